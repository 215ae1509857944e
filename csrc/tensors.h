// What the ops of every file ask of a tensor.
#pragma once

#include "element.h"

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#ifndef FASTLM_CUDA
#include <sys/mman.h>
#endif

namespace {

// name says which tensor of which op it is.
fastlm::Element element(const torch::stable::Tensor& tensor, const char* name = "fastlm: a tensor") {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return fastlm::Element::kFloat32;
    case ScalarType::Half:
      return fastlm::Element::kFloat16;
    case ScalarType::BFloat16:
      return fastlm::Element::kBFloat16;
    default:
      throw std::invalid_argument(std::string(name) + " is " + torch::headeronly::toString(tensor.scalar_type()) +
                                  ", expected float32, float16 or bfloat16");
  }
}

// A large tensor is fresh memory from the system, which clears it at the first touch of each page: with 4 KiB pages that
// takes longer than a kernel's own work. Where the system offers 2 MiB pages on request, request them. On a GPU nothing.
void advise_large_pages(torch::stable::Tensor fresh) {
#if !defined(FASTLM_CUDA) && defined(MADV_HUGEPAGE)
  const uintptr_t page = 2 << 20, begin = reinterpret_cast<uintptr_t>(fresh.data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t last = (begin + fresh.numel() * fresh.element_size()) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace
