// Included before every kernel source: torch's headers as they are, then the names by which the kernels are those of
// CPU tensors, in a namespace of operators of their own (EMULATED_NAMESPACE), beside which the real ones can live.
#pragma once

#include "../torch.h"  // of csrc: this file lies beside the copies of csrc/cuda

#define is_cuda is_cpu
#define get_device_index() is_cpu() * emulation::device_index()
#define DeviceGuard EmulatedDeviceGuard

namespace emulation {
int device_index();
}

namespace torch::stable::accelerator {
struct EmulatedDeviceGuard {
  explicit EmulatedDeviceGuard(int32_t) {}
};
}  // namespace torch::stable::accelerator

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(name_space, key, m) EMULATED_LIBRARY_IMPL(EMULATED_NAMESPACE, m)
#define EMULATED_LIBRARY_IMPL(name_space, m) _STABLE_TORCH_LIBRARY_IMPL(name_space, CPU, m, C10_UID)
