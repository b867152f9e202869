#include "src/attention/decode_text.h"

#include <algorithm>
#include <map>
#include <mutex>

#include "src/attention/tile_text.h"
#include "src/backends/metal/source.h"

namespace veloxquant::attention {
namespace {

using metal::Kernel;

constexpr int kMaxRows = 8;  // of a tile: registers
constexpr int kThreadgroupBytes = 32 * 1024;

// Picks the array of an item among those of its kind.
std::string choice(const std::string& name, int n, const std::string& cast) {
  std::string text = cast + name + "0";
  for (int i = 1; i < n; ++i) {
    text = "source == " + std::to_string(i) + " ? " + cast + name + std::to_string(i) + " : (" +
           text + ")";
  }
  return text;
}

}  // namespace

int values_a_lane(int n_subvectors) {
  int lanes = 2;  // value_lanes of metal_pieces.h
  while (lanes < n_subvectors && lanes < 32) lanes *= 2;
  return (n_subvectors + lanes - 1) / lanes;
}

int query_numbers(const DecodeShape& s) {
  return s.n_spans > 0 ? std::max(s.key_rows(), s.value_rows()) : s.head_dim;
}

int tile_rows(const DecodeShape& s) {
  // Long queries (of a sketch) leave room for fewer: their numbers, 64 weights a simdgroup.
  const int tables = s.n_spans > 0 ? stage_bytes(s.keys) + stage_bytes(s.values) : 0;
  const int fit = (kThreadgroupBytes - tables) / (4 * (query_numbers(s) + 64 * kMaxSimdgroups));
  return std::min({kMaxRows, s.n_rows(), fit});
}

std::string exact_call_text(int array, const std::string& first, const std::string& count,
                            const std::string& position) {
  const std::string k = "ek" + std::to_string(array), v = "ev" + std::to_string(array);
  const auto row = [&](const std::string& name) {
    return name + " + (batch * " + name + "_strides[0] + head * " + name + "_strides[1] + " +
           first + " * " + name + "_strides[2]), " + name + "_strides[2]";
  };
  return "      veloxquant::attend_exact<DIM, ROWS, BFLOAT, SOFTCAP, MASK, NE>(\n          " +
         row(k) + ",\n          " + row(v) + ",\n          " + count + ", " + position +
         ", query, power + 64 * ROWS * simdgroup, cap, seen, query_of,\n          mask_text, "
         "mask_row, mask_step, own, maximum, sum, simdgroup, n_simdgroups, lane);\n";
}

std::string memory_text() {
  return R"(
  threadgroup float query[ROWS * QUERY_DIM];
  threadgroup float power[GROUPS * ROWS * 64];
)";
}

std::string group_text() {
  return
      R"(  const int head = (int)threadgroup_position_in_grid.y, batch = (int)threadgroup_position_in_grid.z;
  const int n_heads = (int)threadgroups_per_grid.y, n_queries = q_shape[2];
  const int group_size = q_shape[1] / n_heads, n_rows = n_queries * group_size;
  const int n_items = (int)threadgroups_per_grid.x / ((n_rows + ROWS - 1) / ROWS);
  const int item = (int)threadgroup_position_in_grid.x % n_items;
  const int first_row = (int)threadgroup_position_in_grid.x / n_items * ROWS;
  const uint self = thread_index_in_threadgroup, n_threads = threads_per_threadgroup.x;
  const int64_t head_queries = (int64_t)(batch * n_heads + head) * n_rows * DIM;
  const float factor = params[0] * M_LOG2E_F, cap = params[1];
)";
}

std::string plan_text() {
  return R"(  const int first = plan[6 * item + 2], position = plan[6 * item + 4], most = plan[6 * item + 3];
  const bool is_packed = plan[6 * item] == 0;
)";
}

