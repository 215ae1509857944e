// Softmax and log-softmax on a CPU as ops on tensors. The Python op checks the arguments and allocates the outputs.
#include "softmax.h"
#include "tensor_utils.h"

#include <torch/csrc/stable/library.h>

#include <vector>

namespace fastlm {
namespace {

// The mask of kernels from a tensor of the input's shape, with adjacent dimensions collapsed where one stride covers
// both.
class MaskView {
 public:
  explicit MaskView(const OptionalTensor& mask) {
    if (!mask.has_value()) return;
    const int64_t last = mask->dim() - 1;
    for (int64_t d = 0; d < last; ++d) {
      const int64_t size = mask->size(d), stride = mask->stride(d);
      if (size == 1) continue;
      if (!sizes_.empty() && strides_.back() == size * stride) {
        sizes_.back() *= size;
        strides_.back() = stride;
      } else {
        sizes_.push_back(size);
        strides_.push_back(stride);
      }
    }
    const bool is_bool = mask->scalar_type() == ScalarType::Bool;
    mask_ = {.data = mask->data_ptr(),
             .is_bool = is_bool,
             .dtype = is_bool ? DType::kFloat32 : dtype_of(*mask),
             .dims = static_cast<int64_t>(sizes_.size()),
             .sizes = sizes_.data(),
             .strides = strides_.data(),
             .column_stride = mask->stride(last)};
  }
  MaskView(const MaskView&) = delete;
  const Mask& get() const { return mask_; }

 private:
  Mask mask_ = {};
  std::vector<int64_t> sizes_, strides_;
};

int64_t num_queries(const Tensor& x, bool causal) { return causal ? x.size(x.dim() - 2) : 0; }

void softmax_rows(Tensor x, OptionalTensor mask, double scale, bool causal, bool is_log, Tensor y) {
  const int64_t C = x.size(x.dim() - 1), N = x.numel() / C;
  const MaskView mask_view(mask);
  const SoftmaxParams params = {.x = rows_of(x, C),
                                .y = output_rows(y, C),
                                .mask = mask_view.get(),
                                .rows = N,
                                .columns = C,
                                .queries = num_queries(x, causal),
                                .scale = static_cast<float>(scale),
                                .is_log = is_log,
                                .non_temporal = use_non_temporal(y)};
  parallel_for(params, N, C, softmax_cpu);
}

void softmax_backward_rows(Tensor dy, Tensor y, OptionalTensor mask, double scale, bool causal, bool is_log,
                           OptionalTensor dx, OptionalTensor dmask) {
  const int64_t C = y.size(y.dim() - 1), N = y.numel() / C;
  const MaskView mask_view(mask);
  const SoftmaxBackwardParams params = {.dy = rows_of(dy, C),
                                        .y = rows_of(y, C),
                                        .dx = output_rows(dx, C),
                                        .dmask = output_rows(dmask, C),
                                        .mask = mask_view.get(),
                                        .rows = N,
                                        .columns = C,
                                        .queries = num_queries(y, causal),
                                        .scale = static_cast<float>(scale),
                                        .is_log = is_log,
                                        .non_temporal = use_non_temporal(y)};
  parallel_for(params, N, C, softmax_backward_cpu);
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastlm, library) {
  library.def("softmax_rows(Tensor x, Tensor? mask, float scale, bool causal, bool log, Tensor(a!) y) -> ()");
  library.def(
      "softmax_backward_rows(Tensor dy, Tensor y, Tensor? mask, float scale, bool causal, bool log, Tensor(a!)? dx, "
      "Tensor(b!)? dmask) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, library) {
  library.impl("softmax_rows", TORCH_BOX(&fastlm::softmax_rows));
  library.impl("softmax_backward_rows", TORCH_BOX(&fastlm::softmax_backward_rows));
}
