// The raw cross entropy ops: every argument check, allocation, and the way to the kernels.
//
// Built twice, each time against PyTorch's stable ABI alone: into _cpu.so, and with FASTLM_CUDA into _cuda.so. Their
// schemas are defined in fastlm/ops/cross_entropy.py, beside the PyTorch code that serves where no library is loaded.
#include "cross_entropy.h"
#include "tensors.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef FASTLM_CUDA
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <cuda_runtime_api.h>
#endif

#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// PyTorch hands std::invalid_argument to Python as ValueError and std::out_of_range as IndexError; STD_TORCH_CHECK's
// errors would be RuntimeError. No standard exception becomes TypeError.
template <class Error, class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

std::string shape(const Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << (tensor.dim() == 1 ? ",)" : ")");
  return text.str();
}

void check_same_device(const Tensor& tensor, const char* name, const Tensor& input) {
  if (tensor.is_cuda() != input.is_cuda() || tensor.get_device_index() != input.get_device_index())
    refuse<std::invalid_argument>("cross_entropy: ", name, " and input are on different devices, expected the same");
}

// What shapes the loss and is the same for all rows.
struct Options {
  int64_t ignore_index;
  int64_t num_classes;
  int64_t first_class;
  int64_t total_classes;
  double label_smoothing;
  double z_loss;
  double softcap;
};

void check_shapes(const Tensor& input, const Tensor& target, const Options& options) {
  if (input.dim() != 2) refuse<std::invalid_argument>("cross_entropy: input has shape ", shape(input), ", expected (N, V)");
  if (target.dim() != 1 || target.size(0) != input.size(0))
    refuse<std::invalid_argument>("cross_entropy: target has shape ", shape(target), ", expected (", input.size(0),
                                  ",) to match the rows of input ", shape(input));
  if (target.scalar_type() != ScalarType::Long && target.scalar_type() != ScalarType::Int)
    refuse<std::invalid_argument>("cross_entropy: target is ", torch::headeronly::toString(target.scalar_type()),
                                  ", expected Long or Int class numbers");
  if (options.num_classes < 0 || options.num_classes > input.size(1))
    refuse<std::invalid_argument>("cross_entropy: num_classes is ", options.num_classes, ", expected 0 to ", input.size(1),
                                  ", the columns of input");
  if (options.first_class < 0 || options.first_class + options.num_classes > options.total_classes)
    refuse<std::invalid_argument>("cross_entropy: classes ", options.first_class, " to ",
                                  options.first_class + options.num_classes, " are not among the ",
                                  options.total_classes, " of the whole vocabulary");
  check_same_device(target, "target", input);
}

void check_float(const Tensor& tensor, const char* name, const Tensor& input) {
  if (tensor.scalar_type() != ScalarType::Float)
    refuse<std::invalid_argument>("cross_entropy: ", name, " is ", torch::headeronly::toString(tensor.scalar_type()),
                                  ", expected Float");
  check_same_device(tensor, name, input);
}

void check_weight(const Tensor& weight, const Tensor& input, int64_t num_classes) {
  check_float(weight, "weight", input);
  if (weight.dim() != 1 || weight.size(0) < num_classes)
    refuse<std::invalid_argument>("cross_entropy: weight has shape ", shape(weight), ", expected (", num_classes,
                                  ",), one for each class");
}

void check_parts(const Tensor& parts, const Tensor& input) {
  check_float(parts, "parts", input);
  if (parts.dim() != 3 || parts.size(1) != input.size(0) || parts.size(2) != fastlm::kPartFloats)
    refuse<std::invalid_argument>("cross_entropy: parts have shape ", shape(parts), ", expected (shards, ", input.size(0),
                                  ", ", fastlm::kPartFloats, ") as cross_entropy_part gives them for each shard");
}

// 0 if one scale serves all rows, 1 if there is one for each.
int64_t checked_scale_stride(const Tensor& scale, const Tensor& input) {
  check_float(scale, "scale", input);
  if (scale.numel() != 1 && (scale.dim() != 1 || scale.size(0) != input.size(0)))
    refuse<std::invalid_argument>("cross_entropy: scale has shape ", shape(scale), ", expected one element or (",
                                  input.size(0), ",) to match the rows of input");
  return scale.numel() == 1 ? 0 : 1;
}

// Rows may be any number of elements apart, but a kernel that writes them needs each element to itself.
void check_writable_rows(const Tensor& input) {
  if (input.dim() != 2) refuse<std::invalid_argument>("cross_entropy: input has shape ", shape(input), ", expected (N, V)");
  const bool rows_apart = input.size(0) <= 1 || input.stride(0) >= input.size(1);
  if ((input.size(1) > 1 && input.stride(1) != 1) || !rows_apart)
    refuse<std::invalid_argument>("cross_entropy: input of shape ", shape(input), " and strides (", input.stride(0), ", ",
                                  input.stride(1), ") cannot be overwritten, expected rows that are contiguous and do "
                                  "not overlap; pass input.contiguous()");
}

#ifdef FASTLM_CUDA

