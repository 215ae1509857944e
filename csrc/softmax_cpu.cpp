// Softmax and log-softmax on a CPU, each in one pass over memory: what is needed twice is found in the cache.
#include "cpu_dispatch.h"
#include "row_io.h"
#include "softmax.h"

namespace fastlm {
namespace FASTLM_INSTRUCTION_SET {
namespace {

inline int64_t whole_steps(int64_t n) { return (n + kStep - 1) / kStep * kStep; }

// The number of columns that a row sees, from the first on.
template <class Params>
inline int64_t visible_columns(const Params& params, int64_t row) {
  if (params.queries == 0) return params.columns;
  const int64_t visible = row % params.queries + params.columns - params.queries + 1;
  return visible < 0 ? 0 : visible;
}

// The first n elements of a row's mask as floats, 0 and 1 for a boolean one: a pointer into the mask, or a copy in
// scratch.
const float* load_mask(const Mask& mask, int64_t row, int64_t n, float* scratch) {
  int64_t first = 0;
  for (int64_t d = mask.dims - 1; d >= 0; --d) {
    first += row % mask.sizes[d] * mask.strides[d];
    row /= mask.sizes[d];
  }
  const int64_t step = mask.column_stride;
  if (!mask.is_bool && step == 1) return load_row(Rows{mask.data, mask.dtype, 0}, 0, first, n, scratch);
  const auto copy = [&](const auto* source) {
    if (step == 1) {
      for (int64_t i = 0; i < n; ++i) scratch[i] = source[i];
    } else {
      for (int64_t i = 0; i < n; ++i) scratch[i] = source[i * step];
    }
  };
  if (mask.is_bool) {
    copy(static_cast<const uint8_t*>(mask.data) + first);
  } else {
    dispatch_dtype(mask.dtype, [&]<class E>() { copy(static_cast<const E*>(mask.data) + first); });
  }
  return scratch;
}

enum class MaskKind { kNone, kBoolean, kAdditive };

// Calls use with the kind of the mask.
template <class Use>
inline void dispatch_mask(const Mask& mask, Use use) {
  if (mask.data == nullptr) return use.template operator()<MaskKind::kNone>();
  if (mask.is_bool) return use.template operator()<MaskKind::kBoolean>();
  use.template operator()<MaskKind::kAdditive>();
}

struct ScoreStats {
  float max;      // at least the lowest finite number: -inf - -inf would be NaN where exp must be 0
  bool has_keys;  // not every score is masked out
};

// Writes the n scores of a row, and -inf up to a whole number of steps.
template <MaskKind kMask>
ScoreStats write_scores(const float* x, const float* mask, int64_t n, float scale, float* s) {
  Vector maxima[kAccumulators];
  for (auto& max : maxima) max = Vector{} - 3.402823466e38f;
  IntegerVector unmasked = {};
  const auto write = [&](int64_t i, int64_t count, int64_t a) {
    Vector value = vec_load_partial(x + i, count) * scale;
    if constexpr (kMask == MaskKind::kBoolean) {
      const Vector keep = vec_load_partial(mask + i, count);
      value = keep != 0.0f ? value : Vector{} - INFINITY;
      unmasked |= keep != 0.0f;
    } else if constexpr (kMask == MaskKind::kAdditive) {
      const Vector bias = vec_load_partial(mask + i, count);
      value += bias;
      unmasked |= mask_tail(bias, count, Vector{} - INFINITY) != -INFINITY;
    }
    if (count < kLanes) value = mask_tail(value, count, Vector{} - INFINITY);
    vec_store(s + i, value);
    maxima[a] = vec_max(value, maxima[a]);  // ignores NaN, which the sum does not
  };
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep)
    for (int64_t a = 0; a < kAccumulators; ++a) write(i + a * kLanes, kLanes, a);
  for (; i + kLanes <= n; i += kLanes) write(i, kLanes, 0);
  if (i < n) {
    write(i, n - i, 0);
    i += kLanes;
  }
  for (; i % kStep != 0; i += kLanes) vec_store(s + i, Vector{} - INFINITY);
  const Vector lanes = vec_max(vec_max(maxima[0], maxima[1]), vec_max(maxima[2], maxima[3]));
  ScoreStats stats = {lanes[0], kMask == MaskKind::kNone};
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    stats.max = lanes[lane] > stats.max ? lanes[lane] : stats.max;
    stats.has_keys |= unmasked[lane] != 0;
  }
  return stats;
}

// The sum of exp(s - max) over whole steps; the exponentials replace s where kKeep.
template <bool kKeep>
float sum_of_exponentials(float* s, int64_t n, float max) {
  BlockedSum sum;
  for (int64_t i = 0; i < n;) {
    const int64_t end = n - i < kSumBlock ? n : i + kSumBlock;
    for (; i < end; i += kStep) {
      Vector e[kAccumulators];
      for (int64_t a = 0; a < kAccumulators; ++a) e[a] = vec_load<Vector>(s + i + a * kLanes) - max;
      exponentials(e);
      for (int64_t a = 0; a < kAccumulators; ++a) {
        if constexpr (kKeep) vec_store(s + i + a * kLanes, e[a]);
        sum.add(e[a], a);
      }
    }
    sum.end_block();
  }
  return sum.total();
}

// Stores value(i, count) in the first n columns of a row, and fill in the others.
template <class E, bool kNonTemporal, class Value>
inline void write_values(E* y, int64_t n, int64_t columns, float fill, Value value) {
  const auto write = [&](int64_t i, Vector vector) {
    if (i + kLanes <= columns) return E::template store<kNonTemporal>(y + i, vector);
    E last[kLanes];
    E::template store<false>(last, vector);
    std::memcpy(static_cast<void*>(y + i), last, (columns - i) * sizeof(E));
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) write(i, value(i, kLanes));
  if (i < n) {
    write(i, mask_tail(value(i, n - i), n - i, Vector{} + fill));
    i += kLanes;
  }
  for (; i < columns; i += kLanes) write(i, Vector{} + fill);
}

// non_temporal has an effect on rows that begin at an aligned address.
template <class Value>
void write_row(const Rows& rows, int64_t row, int64_t n, int64_t columns, bool non_temporal, float fill, Value value) {
  dispatch_dtype(rows.dtype, [&]<class E>() {
    E* y = static_cast<E*>(rows.data) + row * rows.stride;
    if (non_temporal && reinterpret_cast<uintptr_t>(y) % (kLanes * sizeof(E)) == 0) {
      write_values<E, true>(y, n, columns, fill, value);
    } else {
      write_values<E, false>(y, n, columns, fill, value);
    }
  });
}

template <MaskKind kMask>
void softmax_row(const SoftmaxParams& params, int64_t row, const Scratch& scratch) {
  const int64_t C = params.columns, n = visible_columns(params, row);
  float* s = scratch.row(0);
  ScoreStats stats = {0.0f, false};
  if (n > 0) {
    const float* mask = kMask == MaskKind::kNone ? nullptr : load_mask(params.mask, row, n, scratch.row(2));
    stats = write_scores<kMask>(load_row(params.x, row, 0, n, scratch.row(1)), mask, n, params.scale, s);
  }
  if (!stats.has_keys) {
    const Vector nothing = Vector{} + (params.is_log ? -INFINITY : 0.0f);
    return write_row(params.y, row, 0, C, params.non_temporal, nothing[0], [&](int64_t, int64_t) { return nothing; });
  }
  const int64_t steps = whole_steps(n);
  const float max = stats.max;
  if (params.is_log) {
    const float log_sum = std::log(sum_of_exponentials<false>(s, steps, max));
    write_row(params.y, row, n, C, params.non_temporal, -INFINITY - max - log_sum,
              [&](int64_t i, int64_t) { return vec_load<Vector>(s + i) - max - log_sum; });
  } else {
    const float sum = sum_of_exponentials<true>(s, steps, max);
    write_row(params.y, row, n, C, params.non_temporal, 0.0f / sum,
              [&](int64_t i, int64_t) { return vec_load<Vector>(s + i) / sum; });
  }
}

}  // namespace

