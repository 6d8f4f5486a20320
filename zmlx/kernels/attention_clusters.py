"""What blocks of a cluster do for each other in attention on tensor cores (devices from 9.0 on).

Blocks along the positions are a cluster of up to `CLUSTER`, which run at once and can write into
each other's shared memory. Each block of a cluster adds up a share of the result's elements: the
others give it their sums of these, and their maxima and sums of weights. So nothing goes through
device memory, and one wait is all: a block that has met the others owes them nothing more. Of
several clusters each leaves its sums in device memory, share by share, and for each share the last
block to count adds up what the clusters have.
"""

from __future__ import annotations

#: Most blocks of a cluster on every device that has clusters.
CLUSTER = 8
#: Blocks of each of several clusters: larger ones do not find room on all multiprocessors.
FEW = 4

# What a compiler for another machine would have to be told (tests do).
PRIMITIVES = """
namespace attention {
// Blocks of a cluster meet in two steps: a thread says that it has come, and later waits for all.
// What was written before the first can be seen after the second.
inline void come() { asm volatile("barrier.cluster.arrive.release;" : : : "memory"); }
inline void meet() { asm volatile("barrier.cluster.wait.acquire;" : : : "memory"); }
// A shared variable of another block of the cluster.
template <typename X>
inline X* of_block(X* variable, int block) {
  X* found;
  asm("mapa.u64 %0, %1, %2;" : "=l"(found) : "l"(variable), "r"(block));
  return found;
}
}
"""

# Others may write here only when this block has begun.
BEGIN = """come();
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
const int rank = split % CLUSTER;
// Gives four elements of a head to the block that adds them up, with the maximum and the sum of
// weights where they are the first of that head there.
auto give = [&](int h, int f, float4 sum, float2 ends) {
  const int i = h * (DV / 4) + f, owner = i / SHARE, slot = i % SHARE;
  *of_block(given + rank * SHARE + slot, owner) = sum;
  if (f == 0 || slot == 0) {
    *of_block(given_ends + rank * HEADS + h, owner) = ends;
  }
};
meet();
"""
COLLECT = """
come();
meet();
const int came = min(CLUSTER, tiles - split + rank);
const int mine = rank * SHARE, end = min(mine + SHARE, heads * (DV / 4));
for (int i = mine + thread; i < end; i += THREADS) {
  const int h = i / (DV / 4), f = i % (DV / 4);
  float2 ends[CLUSTER];
  float4 some[CLUSTER];
  UNROLL
  for (int s = 0; s < CLUSTER; ++s) {
    ends[s] = make_float2(-INFINITY, 0.0f);
    some[s] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (s < came) {
      ends[s] = given_ends[s * HEADS + h];
      some[s] = given[s * SHARE + i - mine];
    }
  }
  float2 all;
  const float4 sum = added(some, ends, all);
$write}
"""
# Blocks of one cluster that have elements of the same head write the same ends.
WRITE_PART = """  float* to = sums + ((row * (SPLITS / CLUSTER) + split / CLUSTER) * HEADS + h) * (DV + 4);
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