void* current_stream(const Tensor& input) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(input.get_device_index(), &stream));
  return stream;
}

// Targets are checked by the kernel: the host does not wait for the device.
void check_targets(const fastlm::CrossEntropy&) {}

void run(const fastlm::CrossEntropy& call, const Tensor& input) {
  torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  STD_CUDA_CHECK(static_cast<cudaError_t>(fastlm::cross_entropy_cuda(call, current_stream(input))));
}

void run(const fastlm::ScaleRows& call, const Tensor& input) {
  torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  STD_CUDA_CHECK(static_cast<cudaError_t>(fastlm::scale_rows_cuda(call, current_stream(input))));
}

#else

void check_targets(const fastlm::CrossEntropy& call) {
  for (int64_t row = 0; row < call.rows; ++row) {
    const int64_t target = call.target[row];
    if (target != call.ignore_index && (target < 0 || target >= call.total_classes))
      refuse<std::out_of_range>("cross_entropy: target ", target, " at row ", row, " is out of bounds, expected 0 to ",
                                call.total_classes - 1, " or ignore_index ", call.ignore_index);
  }
}

// Rows for one task: about 32 Ki elements, below which handing it to another thread costs more than it saves.
int64_t grain(int64_t columns) { return 1 + (int64_t{1} << 15) / (columns + 1); }

// Few rows are cut into slices, so that every thread has work; the bits are the same either way.
void run_in_slices(fastlm::CrossEntropy call, const Tensor& input, int64_t slices) {
  Tensor parts = torch::stable::new_empty(input, {slices * call.rows * fastlm::kPartFloats}, ScalarType::Float);
  auto* made = reinterpret_cast<fastlm::Part*>(parts.mutable_data_ptr<float>());
  torch::stable::parallel_for(0, slices * call.rows, 1, [&](int64_t begin, int64_t end) {
    fastlm::slice_parts_cpu(call, made, begin, end);
  });
  call.given_parts = made;
  call.num_given = slices;
  torch::stable::parallel_for(0, slices * call.rows, 1, [&](int64_t begin, int64_t end) {
    fastlm::slice_gradients_cpu(call, begin, end);
  });
}

void run(const fastlm::CrossEntropy& call, const Tensor& input) {
  const int64_t slices = fastlm::slices_cpu(call);
  const bool few_rows = call.rows < 2 * static_cast<int64_t>(torch::stable::get_num_threads());
  if (few_rows && slices > 1 && call.parts == nullptr && call.given_parts == nullptr)
    return run_in_slices(call, input, slices);
  torch::stable::parallel_for(0, call.rows, grain(call.columns), [&](int64_t begin, int64_t end) {
    fastlm::cross_entropy_cpu(call, begin, end);
  });
}

void run(const fastlm::ScaleRows& call, const Tensor&) {
  torch::stable::parallel_for(0, call.rows, grain(call.columns), [&](int64_t begin, int64_t end) {
    fastlm::scale_rows_cpu(call, begin, end);
  });
}

#endif

// A call with everything that its results do not decide; keeps alive the tensors whose memory it points to.
class Call {
 public:
  Call(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight, const Options& options)
      : input_(input), classes_(torch::stable::contiguous(torch::stable::to(target, ScalarType::Long))) {
    call_.element = element(input, "cross_entropy: input");
    call_.input = input.data_ptr();
    call_.input_stride = input.stride(0);
    call_.target = classes_.const_data_ptr<int64_t>();
    if (weight.has_value()) {
      check_weight(*weight, input, options.num_classes);
      call_.weight = keep(weight_, *weight);
    }
    call_.rows = input.size(0);
    call_.columns = input.size(1);
    call_.num_classes = options.num_classes;
    call_.first_class = options.first_class;
    call_.total_classes = options.total_classes;
    call_.ignore_index = options.ignore_index;
    call_.label_smoothing = static_cast<float>(options.label_smoothing);
    call_.z_loss = static_cast<float>(options.z_loss);
    call_.softcap = static_cast<float>(options.softcap);
    check_targets(call_);
  }

  // (shards, rows, kPartFloats) of the whole vocabulary, of which input is one shard.
  void take_parts(const std::optional<Tensor>& parts) {
    if (!parts.has_value()) return;
    check_parts(*parts, input_);
    call_.given_parts = reinterpret_cast<const fastlm::Part*>(keep(parts_, *parts));
    call_.num_given = parts->size(0);
  }

  // The gradient is there already, made for an upstream gradient of 1.
  void take_upstream(const Tensor& upstream) {
    call_.upstream_stride = checked_scale_stride(upstream, input_);
    call_.upstream = keep(upstream_, upstream);
  }

  Tensor losses(const Tensor* gradient, const std::optional<Tensor>& scale) {
    Tensor losses = torch::stable::new_empty(input_, {call_.rows}, ScalarType::Float);
    call_.losses = losses.mutable_data_ptr<float>();
    if (scale.has_value()) {
      call_.scale_stride = checked_scale_stride(*scale, input_);
      call_.scale = keep(scale_, *scale);
    }
    if (gradient != nullptr) {
      call_.gradient = gradient->data_ptr();
      call_.gradient_stride = gradient->stride(0);
    }
    if (call_.rows > 0) run(call_, input_);
    return losses;
  }

