// As in kl_rows.cpp, a step goes through all rows of the block before the next begins. Rows are
// only tried: what float32 cannot hold is for divergence.cpp to make.

#include "cpu/jsd_rows.h"

#include <cmath>

#include "cpu/exp_rows.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {
namespace {

// What a row must have at the least to be done: a divergence, and in each gradient that is wanted a
// class with this share of the largest probability.
constexpr double kFarLoss = 1.0 / 16;
constexpr float kFarGradient = 0.2f;
// 2 artanh(r) / r in r^2 for r <= 1/3, in units of log 2; least-maximum fit, error 2e-9.
constexpr double kArtanh[] = {2.885390093, 0.9617917163, 0.5774328505, 0.403451944, 0.4062308721};

template <bool kSameTemperature, int kVectors>
void jsd_rows_of(KLRows& rows, int n, int64_t C, KLScales scale, const Mixture& mix, float* scratch,
                 Left* left) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr int W = kLanes<float>;
  Maxima largest;
  double p_sum[W] = {}, q_sum[W] = {}, p_d[W] = {};
  exp_rows<kVectors>(rows, n, C, scale, scratch, largest, p_sum, q_sum, p_d);

  // Logarithms are to the base 2 until the sums are complete.
  const float p_scale = float(scale.p * kLog2e), q_scale = float(scale.q * kLog2e);
  const VecF32 log_beta = broadcast(float(mix.log_beta * kLog2e));
  const VecF32 log_alpha = broadcast(float(mix.log_alpha * kLog2e));
  double shift[W];
  for (int r = 0; r < n; r += kLanes<double>)  // lane i is row r + i
    store(shift + r, log2_of(load<VecF64>(q_sum + r) / load<VecF64>(p_sum + r)));
  bool some = false;
  for (int r = 0; r < n; r++) {
    // Of close distributions the divergence is alpha beta KL(p || q): it will not do.
    const double kl = (p_d[r] / p_sum[r] + shift[r]) * kLn2;
    const bool close = !(kl >= kFarLoss / (mix.alpha * mix.beta));
    left[r] = {close, close, close};
    some |= !close;
  }
  if (!some) return;

  double p_mean[W] = {}, q_mean[W] = {};
  VecF32 a[kMaxRows], b[kMaxRows];  // one vector a row, to be reduced
  constexpr int64_t block = kVectors ? int64_t(kVectors) * W : kSumBlock;
  for (int64_t begin = 0; begin < (kVectors ? 1 : C); begin += block) {
    for (int r = 0; r < n; r++) {
      a[r] = b[r] = VecF32{};
      if (left[r].value) continue;
      const float *const p_logits = rows.p[r] + begin, *const q_logits = rows.q[r] + begin;
      const float *const p_exps = scratch + 2 * r * C + begin, *const q_exps = p_exps + C;
      float* const p_logs = rows.grad_p[r] ? rows.grad_p[r] + begin : nullptr;
      float* const q_logs = rows.grad_q[r] ? rows.grad_q[r] + begin : nullptr;
      const VecF32 p_max = broadcast(largest.p[r]), q_max = broadcast(largest.q[r]);
      const VecF32 p_factor = broadcast(float(mix.beta / p_sum[r]));
      const VecF32 q_factor = broadcast(float(mix.alpha / q_sum[r]));
      const VecF32 row_shift = broadcast(float(shift[r]));
      VecF32 row_p{}, row_q{};
      for_row<float, kVectors>(std::min(block, C - begin), [&](int64_t i, int lanes) {
        const VecF32 p_less = load_n(p_logits + i, lanes, -kInf) - p_max;
        const VecF32 q_less = load_n(q_logits + i, lanes, -kInf) - q_max;
        const VecF32 d0 = scaled_difference<kSameTemperature>(p_less, q_less, p_scale, q_scale);
        const VecF32 d =
            min(max(d0 + row_shift, broadcast(kNoDifference)), broadcast(-kNoDifference));
        const VecF32 p = load_n(p_exps + i, lanes, 0.0f) * p_factor;  // m = p + q
        const VecF32 q = load_n(q_exps + i, lanes, 0.0f) * q_factor;
        // m's logarithm over the one that is the greater part of it, then over the other.
        const VecF32 less = min(p, q), more = max(p, q);
        const VecF32 ratio = less / max(less + 2.0f * more, broadcast(1e-37f));
        const VecF32 log_more =
            polynomial<float>(ratio * ratio, kArtanh) * ratio + (p > q ? log_beta : log_alpha);
        const VecF32 p_log = p > q ? log_more : log_more - d;
        const VecF32 q_log = p > q ? log_more + d : log_more;
        row_p += p * p_log;
        row_q += q * q_log;
        if (p_logs) store_n(p_logs + i, p_log, lanes);
        if (q_logs) store_n(q_logs + i, q_log, lanes);
      });
      a[r] = row_p, b[r] = row_q;
    }
    add_rows(a, n, p_mean);
    add_rows(b, n, q_mean);
  }

  for (int r = 0; r < n; r++) {
    rows.value[r] = -(p_mean[r] + q_mean[r]) * kLn2;
    if (left[r].value) continue;
    const bool close = !(rows.value[r] >= kFarLoss);
    left[r] = {close, close, close};
    if (close) continue;
    // From logarithms to the gradient. Returns whether that is left.
    const auto gradient = [&](float* grad, const float* exps, float mean, double factor) {
      const float small = kFarGradient * (1 + std::fabs(mean)), change_factor = float(factor);
      VecF32 high{};
      for_row<float, kVectors>(C, [&](int64_t i, int lanes) {
        const VecF32 change =
            load_n(exps + i, lanes, 0.0f) * (mean - load_n(grad + i, lanes, 0.0f));
        high = max(high, abs<float>(change));
        store_n(grad + i, change * change_factor, lanes);
      });
      return !any(high >= small);
    };
    const double factor = rows.factor[r] * kLn2;
    const float* const p_exps = scratch + 2 * r * C;
    if (rows.grad_p[r])
      left[r].grad_p = gradient(rows.grad_p[r], p_exps, float(p_mean[r] / mix.beta),
                                factor * scale.p * mix.beta / p_sum[r]);
    if (rows.grad_q[r])
      left[r].grad_q = gradient(rows.grad_q[r], p_exps + C, float(q_mean[r] / mix.alpha),
                                factor * scale.q * mix.alpha / q_sum[r]);
  }
}

}  // namespace

void jsd_rows(KLRows& rows, int n, int64_t C, KLScales scale, const Mixture& mixture,
              float* scratch, Left* left) {
  with_row_shape(C, scale, [&](auto one_temperature, auto vectors) {
    jsd_rows_of<one_temperature(), vectors()>(rows, n, C, scale, mixture, scratch, left);
  });
}

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
