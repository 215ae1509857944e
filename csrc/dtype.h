// The dtypes that the kernels read and write; they compute in float32.
#pragma once

#include <cstdint>

namespace fastlm {

enum class DType { kFloat32, kFloat16, kBFloat16 };

// Rows of a matrix with unit stride within a row. data is null where there is no such tensor.
struct Rows {
  void* data;
  DType dtype;
  int64_t stride;  // elements from one row to the next
};

}  // namespace fastlm
