// How the rows of cross entropy are laid out on a GPU: a pure function, which needs no GPU to be tested.
#pragma once

#include <cstdint>

namespace fastlm {

constexpr int64_t kVectorBytes = 16;      // the widest access of one thread
constexpr int64_t kVectorsPerThread = 8;  // of a row, before more threads share it
constexpr int kShortRowThreads = 32;      // a warp
constexpr int kMediumRowThreads = 128;
constexpr int kLongRowThreads = 512;
constexpr int kShortRowsPerBlock = 8;
constexpr int kMaxCluster = 8;            // the portable maximum of blocks in a cluster
constexpr int64_t kReservedBytes = 1024;  // of shared memory, reserved by the system for each block
constexpr int64_t kStaticBytes = 512;     // at least the static shared memory of the kernels

struct Chip {
  int64_t shared_per_block;  // bytes, the opt-in maximum
  int64_t shared_per_multiprocessor;
  int major;  // of the compute capability; from 9 on blocks form clusters
};

struct Launch {
  int row_threads;  // threads of one block that share a row
  int rows_per_block;
  int cluster;        // blocks that share a row
  int64_t slice;      // elements of a row for each of these blocks; the last may get fewer
  int64_t staged;     // how many of them are kept in shared memory; the others are read twice
  int64_t row_bytes;  // shared memory for them
};

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Shared memory for n elements, which lie there as far from alignment as in global memory.
inline int64_t staged_bytes(int64_t n, int64_t element_size) {
  return round_up(n * element_size, kVectorBytes) + kVectorBytes;
}

// Short rows get a warp, longer ones a block. A row so long that a multiprocessor could stage only one at a time, and
// would be idle between its passes, is split over a cluster, or staged in part where there are no clusters. Nothing is
// staged where rows are read once: without a gradient, or when their statistics are an input.
inline Launch choose_launch(int64_t elements, int64_t element_size, bool read_twice, const Chip& chip) {
  Launch launch = {.row_threads = kShortRowThreads,
                   .rows_per_block = kShortRowsPerBlock,
                   .cluster = 1,
                   .slice = elements,
                   .staged = 0,
                   .row_bytes = 0};
  while (launch.row_threads < kLongRowThreads &&
         elements * element_size > launch.row_threads * kVectorsPerThread * kVectorBytes) {
    launch.row_threads = launch.row_threads < kMediumRowThreads ? kMediumRowThreads : kLongRowThreads;
    launch.rows_per_block = 1;
  }
  if (!read_twice) return launch;
  const int64_t most = chip.shared_per_block - kStaticBytes;
  const int64_t half = smaller(most, chip.shared_per_multiprocessor / 2 - kReservedBytes - kStaticBytes);
  const bool clusters = chip.major >= 9 && launch.row_threads == kLongRowThreads;
  while (clusters && launch.cluster < kMaxCluster && staged_bytes(launch.slice, element_size) > half) {
    launch.cluster *= 2;
    launch.slice = round_up((elements + launch.cluster - 1) / launch.cluster, kVectorBytes / element_size);
  }
  // If two blocks leave more than half of their slices to be read again, the L2 cache might not hold those any more.
  const bool mostly_staged = launch.rows_per_block * staged_bytes(launch.slice, element_size) <= 2 * half;
  const int64_t row_budget = (mostly_staged ? half : most) / launch.rows_per_block / kVectorBytes * kVectorBytes;
  launch.staged = launch.slice;
  if (staged_bytes(launch.slice, element_size) > row_budget) launch.staged = (row_budget - kVectorBytes) / element_size;
  launch.row_bytes = staged_bytes(launch.staged, element_size);
  return launch;
}

}  // namespace fastlm
