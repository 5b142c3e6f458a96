// The forward-backward recursion of CTC, a block an utterance: alpha by one half of its warps, from
// the front, and beta by the other, from the back, as alpha of the reversed problem. They meet in
// the middle, where the likelihood is known; then each goes on through the other's half and turns
// the other's stored labels into occupancies. Half of each table is stored, and of blanks nothing.
//
// States are pairs: blank k and label k, so that a pair needs one neighbour, the label before it:
//   x       = blank[k] + label[k - 1]
//   blank'  = p(blank) x
//   label'  = p(label) (label[k] + (may skip ? x : blank[k]))
// A lane holds kPairs of them in registers. The neighbour comes by a shuffle within a warp, and
// between warps through shared memory, a chunk of frames at a time: each warp runs one chunk behind
// the one before it, so that the block's barrier comes once a chunk. More pairs than the warps hold
// are done in tiles, one after the other, which hand over in the same way through global memory.

#pragma once

#include "cuda/ctc_problem.cuh"

namespace kdkernels {
namespace cuda {

constexpr int kMostWarps = 4;  // of a direction

// 2^n for n <= 0 (and a little above), 0 far below: n = e - top.
template <class Real>
KDKERNELS_DEVICE Real power_of_two(int e, int minus_top) {
  if constexpr (sizeof(Real) == 8) {
    const int n = __viaddmax_s32(e, minus_top, -1023);
    return __longlong_as_double((long long)(n + 1023) << 52);
  } else {
    const int n = __viaddmax_s32(e, minus_top, -127);
    return __int_as_float(n * (1 << 23) + 0x3f800000);
  }
}

template <class Real>
KDKERNELS_DEVICE Number<Real> zero_number() {
  return {Real(1), kZeroState};
}

template <class Real>
KDKERNELS_DEVICE Number<Real> add(Number<Real> a, Number<Real> b) {
  const int e = max(a.e, b.e);
  return {a.m * power_of_two<Real>(a.e, -e) + b.m * power_of_two<Real>(b.e, -e), e};
}

KDKERNELS_DEVICE Number<float> normalised(Number<float> a) {
  const int bits = __float_as_int(a.m);
  return {__int_as_float((bits & 0x007fffff) | 0x3f800000),
          max(a.e + (bits >> 23) - 127, kZeroState)};
}
KDKERNELS_DEVICE Number<double> normalised(Number<double> a) {
  const long long bits = __double_as_longlong(a.m);
  const long long mantissa = (bits & 0x000fffffffffffffLL) | 0x3ff0000000000000LL;
  return {__longlong_as_double(mantissa), max(a.e + int(bits >> 52) - 1023, kZeroState)};
}

// One thread's part of one direction. Indices of pairs and labels are the direction's own.
template <class Float>
struct Direction {
  bool forward;
  int warp, warps, lane;  // warps: of this direction
  int T, S;
  const int32_t* label;            // [S], in the order of the target
  const Number<Float>* emissions;  // of the utterance
  int pitch;                       // of emissions, in elements
  bool by_class;
  int blank_column;
  Number<Float>* stored;     // [T][S + 1]
  Float* occupancy;          // [T][S + 1]
  Number<double>* boundary;  // [T]
  bool stores;               // the first half's labels are wanted

