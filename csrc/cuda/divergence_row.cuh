// Any divergence of one row and both its gradients in float64, for logits of any dtypes: for
// float64 ones, and for the gradients of others that are differences of logarithms, which float32
// would round to more than is left of them. A row is read at every visit; nothing of its size is
// stored but the gradients. The case that training spends its time in is in kl_row.cuh.
//
// p and q are softmax(p_logits / p_temperature) and the same of q; d = log p - log q.

#pragma once

#include "cuda/device.cuh"

namespace kdkernels {
namespace cuda {

struct LogitRow {
  void* data;
  DType dtype;
  KDKERNELS_DEVICE double operator[](int64_t c) const { return load(data, dtype, c); }
  KDKERNELS_DEVICE void set(int64_t c, double x) const { store(data, dtype, c, x); }
};

struct RowPair {
  LogitRow p, q;
  double p_scale, q_scale;
};

// Where the gradients go (data is null: not wanted), and the factor of each.
struct RowGradients {
  LogitRow p, q;
  double p_factor, q_factor;
};

// 2 artanh(r) / r for |r| < 0.18.
KDKERNELS_DEVICE double artanh_ratio(double r) {
  const double square = r * r;
  double y = 2.0 / 27;
#pragma unroll
  for (int k = 25; k >= 1; k -= 2) y = y * square + 2.0 / k;
  return y;
}

// x - log(1 + x) for |x| < 0.3: never negative.
KDKERNELS_DEVICE double minus_log1p(double x) {
  const double r = x / (x + 2.0);
  return x * r - (artanh_ratio(r) - 2.0) * r;
}

struct RowNormalisers {
  bool valid;                 // no NaN, no infinity, at least one class left
  double p_max, q_max, p, q;  // largest logits, 1 / sum of the exponentials
  double shift;               // d = difference of the scaled logits, less their maxima, + shift
};

template <class AnyGroup>
KDKERNELS_DEVICE RowNormalisers row_normalisers(const RowPair& row, int64_t C,
                                                const AnyGroup& group) {
  double most[3] = {-double(kInfinity), -double(kInfinity), 0};
  for (int64_t c = group.rank; c < C; c += group.size) {
    const double p = row.p[c], q = row.q[c];
    most[0] = fmax(most[0], p);
    most[1] = fmax(most[1], q);
    most[2] = p == p && q == q ? most[2] : 1.0;
  }
  group.template reduce<Max>(most);
  RowNormalisers s{};
  s.p_max = most[0], s.q_max = most[1];
  s.valid = most[2] == 0 && fabs(s.p_max) < double(kInfinity) && fabs(s.q_max) < double(kInfinity);
  double sums[2] = {0, 0};
  if (s.valid) {
    for (int64_t c = group.rank; c < C; c += group.size) {
      sums[0] += exp((row.p[c] - s.p_max) * row.p_scale);
      sums[1] += exp((row.q[c] - s.q_max) * row.q_scale);
    }
  }
  group.template reduce<Sum>(sums);
  s.p = 1 / sums[0];
  s.q = 1 / sums[1];
  s.shift = log(s.p / s.q);
  return s;
}

struct Class {
  double p, q, d;
  double q_minus_p, kl;  // kl = p d + q - p, the term of KL(p || q): never negative
  bool q_masked;
};

KDKERNELS_DEVICE Class class_at(const RowPair& row, const RowNormalisers& s, int64_t c) {
  const double p_less = row.p[c] - s.p_max, q_less = row.q[c] - s.q_max;
  Class x;
  x.p = exp(p_less * row.p_scale) * s.p;
  x.q = exp(q_less * row.q_scale) * s.q;
  // One product where there is one temperature: identical rows have d = 0 exactly.
  x.d = s.shift + (row.p_scale == row.q_scale ? (p_less - q_less) * row.p_scale
                                              : p_less * row.p_scale - q_less * row.q_scale);
  // Where the two are close, from d: the difference of p and q would have lost its digits.
  const bool close = fabs(x.d) < 0.25;
  const double plus = expm1_plus(close ? x.d : 0.0);
  x.q_minus_p = close ? x.p * (plus - x.d) : x.q - x.p;
  x.kl = close ? x.p * plus : x.q_minus_p + (x.p > 0 ? x.p * x.d : 0.0);
  x.q_masked = !(q_less > -double(kInfinity));
  return x;
}

// beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q: log m/p and log m/q, from the
// one that is the logarithm of a number below 1, or, where p and q are close, from m/p - 1 and m/q
// - 1. Returns the class's term of the divergence, in which the first-order parts cancel.
KDKERNELS_DEVICE double jsd_logs(const Class& x, double beta, double& log_m_p, double& log_m_q) {
  const double alpha = 1 - beta, size = fabs(x.d);
  if (size < 0.25) {
    const double v = alpha * (expm1_plus(x.d) - x.d), w = beta * (expm1_plus(-x.d) + x.d);
    const double v_rest = minus_log1p(v), w_rest = minus_log1p(w);
    log_m_p = v - v_rest;
    log_m_q = w - w_rest;
    return beta * x.p * v_rest + alpha * x.q * w_rest;
  }
  const bool p_larger = x.d >= 0;
  const double lower = log1p((p_larger ? alpha : beta) * expm1(-size));
  log_m_p = p_larger ? lower : lower + size;
  log_m_q = p_larger ? lower + size : lower;
  return -(beta * (x.p > 0 ? x.p * log_m_p : 0.0) + alpha * (x.q > 0 ? x.q * log_m_q : 0.0));
}

// A row and its gradients; NaN where it has one, an infinity, or no class left. The gradient of q
// or of p, whichever is the student's (`student_is_p`), gets extra.dense(logit) as well, and then
// extra.correct(...) may overwrite single classes.
template <class AnyGroup, class Extra>
KDKERNELS_DEVICE double divergence_row(Divergence divergence, double beta, const RowPair& row,
                                       const RowGradients& grad, int64_t C, const AnyGroup& group,
                                       bool student_is_p, const Extra& extra) {
  const double infinity = double(kInfinity), alpha = 1 - beta;
  const bool jsd = divergence == Divergence::jsd;
  const RowNormalisers s = row_normalisers(row, C, group);
  double sums[3] = {0, 0, 0};  // the divergence; for jsd KL(p || m) and KL(q || m) too
  if (s.valid) {
    for (int64_t c = group.rank; c < C; c += group.size) {
      const Class x = class_at(row, s, c);
      if (jsd) {
        double log_m_p, log_m_q;
        sums[0] += jsd_logs(x, beta, log_m_p, log_m_q);
        sums[1] += x.p > 0 ? -x.p * log_m_p : 0.0;
        sums[2] += x.q > 0 ? -x.q * log_m_q : 0.0;
      } else {
        sums[0] += x.kl;
      }
    }
  }
  group.template reduce<Sum>(sums);
  const double value = s.valid ? sums[0] : infinity - infinity;

  // Gradients with respect to the logits of p and of q.
  const auto gradients = [&](int64_t c, double& p, double& q) {
    const Class x = class_at(row, s, c);
    if (jsd) {
      double log_m_p, log_m_q;
      jsd_logs(x, beta, log_m_p, log_m_q);
      p = beta * ((x.p > 0 ? -x.p * log_m_p : 0.0) - x.p * sums[1]);
      q = alpha * ((x.q > 0 ? -x.q * log_m_q : 0.0) - x.q * sums[2]);
    } else {
      // An infinite divergence has no gradient with respect to p.
      p = value < infinity && x.p > 0 ? x.p * (x.d - value) : 0.0;
      q = x.q_masked ? 0.0 : x.q_minus_p;
    }
    if (!s.valid) p = q = value;
    p = grad.p_factor == 0 ? 0.0 : p * grad.p_factor;
    q = grad.q_factor == 0 ? 0.0 : q * grad.q_factor;
  };
  const LogitRow student = student_is_p ? row.p : row.q;
  const auto with_extra = [&](int64_t c, double x, double change) {
    const double logit = student[c];
    return logit > -infinity || x != x ? x + (extra.dense(logit) + change) : 0.0;
  };
  if (grad.p.data || grad.q.data) {
    for (int64_t c = group.rank; c < C; c += group.size) {
      double p, q;
      gradients(c, p, q);
      if (grad.p.data) grad.p.set(c, student_is_p ? with_extra(c, p, 0.0) : p);
      if (grad.q.data) grad.q.set(c, student_is_p ? q : with_extra(c, q, 0.0));
    }
  }
  const LogitRow target = student_is_p ? grad.p : grad.q;
  const bool counts = (student_is_p ? grad.p_factor : grad.q_factor) != 0;
  extra.correct(group, target.data && (s.valid || !counts), [&](int64_t c, double change) {
    double p, q;
    gradients(c, p, q);
    target.set(c, with_extra(c, student_is_p ? p : q, change));
  });
  return value;
}

struct NoExtra {  // a gradient that is the divergence's alone
  template <class Real>
  KDKERNELS_DEVICE Real dense(Real) const {
    return 0;
  }
  template <class AnyGroup, class F>
  KDKERNELS_DEVICE void correct(const AnyGroup&, bool, F) const {}
};

// Of the forward KL the teacher's gradient alone: beside kl_row, whose student's gradient is the
// same with it and without.
template <class AnyGroup>
KDKERNELS_DEVICE void teacher_gradient(const RowPair& pair, const LogitRow& grad, double factor,
                                       int64_t C, const AnyGroup& group) {
  const RowGradients gradients{grad, {nullptr, DType::float32}, factor, 0};
  divergence_row(Divergence::forward_kl, 0.5, pair, gradients, C, group, false, NoExtra());
}

}  // namespace cuda
}  // namespace kdkernels
