// Backward: a gradient made in forward, times the gradient of the loss, in place. What comes in is
// read here, on its device; rows whose factor is 1 are left alone.

#include "cuda/rows.cuh"
#include "kdkernels.h"

namespace kdkernels {
namespace cuda {
namespace {

template <class T>
__global__ void scale_grad_kernel(int64_t rows, int64_t C, RowLayout layout, T* grad,
                                  const void* grad_loss, DType dtype) {
  // Where every row has one factor, and it is 1, a block has nothing to look for.
  bool one = true;
  for (int d = 0; d < int(layout.dims); d++) one = one && layout.stride[1][d] == 0;
  if (one && load(grad_loss, dtype, 0) == 1) return;
  const int lane = int(threadIdx.x) % 32, warps = int(blockDim.x) / 32;
  // A warp takes a piece of a row at a time.
  constexpr int64_t kPiece = 1024;
  const int64_t pieces = (C + kPiece - 1) / kPiece;
  const int64_t step = int64_t(gridDim.x) * warps;
  for (int64_t i = int64_t(blockIdx.x) * warps + threadIdx.x / 32; i < rows * pieces; i += step) {
    const int64_t row = i / pieces, begin = (i - row * pieces) * kPiece;
    int64_t at[2];
    layout.at(row, at);
    const double factor = load(grad_loss, dtype, at[1]);
    if (factor == 1) continue;
    T* const grad_row = grad + at[0] + begin;
    const int64_t size = C - begin < kPiece ? C - begin : kPiece;
    if constexpr (sizeof(T) == 8) {
      for (int64_t c = lane; c < size; c += 32) grad_row[c] *= factor;
    } else {
      const bool aligned = is_aligned(grad_row);
      for (int64_t c = lane * kVector<T>; c < size; c += 32 * kVector<T>) {
        float x[kVector<T>];
        load_vector(grad_row, aligned, c, size, x);
#pragma unroll
        for (int j = 0; j < kVector<T>; j++) x[j] = x[j] * float(factor);
        store_vector(grad_row, aligned, c, size, x);
      }
    }
  }
}

}  // namespace

const char* scale_grad(int64_t rows, int64_t C, int64_t dims, const int64_t* layout, void* grad,
                       int64_t grad_dtype, const void* grad_loss, int64_t loss_dtype,
                       int64_t device, void* stream) {
  if (rows > kMostRows) return too_many_rows();
  const OnDevice guard(device);
  constexpr int64_t kMostBlocks = 2048;
  const int64_t wanted = (rows * ((C + 1023) / 1024) + 7) / 8;
  with_dtype(DType(grad_dtype), [&](auto type) {
    using T = typename decltype(type)::Type;
    launch(scale_grad_kernel<T>, wanted < kMostBlocks ? wanted : kMostBlocks, 256, stream, rows, C,
           RowLayout::from(dims, layout, 2), static_cast<T*>(grad), grad_loss, DType(loss_dtype));
  });
  return guard.error();
}

}  // namespace cuda
}  // namespace kdkernels
