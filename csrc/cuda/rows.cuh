// Rows of tensors with any strides, spread over groups of threads.

#pragma once

#include "cuda/device.cuh"

namespace kdkernels {
namespace cuda {

constexpr int kMaxDims = 8;

// Leading dimensions shared by up to five tensors: sizes, then strides in elements of each.
struct RowLayout {
  int64_t dims;
  int64_t size[kMaxDims], stride[5][kMaxDims];

  static RowLayout from(int64_t dims, const int64_t* values, int tensors) {
    RowLayout layout{};
    layout.dims = dims;
    for (int64_t d = 0; d < dims; d++) {
      layout.size[d] = values[d];
      for (int i = 0; i < tensors; i++) layout.stride[i][d] = values[(i + 1) * dims + d];
    }
    return layout;
  }

  // Rows are fewer than 2^31, so that their numbers are divided in 32 bits.
  template <int n>
  KDKERNELS_DEVICE void at(int64_t number, int64_t (&offset)[n]) const {
#pragma unroll
    for (int i = 0; i < n; i++) offset[i] = 0;
    unsigned row = unsigned(number);
    for (int d = int(dims) - 1; d >= 0; d--) {
      const unsigned left = d ? row / unsigned(size[d]) : 0;
      const int64_t index = row - left * unsigned(size[d]);
#pragma unroll
      for (int i = 0; i < n; i++) offset[i] += index * stride[i][d];
      row = left;
    }
  }
};

constexpr int64_t kMostRows = (int64_t(1) << 31) - 1;
inline const char* too_many_rows() { return "expected fewer than 2^31 rows of logits"; }

constexpr int kBlockThreads = 256;  // of blocks that hold many rows

// How a row of C is spread: `lanes` of a warp with 8 classes each, a whole block with 16, or,
// `classes` being 0, a block that reads it again and again.
struct RowShape {
  int classes, lanes, threads;
  int64_t rows_per_block() const { return lanes ? threads / lanes : 1; }

  static RowShape of(int64_t C) {
    if (C <= 256) {
      int lanes = 4;
      while (lanes * 8 < C) lanes *= 2;
      return {8, lanes, kBlockThreads};
    }
    if (C <= 512 * 16) return {16, 0, int((C + 511) / 512) * 32};
    return {0, 0, 512};
  }
  // For rows that are read at every visit, whatever their size.
  static RowShape reread(int64_t C) {
    return C <= 1024 ? RowShape{0, 32, kBlockThreads} : RowShape{0, 0, 512};
  }
};

// The sum of x[0..n) over a block, in a fixed order. `load(i)` gives an element.
template <class Load>
KDKERNELS_DEVICE double block_sum(int64_t n, Load load) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += load(i);
  return Group<true>(0).reduce<Sum>(sum);
}

}  // namespace cuda
}  // namespace kdkernels
