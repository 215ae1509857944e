// Every formula of cross entropy, once, for the CPU and the CUDA kernels. For logits z, classes c < V and target y:
//
//     x_c   = softcap * tanh(z_c / softcap)                        or z_c
//     lse   = log(sum_c exp(x_c))
//     loss  = a (lse - x_y) + b sum_c w_c (lse - x_c) + z_loss lse^2
//     dz_c  = (p_c (a + b sum_c w_c + 2 z_loss lse) - b w_c - (c == y) a) scale dx_c/dz_c        p_c = exp(x_c - lse)
//
//     a = (1 - label_smoothing) w_y     b = label_smoothing / V
//
// Sums are kept relative to the running maximum (Milakov, Gimelshein 2018, arXiv 1805.02867), so they never overflow.
#pragma once

#include "cross_entropy.h"
#include "vec_math.h"

namespace fastlm {

// A logit after softcap, and its derivative by the logit before.
template <class T>
struct Logit {
  T x;
  T slope;
};

template <bool kSoftcap, class T>
FASTLM_HOST_DEVICE Logit<T> apply_softcap(T z, float softcap) {
  if constexpr (kSoftcap) {
    T tanh = hyperbolic_tangent<T>(z / softcap);
    return {no_contract<T>(tanh * softcap), 1.0f - no_contract<T>(tanh * tanh)};
  } else {
    return {z, T{} + 1.0f};
  }
}

// The same for logits of 16 bits on a GPU: one exponential and one reciprocal, whose errors are nothing beside the
// rounding of such a logit. With e = exp(-2 |z| / softcap), tanh is (1 - e) / (1 + e) and its slope 4 e / (1 + e)^2.
FASTLM_HOST_DEVICE Logit<float> apply_softcap_of_16_bits(float z, float softcap) {
  const float e = exponential(fabsf(z) * (-2.0f / softcap));
  const float d = reciprocal(1.0f + e);
  const float tanh = copysignf((1.0f - e) * d, z);
  return {no_contract(tanh * softcap), 4.0f * e * d * d};
}

// The factor that takes a sum relative to the maximum `from` to one relative to `to`. For equal maxima it is 1 even
// where both are infinite: there exp(from - to) is NaN, and a row that merely begins with -inf would be lost.
FASTLM_HOST_DEVICE float rescale(float from, float to) { return from == to ? 1.0f : exponential(from - to); }

// What is subtracted from logits whose maximum is max: 0 where all are -inf (so far), because -inf - -inf is NaN.
FASTLM_HOST_DEVICE float shift(float max) { return max == -INFINITY ? 0.0f : max; }

// The statistics of no logits, the identity of merge.
FASTLM_HOST_DEVICE LogitStats no_logits() { return {-INFINITY, 0.0f, 0.0f, 0.0f}; }

// The statistics of the union of two sets of logits.
template <bool kSmoothing>
FASTLM_HOST_DEVICE LogitStats merge(LogitStats a, LogitStats b) {
  const float max = a.max > b.max ? a.max : b.max;
  LogitStats both = {max, a.sum * rescale(a.max, max) + b.sum * rescale(b.max, max), 0.0f, 0.0f};
  if constexpr (kSmoothing) {
    both.weight = a.weight + b.weight;
    both.weighted =
        (a.weighted + a.weight * (shift(a.max) - shift(max))) + (b.weighted + b.weight * (shift(b.max) - shift(max)));
  }
  return both;
}

template <bool kSmoothing>
FASTLM_HOST_DEVICE PartialStats merge(PartialStats a, PartialStats b) {
  return {merge<kSmoothing>(a.logits, b.logits), a.target_logit + b.target_logit, a.target_weight + b.target_weight};
}

// Whether the stored gradient of a row, for an upstream gradient of 1, is the one that is wanted.
FASTLM_HOST_DEVICE bool is_gradient_stored(const CrossEntropyParams& params, int64_t row) {
  return params.upstream != nullptr && params.upstream[row * params.upstream_stride] == 1.0f;
}

// The factor of the gradient of a row.
FASTLM_HOST_DEVICE float row_scale(const CrossEntropyParams& params, int64_t row) {
  const float scale = params.scale == nullptr ? 1.0f : params.scale[row * params.scale_stride];
  return params.upstream == nullptr ? scale : scale * params.upstream[row * params.upstream_stride];
}

// A row's loss, and what its gradients share.
struct RowStats {
  float loss;
  float max;
  float sum;           // of exp(x - max)
  float weight;        // sum of w
  float target_share;  // a
  float class_share;   // b
  float z_slope;       // of the z loss by lse
  float scale;
};

template <bool kSmoothing>
FASTLM_HOST_DEVICE RowStats row_stats(PartialStats whole, const CrossEntropyParams& params, float scale) {
  const LogitStats& logits = whole.logits;
  const float log_sum = logf(logits.sum);
  RowStats row = {.loss = 0.0f,
                  .max = logits.max,
                  .sum = logits.sum,
                  .weight = logits.weight,
                  .target_share = whole.target_weight,
                  .class_share = 0.0f,
                  .z_slope = 0.0f,
                  .scale = scale};
  if constexpr (kSmoothing) {
    row.target_share = (1.0f - params.label_smoothing) * whole.target_weight;
    row.class_share = params.label_smoothing / static_cast<float>(params.total_classes);
  }
  // The two large terms are subtracted first: log(sum) + max would round a small loss away.
  row.loss = row.target_share * (log_sum + (logits.max - whole.target_logit));
  if constexpr (kSmoothing) row.loss += row.class_share * (logits.weight * log_sum - logits.weighted);
  if (params.z_loss != 0.0f) {  // without the condition, an lse whose square overflows would make the loss NaN
    const float lse = log_sum + logits.max;
    row.loss += params.z_loss * lse * lse;
    row.z_slope = 2.0f * params.z_loss * lse;
  }
  return row;
}

// The gradient of a logit x that is not the target, with slope dx/dz, from p_term = gradient_factor(row) * exp(x -
// max). A row of -inf alone gives NaN, as in PyTorch.
template <bool kSmoothing>
FASTLM_HOST_DEVICE float gradient_factor(const RowStats& row) {
  float total = row.target_share + row.z_slope;
  if constexpr (kSmoothing) total += row.class_share * row.weight;
  return row.scale * total / row.sum;
}

template <bool kSmoothing, class T>
FASTLM_HOST_DEVICE T gradient(T p_term, T class_weight, const RowStats& row, T slope) {
  if constexpr (kSmoothing) p_term = no_contract(p_term) - no_contract(class_weight * (row.class_share * row.scale));
  return p_term * slope;
}

// The gradient of the target logit. The terms that nearly cancel where the model is right are subtracted first, and in
// float32, before any rounding to a shorter dtype.
template <bool kSmoothing>
FASTLM_HOST_DEVICE float target_gradient(Logit<float> logit, float class_weight, const RowStats& row) {
  const float p = exponential(logit.x - row.max) / row.sum;
  float result = row.target_share * (p - 1.0f) + p * row.z_slope;
  if constexpr (kSmoothing) result += row.class_share * (p * row.weight - class_weight);
  return result * (row.scale * logit.slope);
}

}  // namespace fastlm
