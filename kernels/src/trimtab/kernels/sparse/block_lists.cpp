// Lists of blocks on a CPU: what queries choose by their attention to compressed keys, and those
// lists turned into lists of queries.
//
// One source, compiled once for each set of instructions; vectors are the compiler's own. A choice
// is made in tiles of queries, whose scores are gone with the tile. The threads are torch's: OpenMP's
// symbols are those that torch has loaded, so this links to none.

#include "vectors.hpp"

namespace {

constexpr int TILE = 16;     // queries of a tile
constexpr int COLUMNS = 64;  // entries of a panel

// 2^x for x <= 0, down to the smallest numbers there are: far blocks still have an order.
inline vfloat exp2_below(vfloat x) {
  vint tiny = x < -150.0f, n;
  const vfloat p = exp2_of_fraction(whole_part(tiny ? vfloat{} : x, n));
  const vint half = n >> 1;
  vfloat out = p * (vfloat)((half + 127) << 23) * (vfloat)((n - half + 127) << 23);
  return tiny ? vfloat{} : out;
}

}  // namespace

extern "C" {

// Sizes and strides are in elements.
struct Selection {
  const void *q, *entries;
  int32_t* out;                                       // [kv_heads, queries, top], -1 is none
  float* panels;                                      // [kv_heads * panel_count * d * 64]
  const int64_t *panel_first;                         // [panel_count]: first packed entry
  const int64_t *panel_length;                        // [panel_count]
  const int64_t *tile_query, *tile_panel;             // [tiles]: first packed query, first panel
  const int64_t *tile_queries, *tile_position;        // [tiles]: how many, position of the first
  const int64_t* tile_entries;                        // [tiles]: entries of the sequence
  const float* weights;                               // [taps]
  int64_t q_token, q_head, entry_token, entry_head;
  int64_t tiles, panel_count, longest;                // most entries of a sequence, in whole panels
  int64_t queries, heads, kv_heads, d;
  int64_t window, stride, per_block, reach, taps, block, top, first, recent;
  float scale;
  int32_t dtype;                                      // 0 float32, 1 bfloat16, 2 float16
  int32_t threads;
};

struct Numbering {
  const void* ids;                                    // [kv_heads, queries, top], any order
  int32_t* out;                                       // [kv_heads, queries, top], -1 is none
  const int64_t *own, *before;                        // [queries]: last id, what is added to ids
  int64_t ids_head, ids_query;
  int64_t kv_heads, queries, top;
  int32_t long_ids;                                   // whether ids are int64, else int32
  int32_t threads;
};

struct Inversion {
  const int32_t* ids;                                 // [kv_heads, queries, top]; none outside blocks
  int64_t* rows;                                      // [kv_heads * blocks + 1]
  int32_t* query;                                     // [kv_heads * queries * top]
  void* place;                                        // [kv_heads, queries, top]
  int64_t* counts;                                    // [kv_heads * chunks * blocks], zeros
  int64_t ids_head, ids_query;
  int64_t kv_heads, queries, top, blocks, chunks;
  int32_t long_place;                                 // whether places are int64, else int32
  int32_t threads;
};

}  // extern "C"

namespace {

template <class Source>
void pack(const Selection& p, int64_t head, int64_t panel) {
  float* to = p.panels + (head * p.panel_count + panel) * p.d * COLUMNS;
  std::memset(to, 0, p.d * COLUMNS * sizeof(float));
  const auto* from = static_cast<const Source*>(p.entries) + head * p.entry_head;
  for (int64_t i = 0; i < p.panel_length[panel]; ++i) {
    const Source* row = from + (p.panel_first[panel] + i) * p.entry_token;
    for (int64_t c = 0; c < p.d; ++c) to[c * COLUMNS + i] = widen(row[c]);
  }
}

// Every product is summed up in the same order, whatever its place: equal entries score alike.
void multiply(const float* q, const float* panel, int64_t depth, float* out, int64_t line) {
  for (int column = 0; column < COLUMNS; column += VECTORS * WIDTH)
    for (int row = 0; row < TILE; row += ROWS) {
      vfloat acc[ROWS][VECTORS] = {};
      for (int64_t c = 0; c < depth; ++c) {
        vfloat keys[VECTORS];
        for (int j = 0; j < VECTORS; ++j) keys[j] = load(panel + c * COLUMNS + column + j * WIDTH);
        for (int i = 0; i < ROWS; ++i) {
          vfloat each = vfloat{} + q[(row + i) * depth + c];
          for (int j = 0; j < VECTORS; ++j) acc[i][j] += each * keys[j];
        }
      }
      for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < VECTORS; ++j)
          store(out + (row + i) * line + column + j * WIDTH, acc[i][j]);
    }
}

