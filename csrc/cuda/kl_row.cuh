// KL(teacher || student) of one row at one temperature and its gradient with respect to the
// student, in float32 (with two temperatures float32 would not do: equal probabilities come from
// unlike logits): read once where the row fits the registers of its group of threads, twice where
// it does not. Nothing of the row's size is stored but the gradient.
//
// d = log p - log q. A row goes one of three ways, each by its own numbers alone: "near" (all d0
// within 1/4 of each other: q is never formed, and identical rows give exactly 0), "far" (KL = sum
// p d, gradient q - p: loses nothing while KL >= 1/8 and the gradient is not small against the
// probabilities) and "close" for the rest.

#pragma once

#include "cuda/device.cuh"

namespace kdkernels {
namespace cuda {

struct KLScale {
  float factor;  // 1 / temperature
  ExpScale exp;
  __host__ __device__ explicit KLScale(double factor) : factor(float(factor)), exp(factor) {}
};

struct KLStatistics {
  float p_max, q_max;  // largest logits
  float d_range;       // at most: of p - q, over the classes that are not masked in both
  bool nan;
  double p_sum, q_sum, p_d;  // of exp(p), exp(q), exp(p) d0, from the maxima

  // most: the largest p, q, p - q and q - p, and whether there is a NaN. Of a constant between the
  // logits much is rounded off: the range of the differences may be as much larger.
  KDKERNELS_DEVICE KLStatistics(const float* most, const double* sums)
      : p_max(most[0]),
        q_max(most[1]),
        d_range(most[2] + most[3] + 0x1p-23f * fmaxf(fabsf(most[2]), fabsf(most[3]))),
        nan(most[4] != 0),
        p_sum(sums[0]),
        q_sum(sums[1]),
        p_d(sums[2]) {}
};

// p - q as two: rounded, and what the rounding lost; nothing of a masked class.
struct Difference {
  float rounded, lost;
  KDKERNELS_DEVICE Difference(float p, float q) : rounded(p - q) {
    const float minus_q = rounded - p;
    lost = (p - (rounded - minus_q)) - (q + minus_q);
    lost = lost == lost ? lost : 0.0f;
  }
};

// d0, less that of the largest logits: a class of both maxima has exactly 0; infinite for a class
// that one side masks, 0 for one that both mask. The logits may differ by a constant much larger
// than what is left: what the differences lose is carried along.
KDKERNELS_DEVICE float near_difference(float p, float q, const KLScale& scale,
                                       const KLStatistics& s) {
  const Difference d0(p, q), top(s.p_max, s.q_max);
  const float d = ((d0.rounded - top.rounded) + (d0.lost - top.lost)) * scale.factor;
  return d == d ? d : 0.0f;
}

// A row in the registers of its group, K classes a thread, and their exponentials.
template <class T, int K, bool kBlock>
class RowOnChip {
 public:
  static constexpr int kPart = kVector<T>;

  KDKERNELS_DEVICE RowOnChip(const T* teacher, const T* student, int64_t C, Group<kBlock> group)
      : C_(C), group_(group) {
    const bool aligned = is_aligned(teacher) && is_aligned(student);
#pragma unroll
    for (int v = 0; v < K; v += kPart) {
      load_vector(teacher, aligned, at(v), C, p_ + v);
      load_vector(student, aligned, at(v), C, q_ + v);
    }
  }

