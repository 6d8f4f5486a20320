// Vectors of 2, 3 and 4 components, with swizzles, and the operators between them.
#pragma once

#include <zmlx/floats.h>

namespace metal {

template <class T, int N>
struct vec;
// What has it as a base finds the operators of this namespace.
struct Operand {};

} // namespace metal

namespace zmlx {

template <class T>
struct Components { // of what a vector can be made of
  using element = T;
  static constexpr int count = 1;
};
template <class T, int N>
struct Components<metal::vec<T, N>> {
  using element = T;
  static constexpr int count = N;
};

// The lane at an offset of a vector, under one of Metal's names.
template <class T, int N, int... I>
struct Named;
template <class T, int N, int A, int B>
struct Named<T, N, A, B> {
  union {
    T values[N];
    struct {
      T before_x[A], x;
    };
    struct {
      T before_y[B], y;
    };
    struct {
      T before_r[A], r;
    };
    struct {
      T before_g[B], g;
    };
  };
};
template <class T, int N, int A, int B, int C>
struct Named<T, N, A, B, C> {
  union {
    T values[N];
    struct {
      T before_x[A], x;
    };
    struct {
      T before_y[B], y;
    };
    struct {
      T before_z[C], z;
    };
    struct {
      T before_r[A], r;
    };
    struct {
      T before_g[B], g;
    };
    struct {
      T before_b[C], b;
    };
  };
};
template <class T, int N, int A, int B, int C, int D>
struct Named<T, N, A, B, C, D> {
  union {
    T values[N];
    struct {
      T before_x[A], x;
    };
    struct {
      T before_y[B], y;
    };
    struct {
      T before_z[C], z;
    };
    struct {
      T before_w[D], w;
    };
    struct {
      T before_r[A], r;
    };
    struct {
      T before_g[B], g;
    };
    struct {
      T before_b[C], b;
    };
    struct {
      T before_a[D], a;
    };
  };
};

// Components of a vector in some order, as they lie in it; each can be named again: `v.zyx.x`.
template <class T, int N, int... I>
struct Swizzle : metal::Operand, Named<T, N, I...> {
  static constexpr int count = sizeof...(I);
  using Named<T, N, I...>::values;

  constexpr T operator[](int i) const {
    constexpr int order[] = {I...};
    return values[order[i]];
  }

  constexpr operator metal::vec<T, count>() const {
    return metal::vec<T, count>(values[I]...);
  }
  constexpr Swizzle& operator=(const metal::vec<T, count>& from) {
    int i = 0;
    ((values[I] = from[i++]), ...);
    return *this;
  }
  constexpr Swizzle& operator=(const Swizzle& from) {
    return *this = metal::vec<T, count>(from);
  }
  template <class U>
  constexpr Swizzle& operator+=(const U& from) {
    return *this = metal::vec<T, count>(*this) + from;
  }
  template <class U>
  constexpr Swizzle& operator-=(const U& from) {
    return *this = metal::vec<T, count>(*this) - from;
  }
  template <class U>
  constexpr Swizzle& operator*=(const U& from) {
    return *this = metal::vec<T, count>(*this) * from;
  }
  template <class U>
  constexpr Swizzle& operator/=(const U& from) {
    return *this = metal::vec<T, count>(*this) / from;
  }
};
template <class T, int N, int... I>
struct Components<Swizzle<T, N, I...>> {
  using element = T;
  static constexpr int count = sizeof...(I);
};

template <class T>
inline constexpr int count_of = Components<std::remove_cvref_t<T>>::count;

// What the components of a vector lie in; its names are those of Metal.
template <class T, int N>
struct Storage;

template <class T>
struct Storage<T, 2> {
  union {
    T values[2];
    struct {
      T x, y;
    };
    struct {
      T r, g;
    };
    Swizzle<T, 2, 0, 0> xx;
    Swizzle<T, 2, 0, 1> xy, rg;
    Swizzle<T, 2, 1, 0> yx;
    Swizzle<T, 2, 1, 1> yy;
    Swizzle<T, 2, 0, 0, 0> xxx;
    Swizzle<T, 2, 0, 1, 0, 1> xyxy;
  };
};
template <class T>
struct Storage<T, 3> {
  union {
    T values[3];
    struct {
      T x, y, z;
    };
    struct {
      T r, g, b;
    };
    Swizzle<T, 3, 0, 0> xx;
    Swizzle<T, 3, 0, 1> xy, rg;
    Swizzle<T, 3, 0, 2> xz;
    Swizzle<T, 3, 1, 0> yx;
    Swizzle<T, 3, 1, 1> yy;
    Swizzle<T, 3, 1, 2> yz, gb;
    Swizzle<T, 3, 2, 0> zx;
    Swizzle<T, 3, 2, 1> zy;
    Swizzle<T, 3, 2, 2> zz;
    Swizzle<T, 3, 0, 0, 0> xxx;
    Swizzle<T, 3, 0, 1, 2> xyz, rgb;
    Swizzle<T, 3, 1, 2, 0> yzx;
    Swizzle<T, 3, 2, 0, 1> zxy;
    Swizzle<T, 3, 2, 1, 0> zyx, bgr;
  };
};
template <class T>
struct Storage<T, 4> {
  union {
    T values[4];
    struct {
      T x, y, z, w;
    };
    struct {
      T r, g, b, a;
    };
    Swizzle<T, 4, 0, 0> xx;
    Swizzle<T, 4, 0, 1> xy, rg;
    Swizzle<T, 4, 0, 2> xz;
    Swizzle<T, 4, 0, 3> xw;
    Swizzle<T, 4, 1, 0> yx;
    Swizzle<T, 4, 1, 1> yy;
    Swizzle<T, 4, 1, 2> yz, gb;
    Swizzle<T, 4, 1, 3> yw;
    Swizzle<T, 4, 2, 0> zx;
    Swizzle<T, 4, 2, 1> zy;
    Swizzle<T, 4, 2, 2> zz;
    Swizzle<T, 4, 2, 3> zw, ba;
    Swizzle<T, 4, 3, 0> wx;
    Swizzle<T, 4, 3, 1> wy;
    Swizzle<T, 4, 3, 2> wz;
    Swizzle<T, 4, 3, 3> ww;
    Swizzle<T, 4, 0, 0, 0> xxx;
    Swizzle<T, 4, 0, 1, 2> xyz, rgb;
    Swizzle<T, 4, 1, 2, 3> yzw, gba;
    Swizzle<T, 4, 2, 1, 0> zyx, bgr;
    Swizzle<T, 4, 0, 0, 0, 0> xxxx;
    Swizzle<T, 4, 1, 1, 1, 1> yyyy;
    Swizzle<T, 4, 2, 2, 2, 2> zzzz;
    Swizzle<T, 4, 3, 3, 3, 3> wwww;
    Swizzle<T, 4, 0, 1, 2, 3> xyzw, rgba;
    Swizzle<T, 4, 3, 2, 1, 0> wzyx, abgr;
    Swizzle<T, 4, 2, 3, 0, 1> zwxy;
    Swizzle<T, 4, 1, 0, 3, 2> yxwz;
    Swizzle<T, 4, 2, 1, 0, 3> zyxw, bgra;
    Swizzle<T, 4, 0, 1, 0, 1> xyxy;
    Swizzle<T, 4, 2, 3, 2, 3> zwzw;
  };
};

} // namespace zmlx

namespace metal {

template <class T, int N>
struct alignas(sizeof(T) * (N == 3 ? 4 : N)) vec : zmlx::Storage<T, N> {
  using zmlx::Storage<T, N>::values;

  vec() = default;
  constexpr vec(const vec& from) = default;
  // Not by itself: swizzles in the union are assigned in another way.
  constexpr vec& operator=(const vec& from) {
    for (int i = 0; i < N; ++i) {
      values[i] = from.values[i];
    }
    return *this;
  }
  // One number for all components.
  template <class U>
    requires(zmlx::Arithmetic<U> || is_floating_point_v<U>)
  constexpr vec(U value) {
    for (int i = 0; i < N; ++i) {
      set(i, T(value));
    }
  }
  template <class U>
  constexpr explicit vec(const vec<U, N>& from) {
    for (int i = 0; i < N; ++i) {
      set(i, T(from[i]));
    }
  }
  // Numbers and vectors that have N components together.
  template <class A, class B, class... More>
    requires(zmlx::count_of<A> + zmlx::count_of<B> + (0 + ... + zmlx::count_of<More>) == N)
  constexpr vec(const A& a, const B& b, const More&... more) {
    int at = 0;
    append(at, a);
    append(at, b);
    (append(at, more), ...);
  }
  constexpr explicit vec(const T (&from)[N]) {
    for (int i = 0; i < N; ++i) {
      set(i, from[i]);
    }
  }