  Tensor part() {
    Tensor part = torch::stable::new_empty(input_, {call_.rows, fastlm::kPartFloats}, ScalarType::Float);
    call_.parts = reinterpret_cast<fastlm::Part*>(part.mutable_data_ptr<float>());
    if (call_.rows > 0) run(call_, input_);
    return part;
  }

 private:
  static const float* keep(std::optional<Tensor>& kept, const Tensor& tensor) {
    kept = torch::stable::contiguous(tensor);
    return kept->const_data_ptr<float>();
  }

  fastlm::CrossEntropy call_ = {};
  Tensor input_, classes_;
  std::optional<Tensor> weight_, scale_, upstream_, parts_;
};

Tensor with_contiguous_rows(const Tensor& input) {
  return input.size(1) > 1 && input.stride(1) != 1 ? torch::stable::contiguous(input) : input;
}

std::tuple<Tensor, Tensor> cross_entropy(Tensor input, Tensor target, std::optional<Tensor> weight,
                                         std::optional<Tensor> scale, std::optional<Tensor> parts, int64_t ignore_index,
                                         int64_t num_classes, int64_t first_class, int64_t total_classes,
                                         double label_smoothing, double z_loss, double softcap, bool with_gradient) {
  const Options options = {ignore_index, num_classes, first_class, total_classes, label_smoothing, z_loss, softcap};
  check_shapes(input, target, options);
  Call call(with_contiguous_rows(input), target, weight, options);
  call.take_parts(parts);
  if (!with_gradient) return {call.losses(nullptr, scale), torch::stable::new_empty(input, {0})};
  Tensor gradient = torch::stable::new_empty(input, {input.size(0), input.size(1)});
  advise_large_pages(gradient);
  return {call.losses(&gradient, scale), gradient};
}

Tensor cross_entropy_(Tensor input, Tensor target, std::optional<Tensor> weight, std::optional<Tensor> scale,
                      std::optional<Tensor> parts, int64_t ignore_index, int64_t num_classes, int64_t first_class,
                      int64_t total_classes, double label_smoothing, double z_loss, double softcap) {
  const Options options = {ignore_index, num_classes, first_class, total_classes, label_smoothing, z_loss, softcap};
  check_shapes(input, target, options);
  check_writable_rows(input);
  Call call(input, target, weight, options);
  call.take_parts(parts);
  return call.losses(&input, scale);
}

void cross_entropy_again_(Tensor gradient, Tensor input, Tensor target, std::optional<Tensor> weight,
                          std::optional<Tensor> scale, Tensor upstream, int64_t ignore_index, int64_t num_classes,
                          int64_t first_class, int64_t total_classes, double label_smoothing, double z_loss,
                          double softcap) {
  const Options options = {ignore_index, num_classes, first_class, total_classes, label_smoothing, z_loss, softcap};
  check_shapes(input, target, options);
  check_writable_rows(gradient);
  if (gradient.size(0) != input.size(0) || gradient.size(1) != input.size(1) ||
      gradient.scalar_type() != input.scalar_type())
    refuse<std::invalid_argument>("cross_entropy: gradient has shape ", shape(gradient), ", expected the shape ",
                                  shape(input), " and the dtype of input");
  check_same_device(gradient, "gradient", input);
  Call call(with_contiguous_rows(input), target, weight, options);
  call.take_upstream(upstream);
  call.losses(&gradient, scale);
}

Tensor cross_entropy_part(Tensor input, Tensor target, std::optional<Tensor> weight, int64_t ignore_index,
                          int64_t num_classes, int64_t first_class, int64_t total_classes, double label_smoothing,
                          double z_loss, double softcap) {
  const Options options = {ignore_index, num_classes, first_class, total_classes, label_smoothing, z_loss, softcap};
  check_shapes(input, target, options);
  return Call(with_contiguous_rows(input), target, weight, options).part();
}

void scale_rows_(Tensor input, Tensor scale) {
  check_writable_rows(input);
  fastlm::ScaleRows call = {};
  call.element = element(input, "cross_entropy: input");
  call.scale_stride = checked_scale_stride(scale, input);
  Tensor factors = torch::stable::contiguous(scale);
  call.scale = factors.const_data_ptr<float>();
  call.input = input.data_ptr();
  call.stride = input.stride(0);
  call.rows = input.size(0);
  call.columns = input.size(1);
  if (call.rows > 0) run(call, input);
}

}  // namespace

#ifdef FASTLM_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastlm, CUDA, library) {
#else
STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, library) {
#endif
  library.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  library.impl("cross_entropy_", TORCH_BOX(&cross_entropy_));
  library.impl("cross_entropy_again_", TORCH_BOX(&cross_entropy_again_));
  library.impl("cross_entropy_part", TORCH_BOX(&cross_entropy_part));
  library.impl("scale_rows_", TORCH_BOX(&scale_rows_));
  library.impl("advise_large_pages", TORCH_BOX(&advise_large_pages));
}
