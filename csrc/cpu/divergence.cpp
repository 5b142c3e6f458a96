#include "cpu/divergence.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/simd_lanes.h"
#include "cpu/simd_math.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
// In place of an infinite d, whose product with a probability of 0 must be 0.
constexpr double kLargest = 1e30;
// Classes with |d| below this take differences from d: that of p and q would have lost its digits.
constexpr double kClose = 1.0 / 64;

// Series for results of type Float, with their relative errors.
template <class Float>
struct Series;
template <>
struct Series<float> {
  // (expm1(-d) + d) / d^2 in -d for |d| <= kClose: 2e-10.
  static constexpr double kPlus[] = {1. / 2, 1. / 6, 1. / 24, 1. / 120};
  static constexpr int kMixture = 4;  // 6e-10
  // 2 artanh(r) / r in r^2 for r <= 1/3; least-maximum fit: 7e-14.
  static constexpr double kArtanh[] = {
      1.9999999999998737,  0.6666666668119934, 0.39999997264242493, 0.28571624027501186,
      0.22215400180111994, 0.1831004363876266, 0.1407075932464363,  0.20068155694850642};
  // A divergence above this is right as a sum of p d: the terms cancel to no less.
  static constexpr double kPlain = 1e-5;
};
template <>
struct Series<double> {  // 1e-17
  static constexpr double kPlus[] = {1. / 2,   1. / 6,    1. / 24,   1. / 120,
                                     1. / 720, 1. / 5040, 1. / 40320};
  static constexpr int kMixture = Mixture::kTerms;
  static constexpr double kArtanh[] = {2.0,
                                       0.6666666666666669,
                                       0.3999999999999287,
                                       0.28571428572622926,
                                       0.22222222119103674,
                                       0.18181823422495252,
                                       0.1538444706045997,
                                       0.13336876815743837,
                                       0.11715274668110426,
                                       0.10976616637947494,
                                       0.06980390498332432,
                                       0.16488285931389568};
  static constexpr double kPlain = 0.125;
};

struct RowNormalisers {
  double p_max, q_max;  // largest logits
  double p, q;          // 1 / sum of the exponentials
  double shift;         // d = d0 + shift, d0 the difference of the scaled logits less their maxima
  double d0_mean;       // sum of p d0, where it is wanted
  bool valid;           // no NaN, no infinity, at least one class left
};

// d0 of a vector of classes; NaN where p is masked.
template <class Float>
KDKERNELS_INLINE VecF64 difference(const RowPair<Float>& row, VecF64 p_less, VecF64 q_less) {
  return (p_less - q_less) * row.q_scale + p_less * (row.p_scale - row.q_scale);
}
template <class Float>
KDKERNELS_INLINE VecF64 difference_at(const RowPair<Float>& row, const RowNormalisers& s, int64_t c,
                                      int n) {
  constexpr Float kMasked = -std::numeric_limits<Float>::infinity();
  return difference(row, load_wide(row.p_logits + c, n, kMasked) - s.p_max,
                    load_wide(row.q_logits + c, n, kMasked) - s.q_max);
}

