"""Where arrays lie, without a device."""

from __future__ import annotations

import pytest

from zmlx.backend.cuda import addresses


def stand_still(patch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Give arrays the addresses 1, 2, ...; the result's "moved" says whether one has been moved."""
    told = {"moved": False}
    patch.setattr(addresses, "_addresses", lambda arrays: list(range(1, len(arrays) + 1)))
    patch.setattr(addresses, "_watched", lambda _: lambda: told["moved"])
    return told