  KDKERNELS_DEVICE KLStatistics statistics(const KLScale& scale) {
    float most[5] = {-kInfinity, -kInfinity, -kInfinity, -kInfinity, 0};
    // Differences are written the other way round than further on: the compiler would keep them in
    // registers until then, and there are none left.
#pragma unroll
    for (int i = 0; i < K; i++) {
      const float p = p_[i], q = q_[i], d = -(q - p);
      most[0] = fmaxf(most[0], p);
      most[1] = fmaxf(most[1], q);
      most[2] = fmaxf(most[2], d);  // a class that is masked in both has d = NaN: ignored
      most[3] = fmaxf(most[3], -d);
      most[4] = p == p && q == q ? most[4] : 1.0f;
    }
    group_.template reduce<Max>(most);
    float p_sum = 0, q_sum = 0, p_d = 0;
#pragma unroll
    for (int i = 0; i < K; i++) {
      const float p = p_[i] - most[0], q = q_[i] - most[1];
      p_exp_[i] = scale.exp(p);
      q_exp_[i] = scale.exp(q);
      p_sum += p_exp_[i];
      q_sum += q_exp_[i];
      p_d = p_exp_[i] > 0 ? p_d + p_exp_[i] * ((p - q) * scale.factor) : p_d;
    }
    double sums[3] = {double(p_sum), double(q_sum), double(p_d)};
    group_.template reduce<Sum>(sums);
    return {most, sums};
  }

  // f(p, q, exp p, exp q) of every class, into `out` unless that is null. Classes past the end are
  // masked in both.
  template <bool kExpP, bool kExpQ, class F>
  KDKERNELS_DEVICE void map(const KLScale&, const KLStatistics&, T* out, F f) const {
    const bool aligned = is_aligned(out);
#pragma unroll
    for (int v = 0; v < K; v += kPart) {
      float values[kPart];
#pragma unroll
      for (int j = 0; j < kPart; j++) {
        values[j] = f(p_[v + j], q_[v + j], p_exp_[v + j], q_exp_[v + j]);
      }
      if (out) store_vector(out, aligned, at(v), C_, values);
    }
  }

 private:
  KDKERNELS_DEVICE int64_t at(int v) const {
    return (int64_t(v / kPart) * group_.size + group_.rank) * kPart;
  }

  int64_t C_;
  Group<kBlock> group_;
  float p_[K], q_[K], p_exp_[K], q_exp_[K];
};

// A row that is read again at every visit. The statistics are made in one, with a maximum that may
// still grow: what was summed is then scaled down.
template <class T>
class RowInMemory {
 public:
  static constexpr int kPart = kVector<T>;

  KDKERNELS_DEVICE RowInMemory(const T* teacher, const T* student, int64_t C, Group<true> group)
      : teacher_(teacher), student_(student), C_(C), group_(group) {}

  KDKERNELS_DEVICE KLStatistics statistics(const KLScale& scale) {
    float most[5] = {-kInfinity, -kInfinity, -kInfinity, -kInfinity, 0};
    double p_sum = 0, q_sum = 0, p_d = 0;
    const bool aligned = is_aligned(teacher_) && is_aligned(student_);
    for (int64_t c = group_.rank * kPart; c < C_; c += group_.size * kPart) {
      float p[kPart], q[kPart], p_max = most[0], q_max = most[1];
      load_vector(teacher_, aligned, c, C_, p);
      load_vector(student_, aligned, c, C_, q);
#pragma unroll
      for (int j = 0; j < kPart; j++) {
        const float d = p[j] - q[j];
        p_max = fmaxf(p_max, p[j]);
        q_max = fmaxf(q_max, q[j]);
        most[2] = fmaxf(most[2], d);
        most[3] = fmaxf(most[3], -d);
        most[4] = p[j] == p[j] && q[j] == q[j] ? most[4] : 1.0f;
      }
      if (p_max > most[0] || q_max > most[1]) {
        rescale(scale, most, p_max, q_max, p_sum, q_sum, p_d);
        most[0] = p_max, most[1] = q_max;
      }
      if (!(most[0] > -kInfinity && most[1] > -kInfinity)) continue;  // nothing but masked classes
      float p_part = 0, q_part = 0, p_d_part = 0;
#pragma unroll
      for (int j = 0; j < kPart; j++) {
        const float p_less = p[j] - most[0], q_less = q[j] - most[1];
        const float p_exp = scale.exp(p_less), q_exp = scale.exp(q_less);
        p_part += p_exp;
        q_part += q_exp;
        p_d_part = p_exp > 0 ? p_d_part + p_exp * ((p_less - q_less) * scale.factor) : p_d_part;
      }
      p_sum += double(p_part), q_sum += double(q_part), p_d += double(p_d_part);
    }
    const float own[2] = {most[0], most[1]};
    group_.template reduce<Max>(most);
    rescale(scale, own, most[0], most[1], p_sum, q_sum, p_d);
    double sums[3] = {p_sum, q_sum, p_d};
    group_.template reduce<Sum>(sums);
    return {most, sums};
  }

