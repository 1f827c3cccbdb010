#include "partition.h"

#include <algorithm>
#include <numeric>

namespace precisebn::cpu {
namespace {

constexpr int64_t kMaxTasks = 256;
constexpr int64_t kMinTaskBytes = 128 << 10;
constexpr int64_t kStreamBytes = 16 << 10;  // planes read in sequence before the next sample's
constexpr int64_t kMinSlabRows = 192;       // the first rows of a slab cost twice what the others do
constexpr int64_t kLeastSlabRows = 64, kSlabBytes = 768 << 10;  // but of so many bytes, fewer rows are enough
// So do the first few planes of a channel, or blocks of a long one: as many of them as are enough.
constexpr int64_t kMinSlabPlanes = 16, kMinSlabValues = 16384;
constexpr int64_t kRowBlock = 1024;  // channels of wider rows that are a task of their own
constexpr int64_t kVectorLanes = 16;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t multiple) { return divide_up(a, multiple) * multiple; }

// The samples in the order of their groups (counting sort), and how many each group has.
std::vector<int64_t> samples_by_group(const View& view, const std::optional<Tensor>& group,
                                      std::vector<int64_t>& group_size) {
  std::vector<int64_t> order(view.batch);
  if (!group) {
    std::iota(order.begin(), order.end(), 0);
    group_size[0] = view.batch;
    return order;
  }
  const auto num_groups = static_cast<int64_t>(group_size.size());
  const int64_t* ids = group->const_data_ptr<int64_t>();
  const int64_t stride = group->stride(0);
  for (int64_t i = 0; i < view.batch; ++i) ++group_size[ids[i * stride]];
  std::vector<int64_t> next(num_groups, 0);
  std::partial_sum(group_size.begin(), group_size.end() - 1, next.begin() + 1);
  for (int64_t i = 0; i < view.batch; ++i) order[next[ids[i * stride]]++] = i;
  return order;
}

}  // namespace

int64_t rows_joined(const View& view) {
  if (view.width >= kVectorLanes) return 1;
  return kVectorLanes / std::gcd(view.width, kVectorLanes);
}

Partition partition(const View& view, int64_t element_size, const std::optional<Tensor>& group, int64_t num_groups) {
  Partition result;
  result.group_count.assign(num_groups, 0);
  result.channel_block = std::max<int64_t>(view.channels, 1);
  if (view.empty()) return result;

  std::vector<int64_t> group_size(num_groups, 0);
  const std::vector<int64_t> order = samples_by_group(view, group, group_size);
  const int64_t sample_units = view.by_rows ? view.sample_rows : view.length;
  const int64_t unit_bytes = (view.by_rows ? view.width : view.channels) * element_size;

  // A slab of rows is whole fours of them; among planes, its boundary falls between samples where it holds several.
  int64_t max_slabs = kMaxTasks / 2, min_units = divide_up(kMinTaskBytes, unit_bytes), multiple;
  if (view.by_rows) {
    multiple = 4 * rows_joined(view);
    if (view.inner == 1) result.channel_block = std::min(view.channels, kRowBlock);
    const int64_t task_bytes = (view.inner == 1 ? std::min(view.width, kRowBlock) : view.width) * element_size;
    const int64_t rows = view.batch * sample_units, least = std::max(min_units, kLeastSlabRows);
    min_units = std::max(least, std::min(kSlabBytes / task_bytes, kMinSlabRows));
    // As many for each of 2, 4 or 8 threads; of few rows, so many nevertheless.
    if (rows < 8 * min_units) min_units = std::clamp(rows / 8, least, min_units);
    max_slabs = std::clamp(rows < 8 * min_units ? rows / min_units : rows / min_units / 8 * 8, int64_t{1}, max_slabs);
  } else {
    result.channel_block = std::clamp<int64_t>(kStreamBytes / (view.length * element_size), 1, view.channels);
    max_slabs = std::max<int64_t>(1, kMaxTasks / result.channel_blocks(view));
    multiple = 0;
    min_units = std::max(min_units, std::min(kMinSlabPlanes * view.length, kMinSlabValues));
  }
  int64_t slab_units = std::max(divide_up(view.batch * sample_units, max_slabs), min_units);
  if (!view.by_rows) multiple = slab_units >= view.length ? view.length : 4096;
  slab_units = round_up(slab_units, multiple);

  auto sample = order.begin();
  for (int64_t g = 0; g < num_groups; ++g) {
    result.group_count[g] = static_cast<int64_t>(group_size[g]) * view.length;
    int64_t room = 0;  // in the current slab
    for (const auto end = sample + group_size[g]; sample != end; ++sample) {
      int64_t offset = *sample * view.sample_stride, left = sample_units;
      while (left > 0) {
        if (room == 0) {
          const auto index = static_cast<int64_t>(result.segments.size());
          result.slabs.push_back({g, index, index});
          room = slab_units;
        }
        const int64_t take = std::min(left, room);
        Slab& slab = result.slabs.back();
        Segment* previous = slab.last > slab.first ? &result.segments.back() : nullptr;
        if (view.by_rows && previous && previous->offset + previous->length * view.row_stride == offset) {
          previous->length += take;
        } else {
          result.segments.push_back({offset, take});
          ++slab.last;
        }
        offset += take * (view.by_rows ? view.row_stride : 1);
        left -= take;
        room -= take;
      }
    }
  }
  return result;
}

}  // namespace precisebn::cpu
