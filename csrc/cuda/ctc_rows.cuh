// Before the recursion: one kernel looks at the lengths and labels of each utterance; one reads
// each frame once, for its softmax statistics and for the probabilities of the symbols that the
// target needs. Rows past an utterance's end are not read.

#pragma once

#include "cuda/ctc_problem.cuh"

namespace kdkernels {
namespace cuda {

// A block an utterance.
template <class Float>
__global__ void prepare_kernel(CTCProblem<Float> p) {
  KDKERNELS_SHARED(int, wrong, 1);
  const int64_t n = blockIdx.x;
  const Group<true> block(0);
  const int64_t frames_given = p.input_lengths[n * p.input_length_stride];
  const int64_t labels_given = p.target_lengths[n * p.target_length_stride];
  const bool concatenated = p.target_stride_n < 0, labelled = p.is_labelled(n);
  const int64_t most = concatenated ? p.targets_size : p.targets_size / p.N;

  Utterance u{};
  const int64_t frames = frames_given < 0 ? 0 : frames_given > p.T ? p.T : frames_given;
  int64_t labels = labels_given < 0 ? 0 : labels_given > most ? most : labels_given;
  bool bad = frames != frames_given || labels != labels_given;
  int64_t begin = n * p.target_stride_n;
  u.base = n * (p.S + 1);
  if (concatenated) {
    begin = int64_t(block_sum(n, [&](int64_t i) {
      const int64_t length = p.target_lengths[i * p.target_length_stride];
      return double(length < 0 ? 0 : length > most ? most : length);
    }));
    bad = bad || begin + labels > p.targets_size;
    u.base = (bad ? 0 : begin) + n;
  }
  u.slab = p.width ? p.slab_of(n, bad ? 0 : begin) : 0;
  u.frames = int(frames);
  u.labelled = labelled;
  const bool fits = labelled && !bad && labels <= p.S;
  u.labels = fits ? int(labels) : 0;

  const auto label = [&](int64_t k) {
    return concatenated ? p.targets[(begin + k) * p.target_stride]
                        : p.targets[begin + k * p.target_stride];
  };
  // All labels are looked at, also where there are too many to be aligned.
  const int64_t readable = labelled && !bad ? labels : 0;
  double problems[2] = {0, 0};  // wrong labels, repeats
  for (int64_t k = block.rank; k < readable; k += block.size) {
    const int64_t c = label(k);
    problems[0] += c < 0 || c >= p.C || c == p.blank;
    problems[1] += k > 0 && c == label(k - 1);
    if (k < u.labels) p.label[u.base + k] = int32_t(c);
  }
  block.template reduce<Sum>(problems);
  bad = bad || problems[0] > 0;
  u.bad = bad;
  u.runs = fits && !bad && u.frames > 0 && double(u.frames) >= double(labels) + problems[1];
  if (threadIdx.x == 0) wrong[0] = u.runs;
  __syncthreads();
  if (int(wrong[0])) {
    const int32_t* const own = p.label + u.base;
    for (int k = block.rank; k < u.labels; k += block.size) {
      int before = k - 1, after = k + 1;
      while (before >= 0 && own[before] != own[k]) before--;
      while (after < u.labels && own[after] != own[k]) after++;
      p.first[u.base + k] = before < 0;
      p.next[u.base + k] = after < u.labels ? after : -1;
    }
    if (p.emissions) {
      const int pad = p.frames(u) - u.frames, columns = p.by_class ? int(p.C) : u.labels;
      for (int i = block.rank; i < pad * (columns + 1); i += block.size) {
        const int t = u.frames + i / (columns + 1), k = i % (columns + 1) - 1;
        p.emissions[p.emission_at(u, n, k, k) + int64_t(t) * p.width] = {Float(1), kZeroSymbol};
        if (k < 0) p.blank_emissions[n * p.frames() + t] = {Float(1), 0};
      }
    }
  }
  u.weight = p.teacher.data ? block_sum(frames, [&](int64_t t) { return p.weight(t, n); }) : 0.0;
  if (threadIdx.x == 0) {
    // What needs no recursion: an impossible target, or nothing at all.
    const double infinity = double(kInfinity);
    const bool nothing = !labelled || (u.frames == 0 && labels == 0);
    p.utterance_loss[n] = bad ? infinity - infinity : nothing ? 0.0 : infinity;
    u.labels = u.labelled ? int(labels) : 0;  // the divisor of a mean
    p.utterances[n] = u;
    if (n == 0) *p.counter = 0;
  }
}

// exp(x - max) whole: exp(r) 2^n, with the rounding of x - max carried along.
KDKERNELS_DEVICE Number<float> to_number(float x, float max) {
  const float lowest = float(kZeroSymbol * kLn2);
  const float difference = x - max, minus_max = difference - x;
  const float lost = (x - (difference - minus_max)) - (max + minus_max);
  const float d = fmaxf(lowest, difference);
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
  constexpr float kHigh = 0.693359375f, kLow = -2.12194440e-4f;
  // n in two steps, since there are more of them than kRound has room for, and each product exact.
  const float quotient = d * float(kLog2e);
  const float coarse = ((quotient * float(1.0 / 4096) + kRound) - kRound) * 4096.0f;
  const float fine = ((quotient - coarse) + kRound) - kRound;
  const float n = coarse + fine;
  float r = ((d - coarse * kHigh) - fine * kHigh) - n * kLow;
  r = d > lowest ? r + lost : 0.0f;
  constexpr double k[] = {0.49999993, 0.16666521, 0.04166839, 0.00836871, 0.00138146};
  return {horner(r, k) * (r * r) + (r + 1.0f), int(n)};
}
KDKERNELS_DEVICE Number<double> to_number(double x, double max) {
  const double lowest = kZeroSymbol * kLn2, d = fmax(lowest, x - max), n = rint(d * kLog2e);
  const double r = (d - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  return {exp(r), int(n)};
}

// A softmax that is made while more classes come: the sum of exp(x - max) without the classes that
// are the maximum, which are counted, since a certain row has almost nothing else.
template <class Real>
struct RunningSoftmax {
  Real max = Real(-kInfinity), rest = 0, ones = 0;
  bool nan = false;

  KDKERNELS_DEVICE static Real exponential(Real x) {
    if constexpr (sizeof(Real) == 8) {
      return exp(x);
    } else {
      return ExpScale(1.0)(x);
    }
  }
  KDKERNELS_DEVICE void raise(Real to) {  // to a maximum that is no smaller
    if (to > max) {
      rest = (rest + ones) * exponential(max - to);
      ones = 0;
      max = to;
    }
  }
  template <int n>
  KDKERNELS_DEVICE void add(const Real (&x)[n]) {
    Real most = max;
#pragma unroll
    for (int j = 0; j < n; j++) {
      most = x[j] > most ? x[j] : most;
      nan = nan || x[j] != x[j];
    }
    raise(most);
    if (!(max > Real(-kInfinity))) return;
#pragma unroll
    for (int j = 0; j < n; j++) {
      const Real e = exponential(x[j] - max);
      rest = x[j] == max ? rest : rest + e;
      ones = x[j] == max ? ones + 1 : ones;
    }
  }
};

// f(group, t, n) of every frame: groups of `lanes`, or blocks.
template <bool kBlock, class Float, class F>
KDKERNELS_DEVICE void for_frames(const CTCProblem<Float>& p, int lanes, F f) {
  const Group<kBlock> group(lanes);
  const int64_t rows = kBlock ? 1 : int64_t(blockDim.x) / lanes;
  const int64_t row = int64_t(blockIdx.x) * rows + (kBlock ? 0 : int(threadIdx.x) / lanes);
  const bool inside = row < p.T * p.N;
  const int64_t t = inside ? unsigned(row) / unsigned(p.N) : p.T, n = inside ? row - t * p.N : 0;
  f(group, t, n);
}

template <class T, class Float, bool kBlock>
__global__ void __launch_bounds__(kBlock ? 512 : kBlockThreads)
    statistics_kernel(CTCProblem<Float> p, int lanes, bool emissions) {
  if (blockIdx.x == 0 && threadIdx.x < 32) {  // totals over the batch, for the kernels to come
    double sums[2] = {0, 0};
    for (int64_t n = threadIdx.x; n < p.N; n += 32) {
      sums[0] += p.utterances[n].labelled;
      sums[1] += p.utterances[n].weight;
    }
    Group<false>(32).reduce<Sum>(sums);
    if (threadIdx.x == 0) p.totals[0] = sums[0], p.totals[1] = sums[1];
  }
  for_frames<kBlock>(p, lanes, [&](const Group<kBlock>& group, int64_t t, int64_t n) {
    Utterance u{};
    if (t < p.T) u = p.utterances[n];
    const bool live = t < u.frames && u.runs;
    const T* const row = live ? static_cast<const T*>(p.logits.row(t, n).data) : nullptr;
    RunningSoftmax<Float> softmax;
    if (live) {
      if constexpr (sizeof(T) == sizeof(Float) && sizeof(T) == 8) {
        for (int64_t c = group.rank; c < p.C; c += group.size) {
          const Float x[1] = {Float(row[c])};
          softmax.add(x);
        }
      } else {
        const bool aligned = is_aligned(row);
        for (int64_t c = group.rank * kVector<T>; c < p.C; c += group.size * kVector<T>) {
          float x[kVector<T>];
          Float wide[kVector<T>];
          load_vector(row, aligned, c, p.C, x);
#pragma unroll
          for (int j = 0; j < kVector<T>; j++) wide[j] = x[j];
          softmax.add(wide);
        }
      }
    }
    double most[2] = {double(softmax.max), softmax.nan ? 1.0 : 0.0};
    group.template reduce<Max>(most);
    if (softmax.max > Float(-kInfinity)) softmax.raise(Float(most[0]));
    double sums[2] = {double(softmax.rest), double(softmax.ones)};
    group.template reduce<Sum>(sums);
    if (!live) return;
    const double infinity = double(kInfinity);
    const bool valid = most[1] == 0 && fabs(most[0]) < infinity;
    const Float max = valid ? Float(most[0]) : Float(0);
    if (group.rank == 0) {
      p.max[n * p.T + t] = max;
      p.rest[n * p.T + t] = valid ? sums[0] + (sums[1] - 1) : infinity - infinity;
    }
    if (!emissions) return;
    Number<Float>* const out = p.emissions + t * p.width;
    const int32_t* const labels = p.label + u.base;
    const int columns = p.by_class ? int(p.C) : u.labels;
    for (int k = group.rank; k < columns; k += group.size) {
      const int c = p.by_class ? k : labels[k];
      out[p.emission_at(u, n, k, c)] = to_number(Float(to_float(row[c])), max);
    }
    if (group.rank == 0) {
      out[p.emission_at(u, n, -1, 0)] = {Float(1), kZeroSymbol};
      p.blank_emissions[n * p.frames() + t] = to_number(Float(to_float(row[p.blank])), max);
    }
  });
}

}  // namespace cuda
}  // namespace kdkernels
