// Attention over packed documents on a CPU, forward and backward. All arithmetic is float32.
#include "attention.h"
#include "instruction_sets.h"
#include "rows.h"

#include <cmath>

#define UNROLLED _Pragma("GCC unroll 16")  // a loop over an array of vectors would keep it in memory

namespace fastlm {
namespace FASTLM_INSTRUCTION_SET {
namespace {

constexpr int64_t kTileRows = 4;
constexpr int64_t kTileVectors = VECTOR_BYTES == 64 ? 4 : 2;  // so that a tile's sums stay in registers
constexpr int64_t kPanelRows = 64;  // of the right factor that are in use at a time
constexpr int64_t kBlock = 16;  // rows whose scores are formed together, as far as any of them sees
constexpr int64_t kBackwardRows = 8 * kBlock;  // whose scores are kept until keys and values have their share of them

inline int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Of rows of a multiple of 1 KiB the same column falls into few sets of a cache: a vector more spreads them.
inline int64_t row_of_keys(int64_t n) {
  n = whole_vectors(n);
  return n % 256 == 0 ? n + kLanes : n;
}

// A matrix by the steps from row to row and from column to column; one of both is 1.
struct Matrix {
  const float* data;
  int64_t row, column;
};

// c = or += a b, of so many rows and vectors of columns.
template <int64_t kRows, int64_t kVectors>
inline __attribute__((always_inline)) void multiply_tile(Matrix a, int64_t depth, const float* b, int64_t b_row,
                                                        float* c, int64_t c_row, bool add) {
  Vector sums[kRows][kVectors];
#define OVER_TILE UNROLLED for (int64_t r = 0; r < kRows; ++r) UNROLLED for (int64_t v = 0; v < kVectors; ++v)
  OVER_TILE sums[r][v] = Vector{};
  for (int64_t d = 0; d < depth; ++d) {
    Vector row[kVectors];
    UNROLLED for (int64_t v = 0; v < kVectors; ++v) row[v] = bits_of<Vector>(b + d * b_row + v * kLanes);
    OVER_TILE sums[r][v] += row[v] * a.data[r * a.row + d * a.column];
  }
  if (add) OVER_TILE sums[r][v] += bits_of<Vector>(c + r * c_row + v * kLanes);
  OVER_TILE put(c + r * c_row + v * kLanes, sums[r][v]);
#undef OVER_TILE
}

// The same of any number of rows: the part of b is read once from afar, then for every tile from the nearest cache.
template <int64_t kVectors>
inline void multiply_panel(Matrix a, int64_t rows, int64_t depth, const float* b, int64_t b_row, float* c,
                           int64_t c_row, bool add) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows)
    multiply_tile<kTileRows, kVectors>({a.data + r * a.row, a.row, a.column}, depth, b, b_row, c + r * c_row, c_row,
                                       add);
  for (; r < rows; ++r)
    multiply_tile<1, kVectors>({a.data + r * a.row, a.row, a.column}, depth, b, b_row, c + r * c_row, c_row, add);
}

// c (rows, columns) = or += a (rows, depth) b (depth, columns); columns are whole vectors.
void multiply(Matrix a, int64_t rows, int64_t columns, int64_t depth, const float* b, int64_t b_row, float* c,
              int64_t c_row, bool add) {
  int64_t first = 0;
  do {
    const int64_t part = depth - first < kPanelRows ? depth - first : kPanelRows;
    int64_t i = 0;
    for (; i + kTileVectors * kLanes <= columns; i += kTileVectors * kLanes)
      multiply_panel<kTileVectors>(a, rows, part, b + i, b_row, c + i, c_row, add);
    for (; i < columns; i += kLanes) multiply_panel<1>(a, rows, part, b + i, b_row, c + i, c_row, add);
    a.data += part * a.column;
    b += part * b_row;
    first += part;
    add = true;
  } while (first < depth);
}

// A call of memcpy costs more than so few elements.
inline void copy(const float* source, int64_t n, float* target) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) put(target + i, bits_of<Vector>(source + i));
  for (; i < n; ++i) target[i] = source[i];
}

