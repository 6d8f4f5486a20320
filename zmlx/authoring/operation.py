"""Elementwise operations with their transformations: gradients, tangents and batches.

The forward pass is a kernel and so is the backward pass. Where no gradient was given it is derived
from the formula, and its own gradient from it, so that derivatives of any order are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from zmlx.authoring.formula.algebra import ZERO, product, total
from zmlx.authoring.formula.derive import derivative
from zmlx.authoring.formula.errors import NotDifferentiable
from zmlx.authoring.formula.formula import Formula, derived
from zmlx.authoring.formula.tree import Name, Tree
from zmlx.authoring.pointwise import Pointwise
from zmlx.backend.outputs import alone, together
from zmlx.backend.replay import Replay


class Elementwise:
    """An operation on arrays of one shape, called with them; made by `zmlx.elementwise`.

    Its result has the shape of its arguments and, for floating-point arguments, their dtype. It is
    computed in float32 and rounded once. Whole numbers stay whole, with C's rules for them: 8 and
    16 bits are widened to 32 and cut at the end; a formula of whole numbers whose value is a float
    gives float32, and one of booleans whose value is a number gives int32.

    Attributes:
        name: the kernel's name.
        kernel: its formulas, and the source of each set of dtypes.
    """

    def __init__(
        self,
        kernel: Pointwise,
        gradients: Sequence[Formula] | None = None,
        *,
        cotangents: Sequence[str] = ("g",),
        output: str = "",
        gradient_header: str | None = None,
    ) -> None:
        """Make the operation of a kernel.

        Args:
            kernel: the forward pass.
            gradients: for each variable the gradient, of the kernel's variables, the cotangents
                and the output; None to derive them.
            cotangents: the names of the cotangents in `gradients`.
            output: the name of the kernel's output in `gradients`, where they may use it.
            gradient_header: the header of the backward kernel, when it is another.
        """
        self.name = kernel.name
        self.kernel = kernel
        self._gradients = tuple(gradients) if gradients is not None else None
        self._cotangents = tuple(cotangents)
        self._output = output
        self._gradient_header = kernel.header if gradient_header is None else gradient_header
        #: backward kernels by which variables have a gradient
        self._backward: dict[tuple[bool, ...], Elementwise] = {}
        self._arity = len(kernel.variables)
        function = mx.custom_function(self._forward)
        function.vjp(self._vjp)
        function.jvp(self._jvp)
        function.vmap(self._vmap)
        self._function = function
        self._replay = Replay(function, lambda *given: alone(kernel.launched(given)))

    def __call__(self, *arrays: mx.array) -> Any:
        """Compute the operation, lazily.

        Args:
            arrays: one for each variable, of one shape and of any dtype but float64 and complex64.

        Returns:
            An array of that shape; for kernels with several outputs a tuple of them.

        Raises:
            TypeError: there are too many or too few arguments, or one is no such array.
            ValueError: the shapes differ.
        """
        self._check(arrays)
        return self._replay.in_force(arrays, has_reference=not self.kernel.opaque)

    def __repr__(self) -> str:
        formulas = "; ".join(formula.text for formula in self.kernel.formulas)
        return f"{self.name}({', '.join(self.kernel.variables)}) = {formulas}"

    def source(self, *dtypes: mx.Dtype) -> str:
        """Return the body of the kernel for arguments of these dtypes; float32 when none is given.

        Raises:
            TypeError: as many dtypes as the operation has arguments are needed.
        """
        if dtypes and len(dtypes) != self._arity:
            raise TypeError(f"{self.name}.source takes {self._arity} dtypes; got {len(dtypes)}")
        return self.kernel.plan(dtypes or (mx.float32,) * self._arity).whole.source

    def gradient_source(self) -> str:
        """Return the body of the backward kernel for arguments of float32.

        Raises:
            NotDifferentiable: the operation has no gradient; the text says why.
        """
        return self.backward((True,) * self._arity).source()

    def _check(self, arrays: Sequence[mx.array]) -> None:
        if len(arrays) != self._arity:
            raise TypeError(
                f"{self.name} takes {self._arity} arrays ({', '.join(self.kernel.variables)}); "
                f"got {len(arrays)}"
            )
        shape = None
        for array in arrays:
            if not isinstance(array, mx.array):
                raise TypeError(f"{self.name} takes mx.arrays; got a {type(array).__name__}")
            if shape is None:
                shape = array.shape
            elif array.shape != shape:
                raise ValueError(
                    f"{self.name} takes arrays of one shape and does not broadcast; got shapes "
                    f"{' and '.join(str(a.shape) for a in arrays)}; use mx.broadcast_to before it"
                )

    def _forward(self, *arrays: mx.array) -> Any:
        return alone(self.kernel(arrays))

    def _vjp(self, primals: Any, cotangents: Any, outputs: Any) -> list[mx.array]:
        # MLX gives a lone argument, cotangent or output without a tuple around it.
        arrays, several, values = together(primals), together(cotangents), together(outputs)
        return self._pulled_back(arrays, several, values)

    def _pulled_back(
        self,
        arrays: tuple[mx.array, ...],
        cotangents: tuple[mx.array, ...],
        outputs: tuple[mx.array, ...],
    ) -> list[mx.array]:
        floating = tuple([mx.issubdtype(array.dtype, mx.floating) for array in arrays])
        backward = self.backward(floating)
        known = dict(zip(self.kernel.variables, arrays, strict=True))
        known |= zip(self._names_of_cotangents(), cotangents, strict=True)
        if self._output:
            known[self._output] = outputs[0]
        found = iter(together(backward(*[known[name] for name in backward.kernel.variables])))
        return [
            next(found) if has else mx.zeros_like(array)
            for array, has in zip(arrays, floating, strict=True)
        ]

    def _names_of_cotangents(self) -> tuple[str, ...]:
        """Return the names that the backward kernel has for the cotangents."""
        if self._gradients is not None:
            return self._cotangents
        taken = set(self.kernel.variables)
        count = len(self.kernel.formulas)
        stems = (stem for stem in ("g", "cotangent", "cotangent_of_output") if stem not in taken)
        for stem in stems:
            names = (stem,) if count == 1 else tuple(f"{stem}{i}" for i in range(count))
            if not taken & set(names):
                return names
        raise ValueError(f"{self.name}: rename the variable 'g'; derived gradients need the name")

    def backward(self, floating: tuple[bool, ...]) -> Elementwise:
        """Return the backward kernel for the variables that have a gradient.

        Raises:
            NotDifferentiable: there is none; the text says why.
        """
        found = self._backward.get(floating)
        if found is None:
            found = self._backward[floating] = self._made_backward(floating)
        return found

    def _made_backward(self, floating: tuple[bool, ...]) -> Elementwise:
        cotangents = self._names_of_cotangents()
        wanted = [i for i, has in enumerate(floating) if has]
        if self._gradients is not None:
            formulas = [self._gradients[i] for i in wanted]
        else:
            formulas = [self._derived(self.kernel.variables[i], cotangents) for i in wanted]
        # The first variable gives the number of elements, those with a gradient give its dtype.
        kept = {0, *wanted}
        names = [name for i, name in enumerate(self.kernel.variables) if i in kept]
        others = [name for i, name in enumerate(self.kernel.variables) if i not in kept]
        others += [*cotangents, *([self._output] if self._output else [])]
        names += [name for name in others if any(f.mentions(name) for f in formulas)]
        like = [names.index(self.kernel.variables[i]) for i in wanted]
        kernel = Pointwise(
            f"{self.name}_grad",
            names,
            formulas,
            like=like,
            header=self._gradient_header,
            contiguous=self.kernel.contiguous,
        )
        return Elementwise(kernel)

    def _derived(self, variable: str, cotangents: Sequence[str]) -> Formula:
        result: Tree = ZERO
        for formula, cotangent in zip(self.kernel.formulas, cotangents, strict=True):
            if formula.tree is None:
                raise NotDifferentiable(
                    f"{self.name} has no gradient: {formula.opaque}, so none can be derived; give "
                    "one, as grad_expr or with zmlx.autograd"
                )
            try:
                part = derivative(formula.tree, variable)
            except NotDifferentiable as error:
                raise NotDifferentiable(
                    f"{self.name} has no gradient: {error} (formula: {formula.text}); give one, as "
                    "grad_expr or with zmlx.autograd"
                ) from None
            result = total(result, product(Name(cotangent), part))
        return derived(result)

    def _jvp(self, primals: Any, tangents: Any) -> list[mx.array]:
        """Add up gradients with tangents for cotangents: an element depends on no other one."""
        arrays, moved = together(primals), together(tangents) if tangents is not None else (None,)
        outputs = together(self._function(*arrays))
        results = []
        for k, output in enumerate(outputs):
            result = mx.zeros_like(output)
            for i, tangent in enumerate(moved):
                if tangent is not None:
                    seeds = [mx.zeros_like(other) for other in outputs]
                    seeds[k] = tangent.astype(output.dtype)
                    gradient = self._pulled_back(arrays, tuple(seeds), outputs)[i]
                    result = result + gradient.astype(output.dtype)
            results.append(result)
        return results

    def _vmap(self, arrays: Any, axes: Any) -> tuple[Any, Any]:
        several = together(arrays)
        where = axes if isinstance(axes, tuple) else (axes,)
        size = next(a.shape[i] for a, i in zip(several, where, strict=True) if i is not None)
        moved = [
            mx.broadcast_to(a, (size, *a.shape)) if i is None else mx.moveaxis(a, i, 0)
            for a, i in zip(several, where, strict=True)
        ]
        result = self._function(*moved)
        return result, tuple(0 for _ in result) if isinstance(result, tuple) else 0
