// Layer norm and RMS norm on a CPU, each in one pass over memory: what is needed twice is found in the cache.
#include "column_sums_cpu.h"
#include "cpu_dispatch.h"
#include "norm.h"
#include "row_io.h"

namespace fastlm {
namespace FASTLM_INSTRUCTION_SET {
namespace {

// h of a row; the sum is rounded to its dtype before it is normalised: the gradient is then that of what backward
// loads.
inline const float* load_h(const NormParams& params, int64_t row, const Scratch& scratch) {
  const int64_t C = params.columns;
  const float* x = load_row(params.x, row, 0, C, scratch.row(0));
  if (params.residual.data == nullptr) return x;
  const float* residual = load_row(params.residual, row, 0, C, scratch.row(1));
  float* h = row_out(params.h, row, 0, scratch.row(0));
  vec_for(C, [&]<class T>(int64_t i) { vec_store(h + i, vec_load<T>(x + i) + vec_load<T>(residual + i)); });
  store_row(params.h, row, 0, C, h);
  return load_row(params.h, row, 0, C, scratch.row(0));
}

// The mean of a row is shift + mean: the rounding of a first mean, shift, would show in rows far from zero, where 3.7,
// 3.7, ... must give 0. So the second moment is taken of h - shift, whose mean corrects the first.
struct RowMoments {
  float shift, mean, variance;
};

inline RowMoments moments_of(const float* h, int64_t C, bool centered) {
  float shift = 0.0f, mean = 0.0f;
  BlockedSum squares;
  if (centered) {
    BlockedSum first, second;
    vec_reduce(C, [&]<class T>(int64_t i, int64_t a) { first.add(vec_load<T>(h + i), a); }, first);
    shift = first.total() / C;
    const auto add_centered = [&]<class T>(int64_t i, int64_t a) {
      const T difference = vec_load<T>(h + i) - shift;
      second.add(difference, a);
      squares.add(difference * difference, a);
    };
    vec_reduce(C, add_centered, second, squares);
    mean = second.total() / C;
  } else {
    const auto add_square = [&]<class T>(int64_t i, int64_t a) {
      const T value = vec_load<T>(h + i);
      squares.add(value * value, a);
    };
    vec_reduce(C, add_square, squares);
  }
  float variance = squares.total() / C;
  // If both squares overflow, rstd is 0, as in PyTorch, and not NaN.
  if (variance < INFINITY) variance -= mean * mean;
  return {shift, mean, variance < 0.0f ? 0.0f : variance};
}

}  // namespace

void norm(const NormParams& params, int64_t begin, int64_t end) {
  const int64_t C = params.columns;
  const Scratch scratch(3, C);
  for (int64_t row = begin; row < end; ++row) {
    const float* h = load_h(params, row, scratch);
    const RowMoments moments = moments_of(h, C, params.mean != nullptr);
    const float shift = moments.shift, mean = moments.mean, rstd = 1.0f / std::sqrt(moments.variance + params.eps);
    if (params.mean != nullptr) params.mean[row] = shift + mean;
    params.rstd[row] = rstd;
    float* y = row_out(params.y, row, 0, scratch.row(2));
    vec_for(C, [&]<class T>(int64_t i) {
      T value = (vec_load<T>(h + i) - shift - mean) * rstd;
      if (params.weight != nullptr) value *= vec_load<T>(params.weight + i);
      if (params.bias != nullptr) value += vec_load<T>(params.bias + i);
      vec_store(y + i, value);
    });
    store_row(params.y, row, 0, C, y);
  }
}

namespace {

void norm_backward_row(const NormBackwardParams& params, int64_t row, float* dweight, float* dbias,
                       const Scratch& scratch) {
  const int64_t C = params.columns;
  const float* dy = load_row(params.dy, row, 0, C, scratch.row(0));
  const float* h = load_row(params.h, row, 0, C, scratch.row(1));
  const float mean = params.mean == nullptr ? 0.0f : params.mean[row], rstd = params.rstd[row];
  const auto weighted = [&]<class T>(T dy, int64_t i) {
    return params.weight == nullptr ? dy : dy * vec_load<T>(params.weight + i);
  };
  BlockedSum sum, product;
  const auto add = [&]<class T>(int64_t i, int64_t a) {
    const T gradient = vec_load<T>(dy + i), wdy = weighted(gradient, i), h_hat = (vec_load<T>(h + i) - mean) * rstd;
    sum.add(wdy, a);
    product.add(wdy * h_hat, a);
    if (dweight != nullptr) vec_store(dweight + i, vec_load<T>(dweight + i) + gradient * h_hat);
    if (dbias != nullptr) vec_store(dbias + i, vec_load<T>(dbias + i) + gradient);
  };
  vec_reduce(C, add, sum, product);
  if (params.dx.data == nullptr && params.dresidual.data == nullptr) return;
  const float mean_wdy = params.mean == nullptr ? 0.0f : sum.total() / C, mean_product = product.total() / C;
  const float* dsum = params.dsum.data == nullptr ? nullptr : load_row(params.dsum, row, 0, C, scratch.row(2));
  const Rows& first = params.dx.data == nullptr ? params.dresidual : params.dx;
  float* dh = row_out(first, row, 0, scratch.row(3));
  vec_for(C, [&]<class T>(int64_t i) {
    const T h_hat = (vec_load<T>(h + i) - mean) * rstd;
    T value = (weighted(vec_load<T>(dy + i), i) - mean_wdy - h_hat * mean_product) * rstd;
    if (dsum != nullptr) value += vec_load<T>(dsum + i);
    vec_store(dh + i, value);
  });
  store_row(first, row, 0, C, dh);
  if (params.dx.data == nullptr || params.dresidual.data == nullptr) return;
  float* dresidual = row_out(params.dresidual, row, 0, nullptr);
  if (dresidual != nullptr) std::memcpy(dresidual, dh, C * sizeof(float));
  store_row(params.dresidual, row, 0, C, dh);
}

}  // namespace

void norm_backward(const NormBackwardParams& params, int64_t begin, int64_t end) {
  const Scratch scratch(4, params.columns);
  PartialSum dweight(params.dweight, params.columns), dbias(params.dbias, params.columns);
  const auto add = [&](int64_t row, int64_t last) {
    for (; row < last; ++row) norm_backward_row(params, row, dweight.block(), dbias.block(), scratch);
  };
  sum_chunks(params.rows, params.chunks, begin, end, add, dweight, dbias);
}

}  // namespace FASTLM_INSTRUCTION_SET

FASTLM_DEFINE_CPU_DISPATCH(norm, (const NormParams& params, int64_t begin, int64_t end), (params, begin, end))
FASTLM_DEFINE_CPU_DISPATCH(norm_backward, (const NormBackwardParams& params, int64_t begin, int64_t end),
                           (params, begin, end))

}  // namespace fastlm
