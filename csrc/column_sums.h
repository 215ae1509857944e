// Sums over the rows of a matrix, such as the gradient of a bias. Each chunk of rows leaves a partial sum, and these
// are added in their order: the number of chunks, and with it every bit, is independent of the number of threads.
#pragma once

#include "dtype.h"

#include <cstdint>

namespace fastlm {

struct ColumnSumsParams {
  const float* partials;  // (chunks, columns)
  Rows total;             // one row
  int64_t chunks, columns;
};

void column_sums_cpu(const ColumnSumsParams& params);

}  // namespace fastlm
