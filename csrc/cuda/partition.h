// How the kernels cut a tensor into blocks and threads. Plain arithmetic without CUDA or torch, so that every shape can
// be checked on a machine without a GPU: that each value is visited once, by a thread that knows its channel.
//
// All kernels see the same picture. A sample is `rows` rows; a thread owns one column, `vector` adjacent values wide,
// and walks down the rows. Which values are a row depends on the form:
//
//   rows     (channels-last)      a row is the C channels of one position
//   columns  (NCHW, short planes) a row is a whole sample, C planes after another: a thread sees the same few values of
//                                 the same plane in every sample, so 7x7 planes cost no more than long ones
//   planes   (NCHW, long planes)  a row is one vector of a plane; a block has a single column and a single channel
//
// A long plane need not begin or end where a vector may. Its rows are then as many whole vectors as each plane of this
// length has, from the first place in the plane where one may begin; the few values before and behind them (`edge`, as
// many for each plane) are read one by one.
//
// The first two differ only in how many adjacent values are of one channel (`inner`: 1 or the plane's length), the
// third only in its strides. So there is one kernel, and the forms differ in the numbers below.
//
// Of a small tensor a block has all values of its channels: a single slab, and blocks that are narrow instead, so that
// there are enough of them. Such a reduction has nothing to merge, and what needs its results can follow in the same
// launch (whole.h). Of a somewhat larger one as many blocks as a cluster holds (cluster.h) have them together.
//
// The cut depends on the shape, the alignment and the number of multiprocessors, never on what runs first: with the
// order of merging fixed too, results have the same bits every time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>

#include "../moments.h"  // PRECISEBN_HOST_DEVICE

namespace precisebn::cuda {

constexpr int kThreads = 256;        // a block has up to this many
constexpr int kBlocksPerSm = 2;      // how many blocks of a reduction have room on a multiprocessor, by their registers
constexpr int kMaxSlabSamples = 64;  // with groups, by which each block of the slab orders its samples

// A dense tensor (N, C, *): channels * length values a sample, as planes (NCHW) or as rows of channels (channels-last).
struct View {
  int64_t batch, channels, length;
  bool planes;

  int64_t values() const { return batch * channels * length; }
};

// A single channel, or one value per plane, can be seen both ways: take the one with the longer runs.
inline View simplified(View view, bool grouped) {
  if (view.channels == 1 && !grouped) return {1, 1, view.batch * view.length, true};
  if (view.length == 1) view.planes = false;
  return view;
}

// ---- Rows of samples, cut into slabs -------------------------------------------------------------------------------

struct Slab {
  int64_t first_sample, first_row;
  int samples, rows;  // rows: of each sample
};

struct Slabs {
  int64_t samples, rows;  // all there is; rows: of each sample
  int64_t samples_per_slab, rows_per_slab;
  int64_t parts;  // how many slabs share their samples, each with other rows
  int64_t count;

  PRECISEBN_HOST_DEVICE Slab operator[](int64_t slab) const {
    const auto index = static_cast<unsigned>(slab),
               per_sample = static_cast<unsigned>(parts);  // blocks are fewer than 2^31
    const int64_t sample = index / per_sample * samples_per_slab, row = index % per_sample * rows_per_slab;
    const int64_t more_samples = samples - sample, more_rows = rows - row;
    return {sample, row, static_cast<int>(more_samples < samples_per_slab ? more_samples : samples_per_slab),
            static_cast<int>(more_rows < rows_per_slab ? more_rows : rows_per_slab)};
  }
};

// `wanted`: rows of a slab, counted over its samples.
inline Slabs cut_rows(int64_t samples, int64_t rows, int64_t wanted, int64_t most_samples) {
  Slabs slabs{samples, rows, 1, rows, 1, 0};
  if (rows > wanted) {
    slabs.parts = (rows + wanted - 1) / wanted;
    slabs.rows_per_slab = (rows + slabs.parts - 1) / slabs.parts;
    slabs.parts = (rows + slabs.rows_per_slab - 1) / slabs.rows_per_slab;
  } else {
    const int64_t most = std::min({samples, most_samples, wanted / rows}), least_slabs = (samples + most - 1) / most;
    slabs.samples_per_slab = (samples + least_slabs - 1) / least_slabs;
  }
  slabs.count = (samples + slabs.samples_per_slab - 1) / slabs.samples_per_slab * slabs.parts;
  return slabs;
}

// Goes through the rows of a slab's samples in steps of `step` rows: a division and multiplications at the start, a few
// additions on the way. `origin`: the offset of row 0 of sample 0.
class Walk {
 public:
  PRECISEBN_HOST_DEVICE Walk(int start, int step, int rows, int64_t row_stride, int64_t sample_stride, int64_t origin)
      : sample(start / rows),
        row(start % rows),
        offset(origin + sample * sample_stride + row * row_stride),
        rows_(rows),
        sample_step_(step / rows),
        row_step_(step % rows),
        jump_(sample_step_ * sample_stride + row_step_ * row_stride),
        carry_(sample_stride - rows * row_stride) {}

