// ctc_loss, ctc_kd_loss and ctc_posteriors on the CPU. For each utterance: its rows (softmax, the
// divergence from the teacher's, the dense gradient), the recursion, and the occupancies
// subtracted at the target's labels. Utterances in parallel; where there are fewer of them than
// threads, their rows and the two directions. Of the size of the logits only the gradient is stored.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/arena.h"
#include "cpu/ctc_rows.h"
#include "cpu/divergences.h"
#include "cpu/kernels.h"
#include "cpu/row.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// A [T][N][C] tensor.
struct Frames {
  void* data;
  DType dtype;
  int64_t stride_t, stride_n;
  void* row(int64_t t, int64_t n) const {
    return data ? offset(data, dtype, t * stride_t + n * stride_n) : nullptr;
  }
};

template <class Float>
struct Problem {
  int64_t T, N, C, S;
  Frames logits, teacher, grad, grad_teacher;
  const int64_t *targets, *target_offsets, *input_lengths, *target_lengths;
  int64_t blank;
  bool zero_infinity, posteriors;
  const uint8_t* labelled;
  const Float* frame_weight;
  DivergenceOptions divergence;
  double kd_factor;  // temperature^2 where rescaled
  // d(returned loss) / d(ctc loss of n), before the division by its length, and / d(kd loss of a frame)
  double ctc_scale, kd_scale;
  bool divide_by_length;

  bool is_labelled(int64_t n) const { return !labelled || labelled[n]; }
  double weight(int64_t t, int64_t n) const {
    return frame_weight ? double(frame_weight[t * N + n]) : 1.0;
  }
};

// What the calling thread needs for rows.
template <class Float>
struct RowScratch {
  Float *logits, *dense, *kd;  // [C], [C], [kd_block.block()][C]
  DivergenceBlock<Float> kd_block;
  RowScratch(const DivergenceOptions& options, int64_t C, Arena& arena)
      : logits(arena.take<Float>(C)),
        dense(arena.take<Float>(C)),
        kd(arena.take<Float>(rows_in_block(C) * C)),
        kd_block(options, C, arena) {}
};

template <class Float>
class Utterance {
 public:
  using Int = typename Simd<Float>::Int;
  static constexpr int W = kLanes<Float>;

  // With the memory for any utterance of up to T frames and S labels.
  Utterance(Arena& arena, int64_t T, int64_t C, int64_t S) {
    const int64_t width = (S + W) / W * W;
    max_ = arena.take<double>(T);
    rest_ = arena.take<double>(T);
    kd_ = arena.take<double>(T);
    blank_m_ = arena.take<Float>(T);
    blank_e_ = arena.take<Int>(T);
    label_m_ = arena.take<Float>(T * (width + W));
    label_e_ = arena.take<Int>(T * (width + W));
    dense_ = arena.take<Float>(T * (S + 1));
    skip_ = arena.take<Int>(width);
    label_ = arena.take<int32_t>(S);
    symbol_ = arena.take<int32_t>(S);
    symbol_label_ = arena.take<int32_t>(S);
    symbol_of_label_ = arena.take<int32_t>(C);
    for (int i = 0; i < 2; i++) {
      occupancy_[i] = arena.take<Float>(S);
      gamma_[i] = arena.take<Float>(width + 2 * W);
    }
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
    const int64_t* labels = problem.targets + (labelled_ ? problem.target_offsets[n] : 0);
    int64_t repeats = 0;
    for (int64_t k = 0; k < S_; k++) {
      label_[k] = int32_t(labels[k]);
      symbol_of_label_[label_[k]] = -1;
      repeats += k > 0 && label_[k] == label_[k - 1];
    }
    symbols_ = 0;
    for (int64_t k = 0; k < S_; k++) {
      int32_t& symbol = symbol_of_label_[label_[k]];
      if (symbol < 0) {
        symbol = int32_t(symbols_);
        symbol_label_[symbols_++] = label_[k];
      }
      symbol_[k] = symbol;
    }
    const int64_t width = (S_ + W) / W * W;
    for (int64_t k = 0; k < width; k++) {
      skip_[k] = k > 0 && k < S_ && label_[k] != label_[k - 1] ? -1 : 0;
    }
    scale_ = labelled_ ? problem.ctc_scale : 0.0;
    if (problem.divide_by_length) scale_ /= double(std::max<int64_t>(S_, 1));
    loss_ = !labelled_ || (T_ == 0 && S_ == 0) ? 0.0 : kInf;
    runs_ = labelled_ && T_ > 0 && T_ >= S_ + repeats;
    if (!runs_) scale_ = 0;
    lattice_ = {T_, S_, width, blank_m_, blank_e_, label_m_, label_e_, skip_};
  }

