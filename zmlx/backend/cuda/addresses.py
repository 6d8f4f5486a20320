"""Arrays that do not change, given to kernels by address.

What a launch costs the host grows with its inputs: each is looked up while a recorded graph is
replayed, visited when it is evaluated, and noted for the order of kernels; the ten arrays of three
quantized weights cost as much as the launch itself. So launches can be made (`launching`) that take
the arrays which an `Addresses` keeps as one: a table of where they lie.

MLX does not know that such a kernel reads them. They must have been computed, and nothing may write
into them; whoever holds the `Addresses` keeps them alive. And MLX moves an array to other memory
when the host asks for its elements (to save it, say): `Addresses.moved` tells that the tables are
no longer right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx

from zmlx.backend.cuda import library
from zmlx.backend.cuda.ahead import Kernel
from zmlx.backend.cuda.source import CudaSource

#: Arrays whose addresses one launch finds out.
_AT_ONCE = 16
#: The input with the table, and how many addresses it has at least: MLX puts arrays of a few bytes
#: into memory that the host shares.
TABLE = "zmlx_addresses"
_LEAST = 16

_TYPES = {
    mx.bool_: "bool",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.float32: "float",
}


class Addresses:
    """Where some arrays lie.

    Args:
        arrays: computed ones; those with no dimensions, or of a dtype that kernels do not take, are
            passed over, and what is not row contiguous is copied.

    Raises:
        zmlx.backend.extension.NativeUnavailable: nothing can watch them here.
    """

    def __init__(self, arrays: Iterable[mx.array]) -> None:
        given = [array for array in arrays if array.ndim and array.size and array.dtype in _TYPES]
        self._kept = [(array, mx.contiguous(array)) for array in given]
        wholes = [whole for _, whole in self._kept]
        mx.eval(wholes)
        self.moved = _watched(wholes)  # before it is asked where they are
        found = _addresses(wholes)
        self._at = {id(array): at for (array, _), at in zip(self._kept, found, strict=True)}
        self._tables: dict[tuple[int, ...], mx.array] = {}

    def knows(self, array: object) -> bool:
        """Return whether an array is one of these, the very object."""
        return id(array) in self._at

    def table(self, arrays: Sequence[mx.array]) -> mx.array:
        """Return the addresses of some of the arrays, uint64, on the device."""
        at = tuple([self._at[id(array)] for array in arrays])
        if at not in self._tables:
            rows = mx.array([*at, *[0] * (_LEAST - len(at))], mx.uint64)
            # A sum, so that it lies where the device's own arrays do.
            self._tables[at] = rows + mx.array(0, mx.uint64)
            mx.eval(self._tables[at])
        return self._tables[at]


class Forms:
    """The forms of a kernel that take some inputs by address.

    Args:
        make: compiles one from its key, the declarations that go before its body, and the names of
            its inputs.
        asks_about: whether the kernel uses an input's shape, strides or number of dimensions, which
            only an input has.
    """

    def __init__(
        self, make: Callable[[Any, str, list[str]], Any], asks_about: Callable[[str], bool]
    ) -> None:
        self._make = make
        self._asks_about = asks_about
        self._made: dict[tuple[Any, ...], Any] = {}

    def choose(
        self, held: Addresses, key: Any, names: Sequence[str], inputs: Sequence[Any], kernel: Any
    ) -> tuple[Any, Sequence[Any]]:
        """Return a kernel and its inputs: those given, if there are not two addresses to be had."""
        pairs = list(zip(names, inputs, strict=True))
        known = [pair for pair in pairs if held.knows(pair[1]) and not self._asks_about(pair[0])]
        if len(known) < 2:
            return kernel, inputs
        told, arrays = zip(*known, strict=True)
        others = [pair for pair in pairs if pair[0] not in told]
        dtypes = tuple(array.dtype for array in arrays)
        form = (key, told, dtypes)
        if form not in self._made:
            left = [*(name for name, _ in others), TABLE]
            self._made[form] = self._make(key, _declarations(told, dtypes), left)
        return self._made[form], [*(array for _, array in others), held.table(arrays)]


def _watched(arrays: Sequence[mx.array]) -> Callable[[], bool]:
    """Return what tells whether one of some computed arrays has been moved since."""
    moved: Callable[[], bool] = library.load().Places(list(arrays)).moved
    return moved


def _addresses(arrays: Sequence[mx.array]) -> list[int]:
    """Return where arrays lie on the device: a kernel tells what it was given."""
    if not arrays:
        return []
    bytes_of = [array.view(mx.uint8) for array in arrays]
    mx.eval(bytes_of)
    names = [f"array{number}" for number in range(_AT_ONCE)]
    lines = (f"out[{i}] = reinterpret_cast<uint64_t>({n});" for i, n in enumerate(names))
    source = CudaSource("", "\n".join(lines), tuple(names))
    kernel = Kernel("zmlx_addresses", names, ["out"], source, ensure_row_contiguous=False)
    kernel.notice(bytes_of[:1] * _AT_ONCE, [mx.uint64], None)
    found: list[int] = []
    for first in range(0, len(arrays), _AT_ONCE):
        some = bytes_of[first : first + _AT_ONCE]
        [out] = kernel.run(
            inputs=[*some, *[some[0]] * (_AT_ONCE - len(some))],
            output_shapes=[(_AT_ONCE,)],
            output_dtypes=[mx.uint64],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
        )
        found += out.tolist()[: len(some)]
    return found


def _declarations(names: Sequence[str], dtypes: Sequence[mx.Dtype]) -> str:
    """Return what gives arrays in a table their names and types in a kernel's body."""
    lines = [
        f"const {_TYPES[dtype]}* const {name} ="
        f" reinterpret_cast<const {_TYPES[dtype]}*>({TABLE}[{number}]);"
        for number, (name, dtype) in enumerate(zip(names, dtypes, strict=True))
    ]
    return " ".join(lines) + "\n"
