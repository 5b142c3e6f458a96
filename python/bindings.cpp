// The extension kdkernels._C: one line a kernel. A pointer is an integer on the Python side (0 is
// null), and the GIL is released while a kernel runs. One submodule for each instruction set;
// `best_target` names the fastest that this machine has.

#include <pybind11/pybind11.h>

#include "bindings_cuda.h"
#include "kdkernels.h"

namespace py = pybind11;

namespace {

void bind(py::module_ module, const kdkernels::Kernels& kernels) {
  def(module, "kd_loss_workspace", kernels.kd_loss_workspace);
  def(module, "kd_loss_forward", kernels.kd_loss_forward);
  def(module, "ctc_loss_workspace", kernels.ctc_loss_workspace);
  def(module, "ctc_loss_forward", kernels.ctc_loss_forward);
  def(module, "ctc_align_workspace", kernels.ctc_align_workspace);
  def(module, "ctc_align", kernels.ctc_align);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of kdkernels; see csrc/kdkernels.h";
  const char* best = "baseline";
  bind(module.def_submodule("baseline"), kdkernels::kernels_baseline);
  py::list targets;
  targets.append("baseline");
#ifdef KDKERNELS_HAS_avx2
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    bind(module.def_submodule("avx2"), kdkernels::kernels_avx2);
    targets.append(best = "avx2");
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    bind(module.def_submodule("avx512"), kdkernels::kernels_avx512);
    targets.append(best = "avx512");
  }
#endif
#ifdef KDKERNELS_HAS_cuda
  bind_cuda(module.def_submodule("cuda"));
#endif
  module.attr("targets") = py::tuple(targets);
  module.attr("best_target") = best;
}
