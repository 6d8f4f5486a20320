// Functions of scalars and vectors.
#pragma once

namespace metal {

// float and half have overloads of their own, as in Metal: an integer argument is ambiguous.
#define ZMLX_1(NAME)                                                      \
  float NAME(float);                                                      \
  half NAME(half);                                                        \
  template <typename T, int N, enable_if_t<is_floating_point_v<T>, int> = 0> \
  vec<T, N> NAME(vec<T, N>);
#define ZMLX_2(NAME)                                                      \
  float NAME(float, float);                                               \
  half NAME(half, half);                                                  \
  template <typename T, int N, enable_if_t<is_floating_point_v<T>, int> = 0> \
  vec<T, N> NAME(vec<T, N>, vec<T, N>);
#define ZMLX_3(NAME)                                                      \
  float NAME(float, float, float);                                        \
  half NAME(half, half, half);                                            \
  template <typename T, int N, enable_if_t<is_floating_point_v<T>, int> = 0> \
  vec<T, N> NAME(vec<T, N>, vec<T, N>, vec<T, N>);

#define ZMLX_ELEMENTARY(DO1, DO2, DO3)                                                            \
  DO1(acos) DO1(acosh) DO1(asin) DO1(asinh) DO1(atan) DO1(atanh) DO1(ceil) DO1(cos) DO1(cosh)     \
  DO1(cospi) DO1(exp) DO1(exp10) DO1(exp2) DO1(fabs) DO1(floor) DO1(fract) DO1(log) DO1(log10)    \
  DO1(log2) DO1(rint) DO1(round) DO1(rsqrt) DO1(sin) DO1(sinh) DO1(sinpi) DO1(sqrt) DO1(tan)      \
  DO1(tanh) DO1(tanpi) DO1(trunc) DO1(saturate) DO1(sign)                                         \
  DO2(atan2) DO2(copysign) DO2(divide) DO2(fdim) DO2(fmax) DO2(fmin) DO2(fmod) DO2(pow)           \
  DO2(powr) DO2(step) DO2(nextafter)                                                              \
  DO3(fma) DO3(fmax3) DO3(fmin3) DO3(fmedian3) DO3(mix) DO3(smoothstep)

ZMLX_ELEMENTARY(ZMLX_1, ZMLX_2, ZMLX_3)

// A vector with scalars: clamp(v, 0.0f, 1.0f), mix(a, b, 0.5f), pow(v, 2.0f).
template <typename T, int N, typename U, enable_if_t<zmlx_lane<U, T>, int> = 0>
vec<T, N> pow(vec<T, N>, U);
template <typename T, int N, typename U, enable_if_t<zmlx_lane<U, T>, int> = 0>
vec<T, N> powr(vec<T, N>, U);
template <typename T, int N, typename U, enable_if_t<zmlx_lane<U, T>, int> = 0>
vec<T, N> mix(vec<T, N>, vec<T, N>, U);
template <typename T, int N, typename U, enable_if_t<zmlx_lane<U, T>, int> = 0>
vec<T, N> step(U, vec<T, N>);
template <typename T, int N, typename U, enable_if_t<zmlx_lane<U, T>, int> = 0>
vec<T, N> fmod(vec<T, N>, U);

#define ZMLX_EACH_NUMBER(DO) \
  DO(char) DO(uchar) DO(short) DO(ushort) DO(int) DO(uint) DO(long) DO(ulong) DO(half) DO(float)
#define ZMLX_EACH_INTEGER(DO) \
  DO(char) DO(uchar) DO(short) DO(ushort) DO(int) DO(uint) DO(long) DO(ulong)

#define ZMLX_ORDERED(T)   \
  T max(T, T);            \
  T min(T, T);            \
  T max3(T, T, T);        \
  T min3(T, T, T);        \
  T median3(T, T, T);     \
  T clamp(T, T, T);       \
  T abs(T);
ZMLX_EACH_NUMBER(ZMLX_ORDERED)
#undef ZMLX_ORDERED
#define ZMLX_ORDERED(NAME)                                                          \
  template <typename T, int N>                                                      \
  vec<T, N> NAME(vec<T, N>, vec<T, N>);                                             \
  template <typename T, int N, typename U, enable_if_t<zmlx_lane<U, T>, int> = 0>   \
  vec<T, N> NAME(vec<T, N>, U);                                                     \
  template <typename T, int N, typename U, enable_if_t<zmlx_lane<U, T>, int> = 0>   \
  vec<T, N> NAME(U, vec<T, N>);
ZMLX_ORDERED(max)
ZMLX_ORDERED(min)
#undef ZMLX_ORDERED
template <typename T, int N>
vec<T, N> max3(vec<T, N>, vec<T, N>, vec<T, N>);
template <typename T, int N>
vec<T, N> min3(vec<T, N>, vec<T, N>, vec<T, N>);
template <typename T, int N>
vec<T, N> clamp(vec<T, N>, vec<T, N>, vec<T, N>);
template <
    typename T, int N, typename A, typename B,
    enable_if_t<zmlx_lane<A, T> && zmlx_lane<B, T>, int> = 0>
vec<T, N> clamp(vec<T, N>, A, B);
template <typename T, int N>
vec<T, N> abs(vec<T, N>);

#define ZMLX_INTEGER(T)                      \
  T absdiff(T, T);                           \
  T addsat(T, T);                            \
  T subsat(T, T);                            \
  T clz(T);                                  \
  T ctz(T);                                  \
  T popcount(T);                             \
  T reverse_bits(T);                         \
  T hadd(T, T);                              \
  T rhadd(T, T);                             \
  T mulhi(T, T);                             \
  T madhi(T, T, T);                          \
  T madsat(T, T, T);                         \
  T rotate(T, T);                            \
  T extract_bits(T, uint, uint);             \
  T insert_bits(T, T, uint, uint);
ZMLX_EACH_INTEGER(ZMLX_INTEGER)
#undef ZMLX_INTEGER
#define ZMLX_INTEGER(NAME)                                             \
  template <typename T, int N, enable_if_t<is_integral_v<T>, int> = 0> \
  vec<T, N> NAME(vec<T, N>);
ZMLX_INTEGER(clz)
ZMLX_INTEGER(ctz)
ZMLX_INTEGER(popcount)
ZMLX_INTEGER(reverse_bits)
#undef ZMLX_INTEGER
int mul24(int, int);
uint mul24(uint, uint);
int mad24(int, int, int);
uint mad24(uint, uint, uint);

#define ZMLX_CLASSIFY(NAME) \
  bool NAME(float);         \
  bool NAME(half);          \
  template <typename T, int N, enable_if_t<is_floating_point_v<T>, int> = 0> \
  vec<bool, N> NAME(vec<T, N>);
ZMLX_CLASSIFY(isnan)
ZMLX_CLASSIFY(isinf)
ZMLX_CLASSIFY(isfinite)
ZMLX_CLASSIFY(isnormal)
ZMLX_CLASSIFY(signbit)
#undef ZMLX_CLASSIFY
int ilogb(float);
int ilogb(half);
float ldexp(float, int);
half ldexp(half, int);
bool isordered(float, float);
bool isunordered(float, float);
float sincos(float, thread float&);
half sincos(half, thread half&);
float modf(float, thread float&);
half modf(half, thread half&);
float frexp(float, thread int&);
half frexp(half, thread int&);

#define ZMLX_SELECT(T) T select(T, T, bool);
ZMLX_EACH_NUMBER(ZMLX_SELECT)
ZMLX_SELECT(bool)
ZMLX_SELECT(bfloat)
#undef ZMLX_SELECT
template <typename T, int N>
vec<T, N> select(vec<T, N>, vec<T, N>, vec<bool, N>);
template <typename T, int N>
vec<T, N> select(vec<T, N>, vec<T, N>, bool);
bool all(bool);
bool any(bool);
template <int N>
bool all(vec<bool, N>);
template <int N>
bool any(vec<bool, N>);

template <typename T, int N>
T dot(vec<T, N>, vec<T, N>);
template <typename T>
vec<T, 3> cross(vec<T, 3>, vec<T, 3>);
template <typename T, int N>
T length(vec<T, N>);
template <typename T, int N>
T length_squared(vec<T, N>);
template <typename T, int N>
T distance(vec<T, N>, vec<T, N>);
template <typename T, int N>
T distance_squared(vec<T, N>, vec<T, N>);
template <typename T, int N>
vec<T, N> normalize(vec<T, N>);
template <typename T, int N>
vec<T, N> reflect(vec<T, N>, vec<T, N>);

// fast:: and precise:: are of float.
#define ZMLX_F1(NAME) \
  float NAME(float);  \
  template <int N>    \
  vec<float, N> NAME(vec<float, N>);
#define ZMLX_F2(NAME)       \
  float NAME(float, float); \
  template <int N>          \
  vec<float, N> NAME(vec<float, N>, vec<float, N>);
#define ZMLX_F3(NAME)              \
  float NAME(float, float, float); \
  template <int N>                 \
  vec<float, N> NAME(vec<float, N>, vec<float, N>, vec<float, N>);
#define ZMLX_FLOATS(SPACE)                        \
  namespace SPACE {                               \
  ZMLX_ELEMENTARY(ZMLX_F1, ZMLX_F2, ZMLX_F3)      \
  ZMLX_F1(abs)                                    \
  ZMLX_F2(max)                                    \
  ZMLX_F2(min)                                    \
  ZMLX_F3(max3)                                   \
  ZMLX_F3(min3)                                   \
  ZMLX_F3(clamp)                                  \
  ZMLX_F1(normalize)                              \
  float ldexp(float, int);                        \
  float sincos(float, thread float&);             \
  float modf(float, thread float&);               \
  float frexp(float, thread int&);                \
  template <int N>                                \
  float length(vec<float, N>);                    \
  template <int N>                                \
  float distance(vec<float, N>, vec<float, N>);   \
  }
ZMLX_FLOATS(fast)
ZMLX_FLOATS(precise)

uint pack_float_to_unorm4x8(vec<float, 4>);
uint pack_float_to_snorm4x8(vec<float, 4>);
uint pack_float_to_unorm2x16(vec<float, 2>);
uint pack_float_to_snorm2x16(vec<float, 2>);
uint pack_half_to_unorm4x8(vec<half, 4>);
uint pack_half_to_snorm4x8(vec<half, 4>);
vec<float, 4> unpack_unorm4x8_to_float(uint);
vec<float, 4> unpack_snorm4x8_to_float(uint);
vec<half, 4> unpack_unorm4x8_to_half(uint);
vec<half, 4> unpack_snorm4x8_to_half(uint);
vec<float, 2> unpack_unorm2x16_to_float(uint);
vec<float, 2> unpack_snorm2x16_to_float(uint);

} // namespace metal

// Builtins of Apple's compiler that MLX calls.
#define ZMLX_BUILTIN_1(NAME) float __metal_##NAME(float, bool);
#define ZMLX_BUILTIN_2(NAME) float __metal_##NAME(float, float, bool);
#define ZMLX_BUILTIN_3(NAME) float __metal_##NAME(float, float, float, bool);
ZMLX_ELEMENTARY(ZMLX_BUILTIN_1, ZMLX_BUILTIN_2, ZMLX_BUILTIN_3)
float __metal_fma(float, float, float);
float __metal_nextafter(float, float);
float __metal_ldexp(float, int, bool);
float __metal_frexp(float, thread int*);
