// The forward-backward recursion of CTC over one utterance, alpha from the front and beta from the
// back; they meet in the middle, where the likelihood is known, and then each goes on through the
// other's half and turns the other's stored rows into occupancies.
//
// A state's value is mantissa * 2^exponent, one exponent a state: sums are shifts by whole powers
// of two, with neither exp nor log, and nothing underflows. States are kept as pairs, split in two
// arrays: alpha pairs blank k with label k, beta pairs blank k with label k - 1, so that each needs
// one neighbour, the label of the pair before it in its own direction:
//   x       = blank[k] + label[k -/+ 1]
//   blank'  = p(blank) x
//   label'  = p(label) (label[k] + (may skip ? x : blank[k]))
// Rows of the first half are kept in blocks that stay in the cache: of the blocks before the last
// one only the row that precedes it is kept, and the block is computed again when it is needed.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/simd_lanes.h"
#include "cpu/simd_math.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {

// Exponents are whole numbers in Float, exact down to kZeroLikelihood: a likelihood below that
// passed through a symbol with probability 0.
template <class Float>
constexpr Float kZeroLikelihood = -Float(int64_t(1) << (Simd<Float>::kMantissaBits + 1));
// That of a symbol with probability 0, and of a state.
template <class Float>
constexpr Float kZeroSymbol = 2 * kZeroLikelihood<Float>;
template <class Float>
constexpr Float kZeroState = 8 * kZeroLikelihood<Float>;
constexpr int64_t kPeriod = 8;  // frames between normalisations: mantissas stay below 6^8

template <class Float>
struct Number {  // of each lane: m * 2^e
  Vec<Float> m, e;
};

template <class Float>
KDKERNELS_INLINE Number<Float> zero_number() {
  return {Vec<Float>{}, broadcast(kZeroState<Float>)};
}

template <class Float>
KDKERNELS_INLINE Number<Float> add(Number<Float> a, Number<Float> b) {
  const Vec<Float> e = max(a.e, b.e);
  return {scale_by_power<Float>(a.m, a.e - e) + scale_by_power<Float>(b.m, b.e - e), e};
}

// With the mantissa in [1, 2).
template <class Float>
KDKERNELS_INLINE Number<Float> normalised(Number<Float> a) {
  const Vec<Float> e = a.e + exponent_of<Float>(a.m);
  return {mantissa_of<Float>(a.m), max(e, broadcast(kZeroState<Float>))};
}

// What the recursion knows of an utterance.
template <class Float>
struct Lattice {
  using Int = typename Simd<Float>::Int;
  int64_t T, S;
  int64_t width;         // pairs (S + 1) in whole vectors, in elements
  const Float* blank_m;  // [T], probability of blank, in (m, e)
  const Float* blank_e;  // [T]
  // Probabilities of the labels, in (m, e). Of a small alphabet, where registers can be looked up
  // in, those of its classes, [T][2 W], and the class of each label in `class_of`; else those of
  // each label, [T][width + W]. Label k is at element W + k of the latter two; where there is no
  // label is a symbol of probability 0, which in the table takes the place of blank.
  const Float* label_m;
  const Float* label_e;
  const Int* class_of;  // [width + W], or null
  const Int* skip;      // [width], -1 where label k - 1 may be followed by label k, else 0
  int64_t row() const { return class_of ? 2 * kLanes<Float> : width + kLanes<Float>; }
};

// One row of pairs: four arrays of `width` elements, a vector of margin before each and after the
// last. A chain writes zeros beyond its front only, so that neighbouring arrays may share a margin.
template <class Float>
struct PairRow {
  using Int = typename Simd<Float>::Int;
  Float* base;
  int64_t stride;  // width + W
  static int64_t elements(int64_t width) { return 4 * (width + kLanes<Float>)+kLanes<Float>; }
  PairRow(Float* base, int64_t width) : base(base), stride(width + kLanes<Float>) {}

  Number<Float> blank(int64_t j) const { return get(0, j); }
  Number<Float> label(int64_t j) const { return get(2, j); }
  void set_blank(int64_t j, Number<Float> x) { set(0, j, x); }
  void set_label(int64_t j, Number<Float> x) { set(2, j, x); }
  void set_zero(int64_t j) {
    set_blank(j, zero_number<Float>());
    set_label(j, zero_number<Float>());
  }

