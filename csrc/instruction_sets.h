// The instruction sets for which each CPU source is compiled, and the choice among their copies at run time.
#pragma once

namespace fastlm {

// Which one is in use: 0 portable, 1 AVX2 with FMA, 2 AVX-512. The best this CPU has, at first.
int instruction_set();
int best_instruction_set();

}  // namespace fastlm

#if defined(__x86_64__)
#define FOR_EACH_INSTRUCTION_SET(use) use(portable) use(avx2) use(avx512)
#else
#define FOR_EACH_INSTRUCTION_SET(use) use(portable)
#endif

// Defines name, which calls the copy of function for the instruction set in use: CHOOSE(f, g, (int x), (x)).
#define DECLARE(set, function, parameters) \
  namespace set {                          \
  void function parameters;                \
  }
#if defined(__x86_64__)
#define CHOOSE(function, name, parameters, arguments)                                    \
  DECLARE(portable, function, parameters)                                                \
  DECLARE(avx2, function, parameters)                                                    \
  DECLARE(avx512, function, parameters)                                                  \
  void name parameters {                                                                 \
    constexpr void(*copies[]) parameters = {portable::function, avx2::function, avx512::function}; \
    copies[instruction_set()] arguments;                                                 \
  }
#else
#define CHOOSE(function, name, parameters, arguments) \
  DECLARE(portable, function, parameters)             \
  void name parameters { portable::function arguments; }
#endif
