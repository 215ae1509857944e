// The types of the elements that the kernels read and write; they compute in float32.
#pragma once

#include <cstdint>

namespace fastlm {

enum class Element { kFloat32, kFloat16, kBFloat16 };

// Rows of elements; without data there is no such tensor.
struct Rows {
  void* data;
  Element element;
  int64_t stride;  // elements from one row to the next
};

}  // namespace fastlm
