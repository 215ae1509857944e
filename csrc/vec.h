// Vectors of floats, the dtypes that are loaded into them, and loops over them: what the CPU kernels compute with.
//
// Each CPU source is compiled once per instruction set, into the namespace FASTLM_INSTRUCTION_SET. Vectors are GCC and
// Clang vector types, so the same lines become SSE2 or NEON, AVX2 and AVX-512 code. The kernels call no function
// template of the standard library: the linker could keep its AVX-512 copy for the portable code too.
#pragma once

#include "dtype.h"
#include "vec_math.h"

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define FASTLM_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTLM_VECTOR_BYTES 32
#else
#define FASTLM_VECTOR_BYTES 16
#include <torch/headeronly/util/Half.h>
#endif

// Without it GCC keeps an array of vectors that a loop indexes in memory.
#define FASTLM_UNROLL _Pragma("GCC unroll 16")

namespace fastlm {

typedef float Vector __attribute__((vector_size(FASTLM_VECTOR_BYTES)));
typedef int32_t IntegerVector __attribute__((vector_size(FASTLM_VECTOR_BYTES)));
typedef uint32_t BitsVector __attribute__((vector_size(FASTLM_VECTOR_BYTES)));
typedef uint16_t ShortVector __attribute__((vector_size(FASTLM_VECTOR_BYTES / 2)));  // as many lanes, half as wide
typedef int16_t WideShortVector __attribute__((vector_size(FASTLM_VECTOR_BYTES)));   // twice as many lanes

template <>
struct IntegerLike<Vector> {
  using type = IntegerVector;
};

namespace FASTLM_INSTRUCTION_SET {
namespace {

constexpr int64_t kLanes = FASTLM_VECTOR_BYTES / sizeof(float);
constexpr int64_t kAccumulators = 4;  // independent chains, or each step waits for the latency of the one before
constexpr int64_t kStep = kAccumulators * kLanes;

// An unaligned load of a vector, or of a scalar.
template <class T>
inline T vec_load(const void* source) {
  T value;
  std::memcpy(&value, source, sizeof value);
  return value;
}

// An unaligned store; or a non-temporal one to an aligned address, which does not read the cache lines it overwrites.
template <bool kNonTemporal = false, class T>
inline void vec_store(void* target, T value) {
#if defined(__AVX512F__)
  if constexpr (kNonTemporal && sizeof value == 64)
    return _mm512_stream_si512(static_cast<__m512i*>(target), (__m512i)value);
#endif
#if defined(__AVX2__)
  if constexpr (kNonTemporal && sizeof value == 32)
    return _mm256_stream_si256(static_cast<__m256i*>(target), (__m256i)value);
#endif
#if defined(__x86_64__)
  if constexpr (kNonTemporal && sizeof value == 16)
    return _mm_stream_si128(static_cast<__m128i*>(target), (__m128i)value);
#endif
  std::memcpy(target, &value, sizeof value);
}

// The dtypes: each loads and stores kLanes elements, as floats.

struct Float32 {
  float value;
  static Vector load(const Float32* source) { return vec_load<Vector>(source); }
  template <bool kNonTemporal>
  static void store(Float32* target, Vector value) {
    vec_store<kNonTemporal>(target, value);
  }
  operator float() const { return value; }
  void operator=(float x) { value = x; }
};

// The upper half of a float32, rounded to nearest even; U is uint32_t or a vector of them.
template <class U, class F>
inline U round_to_bfloat16(F value, U is_nan) {
  const U bits = vec_load<U>(&value);
  const U rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;  // without the last term ties would always round up
  return is_nan ? U{} + 0x7FC0u : rounded;                         // adding to a NaN's bits could turn it into infinity
}

struct BFloat16 {
  uint16_t bits;
  static Vector load(const BFloat16* source) {
    const BitsVector wide = widened(vec_load<ShortVector>(source)) << 16;
    return vec_load<Vector>(&wide);
  }
  template <bool kNonTemporal>
  static void store(BFloat16* target, Vector value) {
#if defined(__AVX512BF16__)
    vec_store<kNonTemporal>(target, (ShortVector)_mm512_cvtneps_pbh((__m512)value));  // denormal results become 0
#else
    vec_store<kNonTemporal>(target, narrowed(round_to_bfloat16(value, (BitsVector)(value != value))));
#endif
  }
  operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    return vec_load<float>(&wide);
  }
  void operator=(float x) {
#if defined(__AVX512BF16__)
    constexpr float kSmallestNormal = 0x1p-126f;
    if (x < kSmallestNormal && x > -kSmallestNormal) x *= 0.0f;  // as the instruction that rounds vectors
#endif
    bits = static_cast<uint16_t>(round_to_bfloat16(x, static_cast<uint32_t>(x != x)));
  }

