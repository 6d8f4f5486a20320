// half and bfloat. Each operation is done in float and rounded once, which is exact: float has more
// than twice their bits. half is the compiler's own type where it has one (and -fexcess-precision=16
// makes it round after each operation).
#pragma once

#include <zmlx/types.h>

#if __GNUC__ >= 13 || (__GNUC__ == 12 && defined(__x86_64__))
#define ZMLX_NATIVE_HALF 1
#endif

namespace zmlx {

#ifdef ZMLX_NATIVE_HALF
template <class T>
inline constexpr bool is_half = std::is_same_v<T, _Float16>;
#else
template <class T>
inline constexpr bool is_half = false;
#endif

constexpr uint16_t half_bits(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return sign | 0x7e00u;
  }
  if (magnitude >= 0x477ff000u) { // rounds to more than the largest finite one
    return sign | 0x7c00u;
  }
  if (magnitude < 0x38800000u) { // subnormal: a float addition rounds at the right place
    const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
    return sign | uint16_t(__builtin_bit_cast(uint32_t, shifted) - 0x3f000000u);
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return sign | uint16_t((rounded - 0x38000000u) >> 13);
}

constexpr float half_value(uint16_t value) {
  const uint32_t sign = uint32_t(value & 0x8000u) << 16;
  const uint32_t magnitude = value & 0x7fffu;
  if (magnitude >= 0x7c00u) {
    return __builtin_bit_cast(float, sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  }
  // Shifted into float's fields the exponent is 112 too small.
  const float scaled = __builtin_bit_cast(float, magnitude << 13) * 0x1p112f;
  return __builtin_bit_cast(float, sign | __builtin_bit_cast(uint32_t, scaled));
}

constexpr uint16_t bfloat_bits(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return uint16_t((bits >> 16) | 0x40u);
  }
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

constexpr float bfloat_value(uint16_t value) {
  return __builtin_bit_cast(float, uint32_t(value) << 16);
}

template <class T>
concept Arithmetic = std::is_arithmetic_v<T> || is_half<T>;
template <class T>
concept Whole = std::is_integral_v<T>;

} // namespace zmlx

#ifdef ZMLX_NATIVE_HALF
typedef _Float16 half;
#else
// Converts from any number by itself, as Metal's half does.
struct half {
  uint16_t bits;

  half() = default;
  template <zmlx::Arithmetic T>
  constexpr half(T value) : bits(zmlx::half_bits(float(value))) {}
  constexpr operator float() const {
    return zmlx::half_value(bits);
  }
};
#endif

// Whole numbers become one by themselves; float and half have to be cast. To float and bool it converts
// by itself. Metal converts to whole numbers too; here they have to be cast where a variable gets its
// value: with conversions both ways there would be no common type for `c ? b : 0`, which kernels write
// far more often.
struct bfloat {
  uint16_t bits;

  bfloat() = default;
  template <zmlx::Whole T>
  constexpr bfloat(T value) : bits(zmlx::bfloat_bits(float(value))) {}
  template <zmlx::Arithmetic T>
    requires(!zmlx::Whole<T>)
  constexpr explicit bfloat(T value) : bits(zmlx::bfloat_bits(float(value))) {}
  template <class T>
    requires(std::is_same_v<T, float> || std::is_same_v<T, bool>)
  constexpr operator T() const {
    return T(zmlx::bfloat_value(bits));
  }
  template <zmlx::Arithmetic T>
    requires(!std::is_same_v<T, float> && !std::is_same_v<T, bool>)
  constexpr explicit operator T() const {
    return T(zmlx::bfloat_value(bits));
  }
};

// Of two like ones, and of one and a whole number, the result is one; with a float it is a float.
#define ZMLX_OPERATOR(T, op)                         \
  constexpr T operator op(T a, T b) {                \
    return T(float(a) op float(b));                  \
  }                                                  \
  template <zmlx::Whole U>                           \
  constexpr T operator op(T a, U b) {                \
    return T(float(a) op float(T(b)));               \
  }                                                  \
  template <zmlx::Whole U>                           \
  constexpr T operator op(U a, T b) {                \
    return T(float(T(a)) op float(b));               \
  }                                                  \
  constexpr float operator op(T a, float b) {        \
    return float(a) op b;                            \
  }                                                  \
  constexpr float operator op(float a, T b) {        \
    return a op float(b);                            \
  }                                                  \
  template <class U>                                 \
    requires requires(T& a, U b) { a = a op b; }     \
  constexpr T& operator op##=(T& a, U b) {           \
    a = a op b;                                      \
    return a;                                        \
  }                                                  \
  template <zmlx::Arithmetic U>                      \
    requires(!zmlx::is_half<U>)                      \
  constexpr U& operator op##=(U& a, T b) {           \
    a = U(a op b);                                   \
    return a;                                        \
  }
#define ZMLX_COMPARISON(T, op)                       \
  constexpr bool operator op(T a, T b) {             \
    return float(a) op float(b);                     \
  }                                                  \
  template <zmlx::Arithmetic U>                      \
  constexpr bool operator op(T a, U b) {             \
    return float(a) op float(b);                     \
  }                                                  \
  template <zmlx::Arithmetic U>                      \
  constexpr bool operator op(U a, T b) {             \
    return float(a) op float(b);                     \
  }
