"""Metal text that authors share: a header of small functions, and the geometry of a launch."""

from __future__ import annotations

from dataclasses import dataclass

#: Functions for kernels; both are also known to formulas, with their derivatives.
#: kk_sigmoid(x) = 1 / (1 + exp(-x)), kk_silu(x) = x kk_sigmoid(x), for every floating-point type,
#: computed in float32.
DEFAULT_HEADER = """\
template <typename T>
inline T kk_sigmoid(T x) {
  return static_cast<T>(1.0f / (1.0f + metal::precise::exp(-static_cast<float>(x))));
}

template <typename T>
inline T kk_silu(T x) {
  const float value = static_cast<float>(x);
  return static_cast<T>(value / (1.0f + metal::precise::exp(-value)));
}
"""


@dataclass(frozen=True)
class Launch2D:
    """A launch over two axes, as a kernel's call takes it.

    Attributes:
        grid: threads along x, y and z; not threadgroups.
        threadgroup: threads of one threadgroup along x, y and z.
    """

    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]

    @classmethod
    def covering(cls, width: int, height: int, threadgroup: tuple[int, int] = (32, 8)) -> Launch2D:
        """Return a launch of width times height threads.

        Args:
            width: threads along x.
            height: threads along y.
            threadgroup: threads of a threadgroup along x and y; at most 1,024 together.

        Raises:
            ValueError: a number is not positive, or the threadgroup has more than 1,024 threads.
        """
        x, y = threadgroup
        if min(width, height, x, y) < 1 or x * y > 1024:
            raise ValueError(
                f"a launch of {width} x {height} threads in groups of {x} x {y}: numbers must be "
                "positive, and a threadgroup holds at most 1,024 threads"
            )
        return cls((width, height, 1), (x, y, 1))
