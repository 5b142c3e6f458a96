// What every kernel uses: numbers of any dtype, 16-byte loads and stores, groups of threads that
// share a row, launches. The same text compiles as plain C++ against tests/cuda_emulation.

#pragma once

#include <cstdint>

#include "kdkernels.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define KDKERNELS_SHARED(T, name, n) __shared__ T name[n]
#else
#include "cuda_emulation.h"
#define KDKERNELS_SHARED(T, name, n)           \
  static emulation::SharedArray<T, n> name##_; \
  auto& name = name##_
#endif

#define KDKERNELS_DEVICE __device__ __forceinline__

namespace kdkernels {
namespace cuda {

// ------------------------------------------------------------------------------------------
// launches

#ifdef __CUDACC__
template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
            const Args&... args) {
  if (blocks > 0) {
    kernel<<<unsigned(blocks), unsigned(threads), 0, static_cast<cudaStream_t>(stream)>>>(args...);
  }
}

class OnDevice {  // makes a device current, and gives the old one back
 public:
  explicit OnDevice(int64_t device) : device_(int(device)) {
    cudaGetDevice(&before_);
    cudaSetDevice(device_);
  }
  ~OnDevice() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  // What went wrong since, or null.
  const char* error() const {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }

 private:
  int device_, before_ = 0;
};
#else
template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void*,
            const Args&... args) {
  if (blocks > 0) emulation::launch(unsigned(blocks), unsigned(threads), [&] { kernel(args...); });
}

struct OnDevice {
  explicit OnDevice(int64_t) {}
  const char* error() const { return nullptr; }
};
#endif

// -------------------------------------------------------------------------------------------
// numbers

constexpr float kInfinity = __builtin_huge_valf();
constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

KDKERNELS_DEVICE float to_float(float x) { return x; }
KDKERNELS_DEVICE double to_float(double x) { return x; }
KDKERNELS_DEVICE float to_float(BFloat16 x) { return __int_as_float(int(x.bits) << 16); }

#ifdef __CUDACC__
KDKERNELS_DEVICE float to_float(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
KDKERNELS_DEVICE void from_float(double x, BFloat16& y) {
  y.bits = __bfloat16_as_ushort(__float2bfloat16_rn(float(x)));
}
KDKERNELS_DEVICE void from_float(float x, BFloat16& y) {
  y.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
KDKERNELS_DEVICE void from_float(double x, Float16& y) {
  y.bits = __half_as_ushort(__float2half_rn(float(x)));
}
KDKERNELS_DEVICE void from_float(float x, Float16& y) {
  y.bits = __half_as_ushort(__float2half_rn(x));
}
#else
inline float to_float(Float16 x) {
  _Float16 y;
  __builtin_memcpy(&y, &x, 2);
  return float(y);
}
inline void from_float(float x, Float16& y) {
  const _Float16 rounded = _Float16(x);
  __builtin_memcpy(&y, &rounded, 2);
}
inline void from_float(float x, BFloat16& y) {
  const unsigned bits = unsigned(__float_as_int(x));
  y.bits = x != x ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void from_float(double x, Float16& y) { from_float(float(x), y); }
inline void from_float(double x, BFloat16& y) { from_float(float(x), y); }
#endif
KDKERNELS_DEVICE void from_float(float x, float& y) { y = x; }
KDKERNELS_DEVICE void from_float(double x, float& y) { y = float(x); }
KDKERNELS_DEVICE void from_float(double x, double& y) { y = x; }

template <class T>
struct TypeOf {
  using Type = T;
};

// f(TypeOf<T>) for the T of a dtype.
template <class F>
inline void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::float32:
      return f(TypeOf<float>());
    case DType::float64:
      return f(TypeOf<double>());
    case DType::bfloat16:
      return f(TypeOf<BFloat16>());
    case DType::float16:
      return f(TypeOf<Float16>());
  }
}

// One element of a tensor of any dtype.
KDKERNELS_DEVICE double load(const void* x, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::float32:
      return double(static_cast<const float*>(x)[i]);
    case DType::float64:
      return static_cast<const double*>(x)[i];
    case DType::bfloat16:
      return double(to_float(static_cast<const BFloat16*>(x)[i]));
    default:
      return double(to_float(static_cast<const Float16*>(x)[i]));
  }
}

