// The reduction of a tensor to two numbers per (group, channel): one kernel for `moments`, `accumulate` and
// `backward_reduce`, which differ in what a thread does with the values that it reads, and in how two results merge
// (an Op, see moments_op.h and backward_op.h).
//
// A block reduces a slab of rows (partition.h). Each thread walks down its column with kRows independent 16-byte loads
// in flight, and keeps a result per value of its vector. These meet in shared memory, where a few threads per channel
// merge them into the block's partial result. The last block to finish merges the partial results; so that one block
// does not have to read hundreds, that goes in two steps: the last block of a cluster of slabs merges the cluster, the
// last cluster of a channel merges the clusters. Who is last is decided by tickets (workspace.h), but what is merged
// with what, and in which order, by the partition alone: no float atomics, and the same bits every time.
//
// With groups, samples of any order may be of any group, and only the device knows. Several blocks share a slab: each
// finds the same order of its samples by group, cuts it into pieces of one group, and reduces the one piece that is its
// own, so that no block takes longer for there being more groups. A second, small kernel merges the pieces of each
// group.
#pragma once

#include "partition.h"
#include "tensors.h"
#include "vec.h"
#include "workspace.h"

namespace precisebn::cuda {

// What is known of the values of one channel, in a part of the tensor: two numbers, whose meaning is the Op's.
struct Partial {
  double count, first, second;
};

// Where the vectors of one thread lie, of `size` values each.
template <class T, int size>
struct Column {
  const T* inputs[2];
  const int* order;  // the samples to go through, relative to the slab's first; null: all, as they are
  int64_t row_stride, sample_stride, origin;
  int start, step, slab_rows, rows;  // rows: how many there are for this thread

  template <class Op>
  __device__ Column(const Op& op, const Geometry& at, const Slab& slab, int64_t column_block, const int* order,
                    int samples)
      : order(order),
        row_stride(at.row_stride),
        sample_stride(at.sample_stride),
        start(threadIdx.x / at.block.columns),
        step(at.block.thread_rows),
        slab_rows(slab.rows),
        rows(rows_of_thread(samples * slab.rows, start, step)) {
    origin = at.offset(column_block, threadIdx.x % at.block.columns) + slab.first_sample * sample_stride +
             slab.first_row * row_stride + size - 1;
#pragma unroll
    for (int i = 0; i < Op::kInputs; ++i) inputs[i] = op.inputs[i];
#ifdef __CUDA_ARCH__
    asm("" : "+l"(origin));  // else the compiler computes it anew, in twenty instructions, for each row
#endif
  }

  __device__ Walk walk() const { return {start, step, slab_rows, row_stride, sample_stride, origin}; }
  // At a multiple of a vector, from which it differs where a plane has edges: the origin is too large by size - 1.
  __device__ int64_t offset(const Walk& at) const {
    const int64_t offset =
        order == nullptr ? at.offset : origin + order[at.sample] * sample_stride + at.row * row_stride;
    return offset & -static_cast<int64_t>(size);
  }
  __device__ int64_t first() const { return offset(walk()); }

  // Value by value, slowly.
  template <class F>
  __device__ void visit(int first, int last, F f) const {
    Walk at = walk();
#pragma unroll 1
    for (int r = 0; r < rows; ++r, at.next()) {
#pragma unroll 1
      for (int k = first; k < last; ++k) f(offset(at) + k);
    }
  }
};

// Where the values of one thread lie that are at the edges of planes.
template <class T>
struct Edges {
  const T* inputs[2];
  const int* order;
  int64_t sample_stride, origin, between;
  int edge, vector, total, rows;  // rows: how many values there are for this thread

  template <class Op>
  __device__ Edges(const Op& op, const ReductionPlan& plan, const Slab& slab, int64_t column_block, const int* order,
                   int samples)
      : order(order),
        sample_stride(plan.geometry.sample_stride),
        origin(plan.geometry.offset(column_block, 0) + slab.first_sample * sample_stride),
        edge(plan.edge),
        vector(plan.geometry.vector),
        between(plan.between()),
        total(plan.edges_of(slab, samples)),
        rows(rows_of_thread(total, static_cast<int>(threadIdx.x), kThreads)) {
#pragma unroll
    for (int i = 0; i < Op::kInputs; ++i) inputs[i] = op.inputs[i];
  }

