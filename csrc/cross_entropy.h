// What cross_entropy.cpp, which knows tensors, asks of the CPU and the CUDA kernels, which know pointers and sizes.
#pragma once

#include <cstdint>

namespace fastlm {

enum class Element { kFloat32, kFloat16, kBFloat16 };

struct CrossEntropy {
  Element element;         // of input and gradient
  const void* input;       // (rows, columns), unit stride in a row
  int64_t input_stride;    // elements from one row to the next; 0 for one row repeated
  const int64_t* target;   // (rows,)
  const float* scale;      // factor of each row's gradient; null means 1
  int64_t scale_stride;    // 0: one factor for all rows, 1: one for each
  float* losses;           // (rows,)
  void* gradient;          // (rows, columns), may be input itself; null: losses only
  int64_t gradient_stride;
  int64_t rows;
  int64_t columns;
  int64_t num_classes;     // columns from here on count as -inf
  int64_t ignore_index;
};

struct ScaleRows {
  Element element;
  void* input;             // (rows, columns), unit stride in a row
  int64_t stride;
  const float* scale;
  int64_t scale_stride;    // 0: one factor for all rows, 1: one for each
  int64_t rows;
  int64_t columns;
};

// Rows [begin, end): callers share the rows out over threads. cross_entropy_cpu takes Element::kFloat32 alone.
void cross_entropy_cpu(const CrossEntropy& call, int64_t begin, int64_t end);
void scale_rows_cpu(const ScaleRows& call, int64_t begin, int64_t end);

// Which instruction set the CPU kernels use: 0 portable, 1 AVX2 with FMA, 2 AVX-512. The best this CPU has, at first.
int best_instruction_set();
int instruction_set();
void set_instruction_set(int number);

// All rows, on a cudaStream_t; returns a cudaError_t.
int cross_entropy_cuda(const CrossEntropy& call, void* stream);
int scale_rows_cuda(const ScaleRows& call, void* stream);

}  // namespace fastlm