KDKERNELS_DEVICE void store(void* x, DType dtype, int64_t i, double value) {
  switch (dtype) {
    case DType::float32:
      return from_float(value, static_cast<float*>(x)[i]);
    case DType::float64:
      return from_float(value, static_cast<double*>(x)[i]);
    case DType::bfloat16:
      return from_float(value, static_cast<BFloat16*>(x)[i]);
    default:
      return from_float(value, static_cast<Float16*>(x)[i]);
  }
}

__host__ __device__ inline int64_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}
__host__ __device__ inline void* offset(const void* x, DType dtype, int64_t i) {
  return const_cast<char*>(static_cast<const char*>(x)) + i * size_of(dtype);
}

// An integer tensor: `bytes` is its size, -1 for uint8.
struct Integers {
  const void* data;
  int64_t bytes;
  KDKERNELS_DEVICE int64_t operator[](int64_t i) const {
    switch (bytes) {
      case 8:
        return static_cast<const int64_t*>(data)[i];
      case 4:
        return static_cast<const int32_t*>(data)[i];
      case 2:
        return static_cast<const int16_t*>(data)[i];
      case 1:
        return static_cast<const int8_t*>(data)[i];
      default:
        return static_cast<const uint8_t*>(data)[i];
    }
  }
};

// -------------------------------------------------------------------------------------------
// vectors

template <class T>
constexpr int kVector = 16 / int(sizeof(T));  // elements in 16 bytes

template <class T>
struct alignas(16) Packed {
  T x[kVector<T>];
};

KDKERNELS_DEVICE bool is_aligned(const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; }

// Elements [c, c + kVector) of a row of C, -inf past its end.
template <class T>
KDKERNELS_DEVICE void load_vector(const T* row, bool aligned, int64_t c, int64_t C, float* x) {
  if (aligned && c + kVector<T> <= C) {
    const Packed<T> packed = *reinterpret_cast<const Packed<T>*>(row + c);
#pragma unroll
    for (int j = 0; j < kVector<T>; j++) x[j] = to_float(packed.x[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kVector<T>; j++) x[j] = c + j < C ? to_float(row[c + j]) : -kInfinity;
  }
}

template <class T>
KDKERNELS_DEVICE void store_vector(T* row, bool aligned, int64_t c, int64_t C, const float* x) {
  if (aligned && c + kVector<T> <= C) {
    Packed<T> packed;
#pragma unroll
    for (int j = 0; j < kVector<T>; j++) from_float(x[j], packed.x[j]);
    *reinterpret_cast<Packed<T>*>(row + c) = packed;
  } else {
#pragma unroll
    for (int j = 0; j < kVector<T>; j++) {
      if (c + j < C) from_float(x[j], row[c + j]);
    }
  }
}

// --------------------------------------------------------------------------------------------
// groups

struct Sum {
  template <class T>
  KDKERNELS_DEVICE static T identity() {
    return T(0);
  }
  template <class T>
  KDKERNELS_DEVICE static T of(T a, T b) {
    return a + b;
  }
};
struct Max {
  template <class T>
  KDKERNELS_DEVICE static T identity() {
    return T(-kInfinity);
  }
  template <class T>
  KDKERNELS_DEVICE static T of(T a, T b) {
    return a > b ? a : b;
  }
};

// Threads that share a row: kBlock, all of a block; else `size` neighbouring lanes of a warp, a
// power of two. All of a warp's lanes call the collective functions together.
template <bool kBlock>
struct Group {
  static constexpr bool kWholeBlock = kBlock;
  int rank, size;

  KDKERNELS_DEVICE explicit Group(int lanes)
      : rank(kBlock ? int(threadIdx.x) : int(threadIdx.x) % lanes),
        size(kBlock ? int(blockDim.x) : lanes) {}

  KDKERNELS_DEVICE void sync() const {
    if (kBlock) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }

  // Each of x over the group, in a fixed order, for every thread.
  template <class Op, class T, int n>
  KDKERNELS_DEVICE void reduce(T (&x)[n]) const {
    for (int step = (kBlock ? 32 : size) / 2; step > 0; step /= 2) {
#pragma unroll
      for (int i = 0; i < n; i++) x[i] = Op::of(x[i], __shfl_xor_sync(~0u, x[i], step));
    }
    if (!kBlock || size <= 32) return;
    KDKERNELS_SHARED(T, partial, 32 * n);
    const int lane = rank % 32, warps = size / 32;
    int span = 1;  // lanes that take a warp's value each; the others do the same
    while (span < warps) span *= 2;
    __syncthreads();  // until the last reduction has been read
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < n; i++) partial[rank / 32 * n + i] = x[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < n; i++) {
      const int warp = lane % span;
      x[i] = warp < warps ? T(partial[warp * n + i]) : Op::template identity<T>();
    }
    for (int step = span / 2; step > 0; step /= 2) {
#pragma unroll
      for (int i = 0; i < n; i++) x[i] = Op::of(x[i], __shfl_xor_sync(~0u, x[i], step));
    }
  }
  template <class Op, class T>
  KDKERNELS_DEVICE T reduce(T x) const {
    T all[1] = {x};
    reduce<Op>(all);
    return all[0];
  }
};

