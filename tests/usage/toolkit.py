import zmlx, mlx.core as mx
from zmlx import autograd, elementwise, msl

exp_k = elementwise.unary(name="k_exp", expr="metal::exp(x)", header=msl.DEFAULT_HEADER)
mul = autograd.binary_from_expr(name="k_mul", fwd_expr="a * b", vjp_lhs_expr="g * b", vjp_rhs_expr="g * a")

@zmlx.jit                                            # a scalar Python function becomes a kernel; for, if, locals, math calls
def hard_swish(x):
    r = min(max(x + 3.0, 0.0), 6.0)
    return x * r / 6.0

zmlx.testing.assert_matches(hard_swish, lambda x: x * mx.clip(x + 3, 0, 6) / 6, shapes=[(17,), (8, 1000)])
zmlx.bench.compare({"zmlx": hard_swish, "mlx": lambda x: x * mx.clip(x + 3, 0, 6) / 6}, shapes=[(1024, 4096)])
