// What norm.cpp, which knows tensors, asks of the CPU kernels of layer norm and RMS norm, which know pointers and
// sizes.
#pragma once

#include "dtype.h"

#include <cstdint>

namespace fastlm {

// h = x + residual (or x alone), y = (h - mean) rstd weight + bias. Without mean it is RMS norm.
struct NormParams {
  Rows x, residual, h, y;  // (rows, columns); h is stored if there is a residual
  const float* weight;     // (columns,) or null
  const float* bias;       // (columns,) or null
  float* mean;             // (rows,) or null
  float* rstd;             // (rows,)
  int64_t rows, columns;
  float eps;
};

struct NormBackwardParams {
  Rows dy, dsum, h, dx,
      dresidual;        // (rows, columns); dsum is the gradient of h as an output; all but dy and h optional
  const float* weight;  // (columns,) or null
  const float* mean;    // (rows,) or null
  const float* rstd;    // (rows,)
  float* dweight;       // (chunks, columns) partial sums, or null
  float* dbias;         // (chunks, columns) partial sums, or null
  int64_t rows, columns, chunks;
};

// Rows [begin, end), and chunks of rows.
void norm_cpu(const NormParams& params, int64_t begin, int64_t end);
void norm_backward_cpu(const NormBackwardParams& params, int64_t begin, int64_t end);

}  // namespace fastlm
