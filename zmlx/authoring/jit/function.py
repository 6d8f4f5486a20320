"""`jit`: a scalar Python function as an elementwise function of arrays."""

from __future__ import annotations

import functools
import inspect
import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from zmlx.authoring.jit.definition import Definition, define
from zmlx.authoring.jit.flow import check_paths
from zmlx.authoring.jit.ir import Function, Kind
from zmlx.authoring.jit.kernel import Differentiable, Kernel, integer_of
from zmlx.authoring.jit.lower import lower
from zmlx.authoring.jit.metal import TYPES, Port
from zmlx.authoring.jit.source import JitError
from zmlx.backend.signature import dtype_name

#: Parameters without annotation for which all combinations of kinds are tried.
_TRIED = 6

_FLOATS = (mx.float32, mx.float16, mx.bfloat16)


def _kind_of(dtype: mx.Dtype) -> Kind:
    if dtype in _FLOATS:
        return Kind.FLOAT
    return Kind.BOOL if dtype == mx.bool_ else Kind.INT


class JitFunction:
    """A scalar function compiled for arrays; `jit` makes it.

    Attributes:
        definition: what was read of the Python function.
        __wrapped__: the Python function itself, for numbers.
    """

    def __init__(self, function: types.FunctionType) -> None:
        functools.update_wrapper(self, function)
        self.__wrapped__ = function
        self.definition: Definition = define(function)
        self._count = len(self.definition.parameters)
        self._made: dict[tuple[tuple[mx.Dtype, int], ...], Any] = {}
        self._kernels: dict[tuple[tuple[Port, bool], ...], Differentiable] = {}
        self._kinds = _possible_kinds(self.definition)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Return the function of every element, with the shape of the arguments.

        Args:
            arguments: arrays of one shape and of any float, integer or bool dtype; Python numbers
                and 0-d arrays stand for every element. A parameter with a default may be left out.
            named: the same by name.

        Returns:
            An array, or a list of arrays when the function returns a tuple. A float result has the
            dtype that MLX gives to the float arguments together (Python numbers do not count), and
            is computed in float32; float32 where no argument is a float array. A whole result is
            int32, or int64 when an argument is int64 or uint32; a truth value is bool.

        Raises:
            JitError: the function cannot be compiled for these dtypes.
            ValueError: shapes differ.
            TypeError: an argument is neither an array nor a number, or there are too many.
        """
        try:
            call = self._made.get(tuple([(a.dtype, a.ndim) for a in arguments]))
        except AttributeError:  # a Python number, or something wrong
            call = None
        if call is None or named:
            return self._first_call(arguments, named)
        if len(arguments) > 1:
            first, *others = [a.shape for a in arguments if a.ndim]
            for other in others:
                if other != first:
                    raise ValueError(self._shapes(arguments))
        return call(*arguments)

    def _first_call(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Make the kernel for arguments of new dtypes or dimensions, or with Python numbers."""
        if named or len(arguments) != self._count:
            arguments = self._bound(arguments, named)
        arrays, weak = [], []
        for parameter, argument in zip(self.definition.parameters, arguments, strict=True):
            if isinstance(argument, bool | int | float):
                weak.append(True)
                arrays.append(_number(argument))
            elif isinstance(argument, mx.array):
                weak.append(False)
                arrays.append(argument)
            else:
                raise TypeError(
                    f"{self.definition.name}: `{parameter.name}` is a "
                    f"{type(argument).__name__}; it takes an mx.array or a number"
                )
        if len({array.shape for array in arrays if array.ndim}) > 1:
            raise ValueError(self._shapes(arrays))
        ports = tuple(
            (Port(array.dtype, array.ndim == 0), is_weak)
            for array, is_weak in zip(arrays, weak, strict=True)
        )
        call = self._differentiable(ports).replayed
        if not any(weak):
            shapes = [array.ndim for array in arrays]
            # A shape is only compared where there are two; one alone always fits.
            if len(arrays) == 1 or any(shapes):
                self._made[tuple((a.dtype, a.ndim) for a in arrays)] = call
        return call(*arrays)

    def _bound(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        try:
            bound = inspect.signature(self.__wrapped__).bind(*arguments, **named)
        except TypeError as error:
            raise TypeError(f"{self.definition.name}: {error}") from None
        bound.apply_defaults()
        return bound.args

    def _shapes(self, arrays: Sequence[mx.array]) -> str:
        shown = ", ".join(
            f"{parameter.name} {array.shape}"
            for parameter, array in zip(self.definition.parameters, arrays, strict=True)
        )
        return (
            f"{self.definition.name}: shapes differ ({shown}); only numbers and 0-d arrays "
            "broadcast, use mx.broadcast_to for others"
        )

    def _differentiable(self, ports: tuple[tuple[Port, bool], ...]) -> Differentiable:
        if ports not in self._kernels:
            function = self.typed([port.dtype for port, _ in ports])
            inputs = tuple(port for port, _ in ports)
            strong = [port.dtype for port, weak in ports if not weak and port.dtype in _FLOATS]
            float_dtype = functools.reduce(_promoted, strong) if strong else mx.float32
            dtypes = {
                Kind.BOOL: mx.bool_,
                Kind.INT: integer_of(inputs),
                Kind.FLOAT: float_dtype,
            }
            outputs = tuple(dtypes[kind] for kind in function.results)
            self._kernels[ports] = Differentiable(Kernel(function, inputs, outputs))
        return self._kernels[ports]

    def typed(self, dtypes: Sequence[mx.Dtype]) -> Function:
        """Return the typed form for arguments of these dtypes.

        Raises:
            JitError: there is none.
        """
        kinds = []
        for parameter, dtype in zip(self.definition.parameters, dtypes, strict=True):
            if dtype not in TYPES:
                raise self._misfit(
                    f"`{parameter.name}` is {dtype}, which kernels do not compute in; cast it to "
                    "one of " + ", ".join(dtype_name(known) for known in TYPES)
                )
            kind = _kind_of(dtype)
            if parameter.kind is not None and kind > parameter.kind:
                raise self._misfit(
                    f"`{parameter.name}: {parameter.kind.name.lower()}` is given {dtype}"
                )
            kinds.append(kind if parameter.kind is None else parameter.kind)
        return lower(self.definition, tuple(kinds))

    def _misfit(self, reason: str) -> JitError:
        return self.definition.source.error(self.definition.source.node, reason)

    def source(self, *dtypes: mx.Dtype, gradient: bool = False) -> str:
        """Return the Metal text of the kernel.

        Args:
            dtypes: one for each parameter, or one for all; by default what the function takes:
                float32, or int32 where a parameter must be a whole number.
            gradient: the kernel of the gradients instead.

        Raises:
            JitError: the function cannot be compiled for these dtypes.
            ValueError: the number of dtypes is wrong, or there is no gradient.
        """
        if not dtypes:
            usual = {Kind.FLOAT: mx.float32, Kind.INT: mx.int32, Kind.BOOL: mx.bool_}
            dtypes = tuple(usual[kind] for kind in self._kinds)
        if len(dtypes) == 1:
            dtypes *= self._count
        if len(dtypes) != self._count:
            raise ValueError(f"{len(dtypes)} dtypes for {self._count} parameters")
        made = self._differentiable(tuple((Port(dtype, False), False) for dtype in dtypes))
        if not gradient:
            text = made.kernel.text()
        elif made.gradients is None:
            raise ValueError(f"{self.definition.name} has no float parameter or no float result")
        else:
            text = made.gradients.kernel.text()
        return f"{text.header.strip()}\n\n// one thread per element:\n{text.body}"

    @property
    def metal_source(self) -> str:
        """The Metal text of the kernel, for what the function usually takes."""
        return self.source()

    def __repr__(self) -> str:
        """Return the name, the parameters, where it stands and what it was compiled for."""
        parameters = ", ".join(parameter.name for parameter in self.definition.parameters)
        compiled = sorted({", ".join(dtype_name(p.dtype) for p, _ in key) for key in self._kernels})
        source = self.definition.source
        place = f"{source.filename}:{source.node.lineno}"
        kernels = f"; compiled for {' | '.join(compiled)}" if compiled else ""
        return f"<zmlx.jit {self.definition.name}({parameters}) at {place}{kernels}>"


def _number(value: float | int | bool) -> mx.array:
    """Return a Python number as a 0-d array; a whole one of more than 32 bits is int64."""
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**31) <= value < 2**31:
        return mx.array(value, mx.int64)
    return mx.array(value)


