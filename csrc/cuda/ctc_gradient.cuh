// After the recursion: each row of the gradient, softmax less occupancy, together with the
// divergence from the teacher's row, written once; then the last block adds the losses up.
// Occupancies of equal labels are added in the order of the target.

#pragma once

#include "cuda/ctc_rows.cuh"
#include "cuda/kl_row.cuh"

namespace kdkernels {
namespace cuda {

// The CTC part of one frame's gradient, as kl_row and divergence_row take it. Held are few values,
// since they live as long as the row does; the rest is the problem's.
template <class Float>
struct CTCExtra {
  const CTCProblem<Float>& p;
  Float scale;  // d(returned loss) / d(loss of the utterance); NaN, or 0 where it has no part
  Float max, factor;
  int labels;              // 0 where there are no occupancies
  bool corrects, forward;  // there are; and which direction left them
  int64_t base;
  const Float* occupancies;  // of position 0

  KDKERNELS_DEVICE CTCExtra(const CTCProblem<Float>& p, const Utterance& u, int64_t t, int64_t n,
                            bool live)
      : p(p), base(u.base) {
    const double scale = live ? p.ctc_scale(u, n) : 0.0;
    this->scale = Float(scale);
    corrects =
        live && u.runs && scale == scale && scale != 0 && p.utterance_loss[n] < double(kInfinity);
    max = corrects ? p.max[n * p.T + t] : Float(0);
    factor = corrects && !p.posteriors ? Float(scale / (1 + p.rest[n * p.T + t]))
                                       : Float(scale != scale ? scale : 0.0);
    labels = corrects ? u.labels : 0;
    // The second half of a direction left them: beta's up to the middle, alpha's from there.
    forward = t >= p.frames(u) / 2;
    occupancies = p.occupancy + (u.slab * p.frames() + t) * p.width;
  }

  KDKERNELS_DEVICE Float occupancy(int k) const {
    const int width = p.width, last = (labels + 1 + width) / width * width - 1;
    const int position = forward ? k + 1 : last - (k + 1);
    return occupancies[position / width * (p.frames() * width) + position % width];
  }

  template <class Real>
  KDKERNELS_DEVICE Real dense(Real x) const {
    if (factor == 0) return 0;
    if constexpr (sizeof(Real) == 8) {
      return Real(factor) * exp(x - Real(max));
    } else {
      return Real(factor) * ExpScale(1.0)(x - Real(max));
    }
  }

  // set(class, change) for blank and every label, once each. All threads of the group come here.
  template <class AnyGroup, class F>
  KDKERNELS_DEVICE void correct(const AnyGroup& group, bool active, F set) const {
    const int32_t *const label = p.label + base, *const next = p.next + base;
    const int32_t* const first = p.first + base;
    const int size = active ? labels : 0;
    Float sum = 0;
    for (int k = group.rank; k < size; k += group.size) sum += occupancy(k);
    sum = group.template reduce<Sum>(sum);
    group.sync();  // what the group wrote before is overwritten
    if (!active || !corrects) return;
    for (int k = group.rank; k < size; k += group.size) {
      if (!first[k]) continue;
      Float all = occupancy(k);
      for (int i = next[k]; i >= 0; i = next[i]) all += occupancy(i);
      set(int64_t(label[k]), -scale * all);
    }
    // The rest of a frame is blank's.
    if (group.rank == 0) set(p.blank, -scale * (sum < 1 ? 1 - sum : Float(0)));
  }
};

template <class Float>
KDKERNELS_DEVICE void finish_losses(const CTCProblem<Float>& p) {
  const double infinity = double(kInfinity);
  const int warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
  const Group<false> lanes(32);
  if (p.teacher.data) {
    for (int64_t n = warp; n < p.N; n += warps) {
      double sum = 0;
      for (int t = lanes.rank; t < p.utterances[n].frames; t += 32) {
        sum += __ldcg(p.frame_kd + n * p.T + t);
      }
      sum = lanes.reduce<Sum>(sum);
      if (lanes.rank == 0) p.utterance_kd[n] = p.utterances[n].bad ? infinity - infinity : sum;
    }
    __syncthreads();
  }
  const auto ctc_of = [&](int64_t n) {
    const double loss = __ldcg(p.utterance_loss + n);
    const Utterance& u = p.utterances[n];
    if (!u.labelled) return 0.0;
    return loss == infinity && p.zero_infinity ? 0.0 : loss;
  };
  const auto kd_of = [&](int64_t n) { return p.teacher.data ? p.utterance_kd[n] : 0.0; };
  const auto write = [&](int64_t i, double ctc, double kd) {
    // a term of weight 0 is absent, even where it is infinite
    const double loss = (p.ctc_weight == 0 ? 0.0 : p.ctc_weight * ctc) +
                        (p.kd_weight == 0 ? 0.0 : p.kd_weight * kd);
    if (p.loss) p.loss[i] = Float(loss);
    if (p.ctc) p.ctc[i] = Float(ctc);
    if (p.kd) p.kd[i] = Float(kd);
  };
  if (p.reduction == Reduction::none) {
    for (int64_t n = threadIdx.x; n < p.N; n += blockDim.x) write(n, ctc_of(n), kd_of(n));
    return;
  }
  const double ctc = block_sum(p.N, [&](int64_t n) {
    const int labels = p.utterances[n].labels;
    return ctc_of(n) / (p.reduction == Reduction::mean && labels > 1 ? labels : 1);
  });
  const double kd = block_sum(p.N, kd_of);
  if (threadIdx.x == 0) write(0, ctc / p.ctc_divisor(), kd / p.kd_divisor());
}

template <class Float>
__global__ void finish_losses_kernel(CTCProblem<Float> p) {
  finish_losses(p);
}

// One frame: f(group, t, n, utterance, live, extra); then the losses, by the last block.
template <bool kBlock, class Float, class F>
KDKERNELS_DEVICE void for_gradient_rows(const CTCProblem<Float>& p, int lanes, F f) {
  for_frames<kBlock>(p, lanes, [&](const Group<kBlock>& group, int64_t t, int64_t n) {
    Utterance u{};
    const bool inside = t < p.T;
    if (inside) u = p.utterances[n];
    const bool live = t < u.frames;
    const CTCExtra<Float> extra(p, u, t, n, live && (p.grad.data != nullptr));
    f(group, t, n, live, extra);
    if (inside && !live) {
      const LogitRow grad = p.grad.row(t, n), grad_teacher = p.grad_teacher.row(t, n);
      for (int64_t c = group.rank; c < p.C; c += group.size) {
        if (grad.data) grad.set(c, 0);
        if (grad_teacher.data) grad_teacher.set(c, 0);
      }
    }
  });
  if (p.loss && is_last_block(p.counter)) finish_losses(p);
}

// softmax less occupancy, without a teacher.
template <class T, class Out, class Float, bool kBlock>
__global__ void __launch_bounds__(kBlock ? 512 : kBlockThreads)
    gradient_kernel(CTCProblem<Float> p, int lanes) {
  for_gradient_rows<kBlock>(
      p, lanes,
      [&](const Group<kBlock>& group, int64_t t, int64_t n, bool live,
          const CTCExtra<Float>& extra) {
        const T* const row = static_cast<const T*>(p.logits.row(t, n).data);
        Out* const grad = static_cast<Out*>(p.grad.row(t, n).data);
        if (live) {
          if constexpr (sizeof(Out) == 8 || sizeof(T) != sizeof(Out)) {
            for (int64_t c = group.rank; c < p.C; c += group.size) {
              const Float x = Float(to_float(row[c]));
              from_float(
                  x > Float(-kInfinity) || extra.scale != extra.scale ? extra.dense(x) : Float(0),
                  grad[c]);
            }
          } else {
            const bool aligned = is_aligned(row), grad_aligned = is_aligned(grad);
            for (int64_t c = group.rank * kVector<T>; c < p.C; c += group.size * kVector<T>) {
              float x[kVector<T>];
              load_vector(row, aligned, c, p.C, x);
#pragma unroll
              for (int j = 0; j < kVector<T>; j++) x[j] = float(extra.dense(Float(x[j])));
              store_vector(grad, grad_aligned, c, p.C, x);
            }
          }
        }
        extra.correct(group, live, [&](int64_t c, Float change) {
          const Float x = Float(to_float(row[c]));
          from_float(x > Float(-kInfinity) ? extra.dense(x) + change : Float(0), grad[c]);
        });
      });
}

// Of a frame's divergence: what it weighs in the loss, and its classes where it has to be read.
template <class Float>
struct KDFrame {
  double weight, factor;
  int64_t C;
  KDKERNELS_DEVICE KDFrame(const CTCProblem<Float>& p, int64_t t, int64_t n, bool live)
      : weight(live ? p.weight(t, n) * p.kd_factor : 0.0),
        factor(p.kd_weight == 0 ? 0.0 : weight * p.kd_weight / p.kd_divisor()),
        C(weight != 0 ? p.C : 0) {}
};

// A live frame whose divergence is not wanted: CTC alone, and 0 for the teacher.
template <class Float, class AnyGroup>
KDKERNELS_DEVICE void ctc_alone(const CTCProblem<Float>& p, const AnyGroup& group, int64_t t,
                                int64_t n, bool alone, const CTCExtra<Float>& extra) {
  const LogitRow row = p.logits.row(t, n), grad = p.grad.row(t, n);
  const LogitRow grad_teacher = p.grad_teacher.row(t, n);
  const auto gradient = [&](int64_t c, Float change) {
    const Float x = Float(row[c]);
    grad.set(c, x > Float(-kInfinity) || extra.scale != extra.scale ? extra.dense(x) + change
                                                                    : Float(0));
  };
  if (alone) {
    for (int64_t c = group.rank; c < p.C; c += group.size) {
      if (grad.data) gradient(c, 0);
      if (grad_teacher.data) grad_teacher.set(c, 0);
    }
  }
  extra.correct(group, alone && grad.data, gradient);
}

// The same with the forward KL from the teacher, one dtype and temperature; kTeacher: the teacher's
// gradient too.
template <class T, int K, bool kBlock, bool kTeacher>
__global__ void __launch_bounds__(kBlock ? 512 : kBlockThreads, 1)
    kl_gradient_kernel(CTCProblem<float> p, KLScale scale, int lanes) {
  for_gradient_rows<kBlock>(
      p, lanes,
      [&](const Group<kBlock>& group, int64_t t, int64_t n, bool live,
          const CTCExtra<float>& extra) {
        const KDFrame<float> frame(p, t, n, live);
        const T* const student = static_cast<const T*>(p.logits.row(t, n).data);
        const T* const teacher = static_cast<const T*>(p.teacher.row(t, n).data);
        T* const grad = frame.C ? static_cast<T*>(p.grad.row(t, n).data) : nullptr;
        const float factor = float(frame.factor * p.student_scale);
        double kd;
        if constexpr (K > 0) {
          RowOnChip<T, K, kBlock> row(teacher, student, frame.C, group);
          kd = kl_row(row, group, scale, factor, teacher, student, grad, extra);
        } else {
          RowInMemory<T> row(teacher, student, frame.C, group);
          kd = kl_row(row, group, scale, factor, teacher, student, grad, extra);
        }
        if (group.rank == 0 && live) p.frame_kd[n * p.T + t] = frame.C ? kd * frame.weight : 0.0;
        if constexpr (kTeacher) {
          const LogitRow none{nullptr, DType::float32};
          teacher_gradient(
              {p.teacher.row(t, n), p.logits.row(t, n), p.teacher_scale, p.student_scale},
              frame.C ? p.grad_teacher.row(t, n) : none, frame.factor * p.teacher_scale, frame.C,
              group);
        }
        ctc_alone(p, group, t, n, live && !frame.C, extra);
      });
}

// The same with any divergence.
template <class Float, bool kBlock>
__global__ void __launch_bounds__(kBlock ? 512 : kBlockThreads)
    divergence_gradient_kernel(CTCProblem<Float> p, int lanes) {
  for_gradient_rows<kBlock>(
      p, lanes,
      [&](const Group<kBlock>& group, int64_t t, int64_t n, bool live,
          const CTCExtra<Float>& extra) {
        const KDFrame<Float> frame(p, t, n, live);
        const LogitRow student = p.logits.row(t, n), teacher = p.teacher.row(t, n);
        const LogitRow none{nullptr, DType::float32};
        const LogitRow grad_student = frame.C ? p.grad.row(t, n) : none;
        const LogitRow grad_teacher = frame.C ? p.grad_teacher.row(t, n) : none;
        const bool reverse = p.divergence == Divergence::reverse_kl;
        RowPair pair{teacher, student, p.teacher_scale, p.student_scale};
        RowGradients grad{grad_teacher, grad_student, frame.factor * p.teacher_scale,
                          frame.factor * p.student_scale};
        if (reverse) {
          pair = {student, teacher, p.student_scale, p.teacher_scale};
          grad = {grad_student, grad_teacher, frame.factor * p.student_scale,
                  frame.factor * p.teacher_scale};
        }
        const double kd =
            divergence_row(p.divergence, p.beta, pair, grad, frame.C, group, reverse, extra);
        if (group.rank == 0 && live) p.frame_kd[n * p.T + t] = frame.C ? kd * frame.weight : 0.0;
        ctc_alone(p, group, t, n, live && !frame.C, extra);
      });
}

}  // namespace cuda
}  // namespace kdkernels
