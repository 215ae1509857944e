// What activations.cpp, which knows tensors, asks of the CPU kernels of GELU and gated linear units, which know
// pointers and sizes.
#pragma once

#include "dtype.h"

#include <cstdint>

namespace fastlm {

// y = gelu(x + bias)
struct GeluParams {
  Rows x, y;          // (rows, columns)
  const float* bias;  // (columns,) or null
  int64_t rows, columns;
  bool tanh;
};

struct GeluBackwardParams {
  Rows dy, x, dx;     // (rows, columns); dx is optional
  const float* bias;  // (columns,) or null
  float* dbias;       // (chunks, columns) partial sums, or null
  int64_t rows, columns, chunks;
  bool tanh;
};

enum class Activation : int64_t {
  kSilu,
  kGelu,
  kGeluTanh
};  // in the order of ACTIVATIONS in fastlm/ops/activations.py

// y = activation(gate) up
struct GluParams {
  Rows gate, up, y;  // (rows, columns)
  int64_t rows, columns;
  Activation activation;
};

struct GluBackwardParams {
  Rows dy, gate, up, dgate, dup;  // (rows, columns); dgate and dup are optional
  int64_t rows, columns;
  Activation activation;
};

// Rows are cut into segments, which are counted row by row, because one long row is work for all threads.
constexpr int64_t kSegment = 1024;  // elements: with five rows of scratch, 20 KiB

// Segments [begin, end); gelu_backward with dbias: chunks of rows.
void gelu_cpu(const GeluParams& params, int64_t begin, int64_t end);
void gelu_backward_cpu(const GeluBackwardParams& params, int64_t begin, int64_t end);
void glu_cpu(const GluParams& params, int64_t begin, int64_t end);
void glu_backward_cpu(const GluBackwardParams& params, int64_t begin, int64_t end);

}  // namespace fastlm
