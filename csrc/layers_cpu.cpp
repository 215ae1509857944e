// The norms, softmax, the activations and rotary on a CPU, each in one pass over memory: what is needed twice is found in the
// cache. All arithmetic is float32, but of long sums: the error of one in float32 would grow with its length, so blocks are
// summed in float32 and their sums in float64.
#include "instruction_sets.h"
#include "layers.h"
#include "rows.h"

#include <type_traits>

namespace fastlm {
namespace FASTLM_INSTRUCTION_SET {
namespace {

// Calls body with the index and a value of the type to compute with: for whole vectors, then for what is left.
template <class Body>
inline void along(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, Vector{});
  for (; i < n; ++i) body(i, 0.0f);
}

// Calls body with vectors of n elements of each input, absent ones 0, and stores what it leaves in outputs that are there.
// The last elements go through a vector too: where an element stands, and with it the batch, changes none of its bits.
template <int kIn, int kOut, class Body>
inline void map(int64_t n, const float* const (&in)[kIn], float* const (&out)[kOut], Body body) {
  Vector x[kIn] = {}, y[kOut], nothing;
  const Vector zero = {};
  const float* from[kIn];
  float* to[kOut];
  int64_t in_step[kIn], out_step[kOut];  // what is absent is read and written at one place that stays
  for (int k = 0; k < kIn; ++k) {
    from[k] = in[k] == nullptr ? reinterpret_cast<const float*>(&zero) : in[k];
    in_step[k] = in[k] == nullptr ? 0 : 1;
  }
  for (int k = 0; k < kOut; ++k) {
    to[k] = out[k] == nullptr ? reinterpret_cast<float*>(&nothing) : out[k];
    out_step[k] = out[k] == nullptr ? 0 : 1;
  }
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Vector values[kIn], results[kOut];
    for (int k = 0; k < kIn; ++k) values[k] = bits_of<Vector>(from[k] + i * in_step[k]);
    body(values, results);
    for (int k = 0; k < kOut; ++k) put(to[k] + i * out_step[k], results[k]);
  }
  if (i == n) return;
  const size_t bytes = (n - i) * sizeof(float);
  for (int k = 0; k < kIn; ++k) std::memcpy(&x[k], from[k] + i * in_step[k], bytes);
  body(x, y);
  for (int k = 0; k < kOut; ++k) std::memcpy(to[k] + i * out_step[k], &y[k], bytes);
}

class Sum {
 public:
  void add(Vector x, int64_t accumulator) { vectors_[accumulator] += x; }
  void add(float x, int64_t) { rest_ += x; }
  void end_block() {
    total_ += static_cast<double>(sum_of_lanes(vectors_) + rest_);
    rest_ = 0.0f;
    for (auto& vector : vectors_) vector = Vector{};
  }
  float total() const { return static_cast<float>(total_); }

 private:
  Vector vectors_[kAccumulators] = {};
  float rest_ = 0.0f;
  double total_ = 0.0;
};

// As along, for bodies that add to sums: also with the number of the accumulator to add to. Each piece is a block of the
// sums.
template <class Body, class... Sums>
inline void along_summing(int64_t n, Body body, Sums&... sums) {
  for (int64_t i = 0; i < n;) {
    const int64_t end = n - i < kPiece ? n : i + kPiece;
    for (; i + kStep <= end; i += kStep)
      for (int64_t a = 0; a < kAccumulators; ++a) body(i + a * kLanes, Vector{}, a);
    for (; i + kLanes <= end; i += kLanes) body(i, Vector{}, 0);
    for (; i < end; ++i) body(i, 0.0f, 0);
    (sums.end_block(), ...);
  }
}

constexpr int64_t kBlockRows = 32;  // more would cost accuracy, fewer time

// Norms

// h of a row; a sum is rounded before it is normalised: the gradient is then that of what backward reads.
inline const float* added(const Norm& call, int64_t row, const Scratch& scratch) {
  const int64_t C = call.columns;
  const float* x = read(call.x, row, 0, C, scratch.row(0));
  if (call.residual.data == nullptr) return x;
  const float* residual = read(call.residual, row, 0, C, scratch.row(1));
  float* h = place(call.h, row, 0, scratch.row(0));
  along(C, [&](int64_t i, auto like) {
    using T = decltype(like);
    put<T>(h + i, bits_of<T>(x + i) + bits_of<T>(residual + i));
  });
  finish(call.h, row, 0, C, h);
  return read(call.h, row, 0, C, scratch.row(0));
}

}  // namespace

