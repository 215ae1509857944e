// Which copy of the CPU kernels runs: the best that this CPU supports, or the one that a test selects.
#include "cpu_dispatch.h"

#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>

namespace fastlm {
namespace {

int current = best_instruction_set();

// For the tests, which run every instruction set of this CPU: selects number unless it is -1, returns the one in use.
int64_t cpu_instruction_set(int64_t number) {
  if (number < -1 || number > best_instruction_set())
    throw std::invalid_argument("cpu_instruction_set: got " + std::to_string(number) + ", this CPU has 0 to " +
                                std::to_string(best_instruction_set()));
  if (number >= 0) current = static_cast<int>(number);
  return current;
}

}  // namespace

int best_instruction_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();  // this runs while the library is loaded, before the compiler's own call
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw"))
    return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;  // all that have these have F16C
#endif
  return 0;
}

int instruction_set() { return current; }

}  // namespace fastlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastlm, library) { library.def("cpu_instruction_set(int number) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(fastlm, CompositeExplicitAutograd, library) {
  library.impl("cpu_instruction_set", TORCH_BOX(&fastlm::cpu_instruction_set));
}
