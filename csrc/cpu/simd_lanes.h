// What moves data between the lanes of vectors: reductions, transposition, shifts, a table.

#pragma once

#include "cpu/simd.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {

// The even (kOdd: odd) lanes of `a`, then those of `b`.
template <bool kOdd, class V>
KDKERNELS_INLINE V every_other(V a, V b) {
  constexpr int n = int(sizeof(V) / sizeof(a[0])), o = kOdd ? 1 : 0;
  if constexpr (n == 16) {
    return __builtin_shufflevector(a, b, o, o + 2, o + 4, o + 6, o + 8, o + 10, o + 12, o + 14,
                                   o + 16, o + 18, o + 20, o + 22, o + 24, o + 26, o + 28, o + 30);
  } else if constexpr (n == 8) {
    return __builtin_shufflevector(a, b, o, o + 2, o + 4, o + 6, o + 8, o + 10, o + 12, o + 14);
  } else if constexpr (n == 4) {
    return __builtin_shufflevector(a, b, o, o + 2, o + 4, o + 6);
  } else {
    return __builtin_shufflevector(a, b, o, o + 2);
  }
}

// One number for each of n <= lanes vectors, lane r of the result for v[r]: neighbouring lanes are
// joined until one is left. Every vector goes through the same tree, so that its result depends
// neither on its place nor on the vectors beside it.
template <int kRows, class V, class Operation>
KDKERNELS_INLINE V reduce_levels(const V* v, int n, Operation operation) {
  constexpr int lanes = int(sizeof(V) / sizeof(v[0][0]));
  V x[lanes];
  if constexpr (kRows > 0) n = kRows;  // known: every loop below is unrolled
  for (int i = 0; i < n; i++) x[i] = v[i];
#pragma GCC unroll 4
  for (int level = lanes; level > 1; level /= 2) {
    const int pairs = (n + 1) / 2;
#pragma GCC unroll 8
    for (int i = 0; i < pairs; i++) {
      const V a = x[2 * i], b = x[2 * i + 1 < n ? 2 * i + 1 : 2 * i];
      x[i] = operation(every_other<false>(a, b), every_other<true>(a, b));
    }
    n = pairs;
  }
  return x[0];
}
template <class V, class Operation>
KDKERNELS_INLINE V reduce_rows(const V* v, int n, Operation operation) {
  constexpr int lanes = int(sizeof(V) / sizeof(v[0][0]));
  if (n == lanes) return reduce_levels<lanes>(v, n, operation);
  if (n == 1) return reduce_levels<1>(v, n, operation);
  if (n == 2) return reduce_levels<2>(v, n, operation);
  return reduce_levels<0>(v, n, operation);
}

template <class V>
KDKERNELS_INLINE auto reduce_add(V v) {
  return reduce_rows(&v, 1, [](V a, V b) { return a + b; })[0];
}
template <class V>
KDKERNELS_INLINE auto reduce_max(V v) {
  return reduce_rows(&v, 1, [](V a, V b) { return max(a, b); })[0];
}

// Adds the lanes of each of n vectors to its sum; `sums` has room for one of every lane.
template <class V>
KDKERNELS_INLINE void add_rows(const V* lanes, int n, double* sums) {
  constexpr int W = int(sizeof(V) / sizeof(lanes[0][0]));
  const V row_sums = reduce_rows(lanes, n, [](V a, V b) { return a + b; });
#pragma GCC unroll 16
  for (int r = 0; r < W; r++) sums[r] += double(row_sums[r]);
}

// The first (kLast: the last) halves of `a` and `b`, a lane of the one after a lane of the other.
template <bool kLast, class V>
KDKERNELS_INLINE V interleave(V a, V b) {
  constexpr int n = int(sizeof(V) / sizeof(a[0])), s = kLast ? n / 2 : 0;
  if constexpr (n == 16) {
    return __builtin_shufflevector(a, b, s, s + 16, s + 1, s + 17, s + 2, s + 18, s + 3, s + 19,
                                   s + 4, s + 20, s + 5, s + 21, s + 6, s + 22, s + 7, s + 23);
  } else if constexpr (n == 8) {
    return __builtin_shufflevector(a, b, s, s + 8, s + 1, s + 9, s + 2, s + 10, s + 3, s + 11);
  } else if constexpr (n == 4) {
    return __builtin_shufflevector(a, b, s, s + 4, s + 1, s + 5);
  } else {
    return __builtin_shufflevector(a, b, s, s + 2);
  }
}

// Lane j of vector i becomes lane i of vector j.
template <class V>
KDKERNELS_INLINE void transpose(V* x) {
  constexpr int n = int(sizeof(V) / sizeof(x[0][0]));
#pragma GCC unroll 4
  for (int level = n; level > 1; level /= 2) {
    V y[n];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; i++) {
      y[2 * i] = interleave<false>(x[i], x[i + n / 2]);
      y[2 * i + 1] = interleave<true>(x[i], x[i + n / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; i++) x[i] = y[i];
  }
}

// A table of two vectors in registers, where this instruction set can look lanes up in one.
template <class Float>
constexpr bool kHasLookup =
#if defined(__AVX512F__)
    sizeof(Float) == 4;
#else
    false;
#endif

template <class V>
KDKERNELS_INLINE V lookup(V low, V high, VecI32 index) {
#if defined(__AVX512F__)
  return (V)_mm512_permutex2var_epi32((__m512i)low, (__m512i)index, (__m512i)high);
#else
  (void)high, (void)index;
  return low;  // never called: kHasLookup
#endif
}

// The same in a table of kPairs times two vectors.
template <int kPairs, class V>
KDKERNELS_INLINE V lookup(const V* table, VecI32 index) {
  V x = lookup(table[0], table[1], index);
#pragma GCC unroll 4
  for (int i = 1; i < kPairs; i++) {
    const V y = lookup(table[2 * i], table[2 * i + 1], index);
    x = index >= 2 * i * kLanes<float> ? y : x;
  }
  return x;
}

// Lane i takes lane i - 1 of `v`; lane 0 takes the last lane of `before`.
template <class V>
KDKERNELS_INLINE V shift_up(V before, V v) {
  constexpr int n = int(sizeof(V) / sizeof(v[0]));
  if constexpr (n == 16) {
    return __builtin_shufflevector(before, v, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27,
                                   28, 29, 30);
  } else if constexpr (n == 8) {
    return __builtin_shufflevector(before, v, 7, 8, 9, 10, 11, 12, 13, 14);
  } else if constexpr (n == 4) {
    return __builtin_shufflevector(before, v, 3, 4, 5, 6);
  } else {
    return __builtin_shufflevector(before, v, 1, 2);
  }
}

// Lane i takes lane i + 1 of `v`; the last lane takes lane 0 of `after`.
template <class V>
KDKERNELS_INLINE V shift_down(V v, V after) {
  constexpr int n = int(sizeof(V) / sizeof(v[0]));
  if constexpr (n == 16) {
    return __builtin_shufflevector(v, after, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16);
  } else if constexpr (n == 8) {
    return __builtin_shufflevector(v, after, 1, 2, 3, 4, 5, 6, 7, 8);
  } else if constexpr (n == 4) {
    return __builtin_shufflevector(v, after, 1, 2, 3, 4);
  } else {
    return __builtin_shufflevector(v, after, 1, 2);
  }
}

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