void softmax(const SoftmaxParams& params, int64_t begin, int64_t end) {
  const Scratch scratch(3, whole_steps(params.columns));
  dispatch_mask(params.mask, [&]<MaskKind kMask>() {
    for (int64_t row = begin; row < end; ++row) softmax_row<kMask>(params, row, scratch);
  });
  if (params.non_temporal) fence_non_temporal();
}

namespace {

// Stores the gradient of a row's n scores, which value(i, count) gives, as that of the mask, and times scale as that of
// x.
template <class Value>
void write_gradients(const SoftmaxBackwardParams& params, int64_t row, int64_t n, float fill, Value value) {
  const float scale = params.scale;
  const auto scaled = [&](int64_t i, int64_t count) { return value(i, count) * scale; };
  if (params.dx.data != nullptr) write_row(params.dx, row, n, params.columns, params.non_temporal, fill, scaled);
  if (params.dmask.data != nullptr) write_row(params.dmask, row, n, params.columns, params.non_temporal, fill, value);
}

// The sum of the vectors term(i, count) over n elements.
template <class Term>
inline float sum_of(int64_t n, Term term) {
  BlockedSum sum;
  for (int64_t i = 0; i < n;) {
    const int64_t end = n - i < kSumBlock ? n : i + kSumBlock;
    for (; i + kStep <= end; i += kStep)
      for (int64_t a = 0; a < kAccumulators; ++a) sum.add(term(i + a * kLanes, kLanes), a);
    for (; i + kLanes <= end; i += kLanes) sum.add(term(i, kLanes), 0);
    if (i < end) {
      sum.add(term(i, end - i), 0);
      i = end;
    }
    sum.end_block();
  }
  return sum.total();
}

template <MaskKind kMask>
void softmax_backward_row(const SoftmaxBackwardParams& params, int64_t row, const Scratch& scratch) {
  const bool is_masked = kMask != MaskKind::kNone || params.queries != 0;
  const int64_t n = visible_columns(params, row);
  const float* dy = load_row(params.dy, row, 0, n, scratch.row(0));
  const float* y = load_row(params.y, row, 0, n, scratch.row(1));
  const auto gradient = [&](int64_t i, int64_t count) {
    const Vector value = vec_load_partial(dy + i, count);
    if (!is_masked) return value;
    // Otherwise an infinite dy of a masked element would make its row NaN.
    return vec_load_partial(y + i, count) == 0.0f ? Vector{} : value;
  };
  const float total =
      sum_of(n, [&](int64_t i, int64_t count) { return gradient(i, count) * vec_load_partial(y + i, count); });
  write_gradients(params, row, n, total - total, [&](int64_t i, int64_t count) {
    return vec_load_partial(y + i, count) * (gradient(i, count) - total);
  });
}

// The sum is over every dy, even a masked element's, whose own dx is 0 because no input moves it.
template <MaskKind kMask>
void log_softmax_backward_row(const SoftmaxBackwardParams& params, int64_t row, const Scratch& scratch) {
  const int64_t C = params.columns, n = visible_columns(params, row);
  const float* dy = load_row(params.dy, row, 0, C, scratch.row(0));
  const float* y = load_row(params.y, row, 0, n, scratch.row(1));
  const float* mask = kMask == MaskKind::kBoolean ? load_mask(params.mask, row, n, scratch.row(2)) : nullptr;
  if constexpr (kMask == MaskKind::kAdditive) {
    bool has_keys = false;
    for (int64_t i = 0; i < n; ++i) has_keys |= y[i] != -INFINITY;
    if (!has_keys) return write_gradients(params, row, 0, 0.0f, [](int64_t, int64_t) { return Vector{}; });
  }
  const float total = sum_of(C, [&](int64_t i, int64_t count) { return vec_load_partial(dy + i, count); });
  float* e = scratch.row(3);
  write_scores<MaskKind::kNone>(y, nullptr, n, 1.0f, e);
  sum_of_exponentials<true>(e, whole_steps(n), 0.0f);
  write_gradients(params, row, n, 0.0f, [&](int64_t i, int64_t count) {
    const Vector ds = vec_load_partial(dy + i, count) - vec_load<Vector>(e + i) * total;
    if constexpr (kMask != MaskKind::kBoolean) return ds;
    return vec_load_partial(mask + i, count) != 0.0f ? ds : Vector{};
  });
}

}  // namespace

void softmax_backward(const SoftmaxBackwardParams& params, int64_t begin, int64_t end) {
  const Scratch scratch(4, whole_steps(params.columns));
  dispatch_mask(params.mask, [&]<MaskKind kMask>() {
    for (int64_t row = begin; row < end; ++row)
      params.is_log ? log_softmax_backward_row<kMask>(params, row, scratch)
                    : softmax_backward_row<kMask>(params, row, scratch);
  });
  if (params.non_temporal) fence_non_temporal();
}

}  // namespace FASTLM_INSTRUCTION_SET

FASTLM_DEFINE_CPU_DISPATCH(softmax, (const SoftmaxParams& params, int64_t begin, int64_t end), (params, begin, end))
FASTLM_DEFINE_CPU_DISPATCH(softmax_backward, (const SoftmaxBackwardParams& params, int64_t begin, int64_t end),
                           (params, begin, end))

}  // namespace fastlm
