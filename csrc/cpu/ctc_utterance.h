// One utterance on its way through ctc_loss: its rows (softmax, the divergence from the teacher's,
// the dense gradient while the row is in the cache), the recursion, and the occupancies subtracted
// at the target's labels.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/arena.h"
#include "cpu/ctc_occupancy.h"
#include "cpu/ctc_problem.h"
#include "cpu/ctc_recursion.h"
#include "cpu/ctc_rows.h"
#include "cpu/ctc_target.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {

// What the calling thread needs for rows.
template <class Float>
struct RowScratch {
  Float *logits, *dense, *kd;  // [rows_in_block(C)][C]
  DivergenceBlock<Float> kd_block;
  RowScratch(const DivergenceOptions& options, int64_t C, Arena& arena)
      : logits(arena.take<Float>(rows_in_block(C) * C)),
        dense(arena.take<Float>(rows_in_block(C) * C)),
        kd(arena.take<Float>(rows_in_block(C) * C)),
        kd_block(options, C, arena) {}
};

template <class Float>
class Utterance {
 public:
  static constexpr int W = kLanes<Float>;

  // With the memory for any utterance of up to T frames and S labels.
  Utterance(Arena& arena, int64_t T, int64_t C, int64_t S)
      : target_(arena, C, S),
        occupancies_{{arena, S, target_.most_symbols(C, S), 0},
                     {arena, S, target_.most_symbols(C, S), 1}} {
    const int64_t width = (S + W) / W * W;
    max_ = arena.take<double>(T);
    rest_ = arena.take<double>(T);
    kd_ = arena.take<double>(T);
    blank_m_ = arena.take<Float>(T);
    blank_e_ = arena.take<Float>(T);
    label_m_ = arena.take<Float>(T * (width + W));
    label_e_ = arena.take<Float>(T * (width + W));
    dense_ = arena.take<Float>(T * target_.most_symbols(C, S));
    block_rows_ = Chain<Float, true>::most_block_rows(T, width);
    memory_[0] = arena.take<Float>(Chain<Float, true>::workspace(T, width));
    memory_[1] = arena.take<Float>(Chain<Float, false>::workspace(T, width));
  }

  // Which utterance this is; nothing of its logits is read yet.
  void begin(const Problem<Float>& problem, int64_t n) {
    problem_ = &problem;
    n_ = n;
    T_ = problem.input_lengths[n];
    labelled_ = problem.is_labelled(n);
    S_ = labelled_ ? problem.target_lengths[n] : 0;
    target_.begin(problem.targets + (labelled_ ? problem.target_offsets[n] : 0), S_, problem.C,
                  problem.blank);
    // The symbols' lines are read again, for the occupancies: they must be few.
    past_caches_ = problem.past_caches && 4 * W * target_.symbols() <= problem.C;
    scale_ = labelled_ ? problem.ctc_scale : 0.0;
    if (problem.divide_by_length) scale_ /= double(std::max<int64_t>(S_, 1));
    loss_ = !labelled_ || (T_ == 0 && S_ == 0) ? 0.0 : kInfinity;
    runs_ = labelled_ && T_ > 0 && T_ >= target_.frames();
    if (!runs_) scale_ = 0;
    lattice_ = {T_,       S_,       target_.width(),    blank_m_,      blank_e_,
                label_m_, label_e_, target_.class_of(), target_.skip()};
    for (Occupancies<Float>& o : occupancies_) o.begin(S_, target_.symbol(), target_.symbols());
  }

  // Frames [begin, end) of the batch's T: statistics, divergence, dense gradient.
  void rows(int64_t begin, int64_t end, RowScratch<Float>& scratch) {
    const Problem<Float>& p = *problem_;
    const int64_t block = std::min<int64_t>(W, rows_in_block(p.C));
    for (int64_t t = begin; t < std::min(end, T_); t += block) {
      const int64_t last = std::min({end, T_, t + block});
      if (p.teacher.data) kd_rows(t, last, scratch);
      ctc_rows(t, last, scratch);
    }
    for (int64_t t = std::max(begin, T_); t < end; t++) {
      for (const Frames& grad : {p.grad, p.grad_teacher}) {
        if (grad.data) std::memset(grad.row(t, n_), 0, size_t(p.C * size_of(grad.dtype)));
      }
    }
    if (past_caches_) stored_past();
  }

