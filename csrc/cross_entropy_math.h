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
#include "elementary.h"

namespace fastlm {

// A logit as the loss sees it, and its derivative by the logit that was given.
template <class T>
struct Logit {
  T x;
  T slope;
};

template <bool kSoftcap, class T>
FASTLM_FORMULA Logit<T> capped(T z, float softcap) {
  if constexpr (kSoftcap) {
    T tanh = hyperbolic_tangent<T>(z / softcap);
    return {rounded<T>(tanh * softcap), 1.0f - rounded<T>(tanh * tanh)};
  } else {
    return {z, T{} + 1.0f};
  }
}

// What a sum relative to the maximum `from` is multiplied by to be relative to `to`. Equal maxima are 1 even where both
// are infinite: there exp(from - to) is NaN, and a row that merely begins with -inf would be lost.
FASTLM_FORMULA float rescale(float from, float to) { return from == to ? 1.0f : exponential(from - to); }

// What is subtracted from logits whose maximum is max. Where all are -inf (so far) it is 0: -inf - -inf would be NaN.
FASTLM_FORMULA float shift(float max) { return max == -INFINITY ? 0.0f : max; }

// The statistics of no logits.
FASTLM_FORMULA Statistics no_logits() { return {-INFINITY, 0.0f, 0.0f, 0.0f}; }

// The statistics of two groups of logits taken together.
template <bool kSmoothing>
FASTLM_FORMULA Statistics merge(Statistics a, Statistics b) {
  const float max = a.max > b.max ? a.max : b.max;
  Statistics both = {max, a.sum * rescale(a.max, max) + b.sum * rescale(b.max, max), 0.0f, 0.0f};
  if constexpr (kSmoothing) {
    both.weight = a.weight + b.weight;
    both.weighted = (a.weighted + a.weight * (shift(a.max) - shift(max))) +
                    (b.weighted + b.weight * (shift(b.max) - shift(max)));
  }
  return both;
}

template <bool kSmoothing>
FASTLM_FORMULA Part merge(Part a, Part b) {
  return {merge<kSmoothing>(a.logits, b.logits), a.target_logit + b.target_logit, a.target_weight + b.target_weight};
}

// Whether the gradient of a row is there already, made for an upstream gradient of 1, and this is its upstream gradient.
FASTLM_FORMULA bool is_made(const CrossEntropy& call, int64_t row) {
  return call.upstream != nullptr && call.upstream[row * call.upstream_stride] == 1.0f;
}

// What the gradient of a row is multiplied by.
FASTLM_FORMULA float row_scale(const CrossEntropy& call, int64_t row) {
  const float scale = call.scale == nullptr ? 1.0f : call.scale[row * call.scale_stride];
  return call.upstream == nullptr ? scale : scale * call.upstream[row * call.upstream_stride];
}

// What the loss and all gradients of one row share.
struct Row {
  float loss;
  float max;
  float sum;            // of exp(x - max)
  float weight;         // sum of w
  float target_share;   // a
  float class_share;    // b
  float z_slope;        // of the z loss by lse
  float scale;
};

template <bool kSmoothing>
FASTLM_FORMULA Row finish(Part part, const CrossEntropy& call, float scale) {
  const Statistics& logits = part.logits;
  const float log_sum = logf(logits.sum);
  Row row = {0.0f, logits.max, logits.sum, logits.weight, part.target_weight, 0.0f, 0.0f, scale};
  if constexpr (kSmoothing) {
    row.target_share = (1.0f - call.label_smoothing) * part.target_weight;
    row.class_share = call.label_smoothing / static_cast<float>(call.total_classes);
  }
  // The two large terms are subtracted first: log(sum) + max would round a small loss away.
  row.loss = row.target_share * (log_sum + (logits.max - part.target_logit));
  if constexpr (kSmoothing) row.loss += row.class_share * (logits.weight * log_sum - logits.weighted);
  if (call.z_loss != 0.0f) {  // else an lse whose square overflows would make NaN of a loss without this term
    const float lse = log_sum + logits.max;
    row.loss += call.z_loss * lse * lse;
    row.z_slope = 2.0f * call.z_loss * lse;
  }
  return row;
}

// The gradient of a logit x that is not the target, slope dx/dz; part is gradient_factor(row) * exp(x - max). A row of
// -inf alone gives NaN, as in PyTorch.
template <bool kSmoothing>
FASTLM_FORMULA float gradient_factor(const Row& row) {
  float total = row.target_share + row.z_slope;
  if constexpr (kSmoothing) total += row.class_share * row.weight;
  return row.scale * total / row.sum;
}

template <bool kSmoothing, class T>
FASTLM_FORMULA T gradient(T part, T class_weight, const Row& row, T slope) {
  if constexpr (kSmoothing) part = rounded(part) - rounded(class_weight * (row.class_share * row.scale));
  return part * slope;
}

// The gradient of the target logit. What nearly cancels where the model is right is subtracted first, term by term, and
// in float32, before any rounding to a shorter type.
template <bool kSmoothing>
FASTLM_FORMULA float target_gradient(Logit<float> logit, float class_weight, const Row& row) {
  const float p = exponential(logit.x - row.max) / row.sum;
  float result = row.target_share * (p - 1.0f) + p * row.z_slope;
  if constexpr (kSmoothing) result += row.class_share * (p * row.weight - class_weight);
  return result * (row.scale * logit.slope);
}

}  // namespace fastlm
