// Run-time dispatch of the CPU kernels to an instruction set.
//
// Each *_cpu.cpp is compiled once per instruction set, into the namespace FASTLM_INSTRUCTION_SET: portable, avx2,
// avx512.
#pragma once

namespace fastlm {

// The instruction set in use: 0 portable, 1 AVX2 with FMA, 2 AVX-512. At first the best that this CPU has.
int instruction_set();
int best_instruction_set();

}  // namespace fastlm

// FASTLM_DEFINE_CPU_DISPATCH(f, (int x), (x)) defines f_cpu, which calls the copy of f for the instruction set in use.
// The portable copy of a source defines it, the others do not.
#if defined(__AVX2__)
#define FASTLM_DEFINE_CPU_DISPATCH(function, parameters, arguments)
#elif defined(__x86_64__)
#define FASTLM_DEFINE_CPU_DISPATCH(function, parameters, arguments)                                \
  namespace avx2 {                                                                                 \
  void function parameters;                                                                        \
  }                                                                                                \
  namespace avx512 {                                                                               \
  void function parameters;                                                                        \
  }                                                                                                \
  void function##_cpu parameters {                                                                 \
    constexpr void(*copies[]) parameters = {portable::function, avx2::function, avx512::function}; \
    copies[instruction_set()] arguments;                                                           \
  }
#else
#define FASTLM_DEFINE_CPU_DISPATCH(function, parameters, arguments) \
  void function##_cpu parameters { portable::function arguments; }
#endif