// One row of products becomes shares of the row's attention, which are added to `sums`.
void add_shares(float* line, int64_t seen, float scale, float* sums) {
  const int64_t end = (seen + WIDTH - 1) / WIDTH * WIDTH;
  for (int64_t j = 0; j < end; j += WIDTH) store(line + j, load(line + j) * scale);
  for (int64_t j = seen; j < end; ++j) line[j] = MASKED;
  vfloat most = vfloat{} + MASKED, total = {};
  for (int64_t j = 0; j < end; j += WIDTH) {
    vfloat next = load(line + j);
    most = most > next ? most : next;
  }
  float top = MASKED, sum = 0;
  for (int j = 0; j < WIDTH; ++j) top = most[j] > top ? most[j] : top;
  for (int64_t j = 0; j < end; j += WIDTH) {
    vfloat x = exp2_below(load(line + j) - top);
    total += x;
    store(line + j, x);
  }
  for (int j = 0; j < WIDTH; ++j) sum += total[j];
  const float part = 1.0f / sum;
  for (int64_t j = 0; j < end; j += WIDTH) store(sums + j, load(sums + j) + load(line + j) * part);
}

struct Best {
  float* score;
  int32_t* id;
};

// The blocks of one query, ascending: those that are forced and the best between them. A running
// list holds the best so far; since blocks come in order, the lower one wins among equal scores.
void choose(const Selection& p, const float* shares, int64_t own, Best best, int32_t* out) {
  const int64_t first = p.first < own + 1 ? p.first : own + 1;
  const int64_t late = own + 1 - p.recent, end = late > first ? late : first;
  const int64_t room = p.top - first - (own + 1 - end);
  int64_t kept = 0;
  for (int64_t block = first; block < end && room > 0; ++block) {
    float score = 0;
    for (int64_t tap = 0; tap < p.taps; ++tap)
      score += p.weights[tap] * shares[block * p.per_block + tap];
    score = score > 0 ? score : 0;  // what is no number counts as nothing
    if (kept == room && !(score > best.score[kept - 1])) continue;
    int64_t at = kept < room ? kept++ : kept - 1;
    for (; at > 0 && best.score[at - 1] < score; --at) {
      best.score[at] = best.score[at - 1];
      best.id[at] = best.id[at - 1];
    }
    best.score[at] = score;
    best.id[at] = int32_t(block);
  }
  for (int64_t i = 1; i < kept; ++i) {
    const int32_t id = best.id[i];
    int64_t at = i;
    for (; at > 0 && best.id[at - 1] > id; --at) best.id[at] = best.id[at - 1];
    best.id[at] = id;
  }
  int64_t at = 0;
  for (int64_t block = 0; block < first; ++block) out[at++] = int32_t(block);
  for (int64_t i = 0; i < kept; ++i) out[at++] = best.id[i];
  for (int64_t block = end; block <= own; ++block) out[at++] = int32_t(block);
  while (at < p.top) out[at++] = -1;
}

// Floats that a row of sums has: the entries before block 0, and a block more than there are.
inline int64_t sums_size(const Selection& p) {
  return p.reach + p.longest + p.per_block + p.taps + WIDTH;
}

inline int64_t scratch_floats(const Selection& p) {
  return TILE * (p.d + p.longest + sums_size(p)) + 2 * p.top;
}

template <class Source>
void select_tile(const Selection& p, int64_t kv_head, int64_t tile, float* scratch) {
  const int64_t group = p.heads / p.kv_heads, size = sums_size(p), count = p.tile_queries[tile];
  float *q = scratch, *logits = q + TILE * p.d, *sums = logits + TILE * p.longest;
  float* scores = sums + TILE * size;
  const Best best{scores, reinterpret_cast<int32_t*>(scores + p.top)};
  int64_t seen[TILE] = {};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t behind = p.tile_position[tile] + i + 1 - p.window;
    const int64_t ended = behind < 0 ? 0 : behind / p.stride + 1;
    seen[i] = ended < p.tile_entries[tile] ? ended : p.tile_entries[tile];
  }
  std::memset(q, 0, TILE * p.d * sizeof(float));
  std::memset(sums, 0, TILE * size * sizeof(float));
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group && seen[count - 1]; ++head) {
    for (int64_t i = 0; i < count; ++i) {
      const auto* row = static_cast<const Source*>(p.q) + head * p.q_head +
                        (p.tile_query[tile] + i) * p.q_token;
      for (int64_t c = 0; c < p.d; ++c) q[i * p.d + c] = widen(row[c]);
    }
    const float* panel = p.panels + (kv_head * p.panel_count + p.tile_panel[tile]) * p.d * COLUMNS;
    for (int64_t at = 0; at < seen[count - 1]; at += COLUMNS, panel += p.d * COLUMNS)
      multiply(q, panel, p.d, logits + at, p.longest);
    for (int64_t i = 0; i < count; ++i)
      if (seen[i])
        add_shares(logits + i * p.longest, seen[i], p.scale * 1.44269504088896f,
                   sums + i * size + p.reach);
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t own = (p.tile_position[tile] + i) / p.block;
    choose(p, sums + i * size, own, best,
           p.out + (kv_head * p.queries + p.tile_query[tile] + i) * p.top);
  }
}

