// In place of MLX's file of this name, which says everything once for each address space.
#pragma once

#include <zmlx/metal.h>

#include "mlx/backend/metal/kernels/bf16.h"

template <class T>
struct complex_t;

template <class T>
inline constexpr bool is_complex_v = false;
template <class T>
inline constexpr bool is_complex_v<complex_t<T>> = true;

template <class T>
struct complex_t {
  using value_type = T;

  T real;
  T imag;

  constexpr complex_t(T real, T imag) : real(real), imag(imag) {}
  constexpr complex_t() : real(0), imag(0) {}
  template <zmlx::Number U>
  constexpr complex_t(U x) : real(T(x)), imag(T(0)) {}
  template <class U>
    requires(!std::is_same_v<U, T>)
  constexpr complex_t(complex_t<U> x) : real(T(x.real)), imag(T(x.imag)) {}
  constexpr complex_t(metal::vec<T, 2> v) : real(v.x), imag(v.y) {}

  constexpr operator metal::vec<T, 2>() const {
    return metal::vec<T, 2>(real, imag);
  }
  template <zmlx::Number U>
  constexpr operator U() const {
    return U(real);
  }
};

using complex32_t = complex_t<half>;
using complex64_t = complex_t<float>;

template <class T>
constexpr complex_t<T> operator-(complex_t<T> x) {
  return {T(-x.real), T(-x.imag)};
}
// Ordered by the real part, then the imaginary one.
template <class T>
constexpr bool operator>(complex_t<T> a, complex_t<T> b) {
  return a.real > b.real || (a.real == b.real && a.imag > b.imag);
}
template <class T>
constexpr bool operator>=(complex_t<T> a, complex_t<T> b) {
  return a.real > b.real || (a.real == b.real && a.imag >= b.imag);
}
template <class T>
constexpr bool operator<(complex_t<T> a, complex_t<T> b) {
  return b > a;
}
template <class T>
constexpr bool operator<=(complex_t<T> a, complex_t<T> b) {
  return b >= a;
}
template <class T>
constexpr bool operator==(complex_t<T> a, complex_t<T> b) {
  return a.real == b.real && a.imag == b.imag;
}
template <class T>
constexpr complex_t<T> operator+(complex_t<T> a, complex_t<T> b) {
  return {T(a.real + b.real), T(a.imag + b.imag)};
}
template <class T>
constexpr complex_t<T> operator-(complex_t<T> a, complex_t<T> b) {
  return {T(a.real - b.real), T(a.imag - b.imag)};
}
template <class T>
constexpr complex_t<T> operator*(complex_t<T> a, complex_t<T> b) {
  return {T(a.real * b.real - a.imag * b.imag), T(a.real * b.imag + a.imag * b.real)};
}
// A real operand touches what it has to: signs of zeros stay.
template <class T, zmlx::Number U>
constexpr complex_t<T> operator+(complex_t<T> a, U b) {
  return {T(a.real + T(b)), a.imag};
}
template <class T, zmlx::Number U>
constexpr complex_t<T> operator+(U a, complex_t<T> b) {
  return {T(T(a) + b.real), b.imag};
}
template <class T, zmlx::Number U>
constexpr complex_t<T> operator-(complex_t<T> a, U b) {
  return {T(a.real - T(b)), a.imag};
}
template <class T, zmlx::Number U>
constexpr complex_t<T> operator-(U a, complex_t<T> b) {
  return {T(T(a) - b.real), T(-b.imag)};
}
// By the larger part of the denominator (Smith), so that squares do not overflow.
template <class T>
constexpr complex_t<T> operator/(complex_t<T> a, complex_t<T> b) {
  const float ar = a.real, ai = a.imag, br = b.real, bi = b.imag;
  if (__builtin_fabsf(br) >= __builtin_fabsf(bi)) {
    const float ratio = bi / br;
    const float denominator = br + bi * ratio;
    return {T((ar + ai * ratio) / denominator), T((ai - ar * ratio) / denominator)};
  }
  const float ratio = br / bi;
  const float denominator = bi + br * ratio;
  return {T((ar * ratio + ai) / denominator), T((ai * ratio - ar) / denominator)};
}
template <class T, zmlx::Number U>
constexpr complex_t<T> operator/(U a, complex_t<T> b) {
  return complex_t<T>(a) / b;
}
// By part, with the sign of the divisor.
template <class T>
constexpr complex_t<T> operator%(complex_t<T> a, complex_t<T> b) {
  T real = a.real - b.real * int64_t(a.real / b.real);
  T imag = a.imag - b.imag * int64_t(a.imag / b.imag);
  if (real != 0 && (real < 0) != (b.real < 0)) {
    real += b.real;
  }
  if (imag != 0 && (imag < 0) != (b.imag < 0)) {
    imag += b.imag;
  }
  return {real, imag};
}
template <class T>
constexpr complex_t<T>& operator+=(complex_t<T>& a, complex_t<T> b) {
  return a = a + b;
}
template <class T>
constexpr complex_t<T>& operator-=(complex_t<T>& a, complex_t<T> b) {
  return a = a - b;
}
template <class T>
constexpr complex_t<T>& operator*=(complex_t<T>& a, complex_t<T> b) {
  return a = a * b;
}
template <class T>
constexpr complex_t<T>& operator/=(complex_t<T>& a, complex_t<T> b) {
  return a = a / b;
}