// Tokens [first, first + n) of a head: a matrix of floats, with zeros behind the features up to a whole vector.
void gather(const Heads& heads, int64_t head, int64_t first, int64_t n, int64_t features, float* target, int64_t stride) {
  for (int64_t i = 0; i < n; ++i) {
    float* row = target + i * stride;
    const float* source = read(heads.rows, first + i, head * heads.head, features, row);
    if (source != row) copy(source, features, row);
    for (int64_t d = features; d < stride; ++d) row[d] = 0.0f;
  }
}

// The lower halves of two vectors, or the upper, lane by lane in turn.
template <int kUpper>
struct Dealt {
  static constexpr int of(int lane) { return (kUpper * kLanes + lane) / 2 + lane % 2 * kLanes; }
};

// What gather gives, rows and columns exchanged: a square of vectors at a time. Each step deals the rows of the first half and of
// the second into one another, until the lanes of each row are a column.
void gather_columns(const Heads& heads, int64_t head, int64_t first, int64_t n, int64_t features, const Scratch& tokens,
                    float* target, int64_t stride) {
  const int64_t width = whole_vectors(features);
  for (int64_t i = 0; i < stride; i += kLanes) {
    const int64_t left = n - i < 0 ? 0 : n - i < kLanes ? n - i : kLanes;
    gather(heads, head, first + i, left, features, tokens.row(0), width);
    for (int64_t d = 0; d < features; d += kLanes) {
      Vector rows[kLanes], dealt[kLanes];
      UNROLLED for (int64_t r = 0; r < kLanes; ++r)
        rows[r] = r < left ? bits_of<Vector>(tokens.row(r) + d) : Vector{};
      UNROLLED for (int64_t step = 1; step < kLanes; step *= 2) {
        UNROLLED for (int64_t r = 0; r < kLanes / 2; ++r) {
          dealt[2 * r] = shuffled<Dealt<0>>(rows[r], rows[r + kLanes / 2]);
          dealt[2 * r + 1] = shuffled<Dealt<1>>(rows[r], rows[r + kLanes / 2]);
        }
        UNROLLED for (int64_t r = 0; r < kLanes; ++r) rows[r] = dealt[r];
      }
      UNROLLED for (int64_t r = 0; r < kLanes; ++r)
        if (d + r < features) put(target + (d + r) * stride + i, rows[r]);
    }
  }
}

void scatter(const Heads& heads, int64_t head, int64_t first, int64_t n, int64_t features, const float* source,
             int64_t stride) {
  for (int64_t i = 0; i < n; ++i) {
    float* row = place(heads.rows, first + i, head * heads.head, nullptr);
    if (row != nullptr) {
      copy(source + i * stride, features, row);
    } else {
      finish(heads.rows, first + i, head * heads.head, features, source + i * stride);
    }
  }
}

// One document: where it lies, and who sees whom in it.
struct Document {
  int64_t index, q_first, queries, k_first, keys;
  int64_t before, after;

  int64_t position(int64_t query) const { return query + keys - queries; }
  // A query sees the keys [begin, end).
  int64_t begin(int64_t query) const {
    return before < 0 || position(query) < before ? 0 : position(query) - before;
  }
  int64_t end(int64_t query) const { return after < 0 ? keys : clamped(position(query) + after + 1, keys); }
  // A key is seen by the queries [first_seer, end_seer).
  int64_t first_seer(int64_t key) const { return after < 0 ? 0 : clamped(key - position(0) - after, queries); }
  int64_t end_seer(int64_t key) const {
    return before < 0 ? queries : clamped(key - position(0) + before + 1, queries);
  }

 private:
  static int64_t clamped(int64_t x, int64_t most) { return x < 0 ? 0 : x < most ? x : most; }
};

