#include "src/attention/ragged_calls.h"

#include <algorithm>
#include <climits>

#include "src/attention/decode_text.h"
#include "src/attention/pair_text.h"
#include "src/attention/ragged_text.h"
#include "veloxquant/error.h"

namespace veloxquant::attention {
namespace {

using metal::Call;
using metal::Type;

const char* const kHeader = "src/attention/metal_ragged.h";
constexpr int kLeastBlocks = 4;            // as in metal_ragged.h
constexpr int kExactItem = 256;            // tokens, where rows are few
constexpr int kMaxItems = 1024;            // the second pass walks them
constexpr int kManyItems = 16;             // of packed tokens
constexpr int kFewRows = 32, kSlices = 8;  // of the second pass
constexpr int kSimdgroups = 4;             // of few rows
constexpr int kMaxTogether = 8;            // of many rows
constexpr int kMaxSketch = 256;            // signs that a tile shared by simdgroups has room for
constexpr int kBesidePool = 12 << 10;      // bytes: tables, factors, units
constexpr int kWideHead = 128;             // dimensions up to which a simdgroup has 32 rows

int divide_up(int64_t n, int64_t d) { return static_cast<int>((n + d - 1) / d); }

// Tiles of four times values a lane: see metal_tiles.h.
int value_products(const DecodeShape& s) { return 4 * divide_up(s.head_dim, 32); }
int steps_of(int rows) { return divide_up(rows, 16); }

// Numbers of fp32 that a simdgroup transforms a row in.
int scratch_of(int rows) { return 2 * rows; }

// Bytes of the pool, in operands of 16.
struct Pool {
  int queries = 0, keys = 0, values = 0, all = 0;
};
Pool pool_of(const DecodeShape& s, const RaggedCut& cut) {
  const int rows = s.n_spans > 0 ? std::max(s.key_rows(), s.head_dim) : s.head_dim;
  const int nv = value_products(s);
  const int scratch = cut.simdgroups * scratch_of(rows) / 4;
  Pool pool;
  pool.queries = 32 * cut.row_tiles() * cut.parts * steps_of(rows);
  if (cut.together) {
    pool.keys = std::max(128 * steps_of(rows), scratch);
    pool.values = 64 * nv;
  } else {
    pool.keys = std::max(cut.tiles * nv * 33, scratch);
  }
  pool.all = pool.queries + pool.keys + pool.values;
  return pool;
}

// Threadgroups that a multiprocessor takes: registers of a thread, at most 168 or 255.
int at_once(const DecodeShape& s, const RaggedCut& cut) {
  if (cut.simdgroups > 4) return 1;
  return cut.tiles > 1 || s.head_dim > kWideHead || cut.together ? 2 : 3;
}

int chunks_of(const DecodeShape& s, const RaggedCut& cut) {
  return divide_up(s.n_rows(), 16 * cut.row_tiles());
}

}  // namespace

RaggedCut ragged_cut(const RaggedShape& ragged) {
  const DecodeShape& s = ragged.decode;
  const int tiles = divide_up(s.n_rows(), 16), wide = s.head_dim <= kWideHead ? 2 : 1;
  const bool packed = s.n_spans > 0;
  const int parts = packed && s.key_transform != 0 ? 2 : 1;
  std::vector<RaggedCut> cuts;  // the first that fits is the one
  if (tiles > wide && !(packed && s.key_rows() > kMaxSketch)) {
    const int own = tiles > kMaxTogether ? wide : 1;
    const int simdgroups = std::clamp(divide_up(tiles, own), kSimdgroups, kMaxTogether);
    const int own_parts = packed && s.key_transform == 1 ? 2 : 1;
    cuts.push_back({simdgroups, own, own_parts, true});
    cuts.push_back({kSimdgroups, own, own_parts, true});
    cuts.push_back({kSimdgroups, 1, own_parts, true});
  }
  cuts.push_back({kSimdgroups, std::min(tiles, wide), parts, false});
  cuts.push_back({kSimdgroups, 1, parts, false});
  cuts.push_back({kSimdgroups, 1, 1, false});
  for (const RaggedCut& cut : cuts) {
    if (16 * pool_of(s, cut).all + kBesidePool <= ragged.shared_bytes) return cut;
  }
  fail("[attend] keys: got ", s.key_rows(), " numbers of a query, wanted as many as ",
       ragged.shared_bytes, " bytes of a threadgroup's memory hold");
}

RaggedItems ragged_items(const RaggedShape& ragged, int cores) {
  const DecodeShape& s = ragged.decode;
  const RaggedCut cut = ragged_cut(ragged);
  const int64_t groups = int64_t{s.batch} * s.n_kv_heads * chunks_of(s, cut);
  const int64_t room = int64_t{at_once(s, cut)} * cores;
  // One wave, or where the rows alone make more, what fills waves best.
  int64_t wanted = std::clamp<int64_t>(room / groups, 1, kMaxItems);
  if (groups > room / 2) {
    double best = 0;
    for (int64_t items = 1; items <= 4; ++items) {
      const int64_t waves = (groups * items + room - 1) / room;
      const double filled = static_cast<double>(groups * items) / static_cast<double>(waves * room);
      if (filled > best + 0.05) best = filled, wanted = items;
    }
  }
  RaggedItems items;
  if (s.n_spans > 0) {
    const int blocks = divide_up(ragged.most_packed, kBlockTokens);
    items.packed =
        static_cast<int>(std::clamp<int64_t>(divide_up(blocks, kLeastBlocks), 1, wanted));
  }
  if (s.n_exact > 0) {
    const int64_t tail = std::max<int64_t>(ragged.most_exact - ragged.sinks, 1);
    items.exact = static_cast<int>(std::clamp<int64_t>(divide_up(tail, kExactItem), 1, wanted));
    items.exact_tokens = divide_up(divide_up(tail, items.exact), kBlockTokens) * kBlockTokens;
  }
  // Where items are short, exact tokens are threadgroups of their own, of the same wave.
  items.apart = items.packed >= kManyItems && items.exact > 0;
  if (items.apart)
    items.packed = std::min<int>(items.packed, static_cast<int>(wanted) - items.exact);
  return items;
}

std::array<int32_t, kRaggedCount> ragged_numbers(const RaggedShape& s, const RaggedItems& items) {
  const auto held = [](int64_t n) { return static_cast<int32_t>(std::min<int64_t>(n, INT_MAX)); };
  return {held(s.most_packed),
          held(s.most_exact),
          s.sinks,
          items.packed,
          items.exact,
          items.exact_tokens,
          items.apart ? 1 : 0,
          s.causal ? 1 : 0,
          s.window,
          held(s.table_step),
          s.pool};
}

Call ragged_first_pass_call(const RaggedShape& ragged, const RaggedItems& items) {
  const DecodeShape& s = ragged.decode;
  const RaggedCut cut = ragged_cut(ragged);
  const Pool pool = pool_of(s, cut);
  Call call;
  call.kernel = kernel_once("vq_attend_tiles", ragged_inputs(ragged), {"parts", "sums"}, kHeader,
                            ragged_body(ragged, cut), false);
  auto& arguments = call.launch.arguments;
  arguments = {
      {"DIM", s.head_dim},
      {"MT", cut.tiles},
      {"PARTS", cut.parts},
      {"NV", value_products(s)},
      {"ROW_TILES", cut.row_tiles()},
      {"GROUPS", cut.simdgroups},
      {"FACTORS", cut.together ? 1 : cut.simdgroups},
      {"POOL", pool.all},
      {"SCRATCH", scratch_of(s.n_spans > 0 ? std::max(s.key_rows(), s.head_dim) : s.head_dim)},
      {"QUERIES", pool.queries},
      {"KEYS", pool.keys},
      {"EXACT_STEPS", steps_of(s.head_dim)},
      {"BFLOAT", s.bfloat_cache ? 1 : 0},
      {"WIDE", ragged.wide_exact ? 1 : 0},
      {"SOFTCAP", s.softcap ? 1 : 0},
      {"MASK", s.mask ? 1 : 0}};
  if (s.n_spans > 0) {
    arguments.push_back({"STEPS", steps_of(s.key_rows())});
    add_pair_arguments("K", s.keys, s.key_rows(), arguments);
    add_pair_arguments("V", s.values, s.head_dim, arguments);
  }
  const int threads = 32 * cut.simdgroups, n = items.all();
  const int side_by_side = items.apart ? n : std::max(items.packed, items.exact);
  call.launch.grid = {side_by_side * chunks_of(s, cut) * threads, s.n_kv_heads, s.batch};
  call.launch.threadgroup = {threads, 1, 1};
  call.launch.at_once = at_once(s, cut);
  call.launch.pool_bytes = 16 * pool.all;
  call.launch.outputs = {{Type::float32, {s.batch, s.n_kv_heads, n, s.n_rows(), s.head_dim}},
                         {Type::float32, {s.batch, s.n_kv_heads, n, s.n_rows(), 2}}};
  return call;
}

Call ragged_second_pass_call(const RaggedShape& ragged) {
  const DecodeShape& s = ragged.decode;
  Call call;
  call.kernel = kernel_once("vq_attend_merge", {"parts", "sums", "counts", "sinks", "inverse"},
                            {"out", "lse"}, kHeader, kRaggedMergeBody, true);
  // Few rows: simdgroups share one.
  const bool few = s.n_rows() <= kFewRows;
  const int slices = few ? kSlices : 1, together = few ? 1 : kSlices;
  call.launch.arguments = {{"DIM", s.head_dim},
                           {"SLICES", slices},
                           {"TOGETHER", together},
                           {"SINKS", s.sinks ? 1 : 0},
                           {"TRANSFORM", s.n_spans > 0 ? s.value_transform : 0},
                           {"OUT", s.out}};
  call.launch.grid = {divide_up(s.n_rows(), together) * 32 * kSlices, s.n_kv_heads, s.batch};
  call.launch.threadgroup = {32 * kSlices, 1, 1};
  const int n_q_heads = s.n_kv_heads * s.group;
  call.launch.outputs = {{s.out, {s.batch, n_q_heads, s.n_queries, s.head_dim}},
                         {Type::float32, {s.batch, n_q_heads, s.n_queries}}};
  return call;
}

}  // namespace veloxquant::attention