void norm(const Norm& call, int64_t begin, int64_t end) {
  const int64_t C = call.columns;
  const Scratch scratch(3, C);
  for (int64_t row = begin; row < end; ++row) {
    const float* h = added(call, row, scratch);
    // The rounding of a first mean would show in rows far from zero: 3.7, 3.7, ... must give 0. So all that follows is
    // of h - shift, whose mean is the correction.
    float shift = 0.0f, mean = 0.0f;
    Sum squares;
    if (call.mean != nullptr) {
      Sum first, second;
      const auto add = [&](int64_t i, auto like, int64_t a) { first.add(bits_of<decltype(like)>(h + i), a); };
      along_summing(C, add, first);
      shift = first.total() / C;
      const auto add_centered = [&](int64_t i, auto like, int64_t a) {
        const auto centered = bits_of<decltype(like)>(h + i) - shift;
        second.add(centered, a);
        squares.add(centered * centered, a);
      };
      along_summing(C, add_centered, second, squares);
      mean = second.total() / C;
      call.mean[row] = shift + mean;
    } else {
      const auto add_square = [&](int64_t i, auto like, int64_t a) {
        const auto value = bits_of<decltype(like)>(h + i);
        squares.add(value * value, a);
      };
      along_summing(C, add_square, squares);
    }
    float variance = squares.total() / C;
    // Of huge numbers both squares are infinite, and rstd shall be 0, as in PyTorch, not NaN.
    if (variance < INFINITY) variance -= mean * mean;
    const float rstd = 1.0f / std::sqrt((variance < 0.0f ? 0.0f : variance) + call.eps);
    call.rstd[row] = rstd;
    float* y = place(call.y, row, 0, scratch.row(2));
    along(C, [&](int64_t i, auto like) {
      using T = decltype(like);
      T value = (bits_of<T>(h + i) - shift - mean) * rstd;
      if (call.weight != nullptr) value *= bits_of<T>(call.weight + i);
      if (call.bias != nullptr) value += bits_of<T>(call.bias + i);
      put<T>(y + i, value);
    });
    finish(call.y, row, 0, C, y);
  }
}

namespace {

void norm_backward_row(const NormBackward& call, int64_t row, float* dweight, float* dbias, const Scratch& scratch) {
  const int64_t C = call.columns;
  const float* dy = read(call.dy, row, 0, C, scratch.row(0));
  const float* h = read(call.h, row, 0, C, scratch.row(1));
  const float mean = call.mean == nullptr ? 0.0f : call.mean[row], rstd = call.rstd[row];
  const auto scaled = [&](int64_t i, auto like) {
    using T = decltype(like);
    const T value = bits_of<T>(dy + i);
    return call.weight == nullptr ? value : value * bits_of<T>(call.weight + i);
  };
  Sum sum, product;
  const auto add = [&](int64_t i, auto like, int64_t a) {
    using T = decltype(like);
    const T gradient = bits_of<T>(dy + i), wdy = scaled(i, like), h_hat = (bits_of<T>(h + i) - mean) * rstd;
    sum.add(wdy, a);
    product.add(wdy * h_hat, a);
    if (dweight != nullptr) put<T>(dweight + i, bits_of<T>(dweight + i) + gradient * h_hat);
    if (dbias != nullptr) put<T>(dbias + i, bits_of<T>(dbias + i) + gradient);
  };
  along_summing(C, add, sum, product);
  if (call.dx.data == nullptr && call.dresidual.data == nullptr) return;
  const float mean_wdy = call.mean == nullptr ? 0.0f : sum.total() / C, mean_product = product.total() / C;
  const float* dsum = call.dsum.data == nullptr ? nullptr : read(call.dsum, row, 0, C, scratch.row(2));
  const Rows& first = call.dx.data == nullptr ? call.dresidual : call.dx;
  float* dh = place(first, row, 0, scratch.row(3));
  along(C, [&](int64_t i, auto like) {
    using T = decltype(like);
    const T h_hat = (bits_of<T>(h + i) - mean) * rstd;
    T value = (scaled(i, like) - mean_wdy - h_hat * mean_product) * rstd;
    if (dsum != nullptr) value += bits_of<T>(dsum + i);
    put<T>(dh + i, value);
  });
  finish(first, row, 0, C, dh);
  if (call.dx.data == nullptr || call.dresidual.data == nullptr) return;
  if (call.dresidual.element == Element::kFloat32) std::memcpy(place(call.dresidual, row, 0, nullptr), dh, C * sizeof(float));
  finish(call.dresidual, row, 0, C, dh);
}

// One gradient's sums over the rows of chunks, one chunk after the other.
class RowSum {
 public:
  RowSum(float* partials, int64_t columns)
      : partials_(partials), columns_(partials == nullptr ? 0 : columns), scratch_(2, columns_) {}
  float* block() const { return block_; }  // what rows are added to, or null
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
  void end_chunk() {  // leaves the sum of all blocks where the last one's is
    if (num_blocks_ == 0) return;
    for (int64_t i = 0; i < columns_; ++i) block_[i] = static_cast<float>(total()[i] + static_cast<double>(block_[i]));
  }

