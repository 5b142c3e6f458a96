// KL(p || q) of several rows of float32 logits and its gradients: the case that training spends its
// time in.

#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {

// Rows that go through the steps together: as many as stay in the first cache.
constexpr int kMaxRows = kLanes<float>;
inline int rows_in_block(int64_t C) { return int(std::clamp<int64_t>(2048 / C, 1, kMaxRows)); }

// Pairs of rows, of [C] each.
template <class Float>
struct DivergenceRows {
  const Float *p[kMaxRows], *q[kMaxRows];      // logits
  Float *grad_p[kMaxRows], *grad_q[kMaxRows];  // (out), or null; none of the logits
  double factor[kMaxRows];                     // of the gradients
  double value[kMaxRows];                      // (out) the divergences
};
using KLRows = DivergenceRows<float>;

// What of a row float32 would round to more than it may, and is for divergence.h to make. What one
// gradient is made from does not depend on whether the other is wanted.
struct Left {
  bool value = true, grad_p = true, grad_q = true;
};

struct KLScales {
  float p, q;  // 1 / temperature
  // Elements from a row to the one that takes its place in the next block: fetched while this one
  // is computed, since rows are too short for the hardware to notice where they go on.
  int64_t p_ahead, q_ahead;
  bool past_caches;  // where the gradients go
};

// n <= rows_in_block(C) rows; scratch [n][2][C]; left [n] (out). A row with a NaN, an infinity or
// no class left gets NaN, or is left; with only_far every row whose divergence or gradients are
// small is.
void kl_rows(KLRows& rows, int n, int64_t C, KLScales scale, bool only_far, float* scratch,
             Left* left);

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
