// What attention.cpp, which knows tensors, asks of the CPU kernels of packed attention, which know pointers and sizes.
//
//     s_ij = scale q_i . k_j,  p_ij = exp(s_ij - lse_i),  o_i = sum_j p_ij v_j           within each document
//     dv_j = sum_i p_ij do_i,  dp_ij = do_i . v_j,  ds_ij = p_ij (dp_ij - sum_j p_ij dp_ij)
//
// A document's scores are a few rows at a time, whole: documents that are long enough for that to be slow are left out.
#pragma once

#include "element.h"

#include <cstdint>

namespace fastlm {

// (tokens, heads, features): token t of head h is row t of a tensor that begins at h * head.
struct Heads {
  Rows rows;
  int64_t head;  // elements from one head to the next
};

struct Documents {
  Heads q, k, v;
  const int64_t *q_bounds, *k_bounds;         // (documents + 1,)
  int64_t documents, longest;                 // longer documents are left out
  int64_t heads, key_heads, features, total;  // heads are a multiple of key heads
  float scale;
  bool causal;  // aligned at the end
};

struct Attention {
  Documents given;
  Heads out;
  float* lse;  // (heads, total)
};

struct AttentionBackward {
  Documents given;
  Heads dout;
  const float* lse;
  Heads dq, dk, dv;
};

// Pairs [begin, end) of a document and a key head, counted document by document.
void attention_cpu(const Attention& call, int64_t begin, int64_t end);
void attention_backward_cpu(const AttentionBackward& call, int64_t begin, int64_t end);

}  // namespace fastlm
