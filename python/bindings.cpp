// The extension kdkernels._C: one line a kernel. A pointer is an integer on the Python side (0 is
// null), and the GIL is released while a kernel runs. One submodule for each instruction set;
// `best_target` names the fastest that this machine has.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>

#include "kdkernels.h"

namespace py = pybind11;

namespace {

template <class T>
using Argument = std::conditional_t<std::is_pointer_v<T>, uintptr_t, T>;

template <class T>
T from_python(Argument<T> value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);
  } else {
    return value;
  }
}

template <class Result, class... Args>
void def(py::module_& module, const char* name, Result (*kernel)(Args...)) {
  module.def(
      name, [kernel](Argument<Args>... args) { return kernel(from_python<Args>(args)...); },
      py::call_guard<py::gil_scoped_release>());
}

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
  module.attr("targets") = py::tuple(targets);
  module.attr("best_target") = best;
}
