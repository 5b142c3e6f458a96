// The forward-backward recursion of CTC, a block an utterance: alpha by one half of its warps, from
// the front, and beta by the other, from the back, as alpha of the reversed problem. They meet in
// the middle, where the likelihood is known; then each goes on through the other's half and turns
// the other's stored labels into occupancies. Half of each table is stored, and of blanks nothing.
//
// States are pairs: blank k and label k, so that a pair needs one neighbour, the label before it:
//   x       = blank[k] + label[k - 1]
//   blank'  = p(blank) x
//   label'  = p(label) (label[k] + (may skip ? x : blank[k]))
// A lane holds kPairs of them in registers, a warp a slab. The neighbour comes by a shuffle within
// a warp, and between warps through shared memory, a chunk of frames at a time: each warp runs one
// chunk behind the one before it, so that the block's barrier comes once a chunk. More slabs than
// warps are done in tiles, one after the other, which hand over through global memory.
//
// A direction counts positions and frames from its own start; its first pair is one without a
// label, so that what the first lane's shuffle brings, its own last label, ends in a probability of
// 0. Halves are of whole chunks, and tables have rows of a fixed size, so that a frame has no tests
// and its addresses are a pointer and a constant.

#pragma once

#include <type_traits>

#include "cuda/ctc_problem.cuh"