// Calls body with the document and key head of each unit that is not left out.
template <class Body>
void over_units(const Documents& call, const Scoring& scoring, int64_t begin, int64_t end, Body body) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t i = unit / call.key_heads;
    const Document document = {i,
                               call.q_bounds[i],
                               call.q_bounds[i + 1] - call.q_bounds[i],
                               call.k_bounds[i],
                               call.k_bounds[i + 1] - call.k_bounds[i],
                               scoring.before,
                               scoring.after};
    if (document.queries <= call.longest && document.keys <= call.longest) body(document, unit % call.key_heads);
  }
}

// The columns of a block of rows: from a multiple of kBlock up to where the last row sees, and how many are written, as
// many whole blocks as the keys have.
struct Columns {
  int64_t from, to, count;

  Columns(const Document& document, int64_t first, int64_t rows)
      : from(document.begin(first) / kBlock * kBlock), to(document.end(first + rows - 1)) {
    const int64_t blocks = (to - from + kBlock - 1) / kBlock * kBlock, rest = whole_vectors(document.keys) - from;
    count = blocks < rest ? blocks : rest;
  }
};

// A row of a block, and the columns [begin, end) of it that its query sees.
struct Row {
  int64_t begin, end, columns;
  int64_t position;  // the query's own
  float slope;

  Row(const Document& document, const Columns& of_block, int64_t query, float slope)
      : begin(document.begin(query) - of_block.from),
        end(document.end(query) - of_block.from),
        columns(of_block.count),
        position(document.position(query) - of_block.from),
        slope(slope) {}

  int64_t first() const { return begin / kLanes * kLanes; }
  // Calls body(j, seen) with the column of each vector; seen(x, fill) is fill where the query does not see, which only
  // the first and the last vector can have.
  template <class Body>
  void over_vectors(Body body) const {
    const auto at_edge = [&](int64_t j) {
      const IntegerVector lanes = lane_numbers() + static_cast<int32_t>(j);
      const auto visible = (lanes >= static_cast<int32_t>(begin)) & (lanes < static_cast<int32_t>(end));
      body(j, [&](Vector x, Vector fill) { return visible ? x : fill; });
    };
    int64_t j = first();
    if (j < begin) {
      at_edge(j);
      j += kLanes;
    }
    for (; j + kLanes <= end; j += kLanes) body(j, [](Vector x, Vector) { return x; });
    if (j < end) at_edge(j);
  }
  // How far the key of each lane lies from the query.
  Vector distance(int64_t j) const {
    const Vector ahead = __builtin_convertvector(lane_numbers() + static_cast<int32_t>(j - position), Vector);
    return ahead < 0.0f ? -ahead : ahead;
  }
  void clear_unseen(float* row) const {
    for (int64_t j = 0; j < first(); j += kLanes) put(row + j, Vector{});
    for (int64_t j = whole_vectors(end); j < columns; j += kLanes) put(row + j, Vector{});
  }

 private:
  static IntegerVector lane_numbers() {
    IntegerVector lanes;
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
    return lanes;
  }
};

// Turns products into scores, and writes the derivatives of these by the products where asked.
void scores_of_row(float* s, const Row& row, const Scoring& scoring, float* derivatives) {
  const float cap = scoring.softcap;
  for (int64_t j = row.first(); j < row.end; j += kLanes) {
    Vector score = rounded(bits_of<Vector>(s + j) * scoring.scale), derivative = Vector{} + scoring.scale;
    if (cap != 0.0f) {
      const Vector tanh = hyperbolic_tangent(score / cap);
      score = rounded(tanh * cap);
      derivative *= 1.0f - rounded(tanh * tanh);
    }
    if (row.slope != 0.0f) score -= rounded(row.distance(j) * row.slope);
    put(s + j, score);
    if (derivatives != nullptr) put(derivatives + j, derivative);
  }
}

// Turns scores into exp(scale s - max), with zeros where the query does not see, and gives (max, sum): (-inf, 0) if it
// sees nothing but -inf and there is no sink.
struct RowSums {
  float max, sum;
};

inline float weight_of_sink(float sink, float shift) { return sink == -INFINITY ? 0.0f : exponential(sink - shift); }

