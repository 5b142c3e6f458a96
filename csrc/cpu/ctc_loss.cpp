// ctc_loss, ctc_kd_loss and ctc_posteriors on the CPU: utterances in parallel (ctc_utterance.h),
// or, where there are fewer of them than threads, their rows and the two directions. Of the size of
// the logits only the gradient is stored.

#include <omp.h>

#include <algorithm>
#include <vector>

#include "cpu/ctc_utterance.h"
#include "cpu/flush_to_zero.h"
#include "cpu/kernels.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {
namespace {

// The memory of a call: the losses of each utterance, then a piece for each thread.
template <class Float>
struct Workspace {
  double *ctc, *kd;  // [N]
  char* pieces;
  int64_t piece;

  static int64_t piece_of(int64_t T, int64_t C, int64_t S) {
    Arena arena(nullptr);
    RowScratch<Float>({}, C, arena);
    Utterance<Float>(arena, T, C, S);
    return arena.used();
  }
  static int64_t size(int64_t T, int64_t N, int64_t C, int64_t S, int64_t threads) {
    Arena arena(nullptr);
    arena.take<double>(N);
    arena.take<double>(N);
    return arena.used() + threads * piece_of(T, C, S);
  }
  Workspace(void* memory, const Problem<Float>& p) {
    Arena arena(memory);
    ctc = arena.take<double>(p.N);
    kd = arena.take<double>(p.N);
    pieces = static_cast<char*>(memory) + arena.used();
    piece = piece_of(p.T, p.C, p.S);
  }
  Arena operator[](int64_t i) const { return Arena(pieces + i * piece); }
};

// One utterance after the other, each thread its own.
template <class Float>
void run_utterances(const Problem<Float>& p, const Workspace<Float>& workspace, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const FlushToZero flush;
    Arena arena = workspace[omp_get_thread_num()];
    RowScratch<Float> scratch(p.divergence, p.C, arena);
    Utterance<Float> utterance(arena, p.T, p.C, p.S);
#pragma omp for schedule(dynamic)
    for (int64_t n = 0; n < p.N; n++) {
      utterance.begin(p, n);
      const int64_t rows = p.grad.data || p.grad_teacher.data ? p.T : utterance.frames();
      utterance.rows(0, rows, scratch);
      utterance.begin_recursion();
      utterance.first_halves(true, true);
      utterance.meet();
      utterance.second_halves(true, true);
      utterance.finish(scratch);
      workspace.ctc[n] = utterance.ctc_loss();
      workspace.kd[n] = p.teacher.data ? utterance.kd_loss() : 0.0;
    }
  }
}

// The same for fewer utterances than threads: rows and directions in parallel.
template <class Float>
void run_directions(const Problem<Float>& p, const Workspace<Float>& workspace, int threads) {
  constexpr int64_t kBlock = 16;  // frames
  const int64_t blocks = (p.T + kBlock - 1) / kBlock;
  std::vector<Utterance<Float>> utterances;
  for (int64_t n = 0; n < p.N; n++) {
    Arena arena = workspace[n];
    RowScratch<Float>(p.divergence, p.C, arena);
    utterances.emplace_back(arena, p.T, p.C, p.S);
    utterances.back().begin(p, n);
  }
#pragma omp parallel num_threads(threads)
  {
    const FlushToZero flush;
    Arena arena = workspace[omp_get_thread_num()];
    RowScratch<Float> scratch(p.divergence, p.C, arena);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < blocks * p.N; i++) {
      const int64_t begin = i / p.N * kBlock;
      utterances[i % p.N].rows(begin, std::min(p.T, begin + kBlock), scratch);
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < p.N; n++) utterances[n].begin_recursion();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < 2 * p.N; i++) utterances[i / 2].first_halves(i % 2 == 0, i % 2 == 1);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < p.N; n++) utterances[n].meet();
    // Each direction goes on where the other was: of one utterance, the thread that made the rows
    // of these frames' gradient and the states that are stored takes them from its own caches.
#pragma omp for schedule(static)
    for (int64_t i = 0; i < 2 * p.N; i++) utterances[i / 2].second_halves(i % 2 == 1, i % 2 == 0);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < p.N; n++) {
      utterances[n].finish(scratch);
      workspace.ctc[n] = utterances[n].ctc_loss();
      workspace.kd[n] = p.teacher.data ? utterances[n].kd_loss() : 0.0;
    }
  }
}

// A term with weight 0 is left out, so that it may be infinite.
double weighted(double weight, double x) { return weight == 0 ? 0.0 : weight * x; }

}  // namespace

int64_t ctc_loss_workspace(int64_t T, int64_t N, int64_t C, int64_t S, int64_t wide,
                           int64_t threads) {
  return wide ? Workspace<double>::size(T, N, C, S, threads)
              : Workspace<float>::size(T, N, C, S, threads);
}

