// Best-fit-decreasing bin packing of document lengths into rows of a fixed capacity.
//
// Pieces are placed longest first, each into the fullest row that still has room for it (Johnson 1974; for language
// model training Ding et al. 2024, arXiv 2404.10830). Lengths and free spaces are integers of at most the capacity T,
// so nothing is ever compared: a counting sort orders the pieces, one bucket per amount of free space holds the rows,
// and a tree of bitmaps over the buckets finds the smallest sufficient one in O(log64 T). N pieces cost O(N log64 T +
// T).

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

constexpr int64_t kNone = -1;

// The set of non-empty buckets: level 0 has one bit per bucket, each bit above says that 64 bits below are not all 0.
class BucketSet {
 public:
  explicit BucketSet(int64_t size) {
    do {
      size = (size + 63) / 64;
      levels_.emplace_back(static_cast<size_t>(size), 0);
    } while (size > 1);
  }

  void insert(int64_t bucket) {
    for (auto& level : levels_) {
      level[bucket / 64] |= uint64_t{1} << (bucket % 64);
      bucket /= 64;
    }
  }

  void erase(int64_t bucket) {
    for (auto& level : levels_) {
      uint64_t& word = level[bucket / 64];
      word &= ~(uint64_t{1} << (bucket % 64));
      if (word != 0) return;  // the bit above still has to say "not empty"
      bucket /= 64;
    }
  }

  // The smallest member >= bucket, or kNone.
  int64_t at_least(int64_t bucket) const {
    for (size_t height = 0; height < levels_.size(); ++height) {
      const auto& level = levels_[height];
      const int64_t word = bucket / 64;
      if (word >= static_cast<int64_t>(level.size())) return kNone;
      const uint64_t rest = level[word] >> (bucket % 64);
      if (rest != 0) return descend(height, bucket + __builtin_ctzll(rest));
      bucket = word + 1;  // everything below `word` in the level above was looked at
    }
    return kNone;
  }

 private:
  int64_t descend(size_t height, int64_t bit) const {
    while (height-- > 0) bit = bit * 64 + __builtin_ctzll(levels_[height][bit]);
    return bit;
  }

  std::vector<std::vector<uint64_t>> levels_;
};

// Rows grouped by free space, each group a stack threaded through one array.
class OpenRows {
 public:
  explicit OpenRows(int64_t capacity) : top_(static_cast<size_t>(capacity) + 1, kNone), filled_(capacity + 1) {}

  // The fullest row with room for `length`, its free space already reduced; a new row if there is none.
  int64_t place(int64_t length) {
    const int64_t space = filled_.at_least(length);
    if (space == kNone) {
      const int64_t row = static_cast<int64_t>(below_.size());
      below_.push_back(kNone);
      push(row, static_cast<int64_t>(top_.size()) - 1 - length);
      return row;
    }
    const int64_t row = pop(space);
    push(row, space - length);
    return row;
  }

  int64_t size() const { return static_cast<int64_t>(below_.size()); }

 private:
  void push(int64_t row, int64_t space) {
    if (space == 0) return;  // a full row is never asked for again
    if (top_[space] == kNone) filled_.insert(space);
    below_[row] = top_[space];
    top_[space] = row;
  }

  int64_t pop(int64_t space) {
    const int64_t row = top_[space];
    top_[space] = below_[row];
    if (top_[space] == kNone) filled_.erase(space);
    return row;
  }

  std::vector<int64_t> top_;    // by free space: the row on top of that stack
  std::vector<int64_t> below_;  // by row: the row under it
  BucketSet filled_;
};

// Turns counts[k] into the number of items before group k, in place; counts has one entry more than there are groups.
void exclusive_sum(int64_t* counts, int64_t size) {
  int64_t sum = 0;
  for (int64_t k = 0; k < size; ++k) {
    const int64_t count = counts[k];
    counts[k] = sum;
    sum += count;
  }
}

