#include "src/attention/ragged_calls.h"

#include <algorithm>
#include <climits>
#include <tuple>

#include "src/attention/decode_text.h"
#include "src/attention/pair_text.h"
#include "src/attention/tile_text.h"

namespace veloxquant::attention {
namespace {

using metal::Call;
using metal::Type;

const char* const kHeader = "src/attention/metal_ragged.h";
constexpr int kLeastBlocks = 4;  // as in metal_ragged.h
constexpr int kExactItem = 256;  // tokens, where rows are few
constexpr int kMaxItems = 1024;  // the second pass walks them
constexpr int kSimdgroups = 4;   // of few rows
constexpr int kMaxTogether = 8;  // of many rows
constexpr int kMaxSketch = 256;  // signs that a tile shared by simdgroups has room for
constexpr int kWideHead = 128;   // dimensions up to which a simdgroup has 32 rows

int divide_up(int64_t n, int64_t d) { return static_cast<int>((n + d - 1) / d); }

// Tiles of four times values a lane: see metal_tiles.h.
int value_products(const DecodeShape& s) { return 4 * divide_up(s.head_dim, 32); }
int steps_of(int rows) { return divide_up(rows, 16); }

// Bytes of the pool, in operands of 16.
struct Pool {
  int queries = 0, keys = 0, values = 0, all = 0;
};
Pool pool_of(const DecodeShape& s, const RaggedCut& cut) {
  const int rows = s.n_spans > 0 ? std::max(s.key_rows(), s.head_dim) : s.head_dim;
  const int nv = value_products(s);
  const int scratch = (s.key_transform == 3 ? 8 : 4) * rows;  // 16 rows of fp32, and moved
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

std::string blocks_text(const RaggedShape& s) {
  std::string text;
  for (const auto& [name, array, at] :
       {std::tuple{"keys", "k0", 0}, std::tuple{"values", "v0", 3}}) {
    const std::string n = name;
    const auto step = [&, first = at](int i) { return "steps[" + std::to_string(first + i) + "]"; };
    text += s.paged ? "    veloxquant::PagedBlocks<const device uint32_t*, const device int*> "
                    : "    veloxquant::StridedBlocks<const device uint32_t*> ";
    text += n + ";\n    " + n + ".base = (const device uint32_t*)" + array + " + head * " + step(1);
    if (s.paged) {
      text += ";\n    " + n +
              ".table = table + (int64_t)batch * ragged[veloxquant::kTableStep] + "
              "it.first;\n    " +
              n + ".pool = ragged[veloxquant::kPool]";
    } else {
      text += " + batch * " + step(0) + " + it.first * " + step(2);
    }
    text += ";\n    " + n + ".step = " + step(2) + ";\n";
  }
  return text;
}

// Queries as operands, transformed by `moves`; then what the rows of this simdgroup are.
std::string queries_text(const std::string& load, const std::string& moves, const char* rows,
                         const char* steps, const char* parts, bool biased) {
  return replaced(replaced(replaced(replaced(R"(    for (int t = 0; t < ROW_TILES; ++t) {
      const int first_of_tile = first_row + 16 * t;
)" + load + moves + R"(      veloxquant::pack_queries<@ROWS, @STEPS, @PARTS>(
          scratch, units + 16 * t, queries + t * (@PARTS * @STEPS * 32), self, n_threads);
    }
    veloxquant::TileRows<MT> rows;
    veloxquant::open_rows<@BIASED, MT>(rows, ragged, packed_tokens + exact_tokens, n_queries, group_size, n_rows,
                              own_row, factor, units + own_row - first_row, bias + own_row - first_row, lane);
    mask_rows_text
    veloxquant::TileSums<MT, NV> sums_of_lane;
    sums_of_lane.clear();
)",
                                             "@ROWS", rows),
                                    "@STEPS", steps),
                           "@PARTS", parts),
                  "@BIASED", biased ? "1" : "0");
}

std::string attend_text(const RaggedCut& cut, const char* steps, const char* parts,
                        const std::string& keys, const std::string& values, const std::string& n,
                        const std::string& position) {
  std::string text =
      cut.together ? "    veloxquant::attend_together" : "    veloxquant::attend_apart";
  text += std::string("<SOFTCAP, MASK, ") + steps + ", " + parts + ", MT, NV>(\n        " + keys +
          ", " + values + ", " + n + ", " + position +
          ",\n        queries + (own_row - first_row) / 16 * (" + parts + " * " + steps +
          " * 32), factors" + (cut.together ? "" : " + 128 * simdgroup") +
          ", cap, rows, mask_text, mask_step, sums_of_lane,\n        ";
  if (cut.together) text += "key_store, value_store, ";
  return text + "simdgroup, n_simdgroups, lane);\n";
}

std::string put_text(const RaggedCut& cut, const std::string& mean, bool has_mean) {
  const std::string m = has_mean ? "1" : "0";
  const std::string to = "n_rows, parts + part * n_rows * DIM, sums + part * n_rows * 2, ";
  return cut.together ? "    veloxquant::put_own<DIM, " + m + ">(sums_of_lane, " + mean +
                            ", own_row, " + to + "lane);\n"
                      : "    veloxquant::put_merged<DIM, " + m + ">(sums_of_lane, " + mean +
                            ", stats, scratch, first_row, " + to + "self, n_threads);\n";
}

std::string packed_part_text(const RaggedShape& ragged, const RaggedCut& cut) {
  const DecodeShape& s = ragged.decode;
  std::string moves;
  std::string load =
      "      veloxquant::load_queries<DIM, 16>(q + head_queries, group_size, n_queries, "
      "first_of_tile, "
      "n_rows, 1.0f, ";
  if (s.key_transform == 2) {
    load =
        "      veloxquant::load_queries<KROWS, 16>(q_codes + head_queries / DIM * KROWS, "
        "group_size, "
        "n_queries, first_of_tile, n_rows, 1.0f, params, false, scratch, self, n_threads);\n"
        "      veloxquant::barrier_of_group();\n";
  } else {
    load += s.key_transform == 1 ? "smooth + head * DIM, true" : "params, false";
    load += ", scratch, self, n_threads);\n      veloxquant::barrier_of_group();\n";
    if (s.key_transform == 1) {
      moves = "      veloxquant::hadamard_rows<DIM>(scratch, 16, self, n_threads);\n";
    }
    if (s.key_transform == 3) {
      moves =
          "      veloxquant::rotate_rows<DIM>(smooth, scratch, scratch + 16 * DIM, 16, self, "
          "n_threads);\n";
    }
  }
  if (s.keys.mean) {
    moves +=
        "      veloxquant::bias_of_mean<DIM>(scratch, k_tables + 1 + head * DIM, bias + 16 * t, "
        "self, n_threads);\n";
  }
  std::string text = R"(  if (item < ragged[veloxquant::kPackedItems]) {
    const veloxquant::RaggedItem it = veloxquant::packed_item(
        ragged, item, packed_tokens, exact_tokens, seen.begin, seen.end);
    const int64_t part = first_part + item;
    if (it.count == 0) {
      veloxquant::put_nothing(sums + part * n_rows * 2, first_row, min(n_rows, first_row + 16 * ROW_TILES),
                              self, n_threads);
    } else {
)";
  text += pair_tile_text("k", s.keys) + pair_tile_text("v", s.values) + blocks_text(ragged);
  text += queries_text(load, moves, "KROWS", "STEPS", "PARTS", s.keys.mean);
  text += attend_text(cut, "STEPS", "PARTS", "k_tile, keys", "v_tile, values", "it.count",
                      "it.position");
  text += put_text(cut, s.values.mean ? "v_tables + 1 + head * DIM" : "params", s.values.mean);
  return text + "    }\n  }\n";
}

std::string exact_part_text(const RaggedShape& ragged, const RaggedCut& cut) {
  const char* type = ragged.wide_exact ? "uint2" : "ushort";
  std::string text = R"(  if (item < ragged[veloxquant::kExactItems]) {
    const veloxquant::RaggedItem it = veloxquant::exact_item(
        ragged, item, packed_tokens, exact_tokens, seen.begin, seen.end);
    const int64_t part = first_part + ragged[veloxquant::kPackedItems] + item;
    if (it.count + it.sinks == 0) {
      veloxquant::put_nothing(sums + part * n_rows * 2, first_row, min(n_rows, first_row + 16 * ROW_TILES),
                              self, n_threads);
    } else {
      veloxquant::barrier_of_group();  // the bias of packed tokens has been read
      for (uint i = self; i < 16 * ROW_TILES; i += n_threads) bias[i] = 0.0f;
)";
  for (const auto& [side, array] : {std::pair{"k", "ek0"}, std::pair{"v", "ev0"}}) {
    const std::string given =
        R"(    const device #* $_rows = (const device #*)(@ + (batch * @_strides[0] + head * @_strides[1]));
    veloxquant::ExactPairs<DIM, BFLOAT, WIDE, const device #*> $_exact;
    $_exact.step = @_strides[2] / (WIDE ? 4 : 1);
)";
    text += replaced(replaced(replaced(given, "#", type), "$", side), "@", array);
  }
  text += queries_text(
      "      veloxquant::load_queries<DIM, 16>(q + head_queries, group_size, n_queries, "
      "first_of_tile, "
      "n_rows, 1.0f, params, false, scratch, self, n_threads);\n",
      "", "DIM", "EXACT_STEPS", "1", false);
  // Sinks, then the item's own tokens.
  text += R"(    for (int stretch = 0; stretch < 2; ++stretch) {
      const int first = stretch == 0 ? 0 : it.first, tokens = stretch == 0 ? it.sinks : it.count;
      if (tokens == 0) continue;
      veloxquant::StridedBlocks<const device #*> keys, values;
      keys.base = k_rows + first * k_exact.step;
      values.base = v_rows + first * v_exact.step;
      keys.step = 64 * k_exact.step;
      values.step = 64 * v_exact.step;
)";
  text = replaced(text, "#", type);
  text += attend_text(cut, "EXACT_STEPS", "1", "k_exact, keys", "v_exact, values", "tokens",
                      "(stretch == 0 ? 0 : it.position)");
  return text + "    }\n" + put_text(cut, "params", false) + "    }\n  }\n";
}

