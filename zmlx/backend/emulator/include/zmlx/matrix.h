// Matrices of 8 by 8 that a simdgroup holds together, two elements of a row in each lane.
#pragma once

#include <zmlx/simd.h>

namespace metal {

template <class T, int Rows, int Columns>
struct simdgroup_matrix;

template <class T>
struct simdgroup_matrix<T, 8, 8> {
  vec<T, 2> elements;

  simdgroup_matrix() = default;
  // This on the diagonal, zero elsewhere.
  explicit simdgroup_matrix(T value, ZMLX_SITE) {
    const uint32_t lane = zmlx::meet(true, file, line, column).own;
    for (int i = 0; i < 2; ++i) {
      elements[i] = row(lane) == column_of(lane) + i ? value : T(0);
    }
  }
  vec<T, 2>& thread_elements() {
    return elements;
  }
  const vec<T, 2>& thread_elements() const {
    return elements;
  }
  // Where a lane's first element is.
  static int row(uint32_t lane) {
    return int((lane / 4 & 4) + lane / 2 % 4);
  }
  static int column_of(uint32_t lane) {
    return int((lane / 4 & 2) * 2 + lane % 2 * 2);
  }
  // Which lane holds an element.
  static uint32_t lane_of(int row, int column) {
    return uint32_t((row & 4) << 2 | (column & 4) << 1 | (row & 3) << 1 | (column >> 1 & 1));
  }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

// d = a * b + c, each element summed in float from k = 0 on.
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(
    simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
    const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>& c, ZMLX_SITE) {
  struct Both {
    float a[2], b[2];
  };
  using M = simdgroup_matrix<D, 8, 8>;
  const auto lanes = zmlx::meet(
      Both{{float(a.elements[0]), float(a.elements[1])},
           {float(b.elements[0]), float(b.elements[1])}},
      file, line, column);
  for (int i = 0; i < 2; ++i) {
    const int row = M::row(lanes.own), at = M::column_of(lanes.own) + i;
    float sum = float(c.elements[i]);
    for (int k = 0; k < 8; ++k) {
      sum += lanes.from(M::lane_of(row, k)).a[k % 2] * lanes.from(M::lane_of(k, at)).b[at % 2];
    }
    d.elements[i] = D(sum);
  }
}
template <class D, class A, class B>
void simdgroup_multiply(
    simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
    const simdgroup_matrix<B, 8, 8>& b, ZMLX_SITE) {
  simdgroup_matrix<D, 8, 8> zero;
  zero.elements = vec<D, 2>(0);
  simdgroup_multiply_accumulate(d, a, b, zero, file, line, column);
}
template <class T>
simdgroup_matrix<T, 8, 8> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, 8, 8> filled;
  filled.elements = vec<T, 2>(value);
  return filled;
}
template <class T, class U>
void simdgroup_load(
    simdgroup_matrix<T, 8, 8>& d, const U* from, ulong stride = 8, ulong2 origin = ulong2(0),
    bool transposed = false, ZMLX_SITE) {
  using M = simdgroup_matrix<T, 8, 8>;
  const uint32_t lane = zmlx::meet(true, file, line, column).own;
  for (int i = 0; i < 2; ++i) {
    const ulong row = ulong(M::row(lane)), at = ulong(M::column_of(lane) + i);
    d.elements[i] = T(
        from[(origin[1] + (transposed ? at : row)) * stride + origin[0] + (transposed ? row : at)]);
  }
}
template <class T, class U>
void simdgroup_store(
    const simdgroup_matrix<T, 8, 8>& a, U* to, ulong stride = 8, ulong2 origin = ulong2(0),
    bool transposed = false, ZMLX_SITE) {
  using M = simdgroup_matrix<T, 8, 8>;
  const uint32_t lane = zmlx::meet(true, file, line, column).own;
  for (int i = 0; i < 2; ++i) {
    const ulong row = ulong(M::row(lane)), at = ulong(M::column_of(lane) + i);
    to[(origin[1] + (transposed ? at : row)) * stride + origin[0] + (transposed ? row : at)] =
        U(a.elements[i]);
  }
}

} // namespace metal