 private:
  // GCC 12 compiles __builtin_convertvector to a dozen instructions where one would do.
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
  static Vector load(const Float16* source) { return _mm512_maskz_cvtph_ps(0xFFFF, vec_load<__m256i>(source)); }
  template <bool kNonTemporal>
  static void store(Float16* target, Vector value) {
    vec_store<kNonTemporal>(target, _mm512_maskz_cvtps_ph(0xFFFF, value, _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__AVX2__)
  static Vector load(const Float16* source) { return _mm256_cvtph_ps(vec_load<__m128i>(source)); }
  template <bool kNonTemporal>
  static void store(Float16* target, Vector value) {
    vec_store<kNonTemporal>(target, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  static Vector load(const Float16* source) {
    Vector value;
    for (int64_t lane = 0; lane < kLanes; ++lane) value[lane] = source[lane];
    return value;
  }
  template <bool kNonTemporal>
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

// Calls use with the type of the dtype.
template <class Use>
void dispatch_dtype(DType dtype, Use use) {
  switch (dtype) {
    case DType::kFloat32:
      return use.template operator()<Float32>();
    case DType::kFloat16:
      return use.template operator()<Float16>();
    case DType::kBFloat16:
      return use.template operator()<BFloat16>();
  }
}

// Non-temporal stores are weakly ordered: without this fence another thread could read the old values.
inline void fence_non_temporal() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Lanes.

inline IntegerVector lane_indices() {
  IntegerVector lanes;
  for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
  return lanes;
}

// The first n elements, n < kLanes, and zeros; or a whole vector.
inline Vector vec_load_partial(const float* source, int64_t n) {
  if (n >= kLanes) return vec_load<Vector>(source);
  Vector vector = {};
  std::memcpy(&vector, source, n * sizeof(float));
  return vector;
}

// x, with its lanes from n on replaced by fill.
inline Vector mask_tail(Vector x, int64_t n, Vector fill) {
  return lane_indices() < static_cast<int32_t>(n) ? x : fill;
}

// The larger of both; b if either is NaN. That is the instruction maxps, which GCC 12 does not find.
inline Vector vec_max(Vector a, Vector b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xFFFF, a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
inline float vec_max(float a, float b) { return a > b ? a : b; }

// Lane l of the result is lane Lanes::source(l) of a and b; the lanes of b are numbered after those of a.
template <class Lanes, int... lane>
inline Vector shuffle(Vector a, Vector b, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, b, Lanes::source(lane)...);
}

template <class Lanes>
inline Vector shuffle(Vector a, Vector b) {
  return shuffle<Lanes>(a, b, std::make_integer_sequence<int, kLanes>());
}

// Interleaves the lower or the upper halves of two vectors.
template <int kUpper>
struct InterleaveLanes {
  static constexpr int source(int lane) { return (kUpper * kLanes + lane) / 2 + lane % 2 * kLanes; }
};

// Transposes a square of vectors: each step interleaves the rows of its first half with those of its second.
inline void transpose(Vector (&rows)[kLanes]) {
  Vector interleaved[kLanes];
  FASTLM_UNROLL
  for (int64_t step = 1; step < kLanes; step *= 2) {
    FASTLM_UNROLL
    for (int64_t r = 0; r < kLanes / 2; ++r) {
      interleaved[2 * r] = shuffle<InterleaveLanes<0>>(rows[r], rows[r + kLanes / 2]);
      interleaved[2 * r + 1] = shuffle<InterleaveLanes<1>>(rows[r], rows[r + kLanes / 2]);
    }
    FASTLM_UNROLL
    for (int64_t r = 0; r < kLanes; ++r) rows[r] = interleaved[r];
  }
}

template <int kDistance>
struct ButterflyLanes {
  static constexpr int source(int lane) { return lane ^ kDistance; }
};

// A butterfly reduction over the lanes: a sum has fewer roundings than one lane after the other.
template <class Combine>
inline float reduce_lanes(Vector x, Combine combine) {
  if constexpr (kLanes > 8) x = combine(x, shuffle<ButterflyLanes<8>>(x, x));
  if constexpr (kLanes > 4) x = combine(x, shuffle<ButterflyLanes<4>>(x, x));
  x = combine(x, shuffle<ButterflyLanes<2>>(x, x));
  return combine(x, shuffle<ButterflyLanes<1>>(x, x))[0];
}

inline float reduce_max(Vector x) {
  return reduce_lanes(x, [](Vector a, Vector b) { return vec_max(a, b); });
}

inline float reduce_add(Vector x) {
  return reduce_lanes(x, [](Vector a, Vector b) { return a + b; });
}

inline float reduce_add(const Vector (&sums)[kAccumulators]) {
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Loops.

// Calls body<T>(i): with T = Vector for whole vectors from element i on, then with T = float for what is left.
template <class Body>
inline void vec_for(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body.template operator()<Vector>(i);
  for (; i < n; ++i) body.template operator()<float>(i);
}

// Calls body with vectors of the inputs, 0 for an absent (null) one, and stores the results in the outputs that are not
// null. The last elements go through a vector too: no bit of an element depends on its place, and so on its batch.
template <int kIn, int kOut, class Body>
inline void vec_map(int64_t n, const float* const (&in)[kIn], float* const (&out)[kOut], Body body) {
  Vector x[kIn] = {}, y[kOut], discarded;
  const Vector zero = {};
  const float* source[kIn];
  float* target[kOut];
  int64_t in_step[kIn], out_step[kOut];  // 0 for an absent one, which is read and written at one place
  for (int k = 0; k < kIn; ++k) {
    source[k] = in[k] == nullptr ? reinterpret_cast<const float*>(&zero) : in[k];
    in_step[k] = in[k] == nullptr ? 0 : 1;
  }
  for (int k = 0; k < kOut; ++k) {
    target[k] = out[k] == nullptr ? reinterpret_cast<float*>(&discarded) : out[k];
    out_step[k] = out[k] == nullptr ? 0 : 1;
  }
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Vector values[kIn], results[kOut];
    for (int k = 0; k < kIn; ++k) values[k] = vec_load<Vector>(source[k] + i * in_step[k]);
    body(values, results);
    for (int k = 0; k < kOut; ++k) vec_store(target[k] + i * out_step[k], results[k]);
  }
  if (i == n) return;
  const size_t bytes = (n - i) * sizeof(float);
  for (int k = 0; k < kIn; ++k) std::memcpy(&x[k], source[k] + i * in_step[k], bytes);
  body(x, y);
  for (int k = 0; k < kOut; ++k) std::memcpy(target[k] + i * out_step[k], &y[k], bytes);
}

constexpr int64_t kSumBlock = 1024;  // elements

// A long sum: in float32 within a block, in float64 over the blocks, or its error would grow with its length.
class BlockedSum {
 public:
  void add(Vector x, int64_t accumulator) { vectors_[accumulator] += x; }
  void add(float x, int64_t) { rest_ += x; }
  void end_block() {
    total_ += static_cast<double>(reduce_add(vectors_) + rest_);
    rest_ = 0.0f;
    for (auto& vector : vectors_) vector = Vector{};
  }
  float total() const { return static_cast<float>(total_); }

 private:
  Vector vectors_[kAccumulators] = {};
  float rest_ = 0.0f;
  double total_ = 0.0;
};

// vec_for whose body<T>(i, accumulator) adds to sums, and which ends their blocks.
template <class Body, class... Sums>
inline void vec_reduce(int64_t n, Body body, Sums&... sums) {
  for (int64_t i = 0; i < n;) {
    const int64_t end = n - i < kSumBlock ? n : i + kSumBlock;
    for (; i + kStep <= end; i += kStep)
      for (int64_t a = 0; a < kAccumulators; ++a) body.template operator()<Vector>(i + a * kLanes, a);
    for (; i + kLanes <= end; i += kLanes) body.template operator()<Vector>(i, 0);
    for (; i < end; ++i) body.template operator()<float>(i, 0);
    (sums.end_block(), ...);
  }
}

}  // namespace
}  // namespace FASTLM_INSTRUCTION_SET
}  // namespace fastlm
