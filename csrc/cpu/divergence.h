// The divergence between the distributions of two rows of logits, and its gradients, with each
// logit read from memory once and no probability row kept beyond the scratch of one row.
//
// p and q are softmax(p_logits / p_temperature) and the same of q; d = log p - log q. Two ways:
//  - near (every d within 1/4 of the others): q is never formed. With a reference c in the middle of
//    d0 = scaled logit difference, the normaliser ratio is 1 + sum p expm1(-(d0 - c)), so that d and
//    the gradient keep their relative accuracy down to identical rows, where both are exactly 0;
//  - far: two exponentials a class.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/simd.h"
#include "kdkernels.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {

// One row of both logits, scaled by inverse temperatures.
template <class Float>
struct RowPair {
  const Float* p_logits;
  const Float* q_logits;
  Float p_scale, q_scale;
  int64_t C;
  Float* p_exp;  // [C], scratch
  Float* q_exp;  // [C], scratch
};

// Where the gradients go (null: not wanted) and the factor of each.
template <class Float>
struct RowGradients {
  Float* p;
  Float* q;
  Float p_factor, q_factor;
};

template <class Float>
struct RowStatistics {
  bool valid, near;       // not valid: a NaN, an infinity, or no class left
  Float p_max, q_max;     // largest logits
  Float reference;        // c; in units of the logits where the temperatures are the same
  Float p_scale, q_scale; // 1 / sum of the exponentials
  Float shift;            // d = (d0 - reference) + shift
};

// Classes summed in float before the sum goes on in double: the rounding error does not grow with C.
template <class Float>
constexpr int64_t kBlock = 32 * kLanes<Float>;

template <class Float, bool kSameTemperature>
KDKERNELS_INLINE Vec<Float> logit_difference(const RowPair<Float>& row, Vec<Float> p, Vec<Float> q) {
  if constexpr (kSameTemperature) return (p - q) * row.p_scale;
  const Vec<Float> d = p * (row.p_scale - row.q_scale) + (p - q) * row.q_scale;
  return p > -std::numeric_limits<Float>::infinity() ? d : p - q;
}

// d0 - reference in near rows. The rounding of p - q is carried along, since the logits may differ
// by a constant much larger than what is left of d0.
template <class Float, bool kSameTemperature>
KDKERNELS_INLINE Vec<Float> near_difference(const RowPair<Float>& row, Float reference,
                                            Vec<Float> p, Vec<Float> q) {
  Vec<Float> d;
  if constexpr (kSameTemperature) {
    const Vec<Float> difference = p - q, minus_q = difference - p;
    const Vec<Float> lost = (p - (difference - minus_q)) - (q + minus_q);
    d = ((difference - reference) + lost) * row.p_scale;
  } else {
    d = logit_difference<Float, kSameTemperature>(row, p, q) - reference;
  }
  return d == d ? d : Vec<Float>{};
}

