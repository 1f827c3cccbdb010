// Moments of contiguous planes (NCHW) and of rows of channels (NHWC), at the speed of memory.
//
// Exact one-pass formulas carry a serial dependency (Welford) or cancel (E[x^2] - E[x]^2). So the data is taken in
// blocks that fit in cache, and each block is read twice: for its mean, then for the sums of d = x - mean and of d * d.
// The second reading costs no memory traffic, and while it runs the block that follows is prefetched, so memory never
// rests. Lanes are float32: with the mean taken off, d is small and exact where it matters. sum(d) would be 0 in exact
// arithmetic; that it is not corrects both mean and m2 for the rounding of the block's mean, so that the first reading
// may add up in long chains. Blocks merge in float64 by Chan's formula.
//
// The second may not: m2 is right to 1e-6 for all data, also where most values are equal and their squares all round
// the same way. A rounding is at most 2^-24 of the result, and d * d has three of them, as d has one. So no square
// passes through more than 13 float32 additions (kLinks): 16 * 2^-24 < 1e-6. Beyond, all sums are float64.
//
// float32 lanes fail where d * d overflows or underflows (|d| beyond about 1e18 or below 1e-18); the sum of squares
// shows it, and such a block is then done again with float64 lanes. A constant channel lands there too: its sum is 0.
#include "moments.h"
#include "../../moments.h"
#include "vec.h"

namespace precisebn::cpu::PRECISEBN_ISA {
namespace {

constexpr int kUnroll = 4;
constexpr int kLinks = 13;

// Adds four deviations as one link of the chain of sums. A square then goes through four additions at most.
template <class V>
PRECISEBN_INLINE void add_four(V d0, V d1, V d2, V d3, V& sum, V& squares) {
  sum += (d0 + d1) + (d2 + d3);
  V of_four = d0 * d0;
  of_four += d1 * d1;
  of_four += d2 * d2;
  of_four += d3 * d3;
  squares += of_four;
}

// The values of a plane that are held in L1 together with the same amount of what follows.
template <class T>
constexpr int64_t kBlock = 8192 / sizeof(typename Compute<T>::Scalar);

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
  static constexpr int kSteps = 32;  // from one flush to the next
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
  static constexpr int kSteps = kLinks - 2;  // flush() adds two more
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
    const int64_t full = (n - i) / kStep, steps = full < Reduction::kSteps ? full : Reduction::kSteps;
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

// Planes of fewer values are taken four at a time: alone they are too short to hide the latency of their own sums. The
// four also keep the four chains of additions apart. Vectors are added by fours; the links beside theirs are three
// among the four, one to add what is left over, and those that join the lanes.
constexpr int kLinksOfLanes = kBytes == 64 ? 4 : kBytes == 32 ? 3 : 2;
template <class T>
constexpr int64_t kShort = 4 * (kLinks - 4 - kLinksOfLanes + 1) * kLanes<typename Compute<T>::Vec>;
// Several groups of them fit into the time that memory takes.
constexpr int kShortAhead = 8192;

// Planes of 3 to 4 vectors (7 x 7 in float32 lanes of AVX-512) stay in registers between the two readings.
#if defined(__AVX512F__)
constexpr int kHeld = 4;
#else
constexpr int kHeld = 0;
#endif

template <class T, bool kHold>
PRECISEBN_INLINE void four_planes(const T* const (&p)[4], int64_t length, MergeWeights weights, double* mean,
                                  double* m2) {
  using V = typename Compute<T>::Vec;
  using Four = typename FourOf<V>::type;
  constexpr int kL = kLanes<V>;
  const double count = static_cast<double>(length);
  const int rest = static_cast<int>(kHold ? length - (kHeld - 1) * kL : length % kL);
  const int64_t whole = length - rest;

  V held[4][kHeld + 1];
  V sum[4] = {}, squares[4] = {}, center[4];
  for (int64_t i = 0; i < (kHold ? (kHeld - 1) * kL : whole); i += kL) {
    for (int k = 0; k < 4; ++k) {
      __builtin_prefetch(reinterpret_cast<const char*>(p[k] + i) + kShortAhead);
      const V x = load(p[k] + i);
      if constexpr (kHold) held[k][i / kL] = x;
      sum[k] += x;
    }
  }
  if (rest) {
    for (int k = 0; k < 4; ++k) {
      const V x = load_first(p[k] + whole, rest);
      if constexpr (kHold) held[k][kHeld - 1] = x;
      sum[k] += x;
    }
  }
  const Four shift = sums_of_lanes(sum) * static_cast<typename Compute<T>::Scalar>(1 / count);
  for (int k = 0; k < 4; ++k) {
    center[k] = broadcast<V>(shift[k]);
    sum[k] = V{};
  }
  int64_t i = 0;
  if constexpr (!kHold) {
    for (; i + 4 * kL <= whole; i += 4 * kL) {
      for (int k = 0; k < 4; ++k) {
        add_four(load(p[k] + i) - center[k], load(p[k] + i + kL) - center[k], load(p[k] + i + 2 * kL) - center[k],
                 load(p[k] + i + 3 * kL) - center[k], sum[k], squares[k]);
      }
    }
  }
  V last_squares[4] = {};
  for (; i < (kHold ? (kHeld - 1) * kL : whole); i += kL) {
    for (int k = 0; k < 4; ++k) {
      const V d = (kHold ? held[k][i / kL] : load(p[k] + i)) - center[k];
      sum[k] += d;
      last_squares[k] += d * d;
    }
  }
  if (rest) {
    for (int k = 0; k < 4; ++k) {
      const V d = first_lanes((kHold ? held[k][kHeld - 1] : load_first(p[k] + whole, rest)) - center[k], rest);
      sum[k] += d;
      last_squares[k] += d * d;
    }
  }
  for (int k = 0; k < 4; ++k) squares[k] += last_squares[k];
  const FourD residual = __builtin_convertvector(sums_of_lanes(sum), FourD);
  const FourD total = __builtin_convertvector(sums_of_lanes(squares), FourD);
  const FourD correction = residual / count;
  FourD part_mean = __builtin_convertvector(shift, FourD) + correction, part_m2 = total - residual * correction;
  for (int k = 0; k < 4; ++k) {
    if (__builtin_expect(!lanes_suffice<T>(total[k], count), 0)) {
      const Moments part = block_in_float64(p[k], length);
      part_mean[k] = part.mean, part_m2[k] = part.m2;
    }
  }
  part_m2 = part_m2 < 0 ? 0 - FourD{} : part_m2;

  FourD total_mean, total_m2;
  memcpy(&total_mean, mean, sizeof total_mean);
  memcpy(&total_m2, m2, sizeof total_m2);
  const FourD delta = part_mean - total_mean;
  total_mean += delta * weights.mean;
  total_m2 += part_m2 + delta * weights.m2 * delta;
  memcpy(mean, &total_mean, sizeof total_mean);
  memcpy(m2, &total_m2, sizeof total_m2);
}

template <class T, bool kHold>
PRECISEBN_INLINE void short_planes(const T* p, int64_t stride, int64_t channels, int64_t length, MergeWeights weights,
                                   double* mean, double* m2) {
  int64_t c = 0;
  for (; c + 4 <= channels; c += 4, p += 4 * stride) {
    four_planes<T, kHold>({p, p + stride, p + 2 * stride, p + 3 * stride}, length, weights, mean + c, m2 + c);
  }
  if (c == channels) return;
  // The first plane left stands in for those that are missing: a channel's bits must not depend on how many channels
  // the task was given.
  const int left = static_cast<int>(channels - c);
  double last_mean[4] = {}, last_m2[4] = {};
  memcpy(last_mean, mean + c, left * sizeof(double));
  memcpy(last_m2, m2 + c, left * sizeof(double));
  four_planes<T, kHold>({p, left > 1 ? p + stride : p, left > 2 ? p + 2 * stride : p, p}, length, weights, last_mean,
                        last_m2);
  memcpy(mean + c, last_mean, left * sizeof(double));
  memcpy(m2 + c, last_m2, left * sizeof(double));
}

template <class T>
void planes(const void* x, int64_t stride, int64_t channels, int64_t length, double before, double* mean, double* m2) {
  const MergeWeights weights(before, static_cast<double>(length));
  const T* p = static_cast<const T*>(x);
  if (length >= kShort<T>) {
    for (int64_t c = 0; c < channels; ++c, p += stride) {
      const Moments part = plane(p, length);
      merge(mean[c], m2[c], part.mean, part.m2, weights);
    }
    return;
  }
  constexpr int kL = kLanes<typename Compute<T>::Vec>;
  if (kHeld && length > (kHeld - 1) * kL && length <= kHeld * kL) {
    short_planes<T, kHeld != 0>(p, stride, channels, length, weights, mean, m2);
  } else {
    short_planes<T, false>(p, stride, channels, length, weights, mean, m2);
  }
}

// ---- Rows ----
// Channels are lanes, so nothing is summed across lanes. A block is up to 32 rows of a few vectors of channels, read
// down the columns with all sums in registers, and merged into the accumulators on the spot.

constexpr int kColumns = 4;
constexpr int kBlockRows = 32;
static_assert(kBlockRows / 4 + 4 <= kLinks);  // three among four rows, and one to add the rows left over

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
  const auto deviation = [&](int64_t r) {
    return (kPartial ? load_first_as<V>(p + r * stride, n) : load_as<V>(p + r * stride)) - shift;
  };
  sum = squares = V{};
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    add_four(deviation(r), deviation(r + 1), deviation(r + 2), deviation(r + 3), sum, squares);
  }
  V last_squares = {};
  for (; r < rows; ++r) {
    const V d = deviation(r);
    sum += d;
    last_squares += d * d;
  }
  squares += last_squares;
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
  const W residual = rows == kBlockRows ? wide_sum * broadcast<W>(1.0 / kBlockRows)
                                        : wide_sum / broadcast<W>(static_cast<double>(rows));
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

// Prefetches one half of what lies `ahead` elements past the kWidth vectors at p.
template <class T, int kWidth>
PRECISEBN_INLINE void prefetch_half(const T* p, int64_t ahead, int half) {
  constexpr int kRowBytes = kWidth * kLanes<typename Compute<T>::Vec> * static_cast<int>(sizeof(T));
  const char* line = reinterpret_cast<const char*>(p + ahead) + half * kRowBytes / 2;
  if (kRowBytes < 128 && half) return;
  for (int byte = 0; byte < (kRowBytes < 128 ? kRowBytes : kRowBytes / 2); byte += 64) __builtin_prefetch(line + byte);
}

template <class T, int kWidth>
PRECISEBN_INLINE void block_of_rows(const T* p, int64_t stride, int64_t rows, MergeWeights weights, double* mean,
                                    double* m2, int64_t ahead) {
  using V = typename Compute<T>::Vec;
  constexpr int kL = kLanes<V>;
  V shift[kWidth] = {}, sum[kWidth] = {}, squares[kWidth] = {};
  const T* row = p;
  for (int64_t r = 0; r < rows; ++r, row += stride) {
    prefetch_half<T, kWidth>(row, ahead, 0);
    for (int k = 0; k < kWidth; ++k) shift[k] += load(row + k * kL);
  }
  const V inverse = broadcast<V>(static_cast<typename Compute<T>::Scalar>(1.0 / static_cast<double>(rows)));
  for (int k = 0; k < kWidth; ++k) shift[k] *= inverse;
  row = p;
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4, row += 4 * stride) {
    for (int i = 0; i < 4; ++i) prefetch_half<T, kWidth>(row + i * stride, ahead, 1);
    for (int k = 0; k < kWidth; ++k) {
      const T* const at = row + k * kL;
      add_four(load(at) - shift[k], load(at + stride) - shift[k], load(at + 2 * stride) - shift[k],
               load(at + 3 * stride) - shift[k], sum[k], squares[k]);
    }
  }
  V last_squares[kWidth] = {};
  for (; r < rows; ++r, row += stride) {
    prefetch_half<T, kWidth>(row, ahead, 1);
    for (int k = 0; k < kWidth; ++k) {
      const V d = load(row + k * kL) - shift[k];
      sum[k] += d;
      last_squares[k] += d * d;
    }
  }
  for (int k = 0; k < kWidth; ++k) squares[k] += last_squares[k];
  for (int k = 0; k < kWidth; ++k) {
    const int c = k * kL;
    merge_column(p + c, stride, rows, kL, shift[k], sum[k], squares[k], weights, mean + c, m2 + c);
  }
}

