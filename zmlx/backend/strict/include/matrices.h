// Matrices, and the 8 by 8 matrices of a simdgroup.
#pragma once

namespace metal {

template <typename T, int C, int R>
struct matrix {
  vec<T, R> columns[C];
#define ZMLX_AT(SPACE) \
  template <typename I> \
  vec<T, R> operator[](I column) const SPACE;
  ZMLX_SPACES(ZMLX_AT)
#undef ZMLX_AT
#define ZMLX_AT(SPACE) \
  template <typename I> \
  SPACE vec<T, R>& operator[](I column) SPACE;
  ZMLX_WRITABLE(ZMLX_AT)
#undef ZMLX_AT
};
template <typename T, int C, int R>
vec<T, R> operator*(matrix<T, C, R>, vec<T, C>);
template <typename T, int C, int R, int K>
matrix<T, K, R> operator*(matrix<T, C, R>, matrix<T, K, C>);
template <typename T, int C, int R>
matrix<T, C, R> operator*(matrix<T, C, R>, T);
template <typename T, int C, int R>
matrix<T, C, R> operator+(matrix<T, C, R>, matrix<T, C, R>);
template <typename T, int C, int R>
matrix<T, R, C> transpose(matrix<T, C, R>);

template <typename T, int C, int R>
struct simdgroup_matrix {
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal);
  thread vec<T, C * R / 32>& thread_elements() thread;

 private:
  T held[C * R / 32];
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

#define ZMLX_MOVES(SPACE)                                                                       \
  template <typename T, int C, int R>                                                           \
  void simdgroup_load(                                                                          \
      thread simdgroup_matrix<T, C, R>&, const SPACE T*, ulong = C, vec<ulong, 2> = 0,          \
      bool = false);                                                                            \
  template <typename T, int C, int R>                                                           \
  void simdgroup_store(                                                                         \
      simdgroup_matrix<T, C, R>, SPACE T*, ulong = C, vec<ulong, 2> = 0, bool = false);
ZMLX_MOVES(device)
ZMLX_MOVES(threadgroup)
#undef ZMLX_MOVES
template <typename D, typename A, typename B, typename C, int N>
void simdgroup_multiply_accumulate(
    thread simdgroup_matrix<D, N, N>&, simdgroup_matrix<A, N, N>, simdgroup_matrix<B, N, N>,
    simdgroup_matrix<C, N, N>);
template <typename D, typename A, typename B, int N>
void simdgroup_multiply(
    thread simdgroup_matrix<D, N, N>&, simdgroup_matrix<A, N, N>, simdgroup_matrix<B, N, N>);
template <typename T, int C, int R = C>
simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T);

} // namespace metal

#define ZMLX_MATRIX(T)                          \
  typedef metal::matrix<T, 2, 2> T##2x2;        \
  typedef metal::matrix<T, 3, 3> T##3x3;        \
  typedef metal::matrix<T, 4, 4> T##4x4;
ZMLX_MATRIX(float)
ZMLX_MATRIX(half)
#undef ZMLX_MATRIX