  constexpr T& operator[](int i) {
    return values[i];
  }
  constexpr const T& operator[](int i) const {
    return values[i];
  }

 private:
  constexpr void set(int i, T value) {
    values[i] = value;
  }
  template <class A>
  constexpr void append(int& at, const A& part) {
    if constexpr (zmlx::count_of<A> == 1) {
      set(at++, T(part));
    } else {
      const vec<typename zmlx::Components<A>::element, zmlx::count_of<A>> whole = part;
      for (int i = 0; i < zmlx::count_of<A>; ++i) {
        set(at++, T(whole[i]));
      }
    }
  }
};

#define ZMLX_VECTORS(name, T) \
  typedef vec<T, 2> name##2;  \
  typedef vec<T, 3> name##3;  \
  typedef vec<T, 4> name##4;
ZMLX_VECTORS(bool, bool)
ZMLX_VECTORS(char, int8_t)
ZMLX_VECTORS(uchar, uchar)
ZMLX_VECTORS(short, short)
ZMLX_VECTORS(ushort, ushort)
ZMLX_VECTORS(int, int)
ZMLX_VECTORS(uint, uint)
ZMLX_VECTORS(long, int64_t)
ZMLX_VECTORS(ulong, uint64_t)
ZMLX_VECTORS(half, half)
ZMLX_VECTORS(bfloat, bfloat)
ZMLX_VECTORS(float, float)
#undef ZMLX_VECTORS

// Without padding and with the alignment of one component.
template <class T, int N>
struct packed_vec {
  T values[N];

  packed_vec() = default;
  constexpr packed_vec(const vec<T, N>& from) {
    for (int i = 0; i < N; ++i) {
      values[i] = from[i];
    }
  }
  constexpr operator vec<T, N>() const {
    vec<T, N> to(T(0));
    for (int i = 0; i < N; ++i) {
      to[i] = values[i];
    }
    return to;
  }
  constexpr T& operator[](int i) {
    return values[i];
  }
  constexpr const T& operator[](int i) const {
    return values[i];
  }
};
#define ZMLX_PACKED(name, T)                \
  typedef packed_vec<T, 2> packed_##name##2; \
  typedef packed_vec<T, 3> packed_##name##3; \
  typedef packed_vec<T, 4> packed_##name##4;
ZMLX_PACKED(char, int8_t)
ZMLX_PACKED(uchar, uchar)
ZMLX_PACKED(short, short)
ZMLX_PACKED(ushort, ushort)
ZMLX_PACKED(int, int)
ZMLX_PACKED(uint, uint)
ZMLX_PACKED(half, half)
ZMLX_PACKED(bfloat, bfloat)
ZMLX_PACKED(float, float)
#undef ZMLX_PACKED

} // namespace metal

namespace zmlx {

// A vector as it is, a swizzle as a vector.
template <class T, int N>
constexpr const metal::vec<T, N>& plain(const metal::vec<T, N>& v) {
  return v;
}
template <class T, int N, int... I>
constexpr metal::vec<T, sizeof...(I)> plain(const Swizzle<T, N, I...>& v) {
  return v;
}

template <class T>
concept Vector = count_of<T> > 1;
template <class T>
concept Number = Arithmetic<std::remove_cvref_t<T>> ||
    metal::is_floating_point_v<std::remove_cvref_t<T>>;
template <class T>
using element_of = typename Components<std::remove_cvref_t<T>>::element;

template <class A, class F>
constexpr auto each(const A& a, F f) {
  constexpr int n = count_of<A>;
  const auto& v = plain(a);
  metal::vec<decltype(f(v[0])), n> out;
  for (int i = 0; i < n; ++i) {
    out[i] = f(v[i]);
  }
  return out;
}
template <class A, class B, class F>
constexpr auto each(const A& a, const B& b, F f) {
  constexpr int n = count_of<A>;
  static_assert(n == count_of<B>, "vectors of different lengths");
  const auto& v = plain(a);
  const auto& w = plain(b);
  metal::vec<decltype(f(v[0], w[0])), n> out;
  for (int i = 0; i < n; ++i) {
    out[i] = f(v[i], w[i]);
  }
  return out;
}
template <class A, class B, class C, class F>
constexpr auto each(const A& a, const B& b, const C& c, F f) {
  constexpr int n = count_of<A>;
  static_assert(n == count_of<B> && n == count_of<C>, "vectors of different lengths");
  const auto& v = plain(a);
  const auto& w = plain(b);
  const auto& u = plain(c);
  metal::vec<decltype(f(v[0], w[0], u[0])), n> out;
  for (int i = 0; i < n; ++i) {
    out[i] = f(v[i], w[i], u[i]);
  }
  return out;
}

} // namespace zmlx

