// What a call of ctc_loss, ctc_kd_loss, ctc_posteriors or ctc_align asks for, and the memory
// between its kernels.

#pragma once

#include "cuda/divergence_row.cuh"
#include "cuda/rows.cuh"

namespace kdkernels {
namespace cuda {

// m * 2^e, one exponent a number: nothing underflows.
template <class Real>
struct alignas(2 * sizeof(Real)) Number {
  Real m;
  int e;
};

// Exponents: that of a state with probability 0, and of a symbol with probability 0. Between two
// normalisations a period of the latter may be added to the former without overflow.
constexpr int kZeroState = -(1 << 27), kZeroSymbol = kZeroState / 4;
// A likelihood below 2^kZeroLikelihood passed through a symbol with probability 0.
constexpr int kZeroLikelihood = kZeroSymbol / 2;

constexpr int kAhead = 8;            // frames that are loaded ahead, past both ends of an utterance
constexpr int kPeriod = 2 * kAhead;  // utterances have whole periods of frames

template <class Real>
struct Pair {  // blank k and label k of one direction
  Number<Real> blank, label;
};

// A [T][N][C] tensor.
struct Frames {
  void* data;
  DType dtype;
  int64_t stride_t, stride_n;
  KDKERNELS_DEVICE LogitRow row(int64_t t, int64_t n) const {
    return {data ? offset(data, dtype, t * stride_t + n * stride_n) : nullptr, dtype};
  }
};

// An utterance as it is computed; its lengths are within bounds even where those given are not.
struct Utterance {
  int frames, labels;
  int runs;  // its target can be aligned as far as the lengths tell
  int bad;   // a length or label out of range
  int labelled;
  int64_t base;   // where its labels begin in the arrays of labels
  int64_t slab;   // its first slab, see `width`
  double weight;  // sum over its frames of their weights
};

template <class Float>
struct CTCProblem {
  int64_t T, N, C, S;  // S: a bound for the labels of an utterance that can be aligned
  Frames logits, teacher, grad, grad_teacher;
  Integers targets, input_lengths, target_lengths;
  int64_t target_stride_n, target_stride, targets_size;  // stride_n < 0: one after the other
  int64_t input_length_stride, target_length_stride, blank;
  bool zero_infinity, posteriors;
  const uint8_t* labelled;   // or null: all
  const void* frame_weight;  // or null: all ones
  int64_t weight_dtype, weight_stride_t, weight_stride_n;
  double ctc_weight, kd_weight, student_scale, teacher_scale, kd_factor, beta;
  Divergence divergence;
  Reduction reduction;
  Float *loss, *ctc, *kd;  // or null
  bool by_class;           // emissions are of every class, not of the target's labels

  // Tables of the recursion are slabs of [frames()][width], one for each `width` positions: label k
  // is at position k + 1, between two that have no label.
  int width;  // 32, 64 or 128

  // Workspace. Arrays of labels hold labels(n) + 1 elements of each utterance, from its base on.
  Utterance* utterances;           // [N]
  double* totals;                  // labelled utterances, weight of all frames
  unsigned* counter;               // of blocks
  int32_t *label, *next, *first;   // labels; the next equal one or -1; whether none before is equal
  Float* max;                      // [N][T] largest logit
  double* rest;                    // [N][T] sum of exp(logit - max), less 1
  Number<Float>* blank_emissions;  // [N][frames()] exp(logit - max)
  Number<Float>* emissions;        // slabs, or, by_class, one of each utterance: see emission_at
  Number<Float>* stored;           // slabs: labels of the first halves, as their direction has them
  Float* occupancy;                // slabs: of each label, as its direction has it
  Pair<Float>* states;             // [2][width] of each slab: where the directions meet
  Pair<double>* wide_states;       // the same
  Number<double>* boundary;        // [N][2][frames()] label before a tile of pairs
  double *utterance_loss, *utterance_kd, *frame_kd;  // [N], [N], [N][T]

