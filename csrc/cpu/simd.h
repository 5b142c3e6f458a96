// Vectors of the width that this instruction set has, as GCC/Clang vector extensions, and the few
// functions the kernels need on them. Every function is exact about its range; none uses fast-math.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kdkernels {
namespace KDKERNELS_TARGET {

#define KDKERNELS_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float VecF32 __attribute__((vector_size(kVectorBytes)));
typedef double VecF64 __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI32 __attribute__((vector_size(kVectorBytes)));
typedef int64_t VecI64 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));
typedef uint64_t VecU64 __attribute__((vector_size(kVectorBytes)));

// What differs between the two arithmetics.
template <class Float>
struct Simd;

template <>
struct Simd<float> {
  using Vec = VecF32;
  using Int = int32_t;
  using VecInt = VecI32;
  using VecUnsigned = VecU32;
  static constexpr int kMantissaBits = 23;
  static constexpr Int kBias = 127;
  static constexpr float kMinExp = -87.0f;      // exp below this is taken as 0
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;
  // (exp(r) - 1 - r) / r^2 on |r| <= ln(2)/2; least-maximum fit, error of exp 3e-9.
  static constexpr double kExp[] = {0.49999993, 0.16666521, 0.04166839, 0.00836871, 0.00138146};
  // (exp(x) - 1 - x) / x^2 on |x| <= 1/4, Taylor; error 4e-9.
  static constexpr double kExpm1[] = {1. / 2, 1. / 6, 1. / 24, 1. / 120, 1. / 720, 1. / 5040};
};

template <>
struct Simd<double> {
  using Vec = VecF64;
  using Int = int64_t;
  using VecInt = VecI64;
  using VecUnsigned = VecU64;
  static constexpr int kMantissaBits = 52;
  static constexpr Int kBias = 1023;
  static constexpr double kMinExp = -708.0;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2Hi = 6.93147180369123816490e-01;
  static constexpr double kLn2Lo = 1.90821492927058770002e-10;
  static constexpr double kExp[] = {1. / 2,       1. / 6,        1. / 24,        1. / 120,
                                    1. / 720,     1. / 5040,     1. / 40320,     1. / 362880,
                                    1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
  static constexpr double kExpm1[] = {1. / 2,       1. / 6,        1. / 24,        1. / 120,
                                      1. / 720,     1. / 5040,     1. / 40320,     1. / 362880,
                                      1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
};

template <class Float>
using Vec = typename Simd<Float>::Vec;
template <class Float>
using VecInt = typename Simd<Float>::VecInt;
template <class Float>
constexpr int kLanes = kVectorBytes / int(sizeof(Float));

constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
template <class Float>
KDKERNELS_INLINE Vec<Float> broadcast(Float x) {
  return Vec<Float>{} + x;
}

template <class V, class T>
KDKERNELS_INLINE V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class V, class T>
KDKERNELS_INLINE void store(T* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

template <class To, class From>
KDKERNELS_INLINE To bit_cast(From v) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &v, sizeof(To));
  return to;
}

// The first n < lanes elements at p, the others `fill`.
template <class Float>
KDKERNELS_INLINE Vec<Float> load_partial(const Float* p, int n, Float fill) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Float) == 4) {
    return (Vec<Float>)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), __mmask16((1u << n) - 1), p);
  } else {
    return (Vec<Float>)_mm512_mask_loadu_pd(_mm512_set1_pd(fill), __mmask8((1u << n) - 1), p);
  }
#else
  Vec<Float> v = broadcast(fill);
  for (int i = 0; i < n; i++) v[i] = p[i];
  return v;
#endif
}

template <class Float>
KDKERNELS_INLINE void store_partial(Float* p, Vec<Float> v, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Float) == 4) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
  } else {
    _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
  }
#else
  for (int i = 0; i < n; i++) p[i] = v[i];
#endif
}