void check_lengths(const int64_t* lengths, int64_t count, int64_t capacity) {
  for (int64_t i = 0; i < count; ++i) {
    if (lengths[i] < 1 || lengths[i] > capacity) {
      throw std::invalid_argument("pack: lengths[" + std::to_string(i) + "] is " + std::to_string(lengths[i]) +
                                  ", expected 1 to the capacity " + std::to_string(capacity) +
                                  "; split or truncate longer documents first");
    }
  }
}

// Indices of the pieces, longest first; equal lengths keep their order, so the packing is deterministic.
std::vector<int64_t> longest_first(const int64_t* lengths, int64_t count, int64_t capacity) {
  std::vector<int64_t> next(static_cast<size_t>(capacity) + 1, 0);
  for (int64_t i = 0; i < count; ++i) ++next[capacity - lengths[i]];
  exclusive_sum(next.data(), capacity + 1);
  std::vector<int64_t> order(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) order[next[capacity - lengths[i]]++] = i;
  return order;
}

struct Packing {
  std::vector<int64_t> pieces;      // (N,) indices of the pieces, row after row
  std::vector<int64_t> row_starts;  // (R + 1,) row r holds pieces[row_starts[r] : row_starts[r + 1]]
};

Packing best_fit_decreasing(const int64_t* lengths, int64_t count, int64_t capacity) {
  check_lengths(lengths, count, capacity);
  const std::vector<int64_t> order = longest_first(lengths, count, capacity);
  OpenRows rows(capacity);
  std::vector<int64_t> row_of(static_cast<size_t>(count));
  for (int64_t k = 0; k < count; ++k) row_of[k] = rows.place(lengths[order[k]]);

  Packing packing;
  packing.row_starts.assign(static_cast<size_t>(rows.size()) + 1, 0);
  for (const int64_t row : row_of) ++packing.row_starts[row];
  exclusive_sum(packing.row_starts.data(), rows.size() + 1);
  packing.pieces.resize(static_cast<size_t>(count));
  std::vector<int64_t> next(packing.row_starts.begin(), packing.row_starts.end() - 1);
  for (int64_t k = 0; k < count; ++k) packing.pieces[next[row_of[k]]++] = order[k];
  return packing;
}

py::array_t<int64_t> to_numpy(std::vector<int64_t>&& values) {
  auto* kept = new std::vector<int64_t>(std::move(values));
  py::capsule owner(kept, [](void* pointer) { delete static_cast<std::vector<int64_t>*>(pointer); });
  return py::array_t<int64_t>(static_cast<py::ssize_t>(kept->size()), kept->data(), owner);
}

py::tuple pack(const py::array_t<int64_t, py::array::c_style>& lengths, int64_t capacity) {
  constexpr int64_t kLargest = int64_t{1} << 31;  // positions inside a row are int32 in cu_seqlens
  if (lengths.ndim() != 1) {
    throw std::invalid_argument("pack: lengths has " + std::to_string(lengths.ndim()) + " dimensions, expected 1");
  }
  if (capacity < 1 || capacity >= kLargest) {
    throw std::invalid_argument("pack: capacity is " + std::to_string(capacity) + ", expected 1 to 2147483647");
  }
  const int64_t* data = lengths.data();
  const int64_t count = lengths.size();
  Packing packing;
  {
    py::gil_scoped_release release;
    packing = best_fit_decreasing(data, count, capacity);
  }
  return py::make_tuple(to_numpy(std::move(packing.pieces)), to_numpy(std::move(packing.row_starts)));
}

}  // namespace

PYBIND11_MODULE(_packing, module) {
  module.doc() = "Best-fit-decreasing bin packing of integer lengths.";
  module.def("pack", &pack, py::arg("lengths").noconvert(), py::arg("capacity"),
             "pack(lengths (N,) int64, capacity) -> (pieces (N,) int64, row_starts (R + 1,) int64)\n\n"
             "Row r holds the pieces with indices pieces[row_starts[r] : row_starts[r + 1]], longest first; their\n"
             "lengths sum to at most capacity. Raises ValueError for a length outside 1 .. capacity.");
}
