// Packed weights as the numbers of 16 bits that tensor cores take, exactly.
//
// A word becomes pairs of numbers: of 4 bits columns (0, 4), (1, 5), (2, 6), (3, 7), of 8 bits
// (0, 2), (1, 3), of 16 bits (0, 1), as shifting and masking gives them. Activations are laid out in
// the same order.
#pragma once

namespace zmlx {
namespace vectors {

enum Mode { AFFINE, MXFP4, NVFP4, MXFP8, DENSE };

// Both numbers of a word as constants. MAGIC is a power of two whose fraction ends with a bit of 1.
template <typename X>
struct Constants;
template <>
struct Constants<__nv_bfloat16> {
  enum : unsigned {
    ONE = 0x3f803f80u, MINUS_ONE = 0xbf80bf80u, MINUS_ZERO = 0x80008000u,
    MAGIC = 0x43004300u, MINUS_MIDDLE_4 = 0xc308c308u,  // 128, -(128 + 8)
    FP4 = 0x7e807e80u, FP8 = 0x7b807b80u,  // 2^126, 2^120
  };
};
template <>
struct Constants<__half> {
  enum : unsigned {
    ONE = 0x3c003c00u, MINUS_ONE = 0xbc00bc00u, MINUS_ZERO = 0x80008000u,
    MAGIC = 0x64006400u, MINUS_MIDDLE_4 = 0xe408e408u,  // 1024, -(1024 + 8)
    MINUS_MIDDLE_8 = 0xe480e480u,  // -(1024 + 128)
    FP4 = 0x74007400u, FP8 = 0x5c005c00u,  // 2^14, 2^8
  };
};

// The lowest 4 bits of both halves of a word, less 8.
template <typename X>
__device__ __forceinline__ unsigned affine4(unsigned w) {
  using N = Constants<X>;
  return fma2(and_or(w, 0x000f000fu, N::MAGIC), N::ONE, N::MINUS_MIDDLE_4, X());
}

// The lowest 8 bits of both halves of a word, less 128.
__device__ __forceinline__ unsigned affine8(unsigned w, __nv_bfloat16 kind) {
  // Fractions have 7 bits: 128 + (q mod 128), less 128 where q is 128 or more and less 256 where not.
  using N = Constants<__nv_bfloat16>;
  return fma2(and_xor(w, 0x00800080u, 0x43804380u), N::MINUS_ONE,
              and_or(w, 0x007f007fu, N::MAGIC), kind);
}
__device__ __forceinline__ unsigned affine8(unsigned w, __half kind) {
  using N = Constants<__half>;
  return fma2(and_or(w, 0x00ff00ffu, N::MAGIC), N::ONE, N::MINUS_MIDDLE_8, kind);
}

// Small floats are put where sign, exponent and fraction belong, and multiplied with what the
// exponents are apart; the product of bfloat16 puts the sign and the rest in place at once.
__device__ __forceinline__ unsigned fp4(unsigned w, __nv_bfloat16 kind) {
  using N = Constants<__nv_bfloat16>;
  return fma2((w & 0x000f000fu) * 0x1040u & 0x81c081c0u, N::FP4, N::MINUS_ZERO, kind);
}
__device__ __forceinline__ unsigned fp4(unsigned w, __half kind) {
  using N = Constants<__half>;
  return fma2(
      and_or(w << 12, 0x80008000u, w << 9 & 0x0e000e00u), N::FP4, N::MINUS_ZERO, kind);
}
__device__ __forceinline__ unsigned fp8(unsigned w, __nv_bfloat16 kind) {
  using N = Constants<__nv_bfloat16>;
  return fma2(
      and_or(w << 8, 0x80008000u, w << 4 & 0x07f007f0u), N::FP8, N::MINUS_ZERO, kind);
}
__device__ __forceinline__ unsigned fp8(unsigned w, __half kind) {
  using N = Constants<__half>;
  return fma2(
      and_or(w << 8, 0x80008000u, w << 7 & 0x3f803f80u), N::FP8, N::MINUS_ZERO, kind);
}

__device__ __forceinline__ unsigned part(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Four numbers of 16 bytes of weights, those of step j: two words for one product.
template <int MODE, int BITS, typename X>
__device__ __forceinline__ void unpack(const uint4& v, int j, unsigned& first, unsigned& second) {
  if constexpr (BITS == 16) {
    first = part(v, 2 * j);
    second = part(v, 2 * j + 1);
  } else if constexpr (BITS == 8) {
    unsigned w = part(v, j);
    first = MODE == AFFINE ? affine8(w, X()) : fp8(w, X());
    second = MODE == AFFINE ? affine8(w >> 8, X()) : fp8(w >> 8, X());
  } else {
    unsigned w = part(v, j / 2) >> 8 * (j % 2);
    first = MODE == AFFINE ? affine4<X>(w) : fp4(w, X());
    second = MODE == AFFINE ? affine4<X>(w >> 4) : fp4(w >> 4, X());
  }
}

// 8 activations in the order of the weights.
template <int BITS>
__device__ __forceinline__ uint4 ordered(const uint4& v) {
  if constexpr (BITS == 4) {
    return make_uint4(__byte_perm(v.x, v.z, 0x5410), __byte_perm(v.x, v.z, 0x7632),
                      __byte_perm(v.y, v.w, 0x5410), __byte_perm(v.y, v.w, 0x7632));
  } else if constexpr (BITS == 8) {
    return make_uint4(__byte_perm(v.x, v.y, 0x5410), __byte_perm(v.x, v.y, 0x7632),
                      __byte_perm(v.z, v.w, 0x5410), __byte_perm(v.z, v.w, 0x7632));
  } else {
    return v;
  }
}

__device__ __forceinline__ float widened(unsigned bits, __nv_bfloat16) {
  return __uint_as_float(bits << 16);
}
__device__ __forceinline__ float widened(unsigned bits, __half) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}
__device__ __forceinline__ float widened(unsigned bits, float) { return __uint_as_float(bits); }

// A scale from its bits.
template <int MODE, typename S>
__device__ __forceinline__ float scale_of(unsigned bits) {
  if constexpr (MODE == AFFINE) {
    return widened(bits, S());
  } else if constexpr (MODE == NVFP4) {  // e4m3, whose exponents are 8 below a half's
    return widened((bits & 128u) << 8 | (bits & 127u) << 7, __half()) * 256.0f;
  } else {
    return __uint_as_float(bits ? bits << 23 : 0x00400000u);
  }
}

}  // namespace vectors
}  // namespace zmlx
