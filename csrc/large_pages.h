// Large pages for large tensors on a CPU.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <sys/mman.h>

namespace {

// A large tensor is fresh memory from the system, which clears it at the first touch of each page: with 4 KiB pages that
// takes longer than a kernel's own work. Where the system offers 2 MiB pages on request, request them.
void advise_large_pages(torch::stable::Tensor fresh) {
#ifdef MADV_HUGEPAGE
  const uintptr_t page = 2 << 20, begin = reinterpret_cast<uintptr_t>(fresh.data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t last = (begin + fresh.numel() * fresh.element_size()) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace
