#include "cpu/divergence.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/simd_lanes.h"
#include "cpu/simd_math.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {
namespace {

struct RowNormalisers {
  bool valid;           // no NaN, no infinity, at least one class left
  double p_max, q_max;  // largest logits
  double p, q;          // 1 / sum of the exponentials
  double shift;         // d = the difference of the scaled logits, less their maxima, + shift
};

RowNormalisers row_normalisers(const RowPair& row) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  RowNormalisers s{};
  VecF64 p_max = broadcast(-kInf), q_max = p_max, p_sum{}, q_sum{};
  VecI64 nan{};
  for_each_vector<double>(row.C, [&](int64_t c, int n) {
    const VecF64 p = load_n(row.p_logits + c, n, -kInf), q = load_n(row.q_logits + c, n, -kInf);
    nan |= (p != p) | (q != q);
    p_max = max(p_max, p);
    q_max = max(q_max, q);
  });
  s.p_max = reduce_max(p_max);
  s.q_max = reduce_max(q_max);
  s.valid = !any(nan) && std::fabs(s.p_max) < kInf && std::fabs(s.q_max) < kInf;
  if (!s.valid) return s;
  for_each_vector<double>(row.C, [&](int64_t c, int n) {
    const VecF64 p = load_n(row.p_logits + c, n, -kInf), q = load_n(row.q_logits + c, n, -kInf);
    const VecF64 p_exp = exp<double>(p - s.p_max, row.p_scale);
    const VecF64 q_exp = exp<double>(q - s.q_max, row.q_scale);
    p_sum += p_exp;
    q_sum += q_exp;
    store_n(row.p_exp + c, p_exp, n);
    store_n(row.q_exp + c, q_exp, n);
  });
  s.p = 1 / reduce_add(p_sum);
  s.q = 1 / reduce_add(q_sum);
  s.shift = std::log(s.p / s.q);
  return s;
}

struct Classes {  // a vector of them
  VecF64 p, q, d;
  VecF64 q_minus_p, kl;  // kl = p d + q - p, the term of KL(p || q): never negative
};

KDKERNELS_INLINE Classes classes_at(const RowPair& row, const RowNormalisers& s, int64_t c, int n) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  const VecF64 p_logit = load_n(row.p_logits + c, n, -kInf);
  const VecF64 q_logit = load_n(row.q_logits + c, n, -kInf);
  Classes x;
  x.p = load_n(row.p_exp + c, n, 0.0) * s.p;
  x.q = load_n(row.q_exp + c, n, 0.0) * s.q;
  const VecF64 p_less = p_logit - s.p_max, q_less = q_logit - s.q_max;
  // One product where there is one temperature: identical rows have d = 0 exactly.
  x.d = s.shift + (row.p_scale == row.q_scale ? (p_less - q_less) * row.p_scale
                                              : p_less * row.p_scale - q_less * row.q_scale);
  // Where the two are close, from d: the difference of p and q would have lost its digits.
  const VecF64 plus = expm1_plus<double>(x.d);
  const auto close = abs<double>(x.d) < 0.25;
  x.q_minus_p = close ? x.p * (plus - x.d) : x.q - x.p;
  x.kl = close ? x.p * plus : x.q_minus_p + (x.p > 0 ? x.p * x.d : VecF64{});
  return x;
}

// KL(p || q); gradients q - p with respect to q's logits and p (d - KL) with respect to p's.
double kl_row(const RowPair& row, const RowNormalisers& s, const RowGradients& grad) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  VecF64 sum{};
  for_each_vector<double>(row.C, [&](int64_t c, int n) {
    const Classes x = classes_at(row, s, c, n);
    sum += x.kl;
    if (grad.q) {
      const VecF64 logit = load_n(row.q_logits + c, n, -kInf);
      store_n(grad.q + c, logit > -kInf ? x.q_minus_p * grad.q_factor : VecF64{}, n);
    }
  });
  const double kl = reduce_add(sum);
  if (grad.p) {
    for_each_vector<double>(row.C, [&](int64_t c, int n) {
      const Classes x = classes_at(row, s, c, n);
      const VecF64 gradient = x.p * (x.d - kl) * grad.p_factor;
      // An infinite divergence has no gradient with respect to p.
      store_n(grad.p + c, kl < kInf ? (x.p > 0 ? gradient : VecF64{}) : VecF64{}, n);
    });
  }
  return kl;
}