std::string body(const RaggedShape& ragged, const RaggedCut& cut) {
  const DecodeShape& s = ragged.decode;
  std::string text = std::string("  ") + metal::kPoolText + "\n" + R"(
  threadgroup float units[16 * ROW_TILES];
  threadgroup float bias[16 * ROW_TILES];
  threadgroup float factors[128 * FACTORS];
)";
  if (!cut.together) text += "  threadgroup float stats[(GROUPS + 1) * 32 * MT];\n";
  if (s.n_spans > 0) text += pair_stage_text("k", s.keys) + pair_stage_text("v", s.values);
  text += R"(
  const int head = (int)threadgroup_position_in_grid.y, batch = (int)threadgroup_position_in_grid.z;
  const int n_heads = (int)threadgroups_per_grid.y, n_queries = q_shape[2];
  const int group_size = q_shape[1] / n_heads, n_rows = n_queries * group_size;
  const int packed_items = ragged[veloxquant::kPackedItems], exact_items = ragged[veloxquant::kExactItems];
  const int side_by_side = max(packed_items, exact_items);
  const int item = (int)threadgroup_position_in_grid.x % side_by_side;
  const int first_row = (int)threadgroup_position_in_grid.x / side_by_side * (16 * ROW_TILES);
  const int64_t first_part = (int64_t)(batch * n_heads + head) * (packed_items + exact_items);
  const uint self = thread_index_in_threadgroup, n_threads = threads_per_threadgroup.x;
  const uint lane = self % 32, simdgroup = self / 32, n_simdgroups = n_threads / 32;
  const int64_t head_queries = (int64_t)(batch * n_heads + head) * n_rows * DIM;
  const float factor = params[0] * M_LOG2E_F, cap = params[1];
  const decltype(&pool[0]) queries = pool;
  VQ_GROUP float* scratch = (VQ_GROUP float*)(pool + QUERIES);
)";
  text += cut.together ? R"(  const int own_row = first_row + 16 * MT * (int)simdgroup;
  const decltype(&pool[0]) key_store = pool + QUERIES;
  const decltype(&pool[0]) value_store = pool + QUERIES + KEYS;
)"
                       : "  const int own_row = first_row;\n";
  // Lengths beyond what there is room for must not be followed.
  text +=
      std::string("  const int packed_tokens = ") +
      (s.n_spans > 0 ? "clamp((int)n_packed[batch], 0, (int)ragged[veloxquant::kMostPacked])"
                     : "0") +
      ";\n  const int exact_tokens = " +
      (s.n_exact > 0 ? "clamp((int)n_exact[batch], 0, (int)ragged[veloxquant::kMostExact])" : "0") +
      R"(;
  veloxquant::SeenRange seen = veloxquant::seen_by(ragged, packed_tokens + exact_tokens, n_queries,
                                                   first_row / group_size);
  seen.end = veloxquant::seen_by(ragged, packed_tokens + exact_tokens, n_queries,
                                 (min(first_row + 16 * ROW_TILES, n_rows) - 1) / group_size).end;
  for (uint i = self; i < 16 * ROW_TILES; i += n_threads) bias[i] = 0.0f;
)";
  text += s.mask ? "  const int64_t mask_step = mask_strides[3];\n"
                 : "  const int64_t mask_step = 0;\n";
  if (s.n_spans > 0) text += packed_part_text(ragged, cut);
  if (s.n_exact > 0) text += exact_part_text(ragged, cut);
  text = replaced(text, "mask_rows_text",
                  s.mask ? R"(for (int i = 0; i < 2 * MT; ++i) {
      const int row = min(own_row + 8 * i + (int)lane / 4, n_rows - 1);
      rows.mask[i / 2][i % 2] = batch * mask_strides[0] +
          (head * group_size + row % group_size) * mask_strides[1] + row / group_size * mask_strides[2];
    })"
                         : "");
  return replaced(text, "mask_text", s.mask ? "mask" : "params");
}

