// Metal's functions on scalars and vectors. A 16-bit argument is computed in float and rounded.
#pragma once

#include "vectors.cuh"

namespace mlx::core::cu::metal {

// What floating functions compute in: float, also for integers.
template <class T>
using real_t = conditional_t<is_same_v<T, double>, double, float>;
template <class T>
using result_t = conditional_t<is_integral_v<T>, float, T>;

#define ZMLX_REAL(NAME, EXPRESSION)                                                                \
  template <class T>                                                                               \
  auto NAME(T value) {                                                                             \
    return each([](auto e) {                                                                       \
      const float x = static_cast<float>(e);                                                       \
      return static_cast<result_t<decltype(e)>>(EXPRESSION);                                       \
    }, value);                                                                                     \
  }
#define ZMLX_REAL2(NAME, EXPRESSION)                                                               \
  template <class A, class B>                                                                      \
  auto NAME(A first, B second) {                                                                   \
    return together([](auto a, auto b) {                                                           \
      const float x = static_cast<float>(a), y = static_cast<float>(b);                            \
      return static_cast<result_t<mixed_t<decltype(a), decltype(b)>>>(EXPRESSION);                 \
    }, first, second);                                                                             \
  }

#define ZMLX_BOTH(NAME, PRECISE) \
  ZMLX_REAL(NAME, PRECISE)       \
  namespace precise {            \
  using metal::NAME;             \
  }
#define ZMLX_THREE(NAME, PRECISE, FAST) \
  ZMLX_BOTH(NAME, PRECISE)              \
  namespace fast {                      \
  ZMLX_REAL(NAME, FAST)                 \
  }
#define ZMLX_SAME(NAME, PRECISE) \
  ZMLX_BOTH(NAME, PRECISE)       \
  namespace fast {               \
  using metal::NAME;             \
  }
ZMLX_THREE(exp, ::expf(x), ::__expf(x))
ZMLX_THREE(exp10, ::exp10f(x), ::__exp10f(x))
ZMLX_THREE(log, ::logf(x), ::__logf(x))
ZMLX_THREE(log2, ::log2f(x), ::__log2f(x))
ZMLX_THREE(log10, ::log10f(x), ::__log10f(x))
ZMLX_THREE(sin, ::sinf(x), ::__sinf(x))
ZMLX_THREE(cos, ::cosf(x), ::__cosf(x))
ZMLX_THREE(tan, ::tanf(x), ::__tanf(x))
ZMLX_SAME(exp2, ::exp2f(x))
ZMLX_SAME(asin, ::asinf(x))
ZMLX_SAME(acos, ::acosf(x))
ZMLX_SAME(atan, ::atanf(x))
ZMLX_SAME(sinh, ::sinhf(x))
ZMLX_SAME(cosh, ::coshf(x))
ZMLX_SAME(tanh, ::tanhf(x))
ZMLX_SAME(asinh, ::asinhf(x))
ZMLX_SAME(acosh, ::acoshf(x))
ZMLX_SAME(atanh, ::atanhf(x))
ZMLX_SAME(sinpi, ::sinpif(x))
ZMLX_SAME(cospi, ::cospif(x))
ZMLX_SAME(tanpi, ::sinpif(x) / ::cospif(x))
ZMLX_SAME(sqrt, ::sqrtf(x))
ZMLX_SAME(rsqrt, ::rsqrtf(x))
ZMLX_SAME(floor, ::floorf(x))
ZMLX_SAME(ceil, ::ceilf(x))
ZMLX_SAME(round, ::roundf(x))
ZMLX_SAME(rint, ::rintf(x))
ZMLX_SAME(trunc, ::truncf(x))
ZMLX_SAME(fabs, ::fabsf(x))
ZMLX_SAME(fract, ::fminf(x - ::floorf(x), 0x1.fffffep-1f))
ZMLX_SAME(saturate, ::fminf(::fmaxf(x, 0.0f), 1.0f))
ZMLX_REAL(sign, x > 0 ? 1.0f : x < 0 ? -1.0f : x == 0 ? x : 0.0f)
ZMLX_REAL(log1p, ::log1pf(x))

#define ZMLX_BOTH2(NAME, PRECISE, FAST) \
  ZMLX_REAL2(NAME, PRECISE)             \
  namespace precise {                   \
  using metal::NAME;                    \
  }                                     \
  namespace fast {                      \
  ZMLX_REAL2(NAME, FAST)                \
  }
ZMLX_BOTH2(pow, ::powf(x, y), ::__powf(x, y))
ZMLX_BOTH2(powr, ::powf(x, y), ::__powf(x, y))
ZMLX_BOTH2(divide, x / y, ::__fdividef(x, y))
ZMLX_BOTH2(fmod, ::fmodf(x, y), ::fmodf(x, y))
ZMLX_BOTH2(fmin, ::fminf(x, y), ::fminf(x, y))
ZMLX_BOTH2(fmax, ::fmaxf(x, y), ::fmaxf(x, y))
ZMLX_BOTH2(fdim, ::fdimf(x, y), ::fdimf(x, y))
ZMLX_BOTH2(atan2, ::atan2f(x, y), ::atan2f(x, y))
ZMLX_BOTH2(copysign, ::copysignf(x, y), ::copysignf(x, y))
ZMLX_REAL2(hypot, ::hypotf(x, y))
ZMLX_REAL2(step, y < x ? 0.0f : 1.0f)
ZMLX_REAL2(nextafter, ::nextafterf(x, y))

// Smaller and larger: of floats the one that is a number, as fmin and fmax.
template <class A, class B>
constexpr auto smaller(A a, B b) {
  using R = mixed_t<A, B>;
  const R x = static_cast<R>(a), y = static_cast<R>(b);
  if constexpr (is_integral_v<R>) return y < x ? y : x;
  else return static_cast<R>(::fminf(x, y));
}
template <class A, class B>
constexpr auto larger(A a, B b) {
  using R = mixed_t<A, B>;
  const R x = static_cast<R>(a), y = static_cast<R>(b);
  if constexpr (is_integral_v<R>) return x < y ? y : x;
  else return static_cast<R>(::fmaxf(x, y));
}
#define ZMLX_EACH2(NAME, EXPRESSION)                                                     \
  template <class A, class B>                                                            \
  constexpr auto NAME(A first, B second) {                                               \
    return together([](auto a, auto b) { return EXPRESSION; }, first, second);           \
  }
#define ZMLX_EACH3(NAME, EXPRESSION)                                                     \
  template <class A, class B, class C>                                                   \
  constexpr auto NAME(A first, B second, C third) {                                      \
    return together([](auto a, auto b, auto c) { return EXPRESSION; }, first, second, third); \
  }
ZMLX_EACH2(min, smaller(a, b))
ZMLX_EACH2(max, larger(a, b))
ZMLX_EACH3(min3, smaller(smaller(a, b), c))
ZMLX_EACH3(max3, larger(larger(a, b), c))
ZMLX_EACH3(median3, larger(smaller(a, b), smaller(larger(a, b), c)))
ZMLX_EACH3(clamp, smaller(larger(a, b), c))
namespace precise {
using metal::clamp;
using metal::max;
using metal::min;
}
namespace fast {
using metal::clamp;
using metal::max;
using metal::min;
}

template <class A, class B, class C>
auto fused(A a, B b, C c) {
  using R = mixed_t<mixed_t<A, B>, C>;
  if constexpr (is_small_v<R>) {
    return R(__hfma(R(a).native(), R(b).native(), R(c).native()));
  } else if constexpr (is_integral_v<R>) {
    return R(a * b + c);
  } else {
    return ::fmaf(static_cast<float>(a), static_cast<float>(b), static_cast<float>(c));
  }
}
ZMLX_EACH3(fma, fused(a, b, c))
ZMLX_EACH3(mad, fused(a, b, c))
ZMLX_EACH3(mix, (a + (b - a) * c))
ZMLX_EACH3(select, (c ? b : a))
namespace precise {
using metal::fma;
}
namespace fast {
using metal::fma;
}
template <class A, class B, class C>
auto smoothstep(A low, B high, C x) {
  auto t = saturate((x - low) / (high - low));
  return t * t * (decltype(t)(3) - decltype(t)(2) * t);
}

template <class T>
auto abs(T value) {
  return each([](auto e) {
    using E = decltype(e);
    if constexpr (is_integral_v<E>) return E(e < 0 ? -e : e);
    else return E(::fabsf(e));
  }, value);
}

#define ZMLX_TEST(NAME, EXPRESSION)                                                                \
  template <class T>                                                                               \
  auto NAME(T value) {                                                                             \
    return each([](auto e) {                                                                       \
      const float x = static_cast<float>(e);                                                       \
      return bool(EXPRESSION);                                                                     \
    }, value);                                                                                     \
  }
ZMLX_TEST(isnan, x != x)
ZMLX_TEST(isinf, ::fabsf(x) == INFINITY)
ZMLX_TEST(isfinite, ::fabsf(x) < INFINITY)
ZMLX_TEST(signbit, as_type<uint>(x) >> 31)
template <class T>
auto isnormal(T value) {
  return each([](auto e) {
    return isfinite(e) && ::fabsf(e) >= static_cast<float>(numeric_limits<decltype(e)>::min());
  }, value);
}
template <class A, class B>
auto isunordered(A a, B b) { return isnan(a) || isnan(b); }
template <class A, class B>
auto isordered(A a, B b) { return !isunordered(a, b); }

template <class T>
T sincos(T x, T& cosine) {
  cosine = cos(x);
  return sin(x);
}
template <class T>
T modf(T value, T& whole) {
  whole = trunc(value);
  return copysign(each([](auto e) { return isinf(e) ? decltype(e)(0) : e; }, value - whole), value);
}
template <class T>
T frexp(T value, int& exponent) { return T(::frexpf(static_cast<float>(value), &exponent)); }
template <class T, int N>
vec<T, N> frexp(vec<T, N> value, vec<int, N>& exponent) {
  for (int i = 0; i < N; ++i) value[i] = frexp(value[i], exponent[i]);
  return value;
}
template <class T, class E>
auto ldexp(T value, E exponent) {
  return together([](auto x, auto k) { return static_cast<decltype(x)>(::ldexpf(x, k)); }, value,
                  exponent);
}
template <class T>
auto ilogb(T value) {
  return each([](auto e) { return ::ilogbf(static_cast<float>(e)); }, value);
}

// ---- integers ------------------------------------------------------------------------------------

#define ZMLX_INTEGER(NAME, EXPRESSION)                                                             \
  template <class T>                                                                               \
  auto NAME(T value) {                                                                             \
    return each([](auto e) {                                                                       \
      using E = decltype(e);                                                                       \
      constexpr int n = 8 * sizeof(E);                                                             \
      const ulong x = static_cast<make_unsigned_t<E>>(e);                                          \
      return static_cast<E>(EXPRESSION);                                                           \
    }, value);                                                                                     \
  }
ZMLX_INTEGER(popcount, ::__popcll(x))
ZMLX_INTEGER(clz, ::__clzll(x) - (64 - n))
ZMLX_INTEGER(ctz, x ? ::__ffsll(x) - 1 : n)
ZMLX_INTEGER(reverse_bits, ::__brevll(x) >> (64 - n))
ZMLX_EACH2(absdiff, static_cast<make_unsigned_t<decltype(a)>>(
    a < b ? static_cast<make_unsigned_t<decltype(a)>>(b) - a
          : static_cast<make_unsigned_t<decltype(a)>>(a) - b))
ZMLX_EACH2(hadd, static_cast<decltype(a)>((a >> 1) + (b >> 1) + (a & b & 1)))
ZMLX_EACH2(rhadd, static_cast<decltype(a)>((a >> 1) + (b >> 1) + ((a | b) & 1)))

template <class T>
T turned(T value, T by) {
  using U = make_unsigned_t<T>;
  constexpr int n = 8 * sizeof(T);
  const int k = static_cast<int>(by & (n - 1));
  const U u = static_cast<U>(value);
  return static_cast<T>(k ? U(u << k) | U(u >> (n - k)) : u);
}
ZMLX_EACH2(rotate, turned(a, static_cast<decltype(a)>(b)))

// Sums that stop at the ends of their type.
template <class T>
T add_within(T a, T b) {
  using U = make_unsigned_t<T>;
  const T sum = static_cast<T>(U(a) + U(b));
  if constexpr (is_signed_v<T>) {
    const bool wrapped = T((a ^ sum) & (b ^ sum)) < 0;
    return !wrapped ? sum : a < 0 ? numeric_limits<T>::min() : numeric_limits<T>::max();
  } else {
    return sum < a ? numeric_limits<T>::max() : sum;
  }
}
template <class T>
T subtract_within(T a, T b) {
  using U = make_unsigned_t<T>;
  const T rest = static_cast<T>(U(a) - U(b));
  if constexpr (is_signed_v<T>) {
    const bool wrapped = T((a ^ b) & (a ^ rest)) < 0;
    return !wrapped ? rest : a < 0 ? numeric_limits<T>::min() : numeric_limits<T>::max();
  } else {
    return a < b ? T(0) : rest;
  }
}
ZMLX_EACH2(addsat, add_within(a, static_cast<decltype(a)>(b)))
ZMLX_EACH2(subsat, subtract_within(a, static_cast<decltype(a)>(b)))

template <class T>
T upper_half(T a, T b) {
  if constexpr (sizeof(T) == 8) {
    return is_signed_v<T> ? T(::__mul64hi(a, b)) : T(::__umul64hi(a, b));
  } else {
    return static_cast<T>((static_cast<long>(a) * static_cast<long>(b)) >> (8 * sizeof(T)));
  }
}
ZMLX_EACH2(mulhi, upper_half(a, static_cast<decltype(a)>(b)))
ZMLX_EACH3(madhi, static_cast<decltype(a)>(upper_half(a, static_cast<decltype(a)>(b)) + c))

template <class T>
T low24(T x) { return static_cast<T>(x << 8) >> 8; }
ZMLX_EACH2(mul24, low24(a) * low24(b))
ZMLX_EACH3(mad24, low24(a) * low24(b) + c)

template <class T>
auto extract_bits(T value, uint offset, uint bits) {
  return each([=](auto e) {
    using E = decltype(e);
    if (bits == 0) return E(0);
    const int left = 8 * sizeof(E) - bits - offset;
    const E up = static_cast<E>(static_cast<make_unsigned_t<E>>(e) << left);
    return static_cast<E>(up >> (8 * sizeof(E) - bits));
  }, value);
}
template <class T>
auto insert_bits(T base, T from, uint offset, uint bits) {
  return together([=](auto b, auto f) {
    using U = make_unsigned_t<decltype(b)>;
    const U mask = bits == 8 * sizeof(U) ? U(~U(0)) : U(((U(1) << bits) - 1) << offset);
    return static_cast<decltype(b)>((U(b) & ~mask) | (U(U(f) << offset) & mask));
  }, base, from);
}

// ---- whole vectors -------------------------------------------------------------------------------

template <int N>
bool any(vec<bool, N> v) {
  bool r = false;
  for (int i = 0; i < N; ++i) r = r || v[i];
  return r;
}
template <int N>
bool all(vec<bool, N> v) {
  bool r = true;
  for (int i = 0; i < N; ++i) r = r && v[i];
  return r;
}
constexpr bool any(bool v) { return v; }
constexpr bool all(bool v) { return v; }

// Wide enough to add products in.
template <class T>
using sum_t = conditional_t<is_small_v<T>, float, T>;
template <class T, int N>
T dot(vec<T, N> a, vec<T, N> b) {
  sum_t<T> r = sum_t<T>(a[0]) * sum_t<T>(b[0]);
  for (int i = 1; i < N; ++i) r += sum_t<T>(a[i]) * sum_t<T>(b[i]);
  return T(r);
}
template <class T, int N>
T length_squared(vec<T, N> v) { return dot(v, v); }
template <class T, int N>
T length(vec<T, N> v) { return sqrt(dot(v, v)); }
template <class T, int N>
T distance(vec<T, N> a, vec<T, N> b) { return length(a - b); }
template <class T, int N>
T distance_squared(vec<T, N> a, vec<T, N> b) { return length_squared(a - b); }
template <class T, int N>
vec<T, N> normalize(vec<T, N> v) { return v * rsqrt(dot(v, v)); }
template <class T>
vec<T, 3> cross(vec<T, 3> a, vec<T, 3> b) {
  return vec<T, 3>(a.y * b.z - a.z * b.y, a.z * b.x - a.x * b.z, a.x * b.y - a.y * b.x);
}

#undef ZMLX_REAL
#undef ZMLX_REAL2
#undef ZMLX_BOTH
#undef ZMLX_BOTH2
#undef ZMLX_SAME
#undef ZMLX_THREE
#undef ZMLX_EACH2
#undef ZMLX_EACH3
#undef ZMLX_TEST
#undef ZMLX_INTEGER

}  // namespace mlx::core::cu::metal
