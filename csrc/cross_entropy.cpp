// The raw cross entropy ops: every argument check, allocation, and the way to the kernels.
//
// Built twice, each time against PyTorch's stable ABI alone: into _cpu.so, and with FASTLM_CUDA into _cuda.so. Their
// schemas are defined in fastlm/ops/cross_entropy.py, beside the PyTorch code that serves where no library is loaded.
#include "cross_entropy.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef FASTLM_CUDA
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <cuda_runtime_api.h>
#else
#include <sys/mman.h>
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

fastlm::Element element(const Tensor& input) {
  switch (input.scalar_type()) {
    case ScalarType::Float:
      return fastlm::Element::kFloat32;
    case ScalarType::Half:
      return fastlm::Element::kFloat16;
    case ScalarType::BFloat16:
      return fastlm::Element::kBFloat16;
    default:
      refuse<std::invalid_argument>("cross_entropy: input is ", torch::headeronly::toString(input.scalar_type()), ", expected float32, float16 or bfloat16");
  }
}

void check_same_device(const Tensor& tensor, const char* name, const Tensor& input) {
  if (tensor.is_cuda() != input.is_cuda() || tensor.get_device_index() != input.get_device_index())
    refuse<std::invalid_argument>("cross_entropy: ", name, " and input are on different devices, expected the same");
}

void check_shapes(const Tensor& input, const Tensor& target, int64_t num_classes) {
  if (input.dim() != 2) refuse<std::invalid_argument>("cross_entropy: input has shape ", shape(input), ", expected (N, V)");
  if (target.dim() != 1 || target.size(0) != input.size(0))
    refuse<std::invalid_argument>("cross_entropy: target has shape ", shape(target), ", expected (", input.size(0),
                                  ",) to match the rows of input ", shape(input));
  if (target.scalar_type() != ScalarType::Long && target.scalar_type() != ScalarType::Int)
    refuse<std::invalid_argument>("cross_entropy: target is ", torch::headeronly::toString(target.scalar_type()),
                                  ", expected Long or Int class numbers");
  if (num_classes < 0 || num_classes > input.size(1))
    refuse<std::invalid_argument>("cross_entropy: num_classes is ", num_classes, ", expected 0 to ", input.size(1),
                                  ", the columns of input");
  check_same_device(target, "target", input);
}

