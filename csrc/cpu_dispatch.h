// Run-time dispatch of the CPU kernels to an instruction set.
//
// Each *_cpu.cpp is compiled once per instruction set, into the namespace FASTLM_INSTRUCTION_SET: portable, avx2,
// avx512 and, where it multiplies or writes much bfloat16, avx512_bf16.
#pragma once

namespace fastlm {

// The instruction set in use: 0 portable, 1 AVX2 with FMA, 2 AVX-512, 3 that with BF16. At first the best of this CPU.
int instruction_set();
int best_instruction_set();

}  // namespace fastlm

// FASTLM_DEFINE_CPU_DISPATCH(f, (int x), (x)) defines f_cpu, which calls the copy of f for the instruction set in use;
// FASTLM_DEFINE_CPU_DISPATCH_BF16 is for the sources that have a copy for avx512_bf16. The portable copy of a source
// defines it, the others do not.
#if defined(__AVX2__)
#define FASTLM_DEFINE_CPU_COPIES(function, parameters, arguments, best)
#elif defined(__x86_64__)
#define FASTLM_DEFINE_CPU_COPIES(function, parameters, arguments, best)                                            \
  namespace avx2 {                                                                                                 \
  void function parameters;                                                                                        \
  }                                                                                                                \
  namespace avx512 {                                                                                               \
  void function parameters;                                                                                        \
  }                                                                                                                \
  namespace best {                                                                                                 \
  void function parameters;                                                                                        \
  }                                                                                                                \
  void function##_cpu parameters {                                                                                 \
    constexpr void(*copies[]) parameters = {portable::function, avx2::function, avx512::function, best::function}; \
    copies[instruction_set()] arguments;                                                                           \
  }
#else
#define FASTLM_DEFINE_CPU_COPIES(function, parameters, arguments, best) \
  void function##_cpu parameters { portable::function arguments; }
#endif

#define FASTLM_DEFINE_CPU_DISPATCH(function, parameters, arguments) \
  FASTLM_DEFINE_CPU_COPIES(function, parameters, arguments, avx512)
#define FASTLM_DEFINE_CPU_DISPATCH_BF16(function, parameters, arguments) \
  FASTLM_DEFINE_CPU_COPIES(function, parameters, arguments, avx512_bf16)
