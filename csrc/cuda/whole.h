// A reduction, and the map of the same values that needs its results, in one launch: for tensors so small that a block
// has all values of its channels (partition.h). A forward or a backward of batch normalization is three launches else,
// which take longer than such a tensor.
//
// The block reduces as in reduce.h. The thread that has the result of a channel makes its coefficients (a Map, see
// normalize_at_once.cu and backward_at_once.cu), in float64, leaves them in shared memory, and writes what the
// operator returns for the channel. Then all threads go through their rows again. What they read again lies in L1,
// which is the same memory as shared memory would be: a thread has at most 4 batches of 8 vectors, a block 128 KiB.
//
// A somewhat larger tensor takes a cluster of blocks, each with a slab of the same channels. They leave their results
// in shared memory, and each reads those of all, in the same order, as the last block would have merged them: the same
// bits in each. Their barrier empties L1, so what is read again comes from the second-level cache.
//
// With groups, each block has one group of its channels, and a last one the samples of no group, which become NaN. So
// there is no more to order than which samples are its own.
//
// Partition, arithmetic and order are those of the launches that this one replaces, and so are the bits.
#pragma once

#include "cluster.h"
#include "reduce.h"

namespace precisebn::cuda {

constexpr int kMostWholeGroups = 64;
constexpr size_t kMostShared = 48 << 10;  // that a block has without being asked for

// The samples of one group, in the order of the tensor.
struct GroupSamples {
  int group_of[kMaxSlabSamples];
  int sample[kMaxSlabSamples];

  // Returns how many there are, to all threads.
  __device__ int find(const Groups& groups, int n, int group) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) group_of[i] = groups[i];
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      int before = 0;
      for (int j = 0; j < i; ++j) before += group_of[j] == group;
      if (group_of[i] == group) sample[before] = i;
    }
    int all = 0;
    for (int j = 0; j < n; ++j) all += group_of[j] == group;
    __syncthreads();
    return all;
  }
};

// The second way through the block's values. coefficients[i * block_channels + c]: the i-th of channel c of the block.
template <class Op, class Map>
__device__ inline void map_slab(const Op& op, const Map& map, const ReductionPlan& plan, const Slab& slab,
                                int64_t column_block, const int* order, int samples,
                                const typename Op::Real* coefficients) {
  using T = typename Op::Type;
  using Real = typename Op::Real;
  constexpr int kSize = Op::kSize, kRows = Op::kRows;
  const Geometry& at = plan.geometry;
  const int column = threadIdx.x % at.block.columns, thread_row = threadIdx.x / at.block.columns;
  if (thread_row >= at.block.thread_rows || column >= at.columns_of_block(column_block)) return;
  const Column<T, kSize> values(op, at, slab, column_block, order, samples);
  Real own[kSize][Map::kCoefficients];
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
#pragma unroll
    for (int i = 0; i < Map::kCoefficients; ++i) {
      own[k][i] = coefficients[i * at.block_channels + (column * kSize + k) / at.inner];
    }
  }
  Walk walk = values.walk(), to = walk;
#pragma unroll 1
  for (int done = 0; done < values.rows; done += kRows) {
    Batch<Op> batch;
    batch.load(values, walk, min(kRows, values.rows - done));
#pragma unroll
    for (int r = 0; r < kRows; ++r, to.next()) {
      if (done + r >= values.rows) continue;
      Real y[kSize];
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        Real inputs[Op::kInputs];
#pragma unroll
        for (int i = 0; i < Op::kInputs; ++i) inputs[i] = batch.x[i][r][k];
        y[k] = Map::formula(inputs, own[k]);
      }
      Vec<T, kSize>::from(y).store(map.output + values.offset(to));
    }
  }
  if (plan.edge == 0) return;
  const Edges<T> edges(op, plan, slab, column_block, order, samples);
  edges.visit(0, 1, [&](int64_t offset) {
    Real inputs[Op::kInputs];
#pragma unroll
    for (int i = 0; i < Op::kInputs; ++i) inputs[i] = widen(__ldg(op.inputs[i] + offset));
    const Real y[1] = {Map::formula(inputs, own[0])};
    Vec<T, 1>::from(y).store(map.output + offset);
  });
}

