// Memory of a call, in pieces.

#pragma once

#include <cstdint>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace kdkernels {
namespace KDKERNELS_TARGET {

// Hands out pieces of a workspace; without memory it only counts.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t n) {
    T* const p = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += (n * int64_t(sizeof(T)) + 63) / 64 * 64;
#if defined(__SANITIZE_ADDRESS__)  // an overflow from one piece into the next is seen
    if (memory_) __asan_poison_memory_region(memory_ + used_, kGap);
    used_ += kGap;
#endif
    return p;
  }
  int64_t used() const { return used_; }

 private:
  static constexpr int64_t kGap = 64;
  char* memory_;
  int64_t used_ = 0;
};

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