// The larger of each lane; a NaN in `a` is ignored, one in `b` is taken.
template <class V>
KDKERNELS_INLINE V max(V a, V b) {
  return a > b ? a : b;
}
template <class V>
KDKERNELS_INLINE V min(V a, V b) {
  return a < b ? a : b;
}
#if defined(__AVX512F__)
template <>
KDKERNELS_INLINE VecF32 max(VecF32 a, VecF32 b) {
  return (VecF32)_mm512_max_ps((__m512)a, (__m512)b);
}
template <>
KDKERNELS_INLINE VecF32 min(VecF32 a, VecF32 b) {
  return (VecF32)_mm512_min_ps((__m512)a, (__m512)b);
}
template <>
KDKERNELS_INLINE VecI32 max(VecI32 a, VecI32 b) {
  return (VecI32)_mm512_max_epi32((__m512i)a, (__m512i)b);
}
#elif defined(__AVX2__)
template <>
KDKERNELS_INLINE VecF32 max(VecF32 a, VecF32 b) {
  return (VecF32)_mm256_max_ps((__m256)a, (__m256)b);
}
template <>
KDKERNELS_INLINE VecF32 min(VecF32 a, VecF32 b) {
  return (VecF32)_mm256_min_ps((__m256)a, (__m256)b);
}
template <>
KDKERNELS_INLINE VecI32 max(VecI32 a, VecI32 b) {
  return (VecI32)_mm256_max_epi32((__m256i)a, (__m256i)b);
}
#endif

template <class Float>
KDKERNELS_INLINE Vec<Float> abs(Vec<Float> x) {
  return x < 0 ? -x : x;
}

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
template <class V>
KDKERNELS_INLINE auto reduce_min(V v) {
  return reduce_rows(&v, 1, [](V a, V b) { return min(a, b); })[0];
}

