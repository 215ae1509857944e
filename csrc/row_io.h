// Rows of any dtype as floats, and back: what the CPU kernels load and store with.
#pragma once

#include "vec.h"

#include <cstdlib>

namespace fastlm {
namespace FASTLM_INSTRUCTION_SET {
namespace {

// Memory for a few rows of floats.
class Scratch {
 public:
  Scratch(int64_t rows, int64_t columns)
      : columns_((columns + kLanes - 1) / kLanes * kLanes),
        memory_(std::malloc(rows * columns_ * sizeof(float) + 2 * sizeof(Vector))) {
    if (memory_ == nullptr) std::abort();
    // Rows are aligned to vectors: one that crosses a cache line takes two accesses.
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory_) + sizeof(Vector);
    floats_ = reinterpret_cast<float*>(address - address % sizeof(Vector));
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  float* row(int64_t index) const { return floats_ + index * columns_; }

 private:
  int64_t columns_;
  void* memory_;
  float* floats_;
};

// Elements [begin, begin + n) of a row as floats: a pointer to float32 rows themselves, else a copy in scratch.
inline const float* load_row(const Rows& rows, int64_t row, int64_t begin, int64_t n, float* scratch) {
  const int64_t first = row * rows.stride + begin;
  if (rows.dtype == DType::kFloat32) return static_cast<const float*>(rows.data) + first;
  dispatch_dtype(rows.dtype, [&]<class E>() {
    const E* source = static_cast<const E*>(rows.data) + first;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) vec_store(scratch + i, E::load(source + i));
    for (; i < n; ++i) scratch[i] = source[i];
  });
  return scratch;
}

// Where a kernel writes the floats of a row: the row itself if it is float32, else scratch, for store_row to convert.
inline float* row_out(const Rows& rows, int64_t row, int64_t begin, float* scratch) {
  if (rows.dtype != DType::kFloat32) return scratch;
  return static_cast<float*>(rows.data) + row * rows.stride + begin;
}

// Converts n results that lie in scratch and stores them in the row. Results in a float32 row are there already.
inline void store_row(const Rows& rows, int64_t row, int64_t begin, int64_t n, const float* result) {
  if (rows.dtype == DType::kFloat32) return;
  dispatch_dtype(rows.dtype, [&]<class E>() {
    E* target = static_cast<E*>(rows.data) + row * rows.stride + begin;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) E::template store<false>(target + i, vec_load<Vector>(result + i));
    for (; i < n; ++i) target[i] = result[i];
  });
}

}  // namespace
}  // namespace FASTLM_INSTRUCTION_SET
}  // namespace fastlm