// The last channels, fewer than a vector.
template <class T>
PRECISEBN_INLINE void block_of_partial_rows(const T* p, int64_t stride, int64_t rows, int n, MergeWeights weights,
                                            double* mean, double* m2) {
  using V = typename Compute<T>::Vec;
  V shift, sum, squares;
  column<V, T, true>(p, stride, rows, n, V{}, shift, squares);
  shift *= broadcast<V>(static_cast<typename Compute<T>::Scalar>(1.0 / static_cast<double>(rows)));
  column<V, T, true>(p, stride, rows, n, shift, sum, squares);
  merge_column(p, stride, rows, n, shift, sum, squares, weights, mean, m2);
}

template <class T>
void rows(const void* x, int64_t stride, int64_t channels, int64_t rows, double before, double* mean, double* m2) {
  constexpr int kL = kLanes<typename Compute<T>::Vec>;
  const T* p = static_cast<const T*>(x);
  for (int64_t r = 0; r < rows; r += kBlockRows, p += kBlockRows * stride) {
    const int64_t height = rows - r < kBlockRows ? rows - r : kBlockRows;
    const MergeWeights weights(before + static_cast<double>(r), static_cast<double>(height));
    // What follows a column in these rows, and behind the last, the first of the next rows.
    const auto ahead = [&](int64_t c, int width) { return c + width < channels ? width : height * stride - c; };
    int64_t c = 0;
    for (; c + kColumns * kL <= channels; c += kColumns * kL) {
      block_of_rows<T, kColumns>(p + c, stride, height, weights, mean + c, m2 + c, ahead(c, kColumns * kL));
    }
    for (; c + kL <= channels; c += kL) {
      block_of_rows<T, 1>(p + c, stride, height, weights, mean + c, m2 + c, ahead(c, kL));
    }
    if (c < channels) {
      block_of_partial_rows(p + c, stride, height, static_cast<int>(channels - c), weights, mean + c, m2 + c);
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

}  // namespace precisebn::cpu::PRECISEBN_ISA
