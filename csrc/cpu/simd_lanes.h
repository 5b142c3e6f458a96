// What moves data between the lanes of vectors: reductions, transposition, shifts, a table.

#pragma once

#include <utility>

#include "cpu/simd.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {

// Lane i is element Pattern::at(i, lanes) of `a` and `b`, one after the other.
template <class Pattern, class V, size_t... lane>
KDKERNELS_INLINE V shuffle(V a, V b, std::index_sequence<lane...>) {
  return __builtin_shufflevector(a, b, Pattern::at(int(lane), int(sizeof...(lane)))...);
}
template <class Pattern, class V>
KDKERNELS_INLINE V shuffle(V a, V b) {
  return shuffle<Pattern>(a, b, std::make_index_sequence<sizeof(V) / sizeof(a[0])>());
}

// In every group of kGroup lanes: units of kUnit lanes of `a` and of `b` in turns, from the first
// (kLast: last) half of the group.
template <int kGroup, int kUnit, bool kLast>
struct Interleave {
  static constexpr int at(int i, int lanes) {
    const int group = i / kGroup * kGroup, unit = i % kGroup / kUnit;
    return unit % 2 * lanes + group + (kLast ? kGroup / 2 : 0) + unit / 2 * kUnit + i % kUnit;
  }
};

// The even (kOdd: odd) groups of kGroup lanes of `a`, then those of `b`.
template <int kGroup, bool kOdd>
struct EveryOther {
  static constexpr int at(int i, int) {
    return 2 * (i / kGroup * kGroup) + (kOdd ? kGroup : 0) + i % kGroup;
  }
};

// Lanes of 16 bytes: within these a shuffle is cheapest.
template <class V>
constexpr int kShort = 16 / int(sizeof(V{}[0]));

// Joins x[0] with x[1], x[2] with x[3] and so on: (n + 1) / 2 are left.
template <class Low, class High, class V, class Operation>
KDKERNELS_INLINE int join_neighbours(V* x, int n, Operation operation) {
  const int pairs = (n + 1) / 2;
#pragma GCC unroll 8
  for (int i = 0; i < pairs; i++) {
    const V a = x[2 * i], b = x[2 * i + 1 < n ? 2 * i + 1 : 2 * i];
    x[i] = operation(shuffle<Low>(a, b), shuffle<High>(a, b));
  }
  return pairs;
}

// One number for each of n <= lanes vectors, lane r of the result for v[r]: halves of short groups
// are joined, then neighbouring groups, until one is left. Every vector goes through the same tree,
// so that its result depends neither on its place nor on the vectors beside it.
template <int kRows, class V, class Operation>
KDKERNELS_INLINE V reduce_levels(const V* v, int n, Operation operation) {
  constexpr int lanes = int(sizeof(V) / sizeof(v[0][0])), group = kShort<V>;
  V x[lanes];
  if constexpr (kRows > 0) n = kRows;  // known: every loop below is unrolled
  for (int i = 0; i < n; i++) x[i] = v[i];
  n = join_neighbours<Interleave<group, 1, false>, Interleave<group, 1, true>>(x, n, operation);
  if constexpr (group > 2)
    n = join_neighbours<Interleave<group, 2, false>, Interleave<group, 2, true>>(x, n, operation);
  if constexpr (lanes > group)
    n = join_neighbours<EveryOther<group, false>, EveryOther<group, true>>(x, n, operation);
  if constexpr (lanes > 2 * group)
    join_neighbours<EveryOther<group, false>, EveryOther<group, true>>(x, n, operation);
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

// Lane j of vector i becomes lane i of vector j.
template <class V>
KDKERNELS_INLINE void transpose(V* x) {
  constexpr int n = int(sizeof(V) / sizeof(x[0][0]));
#pragma GCC unroll 4
  for (int level = n; level > 1; level /= 2) {
    V y[n];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; i++) {
      y[2 * i] = shuffle<Interleave<n, 1, false>>(x[i], x[i + n / 2]);
      y[2 * i + 1] = shuffle<Interleave<n, 1, true>>(x[i], x[i + n / 2]);
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

// Element i - 1 + lanes (kDown: i + 1) of two vectors.
template <bool kDown>
struct Shift {
  static constexpr int at(int i, int lanes) { return kDown ? i + 1 : lanes + i - 1; }
};

// Lane i takes lane i - 1 of `v`; lane 0 takes the last lane of `before`.
template <class V>
KDKERNELS_INLINE V shift_up(V before, V v) {
  return shuffle<Shift<false>>(before, v);
}

// Lane i takes lane i + 1 of `v`; the last lane takes lane 0 of `after`.
template <class V>
KDKERNELS_INLINE V shift_down(V v, V after) {
  return shuffle<Shift<true>>(v, after);
}

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
