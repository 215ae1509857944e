// Attention over short packed documents on a CPU, forward and backward. All arithmetic is float32.
#include "attention.h"
#include "instruction_sets.h"
#include "rows.h"

#include <cmath>

namespace fastlm {
namespace FASTLM_INSTRUCTION_SET {
namespace {

constexpr int64_t kTileRows = 4;
constexpr int64_t kTileVectors = VECTOR_BYTES == 64 ? 4 : 2;  // so that a tile's sums stay in registers
constexpr int64_t kBlock = 16;  // rows that share the bounds which causality sets

inline int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// A matrix by the steps from row to row and from column to column; one of both is 1.
struct Matrix {
  const float* data;
  int64_t row, column;
};

// c = or += a b, of so many rows and vectors of columns.
template <int64_t kRows, int64_t kVectors>
inline void multiply_tile(Matrix a, int64_t depth, const float* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  Vector sums[kRows][kVectors] = {};
  for (int64_t d = 0; d < depth; ++d) {
    Vector row[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) row[v] = bits_of<Vector>(b + d * b_row + v * kLanes);
    for (int64_t r = 0; r < kRows; ++r)
      for (int64_t v = 0; v < kVectors; ++v) sums[r][v] += row[v] * a.data[r * a.row + d * a.column];
  }
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t v = 0; v < kVectors; ++v) {
      float* target = c + r * c_row + v * kLanes;
      put(target, add ? bits_of<Vector>(target) + sums[r][v] : sums[r][v]);
    }
  }
}

template <int64_t kRows>
inline void multiply_rows(Matrix a, int64_t columns, int64_t depth, const float* b, int64_t b_row, float* c,
                          int64_t c_row, bool add) {
  int64_t i = 0;
  for (; i + kTileVectors * kLanes <= columns; i += kTileVectors * kLanes)
    multiply_tile<kRows, kTileVectors>(a, depth, b + i, b_row, c + i, c_row, add);
  for (; i < columns; i += kLanes) multiply_tile<kRows, 1>(a, depth, b + i, b_row, c + i, c_row, add);
}

// c (rows, columns) = or += a (rows, depth) b (depth, columns); columns are whole vectors.
void multiply(Matrix a, int64_t rows, int64_t columns, int64_t depth, const float* b, int64_t b_row, float* c,
              int64_t c_row, bool add) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows) {
    const Matrix part = {a.data + r * a.row, a.row, a.column};
    multiply_rows<kTileRows>(part, columns, depth, b, b_row, c + r * c_row, c_row, add);
  }
  for (; r < rows; ++r) {
    const Matrix part = {a.data + r * a.row, a.row, a.column};
    multiply_rows<1>(part, columns, depth, b, b_row, c + r * c_row, c_row, add);
  }
}

// Tokens [first, first + n) of a head: a matrix of floats, with zeros behind the features up to a whole vector.
void gather(const Heads& heads, int64_t head, int64_t first, int64_t n, int64_t features, float* target, int64_t stride) {
  for (int64_t i = 0; i < n; ++i) {
    float* row = target + i * stride;
    const float* source = read(heads.rows, first + i, head * heads.head, features, row);
    if (source != row) std::memcpy(row, source, features * sizeof(float));
    for (int64_t d = features; d < stride; ++d) row[d] = 0.0f;
  }
}

// The same, rows and columns exchanged, and zeros behind the tokens.
void transpose(const float* source, int64_t n, int64_t features, int64_t source_row, float* target, int64_t stride) {
  for (int64_t d = 0; d < features; ++d) {
    float* row = target + d * stride;
    for (int64_t i = 0; i < n; ++i) row[i] = source[i * source_row + d];
    for (int64_t i = n; i < stride; ++i) row[i] = 0.0f;
  }
}

void scatter(const Heads& heads, int64_t head, int64_t first, int64_t n, int64_t features, const float* source,
             int64_t stride) {
  for (int64_t i = 0; i < n; ++i) {
    float* row = place(heads.rows, first + i, head * heads.head, nullptr);
    if (row != nullptr) {
      std::memcpy(row, source + i * stride, features * sizeof(float));
    } else {
      finish(heads.rows, first + i, head * heads.head, features, source + i * stride);
    }
  }
}

// One document: where it lies, and who sees whom in it.
struct Document {
  int64_t q_first, queries, k_first, keys;
  bool causal;

