// The dense side of CTC: for each frame the softmax statistics of its logits, the dense part of the
// gradient while the row is in the cache, and the probabilities of the symbols the target needs.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/ctc_recursion.h"
#include "cpu/simd.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {

template <class Float>
struct SoftmaxRow {
  bool valid;   // no NaN, no +inf, at least one class left
  Float max;
  double rest;  // sum of exp(x - max), less 1: small where one class has all, so kept apart
};

// Statistics of the row; with `exponentials` also exp(x - max) of each class.
template <class Float>
SoftmaxRow<Float> softmax_row(const Float* logits, int64_t C, Float* exponentials) {
  using V = Vec<Float>;
  constexpr Float kInf = std::numeric_limits<Float>::infinity();
  V largest = broadcast(-kInf);
  VecInt<Float> nan{};
  for_each_vector<Float>(C, [&](int64_t c, int n) {
    const V x = load_n(logits + c, n, -kInf);
    nan |= x != x;
    largest = max(largest, x);
  });
  SoftmaxRow<Float> row{};
  row.max = reduce_max(largest);
  row.valid = !any(nan) && std::fabs(row.max) < kInf;
  if (!row.valid) return row;
  // Classes that share the maximum are counted, so that the others' sum is not rounded to them.
  row.rest = -1;
  constexpr int64_t block = 32 * kLanes<Float>;
  for (int64_t begin = 0; begin < C; begin += block) {
    V sum{}, count{};
    for_each_vector<Float>(std::min(block, C - begin), [&](int64_t i, int n) {
      const V x = load_n(logits + begin + i, n, -kInf) - row.max;
      const V e = exp<Float>(x);
      count += x == 0 ? broadcast(Float(1)) : V{};
      sum += x == 0 ? V{} : e;
      if (exponentials) store_n(exponentials + begin + i, e, n);
    });
    row.rest += double(reduce_add(count)) + double(reduce_add(sum));
  }
  return row;
}

// exp(max) times the sum of the exponentials, so that a logit becomes a probability in (m, e).
template <class Float>
struct SoftmaxScale {
  Float max, inverse_m;  // sum = m * 2^e with m in [1, 2)
  typename Simd<Float>::Int e;

  explicit SoftmaxScale(Float max, double sum) : max(max) {
    const int64_t bits = bit_cast<int64_t>(sum);
    e = typename Simd<Float>::Int((bits >> 52) - 1023);
    inverse_m = Float(1 / bit_cast<double>(bits - (int64_t(e) << 52)));
  }
};

// The probability of each logit, in (m, e): exp(x - max) is 2^n exp(r), with the rounding of x - max
// carried along, and n goes to e whole.
template <class Float>
KDKERNELS_INLINE Number<Float> to_probability(Vec<Float> x, const SoftmaxScale<Float>& scale) {
  using S = Simd<Float>;
  x = max(x, broadcast(scale.max + Float(kZeroSymbol<Float> * kLn2)));
  const Vec<Float> d = x - scale.max, minus_max = d - x;
  const Vec<Float> lost = (x - (d - minus_max)) - (scale.max + minus_max);
  const Vec<Float> n = (d * Float(kLog2e) + S::kRound) - S::kRound;
  const Vec<Float> r = ((d - n * S::kLn2Hi) - n * S::kLn2Lo) + lost;
  return {small_exp<Float>(r) * scale.inverse_m,
          __builtin_convertvector(n, VecInt<Float>) - scale.e};
}

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