// Adds the lanes of each of n vectors to its sum.
template <class V>
KDKERNELS_INLINE void add_rows(const V* lanes, int n, double* sums) {
  const V row_sums = reduce_rows(lanes, n, [](V a, V b) { return a + b; });
  for (int r = 0; r < n; r++) sums[r] += double(row_sums[r]);
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

template <class V>
KDKERNELS_INLINE bool any(V mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  const VecI64 m = (VecI64)mask;
  return (m[0] | m[1]) != 0;
#endif
}

// 2^n for integer n in [-kBias, kBias], 0 for smaller n.
template <class Float>
KDKERNELS_INLINE Vec<Float> power_of_two(VecInt<Float> n) {
  using S = Simd<Float>;
  const VecInt<Float> biased = max(n + S::kBias, VecInt<Float>{});
  return (Vec<Float>)(biased << S::kMantissaBits);
}

// k[0] + k[1] x + ... by Estrin's scheme: a shorter chain than Horner's, which matters more than
// the few operations it adds. V is a vector or a single number.
template <class Float, int kFirst = 0, class V, int n>
KDKERNELS_INLINE V polynomial(V x, const double (&k)[n]) {
  V terms[n - kFirst];
  for (int i = 0; i < n - kFirst; i++) terms[i] = V{} + Float(k[kFirst + i]);
#pragma GCC unroll 4
  for (int count = n - kFirst; count > 1; count = (count + 1) / 2) {
#pragma GCC unroll 8
    for (int i = 0; i < count / 2; i++) terms[i] = terms[2 * i + 1] * x + terms[2 * i];
    if (count % 2) terms[count / 2] = terms[count - 1];
    x = x * x;
  }
  return terms[0];
}

// e^r for |r| <= ln(2)/2; V is a vector or a single number.
template <class Float, class V>
KDKERNELS_INLINE V small_exp(V r) {
  return polynomial<Float>(r, Simd<Float>::kExp) * (r * r) + (r + Float(1));
}

// e^(x scale) for x <= 0 (and a little above), relative error 1e-7 (float); exactly 1 at 0, 0 where
// it would be below e^kMinExp.
template <class Float>
KDKERNELS_INLINE Vec<Float> exp(Vec<Float> x, Float scale = 1) {
  using S = Simd<Float>;
  using U = typename S::VecUnsigned;  // its overflow is defined, in lanes that are not taken
  const Vec<Float> scaled = x * scale;
  const Vec<Float> shifted = x * Float(scale * kLog2e) + S::kRound;
  const Vec<Float> n = shifted - S::kRound;
  const Vec<Float> r = (scaled - n * S::kLn2Hi) - n * S::kLn2Lo;
  const U y = (U)small_exp<Float>(r) + ((U)shifted << S::kMantissaBits);
  return scaled >= S::kMinExp ? (Vec<Float>)y : Vec<Float>{};
}

// expm1(-x) + x = x^2/2 - x^3/6 + ... for |x| <= 1/4: never negative, relative error 1e-7 (float).
template <class Float>
KDKERNELS_INLINE Vec<Float> expm1_plus(Vec<Float> x) {
  return x * x * polynomial<Float>(-x, Simd<Float>::kExpm1);
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

// The row of n elements in vectors; the last one is filled with `fill` (for loads).
template <class Float, class Body>
KDKERNELS_INLINE void for_each_vector(int64_t n, Body body) {
  constexpr int W = kLanes<Float>;
  int64_t i = 0;
  for (; i + W <= n; i += W) body(i, W);
  if (i < n) body(i, int(n - i));
}

// The same for a row of kVectors vectors, the last of them perhaps not full; 0: any number.
template <class Float, int kVectors, class Body>
KDKERNELS_INLINE void for_row(int64_t n, Body body) {
  if constexpr (kVectors == 0) {
    for_each_vector<Float>(n, body);
  } else {
    constexpr int W = kLanes<Float>;
#pragma GCC unroll 4
    for (int i = 0; i + 1 < kVectors; i++) body(int64_t(i * W), W);
    body(int64_t((kVectors - 1) * W), int(n - (kVectors - 1) * W));
  }
}

// Calls function(std::integral_constant<int, vectors>) for a row of n elements: of so few vectors
// that its loops are best unrolled, else 0.
template <class Float, class Function>
KDKERNELS_INLINE void with_row_vectors(int64_t n, Function function) {
  switch ((n + kLanes<Float> - 1) / kLanes<Float>) {
    case 1:
      return function(std::integral_constant<int, 1>());
    case 2:
      return function(std::integral_constant<int, 2>());
    case 3:
      return function(std::integral_constant<int, 3>());
    case 4:
      return function(std::integral_constant<int, 4>());
    default:
      return function(std::integral_constant<int, 0>());
  }
}

template <class Float>
KDKERNELS_INLINE Vec<Float> load_n(const Float* p, int n, Float fill) {
  return n == kLanes<Float> ? load<Vec<Float>>(p) : load_partial(p, n, fill);
}

template <class Float>
KDKERNELS_INLINE void store_n(Float* p, Vec<Float> v, int n) {
  if (n == kLanes<Float>) {
    store(p, v);
  } else {
    store_partial(p, v, n);
  }
}

// 2 artanh(r) / r for |r| < 0.18, relative error 1e-17.
KDKERNELS_INLINE VecF64 artanh_ratio(VecF64 r) {
  const VecF64 square = r * r;
  VecF64 y = broadcast(2.0 / 27);
#pragma GCC unroll 16
  for (int k = 25; k >= 1; k -= 2) y = y * square + 2.0 / k;
  return y;
}

// x[i] = log2(1 + x[i]) for x >= 0, absolute error 1e-16.
inline void log2_1p(double* x, int64_t n) {
  for_each_vector<double>(n, [&](int64_t i, int lanes) {
    const VecF64 u = load_n(x + i, lanes, 0.0) + 1.0;
    const VecI64 exponent = ((VecI64)u - (VecI64)broadcast(0.7071067811865476)) >> 52;
    const VecF64 f = (VecF64)((VecI64)u - (exponent << 52)) - 1.0;
    const VecF64 r = f / (f + 2.0);
    store_n(x + i, __builtin_convertvector(exponent, VecF64) + artanh_ratio(r) * r * kLog2e, lanes);
  });
}

// x[i] = log(1 + x[i]) for |x| < 0.3, relative error 1e-16.
inline void log_1p_near_zero(double* x, int64_t n) {
  for_each_vector<double>(n, [&](int64_t i, int lanes) {
    const VecF64 f = load_n(x + i, lanes, 0.0), r = f / (f + 2.0);
    store_n(x + i, artanh_ratio(r) * r, lanes);
  });
}

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
