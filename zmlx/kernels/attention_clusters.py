"""What blocks of a cluster do for each other in attention on tensor cores (devices from 9.0 on).

All blocks along the positions are one cluster of 2, 4 or 8, which run at once and can write into
each other's shared memory. Each of them adds up a share of the result's elements: the others give
it their sums of these, and their maxima and sums of weights. A block knows how much it is to be
given, and its barrier counts the bytes that come in (`st.async`). So nothing goes through device
memory, no fence waits for what else was written, and a block that has everything may end.

What it gives is the same as without a cluster, bit for bit: parts are added up by the same
operations in the same order (`Added`).
"""

from __future__ import annotations

#: How many blocks are a cluster; every device that has clusters takes them.
SIZES = (2, 4, 8)

# What a compiler for another machine would have to be told (tests do).
PRIMITIVES = """
namespace attention {
inline unsigned place_of(const void* variable) {
  return (unsigned)__cvta_generic_to_shared(variable);
}
// All threads of a cluster begin, and then meet: from there on blocks may give to each other.
inline void begin(uint64_t* barrier) {
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\\n"
                 "fence.mbarrier_init.release.cluster;"
                 : : "r"(place_of(barrier)) : "memory");
  }
  asm volatile("barrier.cluster.arrive.relaxed;" : : : "memory");
}
inline void meet() { asm volatile("barrier.cluster.wait;" : : : "memory"); }
// Gives a number to the variable of a block, whose barrier counts the bytes.
inline unsigned of_block(const void* variable, int block) {
  unsigned found;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(found) : "r"(place_of(variable)), "r"(block));
  return found;
}
inline void give_to(float4* variable, uint64_t* barrier, int block, float4 x) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
               "[%0], {%1, %2, %3, %4}, [%5];"
               : : "r"(of_block(variable, block)), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w),
                 "r"(of_block(barrier, block))
               : "memory");
}
inline void give_to(float2* variable, uint64_t* barrier, int block, float2 x) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 "
               "[%0], {%1, %2}, [%3];"
               : : "r"(of_block(variable, block)), "f"(x.x), "f"(x.y),
                 "r"(of_block(barrier, block))
               : "memory");
}
// One thread says how many bytes a block gets, and all wait for them.
inline void expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               : : "r"(place_of(barrier)), "r"(bytes) : "memory");
}
inline void wait_for_all(uint64_t* barrier) {
  unsigned done = 0;
  while (!done) {
    asm volatile("{.reg .pred done;\\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], 0;\\n"
                 "selp.u32 %0, 1, 0, done;}"
                 : "=r"(done) : "r"(place_of(barrier)) : "memory");
  }
}
}
"""

BEGIN = """__shared__ uint64_t barrier;
begin(&barrier);
"""
SHARES = """
constexpr int SHARE = (HEADS * (DV / 4) + SPLITS - 1) / SPLITS;
__shared__ float4 given[SPLITS * SHARE];
__shared__ float2 given_ends[SPLITS * HEADS];
const int mine = split * SHARE;
const int end = max(mine, min(mine + SHARE, heads * (DV / 4)));
// Gives four elements of a head to the block that adds them up, with the maximum and the sum of
// weights where they are the first of that head there.
auto give = [&](int h, int f, float4 sum, float2 ends) {
  const int i = h * (DV / 4) + f, owner = i / SHARE, slot = i % SHARE;
  give_to(given + split * SHARE + slot, &barrier, owner, sum);
  if (f == 0 || slot == 0) {
    give_to(given_ends + split * HEADS + h, &barrier, owner, ends);
  }
};
// The first blocks have positions, and give.
const int givers = min(SPLITS, tiles);
__syncwarp();  // the same thread has initialised the barrier, which racecheck does not see
if (thread == 0) {
  const int heads_here = end > mine ? (end - 1) / (DV / 4) - mine / (DV / 4) + 1 : 0;
  expect(&barrier, givers * (int)((end - mine) * sizeof(float4) + heads_here * sizeof(float2)));
}
"""
MEET = """meet();
"""
COLLECT = """
wait_for_all(&barrier);
for (int i = mine + thread; i < end; i += THREADS) {
  const int h = i / (DV / 4), f = i % (DV / 4);
  float4 some[SPLITS];
  float2 ends[SPLITS];
  UNROLL
  for (int s = 0; s < SPLITS; ++s) {
    const int giver = min(s, givers - 1);
    some[s] = given[giver * SHARE + i - mine];
    ends[s] = given_ends[giver * HEADS + h];
  }
  Added all;
  all.add(some, ends, givers);
  write_four(out + (batch * KV_HEADS * SHARED + head + h) * DV + 4 * f, all.sum, all.ends.y);
}
"""