  KDKERNELS_DEVICE int frame(int i) const { return forward ? i : T - 1 - i; }
  KDKERNELS_DEVICE int target_index(int k) const { return forward ? k : S - 1 - k; }
};

struct Likelihood {
  float inverse_m;
  double wide_inverse_m;
  int e;
};

// Steps [begin, end): of the first half, whose labels are stored, or of the second (kSecond), which
// writes occupancies. `states` holds the pairs after the first half: written by it, read by the
// second. Every thread of the block comes here, for as many chunks of kFrames steps.
template <class Real, class Float, int kPairs, int kFrames, bool kRing, bool kSecond>
KDKERNELS_DEVICE void run_half(const Direction<Float>& d, int begin, int end, int chunks,
                               Pair<Real>* states, Likelihood likelihood) {
  static_assert(kFrames <= kAhead, "");
  KDKERNELS_SHARED(Number<Real>, ring, kRing ? 2 * kMostWarps * 2 * kFrames : 1);
  const auto ring_at = [&](int warp, int chunk, int f) {
    return (((d.forward ? 0 : kMostWarps) + warp) * 2 + (chunk & 1)) * kFrames + f;
  };
  constexpr int kWarpPairs = 32 * kPairs;
  const int tile_pairs = d.warps * kWarpPairs, tiles = (d.S + tile_pairs) / tile_pairs;
  const int row = d.S + 1;  // of stored and occupancy
  const int64_t step = d.forward ? d.pitch : -d.pitch, row_step = d.forward ? row : -row;

  for (int tile = 0; tile < tiles; tile++) {
    const int first_pair = tile * tile_pairs + d.warp * kWarpPairs;
    const int first = first_pair + d.lane * kPairs;
    const bool from_boundary = tile > 0 && d.warp == 0;
    const bool to_boundary = tile + 1 < tiles && d.warp == d.warps - 1;

    int column[kPairs], place[kPairs], other[kPairs];
    bool skip[kPairs];
    Number<Real> blank[kPairs], label[kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; j++) {
      const int k = first + j;
      const bool has = k < d.S;
      const int c = has ? d.label[d.target_index(k)] : -1;
      // A pair without a label has a symbol of probability 0, and a place that nobody reads.
      column[j] = has ? (d.by_class ? c : d.target_index(k) + 1) : d.pitch - 1;
      place[j] = has ? (kSecond ? d.target_index(k) : k) : d.S;
      other[j] = has ? d.S - 1 - k : d.S;
      skip[j] = has && k > 0 && c != d.label[d.target_index(k - 1)];
      blank[j] = label[j] = zero_number<Real>();
      if (kSecond) {
        if (k <= d.S) blank[j] = states[k].blank, label[j] = states[k].label;
      } else if (k == 0) {
        blank[j] = {Real(1), 0};
      }
    }

    Number<Float> p_label[kFrames][kPairs], p_blank[kFrames], met[kFrames][kPairs];
    const Number<Float>* emission_row = nullptr;
    const Number<Float>* met_row = nullptr;
    const auto load_frame = [&](int f) {  // of the row that the pointers are at
      p_blank[f] = emission_row[d.blank_column];
#pragma unroll
      for (int j = 0; j < kPairs; j++) {
        p_label[f][j] = emission_row[column[j]];
        if (kSecond) met[f][j] = met_row[other[j]];
      }
      emission_row += step;
      met_row += row_step;
    };
    int loaded = -1;  // the chunk whose frames are in registers

    for (int tick = 0; tick < chunks + (kRing ? d.warps - 1 : 0); tick++) {
      const int chunk = tick - (kRing ? d.warp : 0), from = begin + chunk * kFrames;
      if (chunk >= 0 && from < end) {
        // Pairs that can be reached, and could still reach the end from the frame before.
        const bool alive =
            first_pair < from + kFrames && d.S - first_pair - kWarpPairs <= d.T - from;
        int64_t at = int64_t(d.frame(from)) * row;
        if (!alive) {
          for (int f = 0; f < kFrames && from + f < end; f++) {
#pragma unroll
            for (int j = 0; j < kPairs; j++) {
              if (kSecond) {
                d.occupancy[at + place[j]] = 0;
              } else if (d.stores) {
                d.stored[at + place[j]] = zero_number<Float>();
              }
            }
            at += row_step;
            if (d.lane == 31) {
              if (to_boundary) d.boundary[from + f] = zero_number<double>();
              if (kRing) ring[ring_at(d.warp, chunk, f)] = zero_number<Real>();
            }
          }
        } else {
          if (loaded != chunk) {
            emission_row = d.emissions + int64_t(d.frame(from)) * d.pitch;
            met_row = d.stored + at;
#pragma unroll
            for (int f = 0; f < kFrames; f++) load_frame(f);
          }
          loaded = chunk + 1;
          Float* occupancy_row = d.occupancy + at;
          Number<Float>* stored_row = d.stored + at;
#pragma unroll
          for (int f = 0; f < kFrames; f++) {
            if (from + f >= end) break;
            const Number<Real> last = label[kPairs - 1];
            Number<Real> before{__shfl_up_sync(~0u, last.m, 1), __shfl_up_sync(~0u, last.e, 1)};
            if (kRing) {
              if (d.lane == 31) {
                ring[ring_at(d.warp, chunk, f)] = last;
                if (to_boundary) d.boundary[from + f] = {double(last.m), last.e};
              }
              if (d.lane == 0) {
                before = zero_number<Real>();
                if (d.warp > 0) before = ring[ring_at(d.warp - 1, chunk, f)];
                if (from_boundary) {
                  const Number<double> x = d.boundary[from + f];
                  before = {Real(x.m), x.e};
                }
              }
            } else if (d.lane == 0) {
              before = zero_number<Real>();
            }
#pragma unroll
            for (int j = kPairs - 1; j >= 0; j--) {
              const Number<Real> neighbour = j > 0 ? label[j > 0 ? j - 1 : 0] : before;
              const Number<Real> x = add(blank[j], neighbour);
              const Number<Real> y = add(label[j], skip[j] ? x : blank[j]);
              if (kSecond) {
                const Real inverse = Real(sizeof(Real) == 8 ? likelihood.wide_inverse_m
                                                            : double(likelihood.inverse_m));
                const Real gamma = y.m * Real(met[f][j].m) * inverse *
                                   power_of_two<Real>(y.e + met[f][j].e, -likelihood.e);
                occupancy_row[place[j]] = Float(gamma);
              }
              blank[j] = {x.m * Real(p_blank[f].m), x.e + p_blank[f].e};
              label[j] = {y.m * Real(p_label[f][j].m), y.e + p_label[f][j].e};
              if (!kSecond && d.stores) {
                stored_row[place[j]] = {Float(label[j].m), label[j].e};
              }
            }
            if (kSecond) {
              occupancy_row += row_step;
            } else {
              stored_row += row_step;
            }
            load_frame(f);
          }
#pragma unroll
          for (int j = 0; j < kPairs; j++) {
            blank[j] = normalised(blank[j]);
            label[j] = normalised(label[j]);
          }
        }
      }
      if (kRing) __syncthreads();
    }
    if (!kSecond) {
#pragma unroll
      for (int j = 0; j < kPairs; j++) {
        if (first + j <= d.S) states[first + j] = {blank[j], label[j]};
      }
    }
  }
}

// The likelihood at frame `middle`, from alpha before that frame and beta after it.
template <class Real>
KDKERNELS_DEVICE Number<double> meet(const Pair<Real>* alpha, const Pair<Real>* beta, int S,
                                     const int32_t* label) {
  Number<double> sum{1, 2 * kZeroState};
  for (int k = threadIdx.x; k <= S; k += blockDim.x) {
    const Pair<Real> a = alpha[k], b = beta[S - k];
    const Number<Real> x = k > 0 ? add(a.blank, alpha[k - 1].label) : a.blank;
    sum = add(normalised(sum), {double(x.m) * double(b.blank.m), x.e + b.blank.e});
    if (k < S) {
      const bool skip = k > 0 && label[k] != label[k - 1];
      const Number<Real> y = add(a.label, skip ? x : a.blank), b_label = beta[S - 1 - k].label;
      sum = add(normalised(sum), {double(y.m) * double(b_label.m), y.e + b_label.e});
    }
  }
  const Group<true> block(0);
  const int e = int(block.reduce<Max>(double(sum.e)));
  return {block.reduce<Sum>(sum.m * power_of_two<double>(sum.e, -e)), e};
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
  d.forward = warp < d.warps;
  d.warp = d.forward ? warp : warp - d.warps;
  d.lane = int(threadIdx.x) % 32;
  d.T = u.frames, d.S = u.labels;
  d.label = p.label + u.base;
  d.emissions = p.emissions_of(u, n);
  d.pitch = p.emission_pitch(u);
  d.by_class = p.by_class;
  d.blank_column = p.by_class ? int(p.blank) : 0;
  d.stored = p.stored + p.T * u.base;
  d.occupancy = p.occupancy + p.T * u.base;
  d.boundary = p.boundary + (2 * n + (d.forward ? 0 : 1)) * p.T;
  d.stores = occupancies;

  const double normalisers =
      block_sum(u.frames, [&](int64_t t) { return log1p(p.rest[n * p.T + t]); });
  if (!(normalisers < double(kInfinity))) {
    if (threadIdx.x == 0) p.utterance_loss[n] = normalisers - normalisers;
    return;
  }
  const int middle = u.frames / 2, ahead = d.forward ? middle : u.frames - middle;
  const int chunks = (u.frames - middle + kFrames - 1) / kFrames;
  const auto meeting = [&](auto* all) {
    auto* const alpha = all + 2 * u.base;
    auto* const beta = alpha + u.labels + 1;
    using Real = decltype(alpha->blank.m);
    run_half<Real, Float, kPairs, kFrames, kRing, false>(d, 0, ahead, chunks,
                                                         d.forward ? alpha : beta, {});
    __syncthreads();
    return meet(alpha, beta, u.labels, d.label);
  };
  Number<double> z = meeting(p.states);
  if (z.e < kZeroLikelihood || !(z.m > 0)) return;  // the loss stays infinite
  double loss = normalisers - (double(z.e) * kLn2 + log(z.m));

  if (occupancies) {
    Pair<Float>* const states = p.states + 2 * u.base + (d.forward ? 0 : u.labels + 1);
    const Likelihood likelihood{float(1 / z.m), 1 / z.m, z.e};
    run_half<Float, Float, kPairs, kFrames, kRing, true>(d, ahead, u.frames, chunks, states,
                                                         likelihood);
  }
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