std::string rows_text(bool mask) {
  std::string text =
      R"(  const uint lane = self % 32, simdgroup = self / 32, n_simdgroups = n_threads / 32;
  float maximum[ROWS], sum[ROWS];
  int query_of[ROWS];
  int64_t mask_row[ROWS];
  int seen_end = 0;
  for (int r = 0; r < ROWS; ++r) {
    const int row = min(first_row + r, n_rows - 1);
    seen_end = max(seen_end, veloxquant::end_of_seen(seen, row / group_size, is_packed));
    maximum[r] = -INFINITY;
    sum[r] = 0.0f;
    query_of[r] = row / group_size;
    mask_row[r] = )";
  text +=
      mask ? "batch * mask_strides[0] + (head * group_size + row % group_size) * mask_strides[1] "
             "+ query_of[r] * mask_strides[2]"
           : "0";
  return text +
         ";\n  }\n  const int count = min(most, max(0, seen_end - position));\n"
         "  const int64_t mask_step = " +
         std::string(mask ? "mask_strides[3]" : "0") + ";\n";
}

std::string sides_text(const DecodeShape& s, const std::string& blocks) {
  std::string text = table_text("k", s.keys) + table_text("v", s.values);
  if (s.key_transform == 2) {
    text +=
        "    veloxquant::load_queries<KROWS, ROWS>(q_codes + head_queries / DIM * KROWS, "
        "group_size, n_queries, first_row, n_rows, factor, params, false, query, self, "
        "n_threads);\n";
  } else {
    text += std::string(
                "    veloxquant::load_queries<DIM, ROWS>(q + head_queries, group_size, "
                "n_queries, first_row, n_rows, factor, ") +
            (s.key_transform == 1 ? "smooth + head * DIM, true" : "params, false") +
            ", query, self, n_threads);\n";
    if (s.key_transform == 1) {
      text += "    veloxquant::hadamard_rows<DIM>(query, ROWS, self, n_threads);\n";
    }
    if (s.key_transform == 3) {
      text +=
          "    for (uint r = 0; r < ROWS; r += TURNED) veloxquant::rotate_rows<DIM>(smooth, query "
          "+ r * "
          "DIM, power, TURNED, self, n_threads);\n";
    }
  }
  return text + "    veloxquant::barrier_of_group();\n" + tile_text("k", s.keys) +
         tile_text("v", s.values) + blocks;
}

std::string span_blocks_text(const DecodeShape& s) {
  const std::string block =
      "  const int64_t block = (int64_t)(batch * n_heads + head) * plan[6 * item + 5] + "
      "first;\n";
  const auto blocks_of = [&](const std::string& name, const std::string& side,
                             const CodeFormat& format) {
    const std::string type = std::string("const device ") + word_type(format) + "*";
    return "    " + type + " " + name + " = (" + choice(side, s.n_spans, "(" + type + ")") +
           ") + block * decltype(" + side + "_tile)::WORDS;\n" +
           (format.turned() ? "    " + side + "_tile.first = " + name + ";\n" : "");
  };
  return block + blocks_of("keys", "k", s.keys) + blocks_of("values", "v", s.values);
}

std::string packed_text(const std::string& dims) {
  return replaced(R"(    float own[ROWS][NP];
    int place[NP];
    const int pieces = OUT_DIM / VPIECE / decltype(v_tile)::KINDS;
    for (int k = 0; k < NP; ++k) {
      const int m = veloxquant::value_piece(k / VPIECE, pieces, (int)lane);
      place[k] = m >= 0 && (int)lane < veloxquant::value_lanes(pieces) ? m * VPIECE + k % VPIECE : -1;
      for (int r = 0; r < ROWS; ++r) own[r][k] = 0.0f;
    }
    veloxquant::attend_blocks<ROWS, SOFTCAP, MASK, NP>(
        k_tile, keys, v_tile, values, count, position, query, power + 64 * ROWS * simdgroup, cap, seen,
        query_of, mask_text, mask_row, mask_step, own, maximum, sum, simdgroup, n_simdgroups, lane);
    veloxquant::merge_simdgroups<ROWS, OUT_DIM, NP>(own, place, maximum, sum, query, power, simdgroup,
                                                n_simdgroups, lane);
)",
                  "OUT_DIM", dims);
}

