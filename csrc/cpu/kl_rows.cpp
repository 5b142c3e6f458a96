// Every step goes through all rows of the block before the next begins, so that what is done once a
// row (the sums over its lanes, its logarithm) is done for a vector of rows. A row's result does
// not depend on the rows beside it.
//
// d = log p - log q. Rows in which every d is within 1/4 of the others are "near": for them q is
// never formed. With a reference c in the middle of d0 = scaled difference of the logits, the
// normalisers differ by a factor 1 + sum p expm1(-(d0 - c)), so that d, the loss and the gradient
// keep their relative accuracy down to identical rows, where both are exactly 0. The other rows
// take two exponentials a class.

#include "cpu/kl_rows.h"

#include <cmath>
#include <limits>

#include "cpu/simd_lanes.h"
#include "cpu/simd_math.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {
namespace {

// Classes summed in float before the sum goes on in double, so that rounding does not grow with C.
constexpr int64_t kSumBlock = 32 * kLanes<float>;

KDKERNELS_INLINE float factor(const KLRow& row, KLScales scale) {
  return float(row.factor) * scale.q;
}

// d0, in units of the logits where there is one temperature.
template <bool kSameTemperature>
KDKERNELS_INLINE VecF32 logit_difference(VecF32 p, VecF32 q, KLScales scale) {
  if constexpr (kSameTemperature) return p - q;
  const VecF32 d = p * (scale.p - scale.q) + (p - q) * scale.q;
  return p > -std::numeric_limits<float>::infinity() ? d : p - q;
}

// d0 - c; 0 for a class that is masked in both. The rounding of p - q is carried along, since the
// logits may differ by a constant much larger than what is left of d0.
template <bool kSameTemperature>
KDKERNELS_INLINE VecF32 near_difference(VecF32 p, VecF32 q, KLScales scale, float reference) {
  VecF32 d;
  if constexpr (kSameTemperature) {
    const VecF32 difference = p - q, minus_q = difference - p;
    const VecF32 lost = (p - (difference - minus_q)) - (q + minus_q);
    d = ((difference - reference) + lost) * scale.p;
  } else {
    d = logit_difference<kSameTemperature>(p, q, scale) - reference;
  }
  return d == d ? d : VecF32{};
}

struct RowStatistics {
  VecF32 p_max, q_max;  // largest logits of each row
  VecF32 d_max, d_min;  // of logit_difference over the classes that are not masked in both
  bool nan[kMaxRows];
};

template <bool kSameTemperature, int kVectors>
void row_statistics(const KLRow* rows, int n, int64_t C, KLScales scale, RowStatistics& s) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  VecF32 p_max[kMaxRows], q_max[kMaxRows], d_max[kMaxRows], d_min[kMaxRows];
  for (int r = 0; r < n; r++) {
    VecF32 p_high = broadcast(-kInf), q_high = p_high, d_high = p_high, d_low = broadcast(kInf);
    VecI32 nan{};
    for_row<float, kVectors>(C, [&](int64_t c, int lanes) {
      const VecF32 p = load_n(rows[r].teacher + c, lanes, -kInf),
                   q = load_n(rows[r].student + c, lanes, -kInf);
      const VecF32 d = logit_difference<kSameTemperature>(p, q, scale);
      nan |= (p != p) | (q != q);
      p_high = max(p_high, p);
      q_high = max(q_high, q);
      d_high = max(d, d_high);  // a class that is masked in both has d = NaN: ignored
      d_low = min(d, d_low);
    });
    p_max[r] = p_high, q_max[r] = q_high, d_max[r] = d_high, d_min[r] = d_low;
    s.nan[r] = any(nan);
  }
  const auto larger = [](VecF32 a, VecF32 b) { return max(a, b); };
  s.p_max = reduce_rows(p_max, n, larger);
  s.q_max = reduce_rows(q_max, n, larger);
  s.d_max = reduce_rows(d_max, n, larger);
  s.d_min = reduce_rows(d_min, n, [](VecF32 a, VecF32 b) { return min(a, b); });
}

