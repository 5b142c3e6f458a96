// Vectors of the width that this instruction set has, as GCC/Clang vector extensions, and the few
// functions the kernels need on them. Every function is exact about its range; none uses fast-math.

#pragma once

#include <cstdint>
#include <cstring>
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

// What differs between the two arithmetics.
template <class Float>
struct Simd;

template <>
struct Simd<float> {
  using Vec = VecF32;
  using Int = int32_t;
  using VecInt = VecI32;
  static constexpr int kMantissaBits = 23;
  static constexpr Int kBias = 127;
  static constexpr float kMinExp = -87.0f;  // exp below this is taken as 0
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;
  static constexpr int kExpDegree = 7;     // Taylor on |x| <= ln(2)/2, error 5e-9
  static constexpr int kExpm1Degree = 10;  // Taylor on |x| <= 1/2, error 1e-9
};

template <>
struct Simd<double> {
  using Vec = VecF64;
  using Int = int64_t;
  using VecInt = VecI64;
  static constexpr int kMantissaBits = 52;
  static constexpr Int kBias = 1023;
  static constexpr double kMinExp = -708.0;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2Hi = 6.93147180369123816490e-01;
  static constexpr double kLn2Lo = 1.90821492927058770002e-10;
  static constexpr int kExpDegree = 13;
  static constexpr int kExpm1Degree = 18;
};

template <class Float>
using Vec = typename Simd<Float>::Vec;
template <class Float>
using VecInt = typename Simd<Float>::VecInt;
template <class Float>
constexpr int kLanes = kVectorBytes / int(sizeof(Float));

constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
constexpr double kInverseFactorial[] = {1.0,
                                        1.0,
                                        1.0 / 2,
                                        1.0 / 6,
                                        1.0 / 24,
                                        1.0 / 120,
                                        1.0 / 720,
                                        1.0 / 5040,
                                        1.0 / 40320,
                                        1.0 / 362880,
                                        1.0 / 3628800,
                                        1.0 / 39916800,
                                        1.0 / 479001600,
                                        1.0 / 6227020800,
                                        1.0 / 87178291200,
                                        1.0 / 1307674368000,
                                        1.0 / 20922789888000,
                                        1.0 / 355687428096000,
                                        1.0 / 6402373705728000};

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

// Halve the vector by a fixed tree, so that a reduction has one order whatever the compiler does.
#define KDKERNELS_REDUCE(name, operation)                          \
  template <class V>                                               \
  KDKERNELS_INLINE auto name(V v) {                                \
    constexpr int n = int(sizeof(V) / sizeof(v[0]));               \
    auto lanes = v;                                                \
    for (int width = n / 2; width > 0; width /= 2) {               \
      for (int i = 0; i < width; i++) {                            \
        const auto a = lanes[i], b = lanes[i + width];             \
        lanes[i] = operation;                                      \
      }                                                            \
    }                                                              \
    return lanes[0];                                               \
  }
KDKERNELS_REDUCE(reduce_add_generic, a + b)
KDKERNELS_REDUCE(reduce_max_generic, (a > b ? a : b))
KDKERNELS_REDUCE(reduce_min_generic, (a < b ? a : b))
#undef KDKERNELS_REDUCE

template <class V>
KDKERNELS_INLINE auto reduce_add(V v) {
  return reduce_add_generic(v);
}
template <class V>
KDKERNELS_INLINE auto reduce_max(V v) {
  return reduce_max_generic(v);
}
template <class V>
KDKERNELS_INLINE auto reduce_min(V v) {
  return reduce_min_generic(v);
}
#if defined(__AVX512F__)
template <>
KDKERNELS_INLINE auto reduce_add(VecF32 v) {
  return _mm512_reduce_add_ps((__m512)v);
}
template <>
KDKERNELS_INLINE auto reduce_max(VecF32 v) {
  return _mm512_reduce_max_ps((__m512)v);
}
template <>
KDKERNELS_INLINE auto reduce_min(VecF32 v) {
  return _mm512_reduce_min_ps((__m512)v);
}
#endif

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

template <class Float>
KDKERNELS_INLINE Vec<Float> taylor_exp(Vec<Float> r) {
  constexpr int degree = Simd<Float>::kExpDegree;
  Vec<Float> y = broadcast(Float(kInverseFactorial[degree]));
#pragma GCC unroll 16
  for (int i = degree - 1; i >= 0; i--) y = y * r + Float(kInverseFactorial[i]);
  return y;
}

// e^x for x <= 0 (and a little above), relative error 1e-7 (float); exactly 1 at 0, 0 below kMinExp.
template <class Float>
KDKERNELS_INLINE Vec<Float> exp(Vec<Float> x) {
  using S = Simd<Float>;
  const Vec<Float> shifted = x * Float(kLog2e) + S::kRound;
  const Vec<Float> n = shifted - S::kRound;
  const Vec<Float> r = (x - n * S::kLn2Hi) - n * S::kLn2Lo;
  const Vec<Float> y = taylor_exp<Float>(r);
  const VecInt<Float> scaled = (VecInt<Float>)y + ((VecInt<Float>)shifted << S::kMantissaBits);
  return x >= S::kMinExp ? (Vec<Float>)scaled : Vec<Float>{};
}

// expm1(-x) + x = x^2/2 - x^3/6 + ... for |x| <= 1/2: never negative, relative error 1e-7 (float).
template <class Float>
KDKERNELS_INLINE Vec<Float> expm1_plus(Vec<Float> x) {
  constexpr int degree = Simd<Float>::kExpm1Degree;
  const Vec<Float> minus_x = -x;
  Vec<Float> y = broadcast(Float(kInverseFactorial[degree]));
#pragma GCC unroll 20
  for (int i = degree - 1; i >= 2; i--) y = y * minus_x + Float(kInverseFactorial[i]);
  return x * x * y;
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

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
