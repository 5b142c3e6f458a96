// Every step goes through all rows of the block before the next begins, so that what is done once a
// row (the sums over its lanes, its logarithm) is done for a vector of rows. A row's result does
// not depend on the rows beside it.
//
// d = log p - log q. Rows in which every d is within 1/4 of the others are "near": for them q is
// never formed. With d0 the scaled difference of the logits and c that of the largest logit of each
// side, the normalisers differ by a factor 1 + sum p expm1(-(d0 - c)), so that d, the loss and the
// gradient keep their relative accuracy down to identical rows, where both are exactly 0, and in
// certain rows, where the class of both maxima is nearly all of the mass and adds nothing. Where
// the maxima are of two classes, c lies between the d0 of these: no single class decides it. The
// other rows take two exponentials a class.

#include "cpu/kl_rows.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/exp_rows.h"
#include "cpu/row.h"
#include "cpu/simd_lanes.h"
#include "cpu/simd_math.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {
namespace {

KDKERNELS_INLINE float factor(const KLRows& rows, int r, KLScales scale) {
  return float(rows.factor[r]) * scale.q;
}

// p - q as two: rounded, and what that lost; nothing of a masked class.
template <class V>
struct Difference {
  V rounded, lost;
};

template <class V>
KDKERNELS_INLINE Difference<V> difference(V p, V q) {
  const V rounded = p - q, minus_q = rounded - p;
  const V lost = (p - (rounded - minus_q)) - (q + minus_q);
  return {rounded, lost == lost ? lost : V{}};
}

// c of a row, in units of the logits.
KDKERNELS_INLINE Difference<float> reference(const Maxima& largest, int r) {
  return difference(largest.p[r], largest.q[r]);
}

// d0 - c; infinite for a class that one side masks, 0 for one that both mask. What the differences
// lose is carried along, since the logits may differ by a constant much larger than what is left of
// d0; a class of both maxima has exactly 0.
KDKERNELS_INLINE VecF32 near_difference(VecF32 p, VecF32 q, float scale, Difference<float> c) {
  const Difference<VecF32> d0 = difference(p, q);
  const VecF32 d = ((d0.rounded - c.rounded) + (d0.lost - c.lost)) * scale;
  return d == d ? d : VecF32{};
}

// Rows number `index[0..n)` of the block, all of them near.
void near_rows(KLRows& rows, const int* index, int n, int64_t C, KLScales scale,
               const Maxima& largest, float* scratch) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  double sum[kMaxRows] = {}, change[kMaxRows] = {}, kl[kMaxRows] = {};
  for (int64_t begin = 0; begin < C; begin += kSumBlock) {
    VecF32 sums[kMaxRows], changes[kMaxRows];
    for (int i = 0; i < n; i++) {
      const float *const p_logits = rows.p[index[i]], *const q_logits = rows.q[index[i]];
      const float p_max = largest.p[index[i]];
      const Difference<float> row_c = reference(largest, index[i]);
      float* const exps = scratch + 2 * index[i] * C;
      VecF32 row_sum{}, row_change{};
      for_each_vector<float>(std::min(kSumBlock, C - begin), [&](int64_t k, int lanes) {
        const int64_t c = begin + k;
        const VecF32 p = load_n(p_logits + c, lanes, -kInf), q = load_n(q_logits + c, lanes, -kInf);
        const VecF32 d = near_difference(p, q, scale.p, row_c);
        const VecF32 e = exp<float>(p - p_max, scale.p);
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
      const int r = index[i];
      const float *const p_logits = rows.p[r], *const q_logits = rows.q[r];
      const float* const exps = scratch + 2 * r * C;
      const float p_factor = float(1 / sum[i]), row_shift = float(shift[i]);
      const Difference<float> row_c = reference(largest, r);
      VecF32 row_kl{};
      for_each_vector<float>(std::min(kSumBlock, C - begin), [&](int64_t k, int lanes) {
        const int64_t c = begin + k;
        const VecF32 p = load_n(p_logits + c, lanes, -kInf), q = load_n(q_logits + c, lanes, -kInf);
        const VecF32 d = near_difference(p, q, scale.p, row_c) + row_shift;
        const VecF32 prob = load_n(exps + c, lanes, 0.0f) * p_factor, plus = expm1_plus<float>(d);
        row_kl += prob * plus;
        if (rows.grad_q[r])
          store_n(rows.grad_q[r] + c, prob * (plus - d) * factor(rows, r, scale), lanes);
      });
      kls[i] = row_kl;
    }
    add_rows(kls, n, kl);
  }
  for (int i = 0; i < n; i++) rows.value[index[i]] = kl[i];
}

// Rows of which some classes are close all the same, or whose loss or gradient is small against the
// probabilities: the terms p d + q - p and the differences q - p from d where it is small, and so
// the change of the normalisers, as of near rows. The exponentials are in `scratch`.
void close_rows(KLRows& rows, const int* index, int n, int64_t C, KLScales scale,
                const Maxima& largest, const float* scratch) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (int i = 0; i < n; i++) {
    const int row = index[i];
    const float *const p_logits = rows.p[row], *const q_logits = rows.q[row];
    const float *const p_exps = scratch + 2 * row * C, *const q_exps = p_exps + C;
    const Difference<float> row_c = reference(largest, row);
    const auto d0_less_c = [&](int64_t c, int lanes) {
      return near_difference(load_n(p_logits + c, lanes, -kInf), load_n(q_logits + c, lanes, -kInf),
                             scale.p, row_c);
    };
    // The classes that have the maximum are counted, since a certain row has almost nothing else,
    // and what there is must not be rounded to them.
    double sum[2] = {-1, -1}, change = 0, kl = 0;
    for (int64_t begin = 0; begin < C; begin += kSumBlock) {
      VecF32 rest[5] = {};
      for_each_vector<float>(std::min(kSumBlock, C - begin), [&](int64_t k, int lanes) {
        const int64_t c = begin + k;
        const VecF32 p = load_n(p_exps + c, lanes, 0.0f), q = load_n(q_exps + c, lanes, 0.0f);
        rest[0] = p == 1 ? rest[0] : rest[0] + p;
        rest[1] = q == 1 ? rest[1] : rest[1] + q;
        rest[2] = p == 1 ? rest[2] + 1.0f : rest[2];
        rest[3] = q == 1 ? rest[3] + 1.0f : rest[3];
        const VecF32 d = d0_less_c(c, lanes);
        const auto close = abs<float>(d) < 1.0f;
        rest[4] += close ? p * (expm1_plus<float>(d) - d) : q - p;
      });
      for (int j = 0; j < 4; j++) sum[j % 2] += double(reduce_add(rest[j]));
      change += double(reduce_add(rest[4]));
    }
    const float p_factor = float(1 / (1 + sum[0])), q_factor = float(1 / (1 + sum[1]));
    change /= 1 + sum[0];
    log2_1p(sum, 2);
    // The change is a sum of terms of either sign: near -1 there is nothing left of it.
    const float shift = float(change > -0.5 ? std::log1p(change) : (sum[1] - sum[0]) * kLn2);
    for (int64_t begin = 0; begin < C; begin += kSumBlock) {
      VecF32 row_kl{};
      for_each_vector<float>(std::min(kSumBlock, C - begin), [&](int64_t k, int lanes) {
        const int64_t c = begin + k;
        const VecF32 d = d0_less_c(c, lanes) + shift;
        const VecF32 prob = load_n(p_exps + c, lanes, 0.0f) * p_factor;
        const VecF32 plus = expm1_plus<float>(d);
        const auto close = abs<float>(d) < 1.0f;  // beyond, q - p + p d loses a few bits at most
        VecF32 change = load_n(q_exps + c, lanes, 0.0f) * q_factor - prob;
        change = close ? prob * (plus - d) : change;
        row_kl += close ? prob * plus : change + (prob > 0 ? prob * d : VecF32{});
        if (rows.grad_q[row]) {  // none of a class that q masks
          change = load_n(q_logits + c, lanes, -kInf) > -kInf ? change : VecF32{};
          store_n(rows.grad_q[row] + c, change * factor(rows, row, scale), lanes);
        }
      });
      kl += double(reduce_add(row_kl));
    }
    rows.value[row] = kl;
  }
}

// Tries every row as one that is far: a loss of at least kFarLoss, and gradients that are somewhere
// at least kFarGradient of what they are the difference of: of the largest probability, and for
// p (d - KL) of that times the two terms. Then KL = sum p d and the differences lose nothing. Says
// which rows are not, whose results are for the others to make; rows with a NaN, an infinity or no
// class left are among them. The exponentials stay in `scratch`.
constexpr double kFarLoss = 0.125;
constexpr float kFarGradient = 0.1f;

template <bool kSameTemperature, int kVectors>
void far_rows(KLRows& rows, int n, int64_t C, KLScales scale, Maxima& largest, float* scratch,
              bool* is_far, Left* left) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr int W = kLanes<float>;
  // Logarithms are to the base 2 until the sums are complete.
  const float p_scale = float(scale.p * kLog2e), q_scale = float(scale.q * kLog2e);
  double p_sum[W] = {}, q_sum[W] = {}, p_d[W] = {};
  exp_rows<kVectors>(rows, n, C, scale, scratch, largest, p_sum, q_sum, p_d);

