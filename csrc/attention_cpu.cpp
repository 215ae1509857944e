// Varlen attention on a CPU, forward and backward, in float32 arithmetic.
#include "attention.h"
#include "cpu_dispatch.h"
#include "philox.h"
#include "row_io.h"

namespace fastlm {
namespace FASTLM_INSTRUCTION_SET {
namespace {

constexpr int64_t kTileRows = 4;
constexpr int64_t kTileVectors = FASTLM_VECTOR_BYTES == 64 ? 4 : 2;  // so that a tile's sums stay in registers
constexpr int64_t kPanelDepth = 64;  // rows of the right factor that are in use at a time
constexpr int64_t kBlock = 16;       // queries whose scores are formed together, for the keys that any of them sees
constexpr int64_t kChunkRows = 8 * kBlock;  // queries whose gradients are kept until dk and dv have been added up

inline int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Rows of n keys. A column of rows of a multiple of 1 KiB would fall into few sets of a cache: a vector more spreads
// it.
inline int64_t key_stride(int64_t n) {
  n = whole_vectors(n);
  return n % 256 == 0 ? n + kLanes : n;
}

// Matrix products.

// A left factor by its strides, one of which is 1.
struct Matrix {
  const float* data;
  int64_t row_stride, column_stride;

  Matrix from(int64_t row, int64_t column) const {
    return {data + row * row_stride + column * column_stride, row_stride, column_stride};
  }
};

// A right factor or a product, row by row.
template <class T>
struct RowMajor {
  T* data;
  int64_t stride;

  RowMajor from(int64_t row, int64_t column) const { return {data + row * stride + column, stride}; }
};

struct ProductSize {
  int64_t rows, columns, depth;
};

// c = or += a b for a tile of c.
template <int64_t kRows, int64_t kVectors>
inline __attribute__((always_inline)) void multiply_tile(Matrix a, RowMajor<const float> b, RowMajor<float> c,
                                                         int64_t depth, bool accumulate) {
  Vector sums[kRows][kVectors];
  FASTLM_UNROLL
  for (int64_t r = 0; r < kRows; ++r) {
    FASTLM_UNROLL
    for (int64_t v = 0; v < kVectors; ++v) sums[r][v] = Vector{};
  }
  for (int64_t d = 0; d < depth; ++d) {
    Vector row[kVectors];
    FASTLM_UNROLL
    for (int64_t v = 0; v < kVectors; ++v) row[v] = vec_load<Vector>(b.data + d * b.stride + v * kLanes);
    FASTLM_UNROLL
    for (int64_t r = 0; r < kRows; ++r) {
      FASTLM_UNROLL
      for (int64_t v = 0; v < kVectors; ++v) sums[r][v] += row[v] * a.data[r * a.row_stride + d * a.column_stride];
    }
  }
  if (accumulate) {
    FASTLM_UNROLL
    for (int64_t r = 0; r < kRows; ++r) {
      FASTLM_UNROLL
      for (int64_t v = 0; v < kVectors; ++v) sums[r][v] += vec_load<Vector>(c.data + r * c.stride + v * kLanes);
    }
  }
  FASTLM_UNROLL
  for (int64_t r = 0; r < kRows; ++r) {
    FASTLM_UNROLL
    for (int64_t v = 0; v < kVectors; ++v) vec_store(c.data + r * c.stride + v * kLanes, sums[r][v]);
  }
}

// The same for a column of tiles: the panel of b is read from memory once, then from the L1 cache for every tile.
template <int64_t kVectors>
inline void multiply_panel(Matrix a, RowMajor<const float> b, RowMajor<float> c, int64_t rows, int64_t depth,
                           bool accumulate) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows)
    multiply_tile<kTileRows, kVectors>(a.from(r, 0), b, c.from(r, 0), depth, accumulate);
  for (; r < rows; ++r) multiply_tile<1, kVectors>(a.from(r, 0), b, c.from(r, 0), depth, accumulate);
}

// c (rows, columns) = or += a (rows, depth) b (depth, columns); columns are whole vectors.
void multiply(Matrix a, RowMajor<const float> b, RowMajor<float> c, const ProductSize& size, bool accumulate = false) {
  int64_t first = 0;
  do {
    const int64_t depth = size.depth - first < kPanelDepth ? size.depth - first : kPanelDepth;
    int64_t i = 0;
    for (; i + kTileVectors * kLanes <= size.columns; i += kTileVectors * kLanes)
      multiply_panel<kTileVectors>(a, b.from(0, i), c.from(0, i), size.rows, depth, accumulate);
    for (; i < size.columns; i += kLanes)
      multiply_panel<1>(a, b.from(0, i), c.from(0, i), size.rows, depth, accumulate);
    a = a.from(0, depth);
    b = b.from(depth, 0);
    first += depth;
    accumulate = true;
  } while (first < size.depth);
}

// Tokens of a head, packed into rows of floats and back.

// Tokens [first, first + count) of one head. It goes by reference: a copy of what was just written waits for the
// stores, which took a tenth of the time of sequences of two tokens.
struct TokenRange {
  const Heads& heads;
  int64_t head, first, count, head_dim;

