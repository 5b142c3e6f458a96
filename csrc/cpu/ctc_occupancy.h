// Occupancies of a target's positions to occupancies of its symbols. Frames are collected until
// there are as many as lanes and turned so that a vector holds one position at all of them; then
// each symbol's positions are added in their order. Blank has what they leave of 1.

#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "cpu/arena.h"
#include "cpu/simd_lanes.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {

template <class Float>
class Occupancies {
 public:
  static constexpr int W = kLanes<Float>;
  using V = Vec<Float>;

  // For up to S positions and `symbols` symbols. Position k is at element `first` + k of a frame's
  // row, first <= 1.
  Occupancies(Arena& arena, int64_t S, int64_t symbols, int64_t first)
      : first_(first), stride_((S + W) / W * W + W), symbols_stride_((symbols + W - 1) / W * W) {
    by_frame_ = arena.take<Float>(W * std::max(stride_, symbols_stride_));
    by_position_ = arena.take<Float>(stride_ * W);
    order_ = arena.take<int32_t>(S + 1);
    end_ = arena.take<int32_t>(symbols_stride_);
  }

  // symbol [S + 1]: the number of the symbol at each position, and of blank.
  void begin(int64_t S, const int32_t* symbol, int64_t symbols) {
    S_ = S, symbols_ = symbols, count_ = 0;
    // Positions in the order of their symbols; end_: where those of each symbol end.
    std::fill(end_, end_ + symbols_stride_, 0);
    for (int64_t k = 0; k <= S; k++) end_[symbol[k]]++;
    std::partial_sum(end_, end_ + symbols_stride_, end_);
    for (int64_t k = S; k >= 0; k--) order_[--end_[symbol[k]]] = int32_t(k);
    for (int64_t k = 0; k <= S; k++) end_[symbol[k]]++;
  }

  // The row for one more frame, zeroed. Where blank cannot occur what the positions leave is their
  // rounding.
  Float* add(int64_t frame, bool blank_occurs) {
    Float* const row = by_frame_ + count_ * stride_;
    std::fill(row, row + stride_, Float(0));
    blank_share_[count_] = blank_occurs ? 1 : 0;
    frame_[count_++] = frame;
    return row;
  }
  // There is no room for another frame: it is time to flush.
  bool full() const { return count_ == W; }

  // body(frame, symbols' occupancies [symbols]) for each frame that was added.
  template <class Body>
  void flush(Body body) {
    if (count_ == 0) return;
    V total{};
    for (int64_t begin = 0; begin < S_; begin += W) {
      V x[W], part{};
      for (int i = 0; i < W; i++) x[i] = i < count_ ? load<V>(at(i, begin)) : V{};
      transpose(x);
      for (int i = 0; i < W; i++) {
        store(by_position_ + (begin + i) * W, x[i]);
        part += x[i];
      }
      total += part;
    }
    store(by_position_ + S_ * W, max(Float(1) - total, V{}) * load<V>(blank_share_));
    int32_t k = 0;
    for (int64_t begin = 0; begin < symbols_; begin += W) {
      V x[W];
      for (int i = 0; i < W; i++) {
        x[i] = V{};
        for (; k < end_[begin + i]; k++) x[i] += load<V>(by_position_ + order_[k] * W);
      }
      transpose(x);
      for (int i = 0; i < W; i++) store(by_frame_ + i * symbols_stride_ + begin, x[i]);
    }
    for (int i = 0; i < count_; i++) body(frame_[i], by_frame_ + i * symbols_stride_);
    count_ = 0;
  }

 private:
  const Float* at(int i, int64_t k) const { return by_frame_ + i * stride_ + first_ + k; }

  int64_t first_, stride_, symbols_stride_;
  Float* by_frame_;     // [W][stride], positions of each frame; then its [symbols]
  Float* by_position_;  // [S + 1][W], the last one blank
  int32_t *order_, *end_;
  int64_t frame_[W];
  Float blank_share_[W] = {};
  int64_t S_ = 0, symbols_ = 0;
  int count_ = 0;
};

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
