// Causal attention of query tiles to the 64-key blocks they share, on a CPU.
//
// One source, compiled once for each set of instructions; vectors are the compiler's own. Keys are
// first packed into panels that the products read in order, whatever their layout in memory. The
// threads are torch's: OpenMP's symbols are those that torch has loaded, so this links to none.

#include "vectors.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

constexpr int BLOCK = 64;   // keys of a block, and queries of a tile
constexpr uint8_t NEEDED = 1, PACKED = 2;
constexpr float LEAST = -1e30f;

inline void narrow(float x, float& out) { out = x; }
inline void narrow(float x, bf16& out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) {
    out.bits = uint16_t((bits >> 16) | 0x40);
    return;
  }
  out.bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(float x, fp16& out) {
  _Float16 half = _Float16(x);
  std::memcpy(&out.bits, &half, 2);
}

// 2^x for x <= 0; less than 2^-125 is 0. Error below 2e-7.
inline vfloat exp2_below(vfloat x) {
  vint tiny = x < -125.0f, n;
  const vfloat p = exp2_of_fraction(whole_part(tiny ? vfloat{} : x, n));
  vfloat out = (vfloat)((vint)p + (n << 23));
  return tiny ? vfloat{} : out;
}

// How a kind of operand lies in panels, and the product of ROWS rows with one of them.
struct Float {
  typedef float element;
  static constexpr int PAIR = 1;
  static void put(float x, element& out) { out = x; }
  template <int N>
  static void product(const element* a, int64_t lda, const element* b, int64_t ldb, int depth,
                      vfloat (&acc)[ROWS][N]) {
    for (int k = 0; k < depth; ++k) {
      vfloat column[N];
      for (int j = 0; j < N; ++j) column[j] = load(b + k * ldb + j * WIDTH);
      for (int i = 0; i < ROWS; ++i) {
        vfloat each = vfloat{} + a[i * lda + k];
        for (int j = 0; j < N; ++j) acc[i][j] += each * column[j];
      }
    }
  }
};

#if defined(__AVX512BF16__)
// Pairs of neighbours along the depth lie side by side, as the instruction takes them.
struct Bfloat {
  typedef bf16 element;
  static constexpr int PAIR = 2;
  static void put(float x, element& out) { narrow(x, out); }
  template <int N>
  static void product(const element* a, int64_t lda, const element* b, int64_t ldb, int depth,
                      vfloat (&acc)[ROWS][N]) {
    for (int k = 0; k < depth; k += 2) {
      __m512bh column[N];
      for (int j = 0; j < N; ++j)
        column[j] = (__m512bh)_mm512_loadu_si512(b + k * ldb + j * WIDTH * 2);
      for (int i = 0; i < ROWS; ++i) {
        int32_t two;
        std::memcpy(&two, a + i * lda + k, 4);
        __m512bh each = (__m512bh)_mm512_set1_epi32(two);
        for (int j = 0; j < N; ++j)
          acc[i][j] = (vfloat)_mm512_dpbf16_ps((__m512)acc[i][j], each, column[j]);
      }
    }
  }
};
#endif

// C[rows, columns] = C * keep + A B, or A B where keep is null; columns are a multiple of WIDTH.
template <class Kind, int N>
inline void panel(const typename Kind::element* a, int64_t lda, const typename Kind::element* b,
                  int64_t ldb, float* c, int64_t ldc, int depth, const float* keep) {
  vfloat acc[ROWS][N];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < N; ++j)
      acc[i][j] = keep ? load(c + i * ldc + j * WIDTH) * keep[i] : vfloat{};
  Kind::template product<N>(a, lda, b, ldb, depth, acc);
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < N; ++j) store(c + i * ldc + j * WIDTH, acc[i][j]);
}