  // Frames [begin, end) of the batch's T: statistics, divergence, dense gradient.
  void rows(int64_t begin, int64_t end, RowScratch<Float>& scratch) {
    const int64_t block = problem_->teacher.data ? scratch.kd_block.block() : 1;
    for (int64_t t = begin; t < end; t += block) {
      const int64_t last = std::min(end, t + block);
      if (problem_->teacher.data) kd_rows(t, last, scratch);
      for (int64_t i = t; i < last; i++) row(i, scratch.kd + (i - t) * problem_->C, scratch);
    }
  }

  // After all rows: the symbols' probabilities in (m, e), and the chains' starts.
  void begin_recursion() {
    if (!runs_) return;
    for (int64_t t = 0; t < T_; t++) runs_ = runs_ && rest_[t] == rest_[t];
    if (!runs_) {
      loss_ = kNan;
      return;
    }
    for (int64_t t = 0; t < T_; t++) {
      const SoftmaxScale<Float> scale(Float(max_[t]), 1 + rest_[t]);
      Float* const m = label_m_ + t * lattice_.row() + W;
      Int* const e = label_e_ + t * lattice_.row() + W;
      for (int64_t k = S_; k < lattice_.width; k++) m[k] = Float(-kInf);
      for (int64_t k = 0; k < lattice_.width; k += W) {
        const Number<Float> p = to_probability(load<Vec<Float>>(m + k), scale);
        store(m + k, p.m);
        store(e + k, p.e);
      }
      const Number<Float> blank = to_probability(broadcast(blank_m_[t]), scale);
      blank_m_[t] = blank.m[0];
      blank_e_[t] = blank.e[0];
      m[-1] = 1;
      e[-1] = kZeroSymbol<Float>;
    }
    alpha_.begin(&lattice_, memory_[0]);
    beta_.begin(&lattice_, memory_[1]);
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
    alpha_.leave(middle());
    beta_.leave(T_ - middle());
    Number<Float> sum = zero_number<Float>();
    const int64_t i = T_ - 1 - middle();
    visit(alpha_, middle(), beta_, i, [&](int64_t, Number<Float> blank, Number<Float> label) {
      sum = add(normalised(sum), add(blank, label));
    });
    const Int e = reduce_max(sum.e);
    const double m = double(reduce_add(sum.m * power_of_two<Float>(sum.e - e)));
    if (e < kZeroLikelihood<Float> || !(m > 0)) {
      runs_ = false;
      return;
    }
    const double log2_m = std::log2(m);
    loss_ = -(double(e) + log2_m) * kLn2;
    likelihood_e_ = e;
    likelihood_inverse_m_ = Float(1 / m);
  }

  void second_halves(bool alpha, bool beta) {
    if (!runs_ || !problem_->grad.data || scale_ == 0) return;
    for (int64_t i = 0; i < T_ - middle(); i++) {
      if (alpha) occupy(alpha_, middle() + i, beta_, gamma_[0], occupancy_[0]);
      if (beta && i < middle()) {
        occupy(beta_, T_ - middle() + i, alpha_, gamma_[1], occupancy_[1]);
      }
    }
  }

