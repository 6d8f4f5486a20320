"""The kernels that run on a GPU run on the emulator too, with the same values."""

from __future__ import annotations

import mlx.core as mx
import pytest
from metal.cases import MAKERS, as_numpy, differences

from zmlx.backend.launch import launcher


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_values_of_the_cases(make):
    told: list[str] = []
    for case in make():
        outputs = launcher(case.definition(), "emulator")(**case.arguments())
        mx.eval(outputs)
        kinds = case.outputs.values()
        for out, truth, (_, dtype) in zip(outputs, case.truths(), kinds, strict=True):
            told += differences(case, as_numpy(out), truth, dtype)
    assert not told, "\n" + "\n".join(told)