#define ZMLX_FLOAT(T)                                \
  ZMLX_OPERATOR(T, +)                                \
  ZMLX_OPERATOR(T, -)                                \
  ZMLX_OPERATOR(T, *)                                \
  ZMLX_OPERATOR(T, /)                                \
  ZMLX_COMPARISON(T, <)                              \
  ZMLX_COMPARISON(T, <=)                             \
  ZMLX_COMPARISON(T, >)                              \
  ZMLX_COMPARISON(T, >=)                             \
  ZMLX_COMPARISON(T, ==)                             \
  ZMLX_COMPARISON(T, !=)                             \
  constexpr T operator-(T a) {                       \
    return __builtin_bit_cast(T, uint16_t(a.bits ^ 0x8000u)); \
  }                                                  \
  constexpr T operator+(T a) {                       \
    return a;                                        \
  }                                                  \
  constexpr T& operator++(T& a) {                    \
    return a = a + T(1);                             \
  }                                                  \
  constexpr T& operator--(T& a) {                    \
    return a = a - T(1);                             \
  }                                                  \
  constexpr T operator++(T& a, int) {                \
    T before = a;                                    \
    a = a + T(1);                                    \
    return before;                                   \
  }                                                  \
  constexpr T operator--(T& a, int) {                \
    T before = a;                                    \
    a = a - T(1);                                    \
    return before;                                   \
  }
#ifndef ZMLX_NATIVE_HALF
ZMLX_FLOAT(half)
#endif
ZMLX_FLOAT(bfloat)
#undef ZMLX_FLOAT
#undef ZMLX_COMPARISON
#undef ZMLX_OPERATOR

// Literals: 1.5h, 2.0bf.
constexpr half operator""h(long double value) {
  return half(float(value));
}
constexpr half operator""h(unsigned long long value) {
  return half(float(value));
}
constexpr bfloat operator""bf(long double value) {
  return bfloat(float(value));
}

typedef half float16_t;

namespace metal {

using ::bfloat;
using ::half;

template <class T>
struct is_floating_point : std::bool_constant<
                               std::is_floating_point_v<T> || std::is_same_v<T, half> ||
                               std::is_same_v<T, bfloat>> {};
template <class T>
inline constexpr bool is_floating_point_v = is_floating_point<T>::value;
template <class T>
inline constexpr bool is_arithmetic_v = is_floating_point_v<T> || std::is_integral_v<T>;
template <class T>
struct is_arithmetic : std::bool_constant<is_arithmetic_v<T>> {};
template <class T>
struct is_signed : std::bool_constant<is_floating_point_v<T> || std::is_signed_v<T>> {};
template <class T>
inline constexpr bool is_signed_v = is_signed<T>::value;
template <class T>
inline constexpr bool is_unsigned_v = std::is_unsigned_v<T>;
template <class T>
struct is_unsigned : std::is_unsigned<T> {};

// Of whole numbers.
template <class T>
struct numeric_limits {
  static constexpr bool is_signed = std::is_signed_v<T>;
  static constexpr bool is_integer = std::is_integral_v<T>;
  static constexpr int digits = int(sizeof(T) * 8) - is_signed;
  static constexpr T max() {
    return is_signed ? T(~(std::make_unsigned_t<T>(1) << (sizeof(T) * 8 - 1))) : T(~T(0));
  }
  static constexpr T min() {
    return is_signed ? T(std::make_unsigned_t<T>(1) << (sizeof(T) * 8 - 1)) : T(0);
  }
  static constexpr T lowest() {
    return min();
  }
};
template <>
struct numeric_limits<bool> {
  static constexpr bool is_signed = false;
  static constexpr bool is_integer = true;
  static constexpr bool max() {
    return true;
  }
  static constexpr bool min() {
    return false;
  }
  static constexpr bool lowest() {
    return false;
  }
};

#define ZMLX_LIMITS(T, Bits, largest, least, eps, infinite, nan, mantissa) \
  template <>                                                              \
  struct numeric_limits<T> {                                               \
    static constexpr bool is_signed = true;                                \
    static constexpr bool is_integer = false;                              \
    static constexpr int digits = mantissa;                                \
    static constexpr T max() {                                             \
      return __builtin_bit_cast(T, Bits(largest));                         \
    }                                                                      \
    static constexpr T min() {                                             \
      return __builtin_bit_cast(T, Bits(least));                           \
    }                                                                      \
    static constexpr T lowest() {                                          \
      return -max();                                                       \
    }                                                                      \
    static constexpr T epsilon() {                                         \
      return __builtin_bit_cast(T, Bits(eps));                             \
    }                                                                      \
    static constexpr T infinity() {                                        \
      return __builtin_bit_cast(T, Bits(infinite));                        \
    }                                                                      \
    static constexpr T quiet_NaN() {                                       \
      return __builtin_bit_cast(T, Bits(nan));                             \
    }                                                                      \
    static constexpr T signaling_NaN() {                                   \
      return quiet_NaN();                                                  \
    }                                                                      \
  };
ZMLX_LIMITS(float, uint32_t, 0x7f7fffff, 0x00800000, 0x34000000, 0x7f800000, 0x7fc00000, 24)
ZMLX_LIMITS(half, uint16_t, 0x7bff, 0x0400, 0x1400, 0x7c00, 0x7e00, 11)
ZMLX_LIMITS(bfloat, uint16_t, 0x7f7f, 0x0080, 0x3c00, 0x7f80, 0x7fc0, 8)
#undef ZMLX_LIMITS

} // namespace metal
