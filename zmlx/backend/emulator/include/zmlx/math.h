// The mathematical functions of Metal. half and bfloat are computed in float and rounded once;
// metal::fast and metal::precise are the same here.
#pragma once

#include <zmlx/vectors.h>

// What the names below would hide in their own namespace.
namespace zmlx {

inline float rsqrt(float x) {
  return 1.0f / __builtin_sqrtf(x);
}
inline float exp10(float x) {
  return __builtin_powf(10.0f, x);
}
inline float saturate(float x) {
  return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; // NaN gives 0
}
inline float sign(float x) {
  return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x == 0.0f ? x : 0.0f;
}
inline float fract(float x) {
  const float part = x - __builtin_floorf(x);
  return part < 1.0f ? part : 0x1.fffffep-1f;
}
inline float sinpi(float x) {
  const float turn = x - 2.0f * __builtin_roundf(x * 0.5f); // exact
  return float(__builtin_sin(double(turn) * __builtin_acos(-1.0)));
}
inline float cospi(float x) {
  const float turn = x - 2.0f * __builtin_roundf(x * 0.5f);
  return float(__builtin_cos(double(turn) * __builtin_acos(-1.0)));
}
inline float tanpi(float x) {
  return sinpi(x) / cospi(x);
}
inline float pow(float x, float y) {
  return __builtin_powf(x, y);
}
inline float min3(float x, float y, float z) {
  return __builtin_fminf(x, __builtin_fminf(y, z));
}
inline float max3(float x, float y, float z) {
  return __builtin_fmaxf(x, __builtin_fmaxf(y, z));
}
inline float median3(float x, float y, float z) {
  return __builtin_fmaxf(
      __builtin_fminf(x, y), __builtin_fminf(__builtin_fmaxf(x, y), z));
}
inline float clamp(float x, float least, float most) {
  return __builtin_fminf(__builtin_fmaxf(x, least), most);
}
inline float mix(float x, float y, float a) {
  return x + (y - x) * a;
}
inline float step(float edge, float x) {
  return x < edge ? 0.0f : 1.0f;
}
inline float smoothstep(float from, float to, float x) {
  const float t = clamp((x - from) / (to - from), 0.0f, 1.0f);
  return t * t * (3.0f - 2.0f * t);
}
inline float divide(float x, float y) {
  return x / y;
}

} // namespace zmlx

