"""A plugin of pytest: every kernel that the emulator runs gives wrong results.

    pytest -p sabotage --sabotage zeros tests/authoring

Tests that see the results of a kernel must fail then. One that launches kernels and passes all the
same is listed at the end, unless it is marked `structure`: it looks at shapes, errors or calls.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

import zmlx.backend.emulator as emulator


def five_percent(y: mx.array) -> mx.array:
    """Make floats five percent larger, whole numbers one larger and truth values false or true."""
    if mx.issubdtype(y.dtype, mx.inexact):
        return (y * 1.05).astype(y.dtype)
    return mx.logical_not(y) if y.dtype == mx.bool_ else y + mx.array(1, y.dtype)


WAYS = {"zeros": mx.zeros_like, "five percent": five_percent}


class Sabotage:
    """Alters what launches return, and counts them for each test."""

    def __init__(self, way: str) -> None:
        self.alter = WAYS[way]
        self.launches = 0
        self.unnoticed: list[str] = []
        self.tests = 0
        stock = emulator.compiled

        def compiled(definition: Any) -> Any:
            launch = stock(definition)

            def wrong(**arguments: Any) -> list[mx.array]:
                self.launches += 1
                return [self.alter(y) for y in launch(**arguments)]

            return wrong

        emulator.compiled = compiled

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Any:
        self.launches = 0
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: Any) -> Any:
        report = yield
        if report.when == "call" and self.launches:
            self.tests += 1
            if report.passed and item.get_closest_marker("structure") is None:
                self.unnoticed.append(item.nodeid)
        return report

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_line(f"{self.tests} tests saw kernels")
        for name in self.unnoticed:
            terminalreporter.write_line(f"unnoticed: {name}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sabotage", choices=list(WAYS))


def pytest_configure(config: pytest.Config) -> None:
    way = config.getoption("--sabotage")
    if way:
        config.pluginmanager.register(Sabotage(way))
