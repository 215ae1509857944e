// Cross entropy on a CPU: each row is read from memory once, and exp of each logit is computed once: the exponentials
// that are summed are saved, and the second pass, which finds them in the cache, only multiplies them.
#include "cpu_dispatch.h"
#include "cross_entropy.h"
#include "cross_entropy_math.h"
#include "vec.h"

#include <cstdlib>
#include <type_traits>

namespace fastlm {
namespace FASTLM_INSTRUCTION_SET {
namespace {

// Columns below which partly written cache lines cost more than non-temporal stores save.
constexpr int64_t kMinNonTemporalColumns = 256;

// How far ahead logits are prefetched, through the rows' ends: the maximum of the next slice is taken at once, and what
// it reads must have arrived by then.
constexpr int64_t kPrefetchedAhead = 2 * kSlice;

template <class T>
inline void prefetch(const T* z) {
  __builtin_prefetch(z + kPrefetchedAhead, 0, 2);
}

// Numbers of 16 bits as integers of the same order, or back: below a sign that is set, the bits are flipped.
inline WideShortVector ordered(WideShortVector bits) { return bits ^ ((bits >> 15) & int16_t{0x7FFF}); }

// Of 16 bits as integers: a vector holds twice as many, and none is converted. The NaNs that are positive come last.
template <class T>
Vector maxima_of_shorts(const T* z, int64_t n) {
  WideShortVector maxima[kAccumulators];
  for (auto& max : maxima) max = WideShortVector{} + int16_t{INT16_MIN};
  for (int64_t i = 0; i + 2 * kStep <= n; i += 2 * kStep)
    for (int64_t a = 0; a < kAccumulators; ++a) {
      const WideShortVector x = ordered(vec_load<WideShortVector>(z + i + a * 2 * kLanes));
      maxima[a] = x > maxima[a] ? x : maxima[a];
    }
  for (int64_t a = 1; a < kAccumulators; ++a) maxima[0] = maxima[a] > maxima[0] ? maxima[a] : maxima[0];
  const WideShortVector max = ordered(maxima[0]);
  const T* lanes = reinterpret_cast<const T*>(&max);
  return vec_max(T::load(lanes), T::load(lanes + kLanes));
}

template <class T>
float max_of_slice(const T* z, int64_t n) {
  Vector maxima[kAccumulators];
  for (auto& max : maxima) max = Vector{} - INFINITY;
  int64_t i = 0;
  if constexpr (sizeof(T) == sizeof(int16_t)) {
    if (n >= 2 * kStep) maxima[0] = maxima_of_shorts(z, n);
    i = n / (2 * kStep) * (2 * kStep);
  }
  for (; i + kStep <= n; i += kStep)
    for (int64_t a = 0; a < kAccumulators; ++a) maxima[a] = vec_max(T::load(z + i + a * kLanes), maxima[a]);
  for (; i + kLanes <= n; i += kLanes) maxima[0] = vec_max(T::load(z + i), maxima[0]);
  float max = reduce_max(vec_max(vec_max(maxima[0], maxima[1]), vec_max(maxima[2], maxima[3])));
  for (; i < n; ++i) max = vec_max(z[i], max);
  return max;
}

// What the first pass over a row leaves to the second.
struct SavedRow {
  float* exponentials;  // (num_classes,) exp of each logit minus the maximum of its slice; null: nothing is saved
  float* maxima;        // of the slices
};

// The kernels for the dtypes of input and gradient and options. They reduce a row slice by slice, so that its bits are
// the same on any number of threads; the maximum of a slice is known before its exponentials are summed.
template <class T, class G, bool kSoftcap, bool kSmoothing>
struct Kernel {
  template <class V, int kCount>
  static void take_exponentials(V (&x)[kCount]) {
    if constexpr (sizeof(T) == sizeof(float)) {
      exponentials(x);
    } else {
      exponentials_for_16_bits(x);
    }
  }

  template <class V>
  static V take_exponential(V x) {
    V only[1] = {x};
    take_exponentials(only);
    return only[0];
  }