  // Of the i-th, over all samples: those before the first whole vector of a plane, then those behind the last.
  __device__ int64_t offset(int i) const {
    const int sample = i / edge, of_plane = i - sample * edge;
    const int64_t plane = origin + (order == nullptr ? sample : order[sample]) * sample_stride;
    const int before = static_cast<int>(-plane & (vector - 1));
    return plane + of_plane + (of_plane < before ? 0 : between);
  }
  __device__ int64_t first() const { return offset(static_cast<int>(threadIdx.x)); }

  template <class F>
  __device__ void visit(int, int, F f) const {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < total; i += kThreads) f(offset(i));
  }
};

// ---- Between threads -----------------------------------------------------------------------------------------------

// The sum over `lanes` adjacent threads of a warp, in each of them. All threads of the warp take part.
__device__ inline double sum_over_lanes(double value, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffff, value, distance);
  }
  return value;
}

// The merged results of `lanes` adjacent threads, in the first of them, in the order of threads.
template <class Op>
__device__ Partial merge_over_lanes(Partial part, int lanes) {
  for (int distance = 1; distance < lanes; distance *= 2) {
    const Partial other{__shfl_down_sync(0xffffffff, part.count, distance),
                        __shfl_down_sync(0xffffffff, part.first, distance),
                        __shfl_down_sync(0xffffffff, part.second, distance)};
    Op::merge(part, other);
  }
  return part;
}

// atomicInc, and in the same instruction a release of what has been written before and an acquire of what others have
// released. That is one fence, in front; __threadfence on both sides would be two, each of the costlier kind.
__device__ inline unsigned draw(unsigned* ticket, unsigned most) {
  unsigned drawn;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(drawn)
               : "l"(__cvta_generic_to_global(ticket)), "r"(most)
               : "memory");
  return drawn;
}

// True in all threads of the last of `blocks` blocks that draw this ticket, which then sees what the others have
// written before. The release of one thread covers the writes of its block, which happen before the barrier in front of
// it; its acquire, what the block reads behind the next barrier.
__device__ inline bool is_last_of(int64_t blocks, unsigned* ticket) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    last = true;
    const auto most = static_cast<unsigned>(blocks - 1);
    if (blocks > 1) last = draw(ticket, most) == most;
  }
  __syncthreads();
  return last;
}

// What a block merges for a channel: at(i) are the two numbers of the i-th part, of count(i) values. `at_once` are read
// before the first is used: more than one where reading takes as long as hundreds of additions.
template <int at_once, class At, class Count>
struct Parts {
  At at;
  Count count;

  // Calls f(part) for every part lane, lane + lanes, ... below n.
  template <class F>
  __device__ void visit(int n, int lane, int lanes, F f) const {
#pragma unroll 1
    for (int first = lane; first < n; first += at_once * lanes) {
      double2 values[at_once];
#pragma unroll
      for (int k = 0; k < at_once; ++k) {
        if (first + k * lanes < n) values[k] = at(first + k * lanes);
      }
#pragma unroll
      for (int k = 0; k < at_once; ++k) {
        const int i = first + k * lanes;
        if (i < n) f(Partial{static_cast<double>(count(i)), values[k].x, values[k].y});
      }
    }
  }
};

template <int at_once, class At, class Count>
__device__ Parts<at_once, At, Count> parts_of(At at, Count count) {
  return {at, count};
}

// Calls f(i, lane) for i < n, each with `lanes` adjacent threads; with i >= n too, in threads whose warp still has
// others to do: f may shuffle.
template <class F>
__device__ void for_each_channel(int n, int lanes, F f) {
  const int lane = threadIdx.x % lanes, step = blockDim.x / lanes;
  for (int first = 0; first < n; first += step) f(first + static_cast<int>(threadIdx.x) / lanes, lane);
}

// Entries in shared memory, spread such that threads that write `vector` adjacent ones meet no bank conflict.
struct Entries {
  double *first, *second;

  PRECISEBN_HOST_DEVICE static int place(int i) { return i + i / 8; }
  PRECISEBN_HOST_DEVICE static int places(int n) { return place(n) + 1; }
  __device__ double2 get(int i) const { return {first[place(i)], second[place(i)]}; }
  __device__ void set(int i, double2 value) const { first[place(i)] = value.x, second[place(i)] = value.y; }
};

