// The transcript of an utterance: its labels, which of them may follow each other, and its symbols.

#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/arena.h"
#include "cpu/simd_lanes.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {

// Symbols have numbers: in an alphabet that is small, or mostly in use, those of its classes, so
// that occupancies line up with a row of the gradient; else their order in the alphabet, so that a
// row is gone through from front to back, blank being the last.
template <class Float>
class Target {
 public:
  using Int = typename Simd<Float>::Int;
  static constexpr int W = kLanes<Float>;

  // With the memory for up to S labels.
  Target(Arena& arena, int64_t C, int64_t S) {
    const int64_t width = (S + W) / W * W;
    class_of_ = arena.take<Int>(width + W);
    skip_ = arena.take<Int>(width);
    label_ = arena.take<int32_t>(S);
    symbol_ = arena.take<int32_t>(S + 1);
    symbol_class_ = arena.take<int32_t>(most_symbols(C, S));
  }

  void begin(const int64_t* labels, int64_t S, int64_t C, int64_t blank) {
    S_ = S, C_ = C, blank_ = blank, repeats_ = 0;
    for (int64_t k = 0; k < S; k++) {
      label_[k] = int32_t(labels[k]);
      repeats_ += k > 0 && label_[k] == label_[k - 1];
    }
    for (int64_t k = 0; k < width(); k++) {
      skip_[k] = k > 0 && k < S && label_[k] != label_[k - 1] ? -1 : 0;
    }
    if (fits_registers()) {
      std::fill(class_of_, class_of_ + width() + W, Int(blank));
      std::copy(label_, label_ + S, class_of_ + W);
    }
    number_symbols();
  }

  int64_t size() const { return S_; }
  int64_t width() const { return (S_ + W) / W * W; }  // S + 1 in whole vectors, in elements
  int64_t frames() const { return S_ + repeats_; }    // of the shortest path
  const Int* skip() const { return skip_; }           // see Lattice
  const Int* class_of() const { return fits_registers() ? class_of_ : nullptr; }  // see Lattice
  int64_t label(int64_t k) const { return label_[k]; }

  static int64_t most_symbols(int64_t C, int64_t S) { return all_classes(C, S) ? C : S + 1; }
  bool symbols_are_classes() const { return all_classes(C_, S_); }
  int64_t symbols() const { return symbols_; }
  const int32_t* symbol() const { return symbol_; }  // [S + 1], of each label, and of blank
  int64_t class_of_symbol(int64_t u) const { return symbol_class_[u]; }

  // labels[k] = logits[label_[k]]; from a table in registers where the alphabet fits one.
  void gather(const Float* logits, Float* labels) const {
    constexpr int kPairs = 4;
    if constexpr (kHasLookup<Float>) {
      if (C_ <= 2 * kPairs * W) {
        Vec<Float> table[2 * kPairs];
#pragma GCC unroll 8
        for (int i = 0; i < 2 * kPairs; i++) {
          const int64_t left = std::clamp<int64_t>(C_ - i * W, 0, W);
          table[i] = load_partial(logits + i * W, int(left), Float(0));
        }
        for_each_vector<Float>(S_, [&](int64_t k, int n) {
          const VecI32 index =
              n == W ? load<VecI32>(label_ + k)
                     : (VecI32)load_partial(reinterpret_cast<const float*>(label_ + k), n, 0.0f);
          store_n(labels + k, lookup<kPairs>(table, index), n);
        });
        return;
      }
    }
    for (int64_t k = 0; k < S_; k++) labels[k] = logits[label_[k]];
  }

 private:
  // Probabilities of all classes fit two vectors, to be looked up in.
  bool fits_registers() const { return kHasLookup<Float> && C_ <= 2 * W; }
  static bool all_classes(int64_t C, int64_t S) { return C <= std::max<int64_t>(4 * W, 2 * S); }

  void number_symbols() {
    if (symbols_are_classes()) {
      symbols_ = C_;
      std::copy(label_, label_ + S_, symbol_);
      symbol_[S_] = int32_t(blank_);
      for (int64_t c = 0; c < C_; c++) symbol_class_[c] = int32_t(c);
      return;
    }
    std::copy(label_, label_ + S_, symbol_class_);
    std::sort(symbol_class_, symbol_class_ + S_);
    symbols_ = std::unique(symbol_class_, symbol_class_ + S_) - symbol_class_;
    for (int64_t k = 0; k < S_; k++) {
      symbol_[k] = int32_t(std::lower_bound(symbol_class_, symbol_class_ + symbols_, label_[k]) -
                           symbol_class_);
    }
    symbol_[S_] = int32_t(symbols_);
    symbol_class_[symbols_++] = int32_t(blank_);
  }

  int64_t S_ = 0, C_ = 0, blank_ = 0, repeats_ = 0, symbols_ = 0;
  Int *class_of_, *skip_;
  int32_t *label_, *symbol_;  // [S], [S + 1]
  int32_t* symbol_class_;     // [symbols]
};

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