def _promoted(one: mx.Dtype, other: mx.Dtype) -> mx.Dtype:
    return one if one == other else mx.float32


def _possible_kinds(definition: Definition) -> tuple[Kind, ...]:
    """Return the widest kinds of arguments that a function takes.

    Raises:
        JitError: it takes none, so it cannot be compiled.
    """
    check_paths(definition)
    free = [index for index, p in enumerate(definition.parameters) if p.kind is None]
    failure: JitError | None = None
    few = itertools.product((Kind.FLOAT, Kind.INT), repeat=min(len(free), _TRIED))
    for choice in sorted(few, key=lambda kinds: kinds.count(Kind.INT)):
        chosen = dict(zip(free, choice, strict=False))
        kinds = tuple(
            chosen.get(index, Kind.FLOAT) if parameter.kind is None else parameter.kind
            for index, parameter in enumerate(definition.parameters)
        )
        try:
            lower(definition, kinds)
        except JitError as error:
            failure = failure or error
        else:
            return kinds
    assert failure is not None
    raise failure


def jit(function: Callable[..., Any]) -> JitFunction:
    """Compile a scalar Python function into an elementwise kernel with gradients.

    The function is read, not run: arithmetic (`//` and `%` as Python rounds them, `**`),
    comparisons (also chained), `and`, `or`, `not`, conditional expressions, `& | ^ ~` of whole
    numbers, `if`, `for` over `range`, `break`, `continue`, early `return`, locals, tuples assigned
    to names, several results, calls of other jit functions, and mathematical functions by any of
    their names (`math.exp`, `mx.exp`, `np.exp`; `abs`, `min`, `max`, `round`, `int`, `float`,
    `bool`, `pow`; `where`, `clip`). Numbers around the function (globals, closures, attributes of
    modules, defaults) are constants, as they are when it is decorated.

    What differs from Python: floats are float32, whole numbers have 32 bits (64 when an argument
    is int64 or uint32) and wrap around; nothing raises: division of floats by zero is infinite or
    NaN, of whole numbers 0, `min` and `max` keep a NaN; `math.floor`, `math.ceil`, `math.trunc` and
    `round` of a float stay floats, so that large ones are right (`int(...)` makes them whole, the
    nearest that fits, NaN as 0). A local has the widest kind that is assigned to it anywhere.
    `x: int`, `x: float` and `x: bool` fix what a parameter is; others follow the array's dtype.

    The result runs on every backend and under mx.compile, mx.vmap, mx.grad and mx.vjp, gradients of
    gradients included. Gradients are kernels as well, derived by forward accumulation; at corners
    of `abs`, `min` and `max` they are MLX's. On the CPU MLX operations with masks take the kernel's
    place; there a loop whose length is in an array has to be evaluated while the graph is built,
    and runs on the emulator where mx.compile keeps it from that. mx.jvp works on the CPU only: it
    asks the kernel itself, and MLX's custom kernels have no answer.

    Args:
        function: takes one or more numbers, returns one or a tuple of them. Its source must be in
            a file.

    Raises:
        JitError: something in it cannot be compiled; the error has the file, the line, its text
            and the reason.
    """
    if isinstance(function, JitFunction):
        return function
    if not isinstance(function, types.FunctionType):
        raise TypeError(f"jit takes a Python function, not a {type(function).__name__}")
    return JitFunction(function)
