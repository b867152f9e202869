#include "src/attention/prefill_text.h"

#include <algorithm>

#include "src/attention/decode_text.h"
#include "src/attention/tile_text.h"

namespace veloxquant::attention {
namespace {

constexpr int kLanes = 8;                 // groups of sixteen lanes, each with rows of its own
constexpr int kMostRows = 32;             // of a threadgroup
constexpr int kDecodeQueries = 16;        // of a call of the decode kernel, at most
constexpr int kTileNumbers = 2048;        // decoded at a time, about
constexpr int kMemory = 32 * 1024 - 256;  // of a threadgroup, less what alignment takes

int tile_numbers(const PrefillShape& p) {
  return p.tokens * std::max(p.key_stride, p.value_stride);
}

}  // namespace

PrefillShape prefill_shape(const DecodeShape& s) {
  PrefillShape p;
  const int keys = query_numbers(s), values = s.value_rows(), widest = std::max(keys, values);
  p.tokens = widest <= kTileNumbers / 16 ? 16 : widest <= kTileNumbers / 8 ? 8 : 4;
  // Four numbers more: lanes that read one token each meet different banks.
  p.key_stride = keys + 4;
  p.value_stride = values;
  const int tables = s.n_spans > 0 ? stage_bytes(s.keys) + stage_bytes(s.values) : 0;
  for (p.rows = kMostRows; p.rows >= kLanes; p.rows /= 2) {
    if (4 * (p.rows * (keys + p.tokens) + tile_numbers(p)) <= kMemory - tables) break;
  }
  while (p.rows > kLanes && p.rows / 2 >= s.n_rows()) p.rows /= 2;
  const bool fits = p.rows >= kLanes && widest <= 2 * kMaxDecodeDim;
  if (!fits || s.n_queries <= kDecodeQueries) p.rows = 0;
  return p;
}

std::string prefill_body(const DecodeShape& s) {
  std::string text = R"(
  threadgroup float query[ROWS * QUERY_DIM];
  threadgroup float power[TILE];
  threadgroup float weights[ROWS * TOKENS];
)";
  if (s.n_spans > 0) text += stage_text("k", s.keys) + stage_text("v", s.values);
  text += group_text() + plan_text();
  text += R"(  const int own_row = first_row + (int)self / 16 * RP;
  float maximum[RP], sum[RP], own[RP][N];
  int query_of[RP];
  int64_t mask_row[RP];
  int seen_end = 0, seen_begin = most + position;
  for (int r = 0; r < ROWS; ++r) {
    const int of = min(first_row + r, n_rows - 1) / group_size;
    seen_end = max(seen_end, veloxquant::end_of_seen(seen, of, is_packed));
    seen_begin = min(seen_begin, (int)seen[veloxquant::kSeenNumbers * of]);
  }
  for (int r = 0; r < RP; ++r) {
    const int row = min(own_row + r, n_rows - 1);
    maximum[r] = -INFINITY;
    sum[r] = 0.0f;
    query_of[r] = row / group_size;
    mask_row[r] = MASK_ROW;
    for (int k = 0; k < N; ++k) own[r][k] = 0.0f;
  }
  const int count = min(most, max(0, seen_end - position));
  const int from = max(0, seen_begin - position) / TOKENS * TOKENS;
)";
  text = replaced(text, "MASK_ROW",
                  s.mask ? "batch * mask_strides[0] + (head * group_size + row % group_size) * "
                           "mask_strides[1] + query_of[r] * mask_strides[2]"
                         : "0");
  text += "  const int64_t mask_step = " + std::string(s.mask ? "mask_strides[3]" : "0") + ";\n";
  const auto call = [](const std::string& dim) {
    return "veloxquant::attend_tokens<RP, " + dim +
           ", TOKENS, KSTRIDE, VSTRIDE, SOFTCAP, MASK, N>(\n          here, from, count, position, "
           "query + (int)self / 16 * RP * " +
           dim +
           ", power,\n          weights + (int)self / 16 * RP * TOKENS, cap, seen, query_of, "
           "mask_text, mask_row,\n          mask_step, own, maximum, sum, self, n_threads);\n";
  };
  if (s.n_exact > 0) text += "  const int source = plan[6 * item + 1];\n";
  if (s.n_spans > 0) {
    text += "  if (is_packed) {\n" + sides_text(s, span_blocks_text(s)) + R"(
    veloxquant::PackedTokens<TOKENS, KSTRIDE, VSTRIDE, decltype(k_tile), decltype(v_tile),
                             decltype(keys), decltype(values)> here;
    here.key_tile = k_tile;
    here.value_tile = v_tile;
    here.key_blocks = keys;
    here.value_blocks = values;
    )" + call("KROWS") +
            "  } else {\n";
  } else {
    text += "  {\n";
  }
  if (s.n_exact > 0) {
    text +=
        R"(    veloxquant::load_queries<DIM, ROWS>(q + head_queries, group_size, n_queries, first_row, n_rows,
                                        factor, params, false, query, self, n_threads);
)";
  }
  for (int i = 0; i < s.n_exact; ++i) {
    const std::string k = "ek" + std::to_string(i), v = "ev" + std::to_string(i);
    const auto row = [](const std::string& name) {
      return name + " + (batch * " + name + "_strides[0] + head * " + name +
             "_strides[1] + first * " + name + "_strides[2])";
    };
    text += "    if (source == " + std::to_string(i) +
            ") {\n      veloxquant::ExactTokens<TOKENS, KSTRIDE, VSTRIDE, DIM, BFLOAT, "
            "decltype(" +
            k + " + 0), decltype(" + v + " + 0)> here;\n" + "      here.key_rows = " + row(k) +
            ";\n      here.value_rows = " + row(v) + ";\n      here.key_step = " + k +
            "_strides[2];\n      here.value_step = " + v + "_strides[2];\n      " + call("DIM") +
            "    }\n";
  }
  text += R"(  }
  const int64_t at = ((int64_t)(batch * n_heads + head) * n_items + item) * n_rows;
  for (int r = 0; r < RP; ++r) {
    const int row = own_row + r;
    if (row >= n_rows) continue;
    for (int k = 0; k < N; ++k) {
      const int d = (int)self % 16 + 16 * k;
      if (d < VALUES) parts[(at + row) * VALUES + d] = own[r][k];
    }
    if (self % 16 == 0) {
      sums[(at + row) * 2] = maximum[r];
      sums[(at + row) * 2 + 1] = sum[r];
    }
  }
)";
  return replaced(text, "mask_text", s.mask ? "mask" : "params");
}

std::vector<metal::TemplateArgument> prefill_arguments(const DecodeShape& s) {
  const PrefillShape p = prefill_shape(s);
  std::vector<metal::TemplateArgument> arguments = side_arguments(s);
  int turned = p.rows;  // rows that are rotated at a time, in the tile's memory
  while (turned * s.head_dim > tile_numbers(p)) turned /= 2;
  arguments.insert(arguments.end(), {{"ROWS", p.rows},
                                     {"RP", p.rows / kLanes},
                                     {"TURNED", turned},
                                     {"TOKENS", p.tokens},
                                     {"KSTRIDE", p.key_stride},
                                     {"VSTRIDE", p.value_stride},
                                     {"TILE", tile_numbers(p)},
                                     {"N", (s.value_rows() + 15) / 16}});
  return arguments;
}

}  // namespace veloxquant::attention
