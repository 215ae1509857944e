// Adds up the partial sums of column_sums.h, in float64.
#include "column_sums.h"
#include "cpu_dispatch.h"
#include "row_io.h"

namespace fastlm {
namespace FASTLM_INSTRUCTION_SET {

void column_sums(const ColumnSumsParams& params) {
  const int64_t C = params.columns;
  for (int64_t first = 0; first < C; first += kSumBlock) {
    const int64_t n = C - first < kSumBlock ? C - first : kSumBlock;
    double total[kSumBlock] = {};
    for (int64_t chunk = 0; chunk < params.chunks; ++chunk) {
      const float* partial = params.partials + chunk * C + first;
      for (int64_t i = 0; i < n; ++i) total[i] += static_cast<double>(partial[i]);
    }
    float scratch[kSumBlock];
    float* result = row_out(params.total, 0, first, scratch);
    for (int64_t i = 0; i < n; ++i) result[i] = static_cast<float>(total[i]);
    store_row(params.total, 0, first, n, result);
  }
}

}  // namespace FASTLM_INSTRUCTION_SET

FASTLM_DEFINE_CPU_DISPATCH(column_sums, (const ColumnSumsParams& params), (params))

}  // namespace fastlm
