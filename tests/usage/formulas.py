import mlx.core as mx
from zmlx.api import elementwise, reduce, map_reduce

softplus = elementwise("log(1 + exp(x))", name="softplus")            # plain math names and metal:: names both work
y = softplus(mx.random.normal((1000,)))

cube = elementwise("x * x * x", name="cube", grad_expr="g * 3 * x * x", use_output=False)
dx = mx.grad(lambda z: cube(z).sum())(mx.random.normal((64,)))       # backward is a kernel too

row_max = reduce(init="-INFINITY", update="max(acc, v)", name="row_max")
m = row_max(mx.random.normal((8, 1000)))                               # over the last axis -> shape (8,)

softmax = map_reduce(
    pass1={"init": "-INFINITY", "update": "max(acc1, x)", "reduce": "max(a, b)"},
    pass2={"init": "0.0f", "update": "acc2 + exp(x - s1)", "reduce": "a + b"},
    write="exp(x - s1) / s2", name="my_softmax", threadgroup="auto")   # "auto": tuned on first call per shape, remembered on disk
p = softmax(mx.random.normal((8, 1000)))
