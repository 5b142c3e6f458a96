// ctc_align on the CPU: the best path of each utterance (Viterbi), in float64 so that it is the
// best one. Paths differ in their logits alone: what the softmax of each frame divides by is left
// to the score. States are pairs of blank k and label k, as alpha's in ctc_recursion.h. Stored:
// where their best paths came from, three bits a pair and frame.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/arena.h"
#include "cpu/ctc_rows.h"
#include "cpu/ctc_target.h"
#include "cpu/flush_to_zero.h"
#include "cpu/kernels.h"
#include "cpu/kl_rows.h"
#include "cpu/row.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// Of a vector of pairs, a bit of each byte for each: the blank's best path came from the label
// before it, the label's from the blank before it, from the label before that one (which wins).
// Else from itself.
struct Steps {
  uint8_t blank_advances, label_advances, label_skips;
};

template <class Float>
class Viterbi {
 public:
  static constexpr int W = kLanes<double>;

  Viterbi(Arena& arena, int64_t T, int64_t C, int64_t S) : target_(arena, C, S) {
    const int64_t width = whole_vectors(S + 1);
    logits_ = arena.take<Float>(rows_in_block(C) * C);
    label_logits_ = arena.take<Float>(width);
    rest_ = arena.take<double>(T);
    skip_ = arena.take<int64_t>(width);
    blank_ = arena.take<double>(width);
    label_ = arena.take<double>(width);
    steps_ = arena.take<Steps>(T * (width / W));
  }

  // Fills path [T] and returns its log-probability. row(t, scratch): the logits of frame t;
  // `ahead`: elements from a row to the next.
  template <class Row>
  double run(int64_t T, int64_t C, int64_t S, const int64_t* labels, int64_t blank_class, Row row,
             int64_t ahead, int64_t* path) {
    std::fill(path, path + T, int64_t(-1));
    target_.begin(labels, S, C, blank_class);
    if (T < target_.frames()) return -kInf;  // whatever the frames hold
    begin(T, S);
    const int64_t block = std::min<int64_t>(kLanes<Float>, rows_in_block(C));
    for (int64_t t = 0; t < T; t += block) {
      const int n = int(std::min(block, T - t));
      SoftmaxRow<Float> rows[kLanes<Float>] = {};
      for (int i = 0; i < n; i++) rows[i].logits = row(t + i, logits_ + i * C);
      softmax_rows(rows, n, C, ahead * block, {});
      for (int i = 0; i < n; i++) {
        if (!rows[i].valid) return std::numeric_limits<double>::quiet_NaN();
        rest_[t + i] = rows[i].rest;
        target_.gather(rows[i].logits, label_logits_);
        step(t + i, double(rows[i].logits[blank_class]), double(rows[i].max));
      }
    }
    const bool on_label = S > 0 && label_[S - 1] > blank_[S];
    const double score = on_label ? label_[S - 1] : blank_[S];
    if (score == -kInf) return score;
    trace_back(on_label, blank_class, path);
    return score - log_divisors();
  }

 private:
  static int64_t whole_vectors(int64_t n) { return (n + W - 1) / W * W; }

  // Before the first frame the path is in the first blank.
  void begin(int64_t T, int64_t S) {
    T_ = T, S_ = S, vectors_ = whole_vectors(S + 1) / W;
    std::fill(label_logits_ + S, label_logits_ + vectors_ * W, Float(-kInf));
    std::fill(blank_, blank_ + vectors_ * W, -kInf);
    std::fill(label_, label_ + vectors_ * W, -kInf);
    blank_[0] = 0;
    std::copy(target_.skip(), target_.skip() + vectors_ * W, skip_);
  }

