// The Jensen-Shannon divergence of several rows of float32 logits and its gradients, where they are
// not small against what they are made of.

#pragma once

#include <cstdint>

#include "cpu/divergence.h"
#include "cpu/kl_rows.h"

namespace kdkernels {
namespace KDKERNELS_TARGET {

// n <= rows_in_block(C) rows; scratch [n][2][C]; left [n] (out). A row with a NaN, an infinity or
// no class left is left.
void jsd_rows(KLRows& rows, int n, int64_t C, KLScales scale, const Mixture& mixture,
              float* scratch, Left* left);

}  // namespace KDKERNELS_TARGET
}  // namespace kdkernels
