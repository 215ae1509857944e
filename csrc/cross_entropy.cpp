// The raw cross entropy ops on tensors: they check every argument, allocate the results and launch the kernels.
//
// Built twice: into _cpu.so, and with FASTLM_CUDA into _cuda.so. The schemas are defined in
// fastlm/ops/cross_entropy.py, beside the PyTorch code that runs where no library is loaded.
#include "cross_entropy.h"
#include "tensor_utils.h"

#include <torch/csrc/stable/library.h>

#ifdef FASTLM_CUDA
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <cuda_runtime_api.h>
#endif

#include <sstream>
#include <tuple>

namespace fastlm {
namespace {

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

// The arguments of the loss that are the same for all rows.
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
  if (input.dim() != 2)
    refuse<std::invalid_argument>("cross_entropy: input has shape ", shape(input), ", expected (N, V)");
  if (target.dim() != 1 || target.size(0) != input.size(0))
    refuse<std::invalid_argument>("cross_entropy: target has shape ", shape(target), ", expected (", input.size(0),
                                  ",) to match the rows of input ", shape(input));
  if (target.scalar_type() != ScalarType::Long && target.scalar_type() != ScalarType::Int)
    refuse<std::invalid_argument>("cross_entropy: target is ", torch::headeronly::toString(target.scalar_type()),
                                  ", expected Long or Int class numbers");
  if (options.num_classes < 0 || options.num_classes > input.size(1))
    refuse<std::invalid_argument>("cross_entropy: num_classes is ", options.num_classes, ", expected 0 to ",
                                  input.size(1), ", the columns of input");
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

void check_partial_stats(const Tensor& parts, const Tensor& input) {
  check_float(parts, "parts", input);
  if (parts.dim() != 3 || parts.size(1) != input.size(0) || parts.size(2) != kPartialStatsFloats)
    refuse<std::invalid_argument>("cross_entropy: parts have shape ", shape(parts), ", expected (shards, ",
                                  input.size(0), ", ", kPartialStatsFloats,
                                  ") as cross_entropy_part gives them for each shard");
}

// 0 if there is one scale for all rows, 1 if there is one for each.
int64_t checked_scale_stride(const Tensor& scale, const Tensor& input) {
  check_float(scale, "scale", input);
  if (scale.numel() != 1 && (scale.dim() != 1 || scale.size(0) != input.size(0)))
    refuse<std::invalid_argument>("cross_entropy: scale has shape ", shape(scale), ", expected one element or (",
                                  input.size(0), ",) to match the rows of input");
  return scale.numel() == 1 ? 0 : 1;
}

// A kernel that writes rows needs them contiguous and disjoint; any distance between them will do.
void check_writable_rows(const Tensor& input) {
  if (input.dim() != 2)
    refuse<std::invalid_argument>("cross_entropy: input has shape ", shape(input), ", expected (N, V)");
  const bool rows_apart = input.size(0) <= 1 || input.stride(0) >= input.size(1);
  if ((input.size(1) > 1 && input.stride(1) != 1) || !rows_apart)
    refuse<std::invalid_argument>("cross_entropy: input of shape ", shape(input), " and strides (", input.stride(0),
                                  ", ", input.stride(1),
                                  ") cannot be overwritten, expected rows that are contiguous and do "
                                  "not overlap; pass input.contiguous()");
}

#ifdef FASTLM_CUDA

void* current_stream(const Tensor& input) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(input.get_device_index(), &stream));
  return stream;
}

// The kernel checks the targets: the host must not wait for the device.
void check_targets(const CrossEntropyParams&) {}

void run(const CrossEntropyParams& params, const Tensor& input) {
  torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  STD_CUDA_CHECK(static_cast<cudaError_t>(cross_entropy_cuda(params, current_stream(input))));
}

void run(const ScaleRowsParams& params, const Tensor& input) {
  torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  STD_CUDA_CHECK(static_cast<cudaError_t>(scale_rows_cuda(params, current_stream(input))));
}

#else

