// What cross_entropy.cpp, which knows tensors, asks of the CPU and the CUDA kernels, which know pointers and sizes.
#pragma once

#include "dtype.h"

#include <cstdint>

namespace fastlm {

// Statistics of a set of logits x with class weights w, after softcap.
struct LogitStats {
  float max;
  float sum;       // of exp(x - max)
  float weight;    // sum of w; weight and weighted are 0 without label smoothing
  float weighted;  // sum of w (x - max)
};

// The statistics of some columns of a row, and the target's logit and weight if it is among them, otherwise 0.
struct PartialStats {
  LogitStats logits;
  float target_logit;
  float target_weight;
};
constexpr int64_t kPartialStatsFloats = sizeof(PartialStats) / sizeof(float);

struct CrossEntropyParams {
  DType dtype;                        // of input
  DType gradient_dtype;               // that of input, or bfloat16 for float32 input that the gradient overwrites
  const void* input;                  // (rows, columns), unit stride in a row
  int64_t input_stride;               // elements from one row to the next; 0 for one row repeated
  const int64_t* target;              // (rows,)
  const float* weight;                // (num_classes,) class weights; null for 1
  const float* scale;                 // factor of each row's gradient; null for 1
  int64_t scale_stride;               // 0: one factor for all rows, 1: one for each
  const float* upstream;              // one more factor, if the gradient for a factor of 1 is stored; else null
  int64_t upstream_stride;            // as scale_stride
  PartialStats* partial_stats_out;    // (rows,) the only output; null for losses and gradient
  const PartialStats* partial_stats;  // (num_partial_stats, rows) of a vocab-parallel group; null: compute them
  int64_t num_partial_stats;
  float* losses;   // (rows,)
  void* gradient;  // (rows, columns), may be input itself; null: losses only
  int64_t gradient_stride;
  int64_t rows;
  int64_t columns;
  int64_t num_classes;    // columns from here on count as -inf
  int64_t first_class;    // the class of column 0
  int64_t total_classes;  // in the whole vocabulary
  int64_t ignore_index;
  float label_smoothing;
  float z_loss;
  float softcap;  // 0: none
};

struct ScaleRowsParams {
  DType dtype;
  void* input;  // (rows, columns), unit stride in a row
  int64_t stride;
  const float* scale;
  int64_t scale_stride;  // 0: one factor for all rows, 1: one for each
  int64_t rows;
  int64_t columns;
};

// Rows [begin, end).
void cross_entropy_cpu(const CrossEntropyParams& params, int64_t begin, int64_t end);
void scale_rows_cpu(const ScaleRowsParams& params, int64_t begin, int64_t end);

// The same in slices of rows, for few rows: first the statistics of every slice, into stats (slices, rows), then, with
// these as partial_stats, losses and gradient. Task t is slice t / rows of row t % rows.
constexpr int64_t kSlice = 2048;  // columns: 8 KiB stay in L1
void slice_stats_cpu(const CrossEntropyParams& params, PartialStats* stats, int64_t begin, int64_t end);
void slice_gradients_cpu(const CrossEntropyParams& params, int64_t begin, int64_t end);

// All rows, on a cudaStream_t; returns a cudaError_t.
int cross_entropy_cuda(const CrossEntropyParams& params, void* stream);
int scale_rows_cuda(const ScaleRowsParams& params, void* stream);

}  // namespace fastlm