  // The statistics of n logits; w are their classes' weights, or null. Saved exponentials may replace z.
  template <bool kSave>
  static LogitStats statistics(const T* z, const float* w, int64_t n, float softcap, float* saved) {
    // A NaN is ignored by the maximum but not by the sum, and so makes the whole row NaN, as in PyTorch.
    const float max = apply_softcap<kSoftcap>(max_of_slice(z, n), softcap).x;
    const float subtrahend = shift(max);
    Vector sums[kAccumulators] = {}, weights[kAccumulators] = {}, weighted[kAccumulators] = {};
    const auto add = [&](int64_t i, auto& x) {  // as many vectors as x holds, from element i on
      int a = 0;
      for (auto& value : x) value = apply_softcap<kSoftcap>(T::load(z + i + a++ * kLanes), softcap).x - subtrahend;
      if constexpr (kSmoothing) {
        a = 0;
        for (const auto& value : x) {
          const Vector weight = w == nullptr ? Vector{} + 1.0f : vec_load<Vector>(w + i + a * kLanes);
          weights[a] += weight;
          weighted[a++] += weight * value;
        }
      }
      take_exponentials(x);
      a = 0;
      for (const auto& value : x) {
        if constexpr (kSave) vec_store(saved + i + a * kLanes, value);
        sums[a++] += value;
      }
    };
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep) {
      for (int64_t a = 0; a < kAccumulators; ++a) prefetch(z + i + a * kLanes);
      Vector several[kAccumulators];
      add(i, several);
    }
    for (; i + kLanes <= n; i += kLanes) {
      Vector one[1];
      add(i, one);
    }
    LogitStats stats = {max, reduce_add(sums), reduce_add(weights), reduce_add(weighted)};
    for (; i < n; ++i) {
      const float x = apply_softcap<kSoftcap>(static_cast<float>(z[i]), softcap).x - subtrahend;
      const float e = take_exponential(x);
      stats.sum += e;
      if constexpr (kSave) saved[i] = e;
      if constexpr (kSmoothing) {
        const float weight = w == nullptr ? 1.0f : w[i];
        stats.weight += weight;
        stats.weighted += weight * x;
      }
    }
    return stats;
  }

  // The statistics of the slice from column begin on.
  static PartialStats slice(const CrossEntropyParams& params, int64_t row, int64_t begin, const SavedRow& saved = {}) {
    const int64_t end = slice_end(params, begin), column = params.target[row] - params.first_class;
    const T* z = input_row(params, row);
    const float* w = params.weight == nullptr ? nullptr : params.weight + begin;
    PartialStats stats = {no_logits(), 0.0f, 0.0f};
    if (begin <= column && column < end) {  // read before exponentials can overwrite it
      stats.target_logit = apply_softcap<kSoftcap>(static_cast<float>(z[column]), params.softcap).x;
      stats.target_weight = class_weight(params, column);
    }
    if (saved.exponentials == nullptr) {
      stats.logits = statistics<false>(z + begin, w, end - begin, params.softcap, nullptr);
    } else {
      stats.logits = statistics<true>(z + begin, w, end - begin, params.softcap, saved.exponentials + begin);
      saved.maxima[begin / kSlice] = stats.logits.max;
    }
    return stats;
  }

  static PartialStats whole_row(const CrossEntropyParams& params, int64_t row, const SavedRow& saved = {}) {
    PartialStats whole = {no_logits(), 0.0f, 0.0f};
    if (params.partial_stats != nullptr) {
      for (int64_t k = 0; k < params.num_partial_stats; ++k)
        whole = merge<kSmoothing>(whole, params.partial_stats[k * params.rows + row]);
      return whole;
    }
    for (int64_t i = 0; i < params.num_classes; i += kSlice)
      whole = merge<kSmoothing>(whole, slice(params, row, i, saved));
    return whole;
  }