void check_targets(const CrossEntropyParams& params) {
  for (int64_t row = 0; row < params.rows; ++row) {
    const int64_t target = params.target[row];
    if (target != params.ignore_index && (target < 0 || target >= params.total_classes))
      refuse<std::out_of_range>("cross_entropy: target ", target, " at row ", row, " is out of bounds, expected 0 to ",
                                params.total_classes - 1, " or ignore_index ", params.ignore_index);
  }
}

constexpr int64_t kGrainSize = 1 << 15;  // elements: handing a smaller task to another thread costs more than it saves

int64_t grain_rows(int64_t columns) { return 1 + kGrainSize / (columns + 1); }

// Few rows are cut into slices, so that every thread has work; the bits are the same either way.
void run_in_slices(CrossEntropyParams params, const Tensor& input, int64_t slices) {
  Tensor memory = torch::stable::new_empty(input, {slices * params.rows * kPartialStatsFloats}, ScalarType::Float);
  auto* stats = reinterpret_cast<PartialStats*>(memory.mutable_data_ptr<float>());
  torch::stable::parallel_for(0, slices * params.rows, 1,
                              [&](int64_t begin, int64_t end) { slice_stats_cpu(params, stats, begin, end); });
  params.partial_stats = stats;
  params.num_partial_stats = slices;
  torch::stable::parallel_for(0, slices * params.rows, 1,
                              [&](int64_t begin, int64_t end) { slice_gradients_cpu(params, begin, end); });
}

void run(const CrossEntropyParams& params, const Tensor& input) {
  const int64_t slices = (params.num_classes + kSlice - 1) / kSlice;
  const bool has_few_rows = params.rows < 2 * static_cast<int64_t>(torch::stable::get_num_threads());
  // Slices of a row run at the same time: where the gradient is narrow, one would overwrite what others have to read.
  const bool is_narrow = params.dtype != params.gradient_dtype;
  if (has_few_rows && slices > 1 && !is_narrow && params.partial_stats_out == nullptr &&
      params.partial_stats == nullptr)
    return run_in_slices(params, input, slices);
  torch::stable::parallel_for(0, params.rows, grain_rows(params.columns),
                              [&](int64_t begin, int64_t end) { cross_entropy_cpu(params, begin, end); });
}

void run(const ScaleRowsParams& params, const Tensor&) {
  torch::stable::parallel_for(0, params.rows, grain_rows(params.columns),
                              [&](int64_t begin, int64_t end) { scale_rows_cpu(params, begin, end); });
}

#endif

// The parameters of the kernels but for their outputs, and the tensors whose memory they point to.
class Call {
 public:
  Call(const Tensor& input, const Tensor& target, const OptionalTensor& weight, const Options& options)
      : input_(input), classes_(torch::stable::contiguous(torch::stable::to(target, ScalarType::Long))) {
    params_.dtype = params_.gradient_dtype = dtype_of(input, "cross_entropy: input");
    params_.input = input.data_ptr();
    params_.input_stride = input.stride(0);
    params_.target = classes_.const_data_ptr<int64_t>();
    if (weight.has_value()) {
      check_weight(*weight, input, options.num_classes);
      params_.weight = keep(weight_, *weight);
    }
    params_.rows = input.size(0);
    params_.columns = input.size(1);
    params_.num_classes = options.num_classes;
    params_.first_class = options.first_class;
    params_.total_classes = options.total_classes;
    params_.ignore_index = options.ignore_index;
    params_.label_smoothing = static_cast<float>(options.label_smoothing);
    params_.z_loss = static_cast<float>(options.z_loss);
    params_.softcap = static_cast<float>(options.softcap);
    check_targets(params_);
  }

  // (shards, rows, kPartialStatsFloats) of a vocab-parallel group, of which input is one shard.
  void set_partial_stats(const OptionalTensor& stats) {
    if (!stats.has_value()) return;
    check_partial_stats(*stats, input_);
    params_.partial_stats = reinterpret_cast<const PartialStats*>(keep(partial_stats_, *stats));
    params_.num_partial_stats = stats->size(0);
  }

  // The gradient for an upstream gradient of 1 is stored.
  void set_upstream(const Tensor& upstream) {
    params_.upstream_stride = checked_scale_stride(upstream, input_);
    params_.upstream = keep(upstream_, upstream);
  }

