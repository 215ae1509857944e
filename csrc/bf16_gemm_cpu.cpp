// Products of bfloat16 matrices in float32: one instruction multiplies pairs of neighbours along the depth where the
// CPU has AVX512-BF16, and two multiply them, widened, where it has not.
//
// Both factors are packed into panels whose elements are such pairs: (depth / 2, kPanelRows) of a, of which each pair
// is broadcast, and (depth / 2, kPanelColumns) of b, which are loaded as vectors. Goto and van de Geijn 2008, Anatomy
// of High-Performance Matrix Multiplication.
#include "bf16_gemm.h"
#include "cpu_dispatch.h"
#include "vec.h"

namespace fastlm {
namespace FASTLM_INSTRUCTION_SET {
namespace {

constexpr int64_t kPanelVectors = 2;
constexpr int64_t kPanelColumns = kPanelVectors * kLanes;
constexpr int64_t kPanelRows = kLanes == 16 ? 14 : 8;  // so that the sums of a panel's product stay in registers
static_assert(kPanelRows % kLanes == 0 || kPanelRows < kLanes, "see pack_panel");

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// sum + the products of both halves of a and b; the instruction counts denormals as 0.
inline Vector dot_pairs(Vector sum, BitsVector a, BitsVector b) {
#if defined(__AVX512BF16__)
  return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  sum += (Vector)(a & 0xFFFF0000u) * (Vector)(b & 0xFFFF0000u);
  return sum + (Vector)(a << 16) * (Vector)(b << 16);
#endif
}

// Packing.

// Some rows of a, or columns of b: element (i, d) is data[i * stride + d * depth_stride].
struct Slice {
  const uint16_t* data;
  int64_t stride, depth_stride;

  Slice from(int64_t i, int64_t d) const { return {data + i * stride + d * depth_stride, stride, depth_stride}; }
};

// So many elements, two to a lane; then zeros.
inline BitsVector load_elements(const uint16_t* source, int64_t elements) {
  if (elements >= 2 * kLanes) return vec_load<BitsVector>(source);
  BitsVector vector = {};
  if (elements > 0) std::memcpy(&vector, source, elements * sizeof(uint16_t));
  return vector;
}

// The first n elements, in the upper half of their lanes; then zeros.
inline BitsVector load_upper(const uint16_t* source, int64_t n) {
  const auto* elements = reinterpret_cast<const BFloat16*>(source);
  if (n >= kLanes) return (BitsVector)BFloat16::load(elements);
  BFloat16 some[kLanes] = {};
  if (n > 0) std::memcpy(some, source, n * sizeof(uint16_t));
  return (BitsVector)BFloat16::load(some);
}

// target (depth / 2, kWidth), whose rows from count on are zeros. Up to a vector behind it is overwritten too.
template <int64_t kWidth>
void pack_panel(const Slice& source, int64_t count, int64_t depth, uint32_t* target) {
  if (source.depth_stride == 1) {
    for (int64_t d = 0; d < depth; d += 2 * kLanes) {
      for (int64_t i = 0; i < kWidth; i += kLanes) {
        Vector square[kLanes];
        FASTLM_UNROLL
        for (int64_t r = 0; r < kLanes; ++r)
          square[r] = (Vector)(i + r < count ? load_elements(source.from(i + r, d).data, depth - d) : BitsVector{});
        transpose(square);
        FASTLM_UNROLL
        for (int64_t r = 0; r < kLanes; ++r)
          if (d + 2 * r < depth) vec_store(target + (d / 2 + r) * kWidth + i, square[r]);
      }
    }
  } else {
    for (int64_t d = 0; d < depth; d += 2) {
      for (int64_t i = 0; i < kWidth; i += kLanes) {
        const BitsVector lower = load_upper(source.from(i, d).data, count - i) >> 16;
        const BitsVector upper = d + 1 < depth ? load_upper(source.from(i, d + 1).data, count - i) : BitsVector{};
        vec_store(target + d / 2 * kWidth + i, lower | upper);
      }
    }
  }
}

// All panels of a tile's rows or columns, one after the other, each of pairs rows.
template <int64_t kWidth>
void pack(const Slice& source, int64_t count, int64_t depth, uint32_t* target) {
  for (int64_t i = 0; i < count; i += kWidth) {
    pack_panel<kWidth>(source.from(i, 0), count - i, depth, target);
    target += ceil_div(depth, 2) * kWidth;
  }
}

// Multiplying.

struct Output {
  float* data;
  int64_t stride;
  float alpha;
  bool accumulate, non_temporal;

