// The instructions of zmlx/kernels/vectors/include/machine.cuh, as PTX's manual describes them.
#pragma once

namespace zmlx {
namespace vectors {

template <typename T>
T aligned_read(const T* from) {
  if (reinterpret_cast<size_t>(from) % sizeof(T)) block::fail("a load", "its address is not aligned");
  return *from;
}
inline uint4 read_once(const uint4* from) { return aligned_read(from); }
inline uint4 read(const uint4* from) { return aligned_read(from); }
inline uint2 read(const uint2* from) { return aligned_read(from); }
inline unsigned read(const unsigned* from) { return aligned_read(from); }
inline unsigned read(const unsigned short* from) { return aligned_read(from); }
inline unsigned read(const unsigned char* from) { return *from; }

inline float half_of(unsigned word, int i, __nv_bfloat16) {
  return __uint_as_float(i ? word & 0xffff0000u : word << 16);
}
inline float half_of(unsigned word, int i, __half) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16 * i)));
}
inline unsigned rounded2(float low, float high, __nv_bfloat16) {
  return bfloat_bits(low) | unsigned(bfloat_bits(high)) << 16;
}
inline unsigned rounded2(float low, float high, __half) {
  __half two[2] = {__half(low), __half(high)};
  unsigned bits;
  std::memcpy(&bits, two, 4);
  return bits;
}
inline unsigned and_or(unsigned a, unsigned mask, unsigned bits) { return (a & mask) | bits; }
inline unsigned and_xor(unsigned a, unsigned mask, unsigned bits) { return (a & mask) ^ bits; }

template <typename X>
unsigned fma2(unsigned a, unsigned b, unsigned c, X kind) {
  float d[2];
  for (int i = 0; i < 2; ++i) {
    d[i] = float(double(half_of(a, i, kind)) * half_of(b, i, kind) + half_of(c, i, kind));
  }
  return rounded2(d[0], d[1], kind);
}

// Row r of the first factor is in lanes 4 r to 4 r + 3, rows from 8 on in the second and fourth
// word; its columns 2 t and 2 t + 1 are in lane t of these, those from 8 on in the last two words.
// Of the other factor rows and columns are the other way round.
template <typename X>
void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, X kind) {
  block::Warp& warp = block::warp();
  const int lane = block::lane();
  std::memcpy(warp.a[lane], a, 16);
  warp.b[lane][0] = b0, warp.b[lane][1] = b1;
  block::meet_warp("mma");
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = 0;
    for (int k = 0; k < 16; ++k) {
      const int t = k % 8 / 2, high = k / 8;
      sum += double(half_of(warp.a[row % 8 * 4 + t][row / 8 + 2 * high], k % 2, kind)) *
             half_of(warp.b[column * 4 + t][high], k % 2, kind);
    }
    c[i] = float(c[i] + sum);
  }
  block::meet_warp("mma's end");
}

inline void wait_for(int id, int threads) { block::meet(block::barriers[id], threads, "barrier"); }

}  // namespace vectors
}  // namespace zmlx