// 0 if one scale serves all rows, 1 if there is one for each.
int64_t checked_scale_stride(const Tensor& scale, const Tensor& input) {
  if (scale.scalar_type() != ScalarType::Float)
    refuse<std::invalid_argument>("cross_entropy: scale is ", torch::headeronly::toString(scale.scalar_type()),
                                  ", expected Float");
  if (scale.numel() != 1 && (scale.dim() != 1 || scale.size(0) != input.size(0)))
    refuse<std::invalid_argument>("cross_entropy: scale has shape ", shape(scale), ", expected one element or (",
                                  input.size(0), ",) to match the rows of input");
  check_same_device(scale, "scale", input);
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
void check_call(const fastlm::CrossEntropy&) {}

void run(const fastlm::CrossEntropy& call, const Tensor& input) {
  torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  STD_CUDA_CHECK(static_cast<cudaError_t>(fastlm::cross_entropy_cuda(call, current_stream(input))));
}

void run(const fastlm::ScaleRows& call, const Tensor& input) {
  torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  STD_CUDA_CHECK(static_cast<cudaError_t>(fastlm::scale_rows_cuda(call, current_stream(input))));
}

void advise_large_pages(const Tensor&) {}

#else

void check_call(const fastlm::CrossEntropy& call) {
  if (call.element != fastlm::Element::kFloat32)
    refuse<std::invalid_argument>("cross_entropy: input on a CPU must be float32; convert it with input.float()");
  for (int64_t row = 0; row < call.rows; ++row) {
    const int64_t target = call.target[row];
    if (target != call.ignore_index && (target < 0 || target >= call.num_classes))
      refuse<std::out_of_range>("cross_entropy: target ", target, " at row ", row, " is out of bounds, expected 0 to ",
                                call.num_classes - 1, " or ignore_index ", call.ignore_index);
  }
}

// Rows for one task: about 32 Ki elements, below which handing it to another thread costs more than it saves.
int64_t grain(int64_t columns) { return 1 + (int64_t{1} << 15) / (columns + 1); }

void run(const fastlm::CrossEntropy& call, const Tensor&) {
  torch::stable::parallel_for(0, call.rows, grain(call.columns), [&](int64_t begin, int64_t end) {
    fastlm::cross_entropy_cpu(call, begin, end);
  });
}

void run(const fastlm::ScaleRows& call, const Tensor&) {
  torch::stable::parallel_for(0, call.rows, grain(call.columns), [&](int64_t begin, int64_t end) {
    fastlm::scale_rows_cpu(call, begin, end);
  });
}

// A large tensor is fresh memory from the kernel, which clears it at the first touch of each page: with 4 KiB pages that
// takes longer than the cross entropy itself. Where the system offers 2 MiB pages on request, request them.
void advise_large_pages(const Tensor& fresh) {
#ifdef MADV_HUGEPAGE
  const uintptr_t page = 2 << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(fresh.data_ptr()) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(fresh.data_ptr()) + fresh.numel() * fresh.element_size()) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

#endif

// Checks what is left, fills in the call and runs it; returns the losses.
Tensor run_cross_entropy(const Tensor& input, const Tensor& target, const Tensor* gradient,
                         const std::optional<Tensor>& scale, int64_t ignore_index, int64_t num_classes) {
  Tensor classes = torch::stable::contiguous(torch::stable::to(target, ScalarType::Long));
  Tensor losses = torch::stable::new_empty(input, {input.size(0)}, ScalarType::Float);
  std::optional<Tensor> factors;
  fastlm::CrossEntropy call = {};
  call.element = element(input);
  if (scale.has_value()) {
    call.scale_stride = checked_scale_stride(*scale, input);
    factors = torch::stable::contiguous(*scale);
    call.scale = factors->const_data_ptr<float>();
  }
  call.input = input.data_ptr();
  call.input_stride = input.stride(0);
  call.target = classes.const_data_ptr<int64_t>();
  call.losses = losses.mutable_data_ptr<float>();
  if (gradient != nullptr) {
    call.gradient = gradient->data_ptr();
    call.gradient_stride = gradient->stride(0);
  }
  call.rows = input.size(0);
  call.columns = input.size(1);
  call.num_classes = num_classes;
  call.ignore_index = ignore_index;
  check_call(call);
  if (call.rows > 0) run(call, input);
  return losses;
}

std::tuple<Tensor, Tensor> cross_entropy(Tensor input, Tensor target, int64_t ignore_index, int64_t num_classes,
                                         bool with_gradient, std::optional<Tensor> scale) {
  check_shapes(input, target, num_classes);
  if (input.size(1) > 1 && input.stride(1) != 1) input = torch::stable::contiguous(input);
  if (!with_gradient) {
    Tensor losses = run_cross_entropy(input, target, nullptr, scale, ignore_index, num_classes);
    return {losses, torch::stable::new_empty(input, {0})};
  }
  Tensor gradient = torch::stable::new_empty(input, {input.size(0), input.size(1)});
  advise_large_pages(gradient);
  Tensor losses = run_cross_entropy(input, target, &gradient, scale, ignore_index, num_classes);
  return {losses, gradient};
}

Tensor cross_entropy_(Tensor input, Tensor target, int64_t ignore_index, int64_t num_classes,
                      std::optional<Tensor> scale) {
  check_shapes(input, target, num_classes);
  check_writable_rows(input);
  return run_cross_entropy(input, target, &input, scale, ignore_index, num_classes);
}

void scale_rows_(Tensor input, Tensor scale) {
  check_writable_rows(input);
  fastlm::ScaleRows call = {};
  call.element = element(input);
  call.scale_stride = checked_scale_stride(scale, input);
  Tensor factors = torch::stable::contiguous(scale);
  call.scale = factors.const_data_ptr<float>();
  call.input = input.data_ptr();
  call.stride = input.stride(0);
  call.rows = input.size(0);
  call.columns = input.size(1);
  if (call.rows > 0) run(call, input);
}

#ifndef FASTLM_CUDA

// For the tests, which run every instruction set this CPU has: sets it unless number is -1, returns the one in use.
int64_t cpu_instruction_set(int64_t number) {
  if (number < -1 || number > fastlm::best_instruction_set())
    refuse<std::invalid_argument>("cpu_instruction_set: got ", number, ", this CPU has 0 to ",
                                  fastlm::best_instruction_set());
  if (number >= 0) fastlm::set_instruction_set(static_cast<int>(number));
  return fastlm::instruction_set();
}

#endif

}  // namespace

#ifdef FASTLM_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastlm, CUDA, library) {
#else
STABLE_TORCH_LIBRARY_FRAGMENT(fastlm, library) { library.def("cpu_instruction_set(int number) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(fastlm, CompositeExplicitAutograd, library) {
  library.impl("cpu_instruction_set", TORCH_BOX(&cpu_instruction_set));
}

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, library) {
#endif
  library.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  library.impl("cross_entropy_", TORCH_BOX(&cross_entropy_));
  library.impl("scale_rows_", TORCH_BOX(&scale_rows_));
}
