// What softmax.cpp, which knows tensors, asks of the CPU kernels of softmax and log-softmax, which know pointers and
// sizes.
#pragma once

#include "dtype.h"

#include <cstdint>

namespace fastlm {

// The mask of each row: a strided view whose dimensions before the last count the rows.
struct Mask {
  void* data;    // null for no mask
  bool is_bool;  // true keeps a score; otherwise the mask is added
  DType dtype;   // of an additive mask
  int64_t dims;
  const int64_t* sizes;    // (dims,)
  const int64_t* strides;  // (dims,), 0 along a broadcast dimension
  int64_t column_stride;
};

// s = scale x + mask, or -inf where it is masked; y = exp(s - max) / sum, or its logarithm.
struct SoftmaxParams {
  Rows x, y;  // (rows, columns)
  Mask mask;
  int64_t rows, columns;
  int64_t queries;  // causal: each sees one column more than the one before it, the last all of them; 0 for not causal
  float scale;
  bool is_log;
  bool non_temporal;
};

struct SoftmaxBackwardParams {
  Rows dy, y, dx, dmask;  // (rows, columns); dx and dmask are optional
  Mask mask;
  int64_t rows, columns, queries;
  float scale;
  bool is_log;
  bool non_temporal;
};

// Rows [begin, end).
void softmax_cpu(const SoftmaxParams& params, int64_t begin, int64_t end);
void softmax_backward_cpu(const SoftmaxBackwardParams& params, int64_t begin, int64_t end);

}  // namespace fastlm