namespace kdkernels {
namespace cuda {

constexpr int kMostWarps = 4;  // of a direction

// The number of a chunk's mantissas stays within 2^-8 and 2^24 of 1, so that the exponent field
// takes a shift as far as this; what is farther below counts for nothing.
template <class Real>
constexpr int kFarBelow = sizeof(Real) == 8 ? -900 : -100;

// a.m 2^(a.e - top), where a.e - top is no more than a little above 0; about 0 where it is far
// below.
KDKERNELS_DEVICE float shifted(Number<float> a, int minus_top) {
  const int n = __viaddmax_s32(a.e, minus_top, kFarBelow<float>);
  return __int_as_float(__float_as_int(a.m) + n * (1 << 23));
}
KDKERNELS_DEVICE double shifted(Number<double> a, int minus_top) {
  const long long n = __viaddmax_s32(a.e, minus_top, kFarBelow<double>);
  return __longlong_as_double(__double_as_longlong(a.m) + n * (1LL << 52));
}

template <class Real>
KDKERNELS_DEVICE Number<Real> zero_number() {
  return {Real(1), kZeroState};
}

template <class Real>
KDKERNELS_DEVICE Number<Real> add(Number<Real> a, Number<Real> b) {
  const int e = max(a.e, b.e);
  return {shifted(a, -e) + shifted(b, -e), e};
}

KDKERNELS_DEVICE Number<float> normalised(Number<float> a) {
  const unsigned bits = unsigned(__float_as_int(a.m));
  return {__int_as_float(int((bits & 0x007fffff) | 0x3f800000)),
          __viaddmax_s32(a.e + int(bits >> 23), -127, kZeroState)};
}
KDKERNELS_DEVICE Number<double> normalised(Number<double> a) {
  const long long bits = __double_as_longlong(a.m);
  const long long mantissa = (bits & 0x000fffffffffffffLL) | 0x3ff0000000000000LL;
  return {__longlong_as_double(mantissa), max(a.e + int(bits >> 52) - 1023, kZeroState)};
}

// What the lane's pairs have in a row of a table.
template <class T, int n>
struct alignas(n * sizeof(T) < 16 ? n * sizeof(T) : 16) Several {
  T x[n];
};

// A direction of an utterance.
template <class Float>
struct Direction {
  int warp, warps, lane;  // warps: of this direction
  int S, slabs, frames;
  int64_t slab;                    // elements of a slab
  bool by_class, stores;           // stores: the first half's labels are wanted
  const int32_t* label;            // [S]
  const Number<Float>* emissions;  // of the utterance, in slabs or by class
  const Number<Float>* blank_emissions;
  Number<Float>* stored;  // slabs of the utterance
  Float* occupancy;       // slabs of the utterance
  Number<double>* boundary;
};

struct Likelihood {
  double inverse_m;
  int e;
};

// The first half of a direction's frames, whose labels are stored, or the second (kSecond), which
// writes occupancies. `states` holds the pairs after the first half: written by it, read by the
// second. Every thread of the block comes here.
template <class Real, class Float, int kPairs, int kFrames, bool kRing, bool kForward, bool kSecond>
KDKERNELS_DEVICE void run_half(const Direction<Float>& d, Pair<Real>* states,
                               Likelihood likelihood) {
  static_assert(kAhead % kFrames == 0, "");
  constexpr int kWidth = 32 * kPairs, kStep = kForward ? kWidth : -kWidth;
  constexpr int kBlankStep = kForward ? 1 : -1, kSlots = kMostWarps + 1;
  // What enters warp w is at slot w, for two chunks.
  KDKERNELS_SHARED(Number<Real>, ring, kRing ? 2 * kSlots * 2 * kFrames : 1);
  const auto slot = [&](int warp, int chunk) {
    return (((kForward ? 0 : kSlots) + warp) * 2 + (chunk & 1)) * kFrames;
  };
  const int half = d.frames / 2, chunks = half / kFrames, begin = kSecond ? half : 0;
  const int tiles = (d.slabs + d.warps - 1) / d.warps;

  for (int tile = 0; tile < tiles; tile++) {
    const int slab = tile * d.warps + d.warp;
    const bool has_slab = slab < d.slabs;
    const bool hands_over = kRing && tile + 1 < tiles && d.warp == d.warps - 1;
    // Of the label at position i of this direction: its number in the target, which may be none.
    const int first = slab * kWidth + d.lane * kPairs, positions = d.slabs * kWidth;
    const auto label_at = [&](int i) { return kForward ? i - 1 : positions - 2 - i; };
    const auto has = [&](int k) { return k >= 0 && k < d.S; };
    const int t = kForward ? begin : d.frames - 1 - begin;
    const int64_t row = int64_t(t) * kWidth;

    bool skip[kPairs];
    Number<Real> blank[kPairs], label[kPairs];
    const Number<Float>* emission[kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; j++) {
      const int k = label_at(first + j), before = kForward ? k - 1 : k + 1;
      const int c = has(k) ? d.label[k] : 0;
      const int64_t position = k + 1;
      const int64_t place = position / kWidth * d.slab + position % kWidth;
      // A pair without a label has a symbol of probability 0.
      emission[j] = d.emissions + row + (!has(k) ? 0 : d.by_class ? c + 1 : place);
      skip[j] = has(k) && has(before) && c != d.label[before];
      blank[j] = label[j] = zero_number<Real>();
      if (kSecond && has_slab) {  // over the likelihood
        blank[j] = states[first + j].blank, label[j] = states[first + j].label;
        blank[j].m *= Real(likelihood.inverse_m), blank[j].e -= likelihood.e;
        label[j].m *= Real(likelihood.inverse_m), label[j].e -= likelihood.e;
        blank[j] = normalised(blank[j]), label[j] = normalised(label[j]);
      } else if (before == (kForward ? -1 : d.S)) {
        blank[j] = {Real(1), 0};
      }
    }
    const Number<Float>* blank_emission = d.blank_emissions + t;
    using Numbers = Several<Number<Float>, kPairs>;
    using Floats = Several<Float, kPairs>;
    const int64_t own = slab * d.slab + row;
    Number<Float>* stored = d.stored + own + d.lane * kPairs;
    Float* occupancy = d.occupancy + own + d.lane * kPairs;
    // The other direction stored the same labels from its end.
    const Number<Float>* met_at =
        d.stored + (d.slabs - 1 - slab) * d.slab + row + (31 - d.lane) * kPairs;

    Number<Float> p_label[kFrames][kPairs], p_blank[kFrames];
    Numbers met[kFrames];
    const auto load_frame = [&](int f, int at) {
      p_blank[f] = blank_emission[at * kBlankStep];
#pragma unroll
      for (int j = 0; j < kPairs; j++) p_label[f][j] = emission[j][at * kStep];
      if (kSecond) met[f] = *reinterpret_cast<const Numbers*>(met_at + at * kStep);
    };
    int loaded = -1;                       // the chunk whose frames are in registers
    Number<double> handed{1, kZeroState};  // what the tile before hands over, a frame a lane
    const bool takes_over = kRing && d.warp == 0, hands = d.lane < kFrames;
    if (takes_over && tile > 0 && hands) handed = d.boundary[begin + d.lane];

    for (int tick = 0; tick < chunks + (kRing ? d.warps - 1 : 0); tick++) {
      const int chunk = tick - (kRing ? d.warp : 0), from = begin + chunk * kFrames;
      if (chunk >= 0 && chunk < chunks && has_slab) {
        const int to_ring = kRing ? slot(d.warp + 1, chunk) : 0;
        const int from_ring = kRing ? slot(d.warp, chunk) : 0;
        if (takes_over) {
          if (hands) {
            ring[from_ring + d.lane] = Number<Real>{Real(handed.m), handed.e};
            if (tile > 0 && chunk + 1 < chunks) handed = d.boundary[from + kFrames + d.lane];
          }
          __syncwarp();
        }
        // Pairs that can be reached, and could still reach the end from the frame before.
        const int first_pair = slab * kWidth - (kForward ? 1 : positions - 1 - d.S);
        const bool alive =
            first_pair < from + kFrames && d.S - first_pair - kWidth <= d.frames - from;
        if (!alive) {
#pragma unroll
          for (int f = 0; f < kFrames; f++) {
            Numbers zeros;
            Floats none;
#pragma unroll
            for (int j = 0; j < kPairs; j++) zeros.x[j] = zero_number<Float>(), none.x[j] = 0;
            if (kSecond) {
              *reinterpret_cast<Floats*>(occupancy + f * kStep) = none;
            } else if (d.stores) {
              *reinterpret_cast<Numbers*>(stored + f * kStep) = zeros;
            }
          }
          if (kRing && hands) ring[to_ring + d.lane] = zero_number<Real>();
        } else {
          if (loaded != chunk) {
#pragma unroll
            for (int f = 0; f < kFrames; f++) load_frame(f, f);
          }
          loaded = chunk + 1;
#pragma unroll
          for (int f = 0; f < kFrames; f++) {
            const Number<Real> last = label[kPairs - 1];
            Number<Real> before{__shfl_up_sync(~0u, last.m, 1), __shfl_up_sync(~0u, last.e, 1)};
            if (kRing) {
              if (d.lane == 31) ring[to_ring + f] = last;
              if (d.lane == 0) before = ring[from_ring + f];
            }
            Numbers store;
            Floats gamma;
#pragma unroll
            for (int j = kPairs - 1; j >= 0; j--) {
              const Number<Real> neighbour = j > 0 ? label[j > 0 ? j - 1 : 0] : before;
              const Number<Real> x = add(blank[j], neighbour);
              const Number<Real> y = add(label[j], skip[j] ? x : blank[j]);
              if (kSecond) {
                const Number<Float> z = met[f].x[kPairs - 1 - j];
                gamma.x[j] = Float(shifted(Number<Real>{y.m * Real(z.m), y.e}, z.e));
              }
              blank[j] = {x.m * Real(p_blank[f].m), x.e + p_blank[f].e};
              label[j] = {y.m * Real(p_label[f][j].m), y.e + p_label[f][j].e};
              store.x[j] = {Float(label[j].m), label[j].e};
            }
            if (kSecond) {
              *reinterpret_cast<Floats*>(occupancy + f * kStep) = gamma;
            } else if (d.stores) {
              *reinterpret_cast<Numbers*>(stored + f * kStep) = store;
            }
            load_frame(f, f + kFrames);
          }
#pragma unroll
          for (int j = 0; j < kPairs; j++) {
            blank[j] = normalised(blank[j]);
            label[j] = normalised(label[j]);
          }
        }
        if (hands_over) {
          __syncwarp();
          if (hands) {
            const Number<Real> x = ring[to_ring + d.lane];
            d.boundary[from + d.lane] = {double(x.m), x.e};
          }
        }
        blank_emission += kFrames * kBlankStep;
#pragma unroll
        for (int j = 0; j < kPairs; j++) emission[j] += kFrames * kStep;
        if (kSecond) {
          met_at += kFrames * kStep, occupancy += kFrames * kStep;
        } else {
          stored += kFrames * kStep;
        }
      }
      if (kRing) __syncthreads();
    }
    if (!kSecond && has_slab) {
#pragma unroll
      for (int j = 0; j < kPairs; j++) states[first + j] = {blank[j], label[j]};
    }
  }
}

// The likelihood in the middle, from alpha up to there and beta from there on.
template <class Real>
KDKERNELS_DEVICE Number<double> meet(const Pair<Real>* alpha, const Pair<Real>* beta, int S,
                                     int positions, const int32_t* label) {
  const auto alpha_of = [&](int k) { return alpha[k + 1]; };            // blank k and label k
  const auto beta_of = [&](int k) { return beta[positions - 2 - k]; };  // blank k + 1 and label k
  Number<double> sum{1, 2 * kZeroState};
  for (int k = threadIdx.x; k <= S; k += blockDim.x) {
    const Pair<Real> a = alpha_of(k), b = beta_of(k - 1);
    const Number<Real> x = k > 0 ? add(a.blank, alpha_of(k - 1).label) : a.blank;
    sum = add(normalised(sum), {double(x.m) * double(b.blank.m), x.e + b.blank.e});
    if (k < S) {
      const bool skip = k > 0 && label[k] != label[k - 1];
      const Number<Real> y = add(a.label, skip ? x : a.blank), b_label = beta_of(k).label;
      sum = add(normalised(sum), {double(y.m) * double(b_label.m), y.e + b_label.e});
    }
  }
  const Group<true> block(0);
  const int e = int(block.reduce<Max>(double(sum.e)));
  return {block.reduce<Sum>(shifted(sum, -e)), e};
}

// A block an utterance: its loss and, where they are wanted, the occupancies of its labels.
template <class Float, int kPairs, int kFrames, bool kRing>
__global__ void __launch_bounds__(kRing ? 2 * 32 * kMostWarps : 64)
    recursion_kernel(CTCProblem<Float> p, bool occupancies) {
  const int64_t n = blockIdx.x;
  const Utterance u = p.utterances[n];
  if (!u.runs) return;
  Direction<Float> d;
  d.warps = int(blockDim.x) / 64;
  const int warp = int(threadIdx.x) / 32;
  const bool forward = warp < d.warps;
  d.warp = forward ? warp : warp - d.warps;
  d.lane = int(threadIdx.x) % 32;
  d.S = u.labels, d.slabs = p.slabs(u), d.frames = p.frames(u);
  d.slab = p.frames() * p.width;
  d.by_class = p.by_class, d.stores = occupancies;
  d.label = p.label + u.base;
  d.emissions = p.emissions + (p.by_class ? n : u.slab) * d.slab;
  d.blank_emissions = p.blank_emissions + n * p.frames();
  d.stored = p.stored + u.slab * d.slab;
  d.occupancy = p.occupancy + u.slab * d.slab;
  d.boundary = p.boundary + (2 * n + (forward ? 0 : 1)) * p.frames();

  const double normalisers =
      block_sum(u.frames, [&](int64_t t) { return log1p(p.rest[n * p.T + t]); });
  if (!(normalisers < double(kInfinity))) {
    if (threadIdx.x == 0) p.utterance_loss[n] = normalisers - normalisers;
    return;
  }
  const int positions = d.slabs * p.width;
  const auto half = [&](auto second, auto* states, Likelihood likelihood) {
    using Real = decltype(states->blank.m);
    constexpr bool kSecond = decltype(second)::value;
    if (forward) {
      run_half<Real, Float, kPairs, kFrames, kRing, true, kSecond>(d, states, likelihood);
    } else {
      run_half<Real, Float, kPairs, kFrames, kRing, false, kSecond>(d, states + positions,
                                                                    likelihood);
    }
  };
  const auto meeting = [&](auto* all) {
    auto* const states = all + 2 * u.slab * p.width;
    half(std::false_type(), states, {});
    __syncthreads();
    return meet(states, states + positions, u.labels, positions, d.label);
  };
  Number<double> z = meeting(p.states);
  if (z.e < kZeroLikelihood || !(z.m > 0)) return;  // the loss stays infinite
  double loss = normalisers - (double(z.e) * kLn2 + log(z.m));

  if (occupancies) half(std::true_type(), p.states + 2 * u.slab * p.width, {1 / z.m, z.e});
  if constexpr (sizeof(Float) == 4) {
    // The mantissas' rounding is 1e-7 a frame, at random: too much for a loss as small as this.
    if (loss < 0.1 * sqrt(double(u.frames))) {
      __syncthreads();
      d.stores = false;
      z = meeting(p.wide_states);
      loss = normalisers - (double(z.e) * kLn2 + log(z.m));
    }
  }
  if (threadIdx.x == 0) p.utterance_loss[n] = loss;
}

}  // namespace cuda
}  // namespace kdkernels