RowSums exponentials_of_row(float* s, const Row& row, float scale, float sink) {
  Vector largest = Vector{} - INFINITY;
  row.over_vectors([&](int64_t j, auto seen) { largest = larger(seen(bits_of<Vector>(s + j), largest), largest); });
  const float max = larger(largest_of_lanes(largest) * scale, sink);
  const float shift = max == -INFINITY ? 0.0f : max;  // -inf - -inf would be NaN
  Vector sums = {};
  row.over_vectors([&](int64_t j, auto seen) {
    const Vector e = seen(exponential(rounded(bits_of<Vector>(s + j) * scale) - shift), Vector{});
    sums += e;
    put(s + j, e);
  });
  row.clear_unseen(s);
  return {max, sum_of_lanes(sums) + weight_of_sink(sink, shift)};
}

// Turns scores into p and their dp into ds, with zeros where the query does not see, and gives delta. That is the sum
// of p dp here, not o . do: p is at hand, and where a query sees one key the two cancel to the last bit.
float gradients_of_row(float* p, float* ds, const Row& row, float scale, float sink, float lse, float dlse,
                       const float* kept) {
  const bool empty = lse == -INFINITY;
  const float shift = empty ? INFINITY : lse;
  Vector totals = {}, sums = {};
  row.over_vectors([&](int64_t j, auto seen) {
    Vector exponent = rounded(bits_of<Vector>(p + j) * scale) - shift;
    exponent = exponent > 0.0f ? Vector{} : exponent;  // by a rounding at most; exponential takes none
    const Vector e = seen(exponential(exponent), Vector{});
    put(p + j, e);
    Vector dp = seen(bits_of<Vector>(ds + j), Vector{});
    if (kept != nullptr) dp *= bits_of<Vector>(kept + j);
    put(ds + j, dp);
    totals += e;
    sums += e * dp;
  });
  // The rounding of lse is as large as lse is, but common to the row: divided by their sum the p are free of it.
  const float total = sum_of_lanes(totals) + weight_of_sink(sink, shift);
  const float per_total = total == 0.0f ? 0.0f : 1.0f / total;
  const float delta = empty ? 0.0f : sum_of_lanes(sums) * per_total - dlse;  // whatever came back for an empty row
  row.over_vectors([&](int64_t j, auto seen) {
    const Vector probability = bits_of<Vector>(p + j) * per_total;
    put(ds + j, seen(probability * (bits_of<Vector>(ds + j) - delta) * scale, Vector{}));
    put(p + j, kept == nullptr ? probability : probability * bits_of<Vector>(kept + j));
  });
  row.clear_unseen(p);
  row.clear_unseen(ds);
  return delta;
}

// Takes ds from the scores to the products, and gives the row's share in the gradient of its slope.
float gradients_of_products(float* ds, const Row& row, const float* derivatives) {
  Vector sums = {};
  row.over_vectors([&](int64_t j, auto seen) {
    const Vector gradient = bits_of<Vector>(ds + j);  // 0 where the query does not see
    sums -= gradient * row.distance(j);
    put(ds + j, seen(gradient * bits_of<Vector>(derivatives + j), Vector{}));
  });
  return sum_of_lanes(sums);
}

// Philox-4x32 of 7 rounds, bit for bit that of fastlm/ops/_dropout.py: four words for each counter.
struct Words {
  uint32_t word[4];
};

inline Words philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
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

// What dropout leaves of a query's weights [from, from + columns), from a multiple of 4: 0 or 1 / (1 - p) of each.
void kept_of_row(float* kept, int64_t from, int64_t columns, const Scoring& scoring, int64_t query, int64_t head,
                 int64_t document) {
  for (int64_t j = 0; j < columns; j += 4) {
    const Words words = philox(*scoring.seed, (from + j) / 4, query, head, document);
    for (int64_t k = 0; k < 4; ++k)
      kept[j + k] = static_cast<float>(words.word[k] >> 8) * 0x1p-24f >= scoring.dropout_p ? scoring.kept_factor : 0.0f;
  }
}

}  // namespace