  int64_t begin() const { return head * heads.head_stride; }  // of the head in a token
};

// For so few elements a call of memcpy costs more.
inline void copy(const float* source, int64_t n, float* target) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) vec_store(target + i, vec_load<Vector>(source + i));
  for (; i < n; ++i) target[i] = source[i];
}

// target (count, stride), with zeros from head_dim on.
void pack(const TokenRange& range, float* target, int64_t stride) {
  for (int64_t i = 0; i < range.count; ++i) {
    float* row = target + i * stride;
    const float* source = load_row(range.heads.tokens, range.first + i, range.begin(), range.head_dim, row);
    if (source != row) copy(source, range.head_dim, row);
    for (int64_t d = range.head_dim; d < stride; ++d) row[d] = 0.0f;
  }
}

void unpack(const float* source, int64_t stride, const TokenRange& range) {
  for (int64_t i = 0; i < range.count; ++i) {
    float* row = row_out(range.heads.tokens, range.first + i, range.begin(), nullptr);
    if (row != nullptr) {
      copy(source + i * stride, range.head_dim, row);
    } else {
      store_row(range.heads.tokens, range.first + i, range.begin(), range.head_dim, source + i * stride);
    }
  }
}

// The transpose of what pack writes: target (head_dim, stride), with zeros from count on. rows holds kLanes tokens.
void pack_transposed(const TokenRange& range, const Scratch& rows, float* target, int64_t stride) {
  const int64_t width = whole_vectors(range.head_dim);
  for (int64_t i = 0; i < stride; i += kLanes) {
    const int64_t left = range.count - i < 0 ? 0 : range.count - i < kLanes ? range.count - i : kLanes;
    pack({range.heads, range.head, range.first + i, left, range.head_dim}, rows.row(0), width);
    for (int64_t d = 0; d < range.head_dim; d += kLanes) {
      Vector square[kLanes];
      FASTLM_UNROLL
      for (int64_t r = 0; r < kLanes; ++r) square[r] = r < left ? vec_load<Vector>(rows.row(r) + d) : Vector{};
      transpose(square);
      FASTLM_UNROLL
      for (int64_t r = 0; r < kLanes; ++r)
        if (d + r < range.head_dim) vec_store(target + (d + r) * stride + i, square[r]);
    }
  }
}

// Sequences, and what each query of them sees.

struct Sequence {
  int64_t index, q_first, queries, k_first, keys;
  int64_t window_left, window_right;

  int64_t position(int64_t query) const { return query + keys - queries; }
  // A query sees the keys [key_begin, key_end).
  int64_t key_begin(int64_t query) const {
    return window_left < 0 || position(query) < window_left ? 0 : position(query) - window_left;
  }
  int64_t key_end(int64_t query) const {
    return window_right < 0 ? keys : clamped(position(query) + window_right + 1, keys);
  }
  // A key is seen by the queries [query_begin, query_end).
  int64_t query_begin(int64_t key) const {
    return window_right < 0 ? 0 : clamped(key - position(0) - window_right, queries);
  }
  int64_t query_end(int64_t key) const {
    return window_left < 0 ? queries : clamped(key - position(0) + window_left + 1, queries);
  }

 private:
  static int64_t clamped(int64_t x, int64_t most) { return x < 0 ? 0 : x < most ? x : most; }
};

