// Rows of any element type as floats, and back: what the CPU kernels read and write with.
#pragma once

#include "vectors.h"

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
    // A vector across two lines of the cache is read in two steps.
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

template <class T>
inline void put(float* target, T value) {
  std::memcpy(target, &value, sizeof value);
}

// The first n elements, n < kLanes, and zeros; or a whole vector.
inline Vector load(const float* source, int64_t n) {
  if (n >= kLanes) return bits_of<Vector>(source);
  Vector vector = {};
  std::memcpy(&vector, source, n * sizeof(float));
  return vector;
}

// x, but from lane n on fill.
inline Vector cut(Vector x, int64_t n, Vector fill) {
  IntegerVector lanes;
  for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
  return lanes < static_cast<int32_t>(n) ? x : fill;
}

// n elements of a row from begin on, as floats: where they lie if that is what they are, else widened into scratch.
inline const float* read(const Rows& rows, int64_t row, int64_t begin, int64_t n, float* scratch) {
  const int64_t first = row * rows.stride + begin;
  if (rows.element == Element::kFloat32) return static_cast<const float*>(rows.data) + first;
  with_element(rows.element, [&](auto element) {
    using E = decltype(element);
    const E* source = static_cast<const E*>(rows.data) + first;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) put(scratch + i, E::load(source + i));
    for (; i < n; ++i) scratch[i] = source[i];
  });
  return scratch;
}

// Where results are put: where they are to lie if those are floats, else into scratch, from where finish narrows them.
inline float* place(const Rows& rows, int64_t row, int64_t begin, float* scratch) {
  if (rows.element != Element::kFloat32) return scratch;
  return static_cast<float*>(rows.data) + row * rows.stride + begin;
}

inline void finish(const Rows& rows, int64_t row, int64_t begin, int64_t n, const float* result) {
  if (rows.element == Element::kFloat32) return;
  with_element(rows.element, [&](auto element) {
    using E = decltype(element);
    E* target = static_cast<E*>(rows.data) + row * rows.stride + begin;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) E::template store<false>(target + i, bits_of<Vector>(result + i));
    for (; i < n; ++i) target[i] = result[i];
  });
}

}  // namespace
}  // namespace FASTLM_INSTRUCTION_SET
}  // namespace fastlm
