#include "src/attention/kernel_calls.h"

#include <algorithm>

#include "src/attention/decode_text.h"
#include "src/attention/prefill_text.h"
#include "src/attention/tile_text.h"
#include "src/backends/metal/source.h"

namespace veloxquant::attention {
namespace {

using metal::Call;
using metal::Type;

const char* const kHeader = "src/attention/metal_decode.h";
const char* const kPrefillHeader = "src/attention/metal_prefill.h";
constexpr int kThreadgroupsACore = 8;
constexpr int kMaxItemBlocks = 64;
constexpr int kMergeSlices = 4;  // of the items of a row, merged side by side
constexpr int kMaxBuffers = 31;  // that a Metal function takes

std::string numbered(const char* name, int i) { return name + std::to_string(i); }

std::string first_pass_body(const DecodeShape& s) {
  std::string text = memory_text();
  if (s.n_spans > 0) text += stage_text("k", s.keys) + stage_text("v", s.values);
  text += group_text() + plan_text() + rows_text(s.mask);
  if (s.n_exact > 0) text += "  const int source = plan[6 * item + 1];\n";
  if (s.n_spans > 0) {
    text += "  if (is_packed) {\n" + sides_text(s, span_blocks_text(s)) + packed_text("VALUES") +
            "  } else {\n";
  } else {
    text += "  {\n";
  }
  std::string calls;
  for (int i = 0; i < s.n_exact; ++i) {
    calls += "      if (source == " + std::to_string(i) + ")\n" +
             exact_call_text(i, "first", "count", "position");
  }
  text += (calls.empty() ? calls : exact_text(calls)) + "  }\n" +
          store_text("VALUES", "is_packed ? VALUES : DIM");
  // Without a mask the parameter is any pointer.
  return replaced(text, "mask_text", s.mask ? "mask" : "params");
}

std::vector<std::string> first_pass_inputs(const DecodeShape& s) {
  std::vector<std::string> inputs = {"q"};
  if (s.n_spans > 0 && s.key_transform == 2) inputs.push_back("q_codes");
  inputs.insert(inputs.end(), {"plan", "seen", "params"});
  if (s.n_spans > 0) inputs.insert(inputs.end(), {"smooth", "k_tables", "v_tables"});
  for (int i = 0; i < s.n_spans; ++i) {
    inputs.push_back(numbered("k", i));
    inputs.push_back(numbered("v", i));
  }
  for (int i = 0; i < s.n_exact; ++i) {
    inputs.push_back(numbered("ek", i));
    inputs.push_back(numbered("ev", i));
  }
  if (s.mask) inputs.push_back("mask");
  return inputs;
}

// Query rows of a threadgroup of the first pass.
int shared_rows(const DecodeShape& s) {
  const int rows = prefill_shape(s).rows;
  return rows > 0 ? rows : tile_rows(s);
}

}  // namespace

std::optional<std::string> no_decode_kernel_because(const DecodeShape& s) {
  if (s.head_dim % 8 != 0 || s.head_dim > kMaxDecodeDim) {
    return "head_dim must be a multiple of 8 up to " + std::to_string(kMaxDecodeDim);
  }
  if (s.n_queries > kMaxDecodeQueries) {
    return "more than " + std::to_string(kMaxDecodeQueries) + " queries";
  }
  for (const CodeFormat* f : {&s.keys, &s.values}) {
    if (s.n_spans == 0) continue;
    if (f->sub_dim > kMaxDecodeSubDim) {
      return "sub-vectors of more than " + std::to_string(kMaxDecodeSubDim) + " dimensions";
    }
    if (f->n_rows > 0 && (f->mean || f == &s.values)) return "a sketch of values, or with a mean";
  }
  if (s.key_rows() > kMaxKeyRows) {
    return "queries of more than " + std::to_string(kMaxKeyRows) + " numbers (signs of a sketch)";
  }
  if (s.key_rows() != s.head_dim && s.key_transform != 2) return "a sketch without its queries";
  // Each exact array brings its strides as buffers of their own, a span two arrays.
  const int buffers =
      12 + (s.key_transform == 2 ? 1 : 0) + 2 * s.n_spans + 4 * s.n_exact + (s.mask ? 2 : 0);
  if (buffers > kMaxBuffers) return "more arrays than a Metal function takes";
  return std::nullopt;
}

std::string decode_limits() {
  return "head_dim a multiple of 8 up to " + std::to_string(kMaxDecodeDim) +
         ", sub-vectors of up to " + std::to_string(kMaxDecodeSubDim) +
         ", sketches of qjl (with outliers: and head_dim) up to " + std::to_string(kMaxKeyRows);
}

std::vector<int32_t> seen_numbers(const Visibility& v, const AttentionMask& mask,
                                  int64_t first_query, int64_t n_queries, int64_t length) {
  std::vector<int32_t> seen;
  const bool both = v.n_new_blocks > 0;  // forms of a token
  for (int64_t t = first_query; t < first_query + n_queries; ++t) {
    const int64_t window = mask.sliding_window;
    for (int64_t number : {window > 0 ? std::max<int64_t>(0, t + 1 - window) : 0,
                           mask.causal ? std::min(length, t + 1) : length,
                           both ? v.code_end(t) : INT32_MAX, both ? v.tail_start : INT32_MAX}) {
      seen.push_back(static_cast<int32_t>(number));
    }
  }
  return seen;
}

Stretch seen_part(const Stretch& stretch, const std::vector<int32_t>& seen) {
  int begin = INT32_MAX, end = 0;
  for (size_t q = 0; q + 3 < seen.size(); q += 4) {
    begin = std::min(begin, seen[q]);
    end = std::max(end, stretch.packed ? std::min(seen[q + 1], seen[q + 2]) : seen[q + 1]);
  }
  Stretch part = stretch;
  int skipped = std::clamp(begin - part.position, 0, part.count);
  if (part.packed) skipped -= skipped % kBlockTokens;
  part.first += part.packed ? skipped / kBlockTokens : skipped;
  part.position += skipped;
  part.count = std::clamp(end - part.position, 0, part.count - skipped);
  return part;
}

int metal_cores(const std::string& architecture) {
  switch (architecture.starts_with("applegpu_") ? architecture.back() : ' ') {
    case 'p':
      return 6;
    case 's':
    case 'c':
      return 40;
    case 'd':
      return 80;
    default:
      return 20;
  }
}

std::vector<Item> plan_items(const DecodeShape& s, const std::vector<Stretch>& stretches, int cores,
                             int least_blocks) {
  int64_t blocks = 0;
  for (const Stretch& stretch : stretches) {
    if (stretch.packed) blocks += (stretch.count + kBlockTokens - 1) / kBlockTokens;
  }
  const int64_t tiles = (s.n_rows() + shared_rows(s) - 1) / shared_rows(s);
  const int64_t groups = static_cast<int64_t>(s.batch) * s.n_kv_heads * tiles;
  const int64_t wanted = (int64_t{kThreadgroupsACore} * cores + groups - 1) / groups;
  const int64_t each =
      std::clamp<int64_t>(blocks / std::max<int64_t>(wanted, 1), least_blocks, kMaxItemBlocks);
  const int64_t each_exact = wanted > 1 ? kMaxSimdgroups : kMaxItemBlocks;
  std::vector<Item> items;
  for (bool packed : {true, false}) {
    for (const Stretch& stretch : stretches) {
      if (stretch.packed != packed) continue;
      const int step = static_cast<int>((packed ? each : each_exact) * kBlockTokens);
      for (int done = 0; done < stretch.count; done += step) {
        Item item = stretch;
        item.first += packed ? done / kBlockTokens : done;
        item.position += done;
        item.count = std::min(step, stretch.count - done);
        items.push_back(item);
      }
    }
  }
  return items;
}

Call turn_queries_call(const DecodeShape& s, int matrices) {
  static const metal::Kernel kernel = metal::make_kernel(
      "vq_turn_queries", {"q", "matrix"}, {"q_codes"}, "src/attention/metal_queries.h", R"(
  veloxquant::turn_query<DIM>(q, matrix, MATRICES, HEADS, GROUP, q_codes, thread_position_in_grid,
                              threads_per_grid);)");
  Call call{&kernel, {}};
  call.launch.arguments = {
      {"DIM", s.head_dim}, {"MATRICES", matrices}, {"HEADS", s.n_kv_heads}, {"GROUP", s.group}};
  const int q_heads = s.n_kv_heads * s.group, rows = s.key_rows();
  call.launch.grid = {rows, s.n_queries, s.batch * q_heads};
  call.launch.threadgroup = {std::min(rows, 256), 1, 1};
  call.launch.outputs = {{Type::float32, {s.batch, q_heads, s.n_queries, rows}}};
  return call;
}

Call first_pass_call(const DecodeShape& s, int n_items) {
  Call call;
  const bool prefill = prefill_shape(s).rows > 0;
  call.kernel = prefill ? kernel_once("vq_prefill_items", first_pass_inputs(s), {"parts", "sums"},
                                      kPrefillHeader, prefill_body(s), false)
                        : kernel_once("vq_decode_items", first_pass_inputs(s), {"parts", "sums"},
                                      kHeader, first_pass_body(s), false);
  const int rows = shared_rows(s), tiles = (s.n_rows() + rows - 1) / rows;
  call.launch.arguments = prefill ? prefill_arguments(s) : first_pass_arguments(s);
  const int threads = 32 * kMaxSimdgroups;
  call.launch.grid = {n_items * tiles * threads, s.n_kv_heads, s.batch};
  call.launch.threadgroup = {threads, 1, 1};
  call.launch.outputs = {
      {Type::float32, {s.batch, s.n_kv_heads, n_items, s.n_rows(), s.value_rows()}},
      {Type::float32, {s.batch, s.n_kv_heads, n_items, s.n_rows(), 2}}};
  return call;
}

Call second_pass_call(const DecodeShape& s) {
  Call call;
  call.kernel = kernel_once("vq_decode_merge", {"parts", "sums", "counts", "sinks", "inverse"},
                            {"out", "lse"}, kHeader, R"(
  threadgroup float packed[SLICES * VALUES];
  threadgroup float exact[SLICES * VALUES];
  threadgroup float weights[SLICES * STRIDE];
  threadgroup float moved[DIM];
  threadgroup float partial[32];
  const uint self = thread_index_in_threadgroup, n_threads = threads_per_threadgroup.x;
  const int row = (int)threadgroup_position_in_grid.y, n_rows = (int)threadgroups_per_grid.y;
  const int64_t plane = threadgroup_position_in_grid.z;
  const int n_items = counts[0], group_size = counts[2], head = (int)(plane % HEADS);
  const int in_group = row % group_size, query = row / group_size;
  float maximum, total;
  veloxquant::merge_items<VALUES, STRIDE, SLICES>(
                               parts + plane * n_items * n_rows * VALUES, sums + plane * n_items * n_rows * 2,
                               n_items, counts[1], n_rows, row,
                               SINKS ? (float)sinks[head * group_size + in_group] * M_LOG2E_F : -INFINITY,
                               packed, exact, weights, partial, &maximum, &total, self, n_threads);
  if (TRANSFORM == 1) veloxquant::hadamard_rows<DIM>(packed, 1, self, n_threads);
  if (VALUES > DIM) {  // sums of signs, through the sketch behind the rotation
    veloxquant::multiply_row_transposed<DIM>(inverse + 2 * DIM, packed + DIM, moved, self, n_threads);
    for (uint d = self; d < DIM; d += n_threads) packed[d] += moved[d];
    veloxquant::barrier_of_group();
  }
  if (TRANSFORM == 3) {
    veloxquant::rotate_rows_back<DIM>(inverse, packed, moved, 1, self, n_threads);
  }
  if (TRANSFORM == 2) {
    veloxquant::multiply_row<DIM>(inverse + (int64_t)head * DIM * DIM, packed, moved, self, n_threads);
  }
  if (TRANSFORM == 4) {
    veloxquant::multiply_row_transposed<DIM>(inverse + (int64_t)head * DIM * DIM, packed, moved, self, n_threads);
  }
  const int64_t out_row = (plane * group_size + in_group) * (n_rows / group_size) + query;
  for (uint d = self; d < DIM; d += n_threads) {
    float value = TRANSFORM == 2 || TRANSFORM == 4 ? moved[d] : packed[d];
    if (TRANSFORM == 1) value = value * inverse[head * DIM + d];
    value = total > 0.0f ? (value + exact[d]) / total : total;  // 0: nothing seen; NaN
    out[out_row * DIM + d] = veloxquant::Narrow<OUT>::of(value);
  }
  if (self == 0) lse[out_row] = total > 0.0f ? (maximum + log2(total)) * M_LN2_F : total == total ? -INFINITY : total;
)",
                            true);
  const int stride = (s.value_rows() + 31) / 32 * 32;
  const int slices = std::min(kMergeSlices, 1024 / stride), threads = slices * stride;
  call.launch.arguments = {{"DIM", s.head_dim},
                           {"VALUES", s.value_rows()},
                           {"STRIDE", stride},
                           {"SLICES", slices},
                           {"HEADS", s.n_kv_heads},
                           {"SINKS", s.sinks ? 1 : 0},
                           {"TRANSFORM", s.n_spans > 0 ? s.value_transform : 0},
                           {"OUT", s.out}};
  call.launch.grid = {threads, s.n_rows(), s.batch * s.n_kv_heads};
  call.launch.threadgroup = {threads, 1, 1};
  const int n_q_heads = s.n_kv_heads * s.group;
  call.launch.outputs = {{s.out, {s.batch, n_q_heads, s.n_queries, s.head_dim}},
                         {Type::float32, {s.batch, n_q_heads, s.n_queries}}};
  return call;
}

}  // namespace veloxquant::attention
