// Scalar types, constants and limits by their Metal names.
//
// Everything here lies in mlx::core::cu::metal, inside the namespace in which MLX puts a kernel, so
// that unqualified names in a kernel find these before CUDA's global ones (float4, max, half).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/cstdint>
#include <cuda/std/limits>
#include <cuda/std/type_traits>
#include <cuda/std/utility>

namespace mlx::core::cu::metal {

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;

using cuda::std::conditional;
using cuda::std::conditional_t;
using cuda::std::decay_t;
using cuda::std::enable_if;
using cuda::std::enable_if_t;
using cuda::std::false_type;
using cuda::std::integral_constant;
using cuda::std::is_arithmetic_v;
using cuda::std::is_integral;
using cuda::std::is_integral_v;
using cuda::std::is_pointer_v;
using cuda::std::is_same;
using cuda::std::is_same_v;
using cuda::std::is_signed_v;
using cuda::std::is_unsigned_v;
using cuda::std::make_unsigned_t;
using cuda::std::remove_cv_t;
using cuda::std::remove_reference_t;
using cuda::std::true_type;

// ---- half and bfloat -----------------------------------------------------------------------------

// The nearest 16-bit value, ties to even, in integers: for constants at compile time.
constexpr ushort narrow(float value, int exponent_bits, int fraction_bits) {
  const uint bits = __builtin_bit_cast(uint, value);
  const uint sign = bits >> 31 << 15, magnitude = bits & 0x7fffffff;
  const int drop = 23 - fraction_bits;
  const uint infinity = ((1u << exponent_bits) - 1) << fraction_bits;
  if (magnitude > 0x7f800000) return sign | infinity | 1u << (fraction_bits - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  int exponent = int(magnitude >> 23) - 127 + bias;
  ulong fraction = magnitude >> 23 ? (magnitude & 0x7fffff) | 0x800000 : magnitude & 0x7fffff;
  if (!(magnitude >> 23)) ++exponent;
  int shift = drop;
  if (exponent < 1) {
    shift += 1 - exponent;
    exponent = 1;
  }
  if (shift > 40) return sign;
  const ulong half_way = 1ul << (shift - 1), rest = fraction & ((1ul << shift) - 1);
  fraction >>= shift;
  if (rest > half_way || (rest == half_way && (fraction & 1))) ++fraction;
  const ulong result = (ulong(exponent - 1) << fraction_bits) + fraction;
  return sign | (result < infinity ? uint(result) : infinity);
}

template <class Native>
struct small_float;

template <class T>
struct is_small : false_type {};
template <class Native>
struct is_small<small_float<Native>> : true_type {};
template <class T>
constexpr bool is_small_v = is_small<remove_cv_t<T>>::value;
template <class T>
constexpr bool is_scalar_v = is_arithmetic_v<T> || is_small_v<T>;
template <class T>
constexpr bool is_floating_point_v = cuda::std::is_floating_point_v<T> || is_small_v<T>;
template <class T>
struct is_floating_point : integral_constant<bool, is_floating_point_v<T>> {};

// A 16-bit float with Metal's rules: two of a kind give that kind, rounded; with a float they give a
// float; with an integer they stay what they are. CUDA's own types leave these mixes ambiguous.
template <class Native>
struct small_float {
  ushort bits;

  small_float() = default;
  template <class T, enable_if_t<is_arithmetic_v<T>, int> = 0>
  constexpr small_float(T value) : bits(encode(static_cast<float>(value))) {}
  template <class Other>
  explicit constexpr small_float(small_float<Other> value) : small_float(static_cast<float>(value)) {}
  small_float(Native value) : bits(__builtin_bit_cast(ushort, value)) {}

  static constexpr small_float from_bits(ushort bits) {
    return __builtin_bit_cast(small_float, bits);
  }
  Native native() const { return __builtin_bit_cast(Native, bits); }

  constexpr operator float() const {
    if constexpr (is_same_v<Native, __nv_bfloat16>) {
      return __builtin_bit_cast(float, uint(bits) << 16);
    } else {
      if (!__builtin_is_constant_evaluated()) return __half2float(native());
      const uint sign = uint(bits >> 15) << 31, exponent = bits >> 10 & 31, fraction = bits & 1023;
      if (exponent == 0) return (sign ? -1.0f : 1.0f) * fraction * 0x1p-24f;
      const uint wide = exponent == 31 ? 255 : exponent + 112;
      return __builtin_bit_cast(float, sign | wide << 23 | fraction << 13);
    }
  }

  constexpr small_float operator+() const { return *this; }
  constexpr small_float operator-() const { return from_bits(bits ^ 0x8000); }
  small_float& operator++() { return *this = *this + small_float(1); }
  small_float& operator--() { return *this = *this - small_float(1); }
  small_float operator++(int) { auto old = *this; ++*this; return old; }
  small_float operator--(int) { auto old = *this; --*this; return old; }
  template <class T> constexpr small_float& operator+=(T o) { return *this = small_float(*this + o); }
  template <class T> constexpr small_float& operator-=(T o) { return *this = small_float(*this - o); }
  template <class T> constexpr small_float& operator*=(T o) { return *this = small_float(*this * o); }
  template <class T> constexpr small_float& operator/=(T o) { return *this = small_float(*this / o); }

 private:
  static constexpr ushort encode(float value) {
    if constexpr (is_same_v<Native, __nv_bfloat16>) {
      if (!__builtin_is_constant_evaluated())
        return __builtin_bit_cast(ushort, __float2bfloat16_rn(value));
      return narrow(value, 8, 7);
    } else {
      if (!__builtin_is_constant_evaluated())
        return __builtin_bit_cast(ushort, __float2half_rn(value));
      return narrow(value, 5, 10);
    }
  }
};

using half = small_float<__half>;
using bfloat = small_float<__nv_bfloat16>;
using float16_t = half;
using bfloat16_t = bfloat;

// The type of `a + b` in Metal. A float holds sums, products and quotients of two 16-bit floats so
// well that rounding it again gives the correctly rounded result.
template <class A, class B, class = void>
struct mixed {
  using type = decltype(A() + B());
};
template <class A>
struct mixed<A, A, void> {
  using type = A;
};
template <class N, class B>
struct mixed<small_float<N>, B, enable_if_t<is_arithmetic_v<B>>> {
  using type = conditional_t<is_integral_v<B>, small_float<N>, B>;
};
template <class A, class N>
struct mixed<A, small_float<N>, enable_if_t<is_arithmetic_v<A>>> {
  using type = conditional_t<is_integral_v<A>, small_float<N>, A>;
};
template <class N, class M>
struct mixed<small_float<N>, small_float<M>, enable_if_t<!is_same_v<N, M>>> {
  using type = float;
};
template <class A, class B>
using mixed_t = typename mixed<remove_cv_t<A>, remove_cv_t<B>>::type;

#define ZMLX_SMALL(OP)                                                                             \
  template <class N>                                                                               \
  constexpr small_float<N> operator OP(small_float<N> a, small_float<N> b) {                       \
    return small_float<N>(float(a) OP float(b));                                                   \
  }                                                                                                \
  template <class A, class B,                                                                      \
            enable_if_t<(is_small_v<A> && is_arithmetic_v<B>) ||                                   \
                            (is_arithmetic_v<A> && is_small_v<B>) ||                               \
                            (is_small_v<A> && is_small_v<B> && !is_same_v<A, B>),                  \
                        int> = 0>                                                                  \
  constexpr mixed_t<A, B> operator OP(A a, B b) {                                                  \
    using R = mixed_t<A, B>;                                                                       \
    return R(static_cast<R>(a) OP static_cast<R>(b));                                              \
  }
ZMLX_SMALL(+)
ZMLX_SMALL(-)
ZMLX_SMALL(*)
ZMLX_SMALL(/)
#undef ZMLX_SMALL

// ---- arms of ?: ----------------------------------------------------------------------------------

// `c ? h : 1.0f` with a 16-bit h: C++ finds no common type of a class and a float, Metal a float.
template <class Other, class T>
constexpr decltype(auto) arm(T&& x) {
  using Own = remove_cv_t<remove_reference_t<T>>;
  using Else = remove_cv_t<remove_reference_t<Other>>;
  if constexpr (is_scalar_v<Own> && is_scalar_v<Else> && (is_small_v<Own> || is_small_v<Else>) &&
                !is_same_v<Own, Else>) {
    return mixed_t<Own, Else>(x);
  } else if constexpr (is_pointer_v<Else> && is_integral_v<Own>) {
    return Else(nullptr);
  } else if constexpr (cuda::std::is_lvalue_reference_v<T>) {
    return static_cast<T>(x);
  } else {
    return Own(static_cast<T&&>(x));
  }
}

// ---- limits and constants ------------------------------------------------------------------------

template <class T>
struct numeric_limits : cuda::std::numeric_limits<T> {};

template <class S, ushort Min, ushort Max, ushort Infinity, ushort Quiet, ushort Epsilon, int Digits>
struct small_limits {
  static constexpr bool is_specialized = true, is_signed = true, is_integer = false;
  static constexpr bool is_exact = false, has_infinity = true, has_quiet_NaN = true;
  static constexpr int digits = Digits, radix = 2;
  static constexpr S min() { return S::from_bits(Min); }
  static constexpr S max() { return S::from_bits(Max); }
  static constexpr S lowest() { return S::from_bits(Max | 0x8000); }
  static constexpr S infinity() { return S::from_bits(Infinity); }
  static constexpr S quiet_NaN() { return S::from_bits(Quiet); }
  static constexpr S epsilon() { return S::from_bits(Epsilon); }
  static constexpr S denorm_min() { return S::from_bits(1); }
};
// A template, so that what a kernel does not use is not in its binary.
template <class Native>
struct numeric_limits<small_float<Native>>
    : conditional_t<is_same_v<Native, __half>,
                    small_limits<half, 0x0400, 0x7bff, 0x7c00, 0x7e00, 0x1400, 11>,
                    small_limits<bfloat, 0x0080, 0x7f7f, 0x7f80, 0x7fc0, 0x3c00, 8>> {};

// MLX's own for Metal, whose members are values; kernels write it as `Limits`.
template <class T>
struct value_limits {
  using L = numeric_limits<T>;
  static constexpr T finite_max = L::max();
  static constexpr T finite_min = L::lowest();
  static constexpr T max = L::has_infinity ? L::infinity() : L::max();
  static constexpr T min = L::has_infinity ? T(-L::infinity()) : L::lowest();
};

template <class T, class U>
constexpr T ceildiv(T n, U m) {
  return (n + m - 1) / m;
}

// The same bits as another type of the same size.
template <class To, class From>
constexpr To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type takes types of one size");
  return __builtin_bit_cast(To, value);
}

}  // namespace mlx::core::cu::metal