  PRECISEBN_HOST_DEVICE void next() {
    sample += sample_step_;
    row += row_step_;
    offset += jump_;
    if (row >= rows_) {
      row -= rows_;
      ++sample;
      offset += carry_;
    }
  }

  int sample, row;
  int64_t offset;

 private:
  int rows_, sample_step_, row_step_;
  int64_t jump_, carry_;
};

// As many slabs as samples alone make necessary.
inline Slabs whole_samples(int64_t samples, int64_t rows, int64_t most_samples) {
  return cut_rows(samples, rows, samples * rows, most_samples);
}

// How many of `total` rows the thread row `start` of `step` gets.
PRECISEBN_HOST_DEVICE inline int rows_of_thread(int total, int start, int step) {
  return total > start ? (total - 1 - start) / step + 1 : 0;
}

// ---- Columns, cut into blocks --------------------------------------------------------------------------------------

struct Block {
  int columns;      // vectors side by side
  int thread_rows;  // one below the other
  int threads;      // the product, up to a whole warp
};

// Cuts `total` columns into blocks of at least `least` and at most about `most`, in units that must not be split, such
// that as few threads as possible have nothing to do.
inline Block cut_columns(int64_t total, int64_t unit, int64_t least, int64_t most) {
  Block best{};
  double best_use = -1;
  most = std::max(unit, std::min<int64_t>(most, kThreads));
  most = std::min(most, total + unit - 1) / unit * unit;
  // From the widest on, until there is one that no other can better. Divisions of 64 bits, most of the time that this
  // takes, are left out where they cannot matter.
  for (int64_t columns = most; columns > 0 && best_use < 1 && (columns >= least || columns >= total); columns -= unit) {
    const int width = static_cast<int>(columns), thread_rows = std::max(1, kThreads / width);
    const int threads = (width * thread_rows + 31) / 32 * 32;
    if (width * thread_rows <= best_use * threads) continue;
    const int64_t blocks = (total + columns - 1) / columns;
    const double use = static_cast<double>(total) / (blocks * columns) * (width * thread_rows) / threads;
    if (use > best_use) {
      best = {width, thread_rows, threads};
      best_use = use;
    }
  }
  if (best_use < 0) best = cut_columns(total, unit, unit, most);
  return best;
}

// A narrow block for a tensor of few rows: about one for each multiprocessor, no narrower than `least`, and no more
// threads than there is work for.
inline Block narrow_block(int64_t total, int64_t unit, int64_t least, int64_t most, int64_t rows, int multiprocessors) {
  const int64_t wanted = std::max(least, (total + multiprocessors - 1) / multiprocessors);
  const int64_t columns = std::max(std::min({wanted, most, total}) / unit, int64_t{1}) * unit;
  const int width = static_cast<int>(columns);
  const int thread_rows = static_cast<int>(std::clamp<int64_t>(kThreads / width, 1, rows));
  return {width, thread_rows, (width * thread_rows + 31) / 32 * 32};
}

// Where the values are: in elements from the start of the tensor, except the columns, in vectors.
struct Geometry {
  int64_t row_stride, sample_stride, block_stride;
  int64_t columns;        // of a row, over all blocks
  int64_t column_blocks;  // how many blocks share a slab
  int64_t channels;       // of the tensor
  int inner;              // how many adjacent values of a row are of one channel
  int block_channels;     // channels of a block; the last block may have fewer
  int vector;             // values that a thread loads at once
  Block block;

