#include "../../python/bindings_cuda.h"

PYBIND11_MODULE(kdkernels_emulated, module) { bind_cuda(module.def_submodule("cuda")); }
