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

// x[i] = log2(1 + x[i]) for x >= 0.
inline void log2_1p(double* x, int64_t n) {
  using V = VecF64;
  using I = VecI64;
  for_each_vector<double>(n, [&](int64_t i, int lanes) {
    const V u = load_n(x + i, lanes, 0.0) + 1.0;
    const I exponent = ((I)u - (I)broadcast(0.7071067811865476)) >> 52;
    const V f = (V)((I)u - (exponent << 52)) - 1.0;
    const V r = f / (f + 2.0), square = r * r;
    V y = broadcast(2.0 / 27);
#pragma GCC unroll 16
    for (int k = 25; k >= 1; k -= 2) y = y * square + 2.0 / k;
    store_n(x + i, __builtin_convertvector(exponent, V) + y * r * kLog2e, lanes);
  });
}

// In place: the logit in m becomes the probability 2^((m - max) log2(e) - log2_sum) in (m, e).
// Double keeps what float32 would lose of a large exponent.
template <class Float>
KDKERNELS_INLINE void to_probability(Float* m, typename Simd<Float>::Int* e, int64_t n, double max,
                                     double log2_sum) {
  using S = Simd<Float>;
  constexpr double lowest = double(kZeroSymbol<Float>);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    double y = (double(m[i]) - max) * kLog2e - log2_sum;
    y = y > lowest ? y : lowest;
    const double whole = (y + Simd<double>::kRound) - Simd<double>::kRound;
    const Float r = Float((y - whole) * kLn2);
    Float p = Float(kInverseFactorial[S::kExpDegree]);
#pragma GCC unroll 16
    for (int k = S::kExpDegree - 1; k >= 0; k--) p = p * r + Float(kInverseFactorial[k]);
    m[i] = p;
    e[i] = typename S::Int(whole);
  }
}

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