  PRECISEBN_HOST_DEVICE int columns_of_block(int64_t column_block) const {
    const int64_t rest = columns - column_block * block.columns;
    return static_cast<int>(rest < block.columns ? rest : block.columns);
  }
  PRECISEBN_HOST_DEVICE int channels_of_block(int64_t column_block) const {
    const int64_t rest = channels - column_block * block_channels;
    return static_cast<int>(rest < block_channels ? rest : block_channels);
  }
  // Of the thread's first value in row 0 of sample 0.
  PRECISEBN_HOST_DEVICE int64_t offset(int64_t column_block, int column) const {
    return column_block * block_stride + static_cast<int64_t>(column) * vector;
  }
  // Of a thread's k-th value.
  PRECISEBN_HOST_DEVICE int64_t channel(int64_t column_block, int column, int k) const {
    return column_block * block_channels + (column * vector + k) / inner;
  }
};

// ---- Reductions ----------------------------------------------------------------------------------------------------

struct ReductionPlan {
  Geometry geometry;
  Slabs slabs;
  int edge;               // values of each plane that are in none of its rows
  bool joined;            // all values of a thread are of one channel: they make one entry of the block's merge, not
                          // `vector` entries
  int lanes_per_channel;  // threads that merge one channel; a power of two, at most a warp
  int piece_samples;      // a piece is up to so many samples of a slab: with groups, of one group
  int slots;              // groups: how many pieces a slab may have, each for a block. 0: there are no groups
  double one_of_parts, values_of_samples, values_of_part, all_values;  // for values_before
  int cluster_blocks;        // that have all values of their channels together, one for each slab. 0: they are too many
  int64_t fan_in, clusters;  // slabs are merged `fan_in` at a time into clusters, and these into the result

  int64_t blocks() const { return geometry.column_blocks * slabs.count * (slots ? slots : 1); }
  // Whether a block has all values of its channels, or of its channels and a group.
  PRECISEBN_HOST_DEVICE bool is_whole() const { return slabs.count == 1 && piece_samples == slabs.samples_per_slab; }
  int64_t partials() const {
    const int64_t clusters_too = clusters > 1 ? clusters : 0;
    return (slots ? slabs.count * slots : slabs.count + clusters_too) * geometry.channels;
  }

  // How many values of each channel are in `samples` samples of a slab but in none of its rows.
  PRECISEBN_HOST_DEVICE int edges_of(const Slab& slab, int samples) const {
    return slab.first_row == 0 ? samples * edge : 0;
  }
  // How many values of a plane lie between those before its rows and those behind them.
  PRECISEBN_HOST_DEVICE int64_t between() const { return slabs.rows * geometry.vector; }
  // How many values of each channel are in all slabs before this one; of more slabs than there are, in all. In float64,
  // which is exact here too, and by which dividing is multiplying: a block that merges asks for every part.
  PRECISEBN_HOST_DEVICE double values_before(int64_t slab) const {
    const auto number = static_cast<double>(slab);
    const double whole = floor((number + 0.5) * one_of_parts), part = number - whole * static_cast<double>(slabs.parts);
    const double values = whole * values_of_samples + part * values_of_part + (part > 0 ? edge : 0);
    return values < all_values ? values : all_values;
  }
  int64_t tickets() const { return slots ? 0 : 1 + geometry.column_blocks * (1 + clusters); }