// ---- The kernel ----------------------------------------------------------------------------------------------------

// Of a group: how many values of each channel are in it.
struct alignas(8) Piece {
  int group, values;
};

// The samples that make one piece of a slab: its samples in the order of groups, and of the tensor within a group, are
// cut at the ends of groups and after every `most` of one group. Samples of no group make no piece.
struct PieceSamples {
  int group_of[kMaxSlabSamples];  // of each sample of the slab
  int first_of[kMaxSlabSamples];  // the same where the sample is the first of its piece, else kNone
  int sample[kMaxSlabSamples];    // those of the piece
  int group, samples;             // of the piece; kNone where the slab has fewer pieces

  // By counting: a slab has at most kMaxSlabSamples.
  __device__ void find(const Groups& groups, int64_t first_sample, int n, int piece, int most) {
    if (threadIdx.x == 0) group = Groups::kNone;
    for (int i = threadIdx.x; i < n; i += blockDim.x) group_of[i] = groups[first_sample + i];
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      first_of[i] = before(i) % most == 0 ? group_of[i] : Groups::kNone;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      const int own = group_of[i], own_before = before(i), place = own_before % most;
      int number = own_before / most, all = 0;
      for (int j = 0; j < n; ++j) {
        number += static_cast<unsigned>(first_of[j]) < static_cast<unsigned>(own);  // kNone is the largest
        all += group_of[j] == own;
      }
      if (number != piece || own == Groups::kNone) continue;
      sample[place] = i;
      if (place == 0) group = own, samples = min(most, all - own_before);
    }
    __syncthreads();
  }

  // How many samples before the i-th are of its group.
  __device__ int before(int i) const {
    int others = 0;
    for (int j = 0; j < i; ++j) others += group_of[j] == group_of[i];
    return others;
  }
};

// Does values [first, last) of each of the thread's rows again, with the Op's careful way. Rare, so it finds out anew
// where they are: the loop over the rows keeps no register for it.
template <class Op>
__device__ inline double2 reduce_again(const Op& op, const Geometry& at, const Slabs& slabs, int64_t slab,
                                       int64_t column_block, int group, const int* order, int samples, int first,
                                       int last) {
  const Column<typename Op::Type, Op::kSize> values(op, at, slabs[slab], column_block, order, samples);
  return op.again(values, first, last, at.channel(column_block, threadIdx.x % at.block.columns, first), group);
}

// Adds the thread's share of the edges to its result, in the Op's careful way too: they are few.
template <class Op>
__device__ inline void add_edges(const Op& op, const ReductionPlan& plan, int64_t slab, int64_t column_block, int group,
                                 const int* order, int samples, double2& result) {
  const Slab rows = plan.slabs[slab];
  const Edges<typename Op::Type> edges(op, plan, rows, column_block, order, samples);
  if (edges.rows == 0) return;
  const int own_rows = rows_of_thread(samples * rows.rows, static_cast<int>(threadIdx.x), kThreads);
  Partial all{static_cast<double>(own_rows) * Op::kSize, result.x, result.y};
  const double2 of_edges = op.again(edges, 0, 1, column_block, group);
  Op::merge(all, {static_cast<double>(edges.rows), of_edges.x, of_edges.y});
  result = {all.first, all.second};
}

// The next rows of a thread, all loaded before the first is used.
template <class Op>
struct Batch {
  using Type = typename Op::Type;

  Vec<Type, Op::kSize> x[Op::kInputs][Op::kRows];  // 0 where there are no more

  __device__ void load(const Column<Type, Op::kSize>& values, Walk& walk, int rows) {
#pragma unroll
    for (int r = 0; r < Op::kRows; ++r) {
#pragma unroll
      for (int i = 0; i < Op::kInputs; ++i) x[i][r] = {};
      if (r < rows) {
        const int64_t offset = values.offset(walk);
#pragma unroll
        for (int i = 0; i < Op::kInputs; ++i) x[i][r] = x[i][r].load(values.inputs[i] + offset);
      }
      walk.next();
    }
  }
};

