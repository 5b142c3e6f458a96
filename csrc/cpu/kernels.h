// The kernels of this instruction set; what each one does stands in kdkernels.h.

#pragma once

#include <type_traits>

#include "kdkernels.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {

#define KDKERNELS_DECLARE(name) std::remove_pointer_t<decltype(Kernels::name)> name
KDKERNELS_DECLARE(kd_loss_workspace);
KDKERNELS_DECLARE(kd_loss_forward);
KDKERNELS_DECLARE(ctc_loss_workspace);
KDKERNELS_DECLARE(ctc_loss_forward);
KDKERNELS_DECLARE(ctc_align_workspace);
KDKERNELS_DECLARE(ctc_align);
#undef KDKERNELS_DECLARE

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
