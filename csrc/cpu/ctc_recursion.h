// The forward-backward recursion of CTC over one utterance, alpha from the front and beta from the
// back; they meet in the middle, where the likelihood is known, and then each goes on through the
// other's half and turns the other's stored rows into occupancies.
//
// A state's value is mantissa * 2^exponent, one exponent a state: sums are shifts by whole powers
// of two, with neither exp nor log, and nothing underflows. States are kept as pairs, split in two
// rows: alpha pairs blank k with label k, beta pairs blank k with label k - 1, so that each needs
// one neighbour, the label of the pair before it in its own direction:
//   x       = blank[k] + label[k -/+ 1]
//   blank'  = p(blank) x
//   label'  = p(label) (label[k] + (may skip ? x : blank[k]))
// Blanks need nothing but themselves and are replaced in place. Labels of the first half are kept,
// for the occupancies, in blocks that stay in the cache: of the blocks before the last one only the
// states that precede it are kept, and the block is computed again when it is needed.

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

template <class Float>
KDKERNELS_INLINE Number<Float> multiply(Number<Float> a, Number<Float> b) {
  return {a.m * b.m, a.e + b.e};
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
  int64_t width;  // pairs (S + 1) in whole vectors, in elements
  // Probabilities in (m, e), times what a frame's softmax divides by: every path has all frames'
  // divisors as a factor, the likelihood has them too.
  const Float* blank_m;  // [T]
  const Float* blank_e;  // [T]
  // Of a small alphabet, where registers can be looked up in, those of its classes, [T][2 W], and
  // the class of each label in `class_of`; else those of each label, [T][width + W]. Label k is at
  // element W + k of the latter two; where there is no label is a symbol of probability 0, which in
  // the table takes the place of blank.
  const Float* label_m;
  const Float* label_e;
  const Int* class_of;  // [width + W], or null
  const Int* skip;      // [width], -1 where label k - 1 may be followed by label k, else 0
  int64_t row() const { return class_of ? 2 * kLanes<Float> : width + kLanes<Float>; }
};

// The blanks or the labels of all pairs: two arrays of `width` elements, a vector of margin before
// each and after the last. Margins may be shared, since only zeros are written there.
template <class Float>
struct Row {
  static constexpr int W = kLanes<Float>;
  Float* base;
  int64_t stride;  // width + W
  static int64_t elements(int64_t width) { return 2 * (width + W) + W; }
  Row(Float* base, int64_t width) : base(base), stride(width + W) {}

