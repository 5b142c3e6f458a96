// The dense side of CTC: for each frame the softmax statistics of its logits, the dense part of the
// gradient while the row is in the cache, and the probabilities of the symbols the target needs.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/ctc_recursion.h"
#include "cpu/row.h"
#include "cpu/simd_lanes.h"
#include "cpu/simd_math.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {

// exp(x - max) of each logit as (m, e): 2^n exp(r), with the rounding of x - max carried along, and
// n goes to e whole.
template <class Float>
KDKERNELS_INLINE Number<Float> exponential(Vec<Float> x, Vec<Float> max_x) {
  using V = Vec<Float>;
  const Float lowest = Float(kZeroSymbol<Float> * kLn2);
  const V difference = x - max_x, minus_max = difference - x;
  const V lost = (x - (difference - minus_max)) - (max_x + minus_max);
  const V d = max(broadcast(lowest), difference);
  V n, r;
#if defined(__FMA__)
  n = nearest<Float>(d * Float(kLog2e));
  r = less_product<Float>(less_product<Float>(d, n, Float(kLn2)), n, kLn2Rest<Float>);
#else  // in two steps, since there are more n than kRound has room for, each product exact
  using S = Simd<Float>;
  const V quotient = d * Float(kLog2e);
  const V coarse = ((quotient * Float(1.0 / 4096) + S::kRound) - S::kRound) * Float(4096);
  const V fine = ((quotient - coarse) + S::kRound) - S::kRound;
  n = coarse + fine;
  r = ((d - coarse * S::kLn2Hi) - fine * S::kLn2Hi) - n * S::kLn2Lo;
#endif
  r = d <= lowest ? V{} : r + lost;
  return {small_exp<Float>(r), n};
}

// One frame; what softmax_rows fills in is marked (out).
template <class Float>
struct SoftmaxRow {
  const Float* logits;  // [C]
  Float* exponentials;  // [C] (out) exp(x - max), or null
  // (out) the same in (m, e), or null. [C] in whole vectors, the rest of which get 0 by its e.
  Float *m, *e;
  bool valid;   // (out) no NaN, no +inf, at least one class left
  Float max;    // (out)
  double rest;  // (out) sum of exp(x - max), less 1: kept apart, small in a certain row
};

// n <= lanes rows of logits. Fetched meanwhile: the rows that take their places in the next call,
// `ahead` elements further on, and `written`, rows of Float that are then written, if there are
// any.
template <class Float, int kVectors, bool kNumbers>
void softmax_rows_of(SoftmaxRow<Float>* rows, int n, int64_t C, int64_t ahead, RowsAt written) {
  using V = Vec<Float>;
  constexpr int W = kLanes<Float>;
  constexpr Float kInf = std::numeric_limits<Float>::infinity();
  V largest[W];
  for (int r = 0; r < n; r++) {
    V high = broadcast(-kInf);
    for_row<Float, kVectors>(C, [&](int64_t c, int lanes) {
      high = max(high, load_n(rows[r].logits + c, lanes, -kInf));
    });
    largest[r] = high;
  }
  const V maxima = reduce_rows(largest, n, [](V a, V b) { return max(a, b); });
  for (int r = 0; r < n; r++) rows[r].max = maxima[r];
  double sums[W] = {};
  int64_t ones[W] = {};
  // Summed in Float before the sum goes on in double.
  constexpr int64_t block = (kVectors ? kVectors : 32) * W;
  for (int64_t begin = 0; begin < (kVectors ? 1 : C); begin += block) {
    // Classes that share the maximum are counted, so that the others' sum is not rounded to them.
    V rest[W];
    for (int r = 0; r < n; r++) {
      const SoftmaxRow<Float>& row = rows[r];
      const Float* const out = kVectors ? nullptr : static_cast<const Float*>(written[r]);
      V sum{};
      for_row<Float, kVectors>(std::min(block, C - begin), [&](int64_t i, int lanes) {
        const V x = load_n(row.logits + begin + i, lanes, -kInf), d = x - row.max;
        __builtin_prefetch(row.logits + begin + i + ahead, 0, 2);
        if (out) __builtin_prefetch(out + begin + i, 1);
        V y;
        if constexpr (kNumbers) {
          const Number<Float> number = exponential<Float>(x, broadcast(row.max));
          store(row.m + begin + i, number.m);
          store(row.e + begin + i, number.e);
          y = number.e < Float(1 - Simd<Float>::kBias) ? V{}
                                                       : scale_by_power<Float>(number.m, number.e);
        } else {
          y = exp<Float>(d);
        }
        sum = d == 0 ? sum : sum + y;
        ones[r] += count_lanes(d == 0);
        if (row.exponentials) store_n(row.exponentials + begin + i, y, lanes);
      });
      rest[r] = sum;
    }
    add_rows(rest, n, sums);
  }
  for (int r = 0; r < n; r++) {  // a NaN or an infinity makes the sum NaN
    rows[r].valid = sums[r] == sums[r];
    rows[r].rest = sums[r] + double(ones[r] - 1);
  }
}

// All rows with numbers, or none.
template <class Float>
void softmax_rows(SoftmaxRow<Float>* rows, int n, int64_t C, int64_t ahead, RowsAt written) {
  with_row_vectors<Float>(C, [&](auto vectors) {
    if (rows[0].m) {
      softmax_rows_of<Float, vectors(), true>(rows, n, C, ahead, written);
    } else {
      softmax_rows_of<Float, vectors(), false>(rows, n, C, ahead, written);
    }
  });
}

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
