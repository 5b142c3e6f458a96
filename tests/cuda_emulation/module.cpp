#include "../../python/bindings_cuda.h"
#include "cuda/device.cuh"

namespace {

// What a kernel must not do; the emulation has to say so.
void misuse(const std::string& what) {
  emulation::launch(1, 64, [&] {
    KDKERNELS_SHARED(int, x, 64);
    const int i = int(threadIdx.x);
    if (what == "unwritten") (void)int(x[i]);
    if (what == "bounds" && i == 63) x[i + 1] = 0;
    x[i] = i;
    if (what == "missed barrier" && i == 3) return;
    if (what == "missed exchange" && i == 40) return;
    if (what == "two barriers") {
      if (i < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
    }
    if (what == "missed exchange") __shfl_xor_sync(~0u, i, 1);
    if (what == "warp barrier alone") __syncwarp();
    if (what != "no barrier" && what != "warp barrier alone") __syncthreads();
    (void)int(x[i / 2]);
    if (what == "overwritten") x[i / 2] = 0;
    if (what == "written twice") {
      __syncthreads();
      x[i / 2] = 0;
    }
  });
}

}  // namespace

PYBIND11_MODULE(kdkernels_emulated, module) {
  bind_cuda(module.def_submodule("cuda"));
  module.def("launches", [] { return emulation::launches; });
  module.def("exponentials", [] { return emulation::exponentials; });
  module.def("misuse", misuse);
}