// Rows number `index[0..n)` of the block, all of them near.
template <bool kSameTemperature>
void near_rows(KLRow* rows, const int* index, int n, int64_t C, KLScales scale,
               const RowStatistics& s, float* scratch) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  float reference[kMaxRows];
  double sum[kMaxRows] = {}, change[kMaxRows] = {}, kl[kMaxRows] = {};
  for (int i = 0; i < n; i++) {
    const int r = index[i];
    reference[i] = s.d_min[r] + (s.d_max[r] - s.d_min[r]) / 2;
  }
  for (int64_t begin = 0; begin < C; begin += kSumBlock) {
    VecF32 sums[kMaxRows], changes[kMaxRows];
    for (int i = 0; i < n; i++) {
      const KLRow& row = rows[index[i]];
      float* const exps = scratch + i * C;
      VecF32 row_sum{}, row_change{};
      for_each_vector<float>(std::min(kSumBlock, C - begin), [&](int64_t k, int lanes) {
        const int64_t c = begin + k;
        const VecF32 p = load_n(row.teacher + c, lanes, -kInf),
                     q = load_n(row.student + c, lanes, -kInf);
        const VecF32 d = near_difference<kSameTemperature>(p, q, scale, reference[i]);
        const VecF32 e = exp<float>(p - s.p_max[index[i]], scale.p);
        row_sum += e;
        row_change += e * (expm1_plus<float>(d) - d);
        store_n(exps + c, e, lanes);
      });
      sums[i] = row_sum, changes[i] = row_change;
    }
    add_rows(sums, n, sum);
    add_rows(changes, n, change);
  }
  double shift[kMaxRows];
  for (int i = 0; i < n; i++) shift[i] = change[i] / sum[i];
  log_1p_near_zero(shift, n);
  for (int64_t begin = 0; begin < C; begin += kSumBlock) {
    VecF32 kls[kMaxRows];
    for (int i = 0; i < n; i++) {
      const KLRow& row = rows[index[i]];
      const float* const exps = scratch + i * C;
      const float p_factor = float(1 / sum[i]), row_shift = float(shift[i]);
      VecF32 row_kl{};
      for_each_vector<float>(std::min(kSumBlock, C - begin), [&](int64_t k, int lanes) {
        const int64_t c = begin + k;
        const VecF32 p = load_n(row.teacher + c, lanes, -kInf),
                     q = load_n(row.student + c, lanes, -kInf);
        const VecF32 d = near_difference<kSameTemperature>(p, q, scale, reference[i]) + row_shift;
        const VecF32 prob = load_n(exps + c, lanes, 0.0f) * p_factor, plus = expm1_plus<float>(d);
        row_kl += prob * plus;
        if (row.grad_student)
          store_n(row.grad_student + c, prob * (plus - d) * factor(row, scale), lanes);
      });
      kls[i] = row_kl;
    }
    add_rows(kls, n, kl);
  }
  for (int i = 0; i < n; i++) rows[index[i]].value = kl[i];
}

// d of a class of rows that are not near, from the logits less their maxima: what is rounded is
// small wherever the probability is not. One product where there is one temperature, so that equal
// logits have d0 = 0 exactly.
template <bool kSameTemperature>
KDKERNELS_INLINE VecF32 far_difference(VecF32 p, VecF32 q, KLScales scale) {
  return kSameTemperature ? (p - q) * scale.p : p * scale.p - q * scale.q;
}

