// Vectors of 2, 3 and 4 lanes. For `v.xyz` the checker puts `v.template zmlx_lanes<0, 1, 2>()`.
#pragma once

namespace metal {

template <typename T, int N>
struct vec;
template <typename T, int N>
struct packed_vec;

// May a scalar U stand where a lane of type T is wanted: a float never becomes an integer lane.
template <typename U, typename T>
static constexpr constant bool zmlx_lane =
    (is_arithmetic_v<U> && is_convertible_v<U, T> &&
     !(is_integral_v<T> && is_floating_point_v<U>));

template <typename T>
struct zmlx_width {
  static constexpr constant int value = is_arithmetic_v<T> ? 1 : -100;
};
template <typename T, int N>
struct zmlx_width<vec<T, N>> {
  static constexpr constant int value = N;
};
template <typename T, int N>
struct zmlx_width<packed_vec<T, N>> : zmlx_width<vec<T, N>> {};
template <typename T>
static constexpr constant bool zmlx_wide = (zmlx_width<T>::value > 1);

// A swizzle that is written to.
template <typename T, int N>
struct zmlx_lanes_of {
  void operator=(vec<T, N> value) const;
  void operator+=(vec<T, N> value) const;
  void operator-=(vec<T, N> value) const;
  void operator*=(vec<T, N> value) const;
  void operator/=(vec<T, N> value) const;
};

#define ZMLX_READ(SPACE)                                         \
  template <typename I>                                          \
  T operator[](I lane) const SPACE;                              \
  template <int... L, enable_if_t<((L < zmlx_count) && ...), int> = 0> \
  vec<T, sizeof...(L)> zmlx_lanes() const SPACE;
#define ZMLX_WRITE(SPACE)                                        \
  template <typename I>                                          \
  SPACE T& operator[](I lane) SPACE;                             \
  template <int... L, enable_if_t<((L < zmlx_count) && ...), int> = 0> \
  zmlx_lanes_of<T, sizeof...(L)> zmlx_set() SPACE;

// What vectors of every width have: from one scalar, from a vector of other lanes, from a mixture
// of vectors and scalars, and out of the constant address space.
#define ZMLX_VECTOR(N)                                                                  \
  static constexpr constant int zmlx_count = N;                                         \
  vec() = default;                                                                      \
  constexpr vec(const vec&) = default;                                                  \
  template <int I = 0>                                                                  \
  vec(const constant vec& other);                                                       \
  template <int I = 0>                                                                  \
  vec(const constant vec& other) constant;                                              \
  template <int I = 0>                                                                  \
  void operator=(const constant vec& other);                                            \
  template <typename U, enable_if_t<is_arithmetic_v<U> && is_convertible_v<U, T>, int> = 0> \
  constexpr vec(U value) : vec(zmlx_splat{}, static_cast<T>(value)) {}                  \
  template <typename U, enable_if_t<is_arithmetic_v<U> && !is_convertible_v<U, T>, long> = 0> \
  explicit constexpr vec(U value) : vec(zmlx_splat{}, static_cast<T>(value)) {}         \
  template <typename U, enable_if_t<!is_same_v<U, T>, int> = 0>                         \
  explicit vec(vec<U, N> other);                                                        \
  vec(packed_vec<T, N> other);                                                          \
  template <                                                                            \
      typename A, typename B, typename... C,                                            \
      enable_if_t<                                                                      \
          (zmlx_wide<A> || zmlx_wide<B> || (false || ... || zmlx_wide<C>)) &&           \
              zmlx_width<A>::value + zmlx_width<B>::value +                             \
                      (0 + ... + zmlx_width<C>::value) == N,                            \
          int> = 0>                                                                     \
  vec(A a, B b, C... c);                                                                \
  ZMLX_SPACES(ZMLX_READ)                                                                \
  ZMLX_WRITABLE(ZMLX_WRITE)

struct zmlx_splat {};
#define ZMLX_LANE(A, B) \
  union {               \
    T A;                \
    T B;                \
  };

template <typename T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  ZMLX_LANE(x, r)
  ZMLX_LANE(y, g)
  ZMLX_VECTOR(2)
  constexpr vec(T x, T y) : x(x), y(y) {}
  constexpr vec(T x, T y) constant : x(x), y(y) {}
  constexpr vec(zmlx_splat, T s) : x(s), y(s) {}
};
template <typename T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
  ZMLX_LANE(x, r)
  ZMLX_LANE(y, g)
  ZMLX_LANE(z, b)
  ZMLX_VECTOR(3)
  constexpr vec(T x, T y, T z) : x(x), y(y), z(z) {}
  constexpr vec(T x, T y, T z) constant : x(x), y(y), z(z) {}
  constexpr vec(zmlx_splat, T s) : x(s), y(s), z(s) {}
};
template <typename T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  ZMLX_LANE(x, r)
  ZMLX_LANE(y, g)
  ZMLX_LANE(z, b)
  ZMLX_LANE(w, a)
  ZMLX_VECTOR(4)
  constexpr vec(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
  constexpr vec(T x, T y, T z, T w) constant : x(x), y(y), z(z), w(w) {}
  constexpr vec(zmlx_splat, T s) : x(s), y(s), z(s), w(s) {}
};

