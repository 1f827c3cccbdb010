// Clusters of blocks, which GPUs have from sm_90 on: blocks that run at once, meet at a barrier of their own, and read
// each other's shared memory. In PTX, as the instructions are few. Code for older GPUs has none, and is not launched
// so.
#pragma once

#include <cuda_runtime.h>

namespace precisebn::cuda {

constexpr int kMostClusterBlocks = 8;  // more than that not every GPU has room for

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define PRECISEBN_HAS_CLUSTERS 1
#endif

// All threads of all blocks of the cluster wait for each other. What they have written before, to whatever memory, all
// of them see behind it.
__device__ inline void cluster_barrier() {
#if defined(PRECISEBN_HAS_CLUSTERS)
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n\t"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#endif
}

// What lies in the shared memory of the cluster's block `rank` where `own` lies in that of this one.
__device__ inline double2 of_block(const double2* own, int rank) {
  double2 value{0, 0};
#if defined(PRECISEBN_HAS_CLUSTERS)
  asm volatile(
      "{\n\t.reg .u32 there;\n\t"
      "mapa.shared::cluster.u32 there, %2, %3;\n\t"
      "ld.shared::cluster.v2.f64 {%0, %1}, [there];\n\t}"
      : "=d"(value.x), "=d"(value.y)
      : "r"(static_cast<unsigned>(__cvta_generic_to_shared(own))), "r"(rank)
      : "memory");
#endif
  return value;
}

inline bool has_clusters(int device) {
  int has = 0;
  return cudaDeviceGetAttribute(&has, cudaDevAttrClusterLaunch, device) == cudaSuccess && has != 0;
}

}  // namespace precisebn::cuda