  // After all rows: the symbols' probabilities in (m, e), and the chains' starts.
  void begin_recursion() {
    if (!runs_) return;
    for (int64_t t = 0; t < T_; t++) runs_ = runs_ && rest_[t] == rest_[t];
    if (!runs_) {
      loss_ = kNotANumber;
      return;
    }
    const int64_t row = lattice_.row();
    const int64_t blank = lattice_.class_of ? problem_->blank : W + S_;
    for (int64_t t = 0; t < T_; t++) {
      Float* const m = label_m_ + t * row;
      Float* const e = label_e_ + t * row;
      if (!lattice_.class_of) {  // else made with the softmax
        for (int64_t k = W; k < row; k += W) {
          const Number<Float> p =
              exponential<Float>(load<Vec<Float>>(m + k), broadcast(Float(max_[t])));
          store(m + k, p.m);
          store(e + k, p.e);
        }
        set_zero(m, e, W - 1);
      }
      blank_m_[t] = m[blank];
      blank_e_[t] = e[blank];
      set_zero(m, e, blank);
    }
    alpha_.begin(&lattice_, memory_[0], block_rows_);
    beta_.begin(&lattice_, memory_[1], block_rows_);
  }

  // The halves, of one direction or of both in turns: each alone waits for its own last row.
  void first_halves(bool alpha, bool beta) {
    if (!runs_) return;
    for (int64_t i = 0; i < T_ - middle(); i++) {
      if (alpha && i < middle()) alpha_.first(i);
      if (beta) beta_.first(i);
    }
  }

  // Where they meet: the likelihood.
  void meet() {
    if (!runs_) return;
    Number<Float> sum = zero_number<Float>();
    const Row<Float> blanks = beta_.last_blanks(), labels = beta_.last_labels(T_ - middle());
    alpha_.look_ahead(middle(), [&](int64_t j, Number<Float> blank, Number<Float> label) {
      sum = add(normalised(sum),
                add(multiply(blank, blanks.get(j)), multiply(label, labels.get(j, 1))));
    });
    const Float e = reduce_max(sum.e);
    const double m = double(reduce_add(scale_by_power<Float>(sum.m, sum.e - e)));
    if (e < kZeroLikelihood<Float> || !(m > 0)) {
      runs_ = false;
      return;
    }
    loss_ = (log2_divisors() - (double(e) + std::log2(m))) * kLn2;
    alpha_.leave(middle(), Float(1 / m), e);
    beta_.leave(T_ - middle(), Float(1 / m), e);
  }

  void second_halves(bool alpha, bool beta) {
    if (!runs_ || !problem_->grad.data || scale_ == 0) return;
    for (int64_t i = 0; i < T_ - middle(); i++) {
      if (alpha) occupy(alpha_, middle() + i, beta_, occupancies_[0]);
      if (beta && i < middle()) occupy(beta_, T_ - middle() + i, alpha_, occupancies_[1]);
    }
    if (alpha) subtract(occupancies_[0]);
    if (beta) subtract(occupancies_[1]);
  }

  // A target that cannot be aligned has no part in the gradient, one with a NaN spreads it.
  void finish(RowScratch<Float>& scratch) {
    // The mantissas' rounding is 1e-7 a frame, at random: too much for a loss as small as this.
    if (sizeof(Float) == 4 && runs_ && loss_ < 0.1 * std::sqrt(double(T_))) {
      loss_ = small_loss(scratch);
    }
    if (labelled_ && problem_->grad.data && !(std::fabs(loss_) < kInfinity) && scale_ != 0) {
      scale_ = loss_ == kInfinity ? 0.0 : kNotANumber;
      rows(0, T_, scratch);
    }
    if (loss_ == kInfinity && problem_->zero_infinity) loss_ = 0;
  }

  int64_t frames() const { return T_; }
  double ctc_loss() const { return loss_; }
  double kd_loss() const {
    double sum = 0;
    for (int64_t t = 0; t < T_; t++) sum += kd_[t];
    return sum;
  }

 private:
  int64_t middle() const { return T_ / 2; }

  // What the softmax of all frames divides by, as a logarithm to the base 2.
  double log2_divisors() const {
    constexpr int64_t block = 32 * kLanes<double>;  // products stay below 2^(31 * 32)
    double sum = 0;
    for (int64_t t = 0; t < T_; t += block) {
      VecF64 product = broadcast(1.0);
      for_each_vector<double>(std::min(block, T_ - t), [&](int64_t i, int lanes) {
        product *= load_n(rest_ + t + i, lanes, 0.0) + 1.0;
      });
      sum += reduce_add(log2_of(product));
    }
    return sum;
  }