 private:
  double* total() const { return reinterpret_cast<double*>(scratch_.row(0)); }

  float* partials_;  // (chunks, columns), or null
  int64_t columns_;
  Scratch scratch_;
  float* block_ = nullptr;
  int64_t num_blocks_ = 0;  // that total holds
};

// The first row of a chunk: chunks differ by one row at most.
inline int64_t first_row(int64_t rows, int64_t chunks, int64_t chunk) {
  return chunk * (rows / chunks) + (chunk < rows % chunks ? chunk : rows % chunks);
}

// Calls add with the rows [begin, end) of each block of each chunk, for it to add them to the sums' blocks.
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

void norm_backward(const NormBackward& call, int64_t begin, int64_t end) {
  const Scratch scratch(4, call.columns);
  RowSum dweight(call.dweight, call.columns), dbias(call.dbias, call.columns);
  const auto add = [&](int64_t row, int64_t last) {
    for (; row < last; ++row) norm_backward_row(call, row, dweight.block(), dbias.block(), scratch);
  };
  sum_chunks(call.rows, call.chunks, begin, end, add, dweight, dbias);
}

void chunk_sums(const ChunkSums& call) {
  const int64_t C = call.columns;
  for (int64_t first = 0; first < C; first += kPiece) {
    const int64_t n = C - first < kPiece ? C - first : kPiece;
    double total[kPiece] = {};
    for (int64_t chunk = 0; chunk < call.chunks; ++chunk) {
      const float* partial = call.partials + chunk * C + first;
      for (int64_t i = 0; i < n; ++i) total[i] += static_cast<double>(partial[i]);
    }
    float rounded[kPiece];
    float* result = place(call.total, 0, first, rounded);
    for (int64_t i = 0; i < n; ++i) result[i] = static_cast<float>(total[i]);
    finish(call.total, 0, first, n, result);
  }
}

// Softmax

namespace {

inline int64_t whole_steps(int64_t n) { return (n + kStep - 1) / kStep * kStep; }

// How many columns a row sees: the first so many.
template <class Call>
inline int64_t columns_seen(const Call& call, int64_t row) {
  if (call.queries == 0) return call.columns;
  const int64_t seen = row % call.queries + call.columns - call.queries + 1;
  return seen < 0 ? 0 : seen;
}

// The first n elements of a row's mask as floats, 0 and 1 of a boolean one: where they lie, or copied into scratch.
const float* read(const Mask& mask, int64_t row, int64_t n, float* scratch) {
  int64_t first = 0;
  for (int64_t d = mask.dims - 1; d >= 0; --d) {
    first += row % mask.sizes[d] * mask.strides[d];
    row /= mask.sizes[d];
  }
  const int64_t step = mask.column_stride;
  if (!mask.boolean && step == 1) return read(Rows{mask.data, mask.element, 0}, 0, first, n, scratch);
  const auto copy = [&](const auto* source) {
    if (step == 1) {
      for (int64_t i = 0; i < n; ++i) scratch[i] = source[i];
    } else {
      for (int64_t i = 0; i < n; ++i) scratch[i] = source[i * step];
    }
  };
  if (mask.boolean) {
    copy(static_cast<const uint8_t*>(mask.data) + first);
  } else {
    with_element(mask.element, [&](auto element) { copy(static_cast<const decltype(element)*>(mask.data) + first); });
  }
  return scratch;
}

enum class Masking { kNone, kBoolean, kAdditive };

// Calls use with a value that stands for the kind of mask.
template <class Use>
inline void with_masking(const Mask& mask, Use use) {
  using Kinds = Masking;
  if (mask.data == nullptr) return use(std::integral_constant<Kinds, Kinds::kNone>());
  if (mask.boolean) return use(std::integral_constant<Kinds, Kinds::kBoolean>());
  use(std::integral_constant<Kinds, Kinds::kAdditive>());
}

struct Scores {
  float max;   // or the lowest number, where that is larger: -inf - -inf would be NaN where exp is to give 0
  bool alive;  // something was not removed
};

// Writes the n scores of a row, and -inf up to a whole number of steps.
template <Masking kMasking>
Scores scores(const float* x, const float* mask, int64_t n, float scale, float* s) {
  Vector maxima[kAccumulators];
  for (auto& max : maxima) max = Vector{} - 3.402823466e38f;
  IntegerVector alive = {};
  const auto add = [&](int64_t i, int64_t count, int64_t a) {
    Vector value = load(x + i, count) * scale;
    if constexpr (kMasking == Masking::kBoolean) {
      const Vector said = load(mask + i, count);
      value = said != 0.0f ? value : Vector{} - INFINITY;
      alive |= said != 0.0f;
    } else if constexpr (kMasking == Masking::kAdditive) {
      const Vector said = load(mask + i, count);
      value += said;
      alive |= cut(said, count, Vector{} - INFINITY) != -INFINITY;
    }
    if (count < kLanes) value = cut(value, count, Vector{} - INFINITY);
    put(s + i, value);
    maxima[a] = larger(value, maxima[a]);  // ignores NaN, which the sum does not
  };
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep)
    for (int64_t a = 0; a < kAccumulators; ++a) add(i + a * kLanes, kLanes, a);
  for (; i + kLanes <= n; i += kLanes) add(i, kLanes, 0);
  if (i < n) {
    add(i, n - i, 0);
    i += kLanes;
  }
  for (; i % kStep != 0; i += kLanes) put(s + i, Vector{} - INFINITY);
  const Vector lanes = larger(larger(maxima[0], maxima[1]), larger(maxima[2], maxima[3]));
  Scores found = {lanes[0], kMasking == Masking::kNone};
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    found.max = lanes[lane] > found.max ? lanes[lane] : found.max;
    found.alive |= alive[lane] != 0;
  }
  return found;
}

// The sum of exp(s - max) over whole steps; the exponentials replace s where kKeep.
template <bool kKeep>
float sum_of_exponentials(float* s, int64_t n, float max) {
  Sum sum;
  for (int64_t i = 0; i < n;) {
    const int64_t end = n - i < kPiece ? n : i + kPiece;
    for (; i < end; i += kStep) {
      Vector e[kAccumulators];
      for (int64_t a = 0; a < kAccumulators; ++a) e[a] = bits_of<Vector>(s + i + a * kLanes) - max;
      exponentials(e);
      for (int64_t a = 0; a < kAccumulators; ++a) {
        if constexpr (kKeep) put(s + i + a * kLanes, e[a]);
        sum.add(e[a], a);
      }
    }
    sum.end_block();
  }
  return sum.total();
}

// Stores the values that a row has in its first n columns, and fill in the others. Where kStream, rows that begin at an
// address for it go round the caches.
template <class E, bool kStream, class Value>
inline void write_values(E* y, int64_t n, int64_t columns, float fill, Value value) {
  const auto write = [&](int64_t i, Vector vector) {
    if (i + kLanes <= columns) return E::template store<kStream>(y + i, vector);
    E last[kLanes];
    E::template store<false>(last, vector);
    std::memcpy(static_cast<void*>(y + i), last, (columns - i) * sizeof(E));
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) write(i, value(i, kLanes));
  if (i < n) {
    write(i, cut(value(i, n - i), n - i, Vector{} + fill));
    i += kLanes;
  }
  for (; i < columns; i += kLanes) write(i, Vector{} + fill);
}

template <class Value>
void write_row(const Rows& rows, int64_t row, int64_t n, int64_t columns, bool stream, float fill, Value value) {
  with_element(rows.element, [&](auto element) {
    using E = decltype(element);
    E* y = static_cast<E*>(rows.data) + row * rows.stride;
    if (stream && reinterpret_cast<uintptr_t>(y) % (kLanes * sizeof(E)) == 0) {
      write_values<E, true>(y, n, columns, fill, value);
    } else {
      write_values<E, false>(y, n, columns, fill, value);
    }
  });
}

