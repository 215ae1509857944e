// Functions of one number that several kernels share, for the CPU and the CUDA kernels.
//
// On a CPU each is compiled for a scalar and for a vector of floats: T is float or a GCC vector type.
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

}  // namespace fastlm
