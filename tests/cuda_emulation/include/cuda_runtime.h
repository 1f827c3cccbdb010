// What csrc/cuda uses of CUDA, for a C++ compiler: a CUDA thread is a fiber of runtime.cpp. Builders put this folder in
// front of CUDA's own headers. See README.md.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __noinline__

// ---- The emulated machine -------------------------------------------------------------------------------------------

namespace emulation {

unsigned thread_index();
unsigned block_index();
unsigned block_size();
unsigned grid_size();

void barrier();
void fence();
void cluster_barrier();
// What lies in the shared memory of another block of the cluster where `own` lies in that of this one.
const void* of_rank(const void* own, int rank);

enum class Lane { kXor, kDown, kUp, kIndex };  // from which lane a shuffle takes its value
uint64_t shuffle(unsigned mask, uint64_t value, Lane from, int argument);

// What is ordered around an atomic by the atomic itself, as PTX names it.
enum class Order { relaxed, acquire, release, acq_rel };
using Change = unsigned (*)(unsigned old, unsigned argument);
unsigned atomic(unsigned* p, Change change, unsigned argument, Order order = Order::relaxed);

// The memory of the block that runs, NaN where nothing has been written.
void* dynamic_shared();
void* static_shared(const void* site, size_t bytes);

// An access as a single instruction does it: at a multiple of its size, or the launch fails.
void check_alignment(const void* p, size_t alignment, const char* what);
// A load through the cache for what no thread of the launch writes.
void check_constant(const void* p, size_t bytes, size_t alignment);
// A load of global memory, for the count of them.
void count_load(size_t bytes, bool of_other_blocks);

// Whether the defect of this number, put in by a test, is the one to show.
bool mutant(int number);

// What is between the angle brackets of a launch.
struct Configuration {
  Configuration(int64_t grid, int64_t block, size_t shared = 0, void* stream = nullptr, int64_t cluster = 1)
      : grid(grid), block(block), shared(shared), stream(stream), cluster(cluster) {}

  int64_t grid, block;
  size_t shared;
  void* stream;
  int64_t cluster;  // blocks that are started together
};

// Runs the body once for each thread. Throws where a kernel does what it must not: races, leaves others waiting at a
// barrier, misses an alignment.
void run(const Configuration& configuration, const char* kernel, const std::function<void()>& body);

// kernel<<<configuration>>>(arguments): each thread gets arguments of its own.
template <class Kernel>
auto launch(const char* name, const Configuration& configuration, Kernel kernel) {
  return [=](const auto&... arguments) { run(configuration, name, [&] { kernel(arguments...); }); };
}

#define EMULATION_NAME(kernel) EMULATION_STRING(kernel)  // also of a macro's argument
#define EMULATION_STRING(kernel) #kernel

struct ThreadIndex {
  operator unsigned() const { return thread_index(); }
};
struct BlockIndex {
  operator unsigned() const { return block_index(); }
};
struct BlockSize {
  operator unsigned() const { return block_size(); }
};
struct GridSize {
  operator unsigned() const { return grid_size(); }
};
template <class X>
struct OneDimension {
  X x;
};

}  // namespace emulation

inline constexpr emulation::OneDimension<emulation::ThreadIndex> threadIdx;
inline constexpr emulation::OneDimension<emulation::BlockIndex> blockIdx;
inline constexpr emulation::OneDimension<emulation::BlockSize> blockDim;
inline constexpr emulation::OneDimension<emulation::GridSize> gridDim;

// ---- Vectors: a store of one is one instruction
// -----------------------------------------------------------------------