  // Frames [begin, end), at most a block of them, the gradients of their divergences being in
  // scratch.kd.
  void ctc_rows(int64_t begin, int64_t end, RowScratch<Float>& scratch) {
    const Problem<Float>& p = *problem_;
    const int n = int(end - begin);
    const bool softmax = p.grad.data && !p.posteriors && scale_ != 0;
    SoftmaxRow<Float> rows[W] = {};
    for (int i = 0; i < n; i++) {
      const int64_t t = begin + i;
      rows[i].logits = load_row(p.logits.row(t, n_), p.logits.dtype, p.C, scratch.logits + i * p.C);
      rows[i].exponentials = softmax ? scratch.dense + i * p.C : nullptr;
      if (lattice_.class_of) {
        rows[i].m = label_m_ + t * lattice_.row();
        rows[i].e = label_e_ + t * lattice_.row();
      }
      rows[i].valid = true;  // of an utterance without a transcript nobody asks
    }
    const bool direct = p.grad.dtype == kOwnDType<Float> && !past_caches_;
    const RowsAt written = direct ? p.grad.rows(begin, n_) : RowsAt{};
    if (labelled_) softmax_rows(rows, n, p.C, p.logits.stride_t * (end - begin), written);
    for (int i = 0; i < n; i++) {
      const int64_t t = begin + i;
      if (labelled_) {
        max_[t] = double(rows[i].max);
        rest_[t] = rows[i].valid ? rows[i].rest : kNotANumber;
        if (!lattice_.class_of) label_logits(t, rows[i].logits);
      }
      if (p.grad.data) gradient_row(t, rows[i], scratch, i);
    }
  }

  static void set_zero(Float* m, Float* e, int64_t i) {
    m[i] = 1;
    e[i] = kZeroSymbol<Float>;
  }

  // The logits that become probabilities: after the labels that of blank, then -inf.
  void label_logits(int64_t t, const Float* logits) const {
    Float* const row = label_m_ + t * lattice_.row();
    target_.gather(logits, row + W);
    row[W + S_] = logits[problem_->blank];
    std::fill(row + W + S_ + 1, row + lattice_.row(), Float(-kInfinity));
  }

  void gradient_row(int64_t t, const SoftmaxRow<Float>& row, RowScratch<Float>& scratch, int i) {
    const Problem<Float>& p = *problem_;
    void* const grad = p.grad.row(t, n_);
    const Float* const kd = p.has_kd_gradient(t, n_) ? scratch.kd + i * p.C : nullptr;
    const bool ctc = row.exponentials || scale_ != scale_;
    const Float factor = Float(row.valid ? scale_ / (1 + row.rest) : kNotANumber);
    Float* const scratch_row = scratch.dense + i * p.C;
    Float* const dense = begin_row(grad, p.grad.dtype, scratch_row);
    write_row(dense, p.C, past_caches_, [&](int64_t c, int lanes) {
      Vec<Float> x{};
      if (kd) x = load_n(kd + c, lanes, Float(0));
      if (ctc) x = less_product<Float>(x, load_n(scratch_row + c, lanes, Float(0)), -factor);
      return x;
    });
    if (p.grad.dtype != kOwnDType<Float>) {
      // To be rounded once: kept for the entries of the symbols.
      Float* const kept = dense_ + t * target_.symbols();
      for (int64_t u = 0; u < target_.symbols(); u++) kept[u] = dense[target_.class_of_symbol(u)];
      finish_row(grad, p.grad.dtype, p.C, dense);
    }
  }

  void kd_rows(int64_t begin, int64_t end, RowScratch<Float>& scratch) {
    const Problem<Float>& p = *problem_;
    std::fill(kd_ + begin, kd_ + end, 0.0);
    for (int64_t t = begin, n; t < end; t += n) {
      n = p.frame_weight ? 1 : end - t;  // frames of one weight
      const double weight = p.kd_frame_factor(t, n_);
      RowsAt grad_teacher = p.grad_teacher.rows(t, n_);
      if (grad_teacher.first && (weight == 0 || p.kd_scale == 0)) {
        for (int64_t i = 0; i < n; i++) {
          fill_row(grad_teacher[i], p.grad_teacher.dtype, p.C, Float(0));
        }
        grad_teacher = {nullptr, 0};
      }
      if (weight == 0) continue;
      RowsAt grad{nullptr, 0};
      if (p.has_kd_gradient(t, n_)) {
        grad = {reinterpret_cast<char*>(scratch.kd + (t - begin) * p.C),
                p.C * int64_t(sizeof(Float))};
      }
      scratch.kd_block.add(n, p.logits.rows(t, n_), p.teacher.rows(t, n_), grad, grad_teacher,
                           weight * p.kd_scale, kd_ + t);
    }
    scratch.kd_block.flush();
    for (int64_t t = begin; t < end; t++) {
      if (kd_[t] != 0) kd_[t] *= p.kd_frame_factor(t, n_);
    }
  }

