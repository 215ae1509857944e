// Cross entropy on a CPU, float32: each row is read from memory once, its second pass finds it in the cache.
//
// This file is compiled once per instruction set; FASTLM_INSTRUCTION_SET says for which. Vectors are GCC and Clang vector
// types, so the same lines become SSE2 or NEON, AVX2 and AVX-512 code. No function template of the standard library is
// called: the linker could keep the AVX-512 copy of it for the portable code too.
#include "cross_entropy.h"
#include "cross_entropy_math.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#endif

namespace fastlm {

typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t IntegerVector __attribute__((vector_size(VECTOR_BYTES)));

template <>
struct IntegerLike<Vector> {
  using type = IntegerVector;
};

namespace FASTLM_INSTRUCTION_SET {
namespace {

constexpr int64_t kLanes = VECTOR_BYTES / sizeof(float);
constexpr int64_t kBlock = 1024;         // logits whose maximum is known before they are summed: 4 KiB, stays in L1
constexpr int64_t kAccumulators = 4;     // independent chains, or each step waits for the latency of the one before
constexpr int64_t kStep = kAccumulators * kLanes;
constexpr int64_t kNarrow = 256;         // columns below which half-written cache lines cost more than streaming spares

inline Vector load(const float* source) {
  Vector value;
  std::memcpy(&value, source, sizeof value);
  return value;
}

inline void store(float* target, Vector value) { std::memcpy(target, &value, sizeof value); }

// A store round the caches, to an aligned address: it spares reading a line that is wholly overwritten.
inline void stream(float* target, Vector value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(target, value);
#elif defined(__AVX2__)
  _mm256_stream_ps(target, value);
#elif defined(__x86_64__)
  _mm_stream_ps(target, value);
#else
  store(target, value);
#endif
}

inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }
inline float larger(float a, float b) { return a > b ? a : b; }

// Asks for the cache line of next[i], which is needed soon; memory would stand idle while this piece is computed.
inline void prefetch(const float* next, int64_t i) {
  if (next != nullptr) __builtin_prefetch(next + i, 0, 2);
}

float block_max(const float* x, int64_t n) {
  Vector maxima[kAccumulators];
  for (auto& max : maxima) max = Vector{} - INFINITY;
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep)
    for (int64_t a = 0; a < kAccumulators; ++a) maxima[a] = larger(load(x + i + a * kLanes), maxima[a]);
  for (; i + kLanes <= n; i += kLanes) maxima[0] = larger(load(x + i), maxima[0]);
  Vector lanes = larger(larger(maxima[0], maxima[1]), larger(maxima[2], maxima[3]));
  float max = -INFINITY;
  for (int64_t lane = 0; lane < kLanes; ++lane) max = larger(lanes[lane], max);
  for (; i < n; ++i) max = larger(x[i], max);
  return max;
}

float block_sum(const float* x, int64_t n, float subtrahend, const float* next) {
  Vector sums[kAccumulators] = {};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    for (int64_t a = 0; a < kAccumulators; ++a) {
      prefetch(next, i + a * kLanes);
      sums[a] += exponential<Vector>(load(x + i + a * kLanes) - subtrahend);
    }
  }
  for (; i + kLanes <= n; i += kLanes) sums[0] += exponential<Vector>(load(x + i) - subtrahend);
  Vector lanes = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float sum = 0.0f;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  for (; i < n; ++i) sum += exponential(x[i] - subtrahend);
  return sum;
}

Statistics row_statistics(const float* x, int64_t n) {
  Statistics row = {-INFINITY, 0.0f};
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t length = n - i < kBlock ? n - i : kBlock;
    // A NaN is ignored by the maximum but not by the sum, and so makes the whole row NaN, as in PyTorch.
    const float max = block_max(x + i, length);
    row = merge(row, {max, block_sum(x + i, length, shift(max), n - i > kBlock ? x + i + kBlock : nullptr)});
  }
  return row;
}

