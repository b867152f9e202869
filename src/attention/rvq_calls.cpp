#include "src/attention/rvq_calls.h"

#include <algorithm>

#include "src/attention/decode_text.h"
#include "src/attention/tile_text.h"
#include "src/backends/metal/source.h"

namespace veloxquant::attention {
namespace {

using metal::Call;
using metal::Type;

constexpr int kMaxSubDim = 16, kMaxTable = 2048;  // value table: numbers in threadgroup memory

std::string body_text(bool mask) {
  const std::string text = memory_text() + R"(
  threadgroup float first_table[N1];
  threadgroup float second_table[N2];
  threadgroup float vectors[C * VPIECE];
)" + group_text() + plan_text() +
                           rows_text(mask) +
                           R"(
  for (uint i = self; i < N1; i += n_threads) first_table[i] = centroids1[i];
  for (uint i = self; i < N2; i += n_threads) second_table[i] = centroids2[i];
  for (uint i = self; i < C * VPIECE; i += n_threads) vectors[i] = value_table[i];
  veloxquant::load_queries<DIM, ROWS>(q + head_queries, group_size, n_queries, first_row, n_rows,
                                      factor, params, false, query, self, n_threads);
  veloxquant::barrier_of_group();
  const int tokens = keys1_shape[2];
  const int64_t plane = (int64_t)(batch * n_heads + head) * tokens;
  veloxquant::StagedBytesTile<DIM, N1, N2, decltype(keys1 + 0), decltype(&first_table[0]),
                              decltype(norms + 0)> k_tile;
  k_tile.stage1 = keys1 + plane * DIM;
  k_tile.stage2 = keys2 + plane * DIM;
  k_tile.table1 = first_table;
  k_tile.table2 = second_table;
  k_tile.norms = norms + (NORMS ? plane : 0);
  k_tile.has_norms = NORMS != 0;
  k_tile.last = tokens - 1;
  veloxquant::VectorBytesTile<M, VPIECE, C, decltype(keys1 + 0), decltype(&vectors[0])> v_tile;
  v_tile.values = code_values + plane * M;
  v_tile.table = vectors;
  v_tile.last = tokens - 1;
  decltype(keys1 + 0) keys = k_tile.stage1 + (int64_t)first * 64 * DIM;
  decltype(keys1 + 0) values = v_tile.values + (int64_t)first * 64 * M;
)" + packed_text("M * VPIECE") +
                           store_text("(M * VPIECE)", "M * VPIECE");
  return replaced(text, "mask_text", mask ? "mask" : "params");
}

}  // namespace

DecodeShape RvqShape::decode() const {
  DecodeShape s;
  s.batch = batch, s.n_kv_heads = n_kv_heads, s.group = group, s.n_queries = n_queries;
  s.head_dim = n_subvectors * sub_dim;
  s.out = Type::float16;
  return s;
}

std::optional<std::string> no_rvq_kernel_because(const RvqShape& s) {
  const int out_dim = s.n_subvectors * s.sub_dim;
  if (s.n_queries > kMaxDecodeQueries) {
    return "more than " + std::to_string(kMaxDecodeQueries) + " queries";
  }
  if (s.dim % 4 != 0 || s.dim > kMaxDecodeDim) {
    return "D must be a multiple of 4 up to " + std::to_string(kMaxDecodeDim);
  }
  if (out_dim < 1 || out_dim > kMaxDecodeDim) {
    return "values of more than " + std::to_string(kMaxDecodeDim) + " dimensions";
  }
  if (s.sub_dim > kMaxSubDim || s.n_values * s.sub_dim > kMaxTable) {
    return "a value table of more than " + std::to_string(kMaxTable) + " numbers";
  }
  // MLX binds fewer than 8 elements as `constant`: the arrays of codes must be of one kind.
  const int64_t codes = int64_t{s.batch} * s.n_kv_heads * s.n_tokens;
  if (codes * std::min(s.dim, s.n_subvectors) < 8) return "fewer than 8 codes";
  return std::nullopt;
}

std::string rvq_limits() {
  return "D a multiple of 4 up to " + std::to_string(kMaxDecodeDim) + ", up to " +
         std::to_string(kMaxDecodeQueries) + " queries, value tables of up to " +
         std::to_string(kMaxTable) + " numbers";
}

Call rvq_pass_call(const RvqShape& s, int n_items) {
  std::vector<std::string> inputs = {"q",          "keys1",      "keys2",       "code_values",
                                     "centroids1", "centroids2", "value_table", "norms",
                                     "plan",       "seen",       "params"};
  if (s.mask) inputs.push_back("mask");
  const DecodeShape shape = s.decode();
  const int rows = tile_rows(shape), tiles = (shape.n_rows() + rows - 1) / rows;
  Call call;
  call.kernel = kernel_once("vq_rvq_items", inputs, {"parts", "sums"}, "src/attention/metal_rvq.h",
                            body_text(s.mask), false);
  call.launch.arguments = {{"DIM", s.dim},
                           {"ROWS", rows},
                           {"GROUPS", kMaxSimdgroups},
                           {"QUERY_DIM", std::max(s.dim, shape.head_dim)},
                           {"N1", s.n_centroids1},
                           {"N2", s.n_centroids2},
                           {"M", s.n_subvectors},
                           {"C", s.n_values},
                           {"VPIECE", s.sub_dim},
                           {"NP", values_a_lane(s.n_subvectors) * s.sub_dim},
                           {"NORMS", s.norms ? 1 : 0},
                           {"SOFTCAP", 0},
                           {"MASK", s.mask ? 1 : 0}};
  const int threads = 32 * kMaxSimdgroups;
  call.launch.grid = {n_items * tiles * threads, s.n_kv_heads, s.batch};
  call.launch.threadgroup = {threads, 1, 1};
  const int64_t n_rows = shape.n_rows();
  call.launch.outputs = {{Type::float32, {s.batch, s.n_kv_heads, n_items, n_rows, shape.head_dim}},
                         {Type::float32, {s.batch, s.n_kv_heads, n_items, n_rows, 2}}};
  return call;
}

}  // namespace veloxquant::attention
