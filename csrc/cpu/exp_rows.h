// Several pairs of rows of float32 logits to their exponentials: the first step of every divergence
// in float32.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cpu/kl_rows.h"
#include "cpu/simd_lanes.h"
#include "cpu/simd_math.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {

// Classes summed in float, in four parts, before the sum goes on in double, so that rounding does
// not grow with C: of few distinct numbers a sum rounds the same way again and again.
constexpr int64_t kSumBlock = 32 * kLanes<float>;
// In place of d where that is -inf, or NaN: p is 0 there.
constexpr float kNoDifference = -1e30f;

struct Maxima {
  float p[kMaxRows], q[kMaxRows];  // the largest logits of each row
};

// d without the normalisers in units of log 2, from logits less their maxima and scales in these
// units; NaN where both are masked. Where there is one temperature, equal classes have d = 0; where
// there are two, a product is rounded by no more than the logarithm of a probability.
template <bool kSameTemperature>
KDKERNELS_INLINE VecF32 scaled_difference(VecF32 p, VecF32 q, float p_scale, float q_scale) {
  if constexpr (kSameTemperature) return (p - q) * q_scale;
  return less_product<float>(p * p_scale, q, q_scale);
}

// function(std::bool_constant<one temperature>, std::integral_constant<int, vectors>), the latter
// as in with_row_vectors.
template <class Function>
KDKERNELS_INLINE void with_row_shape(int64_t C, KLScales scale, Function function) {
  with_row_vectors<float>(C, [&](auto vectors) {
    if (scale.p == scale.q) {
      function(std::true_type(), vectors);
    } else {
      function(std::false_type(), vectors);
    }
  });
}

// The exponentials of the scaled logits less their maxima, into scratch [n][2][C]; added to p_sum,
// q_sum and p_d [kMaxRows]: their sums, and the sum of p d, d without the normalisers in units of
// log
// 2. A row's numbers do not depend on the rows beside it.
template <int kVectors>
KDKERNELS_INLINE void exp_rows(const KLRows& rows, int n, int64_t C, KLScales scale, float* scratch,
                               Maxima& largest, double* p_sum, double* q_sum, double* p_d) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr int W = kLanes<float>;
  const auto larger = [](VecF32 a, VecF32 b) { return max(a, b); };
  VecF32 a[kMaxRows], b[kMaxRows], c[kMaxRows];  // one vector a row, to be reduced
  for (int r = 0; r < n; r++) {
    VecF32 p_high = broadcast(-kInf), q_high = p_high;
    for_row<float, kVectors>(C, [&](int64_t i, int lanes) {
      p_high = max(p_high, load_n(rows.p[r] + i, lanes, -kInf));
      q_high = max(q_high, load_n(rows.q[r] + i, lanes, -kInf));
    });
    a[r] = p_high, b[r] = q_high;
  }
  store(largest.p, reduce_rows(a, n, larger));
  store(largest.q, reduce_rows(b, n, larger));

  const float p_scale = float(scale.p * kLog2e), q_scale = float(scale.q * kLog2e);
  constexpr int64_t block = kVectors ? int64_t(kVectors) * W : kSumBlock;
  for (int64_t begin = 0; begin < (kVectors ? 1 : C); begin += block) {
    for (int r = 0; r < n; r++) {
      const float *const p_logits = rows.p[r] + begin, *const q_logits = rows.q[r] + begin;
      const float* const some_grad = rows.grad_q[r] ? rows.grad_q[r] : rows.grad_p[r];
      const float* const grad = some_grad ? some_grad + begin : nullptr;
      float *const p_exps = scratch + 2 * r * C + begin, *const q_exps = p_exps + C;
      const VecF32 p_max = broadcast(largest.p[r]), q_max = broadcast(largest.q[r]);
      const int64_t size = std::min(block, C - begin);
      VecF32 row_p{}, row_q{}, row_p_d{};
      for (int64_t from = 0; from < (kVectors ? 1 : size); from += kSumBlock / 4) {
        VecF32 some_p{}, some_q{}, some_p_d{};
        const int64_t some = kVectors ? size : std::min(kSumBlock / 4, size - from);
        for_row<float, kVectors>(some, [&](int64_t k, int lanes) {
          const int64_t i = from + k;
          const VecF32 p = load_n(p_logits + i, lanes, -kInf) - p_max;
          const VecF32 q = load_n(q_logits + i, lanes, -kInf) - q_max;
          __builtin_prefetch(p_logits + i + scale.p_ahead);
          __builtin_prefetch(q_logits + i + scale.q_ahead);
          if (kVectors == 0 && grad && !scale.past_caches) __builtin_prefetch(grad + i, 1);
          const VecF32 d = p * p_scale - q * q_scale;
          const VecF32 p_exp = exp2(p, p_scale), q_exp = exp2(q, q_scale);
          some_p += p_exp;
          some_q += q_exp;
          some_p_d += p_exp * max(d, broadcast(kNoDifference));
          store_n(p_exps + i, p_exp, lanes);
          store_n(q_exps + i, q_exp, lanes);
        });
        row_p += some_p, row_q += some_q, row_p_d += some_p_d;
      }
      a[r] = row_p, b[r] = row_q, c[r] = row_p_d;
    }
    add_rows(a, n, p_sum);
    add_rows(b, n, q_sum);
    add_rows(c, n, p_d);
  }
}

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