void attention(const Attention& forward, int64_t begin, int64_t end) {
  const Documents& call = forward.given;
  const Scoring& scoring = forward.scoring;
  const bool alters = scoring.alters();
  const int64_t D = call.features, width = whole_vectors(D), longest = row_of_keys(call.longest);
  const int64_t group = call.heads / call.key_heads;
  const Scratch tokens(kLanes, width), k_t(D, longest), v(call.longest, width), q(kBlock, width), s(kBlock, longest),
      out(kBlock, width), kept(1, longest);
  over_units(call, scoring, begin, end, [&](const Document& document, int64_t key_head) {
    const int64_t keys = row_of_keys(document.keys);
    gather_columns(call.k, key_head, document.k_first, document.keys, D, tokens, k_t.row(0), keys);
    gather(call.v, key_head, document.k_first, document.keys, D, v.row(0), width);
    for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
      const float slope = scoring.slopes == nullptr ? 0.0f : scoring.slopes[document.index * call.heads + head];
      const float sink = scoring.sinks == nullptr ? -INFINITY : scoring.sinks[head];
      for (int64_t first = 0; first < document.queries; first += kBlock) {
        const int64_t rows = document.queries - first < kBlock ? document.queries - first : kBlock;
        const Columns columns(document, first, rows);
        gather(call.q, head, document.q_first + first, rows, D, q.row(0), width);
        multiply({q.row(0), width, 1}, rows, columns.count, D, k_t.row(0) + columns.from, keys, s.row(0), keys, false);
        float sums[kBlock];
        for (int64_t i = 0; i < rows; ++i) {
          float* const scores = s.row(0) + i * keys;
          const Row row(document, columns, first + i, slope);
          if (alters) scores_of_row(scores, row, scoring, nullptr);
          const RowSums of_row = exponentials_of_row(scores, row, alters ? 1.0f : scoring.scale, sink);
          if (scoring.seed != nullptr) {
            kept_of_row(kept.row(0), columns.from, columns.count, scoring, first + i, head, document.index);
            for (int64_t j = 0; j < columns.count; j += kLanes)
              put(scores + j, bits_of<Vector>(scores + j) * bits_of<Vector>(kept.row(0) + j));
          }
          sums[i] = of_row.sum;
          forward.lse[head * call.total + document.q_first + first + i] = of_row.max + std::log(of_row.sum);
        }
        multiply({s.row(0), keys, 1}, rows, width, columns.to - columns.from, v.row(columns.from), width, out.row(0),
                 width, false);
        for (int64_t i = 0; i < rows; ++i) {
          float* row = out.row(0) + i * width;
          const float per_sum = sums[i] == 0.0f ? 1.0f : 1.0f / sums[i];
          for (int64_t d = 0; d < width; d += kLanes) put(row + d, bits_of<Vector>(row + d) * per_sum);
        }
        scatter(forward.out, head, document.q_first + first, rows, D, out.row(0), width);
      }
    }
  });
}