template <Masking kMasking>
void softmax_row(const Softmax& call, int64_t row, const Scratch& scratch) {
  const int64_t C = call.columns, n = columns_seen(call, row);
  float* s = scratch.row(0);
  Scores found = {0.0f, false};
  if (n > 0) {
    const float* mask = kMasking == Masking::kNone ? nullptr : read(call.mask, row, n, scratch.row(2));
    found = scores<kMasking>(read(call.x, row, 0, n, scratch.row(1)), mask, n, call.scale, s);
  }
  if (!found.alive) {
    const Vector nothing = Vector{} + (call.log ? -INFINITY : 0.0f);
    return write_row(call.y, row, 0, C, call.stream, nothing[0], [&](int64_t, int64_t) { return nothing; });
  }
  const int64_t steps = whole_steps(n);
  const float max = found.max;
  if (call.log) {
    const float logarithm = std::log(sum_of_exponentials<false>(s, steps, max));
    write_row(call.y, row, n, C, call.stream, -INFINITY - max - logarithm,
              [&](int64_t i, int64_t) { return bits_of<Vector>(s + i) - max - logarithm; });
  } else {
    const float sum = sum_of_exponentials<true>(s, steps, max);
    write_row(call.y, row, n, C, call.stream, 0.0f / sum,
              [&](int64_t i, int64_t) { return bits_of<Vector>(s + i) / sum; });
  }
}

}  // namespace

void softmax(const Softmax& call, int64_t begin, int64_t end) {
  const Scratch scratch(3, whole_steps(call.columns));
  with_masking(call.mask, [&](auto masking) {
    for (int64_t row = begin; row < end; ++row) softmax_row<decltype(masking)::value>(call, row, scratch);
  });
  if (call.stream) finish_streaming();
}

namespace {

// The gradient ds of a row's n scores, of which value gives vectors, into both results.
template <class Value>
void write_gradients(const SoftmaxBackward& call, int64_t row, int64_t n, float fill, Value value) {
  const float scale = call.scale;
  const auto scaled = [&](int64_t i, int64_t count) { return value(i, count) * scale; };
  if (call.dx.data != nullptr) write_row(call.dx, row, n, call.columns, call.stream, fill, scaled);
  if (call.dmask.data != nullptr) write_row(call.dmask, row, n, call.columns, call.stream, fill, value);
}

// Calls body with the index of each vector, how many elements it has, and the accumulator to add to, and ends blocks.
template <class Body>
inline float sum_over(int64_t n, Body body) {
  Sum sum;
  for (int64_t i = 0; i < n;) {
    const int64_t end = n - i < kPiece ? n : i + kPiece;
    for (; i + kStep <= end; i += kStep)
      for (int64_t a = 0; a < kAccumulators; ++a) sum.add(body(i + a * kLanes, kLanes), a);
    for (; i + kLanes <= end; i += kLanes) sum.add(body(i, kLanes), 0);
    if (i < end) {
      sum.add(body(i, end - i), 0);
      i = end;
    }
    sum.end_block();
  }
  return sum.total();
}

template <Masking kMasking>
void softmax_backward_row(const SoftmaxBackward& call, int64_t row, const Scratch& scratch) {
  const bool masked = kMasking != Masking::kNone || call.queries != 0;
  const int64_t n = columns_seen(call, row);
  const float* dy = read(call.dy, row, 0, n, scratch.row(0));
  const float* y = read(call.y, row, 0, n, scratch.row(1));
  const auto gradient = [&](int64_t i, int64_t count) {
    const Vector value = load(dy + i, count);
    if (!masked) return value;
    // Else an infinite dy of a hidden element would make its row NaN.
    return load(y + i, count) == 0.0f ? Vector{} : value;
  };
  const float total = sum_over(n, [&](int64_t i, int64_t count) { return gradient(i, count) * load(y + i, count); });
  write_gradients(call, row, n, total - total, [&](int64_t i, int64_t count) {
    return load(y + i, count) * (gradient(i, count) - total);
  });
}

// Every dy counts, even a hidden element's; but its own dx is 0, for no input moves it.
template <Masking kMasking>
void log_softmax_backward_row(const SoftmaxBackward& call, int64_t row, const Scratch& scratch) {
  const int64_t C = call.columns, n = columns_seen(call, row);
  const float* dy = read(call.dy, row, 0, C, scratch.row(0));
  const float* y = read(call.y, row, 0, n, scratch.row(1));
  const float* mask = kMasking == Masking::kBoolean ? read(call.mask, row, n, scratch.row(2)) : nullptr;
  if constexpr (kMasking == Masking::kAdditive) {
    bool alive = false;
    for (int64_t i = 0; i < n; ++i) alive |= y[i] != -INFINITY;
    if (!alive) return write_gradients(call, row, 0, 0.0f, [](int64_t, int64_t) { return Vector{}; });
  }
  const float total = sum_over(C, [&](int64_t i, int64_t count) { return load(dy + i, count); });
  float* e = scratch.row(3);
  scores<Masking::kNone>(y, nullptr, n, 1.0f, e);
  sum_of_exponentials<true>(e, whole_steps(n), 0.0f);
  write_gradients(call, row, n, 0.0f, [&](int64_t i, int64_t count) {
    const Vector ds = load(dy + i, count) - bits_of<Vector>(e + i) * total;
    if constexpr (kMasking != Masking::kBoolean) return ds;
    return load(mask + i, count) != 0.0f ? ds : Vector{};
  });
}

}  // namespace

