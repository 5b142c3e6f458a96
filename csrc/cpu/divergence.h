// Any divergence between the distributions of two rows of logits and its gradients with respect to
// both, in float64: for float64 logits, and for the gradients of float32 ones that are differences
// of logarithms, which float32 would round to more than is left of them. The case that training
// spends its time in is in kl_rows.h.
//
// p and q are softmax(p_logits / p_temperature) and the same of q; d = log p - log q.

#pragma once

#include <cstdint>

#include "kdkernels.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {

// One row of both logits, [C] each, scaled by inverse temperatures.
struct RowPair {
  const double *p_logits, *q_logits;
  double p_scale, q_scale;
  int64_t C;
  double *p_exp, *q_exp;  // [C], scratch: exp of the scaled logits less their maximum
};

// Where the gradients go, [C] each (null: not wanted), and the factor of each.
struct RowGradients {
  double *p, *q;
  double p_factor, q_factor;
};

// The divergence of a pair of rows, which for forward_kl are (teacher, student); NaN where a row
// has one, an infinity, or no class left.
double divergence_row(Divergence divergence, double beta, const RowPair& row,
                      const RowGradients& grad);

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