  Output from(int64_t row, int64_t column) const {
    return {data + row * stride + column, stride, alpha, accumulate, non_temporal};
  }
};

template <bool kNonTemporal>
inline void write_sums(const Vector (&sums)[kPanelRows][kPanelVectors], const Output& out, int64_t rows) {
  FASTLM_UNROLL
  for (int64_t r = 0; r < kPanelRows; ++r) {
    if (r == rows) return;
    FASTLM_UNROLL
    for (int64_t v = 0; v < kPanelVectors; ++v) {
      float* target = out.data + r * out.stride + v * kLanes;
      Vector sum = no_contract(sums[r][v] * out.alpha);
      if (out.accumulate) sum += vec_load<Vector>(target);
      vec_store<kNonTemporal>(target, sum);
    }
  }
}

// The same at the right edge of out.
void write_some_columns(const Vector (&sums)[kPanelRows][kPanelVectors], const Output& out, int64_t rows,
                        int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    float row[kPanelColumns];
    std::memcpy(row, sums[r], sizeof row);
    float* target = out.data + r * out.stride;
    for (int64_t i = 0; i < columns; ++i)
      target[i] = no_contract(row[i] * out.alpha) + (out.accumulate ? target[i] : 0.0f);
  }
}

// Up to kPanelRows x kPanelColumns of out, from a panel of each factor.
inline void multiply_panels(const uint32_t* a, const uint32_t* b, int64_t pairs, const Output& out, int64_t rows,
                            int64_t columns) {
  Vector sums[kPanelRows][kPanelVectors];
  FASTLM_UNROLL
  for (int64_t r = 0; r < kPanelRows; ++r) {
    FASTLM_UNROLL
    for (int64_t v = 0; v < kPanelVectors; ++v) sums[r][v] = Vector{};
  }
  if (!out.non_temporal) {  // so that it is in the cache when the sums are ready
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t v = 0; v < kPanelVectors && v * kLanes < columns; ++v)
        __builtin_prefetch(out.data + r * out.stride + v * kLanes, 1);
  }
  for (int64_t p = 0; p < pairs; ++p, a += kPanelRows, b += kPanelColumns) {
    BitsVector row[kPanelVectors];
    FASTLM_UNROLL
    for (int64_t v = 0; v < kPanelVectors; ++v) row[v] = vec_load<BitsVector>(b + v * kLanes);
    FASTLM_UNROLL
    for (int64_t r = 0; r < kPanelRows; ++r) {
      const BitsVector pair = BitsVector{} + a[r];
      FASTLM_UNROLL
      for (int64_t v = 0; v < kPanelVectors; ++v) sums[r][v] = dot_pairs(sums[r][v], pair, row[v]);
    }
  }
  if (columns < kPanelColumns) return write_some_columns(sums, out, rows, columns);
  out.non_temporal ? write_sums<true>(sums, out, rows) : write_sums<false>(sums, out, rows);
}

// A tile of out, from the packed factors: a panel of b stays in the L1 cache for all panels of a.
void multiply_tile(const uint32_t* a, const uint32_t* b, int64_t pairs, const Output& out, int64_t rows,
                   int64_t columns) {
  for (int64_t n = 0; n < columns; n += kPanelColumns)
    for (int64_t m = 0; m < rows; m += kPanelRows)
      multiply_panels(a + m * pairs, b + n * pairs, pairs, out.from(m, n), smaller(rows - m, kPanelRows), columns - n);
}

}  // namespace

void bf16_gemm(const Bf16GemmParams& params, int64_t begin, int64_t end) {
  constexpr int64_t kMaxPairs = kMaxDepth / 2;
  const int64_t a_size = ceil_div(params.tile_rows, kPanelRows) * kPanelRows * kMaxPairs;
  const int64_t b_size = ceil_div(params.tile_columns, kPanelColumns) * kPanelColumns * kMaxPairs;
  auto* a = new uint32_t[a_size + b_size + 2 * kLanes];
  uint32_t* b = a + a_size + kLanes;
  const Slice a_slice = {params.a.data, params.a.row_stride, params.a.column_stride};
  const Slice b_slice = {params.b.data, params.b.column_stride, params.b.row_stride};
  int64_t packed_m = -1, packed_d = -1;  // where the rows of a that are packed begin
  const int64_t blocks = params.depth > 0 ? ceil_div(params.depth, kMaxDepth) : 1;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t m = tile / params.tiles_in_row() * params.tile_rows;
    const int64_t n = tile % params.tiles_in_row() * params.tile_columns;
    const int64_t rows = smaller(params.rows - m, params.tile_rows);
    const int64_t columns = smaller(params.columns - n, params.tile_columns);
    Output out = {params.out + m * params.out_stride + n, params.out_stride, params.alpha, params.accumulate,
                  params.non_temporal && blocks == 1};
    for (int64_t block = 0; block < blocks; ++block) {
      // Blocks of equal depth: a short one at the end would pay for its packing with few products.
      const int64_t depth = ceil_div(ceil_div(params.depth, blocks), 2) * 2, d = block * depth;
      const int64_t left = smaller(params.depth - d, depth);
      if (m != packed_m || d != packed_d) pack<kPanelRows>(a_slice.from(m, d), rows, left, a);
      packed_m = m, packed_d = d;
      pack<kPanelColumns>(b_slice.from(n, d), columns, left, b);
      multiply_tile(a, b, ceil_div(left, 2), out, rows, columns);
      out.accumulate = true;
    }
  }
  delete[] a;
  fence_non_temporal();
}

}  // namespace FASTLM_INSTRUCTION_SET

FASTLM_DEFINE_CPU_DISPATCH_BF16(bf16_gemm, (const Bf16GemmParams& params, int64_t begin, int64_t end),
                                (params, begin, end))

}  // namespace fastlm