// Reduces the values of one group in the block's slab: calls emit(c, result) for each channel c of the block.
template <class Op, class Emit>
__device__ void reduce_slab(const Op& op, const ReductionPlan& plan, int64_t slab_index, int64_t column_block,
                            int group, const int* order, int samples, const Entries& entries, Emit emit) {
  constexpr int kSize = Op::kSize, kRows = Op::kRows;
  const Geometry& at = plan.geometry;
  const Slab slab = plan.slabs[slab_index];
  const int column = threadIdx.x % at.block.columns, thread_row = threadIdx.x / at.block.columns;
  const int total = samples * slab.rows;

  if (thread_row < at.block.thread_rows && column < at.columns_of_block(column_block)) {
    const Column<typename Op::Type, kSize> values(op, at, slab, column_block, order, samples);
    typename Op::Lanes lanes(op, at, column_block, column, group);
    Walk walk = values.walk();
#pragma unroll 1
    for (int done = 0; done < values.rows; done += kRows) {
      const int rows = min(kRows, values.rows - done);
      Batch<Op> batch;
      batch.load(values, walk, rows);
      if (rows == kRows) {
        lanes.template add<true>(batch.x, done, rows);
      } else {
        lanes.template add<false>(batch.x, done, rows);
      }
    }

    const int entry = (thread_row * at.block.columns + column) * plan.entries_of_thread();
    unsigned failed = 0;
#pragma unroll
    for (int k = 0; k < kSize; ++k) failed |= static_cast<unsigned>(lanes.failed(k)) << k;
    if (plan.joined) {
      entries.set(entry, lanes.join(values.rows, op.mean_of(group, at.channel(column_block, column, 0))));
    } else {
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        entries.set(entry + k, lanes.finish(k, values.rows, op.mean_of(group, at.channel(column_block, column, k))));
      }
    }
    // Lanes whose float32 arithmetic has overflowed or underflowed are done again in float64.
#pragma unroll 1
    while (failed != 0) {
      const int k = plan.joined ? 0 : __ffs(static_cast<int>(failed)) - 1;
      const double2 result = reduce_again(op, at, plan.slabs, slab_index, column_block, group, order, samples, k,
                                          plan.joined ? kSize : k + 1);
      entries.set(entry + k, result);
      failed = plan.joined ? 0 : failed & (failed - 1);
    }
    if (plan.edge > 0) {
      double2 result = entries.get(entry);
      add_edges(op, plan, slab_index, column_block, group, order, samples, result);
      entries.set(entry, result);
    }
  }
  __syncthreads();

  const int width = plan.entry_width(), all_columns = plan.entry_columns();
  const int values_of_entry = plan.joined ? kSize : 1;
  const int channels = at.channels_of_block(column_block), edges = plan.edges_of(slab, samples);
  for_each_channel(channels, plan.lanes_per_channel, [&](int channel, int lane) {
    const int n = channel < channels ? width * at.block.thread_rows : 0;
    const auto row_of = [&](int i) { return width == 1 ? i : i / width; };
    const auto at_entry = [&](int i) -> double2 {
      const int row = row_of(i);
      return entries.get(row * all_columns + channel * width + (i - row * width));
    };
    const auto count = [&](int i) {
      const int row = row_of(i);
      return rows_of_thread(total, row, at.block.thread_rows) * values_of_entry +
             rows_of_thread(edges, row, at.block.thread_rows);
    };
    const double2 result = Op::combine(n, lane, plan.lanes_per_channel, parts_of<1>(at_entry, count));
    if (lane == 0 && channel < channels) emit(channel, result);
  });
}

