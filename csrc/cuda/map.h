// One value out for each value in, with coefficients per (group, channel): the kernel of `normalize` and
// `backward_apply`, which differ in the formula (an Op, see there).
//
// A thread owns one column of the rows of partition.h and walks down it, so its coefficients stay in registers; they
// are loaded again only where the group changes, or the channel where it walks along a sample. kRows independent
// 16-byte loads per input are in flight before the first is used. In planes, a row is a whole sample, and adjacent
// threads still have adjacent vectors: every access is coalesced, whatever the length of the planes, and a vector may
// hold the end of one plane and the start of the next.
#pragma once

#include "partition.h"
#include "tensors.h"
#include "vec.h"

namespace precisebn::cuda {

template <class Op>
__global__ void __launch_bounds__(kThreads)
    map(const __grid_constant__ Op op, const __grid_constant__ MapPlan plan, Groups groups, int64_t inner) {
  using T = typename Op::Type;
  using Real = Compute<T>;
  constexpr int kSize = Op::kSize, kRows = Op::kRows;
  const Geometry& at = plan.geometry;
  const int64_t column_block = blockIdx.x % at.column_blocks, slab = blockIdx.x / at.column_blocks;
  const int column = threadIdx.x % at.block.columns, thread_row = threadIdx.x / at.block.columns;
  if (thread_row >= at.block.thread_rows || column >= at.columns_of_block(column_block)) return;

  int64_t position = at.offset(column_block, column);  // of the next vector, within its row or along its sample
  int64_t offset, sample = 0, row_of_sample = 0;
  int rows;
  if (plan.along) {
    const int64_t slabs = (plan.rows_per_sample + plan.rows_per_slab - 1) / plan.rows_per_slab;
    sample = slab / slabs;
    row_of_sample = slab % slabs * plan.rows_per_slab;
    position += row_of_sample * at.row_stride;
    offset = sample * at.sample_stride + position;
    rows = static_cast<int>(min(plan.rows_per_slab, (at.sample_stride - position - 1) / at.row_stride + 1));
    if (position >= at.sample_stride) return;
  } else {
    const int64_t first_row = slab * plan.rows_per_slab, row = first_row + thread_row;
    const int total = static_cast<int>(min(plan.rows_per_slab, plan.rows - first_row));
    offset = row * at.row_stride + position;
    rows = rows_of_thread(total, thread_row, at.block.thread_rows);
    if (rows == 0) return;
    if (groups.ids != nullptr) sample = row / plan.rows_per_sample, row_of_sample = row % plan.rows_per_sample;
  }

  Real coefficients[Op::kCoefficients][kSize];
  int64_t left;  // values from the position on of the same plane
  const auto load_coefficients = [&](int group) {
    int64_t channel = position / inner;
    left = inner - (position - channel * inner);
    channel += group * at.channels;
    int64_t of_channel = left;
#pragma unroll
    for (int k = 0; k < kSize; ++k, --of_channel) {
      if (of_channel == 0) ++channel, of_channel = inner;
#pragma unroll
      for (int i = 0; i < Op::kCoefficients; ++i) {
        const Real* from = op.coefficients[i];
        coefficients[i][k] = group == Groups::kNone ? static_cast<Real>(NAN)
                             : from == nullptr      ? 0
                                                    : __ldg(from + channel);
      }
    }
  };
  int group = groups[sample];
  load_coefficients(group);

  const int64_t step = at.block.thread_rows * at.row_stride;
  for (int done = 0; done < rows; done += kRows, offset += kRows * step) {
    Vec<T, kSize> x[Op::kInputs][kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (done + r >= rows) continue;
#pragma unroll
      for (int i = 0; i < Op::kInputs; ++i) x[i][r] = x[i][r].load(op.inputs[i] + offset + r * step);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (done + r >= rows) continue;
      bool changed = false;
      if (groups.ids != nullptr) {
        while (row_of_sample >= plan.rows_per_sample) row_of_sample -= plan.rows_per_sample, ++sample;
        const int now = groups[sample];
        changed = now != group;
        group = now;
        row_of_sample += at.block.thread_rows;
      }
      if (plan.along && done + r > 0) {
        position += step;
        left -= step;
        changed = changed || left < kSize;
      }
      if (changed) load_coefficients(group);
      Real y[kSize];
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        Real values[Op::kInputs], factors[Op::kCoefficients];
#pragma unroll
        for (int i = 0; i < Op::kInputs; ++i) values[i] = x[i][r][k];
#pragma unroll
        for (int i = 0; i < Op::kCoefficients; ++i) factors[i] = coefficients[i][k];
        y[k] = Op::formula(values, factors);
      }
      Vec<T, kSize>::from(y).store(op.output + offset + r * step);
    }
  }
}

// Op<T, size> is made from inputs, output and coefficients, all given as arrays or pointers of T and Compute<T>. Of the
// coefficients some may be absent.
template <template <class, int> class Op, class Inputs, class Coefficients>
void launch_map(const Mapping& to, const Groups& groups, const Inputs& inputs, const Coefficients& coefficients_of) {
  const OnDeviceOf where(to.input);
  const View view = simplified(to.view, groups.ids != nullptr);
  if (view.values() == 0) return;
  dispatch(to.input, [&](auto type) {
    using T = decltype(type);
    const auto launch = [&](auto size, const MapPlan& plan) {
      Op<T, size> op{};
      for (int i = 0; i < op.kInputs; ++i) op.inputs[i] = data<T>(inputs[i]);
      std::optional<Tensor> kept[Op<T, size>::kCoefficients];  // until the launch
      for (int i = 0; i < op.kCoefficients; ++i) {
        if (!coefficients_of[i]) continue;  // null: all 0
        kept[i] = per_group<Compute<T>>(*coefficients_of[i], to.input);
        STD_TORCH_CHECK(kept[i]->size(0) == groups.count, "precisebn: coefficients must have a row per group");
        op.coefficients[i] = data<Compute<T>>(*kept[i]);
      }
      op.output = mutable_data<T>(to.output);
      STD_TORCH_CHECK(plan.blocks() < (int64_t{1} << 31), "precisebn: the tensor is too large");
      map<<<static_cast<unsigned>(plan.blocks()), plan.geometry.block.threads, 0, where.stream>>>(
          op, plan, groups, view.planes ? view.length : 1);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    };
    bool vectors = aligned(to.output.const_data_ptr());
    for (const Tensor& input : inputs) vectors = vectors && aligned(input.const_data_ptr());
    const MapPlan plan = plan_map(view, vectors ? kVector<T> : 1, Op<T, kVector<T>>::kRows, where.multiprocessors);
    if (plan.geometry.vector == 1) {
      launch(std::integral_constant<int, 1>{}, plan);
    } else {
      launch(std::integral_constant<int, kVector<T>>{}, plan);
    }
  });
}

}  // namespace precisebn::cuda
