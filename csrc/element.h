// The types of the elements that the kernels read and write; they compute in float32.
#pragma once

namespace fastlm {

enum class Element { kFloat32, kFloat16, kBFloat16 };

}  // namespace fastlm