std::string exact_text(const std::string& calls) {
  return
      R"(    veloxquant::load_queries<DIM, ROWS>(q + head_queries, group_size, n_queries, first_row, n_rows,
                                        factor, params, false, query, self, n_threads);
    veloxquant::barrier_of_group();
    float own[ROWS][NE];
    int place[NE];
    for (int k = 0; k < NE; ++k) {
      place[k] = (int)lane + 32 * k < DIM ? (int)lane + 32 * k : -1;
      for (int r = 0; r < ROWS; ++r) own[r][k] = 0.0f;
    }
)" + calls +
      R"(    veloxquant::merge_simdgroups<ROWS, DIM, NE>(own, place, maximum, sum, query, power, simdgroup,
                                                n_simdgroups, lane);
)";
}

std::string store_text(const std::string& dims, const std::string& own) {
  return replaced(
      replaced(
          R"(  const int64_t at = ((int64_t)(batch * n_heads + head) * n_items + item) * n_rows + first_row;
  for (uint i = self; i < ROWS * OUT_DIM; i += n_threads) {
    const int row = (int)i / (OUT_DIM), d = (int)i % (OUT_DIM), width = OWN_DIM;
    if (first_row + row < n_rows) parts[at * OUT_DIM + i] = d < width ? query[row * width + d] : 0.0f;
  }
  for (uint i = self; i < ROWS * 2; i += n_threads) {
    if (first_row + (int)(i / 2) < n_rows) sums[at * 2 + i] = power[i];
  }
)",
          "OUT_DIM", dims),
      "OWN_DIM", own);
}

// Bodies differ in which arrays there are: one kernel for each, built once.
const Kernel* kernel_once(const std::string& name, const std::vector<std::string>& inputs,
                          const std::vector<std::string>& outputs, const char* header,
                          const std::string& body, bool row_contiguous) {
  static std::mutex mutex;
  static std::map<std::string, Kernel> kernels;
  const std::lock_guard<std::mutex> lock(mutex);
  auto it = kernels.find(body);
  if (it == kernels.end()) {
    it = kernels
             .emplace(body, metal::make_kernel(name, inputs, outputs, header, body, row_contiguous))
             .first;
  }
  return &it->second;
}

std::vector<metal::TemplateArgument> side_arguments(const DecodeShape& s) {
  std::vector<metal::TemplateArgument> arguments = {
      {"DIM", s.head_dim},      {"BFLOAT", s.bfloat_cache ? 1 : 0}, {"SOFTCAP", s.softcap ? 1 : 0},
      {"MASK", s.mask ? 1 : 0}, {"QUERY_DIM", query_numbers(s)},    {"VALUES", s.value_rows()}};
  if (s.n_spans > 0) {
    add_tile_arguments("K", s.keys, s.key_rows(), arguments);
    add_tile_arguments("V", s.values, s.value_rows(), arguments);
  }
  return arguments;
}

std::vector<metal::TemplateArgument> first_pass_arguments(const DecodeShape& s) {
  std::vector<metal::TemplateArgument> arguments = side_arguments(s);
  arguments.insert(arguments.end(), {{"ROWS", tile_rows(s)},
                                     {"TURNED", tile_rows(s)},
                                     {"GROUPS", kMaxSimdgroups},
                                     {"NE", (s.head_dim + 31) / 32}});
  if (s.n_spans > 0) {
    const int piece = piece_dims(s.values), kinds = s.value_rows() / s.head_dim;
    arguments.push_back({"VPIECE", piece});
    arguments.push_back({"NP", kinds * values_a_lane(s.head_dim / piece) * piece});
  }
  return arguments;
}

}  // namespace veloxquant::attention
