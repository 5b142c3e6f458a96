// Viterbi: the best path of each utterance, a block each, in float64 so that it is the best one.
// Stored: one byte a state and frame, saying where its best path came from.

#pragma once

#include "cuda/ctc_problem.cuh"

namespace kdkernels {
namespace cuda {

struct AlignProblem {
  int64_t* paths;      // [N][T] (out)
  void* scores;        // [N] (out)
  double* best;        // [N][2][2][S + 1] log-probability of the best path to blank k, to label k
  uint8_t* came_from;  // [N][T][S + 1]: of blank k, and of label k times 4
};

// Which state of the frame before: the same one, the one before it, or the label before the blank.
enum Step : int { stay = 0, advance = 1, skip = 2 };

template <class Float>
__global__ void align_kernel(CTCProblem<Float> p, AlignProblem a) {
  const int64_t n = blockIdx.x;
  const Utterance u = p.utterances[n];
  const double infinity = double(kInfinity);
  int64_t* const path = a.paths + n * p.T;
  for (int64_t t = threadIdx.x; t < p.T; t += blockDim.x) path[t] = -1;
  double score = -p.utterance_loss[n];  // of what needs no search
  if (u.runs) {
    const int S = u.labels;
    const int64_t width = p.S + 1;
    double* const best = a.best + n * 4 * width;
    uint8_t* const came_from = a.came_from + n * p.T * width;
    const int32_t* const label = p.label + u.base;
    // Before the first frame the path is in the first blank.
    for (int k = threadIdx.x; k <= S; k += blockDim.x) {
      best[k] = k == 0 ? 0 : -infinity;
      best[width + k] = -infinity;
    }
    double nan = 0;
    for (int t = 0; t < u.frames; t++) {
      __syncthreads();
      const double *const b = best + (t & 1) * 2 * width, *const l = b + width;
      double *const next_b = best + ((t + 1) & 1) * 2 * width, *const next_l = next_b + width;
      const LogitRow row = p.logits.row(t, n);
      const double rest = p.rest[n * p.T + t];
      nan += rest - rest;
      const double log_sum = double(p.max[n * p.T + t]) + log1p(rest);
      const double p_blank = row[p.blank] - log_sum;
      for (int k = threadIdx.x; k <= S; k += blockDim.x) {
        const double before = k > 0 ? l[k - 1] : -infinity;
        double top = b[k];
        int from = stay;
        if (before > top) top = before, from = advance;
        next_b[k] = top + p_blank;
        int label_from = stay;
        if (k < S) {
          top = l[k];
          if (b[k] > top) top = b[k], label_from = advance;
          if (k > 0 && label[k] != label[k - 1] && before > top) top = before, label_from = skip;
          next_l[k] = top + (row[label[k]] - log_sum);
        } else {
          next_l[k] = -infinity;
        }
        came_from[t * width + k] = uint8_t(from + 4 * label_from);
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      const double* const b = best + (u.frames & 1) * 2 * width;
      score = b[S];
      bool on_label = S > 0 && b[width + S - 1] > score;
      int k = on_label ? S - 1 : S;
      if (on_label) score = b[width + S - 1];
      if (nan != 0) score = infinity - infinity;
      if (nan == 0 && score > -infinity) {
        for (int t = u.frames - 1; t >= 0; t--) {
          path[t] = on_label ? label[k] : p.blank;
          const int both = came_from[t * width + k], step = on_label ? both / 4 : both % 4;
          if (step == stay) continue;
          if (!on_label || step == skip) k--;
          on_label = !on_label || step == skip;
        }
      }
    }
  }
  if (threadIdx.x == 0) static_cast<Float*>(a.scores)[n] = Float(score);
}

}  // namespace cuda
}  // namespace kdkernels
