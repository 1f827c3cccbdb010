// All that the sources see of torch: its stable C++ interface, alike in every release from the oldest that setup.py
// targets on. What a later release moved or renamed is put right here and nowhere else; .ci/compile-oldest compiles
// every source with the headers of older releases.
#pragma once

#if defined(USE_CUDA)
#include <cuda_runtime.h>  // STD_CUDA_CHECK is made of it
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>  // from torch 2.12 on the others bring it
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

// Throws where a call of the C interface failed: the name that torch 2.12 gave to TORCH_ERROR_CODE_CHECK.
#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif
