// Vectors of floats, and the element types that are read into them: what the CPU kernels compute with.
//
// Each CPU source is compiled once per instruction set; FASTLM_INSTRUCTION_SET says for which. Vectors are GCC and Clang
// vector types, so the same lines become SSE2 or NEON, AVX2 and AVX-512 code. No function template of the standard
// library is called: the linker could keep the AVX-512 copy of it for the portable code too.
#pragma once

#include "element.h"
#include "elementary.h"

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#include <torch/headeronly/util/Half.h>
#endif

namespace fastlm {

typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t IntegerVector __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t BitsVector __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t ShortVector __attribute__((vector_size(VECTOR_BYTES / 2)));  // as many lanes, half as wide

template <>
struct IntegerLike<Vector> {
  using type = IntegerVector;
};

namespace FASTLM_INSTRUCTION_SET {
namespace {

constexpr int64_t kLanes = VECTOR_BYTES / sizeof(float);
constexpr int64_t kAccumulators = 4;  // independent chains, or each step waits for the latency of the one before
constexpr int64_t kStep = kAccumulators * kLanes;

// Reading and writing kLanes elements of each type; arithmetic is in float32.

template <class Bits>
inline Bits bits_of(const void* value) {
  Bits bits;
  std::memcpy(&bits, value, sizeof bits);
  return bits;
}

// Stores go round the caches, to an aligned address, where kStream: it spares reading lines that are wholly overwritten.
template <bool kStream, class Bits>
inline void write(void* target, Bits value) {
#if defined(__AVX512F__)
  if constexpr (kStream && sizeof value == 64)
    return _mm512_stream_si512(static_cast<__m512i*>(target), (__m512i)value);
#endif
#if defined(__AVX2__)
  if constexpr (kStream && sizeof value == 32)
    return _mm256_stream_si256(static_cast<__m256i*>(target), (__m256i)value);
#endif
#if defined(__x86_64__)
  if constexpr (kStream && sizeof value == 16) return _mm_stream_si128(static_cast<__m128i*>(target), (__m128i)value);
#endif
  std::memcpy(target, &value, sizeof value);
}

struct Float32 {
  float value;
  static Vector load(const Float32* source) { return bits_of<Vector>(source); }
  template <bool kStream>
  static void store(Float32* target, Vector value) { write<kStream>(target, value); }
  operator float() const { return value; }
  void operator=(float x) { value = x; }
};

// The upper half of a float32, rounded to nearest even; U is a float's bits or a vector's.
template <class U, class F>
inline U round_to_bfloat16(F value, U is_nan) {
  const U bits = bits_of<U>(&value);
  const U rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;  // without the last term ties would always round up
  return is_nan ? U{} + 0x7FC0u : rounded;  // adding to a NaN's bits could turn it into infinity
}

struct BFloat16 {
  uint16_t bits;
  static Vector load(const BFloat16* source) {
    const BitsVector wide = widened(bits_of<ShortVector>(source)) << 16;
    return bits_of<Vector>(&wide);
  }
  template <bool kStream>
  static void store(BFloat16* target, Vector value) {
    write<kStream>(target, narrowed(round_to_bfloat16(value, (BitsVector)(value != value))));
  }
  operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    return bits_of<float>(&wide);
  }
  void operator=(float x) { bits = static_cast<uint16_t>(round_to_bfloat16(x, static_cast<uint32_t>(x != x))); }

 private:
  // GCC 12 makes a dozen instructions of __builtin_convertvector where there is one.
  static BitsVector widened(ShortVector shorts) {
#if defined(__AVX512F__)
    return (BitsVector)_mm512_maskz_cvtepu16_epi32(0xFFFF, (__m256i)shorts);
#elif defined(__AVX2__)
    return (BitsVector)_mm256_cvtepu16_epi32((__m128i)shorts);
#else
    return __builtin_convertvector(shorts, BitsVector);
#endif
  }
  static ShortVector narrowed(BitsVector bits) {  // below 2^16
#if defined(__AVX512F__)
    return (ShortVector)_mm512_maskz_cvtepi32_epi16(0xFFFF, (__m512i)bits);
#elif defined(__AVX2__)
    const __m256i words = (__m256i)bits;
    return (ShortVector)_mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
#else
    return __builtin_convertvector(bits, ShortVector);
#endif
  }
};

struct Float16 {
  uint16_t bits;
#if defined(__AVX512F__)
  // The forms without a mask warn of an uninitialised value in GCC 12.
  static Vector load(const Float16* source) { return _mm512_maskz_cvtph_ps(0xFFFF, bits_of<__m256i>(source)); }
  template <bool kStream>
  static void store(Float16* target, Vector value) {
    write<kStream>(target, _mm512_maskz_cvtps_ph(0xFFFF, value, _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__AVX2__)
  static Vector load(const Float16* source) { return _mm256_cvtph_ps(bits_of<__m128i>(source)); }
  template <bool kStream>
  static void store(Float16* target, Vector value) {
    write<kStream>(target, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  static Vector load(const Float16* source) {
    Vector value;
    for (int64_t lane = 0; lane < kLanes; ++lane) value[lane] = source[lane];
    return value;
  }
  template <bool kStream>
  static void store(Float16* target, Vector value) {
    for (int64_t lane = 0; lane < kLanes; ++lane) target[lane] = value[lane];
  }
#endif
#if defined(__F16C__)
  operator float() const { return _cvtsh_ss(bits); }
  void operator=(float x) { bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#else
  operator float() const { return torch::headeronly::detail::fp16_ieee_to_fp32_value(bits); }
  void operator=(float x) { bits = torch::headeronly::detail::fp16_ieee_from_fp32_value(x); }
#endif
};

inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }
inline float larger(float a, float b) { return a > b ? a : b; }

// Lane l is lane Places::of(l) of a and b, those of b counted behind those of a.
template <class Places, int... lane>
inline Vector shuffled(Vector a, Vector b, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, b, Places::of(lane)...);
}

template <class Places>
inline Vector shuffled(Vector a, Vector b) {
  return shuffled<Places>(a, b, std::make_integer_sequence<int, kLanes>());
}

template <int kDistance>
struct Across {
  static constexpr int of(int lane) { return lane ^ kDistance; }
};

// Combines the lanes in pairs: a sum has fewer roundings so than one lane after the other.
template <class Combine>
inline float over_lanes(Vector x, Combine combine) {
  if constexpr (kLanes > 8) x = combine(x, shuffled<Across<8>>(x, x));
  if constexpr (kLanes > 4) x = combine(x, shuffled<Across<4>>(x, x));
  x = combine(x, shuffled<Across<2>>(x, x));
  return combine(x, shuffled<Across<1>>(x, x))[0];
}

inline float largest_of_lanes(Vector x) {
  return over_lanes(x, [](Vector a, Vector b) { return larger(a, b); });
}

inline float sum_of_lanes(Vector x) {
  return over_lanes(x, [](Vector a, Vector b) { return a + b; });
}

inline float sum_of_lanes(const Vector (&sums)[kAccumulators]) {
  return sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Calls use with a value of the type that stands for the element.
template <class Use>
void with_element(Element element, Use use) {
  switch (element) {
    case Element::kFloat32:
      return use(Float32());
    case Element::kFloat16:
      return use(Float16());
    case Element::kBFloat16:
      return use(BFloat16());
  }
}

// Streamed stores are weakly ordered: without it another thread could read what was there before.
inline void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace FASTLM_INSTRUCTION_SET
}  // namespace fastlm