void ctc_loss_forward(int64_t T, int64_t N, int64_t C, int64_t S, const void* logits, int64_t dtype,
                      int64_t stride_t, int64_t stride_n, const int64_t* targets,
                      const int64_t* target_offsets, const int64_t* input_lengths,
                      const int64_t* target_lengths, int64_t blank, int64_t reduction,
                      int64_t zero_infinity, int64_t posteriors, const void* teacher,
                      int64_t teacher_dtype, int64_t teacher_stride_t, int64_t teacher_stride_n,
                      const uint8_t* labelled, const void* frame_weight, double ctc_weight,
                      double kd_weight, double temperature, double teacher_temperature,
                      int64_t divergence, double beta, int64_t rescale, void* loss, void* ctc,
                      void* kd, void* grad, int64_t grad_stride_t, int64_t grad_stride_n,
                      void* grad_teacher, int64_t grad_teacher_stride_t,
                      int64_t grad_teacher_stride_n, void* workspace_memory, int64_t threads) {
  const auto run = [&](auto zero) {
    using Float = decltype(zero);
    Problem<Float> p{};
    p.T = T, p.N = N, p.C = C, p.S = S;
    p.logits = {const_cast<void*>(logits), DType(dtype), stride_t, stride_n};
    p.teacher = {const_cast<void*>(teacher), DType(teacher_dtype), teacher_stride_t,
                 teacher_stride_n};
    p.grad = {grad,
              posteriors ? (sizeof(Float) == 8 ? DType::float64 : DType::float32) : DType(dtype),
              grad_stride_t, grad_stride_n};
    p.grad_teacher = {grad_teacher, DType(teacher_dtype), grad_teacher_stride_t,
                      grad_teacher_stride_n};
    p.targets = targets, p.target_offsets = target_offsets;
    p.input_lengths = input_lengths, p.target_lengths = target_lengths;
    p.blank = blank;
    p.zero_infinity = zero_infinity, p.posteriors = posteriors;
    p.labelled = labelled;
    p.frame_weight = static_cast<const Float*>(frame_weight);
    p.divergence = {
        Divergence(divergence),
        {DType(dtype), kOwnDType<Float>, 1 / temperature, stride_t},
        {DType(teacher_dtype), DType(teacher_dtype), 1 / teacher_temperature, teacher_stride_t},
        beta};
    p.kd_factor = rescale ? temperature * temperature : 1.0;

    const bool mean = Reduction(reduction) == Reduction::mean;
    double utterances = 0, frames = 0;
    for (int64_t n = 0; n < N; n++) {
      utterances += p.is_labelled(n);
      if (!p.frame_weight) frames += double(input_lengths[n]);
      for (int64_t t = 0; p.frame_weight && t < input_lengths[n]; t++) frames += p.weight(t, n);
    }
    const double ctc_divisor = mean ? std::max(utterances, 1.0) : 1.0;
    // Of weights that add up to 0 the mean is 0.
    const double kd_divisor = !mean ? 1.0 : frames != 0 ? frames : kInfinity;
    p.divide_by_length = mean;
    p.ctc_scale = ctc_weight / ctc_divisor;
    p.kd_scale = kd_weight / kd_divisor;

    advise_huge_pages(grad, T * N * C * size_of(p.grad.dtype));
    advise_huge_pages(grad_teacher, T * N * C * size_of(p.grad_teacher.dtype));
    p.past_caches = grad && sizeof(Float) == 4 && p.grad.dtype == DType::float32 &&
                    goes_past_caches(grad, T * N * C * 4);
    const Workspace<Float> workspace(workspace_memory, p);
    if (N >= threads || threads == 1) {
      run_utterances(p, workspace, int(threads));
    } else {
      run_directions(p, workspace, int(threads));
    }

    Float *const out = static_cast<Float*>(loss), *const out_ctc = static_cast<Float*>(ctc),
                 *const out_kd = static_cast<Float*>(kd);
    const auto write = [&](int64_t i, double ctc_term, double kd_term) {
      if (out) out[i] = Float(weighted(ctc_weight, ctc_term) + weighted(kd_weight, kd_term));
      if (out_ctc) out_ctc[i] = Float(ctc_term);
      if (out_kd) out_kd[i] = Float(kd_term);
    };
    double ctc_sum = 0, kd_sum = 0;
    for (int64_t n = 0; n < N; n++) {
      if (Reduction(reduction) == Reduction::none) {
        write(n, workspace.ctc[n], workspace.kd[n]);
      } else {
        const double length = mean ? double(std::max<int64_t>(target_lengths[n], 1)) : 1.0;
        if (p.is_labelled(n)) ctc_sum += workspace.ctc[n] / length;
        kd_sum += workspace.kd[n];
      }
    }
    if (Reduction(reduction) != Reduction::none) {
      write(0, ctc_sum / ctc_divisor, kd_sum / kd_divisor);
    }
  };
  if (DType(dtype) == DType::float64 || (teacher && DType(teacher_dtype) == DType::float64)) {
    run(double());
  } else {
    run(float());
  }
}

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
