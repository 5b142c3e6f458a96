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

struct DivergenceOptions {
  Divergence divergence;
  double student_scale, teacher_scale;  // 1 / temperature
  double beta;
  int64_t student_stride,
      teacher_stride;  // elements from a row to the next, as far as there is one
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

struct TypedRow {
  void* data;
  DType dtype;
};

// Rows of any dtype on their way to Divergences and back.
template <class Float>
class DivergenceBlock {
 public:
  DivergenceBlock(const DivergenceOptions& options, int64_t C, Arena& arena)
      : divergences_(options, C, arena), C_(C) {
    for (Float*& rows : rows_) rows = arena.take<Float>(rows_in_block(C) * C);
  }

  int block() const { return divergences_.block(); }

  // A pair of rows; a gradient that is null is not made. `value` gets the divergence in flush().
  void add(TypedRow student, TypedRow teacher, TypedRow grad_student, TypedRow grad_teacher,
           double factor, double* value) {
    const int64_t at = count_ * C_;
    entries_[count_] = {grad_student, grad_teacher, value};
    DivergenceRow<Float>& row = pairs_[count_++];
    row.student = load_row(student.data, student.dtype, C_, rows_[0] + at);
    row.teacher = load_row(teacher.data, teacher.dtype, C_, rows_[1] + at);
    row.grad_student = grad_student.data
                           ? begin_row(grad_student.data, grad_student.dtype, rows_[2] + at)
                           : nullptr;
    row.grad_teacher = grad_teacher.data
                           ? begin_row(grad_teacher.data, grad_teacher.dtype, rows_[3] + at)
                           : nullptr;
    row.factor = factor;
    if (count_ == divergences_.block()) flush();
  }

  void flush() {
    divergences_(pairs_, count_);
    for (int i = 0; i < count_; i++) {
      const Entry& e = entries_[i];
      *e.value = pairs_[i].value;
      finish_row(e.grad_student.data, e.grad_student.dtype, C_, pairs_[i].grad_student);
      finish_row(e.grad_teacher.data, e.grad_teacher.dtype, C_, pairs_[i].grad_teacher);
    }
    count_ = 0;
  }

 private:
  struct Entry {
    TypedRow grad_student, grad_teacher;
    double* value;
  };

  Divergences<Float> divergences_;
  int64_t C_;
  Float* rows_[4];
  int count_ = 0;
  DivergenceRow<Float> pairs_[kMaxRows];
  Entry entries_[kMaxRows];
};

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