template <class Kind>
void multiply(const typename Kind::element* a, int64_t lda, const typename Kind::element* b,
              int64_t ldb, float* c, int64_t ldc, int rows, int columns, int depth,
              const float* keep) {
  for (int at = 0; at < columns;) {
    int vectors = (columns - at) / WIDTH;
    int taken = vectors >= VECTORS ? VECTORS : 1;
    for (int i = 0; i < rows; i += ROWS) {
      const auto* left = a + i * lda;
      const auto* right = b + at * Kind::PAIR;
      const float* kept = keep ? keep + i : nullptr;
      float* out = c + i * ldc + at;
      if (taken == VECTORS)
        panel<Kind, VECTORS>(left, lda, right, ldb, out, ldc, depth, kept);
      else
        panel<Kind, 1>(left, lda, right, ldb, out, ldc, depth, kept);
    }
    at += taken * WIDTH;
  }
}

}  // namespace

extern "C" {

// Sizes are in elements. A key's place is block_base + token_at[block_token + i] + its head and
// dimension, so that any separable layout of a cache can be read where it lies.
struct Problem {
  const void *q, *k, *v;
  void *out, *panels;
  const int64_t *k_base, *v_base;                    // [blocks]
  const int32_t *block_token, *block_length;         // [blocks]
  const int64_t *k_token_at, *v_token_at;            // [tokens of a page]
  const int64_t *k_dim_at, *v_dim_at;                // [d], [d_v]
  const int64_t *tile_query, *tile_block;            // [tiles]: first packed query, first block
  const int32_t *tile_queries, *tile_position;       // [tiles]: how many, position of the first
  const int64_t* rows;                               // [heads * tiles + 1]
  const int32_t* chosen;                             // ids within the sequence, ascending
  const uint64_t* chosen_by;                         // of each, the places in the tile's own block
                                                     // of the queries that see it; null: all
  uint8_t* needed;                                   // [kv_heads * blocks]: 0, NEEDED or PACKED
  float* shares;                                     // [heads * (share_rows or tiles) * blocks]
  int64_t q_token, q_head, out_token, out_head, k_head, v_head;
  int64_t tiles, blocks, heads, kv_heads, d, d_v;
  int64_t share_rows;   // queries of the tiles, each with shares of its own; 0: each tile's mean
  float scale;
  int32_t dtype;        // 0 float32, 1 bfloat16, 2 float16
  int32_t threads;
  int32_t sample_step;  // every how many queries are looked at for the shares
  int32_t keys_packed;  // whether the panels hold all keys already
};

// Shares of blocks, and what `Selection.keep` keeps of them.
struct Keeping {
  const float* shares;  // [heads * rows, blocks]
  const int64_t* own;   // [rows]: the last block that each can see
  uint8_t* kept;        // [heads * rows, blocks], zeros
  int64_t heads, rows, blocks, first, recent;
  int64_t top;          // how many; 0 where `mass` decides
  float mass;
  int32_t threads;
};

}  // extern "C"

namespace {

inline int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

template <class Kind>
struct Panels {
  typedef typename Kind::element element;
  int64_t depth, wide;
  element* base;
  explicit Panels(const Problem& p)
      : depth((p.d + 1) / 2 * 2), wide(padded(p.d_v)), base(static_cast<element*>(p.panels)) {}
  int64_t size() const { return BLOCK * (depth + wide); }
  element* keys(int64_t at) const { return base + at * size(); }
  element* values(int64_t at) const { return keys(at) + BLOCK * depth; }
  // They are new memory: a page of the usual size each would take as long as filling it.
  void ask_for_large_pages(const Problem& p) const {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = 4096, first = (reinterpret_cast<uintptr_t>(base) + page - 1) / page * page;
    const uintptr_t end = reinterpret_cast<uintptr_t>(keys(p.kv_heads * p.blocks)) / page * page;
    if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
  }
};

template <class Source, class Kind>
void pack_keys(const Problem& p, const Panels<Kind>& panels, int64_t head, int64_t block) {
  typedef typename Kind::element element;
  constexpr int PAIR = Kind::PAIR;
  element* keys = panels.keys(head * p.blocks + block);
  const int64_t length = p.block_length[block], first = p.block_token[block];
  std::memset(static_cast<void*>(keys), 0, BLOCK * panels.depth * sizeof(element));
  const auto* k = static_cast<const Source*>(p.k) + p.k_base[block] + head * p.k_head;
  for (int64_t t = 0; t < length; ++t) {
    const Source* row = k + p.k_token_at[first + t];
    for (int64_t c = 0; c < p.d; ++c)
      Kind::put(widen(row[p.k_dim_at[c]]), keys[(c / PAIR * BLOCK + t) * PAIR + c % PAIR]);
  }
}

inline bool lie_together(const int64_t* at, int64_t count) {
  for (int64_t c = 0; c < count; ++c)
    if (at[c] != c) return false;
  return true;
}

template <class Source, class Kind>
void pack_values(const Problem& p, const Panels<Kind>& panels, int64_t head, int64_t block) {
  typedef typename Kind::element element;
  constexpr int PAIR = Kind::PAIR;
  const bool together = lie_together(p.v_dim_at, p.d_v);
  element* values = panels.values(head * p.blocks + block);
  const int64_t length = p.block_length[block], first = p.block_token[block];
  std::memset(static_cast<void*>(values), 0, BLOCK * panels.wide * sizeof(element));
  const auto* v = static_cast<const Source*>(p.v) + p.v_base[block] + head * p.v_head;
  for (int64_t t = 0; t < length; ++t) {
    const Source* row = v + p.v_token_at[first + t];
    element* line = values + t / PAIR * panels.wide * PAIR + t % PAIR;
    if (together)
      for (int64_t c = 0; c < p.d_v; ++c) Kind::put(widen(row[c]), line[c * PAIR]);
    else
      for (int64_t c = 0; c < p.d_v; ++c) Kind::put(widen(row[p.v_dim_at[c]]), line[c * PAIR]);
  }
}

template <class Source, class Kind>
void copy_query(const Problem& p, int64_t query, int64_t head, typename Kind::element* to) {
  const auto* row = static_cast<const Source*>(p.q) + query * p.q_token + head * p.q_head;
  for (int64_t c = 0; c < p.d; ++c) Kind::put(widen(row[c]), to[c]);
}

inline float highest_of(const float* x, int64_t count, float least) {
  vfloat most = vfloat{} + least;
  for (int64_t j = 0; j < count; j += WIDTH) {
    vfloat next = load(x + j);
    most = most > next ? most : next;
  }
  float highest = least;
  for (int j = 0; j < WIDTH; ++j) highest = most[j] > highest ? most[j] : highest;
  return highest;
}

inline float sum_of(vfloat x) {
  float sum = 0;
  for (int j = 0; j < WIDTH; ++j) sum += x[j];
  return sum;
}

// Scales a row of logits and hides the keys from `limit` on.
inline void scale_and_mask(float* line, float scale, int64_t limit) {
  for (int j = 0; j < BLOCK; j += WIDTH) store(line + j, load(line + j) * scale);
  for (int64_t j = limit < 0 ? 0 : limit; j < BLOCK; ++j) line[j] = MASKED;
}

inline int64_t visible(const Problem& p, int64_t tile, int64_t query, int64_t id) {
  const int64_t limit = p.tile_position[tile] + query + 1 - id * BLOCK;
  const int64_t length = p.block_length[p.tile_block[tile] + id];
  return limit < length ? limit : length;
}

// One row of logits becomes weights; returns what the earlier sums shrink by.
template <class Kind>
inline float soften(float* logits, typename Kind::element* weights, float& top, float& total) {
  const float highest = highest_of(logits, BLOCK, top);
  const vfloat shift = vfloat{} + highest;
  vfloat sum = {};
  for (int j = 0; j < BLOCK; j += WIDTH) {
    vfloat x = exp2_below(load(logits + j) - shift);
    sum += x;
#if defined(__AVX512BF16__)
    if (sizeof(weights[0]) == 2) {
      __m256bh two = _mm512_cvtneps_pbh((__m512)x);
      std::memcpy(weights + j, &two, 32);
      continue;
    }
#endif
    std::memcpy(static_cast<void*>(weights + j), &x, sizeof(x));
  }
  const float keep = highest == top ? 1.0f : exp2_below(vfloat{} + (top - highest))[0];
  total = total * keep + sum_of(sum);
  top = highest;
  return keep;
}

// What a thread holds of a tile.
template <class Kind>
struct Work {
  typedef typename Kind::element element;
  float *logits, *acc, *kept;
  element *q, *weights;
  float top[BLOCK], total[BLOCK], keep[BLOCK];
  Work(const Panels<Kind>& panels, float* scratch)
      : logits(scratch),
        acc(logits + BLOCK * BLOCK),
        kept(acc + BLOCK * panels.wide),
        q(reinterpret_cast<element*>(kept + ROWS * panels.wide)),
        weights(q + BLOCK * panels.depth) {
    std::memset(static_cast<void*>(q), 0, BLOCK * panels.depth * sizeof(element));
    begin(panels);
  }
  void begin(const Panels<Kind>& panels) {
    std::memset(acc, 0, BLOCK * panels.wide * sizeof(float));
    for (int i = 0; i < BLOCK; ++i) top[i] = LEAST, total[i] = 0;
  }
};

// Values that are infinite or no number: a weight of 0 times these is not 0. A block is met with 0
// in their place, and to what a query sees of them they are added.
template <class Kind>
struct Odd {
  typedef typename Kind::element element;
  const int64_t wide;
  element* values;  // of one block
  float* seen;      // [BLOCK, wide], of the tile's queries
  explicit Odd(const Panels<Kind>& panels)
      : wide(panels.wide),
        values(static_cast<element*>(__builtin_malloc(BLOCK * wide * sizeof(element)))),
        seen(static_cast<float*>(__builtin_calloc(BLOCK * wide, sizeof(float)))) {}
  Odd(const Odd&) = delete;
  ~Odd() { __builtin_free(values), __builtin_free(seen); }
  // Takes them out of a block, which the queries of a tile see that have a bit.
  void take_out(const Problem& p, const element* from, int64_t tile, int64_t id, uint64_t bits) {
    std::memcpy(static_cast<void*>(values), from, BLOCK * wide * sizeof(element));
    for (int64_t at = 0; at < BLOCK * wide; ++at) {
      const float x = widen(values[at]);
      if (x - x == 0) continue;
      Kind::put(0, values[at]);
      const int64_t c = at / Kind::PAIR % wide;
      const int64_t t = at / Kind::PAIR / wide * Kind::PAIR + at % Kind::PAIR;
      for (int i = 0; i < p.tile_queries[tile]; ++i)
        if (bits >> i & 1 && t < visible(p, tile, i, id)) seen[i * wide + c] += x;
    }
  }
};

// Rows from `first` on meet one block.
template <class Kind>
void meet(const Problem& p, const Panels<Kind>& panels, Work<Kind>& work, int64_t tile,
          int64_t kv_head, int64_t id, int first, int rows,
          const typename Kind::element* values) {
  const int64_t at = kv_head * p.blocks + p.tile_block[tile] + id;
  const float scale = p.scale * 1.44269504088896f;
  float* logits = work.logits + first * BLOCK;
  auto* weights = work.weights + first * BLOCK;
  multiply<Kind>(work.q + first * panels.depth, panels.depth, panels.keys(at), BLOCK, logits, BLOCK,
                 rows, BLOCK, panels.depth, nullptr);
  for (int i = 0; i < rows; ++i) {
    float* line = logits + i * BLOCK;
    scale_and_mask(line, scale, visible(p, tile, first + i, id));
    work.keep[first + i] =
        soften<Kind>(line, weights + i * BLOCK, work.top[first + i], work.total[first + i]);
  }
  multiply<Kind>(weights, BLOCK, values, panels.wide, work.acc + first * panels.wide,
                 panels.wide, rows, int(panels.wide), BLOCK, work.keep + first);
}

// The rows of a register tile of which only some have chosen a block; the others stay as they are,
// whatever lies in it.
template <class Kind>
void meet_some(const Problem& p, const Panels<Kind>& panels, Work<Kind>& work, int64_t tile,
               int64_t kv_head, int64_t id, int first, unsigned chosen,
               const typename Kind::element* values) {
  float top[ROWS], total[ROWS];
  const int64_t line = panels.wide * sizeof(float);
  for (int i = 0; i < ROWS; ++i) top[i] = work.top[first + i], total[i] = work.total[first + i];
  std::memcpy(work.kept, work.acc + first * panels.wide, ROWS * line);
  meet(p, panels, work, tile, kv_head, id, first, ROWS, values);
  for (int i = 0; i < ROWS; ++i) {
    if (chosen >> i & 1) continue;
    work.top[first + i] = top[i], work.total[first + i] = total[i];
    std::memcpy(work.acc + (first + i) * panels.wide, work.kept + i * panels.wide, line);
  }
}

// A tile meets all of its blocks.
template <class Kind>
void meet_all(const Problem& p, const Panels<Kind>& panels, Work<Kind>& work, int64_t head,
              int64_t tile, Odd<Kind>* odd) {
  const int64_t kv_head = head / (p.heads / p.kv_heads), row = head * p.tiles + tile;
  const int rows = (p.tile_queries[tile] + ROWS - 1) / ROWS * ROWS;
  constexpr unsigned EVERY = (1u << ROWS) - 1;
  for (int64_t at = p.rows[row]; at < p.rows[row + 1]; ++at) {
    const int64_t id = p.chosen[at];
    const uint64_t bits =
        p.chosen_by ? p.chosen_by[at] >> (p.tile_position[tile] % BLOCK) : ~uint64_t(0);
    const auto* values = panels.values(kv_head * p.blocks + p.tile_block[tile] + id);
    if (odd) odd->take_out(p, values, tile, id, bits), values = odd->values;
    if (!p.chosen_by) {
      meet(p, panels, work, tile, kv_head, id, 0, rows, values);
      continue;
    }
    for (int first = 0; first < rows; first += ROWS) {
      const unsigned chosen = unsigned(bits >> first) & EVERY;
      if (chosen == EVERY)
        meet(p, panels, work, tile, kv_head, id, first, ROWS, values);
      else if (chosen)
        meet_some(p, panels, work, tile, kv_head, id, first, chosen, values);
    }
  }
}

// Whether some of count numbers are infinite or none; count is a multiple of WIDTH.
inline bool any_odd(const float* x, int64_t count) {
  vfloat sum = {};
  for (int64_t j = 0; j < count; j += WIDTH) sum += load(x + j) * 0.0f;
  return !(sum_of(sum) == 0);
}

template <class Source, class Kind>
void attend(const Problem& p, const Panels<Kind>& panels, int64_t head, int64_t tile,
            float* scratch) {
  const int queries = p.tile_queries[tile];
  Work<Kind> work(panels, scratch);
  for (int i = 0; i < queries; ++i)
    copy_query<Source, Kind>(p, p.tile_query[tile] + i, head, work.q + i * panels.depth);
  meet_all<Kind>(p, panels, work, head, tile, nullptr);
  if (any_odd(work.acc, queries * panels.wide)) {
    Odd<Kind> odd(panels);
    work.begin(panels);
    meet_all<Kind>(p, panels, work, head, tile, &odd);
    for (int64_t j = 0; j < queries * panels.wide; ++j) work.acc[j] += odd.seen[j];
  }
  auto* out = static_cast<Source*>(p.out) + p.tile_query[tile] * p.out_token + head * p.out_head;
  for (int i = 0; i < queries; ++i) {
    const float share = work.total[i] > 0 ? 1.0f / work.total[i] : 0.0f;
    for (int64_t c = 0; c < p.d_v; ++c)
      narrow(work.acc[i * panels.wide + c] * share, out[i * p.out_token + c]);
  }
}

// How much of a tile's attention falls on each block, as some of its queries see it. Each block is
// summed up relative to its own largest logit, so that the order of the blocks does not matter.
template <class Source, class Kind>
void look(const Problem& p, const Panels<Kind>& panels, int64_t head, int64_t tile,
          float* scratch) {
  typedef typename Kind::element element;
  const int64_t kv_head = head / (p.heads / p.kv_heads), line_size = padded(p.blocks);
  const int queries = p.tile_queries[tile], step = p.sample_step;
  const int before = p.tile_position[tile] % step;  // the last of each step, wherever a chunk begins
  const int samples = (before + queries + step - 1) / step;
  const int rows = (samples + ROWS - 1) / ROWS * ROWS;
  const int64_t blocks = (p.tile_position[tile] + queries - 1) / BLOCK + 1;
  float *logits = scratch, *tops = logits + BLOCK * BLOCK, *sums = tops + BLOCK * line_size;
  element* q = reinterpret_cast<element*>(sums + BLOCK * line_size);
  int at[BLOCK];
  std::memset(static_cast<void*>(q), 0, rows * panels.depth * sizeof(element));
  for (int i = 0; i < samples; ++i) {
    const int end = step * (i + 1) - before;
    at[i] = (end < queries ? end : queries) - 1;
    copy_query<Source, Kind>(p, p.tile_query[tile] + at[i], head, q + i * panels.depth);
    for (int64_t j = 0; j < line_size; ++j)
      tops[i * line_size + j] = MASKED, sums[i * line_size + j] = 0;
  }
  const float scale = p.scale * 1.44269504088896f;
  for (int64_t id = 0; id < blocks; ++id) {
    const auto* keys = panels.keys(kv_head * p.blocks + p.tile_block[tile] + id);
    multiply<Kind>(q, panels.depth, keys, BLOCK, logits, BLOCK, rows, BLOCK, panels.depth, nullptr);
    for (int i = 0; i < samples; ++i) {
      float* line = logits + i * BLOCK;
      const int64_t limit = visible(p, tile, at[i], id);
      if (limit <= 0) continue;
      scale_and_mask(line, scale, limit);
      const float top = highest_of(line, BLOCK, MASKED);
      vfloat sum = {};
      for (int j = 0; j < BLOCK; j += WIDTH) sum += exp2_below(load(line + j) - top);
      tops[i * line_size + id] = top;
      sums[i * line_size + id] = sum_of(sum);
    }
  }
  const bool alone = p.share_rows > 0;
  const int64_t row =
      alone ? head * p.share_rows + p.tile_query[tile] - p.tile_query[0] : head * p.tiles + tile;
  for (int64_t j = 0; j < p.blocks * (alone ? queries : 1); ++j) p.shares[row * p.blocks + j] = 0;
  for (int i = 0; i < samples; ++i) {
    float* shares = p.shares + (row + (alone ? at[i] : 0)) * p.blocks;
    float *line = sums + i * line_size, *tops_here = tops + i * line_size;
    const float highest = highest_of(tops_here, line_size, MASKED);
    vfloat total = {};
    for (int64_t j = 0; j < line_size; j += WIDTH) {
      vfloat x = load(line + j) * exp2_below(load(tops_here + j) - highest);
      total += x;
      store(line + j, x);
    }
    const float part = 1.0f / (sum_of(total) * (alone ? 1 : samples));
    for (int64_t j = 0; j < blocks; ++j) shares[j] += line[j] * part;
  }
}

// The greatest shares first, among equal ones the lower id, after those that are always kept.
void keep_of(const Keeping& p, int64_t row, float* left) {
  const float* shares = p.shares + row * p.blocks;
  uint8_t* kept = p.kept + row * p.blocks;
  const int64_t own = p.own[row % p.rows];
  const int64_t visible = own + 1 < p.blocks ? own + 1 : p.blocks, size = padded(visible);
  double held = 0;
  int64_t count = 0;
  for (int64_t id = 0; id < size; ++id) {
    left[id] = id < visible ? shares[id] : -1.0f;
    if (id >= visible || (id >= p.first && id <= own - p.recent)) continue;
    kept[id] = 1, left[id] = -1.0f;
    held += shares[id], ++count;
  }
  for (; p.top ? count < p.top : float(held) < p.mass; ++count) {
    const float most = highest_of(left, size, -1.0f);
    int64_t id = 0;
    while (id < size && left[id] != most) ++id;
    if (most < 0 || id == size) return;  // none is left, or what is left is no number
    kept[id] = 1, left[id] = -1.0f;
    held += most;
  }
}

template <class Kind>
int64_t scratch_bytes(const Problem& p, const Panels<Kind>& panels) {
  const int64_t element = sizeof(typename Kind::element);
  const int64_t attending =
      (BLOCK + ROWS) * panels.wide * 4 + BLOCK * (panels.depth + BLOCK) * element;
  const int64_t looking = 2 * BLOCK * padded(p.blocks) * 4 + BLOCK * panels.depth * element;
  return BLOCK * BLOCK * 4 + (attending > looking ? attending : looking);
}

template <class Source, class Kind>
void estimate(const Problem& p) {
  const Panels<Kind> panels(p);
  if (!p.keys_packed) panels.ask_for_large_pages(p);
#pragma omp parallel num_threads(p.threads)
  {
    float* own = static_cast<float*>(__builtin_malloc(scratch_bytes(p, panels)));
#pragma omp for schedule(dynamic, 4)
    for (int64_t at = 0; at < p.kv_heads * p.blocks; ++at)
      if (!p.keys_packed) pack_keys<Source, Kind>(p, panels, at / p.blocks, at % p.blocks);
#pragma omp for schedule(dynamic, 4)
    for (int64_t at = 0; at < p.heads * p.tiles; ++at)
      look<Source, Kind>(p, panels, at % p.heads, p.tiles - 1 - at / p.heads, own);
    __builtin_free(own);
  }
}

template <class Source, class Kind>
void run(const Problem& p) {
  const Panels<Kind> panels(p);
  if (!p.keys_packed) panels.ask_for_large_pages(p);
  const int64_t group_rows = p.heads / p.kv_heads * p.tiles;
  for (int64_t row = 0; row < p.heads * p.tiles; ++row)
    for (int64_t at = p.rows[row]; at < p.rows[row + 1]; ++at) {
      const int64_t block = p.tile_block[row % p.tiles] + p.chosen[at];
      uint8_t& state = p.needed[row / group_rows * p.blocks + block];
      if (state != PACKED) state = NEEDED;
    }
#pragma omp parallel num_threads(p.threads)
  {
    float* own = static_cast<float*>(__builtin_malloc(scratch_bytes(p, panels)));
#pragma omp for schedule(dynamic, 4)
    for (int64_t at = 0; at < p.kv_heads * p.blocks; ++at) {
      if (p.needed[at] != NEEDED) continue;
      p.needed[at] = PACKED;
      if (!p.keys_packed) pack_keys<Source, Kind>(p, panels, at / p.blocks, at % p.blocks);
      pack_values<Source, Kind>(p, panels, at / p.blocks, at % p.blocks);
    }
    // The last tiles of a sequence have the most keys: they come first.
#pragma omp for schedule(dynamic, 1)
    for (int64_t at = 0; at < p.heads * p.tiles; ++at)
      attend<Source, Kind>(p, panels, at % p.heads, p.tiles - 1 - at / p.heads, own);
    __builtin_free(own);
  }
}

}  // namespace