// Calls body with the sequence and the key head of each unit [begin, end) whose sequence is not left out.
template <class Body>
void for_each_unit(const VarlenInputs& inputs, const ScoreOptions& options, int64_t begin, int64_t end, Body body) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t i = unit / inputs.kv_heads;
    const Sequence seq = {.index = i,
                          .q_first = inputs.cu_seqlens_q[i],
                          .queries = inputs.cu_seqlens_q[i + 1] - inputs.cu_seqlens_q[i],
                          .k_first = inputs.cu_seqlens_k[i],
                          .keys = inputs.cu_seqlens_k[i + 1] - inputs.cu_seqlens_k[i],
                          .window_left = options.window_left,
                          .window_right = options.window_right};
    if (seq.queries <= inputs.max_seqlen && seq.keys <= inputs.max_seqlen) body(seq, unit % inputs.kv_heads);
  }
}

// A query head, and the terms of its scores.
struct Head {
  int64_t index;
  float slope, sink;

  Head(const VarlenInputs& inputs, const ScoreOptions& options, const Sequence& seq, int64_t index)
      : index(index),
        slope(options.alibi_slopes == nullptr ? 0.0f : options.alibi_slopes[seq.index * inputs.heads + index]),
        sink(options.sinks == nullptr ? -INFINITY : options.sinks[index]) {}
};

// Queries [first, first + rows) of a sequence, at most kBlock, and the keys of their scores: from a multiple of kBlock
// up to the last key that a query sees. Scores are written for columns keys: whole blocks, as far as the keys reach.
struct QueryBlock {
  int64_t first, rows;
  int64_t key_begin, key_end, columns;

  QueryBlock(const Sequence& seq, int64_t first, int64_t end)
      : first(first),
        rows(end - first < kBlock ? end - first : kBlock),
        key_begin(seq.key_begin(first) / kBlock * kBlock),
        key_end(seq.key_end(first + rows - 1)) {
    const int64_t blocks = (key_end - key_begin + kBlock - 1) / kBlock * kBlock;
    const int64_t rest = whole_vectors(seq.keys) - key_begin;
    columns = blocks < rest ? blocks : rest;
  }
};

// A row of a block's scores; its query sees the columns [begin, end).
struct ScoreRow {
  int64_t begin, end, columns;
  int64_t position;  // the query's own, as a column
  float slope, sink;

  ScoreRow(const Sequence& seq, const QueryBlock& block, int64_t row, const Head& head)
      : begin(seq.key_begin(block.first + row) - block.key_begin),
        end(seq.key_end(block.first + row) - block.key_begin),
        columns(block.columns),
        position(seq.position(block.first + row) - block.key_begin),
        slope(head.slope),
        sink(head.sink) {}

  int64_t first_vector() const { return begin / kLanes * kLanes; }
  // Calls body(j, masked) with the column of each vector. masked(x, fill) is fill where the query does not see, which
  // only the first and the last vector can have.
  template <class Body>
  void for_each_vector(Body body) const {
    const auto at_edge = [&](int64_t j) {
      const IntegerVector column = lane_indices() + static_cast<int32_t>(j);
      const auto visible = (column >= static_cast<int32_t>(begin)) & (column < static_cast<int32_t>(end));
      body(j, [&](Vector x, Vector fill) { return visible ? x : fill; });
    };
    int64_t j = first_vector();
    if (j < begin) {
      at_edge(j);
      j += kLanes;
    }
    for (; j + kLanes <= end; j += kLanes) body(j, [](Vector x, Vector) { return x; });
    if (j < end) at_edge(j);
  }
  // The distances of a vector's keys from the query.
  Vector distance(int64_t j) const {
    const Vector ahead = __builtin_convertvector(lane_indices() + static_cast<int32_t>(j - position), Vector);
    return ahead < 0.0f ? -ahead : ahead;
  }
  void zero_masked_vectors(float* row) const {
    for (int64_t j = 0; j < first_vector(); j += kLanes) vec_store(row + j, Vector{});
    for (int64_t j = whole_vectors(end); j < columns; j += kLanes) vec_store(row + j, Vector{});
  }
};

// Rows of scores, forward and backward.

// Turns products q . k into scores, and writes the derivatives of the scores by the products unless dscore is null.
void apply_score_mod(float* s, const ScoreRow& row, const ScoreOptions& options, float* dscore) {
  const float cap = options.softcap;
  for (int64_t j = row.first_vector(); j < row.end; j += kLanes) {
    Vector score = no_contract(vec_load<Vector>(s + j) * options.scale), derivative = Vector{} + options.scale;
    if (cap != 0.0f) {
      const Vector tanh = hyperbolic_tangent(score / cap);
      score = no_contract(tanh * cap);
      derivative *= 1.0f - no_contract(tanh * tanh);
    }
    if (row.slope != 0.0f) score -= no_contract(row.distance(j) * row.slope);
    vec_store(s + j, score);
    if (dscore != nullptr) vec_store(dscore + j, derivative);
  }
}