  // Vector j, or the elements `shift` further on.
  Number<Float> get(int64_t j, int64_t shift = 0) const {
    const Float* const m = base + (j + 1) * W + shift;
    return {load<Vec<Float>>(m), load<Vec<Float>>(m + stride)};
  }
  void set(int64_t j, Number<Float> x) const {
    Float* const m = base + (j + 1) * W;
    store(m, x.m);
    store(m + stride, x.e);
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

  // Rows in a block, for up to half of T frames: at most about 320 KiB.
  static int64_t most_block_rows(int64_t T, int64_t width) {
    const int64_t bytes = Row<Float>::elements(width) * int64_t(sizeof(Float));
    return std::min<int64_t>(T / 2 + 1, std::max<int64_t>(16, 320 * 1024 / bytes));
  }
  static int64_t workspace(int64_t T, int64_t width) {  // elements
    const int64_t most = most_block_rows(T, width), blocks = T / 2 / most + 1;
    return (most + 1 + 1 + 2 * blocks + 2) * Row<Float>::elements(width);
  }

  // `lattice` must outlive the chain's use. `memory` has workspace(T, width) elements for a T and a
  // width that are no smaller than the lattice's, and `most` is most_block_rows of the same two.
  void begin(const Lattice<Float>* lattice, Float* memory, int64_t most) {
    lattice_ = lattice;
    elements_ = Row<Float>::elements(lattice->width);
    const int64_t half = lattice->T / 2 + 1, blocks = (half + most - 1) / most;
    block_ = (half + blocks - 1) / blocks;
    rows_ = memory;
    blanks_ = rows_ + (block_ + 1) * elements_;
    checkpoints_ = blanks_ + elements_;
    current_ = checkpoints_ + 2 * blocks * elements_;
    stored_block_ = 0;
    // Before the first step all mass is in the blank at the chain's own end.
    const int64_t pair = kForward ? 0 : lattice->S, j = pair / W;
    const Row<Float> blank = row(blanks_), label = slot(0);
    for (int64_t k = -1; k <= lattice->width / W; k++) blank.set(k, zero_number<Float>());
    for (int64_t k = j - 1; k <= j + 1; k++) label.set(k, zero_number<Float>());
    Number<Float> start = zero_number<Float>();
    start.m[pair % W] = 1;
    start.e[pair % W] = 0;
    blank.set(j, start);
    copy(checkpoints_, blanks_);
    copy(checkpoints_ + elements_, slot(0).base);
  }

  // The first half: step i, its labels stored.
  void first(int64_t i) {
    const int64_t place = i % block_;
    if (place == 0 && i > 0) {
      Float* const checkpoint = checkpoints_ + i / block_ * 2 * elements_;
      copy(checkpoint, blanks_);
      copy(checkpoint + elements_, slot(block_).base);
      copy(slot(0).base, slot(block_).base);
    }
    step<true>(i, row(blanks_), slot(place), slot(place + 1), kNothing);
    stored_block_ = i / block_;
  }

  // The states after the last of `steps` steps of the first half.
  Row<Float> last_blanks() const { return row(blanks_); }
  Row<Float> last_labels(int64_t steps) const {
    return slot(steps == 0 ? 0 : (steps - 1) % block_ + 1);
  }

  // After `steps` steps of the first half: take the states along, out of the other chain's way,
  // divided by the likelihood m * 2^e, of which `inverse_m` is 1 / m.
  void leave(int64_t steps, Float inverse_m, Float e) {
    copy(current_, blanks_);
    copy(current_ + elements_, last_labels(steps).base);
    const Band live = band(steps - 1);
    const Number<Float> inverse{broadcast(inverse_m), broadcast(-e)};
    for (int64_t j = live.low; j <= live.high; j++) {
      for (Float* const base : {current_, current_ + elements_}) {
        row(base).set(j, multiply(row(base).get(j), inverse));
      }
    }
  }

  // Step i from the last states of the first half, without going there: for each vector j of pairs
  // `body(j, blank, label)` gets the values before this frame's symbol.
  template <class Body>
  void look_ahead(int64_t i, Body body) const {
    step<false>(i, row(blanks_), last_labels(i), last_labels(i), body);
  }

  // The second half: step i of the states taken along, with the same for `body`.
  template <class Body>
  void second(int64_t i, Body body) {
    const Row<Float> label = row(current_ + elements_);
    step<true>(i, row(current_), label, label, body);
  }

  // The stored labels of step i; called with i going down.
  Row<Float> stored(int64_t i) {
    const int64_t block = i / block_;
    if (block != stored_block_) {
      const Float* const checkpoint = checkpoints_ + block * 2 * elements_;
      copy(blanks_, checkpoint);
      copy(slot(0).base, checkpoint + elements_);
      for (int64_t k = 0; k < block_; k++) {
        step<true>(block * block_ + k, row(blanks_), slot(k), slot(k + 1), kNothing);
      }
      stored_block_ = block;
    }
    return slot(i % block_ + 1);
  }

  int64_t frame(int64_t i) const { return kForward ? i : lattice_->T - 1 - i; }

 private:
  static constexpr auto kNothing = [](int64_t, Number<Float>, Number<Float>) {};

  void copy(Float* to, const Float* from) const {
    std::memcpy(to, from, size_t(elements_) * sizeof(Float));
  }
  Row<Float> row(Float* base) const { return {base, lattice_->width}; }
  Row<Float> slot(int64_t place) const { return row(rows_ + place * elements_); }

  // Pairs that count at step i, -1 being the state before the first step.
  Band band(int64_t i) const {
    const int64_t t = kForward ? i : lattice_->T - 1 - i;
    if (i < 0) return kForward ? Band{0, 0} : Band{lattice_->S / W, lattice_->S / W};
    const int64_t left = lattice_->T - 1 - t, shift = kForward ? 1 : 0;
    return {std::max<int64_t>(0, lattice_->S - shift - left) / W,
            std::min<int64_t>(lattice_->S, t + 1 - shift) / W};
  }

  // From the states before step i, `blanks` and the labels `from`, to those after it, `blanks` and
  // `to`, which may be the same row; not kStore: only what `body` is told.
  template <bool kStore, class Body>
  KDKERNELS_INLINE void step(int64_t i, Row<Float> blanks, Row<Float> from, Row<Float> to,
                             Body body) const {
    // Label k is at element W + k; the pair k of beta has label k - 1.
    constexpr int64_t first = W - (kForward ? 0 : 1);
    const Float* const m = lattice_->label_m + frame(i) * lattice_->row();
    const Float* const e = lattice_->label_e + frame(i) * lattice_->row();
    if constexpr (kHasLookup<Float>) {
      if (const Int* const class_of = lattice_->class_of) {
        const Vec<Float> low_m = load<Vec<Float>>(m), high_m = load<Vec<Float>>(m + W);
        const Vec<Float> low_e = load<Vec<Float>>(e), high_e = load<Vec<Float>>(e + W);
        return walk<kStore>(i, blanks, from, to, body, [&](int64_t j) -> Number<Float> {
          const VecInt<Float> index = load<VecInt<Float>>(class_of + first + j * W);
          return {lookup(low_m, high_m, index), lookup(low_e, high_e, index)};
        });
      }
    }
    walk<kStore>(i, blanks, from, to, body, [&](int64_t j) -> Number<Float> {
      return {load<Vec<Float>>(m + first + j * W), load<Vec<Float>>(e + first + j * W)};
    });
  }

  // probability(j): of the labels of the pairs in vector j.
  template <bool kStore, class Body, class Probability>
  KDKERNELS_INLINE void walk(int64_t i, Row<Float> blanks, Row<Float> from, Row<Float> to,
                             Body body, Probability probability) const {
    const Band now = band(i), before = band(i - 1);
    const int64_t t = frame(i);
    const Number<Float> p_blank{broadcast(lattice_->blank_m[t]), broadcast(lattice_->blank_e[t])};
    const bool normalise = i % kPeriod == kPeriod - 1;
    const auto pair = [&](int64_t j, Number<Float> label, Number<Float> neighbour) {
      const Number<Float> blank = blanks.get(j);
      const VecInt<Float> skip = load<VecInt<Float>>(lattice_->skip + j * W);
      const Number<Float> x = add(blank, neighbour);
      const Number<Float> y = add(label, {skip ? x.m : blank.m, skip ? x.e : blank.e});
      body(j, x, y);
      if constexpr (kStore) {
        Number<Float> to_blank = multiply(x, p_blank), to_label = multiply(y, probability(j));
        if (normalise) {
          to_blank = normalised(to_blank);
          to_label = normalised(to_label);
        }
        blanks.set(j, to_blank);
        to.set(j, to_label);
      }
    };
    if constexpr (kForward) {
      Number<Float> last = now.low > before.low ? from.get(now.low - 1) : zero_number<Float>();
      for (int64_t j = now.low; j <= now.high; j++) {
        const Number<Float> label = from.get(j);
        pair(j, label, {shift_up(last.m, label.m), shift_up(last.e, label.e)});
        last = label;
      }
    } else {
      Number<Float> last = now.high < before.high ? from.get(now.high + 1) : zero_number<Float>();
      for (int64_t j = now.high; j >= now.low; j--) {
        const Number<Float> label = from.get(j);
        pair(j, label, {shift_down(label.m, last.m), shift_down(label.e, last.e)});
        last = label;
      }
    }
    // Around its band a row of labels holds a vector of zeros.
    if constexpr (kStore) {
      to.set(now.low - 1, zero_number<Float>());
      to.set(now.high + 1, zero_number<Float>());
    }
  }

  const Lattice<Float>* lattice_ = nullptr;
  int64_t elements_ = 0, block_ = 0;
  Float* rows_ = nullptr;         // [block + 1], labels before a block and those of the block
  Float* blanks_ = nullptr;       // of the first half
  Float* checkpoints_ = nullptr;  // [blocks][2], blanks and labels before each block
  Float* current_ = nullptr;      // [2], blanks and labels of the second half
  int64_t stored_block_ = 0;
};

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
