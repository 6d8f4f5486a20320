// bfloat: converts implicitly from integers and to float and bool, and from float only explicitly.
// Metal converts to integers implicitly too; here that is refused where a variable gets its value: with
// conversions both ways there would be no common type for `c ? b : 0`, which kernels write far more
// often.
#pragma once

struct bfloat;

namespace metal {
template <>
struct is_floating_point<bfloat> : true_type {};
template <typename U>
static constexpr constant bool zmlx_builtin = __is_arithmetic(U) && !is_same_v<U, void>;
template <typename U>
static constexpr constant bool zmlx_follows = is_same_v<U, float> || is_same_v<U, bool>;
} // namespace metal

// For methods: one without an address space takes objects in every one but `constant`.
#define ZMLX_SPACES(DO) DO() DO(constant)
#define ZMLX_WRITABLE(DO) DO(thread) DO(device) DO(threadgroup)

struct bfloat {
  ushort bits;

  bfloat() = default;
  constexpr bfloat(const bfloat&) = default;
  // The implicit copy reads every address space but `constant`; a template is no copy constructor.
  template <int I = 0>
  constexpr bfloat(const constant bfloat& other) : bits(other.bits) {}
  template <int I = 0>
  constexpr bfloat(const constant bfloat& other) constant : bits(other.bits) {}
  template <int I = 0>
  void operator=(const constant bfloat& other) {
    bits = other.bits;
  }
  template <typename U, metal::enable_if_t<__is_integral(U), int> = 0>
  constexpr bfloat(U value) : bits(rounded(value)) {}
  template <typename U, metal::enable_if_t<__is_floating_point(U), long> = 0>
  explicit constexpr bfloat(U value) : bits(rounded(value)) {}

#define ZMLX_CONVERSION(SPACE)                                                           \
  template <typename U, metal::enable_if_t<metal::zmlx_follows<U>, int> = 0>             \
  constexpr operator U() const SPACE {                                                   \
    return static_cast<U>(__builtin_bit_cast(float, uint(bits) << 16));                  \
  }                                                                                      \
  template <                                                                             \
      typename U,                                                                        \
      metal::enable_if_t<metal::zmlx_builtin<U> && !metal::zmlx_follows<U>, long> = 0>   \
  explicit constexpr operator U() const SPACE {                                          \
    return static_cast<U>(__builtin_bit_cast(float, uint(bits) << 16));                  \
  }
  ZMLX_SPACES(ZMLX_CONVERSION)
#undef ZMLX_CONVERSION

 private:
  static constexpr ushort rounded(float value) {
    return value != value
        ? ushort(0x7fc0)
        : ushort((__builtin_bit_cast(uint, value) + 0x7fff +
                  (__builtin_bit_cast(uint, value) >> 16 & 1)) >> 16);
  }
};

#define ZMLX_IF_INTEGER metal::enable_if_t<__is_integral(U), int> = 0
#define ZMLX_IF_FLOAT metal::enable_if_t<metal::is_same_v<U, float>, long> = 0
#define ZMLX_IF_HALF metal::enable_if_t<metal::is_same_v<U, half>, short> = 0

#define ZMLX_ARITHMETIC(OP)                                                        \
  constexpr bfloat operator OP(bfloat a, bfloat b) {                               \
    return bfloat(static_cast<float>(a) OP static_cast<float>(b));                 \
  }                                                                                \
  template <typename U, ZMLX_IF_INTEGER>                                           \
  constexpr bfloat operator OP(bfloat a, U b) {                                    \
    return a OP bfloat(b);                                                         \
  }                                                                                \
  template <typename U, ZMLX_IF_INTEGER>                                           \
  constexpr bfloat operator OP(U a, bfloat b) {                                    \
    return bfloat(a) OP b;                                                         \
  }                                                                                \
  template <typename U, ZMLX_IF_FLOAT>                                             \
  constexpr float operator OP(bfloat a, U b) {                                     \
    return static_cast<float>(a) OP b;                                             \
  }                                                                                \
  template <typename U, ZMLX_IF_FLOAT>                                             \
  constexpr float operator OP(U a, bfloat b) {                                     \
    return a OP static_cast<float>(b);                                             \
  }                                                                                \
  template <typename U, ZMLX_IF_HALF>                                              \
  void operator OP(bfloat a, U b) = delete;                                        \
  template <typename U, ZMLX_IF_HALF>                                              \
  void operator OP(U a, bfloat b) = delete;
ZMLX_ARITHMETIC(+)
ZMLX_ARITHMETIC(-)
ZMLX_ARITHMETIC(*)
ZMLX_ARITHMETIC(/)
#undef ZMLX_ARITHMETIC

#define ZMLX_COMPARISON(OP)                                                       \
  constexpr bool operator OP(bfloat a, bfloat b) {                                \
    return static_cast<float>(a) OP static_cast<float>(b);                        \
  }                                                                               \
  template <typename U, metal::enable_if_t<metal::zmlx_builtin<U>, int> = 0>      \
  constexpr bool operator OP(bfloat a, U b) {                                     \
    return static_cast<float>(a) OP static_cast<float>(b);                        \
  }                                                                               \
  template <typename U, metal::enable_if_t<metal::zmlx_builtin<U>, int> = 0>      \
  constexpr bool operator OP(U a, bfloat b) {                                     \
    return static_cast<float>(a) OP static_cast<float>(b);                        \
  }
ZMLX_COMPARISON(==)
ZMLX_COMPARISON(!=)
ZMLX_COMPARISON(<)
ZMLX_COMPARISON(>)
ZMLX_COMPARISON(<=)
ZMLX_COMPARISON(>=)
#undef ZMLX_COMPARISON

constexpr bfloat operator-(bfloat a) { return bfloat(-static_cast<float>(a)); }
constexpr bfloat operator+(bfloat a) { return a; }

// Into another type: `f += b`.
#define ZMLX_INTO(SPACE, OP)                                                                 \
  template <                                                                                 \
      typename U,                                                                            \
      metal::enable_if_t<metal::zmlx_builtin<U> && !metal::is_same_v<U, half>, int> = 0>     \
  SPACE U& operator OP(SPACE U& a, bfloat b);
#define ZMLX_INTO_EACH(SPACE) \
  ZMLX_INTO(SPACE, +=)        \
  ZMLX_INTO(SPACE, -=)        \
  ZMLX_INTO(SPACE, *=)        \
  ZMLX_INTO(SPACE, /=)
ZMLX_WRITABLE(ZMLX_INTO_EACH)
#undef ZMLX_INTO_EACH
#undef ZMLX_INTO

// `b += 1.0f` would round a float to bfloat implicitly: only bfloat and integers are taken.
#define ZMLX_COMPOUND(SPACE)                              \
  SPACE bfloat& operator+=(SPACE bfloat& a, bfloat b);    \
  SPACE bfloat& operator-=(SPACE bfloat& a, bfloat b);    \
  SPACE bfloat& operator*=(SPACE bfloat& a, bfloat b);    \
  SPACE bfloat& operator/=(SPACE bfloat& a, bfloat b);    \
  SPACE bfloat& operator++(SPACE bfloat& a);              \
  SPACE bfloat& operator--(SPACE bfloat& a);              \
  bfloat operator++(SPACE bfloat& a, int);                \
  bfloat operator--(SPACE bfloat& a, int);
ZMLX_WRITABLE(ZMLX_COMPOUND)
#undef ZMLX_COMPOUND
