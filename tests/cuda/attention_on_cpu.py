"""What attention's bodies for tensor cores get on the CPU instead of the instructions of a GPU."""

from __future__ import annotations

import re

import mlx.core as mx
from warp_program import kernels_on_cpu

from zmlx.backend.cuda import handwritten
from zmlx.backend.launch import forget
from zmlx.kernels import attention_clusters, attention_launch
from zmlx.kernels.attention_launch import new_counters
from zmlx.kernels.attention_tensor_source import PRIMITIVES

ON_CPU = """
#define UNROLL
namespace attention {
struct alignas(16) Piece { unsigned word[4]; };
inline Piece streamed(const void* from) { return *(const Piece*)from; }
inline Piece taken(const void* from) { return *(const Piece*)from; }
inline int taken_number(const int* from) { return *from; }
template <typename T>
T* placed(T* rows, int row, int stride) { return rows + int64_t(row) * stride; }
template <typename T>
void mma(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1,
         T kind) {
  mma_16_8_16(c, a0, a1, a2, a3, b0, b1, kind);
}
template <typename T>
unsigned packed(float low, float high, T kind) {
  return narrow(low, kind) | unsigned(narrow(high, kind)) << 16;
}
inline float2 unpacked(unsigned pair, __half kind) {
  return {wide(pair & 0xffff, kind), wide(pair >> 16, kind)};
}
inline float power_of_two(float x) { return std::exp2(x); }
inline int counted(int* counter) { return (*counter)++; }
inline float from_bits(unsigned x) { return std::bit_cast<float>(x); }
}
"""
CLUSTERS_ON_CPU = """
#define BLOCKS_OF_A_CLUSTER %s
namespace attention {
struct Barrier { int arrivals, bytes; };
inline void begin(uint64_t* barrier) {
  if (threadIdx.x == 0) {
    *(Barrier*)barrier = {1, 0};
  }
  come_to_cluster();
}
inline void meet() { meet_cluster(); }
template <typename X>
void give_to(X* variable, uint64_t* barrier, int block, X x) {
  *in_block(variable, block) = x;
  ((Barrier*)in_block(barrier, block))->bytes -= sizeof(X);
}
inline void expect(uint64_t* barrier, int bytes) {
  ((Barrier*)barrier)->arrivals -= 1;
  ((Barrier*)barrier)->bytes += bytes;
}
inline void wait_for_all(uint64_t* barrier) {
  wait_until([&] { return ((Barrier*)barrier)->arrivals == 0 && ((Barrier*)barrier)->bytes == 0; });
}
}
"""


def run_on_warps(monkeypatch, module, *, backwards):
    """Yield while what a module sends to CUDA runs on the CPU; afterwards counters must be zero."""

    def header(text):
        bounds, found, rest = text.partition(PRIMITIVES)
        assert found
        assert all(line.startswith("#") for line in bounds.splitlines())
        size = re.search(r"__cluster_dims__\((\d), 1, 1\)", bounds)
        assert (size is not None) == (attention_clusters.PRIMITIVES in rest)
        if size is not None:
            rest = rest.replace(attention_clusters.PRIMITIVES, CLUSTERS_ON_CPU % size[1])
        return ON_CPU + rest

    monkeypatch.setattr(mx.fast, "cuda_kernel", kernels_on_cpu(header, lambda: backwards))
    monkeypatch.setattr(handwritten, "shortened", lambda source, name: source)
    monkeypatch.setattr(module, "for_kernels", lambda **_: "cuda")
    monkeypatch.setattr(module, "has_tensor_cores", lambda: True)
    made = []

    def noted(number):
        made.append(new_counters(number))
        return made[-1]

    monkeypatch.setattr(attention_launch, "new_counters", noted)
    forget()
    yield
    assert not any(mx.any(counters).item() for counters in made)
    forget()


def joined_and_clustered(monkeypatch, call, buffers):
    """Return how many blocks are a cluster, and twice what a call gives and leaves in its buffers.

    Args:
        call: one that ends in a launch; it takes copies of `buffers`.
    """
    right, seen, found = attention_launch._definition, [], []
    monkeypatch.setattr(attention_launch, "_definition", lambda v: seen.append(v) or right(v))
    for clusters in (False, True):
        monkeypatch.setattr(attention_launch, "may_cluster", lambda on=clusters: on)
        copies = [x + 0 for x in buffers]
        mx.eval(copies)
        found.append([call(*copies), *copies])
    assert [(v.form, v.cluster > 1) for v in seen] == [("joined", False), ("whole", True)]
    return seen[1].cluster, *found


def same_bits(these, those):
    """Whether arrays hold the same numbers, and the same kinds of zeros, and no NaN."""
    kind = {2: mx.uint16, 4: mx.uint32}
    return all(
        not mx.any(mx.isnan(x)).item()
        and mx.array_equal(x.view(kind[x.dtype.size]), y.view(kind[y.dtype.size])).item()
        for x, y in zip(these, those, strict=True)
    )
