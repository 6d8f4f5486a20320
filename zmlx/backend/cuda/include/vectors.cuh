// Vectors of two, three and four: components, swizzles, indexing, arithmetic, conversions.
#pragma once

#include "scalars.cuh"

namespace mlx::core::cu::metal {

template <class T, int N>
struct components;
template <class T>
struct alignas(2 * sizeof(T)) components<T, 2> {
  union { T x, r; };
  union { T y, g; };
  components() = default;
  constexpr components(T a, T b) : x(a), y(b) {}
};
template <class T>
struct alignas(4 * sizeof(T)) components<T, 3> {
  union { T x, r; };
  union { T y, g; };
  union { T z, b; };
  components() = default;
  constexpr components(T a, T b, T c) : x(a), y(b), z(c) {}
};
template <class T>
struct alignas(4 * sizeof(T)) components<T, 4> {
  union { T x, r; };
  union { T y, g; };
  union { T z, b; };
  union { T w, a; };
  components() = default;
  constexpr components(T p, T q, T s, T t) : x(p), y(q), z(s), w(t) {}
};

template <class T, int N>
struct vec;
template <class T, int N, class Wide = vec<T, N>>
struct packed_vec;

template <class T>
struct width : integral_constant<int, 1> {};
template <class T, int N>
struct width<vec<T, N>> : integral_constant<int, N> {};
template <class T, int N>
struct width<packed_vec<T, N>> : integral_constant<int, N> {};
template <class T>
constexpr bool is_vec_v = width<remove_cv_t<T>>::value > 1;
template <class T>
struct element {
  using type = T;
};
template <class T, int N>
struct element<vec<T, N>> {
  using type = T;
};
template <class T>
using element_t = typename element<remove_cv_t<T>>::type;

template <int I, class T>
constexpr auto component(const T& v) {
  if constexpr (width<T>::value == 1) return v;
  else if constexpr (I == 0) return v.x;
  else if constexpr (I == 1) return v.y;
  else if constexpr (I == 2) return v.z;
  else return v.w;
}
// The I-th component of values laid side by side.
template <int I, class First, class... Rest>
constexpr auto pick(const First& first, const Rest&... rest) {
  if constexpr (I < width<First>::value) return component<I>(first);
  else return pick<I - width<First>::value>(rest...);
}

template <int... I>
struct swizzle {};

// What `v.xz = ...` assigns to.
template <class T, int N, int... I>
struct selected {
  vec<T, N>& to;
  using value = vec<T, sizeof...(I)>;
  operator value() const { return value(to[I]...); }
  value operator=(value from) const {
    int k = 0;
    ((to[I] = from[k++]), ...);
    return from;
  }
  value operator+=(value o) const { return *this = value(*this) + o; }
  value operator-=(value o) const { return *this = value(*this) - o; }
  value operator*=(value o) const { return *this = value(*this) * o; }
  value operator/=(value o) const { return *this = value(*this) / o; }
};

template <class T, int N>
struct vec : components<T, N> {
  using scalar = T;

  vec() = default;
  template <class S, enable_if_t<is_scalar_v<S>, int> = 0>
  constexpr vec(S s) : vec(cuda::std::make_integer_sequence<int, N>(), s) {}
  template <class U>
  explicit constexpr vec(vec<U, N> o) : vec(cuda::std::make_integer_sequence<int, N>(), 0, o) {}
  template <class A, class B, class... More>
  constexpr vec(A a, B b, More... more)
      : vec(cuda::std::make_integer_sequence<int, N>(), 0, a, b, more...) {
    static_assert((width<A>::value + width<B>::value + ... + width<More>::value) == N,
                  "a vector takes one value for each component, or one for all");
  }

  T& operator[](int i) { return reinterpret_cast<T*>(this)[i]; }
  const T& operator[](int i) const { return reinterpret_cast<const T*>(this)[i]; }
  template <int... I>
  constexpr vec<T, sizeof...(I)> get(swizzle<I...>) const {
    return vec<T, sizeof...(I)>(component<I>(*this)...);
  }
  template <int... I>
  selected<T, N, I...> put(swizzle<I...>) { return {*this}; }

