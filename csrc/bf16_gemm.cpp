// Products of bfloat16 matrices in float32 on a CPU as an op on tensors.
#include "bf16_gemm.h"
#include "tensor_utils.h"

#include <torch/csrc/stable/library.h>

namespace fastlm {
namespace {

Bf16Matrix matrix_of(const Tensor& tensor, const char* name) {
  if (tensor.dim() != 2 || tensor.scalar_type() != ScalarType::BFloat16)
    throw std::invalid_argument(std::string("bf16_gemm_: ") + name + ", expected a matrix of bfloat16");
  Bf16Matrix matrix = {static_cast<const uint16_t*>(tensor.data_ptr()), tensor.stride(0), tensor.stride(1)};
  // The stride of a single row or column is any number.
  if (tensor.size(1) == 1 && matrix.row_stride != 1) matrix.column_stride = 1;
  if (tensor.size(0) == 1 && matrix.column_stride != 1) matrix.row_stride = 1;
  if (matrix.row_stride != 1 && matrix.column_stride != 1)
    throw std::invalid_argument(std::string("bf16_gemm_: ") + name + ", expected unit stride in a dimension");
  return matrix;
}

// Tiles of about equal size, so that no thread is left with a sliver, and where they are few as many for each thread.
void choose_tiles(Bf16GemmParams& params) {
  constexpr int64_t kMinTileRows = 42;  // fewer would not pay for packing b again
  constexpr int64_t kLine = 32;         // columns of which a kernel keeps the sums
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t threads = torch::stable::get_num_threads(), columns = ceil_div(params.columns, kMaxTileColumns);
  int64_t rows = ceil_div(params.rows, kMaxTileRows);
  while (rows * columns < 4 * threads && rows * columns % threads != 0 && params.rows > rows * kMinTileRows) ++rows;
  params.tile_rows = ceil_div(params.rows, rows);
  params.tile_columns = ceil_div(ceil_div(params.columns, columns), kLine) * kLine;
}

void bf16_gemm_(Tensor out, Tensor a, Tensor b, double alpha, bool accumulate) {
  if (out.dim() != 2 || out.scalar_type() != ScalarType::Float || (out.size(1) > 1 && out.stride(1) != 1))
    throw std::invalid_argument("bf16_gemm_: out, expected a matrix of float32 with unit stride in a row");
  Bf16GemmParams params = {.a = matrix_of(a, "a"),
                           .b = matrix_of(b, "b"),
                           .out = static_cast<float*>(out.data_ptr()),
                           .out_stride = out.stride(0),
                           .rows = out.size(0),
                           .columns = out.size(1),
                           .depth = a.size(1),
                           .alpha = static_cast<float>(alpha),
                           .accumulate = accumulate};
  if (a.size(0) != params.rows || b.size(0) != params.depth || b.size(1) != params.columns)
    throw std::invalid_argument("bf16_gemm_: sizes disagree, expected out (M, N), a (M, K) and b (K, N)");
  if (params.rows == 0 || params.columns == 0) return;
  constexpr int64_t kLine = 64;
  params.non_temporal = use_non_temporal(out) && reinterpret_cast<uintptr_t>(params.out) % kLine == 0 &&
                        params.out_stride * static_cast<int64_t>(sizeof(float)) % kLine == 0;
  choose_tiles(params);
  torch::stable::parallel_for(0, params.num_tiles(), 1,
                              [&](int64_t begin, int64_t end) { bf16_gemm_cpu(params, begin, end); });
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastlm, library) {
  library.def("bf16_gemm_(Tensor(a!) out, Tensor a, Tensor b, float alpha, bool accumulate) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, library) { library.impl("bf16_gemm_", TORCH_BOX(&fastlm::bf16_gemm_)); }
