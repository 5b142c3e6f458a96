// kd_loss on the CPU: rows in parallel, each read once from memory and its gradient written once.
// Nothing of the size of the logits is stored besides the gradient.

#include <omp.h>

#include <algorithm>
#include <cstring>

#include "cpu/arena.h"
#include "cpu/divergences.h"
#include "cpu/flush_to_zero.h"
#include "cpu/kernels.h"
#include "cpu/row.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {
namespace {

// Where the rows of a tensor begin: [dims] sizes, [dims] strides. Without data all rows are null.
class Rows {
 public:
  Rows(const void* data, DType dtype, int64_t dims, const int64_t* layout, int tensor)
      : data_(static_cast<char*>(const_cast<void*>(data))),
        sizes_(layout),
        strides_(layout + (1 + tensor) * dims),
        dims_(dims),
        bytes_(data ? size_of(dtype) : 0),
        step_(stride() * bytes_) {}

  // From row `row` on, as far as there is one stride.
  KDKERNELS_INLINE RowsAt from(int64_t row) const {
    return {static_cast<char*>((*this)[row]), step_};
  }
  KDKERNELS_INLINE void* operator[](int64_t row) const {
    if (dims_ <= 1) return data_ + row * step_;
    int64_t element = 0;
    for (int64_t d = dims_ - 1; d >= 0; d--) {
      element += row % sizes_[d] * strides_[d];
      row /= sizes_[d];
    }
    return data_ + element * bytes_;
  }
  // Elements from a row to the next, as far as there is one.
  int64_t stride() const { return dims_ > 0 ? strides_[dims_ - 1] : 0; }

 private:
  char* data_;
  const int64_t *sizes_, *strides_;
  int64_t dims_, bytes_, step_;  // bytes: of an element, and from a row to the next
};

// The sum of value(0), ..., value(n - 1), always in the same order; not one chain of additions.
template <class Value>
double fixed_sum(int64_t n, Value value) {
  double sums[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int k = 0; k < 16; k++) sums[k] += value(i + k);
  }
  for (; i < n; i++) sums[0] += value(i);
  double sum = 0;
  for (double part : sums) sum += part;
  return sum;
}

// Where the share of a thread begins. Each has as many rows that are not of weight 0, side by side:
// what it fetches ahead it reads itself, and in the next call it finds them in its own caches.
template <class Float>
int64_t first_of_share(int64_t thread, int64_t threads, int64_t rows, const Float* weight) {
  if (!weight || thread == 0 || thread == threads) return rows * thread / threads;
  const auto counts = [](Float w) { return w != 0; };
  int64_t before = std::count_if(weight, weight + rows, counts) * thread / threads, first = 0;
  for (; before > 0; first++) before -= counts(weight[first]);
  return first;
}

template <class Float>
int64_t piece_of(int64_t C) {
  Arena arena(nullptr);
  DivergenceBlock<Float>({}, C, arena);
  return arena.used();
}

