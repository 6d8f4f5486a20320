"""Tests here need clang: elsewhere they are skipped with the reason, in CI they fail."""

from __future__ import annotations

import os

import pytest

from zmlx.backend import strict


@pytest.fixture(scope="session", autouse=True)
def _clang():
    try:
        strict.find()
    except strict.ClangUnavailable as missing:
        # In CI nobody reads what was skipped.
        stop = pytest.fail if os.environ.get("CI") else pytest.skip
        stop(str(missing))
