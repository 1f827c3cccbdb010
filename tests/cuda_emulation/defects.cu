// A kernel for each class of defects that the emulation finds: what it says of them is tested, and that it says it.
#include <string>

#include "cluster.h"
#include "cuda_runtime.h"

namespace {

using namespace precisebn::cuda;

__global__ void missing_barrier(float* out) {
  __shared__ float values[64];
  values[threadIdx.x] = 1;
  out[threadIdx.x] = values[(threadIdx.x + 1) % 64];
}

__global__ void no_value(float* out) {
  __shared__ float values[64];
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void missing_fence(float* out) {
  __shared__ unsigned before;
  if (threadIdx.x == 0) {
    out[blockIdx.x] = 1;
    before = atomicAdd(reinterpret_cast<unsigned*>(out + 32), 1);
  }
  __syncthreads();
  if (before == gridDim.x - 1 && threadIdx.x < gridDim.x) out[threadIdx.x] = 2;
}

// Of blocks in clusters of two, whose memory each reads.
__global__ void missing_cluster_barrier(float* out) {
  extern __shared__ double2 own[];
  if (threadIdx.x == 0) own[0] = {1, 1};
  __syncthreads();
  out[2 * blockIdx.x + threadIdx.x] = static_cast<float>(of_block(own, 1 - static_cast<int>(blockIdx.x)).x);
}

__global__ void left_before_a_cluster_barrier(float*) {
  if (blockIdx.x == 0) cluster_barrier();
}

__global__ void written_constant(float* out) {
  if (blockIdx.x == 0) {
    out[threadIdx.x] = 1;
  } else {
    out[64 + threadIdx.x] = __ldg(out + threadIdx.x);
  }
}

__global__ void left_before_a_barrier(float* out) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void shuffle_and_barrier(float* out) {
  if (threadIdx.x % 32 == 0) __syncthreads();
  out[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1.0f, 1);
}

__global__ void misaligned_load(float* out) {
  const uint4 words = __ldg(reinterpret_cast<const uint4*>(out + 1));
  out[32 + threadIdx.x] = __uint_as_float(words.x);
}

__global__ void misaligned_store(float* out) { *reinterpret_cast<uint4*>(out + 4 * threadIdx.x + 1) = {1, 2, 3, 4}; }

__global__ void outside(float* out) { out[256 + threadIdx.x] = 1; }

__global__ void outside_of_shared_memory(float* out) {
  extern __shared__ float values[];
  values[threadIdx.x + 1] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void shift_by_too_much(float* out) { out[threadIdx.x] = static_cast<float>(1 << (threadIdx.x + 1)); }

std::string message;

template <class Launch>
const char* run(const Launch& launch) {
  void* out = nullptr;
  cudaMalloc(&out, 256 * sizeof(float));
  cudaMemsetAsync(out, 0, 256 * sizeof(float), nullptr);
  message.clear();
  try {
    launch(static_cast<float*>(out));
    if (static_cast<float*>(out)[0] != static_cast<float*>(out)[0]) message = "NaN";
  } catch (const std::exception& error) {
    message = error.what();
  }
  cudaFree(out);
  return message.c_str();
}

}  // namespace

#define DEFECT(kernel, blocks, threads, ...)                                        \
  extern "C" __attribute__((visibility("default"))) const char* defect_##kernel() { \
    return run([](float* out) { kernel<<<blocks, threads, __VA_ARGS__>>>(out); });  \
  }
DEFECT(missing_barrier, 1, 64, 0)
DEFECT(no_value, 1, 64, 0)
DEFECT(missing_fence, 4, 32, 0)
DEFECT(missing_cluster_barrier, 2, 2, sizeof(double2), nullptr, 2)
DEFECT(left_before_a_cluster_barrier, 2, 1, 0, nullptr, 2)
DEFECT(written_constant, 2, 64, 0)
DEFECT(left_before_a_barrier, 1, 64, 0)
DEFECT(shuffle_and_barrier, 1, 64, 0)
DEFECT(misaligned_load, 1, 32, 0)
DEFECT(misaligned_store, 1, 32, 0)
DEFECT(outside, 1, 32, 0)
DEFECT(outside_of_shared_memory, 1, 64, 64 * sizeof(float))
DEFECT(shift_by_too_much, 1, 32, 0)