template <bool kWithMean, class Float>
RowNormalisers normalise(const RowPair<Float>& row) {
  constexpr Float kMasked = -std::numeric_limits<Float>::infinity();
  Vec<Float> p_high = broadcast(kMasked), q_high = p_high;
  for_each_vector<Float>(row.C, [&](int64_t c, int n) {
    p_high = max(p_high, load_n(row.p_logits + c, n, kMasked));
    q_high = max(q_high, load_n(row.q_logits + c, n, kMasked));
  });
  RowNormalisers s{};
  s.p_max = double(reduce_max(p_high));
  s.q_max = double(reduce_max(q_high));
  VecF64 p_sum{}, q_sum{}, d_sum{};
  for_each_vector<double>(row.C, [&](int64_t c, int n) {
    const VecF64 p_less = load_wide(row.p_logits + c, n, kMasked) - s.p_max;
    const VecF64 q_less = load_wide(row.q_logits + c, n, kMasked) - s.q_max;
    const VecF64 p = wide_exp<Float>(p_less, row.p_scale);
    const VecF64 q = wide_exp<Float>(q_less, row.q_scale);
    p_sum += p;
    q_sum += q;
    if constexpr (kWithMean) d_sum += p > 0 ? p * difference(row, p_less, q_less) : VecF64{};
    store_n(row.p_exp + c, p, n);
    store_n(row.q_exp + c, q, n);
  });
  const double p = reduce_add(p_sum), q = reduce_add(q_sum);
  s.valid = p == p && q == q && std::fabs(s.p_max) < kInf && std::fabs(s.q_max) < kInf;
  s.p = 1 / p;
  s.q = 1 / q;
  s.shift = std::log(q / p);
  s.d0_mean = reduce_add(d_sum) * s.p;
  return s;
}

// KL(p || q); gradients q - p with respect to q's logits and p (d - KL) with respect to p's.
template <class Float>
double kl_row(const RowPair<Float>& row, const RowNormalisers& s, const RowGradients<Float>& grad) {
  constexpr Float kMasked = -std::numeric_limits<Float>::infinity();
  double kl = s.d0_mean + s.shift;
  const bool plain = kl > Series<Float>::kPlain;
  if (!plain || grad.q) {
    VecF64 sum{};
    for_each_vector<double>(row.C, [&](int64_t c, int n) {
      const VecF64 p = load_n(row.p_exp + c, n, 0.0) * s.p;
      const VecF64 q = load_n(row.q_exp + c, n, 0.0) * s.q;
      const VecF64 d = max(difference_at(row, s, c, n) + s.shift, broadcast(-kLargest));
      const VecF64 plus = d * d * polynomial<double>(-d, Series<Float>::kPlus);
      const auto close = d * d < kClose * kClose;
      const VecF64 change = close ? p * (plus - d) : q - p;
      sum += close ? p * plus : change + (p > 0 ? p * d : VecF64{});  // never negative
      if (grad.q) {
        const VecF64 logit = load_wide(row.q_logits + c, n, kMasked);
        store_wide(grad.q + c, logit > -kInf ? change * grad.q_factor : VecF64{}, n);
      }
    });
    if (!plain) kl = reduce_add(sum);
  }
  if (grad.p) {
    const double factor = s.p * grad.p_factor;
    for_each_vector<double>(row.C, [&](int64_t c, int n) {
      const VecF64 p = load_n(row.p_exp + c, n, 0.0);
      const VecF64 gradient = p * (difference_at(row, s, c, n) - s.d0_mean) * factor;
      // An infinite divergence has no gradient with respect to p.
      store_wide(grad.p + c, kl < kInf ? (p > 0 ? gradient : VecF64{}) : VecF64{}, n);
    });
  }
  return kl;
}