// Takes ds from the scores to the products, and returns what the row adds to the gradient of its slope.
float score_mod_backward(float* ds, const ScoreRow& row, const float* dscore) {
  Vector sums = {};
  row.for_each_vector([&](int64_t j, auto masked) {
    const Vector gradient = vec_load<Vector>(ds + j);  // 0 where the query does not see
    sums -= gradient * row.distance(j);
    vec_store(ds + j, masked(gradient * vec_load<Vector>(dscore + j), Vector{}));
  });
  return reduce_add(sums);
}

struct SoftmaxStats {
  float max, sum;
};

inline float sink_weight(float sink, float shift) { return sink == -INFINITY ? 0.0f : exponential(sink - shift); }

// Turns scores into exp(scale s - max), with zeros where the query does not see, and returns max and the sum: -inf and
// 0 if it sees nothing but -inf and there is no sink.
SoftmaxStats exponentials_of_row(float* s, const ScoreRow& row, float scale) {
  Vector largest = Vector{} - INFINITY;
  row.for_each_vector(
      [&](int64_t j, auto masked) { largest = vec_max(masked(vec_load<Vector>(s + j), largest), largest); });
  const float max = vec_max(reduce_max(largest) * scale, row.sink);
  const float shift = max == -INFINITY ? 0.0f : max;  // -inf - -inf would be NaN
  Vector sums = {};
  row.for_each_vector([&](int64_t j, auto masked) {
    const Vector e = masked(exponential(no_contract(vec_load<Vector>(s + j) * scale) - shift), Vector{});
    sums += e;
    vec_store(s + j, e);
  });
  row.zero_masked_vectors(s);
  return {max, reduce_add(sums) + sink_weight(row.sink, shift)};
}

// Turns scores into p and their dp into ds, with zeros where the query does not see, and returns delta. That is the sum
// of p dp here and not o . do: p is at hand, and where a query sees one key the two cancel to the last bit. keep holds
// the factors of dropout, or is null.
float softmax_backward_of_row(float* p, float* ds, const ScoreRow& row, float scale, float lse, float dlse,
                              const float* keep) {
  const bool empty = lse == -INFINITY;
  const float shift = empty ? INFINITY : lse;
  Vector totals = {}, sums = {};
  row.for_each_vector([&](int64_t j, auto masked) {
    Vector exponent = no_contract(vec_load<Vector>(p + j) * scale) - shift;
    exponent = exponent > 0.0f ? Vector{} : exponent;  // by a rounding at most; exponential takes none
    const Vector e = masked(exponential(exponent), Vector{});
    vec_store(p + j, e);
    Vector dp = masked(vec_load<Vector>(ds + j), Vector{});
    if (keep != nullptr) dp *= vec_load<Vector>(keep + j);
    vec_store(ds + j, dp);
    totals += e;
    sums += e * dp;
  });
  // The rounding of lse is as large as lse is, but the same for the whole row: dividing p by its sum removes it.
  const float total = reduce_add(totals) + sink_weight(row.sink, shift);
  const float per_total = total == 0.0f ? 0.0f : 1.0f / total;
  const float delta = empty ? 0.0f : reduce_add(sums) * per_total - dlse;  // 0 whatever the dlse of an empty row is
  row.for_each_vector([&](int64_t j, auto masked) {
    const Vector probability = vec_load<Vector>(p + j) * per_total;
    vec_store(ds + j, masked(probability * (vec_load<Vector>(ds + j) - delta) * scale, Vector{}));
    vec_store(p + j, keep == nullptr ? probability : probability * vec_load<Vector>(keep + j));
  });
  row.zero_masked_vectors(p);
  row.zero_masked_vectors(ds);
  return delta;
}

// Writes the factors of dropout for a row of a block's scores: 0 or 1 / (1 - dropout_p).
void draw_dropout(float* keep, const ScoreOptions& options, const Sequence& seq, const QueryBlock& block, int64_t row,
                  const Head& head) {
  const int64_t query = block.first + row;
  for (int64_t j = 0; j < block.columns; j += 4) {  // key_begin is a multiple of 4
    const PhiloxWords words = philox(*options.seed, (block.key_begin + j) / 4, query, head.index, seq.index);
    for (int64_t k = 0; k < 4; ++k)
      keep[j + k] = to_uniform(words.word[k]) >= options.dropout_p ? options.dropout_scale : 0.0f;
  }
}