template <typename T, int N>
struct packed_vec {
  T lanes[N];
  packed_vec() = default;
  packed_vec(vec<T, N> other);
  template <typename... U, enable_if_t<sizeof...(U) == N, int> = 0>
  packed_vec(U... lanes);
#define ZMLX_PACKED(SPACE) \
  template <typename I>    \
  T operator[](I lane) const SPACE;
  ZMLX_SPACES(ZMLX_PACKED)
#undef ZMLX_PACKED
};

#define ZMLX_OPERATOR(OP, RESULT, WHERE)                                                   \
  template <typename T, int N, enable_if_t<WHERE, int> = 0>                                \
  vec<RESULT, N> operator OP(vec<T, N> a, vec<T, N> b);                                    \
  template <typename T, int N, typename U, enable_if_t<WHERE && zmlx_lane<U, T>, int> = 0> \
  vec<RESULT, N> operator OP(vec<T, N> a, U b);                                            \
  template <typename T, int N, typename U, enable_if_t<WHERE && zmlx_lane<U, T>, int> = 0> \
  vec<RESULT, N> operator OP(U a, vec<T, N> b);
ZMLX_OPERATOR(+, T, true)
ZMLX_OPERATOR(-, T, true)
ZMLX_OPERATOR(*, T, true)
ZMLX_OPERATOR(/, T, true)
ZMLX_OPERATOR(%, T, is_integral_v<T>)
ZMLX_OPERATOR(&, T, is_integral_v<T>)
ZMLX_OPERATOR(|, T, is_integral_v<T>)
ZMLX_OPERATOR(^, T, is_integral_v<T>)
ZMLX_OPERATOR(<<, T, is_integral_v<T>)
ZMLX_OPERATOR(>>, T, is_integral_v<T>)
ZMLX_OPERATOR(==, bool, true)
ZMLX_OPERATOR(!=, bool, true)
ZMLX_OPERATOR(<, bool, true)
ZMLX_OPERATOR(>, bool, true)
ZMLX_OPERATOR(<=, bool, true)
ZMLX_OPERATOR(>=, bool, true)
ZMLX_OPERATOR(&&, bool, true)
ZMLX_OPERATOR(||, bool, true)
#undef ZMLX_OPERATOR

template <typename T, int N>
vec<T, N> operator-(vec<T, N> a);
template <typename T, int N>
vec<T, N> operator+(vec<T, N> a);
template <typename T, int N, enable_if_t<is_integral_v<T>, int> = 0>
vec<T, N> operator~(vec<T, N> a);
template <typename T, int N>
vec<bool, N> operator!(vec<T, N> a);

