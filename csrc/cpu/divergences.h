// Blocks of rows of logits of any dtype to their divergences and gradients: loads, the choice of
// the way (kl_rows.h or divergence.h), stores.

#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "cpu/arena.h"
#include "cpu/divergence.h"
#include "cpu/jsd_rows.h"
#include "cpu/kl_rows.h"
#include "cpu/row.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {

struct DivergenceSide {
  DType dtype, grad_dtype;
  double scale;    // 1 / temperature
  int64_t stride;  // elements from a row to the next, as far as there is one
};

struct DivergenceOptions {
  Divergence divergence;
  DivergenceSide student, teacher;
  double beta;
  bool past_caches = false;  // where the gradients go: those of KL in float32
  // The two of KL(p || q), and of JSD(p, q) = beta KL(p || m) + (1 - beta) KL(q || m).
  bool student_is_p() const { return divergence == Divergence::reverse_kl; }
  const DivergenceSide& p() const { return student_is_p() ? student : teacher; }
  const DivergenceSide& q() const { return student_is_p() ? teacher : student; }
};

template <class Float>
class Divergences {
 public:
  Divergences(const DivergenceOptions& options, int64_t C, Arena& arena)
      : options_(options), mixture_(options.beta), C_(C) {
    scratch_ = arena.take<float>(2 * rows_in_block(C) * C);
    for (double*& row : wide_) row = arena.take<double>(C);
  }

  // Rows to hand over at once, at most.
  int block() const { return sizeof(Float) == 4 ? rows_in_block(C_) : 1; }

  void operator()(DivergenceRows<Float>& rows, int n) const {
    Left left[kMaxRows];
    if constexpr (sizeof(Float) == 4) {
      const DivergenceSide &p = options_.p(), &q = options_.q();
      const KLScales scale{float(p.scale), float(q.scale), n * p.stride, n * q.stride,
                           options_.past_caches};
      if (options_.divergence == Divergence::jsd) {
        jsd_rows(rows, n, C_, scale, mixture_, scratch_, left);
      } else {
        // Of reverse KL near convergence the student's gradient is a difference of logarithms; with
        // two temperatures equal probabilities come from unlike logits.
        const bool only_far = options_.student_is_p() || p.scale != q.scale;
        kl_rows(rows, n, C_, scale, only_far, scratch_, left);
      }
    }
    for (int i = 0; i < n; i++) {
      if (left[i].value || left[i].grad_p || left[i].grad_q) wide(rows, i, left[i]);
    }
  }

 private:
  void wide(DivergenceRows<Float>& rows, int i, Left left) const {
    const double p_scale = options_.p().scale, q_scale = options_.q().scale;
    const RowPair<Float> pair{rows.p[i], rows.q[i], p_scale,  q_scale, C_,
                              wide_[0],  wide_[1],  wide_[2], wide_[3]};
    const RowGradients<Float> grad{left.grad_p ? rows.grad_p[i] : nullptr,
                                   left.grad_q ? rows.grad_q[i] : nullptr, rows.factor[i] * p_scale,
                                   rows.factor[i] * q_scale};
    const double value = divergence_row(options_.divergence, mixture_, pair, grad);
    if (left.value || left.grad_p) rows.value[i] = value;
  }

  DivergenceOptions options_;
  Mixture mixture_;
  int64_t C_;
  float* scratch_;
  double* wide_[4];
};

// Rows of any dtype on their way to Divergences and back.
template <class Float>
class DivergenceBlock {
 public:
  DivergenceBlock(const DivergenceOptions& options, int64_t C, Arena& arena)
      : divergences_(options, C, arena),
        swapped_(options.student_is_p()),
        dtypes_{options.p().dtype, options.q().dtype},
        grad_dtypes_{options.p().grad_dtype, options.q().grad_dtype},
        C_(C) {
    constexpr DType own = kOwnDType<Float>;
    converts_ =
        dtypes_[0] != own || dtypes_[1] != own || grad_dtypes_[0] != own || grad_dtypes_[1] != own;
    for (Float*& rows : converted_) rows = arena.take<Float>(rows_in_block(C) * C);
  }

  // n pairs of rows. values [n] get the divergences, at the latest in flush().
  void add(int64_t n, RowsAt student, RowsAt teacher, RowsAt grad_student, RowsAt grad_teacher,
           double factor, double* values) {
    if (swapped_) {
      std::swap(student, teacher);
      std::swap(grad_student, grad_teacher);
    }
    for (int64_t i = 0; i < n;) {
      const int begin = count_, end = int(std::min<int64_t>(divergences_.block(), begin + n - i));
      const int64_t shift = i - begin;
      for (int k = begin; k < end; k++) {
        rows_.p[k] = static_cast<const Float*>(teacher[k + shift]);
        rows_.q[k] = static_cast<const Float*>(student[k + shift]);
        rows_.grad_p[k] = static_cast<Float*>(grad_teacher[k + shift]);
        rows_.grad_q[k] = static_cast<Float*>(grad_student[k + shift]);
        rows_.factor[k] = factor;
        values_[k] = values + (k + shift);
      }
      i += end - begin;
      count_ = end;
      if (converts_) convert(begin, end);
      if (count_ == divergences_.block()) flush();
    }
  }

  void flush() {
    if (count_ == 0) return;
    divergences_(rows_, count_);
    for (int k = 0; k < count_; k++) *values_[k] = rows_.value[k];
    for (int k = 0; converts_ && k < count_; k++) {
      finish_row(grads_[0][k], grad_dtypes_[0], C_, rows_.grad_p[k]);
      finish_row(grads_[1][k], grad_dtypes_[1], C_, rows_.grad_q[k]);
    }
    count_ = 0;
  }

 private:
  // From the rows as they are to rows of Float.
  void convert(int begin, int end) {
    for (int k = begin; k < end; k++) {
      const int64_t at = k * C_;
      grads_[0][k] = rows_.grad_p[k];
      grads_[1][k] = rows_.grad_q[k];
      rows_.p[k] = load_row(rows_.p[k], dtypes_[0], C_, converted_[0] + at);
      rows_.q[k] = load_row(rows_.q[k], dtypes_[1], C_, converted_[1] + at);
      if (grads_[0][k])
        rows_.grad_p[k] = begin_row(grads_[0][k], grad_dtypes_[0], converted_[2] + at);
      if (grads_[1][k])
        rows_.grad_q[k] = begin_row(grads_[1][k], grad_dtypes_[1], converted_[3] + at);
    }
  }

  Divergences<Float> divergences_;
  const bool swapped_;                      // reverse KL: p is the student's
  const DType dtypes_[2], grad_dtypes_[2];  // of p and q
  const int64_t C_;
  bool converts_;  // one of the dtypes is not Float's
  Float* converted_[4];
  int count_ = 0;
  DivergenceRows<Float> rows_;
  void* grads_[2][kMaxRows];
  double* values_[kMaxRows];
};

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
