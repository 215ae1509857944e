// Philox-4x32 with 7 rounds (Salmon et al. 2011), bit for bit that of fastlm/ops/_dropout.py.
#pragma once

#include <cstdint>

namespace fastlm {
namespace FASTLM_INSTRUCTION_SET {
namespace {

struct PhiloxWords {
  uint32_t word[4];
};

inline PhiloxWords philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 7; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// A random word as a uniform number in [0, 1).
inline float to_uniform(uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f; }

}  // namespace
}  // namespace FASTLM_INSTRUCTION_SET
}  // namespace fastlm