  // A target that cannot be aligned has no part in the gradient, one with a NaN spreads it.
  void finish(RowScratch<Float>& scratch) {
    // The mantissas' rounding is 1e-7 a frame, at random: too much for a loss as small as this.
    if (sizeof(Float) == 4 && runs_ && loss_ < 0.1 * std::sqrt(double(T_))) {
      loss_ = small_loss(scratch);
    }
    if (labelled_ && problem_->grad.data && !(std::fabs(loss_) < kInf) && scale_ != 0) {
      scale_ = loss_ == kInf ? 0.0 : kNan;
      rows(0, T_, scratch);
    }
    if (loss_ == kInf && problem_->zero_infinity) loss_ = 0;
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

  // One frame, the gradient of its divergence being in `kd`.
  void row(int64_t t, const Float* kd, RowScratch<Float>& scratch) {
    const Problem<Float>& p = *problem_;
    void* const grad = p.grad.row(t, n_);
    if (t >= T_) {
      if (grad) fill_row(grad, p.grad.dtype, p.C, Float(0));
      if (void* x = p.grad_teacher.row(t, n_)) fill_row(x, p.grad_teacher.dtype, p.C, Float(0));
      return;
    }
    const Float* logits = load_row(p.logits.row(t, n_), p.logits.dtype, p.C, scratch.logits);
    Float* const dense = grad ? begin_row(grad, p.grad.dtype, scratch.dense) : nullptr;
    ctc_row(t, logits, dense);
    if (!grad) return;
    if (p.teacher.data && p.weight(t, n_) != 0) {
      for (int64_t c = 0; c < p.C; c++) dense[c] += kd[c];
    }
    if (dense != grad) {  // to be rounded once: kept for the entries of the target's labels
      Float* const kept = dense_ + t * (S_ + 1);
      for (int64_t u = 0; u < symbols_; u++) kept[u] = dense[symbol_label_[u]];
      kept[symbols_] = dense[p.blank];
    }
    finish_row(grad, p.grad.dtype, p.C, dense);
  }

  void ctc_row(int64_t t, const Float* logits, Float* dense) {
    const Problem<Float>& p = *problem_;
    const bool softmax = dense && !p.posteriors && scale_ != 0;
    double factor = scale_ == scale_ ? 0 : kNan;
    if (labelled_) {
      const SoftmaxRow<Float> s = softmax_row(logits, p.C, softmax ? dense : nullptr);
      max_[t] = double(s.max);
      rest_[t] = s.valid ? s.rest : kNan;
      blank_m_[t] = logits[p.blank];
      Float* const label = label_m_ + t * lattice_.row() + W;
      for (int64_t k = 0; k < S_; k++) label[k] = logits[label_[k]];
      if (softmax) factor = s.valid ? scale_ / (1 + s.rest) : kNan;
    }
    if (!dense) return;
    if (softmax && factor == factor) {
      const Float f = Float(factor);
      for (int64_t c = 0; c < p.C; c++) dense[c] *= f;
    } else {
      std::fill(dense, dense + p.C, Float(factor));
    }
  }

  void kd_rows(int64_t begin, int64_t end, RowScratch<Float>& scratch) {
    constexpr DType own = sizeof(Float) == 8 ? DType::float64 : DType::float32;
    const Problem<Float>& p = *problem_;
    end = std::min(end, T_);
    for (int64_t t = begin; t < end; t++) {
      const double weight = p.weight(t, n_) * p.kd_factor;
      void* const grad_teacher = p.grad_teacher.row(t, n_);
      kd_[t] = 0;
      if (weight == 0) {
        if (grad_teacher) fill_row(grad_teacher, p.grad_teacher.dtype, p.C, Float(0));
        continue;
      }
      scratch.kd_block.add({p.logits.row(t, n_), p.logits.dtype},
                           {p.teacher.row(t, n_), p.teacher.dtype},
                           {p.grad.data ? scratch.kd + (t - begin) * p.C : nullptr, own},
                           {grad_teacher, p.grad_teacher.dtype}, weight * p.kd_scale, kd_ + t);
    }
    scratch.kd_block.flush();
    for (int64_t t = begin; t < end; t++) {
      if (kd_[t] != 0) kd_[t] *= p.weight(t, n_) * p.kd_factor;
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
          label[k] = (label[k] + blank[k] + (skip_[k] ? before : 0.0)) * probability(label_[k]);
        }
        blank[k] = (blank[k] + before) * p_blank;
      }
    }
    return -std::log(blank[S_] + (S_ > 0 ? label[S_ - 1] : 0.0));
  }

  // Step i of one chain against step `other_i`, the same frame, of the other: for each vector of
  // pairs the products of the two, of the blanks and of the labels.
  template <bool kForward, class Body>
  KDKERNELS_INLINE void visit(Chain<Float, kForward>& chain, int64_t i,
                              Chain<Float, !kForward>& other, int64_t other_i, Body body) {
    const PairRow<Float> row = other.stored(other_i);
    const Band band = other.band(other_i);
    chain.second(i, [&](int64_t j, Number<Float> blank, Number<Float> label) {
      const Number<Float> other_blank = row.blank(j), aligned = row.label(j);
      Number<Float> other_label;
      if constexpr (kForward) {  // the label of alpha's pair k is that of beta's pair k + 1
        const Number<Float> after = j < band.high ? row.label(j + 1) : zero_number<Float>();
        other_label = {shift_down(aligned.m, after.m), shift_down(aligned.e, after.e)};
      } else {
        const Number<Float> before = j > band.low ? row.label(j - 1) : zero_number<Float>();
        other_label = {shift_up(before.m, aligned.m), shift_up(before.e, aligned.e)};
      }
      body(j, Number<Float>{blank.m * other_blank.m, blank.e + other_blank.e},
           Number<Float>{label.m * other_label.m, label.e + other_label.e});
    });
  }

  // Occupancies of one frame, into its row of the gradient.
  template <bool kForward>
  void occupy(Chain<Float, kForward>& chain, int64_t i, Chain<Float, !kForward>& other,
              Float* gamma, Float* occupancy) {
    const int64_t shift = kForward ? 0 : 1;  // beta's pair k has label k - 1
    Float* const gamma_0 = gamma + W;
    Vec<Float> blanks{};
    const auto probability = [&](Number<Float> x) {
      return x.m * likelihood_inverse_m_ * power_of_two<Float>(x.e - likelihood_e_);
    };
    visit(chain, i, other, T_ - 1 - i, [&](int64_t j, Number<Float> blank, Number<Float> label) {
      blanks += probability(blank);
      store(gamma_0 + j * W - shift, probability(label));
    });
    const Band band = chain.band(i);
    const int64_t begin = std::max<int64_t>(0, band.low * W - shift);
    const int64_t end = std::min(S_, (band.high + 1) * W - shift);
    std::fill(occupancy, occupancy + symbols_, Float(0));
    for (int64_t k = begin; k < end; k++) occupancy[symbol_[k]] += gamma_0[k];

    const Problem<Float>& p = *problem_;
    const int64_t t = chain.frame(i);
    const Float scale = p.posteriors ? Float(-1) : Float(scale_);
    void* const grad = p.grad.row(t, n_);
    const Float blank = reduce_add(blanks);
    if (p.grad.dtype == (sizeof(Float) == 8 ? DType::float64 : DType::float32)) {
      Float* const row = static_cast<Float*>(grad);
      for (int64_t u = 0; u < symbols_; u++) row[symbol_label_[u]] -= scale * occupancy[u];
      row[p.blank] -= scale * blank;
    } else {
      const Float* const kept = dense_ + t * (S_ + 1);
      for (int64_t u = 0; u < symbols_; u++) {
        store_one(grad, p.grad.dtype, symbol_label_[u], kept[u] - scale * occupancy[u]);
      }
      store_one(grad, p.grad.dtype, p.blank, kept[symbols_] - scale * blank);
    }
  }

  const Problem<Float>* problem_ = nullptr;
  int64_t n_ = 0, T_ = 0, S_ = 0, symbols_ = 0;
  bool labelled_ = false, runs_ = false;
  double scale_ = 0, loss_ = 0;  // scale: d(returned loss) / d(loss)
  Int likelihood_e_ = 0;
  Float likelihood_inverse_m_ = 0;
  Lattice<Float> lattice_{};
  Chain<Float, true> alpha_;
  Chain<Float, false> beta_;

  double *max_, *rest_, *kd_;      // [T], SoftmaxRow and divergence of each frame
  Float *blank_m_, *label_m_;      // see Lattice
  Int *blank_e_, *label_e_, *skip_;
  Float* dense_;             // [T][S + 1], dense gradient at each symbol and at blank
  int32_t* label_;           // [S]
  int32_t* symbol_;          // [S], number of the label among the distinct ones
  int32_t* symbol_label_;    // [symbols]
  int32_t* symbol_of_label_; // [C]
  Float *occupancy_[2], *gamma_[2], *memory_[2];  // of alpha and of beta
};

