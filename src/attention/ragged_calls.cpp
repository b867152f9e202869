#include "src/attention/ragged_calls.h"

#include <algorithm>
#include <climits>
#include <tuple>

#include "src/attention/decode_text.h"
#include "src/attention/tile_text.h"

namespace veloxquant::attention {
namespace {

using metal::Call;
using metal::Type;

const char* const kHeader = "src/attention/metal_ragged.h";
constexpr int kExactItem = 256, kLeastBlocks = 4;  // as in metal_ragged.h
constexpr int kMaxItems = 1024;                    // the second pass walks them

// Block 0 of the item: keys and values of one kind, since attend_blocks takes one.
std::string blocks_text(const RaggedShape& s) {
  const std::string kind =
      s.paged ? "veloxquant::PagedBlocks<const device uint32_t*, const device int*>"
              : "veloxquant::StridedBlocks<const device uint32_t*>";
  std::string text;
  for (const auto& [name, array, at] :
       {std::tuple{"keys", "k0", 0}, std::tuple{"values", "v0", 3}}) {
    const auto step = [&, first = at](int i) { return "steps[" + std::to_string(first + i) + "]"; };
    text += "    " + kind + " " + name + ";\n    " + name + ".base = (const device uint32_t*)" +
            array + " + head * " + step(1);
    if (s.paged) {
      text += ";\n    " + std::string(name) + ".table = table + (int64_t)batch * " +
              "ragged[veloxquant::kTableStep] + first;\n    " + name +
              ".pool = ragged[veloxquant::kPool]";
    } else {
      text += " + batch * " + step(0) + " + first * " + step(2);
    }
    text += ";\n    " + std::string(name) + ".step = " + step(2) + ";\n";
  }
  return text;
}

std::string body(const RaggedShape& ragged) {
  const DecodeShape& s = ragged.decode;
  std::string text = memory_text();
  if (s.n_spans > 0) text += stage_text("k", s.keys) + stage_text("v", s.values);
  // Exact tokens first: what is left for a second wave is then short of them.
  text += group_text(s.n_spans > 0 ? "ragged[veloxquant::kPackedItems]" : "0") + R"(
  threadgroup int seen[4 * 16];
)";
  // Lengths beyond what there is room for must not be followed.
  text +=
      std::string("  const int packed_tokens = ") +
      (s.n_spans > 0 ? "clamp((int)n_packed[batch], 0, (int)ragged[veloxquant::kMostPacked])"
                     : "0") +
      ";\n  const int exact_tokens = " +
      (s.n_exact > 0 ? "clamp((int)n_exact[batch], 0, (int)ragged[veloxquant::kMostExact])" : "0") +
      R"(;
  veloxquant::ragged_seen(ragged, packed_tokens, exact_tokens, n_queries, seen, self, n_threads);
  const veloxquant::RaggedItem it =
      veloxquant::ragged_item(ragged, item, packed_tokens, exact_tokens, seen[0]);
  const int first = it.first, most = it.count, position = it.position;
  const bool is_packed = it.packed;
  if (most + it.sinks == 0) {
    const int64_t none = ((int64_t)(batch * n_heads + head) * n_items + item) * n_rows + first_row;
    for (uint i = self; i < ROWS * 2; i += n_threads) {
      if (first_row + (int)(i / 2) < n_rows) sums[none * 2 + i] = i % 2 == 0 ? -INFINITY : 0.0f;
    }
    return;
  }
)" + rows_text(s.mask);
  text += s.n_spans > 0 ? "  if (is_packed) {\n" + sides_text(s, blocks_text(ragged)) +
                              packed_text("DIM") + "  } else {\n"
                        : "  {\n";
  if (s.n_exact > 0) {
    text += exact_text(R"(    for (int part = 0; part < 2; ++part) {
      const int token = part == 0 ? 0 : first, tokens = part == 0 ? it.sinks : count;
)" + exact_call_text(0, "token", "tokens", "(part == 0 ? 0 : position)") +
                       "    }\n");
  }
  text += "  }\n" + store_text("DIM");
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

int divide_up(int64_t n, int64_t d) { return static_cast<int>((n + d - 1) / d); }

// Threadgroups of a multiprocessor: what 128 registers a thread leave, or 168 for more rows.
int at_once(const DecodeShape& s) { return tile_rows(s) > 4 ? 3 : 4; }

int tiles_of(const DecodeShape& s) { return divide_up(s.n_rows(), tile_rows(s)); }

}  // namespace

RaggedItems ragged_items(const RaggedShape& ragged, int cores) {
  const DecodeShape& s = ragged.decode;
  RaggedItems items;
  if (s.n_spans > 0) {
    const int64_t groups = int64_t{s.batch} * s.n_kv_heads * tiles_of(s);
    const int wanted =
        static_cast<int>(std::clamp<int64_t>(at_once(s) * cores / groups, 1, kMaxItems));
    const int blocks = divide_up(ragged.most_packed, kBlockTokens);
    items.packed = std::clamp(divide_up(blocks, kLeastBlocks), 1, wanted);
  }
  if (s.n_exact > 0) {
    items.exact = std::max(divide_up(ragged.most_exact - ragged.sinks, kExactItem), 1);
  }
  return items;
}

std::array<int32_t, kRaggedCount> ragged_numbers(const RaggedShape& s, const RaggedItems& items) {
  const auto held = [](int64_t n) { return static_cast<int32_t>(std::min<int64_t>(n, INT_MAX)); };
  return {held(s.most_packed),
          held(s.most_exact),
          s.sinks,
          items.packed,
          s.causal ? 1 : 0,
          s.window,
          held(s.table_step),
          s.pool};
}

Call ragged_first_pass_call(const RaggedShape& ragged, const RaggedItems& items) {
  const DecodeShape& s = ragged.decode;
  Call call;
  call.kernel = kernel_once("vq_decode_ragged", inputs_of(ragged), {"parts", "sums"}, kHeader,
                            body(ragged), false);
  call.launch.arguments = first_pass_arguments(s);
  const int threads = 32 * kMaxSimdgroups, n = items.all();
  call.launch.grid = {n * tiles_of(s) * threads, s.n_kv_heads, s.batch};
  call.launch.threadgroup = {threads, 1, 1};
  call.launch.at_once = at_once(s);
  call.launch.outputs = {{Type::float32, {s.batch, s.n_kv_heads, n, s.n_rows(), s.head_dim}},
                         {Type::float32, {s.batch, s.n_kv_heads, n, s.n_rows(), 2}}};
  return call;
}

}  // namespace veloxquant::attention