extern "C" {

// Callers compare it with their own: code built from an older source must not be called.
__attribute__((visibility("default"))) int trimtab_problem_bytes() { return sizeof(Problem); }

__attribute__((visibility("default"))) int trimtab_keeping_bytes() { return sizeof(Keeping); }

// Bytes of one packed element.
__attribute__((visibility("default"))) int trimtab_element_bytes(int dtype) {
#if defined(__AVX512BF16__)
  return dtype == 1 ? 2 : 4;
#else
  (void)dtype;
  return 4;
#endif
}

__attribute__((visibility("default"))) void trimtab_block_shares(const Problem* p) {
  if (p->dtype == 0) return estimate<float, Float>(*p);
  if (p->dtype == 2) return estimate<fp16, Float>(*p);
#if defined(__AVX512BF16__)
  estimate<bf16, Bfloat>(*p);
#else
  estimate<bf16, Float>(*p);
#endif
}

__attribute__((visibility("default"))) void trimtab_block_sparse(const Problem* p) {
  if (p->dtype == 0) return run<float, Float>(*p);
  if (p->dtype == 2) return run<fp16, Float>(*p);
#if defined(__AVX512BF16__)
  run<bf16, Bfloat>(*p);
#else
  run<bf16, Float>(*p);
#endif
}

__attribute__((visibility("default"))) void trimtab_keep_blocks(const Keeping* p) {
#pragma omp parallel num_threads(p->threads)
  {
    float* left = static_cast<float*>(__builtin_malloc(padded(p->blocks) * sizeof(float)));
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p->heads * p->rows; ++row) keep_of(*p, row, left);
    __builtin_free(left);
  }
}

}  // extern "C"