template <class Float, bool kSameTemperature>
RowStatistics<Float> row_statistics(const RowPair<Float>& row) {
  constexpr Float kInf = std::numeric_limits<Float>::infinity();
  using V = Vec<Float>;
  RowStatistics<Float> s{};

  V p_max = broadcast(-kInf), q_max = broadcast(-kInf);
  V d_max = broadcast(-kInf), d_min = broadcast(kInf);
  VecInt<Float> nan{};
  for_each_vector<Float>(row.C, [&](int64_t c, int n) {
    const V p = load_n(row.p_logits + c, n, -kInf), q = load_n(row.q_logits + c, n, -kInf);
    const V d = logit_difference<Float, kSameTemperature>(row, p, q);
    nan |= (p != p) | (q != q);
    p_max = max(p_max, p);
    q_max = max(q_max, q);
    d_max = max(d, d_max);  // a class masked in both rows has d = NaN: ignored
    d_min = min(d, d_min);
  });
  s.p_max = reduce_max(p_max);
  s.q_max = reduce_max(q_max);
  s.valid = !any(nan) && std::fabs(s.p_max) < kInf && std::fabs(s.q_max) < kInf;
  if (!s.valid) return s;
  const Float d_high = reduce_max(d_max), d_low = reduce_min(d_min);
  s.near = d_high - d_low <= Float(0.25);

  double p_sum = 0, q_sum = 0;
  if (s.near) {
    s.reference = (d_low + (d_high - d_low) / 2) / (kSameTemperature ? row.p_scale : 1);
    for (int64_t begin = 0; begin < row.C; begin += kBlock<Float>) {
      V sum{}, change{};
      for_each_vector<Float>(std::min(kBlock<Float>, row.C - begin), [&](int64_t i, int n) {
        const int64_t c = begin + i;
        const V p = load_n(row.p_logits + c, n, -kInf), q = load_n(row.q_logits + c, n, -kInf);
        const V d = near_difference<Float, kSameTemperature>(row, s.reference, p, q);
        const V e = exp<Float>((p - s.p_max) * row.p_scale);
        sum += e;
        change += e * (expm1_plus<Float>(d) - d);
        store_n(row.p_exp + c, e, n);
      });
      p_sum += double(reduce_add(sum));
      q_sum += double(reduce_add(change));
    }
    s.shift = Float(std::log1p(q_sum / p_sum));
  } else {
    for (int64_t begin = 0; begin < row.C; begin += kBlock<Float>) {
      V sum_p{}, sum_q{};
      for_each_vector<Float>(std::min(kBlock<Float>, row.C - begin), [&](int64_t i, int n) {
        const int64_t c = begin + i;
        const V p = load_n(row.p_logits + c, n, -kInf), q = load_n(row.q_logits + c, n, -kInf);
        const V e_p = exp<Float>((p - s.p_max) * row.p_scale);
        const V e_q = exp<Float>((q - s.q_max) * row.q_scale);
        sum_p += e_p;
        sum_q += e_q;
        store_n(row.p_exp + c, e_p, n);
        store_n(row.q_exp + c, e_q, n);
      });
      p_sum += double(reduce_add(sum_p));
      q_sum += double(reduce_add(sum_q));
    }
    // d0 - reference is taken against the difference of the maxima, so that it stays small.
    const double reference = double(s.p_max) * row.p_scale - double(s.q_max) * row.q_scale;
    s.reference = Float(reference);
    s.shift = Float(std::log(q_sum / p_sum) + (double(s.reference) - reference));
    s.q_scale = Float(1 / q_sum);
  }
  s.p_scale = Float(1 / p_sum);
  return s;
}

// p, q, d and q - p of one vector of classes.
template <class Float>
struct Classes {
  Vec<Float> p, q, d, q_minus_p;
  Vec<Float> kl;  // p d + q - p, the term of KL(p || q): never negative
};

template <class Float, bool kSameTemperature, bool kNear>
KDKERNELS_INLINE Classes<Float> classes_at(const RowPair<Float>& row, const RowStatistics<Float>& s,
                                           int64_t c, int n) {
  constexpr Float kInf = std::numeric_limits<Float>::infinity();
  using V = Vec<Float>;
  const V p_logit = load_n(row.p_logits + c, n, -kInf), q_logit = load_n(row.q_logits + c, n, -kInf);
  Classes<Float> x;
  x.p = load_n(row.p_exp + c, n, Float(0)) * s.p_scale;
  if constexpr (kNear) {
    x.d = near_difference<Float, kSameTemperature>(row, s.reference, p_logit, q_logit) + s.shift;
    const V plus = expm1_plus<Float>(x.d);
    x.q_minus_p = x.p * (plus - x.d);
    x.q = x.p + x.q_minus_p;
    x.kl = x.p * plus;
  } else {
    x.q = load_n(row.q_exp + c, n, Float(0)) * s.q_scale;
    const V d0 = logit_difference<Float, kSameTemperature>(row, p_logit, q_logit);
    x.d = (d0 - s.reference) + s.shift;
    x.q_minus_p = x.q - x.p;
    const V small = expm1_plus<Float>(x.d);
    const V large = x.p > 0 ? x.p * x.d : V{};
    x.kl = abs<Float>(x.d) < Float(0.25) ? x.p * small : x.q_minus_p + large;
  }
  return x;
}