  KDKERNELS_DEVICE bool is_labelled(int64_t n) const { return !labelled || labelled[n]; }
  KDKERNELS_DEVICE double weight(int64_t t, int64_t n) const {
    if (!frame_weight) return 1.0;
    const int64_t i = t * weight_stride_t + n * weight_stride_n;
    if (weight_dtype == 4) return static_cast<const uint8_t*>(frame_weight)[i] ? 1.0 : 0.0;
    return load(frame_weight, DType(weight_dtype), i);
  }
  // Frames are padded by certain blanks to whole periods, which changes no probability: the halves
  // are equal, and of whole chunks.
  __host__ __device__ int64_t frames() const { return (T + kPeriod - 1) / kPeriod * kPeriod; }
  KDKERNELS_DEVICE int frames(const Utterance& u) const {
    return (u.frames + kPeriod - 1) / kPeriod * kPeriod;
  }
  // The first slab of utterance n, before whose target `labels` labels lie, if targets are
  // concatenated.
  __host__ __device__ int64_t slab_of(int64_t n, int64_t labels) const {
    return target_stride_n < 0 ? (labels + 2 * n) / width + n : n * ((S + 1 + width) / width);
  }
  KDKERNELS_DEVICE int slabs(const Utterance& u) const { return (u.labels + 1 + width) / width; }
  // Where position `i` of frame 0 lies in a table of slabs; a frame on, it is `width` further.
  KDKERNELS_DEVICE int64_t at(const Utterance& u, int i) const {
    return (u.slab + i / width) * frames() * width + i % width;
  }
  // The symbol of label k, of class c, in frame 0; or, for k = -1, one of probability 0.
  KDKERNELS_DEVICE int64_t emission_at(const Utterance& u, int64_t n, int k, int c) const {
    return by_class ? n * frames() * width + (k < 0 ? 0 : c + 1) : at(u, k + 1);
  }
  KDKERNELS_DEVICE double ctc_divisor() const {
    return reduction == Reduction::mean && totals[0] > 1 ? totals[0] : 1.0;
  }
  KDKERNELS_DEVICE double kd_divisor() const {
    if (reduction != Reduction::mean) return 1;
    return totals[1] != 0 ? totals[1] : double(kInfinity);  // weights that add up to 0: a mean of 0
  }
  // d(returned loss) / d(loss of n).
  KDKERNELS_DEVICE double ctc_scale(const Utterance& u, int64_t n) const {
    if (posteriors) return utterance_loss[n] == utterance_loss[n] ? -1.0 : utterance_loss[n];
    if (!u.labelled || ctc_weight == 0 || utterance_loss[n] == double(kInfinity)) return 0;
    if (utterance_loss[n] != utterance_loss[n]) return utterance_loss[n];
    const bool divide = reduction == Reduction::mean && u.labels > 1;
    return ctc_weight / ctc_divisor() / (divide ? double(u.labels) : 1.0);
  }
};

// Takes pieces out of a workspace, or, without memory, counts what it must hold.
class Pieces {
 public:
  explicit Pieces(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  void take(T*& piece, int64_t n) {
    piece = reinterpret_cast<T*>(memory_ + used_);
    used_ += (n * int64_t(sizeof(T)) + 255) / 256 * 256;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// Sizes must stand in `p`, and whether targets are concatenated. Returns the bytes used.
template <class Float>
int64_t lay_out(CTCProblem<Float>& p, void* memory, bool recursion) {
  const bool concatenated = p.target_stride_n < 0;
  const int64_t labels = concatenated ? p.targets_size + p.N : p.N * (p.S + 1);
  const int64_t positions = p.S + 2;
  p.width = positions <= 32 ? 32 : positions <= 256 || sizeof(Float) == 8 ? 64 : 128;
  // One after the other, targets may be short, though one that takes all labels is not.
  if (concatenated && p.N > 0 && p.width > 64 && p.targets_size / p.N < 64) p.width = 64;
  p.by_class = p.C < p.width;
  Pieces pieces(memory);
  pieces.take(p.utterances, p.N);
  pieces.take(p.totals, 2);
  pieces.take(p.counter, 1);
  pieces.take(p.label, labels);
  pieces.take(p.next, labels);
  pieces.take(p.first, labels);
  pieces.take(p.max, p.N * p.T);
  pieces.take(p.rest, p.N * p.T);
  pieces.take(p.utterance_loss, p.N);
  pieces.take(p.utterance_kd, p.N);
  pieces.take(p.frame_kd, p.N * p.T);
  if (recursion) {
    const int64_t slabs = p.slab_of(p.N, p.targets_size), row = p.width, frames = p.frames();
    const int64_t margin = kAhead * row;
    Number<Float>* before;
    pieces.take(before, margin);
    pieces.take(p.blank_emissions, p.N * frames);
    pieces.take(before, margin);
    pieces.take(p.emissions, (p.by_class ? p.N : slabs) * frames * row);
    pieces.take(before, margin);
    pieces.take(p.stored, slabs * frames * row);
    pieces.take(before, margin);
    pieces.take(p.occupancy, slabs * frames * row);
    pieces.take(p.states, 2 * slabs * row);
    pieces.take(p.wide_states, 2 * slabs * row);
    pieces.take(p.boundary, p.N * 2 * frames);
  }
  return pieces.used();
}

}  // namespace cuda
}  // namespace kdkernels
