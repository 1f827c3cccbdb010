// Memory for what blocks tell each other within one launch: partial results, and tickets that tell which block comes
// last.
//
// Tickets must be 0 when a kernel starts. Zeroing them for each call would cost a second operation on the device beside
// each reduction, as much as the reduction of a small layer itself, so a stream has a buffer of its own whose tickets
// each kernel leaves at 0 (they count modulo the number of blocks that draw them). That is correct because kernels of
// one stream run one after another, whichever threads launch them; streams are told apart by the id that CUDA never
// gives twice, not by their handle, which a later stream may inherit.
//
// A kernel captured into a graph runs on whatever stream the graph is launched on, beside kernels of the stream it was
// captured on. So does not share: it gets memory from torch's allocator, which belongs to the graph for as long as the
// graph lives, and zeroes its tickets by a memset node in front of it. A graph runs only once at a time. The same is
// done for the rare reduction that needs more than a stream's buffer holds; and for those that need no tickets because
// they are two launches, between which another thread may launch something else on the same stream.
//
// Buffers are kept for as long as the process lives: nothing says when a stream ends, and to free one, or to hand it to
// another stream, would mean to wait for kernels of a stream that may be gone. So there are few: the first 16 streams
// of a device that reduce anything have one, streams after them do as captured kernels do, and pay for the memset.
#pragma once

#include <cstdint>
#include <optional>

#include "tensors.h"

namespace precisebn::cuda {

class Workspace {
 public:
  Workspace(const OnDeviceOf& where, const Tensor& like, int64_t partials, int64_t tickets);

  double2* partials;
  unsigned* tickets;

 private:
  std::optional<Tensor> owner_;  // may go when the kernel has been launched: memory is reused in stream order
};

}  // namespace precisebn::cuda
