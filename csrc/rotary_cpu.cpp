// Rotary embeddings on a CPU, in float32 arithmetic.
#include "cpu_dispatch.h"
#include "rotary.h"
#include "row_io.h"

namespace fastlm {
namespace FASTLM_INSTRUCTION_SET {
namespace {

inline bool is_aligned(const float* y) { return reinterpret_cast<uintptr_t>(y) % sizeof(Vector) == 0; }

// One head; sin has the sign of the direction.
template <bool kNonTemporal>
inline void rotate(const float* x, const float* cos, const float* sin, float* y, int64_t pairs, bool interleaved) {
  if (interleaved) {
    for (int64_t i = 0; i < pairs; ++i) {
      const float x1 = x[2 * i], x2 = x[2 * i + 1];
      y[2 * i] = x1 * cos[i] - x2 * sin[i];
      y[2 * i + 1] = x2 * cos[i] + x1 * sin[i];
    }
    return;
  }
  vec_for(pairs, [&]<class T>(int64_t i) {
    const T x1 = vec_load<T>(x + i), x2 = vec_load<T>(x + pairs + i);
    const T c = vec_load<T>(cos + i), s = vec_load<T>(sin + i);
    vec_store<kNonTemporal>(y + i, T(x1 * c - x2 * s));
    vec_store<kNonTemporal>(y + pairs + i, T(x2 * c + x1 * s));
  });
}

}  // namespace

void rotary(const RotaryParams& params, int64_t begin, int64_t end) {
  const int64_t pairs = params.pairs, C = params.columns;
  const bool non_temporal = params.non_temporal && params.y.dtype == DType::kFloat32;
  const Scratch scratch(5, C);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t batch = index / params.tokens, token = index % params.tokens;
    const int64_t position = params.positions == nullptr ? token : params.positions[index];
    const int64_t x_first = batch * params.x_batch_stride + token * params.x_token_stride;
    const int64_t y_first = batch * params.y_batch_stride + token * params.y_token_stride;
    const float* cos = load_row(params.cos, position, 0, pairs, scratch.row(0));
    const float* forward_sin = load_row(params.sin, position, 0, pairs, scratch.row(1));
    float* sin = scratch.row(2);
    for (int64_t i = 0; i < pairs; ++i) sin[i] = params.inverse ? -forward_sin[i] : forward_sin[i];
    for (int64_t head = 0; head < params.heads; ++head) {
      const float* x = load_row(params.x, head, x_first, C, scratch.row(3));
      float* y = row_out(params.y, head, y_first, scratch.row(4));
      if (non_temporal && is_aligned(y) && is_aligned(y + pairs)) {
        rotate<true>(x, cos, sin, y, pairs, params.interleaved);
      } else {
        rotate<false>(x, cos, sin, y, pairs, params.interleaved);
      }
      if (y != x && C > 2 * pairs) std::memcpy(y + 2 * pairs, x + 2 * pairs, (C - 2 * pairs) * sizeof(float));
      store_row(params.y, head, y_first, C, y);
    }
  }
  if (non_temporal) fence_non_temporal();
}

}  // namespace FASTLM_INSTRUCTION_SET

FASTLM_DEFINE_CPU_DISPATCH(rotary, (const RotaryParams& params, int64_t begin, int64_t end), (params, begin, end))

}  // namespace fastlm
