// What attention.cpp, which knows tensors, asks of the CPU kernels of packed attention, which know pointers and sizes.
//
//     s_ij = softcap(scale q_i . k_j) - slope |i - j|,  p_ij = exp(s_ij - lse_i)            within each document
//     o_i = sum_j r_ij p_ij v_j                           r_ij: 0 or 1 / (1 - dropout_p)
//     dv_j = sum_i r_ij p_ij do_i,  dp_ij = r_ij do_i . v_j,  ds_ij = p_ij (dp_ij - delta_i),
//     delta_i = sum_j p_ij dp_ij - dlse_i
//
// A few rows of a document's scores at a time are formed, as far as their queries see.
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
};

// How a product becomes a weight, and which keys a query sees.
struct Scoring {
  float scale, softcap;                        // 0 for none
  int64_t before, after;                       // keys before and after its own position, aligned at the end; -1 for all
  const float *slopes, *sinks;                 // (documents, heads) and (heads,); null for none
  const int64_t* seed;                         // null for no dropout
  float dropout_p, kept_factor;                // 1 / (1 - dropout_p)

  bool alters() const { return softcap != 0.0f || slopes != nullptr || !(scale > 0.0f); }
};

struct Attention {
  Documents given;
  Scoring scoring;
  Heads out;
  float* lse;  // (heads, total)
};

struct AttentionBackward {
  Documents given;
  Scoring scoring;
  Heads dout;
  const float *lse, *dlse;  // (heads, total), as the next two; dlse is null if it is 0
  float *delta, *shares;    // shares of the rows in the gradients of their slopes; null if there are none
  Heads dq, dk, dv;
};

// Pairs [begin, end) of a document and a key head, counted document by document.
void attention_cpu(const Attention& call, int64_t begin, int64_t end);
void attention_backward_cpu(const AttentionBackward& call, int64_t begin, int64_t end);

}  // namespace fastlm
