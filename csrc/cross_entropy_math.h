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
// On a CPU each formula is compiled for a scalar and for a vector of floats: T is float or a GCC vector type.
#pragma once

#include "cross_entropy.h"

#include <cmath>
#include <cstdint>
#include <cstring>

// Internal linkage: the CPU source is compiled once per instruction set, and the linker must not merge the copies.
#ifdef __CUDACC__
#define FASTLM_FORMULA static __host__ __device__ __forceinline__
#else
#define FASTLM_FORMULA static inline __attribute__((always_inline))
#endif

namespace fastlm {

template <class T>
struct IntegerLike {
  using type = int32_t;
};

// exp(x) for x <= 0. On a CPU at most 1.02 ulp off for every float in [-87, 0] (all of them were tried, with and
// without FMA); below -87, where exp is under 1.7e-38, it is 0, and NaN stays NaN. On a GPU one ex2.approx, whose
// denormal results are 0: 2 ulp of exp2 plus the rounding of x * log2(e).
#ifdef __CUDA_ARCH__
template <class T>
FASTLM_FORMULA T exponential(T x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.44269504f));
  return result;
}
#else
// Of several x at once, step by step: each of them waits for its own steps, and a CPU does not look far enough ahead to
// find the next one's.
template <class T, int kCount>
FASTLM_FORMULA void exponentials(T (&x)[kCount]) {
  using Int = typename IntegerLike<T>::type;
  const float round_to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  T shifted[kCount], r[kCount], square[kCount], q[kCount], even[kCount];
#define FOR_EACH for (int k = 0; k < kCount; ++k)
  FOR_EACH shifted[k] = x[k] * 1.44269504f + round_to_integer;
  FOR_EACH q[k] = shifted[k] - round_to_integer;  // n
  // ln 2 in two parts, the first short enough that n * part is exact: without it r loses digits for large |x|.
  FOR_EACH r[k] = x[k] - q[k] * 0.693359375f;
  FOR_EACH r[k] = r[k] - q[k] * -2.12194440e-4f;
  // exp(r) = 1 + r + r^2 q(r), q the degree-4 polynomial of least maximal relative error on |r| <= ln(2) / 2.
  FOR_EACH square[k] = r[k] * r[k];
  FOR_EACH even[k] = r[k] * 0x1.55549p-3f + 0x1.fffffcp-2f;
  FOR_EACH q[k] = r[k] * 0x1.123a6cp-7f + 0x1.5558f4p-5f;
  FOR_EACH q[k] = square[k] * 0x1.6a2342p-10f + q[k];
  FOR_EACH q[k] = q[k] * square[k] + even[k];
  FOR_EACH q[k] = q[k] * square[k] + r[k];
  FOR_EACH q[k] = q[k] + 1.0f;
  FOR_EACH {
    Int bits, exponent;
    std::memcpy(&bits, &q[k], sizeof bits);
    std::memcpy(&exponent, &shifted[k], sizeof exponent);
    bits += exponent << 23;  // times 2^n
    std::memcpy(&q[k], &bits, sizeof bits);
    x[k] = x[k] < -87.0f ? T{} : q[k];
  }
#undef FOR_EACH
}

template <class T>
FASTLM_FORMULA T exponential(T x) {
  T only[1] = {x};
  exponentials(only);
  return only[0];
}
#endif

// tanh(u), at most 1.5 ulp off on a CPU (two million values were tried on each side of 0.625, where the forms meet).
template <class T>
FASTLM_FORMULA T hyperbolic_tangent(T u) {
#ifdef __CUDA_ARCH__
  return tanhf(u);
#else
  // tanh(u) = u + u w q(w), w = u^2, q the degree-4 polynomial of least maximal relative error.
  T w = u * u;
  T q = w * -0x1.75e1a8p-8f + 0x1.522692p-6f;
  q = q * w - 0x1.b83c58p-5f;
  q = q * w + 0x1.110726p-3f;
  q = q * w - 0x1.555532p-2f;
  T near_zero = u * (w * q) + u;
  T size = u < 0.0f ? T{} - u : u;
  T e = exponential<T>(size * -2.0f);
  T far = 1.0f - 2.0f * e / (e + 1.0f);
  far = u < 0.0f ? T{} - far : far;
  return size < 0.625f ? near_zero : far;
#endif
}

// A logit as the loss sees it, and its derivative by the logit that was given.
template <class T>
struct Logit {
  T x;
  T slope;
};

// x, rounded to a float32 at this point. Compilers fuse a product with a sum that uses it, here and not there: a capped
// maximum would then differ from itself, a gradient that is 0 would not be, and a row's bits would depend on its batch.
template <class T>
FASTLM_FORMULA T rounded(T x) {
#if defined(__CUDA_ARCH__)
  x = __fadd_rn(x, -0.0f);
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

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