// What a block does when its slab, of several, is reduced: nothing, unless it is the last of its cluster, and then of
// its channels. Returns whether it is that, and so has their results.
template <class Op>
__device__ inline bool merge_slabs(const Op& op, const ReductionPlan& plan, int64_t slab_index, int64_t column_block,
                                   double2* partials, unsigned* tickets) {
  const Geometry& at = plan.geometry;
  const int64_t first_channel = column_block * at.block_channels;
  const int channels = at.channels_of_block(column_block);
  double2* const cluster_results = partials + plan.slabs.count * at.channels + first_channel;
  unsigned *const final_tickets = tickets + 1, *const cluster_tickets = final_tickets + at.column_blocks;
  const int64_t cluster = slab_index / plan.fan_in;
  // Merges n results from the begin-th on, of `step` slabs each: first slabs, then clusters.
  int64_t begin = cluster * plan.fan_in, step = 1;
  int n = static_cast<int>(min(plan.fan_in, plan.slabs.count - begin));
  const double2* from = partials + begin * at.channels + first_channel;
  if (!is_last_of(n, cluster_tickets + column_block * plan.clusters + cluster)) return false;
#pragma unroll 1
  for (;;) {
    const bool is_result = plan.clusters == 1 || step > 1;
    for_each_channel(channels, plan.lanes_per_channel, [&](int channel, int lane) {
      const auto result_of = [&](int i) { return __ldcg(from + i * at.channels + channel); };  // not from this one's L1
      const auto count = [&](int i) {
        return plan.values_before(begin + (i + 1) * step) - plan.values_before(begin + i * step);
      };
      const double2 merged =
          Op::combine(channel < channels ? n : 0, lane, plan.lanes_per_channel, parts_of<8>(result_of, count));
      if (lane != 0 || channel >= channels) return;
      if (is_result) {
        op.emit(0, first_channel + channel, {plan.all_values, merged.x, merged.y});
      } else {
        cluster_results[cluster * at.channels + channel] = merged;
      }
    });
    if (is_result) return true;
    if (!is_last_of(plan.clusters, final_tickets + column_block)) return false;
    begin = 0, step = plan.fan_in, n = static_cast<int>(plan.clusters), from = cluster_results;
  }
}

template <class Op>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    reduce(const __grid_constant__ Op op, const __grid_constant__ ReductionPlan plan, Groups groups, double2* partials,
           Piece* pieces, unsigned* tickets) {
  extern __shared__ __align__(16) double shared[];
  __shared__ PieceSamples piece;
  const Geometry& at = plan.geometry;
  const int64_t column_block = blockIdx.x % at.column_blocks, to = blockIdx.x / at.column_blocks;
  const bool grouped = plan.slots > 0;
  const int64_t slab_index = grouped ? to / plan.slots : to;
  const Slab slab = plan.slabs[slab_index];
  const int num_entries = static_cast<int>(blockDim.x) * plan.entries_of_thread();
  const Entries entries{shared, shared + Entries::places(num_entries)};

  int group = 0, samples = slab.samples;
  if (grouped) {
    piece.find(groups, slab.first_sample, samples, static_cast<int>(to % plan.slots), plan.piece_samples);
    group = piece.group;
    samples = group == Groups::kNone ? 0 : piece.samples;
    if (column_block == 0 && threadIdx.x == 0) {
      pieces[to] = {group, samples * slab.rows * at.inner + plan.edges_of(slab, samples)};
    }
    if (group == Groups::kNone) return;
  }
  const int64_t first_channel = column_block * at.block_channels;
  const bool is_result = !grouped && plan.slabs.count == 1;
  reduce_slab(op, plan, slab_index, column_block, group, grouped ? piece.sample : nullptr, samples, entries,
              [&](int channel, double2 result) {
                if (is_result) {
                  op.emit(0, first_channel + channel, {plan.all_values, result.x, result.y});
                } else {
                  partials[to * at.channels + first_channel + channel] = result;
                }
              });
  if (grouped || !(is_result || merge_slabs(op, plan, slab_index, column_block, partials, tickets))) return;
  const bool now = op.count_comes_last() ? is_last_of(at.column_blocks, tickets) : column_block == 0;
  if (now && threadIdx.x == 0) op.emit_count(0, plan.all_values);
}