// Rows of which some classes are close all the same, or whose loss or gradient is small against the
// probabilities: the terms p d + q - p and the differences q - p from d where it is small. The
// exponentials are in `scratch`.
template <bool kSameTemperature>
void close_rows(KLRow* rows, const int* index, int n, int64_t C, KLScales scale,
                const RowStatistics& s, const float* scratch) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (int i = 0; i < n; i++) {
    KLRow& row = rows[index[i]];
    const float p_max = s.p_max[index[i]], q_max = s.q_max[index[i]];
    const float *const p_exps = scratch + 2 * index[i] * C, *const q_exps = p_exps + C;
    // The classes that have the maximum are counted, since a certain row has almost nothing else,
    // and what there is must not be rounded to them.
    double sum[2] = {-1, -1}, kl = 0;
    for (int64_t begin = 0; begin < C; begin += kSumBlock) {
      VecF32 rest[4] = {};
      for_each_vector<float>(std::min(kSumBlock, C - begin), [&](int64_t k, int lanes) {
        const VecF32 p = load_n(p_exps + begin + k, lanes, 0.0f);
        const VecF32 q = load_n(q_exps + begin + k, lanes, 0.0f);
        rest[0] = p == 1 ? rest[0] : rest[0] + p;
        rest[1] = q == 1 ? rest[1] : rest[1] + q;
        rest[2] = p == 1 ? rest[2] + 1.0f : rest[2];
        rest[3] = q == 1 ? rest[3] + 1.0f : rest[3];
      });
      for (int j = 0; j < 4; j++) sum[j % 2] += double(reduce_add(rest[j]));
    }
    const float p_factor = float(1 / (1 + sum[0])), q_factor = float(1 / (1 + sum[1]));
    log2_1p(sum, 2);
    const float shift = float((sum[1] - sum[0]) * kLn2);
    for (int64_t begin = 0; begin < C; begin += kSumBlock) {
      VecF32 row_kl{};
      for_each_vector<float>(std::min(kSumBlock, C - begin), [&](int64_t k, int lanes) {
        const int64_t c = begin + k;
        const VecF32 p = load_n(row.teacher + c, lanes, -kInf) - p_max;
        const VecF32 q = load_n(row.student + c, lanes, -kInf) - q_max;
        const VecF32 d = far_difference<kSameTemperature>(p, q, scale) + shift;
        const VecF32 prob = load_n(p_exps + c, lanes, 0.0f) * p_factor;
        const VecF32 plus = expm1_plus<float>(d);
        const auto close = abs<float>(d) < 0.25f;
        VecF32 change = load_n(q_exps + c, lanes, 0.0f) * q_factor - prob;
        change = close ? prob * (plus - d) : change;
        row_kl += close ? prob * plus : change + (prob > 0 ? prob * d : VecF32{});
        if (row.grad_student) store_n(row.grad_student + c, change * factor(row, scale), lanes);
      });
      kl += double(reduce_add(row_kl));
    }
    row.value = kl;
  }
}

// Rows that are not near. Most are as far apart as this: a loss of at least kFarLoss, and a
// gradient that is at least kFarGradient of the largest probability somewhere; for them KL = sum p
// d and q - p lose nothing. The others go to close_rows.
constexpr double kFarLoss = 0.125;
constexpr float kFarGradient = 0.1f;