namespace metal {

// Between vectors of one type; a number takes the type of the other operand's components.
#define ZMLX_VECTOR_OPERATOR(op, Result)                                                \
  template <zmlx::Vector A, zmlx::Vector B>                                             \
  constexpr auto operator op(const A& a, const B& b) {                                  \
    using T = zmlx::element_of<A>;                                                      \
    return zmlx::each(a, b, [](T x, zmlx::element_of<B> y) { return Result(x op y); }); \
  }                                                                                     \
  template <zmlx::Vector A, zmlx::Number B>                                             \
  constexpr auto operator op(const A& a, const B& b) {                                  \
    using T = zmlx::element_of<A>;                                                      \
    return zmlx::each(a, [y = T(b)](T x) { return Result(x op y); });                   \
  }                                                                                     \
  template <zmlx::Number A, zmlx::Vector B>                                             \
  constexpr auto operator op(const A& a, const B& b) {                                  \
    using T = zmlx::element_of<B>;                                                      \
    return zmlx::each(b, [x = T(a)](T y) { return Result(x op y); });                   \
  }
#define ZMLX_VECTOR_ARITHMETIC(op)                        \
  ZMLX_VECTOR_OPERATOR(op, T)                             \
  template <class T, int N, class B>                      \
  constexpr metal::vec<T, N>& operator op##=(metal::vec<T, N>& a, const B& b) { \
    return a = metal::vec<T, N>(a op b);                  \
  }
ZMLX_VECTOR_ARITHMETIC(+)
ZMLX_VECTOR_ARITHMETIC(-)
ZMLX_VECTOR_ARITHMETIC(*)
ZMLX_VECTOR_ARITHMETIC(/)
ZMLX_VECTOR_ARITHMETIC(%)
ZMLX_VECTOR_ARITHMETIC(&)
ZMLX_VECTOR_ARITHMETIC(|)
ZMLX_VECTOR_ARITHMETIC(^)
ZMLX_VECTOR_ARITHMETIC(<<)
ZMLX_VECTOR_ARITHMETIC(>>)
ZMLX_VECTOR_OPERATOR(<, bool)
ZMLX_VECTOR_OPERATOR(<=, bool)
ZMLX_VECTOR_OPERATOR(>, bool)
ZMLX_VECTOR_OPERATOR(>=, bool)
ZMLX_VECTOR_OPERATOR(==, bool)
ZMLX_VECTOR_OPERATOR(!=, bool)
ZMLX_VECTOR_OPERATOR(&&, bool)
ZMLX_VECTOR_OPERATOR(||, bool)
#undef ZMLX_VECTOR_ARITHMETIC
#undef ZMLX_VECTOR_OPERATOR

template <class T, int N>
constexpr vec<T, N>& operator++(vec<T, N>& a) {
  return a += T(1);
}
template <class T, int N>
constexpr vec<T, N>& operator--(vec<T, N>& a) {
  return a -= T(1);
}
template <class T, int N>
constexpr vec<T, N> operator++(vec<T, N>& a, int) {
  const vec<T, N> before = a;
  a += T(1);
  return before;
}
template <class T, int N>
constexpr vec<T, N> operator--(vec<T, N>& a, int) {
  const vec<T, N> before = a;
  a -= T(1);
  return before;
}
template <zmlx::Vector A>
constexpr auto operator-(const A& a) {
  using T = zmlx::element_of<A>;
  return zmlx::each(a, [](T x) { return T(-x); });
}
template <zmlx::Vector A>
constexpr auto operator~(const A& a) {
  using T = zmlx::element_of<A>;
  return zmlx::each(a, [](T x) { return T(~x); });
}
template <zmlx::Vector A>
constexpr auto operator!(const A& a) {
  return zmlx::each(a, [](auto x) { return !x; });
}

} // namespace metal
