// Vectors of the width that this instruction set has, as GCC/Clang vector extensions: types, loads
// and stores, loops over a row.

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
  // (2^r - 1) / r on |r| <= 1/2; least-maximum fit, error of 2^r 1.1e-7.
  static constexpr float kExp2[] = {0.69314698f, 0.24022242f, 0.055507338f, 0.0096715132f,
                                    0.0013264725f};
  // (exp(x) - 1 - x) / x^2 on |x| <= 1, Taylor; relative error 5e-8.
  static constexpr double kExpm1[] = {1. / 2,    1. / 6,     1. / 24,     1. / 120,    1. / 720,
                                      1. / 5040, 1. / 40320, 1. / 362880, 1. / 3628800};
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
// What kLn2 has beyond a Float.
template <class Float>
constexpr Float kLn2Rest =
    sizeof(Float) == 4 ? Float(kLn2 - double(float(kLn2))) : Float(2.3190468138462996e-17);
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

// To a multiple of kVectorBytes, past the caches where this instruction set can; `stored_past`
// makes what this thread has stored so be seen before what it stores next.
KDKERNELS_INLINE void store_past(float* p, VecF32 v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}
inline void stored_past() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
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
KDKERNELS_INLINE VecF64 max(VecF64 a, VecF64 b) {
  return (VecF64)_mm512_max_pd((__m512d)a, (__m512d)b);
}
template <>
KDKERNELS_INLINE VecF64 min(VecF64 a, VecF64 b) {
  return (VecF64)_mm512_min_pd((__m512d)a, (__m512d)b);
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
KDKERNELS_INLINE VecF64 max(VecF64 a, VecF64 b) {
  return (VecF64)_mm256_max_pd((__m256d)a, (__m256d)b);
}
template <>
KDKERNELS_INLINE VecF64 min(VecF64 a, VecF64 b) {
  return (VecF64)_mm256_min_pd((__m256d)a, (__m256d)b);
}
#endif

template <class Float>
KDKERNELS_INLINE Vec<Float> abs(Vec<Float> x) {
  return x < 0 ? -x : x;
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

// Bit i says whether lane i of a comparison is true.
template <class V>
KDKERNELS_INLINE unsigned lane_bits(V mask) {
  [[maybe_unused]] constexpr bool wide = sizeof(mask[0]) == 8;
#if defined(__AVX512F__)
  const __m512i m = (__m512i)mask;
  return wide ? unsigned(_mm512_movepi64_mask(m)) : unsigned(_mm512_movepi32_mask(m));
#elif defined(__AVX2__)
  return unsigned(wide ? _mm256_movemask_pd((__m256d)mask) : _mm256_movemask_ps((__m256)mask));
#else
  unsigned bits = 0;
  for (unsigned i = 0; i < sizeof(V) / sizeof(mask[0]); i++) bits |= unsigned(mask[i] != 0) << i;
  return bits;
#endif
}

// How many lanes of a comparison are true.
template <class V>
KDKERNELS_INLINE int count_lanes(V mask) {
  return __builtin_popcount(lane_bits(mask));
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

typedef float HalfF32 __attribute__((vector_size(kVectorBytes / 2)));
// GCC 12 converts halves of the vector one by one.
KDKERNELS_INLINE VecF64 widen(HalfF32 v) {
#if defined(__AVX512F__)
  return (VecF64)_mm512_cvtps_pd((__m256)v);
#elif defined(__AVX2__)
  return (VecF64)_mm256_cvtps_pd((__m128)v);
#else
  return __builtin_convertvector(v, VecF64);
#endif
}
KDKERNELS_INLINE HalfF32 narrowed(VecF64 v) {
#if defined(__AVX512F__)
  return (HalfF32)_mm512_cvtpd_ps((__m512d)v);
#elif defined(__AVX2__)
  return (HalfF32)_mm256_cvtpd_ps((__m256d)v);
#else
  return __builtin_convertvector(v, HalfF32);
#endif
}

// A row of floats in vectors of doubles: the first n <= kLanes<double> elements at p, the others
// `fill`; and back, rounded.
KDKERNELS_INLINE VecF64 load_wide(const float* p, int n, float fill) {
  if (n == kLanes<double>) return widen(load<HalfF32>(p));
#if defined(__AVX512F__)
  return widen((HalfF32)_mm256_mask_loadu_ps(_mm256_set1_ps(fill), __mmask8((1u << n) - 1), p));
#else
  HalfF32 v = HalfF32{} + fill;
#pragma GCC unroll 4
  for (int i = 0; i < kLanes<double>; i++) {
    if (i < n) v[i] = p[i];
  }
  return widen(v);
#endif
}
KDKERNELS_INLINE VecF64 load_wide(const double* p, int n, double fill) {
  return load_n(p, n, fill);
}
KDKERNELS_INLINE void store_wide(float* p, VecF64 v, int n) {
  if (n == kLanes<double>) return store(p, narrowed(v));
#if defined(__AVX512F__)
  _mm256_mask_storeu_ps(p, __mmask8((1u << n) - 1), (__m256)narrowed(v));
#else
  const HalfF32 narrow = narrowed(v);
#pragma GCC unroll 4
  for (int i = 0; i < kLanes<double>; i++) {
    if (i < n) p[i] = narrow[i];
  }
#endif
}
KDKERNELS_INLINE void store_wide(double* p, VecF64 v, int n) { store_n(p, v, n); }

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