void attention_backward(const AttentionBackward& backward, int64_t begin, int64_t end) {
  const Documents& call = backward.given;
  const Scoring& scoring = backward.scoring;
  const bool alters = scoring.alters();
  const int64_t D = call.features, width = whole_vectors(D), longest = row_of_keys(call.longest);
  const int64_t group = call.heads / call.key_heads;
  const Scratch tokens(kLanes, width), k_t(D, longest), v_t(D, longest), k(call.longest, width),
      dk(call.longest, width), dv(call.longest, width), q(kBackwardRows, width), dout(kBackwardRows, width),
      p(kBackwardRows, longest), ds(kBackwardRows, longest), dq(kBlock, width), derivatives(1, longest),
      kept(1, longest);
  over_units(call, scoring, begin, end, [&](const Document& document, int64_t key_head) {
    const int64_t keys = row_of_keys(document.keys);
    gather(call.k, key_head, document.k_first, document.keys, D, k.row(0), width);
    gather_columns(call.k, key_head, document.k_first, document.keys, D, tokens, k_t.row(0), keys);
    gather_columns(call.v, key_head, document.k_first, document.keys, D, tokens, v_t.row(0), keys);
    for (int64_t i = 0; i < document.keys * width; ++i) dk.row(0)[i] = dv.row(0)[i] = 0.0f;
    for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
      const float slope = scoring.slopes == nullptr ? 0.0f : scoring.slopes[document.index * call.heads + head];
      const float sink = scoring.sinks == nullptr ? -INFINITY : scoring.sinks[head];
      for (int64_t start = 0; start < document.queries; start += kBackwardRows) {
        const int64_t stop = document.queries - start < kBackwardRows ? document.queries : start + kBackwardRows;
        gather(call.q, head, document.q_first + start, stop - start, D, q.row(0), width);
        gather(backward.dout, head, document.q_first + start, stop - start, D, dout.row(0), width);
        for (int64_t first = start; first < stop; first += kBlock) {
          const int64_t rows = stop - first < kBlock ? stop - first : kBlock;
          const Columns columns(document, first, rows);
          const float *const q_rows = q.row(first - start), *const dout_rows = dout.row(first - start);
          float* const p_rows = p.row(0) + (first - start) * keys + columns.from;
          float* const ds_rows = ds.row(0) + (first - start) * keys + columns.from;
          multiply({q_rows, width, 1}, rows, columns.count, D, k_t.row(0) + columns.from, keys, p_rows, keys, false);
          multiply({dout_rows, width, 1}, rows, columns.count, D, v_t.row(0) + columns.from, keys, ds_rows, keys,
                   false);
          for (int64_t i = 0; i < rows; ++i) {
            float *const p_row = p_rows + i * keys, *const ds_row = ds_rows + i * keys;
            const int64_t place = head * call.total + document.q_first + first + i;
            const Row row(document, columns, first + i, slope);
            if (alters) scores_of_row(p_row, row, scoring, derivatives.row(0));
            if (scoring.seed != nullptr)
              kept_of_row(kept.row(0), columns.from, columns.count, scoring, first + i, head, document.index);
            const float delta = gradients_of_row(p_row, ds_row, row, alters ? 1.0f : scoring.scale, sink,
                                                 backward.lse[place],
                                                 backward.dlse == nullptr ? 0.0f : backward.dlse[place],
                                                 scoring.seed == nullptr ? nullptr : kept.row(0));
            if (backward.delta != nullptr) backward.delta[place] = delta;
            if (!alters) continue;
            const float share = gradients_of_products(ds_row, row, derivatives.row(0));
            if (backward.shares != nullptr) backward.shares[place] = share;
          }
          multiply({ds_rows, keys, 1}, rows, width, columns.to - columns.from, k.row(columns.from), width, dq.row(0),
                   width, false);
          scatter(backward.dq, head, document.q_first + first, rows, D, dq.row(0), width);
        }
        // A block of keys takes whole blocks of queries: only these have written its columns.
        for (int64_t first = 0; first < document.keys; first += kBlock) {
          const int64_t columns = document.keys - first < kBlock ? document.keys - first : kBlock;
          const int64_t first_seer = document.first_seer(first) / kBlock * kBlock;
          const int64_t end_seer = (document.end_seer(first + columns - 1) + kBlock - 1) / kBlock * kBlock;
          const int64_t from = first_seer < start ? start : first_seer, to = end_seer < stop ? end_seer : stop;
          if (from >= to) continue;
          const int64_t corner = (from - start) * keys + first;
          const Matrix p_t = {p.row(0) + corner, 1, keys}, ds_t = {ds.row(0) + corner, 1, keys};
          multiply(p_t, columns, width, to - from, dout.row(from - start), width, dv.row(first), width, true);
          multiply(ds_t, columns, width, to - from, q.row(from - start), width, dk.row(first), width, true);
        }
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
