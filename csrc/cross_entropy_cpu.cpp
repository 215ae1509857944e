// Cross entropy on a CPU: each row is read from memory once, and exp is taken once of each logit: the exponentials that
// are summed are kept, and the second pass, which finds them in the cache, only multiplies them.
#include "cross_entropy.h"
#include "cross_entropy_math.h"
#include "instruction_sets.h"
#include "vectors.h"

#include <cstdlib>
#include <type_traits>

namespace fastlm {
namespace FASTLM_INSTRUCTION_SET {
namespace {

// Logits whose maximum is known before they are summed, and which are summed by themselves: 8 KiB stay in L1, and a row
// has the same bits however it is shared out over threads.
constexpr int64_t kSlice = 2048;
constexpr int64_t kNarrow = 256;  // columns below which half-written cache lines cost more than streaming spares


// Asks for the cache line of next[i], which is needed soon; memory would stand idle while this piece is computed.
template <class T>
inline void prefetch(const T* next, int64_t i) {
  if (next != nullptr) __builtin_prefetch(next + i, 0, 2);
}

template <class T>
float largest(const T* z, int64_t n) {
  Vector maxima[kAccumulators];
  for (auto& max : maxima) max = Vector{} - INFINITY;
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep)
    for (int64_t a = 0; a < kAccumulators; ++a) maxima[a] = larger(T::load(z + i + a * kLanes), maxima[a]);
  for (; i + kLanes <= n; i += kLanes) maxima[0] = larger(T::load(z + i), maxima[0]);
  float max = largest_of_lanes(larger(larger(maxima[0], maxima[1]), larger(maxima[2], maxima[3])));
  for (; i < n; ++i) max = larger(z[i], max);
  return max;
}

// What the first pass over a row leaves to the second.
struct Kept {
  float* exponentials;  // (num_classes,) of each logit less the maximum of its slice
  float* maxima;        // of the slices
};

// What the kernel of a call with these options does.
template <class T, bool kSoftcap, bool kSmoothing>
struct Kernel {
  // The statistics of n logits; w are their classes' weights, or null. Where exponentials are kept they may replace z.
  template <bool kKeep>
  static Statistics statistics(const T* z, const float* w, int64_t n, float softcap, float* kept, const T* next) {
    // A NaN is ignored by the maximum but not by the sum, and so makes the whole row NaN, as in PyTorch.
    const float max = capped<kSoftcap>(largest(z, n), softcap).x;
    const float subtrahend = shift(max);
    Vector sums[kAccumulators] = {}, weights[kAccumulators] = {}, weighted[kAccumulators] = {};
    const auto add = [&](int64_t i, auto& x) {  // as many vectors as x holds, from element i on
      int a = 0;
      for (auto& value : x) value = capped<kSoftcap>(T::load(z + i + a++ * kLanes), softcap).x - subtrahend;
      if constexpr (kSmoothing) {
        a = 0;
        for (const auto& value : x) {
          const Vector weight = w == nullptr ? Vector{} + 1.0f : bits_of<Vector>(w + i + a * kLanes);
          weights[a] += weight;
          weighted[a++] += weight * value;
        }
      }
      exponentials(x);
      a = 0;
      for (const auto& value : x) {
        if constexpr (kKeep) std::memcpy(kept + i + a * kLanes, &value, sizeof value);
        sums[a++] += value;
      }
    };
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep) {
      for (int64_t a = 0; a < kAccumulators; ++a) prefetch(next, i + a * kLanes);
      Vector several[kAccumulators];
      add(i, several);
    }
    for (; i + kLanes <= n; i += kLanes) {
      Vector one[1];
      add(i, one);
    }
    Statistics slice = {max, sum_of_lanes(sums), sum_of_lanes(weights), sum_of_lanes(weighted)};
    for (; i < n; ++i) {
      const float x = capped<kSoftcap>(static_cast<float>(z[i]), softcap).x - subtrahend;
      const float e = exponential(x);
      slice.sum += e;
      if constexpr (kKeep) kept[i] = e;
      if constexpr (kSmoothing) {
        const float weight = w == nullptr ? 1.0f : w[i];
        slice.weight += weight;
        slice.weighted += weight * x;
      }
    }
    return slice;
  }

  // The part that the slice from column begin on is of its row.
  static Part part(const CrossEntropy& call, int64_t row, int64_t begin, const Kept& kept = {}) {
    const int64_t end = slice_end(call, begin), column = call.target[row] - call.first_class;
    const T* z = input_row(call, row);
    const T* next = end < call.num_classes ? z + end : row + 1 < call.rows ? input_row(call, row + 1) : nullptr;
    const float* w = call.weight == nullptr ? nullptr : call.weight + begin;
    Part part = {no_logits(), 0.0f, 0.0f};
    if (begin <= column && column < end) {  // read before exponentials may take its place
      part.target_logit = capped<kSoftcap>(static_cast<float>(z[column]), call.softcap).x;
      part.target_weight = class_weight(call, column);
    }
    if (kept.exponentials == nullptr) {
      part.logits = statistics<false>(z + begin, w, end - begin, call.softcap, nullptr, next);
    } else {
      part.logits = statistics<true>(z + begin, w, end - begin, call.softcap, kept.exponentials + begin, next);
      kept.maxima[begin / kSlice] = part.logits.max;
    }
    return part;
  }

