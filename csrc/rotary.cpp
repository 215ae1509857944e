// Rotary embeddings on a CPU as an op on tensors. The Python op checks the other arguments and allocates the output.
#include "rotary.h"
#include "tensor_utils.h"

#include <torch/csrc/stable/library.h>

namespace fastlm {
namespace {

void check_positions(const int64_t* positions, int64_t count, int64_t end) {
  for (int64_t i = 0; i < count; ++i)
    if (positions[i] < 0 || positions[i] >= end)
      throw std::out_of_range("apply_rotary: position " + std::to_string(positions[i]) + " is out of bounds, cos has " +
                              std::to_string(end) + " positions");
}

void rotary_rows(Tensor x, Tensor cos, Tensor sin, OptionalTensor positions, bool interleaved, bool inverse, Tensor y) {
  const int64_t B = x.size(0), T = x.size(1), pairs = cos.size(1);
  const int64_t* position = positions.has_value() ? positions->const_data_ptr<int64_t>() : nullptr;
  if (position != nullptr) check_positions(position, B * T, cos.size(0));
  const bool in_place = y.data_ptr() == x.data_ptr();
  if (!in_place) advise_large_pages(y);
  const RotaryParams params = {
      .x = {.data = x.data_ptr(), .dtype = dtype_of(x), .stride = x.stride(2)},
      .y = {.data = y.data_ptr(), .dtype = dtype_of(y), .stride = y.stride(2)},
      .x_batch_stride = x.stride(0),
      .x_token_stride = x.stride(1),
      .y_batch_stride = y.stride(0),
      .y_token_stride = y.stride(1),
      .cos = rows_of(cos, pairs),
      .sin = rows_of(sin, pairs),
      .positions = position,
      .batch = B,
      .tokens = T,
      .heads = x.size(2),
      .columns = x.size(3),
      .pairs = pairs,
      .interleaved = interleaved,
      .inverse = inverse,
      .non_temporal = use_non_temporal(y) && !in_place,
  };
  parallel_for(params, B * T, params.heads * params.columns, rotary_cpu);
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastlm, library) {
  library.def(
      "rotary_rows(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse, Tensor(a!) y) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, library) { library.impl("rotary_rows", TORCH_BOX(&fastlm::rotary_rows)); }
