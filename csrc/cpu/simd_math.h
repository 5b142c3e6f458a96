// Functions of vectors. Each says its range and its error; none needs fast-math.

#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {

// m 2^e for a whole number e <= kBias; 0 for an e too small.
template <class Float>
KDKERNELS_INLINE Vec<Float> scale_by_power(Vec<Float> m, Vec<Float> e) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Float) == 4) {
    return (Vec<Float>)_mm512_scalef_ps((__m512)m, (__m512)e);
  } else {
    return (Vec<Float>)_mm512_scalef_pd((__m512d)m, (__m512d)e);
  }
#else
  using S = Simd<Float>;  // the sum's last bits are e's biased exponent
  const Vec<Float> biased = max(e, broadcast(Float(-S::kBias))) + (S::kRound + S::kBias);
  return m * (Vec<Float>)((VecInt<Float>)biased << S::kMantissaBits);
#endif
}

#if defined(__FMA__)
// The nearest whole number.
template <class Float>
KDKERNELS_INLINE Vec<Float> nearest(Vec<Float> x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#if defined(__AVX512F__)
  if constexpr (sizeof(Float) == 4) {
    return (Vec<Float>)_mm512_roundscale_ps((__m512)x, kNearest);
  } else {
    return (Vec<Float>)_mm512_roundscale_pd((__m512d)x, kNearest);
  }
#else
  if constexpr (sizeof(Float) == 4) {
    return (Vec<Float>)_mm256_round_ps((__m256)x, kNearest);
  } else {
    return (Vec<Float>)_mm256_round_pd((__m256d)x, kNearest);
  }
#endif
}
#endif

// x - n k: rounded once with FMA, which the compiler would use here and not there by itself.
template <class Float>
KDKERNELS_INLINE Vec<Float> less_product(Vec<Float> x, Vec<Float> n, Vec<Float> k) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Float) == 4) {
    return (Vec<Float>)_mm512_fnmadd_ps((__m512)n, (__m512)k, (__m512)x);
  } else {
    return (Vec<Float>)_mm512_fnmadd_pd((__m512d)n, (__m512d)k, (__m512d)x);
  }
#elif defined(__FMA__)
  if constexpr (sizeof(Float) == 4) {
    return (Vec<Float>)_mm256_fnmadd_ps((__m256)n, (__m256)k, (__m256)x);
  } else {
    return (Vec<Float>)_mm256_fnmadd_pd((__m256d)n, (__m256d)k, (__m256d)x);
  }
#else
  return x - n * k;
#endif
}
template <class Float>
KDKERNELS_INLINE Vec<Float> less_product(Vec<Float> x, Vec<Float> n, Float k) {
  return less_product<Float>(x, n, broadcast(k));
}

// x = mantissa_of(x) 2^exponent_of(x), the mantissa in [1, 2), for normal x > 0. Of 0 the exponent
// is -kBias or less.
template <class Float>
KDKERNELS_INLINE Vec<Float> mantissa_of(Vec<Float> x) {
  constexpr auto kBits = (typename Simd<Float>::Int(1) << Simd<Float>::kMantissaBits) - 1;
  return (Vec<Float>)(((VecInt<Float>)x & kBits) | (VecInt<Float>)broadcast(Float(1)));
}
template <class Float>
KDKERNELS_INLINE Vec<Float> exponent_of(Vec<Float> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Float) == 4) {
    return (Vec<Float>)_mm512_getexp_ps((__m512)x);
  } else {
    return (Vec<Float>)_mm512_getexp_pd((__m512d)x);
  }
#else
  using S =
      Simd<Float>;  // a number whose last bits are the biased exponent, less what it is in all
  const VecInt<Float> bits =
      ((VecInt<Float>)x >> S::kMantissaBits) | (VecInt<Float>)broadcast(S::kRound);
  return (Vec<Float>)bits - (S::kRound + S::kBias);
#endif
}