template <class Float, bool kSameTemperature, bool kNear>
double kl_row(const RowPair<Float>& row, const RowStatistics<Float>& s, RowGradients<Float> grad) {
  using V = Vec<Float>;
  double kl = 0;
  for (int64_t begin = 0; begin < row.C; begin += kBlock<Float>) {
    V sum{};
    for_each_vector<Float>(std::min(kBlock<Float>, row.C - begin), [&](int64_t i, int n) {
      const int64_t c = begin + i;
      const auto x = classes_at<Float, kSameTemperature, kNear>(row, s, c, n);
      sum += x.kl;
      if (grad.q) store_n(grad.q + c, x.q_minus_p * grad.q_factor, n);
      if (grad.p) store_n(grad.p + c, x.p > 0 ? x.p * x.d : V{}, n);
    });
    kl += double(reduce_add(sum));
  }
  if (grad.p) {
    for_each_vector<Float>(row.C, [&](int64_t c, int n) {
      const V p = load_n(row.p_exp + c, n, Float(0)) * s.p_scale;
      const V p_d = load_n(grad.p + c, n, Float(0));
      store_n(grad.p + c, p > 0 ? (p_d - p * Float(kl)) * grad.p_factor : V{}, n);
    });
  }
  return kl;
}

// log(1 + f) for |f| < 1/2 as 2 artanh(r), r = f / (2 + f); the series without its first term.
template <class Float>
KDKERNELS_INLINE Vec<Float> artanh_tail(Vec<Float> r) {
  constexpr int terms = sizeof(Float) == 8 ? 13 : 6;
  const Vec<Float> square = r * r;
  Vec<Float> y = broadcast(Float(2.0 / (2 * terms + 1)));
#pragma GCC unroll 16
  for (int i = terms - 1; i >= 1; i--) y = y * square + Float(2.0 / (2 * i + 1));
  return y * square * r;
}

// log(1 + x) for -1 < x <= 0.
template <class Float>
KDKERNELS_INLINE Vec<Float> log1p_negative(Vec<Float> x) {
  using S = Simd<Float>;
  using V = Vec<Float>;
  using I = VecInt<Float>;
  const V u = Float(1) + x;
  const I bits = (I)u;
  const V half = broadcast(Float(0.7071067811865476));
  const I n = (bits - (I)half) >> S::kMantissaBits;
  const V f = (V)(bits - (n << S::kMantissaBits)) - Float(1);
  const V r = f / (f + Float(2));
  const V n_float = __builtin_convertvector(n, V);
  const V lost = (x - (u - Float(1))) / u;
  return n_float * Float(kLn2) + (r + r + artanh_tail<Float>(r) + lost);
}

// x - log(1 + x) for |x| <= 0.3: never negative, accurate near 0.
template <class Float>
KDKERNELS_INLINE Vec<Float> minus_log1p(Vec<Float> x) {
  const Vec<Float> r = x / (x + Float(2));
  return x * r - artanh_tail<Float>(r);
}

// beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.
template <class Float, bool kSameTemperature, bool kNear>
double jsd_row(const RowPair<Float>& row, const RowStatistics<Float>& s, RowGradients<Float> grad,
               Float beta) {
  using V = Vec<Float>;
  const Float alpha = 1 - beta;
  double p_kl = 0, q_kl = 0, jsd = 0;
  for (int64_t begin = 0; begin < row.C; begin += kBlock<Float>) {
    V p_sum{}, q_sum{}, sum{};
    for_each_vector<Float>(std::min(kBlock<Float>, row.C - begin), [&](int64_t i, int n) {
      const int64_t c = begin + i;
      const auto x = classes_at<Float, kSameTemperature, kNear>(row, s, c, n);
      const V size = abs<Float>(x.d);
      // log(m / p) and log(m / q), from the one that is a logarithm of a number below 1.
      const V drop = (x.d >= 0 ? broadcast(alpha) : broadcast(beta)) *
                     (exp<Float>(-size) - Float(1));
      const V lower = log1p_negative<Float>(drop);
      V log_m_p = x.d >= 0 ? lower : lower + size;
      V log_m_q = x.d >= 0 ? lower + size : lower;
      // Where the rows are close these cancel: there from the accurate expm1.
      const V clipped = size < Float(0.25) ? x.d : V{};
      const V v = alpha * (expm1_plus<Float>(clipped) - clipped);
      const V w = beta * (expm1_plus<Float>(-clipped) + clipped);
      const V v_rest = minus_log1p<Float>(v), w_rest = minus_log1p<Float>(w);
      const auto close = size < Float(0.25);
      log_m_p = close ? v - v_rest : log_m_p;
      log_m_q = close ? w - w_rest : log_m_q;
      const V p_term = x.p > 0 ? -x.p * log_m_p : V{}, q_term = x.q > 0 ? -x.q * log_m_q : V{};
      p_sum += p_term;
      q_sum += q_term;
      sum += close ? beta * x.p * v_rest + alpha * x.q * w_rest : beta * p_term + alpha * q_term;
      if (grad.p) store_n(grad.p + c, p_term, n);
      if (grad.q) store_n(grad.q + c, q_term, n);
    });
    p_kl += double(reduce_add(p_sum));
    q_kl += double(reduce_add(q_sum));
    jsd += double(reduce_add(sum));
  }
  if (grad.p || grad.q) {
    for_each_vector<Float>(row.C, [&](int64_t c, int n) {
      const V p = load_n(row.p_exp + c, n, Float(0)) * s.p_scale;
      V q;
      if constexpr (kNear) {
        q = classes_at<Float, kSameTemperature, kNear>(row, s, c, n).q;
      } else {
        q = load_n(row.q_exp + c, n, Float(0)) * s.q_scale;
      }
      if (grad.p) {
        const V term = load_n(grad.p + c, n, Float(0));
        store_n(grad.p + c, (term - p * Float(p_kl)) * (beta * grad.p_factor), n);
      }
      if (grad.q) {
        const V term = load_n(grad.q + c, n, Float(0));
        store_n(grad.q + c, (term - q * Float(q_kl)) * (alpha * grad.q_factor), n);
      }
    });
  }
  return jsd;
}

// One row of a divergence, student and teacher in place of p and q. Returns the divergence.
template <class Float>
struct DivergenceRow {
  Divergence divergence;
  Float student_scale, teacher_scale;  // 1 / temperature
  Float beta;
  int64_t C;
  Float* scratch;  // [2][C]

  double operator()(const Float* student, const Float* teacher, Float* grad_student,
                    Float* grad_teacher, Float factor) const {
    const bool student_first = divergence == Divergence::reverse_kl;
    RowPair<Float> row{teacher, student, teacher_scale, student_scale, C, scratch, scratch + C};
    RowGradients<Float> grad{grad_teacher, grad_student, factor * teacher_scale,
                             factor * student_scale};
    if (student_first) {
      row = {student, teacher, student_scale, teacher_scale, C, scratch, scratch + C};
      grad = {grad_student, grad_teacher, factor * student_scale, factor * teacher_scale};
    }
    return student_scale == teacher_scale ? run<true>(row, grad) : run<false>(row, grad);
  }

 private:
  template <bool kSameTemperature>
  double run(const RowPair<Float>& row, const RowGradients<Float>& grad) const {
    const auto s = row_statistics<Float, kSameTemperature>(row);
    if (!s.valid) {
      constexpr Float kNan = std::numeric_limits<Float>::quiet_NaN();
      for (int64_t c = 0; c < C; c++) {
        if (grad.p) grad.p[c] = kNan;
        if (grad.q) grad.q[c] = kNan;
      }
      return kNan;
    }
    if (divergence == Divergence::jsd) {
      return s.near ? jsd_row<Float, kSameTemperature, true>(row, s, grad, beta)
                    : jsd_row<Float, kSameTemperature, false>(row, s, grad, beta);
    }
    return s.near ? kl_row<Float, kSameTemperature, true>(row, s, grad)
                  : kl_row<Float, kSameTemperature, false>(row, s, grad);
  }
};

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