template <class Float>
void forward(int64_t rows, int64_t C, int64_t batch, int64_t dims, const int64_t* layout,
             const void* student, DType student_dtype, const void* teacher, DType teacher_dtype,
             const Float* weight, double temperature, double teacher_temperature,
             Divergence divergence, double beta, Reduction reduction, bool rescale, Float* loss,
             void* grad_student, void* grad_teacher, char* workspace, int threads) {
  Arena shared(workspace);
  double* const row_loss = shared.take<double>(rows);
  workspace += shared.used();
  double scale = rescale ? temperature * temperature : 1.0;
  if (reduction == Reduction::batchmean) scale = batch > 0 ? scale / double(batch) : 0.0;
  if (reduction == Reduction::mean) {
    double count = double(rows);
    if (weight) {
      count = 0;
      for (int64_t r = 0; r < rows; r++) count += double(weight[r]);
    }
    scale = count != 0 ? scale / count : 0.0;
  }
  const auto factor = [&](int64_t r) { return weight ? scale * double(weight[r]) : scale; };
  advise_huge_pages(grad_student, rows * C * size_of(student_dtype));
  advise_huge_pages(grad_teacher, rows * C * size_of(teacher_dtype));

  threads = int(std::clamp<int64_t>(rows * C / 8192, 1, threads));  // to wake one costs some time
  const int64_t piece = piece_of<Float>(C);
  const int64_t inner = dims > 0 ? layout[dims - 1] : 1;  // rows with one stride
  const Rows students(student, student_dtype, dims, layout, 0);
  const Rows teachers(teacher, teacher_dtype, dims, layout, 1);
  const Rows student_grads(grad_student, student_dtype, dims, layout, 2);
  const Rows teacher_grads(grad_teacher, teacher_dtype, dims, layout, 3);
  const auto goes_past = [&](const void* grad, DType dtype) {
    return !grad || (dtype == kOwnDType<float> && goes_past_caches(grad, rows * C * 4));
  };
  const DivergenceOptions options{
      divergence,
      {student_dtype, student_dtype, 1 / temperature, students.stride()},
      {teacher_dtype, teacher_dtype, 1 / teacher_temperature, teachers.stride()},
      beta,
      divergence != Divergence::jsd && goes_past(grad_student, student_dtype) &&
          goes_past(grad_teacher, teacher_dtype)};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const FlushToZero flush;
    const int thread = omp_get_thread_num(), count = omp_get_num_threads();
    Arena arena(workspace + thread * piece);
    DivergenceBlock<Float> block(options, C, arena);
    const int64_t end = first_of_share(thread + 1, count, rows, weight);
    for (int64_t r = first_of_share(thread, count, rows, weight), n; r < end; r += n) {
      n = weight ? 1 : std::min(end, r / inner * inner + inner) - r;
      if (weight && weight[r] == 0) {
        if (grad_student) std::memset(student_grads[r], 0, size_t(C * size_of(student_dtype)));
        if (grad_teacher) std::memset(teacher_grads[r], 0, size_t(C * size_of(teacher_dtype)));
        row_loss[r] = 0;
      } else {
        block.add(n, students.from(r), teachers.from(r), student_grads.from(r),
                  teacher_grads.from(r), factor(r), row_loss + r);
      }
    }
    block.flush();
    if (options.past_caches) stored_past();
  }
  const auto value = [&](int64_t r) { return row_loss[r] == 0 ? 0.0 : factor(r) * row_loss[r]; };
  if (reduction == Reduction::none) {
    for (int64_t r = 0; r < rows; r++) loss[r] = Float(value(r));
  } else if (weight) {
    *loss = Float(fixed_sum(rows, value));
  } else {
    *loss = Float(scale * fixed_sum(rows, [&](int64_t r) { return row_loss[r]; }));
  }
}

}  // namespace

int64_t kd_loss_workspace(int64_t rows, int64_t C, int64_t wide, int64_t threads) {
  Arena arena(nullptr);
  arena.take<double>(rows);
  return arena.used() + threads * (wide ? piece_of<double>(C) : piece_of<float>(C));
}

void kd_loss_forward(int64_t rows, int64_t C, int64_t batch, int64_t dims, const int64_t* layout,
                     const void* student, int64_t student_dtype, const void* teacher,
                     int64_t teacher_dtype, const void* weight, double temperature,
                     double teacher_temperature, int64_t divergence, double beta, int64_t reduction,
                     int64_t rescale, void* loss, void* grad_student, void* grad_teacher,
                     void* workspace, int64_t threads) {
  const auto run = [&](auto zero) {
    using Float = decltype(zero);
    forward<Float>(rows, C, batch, dims, layout, student, DType(student_dtype), teacher,
                   DType(teacher_dtype), static_cast<const Float*>(weight), temperature,
                   teacher_temperature, Divergence(divergence), beta, Reduction(reduction),
                   rescale != 0, static_cast<Float*>(loss), grad_student, grad_teacher,
                   static_cast<char*>(workspace), int(threads));
  };
  if (DType(student_dtype) == DType::float64 || DType(teacher_dtype) == DType::float64) {
    run(double());
  } else {
    run(float());
  }
}

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
