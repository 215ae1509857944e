// Varlen attention on a CPU as ops on tensors. The Python op checks the arguments and allocates the outputs, which
// these ops fill for the sequences up to max_seqlen.
#include "attention.h"
#include "tensor_utils.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>

namespace fastlm {
namespace {

Heads heads_of(const Tensor& x) {
  return {.tokens = {.data = x.data_ptr(), .dtype = dtype_of(x), .stride = x.stride(0)}, .head_stride = x.stride(1)};
}

// The same of an output that was just allocated.
Heads output_heads(const Tensor& x) {
  advise_large_pages(x);
  return heads_of(x);
}

VarlenInputs inputs_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                       const Tensor& cu_seqlens_k, int64_t max_seqlen) {
  VarlenInputs inputs = {.q = heads_of(q),
                         .k = heads_of(k),
                         .v = heads_of(v),
                         .cu_seqlens_q = cu_seqlens_q.const_data_ptr<int64_t>(),
                         .cu_seqlens_k = cu_seqlens_k.const_data_ptr<int64_t>(),
                         .num_seqs = cu_seqlens_q.numel() - 1,
                         .max_seqlen = 0,
                         .heads = q.size(1),
                         .kv_heads = k.size(1),
                         .head_dim = q.size(2),
                         .total_q = q.size(0)};
  for (int64_t i = 0; i < inputs.num_seqs; ++i) {
    const int64_t length = std::max(inputs.cu_seqlens_q[i + 1] - inputs.cu_seqlens_q[i],
                                    inputs.cu_seqlens_k[i + 1] - inputs.cu_seqlens_k[i]);
    if (length <= max_seqlen) inputs.max_seqlen = std::max(inputs.max_seqlen, length);
  }
  return inputs;
}

ScoreOptions options_of(const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, const OptionalTensor& seed,
                        double scale, int64_t window_left, int64_t window_right, double softcap, double dropout_p) {
  return {.scale = static_cast<float>(scale),
          .softcap = static_cast<float>(softcap),
          .window_left = window_left,
          .window_right = window_right,
          .alibi_slopes = float_data(alibi_slopes),
          .sinks = float_data(sinks),
          .seed = seed.has_value() ? seed->const_data_ptr<int64_t>() : nullptr,
          .dropout_p = static_cast<float>(dropout_p),
          .dropout_scale = static_cast<float>(1.0 / (1.0 - dropout_p))};
}

int64_t num_multiplications(const VarlenInputs& inputs) {
  int64_t scores = 0;
  for (int64_t i = 0; i < inputs.num_seqs; ++i) {
    const int64_t queries = inputs.cu_seqlens_q[i + 1] - inputs.cu_seqlens_q[i];
    const int64_t keys = inputs.cu_seqlens_k[i + 1] - inputs.cu_seqlens_k[i];
    if (queries <= inputs.max_seqlen && keys <= inputs.max_seqlen) scores += queries * keys;
  }
  return scores * inputs.heads * inputs.head_dim;
}

// Calls kernel(params, begin, end) for all units. Sequences differ in length, so each thread takes the next few units
// when it is done with its last.
template <class Params>
void parallel_for_units(const Params& params, void (*kernel)(const Params&, int64_t, int64_t)) {
  constexpr int64_t kGrainSize = 1 << 18;  // multiplications: waking another thread for fewer costs more than it saves
  constexpr int64_t kTasksPerThread = 16;
  const int64_t threads =
      std::min<int64_t>(torch::stable::get_num_threads(), 1 + num_multiplications(params.inputs) / kGrainSize);
  const int64_t units = params.inputs.num_seqs * params.inputs.kv_heads;
  const int64_t task_units = 1 + units / (threads * kTasksPerThread);
  std::atomic<int64_t> next = 0;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(task_units)) < units;)
      kernel(params, begin, std::min(begin + task_units, units));
  });
}

void attention_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t max_seqlen,
                      OptionalTensor alibi_slopes, OptionalTensor sinks, OptionalTensor seed, double scale,
                      int64_t window_left, int64_t window_right, double softcap, double dropout_p, Tensor out,
                      Tensor lse) {
  const AttentionParams params = {
      .inputs = inputs_of(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen),
      .options = options_of(alibi_slopes, sinks, seed, scale, window_left, window_right, softcap, dropout_p),
      .out = output_heads(out),
      .lse = float_data(lse)};
  parallel_for_units(params, attention_cpu);
}

void attention_varlen_backward(Tensor dout, OptionalTensor dlse, Tensor lse, Tensor q, Tensor k, Tensor v,
                               Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t max_seqlen,
                               OptionalTensor alibi_slopes, OptionalTensor sinks, OptionalTensor seed, double scale,
                               int64_t window_left, int64_t window_right, double softcap, double dropout_p,
                               OptionalTensor delta, OptionalTensor dslope, Tensor dq, Tensor dk, Tensor dv) {
  const AttentionBackwardParams params = {
      .inputs = inputs_of(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen),
      .options = options_of(alibi_slopes, sinks, seed, scale, window_left, window_right, softcap, dropout_p),
      .dout = heads_of(dout),
      .lse = float_data(lse),
      .dlse = float_data(dlse),
      .delta = float_data(delta),
      .dslope = float_data(dslope),
      .dq = output_heads(dq),
      .dk = output_heads(dk),
      .dv = output_heads(dv)};
  parallel_for_units(params, attention_backward_cpu);
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastlm, library) {
  const std::string inputs_and_options =
      "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen, "
      "Tensor? alibi_slopes, Tensor? sinks, Tensor? seed, float scale, int window_left, int window_right, "
      "float softcap, float dropout_p, ";
  const std::string forward = "attention_varlen(" + inputs_and_options + "Tensor(a!) out, Tensor(b!) lse) -> ()";
  const std::string backward = "attention_varlen_backward(Tensor dout, Tensor? dlse, Tensor lse, " +
                               inputs_and_options +
                               "Tensor(a!)? delta, Tensor(b!)? dslope, Tensor(c!) dq, Tensor(d!) dk, Tensor(e!) dv) "
                               "-> ()";
  library.def(forward.c_str());
  library.def(backward.c_str());
}

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, library) {
  library.impl("attention_varlen", TORCH_BOX(&fastlm::attention_varlen));
  library.impl("attention_varlen_backward", TORCH_BOX(&fastlm::attention_varlen_backward));
}
