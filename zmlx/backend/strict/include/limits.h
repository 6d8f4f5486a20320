// numeric_limits.
#pragma once

namespace metal {

template <typename T>
struct numeric_limits {
  static constexpr constant bool is_specialized = false;
};

#define ZMLX_INTEGER_LIMITS(TYPE, SIGNED, LOWEST, LARGEST, DIGITS)   \
  template <>                                                        \
  struct numeric_limits<TYPE> {                                      \
    static constexpr constant bool is_specialized = true;            \
    static constexpr constant bool is_signed = SIGNED;              \
    static constexpr constant bool is_integer = true;                \
    static constexpr constant bool is_exact = true;                  \
    static constexpr constant bool has_infinity = false;             \
    static constexpr constant bool has_quiet_NaN = false;            \
    static constexpr constant int radix = 2;                         \
    static constexpr constant int digits = DIGITS;                   \
    static constexpr TYPE min() { return LOWEST; }                   \
    static constexpr TYPE lowest() { return LOWEST; }                \
    static constexpr TYPE max() { return LARGEST; }                  \
    static constexpr TYPE epsilon() { return 0; }                    \
    static constexpr TYPE infinity() { return 0; }                   \
    static constexpr TYPE quiet_NaN() { return 0; }                  \
  };
ZMLX_INTEGER_LIMITS(bool, false, false, true, 1)
ZMLX_INTEGER_LIMITS(char, true, CHAR_MIN, CHAR_MAX, 7)
ZMLX_INTEGER_LIMITS(uchar, false, 0, UCHAR_MAX, 8)
ZMLX_INTEGER_LIMITS(short, true, SHRT_MIN, SHRT_MAX, 15)
ZMLX_INTEGER_LIMITS(ushort, false, 0, USHRT_MAX, 16)
ZMLX_INTEGER_LIMITS(int, true, INT_MIN, INT_MAX, 31)
ZMLX_INTEGER_LIMITS(uint, false, 0, UINT_MAX, 32)
ZMLX_INTEGER_LIMITS(long, true, LONG_MIN, LONG_MAX, 63)
ZMLX_INTEGER_LIMITS(ulong, false, 0, ULONG_MAX, 64)
#undef ZMLX_INTEGER_LIMITS

#define ZMLX_FLOAT_LIMITS(TYPE, SMALLEST, LARGEST, EPSILON, DIGITS)     \
  template <>                                                           \
  struct numeric_limits<TYPE> {                                         \
    static constexpr constant bool is_specialized = true;               \
    static constexpr constant bool is_signed = true;                    \
    static constexpr constant bool is_integer = false;                  \
    static constexpr constant bool is_exact = false;                    \
    static constexpr constant bool has_infinity = true;                 \
    static constexpr constant bool has_quiet_NaN = true;                \
    static constexpr constant int radix = 2;                            \
    static constexpr constant int digits = DIGITS;                      \
    static constexpr TYPE min() { return TYPE(SMALLEST); }              \
    static constexpr TYPE lowest() { return TYPE(-(LARGEST)); }         \
    static constexpr TYPE max() { return TYPE(LARGEST); }               \
    static constexpr TYPE denorm_min() { return TYPE(SMALLEST * EPSILON); } \
    static constexpr TYPE epsilon() { return TYPE(EPSILON); }           \
    static constexpr TYPE round_error() { return TYPE(0.5f); }          \
    static constexpr TYPE infinity() { return TYPE(INFINITY); }         \
    static constexpr TYPE quiet_NaN() { return TYPE(NAN); }             \
    static constexpr TYPE signaling_NaN() { return TYPE(NAN); }         \
  };
ZMLX_FLOAT_LIMITS(float, FLT_MIN, FLT_MAX, FLT_EPSILON, 24)
ZMLX_FLOAT_LIMITS(half, 6.103515625e-05f, 65504.0f, 9.765625e-04f, 11)
ZMLX_FLOAT_LIMITS(bfloat, FLT_MIN, 3.38953138925153547590e+38f, 7.8125e-03f, 8)
#undef ZMLX_FLOAT_LIMITS

} // namespace metal
