// The CPU kernels of packed attention as ops on tensors, against PyTorch's stable ABI alone.
//
// fastlm/ops/attention.py checks the arguments and allocates the results, which these fill for documents up to a limit.
#include "attention.h"
#include "tensors.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>

namespace {

using fastlm::Heads;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t kGrain = 1 << 18;  // multiplications: below, to wake another thread costs more than it saves
constexpr int64_t kShares = 16;      // of a thread: documents differ in length, and who is done early takes more

Heads heads(const Tensor& x) { return {{x.data_ptr(), element(x), x.stride(0)}, x.stride(1)}; }

// The same of a tensor that was allocated for results.
Heads fresh_heads(const Tensor& x) {
  advise_large_pages(x);
  return heads(x);
}

fastlm::Documents documents(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_bounds,
                            const Tensor& k_bounds, int64_t limit) {
  fastlm::Documents call = {heads(q),  heads(k),  heads(v),  q_bounds.const_data_ptr<int64_t>(),
                            k_bounds.const_data_ptr<int64_t>(), q_bounds.numel() - 1, 0,
                            q.size(1), k.size(1), q.size(2), q.size(0)};
  for (int64_t i = 0; i < call.documents; ++i) {
    const int64_t length = std::max(call.q_bounds[i + 1] - call.q_bounds[i], call.k_bounds[i + 1] - call.k_bounds[i]);
    if (length <= limit) call.longest = std::max(call.longest, length);
  }
  return call;
}

float* floats(const Optional& x) { return x.has_value() ? static_cast<float*>(x->data_ptr()) : nullptr; }

fastlm::Scoring scoring(const Optional& slopes, const Optional& sinks, const Optional& seed, double scale,
                        int64_t before, int64_t after, double softcap, double dropout_p) {
  return {static_cast<float>(scale), static_cast<float>(softcap), before, after, floats(slopes), floats(sinks),
          seed.has_value() ? seed->const_data_ptr<int64_t>() : nullptr, static_cast<float>(dropout_p),
          static_cast<float>(1.0 / (1.0 - dropout_p))};
}

template <class Call>
void share_out(const Call& call, void (*kernel)(const Call&, int64_t, int64_t)) {
  const fastlm::Documents& given = call.given;
  int64_t pairs = 0;  // of tokens
  for (int64_t i = 0; i < given.documents; ++i) {
    const int64_t queries = given.q_bounds[i + 1] - given.q_bounds[i], keys = given.k_bounds[i + 1] - given.k_bounds[i];
    if (queries <= given.longest && keys <= given.longest) pairs += queries * keys;
  }
  const int64_t useful = 1 + pairs * given.heads * given.features / kGrain;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), useful);
  const int64_t units = given.documents * given.key_heads, share = 1 + units / (threads * kShares);
  std::atomic<int64_t> next = 0;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(share)) < units;) kernel(call, begin, std::min(begin + share, units));
  });
}

void attention(Tensor q, Tensor k, Tensor v, Tensor q_bounds, Tensor k_bounds, int64_t limit, Optional slopes,
               Optional sinks, Optional seed, double scale, int64_t before, int64_t after, double softcap,
               double dropout_p, Tensor out, Tensor lse) {
  const fastlm::Attention call = {documents(q, k, v, q_bounds, k_bounds, limit),
                                  scoring(slopes, sinks, seed, scale, before, after, softcap, dropout_p),
                                  fresh_heads(out), static_cast<float*>(lse.data_ptr())};
  share_out(call, fastlm::attention_cpu);
}

void attention_backward(Tensor dout, Optional dlse, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor q_bounds,
                        Tensor k_bounds, int64_t limit, Optional slopes, Optional sinks, Optional seed, double scale,
                        int64_t before, int64_t after, double softcap, double dropout_p, Optional delta,
                        Optional shares, Tensor dq, Tensor dk, Tensor dv) {
  const fastlm::AttentionBackward call = {documents(q, k, v, q_bounds, k_bounds, limit),
                                          scoring(slopes, sinks, seed, scale, before, after, softcap, dropout_p),
                                          heads(dout),
                                          lse.const_data_ptr<float>(),
                                          floats(dlse),
                                          floats(delta),
                                          floats(shares),
                                          fresh_heads(dq),
                                          fresh_heads(dk),
                                          fresh_heads(dv)};
  share_out(call, fastlm::attention_backward_cpu);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastlm, library) {
#define DOCUMENTS "Tensor q, Tensor k, Tensor v, Tensor q_bounds, Tensor k_bounds, int limit, "
#define SCORING                                                                                                     \
  "Tensor? slopes, Tensor? sinks, Tensor? seed, float scale, int before, int after, float softcap, float dropout_p, "
  library.def("attention_of_documents(" DOCUMENTS SCORING "Tensor(a!) out, Tensor(b!) lse) -> ()");
  library.def("attention_of_documents_backward(Tensor dout, Tensor? dlse, Tensor lse, " DOCUMENTS SCORING
              "Tensor(a!)? delta, Tensor(b!)? shares, Tensor(c!) dq, Tensor(d!) dk, Tensor(e!) dv) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, library) {
  library.impl("attention_of_documents", TORCH_BOX(&attention));
  library.impl("attention_of_documents_backward", TORCH_BOX(&attention_backward));
}
