// What attention.cpp, which knows tensors, asks of the CPU kernels of varlen attention, which know pointers and sizes.
//
//     s_ij = softcap(scale q_i . k_j) - slope |i - j|,  p_ij = exp(s_ij - lse_i)            within each sequence
//     o_i = sum_j r_ij p_ij v_j                           r_ij: 0 or 1 / (1 - dropout_p)
//     dv_j = sum_i r_ij p_ij do_i,  dp_ij = r_ij do_i . v_j,  ds_ij = p_ij (dp_ij - delta_i),
//     delta_i = sum_j p_ij dp_ij - dlse_i
//
// The scores of a few queries at a time are formed, for the keys that any of them sees.
#pragma once

#include "dtype.h"

#include <cstdint>

namespace fastlm {

// (tokens, heads, head_dim): the vector of head h is row t of the rows that begin h * head_stride elements later.
struct Heads {
  Rows tokens;
  int64_t head_stride;
};

struct VarlenInputs {
  Heads q, k, v;
  const int64_t *cu_seqlens_q, *cu_seqlens_k;  // (num_seqs + 1,)
  int64_t num_seqs, max_seqlen;                // longer sequences are left out
  int64_t heads, kv_heads, head_dim, total_q;  // heads are a multiple of kv_heads
};

// How a product becomes a probability, and which keys a query sees.
struct ScoreOptions {
  float scale, softcap;               // softcap 0: none
  int64_t window_left, window_right;  // keys before and after the query's own position, aligned at the end; -1 for all
  const float *alibi_slopes, *sinks;  // (num_seqs, heads) and (heads,), or null
  const int64_t* seed;                // null for no dropout
  float dropout_p, dropout_scale;     // dropout_scale = 1 / (1 - dropout_p)

  // Whether a score is more than scale q . k, so that its row is rewritten before the softmax.
  bool has_score_mod() const { return softcap != 0.0f || alibi_slopes != nullptr || !(scale > 0.0f); }
};

struct AttentionParams {
  VarlenInputs inputs;
  ScoreOptions options;
  Heads out;
  float* lse;  // (heads, total_q)
};

struct AttentionBackwardParams {
  VarlenInputs inputs;
  ScoreOptions options;
  Heads dout;
  const float* lse;   // (heads, total_q)
  const float* dlse;  // (heads, total_q), or null for 0
  float* delta;       // (heads, total_q), or null
  float* dslope;      // (heads, total_q), what each query adds to the gradient of its slope, or null
  Heads dq, dk, dv;
};

// Units [begin, end): pairs of a sequence and a key head, counted sequence by sequence.
void attention_cpu(const AttentionParams& params, int64_t begin, int64_t end);
void attention_backward_cpu(const AttentionBackwardParams& params, int64_t begin, int64_t end);

}  // namespace fastlm
