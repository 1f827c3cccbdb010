// How a reduction over samples is cut into pieces that threads take. The cut depends on the shape and the groups alone,
// never on the number of threads, and the pieces' results are merged in a fixed order: so the result has the same
// bits on any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "view.h"

namespace precisebn::cpu {

// Consecutive values of one group: `length` rows, or `length` values of every plane of one sample.
struct Segment {
  int64_t offset;  // elements
  int64_t length;
};

// What one task reduces: some segments, all of one group.
struct Slab {
  int64_t group;
  int64_t first, last;  // into Partition::segments
};

struct Partition {
  std::vector<Segment> segments;
  std::vector<Slab> slabs;           // ordered by group
  std::vector<int64_t> group_count;  // values per channel
  int64_t channel_block;             // how many channels of a slab one task takes

  int64_t channel_blocks(const View& view) const { return (view.channels + channel_block - 1) / channel_block; }
};

Partition partition(const View& view, int64_t element_size, const std::optional<Tensor>& group, int64_t num_groups);

// The grain for parallel_for over `units` that move `bytes` in all: one thread does all of a small layer. Waking others
// takes some microseconds where they wait for work, and a time slice of the system, milliseconds, where another process
// has their core; so few bytes take some tens of microseconds. A network of small layers would pay at each of them.
inline int64_t grain_for(int64_t units, int64_t bytes, int64_t grain) {
  constexpr int64_t kOneThreadBytes = 512 << 10;
  return bytes <= kOneThreadBytes ? std::max<int64_t>(units, 1) : grain;
}

// For rows so narrow that a vector holds several: how many adjacent rows are joined into one.
int64_t rows_joined(const View& view);

}  // namespace precisebn::cpu