// beta KL(p || m) + alpha KL(q || m); gradients beta p (log p/m - KL(p || m)) and
// alpha q (log q/m - KL(q || m)).
template <class Float>
double jsd_row(const RowPair<Float>& row, const RowNormalisers& s, const RowGradients<Float>& grad,
               const Mixture& mix) {
  double series[Series<Float>::kMixture];
  std::copy(mix.series, mix.series + Series<Float>::kMixture, series);
  const double beta = mix.beta, alpha = mix.alpha, p_factor = s.p * beta, q_factor = s.q * alpha;
  const VecF64 log_beta = broadcast(mix.log_beta), log_alpha = broadcast(mix.log_alpha);
  VecF64 sum{}, p_sum{}, q_sum{};
  for_each_vector<double>(row.C, [&](int64_t c, int n) {
    const VecF64 p = load_n(row.p_exp + c, n, 0.0) * p_factor;  // m = p + q
    const VecF64 q = load_n(row.q_exp + c, n, 0.0) * q_factor;
    const VecF64 d =
        min(max(difference_at(row, s, c, n) + s.shift, broadcast(-kLargest)), broadcast(kLargest));
    // From d, without the first-order parts, which cancel.
    const VecF64 square = d * d, rest = square * polynomial<double>(d, series);
    const VecF64 ratio = d * polynomial<double>(-d, Series<Float>::kPlus);
    VecF64 p_log = rest - alpha * d, q_log = rest + beta * d;
    VecF64 term = p * (square * alpha) * (1.0 - ratio) - (p + q) * rest;
    const auto far = square >= kClose * kClose;
    if (any(far)) {
      // m's logarithm over the one that is the greater part of it, then over the other.
      const VecF64 less = min(p, q), more = max(p, q);
      const VecF64 r = less / max(less + 2.0 * more, broadcast(1e-300));
      const VecF64 log_more =
          polynomial<double>(r * r, Series<Float>::kArtanh) * r + (p > q ? log_beta : log_alpha);
      const VecF64 far_p_log = p > q ? log_more : log_more - d;
      const VecF64 far_q_log = p > q ? log_more + d : log_more;
      p_log = far ? far_p_log : p_log;
      q_log = far ? far_q_log : q_log;
      term = far ? -(p * far_p_log + q * far_q_log) : term;
    }
    sum += term;
    if (grad.p) {
      p_sum += p * p_log;
      store_n(row.p_log + c, p_log, n);
    }
    if (grad.q) {
      q_sum += q * q_log;
      store_n(row.q_log + c, q_log, n);
    }
  });
  const auto gradient = [&](Float* out, const double* exps, const double* logs, double mean,
                            double factor) {
    for_each_vector<double>(row.C, [&](int64_t c, int n) {
      store_wide(out + c, load_n(exps + c, n, 0.0) * (mean - load_n(logs + c, n, 0.0)) * factor, n);
    });
  };
  if (grad.p)
    gradient(grad.p, row.p_exp, row.p_log, reduce_add(p_sum) / beta, p_factor * grad.p_factor);
  if (grad.q)
    gradient(grad.q, row.q_exp, row.q_log, reduce_add(q_sum) / alpha, q_factor * grad.q_factor);
  return std::max(reduce_add(sum), 0.0);
}

}  // namespace

// The series of log M(d), M(d) = beta e^(alpha d) + alpha e^(-beta d), from that of M.
Mixture::Mixture(double beta)
    : beta(beta), alpha(1 - beta), log_beta(std::log(beta)), log_alpha(std::log1p(-beta)) {
  double m[kTerms + 2] = {1, 0};
  double p_power = beta * alpha, q_power = -alpha * beta, factorial = 1;
  for (int k = 2; k < kTerms + 2; k++) {
    p_power *= alpha, q_power *= -beta, factorial *= k;
    m[k] = (p_power + q_power) / factorial;
    double sum = 0;
    for (int j = 2; j < k; j++) sum += j * series[j - 2] * m[k - j];
    series[k - 2] = m[k] - sum / k;
  }
}

template <class Float>
double divergence_row(Divergence divergence, const Mixture& mixture, const RowPair<Float>& row,
                      const RowGradients<Float>& grad) {
  const bool jsd = divergence == Divergence::jsd;
  const RowNormalisers s = jsd ? normalise<false>(row) : normalise<true>(row);
  if (!s.valid) {
    constexpr Float kNan = std::numeric_limits<Float>::quiet_NaN();
    if (grad.p) std::fill(grad.p, grad.p + row.C, kNan);
    if (grad.q) std::fill(grad.q, grad.q + row.C, kNan);
    return kNan;
  }
  return jsd ? jsd_row(row, s, grad, mixture) : kl_row(row, s, grad);
}

template double divergence_row(Divergence, const Mixture&, const RowPair<float>&,
                               const RowGradients<float>&);
template double divergence_row(Divergence, const Mixture&, const RowPair<double>&,
                               const RowGradients<double>&);

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
