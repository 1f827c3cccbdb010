// Moments of contiguous planes (NCHW) and of rows of channels (NHWC), at the speed of memory.
//
// Exact one-pass formulas carry a serial dependency (Welford) or cancel (E[x^2] - E[x]^2). So the data is taken in
// blocks that fit in cache, and each block is read twice: for its mean, then for the sums of d = x - mean and of d * d.
// The second reading costs no memory traffic, and while it runs the block that follows is prefetched, so memory never
// rests. Lanes are float32: with the mean taken off, d is small and exact where it matters, chains of additions are at
// most 32 long, and beyond them all sums are float64. sum(d) would be 0 in exact arithmetic; that it is not corrects
// both mean and m2 to first order for the rounding of the block's mean. Blocks merge in float64 by Chan's formula.
//
// float32 lanes fail where d * d overflows or underflows (|d| beyond about 1e18 or below 1e-18); the sum of squares
// shows it, and such a block is then done again with float64 lanes. A constant channel lands there too: its sum is 0.
#include "moments_kernel.h"
#include "../moments.h"
#include "vec.h"

#ifndef PB_BLK
#define PB_BLK 1
#endif
#ifndef PB_TILE
#define PB_TILE 1024
#endif
#ifndef PB_HINT
#define PB_HINT 2
#endif

namespace precisebn::PRECISEBN_ISA {
namespace {

constexpr int kUnroll = 4;
constexpr int kChain = 32;

// The values of a plane that are held in L1 together with the same amount of what follows.
template <class T>
constexpr int64_t kBlock = 8192 / sizeof(typename Compute<T>::Scalar) * PB_BLK;

// Sums of squares in this range have lost nothing to under- or overflow. NaN is not in it.
template <class T>
PRECISEBN_INLINE bool lanes_suffice(double sum_of_squares, double count) {
  if constexpr (sizeof(typename Compute<T>::Scalar) == 8) {
    return true;
  } else {
    return sum_of_squares >= count * 0x1p-120 && sum_of_squares <= 0x1p127;
  }
}

template <class V, class T>
PRECISEBN_INLINE V load_as(const T* p) {
  if constexpr (sizeof(V) == sizeof(WideVec)) {
    return widen(load(p));
  } else {
    return load(p);
  }
}
template <class V, class T>
PRECISEBN_INLINE V load_first_as(const T* p, int n) {
  if constexpr (sizeof(V) == sizeof(WideVec)) {
    return widen(load_first(p, n));
  } else {
    return load_first(p, n);
  }
}

// ---- Planes ----

template <class V>
struct Sum {
  using Wide = decltype(widen(V{}));
  V lanes[kUnroll] = {};
  Wide total = {};

  PRECISEBN_INLINE void add(int chain, V x) { lanes[chain] += x; }
  PRECISEBN_INLINE void add_first(int chain, V x, int) { lanes[chain] += x; }
  PRECISEBN_INLINE void flush() {
    total += widen((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]));
    for (V& lane : lanes) lane = V{};
  }
};

template <class V>
struct Deviations {
  using Wide = decltype(widen(V{}));
  V mean;
  V lanes[kUnroll] = {}, squares[kUnroll] = {};
  Wide total = {}, total_squares = {};

  PRECISEBN_INLINE void add(int chain, V x) {
    const V d = x - mean;
    lanes[chain] += d;
    squares[chain] += d * d;
  }
  PRECISEBN_INLINE void add_first(int chain, V x, int n) {
    const V d = first_lanes(x - mean, n);
    lanes[chain] += d;
    squares[chain] += d * d;
  }
  PRECISEBN_INLINE void flush() {
    total += widen((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]));
    total_squares += widen((squares[0] + squares[1]) + (squares[2] + squares[3]));
    for (V& lane : lanes) lane = V{};
    for (V& lane : squares) lane = V{};
  }
};

// Feeds p[0 .. n) to a Sum or Deviations and prefetches half as many bytes from `ahead`: the two readings of a block
// fetch the two halves of the next.
template <class V, class T, class Reduction>
PRECISEBN_INLINE void reduce(const T* p, int64_t n, const char* ahead, Reduction& into) {
  constexpr int kStep = kUnroll * kLanes<V>;
  constexpr int kAhead = kStep * sizeof(T) / 2;
  int64_t i = 0;
  while (i + kStep <= n) {
    const int64_t full = (n - i) / kStep, steps = full < kChain ? full : kChain;
    for (int64_t step = 0; step < steps; ++step, i += kStep, ahead += kAhead) {
      for (int line = 0; line < kAhead; line += 64) __builtin_prefetch(ahead + line);
      for (int chain = 0; chain < kUnroll; ++chain) into.add(chain, load_as<V>(p + i + chain * kLanes<V>));
    }
    into.flush();
  }
  for (; i + kLanes<V> <= n; i += kLanes<V>) into.add(0, load_as<V>(p + i));
  if (i < n) into.add_first(1, load_first_as<V>(p + i, static_cast<int>(n - i)), static_cast<int>(n - i));
  into.flush();
}

template <class V, class T>
PRECISEBN_INLINE Moments two_readings(const T* p, int64_t n, bool& exact) {
  using Scalar = typename Compute<T>::Scalar;
  const char* ahead = reinterpret_cast<const char*>(p + n);
  const double count = static_cast<double>(n);

  Sum<V> sum;
  reduce<V>(p, n, ahead, sum);
  const double mean = static_cast<Scalar>(sum_of_lanes(sum.total) / count);

  Deviations<V> deviations{broadcast<V>(static_cast<Scalar>(mean))};
  reduce<V>(p, n, ahead + n * sizeof(T) / 2, deviations);
  const double residual = sum_of_lanes(deviations.total), squares = sum_of_lanes(deviations.total_squares);
  exact = lanes_suffice<T>(squares, count);
  const double m2 = squares - residual * (residual / count);
  return {mean + residual / count, m2 < 0 ? 0 : m2};
}

template <class T>
__attribute__((noinline)) Moments block_in_float64(const T* p, int64_t n) {
  bool exact;
  return two_readings<typename Compute<T>::Wide>(p, n, exact);
}

template <class T>
PRECISEBN_INLINE Moments block(const T* p, int64_t n) {
  bool exact;
  const Moments result = two_readings<typename Compute<T>::Vec>(p, n, exact);
  return exact ? result : block_in_float64(p, n);
}

template <class T>
PRECISEBN_INLINE Moments plane(const T* p, int64_t length) {
  if (length <= kBlock<T>) return block(p, length);
  const int64_t blocks = (length + kBlock<T> - 1) / kBlock<T>;
  Moments total{0, 0};
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t begin = length * i / blocks, end = length * (i + 1) / blocks;
    const Moments part = block(p + begin, end - begin);
    merge(total.mean, total.m2, part.mean, part.m2, {static_cast<double>(begin), static_cast<double>(end - begin)});
  }
  return total;
}

template <class T>
void planes(const void* x, int64_t stride, int64_t channels, int64_t length, double before, double* mean, double* m2) {
  const MergeWeights weights(before, static_cast<double>(length));
  const T* p = static_cast<const T*>(x);
  for (int64_t c = 0; c < channels; ++c, p += stride) {
    const Moments part = plane(p, length);
    merge(mean[c], m2[c], part.mean, part.m2, weights);
  }
}

// ---- Rows ----
// Channels are lanes, so nothing is summed across lanes. A block is up to 32 rows of up to kTile channels. The first
// reading goes along the rows, as memory does, with the sums in L1; the second goes down the columns, with all sums in
// registers, and merges them into the accumulators on the spot.

constexpr int64_t kTile = PB_TILE;

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

PRECISEBN_INLINE VecD not_negative(VecD v) { return (VecD)((VecI64)v & ~(v < VecD{})); }
PRECISEBN_INLINE WideVec not_negative(WideVec v) { return {not_negative(v.lo), not_negative(v.hi)}; }

// One vector of channels, `rows` values each, down a column, in the arithmetic of V.
template <class V, class T, bool kPartial>
PRECISEBN_INLINE void column(const T* p, int64_t stride, int64_t rows, int n, V shift, V& sum, V& squares) {
  sum = squares = V{};
  for (int64_t r = 0; r < rows; ++r) {
    const V d = (kPartial ? load_first_as<V>(p + r * stride, n) : load_as<V>(p + r * stride)) - shift;
    sum += d;
    squares += d * d;
  }
}

