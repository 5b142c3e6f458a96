// KL(p || q) of several rows of float32 logits and its gradient with respect to q's logits: the
// case that training spends its time in.

#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {

// One pair of rows. Here p is the teacher's, q the student's; grad_teacher is not looked at.
template <class Float>
struct DivergenceRow {
  const Float *student, *teacher;      // [C] logits
  Float *grad_student, *grad_teacher;  // [C] (out), or null; none of the logits
  double factor;                       // of the gradients
  double value;                        // (out) the divergence
};
using KLRow = DivergenceRow<float>;

struct KLScales {
  float p, q;  // 1 / temperature
  // Elements from a row to the one that takes its place in the next block: fetched while this one
  // is computed, since rows are too short for the hardware to notice where they go on.
  int64_t p_ahead, q_ahead;
};

// Rows that go through the steps together: as many as stay in the first cache.
constexpr int kMaxRows = kLanes<float>;
inline int rows_in_block(int64_t C) { return int(std::clamp<int64_t>(2048 / C, 1, kMaxRows)); }

// n <= rows_in_block(C) rows; scratch [n][2][C]. A row with a NaN, an infinity or no class left
// gets NaN.
void kl_rows(KLRow* rows, int n, int64_t C, KLScales scale, float* scratch);

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
