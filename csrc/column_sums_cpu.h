// How the CPU kernels of the norms and the activations add rows to the partial sums of column_sums.h.
#pragma once

#include "row_io.h"

namespace fastlm {
namespace FASTLM_INSTRUCTION_SET {
namespace {

constexpr int64_t kBlockRows = 32;  // summed in float32: more would cost accuracy, fewer time

// One gradient's sums over the rows of chunks, one chunk after the other.
class PartialSum {
 public:
  PartialSum(float* partials, int64_t columns)
      : partials_(partials), columns_(partials == nullptr ? 0 : columns), scratch_(2, columns_) {}
  float* block() const { return block_; }  // the sums that a kernel adds rows to, or null
  void begin_chunk(int64_t chunk) {
    if (partials_ == nullptr) return;
    block_ = partials_ + chunk * columns_;
    std::memset(block_, 0, columns_ * sizeof(float));
    num_blocks_ = 0;
  }
  void end_block() {
    if (partials_ == nullptr) return;
    double* total = this->total();
    if (num_blocks_++ == 0) std::memset(total, 0, columns_ * sizeof(double));
    for (int64_t i = 0; i < columns_; ++i) total[i] += static_cast<double>(block_[i]);
    std::memset(block_, 0, columns_ * sizeof(float));
  }
  void end_chunk() {  // replaces the sum of the last block by that of all blocks
    if (num_blocks_ == 0) return;
    for (int64_t i = 0; i < columns_; ++i) block_[i] = static_cast<float>(total()[i] + static_cast<double>(block_[i]));
  }

 private:
  double* total() const { return reinterpret_cast<double*>(scratch_.row(0)); }

  float* partials_;  // (chunks, columns), or null
  int64_t columns_;
  Scratch scratch_;
  float* block_ = nullptr;
  int64_t num_blocks_ = 0;  // in total
};

// The first row of a chunk: chunks differ by one row at most.
inline int64_t first_row(int64_t rows, int64_t chunks, int64_t chunk) {
  return chunk * (rows / chunks) + (chunk < rows % chunks ? chunk : rows % chunks);
}

// Calls add(begin, end) with the rows of each block of chunks [begin, end), to be added to the blocks of the sums.
template <class Add, class... Sums>
inline void sum_chunks(int64_t rows, int64_t chunks, int64_t begin, int64_t end, Add add, Sums&... sums) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = first_row(rows, chunks, chunk), last = first_row(rows, chunks, chunk + 1);
    (sums.begin_chunk(chunk), ...);
    for (int64_t row = first; row < last; row += kBlockRows) {
      if (row > first) (sums.end_block(), ...);
      add(row, last - row < kBlockRows ? last : row + kBlockRows);
    }
    (sums.end_chunk(), ...);
  }
}

}  // namespace
}  // namespace FASTLM_INSTRUCTION_SET
}  // namespace fastlm