  Tensor losses(const Tensor* gradient, const OptionalTensor& scale) {
    Tensor losses = torch::stable::new_empty(input_, {params_.rows}, ScalarType::Float);
    params_.losses = losses.mutable_data_ptr<float>();
    if (scale.has_value()) {
      params_.scale_stride = checked_scale_stride(*scale, input_);
      params_.scale = keep(scale_, *scale);
    }
    if (gradient != nullptr) {
      params_.gradient = gradient->data_ptr();
      params_.gradient_dtype = dtype_of(*gradient);
      params_.gradient_stride = gradient->stride(0);
    }
    if (params_.rows > 0) run(params_, input_);
    return losses;
  }

  Tensor partial_stats() {
    Tensor stats = torch::stable::new_empty(input_, {params_.rows, kPartialStatsFloats}, ScalarType::Float);
    params_.partial_stats_out = reinterpret_cast<PartialStats*>(stats.mutable_data_ptr<float>());
    if (params_.rows > 0) run(params_, input_);
    return stats;
  }

 private:
  static const float* keep(OptionalTensor& kept, const Tensor& tensor) {
    kept = torch::stable::contiguous(tensor);
    return kept->const_data_ptr<float>();
  }

  CrossEntropyParams params_ = {};
  Tensor input_, classes_;
  OptionalTensor weight_, scale_, upstream_, partial_stats_;
};

Tensor with_contiguous_rows(const Tensor& input) {
  return input.size(1) > 1 && input.stride(1) != 1 ? torch::stable::contiguous(input) : input;
}

std::tuple<Tensor, Tensor> cross_entropy(Tensor input, Tensor target, OptionalTensor weight, OptionalTensor scale,
                                         OptionalTensor parts, int64_t ignore_index, int64_t num_classes,
                                         int64_t first_class, int64_t total_classes, double label_smoothing,
                                         double z_loss, double softcap, bool with_gradient) {
  const Options options = {.ignore_index = ignore_index,
                           .num_classes = num_classes,
                           .first_class = first_class,
                           .total_classes = total_classes,
                           .label_smoothing = label_smoothing,
                           .z_loss = z_loss,
                           .softcap = softcap};
  check_shapes(input, target, options);
  Call call(with_contiguous_rows(input), target, weight, options);
  call.set_partial_stats(parts);
  if (!with_gradient) return {call.losses(nullptr, scale), torch::stable::new_empty(input, {0})};
  Tensor gradient = torch::stable::new_empty(input, {input.size(0), input.size(1)});
  advise_large_pages(gradient);
  return {call.losses(&gradient, scale), gradient};
}

Tensor cross_entropy_(Tensor input, Tensor target, OptionalTensor weight, OptionalTensor scale, OptionalTensor parts,
                      int64_t ignore_index, int64_t num_classes, int64_t first_class, int64_t total_classes,
                      double label_smoothing, double z_loss, double softcap) {
  const Options options = {.ignore_index = ignore_index,
                           .num_classes = num_classes,
                           .first_class = first_class,
                           .total_classes = total_classes,
                           .label_smoothing = label_smoothing,
                           .z_loss = z_loss,
                           .softcap = softcap};
  check_shapes(input, target, options);
  check_writable_rows(input);
  Call call(input, target, weight, options);
  call.set_partial_stats(parts);
  return call.losses(&input, scale);
}

void cross_entropy_again_(Tensor gradient, Tensor input, Tensor target, OptionalTensor weight, OptionalTensor scale,
                          Tensor upstream, int64_t ignore_index, int64_t num_classes, int64_t first_class,
                          int64_t total_classes, double label_smoothing, double z_loss, double softcap) {
  const Options options = {.ignore_index = ignore_index,
                           .num_classes = num_classes,
                           .first_class = first_class,
                           .total_classes = total_classes,
                           .label_smoothing = label_smoothing,
                           .z_loss = z_loss,
                           .softcap = softcap};
  check_shapes(input, target, options);
  check_writable_rows(gradient);
  if (gradient.size(0) != input.size(0) || gradient.size(1) != input.size(1) ||
      gradient.scalar_type() != input.scalar_type())
    refuse<std::invalid_argument>("cross_entropy: gradient has shape ", shape(gradient), ", expected the shape ",
                                  shape(input), " and the dtype of input");
  check_same_device(gradient, "gradient", input);
  Call call(with_contiguous_rows(input), target, weight, options);
  call.set_upstream(upstream);
  call.losses(&gradient, scale);
}

