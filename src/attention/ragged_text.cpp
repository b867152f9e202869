#include "src/attention/ragged_text.h"

#include <tuple>

#include "src/attention/pair_text.h"
#include "src/attention/tile_text.h"

namespace veloxquant::attention {
namespace {

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

// Queries as operands, a row by a simdgroup; then what the rows of this simdgroup are.
std::string queries_text(const RaggedCut& cut, const std::string& source, const char* rows,
                         const std::string& arguments, const std::string& moves,
                         const std::string& mean, bool biased) {
  // Simdgroups that share rows share the work; else each has its own.
  const std::string loop =
      cut.together
          ? "for (int r = 16 * MT * (int)simdgroup; r < 16 * MT * ((int)simdgroup + 1); ++r) {"
          : "for (int r = (int)simdgroup; r < 16 * MT; r += (int)n_simdgroups) {";
  std::string text = "    veloxquant::barrier_of_group();\n    " + loop + R"(
      const int row = first_row + r;
      veloxquant::put_query<@ARGUMENTS>(@SOURCE + veloxquant::query_at(min(row, n_rows - 1), group_size, n_queries, @ROWS),
          row < n_rows, @MOVES, @MEAN, scratch + (int)simdgroup * SCRATCH,
          (VQ_GROUP uint*)(queries + r / 16 * (@PARTS * @STEPS * 32)), (uint)r % 16,
          units + r / 16 * 16, bias + r / 16 * 16, lane);
    }
    veloxquant::barrier_of_group();
    veloxquant::TileRows<MT> rows;
    veloxquant::open_rows<@BIASED, MT>(rows, ragged, packed_tokens + exact_tokens, n_queries, group_size,
                                       n_rows, own_row, factor, units + own_row - first_row,
                                       bias + own_row - first_row, lane);
    mask_rows_text
    veloxquant::TileSums<MT, NV> sums_of_lane;
    sums_of_lane.clear();
)";
  const bool packed = rows[0] == 'K';
  for (const auto& [name, with] : {std::pair<const char*, std::string>{"@ARGUMENTS", arguments},
                                   {"@SOURCE", source},
                                   {"@ROWS", rows},
                                   {"@MOVES", moves},
                                   {"@MEAN", mean},
                                   {"@PARTS", packed ? "PARTS" : "1"},
                                   {"@STEPS", packed ? "STEPS" : "EXACT_STEPS"},
                                   {"@BIASED", biased ? "1" : "0"}}) {
    text = replaced(text, name, with);
  }
  return text;
}

std::string attend_text(const RaggedCut& cut, const char* steps, const char* parts,
                        const std::string& keys, const std::string& values, const std::string& n,
                        const std::string& position) {
  std::string text =
      cut.together ? "    veloxquant::attend_together" : "    veloxquant::attend_apart";
  text += std::string("<SOFTCAP, MASK, ") + steps + ", " + parts +
          (cut.together
               ? std::string(", (") + steps + " + GROUPS - 1) / GROUPS, (NV + GROUPS - 1) / GROUPS"
               : "") +
          ", MT, NV>(\n        " + keys + ", " + values + ", " + n + ", " + position +
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
  std::string text = R"(  if (packed_item >= 0 && packed_item < packed_items) {
    const veloxquant::RaggedItem it = veloxquant::packed_item(
        ragged, packed_item, packed_tokens, exact_tokens, seen.begin, seen.end);
    const int64_t part = first_part + packed_item;
    if (it.count == 0) {
      veloxquant::put_nothing(sums + part * n_rows * 2, first_row, min(n_rows, first_row + 16 * ROW_TILES),
                              self, n_threads);
    } else {
)";
  text += pair_tile_text("k", s.keys) + pair_tile_text("v", s.values) + blocks_text(ragged);
  const std::string move = std::to_string(s.key_transform == 2 ? 0 : s.key_transform);
  text += queries_text(
      cut, s.key_transform == 2 ? "q_codes + head_queries / DIM * KROWS" : "q + head_queries",
      "KROWS", "KROWS, STEPS, PARTS, " + move + (s.keys.mean ? ", 1" : ", 0"),
      s.key_transform == 1   ? "smooth + head * DIM"
      : s.key_transform == 3 ? "smooth"
                             : "params",
      s.keys.mean ? "k_tables + 1 + head * DIM" : "params", s.keys.mean);
  text += attend_text(cut, "STEPS", "PARTS", "k_tile, keys", "v_tile, values", "it.count",
                      "it.position");
  text += put_text(cut, s.values.mean ? "v_tables + 1 + head * DIM" : "params", s.values.mean);
  return text + "    }\n  }\n";
}