// What the forward and the backward of a unit share.
struct Unit {
  const VarlenInputs& inputs;
  const ScoreOptions& options;
  const Sequence& seq;
  int64_t kv_head;
  int64_t width;  // of a packed row of head_dim
  int64_t keys;   // of a row of scores
  bool has_score_mod;
  float softmax_scale;  // that the softmax has to apply to scores

  Unit(const VarlenInputs& inputs, const ScoreOptions& options, const Sequence& seq, int64_t kv_head)
      : inputs(inputs),
        options(options),
        seq(seq),
        kv_head(kv_head),
        width(whole_vectors(inputs.head_dim)),
        keys(key_stride(seq.keys)),
        has_score_mod(options.has_score_mod()),
        softmax_scale(has_score_mod ? 1.0f : options.scale) {}

  TokenRange all_keys(const Heads& heads) const { return {heads, kv_head, seq.k_first, seq.keys, inputs.head_dim}; }

  TokenRange queries(const Heads& heads, const Head& head, int64_t first, int64_t count) const {
    return {heads, head.index, seq.q_first + first, count, inputs.head_dim};
  }

  // Where lse and its like hold the value of a query.
  int64_t stat_index(const Head& head, int64_t query) const {
    return head.index * inputs.total_q + seq.q_first + query;
  }

  // Calls body with each query head that shares the key head.
  template <class Body>
  void for_each_head(Body body) const {
    const int64_t group = inputs.heads / inputs.kv_heads;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) body(Head(inputs, options, seq, head));
  }
};

// Forward.

struct ForwardScratch {
  Scratch rows, k_t, v, q, scores, out, keep;

  explicit ForwardScratch(const VarlenInputs& inputs)
      : ForwardScratch(inputs, whole_vectors(inputs.head_dim), key_stride(inputs.max_seqlen)) {}

 private:
  ForwardScratch(const VarlenInputs& inputs, int64_t width, int64_t keys)
      : rows(kLanes, width),
        k_t(inputs.head_dim, keys),
        v(inputs.max_seqlen, width),
        q(kBlock, width),
        scores(kBlock, keys),
        out(kBlock, width),
        keep(1, keys) {}
};

void forward_block(const AttentionParams& params, const Unit& unit, const Head& head, const QueryBlock& block,
                   const ForwardScratch& scratch) {
  const int64_t width = unit.width, keys = unit.keys;
  pack(unit.queries(params.inputs.q, head, block.first, block.rows), scratch.q.row(0), width);
  multiply({scratch.q.row(0), width, 1}, {scratch.k_t.row(0) + block.key_begin, keys}, {scratch.scores.row(0), keys},
           {block.rows, block.columns, params.inputs.head_dim});
  float sums[kBlock];
  for (int64_t i = 0; i < block.rows; ++i) {
    float* const scores = scratch.scores.row(0) + i * keys;
    const ScoreRow row(unit.seq, block, i, head);
    if (unit.has_score_mod) apply_score_mod(scores, row, params.options, nullptr);
    const SoftmaxStats stats = exponentials_of_row(scores, row, unit.softmax_scale);
    if (params.options.seed != nullptr) {
      float* const keep = scratch.keep.row(0);
      draw_dropout(keep, params.options, unit.seq, block, i, head);
      for (int64_t j = 0; j < block.columns; j += kLanes)
        vec_store(scores + j, vec_load<Vector>(scores + j) * vec_load<Vector>(keep + j));
    }
    sums[i] = stats.sum;
    params.lse[unit.stat_index(head, block.first + i)] = stats.max + std::log(stats.sum);
  }
  multiply({scratch.scores.row(0), keys, 1}, {scratch.v.row(block.key_begin), width}, {scratch.out.row(0), width},
           {block.rows, width, block.key_end - block.key_begin});
  for (int64_t i = 0; i < block.rows; ++i) {
    float* const out = scratch.out.row(0) + i * width;
    const float per_sum = sums[i] == 0.0f ? 1.0f : 1.0f / sums[i];
    for (int64_t d = 0; d < width; d += kLanes) vec_store(out + d, vec_load<Vector>(out + d) * per_sum);
  }
  unpack(scratch.out.row(0), width, unit.queries(params.out, head, block.first, block.rows));
}

