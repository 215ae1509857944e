// GELU and gated linear units on a CPU as ops on tensors. The Python op checks the arguments and allocates the outputs.
#include "activations.h"
#include "tensor_utils.h"

#include <torch/csrc/stable/library.h>

namespace fastlm {
namespace {

int64_t num_segments(int64_t rows, int64_t columns) { return rows * ((columns + kSegment - 1) / kSegment); }

void gelu_rows(int64_t N, Tensor x, OptionalTensor bias, bool tanh, Tensor y) {
  const int64_t C = x.numel() / N;
  const GeluParams params = {
      .x = rows_of(x, C), .y = output_rows(y, C), .bias = float_data(bias), .rows = N, .columns = C, .tanh = tanh};
  parallel_for(params, num_segments(N, C), kSegment, gelu_cpu);
}

void gelu_backward_rows(int64_t N, Tensor dy, Tensor x, OptionalTensor bias, bool tanh, OptionalTensor dx,
                        OptionalTensor dbias) {
  const int64_t C = x.numel() / N;
  const int64_t tasks = dbias.has_value() ? num_chunks(N) : num_segments(N, C);
  const OptionalTensor dbias_partials = new_partial_sums(dbias, x, tasks, C);
  const GeluBackwardParams params = {.dy = rows_of(dy, C),
                                     .x = rows_of(x, C),
                                     .dx = output_rows(dx, C),
                                     .bias = float_data(bias),
                                     .dbias = float_data(dbias_partials),
                                     .rows = N,
                                     .columns = C,
                                     .chunks = tasks,
                                     .tanh = tanh};
  parallel_for(params, tasks, N * C / tasks, gelu_backward_cpu);
  add_partial_sums(dbias_partials, dbias);
}

void glu_rows(int64_t N, Tensor gate, Tensor up, int64_t activation, Tensor y) {
  const int64_t C = gate.numel() / N;
  const GluParams params = {.gate = rows_of(gate, C),
                            .up = rows_of(up, C),
                            .y = output_rows(y, C),
                            .rows = N,
                            .columns = C,
                            .activation = Activation{activation}};
  parallel_for(params, num_segments(N, C), kSegment, glu_cpu);
}

void glu_backward_rows(int64_t N, Tensor dy, Tensor gate, Tensor up, int64_t activation, OptionalTensor dgate,
                       OptionalTensor dup) {
  const int64_t C = gate.numel() / N;
  const GluBackwardParams params = {.dy = rows_of(dy, C),
                                    .gate = rows_of(gate, C),
                                    .up = rows_of(up, C),
                                    .dgate = output_rows(dgate, C),
                                    .dup = output_rows(dup, C),
                                    .rows = N,
                                    .columns = C,
                                    .activation = Activation{activation}};
  parallel_for(params, num_segments(N, C), kSegment, glu_backward_cpu);
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastlm, library) {
  library.def("gelu_rows(int N, Tensor x, Tensor? bias, bool tanh, Tensor(a!) y) -> ()");
  library.def(
      "gelu_backward_rows(int N, Tensor dy, Tensor x, Tensor? bias, bool tanh, Tensor(a!)? dx, Tensor(b!)? dbias) "
      "-> ()");
  library.def("glu_rows(int N, Tensor gate, Tensor up, int activation, Tensor(a!) y) -> ()");
  library.def(
      "glu_backward_rows(int N, Tensor dy, Tensor gate, Tensor up, int activation, Tensor(a!)? dgate, Tensor(b!)? dup) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, library) {
  library.impl("gelu_rows", TORCH_BOX(&fastlm::gelu_rows));
  library.impl("gelu_backward_rows", TORCH_BOX(&fastlm::gelu_backward_rows));
  library.impl("glu_rows", TORCH_BOX(&fastlm::glu_rows));
  library.impl("glu_backward_rows", TORCH_BOX(&fastlm::glu_backward_rows));
}
