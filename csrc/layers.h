// What layers.cpp, which knows tensors, asks of the CPU kernels of the norms, softmax, the activations and rotary,
// which know pointers and sizes. All of them go over rows; a row's elements are adjacent.
#pragma once

#include "element.h"

#include <cstdint>

namespace fastlm {

// h = x + residual (or x alone), y = (h - mean) rstd weight + bias. Without mean it is RMS norm.
struct Norm {
  Rows x, residual, h, y;  // (rows, columns); h is stored where there is a residual
  const float* weight;     // (columns,) or null
  const float* bias;       // (columns,) or null
  float* mean;             // (rows,) or null
  float* rstd;             // (rows,)
  int64_t rows, columns;
  float eps;
};

// Sums over rows are left as one partial sum for each chunk of rows: the number of chunks, and with it every bit, is
// independent of the number of threads.
struct NormBackward {
  Rows dy, dsum, h, dx, dresidual;  // (rows, columns); dsum comes back through h itself; the last two where wanted
  const float* weight;              // (columns,) or null
  const float* mean;                // (rows,) or null
  const float* rstd;                // (rows,)
  float* dweight;                   // (chunks, columns) or null
  float* dbias;                     // (chunks, columns) or null
  int64_t rows, columns, chunks;
};

// total = the sum of the chunks' partial sums, in their order.
struct ChunkSums {
  const float* partials;  // (chunks, columns)
  Rows total;             // one row
  int64_t chunks, columns;
};

// What a mask says of each row, along whose leading dimensions the rows count.
struct Mask {
  void* data;  // null: there is none
  bool boolean;      // true keeps; else it is added
  Element element;   // of one that is added
  int64_t dims;
  const int64_t* sizes;    // (dims,)
  const int64_t* strides;  // (dims,), 0 along what is broadcast
  int64_t column_stride;
};

// s = scale x + mask, or -inf where it hides; y = exp(s - max) / sum, or its logarithm.
struct Softmax {
  Rows x, y;  // (rows, columns)
  Mask mask;
  int64_t rows, columns;
  int64_t queries;  // each sees one column more than the one before, the last all of them; 0: all see all
  float scale;
  bool log;
  bool stream;  // results are stored round the caches
};

struct SoftmaxBackward {
  Rows dy, y, dx, dmask;  // (rows, columns); the last two where wanted
  Mask mask;
  int64_t rows, columns, queries;
  float scale;
  bool log;
  bool stream;  // results are stored round the caches
};

// y = gelu(x + bias)
struct Gelu {
  Rows x, y;          // (rows, columns)
  const float* bias;  // (columns,) or null
  int64_t rows, columns;
  bool tanh;
};

struct GeluBackward {
  Rows dy, x, dx;     // (rows, columns); dx where wanted
  const float* bias;  // (columns,) or null
  float* dbias;       // (chunks, columns) or null
  int64_t rows, columns, chunks;
  bool tanh;
};

// y = silu(gate) up
struct Swiglu {
  Rows gate, up, y;  // (rows, columns)
  int64_t rows, columns;
};

struct SwigluBackward {
  Rows dy, gate, up, dgate, dup;  // (rows, columns); the last two where wanted
  int64_t rows, columns;
};

// Every head of every token turned by the angles of the token's position; y may be x.
struct Rotary {
  Rows x, y;                 // heads as rows: stride is that from head to head
  int64_t x_batch, x_token;  // elements from one to the next
  int64_t y_batch, y_token;
  Rows cos, sin;             // (positions, pairs)
  const int64_t* positions;  // (batch, tokens), or null: the token's number
  int64_t batch, tokens, heads, columns, pairs;
  bool interleaved, inverse;
  bool stream;  // a large result is stored round the caches
};

// Rows, chunks or tokens [begin, end), or pieces of rows of an activation: callers share them out over threads.
constexpr int64_t kPiece = 1024;  // elements: with three rows of scratch, 12 KiB
void norm_cpu(const Norm& call, int64_t begin, int64_t end);
void norm_backward_cpu(const NormBackward& call, int64_t begin, int64_t end);
void chunk_sums_cpu(const ChunkSums& call);
void softmax_cpu(const Softmax& call, int64_t begin, int64_t end);
void softmax_backward_cpu(const SoftmaxBackward& call, int64_t begin, int64_t end);
void gelu_cpu(const Gelu& call, int64_t begin, int64_t end);
void gelu_backward_cpu(const GeluBackward& call, int64_t begin, int64_t end);
void swiglu_cpu(const Swiglu& call, int64_t begin, int64_t end);
void swiglu_backward_cpu(const SwigluBackward& call, int64_t begin, int64_t end);
void rotary_cpu(const Rotary& call, int64_t begin, int64_t end);

}  // namespace fastlm