// Backward.

struct BackwardScratch {
  Scratch rows, k, k_t, v_t, dk, dv;  // all keys of a sequence
  Scratch q, dout, p, ds;             // a chunk of queries
  Scratch dq;                         // a block of queries
  Scratch dscore, keep;               // a row of scores

  explicit BackwardScratch(const VarlenInputs& inputs)
      : BackwardScratch(inputs, whole_vectors(inputs.head_dim), key_stride(inputs.max_seqlen)) {}

 private:
  BackwardScratch(const VarlenInputs& inputs, int64_t width, int64_t keys)
      : rows(kLanes, width),
        k(inputs.max_seqlen, width),
        k_t(inputs.head_dim, keys),
        v_t(inputs.head_dim, keys),
        dk(inputs.max_seqlen, width),
        dv(inputs.max_seqlen, width),
        q(kChunkRows, width),
        dout(kChunkRows, width),
        p(kChunkRows, keys),
        ds(kChunkRows, keys),
        dq(kBlock, width),
        dscore(1, keys),
        keep(1, keys) {}
};

// A chunk of queries [begin, end) of a head. Its scratch holds query begin in row 0.
struct QueryChunk {
  int64_t begin, end;

  QueryChunk(const Sequence& seq, int64_t begin)
      : begin(begin), end(seq.queries - begin < kChunkRows ? seq.queries : begin + kChunkRows) {}
};

// Turns the products of a row, q . k in p and do . v in ds, into p and ds, and stores what the row gives besides.
void backward_row(const AttentionBackwardParams& params, const Unit& unit, const Head& head, const QueryBlock& block,
                  int64_t i, float* p, float* ds, const BackwardScratch& scratch) {
  const ScoreOptions& options = params.options;
  const int64_t index = unit.stat_index(head, block.first + i);
  const ScoreRow row(unit.seq, block, i, head);
  float* const dscore = scratch.dscore.row(0);
  float* const keep = options.seed == nullptr ? nullptr : scratch.keep.row(0);
  if (unit.has_score_mod) apply_score_mod(p, row, options, dscore);
  if (keep != nullptr) draw_dropout(keep, options, unit.seq, block, i, head);
  const float dlse = params.dlse == nullptr ? 0.0f : params.dlse[index];
  const float delta = softmax_backward_of_row(p, ds, row, unit.softmax_scale, params.lse[index], dlse, keep);
  if (params.delta != nullptr) params.delta[index] = delta;
  if (!unit.has_score_mod) return;
  const float dslope = score_mod_backward(ds, row, dscore);
  if (params.dslope != nullptr) params.dslope[index] = dslope;
}

// Fills the block's rows of p and ds, and stores its dq.
void backward_block(const AttentionBackwardParams& params, const Unit& unit, const Head& head, const QueryChunk& chunk,
                    const QueryBlock& block, const BackwardScratch& scratch) {
  const int64_t width = unit.width, keys = unit.keys, row = block.first - chunk.begin;
  const RowMajor<float> p = {scratch.p.row(0) + row * keys + block.key_begin, keys};
  const RowMajor<float> ds = {scratch.ds.row(0) + row * keys + block.key_begin, keys};
  const ProductSize scores = {block.rows, block.columns, params.inputs.head_dim};
  multiply({scratch.q.row(row), width, 1}, {scratch.k_t.row(0) + block.key_begin, keys}, p, scores);
  multiply({scratch.dout.row(row), width, 1}, {scratch.v_t.row(0) + block.key_begin, keys}, ds, scores);
  for (int64_t i = 0; i < block.rows; ++i)
    backward_row(params, unit, head, block, i, p.data + i * keys, ds.data + i * keys, scratch);
  multiply({ds.data, keys, 1}, {scratch.k.row(block.key_begin), width}, {scratch.dq.row(0), width},
           {block.rows, width, block.key_end - block.key_begin});
  unpack(scratch.dq.row(0), width, unit.queries(params.dq, head, block.first, block.rows));
}