template <class Op, class Map, bool in_clusters>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    reduce_and_map(const __grid_constant__ Op op, const __grid_constant__ Map map,
                   const __grid_constant__ ReductionPlan plan, Groups groups) {
  using Real = typename Op::Real;
  extern __shared__ __align__(16) double shared[];  // results are loaded as double2, of other blocks too
  __shared__ GroupSamples own;
  const Geometry& at = plan.geometry;
  // The blocks of a cluster are adjacent; without, those of a group are.
  const int64_t column_block = in_clusters ? blockIdx.x / plan.cluster_blocks : blockIdx.x % at.column_blocks;
  const int64_t slab_index = in_clusters ? blockIdx.x % plan.cluster_blocks : 0;
  const int group = in_clusters ? 0 : static_cast<int>(blockIdx.x / at.column_blocks);
  const int64_t first_channel = column_block * at.block_channels;
  const Slab slab = plan.slabs[slab_index];
  const int num_entries = static_cast<int>(blockDim.x) * plan.entries_of_thread();
  const Entries entries{shared, shared + Entries::places(num_entries)};
  auto* const results = reinterpret_cast<double2*>(shared + 2 * Entries::places(num_entries));  // in clusters
  Real* const coefficients = reinterpret_cast<Real*>(results + (in_clusters ? at.block_channels : 0));
  const auto emit = [&](int channel, double count, double2 result, bool writes) {
    map.emit(group, first_channel + channel, {count, result.x, result.y}, writes, [&](int i, double coefficient) {
      coefficients[i * at.block_channels + channel] = static_cast<Real>(coefficient);
    });
  };

  int samples = slab.samples;
  const int* order = nullptr;
  const bool of_none = groups.ids != nullptr && group == groups.count;
  if (groups.ids != nullptr) {
    samples = own.find(groups, samples, of_none ? Groups::kNone : group);
    order = own.sample;
  }
  if (of_none) {
    if (samples == 0) return;
    for (int i = threadIdx.x; i < Map::kCoefficients * at.block_channels; i += blockDim.x) {
      coefficients[i] = static_cast<Real>(NAN);
    }
  } else {
    const double count = static_cast<double>(samples * slab.rows * at.inner + plan.edges_of(slab, samples));
    reduce_slab(op, plan, slab_index, column_block, group, order, samples, entries, [&](int channel, double2 result) {
      if constexpr (in_clusters) {
        results[channel] = result;
      } else {
        emit(channel, count, result, true);
      }
    });
  }
  if constexpr (in_clusters) {
    cluster_barrier();  // results are there
    const int channels = at.channels_of_block(column_block);
    for_each_channel(channels, plan.lanes_per_channel, [&](int channel, int lane) {
      const auto result_of = [&](int i) { return of_block(results + channel, i); };
      const auto count = [&](int i) { return plan.values_before(i + 1) - plan.values_before(i); };
      const double2 merged = Op::combine(channel < channels ? plan.cluster_blocks : 0, lane, plan.lanes_per_channel,
                                         parts_of<kMostClusterBlocks>(result_of, count));
      if (lane == 0 && channel < channels) emit(channel, plan.all_values, merged, slab_index == 0);
    });
    cluster_barrier();  // coefficients are there, and nobody needs the results of a block that is done
  } else {
    __syncthreads();
  }
  map_slab(op, map, plan, slab, column_block, order, samples, coefficients);
}

// What a kernel needs of shared memory, and what a block must have.
template <class Map, class Real>
size_t shared_of_whole(const ReductionPlan& plan) {
  return 2 * sizeof(double) * Entries::places(plan.geometry.block.threads * plan.entries_of_thread()) +
         sizeof(double2) * static_cast<size_t>(plan.cluster_blocks ? plan.geometry.block_channels : 0) +
         sizeof(Real) * static_cast<size_t>(Map::kCoefficients * plan.geometry.block_channels);
}

// Whether there is such a launch for a tensor of this plan.
template <class Map, class Real>
bool fits_whole(const OnDeviceOf& where, const Groups& groups, const ReductionPlan& plan) {
  const bool is_small = plan.cluster_blocks > 0
                            ? has_clusters(where.device)
                            : plan.is_whole() && (groups.ids == nullptr || groups.count <= kMostWholeGroups);
  return is_small && shared_of_whole<Map, Real>(plan) + sizeof(GroupSamples) <= kMostShared;
}

template <class Op, class Map>
void launch_clusters(const OnDeviceOf& where, const Op& op, const Map& map, const ReductionPlan& plan) {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(plan.cluster_blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = {static_cast<unsigned>(plan.blocks()), 1, 1};
  config.blockDim = {static_cast<unsigned>(plan.geometry.block.threads), 1, 1};
  config.dynamicSmemBytes = shared_of_whole<Map, typename Op::Real>(plan);
  config.stream = where.stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, reduce_and_map<Op, Map, true>, op, map, plan, Groups{nullptr, 0, 1}));
}

template <class Op, class Map>
void launch_whole(const OnDeviceOf& where, const Groups& groups, const Op& op, const Map& map,
                  const ReductionPlan& plan) {
  if (plan.cluster_blocks > 0) return launch_clusters(where, op, map, plan);
  const int64_t blocks = plan.geometry.column_blocks * (groups.ids == nullptr ? 1 : groups.count + 1);
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "precisebn: the tensor is too large");
  const size_t shared = shared_of_whole<Map, typename Op::Real>(plan);
  reduce_and_map<Op, Map, false>
      <<<static_cast<unsigned>(blocks), plan.geometry.block.threads, shared, where.stream>>>(op, map, plan, groups);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace precisebn::cuda
