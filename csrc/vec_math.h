// Elementwise functions that the CPU and the CUDA kernels share.
//
// On a CPU each is compiled for scalars and for vectors: T is float or a GCC vector type.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// Internal linkage: CPU sources are compiled once per instruction set, and the linker must not merge the copies.
#ifdef __CUDACC__
#define FASTLM_HOST_DEVICE static __host__ __device__ __forceinline__
#else
#define FASTLM_HOST_DEVICE static inline __attribute__((always_inline))
#endif

namespace fastlm {

template <class T>
struct IntegerLike {
  using type = int32_t;
};

// exp(x) for x <= 0. On a CPU the error is at most 1.02 ulp for every float in [-87, 0] (all of them were tried, with
// and without FMA); below -87, where exp is under 1.7e-38, the result is 0, and NaN stays NaN. On a GPU it is one
// ex2.approx, which flushes denormal results to 0: 2 ulp of exp2 plus the rounding of x * log2(e).
#ifdef __CUDA_ARCH__
template <class T>
FASTLM_HOST_DEVICE T exponential(T x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.44269504f));
  return result;
}
#else
constexpr float kRoundToInteger = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits

// x * 2^n, n the integer that shifted holds after kRoundToInteger was added to it.
template <class T>
FASTLM_HOST_DEVICE T times_power_of_two(T x, T shifted) {
  typename IntegerLike<T>::type bits, exponent;
  std::memcpy(&bits, &x, sizeof bits);
  std::memcpy(&exponent, &shifted, sizeof exponent);
  bits += exponent << 23;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

// exp of several x in lockstep: the steps of one x depend on each other, and a CPU's out-of-order window is too short
// to overlap them with those of the next x.
template <class T, int kCount>
FASTLM_HOST_DEVICE void exponentials(T (&x)[kCount]) {
  T shifted[kCount], r[kCount], square[kCount], q[kCount], even[kCount];
  for (int k = 0; k < kCount; ++k) shifted[k] = x[k] * 1.44269504f + kRoundToInteger;
  for (int k = 0; k < kCount; ++k) q[k] = shifted[k] - kRoundToInteger;  // n
  // ln 2 in two parts, the first short enough that n * part is exact: without it r loses digits for large |x|.
  for (int k = 0; k < kCount; ++k) r[k] = x[k] - q[k] * 0.693359375f;
  for (int k = 0; k < kCount; ++k) r[k] = r[k] - q[k] * -2.12194440e-4f;
  // exp(r) = 1 + r + r^2 q(r), q the degree-4 polynomial of least maximal relative error on |r| <= ln(2) / 2.
  for (int k = 0; k < kCount; ++k) square[k] = r[k] * r[k];
  for (int k = 0; k < kCount; ++k) even[k] = r[k] * 0x1.55549p-3f + 0x1.fffffcp-2f;
  for (int k = 0; k < kCount; ++k) q[k] = r[k] * 0x1.123a6cp-7f + 0x1.5558f4p-5f;
  for (int k = 0; k < kCount; ++k) q[k] = square[k] * 0x1.6a2342p-10f + q[k];
  for (int k = 0; k < kCount; ++k) q[k] = q[k] * square[k] + even[k];
  for (int k = 0; k < kCount; ++k) q[k] = q[k] * square[k] + r[k];
  for (int k = 0; k < kCount; ++k) q[k] = q[k] + 1.0f;
  for (int k = 0; k < kCount; ++k) x[k] = x[k] < -87.0f ? T{} : times_power_of_two(q[k], shifted[k]);
}

template <class T>
FASTLM_HOST_DEVICE T exponential(T x) {
  T only[1] = {x};
  exponentials(only);
  return only[0];
}

// The same with an error of at most 2^-17 of the result, for what is rounded to 16 bits: two thirds of the steps.
template <class T, int kCount>
FASTLM_HOST_DEVICE void exponentials_for_16_bits(T (&x)[kCount]) {
  T shifted[kCount], r[kCount], q[kCount];
  for (int k = 0; k < kCount; ++k) shifted[k] = x[k] * 1.44269504f + kRoundToInteger;
  for (int k = 0; k < kCount; ++k) q[k] = shifted[k] - kRoundToInteger;  // n
  for (int k = 0; k < kCount; ++k) r[k] = x[k] - q[k] * 0.693147181f;
  // exp(r) = 1 + r + r^2 q(r), q the degree-2 polynomial of least maximal relative error on |r| <= ln(2) / 2.
  for (int k = 0; k < kCount; ++k) q[k] = r[k] * 0x1.5225b6p-5f + 0x1.571caap-3f;
  for (int k = 0; k < kCount; ++k) q[k] = q[k] * r[k] + 0x1.0006b4p-1f;
  for (int k = 0; k < kCount; ++k) q[k] = q[k] * r[k] + 1.0f;
  for (int k = 0; k < kCount; ++k) q[k] = q[k] * r[k] + 1.0f;
  for (int k = 0; k < kCount; ++k) x[k] = x[k] < -87.0f ? T{} : times_power_of_two(q[k], shifted[k]);
}
#endif

// 1 / x; on a GPU one rcp.approx, 1 ulp.
FASTLM_HOST_DEVICE float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1.0f / x;
#endif
}

// tanh(u), with an error of at most 1.5 ulp on a CPU (two million values were tried on each side of 0.625, where the
// two forms meet).
template <class T>
FASTLM_HOST_DEVICE T hyperbolic_tangent(T u) {
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

// x, kept out of FMA contraction: compilers fuse a product with the sum that uses it in one place and not in another.
// A capped maximum would then differ from itself, a gradient that is 0 would not be, and a row's bits would depend on
// its batch.
template <class T>
FASTLM_HOST_DEVICE T no_contract(T x) {
#if defined(__CUDA_ARCH__)
  x = __fadd_rn(x, -0.0f);
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

}  // namespace fastlm