std::vector<std::string> inputs_of(const RaggedShape& ragged) {
  const DecodeShape& s = ragged.decode;
  std::vector<std::string> inputs = {"q"};
  if (s.n_spans > 0 && s.key_transform == 2) inputs.push_back("q_codes");
  inputs.push_back("ragged");
  if (s.n_spans > 0) inputs.push_back("n_packed");
  if (s.n_exact > 0) inputs.push_back("n_exact");
  inputs.push_back("params");
  if (s.n_spans > 0) {
    inputs.insert(inputs.end(), {"smooth", "k_tables", "v_tables", "steps", "k0", "v0"});
    if (ragged.paged) inputs.push_back("table");
  }
  if (s.n_exact > 0) inputs.insert(inputs.end(), {"ek0", "ev0"});
  if (s.mask) inputs.push_back("mask");
  return inputs;
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
  const bool wide = s.head_dim <= kWideHead;
  const int tiles = divide_up(s.n_rows(), 16);
  RaggedCut cut;
  cut.simdgroups = kSimdgroups;
  cut.tiles = tiles > 1 && wide ? 2 : 1;
  cut.parts = s.n_spans > 0 && s.key_transform != 0 ? 2 : 1;
  if (tiles <= cut.tiles || (s.n_spans > 0 && s.key_rows() > kMaxSketch)) return cut;
  cut.together = true;
  if (s.key_transform != 1) cut.parts = 1;
  cut.tiles = tiles > kMaxTogether && wide ? 2 : 1;
  cut.simdgroups = std::clamp(divide_up(tiles, cut.tiles), kSimdgroups, kMaxTogether);
  return cut;
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
  return items;
}