// True in every thread of the last block to come here, with all that the others wrote visible (read
// it with __ldcg). `counter` is 0 before the first.
KDKERNELS_DEVICE bool is_last_block(unsigned* counter) {
  KDKERNELS_SHARED(unsigned, before, 1);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) before[0] = atomicAdd(counter, 1u);
  __syncthreads();
  const bool last = unsigned(before[0]) == gridDim.x - 1;
  if (last) __threadfence();
  return last;
}

// ----------------------------------------------------------------------------------------
// arithmetic

// 2^x, by the special-function unit.
KDKERNELS_DEVICE float exp2_fast(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return emulation::exp2_counted(x);
#endif
}

// exp(x scale) with scale * log2(e) = high + low.
struct ExpScale {
  float high, low;
  __host__ __device__ explicit ExpScale(double scale)
      : high(float(scale * kLog2e)), low(float(scale * kLog2e - double(float(scale * kLog2e)))) {}
  KDKERNELS_DEVICE float operator()(float x) const {
    return exp2_fast(fmaxf(fmaf(x, high, x * low), -200.0f));  // of -inf the sum may be NaN
  }
};

template <int n, class Real>
KDKERNELS_DEVICE Real horner(Real x, const double (&k)[n]) {
  Real y = Real(k[n - 1]);
#pragma unroll
  for (int i = n - 2; i >= 0; i--) y = y * x + Real(k[i]);
  return y;
}

// expm1(-x) + x for |x| <= 1: never negative.
KDKERNELS_DEVICE float expm1_plus(float x) {
  constexpr double k[] = {1. / 2,    1. / 6,     1. / 24,     1. / 120,    1. / 720,
                          1. / 5040, 1. / 40320, 1. / 362880, 1. / 3628800};
  return x * x * horner(-x, k);
}
// The same for |x| <= 1/4.
KDKERNELS_DEVICE double expm1_plus(double x) {
  constexpr double k[] = {1. / 2,       1. / 6,        1. / 24,        1. / 120,
                          1. / 720,     1. / 5040,     1. / 40320,     1. / 362880,
                          1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
  return x * x * horner(-x, k);
}

}  // namespace cuda
}  // namespace kdkernels