  float p_row[W], q_row[W];  // from an exponential to its part of the gradient
  double d0_mean[W];         // sum of p d, d without the normalisers
  for (int r = 0; r < n; r++) p_row[r] = factor(rows, r, scale);
  for (int r = 0; r < n; r += kLanes<double>) {  // lane i is row r + i
    const VecF64 p = load<VecF64>(p_sum + r), q = load<VecF64>(q_sum + r), p_factor = 1.0 / p;
    const VecF64 mean = load<VecF64>(p_d + r) * p_factor;
    const VecF64 kl = (mean + log2_of(q * p_factor)) * kLn2;
    store(d0_mean + r, mean);
    store(p_d + r, q == q ? kl : q);
    store(p_sum + r, p_factor);
    store(q_sum + r, 1.0 / q);
  }
  // Two temperatures are rounded differently, and so are equal logits by them.
  constexpr float caution = kSameTemperature ? 1.0f : 2.0f;
  bool some_p = false;  // a gradient with respect to p is wanted
  bool masked = false;  // a class that only q masks, for which the loss is infinite
  for (int r = 0; r < n; r++) {
    q_row[r] = float(q_sum[r]) * p_row[r];
    p_row[r] = float(p_sum[r]) * p_row[r];
    rows.value[r] = p_d[r];
    is_far[r] = p_d[r] >= kFarLoss;
    some_p |= rows.grad_p[r] != nullptr;
    left[r].value = left[r].grad_q = false;
    left[r].grad_p = rows.grad_p[r] && !(p_d[r] >= caution * caution * kFarLoss);
    masked |= p_d[r] == kInf;
  }

