// The whole interface of the C++ core: plain pointers in, plain pointers out, no framework.
//
// Sizes: T frames, N utterances, C classes (with blank), S labels of an utterance's target.
// Strides are in elements. A logits pointer is typed by a DType beside it; arithmetic is float32
// for float32, bfloat16 and float16 logits, float64 for float64 ones, and results other than
// gradients have the type of the arithmetic. Nothing is allocated: scratch memory is a parameter,
// and the `..._workspace` function says how many bytes it must have (wide: float64 is among the
// logits). The formulas stand in the docstrings of the Python package (kdkernels/_kd_loss.py and
// its neighbours).

#pragma once

#include <cstdint>

namespace kdkernels {

enum class DType : int64_t { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };
enum class Divergence : int64_t { forward_kl = 0, reverse_kl = 1, jsd = 2 };
enum class Reduction : int64_t { none = 0, mean = 1, sum = 2, batchmean = 3 };

// The kernels of one instruction set. Integers of Python arrive as int64_t, the three enumerations
// above as their values.
struct Kernels {
  // kd_loss

  int64_t (*kd_loss_workspace)(int64_t rows, int64_t C, int64_t wide, int64_t threads);

  // Divergence of each row of logits and its gradients, in one visit of each row.
  void (*kd_loss_forward)(int64_t rows, int64_t C,
                          int64_t batch,  // batch: the divisor of "batchmean"
                          int64_t dims,
                          const int64_t* layout,  // sizes [dims], then the strides [dims] of
                                                  // student, teacher, grad_student, grad_teacher
                          const void* student, int64_t student_dtype,  //
                          const void* teacher, int64_t teacher_dtype,  //
                          const void* weight,  // [rows] float32 / float64, or null: all ones
                          double temperature, double teacher_temperature,  //
                          int64_t divergence, double beta, int64_t reduction, int64_t rescale,
                          void* loss,          // [rows] for Reduction::none, else [1] (out)
                          void* grad_student,  // [rows][C], dtype of the student, or null (out)
                          void* grad_teacher,  // [rows][C], dtype of the teacher, or null (out)
                          void* workspace, int64_t threads);

  // ctc_loss, ctc_kd_loss, ctc_posteriors

  int64_t (*ctc_loss_workspace)(int64_t T, int64_t N, int64_t C, int64_t S, int64_t wide,
                                int64_t threads);

  // CTC loss of each utterance and its gradient; with a teacher the divergence of each frame as
  // well, and both gradients written as one.
  void (*ctc_loss_forward)(
      int64_t T, int64_t N, int64_t C, int64_t S,                             // S: longest target
      const void* logits, int64_t dtype, int64_t stride_t, int64_t stride_n,  //
      const int64_t* targets, const int64_t* target_offsets,  // labels of n: targets + offsets[n]
      const int64_t* input_lengths, const int64_t* target_lengths,  // [N]
      int64_t blank, int64_t reduction, int64_t zero_infinity,
      int64_t posteriors,  // 1: expected occupancies in place of the gradient
      // The teacher; all of these are ignored where it is null.
      const void* teacher, int64_t teacher_dtype, int64_t teacher_stride_t,
      int64_t teacher_stride_n,  //
      const uint8_t* labelled,   // [N], or null: all
      const void* frame_weight,  // [T][N], or null: all ones
      double ctc_weight, double kd_weight, double temperature, double teacher_temperature,
      int64_t divergence, double beta, int64_t rescale,
      // [N] for Reduction::none, else [1] (out); null: not wanted
      void* loss, void* ctc, void* kd,                           //
      void* grad, int64_t grad_stride_t, int64_t grad_stride_n,  // [T][N][C], or null (out)
      void* grad_teacher, int64_t grad_teacher_stride_t, int64_t grad_teacher_stride_n,  // the same
      void* workspace, int64_t threads);

  // ctc_align

  int64_t (*ctc_align_workspace)(int64_t T, int64_t N, int64_t C, int64_t S, int64_t wide,
                                 int64_t threads);

  // Viterbi path of each utterance and its log-probability.
  void (*ctc_align)(int64_t T, int64_t N, int64_t C, int64_t S,                             //
                    const void* logits, int64_t dtype, int64_t stride_t, int64_t stride_n,  //
                    const int64_t* targets, const int64_t* target_offsets,                  //
                    const int64_t* input_lengths, const int64_t* target_lengths, int64_t blank,
                    int64_t* paths,  // [N][T], -1 on padded frames (out)
                    void* scores,    // [N] (out)
                    void* workspace, int64_t threads);
};

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

// The kernels of the GPU, where they are built. Pointers are to memory of `device`, but for sizes,
// strides and layouts, which are read before the call returns. Nothing waits for the device. The
// result is what went wrong in a launch, or null. An integer tensor's `bytes` are those of its
// elements, -1 for uint8; the dtype of a weight may also be 4, bool.
namespace cuda {

int64_t kd_loss_workspace(int64_t rows);

// As Kernels::kd_loss_forward; the layout has the strides of weight besides.
const char* kd_loss_forward(int64_t rows, int64_t C, int64_t batch, int64_t dims,
                            const int64_t* layout, const void* student, int64_t student_dtype,
                            const void* teacher, int64_t teacher_dtype, const void* weight,
                            int64_t weight_dtype, double temperature, double teacher_temperature,
                            int64_t divergence, double beta, int64_t reduction, int64_t rescale,
                            void* loss, void* grad_student, void* grad_teacher, void* workspace,
                            int64_t device, void* stream);

// sizes: T, N, C, S of padded targets (of concatenated ones a bound), elements of targets.
// strides: of targets by utterance (negative: concatenated) and by label, of input_lengths, of
// target_lengths.
int64_t ctc_loss_workspace(const int64_t* sizes, const int64_t* strides, int64_t wide);

// As Kernels::ctc_loss_forward.
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
    int64_t grad_teacher_stride_n, void* workspace, int64_t device, void* stream);

int64_t ctc_align_workspace(const int64_t* sizes, const int64_t* strides, int64_t wide);

// As Kernels::ctc_align.
const char* ctc_align(const int64_t* sizes, const int64_t* strides, const void* logits,
                      int64_t dtype, int64_t stride_t, int64_t stride_n, const void* targets,
                      int64_t targets_bytes, const void* input_lengths, int64_t input_lengths_bytes,
                      const void* target_lengths, int64_t target_lengths_bytes, int64_t blank,
                      int64_t* paths, void* scores, void* workspace, int64_t device, void* stream);

// grad [rows][C] times grad_loss [rows], in place; the layout has the strides of the two.
const char* scale_grad(int64_t rows, int64_t C, int64_t dims, const int64_t* layout, void* grad,
                       int64_t grad_dtype, const void* grad_loss, int64_t loss_dtype,
                       int64_t device, void* stream);

}  // namespace cuda

}  // namespace kdkernels
