"""Assertions for kernels: values and gradients against a reference, with the worst element named.

    zmlx.testing.assert_matches(softplus, lambda x: mx.logaddexp(x, 0), shapes=[(17,), (8, 1000)])

What counts as equal is said in `zmlx.testing.difference`, what the inputs are in
`zmlx.testing.inputs`.
"""

from zmlx.testing.assertions import assert_gradient_matches, assert_matches

__all__ = ["assert_gradient_matches", "assert_matches"]