  // The gradient of the slice from column begin on, except the target's.
  template <bool kNonTemporal, bool kIsSaved>
  static void write_slice(const CrossEntropyParams& params, int64_t row, const RowStats& stats, int64_t begin,
                          const SavedRow& saved) {
    const T* z = input_row(params, row);
    G* y = gradient_row(params, row);
    const int64_t end = slice_end(params, begin);
    const float max = kIsSaved ? saved.maxima[begin / kSlice]
                               : apply_softcap<kSoftcap>(max_of_slice<T>(z + begin, end - begin), params.softcap).x;
    const float subtrahend = shift(max), factor = gradient_factor<kSmoothing>(stats) * rescale(max, stats.max);
    const auto single = [&](int64_t i) {
      Logit<float> logit = {0.0f, 1.0f};
      if constexpr (!kIsSaved) logit = apply_softcap<kSoftcap>(static_cast<float>(z[i]), params.softcap);
      const float e = kIsSaved ? saved.exponentials[i] : take_exponential(logit.x - subtrahend);
      y[i] = gradient<kSmoothing, float>(e * factor, class_weight(params, i), stats, logit.slope);
    };
    int64_t i = begin;
    if (kNonTemporal) {
      for (; i < end && reinterpret_cast<uintptr_t>(y + i) % (kLanes * sizeof(G)) != 0; ++i) single(i);
    }
    for (; i + kLanes <= end; i += kLanes) {
      Logit<Vector> logit = {Vector{}, Vector{} + 1.0f};
      if constexpr (!kIsSaved) logit = apply_softcap<kSoftcap>(T::load(z + i), params.softcap);
      const Vector e = kIsSaved ? vec_load<Vector>(saved.exponentials + i) : take_exponential(logit.x - subtrahend);
      const Vector weight =
          kSmoothing && params.weight != nullptr ? vec_load<Vector>(params.weight + i) : Vector{} + 1.0f;
      G::template store<kNonTemporal>(y + i, gradient<kSmoothing, Vector>(e * factor, weight, stats, logit.slope));
    }
    for (; i < end; ++i) single(i);
  }

  // Columns [begin, end) of the gradient, whole slices, and the padding if they reach it.
  template <bool kIsSaved>
  static void write_gradient(const CrossEntropyParams& params, int64_t row, const PartialStats& whole,
                             const RowStats& stats, int64_t begin, int64_t end, const SavedRow& saved) {
    G* y = gradient_row(params, row);
    const int64_t column = params.target[row] - params.first_class;
    const bool owns_target = begin <= column && column < end;
    Logit<float> target = {whole.target_logit, 1.0f};
    if constexpr (kSoftcap)
      if (owns_target)
        target = apply_softcap<kSoftcap>(static_cast<float>(input_row(params, row)[column]), params.softcap);
    const bool temporal = params.gradient == params.input || params.columns < kMinNonTemporalColumns;
    for (int64_t i = begin; i < end; i += kSlice) {
      temporal ? write_slice<false, kIsSaved>(params, row, stats, i, saved)
               : write_slice<true, kIsSaved>(params, row, stats, i, saved);
    }
    if (owns_target) y[column] = target_gradient<kSmoothing>(target, class_weight(params, column), stats);
    if (end == params.num_classes) std::memset(y + end, 0, (params.columns - end) * sizeof(G));
  }

  // Loss and gradient of columns [begin, end) of a row, whose target may be ignored.
  template <bool kIsSaved>
  static void finish_row(const CrossEntropyParams& params, int64_t row, int64_t begin, int64_t end,
                         const SavedRow& saved) {
    if (is_gradient_stored(params, row)) return;
    const bool with_loss = begin == 0;
    if (params.target[row] == params.ignore_index) {
      if (with_loss) params.losses[row] = 0.0f;
      const int64_t written = end == params.num_classes ? params.columns : end;
      if (params.gradient != nullptr) std::memset(gradient_row(params, row) + begin, 0, (written - begin) * sizeof(G));
      return;
    }
    const PartialStats whole = whole_row(params, row, saved);
    const RowStats stats = row_stats<kSmoothing>(whole, params, row_scale(params, row));
    if (with_loss) params.losses[row] = stats.loss;
    if (params.gradient != nullptr) write_gradient<kIsSaved>(params, row, whole, stats, begin, end, saved);
  }

  static void rows(const CrossEntropyParams& params, int64_t begin, int64_t end) {
    // The gradient of a capped logit needs the logit too.
    const bool saves = !kSoftcap && params.gradient != nullptr && params.partial_stats == nullptr &&
                       params.partial_stats_out == nullptr;
    const bool over_logits = std::is_same<T, Float32>::value && params.gradient == params.input;
    const int64_t slices = (params.num_classes + kSlice - 1) / kSlice;
    const int64_t floats = slices + (over_logits ? 0 : params.num_classes);
    float* scratch =
        saves ? static_cast<float*>(std::malloc(floats * sizeof(float))) : nullptr;  // null: nothing is saved
    for (int64_t row = begin; row < end; ++row) {
      if (scratch != nullptr) {
        auto* over = reinterpret_cast<float*>(const_cast<T*>(input_row(params, row)));
        finish_row<true>(params, row, 0, params.num_classes, {over_logits ? over : scratch + slices, scratch});
      } else if (params.partial_stats_out == nullptr) {
        finish_row<false>(params, row, 0, params.num_classes, {});
      } else {
        const bool is_valid = params.target[row] != params.ignore_index;
        params.partial_stats_out[row] = is_valid ? whole_row(params, row) : PartialStats{no_logits(), 0.0f, 0.0f};
      }
    }
    std::free(scratch);
    fence_non_temporal();
  }