#define ZMLX_COMPOUND(SPACE, OP)                                                    \
  template <typename T, int N>                                                      \
  SPACE vec<T, N>& operator OP(SPACE vec<T, N>& a, vec<T, N> b);                    \
  template <typename T, int N, typename U, enable_if_t<zmlx_lane<U, T>, int> = 0>   \
  SPACE vec<T, N>& operator OP(SPACE vec<T, N>& a, U b);
#define ZMLX_COMPOUNDS(SPACE) \
  ZMLX_COMPOUND(SPACE, +=)    \
  ZMLX_COMPOUND(SPACE, -=)    \
  ZMLX_COMPOUND(SPACE, *=)    \
  ZMLX_COMPOUND(SPACE, /=)    \
  ZMLX_COMPOUND(SPACE, %=)    \
  ZMLX_COMPOUND(SPACE, &=)    \
  ZMLX_COMPOUND(SPACE, |=)    \
  ZMLX_COMPOUND(SPACE, ^=)    \
  ZMLX_COMPOUND(SPACE, <<=)   \
  ZMLX_COMPOUND(SPACE, >>=)   \
  template <typename T, int N>                               \
  SPACE vec<T, N>& operator++(SPACE vec<T, N>& a);           \
  template <typename T, int N>                               \
  vec<T, N> operator++(SPACE vec<T, N>& a, int);
ZMLX_WRITABLE(ZMLX_COMPOUNDS)
#undef ZMLX_COMPOUNDS
#undef ZMLX_COMPOUND

} // namespace metal

#define ZMLX_NAMED(TYPE)                  \
  typedef metal::vec<TYPE, 2> TYPE##2;    \
  typedef metal::vec<TYPE, 3> TYPE##3;    \
  typedef metal::vec<TYPE, 4> TYPE##4;    \
  typedef metal::packed_vec<TYPE, 2> packed_##TYPE##2; \
  typedef metal::packed_vec<TYPE, 3> packed_##TYPE##3; \
  typedef metal::packed_vec<TYPE, 4> packed_##TYPE##4;
ZMLX_NAMED(bool)
ZMLX_NAMED(char)
ZMLX_NAMED(uchar)
ZMLX_NAMED(short)
ZMLX_NAMED(ushort)
ZMLX_NAMED(int)
ZMLX_NAMED(uint)
ZMLX_NAMED(long)
ZMLX_NAMED(ulong)
ZMLX_NAMED(half)
ZMLX_NAMED(float)
ZMLX_NAMED(bfloat)
#undef ZMLX_NAMED
namespace metal {
using ::bfloat;
#define ZMLX_ALSO(TYPE) using ::TYPE##2; using ::TYPE##3; using ::TYPE##4;
ZMLX_ALSO(bool)
ZMLX_ALSO(char)
ZMLX_ALSO(uchar)
ZMLX_ALSO(short)
ZMLX_ALSO(ushort)
ZMLX_ALSO(int)
ZMLX_ALSO(uint)
ZMLX_ALSO(long)
ZMLX_ALSO(ulong)
ZMLX_ALSO(half)
ZMLX_ALSO(float)
ZMLX_ALSO(bfloat)
#undef ZMLX_ALSO

// A value that is the same in all threads of a simdgroup.
template <typename T>
using uniform = T;
template <typename T>
constexpr T make_uniform(T value) {
  return value;
}

template <typename T, size_t N>
struct array {
  T elements[N];
#define ZMLX_AT(SPACE) const SPACE T& operator[](size_t i) const SPACE { return elements[i]; } \
  constexpr size_t size() const SPACE { return N; }
  ZMLX_SPACES(ZMLX_AT)
#undef ZMLX_AT
#define ZMLX_AT(SPACE) SPACE T& operator[](size_t i) SPACE { return elements[i]; }
  ZMLX_WRITABLE(ZMLX_AT)
#undef ZMLX_AT
};
} // namespace metal
