// Results too small for a normal number (1e-38 in float) are 0 while a FlushToZero lives: Intel's
// processors take some 150 cycles for each of them, and gradients of peaked distributions, and the
// states of a recursion, are full of them. Subnormal arguments are still read as what they are,
// whatever torch.set_flush_denormal says: a subnormal half is one on its way to float.

#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kdkernels {
namespace KDKERNELS_TARGET {

// Of the thread that makes it.
class FlushToZero {
#if defined(__x86_64__)
 public:
  FlushToZero() : saved_(_mm_getcsr()) {
    constexpr unsigned kFlushResults = 1u << 15, kArgumentsAreZero = 1u << 6;
    _mm_setcsr((saved_ | kFlushResults) & ~kArgumentsAreZero);
  }
  ~FlushToZero() { _mm_setcsr(saved_); }
  FlushToZero(const FlushToZero&) = delete;
  FlushToZero& operator=(const FlushToZero&) = delete;

 private:
  unsigned saved_;
#else
 public:
  FlushToZero() {}
  ~FlushToZero() {}
#endif
};

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
