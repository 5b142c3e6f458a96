// kd_loss on a GPU: each row's divergence and its gradients in one kernel, which reads a row once
// where it fits on chip; then one block adds the rows' losses up. Of the size of the logits only
// the gradients are stored.

#include "cuda/divergence_row.cuh"
#include "cuda/kl_row.cuh"
#include "cuda/rows.cuh"
#include "kdkernels.h"

namespace kdkernels {
namespace cuda {
namespace {

constexpr int64_t kBool = 4;  // dtype of a weight, besides those of DType

struct Problem {
  int64_t rows, C, batch;
  RowLayout layout;
  LogitRow student, teacher, grad_student, grad_teacher;
  const void* weight;
  int64_t weight_dtype;
  double student_scale, teacher_scale;  // 1 / temperature
  double beta, factor;                  // factor: temperature^2 where rescaled
  Divergence divergence;
  Reduction reduction;
  void* loss;
  DType loss_dtype;
  double *block_loss, *weight_sum;  // [blocks], [1]
  unsigned* counter;                // of blocks, where there is a weight_sum

  KDKERNELS_DEVICE double weight_at(int64_t i) const {
    if (!weight) return 1.0;
    if (weight_dtype == kBool) return static_cast<const uint8_t*>(weight)[i] ? 1.0 : 0.0;
    return load(weight, DType(weight_dtype), i);
  }
  // What the sum over rows is multiplied by; the gradient too.
  KDKERNELS_DEVICE double scale() const {
    switch (reduction) {
      case Reduction::mean: {
        const double sum = weight_sum ? __ldcg(weight_sum) : double(rows);
        return sum == 0 ? 0.0 : 1 / sum;
      }
      case Reduction::batchmean:
        return 1 / double(batch > 0 ? batch : 1);
      default:
        return 1.0;
    }
  }
};

KDKERNELS_DEVICE LogitRow moved(const LogitRow& x, int64_t elements) {
  return {x.data ? offset(x.data, x.dtype, elements) : nullptr, x.dtype};
}

__global__ void weights_kernel(Problem p) {
  const double sum = block_sum(p.rows, [&](int64_t row) {
    int64_t at[5];
    p.layout.at(row, at);
    return p.weight_at(at[4]);
  });
  if (threadIdx.x == 0) {
    *p.weight_sum = sum;
    *p.counter = 0;
  }
}

KDKERNELS_DEVICE void finish(const Problem& p, int64_t blocks) {
  const double sum = block_sum(blocks, [&](int64_t i) { return __ldcg(p.block_loss + i); });
  if (threadIdx.x == 0) store(p.loss, p.loss_dtype, 0, sum * p.scale());
}

__global__ void finish_kernel(Problem p, int64_t blocks) { finish(p, blocks); }

// The groups of a block take a row each; body(row, offsets, weight, ...) returns its divergence.
template <bool kBlock, class Body>
KDKERNELS_DEVICE void for_rows(const Problem& p, int lanes, Body body) {
  const Group<kBlock> group(lanes);
  const int index = kBlock ? 0 : int(threadIdx.x) / lanes,
            rows = kBlock ? 1 : int(blockDim.x) / lanes;
  const int64_t row = int64_t(blockIdx.x) * rows + index;
  int64_t at[5] = {0, 0, 0, 0, 0};
  double weight = 0;
  if (row < p.rows) {
    p.layout.at(row, at);
    weight = p.weight_at(at[4]);
  }
  // A row of weight 0 is not read: it is taken for one without classes.
  const int64_t C = weight != 0 ? p.C : 0;
  const double factor = weight * p.factor;
  const double value = body(group, at, C, factor * p.scale());
  if (row < p.rows && C == 0) {
    for (int64_t c = group.rank; c < p.C; c += group.size) {
      if (p.grad_student.data) moved(p.grad_student, at[2]).set(c, 0);
      if (p.grad_teacher.data) moved(p.grad_teacher, at[3]).set(c, 0);
    }
  }
  const double row_loss = C ? value * factor : 0.0;
  if (p.reduction == Reduction::none) {
    if (group.rank == 0 && row < p.rows) store(p.loss, p.loss_dtype, row, row_loss);
    return;
  }
  if (kBlock) {
    if (threadIdx.x == 0) p.block_loss[blockIdx.x] = row_loss;
  } else {
    KDKERNELS_SHARED(double, losses, kBlockThreads / 4);
    if (group.rank == 0) losses[index] = row < p.rows ? row_loss : 0.0;
    __syncthreads();
    if (threadIdx.x == 0) {
      double sum = 0;
      for (int i = 0; i < rows; i++) sum += losses[i];
      p.block_loss[blockIdx.x] = sum;
    }
  }
  if (p.counter && is_last_block(p.counter)) finish(p, gridDim.x);
}

// Forward KL, one dtype and one temperature; kTeacher: the teacher's gradient too.
template <class T, int K, bool kBlock, bool kTeacher>
__global__ void __launch_bounds__(kBlock ? 512 : kBlockThreads, K == 0 && !kTeacher ? 2 : 1)
    kl_kernel(Problem p, KLScale scale, int lanes) {
  for_rows<kBlock>(p, lanes, [&](const auto& group, const int64_t* at, int64_t C, double factor) {
    const T* const student = static_cast<const T*>(p.student.data) + at[0];
    const T* const teacher = static_cast<const T*>(p.teacher.data) + at[1];
    T* const grad =
        C && p.grad_student.data ? static_cast<T*>(p.grad_student.data) + at[2] : nullptr;
    const float grad_factor = float(factor * p.student_scale);
    if constexpr (kTeacher) {
      const LogitRow none{nullptr, DType::float32};
      teacher_gradient(
          {moved(p.teacher, at[1]), moved(p.student, at[0]), p.teacher_scale, p.student_scale},
          C ? moved(p.grad_teacher, at[3]) : none, factor * p.teacher_scale, C, group);
    }
    if constexpr (K > 0) {
      RowOnChip<T, K, kBlock> row(teacher, student, C, group);
      return kl_row(row, group, scale, grad_factor, teacher, student, grad, NoExtra());
    } else {
      RowInMemory<T> row(teacher, student, C, group);
      return kl_row(row, group, scale, grad_factor, teacher, student, grad, NoExtra());
    }
  });
}

// Everything else.
template <bool kBlock>
__global__ void __launch_bounds__(kBlock ? 512 : kBlockThreads)
    divergence_kernel(Problem p, int lanes) {
  for_rows<kBlock>(p, lanes, [&](const auto& group, const int64_t* at, int64_t C, double factor) {
    const LogitRow student = moved(p.student, at[0]), teacher = moved(p.teacher, at[1]);
    const LogitRow none{nullptr, DType::float32};
    const LogitRow grad_student = C ? moved(p.grad_student, at[2]) : none;
    const LogitRow grad_teacher = C ? moved(p.grad_teacher, at[3]) : none;
    const bool reverse = p.divergence == Divergence::reverse_kl;
    RowPair pair{teacher, student, p.teacher_scale, p.student_scale};
    RowGradients grad{grad_teacher, grad_student, factor * p.teacher_scale,
                      factor * p.student_scale};
    if (reverse) {
      pair = {student, teacher, p.student_scale, p.teacher_scale};
      grad = {grad_student, grad_teacher, factor * p.student_scale, factor * p.teacher_scale};
    }
    return divergence_row(p.divergence, p.beta, pair, grad, C, group, reverse, NoExtra());
  });
}

template <class T, bool kTeacher>
void launch_kl_of(const Problem& p, RowShape shape, int64_t blocks, void* stream) {
  const KLScale scale(p.student_scale);
  const auto kernel = shape.classes == 8   ? kl_kernel<T, 8, false, kTeacher>
                      : shape.classes == 0 ? kl_kernel<T, 0, true, kTeacher>
                                           : kl_kernel<T, 16, true, kTeacher>;
  launch(kernel, blocks, shape.threads, stream, p, scale, shape.lanes);
}

template <class T>
void launch_kl(const Problem& p, RowShape shape, int64_t blocks, void* stream) {
  if (p.grad_teacher.data) {
    launch_kl_of<T, true>(p, shape, blocks, stream);
  } else {
    launch_kl_of<T, false>(p, shape, blocks, stream);
  }
}

}  // namespace

int64_t kd_loss_workspace(int64_t rows) { return (rows + 2) * int64_t(sizeof(double)); }

const char* kd_loss_forward(int64_t rows, int64_t C, int64_t batch, int64_t dims,
                            const int64_t* layout, const void* student, int64_t student_dtype,
                            const void* teacher, int64_t teacher_dtype, const void* weight,
                            int64_t weight_dtype, double temperature, double teacher_temperature,
                            int64_t divergence, double beta, int64_t reduction, int64_t rescale,
                            void* loss, void* grad_student, void* grad_teacher, void* workspace,
                            int64_t device, void* stream) {
  if (rows > kMostRows) return too_many_rows();
  const OnDevice guard(device);
  Problem p{};
  p.rows = rows, p.C = C, p.batch = batch;
  p.layout = RowLayout::from(dims, layout, 5);
  p.student = {const_cast<void*>(student), DType(student_dtype)};
  p.teacher = {const_cast<void*>(teacher), DType(teacher_dtype)};
  p.grad_student = {grad_student, DType(student_dtype)};
  p.grad_teacher = {grad_teacher, DType(teacher_dtype)};
  p.weight = weight, p.weight_dtype = weight_dtype;
  p.student_scale = 1 / temperature, p.teacher_scale = 1 / teacher_temperature;
  p.beta = beta, p.factor = rescale ? temperature * temperature : 1.0;
  p.divergence = Divergence(divergence), p.reduction = Reduction(reduction);
  const bool wide = p.student.dtype == DType::float64 || p.teacher.dtype == DType::float64;
  p.loss = loss, p.loss_dtype = wide ? DType::float64 : DType::float32;
  double* const memory = static_cast<double*>(workspace);
  p.block_loss = memory + 2;
  if (weight && p.reduction == Reduction::mean) {
    p.weight_sum = memory;
    p.counter = reinterpret_cast<unsigned*>(memory + 1);
    launch(weights_kernel, 1, 1024, stream, p);
  }
  const bool fast = !wide && p.divergence == Divergence::forward_kl &&
                    p.student_scale == p.teacher_scale && p.student.dtype == p.teacher.dtype;
  const RowShape shape = fast ? RowShape::of(C) : RowShape::reread(C);
  const int64_t blocks = (rows + shape.rows_per_block() - 1) / shape.rows_per_block();
  if (!fast) {
    launch(shape.lanes ? divergence_kernel<false> : divergence_kernel<true>, blocks, shape.threads,
           stream, p, shape.lanes);
  } else if (p.student.dtype == DType::float32) {
    launch_kl<float>(p, shape, blocks, stream);
  } else if (p.student.dtype == DType::bfloat16) {
    launch_kl<BFloat16>(p, shape, blocks, stream);
  } else {
    launch_kl<Float16>(p, shape, blocks, stream);
  }
  if (p.reduction != Reduction::none && (!p.counter || blocks == 0)) {
    launch(finish_kernel, 1, 1024, stream, p, blocks);
  }
  return guard.error();
}

}  // namespace cuda
}  // namespace kdkernels