// The memory of a call: the losses of each utterance, then a piece for each thread.
template <class Float>
struct Workspace {
  double *ctc, *kd;  // [N]
  char* pieces;
  int64_t piece;

  static int64_t piece_of(int64_t T, int64_t C, int64_t S) {
    Arena arena(nullptr);
    RowScratch<Float>({}, C, arena);
    Utterance<Float>(arena, T, C, S);
    return arena.used();
  }
  static int64_t size(int64_t T, int64_t N, int64_t C, int64_t S, int64_t threads) {
    Arena arena(nullptr);
    arena.take<double>(N);
    arena.take<double>(N);
    return arena.used() + threads * piece_of(T, C, S);
  }
  Workspace(void* memory, const Problem<Float>& p) {
    Arena arena(memory);
    ctc = arena.take<double>(p.N);
    kd = arena.take<double>(p.N);
    pieces = static_cast<char*>(memory) + arena.used();
    piece = piece_of(p.T, p.C, p.S);
  }
  Arena operator[](int64_t i) const { return Arena(pieces + i * piece); }
};

// One utterance after the other, each thread its own.
template <class Float>
void run_utterances(const Problem<Float>& p, const Workspace<Float>& workspace, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Arena arena = workspace[omp_get_thread_num()];
    RowScratch<Float> scratch(p.divergence, p.C, arena);
    Utterance<Float> utterance(arena, p.T, p.C, p.S);
#pragma omp for schedule(dynamic)
    for (int64_t n = 0; n < p.N; n++) {
      utterance.begin(p, n);
      const int64_t rows = p.grad.data || p.grad_teacher.data ? p.T : utterance.frames();
      utterance.rows(0, rows, scratch);
      utterance.begin_recursion();
      utterance.first_halves(true, true);
      utterance.meet();
      utterance.second_halves(true, true);
      utterance.finish(scratch);
      workspace.ctc[n] = utterance.ctc_loss();
      workspace.kd[n] = p.teacher.data ? utterance.kd_loss() : 0.0;
    }
  }
}