template <class Source>
void select(const Selection& p) {
#pragma omp parallel num_threads(p.threads)
  {
    float* own = static_cast<float*>(__builtin_malloc(scratch_floats(p) * sizeof(float)));
#pragma omp for schedule(dynamic, 4)
    for (int64_t at = 0; at < p.kv_heads * p.panel_count; ++at)
      pack<Source>(p, at / p.panel_count, at % p.panel_count);
    // The last tiles of a sequence have the most entries: they come first.
#pragma omp for schedule(dynamic, 1)
    for (int64_t at = 0; at < p.kv_heads * p.tiles; ++at)
      select_tile<Source>(p, at % p.kv_heads, p.tiles - 1 - at / p.kv_heads, own);
    __builtin_free(own);
  }
}

// Lists are nearly always in order already; so each id is put in its place from the end on.
template <class Id>
void number_through(const Numbering& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t item = 0; item < p.kv_heads * p.queries; ++item) {
    const int64_t query = item % p.queries, last = p.own[query], before = p.before[query];
    const Id* ids =
        static_cast<const Id*>(p.ids) + item / p.queries * p.ids_head + query * p.ids_query;
    int32_t* out = p.out + item * p.top;
    int64_t count = 0;
    for (int64_t slot = 0; slot < p.top; ++slot) {
      const int64_t id = ids[slot] + before;
      if (ids[slot] < 0 || ids[slot] > last) continue;
      int64_t at = count;
      while (at > 0 && out[at - 1] > id) --at;
      if (at > 0 && out[at - 1] == id) continue;
      for (int64_t moved = count++; moved > at; --moved) out[moved] = out[moved - 1];
      out[at] = int32_t(id);
    }
    while (count < p.top) out[count++] = -1;
  }
}

inline bool is_block(int64_t id, int64_t blocks) { return uint64_t(id) < uint64_t(blocks); }

// A counting sort. Each chunk of a head's queries counts by itself and then writes behind those
// before it, so that rows ascend whatever the threads do.
template <class Place>
void invert(const Inversion& p) {
  const int64_t size = (p.queries + p.chunks - 1) / p.chunks;
  auto* place = static_cast<Place*>(p.place);
#pragma omp parallel num_threads(p.threads)
  {
#pragma omp for schedule(static)
    for (int64_t item = 0; item < p.kv_heads * p.chunks; ++item) {
      const int64_t head = item / p.chunks, begin = item % p.chunks * size;
      int64_t* counts = p.counts + item * p.blocks;
      for (int64_t query = begin; query < begin + size && query < p.queries; ++query) {
        const int32_t* ids = p.ids + head * p.ids_head + query * p.ids_query;
        for (int64_t slot = 0; slot < p.top; ++slot)
          if (is_block(ids[slot], p.blocks)) ++counts[ids[slot]];
      }
    }
#pragma omp single
    {
      int64_t total = 0;
      for (int64_t head = 0; head < p.kv_heads; ++head)
        for (int64_t block = 0; block < p.blocks; ++block) {
          p.rows[head * p.blocks + block] = total;
          for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
            int64_t& count = p.counts[(head * p.chunks + chunk) * p.blocks + block];
            const int64_t its = count;
            count = total;
            total += its;
          }
        }
      p.rows[p.kv_heads * p.blocks] = total;
    }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < p.kv_heads * p.chunks; ++item) {
      const int64_t head = item / p.chunks, begin = item % p.chunks * size;
      int64_t* next = p.counts + item * p.blocks;
      for (int64_t query = begin; query < begin + size && query < p.queries; ++query) {
        const int32_t* ids = p.ids + head * p.ids_head + query * p.ids_query;
        Place* to = place + (head * p.queries + query) * p.top;
        for (int64_t slot = 0; slot < p.top; ++slot) {
          const int64_t at = is_block(ids[slot], p.blocks) ? next[ids[slot]]++ : -1;
          to[slot] = Place(at);
          if (at >= 0) p.query[at] = int32_t(query);
        }
      }
    }
  }
}

}  // namespace

extern "C" {

// Callers compare them with their own: code built from an older source must not be called.
__attribute__((visibility("default"))) int trimtab_selection_bytes() { return sizeof(Selection); }
__attribute__((visibility("default"))) int trimtab_numbering_bytes() { return sizeof(Numbering); }
__attribute__((visibility("default"))) int trimtab_inversion_bytes() { return sizeof(Inversion); }

__attribute__((visibility("default"))) void trimtab_select_blocks(const Selection* p) {
  if (p->dtype == 0) return select<float>(*p);
  if (p->dtype == 1) return select<bf16>(*p);
  select<fp16>(*p);
}

__attribute__((visibility("default"))) void trimtab_number_through(const Numbering* p) {
  if (p->long_ids) return number_through<int64_t>(*p);
  number_through<int32_t>(*p);
}

__attribute__((visibility("default"))) void trimtab_invert_lists(const Inversion* p) {
  if (p->long_place) return invert<int64_t>(*p);
  invert<int32_t>(*p);
}

}  // extern "C"