// dv += p^T do and dk += ds^T q over a chunk of queries, for each block of keys.
void add_key_gradients(const Unit& unit, const QueryChunk& chunk, const BackwardScratch& scratch) {
  const Sequence& seq = unit.seq;
  const int64_t width = unit.width, keys = unit.keys;
  for (int64_t first = 0; first < seq.keys; first += kBlock) {
    const int64_t rows = seq.keys - first < kBlock ? seq.keys - first : kBlock;
    // Whole blocks of queries: p and ds are written for whole blocks, and hold 0 where a query does not see.
    const int64_t query_begin = seq.query_begin(first) / kBlock * kBlock;
    const int64_t query_end = (seq.query_end(first + rows - 1) + kBlock - 1) / kBlock * kBlock;
    const int64_t begin = query_begin < chunk.begin ? chunk.begin : query_begin;
    const int64_t end = query_end < chunk.end ? query_end : chunk.end;
    if (begin >= end) continue;
    const int64_t row = begin - chunk.begin;
    const Matrix p_t = {scratch.p.row(0) + row * keys + first, 1, keys};
    const Matrix ds_t = {scratch.ds.row(0) + row * keys + first, 1, keys};
    const ProductSize size = {rows, width, end - begin};
    multiply(p_t, {scratch.dout.row(row), width}, {scratch.dv.row(first), width}, size, true);
    multiply(ds_t, {scratch.q.row(row), width}, {scratch.dk.row(first), width}, size, true);
  }
}

void backward_chunk(const AttentionBackwardParams& params, const Unit& unit, const Head& head, const QueryChunk& chunk,
                    const BackwardScratch& scratch) {
  const int64_t count = chunk.end - chunk.begin;
  pack(unit.queries(params.inputs.q, head, chunk.begin, count), scratch.q.row(0), unit.width);
  pack(unit.queries(params.dout, head, chunk.begin, count), scratch.dout.row(0), unit.width);
  for (int64_t first = chunk.begin; first < chunk.end; first += kBlock)
    backward_block(params, unit, head, chunk, QueryBlock(unit.seq, first, chunk.end), scratch);
  add_key_gradients(unit, chunk, scratch);
}

}  // namespace

void attention(const AttentionParams& params, int64_t begin, int64_t end) {
  const ForwardScratch scratch(params.inputs);
  for_each_unit(params.inputs, params.options, begin, end, [&](const Sequence& seq, int64_t kv_head) {
    const Unit unit(params.inputs, params.options, seq, kv_head);
    pack_transposed(unit.all_keys(params.inputs.k), scratch.rows, scratch.k_t.row(0), unit.keys);
    pack(unit.all_keys(params.inputs.v), scratch.v.row(0), unit.width);
    unit.for_each_head([&](const Head& head) {
      for (int64_t first = 0; first < seq.queries; first += kBlock)
        forward_block(params, unit, head, QueryBlock(seq, first, seq.queries), scratch);
    });
  });
}

void attention_backward(const AttentionBackwardParams& params, int64_t begin, int64_t end) {
  const BackwardScratch scratch(params.inputs);
  for_each_unit(params.inputs, params.options, begin, end, [&](const Sequence& seq, int64_t kv_head) {
    const Unit unit(params.inputs, params.options, seq, kv_head);
    pack(unit.all_keys(params.inputs.k), scratch.k.row(0), unit.width);
    pack_transposed(unit.all_keys(params.inputs.k), scratch.rows, scratch.k_t.row(0), unit.keys);
    pack_transposed(unit.all_keys(params.inputs.v), scratch.rows, scratch.v_t.row(0), unit.keys);
    for (int64_t i = 0; i < seq.keys * unit.width; ++i) scratch.dk.row(0)[i] = scratch.dv.row(0)[i] = 0.0f;
    unit.for_each_head([&](const Head& head) {
      for (int64_t first = 0; first < seq.queries; first += kChunkRows)
        backward_chunk(params, unit, head, QueryChunk(seq, first), scratch);
    });
    unpack(scratch.dk.row(0), unit.width, unit.all_keys(params.dk));
    unpack(scratch.dv.row(0), unit.width, unit.all_keys(params.dv));
  });
}

}  // namespace FASTLM_INSTRUCTION_SET

FASTLM_DEFINE_CPU_DISPATCH(attention, (const AttentionParams& params, int64_t begin, int64_t end), (params, begin, end))
FASTLM_DEFINE_CPU_DISPATCH(attention_backward, (const AttentionBackwardParams& params, int64_t begin, int64_t end),
                           (params, begin, end))

}  // namespace fastlm