// The same for fewer utterances than threads: rows and directions in parallel.
template <class Float>
void run_directions(const Problem<Float>& p, const Workspace<Float>& workspace, int threads) {
  constexpr int64_t kBlock = 16;  // frames
  const int64_t blocks = (p.T + kBlock - 1) / kBlock;
  std::vector<Utterance<Float>> utterances;
  for (int64_t n = 0; n < p.N; n++) {
    Arena arena = workspace[n];
    RowScratch<Float>(p.divergence, p.C, arena);
    utterances.emplace_back(arena, p.T, p.C, p.S);
    utterances.back().begin(p, n);
  }
#pragma omp parallel num_threads(threads)
  {
    Arena arena = workspace[omp_get_thread_num()];
    RowScratch<Float> scratch(p.divergence, p.C, arena);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < blocks * p.N; i++) {
      const int64_t begin = i / p.N * kBlock;
      utterances[i % p.N].rows(begin, std::min(p.T, begin + kBlock), scratch);
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < p.N; n++) utterances[n].begin_recursion();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < 2 * p.N; i++) utterances[i / 2].first_halves(i % 2 == 0, i % 2 == 1);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < p.N; n++) utterances[n].meet();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < 2 * p.N; i++) utterances[i / 2].second_halves(i % 2 == 0, i % 2 == 1);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < p.N; n++) {
      utterances[n].finish(scratch);
      workspace.ctc[n] = utterances[n].ctc_loss();
      workspace.kd[n] = p.teacher.data ? utterances[n].kd_loss() : 0.0;
    }
  }
}

// A term with weight 0 is left out, so that it may be infinite.
double weighted(double weight, double x) { return weight == 0 ? 0.0 : weight * x; }

}  // namespace

int64_t ctc_loss_workspace(int64_t T, int64_t N, int64_t C, int64_t S, int64_t threads) {
  return std::max(Workspace<float>::size(T, N, C, S, threads),
                  Workspace<double>::size(T, N, C, S, threads));
}

