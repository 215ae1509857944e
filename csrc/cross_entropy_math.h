// Every formula of cross entropy, once, for the CPU and the CUDA kernels.
//
//     loss[i]        = log(sum_c exp(x[i,c])) - x[i,target[i]]
//     gradient[i,c]  = (exp(x[i,c]) / sum_c exp(x[i,c]) - (c == target[i])) * scale[i]
//
// The sum is kept relative to the running maximum (Milakov, Gimelshein 2018, arXiv 1805.02867), so it never overflows.
// On a CPU each formula is compiled for a scalar and for a vector of floats: T is float or a GCC vector type.
#pragma once

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

// The maximum of some logits of a row, and the sum of exp(logit - max) over the same logits.
struct Statistics {
  float max;
  float sum;
};

template <class T>
struct IntegerLike {
  using type = int32_t;
};

// exp(x) for x <= 0. On a CPU at most 1.02 ulp off for every float in [-87, 0] (all of them were tried, with and
// without FMA); below -87, where exp is under 1.7e-38, it is 0, and NaN stays NaN. On a GPU ex2.approx: 2 ulp of exp2 plus the rounding of x * log2(e).
template <class T>
FASTLM_FORMULA T exponential(T x) {
#ifdef __CUDA_ARCH__
  return exp2f(x * 1.44269504f);
#else
  using Int = typename IntegerLike<T>::type;
  const float round_to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  T shifted = x * 1.44269504f + round_to_integer;
  T n = shifted - round_to_integer;
  // ln 2 in two parts, the first short enough that n * part is exact: without it r loses digits for large |x|.
  T r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  // exp(r) = 1 + r + r^2 q(r), q the degree-4 polynomial of least maximal relative error on |r| <= ln(2) / 2.
  T q = r * 0x1.6a2342p-10f + 0x1.123a6cp-7f;
  q = q * r + 0x1.5558f4p-5f;
  q = q * r + 0x1.55549p-3f;
  q = q * r + 0x1.fffffcp-2f;
  T mantissa = (q * (r * r) + r) + 1.0f;
  Int bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + (127 << 23);  // 2^n
  T power;
  std::memcpy(&power, &bits, sizeof power);
  T result = mantissa * power;
  return x < -87.0f ? T{} : result;
#endif
}

// What a sum relative to the maximum `from` is multiplied by to be relative to `to`. Equal maxima are 1 even where both
// are infinite: there exp(from - to) is NaN, and a row that merely begins with -inf would be lost.
FASTLM_FORMULA float rescale(float from, float to) { return from == to ? 1.0f : exponential(from - to); }

// The statistics of two groups of logits taken together.
FASTLM_FORMULA Statistics merge(Statistics a, Statistics b) {
  float max = a.max > b.max ? a.max : b.max;
  return {max, a.sum * rescale(a.max, max) + b.sum * rescale(b.max, max)};
}

// What is subtracted from logits whose maximum is max. Where all are -inf (so far) it is 0: -inf - -inf would be NaN.
FASTLM_FORMULA float shift(float max) { return max == -INFINITY ? 0.0f : max; }

// The loss of a row. The two large terms are subtracted first: log(sum) + max would round a small loss away.
FASTLM_FORMULA float loss(Statistics row, float target_logit) { return logf(row.sum) + (row.max - target_logit); }

// The factor common to all gradients of a row.
FASTLM_FORMULA float gradient_factor(Statistics row, float scale) { return scale / row.sum; }

// The gradient of a logit that is not the target. A row of -inf alone gives NaN, as in PyTorch.
template <class T>
FASTLM_FORMULA T gradient(T logit, float max, float factor) {
  return exponential(logit - max) * factor;
}

// The gradient of the target logit. The 1 is subtracted in float32, before any rounding to a shorter type: the
// difference is small exactly where the model is right.
FASTLM_FORMULA float target_gradient(float target_logit, Statistics row, float scale) {
  return (exponential(target_logit - row.max) / row.sum - 1.0f) * scale;
}

}  // namespace fastlm