  template <bool kExpP, bool kExpQ, class F>
  KDKERNELS_DEVICE void map(const KLScale& scale, const KLStatistics& s, T* out, F f) const {
    const bool aligned = is_aligned(teacher_) && is_aligned(student_),
               out_aligned = is_aligned(out);
    for (int64_t c = group_.rank * kPart; c < C_; c += group_.size * kPart) {
      float p[kPart], q[kPart], values[kPart];
      load_vector(teacher_, aligned, c, C_, p);
      load_vector(student_, aligned, c, C_, q);
#pragma unroll
      for (int j = 0; j < kPart; j++) {
        values[j] = f(p[j], q[j], kExpP ? scale.exp(p[j] - s.p_max) : 0.0f,
                      kExpQ ? scale.exp(q[j] - s.q_max) : 0.0f);
      }
      if (out) store_vector(out, out_aligned, c, C_, values);
    }
  }

 private:
  // The sums, made from the maxima `from`, as if from the larger p_max and q_max.
  KDKERNELS_DEVICE static void rescale(const KLScale& scale, const float* from, float p_max,
                                       float q_max, double& p_sum, double& q_sum, double& p_d) {
    if (!(from[0] > -kInfinity && from[1] > -kInfinity)) return;  // nothing summed yet
    const float p_less = from[0] - p_max, q_less = from[1] - q_max;
    const double p_factor = double(scale.exp(p_less)), q_factor = double(scale.exp(q_less));
    p_d = (p_d + p_sum * double((p_less - q_less) * scale.factor)) * p_factor;
    p_sum *= p_factor;
    q_sum *= q_factor;
  }