// All bits set in the lanes of `squares`, among the first n, that need float64; whether there are any.
PRECISEBN_INLINE bool lanes_that_fail(VecF squares, int n, double count, VecI32& failing) {
  const VecF low = VecF{} + static_cast<float>(count * 0x1p-120), high = VecF{} + 0x1p127f;
  failing = (VecI32)first_lanes((VecF) ~((squares >= low) & (squares <= high)), n);
  int64_t words[kBytes / 8], any = 0;
  memcpy(words, &failing, sizeof words);
  for (int64_t word : words) any |= word;
  return any != 0;
}
PRECISEBN_INLINE bool lanes_that_fail(VecD, int, double, VecI32&) { return false; }

// Replaces the sums of the failing lanes, and of no other: what one channel holds never touches the bits of another.
template <class T>
__attribute__((noinline)) void column_in_float64(const T* p, int64_t stride, int64_t rows, int n, VecI32 failing,
                                                 WideVec& shift, WideVec& sum, WideVec& squares) {
  WideVec exact_sum, exact_squares, ignored;
  column<WideVec, T, true>(p, stride, rows, n, WideVec{}, exact_sum, ignored);
  const WideVec exact_shift = exact_sum * broadcast<WideVec>(1.0 / static_cast<double>(rows));
  column<WideVec, T, true>(p, stride, rows, n, exact_shift, exact_sum, exact_squares);
  for (int i = 0; i < kLanes<VecD>; ++i) {
    if (failing[i]) shift.lo[i] = exact_shift.lo[i], sum.lo[i] = exact_sum.lo[i], squares.lo[i] = exact_squares.lo[i];
    if (failing[i + kLanes<VecD>]) {
      shift.hi[i] = exact_shift.hi[i], sum.hi[i] = exact_sum.hi[i], squares.hi[i] = exact_squares.hi[i];
    }
  }
}
template <class T>
PRECISEBN_INLINE void column_in_float64(const T*, int64_t, int64_t, int, VecI32, VecD&, VecD&, VecD&) {}

template <class T>
PRECISEBN_INLINE void merge_column(const T* p, int64_t stride, int64_t rows, int n, typename Compute<T>::Vec shift,
                                   typename Compute<T>::Vec sum, typename Compute<T>::Vec squares, MergeWeights weights,
                                   double* mean, double* m2) {
  using W = typename Compute<T>::Wide;
  W wide_shift = widen(shift), wide_sum = widen(sum), wide_squares = widen(squares);
  VecI32 failing;
  if (__builtin_expect(lanes_that_fail(squares, n, static_cast<double>(rows), failing), 0)) {
    column_in_float64(p, stride, rows, n, failing, wide_shift, wide_sum, wide_squares);
  }
  // Divide where the reciprocal is not exact: m2 of a constant channel is then exactly 0.
  const W residual =
      rows == kChain ? wide_sum * broadcast<W>(1.0 / kChain) : wide_sum / broadcast<W>(static_cast<double>(rows));
  const W part_mean = wide_shift + residual, part_m2 = not_negative(wide_squares - wide_sum * residual);

  double buffer[2][kLanes<typename Compute<T>::Vec>];
  const bool partial = n < kLanes<typename Compute<T>::Vec>;
  double *to_mean = mean, *to_m2 = m2;
  if (partial) {
    for (int i = 0; i < n; ++i) buffer[0][i] = mean[i], buffer[1][i] = m2[i];
    to_mean = buffer[0], to_m2 = buffer[1];
  }
  W total_mean, total_m2;
  load_accumulator(to_mean, total_mean);
  load_accumulator(to_m2, total_m2);
  const W delta = part_mean - total_mean;
  store_accumulator(to_mean, total_mean + delta * broadcast<W>(weights.mean));
  store_accumulator(to_m2, total_m2 + (part_m2 + delta * broadcast<W>(weights.m2) * delta));
  if (partial) {
    for (int i = 0; i < n; ++i) mean[i] = buffer[0][i], m2[i] = buffer[1][i];
  }
}

