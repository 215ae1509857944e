// What rotary.cpp, which knows tensors, asks of the CPU kernel of rotary embeddings, which knows pointers and sizes.
#pragma once

#include "dtype.h"

#include <cstdint>

namespace fastlm {

// Rotates every head of every token by the angles of the token's position; y may be x.
struct RotaryParams {
  Rows x, y;  // the heads of a token as rows
  int64_t x_batch_stride, x_token_stride;
  int64_t y_batch_stride, y_token_stride;
  Rows cos, sin;             // (positions, pairs)
  const int64_t* positions;  // (batch, tokens), or null for the token's index
  int64_t batch, tokens, heads, columns, pairs;
  bool interleaved, inverse;
  bool non_temporal;
};

// Tokens [begin, end) of the batch.
void rotary_cpu(const RotaryParams& params, int64_t begin, int64_t end);

}  // namespace fastlm
