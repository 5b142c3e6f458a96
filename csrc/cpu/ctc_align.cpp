// ctc_align on the CPU: the best path of each utterance (Viterbi), in float64 so that it is the
// best one. Stored: one byte a state and frame, saying where its best path came from.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/arena.h"
#include "cpu/ctc_rows.h"
#include "cpu/kernels.h"
#include "cpu/row.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// Which state of the frame before: the same one, the one before it, or the label before the blank.
enum Step : uint8_t { stay = 0, advance = 1, skip = 2 };

template <class Float>
struct Viterbi {
  Float* logits;                // [C], scratch
  double *blank[2], *label[2];  // [S + 1] best log-probability of a path to blank k, to label k
  uint8_t *from_blank, *from_label;  // [T][S + 1]

  Viterbi(Arena& arena, int64_t T, int64_t C, int64_t S) {
    logits = arena.take<Float>(C);
    for (int i = 0; i < 2; i++) {
      blank[i] = arena.take<double>(S + 1);
      label[i] = arena.take<double>(S + 1);
    }
    from_blank = arena.take<uint8_t>(T * (S + 1));
    from_label = arena.take<uint8_t>(T * (S + 1));
  }

  // Fills path [T] and returns its log-probability.
  template <class Row>
  double run(int64_t T, int64_t C, int64_t S, const int64_t* labels, int64_t blank_class, Row row,
             int64_t* path) {
    std::fill(path, path + T, int64_t(-1));
    if (T == 0) return S == 0 ? 0.0 : -kInf;
    // Before the first frame the path is in the first blank.
    std::fill(blank[0], blank[0] + S + 1, -kInf);
    std::fill(label[0], label[0] + S + 1, -kInf);
    blank[0][0] = 0;
    for (int64_t t = 0; t < T; t++) {
      const Float* const x = row(t, logits);
      SoftmaxRow<Float> s{x, nullptr, nullptr, nullptr, false, 0, 0};
      softmax_rows(&s, 1, C, 0);
      if (!s.valid) return std::numeric_limits<double>::quiet_NaN();
      const double log_sum = double(s.max) + std::log1p(s.rest);
      const double *const b = blank[t & 1], *const l = label[t & 1];
      double *const next_b = blank[(t + 1) & 1], *const next_l = label[(t + 1) & 1];
      uint8_t *const from_b = from_blank + t * (S + 1), *const from_l = from_label + t * (S + 1);
      for (int64_t k = 0; k <= S; k++) {
        double best = b[k];
        from_b[k] = stay;
        if (k > 0 && l[k - 1] > best) best = l[k - 1], from_b[k] = advance;
        next_b[k] = best + (double(x[blank_class]) - log_sum);
        if (k == S) break;
        best = l[k];
        from_l[k] = stay;
        if (b[k] > best) best = b[k], from_l[k] = advance;
        if (k > 0 && labels[k] != labels[k - 1] && l[k - 1] > best) {
          best = l[k - 1], from_l[k] = skip;
        }
        next_l[k] = best + (double(x[labels[k]]) - log_sum);
      }
    }
    double score = blank[T & 1][S];
    bool on_label = S > 0 && label[T & 1][S - 1] > score;
    int64_t k = on_label ? S - 1 : S;
    if (on_label) score = label[T & 1][S - 1];
    if (score == -kInf) return score;
    for (int64_t t = T - 1; t >= 0; t--) {
      path[t] = on_label ? labels[k] : blank_class;
      const uint8_t step = on_label ? from_label[t * (S + 1) + k] : from_blank[t * (S + 1) + k];
      if (step == stay) continue;
      if (!on_label || step == skip) k--;
      on_label = !on_label || step == skip;
    }
    return score;
  }
};

template <class Float>
int64_t piece_of(int64_t T, int64_t C, int64_t S) {
  Arena arena(nullptr);
  Viterbi<Float>(arena, T, C, S);
  return arena.used();
}

}  // namespace

int64_t ctc_align_workspace(int64_t T, int64_t, int64_t C, int64_t S, int64_t threads) {
  return threads * std::max(piece_of<float>(T, C, S), piece_of<double>(T, C, S));
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
      Arena arena(static_cast<char*>(workspace) + omp_get_thread_num() * piece);
      Viterbi<Float> viterbi(arena, T, C, S);
#pragma omp for schedule(dynamic)
      for (int64_t n = 0; n < N; n++) {
        const auto row = [&](int64_t t, Float* scratch) {
          const void* x = offset(logits, DType(dtype), t * stride_t + n * stride_n);
          return load_row<Float>(x, DType(dtype), C, scratch);
        };
        int64_t* const path = paths + n * T;
        static_cast<Float*>(scores)[n] = Float(viterbi.run(
            input_lengths[n], C, target_lengths[n], targets + target_offsets[n], blank, row, path));
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
