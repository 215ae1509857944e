// What the op files, <op>.cpp, share: from tensors to the pointers that kernels take, and work to the threads.
//
// There are two kinds of op. Cross entropy has no Triton kernel: its C++ is registered on fastlm::cross_entropy itself,
// for CPU and for CUDA, and allocates its results. All other ops have one, and under TRITON_INTERPRET=1 it runs on CPU
// tensors too, through the same dispatcher key CPU. That key can hold one function, and which kernel a call gets is
// known only when it runs: so the function is Python's, which allocates the results, and the C++ is an op of its own
// (norm_rows, softmax_rows, attention_varlen, ...) that fills them.
#pragma once

#include "column_sums.h"
#include "dtype.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#ifndef FASTLM_CUDA
#include <sys/mman.h>
#endif

namespace fastlm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// name says in an error which tensor of which op it is.
inline DType dtype_of(const Tensor& tensor, const char* name = "fastlm: a tensor") {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      throw std::invalid_argument(std::string(name) + " is " + torch::headeronly::toString(tensor.scalar_type()) +
                                  ", expected float32, float16 or bfloat16");
  }
}

// Asks for 2 MiB pages, where the system offers them on request, for a tensor that was just allocated: the system
// clears each page at its first touch, and with 4 KiB pages that takes longer than a kernel's own work. Does nothing on
// a GPU.
inline void advise_large_pages(Tensor fresh) {
#if !defined(FASTLM_CUDA) && defined(MADV_HUGEPAGE)
  const uintptr_t page = 2 << 20, begin = reinterpret_cast<uintptr_t>(fresh.data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t last = (begin + fresh.numel() * fresh.element_size()) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// The rows of a matrix, or of a contiguous tensor, of so many columns.
inline Rows rows_of(const Tensor& tensor, int64_t columns) {
  return {
      .data = tensor.data_ptr(), .dtype = dtype_of(tensor), .stride = tensor.dim() == 2 ? tensor.stride(0) : columns};
}

inline Rows rows_of(const OptionalTensor& tensor, int64_t columns) {
  return tensor.has_value() ? rows_of(*tensor, columns) : Rows{};
}

// The same of an output that was just allocated.
inline Rows output_rows(const Tensor& tensor, int64_t columns) {
  advise_large_pages(tensor);
  return rows_of(tensor, columns);
}

inline Rows output_rows(const OptionalTensor& tensor, int64_t columns) {
  return tensor.has_value() ? output_rows(*tensor, columns) : Rows{};
}

inline float* float_data(const OptionalTensor& tensor) {
  return tensor.has_value() ? static_cast<float*>(tensor->data_ptr()) : nullptr;
}

// Whether the stores of an output are non-temporal: it is larger than a cache that it could be found in later.
inline bool use_non_temporal(const Tensor& output) {
  constexpr int64_t kNonTemporalBytes = 1 << 22;
  return output.numel() * static_cast<int64_t>(output.element_size()) >= kNonTemporalBytes;
}

// Calls kernel(params, begin, end) on all threads for ranges of units, each of so many elements.
template <class Params>
void parallel_for(const Params& params, int64_t units, int64_t elements,
                  void (*kernel)(const Params&, int64_t, int64_t)) {
  constexpr int64_t kGrainSize =
      1 << 14;  // elements: handing a smaller task to another thread costs more than it saves
  torch::stable::parallel_for(0, units, 1 + kGrainSize / (elements + 1),
                              [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

// Column sums: see column_sums.h.

inline int64_t num_chunks(int64_t rows) {
  constexpr int64_t kMaxChunks = 64;
  constexpr int64_t kMinChunkRows = 16;  // with fewer, adding the partial sums costs more than making them
  const int64_t chunks = rows / kMinChunkRows;
  return chunks < 1 ? 1 : chunks < kMaxChunks ? chunks : kMaxChunks;
}

// (chunks, columns) for the partial sums, if their total is wanted.
inline OptionalTensor new_partial_sums(const OptionalTensor& total, const Tensor& like, int64_t chunks,
                                       int64_t columns) {
  if (!total.has_value()) return std::nullopt;
  return torch::stable::new_empty(like, {chunks, columns}, ScalarType::Float);
}

inline void add_partial_sums(const OptionalTensor& partials, const OptionalTensor& total) {
  if (!total.has_value()) return;
  const int64_t columns = partials->size(1);
  column_sums_cpu({.partials = float_data(partials),
                   .total = rows_of(*total, columns),
                   .chunks = partials->size(0),
                   .columns = columns});
}

}  // namespace fastlm
