// What a call of ctc_loss asks for, as every utterance sees it.

#pragma once

#include <cstdint>
#include <limits>

#include "cpu/divergences.h"
#include "cpu/row.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNotANumber = std::numeric_limits<double>::quiet_NaN();

// A [T][N][C] tensor.
struct Frames {
  void* data;
  DType dtype;
  int64_t stride_t, stride_n;
  void* row(int64_t t, int64_t n) const {
    return data ? offset(data, dtype, t * stride_t + n * stride_n) : nullptr;
  }
  // Those of an utterance from frame t on.
  RowsAt rows(int64_t t, int64_t n) const {
    return {static_cast<char*>(row(t, n)), data ? stride_t * size_of(dtype) : 0};
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
  // d(returned loss) / d(ctc loss of n), before the division by its length, and / d(kd loss of a
  // frame)
  double ctc_scale, kd_scale;
  bool divide_by_length;
  bool past_caches;  // a gradient that is too large for them

  bool is_labelled(int64_t n) const { return !labelled || labelled[n]; }
  double weight(int64_t t, int64_t n) const {
    return frame_weight ? double(frame_weight[t * N + n]) : 1.0;
  }
  // Of the divergence of a frame; where it is 0 the teacher's frame is not read.
  double kd_frame_factor(int64_t t, int64_t n) const { return weight(t, n) * kd_factor; }
  bool has_kd_gradient(int64_t t, int64_t n) const {
    return grad.data && teacher.data && kd_scale != 0 && kd_frame_factor(t, n) != 0;
  }
};

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
