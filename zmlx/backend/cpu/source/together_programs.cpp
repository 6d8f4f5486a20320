// One unit, because each of these reads MLX's headers: that takes longer than what stands in them.
#include "arithmetic.cpp"
#include "fuse.cpp"
#include "operations.cpp"
#include "program.cpp"
#include "view.cpp"