  // Frame t, in the vectors with a state that can be reached and can still reach the end.
  void step(int64_t t, double blank_logit, double max_logit) {
    const int64_t low = std::max<int64_t>(0, S_ - (T_ - t)) / W, high = std::min(S_, t) / W;
    const double p_blank = blank_logit - max_logit;
    Steps* const steps = steps_ + t * vectors_;
    VecF64 last = low > 0 ? load<VecF64>(label_ + (low - 1) * W) : broadcast(-kInf);
    for (int64_t j = low; j <= high; j++) {
      const VecF64 blank = load<VecF64>(blank_ + j * W), label = load<VecF64>(label_ + j * W);
      const VecF64 before = shift_up(last, label), from_blank = max(blank, label);
      const auto skips = (before > from_blank) & load<VecI64>(skip_ + j * W);
      steps[j] = {uint8_t(lane_bits(before > blank)), uint8_t(lane_bits(blank > label)),
                  uint8_t(lane_bits(skips))};
      store(blank_ + j * W, max(blank, before) + p_blank);
      store(label_ + j * W, (skips ? before : from_blank) +
                                (load_wide(label_logits_ + j * W, W, Float(0)) - max_logit));
      last = label;
    }
  }

  void trace_back(bool on_label, int64_t blank_class, int64_t* path) const {
    int64_t k = on_label ? S_ - 1 : S_;
    for (int64_t t = T_ - 1; t >= 0; t--) {
      path[t] = on_label ? target_.label(k) : blank_class;
      const Steps& steps = steps_[t * vectors_ + k / W];
      const int bit = int(k % W);
      if (on_label && steps.label_skips >> bit & 1) {
        k--;
      } else if (on_label) {
        on_label = !(steps.label_advances >> bit & 1);
      } else if (steps.blank_advances >> bit & 1) {
        on_label = true;
        k--;
      }
    }
  }

  // Logarithm of what the softmaxes of all frames divide by, relative to the largest logits.
  double log_divisors() {
    log2_1p(rest_, T_);
    double sum = 0;
    for (int64_t t = 0; t < T_; t++) sum += rest_[t];
    return sum * kLn2;
  }

  Target<Float> target_;
  int64_t T_ = 0, S_ = 0, vectors_ = 0;
  Float *logits_, *label_logits_;  // [rows_in_block(C)][C]; [S], then -inf
  double* rest_;                   // [T], see SoftmaxRow
  int64_t* skip_;                  // the target's, as wide as the vectors here
  double *blank_, *label_;         // log-probabilities of the best paths to them
  Steps* steps_;                   // [T][vectors]
};

template <class Float>
int64_t piece_of(int64_t T, int64_t C, int64_t S) {
  Arena arena(nullptr);
  Viterbi<Float>(arena, T, C, S);
  return arena.used();
}

}  // namespace

int64_t ctc_align_workspace(int64_t T, int64_t, int64_t C, int64_t S, int64_t wide,
                            int64_t threads) {
  return threads * (wide ? piece_of<double>(T, C, S) : piece_of<float>(T, C, S));
}

void ctc_align(int64_t T, int64_t N, int64_t C, int64_t S, const void* logits, int64_t dtype,
               int64_t stride_t, int64_t stride_n, const int64_t* targets,
               const int64_t* target_offsets, const int64_t* input_lengths,
               const int64_t* target_lengths, int64_t blank, int64_t* paths, void* scores,
               void* workspace, int64_t threads) {
  const auto run = [&](auto zero) {
    using Float = decltype(zero);
    const int64_t piece = piece_of<Float>(T, C, S);
#pragma omp parallel num_threads(int(threads)) if (threads > 1 && N > 1)
    {
      const FlushToZero flush;
      Arena arena(static_cast<char*>(workspace) + omp_get_thread_num() * piece);
      Viterbi<Float> viterbi(arena, T, C, S);
#pragma omp for schedule(dynamic)
      for (int64_t n = 0; n < N; n++) {
        const auto row = [&](int64_t t, Float* scratch) {
          const void* x = offset(logits, DType(dtype), t * stride_t + n * stride_n);
          return load_row<Float>(x, DType(dtype), C, scratch);
        };
        int64_t* const path = paths + n * T;
        static_cast<Float*>(scores)[n] =
            Float(viterbi.run(input_lengths[n], C, target_lengths[n], targets + target_offsets[n],
                              blank, row, stride_t, path));
        std::fill(path + input_lengths[n], path + T, int64_t(-1));
      }
    }
  };
  if (DType(dtype) == DType::float64) {
    run(double());
  } else {
    run(float());
  }
}

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