  static void slice_stats(const CrossEntropyParams& params, PartialStats* stats, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      stats[task] = slice(params, task % params.rows, task / params.rows * kSlice);
  }

  static void slice_gradients(const CrossEntropyParams& params, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / params.rows * kSlice;
      finish_row<false>(params, task % params.rows, first, slice_end(params, first), {});
    }
    fence_non_temporal();
  }

  static const T* input_row(const CrossEntropyParams& params, int64_t row) {
    return static_cast<const T*>(params.input) + row * params.input_stride;
  }

  static G* gradient_row(const CrossEntropyParams& params, int64_t row) {
    return static_cast<G*>(params.gradient) + row * params.gradient_stride;
  }

  static float class_weight(const CrossEntropyParams& params, int64_t column) {
    return params.weight == nullptr ? 1.0f : params.weight[column];
  }

  static int64_t slice_end(const CrossEntropyParams& params, int64_t begin) {
    return params.num_classes - begin < kSlice ? params.num_classes : begin + kSlice;
  }
};

// Calls use with the kernels for a call's dtype and options.
template <class Use>
void dispatch_kernel(const CrossEntropyParams& params, Use use) {
  const auto dispatch_options = [&]<class T, class G>() {
    const bool smoothing = params.label_smoothing != 0.0f;
    if (params.softcap != 0.0f) {
      smoothing ? use.template operator()<Kernel<T, G, true, true>>()
                : use.template operator()<Kernel<T, G, true, false>>();
    } else {
      smoothing ? use.template operator()<Kernel<T, G, false, true>>()
                : use.template operator()<Kernel<T, G, false, false>>();
    }
  };
  // A narrow gradient trails the wider logits that it overwrites: what is still to be read lies behind it.
  if (params.dtype != params.gradient_dtype) return dispatch_options.template operator()<Float32, BFloat16>();
  dispatch_dtype(params.dtype, [&]<class T>() { dispatch_options.template operator()<T, T>(); });
}

}  // namespace

void cross_entropy(const CrossEntropyParams& params, int64_t begin, int64_t end) {
  dispatch_kernel(params, [&]<class Kernels>() { Kernels::rows(params, begin, end); });
}

void slice_stats(const CrossEntropyParams& params, PartialStats* stats, int64_t begin, int64_t end) {
  dispatch_kernel(params, [&]<class Kernels>() { Kernels::slice_stats(params, stats, begin, end); });
}

void slice_gradients(const CrossEntropyParams& params, int64_t begin, int64_t end) {
  dispatch_kernel(params, [&]<class Kernels>() { Kernels::slice_gradients(params, begin, end); });
}

void scale_rows(const ScaleRowsParams& params, int64_t begin, int64_t end) {
  dispatch_dtype(params.dtype, [&]<class T>() {
    for (int64_t row = begin; row < end; ++row) {
      const float scale = params.scale[row * params.scale_stride];
      if (scale == 1.0f) continue;
      T* x = static_cast<T*>(params.input) + row * params.stride;
      int64_t i = 0;
      for (; i + kLanes <= params.columns; i += kLanes) T::template store<false>(x + i, T::load(x + i) * scale);
      for (; i < params.columns; ++i) x[i] = x[i] * scale;
    }
  });
}

}  // namespace FASTLM_INSTRUCTION_SET

FASTLM_DEFINE_CPU_DISPATCH_BF16(cross_entropy, (const CrossEntropyParams& params, int64_t begin, int64_t end),
                                (params, begin, end))
FASTLM_DEFINE_CPU_DISPATCH_BF16(slice_stats,
                                (const CrossEntropyParams& params, PartialStats* stats, int64_t begin, int64_t end),
                                (params, stats, begin, end))
FASTLM_DEFINE_CPU_DISPATCH_BF16(slice_gradients, (const CrossEntropyParams& params, int64_t begin, int64_t end),
                                (params, begin, end))
FASTLM_DEFINE_CPU_DISPATCH_BF16(scale_rows, (const ScaleRowsParams& params, int64_t begin, int64_t end),
                                (params, begin, end))

}  // namespace fastlm