// The pieces that blocks have left, merged: several warps for each channel of a group, a block for adjacent channels.
// A thread has every so-many-th piece of all, and skips those of other groups; then those of threads are merged in a
// tree, and those of warps.
template <class Op>
__global__ void __launch_bounds__(kThreads)
    merge_pieces(const __grid_constant__ Op op, int64_t channels, int warps_per_channel, int num_pieces,
                 const double2* partials, const Piece* pieces) {
  constexpr int kWarp = 32, kWarps = kThreads / kWarp, kAtOnce = 4;
  __shared__ Partial parts[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, channels_here = kWarps / warps_per_channel;
  const int64_t blocks = (channels + channels_here - 1) / channels_here;
  const int64_t first_channel = blockIdx.x % blocks * channels_here, channel = first_channel + warp / warps_per_channel;
  const int group = static_cast<int>(blockIdx.x / blocks);

  Partial merged{0, 0, 0};
  const int threads = warps_per_channel * kWarp, end = channel < channels ? num_pieces : 0;
#pragma unroll 1
  for (int first = warp % warps_per_channel * kWarp + lane; first < end; first += kAtOnce * threads) {
    int values[kAtOnce];
    double2 results[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int i = min(first + k * threads, end - 1);
      const int2 piece = __ldg(reinterpret_cast<const int2*>(pieces) + i);
      values[k] = first + k * threads < end && piece.x == group ? piece.y : 0;
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (values[k] > 0) results[k] = __ldg(partials + (first + k * threads) * channels + channel);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (values[k] > 0) Op::merge(merged, {static_cast<double>(values[k]), results[k].x, results[k].y});
    }
  }
  merged = merge_over_lanes<Op>(merged, kWarp);
  if (lane == 0) parts[warp] = merged;
  __syncthreads();
  if (warp > 0) return;
  merged = merge_over_lanes<Op>(parts[lane % kWarps], warps_per_channel);
  if (lane >= kWarps || lane % warps_per_channel != 0) return;
  const int64_t own = first_channel + lane / warps_per_channel;
  if (own >= channels) return;
  op.emit(group, own, merged);
  if (own == 0) op.emit_count(group, merged.count);
}

// ---- The launch ----------------------------------------------------------------------------------------------------

// `view` is not empty; `op` has vectors of kSize values, to which its inputs are aligned.
template <class Op>
void launch_reduction(const OnDeviceOf& where, const Tensor& x, const View& view, const Groups& groups, const Op& op,
                      const ReductionPlan& plan) {
  const int64_t num_pieces = plan.slots * plan.slabs.count;
  const auto in_double2 =
      static_cast<int64_t>(num_pieces * sizeof(Piece) + sizeof(double2) - 1) / static_cast<int64_t>(sizeof(double2));
  const Workspace workspace(where, x, plan.partials() + in_double2, plan.tickets());
  auto* const pieces = reinterpret_cast<Piece*>(workspace.partials + plan.partials());
  const int entries = plan.geometry.block.threads * plan.entries_of_thread();
  const size_t shared = 2 * sizeof(double) * Entries::places(entries);
  STD_TORCH_CHECK(plan.blocks() < (int64_t{1} << 31), "precisebn: the tensor is too large");
  reduce<<<static_cast<unsigned>(plan.blocks()), plan.geometry.block.threads, shared, where.stream>>>(
      op, plan, groups, workspace.partials, pieces, workspace.tickets);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (plan.slots == 0) return;
  const auto blocks_with = [&](int warps) { return (view.channels * warps + 7) / 8 * groups.count; };
  int warps =
      1;  // for each channel: more while threads have more pieces than they read at once, and multiprocessors no work
  while (warps < 8 && warps * 128 < num_pieces && blocks_with(warps) < where.multiprocessors) warps *= 2;
  STD_TORCH_CHECK(blocks_with(warps) < (int64_t{1} << 31) && num_pieces < (int64_t{1} << 30),
                  "precisebn: there are too many groups");
  merge_pieces<<<static_cast<unsigned>(blocks_with(warps)), kThreads, 0, where.stream>>>(
      op, view.channels, warps, static_cast<int>(num_pieces), workspace.partials, pieces);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Plans the reduction of a dense tensor and calls launch(size, plan), size a constant: how many values a thread loads
// at once.
template <class T, class Launch>
void plan_and_launch(const View& view, bool is_aligned, const Groups& groups, int rows_at_once, int multiprocessors,
                     const Launch& launch) {
  const ReductionPlan plan = plan_reduction(view, is_aligned ? kVector<T> : 1, sizeof(T), rows_at_once,
                                            groups.ids == nullptr ? 0 : groups.count, multiprocessors);
  if (plan.geometry.vector == 1) {
    launch(std::integral_constant<int, 1>{}, plan);
  } else {
    launch(std::integral_constant<int, kVector<T>>{}, plan);
  }
}

}  // namespace precisebn::cuda
