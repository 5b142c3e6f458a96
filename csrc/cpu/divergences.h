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
      : options_(options), C_(C) {
    fast_ = sizeof(Float) == 4 && options.divergence == Divergence::forward_kl;
    block_ = fast_ ? rows_in_block(C) : 1;
    scratch_ = arena.take<float>(2 * rows_in_block(C) * C);
    for (double*& row : wide_) row = arena.take<double>(C);
  }

  // Rows to hand over at once, at most.
  int block() const { return block_; }

  void operator()(DivergenceRow<Float>* rows, int n) const {
    if constexpr (sizeof(Float) == 4) {
      if (fast_) {
        fast(rows, n);
        // The teacher's gradient has logarithms in it.
        for (int i = 0; i < n; i++) {
          if (!rows[i].grad_teacher) continue;
          DivergenceRow<Float> row = rows[i];
          row.grad_student = nullptr;
          wide(row);
        }
        return;
      }
    }
    for (int i = 0; i < n; i++) wide(rows[i]);
  }

 private:
  void fast(DivergenceRow<float>* rows, int n) const {
    const KLScales scale{float(options_.teacher_scale), float(options_.student_scale),
                         n * options_.teacher_stride, n * options_.student_stride};
    kl_rows(rows, n, C_, scale, scratch_);
  }

  void wide(DivergenceRow<Float>& row) const {
    const auto input = [&](const Float* x, double* scratch) {
      if constexpr (sizeof(Float) == 8) return x;
      std::copy(x, x + C_, scratch);
      return static_cast<const double*>(scratch);
    };
    const auto output = [&](Float* x, double* scratch) -> double* {
      if constexpr (sizeof(Float) == 8) return x;
      return x ? scratch : nullptr;
    };
    const double* const student = input(row.student, wide_[0]);
    const double* const teacher = input(row.teacher, wide_[1]);
    double* const grad_student = output(row.grad_student, wide_[2]);
    double* const grad_teacher = output(row.grad_teacher, wide_[3]);
    RowPair pair{teacher,  student, options_.teacher_scale, options_.student_scale, C_,
                 wide_[4], wide_[5]};
    RowGradients grad{grad_teacher, grad_student, row.factor * options_.teacher_scale,
                      row.factor * options_.student_scale};
    if (options_.divergence == Divergence::reverse_kl) {
      std::swap(pair.p_logits, pair.q_logits);
      std::swap(pair.p_scale, pair.q_scale);
      std::swap(grad.p, grad.q);
      std::swap(grad.p_factor, grad.q_factor);
    }
    row.value = divergence_row(options_.divergence, options_.beta, pair, grad);
    if constexpr (sizeof(Float) == 4) {
      if (grad_student) std::copy(grad_student, grad_student + C_, row.grad_student);
      if (grad_teacher) std::copy(grad_teacher, grad_teacher + C_, row.grad_teacher);
    }
  }

  DivergenceOptions options_;
  int64_t C_;
  bool fast_;
  int block_;
  float* scratch_;
  double* wide_[6];
};

// Rows of any dtype on their way to Divergences and back.
template <class Float>
class DivergenceBlock {
 public:
  DivergenceBlock(const DivergenceOptions& options, int64_t C, Arena& arena)
      : divergences_(options, C, arena), dtype_(options.dtype), C_(C) {
    constexpr DType own = kOwnDType<Float>;
    converts_ = dtype_.student != own || dtype_.teacher != own || dtype_.grad_student != own;
    for (Float*& rows : rows_) rows = arena.take<Float>(rows_in_block(C) * C);
  }

  // A pair of rows; a gradient that is null is not made. `value` gets the divergence in flush().
  KDKERNELS_INLINE void add(const void* student, const void* teacher, void* grad_student,
                            void* grad_teacher, double factor, double* value) {
    pairs_[count_] = {static_cast<const Float*>(student),
                      static_cast<const Float*>(teacher),
                      static_cast<Float*>(grad_student),
                      static_cast<Float*>(grad_teacher),
                      factor,
                      0};
    values_[count_] = value;
    if (converts_) convert(pairs_[count_]);
    if (++count_ == divergences_.block()) flush();
  }

  void flush() {
    divergences_(pairs_, count_);
    for (int i = 0; i < count_; i++) {
      *values_[i] = pairs_[i].value;
      if (!converts_) continue;
      finish_row(grads_[0][i], dtype_.grad_student, C_, pairs_[i].grad_student);
      finish_row(grads_[1][i], dtype_.teacher, C_, pairs_[i].grad_teacher);
    }
    count_ = 0;
  }

 private:
  // From the rows as they are to rows of Float.
  void convert(DivergenceRow<Float>& row) {
    const int64_t at = count_ * C_;
    grads_[0][count_] = row.grad_student;
    grads_[1][count_] = row.grad_teacher;
    row.student = load_row(row.student, dtype_.student, C_, rows_[0] + at);
    row.teacher = load_row(row.teacher, dtype_.teacher, C_, rows_[1] + at);
    if (row.grad_student)
      row.grad_student = begin_row(row.grad_student, dtype_.grad_student, rows_[2] + at);
    if (row.grad_teacher)
      row.grad_teacher = begin_row(row.grad_teacher, dtype_.teacher, rows_[3] + at);
  }

  Divergences<Float> divergences_;
  const DivergenceDtypes dtype_;
  const int64_t C_;
  bool converts_;  // one of the dtypes is not Float's
  Float* rows_[4];
  int count_ = 0;
  DivergenceRow<Float> pairs_[kMaxRows];
  void* grads_[2][kMaxRows];
  double* values_[kMaxRows];
};

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