  for (int r = 0; r < n; r++) {
    const float *const p_exps = scratch + 2 * r * C, *const q_exps = p_exps + C;
    float* const grad = rows.grad_q[r];
    if (!grad || !is_far[r]) continue;
    const VecF32 p_factor = broadcast(p_row[r]), q_factor = broadcast(q_row[r]);
    const float small = kFarGradient * std::max(std::fabs(p_row[r]), std::fabs(q_row[r]));
    VecF32 high{};
    write_row<float, kVectors>(grad, C, scale.past_caches, [&](int64_t i, int lanes) {
      const VecF32 q = load_n(q_exps + i, lanes, 0.0f) * q_factor;
      const VecF32 change = less_product<float>(q, load_n(p_exps + i, lanes, 0.0f), p_factor);
      high = max(high, abs<float>(change));
      return change;
    });
    is_far[r] = any(high >= small);
  }
  for (int r = 0; some_p && r < n; r++) {
    float* const grad = rows.grad_p[r];
    if (!grad || left[r].grad_p) continue;
    if (rows.value[r] == kInf) {  // an infinite divergence has no gradient with respect to p
      std::fill(grad, grad + C, 0.0f);
      continue;
    }
    const float *const p_logits = rows.p[r], *const q_logits = rows.q[r];
    const float* const p_exps = scratch + 2 * r * C;
    const VecF32 p_max = broadcast(largest.p[r]), q_max = broadcast(largest.q[r]);
    const VecF32 mean = broadcast(float(d0_mean[r]));
    const float change_factor = float(rows.factor[r] * p_sum[r] * kLn2) * scale.p;
    const float small = caution * 2 * kFarGradient * (1 + std::fabs(float(d0_mean[r])));
    VecF32 high{};
    write_row<float, kVectors>(grad, C, scale.past_caches, [&](int64_t i, int lanes) {
      const VecF32 p = load_n(p_logits + i, lanes, -kInf) - p_max;
      const VecF32 q = load_n(q_logits + i, lanes, -kInf) - q_max;
      const VecF32 d = max(scaled_difference<kSameTemperature>(p, q, p_scale, q_scale),
                           broadcast(kNoDifference));
      const VecF32 change = load_n(p_exps + i, lanes, 0.0f) * (d - mean);
      high = max(high, abs<float>(change));
      return change * change_factor;
    });
    left[r].grad_p = !any(high >= small);
  }
  for (int r = 0; masked && r < n; r++) {  // such a class has no gradient: see what the others have
    float* const grad = rows.grad_q[r];
    if (!grad || !is_far[r] || rows.value[r] != kInf) continue;
    const float small = kFarGradient * std::max(std::fabs(p_row[r]), std::fabs(q_row[r]));
    VecF32 high{};
    for_each_vector<float>(C, [&](int64_t i, int lanes) {
      const VecF32 q = load_n(rows.q[r] + i, lanes, -kInf), all = load_n(grad + i, lanes, 0.0f);
      const VecF32 change = q > -kInf ? all : VecF32{};
      high = max(high, abs<float>(change));
      store_n(grad + i, change, lanes);
    });
    is_far[r] = any(high >= small);
  }
}

