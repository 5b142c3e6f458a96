// Any divergence between the distributions of two rows of logits and its gradients with respect to
// both, in float64: for float64 logits, and for what is a difference of logarithms of float32 ones,
// which float32 would round to more than is left of it. Series have as many terms as a result of
// the logits' type needs. The case that training spends most of its time in is in kl_rows.h.
//
// p and q are softmax(p_logits / p_temperature) and the same of q; d = log p - log q.

#pragma once

#include <cstdint>

#include "kdkernels.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {

// One row of both logits, [C] each, scaled by inverse temperatures.
template <class Float>
struct RowPair {
  const Float *p_logits, *q_logits;
  double p_scale, q_scale;
  int64_t C;
  // [C], scratch: exp of the scaled logits less their maximum; log m/p and log m/q, m the mixture
  double *p_exp, *q_exp, *p_log, *q_log;
};

// Where the gradients go, [C] each (null: not wanted), and the factor of each.
template <class Float>
struct RowGradients {
  Float *p, *q;
  double p_factor, q_factor;
};

// The mixture m = beta p + alpha q of the Jensen-Shannon divergence.
struct Mixture {
  explicit Mixture(double beta);
  static constexpr int kTerms = 9;
  double beta, alpha, log_beta, log_alpha;
  double series[kTerms];  // log m/p + alpha d = d^2 (series[0] + series[1] d + ...) for small d
};

// The divergence of a pair of rows, which for forward_kl are (teacher, student); NaN where a row
// has one, an infinity, or no class left.
template <class Float>
double divergence_row(Divergence divergence, const Mixture& mixture, const RowPair<Float>& row,
                      const RowGradients<Float>& grad);

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
