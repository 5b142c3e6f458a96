// ctc_loss, ctc_kd_loss, ctc_posteriors and ctc_align on a GPU: four kernels, none of which waits
// for the host. Of the size of the logits only the gradient is stored.

#include "cuda/ctc_align.cuh"
#include "cuda/ctc_gradient.cuh"
#include "cuda/ctc_recursion.cuh"
#include "cuda/ctc_rows.cuh"
#include "kdkernels.h"

namespace kdkernels {
namespace cuda {
namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

RowShape statistics_shape(int64_t C) {
  if (C > 2048) return {0, 0, C > 16384 ? 512 : 256};
  int lanes = 4;
  while (lanes < 32 && lanes * 8 < C) lanes *= 2;
  return {0, lanes, kBlockThreads};
}

template <class Float>
int64_t blocks_of(const CTCProblem<Float>& p, RowShape shape) {
  return (p.T * p.N + shape.rows_per_block() - 1) / shape.rows_per_block();
}

// f(TypeOf<dtype of the logits>): one of those that the arithmetic is for.
template <class Float, class F>
void with_logits(const CTCProblem<Float>& p, F f) {
  with_dtype(p.logits.dtype, [&](auto type) {
    if constexpr (sizeof(typename decltype(type)::Type) <= sizeof(Float)) f(type);
  });
}

template <class Float>
void launch_rows(const CTCProblem<Float>& p, bool emissions, void* stream) {
  launch(prepare_kernel<Float>, p.N, 256, stream, p);
  const RowShape shape = statistics_shape(p.C);
  const int64_t blocks = blocks_of(p, shape);
  with_logits(p, [&](auto type) {
    using T = typename decltype(type)::Type;
    launch(shape.lanes ? statistics_kernel<T, Float, false> : statistics_kernel<T, Float, true>,
           blocks > 0 ? blocks : 1, shape.threads, stream, p, shape.lanes, emissions);
  });
}

template <class Float>
void launch_recursion(const CTCProblem<Float>& p, bool occupancies, void* stream) {
  const int64_t slabs = (p.S + 1 + p.width) / p.width;
  const int threads = 64 * int(smaller(kMostWarps, slabs));
  const auto run = [&](auto kernel, int threads) {
    launch(kernel, p.N, threads, stream, p, occupancies);
  };
  if (p.width == 32) return run(recursion_kernel<Float, 1, 8, false>, 64);
  if constexpr (sizeof(Float) == 8) {
    run(recursion_kernel<Float, 2, 4, true>, threads);
  } else if (slabs == 1) {
    run(recursion_kernel<Float, 2, 8, false>, 64);
  } else if (p.width == 64) {
    run(recursion_kernel<Float, 2, 8, true>, threads);
  } else {
    run(recursion_kernel<Float, 4, 4, true>, threads);
  }
}

template <class T, bool kTeacher>
void launch_kl_gradient(const CTCProblem<float>& p, void* stream) {
  const RowShape shape = RowShape::of(p.C);
  const KLScale scale(p.student_scale);
  const auto kernel = shape.classes == 8   ? kl_gradient_kernel<T, 8, false, kTeacher>
                      : shape.classes == 0 ? kl_gradient_kernel<T, 0, true, kTeacher>
                                           : kl_gradient_kernel<T, 16, true, kTeacher>;
  launch(kernel, blocks_of(p, shape), shape.threads, stream, p, scale, shape.lanes);
}

template <class Float>
void launch_gradient(const CTCProblem<Float>& p, void* stream) {
  if (!p.teacher.data) {
    const RowShape shape = statistics_shape(p.C);
    with_logits(p, [&](auto type) {
      using T = typename decltype(type)::Type;
      auto kernel =
          shape.lanes ? gradient_kernel<T, T, Float, false> : gradient_kernel<T, T, Float, true>;
      if (p.posteriors) {
        kernel = shape.lanes ? gradient_kernel<T, Float, Float, false>
                             : gradient_kernel<T, Float, Float, true>;
      }
      launch(kernel, blocks_of(p, shape), shape.threads, stream, p, shape.lanes);
    });
    return;
  }
  if constexpr (sizeof(Float) == 4) {
    if (p.divergence == Divergence::forward_kl && p.student_scale == p.teacher_scale &&
        p.logits.dtype == p.teacher.dtype) {
      with_logits(p, [&](auto type) {
        using T = typename decltype(type)::Type;
        if (p.grad_teacher.data) {
          launch_kl_gradient<T, true>(p, stream);
        } else {
          launch_kl_gradient<T, false>(p, stream);
        }
      });
      return;
    }
  }
  const RowShape shape = RowShape::reread(p.C);
  launch(shape.lanes ? divergence_gradient_kernel<Float, false>
                     : divergence_gradient_kernel<Float, true>,
         blocks_of(p, shape), shape.threads, stream, p, shape.lanes);
}

// What all of the operators know of a problem. `sizes`: T, N, C, S of padded targets, elements of
// targets; `strides`: of targets (n, then label; n < 0: concatenated), input_lengths,
// target_lengths.
template <class Float>
CTCProblem<Float> problem_of(const int64_t* sizes, const int64_t* strides) {
  CTCProblem<Float> p{};
  p.T = sizes[0], p.N = sizes[1], p.C = sizes[2];
  p.S = smaller(sizes[3], p.T);
  p.targets_size = sizes[4];
  p.target_stride_n = strides[0], p.target_stride = strides[1];
  p.input_length_stride = strides[2], p.target_length_stride = strides[3];
  p.ctc_weight = 1, p.kd_factor = 1;
  return p;
}

bool is_wide(int64_t dtype, const void* teacher, int64_t teacher_dtype) {
  return DType(dtype) == DType::float64 || (teacher && DType(teacher_dtype) == DType::float64);
}

// The align operator's own memory, after that of the problem.
template <class Float>
int64_t lay_out(CTCProblem<Float>& p, AlignProblem& a, void* memory) {
  const int64_t used = lay_out(p, memory, false);
  Pieces pieces(static_cast<char*>(memory) + used);
  pieces.take(a.best, p.N * 4 * (p.S + 1));
  pieces.take(a.came_from, p.N * p.T * (p.S + 1));
  return used + pieces.used();
}

}  // namespace

int64_t ctc_loss_workspace(const int64_t* sizes, const int64_t* strides, int64_t wide) {
  if (wide) {
    CTCProblem<double> p = problem_of<double>(sizes, strides);
    return lay_out(p, nullptr, true);
  }
  CTCProblem<float> p = problem_of<float>(sizes, strides);
  return lay_out(p, nullptr, true);
}

const char* ctc_loss_forward(
    const int64_t* sizes, const int64_t* strides, const void* logits, int64_t dtype,
    int64_t stride_t, int64_t stride_n, const void* targets, int64_t targets_bytes,
    const void* input_lengths, int64_t input_lengths_bytes, const void* target_lengths,
    int64_t target_lengths_bytes, int64_t blank, int64_t reduction, int64_t zero_infinity,
    int64_t posteriors, const void* teacher, int64_t teacher_dtype, int64_t teacher_stride_t,
    int64_t teacher_stride_n, const void* labelled, const void* frame_weight, int64_t weight_dtype,
    int64_t weight_stride_t, int64_t weight_stride_n, double ctc_weight, double kd_weight,
    double temperature, double teacher_temperature, int64_t divergence, double beta,
    int64_t rescale, void* loss, void* ctc, void* kd, void* grad, int64_t grad_stride_t,
    int64_t grad_stride_n, void* grad_teacher, int64_t grad_teacher_stride_t,
    int64_t grad_teacher_stride_n, void* workspace, int64_t device, void* stream) {
  if (sizes[0] * sizes[1] > kMostRows) return too_many_rows();
  const OnDevice guard(device);
  const auto run = [&](auto zero) {
    using Float = decltype(zero);
    CTCProblem<Float> p = problem_of<Float>(sizes, strides);
    p.logits = {const_cast<void*>(logits), DType(dtype), stride_t, stride_n};
    p.teacher = {const_cast<void*>(teacher), DType(teacher_dtype), teacher_stride_t,
                 teacher_stride_n};
    const DType own = sizeof(Float) == 8 ? DType::float64 : DType::float32;
    p.grad = {grad, posteriors ? own : DType(dtype), grad_stride_t, grad_stride_n};
    p.grad_teacher = {grad_teacher, DType(teacher_dtype), grad_teacher_stride_t,
                      grad_teacher_stride_n};
    p.targets = {targets, targets_bytes};
    p.input_lengths = {input_lengths, input_lengths_bytes};
    p.target_lengths = {target_lengths, target_lengths_bytes};
    p.blank = blank;
    p.zero_infinity = zero_infinity != 0, p.posteriors = posteriors != 0;
    p.labelled = static_cast<const uint8_t*>(labelled);
    p.frame_weight = frame_weight, p.weight_dtype = weight_dtype;
    p.weight_stride_t = weight_stride_t, p.weight_stride_n = weight_stride_n;
    p.ctc_weight = ctc_weight, p.kd_weight = kd_weight;
    p.student_scale = 1 / temperature, p.teacher_scale = 1 / teacher_temperature;
    p.kd_factor = rescale ? temperature * temperature : 1.0;
    p.beta = beta, p.divergence = Divergence(divergence), p.reduction = Reduction(reduction);
    p.loss = static_cast<Float*>(loss);
    p.ctc = static_cast<Float*>(ctc), p.kd = static_cast<Float*>(kd);
    lay_out(p, workspace, true);
    launch_rows(p, true, stream);
    if (p.T > 0 && p.N > 0) {
      launch_recursion(p, grad && (ctc_weight != 0 || posteriors), stream);
    }
    const bool rows = p.T * p.N > 0 && (grad || teacher);
    if (rows) launch_gradient(p, stream);
    if (!rows && loss) launch(finish_losses_kernel<Float>, 1, 256, stream, p);
  };
  if (is_wide(dtype, teacher, teacher_dtype)) {
    run(double());
  } else {
    run(float());
  }
  return guard.error();
}

int64_t ctc_align_workspace(const int64_t* sizes, const int64_t* strides, int64_t wide) {
  AlignProblem a{};
  if (wide) {
    CTCProblem<double> p = problem_of<double>(sizes, strides);
    return lay_out(p, a, nullptr);
  }
  CTCProblem<float> p = problem_of<float>(sizes, strides);
  return lay_out(p, a, nullptr);
}

const char* ctc_align(const int64_t* sizes, const int64_t* strides, const void* logits,
                      int64_t dtype, int64_t stride_t, int64_t stride_n, const void* targets,
                      int64_t targets_bytes, const void* input_lengths, int64_t input_lengths_bytes,
                      const void* target_lengths, int64_t target_lengths_bytes, int64_t blank,
                      int64_t* paths, void* scores, void* workspace, int64_t device, void* stream) {
  if (sizes[0] * sizes[1] > kMostRows) return too_many_rows();
  const OnDevice guard(device);
  const auto run = [&](auto zero) {
    using Float = decltype(zero);
    CTCProblem<Float> p = problem_of<Float>(sizes, strides);
    p.logits = {const_cast<void*>(logits), DType(dtype), stride_t, stride_n};
    p.targets = {targets, targets_bytes};
    p.input_lengths = {input_lengths, input_lengths_bytes};
    p.target_lengths = {target_lengths, target_lengths_bytes};
    p.blank = blank;
    AlignProblem a{};
    lay_out(p, a, workspace);
    a.paths = paths, a.scores = scores;
    launch_rows(p, false, stream);
    launch(align_kernel<Float>, p.N, p.S < 256 ? 128 : 512, stream, p, a);
  };
  if (is_wide(dtype, nullptr, 0)) {
    run(double());
  } else {
    run(float());
  }
  return guard.error();
}

}  // namespace cuda
}  // namespace kdkernels
