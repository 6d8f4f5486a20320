"""What blocks of a cluster do for each other in attention on tensor cores (devices from 9.0 on).

Blocks along the positions are a cluster of up to `CLUSTER`, which run at once and can write into
each other's shared memory. Each block of a cluster adds up a share of the result's elements: the
others give it their sums of these, and their maxima and sums of weights. A block knows how much it
is to be given, and its barrier counts the bytes that come in (`st.async`). So nothing goes through
device memory, no fence waits for what else was written, and a block that has everything may end.

Of several clusters each leaves its sums in device memory, share by share, and for each share the
last block to count adds up what the clusters have.
"""

from __future__ import annotations

#: Most blocks of a cluster on every device that has clusters.
CLUSTER = 8
#: Blocks of each of several clusters: larger ones do not find room on all multiprocessors.
FEW = 4

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
# Clusters have positions or have none as a whole.
LEAVE = """if (split / CLUSTER * CLUSTER >= tiles) {
  meet();
  return;
}
"""
SHARES = """
constexpr int SHARE = (HEADS * (DV / 4) + CLUSTER - 1) / CLUSTER;
__shared__ float4 given[CLUSTER * SHARE];
__shared__ float2 given_ends[CLUSTER * HEADS];
const int rank = split % CLUSTER, mine = rank * SHARE;
const int end = max(mine, min(mine + SHARE, heads * (DV / 4)));
// Gives four elements of a head to the block that adds them up, with the maximum and the sum of
// weights where they are the first of that head there.
auto give = [&](int h, int f, float4 sum, float2 ends) {
  const int i = h * (DV / 4) + f, owner = i / SHARE, slot = i % SHARE;
  give_to(given + rank * SHARE + slot, &barrier, owner, sum);
  if (f == 0 || slot == 0) {
    give_to(given_ends + rank * HEADS + h, &barrier, owner, ends);
  }
};
// Of the cluster's blocks these have positions, and give.
const int givers = min(CLUSTER, tiles - split + rank);
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
  float2 ends[CLUSTER];
  float4 some[CLUSTER];
  UNROLL
  for (int s = 0; s < CLUSTER; ++s) {
    ends[s] = make_float2(-INFINITY, 0.0f);
    some[s] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (s < givers) {
      ends[s] = given_ends[s * HEADS + h];
      some[s] = given[s * SHARE + i - mine];
    }
  }
  float2 all;
  const float4 sum = added(some, ends, all);
$write}
"""
# Blocks of one cluster that have elements of the same head write the same ends.
WRITE_PART = """  const int part = row * (SPLITS / CLUSTER) + split / CLUSTER;
  float* to = sums + (part * HEADS + h) * (DV + 4);
  *(float4*)(to + 4 * f) = sum;
  if (f == 0 || i == mine) {
    *(float2*)(to + DV) = all;
  }
"""
#: How parts of clusters are joined: those of each share by themselves.
JOINED = {
    "most": "SPLITS / CLUSTER",
    "parts": "min(PARTS, (tiles + CLUSTER - 1) / CLUSTER)",
    "counter": " + rank",
    "low": "mine",
    "high": "end",
}
