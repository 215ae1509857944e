// Layer norm and RMS norm on a CPU as ops on tensors. The Python op checks the arguments and allocates the outputs.
#include "norm.h"
#include "tensor_utils.h"

#include <torch/csrc/stable/library.h>

namespace fastlm {
namespace {

void norm_rows(Tensor x, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias, double eps, Tensor y,
               OptionalTensor h, OptionalTensor mean, Tensor rstd) {
  const int64_t N = rstd.numel(), C = x.numel() / N;
  const NormParams params = {.x = rows_of(x, C),
                             .residual = rows_of(residual, C),
                             .h = output_rows(h, C),
                             .y = output_rows(y, C),
                             .weight = float_data(weight),
                             .bias = float_data(bias),
                             .mean = float_data(mean),
                             .rstd = float_data(rstd),
                             .rows = N,
                             .columns = C,
                             .eps = static_cast<float>(eps)};
  parallel_for(params, N, C, norm_cpu);
}

void norm_backward_rows(Tensor dy, OptionalTensor dsum, Tensor h, OptionalTensor weight, OptionalTensor mean,
                        Tensor rstd, OptionalTensor dx, OptionalTensor dresidual, OptionalTensor dweight,
                        OptionalTensor dbias) {
  const int64_t N = rstd.numel(), C = h.numel() / N;
  const bool has_sums = dweight.has_value() || dbias.has_value();
  const int64_t chunks = has_sums ? num_chunks(N) : N;
  const OptionalTensor dweight_partials = new_partial_sums(dweight, h, chunks, C);
  const OptionalTensor dbias_partials = new_partial_sums(dbias, h, chunks, C);
  const NormBackwardParams params = {.dy = rows_of(dy, C),
                                     .dsum = rows_of(dsum, C),
                                     .h = rows_of(h, C),
                                     .dx = output_rows(dx, C),
                                     .dresidual = output_rows(dresidual, C),
                                     .weight = float_data(weight),
                                     .mean = float_data(mean),
                                     .rstd = float_data(rstd),
                                     .dweight = float_data(dweight_partials),
                                     .dbias = float_data(dbias_partials),
                                     .rows = N,
                                     .columns = C,
                                     .chunks = chunks};
  parallel_for(params, chunks, N / chunks * C, norm_backward_cpu);
  add_partial_sums(dweight_partials, dweight);
  add_partial_sums(dbias_partials, dbias);
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastlm, library) {
  library.def(
      "norm_rows(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, Tensor(a!) y, Tensor(b!)? h, "
      "Tensor(c!)? mean, Tensor(d!) rstd) -> ()");
  library.def(
      "norm_backward_rows(Tensor dy, Tensor? dsum, Tensor h, Tensor? weight, Tensor? mean, Tensor rstd, "
      "Tensor(a!)? dx, Tensor(b!)? dresidual, Tensor(c!)? dweight, Tensor(d!)? dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, library) {
  library.impl("norm_rows", TORCH_BOX(&fastlm::norm_rows));
  library.impl("norm_backward_rows", TORCH_BOX(&fastlm::norm_backward_rows));
}