  const T *teacher_, *student_;
  int64_t C_;
  Group<true> group_;
};

constexpr double kFarLoss = 0.125;
constexpr float kFarGradient = 0.1f;  // of the largest probability

// The row's KL. All threads of the warp come here together, those without a row with C = 0; ways
// that rows of one warp need not share hold no collective function. The gradient times `factor`,
// plus extra.dense(student logit), goes to `grad` unless that is null; then extra.correct(...) may
// overwrite single classes.
template <class T, class Row, class AnyGroup, class Extra>
KDKERNELS_DEVICE double kl_row(Row& row, const AnyGroup& group, const KLScale& scale, float factor,
                               const T* teacher, const T* student, T* grad, const Extra& extra) {
  const KLStatistics s = row.statistics(scale);
  const bool valid = !s.nan && fabsf(s.p_max) < kInfinity && fabsf(s.q_max) < kInfinity;
  const bool near = valid && s.d_range * scale.factor <= 0.25f;
  const bool far = valid && !near;

  // A gradient as it is written.
  const auto finish = [&](float change, float q) {
    const float kd = factor == 0 ? 0.0f : change * factor;
    return q > -kInfinity ? kd + extra.dense(q) : 0.0f;
  };
  const auto correct = [&](auto change) {
    extra.correct(group, grad && (valid || factor == 0), [&](int64_t c, float extra_change) {
      const float p = to_float(teacher[c]), q = to_float(student[c]);
      const float kd = factor == 0
                           ? 0.0f
                           : factor * change(p, q, scale.exp(p - s.p_max), scale.exp(q - s.q_max));
      from_float(q > -kInfinity ? kd + (extra.dense(q) + extra_change) : 0.0f, grad[c]);
    });
  };

  double kl = 0;
  bool close = far;
  const double normalisers = log(s.q_sum) - log(s.p_sum);  // of q over that of p
  const float pf = float(1 / s.p_sum), qf = float(1 / s.q_sum), log_ratio = float(normalisers);
  {
    const double p_d = s.p_d / s.p_sum + normalisers;
    const bool direct = far && p_d >= kFarLoss;
    float largest = 0;
    if (direct && grad) {
      row.template map<true, true>(scale, s, grad, [&](float, float q, float p_exp, float q_exp) {
        const float change = q_exp * qf - p_exp * pf;
        largest = fmaxf(largest, fabsf(change));
        return finish(change, q);
      });
    }
    largest = group.template reduce<Max>(largest);
    if (direct && (!grad || largest >= kFarGradient * fmaxf(pf, qf))) {
      kl = p_d;
      close = false;
    }
    if (!valid) {
      kl = double(kInfinity) - double(kInfinity);
      row.template map<false, false>(scale, s, grad, [&](float, float q, float, float) {
        return factor == 0 ? finish(0.0f, q) : float(kl);
      });
    }
  }

  if (AnyGroup::kWholeBlock && !near && !close) {  // alike in all of its threads: the row is done
    correct([&](float, float, float p_exp, float q_exp) { return q_exp * qf - p_exp * pf; });
    return kl;
  }
  if (AnyGroup::kWholeBlock) close = !near;  // one of the two: no register need hold it

  // The change of the normalisers, for the ways that need it. In a row whose largest p is near 1
  // that class adds nothing to it.
  float part = 0;
  if (near) {
    row.template map<true, false>(scale, s, static_cast<T*>(nullptr),
                                  [&](float p, float q, float p_exp, float) {
                                    const float d = near_difference(p, q, scale, s);
                                    part += p_exp * (expm1_plus(d) - d);
                                    return 0.0f;
                                  });
  } else if (close) {
    row.template map<true, true>(
        scale, s, static_cast<T*>(nullptr), [&](float p, float q, float p_exp, float q_exp) {
          const float d = near_difference(p, q, scale, s);
          part += fabsf(d) < 1.0f ? p_exp * (expm1_plus(d) - d) : q_exp - p_exp;
          return 0.0f;
        });
  }
  const double change = group.template reduce<Sum>(double(part)) * double(pf);
  // A sum of terms of either sign: near -1 there is nothing left of it.
  const float shift = change > -0.5 ? float(log1p(change)) : log_ratio;

  float row_kl = 0;
  const auto near_change = [&](float p, float q, float p_exp, float) {
    const float d = near_difference(p, q, scale, s) + shift;
    const float prob = p_exp * pf, plus = expm1_plus(d);
    row_kl += prob * plus;
    return prob * (plus - d);
  };
  const auto close_change = [&](float p, float q, float p_exp, float q_exp) {
    const float d = near_difference(p, q, scale, s) + shift;
    const float prob = p_exp * pf, plus = expm1_plus(d);
    float change = q_exp * qf - prob;
    const bool small = fabsf(d) < 1.0f;  // beyond, q - p + p d loses a few bits at most
    change = small ? prob * (plus - d) : change;
    row_kl += small ? prob * plus : change + (prob > 0 ? prob * d : 0.0f);
    return change;
  };
  if (near) {
    row.template map<true, false>(scale, s, grad, [&](float p, float q, float p_exp, float q_exp) {
      return finish(near_change(p, q, p_exp, q_exp), q);
    });
  } else if (close) {
    row.template map<true, true>(scale, s, grad, [&](float p, float q, float p_exp, float q_exp) {
      return finish(close_change(p, q, p_exp, q_exp), q);
    });
  }
  const double summed = group.template reduce<Sum>(double(row_kl));
  if (near || close) kl = summed;

  correct([&](float p, float q, float p_exp, float q_exp) {
    if (near) return near_change(p, q, p_exp, q_exp);
    if (close) return close_change(p, q, p_exp, q_exp);
    return q_exp * qf - p_exp * pf;
  });
  return kl;
}

}  // namespace cuda
}  // namespace kdkernels