void ctc_loss_forward(int64_t T, int64_t N, int64_t C, int64_t S, const void* logits, int64_t dtype,
                      int64_t stride_t, int64_t stride_n, const int64_t* targets,
                      const int64_t* target_offsets, const int64_t* input_lengths,
                      const int64_t* target_lengths, int64_t blank, int64_t reduction,
                      int64_t zero_infinity, int64_t posteriors, const void* teacher,
                      int64_t teacher_dtype, int64_t teacher_stride_t, int64_t teacher_stride_n,
                      const uint8_t* labelled, const void* frame_weight, double ctc_weight,
                      double kd_weight, double temperature, double teacher_temperature,
                      int64_t divergence, double beta, int64_t rescale, void* loss, void* ctc,
                      void* kd, void* grad, int64_t grad_stride_t, int64_t grad_stride_n,
                      void* grad_teacher, int64_t grad_teacher_stride_t,
                      int64_t grad_teacher_stride_n, void* workspace_memory, int64_t threads) {
  const auto run = [&](auto zero) {
    using Float = decltype(zero);
    Problem<Float> p{};
    p.T = T, p.N = N, p.C = C, p.S = S;
    p.logits = {const_cast<void*>(logits), DType(dtype), stride_t, stride_n};
    p.teacher = {const_cast<void*>(teacher), DType(teacher_dtype), teacher_stride_t,
                 teacher_stride_n};
    p.grad = {grad, posteriors ? (sizeof(Float) == 8 ? DType::float64 : DType::float32) : DType(dtype),
              grad_stride_t, grad_stride_n};
    p.grad_teacher = {grad_teacher, DType(teacher_dtype), grad_teacher_stride_t,
                      grad_teacher_stride_n};
    p.targets = targets, p.target_offsets = target_offsets;
    p.input_lengths = input_lengths, p.target_lengths = target_lengths;
    p.blank = blank;
    p.zero_infinity = zero_infinity, p.posteriors = posteriors;
    p.labelled = labelled;
    p.frame_weight = static_cast<const Float*>(frame_weight);
    p.divergence = {Divergence(divergence), 1 / temperature, 1 / teacher_temperature, beta};
    p.kd_factor = rescale ? temperature * temperature : 1.0;

    const bool mean = Reduction(reduction) == Reduction::mean;
    double utterances = 0, frames = 0;
    for (int64_t n = 0; n < N; n++) {
      utterances += p.is_labelled(n);
      for (int64_t t = 0; teacher && t < input_lengths[n]; t++) frames += p.weight(t, n);
    }
    const double ctc_divisor = mean ? std::max(utterances, 1.0) : 1.0;
    const double kd_divisor = mean && frames != 0 ? frames : 1.0;
    p.divide_by_length = mean;
    p.ctc_scale = ctc_weight / ctc_divisor;
    p.kd_scale = kd_weight / kd_divisor;

    if (grad) advise_huge_pages(grad, T * N * C * size_of(p.grad.dtype));
    if (grad_teacher) advise_huge_pages(grad_teacher, T * N * C * size_of(p.grad_teacher.dtype));
    const Workspace<Float> workspace(workspace_memory, p);
    if (N >= threads || threads == 1) {
      run_utterances(p, workspace, int(threads));
    } else {
      run_directions(p, workspace, int(threads));
    }

    Float *const out = static_cast<Float*>(loss), *const out_ctc = static_cast<Float*>(ctc),
                 *const out_kd = static_cast<Float*>(kd);
    const auto write = [&](int64_t i, double ctc_term, double kd_term) {
      if (out) out[i] = Float(weighted(ctc_weight, ctc_term) + weighted(kd_weight, kd_term));
      if (out_ctc) out_ctc[i] = Float(ctc_term);
      if (out_kd) out_kd[i] = Float(kd_term);
    };
    double ctc_sum = 0, kd_sum = 0;
    for (int64_t n = 0; n < N; n++) {
      if (Reduction(reduction) == Reduction::none) {
        write(n, workspace.ctc[n], workspace.kd[n]);
      } else {
        const double length = mean ? double(std::max<int64_t>(target_lengths[n], 1)) : 1.0;
        if (p.is_labelled(n)) ctc_sum += workspace.ctc[n] / length;
        kd_sum += workspace.kd[n];
      }
    }
    if (Reduction(reduction) != Reduction::none) {
      write(0, ctc_sum / ctc_divisor, kd_sum / kd_divisor);
    }
  };
  if (DType(dtype) == DType::float64 || (teacher && DType(teacher_dtype) == DType::float64)) {
    run(double());
  } else {
    run(float());
  }
}

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