  // How many keys a query sees: the first so many.
  int64_t seen(int64_t query) const {
    if (!causal) return keys;
    const int64_t seen = query + keys - queries + 1;
    return seen < 0 ? 0 : seen;
  }
  // The first query that sees the key.
  int64_t seer(int64_t key) const {
    if (!causal) return 0;
    const int64_t seer = key + queries - keys;
    return seer < 0 ? 0 : seer;
  }
};

// Calls body with the document and key head of each unit that is not left out.
template <class Body>
void over_units(const Documents& call, int64_t begin, int64_t end, Body body) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t i = unit / call.key_heads;
    const Document document = {call.q_bounds[i], call.q_bounds[i + 1] - call.q_bounds[i], call.k_bounds[i],
                               call.k_bounds[i + 1] - call.k_bounds[i], call.causal};
    if (document.queries <= call.longest && document.keys <= call.longest) body(document, unit % call.key_heads);
  }
}

// Turns n scores into exp(scale s - max), with zeros up to columns; gives (max, sum), or (-inf, 0) of no scores.
struct RowSums {
  float max, sum;
};

RowSums exponentials_of_row(float* s, int64_t n, int64_t columns, float scale) {
  Vector largest = Vector{} - INFINITY;
  for (int64_t j = 0; j < n; j += kLanes) largest = larger(cut(bits_of<Vector>(s + j), n - j, largest), largest);
  float max = -INFINITY;
  for (int64_t lane = 0; lane < kLanes; ++lane) max = larger(largest[lane], max);
  max *= scale;
  Vector sums[kAccumulators] = {};
  for (int64_t j = 0; j < n; j += kLanes) {
    const Vector e = cut(exponential(rounded(bits_of<Vector>(s + j) * scale) - max), n - j, Vector{});
    sums[0] += e;
    put(s + j, e);
  }
  for (int64_t j = whole_vectors(n); j < columns; j += kLanes) put(s + j, Vector{});
  return {max, sum_of_lanes(sums)};
}

// Turns n scores into p and their dp into ds, with zeros up to columns. delta is the sum of p dp here, not o . do: p is at
// hand, and where a query sees one key the two cancel to the last bit.
void gradients_of_row(float* p, float* ds, int64_t n, int64_t columns, float scale, float lse) {
  Vector sums[kAccumulators] = {};
  for (int64_t j = 0; j < columns; j += kLanes) {
    Vector exponent = rounded(bits_of<Vector>(p + j) * scale) - lse;
    exponent = exponent > 0.0f ? Vector{} : exponent;  // by a rounding at most; exponential takes none
    const Vector probability = cut(exponential(exponent), n - j, Vector{});
    put(p + j, probability);
    const Vector dp = cut(bits_of<Vector>(ds + j), n - j, Vector{});
    put(ds + j, dp);
    sums[0] += probability * dp;
  }
  const float delta = sum_of_lanes(sums);
  for (int64_t j = 0; j < columns; j += kLanes)
    put(ds + j, cut(bits_of<Vector>(p + j) * (bits_of<Vector>(ds + j) - delta) * scale, n - j, Vector{}));
}

}  // namespace

void attention(const Attention& forward, int64_t begin, int64_t end) {
  const Documents& call = forward.given;
  const int64_t D = call.features, width = whole_vectors(D), longest = whole_vectors(call.longest);
  const int64_t group = call.heads / call.key_heads;
  const Scratch k_t(D, longest), k(call.longest, width), v(call.longest, width), q(kBlock, width), s(kBlock, longest),
      out(kBlock, width);
  over_units(call, begin, end, [&](const Document& document, int64_t key_head) {
    const int64_t keys = whole_vectors(document.keys);
    gather(call.k, key_head, document.k_first, document.keys, D, k.row(0), width);
    gather(call.v, key_head, document.k_first, document.keys, D, v.row(0), width);
    transpose(k.row(0), document.keys, D, width, k_t.row(0), keys);
    for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
      for (int64_t first = 0; first < document.queries; first += kBlock) {
        const int64_t rows = document.queries - first < kBlock ? document.queries - first : kBlock;
        const int64_t seen = document.seen(first + rows - 1), columns = whole_vectors(seen);
        gather(call.q, head, document.q_first + first, rows, D, q.row(0), width);
        multiply({q.row(0), width, 1}, rows, columns, D, k_t.row(0), keys, s.row(0), keys, false);
        float sums[kBlock];
        for (int64_t i = 0; i < rows; ++i) {
          const RowSums row = exponentials_of_row(s.row(0) + i * keys, document.seen(first + i), columns, call.scale);
          sums[i] = row.sum;
          forward.lse[head * call.total + document.q_first + first + i] = row.max + std::log(row.sum);
        }
        multiply({s.row(0), keys, 1}, rows, width, seen, v.row(0), width, out.row(0), width, false);
        for (int64_t i = 0; i < rows; ++i) {
          float* row = out.row(0) + i * width;
          const float sum = document.seen(first + i) == 0 ? 1.0f : sums[i];
          for (int64_t d = 0; d < width; d += kLanes) put(row + d, bits_of<Vector>(row + d) / sum);
        }
        scatter(forward.out, head, document.q_first + first, rows, D, out.row(0), width);
      }
    }
  });
}