// A row that is not far: near, close, or without a divergence.
struct Way {
  bool valid, near;
};

Way way_of(const float* p_logits, const float* q_logits, int64_t C, float scale, float p_max,
           float q_max) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  VecF32 d_high = broadcast(-kInf), d_low = broadcast(kInf);
  VecI32 nan{};
  for_each_vector<float>(C, [&](int64_t c, int lanes) {
    const VecF32 p = load_n(p_logits + c, lanes, -kInf), q = load_n(q_logits + c, lanes, -kInf);
    const VecF32 d = p - q;
    nan |= (p != p) | (q != q);
    d_high = max(d, d_high);  // a class that is masked in both has d = NaN: ignored
    d_low = min(d, d_low);
  });
  const float low = -reduce_max(-d_low), high = reduce_max(d_high);
  // Of a constant between the logits much is rounded off: the spread may be as much larger.
  const float rounded =
      std::numeric_limits<float>::epsilon() * max(std::fabs(low), std::fabs(high));
  const bool valid = !any(nan) && std::fabs(p_max) < kInf && std::fabs(q_max) < kInf;
  return {valid, (high - low + rounded) * scale <= 0.25f};
}

template <bool kSameTemperature, int kVectors>
void kl_rows_of(KLRows& rows, int n, int64_t C, KLScales scale, bool only_far, float* scratch,
                Left* left) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  Maxima largest;
  bool is_far[kMaxRows];
  far_rows<kSameTemperature, kVectors>(rows, n, C, scale, largest, scratch, is_far, left);
  int near[kMaxRows], close[kMaxRows], near_count = 0, close_count = 0;
  for (int r = 0; r < n; r++) {
    if (is_far[r]) continue;
    if (only_far || (left[r].grad_p && !rows.grad_q[r])) {
      left[r].value = true;
      left[r].grad_q = only_far;
      continue;
    }
    const Way way = way_of(rows.p[r], rows.q[r], C, scale.p, largest.p[r], largest.q[r]);
    if (!way.valid) {
      rows.value[r] = kNan;
      if (float* const grad = rows.grad_q[r]) std::fill(grad, grad + C, kNan);
    } else if (way.near) {
      near[near_count++] = r;
    } else {
      close[close_count++] = r;
    }
  }
  if (near_count) near_rows(rows, near, near_count, C, scale, largest, scratch);
  if (close_count) close_rows(rows, close, close_count, C, scale, largest, scratch);
}

}  // namespace

void kl_rows(KLRows& rows, int n, int64_t C, KLScales scale, bool only_far, float* scratch,
             Left* left) {
  with_row_shape(C, scale, [&](auto one_temperature, auto vectors) {
    kl_rows_of<one_temperature(), vectors()>(rows, n, C, scale, only_far, scratch, left);
  });
}

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
