// Every text of MLX's names this namespace; a kernel that uses something of it is left to MLX.
#pragma once

namespace cooperative_groups {}
