// Rows of logits and gradients in any of the four dtypes, as rows of the arithmetic's type.

#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd.h"
#include "kdkernels.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kdkernels {
namespace KDKERNELS_TARGET {

inline int64_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

inline const void* offset(const void* p, DType dtype, int64_t elements) {
  return static_cast<const char*>(p) + elements * size_of(dtype);
}
inline void* offset(void* p, DType dtype, int64_t elements) {
  return static_cast<char*>(p) + elements * size_of(dtype);
}

// Rows of one tensor: the address of the first, and bytes from a row to the next. A tensor that
// is not there is null, and so is the step.
struct RowsAt {
  char* first;
  int64_t step;
  KDKERNELS_INLINE void* operator[](int64_t i) const { return first + i * step; }
};

KDKERNELS_INLINE float from_bfloat16(uint16_t x) { return bit_cast<float>(uint32_t(x) << 16); }

// Round to nearest, ties to even; a NaN stays one.
KDKERNELS_INLINE uint16_t to_bfloat16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t(x == x ? rounded : 0x7fc0u);
}

#if defined(__F16C__)
KDKERNELS_INLINE float from_float16(uint16_t x) { return _cvtsh_ss(x); }
KDKERNELS_INLINE uint16_t to_float16(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }

// kLanes<float> of them.
KDKERNELS_INLINE VecF32 load_float16(const uint16_t* p) {
#if defined(__AVX512F__)
  return (VecF32)_mm512_cvtph_ps(load<__m256i>(p));
#else
  return (VecF32)_mm256_cvtph_ps(load<__m128i>(p));
#endif
}
KDKERNELS_INLINE void store_float16(uint16_t* p, VecF32 x) {
#if defined(__AVX512F__)
  store(p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#else
  store(p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#endif
}
#else
// A half's exponent is moved to a float's place and its bias mended by a multiplication, which is
// exact and makes the subnormals right as well.
KDKERNELS_INLINE float from_float16(uint16_t x) {
  const uint32_t magnitude = uint32_t(x & 0x7fffu) << 13, sign = uint32_t(x & 0x8000u) << 16;
  const float scaled = bit_cast<float>(magnitude) * bit_cast<float>(uint32_t(254 - 15) << 23);
  const uint32_t infinite = magnitude >= (31u << 23) ? 0x7f800000u : 0u;  // inf or NaN
  return bit_cast<float>(bit_cast<uint32_t>(scaled) | infinite | sign);
}

KDKERNELS_INLINE uint16_t to_float16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // A subnormal half counts multiples of 2^-24: adding 1/2 rounds to them in the sum's last bits.
  const uint32_t subnormal =
      bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return uint16_t(sign | (magnitude >= 0x477ff000u ? large : finite));
}

KDKERNELS_INLINE VecF32 load_float16(const uint16_t* p) {
  VecF32 x;
  for (int i = 0; i < kLanes<float>; i++) x[i] = from_float16(p[i]);
  return x;
}
KDKERNELS_INLINE void store_float16(uint16_t* p, VecF32 x) {
  for (int i = 0; i < kLanes<float>; i++) p[i] = to_float16(x[i]);
}
#endif

// The dtype that is the arithmetic's own.
template <class Float>
constexpr DType kOwnDType = sizeof(Float) == 8 ? DType::float64 : DType::float32;

template <class Float>
const Float* convert_row(const void* row, DType dtype, int64_t C, Float* scratch) {
  switch (dtype) {
    case DType::float32: {
      const float* x = static_cast<const float*>(row);
      for (int64_t c = 0; c < C; c++) scratch[c] = Float(x[c]);
      break;
    }
    case DType::bfloat16: {
      const uint16_t* x = static_cast<const uint16_t*>(row);
      for (int64_t c = 0; c < C; c++) scratch[c] = Float(from_bfloat16(x[c]));
      break;
    }
    case DType::float16: {
      const uint16_t* x = static_cast<const uint16_t*>(row);
      int64_t c = 0;
      if constexpr (sizeof(Float) == 4) {
        for (; c + kLanes<float> <= C; c += kLanes<float>) store(scratch + c, load_float16(x + c));
      }
      for (; c < C; c++) scratch[c] = Float(from_float16(x[c]));
      break;
    }
    default:
      break;
  }
  return scratch;
}

// The row as Float: the logits themselves where they have that type, else a copy in `scratch`.
template <class Float>
KDKERNELS_INLINE const Float* load_row(const void* row, DType dtype, int64_t C, Float* scratch) {
  if (dtype == kOwnDType<Float>) return static_cast<const Float*>(row);
  return convert_row(row, dtype, C, scratch);
}

// Where to write a row of Float results: the output itself where it has that type, else `scratch`,
// which finish_row then rounds to the output.
template <class Float>
KDKERNELS_INLINE Float* begin_row(void* row, DType dtype, Float* scratch) {
  return dtype == kOwnDType<Float> ? static_cast<Float*>(row) : scratch;
}

template <class Float>
void round_row(void* row, DType dtype, int64_t C, const Float* values) {
  switch (dtype) {
    case DType::float32: {
      float* y = static_cast<float*>(row);
      for (int64_t c = 0; c < C; c++) y[c] = float(values[c]);
      break;
    }
    case DType::bfloat16: {
      uint16_t* y = static_cast<uint16_t*>(row);
      for (int64_t c = 0; c < C; c++) y[c] = to_bfloat16(float(values[c]));
      break;
    }
    case DType::float16: {
      uint16_t* y = static_cast<uint16_t*>(row);
      int64_t c = 0;
      if constexpr (sizeof(Float) == 4) {
        for (; c + kLanes<float> <= C; c += kLanes<float>) {
          store_float16(y + c, load<VecF32>(values + c));
        }
      }
      for (; c < C; c++) y[c] = to_float16(float(values[c]));
      break;
    }
    default:
      break;
  }
}

template <class Float>
KDKERNELS_INLINE void finish_row(void* row, DType dtype, int64_t C, const Float* values) {
  if (values != row) round_row(row, dtype, C, values);
}

template <class Float>
void store_one(void* row, DType dtype, int64_t c, Float value) {
  switch (dtype) {
    case DType::float32:
      static_cast<float*>(row)[c] = float(value);
      break;
    case DType::float64:
      static_cast<double*>(row)[c] = double(value);
      break;
    case DType::bfloat16:
      static_cast<uint16_t*>(row)[c] = to_bfloat16(float(value));
      break;
    case DType::float16:
      static_cast<uint16_t*>(row)[c] = to_float16(float(value));
      break;
  }
}

template <class Float>
void fill_row(void* row, DType dtype, int64_t C, Float value) {
  for (int64_t c = 0; c < C; c++) store_one(row, dtype, c, value);
}

// value(c, lanes) to a row of a gradient, past the caches if so wanted: see store_past.
template <class Float, int kVectors = 0, class Value>
KDKERNELS_INLINE void write_row(Float* row, int64_t C, bool past_caches, Value value) {
  if constexpr (kVectors == 0 && sizeof(Float) == 4) {
    if (past_caches) {
      constexpr int W = kLanes<float>;
      const uintptr_t beyond = reinterpret_cast<uintptr_t>(row) % kVectorBytes;
      int64_t c = std::min<int64_t>(C, beyond ? (kVectorBytes - beyond) / sizeof(float) : 0);
      if (c) store_partial(row, value(0, int(c)), int(c));
      for (; c + W <= C; c += W) store_past(row + c, value(c, W));
      if (c < C) store_partial(row + c, value(c, int(C - c)), int(C - c));
      return;
    }
  }
  for_row<Float, kVectors>(C,
                           [&](int64_t c, int lanes) { store_n(row + c, value(c, lanes), lanes); });
}

// Whether an output is written past the caches: one that is no longer in them when somebody reads
// it, unless its pages are new, which zeroing brings in. With 32 MB of L3 and a reader behind, an
// output of 16 MB took longer that way and one of 32 MB less time.
inline bool goes_past_caches(const void* p, int64_t bytes) {
#if defined(__linux__) && defined(__x86_64__)
  constexpr int64_t kLarge = int64_t(24) << 20;
  constexpr uintptr_t kPage = 4096;
  if (bytes < kLarge) return false;
  const uintptr_t page = (reinterpret_cast<uintptr_t>(p) + uintptr_t(bytes) / 2) & ~(kPage - 1);
  unsigned char used = 0;
  return mincore(reinterpret_cast<void*>(page), kPage, &used) == 0 && (used & 1);
#else
  (void)p, (void)bytes;
  return false;
#endif
}

// Ask for huge pages before an output is touched for the first time: the page faults of small ones
// cost more than the arithmetic.
inline void advise_huge_pages(void* p, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t(1) << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + uintptr_t(bytes)) & ~(kHuge - 1);
  if (p != nullptr && end > begin) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#else
  (void)p, (void)bytes;
#endif
}

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