  vec operator+() const { return *this; }
  vec operator-() const { vec r; for (int i = 0; i < N; ++i) r[i] = T(-(*this)[i]); return r; }
  vec operator~() const { vec r; for (int i = 0; i < N; ++i) r[i] = T(~(*this)[i]); return r; }
  vec<bool, N> operator!() const {
    vec<bool, N> r;
    for (int i = 0; i < N; ++i) r[i] = !(*this)[i];
    return r;
  }
  vec& operator++() { return *this += vec(1); }
  vec& operator--() { return *this -= vec(1); }

#define ZMLX_VEC(OP)                                                                               \
  friend vec operator OP(vec a, vec b) {                                                           \
    vec r;                                                                                         \
    for (int i = 0; i < N; ++i) r[i] = T(a[i] OP b[i]);                                            \
    return r;                                                                                      \
  }                                                                                                \
  friend vec& operator OP##=(vec& a, vec b) { return a = a OP b; }
  ZMLX_VEC(+)
  ZMLX_VEC(-)
  ZMLX_VEC(*)
  ZMLX_VEC(/)
  ZMLX_VEC(%)
  ZMLX_VEC(&)
  ZMLX_VEC(|)
  ZMLX_VEC(^)
  ZMLX_VEC(<<)
  ZMLX_VEC(>>)
#undef ZMLX_VEC
#define ZMLX_VEC(OP)                                                                               \
  friend vec<bool, N> operator OP(vec a, vec b) {                                                  \
    vec<bool, N> r;                                                                                \
    for (int i = 0; i < N; ++i) r[i] = a[i] OP b[i];                                               \
    return r;                                                                                      \
  }
  ZMLX_VEC(<)
  ZMLX_VEC(>)
  ZMLX_VEC(<=)
  ZMLX_VEC(>=)
  ZMLX_VEC(==)
  ZMLX_VEC(!=)
  ZMLX_VEC(&&)
  ZMLX_VEC(||)
#undef ZMLX_VEC

 private:
  template <class, int>
  friend struct vec;
  template <int... I, class S>
  constexpr vec(cuda::std::integer_sequence<int, I...>, S s)
      : components<T, N>((void(I), static_cast<T>(s))...) {}
  template <int... I, class... A>
  constexpr vec(cuda::std::integer_sequence<int, I...>, int, const A&... a)
      : components<T, N>(static_cast<T>(pick<I>(a...))...) {}
};

// Without padding and with the alignment of one component. Computing is done as a vec, whose operators
// are found because it is one of the template's arguments.
template <class T>
struct packed_vec<T, 2, vec<T, 2>> {
  T x, y;
  packed_vec() = default;
  constexpr packed_vec(T a, T b) : x(a), y(b) {}
  constexpr packed_vec(vec<T, 2> v) : x(v.x), y(v.y) {}
  constexpr operator vec<T, 2>() const { return vec<T, 2>(x, y); }
  T& operator[](int i) { return (&x)[i]; }
  const T& operator[](int i) const { return (&x)[i]; }
};
template <class T>
struct packed_vec<T, 3, vec<T, 3>> {
  T x, y, z;
  packed_vec() = default;
  constexpr packed_vec(T a, T b, T c) : x(a), y(b), z(c) {}
  constexpr packed_vec(vec<T, 3> v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator vec<T, 3>() const { return vec<T, 3>(x, y, z); }
  T& operator[](int i) { return (&x)[i]; }
  const T& operator[](int i) const { return (&x)[i]; }
};
template <class T>
struct packed_vec<T, 4, vec<T, 4>> {
  T x, y, z, w;
  packed_vec() = default;
  constexpr packed_vec(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
  constexpr packed_vec(vec<T, 4> v) : x(v.x), y(v.y), z(v.z), w(v.w) {}
  constexpr operator vec<T, 4>() const { return vec<T, 4>(x, y, z, w); }
  T& operator[](int i) { return (&x)[i]; }
  const T& operator[](int i) const { return (&x)[i]; }
};

// Applied to components; scalars beside vectors are repeated.
template <class F, class T>
constexpr auto each(F f, T a) {
  if constexpr (is_vec_v<T>) {
    vec<decltype(f(a.x)), width<T>::value> r;
    for (int i = 0; i < width<T>::value; ++i) r[i] = f(a[i]);
    return r;
  } else {
    return f(a);
  }
}
template <class T>
constexpr auto at(const T& v, int i) {
  if constexpr (is_vec_v<T>) return v[i];
  else return v;
}
template <class... T>
constexpr int widest(int first, T... rest) {
  ((first = rest > first ? rest : first), ...);
  return first;
}
template <class F, class... T>
constexpr auto together(F f, T... a) {
  constexpr int n = widest(width<T>::value...);
  if constexpr (n > 1) {
    vec<decltype(f(at(a, 0)...)), n> r;
    for (int i = 0; i < n; ++i) r[i] = f(at(a, i)...);
    return r;
  } else {
    return f(a...);
  }
}

#define ZMLX_NAMES(TYPE)                                                                           \
  using TYPE##2 = vec<TYPE, 2>;                                                                    \
  using TYPE##3 = vec<TYPE, 3>;                                                                    \
  using TYPE##4 = vec<TYPE, 4>;                                                                    \
  using packed_##TYPE##2 = packed_vec<TYPE, 2>;                                                    \
  using packed_##TYPE##3 = packed_vec<TYPE, 3>;                                                    \
  using packed_##TYPE##4 = packed_vec<TYPE, 4>;
ZMLX_NAMES(bool)
ZMLX_NAMES(char)
ZMLX_NAMES(uchar)
ZMLX_NAMES(short)
ZMLX_NAMES(ushort)
ZMLX_NAMES(int)
ZMLX_NAMES(uint)
ZMLX_NAMES(long)
ZMLX_NAMES(ulong)
ZMLX_NAMES(float)
ZMLX_NAMES(half)
ZMLX_NAMES(bfloat)
#undef ZMLX_NAMES

}  // namespace mlx::core::cu::metal
