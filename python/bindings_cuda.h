// The GPU's part of the bindings, for kdkernels._C and for the tests' emulation of it.

#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "kdkernels.h"

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

// A kernel's function; one that returns text raises it where there is one.
template <class Result, class... Args>
void def(pybind11::module_& module, const char* name, Result (*kernel)(Args...)) {
  module.def(
      name,
      [kernel](Argument<Args>... args) {
        if constexpr (std::is_same_v<Result, const char*>) {
          if (const char* error = kernel(from_python<Args>(args)...))
            throw std::runtime_error(error);
        } else {
          return kernel(from_python<Args>(args)...);
        }
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

inline void bind_cuda(pybind11::module_ module) {
  namespace cuda = kdkernels::cuda;
  def(module, "kd_loss_workspace", cuda::kd_loss_workspace);
  def(module, "kd_loss_forward", cuda::kd_loss_forward);
  def(module, "ctc_loss_workspace", cuda::ctc_loss_workspace);
  def(module, "ctc_loss_forward", cuda::ctc_loss_forward);
  def(module, "ctc_align_workspace", cuda::ctc_align_workspace);
  def(module, "ctc_align", cuda::ctc_align);
  def(module, "scale_grad", cuda::scale_grad);
}