std::string exact_part_text(const RaggedShape& ragged, const RaggedCut& cut) {
  const char* type = ragged.wide_exact ? "uint2" : "ushort";
  std::string text = R"(  if (item < exact_items) {
    const veloxquant::RaggedItem it = veloxquant::exact_item(
        ragged, item, packed_tokens, exact_tokens, seen.begin, seen.end);
    const int64_t part = first_part + packed_items + item;
    if (it.count + it.sinks == 0) {
      veloxquant::put_nothing(sums + part * n_rows * 2, first_row, min(n_rows, first_row + 16 * ROW_TILES),
                              self, n_threads);
    } else {
)";
  for (const auto& [side, array] : {std::pair{"k", "ek0"}, std::pair{"v", "ev0"}}) {
    const std::string given =
        R"(    const device #* $_rows = (const device #*)(@ + (batch * @_strides[0] + head * @_strides[1]));
    veloxquant::ExactPairs<DIM, BFLOAT, WIDE, const device #*> $_exact;
    $_exact.step = @_strides[2] / (WIDE ? 4 : 1);
)";
    text += replaced(replaced(replaced(given, "#", type), "$", side), "@", array);
  }
  text += queries_text(cut, "q + head_queries", "DIM", "DIM, EXACT_STEPS, 1, 0, 0", "params",
                       "params", false);
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

}  // namespace

std::string ragged_body(const RaggedShape& ragged, const RaggedCut& cut) {
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
  const bool apart = ragged[veloxquant::kApart] != 0;
  const int side_by_side = apart ? packed_items + exact_items : max(packed_items, exact_items);
  const int item = (int)threadgroup_position_in_grid.x % side_by_side;  // of exact tokens
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
)";
  text += s.mask ? "  const int64_t mask_step = mask_strides[3];\n"
                 : "  const int64_t mask_step = 0;\n";
  if (s.n_spans > 0) {
    text += "  const int packed_item = apart ? item - exact_items : item;\n";
    text += packed_part_text(ragged, cut);
  }
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

std::vector<std::string> ragged_inputs(const RaggedShape& ragged) {
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

const char* const kRaggedMergeBody = R"(
  threadgroup float packed[TOGETHER * SLICES * DIM];
  threadgroup float exact[TOGETHER * SLICES * DIM];
  threadgroup float moved[TOGETHER * DIM];
  threadgroup float stats[TOGETHER * SLICES];
  const uint lane = thread_index_in_threadgroup % 32, simdgroup = thread_index_in_threadgroup / 32;
  const uint slice = simdgroup % SLICES, own = simdgroup / SLICES;
  const int head = (int)threadgroup_position_in_grid.y, n_rows = counts[3], group_size = counts[2];
  const int64_t plane = (int64_t)threadgroup_position_in_grid.z * threadgroups_per_grid.y + head;
  // A row beyond the last is the last once more.
  const int given = (int)(threadgroup_position_in_grid.x * TOGETHER + own), row = min(given, n_rows - 1);
  const int n_items = counts[0], in_group = row % group_size, query = row / group_size;
  const decltype(&packed[0]) codes = packed + own * SLICES * DIM;
  const decltype(&packed[0]) kept = exact + own * SLICES * DIM;
  const decltype(&packed[0]) turned = moved + own * DIM;
  float maximum, total;
  veloxquant::merge_row<DIM, SLICES>(parts + plane * n_items * n_rows * DIM, sums + plane * n_items * n_rows * 2,
                                     n_items, counts[1], n_rows, row,
                                     SINKS ? (float)sinks[head * group_size + in_group] * M_LOG2E_F : -INFINITY,
                                     codes, kept, stats + own * SLICES, &maximum, &total, slice, lane);
  if (TRANSFORM == 1 && slice == 0) veloxquant::simd_hadamard<DIM>(codes, lane);
  if (TRANSFORM == 3 && slice == 0) veloxquant::simd_rotate_back<DIM>(inverse, codes, turned, lane);
  if (TRANSFORM == 2) {
    veloxquant::multiply_back<DIM, SLICES, 0>(inverse + (int64_t)head * DIM * DIM, codes, turned, slice, lane);
  }
  if (TRANSFORM == 4) {
    veloxquant::multiply_back<DIM, SLICES, 1>(inverse + (int64_t)head * DIM * DIM, codes, turned, slice, lane);
  }
  veloxquant::barrier_of_group();
  if (given >= n_rows) return;
  const int64_t out_row = (plane * group_size + in_group) * (n_rows / group_size) + query;
  for (uint d = 32 * slice + lane; d < DIM; d += 32 * SLICES) {
    float value = TRANSFORM == 2 || TRANSFORM == 4 ? turned[d] : codes[d];
    if (TRANSFORM == 1) value = value * inverse[head * DIM + d];
    value = total == 0.0f ? 0.0f : (value + kept[d]) / total;
    out[out_row * DIM + d] = veloxquant::Narrow<OUT>::of(value);
  }
  if (slice == 0 && lane == 0) {
    lse[out_row] = total == 0.0f ? -INFINITY : (maximum + log2(total)) * M_LN2_F;
  }
)";

}  // namespace veloxquant::attention
