// GELU and gated linear units on a CPU, in float32 arithmetic.
#include "activations.h"
#include "column_sums_cpu.h"
#include "cpu_dispatch.h"
#include "row_io.h"

namespace fastlm {
namespace FASTLM_INSTRUCTION_SET {
namespace {

// Calls use with the row, the first column and the size of each segment [begin, end).
template <class Use>
inline void for_each_segment(int64_t columns, int64_t begin, int64_t end, Use use) {
  const int64_t per_row = (columns + kSegment - 1) / kSegment;
  for (int64_t segment = begin; segment < end; ++segment) {
    const int64_t first = segment % per_row * kSegment;
    use(segment / per_row, first, columns - first < kSegment ? columns - first : kSegment);
  }
}

// sigmoid(x) and 1 - sigmoid(x). Neither is a difference, which would cancel, and exp gets no positive number.
struct Sigmoid {
  Vector value;
  Vector complement;
};

inline Sigmoid sigmoid(Vector x) {
  const Vector small = exponential(x < 0.0f ? x : -x), large = 1.0f / (small + 1.0f), product = small * large;
  return {x < 0.0f ? product : large, x < 0.0f ? large : product};
}

// An activation x g(x) has the derivative g + x g'.
struct Gate {
  Vector g;
  Vector dg;  // g'
};

// g is a sigmoid of u = 2 sqrt(2 / pi) (x + 0.044715 x^3).
inline Gate gelu_gate_tanh(Vector x) {
  Vector squared = x * x;
  squared = squared > 1e4f ? Vector{} + 1e4f : squared;  // g' is 0 there, and 0 times infinity would be NaN
  const Sigmoid gate = sigmoid(x * (squared * 0.07135481282703227f + 1.5957691216057308f));
  return {gate.value, gate.value * gate.complement * (squared * 0.21406443848109681f + 1.5957691216057308f)};
}

// g(x) = erfc(-x / sqrt(2)) / 2. For x < 0 it is the density times t q(t), t = 1 / (1 + c |x|), as in Hastings 1955,
// with the polynomial q of least maximal error in (1 + |x|) g, which is 1.1e-8. g and its derivative, the density,
// share one exp.
inline Gate gelu_gate_erf(Vector x) {
  const Vector e = exponential(x * x * -0.5f), t = 1.0f / ((x < 0.0f ? -x : x) * 0.27577164f + 1.0f);
  Vector q = t * -0x1.d02e56p-4f + 0x1.c4231ap-2f;
  q = q * t - 0x1.42606ap-2f;
  q = q * t + 0x1.4a38f6p-2f;
  q = q * t + 0x1.7dc6e8p-5f;
  q = q * t + 0x1.e15c4ep-4f;  // 2e-8 above the best: q(1), and with it g(0), is then one half to the last bit
  const Vector tail = q * t * e, far = x < 0.0f ? tail : 1.0f - tail;
  // Where g is about one half, the roundings of t alone would be 2 ulp of g: there g = 1/2 + x p(x^2).
  const Vector w = x * x;
  Vector p = w * 0x1.7bd072p-14f - 0x1.305be0p-10f;
  p = p * w + 0x1.466648p-7f;
  p = p * w - 0x1.10558ap-4f;
  p = p * w + 0x1.98844ap-2f;
  return {w < 1.0f ? x * p + 0.5f : far, e * 0.3989422804014327f};
}

template <bool kTanh>
inline Gate gelu_gate(Vector x) {
  return kTanh ? gelu_gate_tanh(x) : gelu_gate_erf(x);
}

template <Activation kActivation>
inline Gate gate_of(Vector x) {
  if constexpr (kActivation == Activation::kSilu) {
    const Sigmoid gate = sigmoid(x);
    return {gate.value, gate.value * gate.complement};
  } else {
    return gelu_gate<kActivation == Activation::kGeluTanh>(x);
  }
}

// Pointers to optional tensors: null where there is none.
inline const float* offset(const float* vector, int64_t first) { return vector == nullptr ? nullptr : vector + first; }

inline float* optional_row_out(const Rows& rows, int64_t row, int64_t first, float* scratch) {
  return rows.data == nullptr ? nullptr : row_out(rows, row, first, scratch);
}

template <bool kTanh>
void gelu_segment(const GeluParams& params, int64_t row, int64_t first, int64_t n, const Scratch& scratch) {
  float* y = row_out(params.y, row, first, scratch.row(1));
  vec_map<2, 1>(n, {load_row(params.x, row, first, n, scratch.row(0)), offset(params.bias, first)}, {y},
                [](const Vector(&in)[2], Vector(&out)[1]) {
                  const Vector x = in[0] + in[1];
                  out[0] = x * gelu_gate<kTanh>(x).g;
                });
  store_row(params.y, row, first, n, y);
}

template <bool kTanh>
void gelu_backward_segment(const GeluBackwardParams& params, int64_t row, int64_t first, int64_t n, float* dbias,
                           const Scratch& scratch) {
  const float* dy = load_row(params.dy, row, first, n, scratch.row(0));
  const float* x = load_row(params.x, row, first, n, scratch.row(1));
  float* dx = optional_row_out(params.dx, row, first, scratch.row(2));
  const float* bias = offset(params.bias, first);
  const auto gradient = [](Vector dy, Vector x) {
    const Gate gate = gelu_gate<kTanh>(x);
    return dy * (gate.g + x * gate.dg);
  };
  if (dbias == nullptr) {
    vec_map<3, 1>(n, {dy, x, bias}, {dx},
                  [&](const Vector(&in)[3], Vector(&out)[1]) { out[0] = gradient(in[0], in[1] + in[2]); });
  } else {
    vec_map<4, 2>(n, {dy, x, bias, dbias}, {dx, dbias}, [&](const Vector(&in)[4], Vector(&out)[2]) {
      out[0] = gradient(in[0], in[1] + in[2]);
      out[1] = in[3] + out[0];
    });
  }
  if (dx != nullptr) store_row(params.dx, row, first, n, dx);
}

template <Activation kActivation>
void glu_segments(const GluParams& params, int64_t begin, int64_t end) {
  const Scratch scratch(3, kSegment);
  for_each_segment(params.columns, begin, end, [&](int64_t row, int64_t first, int64_t n) {
    const float* gate = load_row(params.gate, row, first, n, scratch.row(0));
    const float* up = load_row(params.up, row, first, n, scratch.row(1));
    float* y = row_out(params.y, row, first, scratch.row(2));
    vec_map<2, 1>(n, {gate, up}, {y}, [](const Vector(&in)[2], Vector(&out)[1]) {
      out[0] = in[0] * gate_of<kActivation>(in[0]).g * in[1];
    });
    store_row(params.y, row, first, n, y);
  });
}

template <Activation kActivation>
void glu_backward_segments(const GluBackwardParams& params, int64_t begin, int64_t end) {
  const Scratch scratch(5, kSegment);
  for_each_segment(params.columns, begin, end, [&](int64_t row, int64_t first, int64_t n) {
    const float* dy = load_row(params.dy, row, first, n, scratch.row(0));
    const float* gate = load_row(params.gate, row, first, n, scratch.row(1));
    const float* up = load_row(params.up, row, first, n, scratch.row(2));
    float* dgate = optional_row_out(params.dgate, row, first, scratch.row(3));
    float* dup = optional_row_out(params.dup, row, first, scratch.row(4));
    vec_map<3, 2>(n, {dy, gate, up}, {dgate, dup}, [](const Vector(&in)[3], Vector(&out)[2]) {
      const Gate gate = gate_of<kActivation>(in[1]);
      out[0] = in[0] * in[2] * (gate.g + in[1] * gate.dg);
      out[1] = in[0] * (in[1] * gate.g);
    });
    if (dgate != nullptr) store_row(params.dgate, row, first, n, dgate);
    if (dup != nullptr) store_row(params.dup, row, first, n, dup);
  });
}

}  // namespace

void gelu(const GeluParams& params, int64_t begin, int64_t end) {
  const Scratch scratch(2, kSegment);
  for_each_segment(params.columns, begin, end, [&](int64_t row, int64_t first, int64_t n) {
    (params.tanh ? gelu_segment<true> : gelu_segment<false>)(params, row, first, n, scratch);
  });
}

void gelu_backward(const GeluBackwardParams& params, int64_t begin, int64_t end) {
  const Scratch scratch(3, kSegment);
  const auto run = [&](int64_t first_segment, int64_t last_segment, float* dbias) {
    for_each_segment(params.columns, first_segment, last_segment, [&](int64_t row, int64_t first, int64_t n) {
      float* sums = dbias == nullptr ? nullptr : dbias + first;
      (params.tanh ? gelu_backward_segment<true> : gelu_backward_segment<false>)(params, row, first, n, sums, scratch);
    });
  };
  if (params.dbias == nullptr) return run(begin, end, nullptr);
  PartialSum dbias(params.dbias, params.columns);
  const int64_t per_row = (params.columns + kSegment - 1) / kSegment;
  const auto add = [&](int64_t row, int64_t last) { run(row * per_row, last * per_row, dbias.block()); };
  sum_chunks(params.rows, params.chunks, begin, end, add, dbias);
}

void glu(const GluParams& params, int64_t begin, int64_t end) {
  switch (params.activation) {
    case Activation::kSilu:
      return glu_segments<Activation::kSilu>(params, begin, end);
    case Activation::kGelu:
      return glu_segments<Activation::kGelu>(params, begin, end);
    case Activation::kGeluTanh:
      return glu_segments<Activation::kGeluTanh>(params, begin, end);
  }
}

void glu_backward(const GluBackwardParams& params, int64_t begin, int64_t end) {
  switch (params.activation) {
    case Activation::kSilu:
      return glu_backward_segments<Activation::kSilu>(params, begin, end);
    case Activation::kGelu:
      return glu_backward_segments<Activation::kGelu>(params, begin, end);
    case Activation::kGeluTanh:
      return glu_backward_segments<Activation::kGeluTanh>(params, begin, end);
  }
}

}  // namespace FASTLM_INSTRUCTION_SET

FASTLM_DEFINE_CPU_DISPATCH(gelu, (const GeluParams& params, int64_t begin, int64_t end), (params, begin, end))
FASTLM_DEFINE_CPU_DISPATCH(gelu_backward, (const GeluBackwardParams& params, int64_t begin, int64_t end),
                           (params, begin, end))
FASTLM_DEFINE_CPU_DISPATCH(glu, (const GluParams& params, int64_t begin, int64_t end), (params, begin, end))
FASTLM_DEFINE_CPU_DISPATCH(glu_backward, (const GluBackwardParams& params, int64_t begin, int64_t end),
                           (params, begin, end))

}  // namespace fastlm
