// How sums over rows of channels (NHWC) are made: channels are lanes, so nothing is summed across lanes. Rows are read
// four at a time from end to end, as memory likes it: a column of a few vectors down many rows would touch a page, and
// with 1024 channels the same few lines of the first cache, at every row. The sums of all channels wait in that cache
// from one four to the next; a vector of channels and its sums are a column.
#pragma once

#include "vec.h"

namespace precisebn::cpu::PRECISEBN_ISA {
namespace {

constexpr int kTogether = 4;

// Wider rows are taken in several runs of so many channels: their sums are held in the first cache, beside the rows.
constexpr int64_t kRun = 1024;
template <class T>
constexpr int64_t kColumns = kRun / kLanes<typename Compute<T>::Vec>;

// The sum of f(first), ..., f(first + kCount - 1): pairs are added first, then pairs of pairs.
template <int kCount, class F>
PRECISEBN_INLINE auto in_pairs(const F& f, int first = 0) {
  if constexpr (kCount == 1) {
    return f(first);
  } else {
    return in_pairs<kCount / 2>(f, first) + in_pairs<kCount - kCount / 2>(f, first + kCount / 2);
  }
}

// Calls add.template operator()<kRows>(first) for all rows, kTogether at a time and those left over one by one.
template <class Add>
PRECISEBN_INLINE void for_each_four(int64_t rows, const Add& add) {
  int64_t r = 0;
  for (; r + kTogether <= rows; r += kTogether) add.template operator()<kTogether>(r);
  for (; r < rows; ++r) add.template operator()<1>(r);
}

// Calls add.template operator()<kPartial>(column, n) for all columns, n channels each. In between, fetch(row, byte) is
// called for every line of kRows rows, one row after the other: memory is faster so than in the order of the columns.
template <class T, int kRows, class Fetch, class Add>
PRECISEBN_INLINE void for_each_column(int64_t channels, const Fetch& fetch, const Add& add) {
  constexpr int kL = kLanes<typename Compute<T>::Vec>, kFetched = kRows * kL * static_cast<int>(sizeof(T));
  const int64_t whole = channels / kL;
  int64_t k = 0;
  for (int row = 0; row < kRows; ++row) {
    int64_t byte = 0;
    for (const int64_t end = whole * (row + 1) / kRows; k < end; ++k, byte += kFetched) {
      for (int line = 0; line < kFetched; line += 64) fetch(row, byte + line);
      add.template operator()<false>(k, kL);
    }
  }
  const int rest = static_cast<int>(channels - whole * kL);
  if (rest) add.template operator()<true>(whole, rest);
}

// A column's numbers in float64.
PRECISEBN_INLINE void load_accumulator(const double* p, WideVec& v) {
  memcpy(&v.lo, p, sizeof v.lo);
  memcpy(&v.hi, p + kLanes<VecD>, sizeof v.hi);
}
PRECISEBN_INLINE void load_accumulator(const double* p, VecD& v) { memcpy(&v, p, sizeof v); }
PRECISEBN_INLINE void store_accumulator(double* p, WideVec v) {
  memcpy(p, &v.lo, sizeof v.lo);
  memcpy(p + kLanes<VecD>, &v.hi, sizeof v.hi);
}
PRECISEBN_INLINE void store_accumulator(double* p, VecD v) { memcpy(p, &v, sizeof v); }

// How many elements further on, in rows of so many channels that begin `stride` apart, is what a line is fetched for
// while this one is read: 8 KiB, or the next four rows.
template <class T>
PRECISEBN_INLINE int64_t ahead_in_rows(int64_t stride, int64_t channels) {
  const int64_t rows = 8192 / (channels * static_cast<int64_t>(sizeof(T))) + kTogether;
  return rows / kTogether * kTogether * stride;
}

}  // namespace
}  // namespace precisebn::cpu::PRECISEBN_ISA