template <bool kSameTemperature, int kVectors>
void far_rows(KLRow* rows, const int* index, int n, int64_t C, KLScales scale,
              const RowStatistics& s, float* scratch) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  double p_sum[kMaxRows] = {}, q_sum[kMaxRows] = {}, p_d[kMaxRows] = {};
  constexpr int64_t block = kVectors ? int64_t(kVectors) * kLanes<float> : kSumBlock;
  for (int64_t begin = 0; begin < (kVectors ? 1 : C); begin += block) {
    VecF32 p_sums[kMaxRows], q_sums[kMaxRows], p_ds[kMaxRows];
    for (int i = 0; i < n; i++) {
      const KLRow& row = rows[index[i]];
      const float p_max = s.p_max[index[i]], q_max = s.q_max[index[i]];
      float *const p_exps = scratch + 2 * index[i] * C, *const q_exps = p_exps + C;
      VecF32 row_p{}, row_q{}, row_p_d{};
      for_row<float, kVectors>(std::min(block, C - begin), [&](int64_t k, int lanes) {
        const int64_t c = begin + k;
        const VecF32 p = load_n(row.teacher + c, lanes, -kInf) - p_max;
        const VecF32 q = load_n(row.student + c, lanes, -kInf) - q_max;
        if constexpr (kVectors == 0) {
          __builtin_prefetch(row.teacher + c + scale.p_ahead);
          __builtin_prefetch(row.student + c + scale.q_ahead);
          if (row.grad_student) __builtin_prefetch(row.grad_student + c, 1);
        }
        const VecF32 p_exp = exp<float>(p, scale.p), q_exp = exp<float>(q, scale.q);
        const VecF32 d = far_difference<kSameTemperature>(p, q, scale);
        row_p += p_exp;
        row_q += q_exp;
        row_p_d = p_exp > 0 ? row_p_d + p_exp * d : row_p_d;
        store_n(p_exps + c, p_exp, lanes);
        store_n(q_exps + c, q_exp, lanes);
      });
      p_sums[i] = row_p, q_sums[i] = row_q, p_ds[i] = row_p_d;
    }
    add_rows(p_sums, n, p_sum);
    add_rows(q_sums, n, q_sum);
    add_rows(p_ds, n, p_d);
  }
  double log2_sum[2][kMaxRows];
  for (int i = 0; i < n; i++) {
    log2_sum[0][i] = p_sum[i] - 1;
    log2_sum[1][i] = q_sum[i] - 1;
  }
  log2_1p(log2_sum[0], n);
  log2_1p(log2_sum[1], n);
  double p_factor[kMaxRows], q_factor[kMaxRows];
  for (int i = 0; i < n; i++) {
    p_factor[i] = 1 / p_sum[i];
    q_factor[i] = 1 / q_sum[i];
    p_d[i] = p_d[i] * p_factor[i] + (log2_sum[1][i] - log2_sum[0][i]) * kLn2;
  }
  VecF32 largest[kMaxRows];
  for (int i = 0; i < n; i++) {
    const KLRow& row = rows[index[i]];
    const float* const p_exps = scratch + 2 * index[i] * C;
    const float p_row = float(p_factor[i]) * factor(row, scale),
                q_row = float(q_factor[i]) * factor(row, scale);
    VecF32 row_largest{};
    if (row.grad_student && p_d[i] >= kFarLoss) {
      for_row<float, kVectors>(C, [&](int64_t c, int lanes) {
        const VecF32 change =
            load_n(p_exps + C + c, lanes, 0.0f) * q_row - load_n(p_exps + c, lanes, 0.0f) * p_row;
        row_largest = max(row_largest, abs<float>(change));
        store_n(row.grad_student + c, change, lanes);
      });
    }
    largest[i] = row_largest;
  }
  const VecF32 maxima = reduce_rows(largest, n, [](VecF32 a, VecF32 b) { return max(a, b); });
  int close[kMaxRows], close_count = 0;
  for (int i = 0; i < n; i++) {
    KLRow& row = rows[index[i]];
    row.value = p_d[i];
    const float probability =
        float(std::max(p_factor[i], q_factor[i])) * std::fabs(factor(row, scale));
    const bool far =
        p_d[i] >= kFarLoss && (!row.grad_student || maxima[i] >= kFarGradient * probability);
    close[close_count] = index[i];
    close_count += !far;
  }
  if (close_count) close_rows<kSameTemperature>(rows, close, close_count, C, scale, s, scratch);
  for (int i = 0; i < n; i++) {
    const KLRow& row = rows[index[i]];
    if (row.grad_student &&
        s.d_max[index[i]] == kInf) {  // classes that are masked in q have no gradient
      for (int64_t c = 0; c < C; c++)
        row.grad_student[c] = row.student[c] > -kInf ? row.grad_student[c] : 0.0f;
    }
  }
}

template <bool kSameTemperature, int kVectors>
void kl_rows_of(KLRow* rows, int n, int64_t C, KLScales scale, float* scratch) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  RowStatistics s;
  row_statistics<kSameTemperature, kVectors>(rows, n, C, scale, s);
  const float unit = kSameTemperature ? scale.p : 1.0f;
  int near[kMaxRows], far[kMaxRows], near_count = 0, far_count = 0;
  for (int r = 0; r < n; r++) {
    const bool valid = !s.nan[r] && s.p_max[r] < kInf && s.q_max[r] < kInf && s.p_max[r] > -kInf &&
                       s.q_max[r] > -kInf;
    if (!valid) {
      rows[r].value = kNan;
      if (rows[r].grad_student) std::fill(rows[r].grad_student, rows[r].grad_student + C, kNan);
    } else if ((s.d_max[r] - s.d_min[r]) * unit <= 0.25f) {
      near[near_count++] = r;
    } else {
      far[far_count++] = r;
    }
  }
  if (near_count) near_rows<kSameTemperature>(rows, near, near_count, C, scale, s, scratch);
  if (far_count) far_rows<kSameTemperature, kVectors>(rows, far, far_count, C, scale, s, scratch);
}

}  // namespace

void kl_rows(KLRow* rows, int n, int64_t C, KLScales scale, float* scratch) {
  with_row_vectors<float>(C, [&](auto vectors) {
    if (scale.p == scale.q) {
      kl_rows_of<true, vectors()>(rows, n, C, scale, scratch);
    } else {
      kl_rows_of<false, vectors()>(rows, n, C, scale, scratch);
    }
  });
}

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