  // The loss in plain float64: nothing that counts can underflow where the loss is small.
  double small_loss(RowScratch<Float>& scratch) {
    double* const blank = reinterpret_cast<double*>(memory_[0]);
    double* const label = reinterpret_cast<double*>(memory_[1]);
    std::fill(blank, blank + S_ + 1, 0.0);
    std::fill(label, label + S_ + 1, 0.0);
    blank[0] = 1;
    const Problem<Float>& p = *problem_;
    log2_1p(rest_, T_);
    for (int64_t t = 0; t < T_; t++) {
      const Float* x = load_row(p.logits.row(t, n_), p.logits.dtype, p.C, scratch.logits);
      const auto probability = [&](int64_t c) {
        return std::exp2((double(x[c]) - max_[t]) * kLog2e - rest_[t]);
      };
      const double p_blank = probability(p.blank);
      for (int64_t k = std::min(S_, t + 1); k >= 0; k--) {  // down: k - 1 is still of frame t - 1
        const double before = k > 0 ? label[k - 1] : 0.0;
        if (k < S_) {
          label[k] = (label[k] + blank[k] + (target_.skip()[k] ? before : 0.0)) *
                     probability(target_.label(k));
        }
        blank[k] = (blank[k] + before) * p_blank;
      }
    }
    return -std::log(blank[S_] + (S_ > 0 ? label[S_ - 1] : 0.0));
  }

  // Occupancies of one frame, which is step i of a chain and step T - 1 - i of the other.
  template <bool kForward>
  void occupy(Chain<Float, kForward>& chain, int64_t i, Chain<Float, !kForward>& other,
              Occupancies<Float>& occupancies) {
    // The label of alpha's pair k is that of beta's pair k + 1.
    constexpr int64_t shift = kForward ? 1 : -1;
    const int64_t t = chain.frame(i);
    Float* const occupancy = occupancies.add(t, blank_e_[t] >= kZeroLikelihood<Float>);
    const Row<Float> row = other.stored(T_ - 1 - i);
    chain.second(i, [&](int64_t j, Number<Float>, Number<Float> label) {
      const Number<Float> x = multiply(label, row.get(j, shift));
      store(occupancy + j * W, scale_by_power<Float>(x.m, x.e));
    });
    if (occupancies.full()) subtract(occupancies);
  }

  // The frames collected, from their rows of the gradient.
  void subtract(Occupancies<Float>& occupancies) {
    const Problem<Float>& p = *problem_;
    const Float scale = p.posteriors ? Float(-1) : Float(scale_);
    const int64_t symbols = target_.symbols();
    occupancies.flush([&](int64_t t, const Float* occupancy) {
      void* const grad = p.grad.row(t, n_);
      Float* const row = static_cast<Float*>(grad);
      if (p.grad.dtype == kOwnDType<Float> && target_.symbols_are_classes()) {
        for (int64_t c = 0; c < p.C; c++) row[c] -= scale * occupancy[c];
      } else if (p.grad.dtype == kOwnDType<Float>) {
        for (int64_t u = 0; u < symbols; u++) {
          row[target_.class_of_symbol(u)] -= scale * occupancy[u];
        }
      } else {
        const Float* const kept = dense_ + t * symbols;
        for (int64_t u = 0; u < symbols; u++) {
          store_one(grad, p.grad.dtype, target_.class_of_symbol(u), kept[u] - scale * occupancy[u]);
        }
      }
    });
  }

  const Problem<Float>* problem_ = nullptr;
  int64_t block_rows_ = 0;  // of a chain, for the largest utterance there is memory for
  int64_t n_ = 0, T_ = 0, S_ = 0;
  bool labelled_ = false, runs_ = false, past_caches_ = false;
  double scale_ = 0, loss_ = 0;  // scale: d(returned loss) / d(loss)
  Lattice<Float> lattice_{};
  Chain<Float, true> alpha_;
  Chain<Float, false> beta_;
  Target<Float> target_;
  Occupancies<Float> occupancies_[2];  // of alpha and of beta, whose pair k has label k - 1

  double *max_, *rest_, *kd_;                        // [T], SoftmaxRow and divergence of each frame
  Float *blank_m_, *blank_e_, *label_m_, *label_e_;  // see Lattice
  Float* dense_;                                     // [T][symbols], dense gradient at each symbol
  Float* memory_[2];                                 // of alpha and of beta
};

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