 private:
  Float* at(int64_t array, int64_t j) const {
    return base + array * stride + (j + 1) * kLanes<Float>;
  }
  Number<Float> get(int64_t array, int64_t j) const {
    return {load<Vec<Float>>(at(array, j)), load<Vec<Float>>(at(array + 1, j))};
  }
  void set(int64_t array, int64_t j, Number<Float> x) {
    store(at(array, j), x.m);
    store(at(array + 1, j), x.e);
  }
};

struct Band {  // vectors that hold a state that can be reached and can still reach the end
  int64_t low, high;
};

// One direction: kForward is alpha. Its step i is at frame i, or T - 1 - i.
template <class Float, bool kForward>
class Chain {
 public:
  using Int = typename Simd<Float>::Int;
  static constexpr int W = kLanes<Float>;

  // Rows in a block, for half of T frames: about 256 KiB.
  static int64_t block_rows(int64_t T, int64_t width) {
    const int64_t bytes = PairRow<Float>::elements(width) * int64_t(sizeof(Float));
    return std::min<int64_t>((T + 1) / 2 + 1, std::max<int64_t>(16, (int64_t(1) << 18) / bytes));
  }
  static int64_t workspace(int64_t T, int64_t width) {  // elements
    const int64_t block = block_rows(T, width), blocks = (T / 2 + 1) / block + 1;
    return (block + 1 + blocks + 2) * PairRow<Float>::elements(width);
  }

  // `lattice` must outlive the chain's use. `memory` has workspace(T, width) elements for a T and a
  // width that are no smaller than the lattice's, and `block` is block_rows of the same two.
  void begin(const Lattice<Float>* lattice, Float* memory, int64_t block) {
    lattice_ = lattice;
    elements_ = PairRow<Float>::elements(lattice->width);
    block_ = block;
    rows_ = memory;
    checkpoints_ = rows_ + (block_ + 1) * elements_;
    current_ = checkpoints_ + ((lattice->T / 2 + 1) / block_ + 1) * elements_;
    stored_block_ = 0;
    // Before the first step all mass is in the blank at the chain's own end.
    const int64_t pair = kForward ? 0 : lattice->S, j = pair / W;
    PairRow<Float> row = slot(0);
    row.set_zero(j);
    row.set_zero(kForward ? j + 1 : j - 1);
    Number<Float> start = zero_number<Float>();
    start.m[pair % W] = 1;
    start.e[pair % W] = 0;
    row.set_blank(j, start);
    std::memcpy(checkpoints_, row.base, bytes());
  }

  // The first half: step i, its row stored.
  void first(int64_t i) {
    const int64_t place = i % block_;
    if (place == 0 && i > 0) {
      std::memcpy(checkpoints_ + i / block_ * elements_, slot(block_).base, bytes());
      std::memcpy(slot(0).base, slot(block_).base, bytes());
    }
    step(i, slot(place), slot(place + 1), [](int64_t, Number<Float>, Number<Float>) {});
    stored_block_ = i / block_;
  }

  // After `steps` steps of the first half: take the last row along, out of the other chain's way.
  void leave(int64_t steps) {
    std::memcpy(current_, slot(steps == 0 ? 0 : (steps - 1) % block_ + 1).base, bytes());
    parity_ = steps & 1;
  }

  // The second half: step i from the row taken along. For each vector j of pairs
  // `body(j, blank, label)` gets the values before this frame's symbol.
  template <class Body>
  void second(int64_t i, Body body) {
    step(i, current(i), current(i + 1), body);
  }

  // The stored row of step i; called with i going down.
  PairRow<Float> stored(int64_t i) {
    const int64_t block = i / block_;
    if (block != stored_block_) {
      std::memcpy(slot(0).base, checkpoints_ + block * elements_, bytes());
      for (int64_t k = 0; k < block_; k++) {
        step(block * block_ + k, slot(k), slot(k + 1),
             [](int64_t, Number<Float>, Number<Float>) {});
      }
      stored_block_ = block;
    }
    return slot(i % block_ + 1);
  }

  // Pairs that count at step i, -1 being the state before the first step.
  Band band(int64_t i) const {
    const int64_t t = kForward ? i : lattice_->T - 1 - i;
    if (i < 0) return kForward ? Band{0, 0} : Band{lattice_->S / W, lattice_->S / W};
    const int64_t left = lattice_->T - 1 - t, shift = kForward ? 1 : 0;
    return {std::max<int64_t>(0, lattice_->S - shift - left) / W,
            std::min<int64_t>(lattice_->S, t + 1 - shift) / W};
  }

