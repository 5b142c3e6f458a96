// The table of this instruction set's kernels, for the bindings to choose from.

#include "cpu/kernels.h"

#define KDKERNELS_JOIN_(a, b) a##b
#define KDKERNELS_JOIN(a, b) KDKERNELS_JOIN_(a, b)

namespace kdkernels {

using namespace KDKERNELS_TARGET;

extern const Kernels KDKERNELS_JOIN(kernels_, KDKERNELS_TARGET) = {
    kd_loss_workspace, kd_loss_forward,     ctc_loss_workspace,
    ctc_loss_forward,  ctc_align_workspace, ctc_align};

}  // namespace kdkernels