  static Part whole_row(const CrossEntropy& call, int64_t row, const Kept& kept = {}) {
    Part whole = {no_logits(), 0.0f, 0.0f};
    if (call.given_parts != nullptr) {
      for (int64_t k = 0; k < call.num_given; ++k)
        whole = merge<kSmoothing>(whole, call.given_parts[k * call.rows + row]);
      return whole;
    }
    for (int64_t i = 0; i < call.num_classes; i += kSlice)
      whole = merge<kSmoothing>(whole, part(call, row, i, kept));
    return whole;
  }

  // The gradient of the slice from column begin on, but for the target's.
  template <bool kStream, bool kKept>
  static void write_slice(const CrossEntropy& call, int64_t row, const Row& facts, int64_t begin, const Kept& kept) {
    const T* z = input_row(call, row);
    T* y = gradient_row(call, row);
    const int64_t end = slice_end(call, begin);
    const float max = kKept ? kept.maxima[begin / kSlice]
                            : capped<kSoftcap>(largest<T>(z + begin, end - begin), call.softcap).x;
    const float subtrahend = shift(max), factor = gradient_factor<kSmoothing>(facts) * rescale(max, facts.max);
    const auto single = [&](int64_t i) {
      Logit<float> logit = {0.0f, 1.0f};
      if constexpr (!kKept) logit = capped<kSoftcap>(static_cast<float>(z[i]), call.softcap);
      const float e = kKept ? kept.exponentials[i] : exponential(logit.x - subtrahend);
      y[i] = gradient<kSmoothing, float>(e * factor, class_weight(call, i), facts, logit.slope);
    };
    int64_t i = begin;
    if (kStream) {
      for (; i < end && reinterpret_cast<uintptr_t>(y + i) % (kLanes * sizeof(T)) != 0; ++i) single(i);
    }
    for (; i + kLanes <= end; i += kLanes) {
      Logit<Vector> logit = {Vector{}, Vector{} + 1.0f};
      if constexpr (!kKept) logit = capped<kSoftcap>(T::load(z + i), call.softcap);
      const Vector e = kKept ? bits_of<Vector>(kept.exponentials + i) : exponential<Vector>(logit.x - subtrahend);
      const Vector weight = kSmoothing && call.weight != nullptr ? bits_of<Vector>(call.weight + i) : Vector{} + 1.0f;
      T::template store<kStream>(y + i, gradient<kSmoothing, Vector>(e * factor, weight, facts, logit.slope));
    }
    for (; i < end; ++i) single(i);
  }

  // Columns [begin, end) of the gradient, whole slices, and the padding if they reach it.
  template <bool kKept>
  static void write_gradient(const CrossEntropy& call, int64_t row, const Part& whole, const Row& facts, int64_t begin,
                             int64_t end, const Kept& kept) {
    T* y = gradient_row(call, row);
    const int64_t column = call.target[row] - call.first_class;
    const bool here = begin <= column && column < end;
    Logit<float> target = {whole.target_logit, 1.0f};
    if constexpr (kSoftcap)
      if (here) target = capped<kSoftcap>(static_cast<float>(input_row(call, row)[column]), call.softcap);
    const bool through_cache = call.gradient == call.input || call.columns < kNarrow;
    for (int64_t i = begin; i < end; i += kSlice) {
      through_cache ? write_slice<false, kKept>(call, row, facts, i, kept)
                    : write_slice<true, kKept>(call, row, facts, i, kept);
    }
    if (here) y[column] = target_gradient<kSmoothing>(target, class_weight(call, column), facts);
    if (end == call.num_classes) std::memset(y + end, 0, (call.columns - end) * sizeof(T));
  }

  // Loss and gradient of columns [begin, end) of a row that counts or not.
  template <bool kKept>
  static void finish_row(const CrossEntropy& call, int64_t row, int64_t begin, int64_t end, const Kept& kept) {
    if (is_made(call, row)) return;
    const bool with_loss = begin == 0;
    if (call.target[row] == call.ignore_index) {
      if (with_loss) call.losses[row] = 0.0f;
      const int64_t written = end == call.num_classes ? call.columns : end;
      if (call.gradient != nullptr) std::memset(gradient_row(call, row) + begin, 0, (written - begin) * sizeof(T));
      return;
    }
    const Part whole = whole_row(call, row, kept);
    const Row facts = finish<kSmoothing>(whole, call, row_scale(call, row));
    if (with_loss) call.losses[row] = facts.loss;
    if (call.gradient != nullptr) write_gradient<kKept>(call, row, whole, facts, begin, end, kept);
  }