namespace metal {

// Of floats, of the 16-bit types by way of float, of vectors by component.
#define ZMLX_UNARY(name, function)            \
  inline float name(float x) {                \
    return function(x);                       \
  }                                           \
  inline half name(half x) {                  \
    return half(function(float(x)));          \
  }                                           \
  inline bfloat name(bfloat x) {              \
    return bfloat(function(float(x)));        \
  }                                           \
  template <zmlx::Vector A>                   \
    requires is_floating_point_v<zmlx::element_of<A>> \
  auto name(const A& a) {                     \
    return zmlx::each(a, [](auto x) { return name(x); }); \
  }
#define ZMLX_BINARY(name, function)                  \
  inline float name(float x, float y) {              \
    return function(x, y);                           \
  }                                                  \
  inline half name(half x, half y) {                 \
    return half(function(float(x), float(y)));       \
  }                                                  \
  inline bfloat name(bfloat x, bfloat y) {           \
    return bfloat(function(float(x), float(y)));     \
  }                                                  \
  template <zmlx::Vector A, zmlx::Vector B>          \
    requires is_floating_point_v<zmlx::element_of<A>> \
  auto name(const A& a, const B& b) {                \
    return zmlx::each(a, b, [](auto x, auto y) { return name(x, y); }); \
  }                                                  \
  template <zmlx::Vector A, zmlx::Number B>          \
    requires is_floating_point_v<zmlx::element_of<A>> \
  auto name(const A& a, const B& b) {                \
    using T = zmlx::element_of<A>;                   \
    return zmlx::each(a, [y = T(b)](T x) { return name(x, y); }); \
  }
#define ZMLX_TERNARY(name, function)                 \
  inline float name(float x, float y, float z) {     \
    return function(x, y, z);                        \
  }                                                  \
  inline half name(half x, half y, half z) {         \
    return half(function(float(x), float(y), float(z))); \
  }                                                  \
  inline bfloat name(bfloat x, bfloat y, bfloat z) { \
    return bfloat(function(float(x), float(y), float(z))); \
  }                                                  \
  template <zmlx::Vector A, zmlx::Vector B, zmlx::Vector C> \
    requires is_floating_point_v<zmlx::element_of<A>> \
  auto name(const A& a, const B& b, const C& c) {    \
    return zmlx::each(a, b, c, [](auto x, auto y, auto z) { return name(x, y, z); }); \
  }

#define ZMLX_MATH                           \
  ZMLX_UNARY(fabs, __builtin_fabsf)         \
  ZMLX_UNARY(acos, __builtin_acosf)         \
  ZMLX_UNARY(acosh, __builtin_acoshf)       \
  ZMLX_UNARY(asin, __builtin_asinf)         \
  ZMLX_UNARY(asinh, __builtin_asinhf)       \
  ZMLX_UNARY(atan, __builtin_atanf)         \
  ZMLX_UNARY(atanh, __builtin_atanhf)       \
  ZMLX_UNARY(ceil, __builtin_ceilf)         \
  ZMLX_UNARY(cos, __builtin_cosf)           \
  ZMLX_UNARY(cosh, __builtin_coshf)         \
  ZMLX_UNARY(cospi, zmlx::cospi)            \
  ZMLX_UNARY(exp, __builtin_expf)           \
  ZMLX_UNARY(exp2, __builtin_exp2f)         \
  ZMLX_UNARY(exp10, zmlx::exp10)            \
  ZMLX_UNARY(floor, __builtin_floorf)       \
  ZMLX_UNARY(fract, zmlx::fract)            \
  ZMLX_UNARY(log, __builtin_logf)           \
  ZMLX_UNARY(log2, __builtin_log2f)         \
  ZMLX_UNARY(log10, __builtin_log10f)       \
  ZMLX_UNARY(rint, __builtin_rintf)         \
  ZMLX_UNARY(round, __builtin_roundf)       \
  ZMLX_UNARY(rsqrt, zmlx::rsqrt)            \
  ZMLX_UNARY(saturate, zmlx::saturate)      \
  ZMLX_UNARY(sign, zmlx::sign)              \
  ZMLX_UNARY(sin, __builtin_sinf)           \
  ZMLX_UNARY(sinh, __builtin_sinhf)         \
  ZMLX_UNARY(sinpi, zmlx::sinpi)            \
  ZMLX_UNARY(sqrt, __builtin_sqrtf)         \
  ZMLX_UNARY(tan, __builtin_tanf)           \
  ZMLX_UNARY(tanh, __builtin_tanhf)         \
  ZMLX_UNARY(tanpi, zmlx::tanpi)            \
  ZMLX_UNARY(trunc, __builtin_truncf)       \
  ZMLX_BINARY(atan2, __builtin_atan2f)      \
  ZMLX_BINARY(copysign, __builtin_copysignf) \
  ZMLX_BINARY(divide, zmlx::divide)         \
  ZMLX_BINARY(fdim, __builtin_fdimf)        \
  ZMLX_BINARY(fmax, __builtin_fmaxf)        \
  ZMLX_BINARY(fmin, __builtin_fminf)        \
  ZMLX_BINARY(fmod, __builtin_fmodf)        \
  ZMLX_BINARY(nextafter, __builtin_nextafterf) \
  ZMLX_BINARY(pow, __builtin_powf)          \
  ZMLX_BINARY(powr, __builtin_powf)         \
  ZMLX_BINARY(step, zmlx::step)             \
  ZMLX_TERNARY(fma, __builtin_fmaf)         \
  ZMLX_TERNARY(fmin3, zmlx::min3)           \
  ZMLX_TERNARY(fmax3, zmlx::max3)           \
  ZMLX_TERNARY(fmedian3, zmlx::median3)     \
  ZMLX_TERNARY(mix, zmlx::mix)              \
  ZMLX_TERNARY(smoothstep, zmlx::smoothstep)

// Also of whole numbers: min, max, abs, clamp.
#define ZMLX_WHOLE(T)                        \
  inline T min(T x, T y) {                   \
    return y < x ? y : x;                    \
  }                                          \
  inline T max(T x, T y) {                   \
    return x < y ? y : x;                    \
  }                                          \
  inline T clamp(T x, T least, T most) {     \
    return min(max(x, least), most);         \
  }                                          \
  inline T min3(T x, T y, T z) {             \
    return min(x, min(y, z));                \
  }                                          \
  inline T max3(T x, T y, T z) {             \
    return max(x, max(y, z));                \
  }                                          \
  inline T median3(T x, T y, T z) {          \
    return max(min(x, y), min(max(x, y), z)); \
  }
#define ZMLX_SIGNED(T) \
  ZMLX_WHOLE(T)        \
  inline T abs(T x) {  \
    return x < 0 ? T(-x) : x; \
  }
#define ZMLX_UNSIGNED(T) \
  ZMLX_WHOLE(T)          \
  inline T abs(T x) {    \
    return x;            \
  }
#define ZMLX_WHOLE_MATH         \
  ZMLX_SIGNED(int8_t)           \
  ZMLX_UNSIGNED(uint8_t)        \
  ZMLX_SIGNED(int16_t)          \
  ZMLX_UNSIGNED(uint16_t)       \
  ZMLX_SIGNED(int32_t)          \
  ZMLX_UNSIGNED(uint32_t)       \
  ZMLX_SIGNED(int64_t)          \
  ZMLX_UNSIGNED(uint64_t)       \
  ZMLX_UNARY(abs, __builtin_fabsf)     \
  ZMLX_BINARY(min, __builtin_fminf)    \
  ZMLX_BINARY(max, __builtin_fmaxf)    \
  ZMLX_TERNARY(clamp, zmlx::clamp)     \
  ZMLX_TERNARY(min3, zmlx::min3)       \
  ZMLX_TERNARY(max3, zmlx::max3)       \
  ZMLX_TERNARY(median3, zmlx::median3) \
  template <zmlx::Vector A, zmlx::Vector B> \
    requires(!is_floating_point_v<zmlx::element_of<A>>) \
  auto min(const A& a, const B& b) {   \
    return zmlx::each(a, b, [](auto x, auto y) { return min(x, y); }); \
  }                                    \
  template <zmlx::Vector A, zmlx::Vector B> \
    requires(!is_floating_point_v<zmlx::element_of<A>>) \
  auto max(const A& a, const B& b) {   \
    return zmlx::each(a, b, [](auto x, auto y) { return max(x, y); }); \
  }                                    \
  template <zmlx::Vector A>            \
    requires(!is_floating_point_v<zmlx::element_of<A>>) \
  auto abs(const A& a) {               \
    return zmlx::each(a, [](auto x) { return abs(x); }); \
  }                                    \
  template <zmlx::Vector A, zmlx::Vector B, zmlx::Vector C> \
    requires(!is_floating_point_v<zmlx::element_of<A>>) \
  auto clamp(const A& a, const B& least, const C& most) { \
    return zmlx::each(a, least, most, [](auto x, auto y, auto z) { return clamp(x, y, z); }); \
  }                                    \
  template <zmlx::Vector A>            \
  auto clamp(const A& a, zmlx::element_of<A> least, zmlx::element_of<A> most) { \
    return zmlx::each(a, [=](auto x) { return clamp(x, least, most); }); \
  }                                    \
  template <zmlx::Vector A, zmlx::Vector B> \
  auto mix(const A& a, const B& b, zmlx::element_of<A> t) { \
    return zmlx::each(a, b, [=](auto x, auto y) { return mix(x, y, t); }); \
  }

ZMLX_MATH
ZMLX_WHOLE_MATH

namespace fast {
ZMLX_MATH
ZMLX_WHOLE_MATH
} // namespace fast

namespace precise {
ZMLX_MATH
ZMLX_WHOLE_MATH
} // namespace precise

#undef ZMLX_WHOLE_MATH
#undef ZMLX_UNSIGNED
#undef ZMLX_SIGNED
#undef ZMLX_WHOLE
#undef ZMLX_MATH
#undef ZMLX_TERNARY
#undef ZMLX_BINARY
#undef ZMLX_UNARY

// Questions about numbers.
#define ZMLX_QUESTION(name, question)       \
  inline bool name(float x) {               \
    return question;                        \
  }                                         \
  inline bool name(half y) {                \
    const float x = y;                      \
    return question;                        \
  }                                         \
  inline bool name(bfloat y) {              \
    const float x = y;                      \
    return question;                        \
  }                                         \
  template <zmlx::Vector A>                 \
  auto name(const A& a) {                   \
    return zmlx::each(a, [](auto x) { return name(x); }); \
  }
ZMLX_QUESTION(isnan, __builtin_isnan(x))
ZMLX_QUESTION(isinf, __builtin_isinf(x) != 0)
ZMLX_QUESTION(isfinite, __builtin_isfinite(x))
ZMLX_QUESTION(isnormal, __builtin_isnormal(x))
ZMLX_QUESTION(signbit, __builtin_signbit(x) != 0)
#undef ZMLX_QUESTION

inline bool isunordered(float x, float y) {
  return __builtin_isunordered(x, y);
}
inline bool isordered(float x, float y) {
  return !__builtin_isunordered(x, y);
}

// More results than one.
#define ZMLX_SEVERAL(T)                             \
  inline T sincos(T x, T& cosine) {                 \
    cosine = cos(x);                                \
    return sin(x);                                  \
  }                                                 \
  inline T modf(T x, T& whole) {                    \
    whole = trunc(x);                               \
    return T(float(x) - float(whole));              \
  }                                                 \
  inline T frexp(T x, int& exponent) {              \
    int found = 0;                                  \
    const float fraction = __builtin_frexpf(float(x), &found); \
    exponent = found;                               \
    return T(fraction);                             \
  }                                                 \
  inline T ldexp(T x, int exponent) {               \
    return T(__builtin_ldexpf(float(x), exponent)); \
  }                                                 \
  inline int ilogb(T x) {                           \
    return __builtin_ilogbf(float(x));              \
  }
ZMLX_SEVERAL(float)
ZMLX_SEVERAL(half)
ZMLX_SEVERAL(bfloat)
namespace fast {
using metal::sincos;
}
namespace precise {
using metal::sincos;
}
#undef ZMLX_SEVERAL

template <class T>
T select(T otherwise, T chosen, bool condition) {
  return condition ? chosen : otherwise;
}
template <zmlx::Vector A, zmlx::Vector B, zmlx::Vector C>
auto select(const A& otherwise, const B& chosen, const C& condition) {
  using T = zmlx::element_of<A>;
  return zmlx::each(
      otherwise, chosen, condition, [](T x, T y, bool chooses) { return chooses ? y : x; });
}
inline bool any(bool x) {
  return x;
}
inline bool all(bool x) {
  return x;
}
template <int N>
bool any(vec<bool, N> v) {
  bool found = false;
  for (int i = 0; i < N; ++i) {
    found |= v[i];
  }
  return found;
}
template <int N>
bool all(vec<bool, N> v) {
  bool held = true;
  for (int i = 0; i < N; ++i) {
    held &= v[i];
  }
  return held;
}

// Geometry.
template <zmlx::Vector A, zmlx::Vector B>
auto dot(const A& a, const B& b) {
  const auto product = a * b;
  auto sum = product[0];
  for (int i = 1; i < zmlx::count_of<A>; ++i) {
    sum += product[i];
  }
  return sum;
}
template <zmlx::Vector A>
auto length_squared(const A& a) {
  return dot(a, a);
}
template <zmlx::Vector A>
auto length(const A& a) {
  return sqrt(dot(a, a));
}
template <zmlx::Vector A, zmlx::Vector B>
auto distance(const A& a, const B& b) {
  return length(a - b);
}
template <zmlx::Vector A>
auto normalize(const A& a) {
  return a * rsqrt(dot(a, a));
}
template <zmlx::Vector A, zmlx::Vector B>
  requires(zmlx::count_of<A> == 3 && zmlx::count_of<B> == 3)
auto cross(const A& a, const B& b) {
  using T = zmlx::element_of<A>;
  return vec<T, 3>(
      T(a[1] * b[2] - a[2] * b[1]), T(a[2] * b[0] - a[0] * b[2]), T(a[0] * b[1] - a[1] * b[0]));
}

// Bits of whole numbers.
template <zmlx::Whole T>
T popcount(T x) {
  return T(__builtin_popcountll(std::make_unsigned_t<T>(x)));
}
template <zmlx::Whole T>
T clz(T x) {
  const auto bits = std::make_unsigned_t<T>(x);
  return bits == 0 ? T(sizeof(T) * 8) : T(__builtin_clzll(bits) - (64 - int(sizeof(T)) * 8));
}
template <zmlx::Whole T>
T ctz(T x) {
  const auto bits = std::make_unsigned_t<T>(x);
  return bits == 0 ? T(sizeof(T) * 8) : T(__builtin_ctzll(bits));
}
template <zmlx::Whole T>
T reverse_bits(T x) {
  auto bits = std::make_unsigned_t<T>(x);
  std::make_unsigned_t<T> out = 0;
  for (unsigned i = 0; i < sizeof(T) * 8; ++i) {
    out = decltype(out)(out << 1 | (bits >> i & 1));
  }
  return T(out);
}
template <zmlx::Whole T>
T rotate(T x, T by) {
  using U = std::make_unsigned_t<T>;
  constexpr unsigned n = sizeof(T) * 8;
  const unsigned k = unsigned(U(by)) % n;
  return k == 0 ? x : T(U(U(x) << k | U(x) >> (n - k)));
}
template <zmlx::Whole T>
T extract_bits(T x, uint offset, uint bits) {
  if (bits == 0) {
    return 0;
  }
  constexpr unsigned n = sizeof(T) * 8;
  using U = std::make_unsigned_t<T>;
  return T(T(U(x) << (n - offset - bits)) >> (n - bits));
}
template <zmlx::Whole T>
T insert_bits(T base, T insert, uint offset, uint bits) {
  using U = std::make_unsigned_t<T>;
  const U mask = bits >= sizeof(T) * 8 ? U(~U(0)) : U(((U(1) << bits) - 1) << offset);
  return T((U(base) & ~mask) | (U(U(insert) << offset) & mask));
}
template <zmlx::Whole T>
T mulhi(T x, T y) {
  return T(__int128(x) * __int128(y) >> (sizeof(T) * 8));
}
inline ulong mulhi(ulong x, ulong y) {
  return ulong((unsigned __int128)x * y >> 64);
}
inline int mul24(int x, int y) {
  return int(int64_t(x << 8 >> 8) * (y << 8 >> 8));
}
inline uint mul24(uint x, uint y) {
  return (x & 0xffffffu) * (y & 0xffffffu);
}
inline int mad24(int x, int y, int z) {
  return int(uint(mul24(x, y)) + uint(z));
}
inline uint mad24(uint x, uint y, uint z) {
  return mul24(x, y) + z;
}
template <zmlx::Whole T>
T absdiff(T x, T y) {
  return x > y ? T(x - y) : T(y - x);
}
template <zmlx::Whole T>
T addsat(T x, T y) {
  T out;
  if (__builtin_add_overflow(x, y, &out)) {
    return y < 0 ? numeric_limits<T>::min() : numeric_limits<T>::max();
  }
  return out;
}
template <zmlx::Whole T>
T subsat(T x, T y) {
  T out;
  if (__builtin_sub_overflow(x, y, &out)) {
    return y > 0 ? numeric_limits<T>::min() : numeric_limits<T>::max();
  }
  return out;
}
template <zmlx::Whole T>
T hadd(T x, T y) {
  return T((__int128(x) + y) >> 1);
}
template <zmlx::Whole T>
T rhadd(T x, T y) {
  return T((__int128(x) + y + 1) >> 1);
}

} // namespace metal