// x - log(1 + x) for |x| < 0.3: never negative.
KDKERNELS_INLINE VecF64 minus_log1p(VecF64 x) {
  const VecF64 r = x / (x + 2.0);
  return x * r - (artanh_ratio(r) - 2.0) * r;
}

// beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; gradients
// beta p (log p/m - KL(p || m)) and (1 - beta) q (log q/m - KL(q || m)).
double jsd_row(const RowPair& row, const RowNormalisers& s, const RowGradients& grad, double beta) {
  const double alpha = 1 - beta;
  VecF64 p_sum{}, q_sum{}, sum{};
  // log m/p and log m/q: from the one that is the logarithm of a number below 1, or, where the two
  // are close, from m/p - 1 and m/q - 1.
  const auto logs = [&](const Classes& x, VecF64& log_m_p, VecF64& log_m_q) {
    const VecF64 size = abs<double>(x.d);
    const auto p_larger = x.d >= 0, close = size < 0.25;
    const VecF64 drop =
        (p_larger ? broadcast(alpha) : broadcast(beta)) * (exp<double>(-size) - 1.0);
    const VecF64 lower = log1p(drop);
    const VecF64 d = close ? x.d : VecF64{};
    const VecF64 v = alpha * (expm1_plus<double>(d) - d), w = beta * (expm1_plus<double>(-d) + d);
    const VecF64 v_rest = minus_log1p(v), w_rest = minus_log1p(w);
    log_m_p = close ? v - v_rest : p_larger ? lower : lower + size;
    log_m_q = close ? w - w_rest : p_larger ? lower + size : lower;
    // The term of the divergence; the first-order parts v and w cancel.
    const VecF64 terms =
        beta * (x.p > 0 ? x.p * log_m_p : VecF64{}) + alpha * (x.q > 0 ? x.q * log_m_q : VecF64{});
    return close ? beta * x.p * v_rest + alpha * x.q * w_rest : -terms;
  };
  for_each_vector<double>(row.C, [&](int64_t c, int n) {
    const Classes x = classes_at(row, s, c, n);
    VecF64 log_m_p, log_m_q;
    sum += logs(x, log_m_p, log_m_q);
    const VecF64 p_term = x.p > 0 ? -x.p * log_m_p : VecF64{};
    const VecF64 q_term = x.q > 0 ? -x.q * log_m_q : VecF64{};
    p_sum += p_term;
    q_sum += q_term;
    if (grad.p) store_n(grad.p + c, p_term, n);
    if (grad.q) store_n(grad.q + c, q_term, n);
  });
  const double p_kl = reduce_add(p_sum), q_kl = reduce_add(q_sum);
  for_each_vector<double>(row.C, [&](int64_t c, int n) {
    if (grad.p) {
      const VecF64 p = load_n(row.p_exp + c, n, 0.0) * s.p, term = load_n(grad.p + c, n, 0.0);
      store_n(grad.p + c, (term - p * p_kl) * (beta * grad.p_factor), n);
    }
    if (grad.q) {
      const VecF64 q = load_n(row.q_exp + c, n, 0.0) * s.q, term = load_n(grad.q + c, n, 0.0);
      store_n(grad.q + c, (term - q * q_kl) * (alpha * grad.q_factor), n);
    }
  });
  return reduce_add(sum);
}

}  // namespace

double divergence_row(Divergence divergence, double beta, const RowPair& row,
                      const RowGradients& grad) {
  const RowNormalisers s = row_normalisers(row);
  if (!s.valid) {
    constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
    if (grad.p) std::fill(grad.p, grad.p + row.C, kNan);
    if (grad.q) std::fill(grad.q, grad.q + row.C, kNan);
    return kNan;
  }
  return divergence == Divergence::jsd ? jsd_row(row, s, grad, beta) : kl_row(row, s, grad);
}

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