// k[0] + k[1] x + ... by Estrin's scheme: a shorter chain than Horner's, which matters more than
// the few operations it adds. V is a vector or a single number.
template <class Float, class V, int n>
KDKERNELS_INLINE V polynomial(V x, const double (&k)[n]) {
  V terms[n];
  for (int i = 0; i < n; i++) terms[i] = V{} + Float(k[i]);
#pragma GCC unroll 4
  for (int count = n; count > 1; count = (count + 1) / 2) {
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

// 2^(x scale) for a product <= 0 (and a little above), relative error 2e-7; exactly 1 at 0, 0 where
// it would be below e^kMinExp, NaN for a NaN. With FMA the product is not rounded.
KDKERNELS_INLINE VecF32 exp2(VecF32 x, float scale = 1) {
  using S = Simd<float>;
  constexpr float lowest = float(S::kMinExp * kLog2e);
  const VecF32 scaled = x * scale;
#if defined(__FMA__)
  const VecF32 n = nearest<float>(scaled);
#if defined(__AVX512F__)
  const VecF32 r = (VecF32)_mm512_fmsub_ps((__m512)x, _mm512_set1_ps(scale), (__m512)n);
#else
  const VecF32 r = (VecF32)_mm256_fmsub_ps((__m256)x, _mm256_set1_ps(scale), (__m256)n);
#endif
#else
  const VecF32 n = (scaled + S::kRound) - S::kRound;
  const VecF32 r = scaled - n;
#endif
  VecF32 y = broadcast(S::kExp2[4]);
#pragma GCC unroll 4
  for (int i = 3; i >= 0; i--) y = y * r + S::kExp2[i];
  y = y * r + 1.0f;
#if defined(__AVX512F__)
  const __mmask16 counts = _mm512_cmp_ps_mask((__m512)scaled, _mm512_set1_ps(lowest), _CMP_NLT_UQ);
  return (VecF32)_mm512_maskz_scalef_ps(counts, (__m512)y, (__m512)n);
#else
  const VecU32 power = (VecU32)(n + S::kRound) << S::kMantissaBits;  // what overflows is not taken
  return scaled < lowest ? VecF32{} : x == x ? (VecF32)((VecU32)y + power) : x;
#endif
}

// e^(x scale), the same otherwise; relative error 2e-7 + 4e-8 |x scale| (float).
template <class Float>
KDKERNELS_INLINE Vec<Float> exp(Vec<Float> x, Float scale = 1) {
  if constexpr (sizeof(Float) == 4) {
    return exp2(x, float(scale * kLog2e));
  } else {
    using S = Simd<Float>;
    using U = typename S::VecUnsigned;  // its overflow is defined, in lanes that are not taken
    const Vec<Float> scaled = x * scale;
    const Vec<Float> shifted = scaled * kLog2e + S::kRound;
    const Vec<Float> n = shifted - S::kRound;
    const Vec<Float> r = (scaled - n * S::kLn2Hi) - n * S::kLn2Lo;
    const U y = (U)small_exp<Float>(r) + ((U)shifted << S::kMantissaBits);
    return scaled < S::kMinExp ? Vec<Float>{} : x == x ? (Vec<Float>)y : x;
  }
}

// (2^r - 1) / r on |r| <= 1/2; least-maximum fit, error of 2^r 4e-14.
constexpr double kWideExp2[] = {
    0.6931471805599453,    0.2402265069581299,     0.055504108664760424,
    0.009618129159402558,  0.0013333558179043112,  0.00015403455852453838,
    1.525268684626772e-05, 1.3255224878668817e-06, 1.0203121063391729e-07};

// exp in float64 for results of type Result: relative error 1e-15 (double), 4e-14 (float).
template <class Result>
KDKERNELS_INLINE VecF64 wide_exp(VecF64 x, double scale) {
  if constexpr (sizeof(Result) == 8) {
    return exp<double>(x, scale);
  } else {
    using S = Simd<double>;
    constexpr double lowest = S::kMinExp * kLog2e;
    const VecF64 scaled = x * (scale * kLog2e);
#if defined(__FMA__)
    const VecF64 n = nearest<double>(scaled);
#else
    const VecF64 n = (scaled + S::kRound) - S::kRound;
#endif
    const VecF64 r = scaled - n;
    const VecF64 y = polynomial<double>(r, kWideExp2) * r + 1.0;
#if defined(__AVX512F__)
    const __mmask8 counts =
        _mm512_cmp_pd_mask((__m512d)scaled, _mm512_set1_pd(lowest), _CMP_NLT_UQ);
    return (VecF64)_mm512_maskz_scalef_pd(counts, (__m512d)y, (__m512d)n);
#else
    const VecU64 power = (VecU64)(n + S::kRound)
                         << S::kMantissaBits;  // what overflows is not taken
    return scaled < lowest ? VecF64{} : scaled == scaled ? (VecF64)((VecU64)y + power) : scaled;
#endif
  }
}

// expm1(-x) + x = x^2/2 - x^3/6 + ... for |x| <= 1/4 (float: 1): never negative, relative error
// 1e-7 (float).
template <class Float>
KDKERNELS_INLINE Vec<Float> expm1_plus(Vec<Float> x) {
  return x * x * polynomial<Float>(-x, Simd<Float>::kExpm1);
}

// 2 artanh(r) / r for |r| < 0.18, relative error 1e-17.
KDKERNELS_INLINE VecF64 artanh_ratio(VecF64 r) {
  const VecF64 square = r * r;
  VecF64 y = broadcast(2.0 / 27);
#pragma GCC unroll 16
  for (int k = 25; k >= 1; k -= 2) y = y * square + 2.0 / k;
  return y;
}

// log2(x) for normal x > 0, absolute error 1e-16 near 1.
KDKERNELS_INLINE VecF64 log2_of(VecF64 x) {
  const VecI64 exponent = ((VecI64)x - (VecI64)broadcast(0.7071067811865476)) >> 52;
  const VecF64 f = (VecF64)((VecI64)x - (exponent << 52)) - 1.0;
  const VecF64 r = f / (f + 2.0);
  return __builtin_convertvector(exponent, VecF64) + artanh_ratio(r) * r * kLog2e;
}
// x[i] = log2(1 + x[i]) for x >= 0, relative error 4e-16: what 1 + x[i] loses is carried along.
inline void log2_1p(double* x, int64_t n) {
  for_each_vector<double>(n, [&](int64_t i, int lanes) {
    const VecF64 v = load_n(x + i, lanes, 0.0), sum = 1.0 + v, lost = v - (sum - 1.0);
    store_n(x + i, log2_of(sum) + lost / sum * kLog2e, lanes);
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