template <bool kStream>
void write_gradient(const float* x, float* y, int64_t n, float max, float factor, const float* next) {
  int64_t i = 0;
  if (kStream) {
    for (; i < n && reinterpret_cast<uintptr_t>(y + i) % VECTOR_BYTES != 0; ++i) y[i] = gradient(x[i], max, factor);
  }
  for (; i + kLanes <= n; i += kLanes) {
    prefetch(next, i);
    const Vector value = gradient<Vector>(load(x + i), max, factor);
    kStream ? stream(y + i, value) : store(y + i, value);
  }
  for (; i < n; ++i) y[i] = gradient(x[i], max, factor);
}

}  // namespace

void cross_entropy_rows(const CrossEntropy& call, int64_t begin, int64_t end) {
  const bool through_cache = call.gradient == call.input || call.columns < kNarrow;
  for (int64_t row = begin; row < end; ++row) {
    const float* x = static_cast<const float*>(call.input) + row * call.input_stride;
    float* y = call.gradient == nullptr ? nullptr : static_cast<float*>(call.gradient) + row * call.gradient_stride;
    const int64_t target = call.target[row];
    if (target == call.ignore_index) {
      call.losses[row] = 0.0f;
      if (y != nullptr) std::memset(y, 0, call.columns * sizeof(float));
      continue;
    }
    const Statistics statistics = row_statistics(x, call.num_classes);
    const float target_logit = x[target];
    call.losses[row] = loss(statistics, target_logit);
    if (y == nullptr) continue;
    const float scale = call.scale == nullptr ? 1.0f : call.scale[row * call.scale_stride];
    const float factor = gradient_factor(statistics, scale);
    const float* next = row + 1 < end ? x + call.input_stride : nullptr;
    if (through_cache) {
      write_gradient<false>(x, y, call.num_classes, statistics.max, factor, next);
    } else {
      write_gradient<true>(x, y, call.num_classes, statistics.max, factor, next);
    }
    y[target] = target_gradient(target_logit, statistics, scale);
    std::memset(y + call.num_classes, 0, (call.columns - call.num_classes) * sizeof(float));
  }
#if defined(__x86_64__)
  _mm_sfence();  // streamed stores are weakly ordered: without it another thread could read what was there before
#endif
}

}  // namespace FASTLM_INSTRUCTION_SET

#if VECTOR_BYTES == 16  // the portable copy chooses among all

#if defined(__x86_64__)
#define FOR_EACH_INSTRUCTION_SET(use) use(portable) use(avx2) use(avx512)
#else
#define FOR_EACH_INSTRUCTION_SET(use) use(portable)
#endif

#define DECLARE(name) \
  namespace name {    \
  void cross_entropy_rows(const CrossEntropy&, int64_t, int64_t); \
  }
FOR_EACH_INSTRUCTION_SET(DECLARE)

namespace {

#define ADDRESS(name) name::cross_entropy_rows,
constexpr void (*kKernels[])(const CrossEntropy&, int64_t, int64_t) = {FOR_EACH_INSTRUCTION_SET(ADDRESS)};

int chosen = best_instruction_set();

template <class T>
void scale_rows(const ScaleRows& call, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float scale = call.scale[row * call.scale_stride];
    if (scale == 1.0f) continue;
    T* x = static_cast<T*>(call.input) + row * call.stride;
    for (int64_t i = 0; i < call.columns; ++i) x[i] = static_cast<T>(static_cast<float>(x[i]) * scale);
  }
}

}  // namespace

int best_instruction_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();  // this runs while the library is loaded, before the compiler's own call
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

int instruction_set() { return chosen; }
void set_instruction_set(int number) { chosen = number; }

void cross_entropy_cpu(const CrossEntropy& call, int64_t begin, int64_t end) {
  kKernels[chosen](call, begin, end);
}

void scale_rows_cpu(const ScaleRows& call, int64_t begin, int64_t end) {
  switch (call.element) {
    case Element::kFloat16:
      return scale_rows<torch::headeronly::Half>(call, begin, end);
    case Element::kBFloat16:
      return scale_rows<torch::headeronly::BFloat16>(call, begin, end);
    default:
      return scale_rows<float>(call, begin, end);
  }
}

#endif

}  // namespace fastlm
