// Moments of contiguous planes (NCHW) and of rows of channels (NHWC), at the speed of memory.
//
// Exact one-pass formulas carry a serial dependency (Welford) or cancel (E[x^2] - E[x]^2). So the data is taken in
// blocks that fit in cache, and each block is read twice: for its mean, then for the sums of d = x - mean and of d * d.
// The second reading costs no memory traffic, and while it runs the block that follows is prefetched, so memory never
// rests. (Rows of channels and planes do without the first once enough of the same channel has come before; see Rows.)
// Lanes are float32: with the mean taken off, d is small and exact where it matters. sum(d) would be 0 in exact
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
#include "columns.h"
#include "vec.h"

namespace precisebn::cpu::PRECISEBN_ISA {
namespace {

constexpr int kUnroll = 4;
constexpr int kLinks = 13;
// How many bytes further on is what is fetched, where the data is read once.
constexpr int kAheadInPlanes = 16384;

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

// Of all four.
template <class T>
PRECISEBN_INLINE bool lanes_suffice(FourD sums_of_squares, double count) {
#if defined(__AVX2__)
  if constexpr (sizeof(typename Compute<T>::Scalar) == 8) return true;
  const auto sound = (sums_of_squares >= FourD{} + count * 0x1p-120) & (sums_of_squares <= FourD{} + 0x1p127);
  return _mm256_movemask_pd((__m256d)sound) == 0xf;
#else
  bool all = true;
  for (int k = 0; k < 4; ++k) all = all && lanes_suffice<T>(sums_of_squares[k], count);
  return all;
#endif
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

template <class V, int kLinksOfChain>
struct Deviations {
  using Wide = decltype(widen(V{}));
  static constexpr int kSteps = kLinksOfChain - 2;  // flush() adds two more
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

// Feeds p[0 .. n) to a Sum or Deviations and prefetches from `ahead` as many bytes, or half as many where there are two
// readings: they fetch the two halves of the next block.
template <int kReadings, class V, class T, class Reduction>
PRECISEBN_INLINE void reduce(const T* p, int64_t n, const char* ahead, Reduction& into) {
  constexpr int kStep = kUnroll * kLanes<V>;
  constexpr int kAhead = kStep * sizeof(T) / kReadings;
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

template <class T, class V, int kLinksOfChain>
PRECISEBN_INLINE Moments moments_of(const Deviations<V, kLinksOfChain>& deviations, double center, double count,
                                    bool& exact) {
  const double residual = sum_of_lanes(deviations.total), squares = sum_of_lanes(deviations.total_squares);
  exact = lanes_suffice<T>(squares, count);
  return {center + residual / count, squares - residual * (residual / count)};
}

template <class V, class T>
PRECISEBN_INLINE Moments two_readings(const T* p, int64_t n, bool& exact) {
  using Scalar = typename Compute<T>::Scalar;
  const char* ahead = reinterpret_cast<const char*>(p + n);
  const double count = static_cast<double>(n);

  Sum<V> sum;
  reduce<2, V>(p, n, ahead, sum);
  const auto mean = static_cast<Scalar>(sum_of_lanes(sum.total) / count);

  Deviations<V, kLinks> deviations{broadcast<V>(mean)};
  reduce<2, V>(p, n, ahead + n * sizeof(T) / 2, deviations);
  return moments_of<T>(deviations, mean, count, exact);
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

// A block needs no reading for its mean after four times as many values of its channel: the mean of those will do. Why,
// and when, is said at Rows below; here q = 10, two in d, one in d * d and seven in the chain (kFollowingLinks, of
// which the first is exact), and s = 8, so r <= 0.2 is enough.
constexpr int kFollowingLinks = 8;
constexpr int64_t kFollows = 4;
// Blocks shorter than this are mostly the sums of their lanes.
template <class T>
constexpr int64_t kLeastBlock = 2048 / sizeof(typename Compute<T>::Scalar);

template <class T>
PRECISEBN_INLINE Moments following_block(const T* p, int64_t n, double mean) {
  using V = typename Compute<T>::Vec;
  const auto center = static_cast<typename Compute<T>::Scalar>(mean);
  bool exact;
  Deviations<V, kFollowingLinks> deviations{broadcast<V>(center)};
  reduce<1, V>(p, n, reinterpret_cast<const char*>(p) + kAheadInPlanes, deviations);
  const Moments result = moments_of<T>(deviations, center, static_cast<double>(n), exact);
  return exact ? result : block_in_float64(p, n);
}

// Merges the moments of a plane into those of the `before` values of its channel that came before.
template <class T>
__attribute__((noinline)) void add_plane(const T* p, int64_t length, double before, double& mean, double& m2) {
  while (length > 0) {
    const auto enough = static_cast<int64_t>(before / kFollows);
    const bool follows = enough >= kLeastBlock<T>;
    const int64_t most = follows && enough < kBlock<T> ? enough : kBlock<T>, blocks = (length + most - 1) / most;
    const int64_t n = (length + blocks - 1) / blocks;
    const Moments part = follows ? following_block(p, n, mean) : block(p, n);
    const auto count = static_cast<double>(n);
    merge(mean, m2, part.mean, part.m2, {before, count});
    m2 = m2 < 0 ? 0 : m2;  // as a whole: see merge_sums
    before += count;
    p += n;
    length -= n;
  }
}

// Planes of fewer values are taken four at a time: alone they are too short to hide the latency of their own sums. The
// four also keep the four chains of additions apart. Vectors are added by fours; the links beside theirs are three
// among the four and one to add what is left over. Lanes are joined in float64, but of few vectors.
template <class T>
constexpr int64_t kShort = 4 * (kLinks - 5) * kLanes<typename Compute<T>::Vec>;

// Planes of 3 to 4 vectors (7 x 7 in float32 lanes of AVX-512) stay in registers between the two readings.
#if defined(__AVX512F__)
constexpr int kHeld = 4;
#else
constexpr int kHeld = 0;
#endif

// After some others of their channel they need no reading for their mean: as above, but with f fours q = 6 + f, two in
// d, one in d * d, three among the four, f - 1 between them and one for what is left over, and s = 3 + f. So four
// others are enough where f <= 4, and nine, r <= 0.1, where f <= 7.
template <class T>
PRECISEBN_INLINE bool follows_enough(int64_t length, double before) {
  const bool few = length < 20 * kLanes<typename Compute<T>::Vec>;
  return before >= static_cast<double>((few ? 4 : 9) * length);
}

// kFew: of 3 to 4 vectors.
template <class T, bool kFew, bool kFollows>
PRECISEBN_INLINE void four_planes(const T* const (&p)[4], int64_t length, MergeWeights weights, double* mean,
                                  double* m2) {
  using V = typename Compute<T>::Vec;
  using Four = typename FourOf<V>::type;
  constexpr int kL = kLanes<V>;
  constexpr bool kHold = kFew && !kFollows;
  const double count = static_cast<double>(length);
  const int rest = static_cast<int>(kFew ? length - (kHeld - 1) * kL : length % kL);
  const int64_t whole = kFew ? (kHeld - 1) * kL : length - rest;
  const auto fetch = [&](int k, int64_t i) {
    __builtin_prefetch(reinterpret_cast<const char*>(p[k] + i) + kAheadInPlanes);
  };

  V held[4][kHeld + 1];
  V sum[4] = {}, squares[4] = {}, center[4];
  if constexpr (!kFollows) {
    for (int64_t i = 0; i < whole; i += kL) {
      for (int k = 0; k < 4; ++k) {
        fetch(k, i);
        const V x = load(p[k] + i);
        if constexpr (kHold) held[k][i / kL] = x;
        sum[k] += x;
      }
    }
    for (int k = 0; k < 4 && rest; ++k) {
      fetch(k, whole);
      const V x = load_first(p[k] + whole, rest);
      if constexpr (kHold) held[k][kHeld - 1] = x;
      sum[k] += x;
    }
  }
  FourD total_mean, total_m2;
  memcpy(&total_mean, mean, sizeof total_mean);
  memcpy(&total_m2, m2, sizeof total_m2);
  const Four shift = kFollows ? __builtin_convertvector(total_mean, Four)
                              : sums_of_lanes(sum) * static_cast<typename Compute<T>::Scalar>(1 / count);
  for (int k = 0; k < 4; ++k) {
    center[k] = broadcast<V>(shift[k]);
    sum[k] = V{};
  }
  int64_t i = 0;
  if constexpr (!kFew) {
    for (; i + 4 * kL <= whole; i += 4 * kL) {
      for (int k = 0; k < 4; ++k) {
        V d[4];
        for (int j = 0; j < 4; ++j) {
          if constexpr (kFollows) fetch(k, i + j * kL);
          d[j] = load(p[k] + i + j * kL) - center[k];
        }
        add_four(d[0], d[1], d[2], d[3], sum[k], squares[k]);
      }
    }
  }
  if (i < length) {
    V last_squares[4] = {};
    for (; i < whole; i += kL) {
      for (int k = 0; k < 4; ++k) {
        if constexpr (kFollows) fetch(k, i);
        const V d = (kHold ? held[k][i / kL] : load(p[k] + i)) - center[k];
        sum[k] += d;
        last_squares[k] += d * d;
      }
    }
    for (int k = 0; k < 4 && rest; ++k) {
      if constexpr (kFollows) fetch(k, whole);
      const V d = first_lanes((kHold ? held[k][kHeld - 1] : load_first(p[k] + whole, rest)) - center[k], rest);
      sum[k] += d;
      last_squares[k] += d * d;
    }
    for (int k = 0; k < 4; ++k) squares[k] += last_squares[k];
  }
  FourD residual, total;
  if constexpr (kFew) {
    residual = __builtin_convertvector(sums_of_lanes(sum), FourD);
    total = __builtin_convertvector(sums_of_lanes(squares), FourD);
  } else {
    residual = wide_sums_of_lanes(sum), total = wide_sums_of_lanes(squares);
  }
  const FourD correction = residual / count;
  FourD part_mean = __builtin_convertvector(shift, FourD) + correction, part_m2 = total - residual * correction;
  if (__builtin_expect(!lanes_suffice<T>(total, count), 0)) {
    for (int k = 0; k < 4; ++k) {
      if (lanes_suffice<T>(total[k], count)) continue;
      const Moments part = block_in_float64(p[k], length);
      part_mean[k] = part.mean, part_m2[k] = part.m2;
    }
  }

  const FourD delta = part_mean - total_mean;
  total_mean += delta * weights.mean;
  total_m2 += part_m2 + delta * weights.m2 * delta;
  total_m2 = total_m2 < 0 ? 0 - FourD{} : total_m2;  // as a whole: see merge_sums
  memcpy(mean, &total_mean, sizeof total_mean);
  memcpy(m2, &total_m2, sizeof total_m2);
}

template <class T, bool kFew, bool kFollows>
__attribute__((noinline)) void short_planes(const T* p, int64_t stride, int64_t channels, int64_t length,
                                            MergeWeights weights, double* mean, double* m2) {
  int64_t c = 0;
  for (; c + 4 <= channels; c += 4, p += 4 * stride) {
    four_planes<T, kFew, kFollows>({p, p + stride, p + 2 * stride, p + 3 * stride}, length, weights, mean + c, m2 + c);
  }
  if (c == channels) return;
  // The first plane left stands in for those that are missing: a channel's bits must not depend on how many channels
  // the task was given.
  const int left = static_cast<int>(channels - c);
  double last_mean[4] = {}, last_m2[4] = {};
  memcpy(last_mean, mean + c, left * sizeof(double));
  memcpy(last_m2, m2 + c, left * sizeof(double));
  four_planes<T, kFew, kFollows>({p, left > 1 ? p + stride : p, left > 2 ? p + 2 * stride : p, p}, length, weights,
                                 last_mean, last_m2);
  memcpy(mean + c, last_mean, left * sizeof(double));
  memcpy(m2 + c, last_m2, left * sizeof(double));
}

template <class T>
void planes(const void* x, int64_t stride, int64_t channels, int64_t length, double before, double* mean, double* m2) {
  const T* p = static_cast<const T*>(x);
  if (length >= kShort<T>) {
    for (int64_t c = 0; c < channels; ++c, p += stride) add_plane(p, length, before, mean[c], m2[c]);
    return;
  }
  const MergeWeights weights(before, static_cast<double>(length));
  constexpr int kL = kLanes<typename Compute<T>::Vec>;
  const bool few = kHeld && length > (kHeld - 1) * kL && length <= kHeld * kL;
  const bool follows = follows_enough<T>(length, before);
  if (few && follows) {
    short_planes<T, kHeld != 0, true>(p, stride, channels, length, weights, mean, m2);
  } else if (few) {
    short_planes<T, kHeld != 0, false>(p, stride, channels, length, weights, mean, m2);
  } else if (follows) {
    short_planes<T, false, true>(p, stride, channels, length, weights, mean, m2);
  } else {
    short_planes<T, false, false>(p, stride, channels, length, weights, mean, m2);
  }
}

// ---- Rows ----
// Read as columns.h says, in blocks whose sums are merged into the accumulators. Four rows are one link.

// One vector of channels of a block: sums of deviations from a center. Beside each other, because arrays of their own
// would lie a page apart, as the rows do, and there are only so many places for lines of the same offset in a page.
template <class V>
struct Column {
  V center, sum, squares;
};

PRECISEBN_INLINE VecD not_negative(VecD v) { return (VecD)((VecI64)v & ~(v < VecD{})); }
PRECISEBN_INLINE WideVec not_negative(WideVec v) { return {not_negative(v.lo), not_negative(v.hi)}; }

// Of the first n channels, `rows` values each, sums of deviations in float64.
template <class T>
PRECISEBN_INLINE void exact_column(const T* p, int64_t stride, int64_t rows, int n, WideVec shift, WideVec& sum,
                                   WideVec& squares) {
  sum = squares = WideVec{};
  for (int64_t r = 0; r < rows; ++r) {
    const WideVec d = load_first_as<WideVec>(p + r * stride, n) - shift;
    sum += d;
    squares += d * d;
  }
}

// Whether float32 lanes suffice for the first n of `squares`, the sums of `count` squares; if not, all bits are set in
// those of `failing` that need float64.
PRECISEBN_INLINE bool lanes_suffice(VecF squares, int n, double count, VecI32& failing) {
  const VecF low = VecF{} + static_cast<float>(count * 0x1p-120), high = VecF{} + 0x1p127f;
#if defined(__AVX512F__)
  const __mmask16 sound = _mm512_cmp_ps_mask((__m512)squares, (__m512)low, _CMP_GE_OQ) &
                          _mm512_cmp_ps_mask((__m512)squares, (__m512)high, _CMP_LE_OQ);
  if (__builtin_expect((sound | (0xffffu << n & 0xffffu)) == 0xffffu, 1)) return true;
#endif
  failing = (VecI32)first_lanes((VecF) ~((squares >= low) & (squares <= high)), n);
  int64_t words[kBytes / 8], any = 0;
  memcpy(words, &failing, sizeof words);
  for (int64_t word : words) any |= word;
  return any == 0;
}
PRECISEBN_INLINE bool lanes_suffice(VecD, int, double, VecI32&) { return true; }

// Replaces the sums of the failing lanes, and of no other: what one channel holds never touches the bits of another.
template <class T>
PRECISEBN_INLINE void column_in_float64(const T* p, int64_t stride, int64_t rows, int n, VecI32 failing, WideVec& shift,
                                        WideVec& sum, WideVec& squares) {
  WideVec exact_sum, exact_squares, ignored;
  exact_column(p, stride, rows, n, WideVec{}, exact_sum, ignored);
  const WideVec exact_shift = exact_sum * broadcast<WideVec>(1.0 / static_cast<double>(rows));
  exact_column(p, stride, rows, n, exact_shift, exact_sum, exact_squares);
  for (int i = 0; i < kLanes<VecD>; ++i) {
    if (failing[i]) shift.lo[i] = exact_shift.lo[i], sum.lo[i] = exact_sum.lo[i], squares.lo[i] = exact_squares.lo[i];
    if (failing[i + kLanes<VecD>]) {
      shift.hi[i] = exact_shift.hi[i], sum.hi[i] = exact_sum.hi[i], squares.hi[i] = exact_squares.hi[i];
    }
  }
}

// Consecutive rows, `before` after the first of those in the accumulators.
struct Block {
  int64_t stride, rows;
  MergeWeights weights;
  double inverse;  // 1 / rows where that is exact, else 0

  PRECISEBN_INLINE Block(int64_t row_stride, int64_t number, double before)
      : stride(row_stride),
        rows(number),
        weights(before, static_cast<double>(number)),
        inverse((number & (number - 1)) == 0 ? 1 / static_cast<double>(number) : 0) {}
};

// Merges a block of one column, of n channels, into mean and m2, and makes it ready for the next: the new mean is its
// center.
template <class V, class W>
PRECISEBN_INLINE void merge_sums(W shift, W sum, W squares, const Block& block, int n, Column<V>& column, double* mean,
                                 double* m2) {
  // Divide where the reciprocal is not exact: m2 of a constant channel is then exactly 0.
  const W residual =
      block.inverse != 0 ? sum * broadcast<W>(block.inverse) : sum / broadcast<W>(static_cast<double>(block.rows));
  const W part_mean = shift + residual, part_m2 = squares - sum * residual;

  double buffer[2][kLanes<V>];
  const bool partial = n < kLanes<V>;
  double *to_mean = mean, *to_m2 = m2;
  if (partial) {
    for (int i = 0; i < kLanes<V>; ++i) buffer[0][i] = i < n ? mean[i] : 0, buffer[1][i] = i < n ? m2[i] : 0;
    to_mean = buffer[0], to_m2 = buffer[1];
  }
  W total_mean, total_m2;
  load_accumulator(to_mean, total_mean);
  load_accumulator(to_m2, total_m2);
  const W delta = part_mean - total_mean;
  total_mean = total_mean + delta * broadcast<W>(block.weights.mean);
  store_accumulator(to_mean, total_mean);
  // Not negative as a whole: alone, part_m2 may be by a rounding, which the other term makes up for.
  store_accumulator(to_m2, not_negative(total_m2 + (part_m2 + delta * broadcast<W>(block.weights.m2) * delta)));
  if (partial) {
    for (int i = 0; i < n; ++i) mean[i] = buffer[0][i], m2[i] = buffer[1][i];
  }
  column = {narrow(total_mean), V{}, V{}};
}

// The same where some lanes need float64; the values of the column begin at p.
template <class T>
__attribute__((noinline)) void merge_in_float64(const T* p, const Block& block, int n, VecI32 failing,
                                                Column<VecF>& column, double* mean, double* m2) {
  WideVec shift = widen(column.center), sum = widen(column.sum), squares = widen(column.squares);
  column_in_float64(p, block.stride, block.rows, n, failing, shift, sum, squares);
  merge_sums(shift, sum, squares, block, n, column, mean, m2);
}
PRECISEBN_INLINE void merge_in_float64(const double*, const Block&, int, VecI32, Column<VecD>&, double*, double*) {}

template <class T, class V>
PRECISEBN_INLINE void merge_column(const T* p, const Block& block, int n, Column<V>& column, double* mean, double* m2) {
  VecI32 failing;
  if (__builtin_expect(lanes_suffice(column.squares, n, static_cast<double>(block.rows), failing), 1)) {
    merge_sums(widen(column.center), widen(column.sum), widen(column.squares), block, n, column, mean, m2);
  } else {
    merge_in_float64(p, block, n, failing, column, mean, m2);
  }
}

// Adds kRows rows to a column, as one link of the chains of its sums; or to its sum alone.
template <class T, int kRows, bool kDeviations, bool kPartial>
PRECISEBN_INLINE void add_to_column(const T* p, int64_t stride, int n, Column<typename Compute<T>::Vec>& column) {
  using V = typename Compute<T>::Vec;
  V d[kRows];
  for (int i = 0; i < kRows; ++i) {
    d[i] = kPartial ? load_first(p + i * stride, n) : load(p + i * stride);
    if constexpr (kDeviations) d[i] -= column.center;
  }
  column.sum += in_pairs<kRows>([&](int i) { return d[i]; });
  if constexpr (kDeviations) column.squares += in_pairs<kRows>([&](int i) { return d[i] * d[i]; });
}

// The mean of so many rows, whose sum the column has, as its center.
template <class V>
PRECISEBN_INLINE Column<V> centered(const Column<V>& column, int64_t rows) {
  const auto count = static_cast<double>(rows);
  return {column.sum * broadcast<V>(static_cast<decltype(column.sum[0] + column.sum[0])>(1.0 / count)), V{}, V{}};
}

// A block needs no reading for its mean where n_a rows have come before, enough against its own n_b: the mean of those
// is the center of the deviations. With S = sum d, Q = sum d * d and n = n_a + n_b, m2 grows by I = Q - S^2 / n, and as
// S^2 <= n_b Q, at most r = n_b / n of Q cancels: I >= (1 - r) Q, for any data. Each I is right to 1e-6, and so is
// their sum, where (q + 2 r s) / (1 - r) is below 16.7, 1e-6 in units of 2^-24; q and s are the roundings in Q and S:
// two in d, for it is squared, one in d * d, two among four rows, one for every four but the first; in S one, two, and
// those. So there are 6 and 4 in a block of 8 rows, 8 and 6 in one of 16, 12 and 10 in one of 32, which may follow 11,
// 37 and 218 rows.
constexpr double kFew = 11;
PRECISEBN_INLINE int64_t rows_of_block(double before, int64_t left) {
  const int64_t rows = before == 0 || before >= 218 ? 32 : before < 37 ? 8 : 16;
  // What is left over at the end is a block of its own: its rows are links each.
  return left >= rows ? rows : left >= kTogether ? left / kTogether * kTogether : left;
}

template <class V>
PRECISEBN_INLINE Column<V> centered(const double* mean, int n) {
  decltype(widen(V{})) center;
  if (n == kLanes<V>) {
    load_accumulator(mean, center);
  } else {
    double padded[kLanes<V>] = {};
    for (int i = 0; i < n; ++i) padded[i] = mean[i];
    load_accumulator(padded, center);
  }
  return {narrow(center), V{}, V{}};
}

template <class T, bool kDeviations>
PRECISEBN_INLINE void add_block(const T* p, const Block& block, int64_t channels, int64_t ahead,
                                Column<typename Compute<T>::Vec>* columns) {
  for_each_four(block.rows, [&]<int kRows>(int64_t r) {
    const T* const from = p + r * block.stride;
    for_each_column<T, kRows>(
        channels,
        [&](int row, int64_t byte) {
          __builtin_prefetch(reinterpret_cast<const char*>(from + row * block.stride + ahead) + byte);
        },
        [&]<bool kPartial>(int64_t k, int n) {
          constexpr int kL = kLanes<typename Compute<T>::Vec>;
          add_to_column<T, kRows, kDeviations, kPartial>(from + k * kL, block.stride, n, columns[k]);
        });
  });
}

template <class T>
void run_of_rows(const T* p, int64_t stride, int64_t channels, int64_t rows, double before, double* mean, double* m2) {
  using V = typename Compute<T>::Vec;
  constexpr int kL = kLanes<V>;
  const int64_t ahead = ahead_in_rows<T>(stride, channels);
  const auto lanes = [&](int64_t c) { return channels - c < kL ? static_cast<int>(channels - c) : kL; };
  Column<V> columns[kColumns<T>];
  for (int64_t c = 0; c < channels; c += kL) columns[c / kL] = centered<V>(mean + c, lanes(c));
  while (rows > 0) {
    const Block block(stride, rows_of_block(before, rows), before);
    if (before < kFew) {
      add_block<T, false>(p, block, channels, ahead, columns);
      for (int64_t c = 0; c < channels; c += kL) columns[c / kL] = centered(columns[c / kL], block.rows);
    }
    add_block<T, true>(p, block, channels, ahead, columns);
    int64_t c = 0;
    for (; c + kL <= channels; c += kL) merge_column(p + c, block, kL, columns[c / kL], mean + c, m2 + c);
    if (c < channels) merge_column(p + c, block, lanes(c), columns[c / kL], mean + c, m2 + c);
    before += static_cast<double>(block.rows);
    rows -= block.rows;
    p += block.rows * stride;
  }
}

template <class T>
void rows(const void* x, int64_t stride, int64_t channels, int64_t rows, double before, double* mean, double* m2) {
  const T* p = static_cast<const T*>(x);
  for (int64_t c = 0; c < channels; c += kRun) {
    run_of_rows(p + c, stride, channels - c < kRun ? channels - c : kRun, rows, before, mean + c, m2 + c);
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