namespace mlx::core::cu {
using namespace metal;
}

// MLX writes these in a kernel's signature and for the types of its template.
#define __half ::mlx::core::cu::metal::half
#define __nv_bfloat16 ::mlx::core::cu::metal::bfloat

#undef WARP_SIZE
#undef MAX_NDIM
#define METAL_FUNC __forceinline__
#define MLX_MTL_PRAGMA_UNROLL _Pragma("unroll")

#undef INFINITY
#define INFINITY ::cuda::std::numeric_limits<float>::infinity()
#undef NAN
#define NAN ::cuda::std::numeric_limits<float>::quiet_NaN()
#undef MAXFLOAT
#define MAXFLOAT 3.402823466e+38f
#undef HUGE_VALF
#define HUGE_VALF INFINITY
#undef FLT_MAX
#define FLT_MAX 3.402823466e+38f
#undef FLT_MIN
#define FLT_MIN 1.175494351e-38f
#undef FLT_EPSILON
#define FLT_EPSILON 1.192092896e-07f
#define MAXHALF ::mlx::core::cu::metal::half::from_bits(0x7bff)
#define HUGE_VALH ::mlx::core::cu::metal::half::from_bits(0x7c00)
#define HALF_MAX ::mlx::core::cu::metal::half::from_bits(0x7bff)
#define HALF_MIN ::mlx::core::cu::metal::half::from_bits(0x0400)
#define HALF_EPSILON ::mlx::core::cu::metal::half::from_bits(0x1400)
#undef CHAR_BIT
#define CHAR_BIT 8
#undef CHAR_MAX
#define CHAR_MAX 127
#undef CHAR_MIN
#define CHAR_MIN (-128)
#undef UCHAR_MAX
#define UCHAR_MAX 255
#undef SHRT_MAX
#define SHRT_MAX 32767
#undef SHRT_MIN
#define SHRT_MIN (-32768)
#undef USHRT_MAX
#define USHRT_MAX 65535
#undef INT_MAX
#define INT_MAX 2147483647
#undef INT_MIN
#define INT_MIN (-2147483647 - 1)
#undef UINT_MAX
#define UINT_MAX 4294967295u
#undef LONG_MAX
#define LONG_MAX 9223372036854775807l
#undef LONG_MIN
#define LONG_MIN (-9223372036854775807l - 1)
#undef ULONG_MAX
#define ULONG_MAX 18446744073709551615ul
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.434294481903251827651f
#define M_LN2_F 0.693147180559945309417f
#define M_LN10_F 2.30258509299404568402f
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_PI_4_F 0.785398163397448309616f
#define M_1_PI_F 0.318309886183790671538f
#define M_2_PI_F 0.636619772367581343076f
#define M_2_SQRTPI_F 1.12837916709551257390f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.707106781186547524401f