  // A block's merge goes over `thread_rows` x `entry_columns` entries, of which each channel has `entry_width` in a
  // row.
  PRECISEBN_HOST_DEVICE int entries_of_thread() const { return joined ? 1 : geometry.vector; }
  PRECISEBN_HOST_DEVICE int entry_columns() const { return geometry.block.columns * entries_of_thread(); }
  PRECISEBN_HOST_DEVICE int entry_width() const { return joined ? geometry.inner / geometry.vector : geometry.inner; }
};

// vector: values in 16 bytes, or 1 where the tensor is not aligned to them. rows_at_once: rows that a thread has in
// flight.
inline ReductionPlan plan_reduction(const View& view, int vector, int element_size, int rows_at_once,
                                    int64_t num_groups, int multiprocessors) {
  constexpr int64_t kLongPlane = 64;       // vectors
  constexpr int kMostRounds = 16;          // a chain of float32 merges is no longer than this
  constexpr int kWaves = 3;                // blocks do not all take the same time
  constexpr int kMostWholeRounds = 4;      // take less time than a ticket and what comes behind it
  constexpr int kMostSlabs = 8;            // of a cluster of blocks, each of so many rounds at most
  constexpr int64_t kMostBytes = 2 << 20;  // beyond, launches matter less than bytes
  const bool grouped = num_groups > 0;     // 0: no group vector
  const int64_t sample = view.channels * view.length;

  ReductionPlan plan{};
  Geometry& at = plan.geometry;
  at.channels = view.channels;
  int64_t samples = view.batch, rows_per_sample;
  const auto rounds_of = [&](const Block& block) {
    const int64_t round = static_cast<int64_t>(block.thread_rows) * rows_at_once;
    return (samples * rows_per_sample + round - 1) / round;
  };
  const auto is_whole = [&](const Block& block) {
    return rounds_of(block) <= kMostWholeRounds && !(grouped && samples > kMaxSlabSamples);
  };

  const auto is_clustered = [&](const Block& block) {
    return !grouped && rounds_of(block) <= kMostSlabs * kMostWholeRounds && view.values() * element_size <= kMostBytes;
  };

  // Short planes: a block's columns must be whole planes and whole vectors.
  const int64_t row = view.planes ? sample : view.channels;
  at.vector = row % vector == 0 ? vector : 1;
  const int64_t unit = view.planes ? std::lcm(view.length, static_cast<int64_t>(at.vector)) / at.vector : 1;
  const bool whole_vectors = view.length % vector == 0;
  const bool long_planes = whole_vectors && view.length / vector >= kLongPlane;
  if (view.planes && (long_planes || unit > kThreads)) {
    at.vector = vector;
    at.row_stride = at.inner = at.vector;
    at.sample_stride = sample;
    at.block_stride = view.length;
    at.columns = at.column_blocks = view.channels;
    at.block_channels = 1;
    at.block = {1, kThreads, kThreads};
    rows_per_sample = (view.length - (whole_vectors ? 0 : vector - 1)) / vector;
    plan.edge = static_cast<int>(view.length - rows_per_sample * vector);
  } else {
    at.inner = view.planes ? static_cast<int>(view.length) : 1;
    at.row_stride = row;
    at.columns = row / at.vector;
    // A block leaves 16 bytes per channel for the final merge, so it should read several times as many: enough rows,
    // which takes narrow blocks, if not so narrow that a row of theirs is less than a cache line.
    const int64_t value_bytes = static_cast<int64_t>(at.inner) * element_size;
    const int64_t enough_rows = std::max<int64_t>(1, 32 / value_bytes);
    const int64_t line = 128 / (at.vector * element_size);
    const int64_t most = enough_rows == 1 ? kThreads : std::max(kThreads / enough_rows, line);
    rows_per_sample = view.planes ? 1 : view.length;
    at.block = narrow_block(at.columns, unit, line / 2, most, samples * rows_per_sample, multiprocessors);
    if (!is_whole(at.block) && !is_clustered(at.block))
      at.block = cut_columns(at.columns, unit, std::max(line, most / 2), most);
    at.block_stride = static_cast<int64_t>(at.block.columns) * at.vector;
    at.column_blocks = (at.columns + at.block.columns - 1) / at.block.columns;
    at.block_channels = at.block.columns * at.vector / at.inner;
    at.sample_stride = sample;
    if (!grouped) {  // samples lie one after another: one long sample
      rows_per_sample *= samples;
      samples = 1;
    }
  }

  const int64_t round = static_cast<int64_t>(at.block.thread_rows) * rows_at_once, rounds = rounds_of(at.block);
  const int64_t slabs_wanted = std::max<int64_t>(1, multiprocessors * kBlocksPerSm * kWaves / at.column_blocks);
  const int64_t wanted = std::clamp<int64_t>((rounds + slabs_wanted - 1) / slabs_wanted, 1, kMostRounds) * round;
  Slabs of_cluster{};
  for (int64_t each = 1; each <= kMostWholeRounds && is_clustered(at.block); ++each) {
    of_cluster = cut_rows(samples, rows_per_sample, each * round, samples);
    if (of_cluster.count <= kMostSlabs) break;
  }
  if (is_whole(at.block)) {
    plan.slabs = whole_samples(samples, rows_per_sample, samples);
    plan.piece_samples = static_cast<int>(samples);
    plan.slots = grouped ? static_cast<int>(std::min(num_groups, samples)) : 0;
  } else if (is_clustered(at.block) && of_cluster.count <= kMostSlabs) {
    plan.slabs = of_cluster;
    plan.piece_samples = static_cast<int>(plan.slabs.samples_per_slab);
    plan.cluster_blocks = static_cast<int>(plan.slabs.count);
  } else if (grouped && rows_per_sample <= wanted) {
    // Which samples are of one group only the device knows: a slab is as many as a block can order, the work of
    // several.
    plan.slabs = whole_samples(samples, rows_per_sample, kMaxSlabSamples);
    const int64_t whole = plan.slabs.samples_per_slab, piece = std::min(whole, wanted / rows_per_sample);
    plan.piece_samples = static_cast<int>(piece);
    // Each group of a slab has a last piece that may be short: so many pieces at most, of so many groups.
    plan.slots = static_cast<int>((whole + std::min(num_groups, whole) * (piece - 1)) / piece);
  } else {
    plan.slabs = cut_rows(samples, rows_per_sample, wanted, samples);
    plan.piece_samples = static_cast<int>(plan.slabs.samples_per_slab);
    plan.slots = grouped ? 1 : 0;
  }

  const auto values_of = [&](int64_t samples, int64_t rows, int edge) {
    return static_cast<double>(samples * (rows * at.inner + edge));
  };
  plan.one_of_parts = 1.0 / static_cast<double>(plan.slabs.parts);
  plan.values_of_samples = values_of(plan.slabs.samples_per_slab, rows_per_sample, plan.edge);
  plan.values_of_part = values_of(1, plan.slabs.rows_per_slab, 0);
  plan.all_values = values_of(samples, rows_per_sample, plan.edge);

  plan.joined = at.inner % at.vector == 0;  // always where there are edges
  plan.lanes_per_channel = 1;
  while (plan.lanes_per_channel < 32 && 2 * plan.lanes_per_channel * at.block_channels <= at.block.threads) {
    plan.lanes_per_channel *= 2;
  }
  // Up to 16 slabs in one go; else about as many clusters as slabs in a cluster.
  plan.fan_in = plan.slabs.count;
  if (plan.slabs.count > 16) {
    plan.fan_in = 1;
    while (plan.fan_in * plan.fan_in < plan.slabs.count) ++plan.fan_in;
  }
  plan.clusters = (plan.slabs.count + plan.fan_in - 1) / plan.fan_in;
  return plan;
}

// ---- Maps: one value out for each value in --------------------------------------------------------------------------

// A thread walks down a column of rows, samples of planes or positions, and needs the same coefficients in each. Few
// samples have few rows: then it walks along the sample, whose rows are as wide as a block, and its coefficients change
// where the next plane begins.
struct MapPlan {
  Geometry geometry;
  int64_t rows, rows_per_slab, slabs;
  int64_t rows_per_sample;
  bool along;  // slabs then hold rows of one sample; the last row of a sample may be short

