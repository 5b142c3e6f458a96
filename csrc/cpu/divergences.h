// Blocks of rows of logits of any dtype to their divergences and gradients: loads, the choice of
// the way (kl_rows.h or divergence.h), stores.

#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/arena.h"
#include "cpu/divergence.h"
#include "cpu/kl_rows.h"
#include "cpu/row.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {

struct DivergenceDtypes {
  DType student, teacher, grad_student;  // the teacher's gradient has the teacher's
};

struct DivergenceOptions {
  Divergence divergence;
  DivergenceDtypes dtype;
  double student_scale, teacher_scale;  // 1 / temperature
  double beta;
  // Elements from a row to the next, as far as there is one.
  int64_t student_stride, teacher_stride;
};

template <class Float>
class Divergences {
 public:
  Divergences(const DivergenceOptions& options, int64_t C, Arena& arena)
      : options_(options), mixture_(options.beta), C_(C) {
    fast_ = sizeof(Float) == 4 && options.divergence == Divergence::forward_kl;
    block_ = fast_ ? rows_in_block(C) : 1;
    scratch_ = arena.take<float>(2 * rows_in_block(C) * C);
    for (double*& row : wide_) row = arena.take<double>(C);
  }

  // Rows to hand over at once, at most.
  int block() const { return block_; }

  void operator()(DivergenceRows<Float>& rows, int n) const {
    if constexpr (sizeof(Float) == 4) {
      if (fast_ && !rows.grad_teacher[0]) {  // the teacher's gradient has logarithms in it
        const KLScales scale{float(options_.teacher_scale), float(options_.student_scale),
                             n * options_.teacher_stride, n * options_.student_stride};
        return kl_rows(rows, n, C_, scale, scratch_);
      }
    }
    for (int i = 0; i < n; i++) wide(rows, i);
  }

 private:
  void wide(DivergenceRows<Float>& rows, int i) const {
    RowPair<Float> pair{rows.teacher[i],
                        rows.student[i],
                        options_.teacher_scale,
                        options_.student_scale,
                        C_,
                        wide_[0],
                        wide_[1],
                        wide_[2],
                        wide_[3]};
    RowGradients<Float> grad{rows.grad_teacher[i], rows.grad_student[i],
                             rows.factor[i] * options_.teacher_scale,
                             rows.factor[i] * options_.student_scale};
    if (options_.divergence == Divergence::reverse_kl) {
      std::swap(pair.p_logits, pair.q_logits);
      std::swap(pair.p_scale, pair.q_scale);
      std::swap(grad.p, grad.q);
      std::swap(grad.p_factor, grad.q_factor);
    }
    rows.value[i] = divergence_row(options_.divergence, mixture_, pair, grad);
  }

  DivergenceOptions options_;
  Mixture mixture_;
  int64_t C_;
  bool fast_;
  int block_;
  float* scratch_;
  double* wide_[4];
};

// Rows of one tensor: the address of the first, and bytes from a row to the next. A gradient that
// is not wanted is null, and so is the step.
struct RowsAt {
  char* first;
  int64_t step;
  KDKERNELS_INLINE void* operator[](int64_t i) const { return first + i * step; }
};

// Rows of any dtype on their way to Divergences and back.
template <class Float>
class DivergenceBlock {
 public:
  DivergenceBlock(const DivergenceOptions& options, int64_t C, Arena& arena)
      : divergences_(options, C, arena), dtype_(options.dtype), C_(C) {
    constexpr DType own = kOwnDType<Float>;
    converts_ = dtype_.student != own || dtype_.teacher != own || dtype_.grad_student != own;
    for (Float*& rows : converted_) rows = arena.take<Float>(rows_in_block(C) * C);
  }

  // n pairs of rows. values [n] get the divergences, at the latest in flush().
  void add(int64_t n, RowsAt student, RowsAt teacher, RowsAt grad_student, RowsAt grad_teacher,
           double factor, double* values) {
    for (int64_t i = 0; i < n;) {
      const int begin = count_, end = int(std::min<int64_t>(divergences_.block(), begin + n - i));
      const int64_t shift = i - begin;
      for (int k = begin; k < end; k++) {
        rows_.student[k] = static_cast<const Float*>(student[k + shift]);
        rows_.teacher[k] = static_cast<const Float*>(teacher[k + shift]);
        rows_.grad_student[k] = static_cast<Float*>(grad_student[k + shift]);
        rows_.grad_teacher[k] = static_cast<Float*>(grad_teacher[k + shift]);
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
      finish_row(grads_[0][k], dtype_.grad_student, C_, rows_.grad_student[k]);
      finish_row(grads_[1][k], dtype_.teacher, C_, rows_.grad_teacher[k]);
    }
    count_ = 0;
  }

 private:
  // From the rows as they are to rows of Float.
  void convert(int begin, int end) {
    for (int k = begin; k < end; k++) {
      const int64_t at = k * C_;
      grads_[0][k] = rows_.grad_student[k];
      grads_[1][k] = rows_.grad_teacher[k];
      rows_.student[k] = load_row(rows_.student[k], dtype_.student, C_, converted_[0] + at);
      rows_.teacher[k] = load_row(rows_.teacher[k], dtype_.teacher, C_, converted_[1] + at);
      if (grads_[0][k])
        rows_.grad_student[k] = begin_row(grads_[0][k], dtype_.grad_student, converted_[2] + at);
      if (grads_[1][k])
        rows_.grad_teacher[k] = begin_row(grads_[1][k], dtype_.teacher, converted_[3] + at);
    }
  }

  Divergences<Float> divergences_;
  const DivergenceDtypes dtype_;
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