  static void rows(const CrossEntropy& call, int64_t begin, int64_t end) {
    // The gradient of a capped logit needs the logit too.
    const bool keep = !kSoftcap && call.gradient != nullptr && call.given_parts == nullptr && call.parts == nullptr;
    const bool over_logits = std::is_same<T, Float32>::value && call.gradient == call.input;
    const int64_t slices = (call.num_classes + kSlice - 1) / kSlice;
    const int64_t floats = slices + (over_logits ? 0 : call.num_classes);
    float* scratch = keep ? static_cast<float*>(std::malloc(floats * sizeof(float))) : nullptr;  // null: nothing is kept
    for (int64_t row = begin; row < end; ++row) {
      if (scratch != nullptr) {
        float* over = reinterpret_cast<float*>(gradient_row(call, row));
        finish_row<true>(call, row, 0, call.num_classes, {over_logits ? over : scratch + slices, scratch});
      } else if (call.parts == nullptr) {
        finish_row<false>(call, row, 0, call.num_classes, {});
      } else {
        const bool counts = call.target[row] != call.ignore_index;
        call.parts[row] = counts ? whole_row(call, row) : Part{no_logits(), 0.0f, 0.0f};
      }
    }
    std::free(scratch);
    finish_streaming();
  }

  static void slice_parts(const CrossEntropy& call, Part* parts, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      parts[task] = part(call, task % call.rows, task / call.rows * kSlice);
  }

  static void slice_gradients(const CrossEntropy& call, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / call.rows * kSlice;
      finish_row<false>(call, task % call.rows, first, slice_end(call, first), {});
    }
    finish_streaming();
  }

  static const T* input_row(const CrossEntropy& call, int64_t row) {
    return static_cast<const T*>(call.input) + row * call.input_stride;
  }

  static T* gradient_row(const CrossEntropy& call, int64_t row) {
    return static_cast<T*>(call.gradient) + row * call.gradient_stride;
  }

  static float class_weight(const CrossEntropy& call, int64_t column) {
    return call.weight == nullptr ? 1.0f : call.weight[column];
  }

  static int64_t slice_end(const CrossEntropy& call, int64_t begin) {
    return call.num_classes - begin < kSlice ? call.num_classes : begin + kSlice;
  }
};

// Calls use with the kernel for the call's element and options.
template <class Use>
void with_kernel(const CrossEntropy& call, Use use) {
  with_element(call.element, [&](auto element) {
    using T = decltype(element);
    if (call.softcap != 0.0f) {
      call.label_smoothing != 0.0f ? use(Kernel<T, true, true>()) : use(Kernel<T, true, false>());
    } else {
      call.label_smoothing != 0.0f ? use(Kernel<T, false, true>()) : use(Kernel<T, false, false>());
    }
  });
}

}  // namespace

void rows(const CrossEntropy& call, int64_t begin, int64_t end) {
  with_kernel(call, [&](auto kernel) { kernel.rows(call, begin, end); });
}

void slice_parts(const CrossEntropy& call, Part* parts, int64_t begin, int64_t end) {
  with_kernel(call, [&](auto kernel) { kernel.slice_parts(call, parts, begin, end); });
}

void slice_gradients(const CrossEntropy& call, int64_t begin, int64_t end) {
  with_kernel(call, [&](auto kernel) { kernel.slice_gradients(call, begin, end); });
}

void scale_rows(const ScaleRows& call, int64_t begin, int64_t end) {
  with_element(call.element, [&](auto element) {
    using T = decltype(element);
    for (int64_t row = begin; row < end; ++row) {
      const float scale = call.scale[row * call.scale_stride];
      if (scale == 1.0f) continue;
      T* x = static_cast<T*>(call.input) + row * call.stride;
      int64_t i = 0;
      for (; i + kLanes <= call.columns; i += kLanes) T::template store<false>(x + i, T::load(x + i) * scale);
      for (; i < call.columns; ++i) x[i] = x[i] * scale;
    }
  });
}

}  // namespace FASTLM_INSTRUCTION_SET

#if VECTOR_BYTES == 16  // the portable copy chooses among all

CHOOSE(rows, cross_entropy_cpu, (const CrossEntropy& call, int64_t begin, int64_t end), (call, begin, end))
CHOOSE(slice_parts, slice_parts_cpu, (const CrossEntropy& call, Part* parts, int64_t begin, int64_t end),
       (call, parts, begin, end))
CHOOSE(slice_gradients, slice_gradients_cpu, (const CrossEntropy& call, int64_t begin, int64_t end), (call, begin, end))
CHOOSE(scale_rows, scale_rows_cpu, (const ScaleRows& call, int64_t begin, int64_t end), (call, begin, end))

int64_t slices_cpu(const CrossEntropy& call) {
  return (call.num_classes + portable::kSlice - 1) / portable::kSlice;
}

#endif

}  // namespace fastlm