#define EMULATED_VECTOR(Name, Scalar, bytes, list, copy)              \
  struct alignas(bytes) Name {                                        \
    Scalar list;                                                      \
    Name& operator=(const Name& other) {                              \
      emulation::check_alignment(this, bytes, "a store of a " #Name); \
      copy;                                                           \
      return *this;                                                   \
    }                                                                 \
  }
#define EMULATED_LIST(...) __VA_ARGS__
EMULATED_VECTOR(int2, int, 8, EMULATED_LIST(x, y), (x = other.x, y = other.y));
EMULATED_VECTOR(uint2, unsigned, 8, EMULATED_LIST(x, y), (x = other.x, y = other.y));
EMULATED_VECTOR(uint4, unsigned, 16, EMULATED_LIST(x, y, z, w), (x = other.x, y = other.y, z = other.z, w = other.w));
EMULATED_VECTOR(float2, float, 8, EMULATED_LIST(x, y), (x = other.x, y = other.y));
EMULATED_VECTOR(float4, float, 16, EMULATED_LIST(x, y, z, w), (x = other.x, y = other.y, z = other.z, w = other.w));
EMULATED_VECTOR(double2, double, 16, EMULATED_LIST(x, y), (x = other.x, y = other.y));
#undef EMULATED_VECTOR
#undef EMULATED_LIST

inline double2 make_double2(double x, double y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

// ---- Device functions -----------------------------------------------------------------------------------------------

inline void __syncthreads() { emulation::barrier(); }
inline void __threadfence() { emulation::fence(); }

inline unsigned atomicInc(unsigned* p, unsigned limit, emulation::Order order = emulation::Order::relaxed) {
  return emulation::atomic(p, [](unsigned old, unsigned most) { return old >= most ? 0 : old + 1; }, limit, order);
}
inline unsigned atomicAdd(unsigned* p, unsigned value) {
  return emulation::atomic(p, [](unsigned old, unsigned more) { return old + more; }, value);
}
inline unsigned atomicExch(unsigned* p, unsigned value) {
  return emulation::atomic(p, [](unsigned, unsigned now) { return now; }, value);
}

namespace emulation {
template <class T>
T shuffle_value(unsigned mask, T value, Lane from, int argument) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(mask, bits, from, argument);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
}  // namespace emulation

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulation::shuffle_value(mask, value, emulation::Lane::kXor, lanes);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int lanes) {
  return emulation::shuffle_value(mask, value, emulation::Lane::kDown, lanes);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int lanes) {
  return emulation::shuffle_value(mask, value, emulation::Lane::kUp, lanes);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulation::shuffle_value(mask, value, emulation::Lane::kIndex, lane);
}

template <class T>
T __ldg(const T* p) {
  emulation::count_load(sizeof(T), false);
  emulation::check_constant(p, sizeof(T), alignof(T));
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  emulation::count_load(sizeof(T), true);
  emulation::check_alignment(p, alignof(T), "__ldcg");
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  emulation::count_load(sizeof(T), false);
  emulation::check_alignment(p, alignof(T), "__ldcs");
  return *p;
}
template <class T>
void __stcg(T* p, T value) {
  *p = value;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}

inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline double __hiloint2double(int high, int low) {
  return std::bit_cast<double>(static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 | static_cast<uint32_t>(low));
}
inline int __double2loint(double x) { return static_cast<int>(static_cast<uint32_t>(std::bit_cast<uint64_t>(x))); }
inline int __double2hiint(double x) {
  return static_cast<int>(static_cast<uint32_t>(std::bit_cast<uint64_t>(x) >> 32));
}

// As CUDA has them: of a number and NaN, the number.
template <class A, class B>
  requires std::is_arithmetic_v<A> && std::is_arithmetic_v<B>
constexpr auto min(A a, B b) {
  using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<C>) {
    return static_cast<C>(std::fmin(static_cast<C>(a), static_cast<C>(b)));
  } else {
    return static_cast<C>(a) < static_cast<C>(b) ? static_cast<C>(a) : static_cast<C>(b);
  }
}
template <class A, class B>
  requires std::is_arithmetic_v<A> && std::is_arithmetic_v<B>
constexpr auto max(A a, B b) {
  using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<C>) {
    return static_cast<C>(std::fmax(static_cast<C>(a), static_cast<C>(b)));
  } else {
    return static_cast<C>(a) > static_cast<C>(b) ? static_cast<C>(a) : static_cast<C>(b);
  }
}
using std::fma;
using std::fmax;
using std::fmin;
using std::sqrt;

// ---- The host's interface -------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2, cudaErrorStreamCaptureUnsupported = 900 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrClusterLaunch = 120 };

cudaError_t cudaGetLastError();
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id);
cudaError_t cudaMalloc(void** p, size_t bytes);
cudaError_t cudaMallocAsync(void** p, size_t bytes, cudaStream_t stream);
cudaError_t cudaFree(void* p);
cudaError_t cudaFreeAsync(void* p, cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

// Launches with attributes, of which there is one.
struct dim3 {
  unsigned x, y, z;
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emulation {
template <class Kernel, class... Arguments>
cudaError_t launch_with(const char* name, const cudaLaunchConfig_t* with, Kernel kernel,
                        const Arguments&... arguments) {
  const int64_t cluster = with->numAttrs == 0 ? 1 : with->attrs->val.clusterDim.x;
  launch(name, Configuration(with->gridDim.x, with->blockDim.x, with->dynamicSmemBytes, with->stream, cluster),
         kernel)(arguments...);
  return cudaSuccess;
}
}  // namespace emulation