// sums[c] += the column sums of `rows` rows; `ahead` bytes further on lies what is needed next.
template <class T>
PRECISEBN_INLINE void add_rows(const T* p, int64_t stride, int64_t rows, int64_t channels,
                               typename Compute<T>::Scalar* sums, int64_t ahead) {
  using V = typename Compute<T>::Vec;
  constexpr int kL = kLanes<V>;
  const int64_t whole = channels / kL * kL;
  const int tail = static_cast<int>(channels - whole);
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4, p += 4 * stride) {
    for (int64_t c = 0; c < whole; c += kL) {
      if (c * sizeof(T) % 64 == 0) {
        for (int row = 0; row < 4; ++row)
          __builtin_prefetch(reinterpret_cast<const char*>(p + row * stride + c) + ahead, 0, PB_HINT);
      }
      store(sums + c, load(sums + c) + ((load(p + c) + load(p + stride + c)) +
                                        (load(p + 2 * stride + c) + load(p + 3 * stride + c))));
    }
    if (tail) {
      V v = load(sums + whole);
      for (int row = 0; row < 4; ++row) v += load_first(p + row * stride + whole, tail);
      store(sums + whole, v);
    }
  }
  for (; r < rows; ++r, p += stride) {
    for (int64_t c = 0; c < whole; c += kL) store(sums + c, load(sums + c) + load(p + c));
    if (tail) store(sums + whole, load(sums + whole) + load_first(p + whole, tail));
  }
}

template <class T>
PRECISEBN_INLINE void block_of_rows(const T* p, int64_t stride, int64_t channels, int64_t rows, MergeWeights weights,
                                    double* mean, double* m2, int64_t ahead) {
  using V = typename Compute<T>::Vec;
  using Scalar = typename Compute<T>::Scalar;
  constexpr int kL = kLanes<V>;
  alignas(64) Scalar sums[kTile + kL];
  memset(sums, 0, (channels + kL) * sizeof(Scalar));
  add_rows(p, stride, rows, channels, sums, ahead);

  const V inverse = broadcast<V>(static_cast<Scalar>(1.0 / static_cast<double>(rows)));
  int64_t c = 0;
  for (; c + 2 * kL <= channels; c += 2 * kL) {
    const V shift0 = load(sums + c) * inverse, shift1 = load(sums + c + kL) * inverse;
    V sum0{}, sum1{}, squares0{}, squares1{};
    const T* q = p + c;
    for (int64_t r = 0; r < rows; ++r, q += stride) {
      const V d0 = load(q) - shift0, d1 = load(q + kL) - shift1;
      sum0 += d0;
      sum1 += d1;
      squares0 += d0 * d0;
      squares1 += d1 * d1;
    }
    merge_column(p + c, stride, rows, kL, shift0, sum0, squares0, weights, mean + c, m2 + c);
    merge_column(p + c + kL, stride, rows, kL, shift1, sum1, squares1, weights, mean + c + kL, m2 + c + kL);
  }
  for (; c < channels; c += kL) {
    const int n = channels - c < kL ? static_cast<int>(channels - c) : kL;
    const V shift = load(sums + c) * inverse;
    V sum, squares;
    if (n == kL) {
      column<V, T, false>(p + c, stride, rows, n, shift, sum, squares);
    } else {
      column<V, T, true>(p + c, stride, rows, n, shift, sum, squares);
    }
    merge_column(p + c, stride, rows, n, shift, sum, squares, weights, mean + c, m2 + c);
  }
}

template <class T>
void rows(const void* x, int64_t stride, int64_t channels, int64_t rows, double before, double* mean, double* m2) {
  const T* p = static_cast<const T*>(x);
  for (int64_t r = 0; r < rows; r += kChain) {
    const int64_t height = rows - r < kChain ? rows - r : kChain;
    const MergeWeights weights(before + static_cast<double>(r), static_cast<double>(height));
    const int64_t tiles = (channels + kTile - 1) / kTile;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t c = tile * kTile, width = channels - c < kTile ? channels - c : kTile;
      // After the last tile of these rows comes the first of the next rows.
      const int64_t ahead = tiles == 1 ? height * stride : tile + 1 < tiles ? width : height * stride - c;
      block_of_rows(p + r * stride + c, stride, width, height, weights, mean + c, m2 + c,
                    ahead * static_cast<int64_t>(sizeof(T)));
    }
  }
}

}  // namespace

const MomentsKernels moments_kernels[kNumDtypes] = {
    {planes<float>, rows<float>},
    {planes<double>, rows<double>},
    {planes<Half>, rows<Half>},
    {planes<BFloat16>, rows<BFloat16>},
};

}  // namespace precisebn::PRECISEBN_ISA