void softmax_backward(const SoftmaxBackward& call, int64_t begin, int64_t end) {
  const Scratch scratch(4, whole_steps(call.columns));
  with_masking(call.mask, [&](auto masking) {
    constexpr Masking kMasking = decltype(masking)::value;
    for (int64_t row = begin; row < end; ++row)
      call.log ? log_softmax_backward_row<kMasking>(call, row, scratch)
               : softmax_backward_row<kMasking>(call, row, scratch);
  });
  if (call.stream) finish_streaming();
}

// Activations

namespace {

// Calls use with the row, the first column and the size of each piece [begin, end).
template <class Use>
inline void for_each_piece(int64_t columns, int64_t begin, int64_t end, Use use) {
  const int64_t pieces = (columns + kPiece - 1) / kPiece;
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t first = piece % pieces * kPiece;
    use(piece / pieces, first, columns - first < kPiece ? columns - first : kPiece);
  }
}

// sigmoid(x) and 1 - sigmoid(x). Neither is a difference, which would cancel, and exp sees no positive number.
struct Gate {
  Vector share;
  Vector rest;
};

inline Gate sigmoid(Vector x) {
  const Vector small = exponential(x < 0.0f ? x : -x), large = 1.0f / (small + 1.0f), product = small * large;
  return {x < 0.0f ? product : large, x < 0.0f ? large : product};
}

// gelu(x) = x g(x) with the derivative g + x g'.
struct GeluPart {
  Vector g;
  Vector slope;  // g'
};

// g is a sigmoid of u = 2 sqrt(2 / pi) (x + 0.044715 x^3).
inline GeluPart gelu_by_tanh(Vector x) {
  Vector squared = x * x;
  squared = squared > 1e4f ? Vector{} + 1e4f : squared;  // g' is 0 long before, and must not be multiplied by infinity
  const Gate gate = sigmoid(x * (squared * 0.07135481282703227f + 1.5957691216057308f));
  return {gate.share, gate.share * gate.rest * (squared * 0.21406443848109681f + 1.5957691216057308f)};
}

// g(x) = erfc(-x / sqrt(2)) / 2: left of 0 it is density times t q(t), t = 1 / (1 + c |x|), as in Hastings 1955, with the
// polynomial of least maximal error of (1 + |x|) g, which is 1.1e-8. One exp serves g and its derivative, the density.
inline GeluPart gelu_by_erf(Vector x) {
  const Vector e = exponential(x * x * -0.5f), t = 1.0f / ((x < 0.0f ? -x : x) * 0.27577164f + 1.0f);
  Vector q = t * -0x1.d02e56p-4f + 0x1.c4231ap-2f;
  q = q * t - 0x1.42606ap-2f;
  q = q * t + 0x1.4a38f6p-2f;
  q = q * t + 0x1.7dc6e8p-5f;
  q = q * t + 0x1.e15c4ep-4f;  // 2e-8 above the best: q(1), and with it g(0), is then one half to the last bit
  const Vector tail = q * t * e, far = x < 0.0f ? tail : 1.0f - tail;
  // Where g is about one half the roundings of t alone would be 2 ulp of it: there it is 1/2 + x p(x^2).
  const Vector w = x * x;
  Vector p = w * 0x1.7bd072p-14f - 0x1.305be0p-10f;
  p = p * w + 0x1.466648p-7f;
  p = p * w - 0x1.10558ap-4f;
  p = p * w + 0x1.98844ap-2f;
  return {w < 1.0f ? x * p + 0.5f : far, e * 0.3989422804014327f};
}