void attention_backward(const AttentionBackward& backward, int64_t begin, int64_t end) {
  const Documents& call = backward.given;
  const int64_t D = call.features, width = whole_vectors(D), longest = whole_vectors(call.longest);
  const int64_t group = call.heads / call.key_heads;
  const Scratch k_t(D, longest), v_t(D, longest), k(call.longest, width), v(call.longest, width),
      dk(call.longest, width), dv(call.longest, width), q(call.longest, width), dout(call.longest, width),
      p(call.longest, longest), ds(call.longest, longest), dq(kBlock, width);
  over_units(call, begin, end, [&](const Document& document, int64_t key_head) {
    const int64_t queries = document.queries, keys = whole_vectors(document.keys);
    gather(call.k, key_head, document.k_first, document.keys, D, k.row(0), width);
    gather(call.v, key_head, document.k_first, document.keys, D, v.row(0), width);
    transpose(k.row(0), document.keys, D, width, k_t.row(0), keys);
    transpose(v.row(0), document.keys, D, width, v_t.row(0), keys);
    for (int64_t i = 0; i < document.keys * width; ++i) dk.row(0)[i] = dv.row(0)[i] = 0.0f;
    for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
      gather(call.q, head, document.q_first, queries, D, q.row(0), width);
      gather(backward.dout, head, document.q_first, queries, D, dout.row(0), width);
      for (int64_t first = 0; first < queries; first += kBlock) {
        const int64_t rows = queries - first < kBlock ? queries - first : kBlock;
        const int64_t last_seen = document.seen(first + rows - 1);
        const int64_t blocks_seen = (last_seen + kBlock - 1) / kBlock * kBlock;  // whole: below, keys go by blocks too
        const int64_t columns = blocks_seen < keys ? blocks_seen : keys;
        float* const p_rows = p.row(0) + first * keys;
        float* const ds_rows = ds.row(0) + first * keys;
        multiply({q.row(0) + first * width, width, 1}, rows, columns, D, k_t.row(0), keys, p_rows, keys, false);
        multiply({dout.row(0) + first * width, width, 1}, rows, columns, D, v_t.row(0), keys, ds_rows, keys, false);
        for (int64_t i = 0; i < rows; ++i) {
          const float lse = backward.lse[head * call.total + document.q_first + first + i];
          gradients_of_row(p_rows + i * keys, ds_rows + i * keys, document.seen(first + i), columns, call.scale, lse);
        }
        multiply({ds_rows, keys, 1}, rows, width, last_seen, k.row(0), width, dq.row(0), width, false);
        scatter(backward.dq, head, document.q_first + first, rows, D, dq.row(0), width);
      }
      for (int64_t first = 0; first < document.keys; first += kBlock) {
        const int64_t rows = document.keys - first < kBlock ? document.keys - first : kBlock;
        const int64_t seer = document.seer(first) / kBlock * kBlock;  // the blocks before it left these columns unwritten
        if (seer >= queries) continue;
        const Matrix p_t = {p.row(0) + seer * keys + first, 1, keys}, ds_t = {ds.row(0) + seer * keys + first, 1, keys};
        multiply(p_t, rows, width, queries - seer, dout.row(0) + seer * width, width, dv.row(0) + first * width, width,
                 true);
        multiply(ds_t, rows, width, queries - seer, q.row(0) + seer * width, width, dk.row(0) + first * width, width, true);
      }
    }
    scatter(backward.dk, key_head, document.k_first, document.keys, D, dk.row(0), width);
    scatter(backward.dv, key_head, document.k_first, document.keys, D, dv.row(0), width);
  });
}

}  // namespace FASTLM_INSTRUCTION_SET

#if VECTOR_BYTES == 16  // the portable copy chooses among all

CHOOSE(attention, attention_cpu, (const Attention& call, int64_t begin, int64_t end), (call, begin, end))
CHOOSE(attention_backward, attention_backward_cpu, (const AttentionBackward& call, int64_t begin, int64_t end),
       (call, begin, end))

#endif

}  // namespace fastlm
