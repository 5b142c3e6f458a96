// CUDA on the host, for tests: what csrc/cuda/device.cuh takes from nvcc, in plain C++. Blocks run
// one after the other, in any order; the threads of a block are fibers that change over at
// barriers, shuffles and votes, in any order too. Checked: every thread reaches the same barrier;
// shared memory is read within bounds, after it was written, and there is a barrier between what
// two threads do with an element unless both read it. Exponentials are as inexact as a GPU's.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

namespace emulation {

struct Dim {
  unsigned x;
};

void launch(unsigned grid, unsigned block, const std::function<void()>& kernel);
void barrier(int line);
void warp_barrier();
// Every lane of the warp hands in `bytes` bytes and gets those of lane `from`.
void exchange(const void* value, void* result, int bytes, int from);
[[noreturn]] void fail(const std::string& message);

// Count every launch, every block ever run, every exponential.
extern uint64_t launches, block_number, exponentials;
int epoch_of_block();
int epoch_of_warp();

struct Access {
  uint64_t block = 0;
  unsigned thread = 0;  // of several, kSeveral and that of their warp, if it is one
  unsigned warp = 0;
  int block_epoch = 0, warp_epoch = 0;
};
constexpr unsigned kSeveral = ~0u;
struct Accesses {
  Access written, read;
};
void check_read(Accesses& accesses);
void check_write(Accesses& accesses);

template <class T, int n>
class SharedArray {
 public:
  class Element {
   public:
    Element(SharedArray& array, int64_t i) : array_(array), i_(i) {}
    operator T() const {
      check_read(array_.accesses_[i_]);
      return array_.values_[i_];
    }
    T operator=(T x) {
      check_write(array_.accesses_[i_]);
      array_.values_[i_] = x;
      return x;
    }
    T operator=(const Element& x) { return *this = T(x); }

   private:
    SharedArray& array_;
    int64_t i_;
  };
  Element operator[](int64_t i) {
    if (i < 0 || i >= n)
      fail("shared memory: index " + std::to_string(i) + " of " + std::to_string(n));
    return Element(*this, i);
  }

 private:
  T values_[n];
  Accesses accesses_[n];
};

// With an error of up to 2^-22, as ex2.approx.ftz may have.
inline float exp2_counted(float x) {
  exponentials++;
  const float exact = exp2f(x);
  if (exact < 0x1p-126f) return 0;
  if (x == 0 || exact > 0x1p126f) return exact;
  uint32_t bits, noise;
  std::memcpy(&noise, &x, 4);
  noise = (noise ^ noise >> 15) * 0x2c1b3c6du;
  std::memcpy(&bits, &exact, 4);
  bits += (noise >> 13) % 5 - 2;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

}  // namespace emulation

extern emulation::Dim threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads(int line = __builtin_LINE()) { emulation::barrier(line); }
inline void __syncwarp() { emulation::warp_barrier(); }
inline void __threadfence() {}

inline int emulation_lane() { return int(threadIdx.x % 32); }
template <class T>
T emulation_exchange(T value, int from) {
  T result;
  emulation::exchange(&value, &result, sizeof(T), from);
  return result;
}
template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return emulation_exchange(value, from);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int delta) {
  return emulation_exchange(value,
                            emulation_lane() < delta ? emulation_lane() : emulation_lane() - delta);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation_exchange(value, emulation_lane() ^ mask);
}

inline unsigned atomicAdd(unsigned* x, unsigned y) {
  const unsigned before = *x;
  *x += y;
  return before;
}
template <class T>
T __ldcg(const T* x) {
  return *x;
}

template <class To, class From>
To emulation_cast(From x) {
  To y;
  static_assert(sizeof(To) == sizeof(From), "");
  std::memcpy(&y, &x, sizeof(To));
  return y;
}
inline float __int_as_float(int x) { return emulation_cast<float>(x); }
inline int __float_as_int(float x) { return emulation_cast<int>(x); }
inline double __longlong_as_double(long long x) { return emulation_cast<double>(x); }
inline long long __double_as_longlong(double x) { return emulation_cast<long long>(x); }
inline int __viaddmax_s32(int a, int b, int c) {
  return std::max(int(unsigned(a) + unsigned(b)), c);
}
using std::max;
using std::min;