#ifndef FASTLM_CUDA

// gradient, of bfloat16, is the first half of the memory of input's rows, which are of float32.
Tensor cross_entropy_narrow_(Tensor gradient, Tensor input, Tensor target, OptionalTensor weight, OptionalTensor scale,
                             OptionalTensor parts, int64_t ignore_index, int64_t num_classes, int64_t first_class,
                             int64_t total_classes, double label_smoothing, double z_loss, double softcap) {
  const Options options = {.ignore_index = ignore_index,
                           .num_classes = num_classes,
                           .first_class = first_class,
                           .total_classes = total_classes,
                           .label_smoothing = label_smoothing,
                           .z_loss = z_loss,
                           .softcap = softcap};
  check_shapes(input, target, options);
  check_writable_rows(input);
  if (input.scalar_type() != ScalarType::Float || gradient.scalar_type() != ScalarType::BFloat16 ||
      gradient.data_ptr() != input.data_ptr() || gradient.dim() != 2 || gradient.size(0) != input.size(0) ||
      gradient.size(1) != input.size(1) || (input.size(0) > 1 && gradient.stride(0) != 2 * input.stride(0)))
    refuse<std::invalid_argument>("cross_entropy: gradient has shape ", shape(gradient),
                                  ", expected the bfloat16 view of the first half of each float32 row of input ",
                                  shape(input));
  Call call(input, target, weight, options);
  call.set_partial_stats(parts);
  return call.losses(&gradient, scale);
}

#endif

Tensor cross_entropy_part(Tensor input, Tensor target, OptionalTensor weight, int64_t ignore_index, int64_t num_classes,
                          int64_t first_class, int64_t total_classes, double label_smoothing, double z_loss,
                          double softcap) {
  const Options options = {.ignore_index = ignore_index,
                           .num_classes = num_classes,
                           .first_class = first_class,
                           .total_classes = total_classes,
                           .label_smoothing = label_smoothing,
                           .z_loss = z_loss,
                           .softcap = softcap};
  check_shapes(input, target, options);
  return Call(with_contiguous_rows(input), target, weight, options).partial_stats();
}

void scale_rows_(Tensor input, Tensor scale) {
  check_writable_rows(input);
  const DType dtype = dtype_of(input, "cross_entropy: input");
  const int64_t scale_stride = checked_scale_stride(scale, input);
  const Tensor factors = torch::stable::contiguous(scale);
  const ScaleRowsParams params = {.dtype = dtype,
                                  .input = input.data_ptr(),
                                  .stride = input.stride(0),
                                  .scale = factors.const_data_ptr<float>(),
                                  .scale_stride = scale_stride,
                                  .rows = input.size(0),
                                  .columns = input.size(1)};
  if (params.rows > 0) run(params, input);
}

}  // namespace
}  // namespace fastlm

#ifdef FASTLM_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastlm, CUDA, library) {
#else
STABLE_TORCH_LIBRARY_FRAGMENT(fastlm, library) {
  library.def(
      "cross_entropy_narrow_(Tensor(a!) gradient, Tensor(a!) input, Tensor target, Tensor? weight, Tensor? scale, "
      "Tensor? parts, int ignore_index, int num_classes, int first_class, int total_classes, float label_smoothing, "
      "float z_loss, float softcap) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, library) {
  library.impl("cross_entropy_narrow_", TORCH_BOX(&fastlm::cross_entropy_narrow_));
#endif
  library.impl("cross_entropy", TORCH_BOX(&fastlm::cross_entropy));
  library.impl("cross_entropy_", TORCH_BOX(&fastlm::cross_entropy_));
  library.impl("cross_entropy_again_", TORCH_BOX(&fastlm::cross_entropy_again_));
  library.impl("cross_entropy_part", TORCH_BOX(&fastlm::cross_entropy_part));
  library.impl("scale_rows_", TORCH_BOX(&fastlm::scale_rows_));
  library.impl("advise_large_pages", TORCH_BOX(&fastlm::advise_large_pages));
}
