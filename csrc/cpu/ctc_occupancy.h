// Occupancies of a target's positions to occupancies of its symbols. Equal labels are added in the
// order of their positions; frames are collected until there are as many as lanes, turned so that a
// vector holds one position at all of them, and added a vector at a time.

#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/arena.h"
#include "cpu/simd_lanes.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {

template <class Float>
class Occupancies {
 public:
  static constexpr int W = kLanes<Float>;
  using V = Vec<Float>;

  // For up to S positions and `symbols` symbols.
  Occupancies(Arena& arena, int64_t S, int64_t symbols)
      : stride_((S + W) / W * W + 2 * W), symbols_stride_((symbols + W - 1) / W * W) {
    positions_ = arena.take<Float>(W * stride_);
    sums_ = arena.take<Float>(symbols_stride_ * W);
    by_frame_ = arena.take<Float>(symbols_stride_ * W);
  }

  // symbol [S]: the number of the symbol at each position.
  void begin(int64_t S, const int32_t* symbol, int64_t symbols) {
    S_ = S, symbol_ = symbol, symbols_ = symbols, count_ = 0;
  }

  // The row for one more frame, zeroed: position k at element k, a vector of margin before it.
  Float* add(int64_t frame) {
    Float* const row = positions_ + count_ * stride_;
    std::fill(row, row + stride_, Float(0));
    frame_[count_] = frame;
    return row + W;
  }
  // The frame's blanks, to be summed over the lanes, end its row. True: it is time to flush.
  bool finish(V blanks) {
    blanks_[count_++] = blanks;
    return count_ == W;
  }

  // body(frame, symbols' occupancies [symbols], blank's) for each frame that was added.
  template <class Body>
  void flush(Body body) {
    if (count_ == 0) return;
    std::fill(sums_, sums_ + symbols_ * W, Float(0));
    for (int64_t begin = 0; begin < S_; begin += W) {
      V x[W];
      for (int i = 0; i < W; i++) x[i] = i < count_ ? load<V>(at(i, begin)) : V{};
      transpose(x);
      const int64_t n = std::min<int64_t>(W, S_ - begin);
      for (int64_t i = 0; i < n; i++) {
        Float* const sum = sums_ + symbol_[begin + i] * W;
        store(sum, load<V>(sum) + x[i]);
      }
    }
    for (int64_t begin = 0; begin < symbols_; begin += W) {
      V x[W];
      for (int i = 0; i < W; i++) x[i] = load<V>(sums_ + (begin + i) * W);
      transpose(x);
      for (int i = 0; i < W; i++) store(by_frame_ + i * symbols_stride_ + begin, x[i]);
    }
    const V blanks = reduce_rows(blanks_, count_, [](V a, V b) { return a + b; });
    for (int i = 0; i < count_; i++) {
      body(frame_[i], by_frame_ + i * symbols_stride_, Float(blanks[i]));
    }
    count_ = 0;
  }

 private:
  const Float* at(int i, int64_t k) const { return positions_ + i * stride_ + W + k; }

  int64_t stride_, symbols_stride_;
  Float* positions_;  // [W][stride], frame by frame
  Float* sums_;       // [symbols][W]
  Float* by_frame_;   // [W][symbols]
  V blanks_[W];
  int64_t frame_[W];
  int64_t S_ = 0, symbols_ = 0;
  const int32_t* symbol_ = nullptr;
  int count_ = 0;
};

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