template <bool kTanh>
inline GeluPart gelu_of(Vector x) {
  return kTanh ? gelu_by_tanh(x) : gelu_by_erf(x);
}

inline const float* from(const float* vector, int64_t first) { return vector == nullptr ? nullptr : vector + first; }

template <bool kTanh>
void gelu_piece(const Gelu& call, int64_t row, int64_t first, int64_t n, const Scratch& scratch) {
  float* y = place(call.y, row, first, scratch.row(1));
  map<2, 1>(n, {read(call.x, row, first, n, scratch.row(0)), from(call.bias, first)}, {y},
            [](const Vector(&in)[2], Vector(&out)[1]) {
              const Vector x = in[0] + in[1];
              out[0] = x * gelu_of<kTanh>(x).g;
            });
  finish(call.y, row, first, n, y);
}

template <bool kTanh>
void gelu_backward_piece(const GeluBackward& call, int64_t row, int64_t first, int64_t n, float* dbias,
                         const Scratch& scratch) {
  const float* dy = read(call.dy, row, first, n, scratch.row(0));
  const float* x = read(call.x, row, first, n, scratch.row(1));
  float* dx = call.dx.data == nullptr ? nullptr : place(call.dx, row, first, scratch.row(2));
  const float* bias = from(call.bias, first);
  const auto gradient = [](Vector dy, Vector x) {
    const GeluPart part = gelu_of<kTanh>(x);
    return dy * (part.g + x * part.slope);
  };
  if (dbias == nullptr) {
    map<3, 1>(n, {dy, x, bias}, {dx},
              [&](const Vector(&in)[3], Vector(&out)[1]) { out[0] = gradient(in[0], in[1] + in[2]); });
  } else {
    map<4, 2>(n, {dy, x, bias, dbias}, {dx, dbias}, [&](const Vector(&in)[4], Vector(&out)[2]) {
      out[0] = gradient(in[0], in[1] + in[2]);
      out[1] = in[3] + out[0];
    });
  }
  if (dx != nullptr) finish(call.dx, row, first, n, dx);
}

}  // namespace

void gelu(const Gelu& call, int64_t begin, int64_t end) {
  const Scratch scratch(2, kPiece);
  for_each_piece(call.columns, begin, end, [&](int64_t row, int64_t first, int64_t n) {
    (call.tanh ? gelu_piece<true> : gelu_piece<false>)(call, row, first, n, scratch);
  });
}

void gelu_backward(const GeluBackward& call, int64_t begin, int64_t end) {
  const Scratch scratch(3, kPiece);
  const int64_t pieces = (call.columns + kPiece - 1) / kPiece;
  const auto run = [&](int64_t first_piece, int64_t last_piece, float* dbias) {
    for_each_piece(call.columns, first_piece, last_piece, [&](int64_t row, int64_t first, int64_t n) {
      float* sums = dbias == nullptr ? nullptr : dbias + first;
      (call.tanh ? gelu_backward_piece<true> : gelu_backward_piece<false>)(call, row, first, n, sums, scratch);
    });
  };
  if (call.dbias == nullptr) return run(begin, end, nullptr);
  RowSum dbias(call.dbias, call.columns);
  const auto add = [&](int64_t row, int64_t last) { run(row * pieces, last * pieces, dbias.block()); };
  sum_chunks(call.rows, call.chunks, begin, end, add, dbias);
}

void swiglu(const Swiglu& call, int64_t begin, int64_t end) {
  const Scratch scratch(3, kPiece);
  for_each_piece(call.columns, begin, end, [&](int64_t row, int64_t first, int64_t n) {
    const float* gate = read(call.gate, row, first, n, scratch.row(0));
    const float* up = read(call.up, row, first, n, scratch.row(1));
    float* y = place(call.y, row, first, scratch.row(2));
    map<2, 1>(n, {gate, up}, {y}, [](const Vector(&in)[2], Vector(&out)[1]) {
      out[0] = in[0] * sigmoid(in[0]).share * in[1];
    });
    finish(call.y, row, first, n, y);
  });
}

