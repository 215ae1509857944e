// The CPU kernels of the norms, softmax, the activations and rotary as ops on tensors, against PyTorch's stable ABI alone.
//
// They are what the Triton launchers are on a GPU: fastlm/ops/_norm.py, softmax.py, activations.py and rotary.py check the
// arguments, lay the tensors out in rows, allocate the results, and then call one of these, which fill them.
#include "layers.h"
#include "tensors.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using fastlm::Rows;

constexpr int64_t kGrain = 1 << 14;  // elements of a task: below, to hand it to another thread costs more than it saves
constexpr int64_t kStreamed = 1 << 22;  // bytes
constexpr int64_t kChunks = 64;
constexpr int64_t kChunkRows = 16;  // at least, or the sums of the chunks cost more than the chunks

// The rows of a matrix, or of a contiguous tensor of so many columns.
Rows rows(const Tensor& tensor, int64_t columns) {
  return {tensor.data_ptr(), element(tensor), tensor.dim() == 2 ? tensor.stride(0) : columns};
}

Rows rows(const Optional& tensor, int64_t columns) {
  return tensor.has_value() ? rows(*tensor, columns) : Rows{nullptr, fastlm::Element::kFloat32, 0};
}

// The same of a tensor that was allocated for the results.
Rows fresh_rows(const Tensor& tensor, int64_t columns) {
  advise_large_pages(tensor);
  return rows(tensor, columns);
}

Rows fresh_rows(const Optional& tensor, int64_t columns) {
  return tensor.has_value() ? fresh_rows(*tensor, columns) : rows(tensor, columns);
}

float* floats(const Optional& tensor) {
  return tensor.has_value() ? static_cast<float*>(tensor->data_ptr()) : nullptr;
}

int64_t number_of_chunks(int64_t rows) {
  const int64_t filled = rows / kChunkRows;
  return filled < 1 ? 1 : filled < kChunks ? filled : kChunks;
}

// Results that no cache holds are stored round them, which spares reading lines that are wholly overwritten.
bool is_streamed(const Tensor& result) { return result.numel() * static_cast<int64_t>(result.element_size()) >= kStreamed; }

