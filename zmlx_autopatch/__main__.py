"""`python -m zmlx_autopatch` prints what the hook has seen in this process, as JSON."""

from __future__ import annotations

import json

import zmlx_autopatch

print(json.dumps(zmlx_autopatch.state()))
