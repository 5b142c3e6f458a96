// kd_loss on the CPU: rows in parallel, each read once from memory and its gradient written once.
// Nothing of the size of the logits is stored besides the gradient.

#include <omp.h>

#include <algorithm>
#include <cstring>

#include "cpu/arena.h"
#include "cpu/divergences.h"
#include "cpu/kernels.h"
#include "cpu/row.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {
namespace {

// Where the rows of a tensor begin: [dims] sizes, [dims] strides.
struct Rows {
  char* data;
  DType dtype;
  int64_t dims, bytes;  // of an element
  const int64_t *sizes, *strides;

  Rows(const void* data, DType dtype, int64_t dims, const int64_t* layout, int tensor)
      : data(static_cast<char*>(const_cast<void*>(data))),
        dtype(dtype),
        dims(dims),
        bytes(size_of(dtype)),
        sizes(layout),
        strides(layout + (1 + tensor) * dims) {}

  KDKERNELS_INLINE TypedRow operator[](int64_t row) const {
    if (data == nullptr) return {nullptr, dtype};
    if (dims == 1) return {data + row * stride() * bytes, dtype};
    int64_t element = 0;
    for (int64_t d = dims - 1; d >= 0; d--) {
      element += row % sizes[d] * strides[d];
      row /= sizes[d];
    }
    return {data + element * bytes, dtype};
  }
  // Elements from a row to the next, as far as there is one.
  int64_t stride() const { return dims > 0 ? strides[dims - 1] : 0; }
};

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
             void* grad_student, void* grad_teacher, double* row_loss, char* workspace,
             int threads) {
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

  // Chunks of rows large enough to hide their hand-out, small enough to balance rows of weight 0.
  const int64_t chunk =
      std::clamp<int64_t>(rows / (4 * threads), 1, std::max<int64_t>(1, 65536 / C));
  const int64_t chunks = (rows + chunk - 1) / chunk, piece = piece_of<Float>(C);
  const Rows students(student, student_dtype, dims, layout, 0);
  const Rows teachers(teacher, teacher_dtype, dims, layout, 1);
  const Rows student_grads(grad_student, student_dtype, dims, layout, 2);
  const Rows teacher_grads(grad_teacher, teacher_dtype, dims, layout, 3);
  const DivergenceOptions options{divergence, 1 / temperature,   1 / teacher_temperature,
                                  beta,       students.stride(), teachers.stride()};
#pragma omp parallel num_threads(threads) if (threads > 1 && chunks > 1)
  {
    Arena arena(workspace + omp_get_thread_num() * piece);
    DivergenceBlock<Float> block(options, C, arena);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < chunks; i++) {
      const int64_t end = std::min(rows, (i + 1) * chunk);
      for (int64_t r = i * chunk; r < end; r++) {
        if (weight && weight[r] == 0) {
          for (const Rows* grads : {&student_grads, &teacher_grads}) {
            const TypedRow row = (*grads)[r];
            if (row.data) std::memset(row.data, 0, size_t(C * size_of(row.dtype)));
          }
          row_loss[r] = 0;
        } else {
          block.add(students[r], teachers[r], student_grads[r], teacher_grads[r], factor(r),
                    row_loss + r);
        }
      }
      block.flush();
    }
  }
  double sum = 0;
  for (int64_t r = 0; r < rows; r++) {
    const double value = row_loss[r] == 0 ? 0.0 : factor(r) * row_loss[r];
    if (reduction == Reduction::none) loss[r] = Float(value);
    sum += value;
  }
  if (reduction != Reduction::none) *loss = Float(sum);
}

}  // namespace

int64_t kd_loss_workspace(int64_t C, int64_t threads) {
  return threads * std::max(piece_of<float>(C), piece_of<double>(C));
}

void kd_loss_forward(int64_t rows, int64_t C, int64_t batch, int64_t dims, const int64_t* layout,
                     const void* student, int64_t student_dtype, const void* teacher,
                     int64_t teacher_dtype, const void* weight, double temperature,
                     double teacher_temperature, int64_t divergence, double beta, int64_t reduction,
                     int64_t rescale, void* loss, void* grad_student, void* grad_teacher,
                     void* row_loss, void* workspace, int64_t threads) {
  const auto run = [&](auto zero) {
    using Float = decltype(zero);
    forward<Float>(rows, C, batch, dims, layout, student, DType(student_dtype), teacher,
                   DType(teacher_dtype), static_cast<const Float*>(weight), temperature,
                   teacher_temperature, Divergence(divergence), beta, Reduction(reduction),
                   rescale != 0, static_cast<Float*>(loss), grad_student, grad_teacher,
                   static_cast<double*>(row_loss), static_cast<char*>(workspace), int(threads));
  };
  if (DType(student_dtype) == DType::float64 || DType(teacher_dtype) == DType::float64) {
    run(double());
  } else {
    run(float());
  }
}

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