// Shares out units of so many elements.
template <class Call>
void share_out(const Call& call, int64_t units, int64_t elements, void (*kernel)(const Call&, int64_t, int64_t)) {
  torch::stable::parallel_for(0, units, 1 + kGrain / (elements + 1),
                              [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

int64_t pieces(int64_t rows, int64_t columns) { return rows * ((columns + fastlm::kPiece - 1) / fastlm::kPiece); }

// Memory for the chunks' partial sums of a gradient, and their sum.
class Partials {
 public:
  Partials(const Optional& total, const Tensor& like, int64_t chunks, int64_t columns)
      : total_(total), chunks_(chunks), columns_(columns) {
    if (total.has_value()) partials_ = torch::stable::new_empty(like, {chunks, columns}, ScalarType::Float);
  }
  float* data() const { return floats(partials_); }
  void sum() const {
    if (total_.has_value()) fastlm::chunk_sums_cpu({data(), rows(*total_, columns_), chunks_, columns_});
  }

 private:
  const Optional& total_;
  Optional partials_;
  int64_t chunks_, columns_;
};

void norm(Tensor x, Optional residual, Optional weight, Optional bias, double eps, Tensor y, Optional h, Optional mean,
          Tensor rstd) {
  const int64_t N = rstd.numel(), C = x.numel() / N;
  const fastlm::Norm call = {rows(x, C), rows(residual, C), fresh_rows(h, C), fresh_rows(y, C), floats(weight), floats(bias),
                             floats(mean), floats(rstd), N, C, static_cast<float>(eps)};
  share_out(call, N, C, fastlm::norm_cpu);
}

void norm_backward(Tensor dy, Optional dsum, Tensor h, Optional weight, Optional mean, Tensor rstd, Optional dx,
                   Optional dresidual, Optional dweight, Optional dbias) {
  const int64_t N = rstd.numel(), C = h.numel() / N;
  const bool has_sums = dweight.has_value() || dbias.has_value();
  const int64_t chunks = has_sums ? number_of_chunks(N) : N;
  const Partials dweights(dweight, h, chunks, C), dbiases(dbias, h, chunks, C);
  const fastlm::NormBackward call = {rows(dy, C), rows(dsum, C), rows(h, C), fresh_rows(dx, C), fresh_rows(dresidual, C),
                                     floats(weight), floats(mean), floats(rstd), dweights.data(), dbiases.data(),
                                     N, C, chunks};
  share_out(call, chunks, N / chunks * C, fastlm::norm_backward_cpu);
  dweights.sum();
  dbiases.sum();
}

// A mask of the shape of the input, and the dimensions before the last through which its rows count.
class MaskRows {
 public:
  explicit MaskRows(const Optional& mask) {
    if (!mask.has_value()) return;
    const int64_t last = mask->dim() - 1;
    for (int64_t d = 0; d < last; ++d) {
      const int64_t size = mask->size(d), stride = mask->stride(d);
      if (size == 1) continue;
      if (!sizes_.empty() && strides_.back() == size * stride) {  // one dimension in all but name
        sizes_.back() *= size;
        strides_.back() = stride;
      } else {
        sizes_.push_back(size);
        strides_.push_back(stride);
      }
    }
    const bool boolean = mask->scalar_type() == ScalarType::Bool;
    mask_ = {mask->data_ptr(), boolean, boolean ? fastlm::Element::kFloat32 : element(*mask), 0, nullptr, nullptr,
             mask->stride(last)};
  }
  fastlm::Mask get() const {
    fastlm::Mask mask = mask_;
    mask.dims = sizes_.size();
    mask.sizes = sizes_.data();
    mask.strides = strides_.data();
    return mask;
  }

 private:
  fastlm::Mask mask_ = {};
  std::vector<int64_t> sizes_, strides_;
};

int64_t queries(const Tensor& x, bool causal) { return causal ? x.size(x.dim() - 2) : 0; }

void softmax(Tensor x, Optional mask, double scale, bool causal, bool log, Tensor y) {
  const int64_t C = x.size(x.dim() - 1), N = x.numel() / C;
  const MaskRows masks(mask);
  const fastlm::Softmax call = {rows(x, C), fresh_rows(y, C), masks.get(), N, C, queries(x, causal),
                                static_cast<float>(scale), log, is_streamed(y)};
  share_out(call, N, C, fastlm::softmax_cpu);
}

void softmax_backward(Tensor dy, Tensor y, Optional mask, double scale, bool causal, bool log, Optional dx, Optional dmask) {
  const int64_t C = y.size(y.dim() - 1), N = y.numel() / C;
  const MaskRows masks(mask);
  const fastlm::SoftmaxBackward call = {rows(dy, C), rows(y, C), fresh_rows(dx, C), fresh_rows(dmask, C), masks.get(), N, C,
                                        queries(y, causal), static_cast<float>(scale), log, is_streamed(y)};
  share_out(call, N, C, fastlm::softmax_backward_cpu);
}

void gelu(int64_t N, Tensor x, Optional bias, bool tanh, Tensor y) {
  const int64_t C = x.numel() / N;
  const fastlm::Gelu call = {rows(x, C), fresh_rows(y, C), floats(bias), N, C, tanh};
  share_out(call, pieces(N, C), fastlm::kPiece, fastlm::gelu_cpu);
}

void gelu_backward(int64_t N, Tensor dy, Tensor x, Optional bias, bool tanh, Optional dx, Optional dbias) {
  const int64_t C = x.numel() / N;
  const int64_t chunks = dbias.has_value() ? number_of_chunks(N) : pieces(N, C);
  const Partials dbiases(dbias, x, chunks, C);
  const fastlm::GeluBackward call = {rows(dy, C), rows(x, C), fresh_rows(dx, C), floats(bias), dbiases.data(), N, C, chunks,
                                     tanh};
  share_out(call, chunks, N * C / chunks, fastlm::gelu_backward_cpu);
  dbiases.sum();
}

void swiglu(int64_t N, Tensor gate, Tensor up, Tensor y) {
  const int64_t C = gate.numel() / N;
  const fastlm::Swiglu call = {rows(gate, C), rows(up, C), fresh_rows(y, C), N, C};
  share_out(call, pieces(N, C), fastlm::kPiece, fastlm::swiglu_cpu);
}

void swiglu_backward(int64_t N, Tensor dy, Tensor gate, Tensor up, Optional dgate, Optional dup) {
  const int64_t C = gate.numel() / N;
  const fastlm::SwigluBackward call = {rows(dy, C), rows(gate, C), rows(up, C), fresh_rows(dgate, C), fresh_rows(dup, C), N, C};
  share_out(call, pieces(N, C), fastlm::kPiece, fastlm::swiglu_backward_cpu);
}

void check_positions(const int64_t* positions, int64_t count, int64_t end) {
  for (int64_t i = 0; i < count; ++i)
    if (positions[i] < 0 || positions[i] >= end)
      throw std::out_of_range("apply_rotary: position " + std::to_string(positions[i]) + " is out of bounds, cos has " +
                              std::to_string(end) + " positions");
}

void rotary(Tensor x, Tensor cos, Tensor sin, Optional positions, bool interleaved, bool inverse, Tensor y) {
  const int64_t B = x.size(0), T = x.size(1), H = x.size(2), C = x.size(3), pairs = cos.size(1);
  const auto* given = positions.has_value() ? positions->const_data_ptr<int64_t>() : nullptr;
  if (given != nullptr) check_positions(given, B * T, cos.size(0));
  if (y.data_ptr() != x.data_ptr()) advise_large_pages(y);
  const fastlm::Rotary call = {{x.data_ptr(), element(x), x.stride(2)}, {y.data_ptr(), element(y), y.stride(2)},
                               x.stride(0), x.stride(1), y.stride(0), y.stride(1), rows(cos, pairs), rows(sin, pairs),
                               given, B, T, H, C, pairs, interleaved, inverse,
                               is_streamed(y) && y.data_ptr() != x.data_ptr()};
  share_out(call, B * T, H * C, fastlm::rotary_cpu);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastlm, library) {
  library.def(
      "norm_rows(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, Tensor(a!) y, Tensor(b!)? h, "
      "Tensor(c!)? mean, Tensor(d!) rstd) -> ()");
  library.def(
      "norm_backward_rows(Tensor dy, Tensor? dsum, Tensor h, Tensor? weight, Tensor? mean, Tensor rstd, "
      "Tensor(a!)? dx, Tensor(b!)? dresidual, Tensor(c!)? dweight, Tensor(d!)? dbias) -> ()");
  library.def(
      "softmax_rows(Tensor x, Tensor? mask, float scale, bool causal, bool log, Tensor(a!) y) -> ()");
  library.def(
      "softmax_backward_rows(Tensor dy, Tensor y, Tensor? mask, float scale, bool causal, bool log, Tensor(a!)? dx, "
      "Tensor(b!)? dmask) -> ()");
  library.def("gelu_rows(int N, Tensor x, Tensor? bias, bool tanh, Tensor(a!) y) -> ()");
  library.def(
      "gelu_backward_rows(int N, Tensor dy, Tensor x, Tensor? bias, bool tanh, Tensor(a!)? dx, Tensor(b!)? dbias) "
      "-> ()");
  library.def("swiglu_rows(int N, Tensor gate, Tensor up, Tensor(a!) y) -> ()");
  library.def(
      "swiglu_backward_rows(int N, Tensor dy, Tensor gate, Tensor up, Tensor(a!)? dgate, Tensor(b!)? dup) -> ()");
  library.def(
      "rotary_rows(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse, Tensor(a!) y) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, library) {
  library.impl("norm_rows", TORCH_BOX(&norm));
  library.impl("norm_backward_rows", TORCH_BOX(&norm_backward));
  library.impl("softmax_rows", TORCH_BOX(&softmax));
  library.impl("softmax_backward_rows", TORCH_BOX(&softmax_backward));
  library.impl("gelu_rows", TORCH_BOX(&gelu));
  library.impl("gelu_backward_rows", TORCH_BOX(&gelu_backward));
  library.impl("swiglu_rows", TORCH_BOX(&swiglu));
  library.impl("swiglu_backward_rows", TORCH_BOX(&swiglu_backward));
  library.impl("rotary_rows", TORCH_BOX(&rotary));
}
