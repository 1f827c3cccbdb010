#include "workspace.h"

#include <map>
#include <mutex>

namespace precisebn::cuda {
namespace {

constexpr int64_t kPartials = 4 << 20 >> 4;  // 4 MiB hold every layer of a ResNet-50
constexpr int64_t kTickets = 16 << 10;
constexpr size_t kBytes = kPartials * sizeof(double2) + kTickets * sizeof(unsigned);
constexpr size_t kMostBuffers = 16;  // of a device: 65 MiB

// While any thread captures a stream in the default mode, CUDA forbids others what is not captured and may be unsafe,
// as allocations are, and a forbidden call would fail and spoil the capture. These are not unsafe: nothing that is
// captured depends on the memory. See cudaThreadExchangeStreamCaptureMode.
class BesideCaptures {
 public:
  BesideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~BesideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  BesideCaptures(const BesideCaptures&) = delete;
  BesideCaptures& operator=(const BesideCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// A new buffer, its tickets 0, or null where there is no memory. What is allocated before a step that fails goes back.
void* new_buffer(cudaStream_t stream) {
  const BesideCaptures allowed;
  // Not from torch's allocator: what is taken from it during the warm-up of a CUDA graph must not outlive that.
  void* buffer = nullptr;
  if (cudaMallocAsync(&buffer, kBytes, stream) != cudaSuccess) {
    cudaGetLastError();  // or the next launch would report it
    return nullptr;
  }
  if (cudaMemsetAsync(buffer, 0, kBytes, stream) != cudaSuccess) {
    cudaGetLastError();
    cudaFreeAsync(buffer, stream);
    return nullptr;
  }
  return buffer;
}

// Null where there can be none now; the caller then does without, and the next one tries again.
void* buffer_of(int32_t device, cudaStream_t stream) {
  static std::mutex mutex;
  static auto& of_devices = *new std::map<int32_t, std::map<unsigned long long, void*>>;  // CUDA goes first at exit
  unsigned long long id;
  if (cudaStreamGetId(stream, &id) != cudaSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  const std::lock_guard lock(mutex);
  auto& buffers = of_devices[device];
  if (const auto known = buffers.find(id); known != buffers.end()) return known->second;
  if (buffers.size() >= kMostBuffers) return nullptr;
  void* const buffer = new_buffer(stream);
  if (buffer != nullptr) buffers.emplace(id, buffer);
  return buffer;
}

}  // namespace

Workspace::Workspace(const OnDeviceOf& where, const Tensor& like, int64_t num_partials, int64_t num_tickets) {
  cudaStreamCaptureStatus capture;
  STD_CUDA_CHECK(cudaStreamIsCapturing(where.stream, &capture));
  void* memory = nullptr;
  const bool fits = num_partials <= kPartials && num_tickets <= kTickets;
  if (capture == cudaStreamCaptureStatusNone && num_tickets > 0 && fits) {
    memory = buffer_of(where.device, where.stream);
  }
  if (memory != nullptr) {
    partials = static_cast<double2*>(memory);
    tickets = reinterpret_cast<unsigned*>(partials + kPartials);
    return;
  }
  const int64_t ticket_bytes = num_tickets * static_cast<int64_t>(sizeof(unsigned));
  const int64_t partial_bytes = num_partials * static_cast<int64_t>(sizeof(double2));
  owner_ = torch::stable::new_empty(like, {partial_bytes + ticket_bytes}, ScalarType::Byte);
  partials = mutable_data<double2>(*owner_);
  tickets = reinterpret_cast<unsigned*>(partials + num_partials);
  if (num_tickets > 0) STD_CUDA_CHECK(cudaMemsetAsync(tickets, 0, ticket_bytes, where.stream));
}

}  // namespace precisebn::cuda
