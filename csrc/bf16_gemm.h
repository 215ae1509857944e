// What bf16_gemm.cpp, which knows tensors, asks of the CPU kernel, which knows pointers and sizes.
//
//     out = alpha a b   or   out + alpha a b            a and b bfloat16, products, sums and out float32
//
// PyTorch's products of bfloat16 matrices round their results to bfloat16 on a CPU.
#pragma once

#include <cstdint>

namespace fastlm {

// A matrix of bfloat16 by its strides in elements, of which one is 1.
struct Bf16Matrix {
  const uint16_t* data;
  int64_t row_stride, column_stride;
};

struct Bf16GemmParams {
  Bf16Matrix a, b;  // (rows, depth) and (depth, columns)
  float* out;       // (rows, columns), unit stride in a row
  int64_t out_stride;
  int64_t rows, columns, depth;
  float alpha;
  bool accumulate;                  // add to out
  bool non_temporal;                // out is larger than the caches
  int64_t tile_rows, tile_columns;  // of out

  int64_t tiles_in_row() const { return (columns + tile_columns - 1) / tile_columns; }
  int64_t num_tiles() const { return (rows + tile_rows - 1) / tile_rows * tiles_in_row(); }
};

// With these the packed rows of a and columns of b that make a tile stay in the L2 cache together.
constexpr int64_t kMaxTileRows = 518, kMaxTileColumns = 256, kMaxDepth = 384;

// Tiles [begin, end) of out, counted along its rows.
void bf16_gemm_cpu(const Bf16GemmParams& params, int64_t begin, int64_t end);

}  // namespace fastlm
