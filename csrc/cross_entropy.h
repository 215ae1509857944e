// What cross_entropy.cpp, which knows tensors, asks of the CPU and the CUDA kernels, which know pointers and sizes.
#pragma once

#include "element.h"

#include <cstdint>

namespace fastlm {

// Of a group of logits x with class weights w, softcap already applied.
struct Statistics {
  float max;
  float sum;       // of exp(x - max)
  float weight;    // sum of w; 0 where no label is smoothed, as the next
  float weighted;  // sum of w (x - max)
};

// The statistics of some columns of a row, and the target's logit and weight where it is among them, else 0.
struct Part {
  Statistics logits;
  float target_logit;
  float target_weight;
};
constexpr int64_t kPartFloats = sizeof(Part) / sizeof(float);

struct CrossEntropy {
  Element element;         // of input and gradient
  const void* input;       // (rows, columns), unit stride in a row
  int64_t input_stride;    // elements from one row to the next; 0 for one row repeated
  const int64_t* target;   // (rows,)
  const float* weight;     // (num_classes,) of each class; null means 1
  const float* scale;      // factor of each row's gradient; null means 1
  int64_t scale_stride;    // 0: one factor for all rows, 1: one for each
  const float* upstream;   // a factor more; the gradient of a row where it is 1 is there already. Null: it is not
  int64_t upstream_stride;
  Part* parts;             // (rows,) to be filled, and nothing else; null: losses are wanted
  const Part* given_parts; // (num_given, rows) of the whole vocabulary, shared out; null: input holds all of it
  int64_t num_given;
  float* losses;           // (rows,)
  void* gradient;          // (rows, columns), may be input itself; null: losses only
  int64_t gradient_stride;
  int64_t rows;
  int64_t columns;
  int64_t num_classes;     // columns from here on count as -inf
  int64_t first_class;     // the class of column 0
  int64_t total_classes;   // in the whole vocabulary
  int64_t ignore_index;
  float label_smoothing;
  float z_loss;
  float softcap;           // 0: none
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

// Rows [begin, end): callers share the rows out over threads.
void cross_entropy_cpu(const CrossEntropy& call, int64_t begin, int64_t end);
void scale_rows_cpu(const ScaleRows& call, int64_t begin, int64_t end);

// The same in slices of a row, for few rows: first the part of every slice, into parts (slices, rows), then, with these
// as given_parts, losses and gradient. Task t is slice t / rows of row t % rows.
int64_t slices_cpu(const CrossEntropy& call);
void slice_parts_cpu(const CrossEntropy& call, Part* parts, int64_t begin, int64_t end);
void slice_gradients_cpu(const CrossEntropy& call, int64_t begin, int64_t end);

// All rows, on a cudaStream_t; returns a cudaError_t.
int cross_entropy_cuda(const CrossEntropy& call, void* stream);
int scale_rows_cuda(const ScaleRows& call, void* stream);

}  // namespace fastlm