  int64_t blocks() const { return geometry.column_blocks * slabs; }
};

inline MapPlan plan_map(const View& view, int vector, int rows_at_once, int multiprocessors) {
  constexpr int kMostRounds = 16, kBlocksWanted = 16;  // of each multiprocessor
  MapPlan plan{};
  Geometry& at = plan.geometry;
  at.channels = view.channels;
  at.inner = 1;  // unused: planes may be longer than an int
  at.sample_stride = view.channels * view.length;
  at.row_stride = view.planes ? at.sample_stride : view.channels;
  at.vector = at.row_stride % vector == 0 ? vector : 1;
  at.columns = at.row_stride / at.vector;
  const int64_t wanted = static_cast<int64_t>(multiprocessors) * kBlocksWanted, span = int64_t{kThreads} * at.vector;
  plan.along = view.planes && (view.batch == 1 || (view.batch < rows_at_once && view.length >= span));
  if (plan.along) {
    at.block = {kThreads, 1, kThreads};
    at.row_stride = at.block_stride = span;
    at.column_blocks = 1;
    plan.rows_per_sample = (at.columns + kThreads - 1) / kThreads;
    plan.rows = view.batch * plan.rows_per_sample;
    const int64_t rows = std::clamp<int64_t>((plan.rows + wanted - 1) / wanted, 1, kMostRounds * rows_at_once);
    plan.rows_per_slab = rows < rows_at_once ? rows : (rows + rows_at_once - 1) / rows_at_once * rows_at_once;
    plan.slabs = (plan.rows_per_sample + plan.rows_per_slab - 1) / plan.rows_per_slab * view.batch;
    return plan;
  }
  at.block = cut_columns(at.columns, 1, std::min<int64_t>(at.columns, kThreads / 2), kThreads);
  at.block_stride = static_cast<int64_t>(at.block.columns) * at.vector;
  at.column_blocks = (at.columns + at.block.columns - 1) / at.block.columns;
  plan.rows_per_sample = view.planes ? 1 : view.length;
  plan.rows = view.batch * plan.rows_per_sample;
  const int64_t round = static_cast<int64_t>(at.block.thread_rows) * rows_at_once;
  const int64_t rounds = (plan.rows + round - 1) / round;
  const int64_t slabs_wanted = std::max<int64_t>(1, wanted / at.column_blocks);
  plan.rows_per_slab = std::clamp<int64_t>((rounds + slabs_wanted - 1) / slabs_wanted, 1, kMostRounds) * round;
  plan.slabs = (plan.rows + plan.rows_per_slab - 1) / plan.rows_per_slab;
  return plan;
}

}  // namespace precisebn::cuda