  int64_t frame(int64_t i) const { return kForward ? i : lattice_->T - 1 - i; }

 private:
  int64_t bytes() const { return elements_ * int64_t(sizeof(Float)); }
  PairRow<Float> slot(int64_t place) const { return {rows_ + place * elements_, lattice_->width}; }
  PairRow<Float> current(int64_t i) const {
    return {current_ + ((i ^ parity_) & 1) * elements_, lattice_->width};
  }

  template <class Body>
  KDKERNELS_INLINE void step(int64_t i, PairRow<Float> from, PairRow<Float> to, Body body) const {
    // Label k is at element W + k; the pair k of beta has label k - 1.
    constexpr int64_t first = W - (kForward ? 0 : 1);
    const Float* const m = lattice_->label_m + frame(i) * lattice_->row();
    const Float* const e = lattice_->label_e + frame(i) * lattice_->row();
    if constexpr (kHasLookup<Float>) {
      if (const Int* const class_of = lattice_->class_of) {
        const Vec<Float> low_m = load<Vec<Float>>(m), high_m = load<Vec<Float>>(m + W);
        const Vec<Float> low_e = load<Vec<Float>>(e), high_e = load<Vec<Float>>(e + W);
        return walk(i, from, to, body, [&](int64_t j) -> Number<Float> {
          const VecInt<Float> index = load<VecInt<Float>>(class_of + first + j * W);
          return {lookup(low_m, high_m, index), lookup(low_e, high_e, index)};
        });
      }
    }
    walk(i, from, to, body, [&](int64_t j) -> Number<Float> {
      return {load<Vec<Float>>(m + first + j * W), load<Vec<Float>>(e + first + j * W)};
    });
  }

  // probability(j): of the labels of the pairs in vector j.
  template <class Body, class Probability>
  KDKERNELS_INLINE void walk(int64_t i, PairRow<Float> from, PairRow<Float> to, Body body,
                             Probability probability) const {
    const Band now = band(i), before = band(i - 1);
    const int64_t t = frame(i);
    const Number<Float> p_blank{broadcast(lattice_->blank_m[t]), broadcast(lattice_->blank_e[t])};
    const bool normalise = i % kPeriod == kPeriod - 1;
    const auto pair = [&](int64_t j, Number<Float> label, Number<Float> neighbour) {
      const Number<Float> blank = from.blank(j);
      const VecInt<Float> skip = load<VecInt<Float>>(lattice_->skip + j * W);
      const Number<Float> x = add(blank, neighbour);
      const Number<Float> y = add(label, {skip ? x.m : blank.m, skip ? x.e : blank.e});
      body(j, x, y);
      Number<Float> to_blank{x.m * p_blank.m, x.e + p_blank.e};
      const Number<Float> p_label = probability(j);
      Number<Float> to_label{y.m * p_label.m, y.e + p_label.e};
      if (normalise) {
        to_blank = normalised(to_blank);
        to_label = normalised(to_label);
      }
      to.set_blank(j, to_blank);
      to.set_label(j, to_label);
    };
    // Beyond its front a row holds one vector of zeros; behind its back nothing that counts.
    if constexpr (kForward) {
      Number<Float> last = now.low > before.low ? from.label(now.low - 1) : zero_number<Float>();
      for (int64_t j = now.low; j <= now.high; j++) {
        const Number<Float> label = from.label(j);
        pair(j, label, {shift_up(last.m, label.m), shift_up(last.e, label.e)});
        last = label;
      }
      to.set_zero(now.high + 1);
    } else {
      Number<Float> last = now.high < before.high ? from.label(now.high + 1) : zero_number<Float>();
      for (int64_t j = now.high; j >= now.low; j--) {
        const Number<Float> label = from.label(j);
        pair(j, label, {shift_down(label.m, last.m), shift_down(label.e, last.e)});
        last = label;
      }
      to.set_zero(now.low - 1);
    }
  }

  const Lattice<Float>* lattice_ = nullptr;
  int64_t elements_ = 0, block_ = 0;
  Float* rows_ = nullptr;         // [block + 1], the row before a block and the block
  Float* checkpoints_ = nullptr;  // [blocks], the row before each block
  Float* current_ = nullptr;      // [2], rows of the second half
  int64_t stored_block_ = 0, parity_ = 0;
};

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