void swiglu_backward(const SwigluBackward& call, int64_t begin, int64_t end) {
  const Scratch scratch(5, kPiece);
  for_each_piece(call.columns, begin, end, [&](int64_t row, int64_t first, int64_t n) {
    const float* dy = read(call.dy, row, first, n, scratch.row(0));
    const float* gate = read(call.gate, row, first, n, scratch.row(1));
    const float* up = read(call.up, row, first, n, scratch.row(2));
    float* dgate = call.dgate.data == nullptr ? nullptr : place(call.dgate, row, first, scratch.row(3));
    float* dup = call.dup.data == nullptr ? nullptr : place(call.dup, row, first, scratch.row(4));
    map<3, 2>(n, {dy, gate, up}, {dgate, dup}, [](const Vector(&in)[3], Vector(&out)[2]) {
      const Gate part = sigmoid(in[1]);
      const Vector silu = in[1] * part.share;
      out[0] = in[0] * in[2] * (part.share + silu * part.rest);
      out[1] = in[0] * silu;
    });
    if (dgate != nullptr) finish(call.dgate, row, first, n, dgate);
    if (dup != nullptr) finish(call.dup, row, first, n, dup);
  });
}

// Rotary

namespace {

inline bool is_aligned(const float* y) { return reinterpret_cast<uintptr_t>(y) % sizeof(Vector) == 0; }

// One head; sin has the sign of the direction.
template <bool kStream>
inline void turn(const float* x, const float* cos, const float* sin, float* y, int64_t R, bool interleaved) {
  if (interleaved) {
    for (int64_t i = 0; i < R; ++i) {
      const float x1 = x[2 * i], x2 = x[2 * i + 1];
      y[2 * i] = x1 * cos[i] - x2 * sin[i];
      y[2 * i + 1] = x2 * cos[i] + x1 * sin[i];
    }
    return;
  }
  along(R, [&](int64_t i, auto like) {
    using T = decltype(like);
    const T x1 = bits_of<T>(x + i), x2 = bits_of<T>(x + R + i), c = bits_of<T>(cos + i), s = bits_of<T>(sin + i);
    write<kStream>(y + i, T(x1 * c - x2 * s));
    write<kStream>(y + R + i, T(x2 * c + x1 * s));
  });
}

}  // namespace

void rotary(const Rotary& call, int64_t begin, int64_t end) {
  const int64_t R = call.pairs, C = call.columns;
  const bool stream = call.stream && call.y.element == Element::kFloat32;
  const Scratch scratch(5, C);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t batch = index / call.tokens, token = index % call.tokens;
    const int64_t position = call.positions == nullptr ? token : call.positions[index];
    const int64_t x_first = batch * call.x_batch + token * call.x_token;
    const int64_t y_first = batch * call.y_batch + token * call.y_token;
    const float* cos = read(call.cos, position, 0, R, scratch.row(0));
    const float* given_sin = read(call.sin, position, 0, R, scratch.row(1));
    float* sin = scratch.row(2);
    for (int64_t i = 0; i < R; ++i) sin[i] = call.inverse ? -given_sin[i] : given_sin[i];
    for (int64_t head = 0; head < call.heads; ++head) {
      const float* x = read(call.x, head, x_first, C, scratch.row(3));
      float* y = place(call.y, head, y_first, scratch.row(4));
      if (stream && is_aligned(y) && is_aligned(y + R)) {
        turn<true>(x, cos, sin, y, R, call.interleaved);
      } else {
        turn<false>(x, cos, sin, y, R, call.interleaved);
      }
      if (y != x && C > 2 * R) std::memcpy(y + 2 * R, x + 2 * R, (C - 2 * R) * sizeof(float));
      finish(call.y, head, y_first, C, y);
    }
  }
  if (stream) finish_streaming();
}

}  // namespace FASTLM_INSTRUCTION_SET

#if VECTOR_BYTES == 16  // the portable copy chooses among all

#define CHOOSE_LAYER(function, Type) \
  CHOOSE(function, function##_cpu, (const Type& call, int64_t begin, int64_t end), (call, begin, end))
CHOOSE_LAYER(norm, Norm)
CHOOSE_LAYER(norm_backward, NormBackward)
CHOOSE(chunk_sums, chunk_sums_cpu, (const ChunkSums& call), (call))
CHOOSE_LAYER(softmax, Softmax)
CHOOSE_LAYER(softmax_backward, SoftmaxBackward)
CHOOSE_LAYER(gelu, Gelu)
CHOOSE_LAYER(gelu_backward, GeluBackward)
CHOOSE_LAYER(swiglu, Swiglu)
CHOOSE_LAYER(swiglu_backward, SwigluBackward)
CHOOSE_LAYER(rotary, Rotary)

#endif

}  // namespace fastlm