std::array<int32_t, kRaggedCount> ragged_numbers(const RaggedShape& s, const RaggedItems& items) {
  const auto held = [](int64_t n) { return static_cast<int32_t>(std::min<int64_t>(n, INT_MAX)); };
  return {held(s.most_packed), held(s.most_exact), s.sinks,  items.packed,       items.exact,
          items.exact_tokens,  s.causal ? 1 : 0,   s.window, held(s.table_step), s.pool};
}

Call ragged_first_pass_call(const RaggedShape& ragged, const RaggedItems& items) {
  const DecodeShape& s = ragged.decode;
  const RaggedCut cut = ragged_cut(ragged);
  const Pool pool = pool_of(s, cut);
  Call call;
  call.kernel = kernel_once("vq_attend_tiles", inputs_of(ragged), {"parts", "sums"}, kHeader,
                            body(ragged, cut), false);
  auto& arguments = call.launch.arguments;
  arguments = {{"DIM", s.head_dim},
               {"MT", cut.tiles},
               {"PARTS", cut.parts},
               {"NV", value_products(s)},
               {"ROW_TILES", cut.row_tiles()},
               {"GROUPS", cut.simdgroups},
               {"FACTORS", cut.together ? 1 : cut.simdgroups},
               {"POOL", pool.all},
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
  call.launch.grid = {std::max(items.packed, items.exact) * chunks_of(s, cut) * threads,
                      s.n_kv_heads, s.batch};
  call.launch.threadgroup = {threads, 1, 1};
  call.launch.at_once = at_once(s, cut);
  call.launch.pool_bytes = 16 * pool.all;
  call.launch.outputs = {{Type::float32, {s.batch, s.n_kv_heads, n, s.n_rows(), s.head_dim}},
                         {Type::float32, {s.batch, s.n_kv_heads, n, s.n_rows(), 2}}};
  return call;
}

}  // namespace veloxquant::attention
