#include "src/codecs/rabitq/kernel_calls.h"

#include <algorithm>

#include "src/backends/metal/source.h"
#include "src/codecs/kernel_calls.h"
#include "src/codecs/rabitq/levels.h"
#include "src/codecs/registry.h"

namespace veloxquant::rabitq {
namespace {

using metal::Call;
using metal::Kernel;
using metal::make_kernel;
using metal::Type;

const char* const kBlocks = "src/codecs/rabitq/metal_blocks.h";
constexpr int kThreads = 256;

std::vector<metal::TemplateArgument> arguments_of(const BlockKernelShape& s) {
  return {{"DIM", s.dim}, {"BITS", s.bits}, {"MEAN", s.mean ? 1 : 0}};
}

}  // namespace

BlockKernelShape block_shape_of(const CodecSpec& spec, bool has_mean) {
  static const CodecTables none;
  SpecReader reader(spec, none);
  BlockKernelShape s;
  s.heads = spec.n_kv_heads;
  s.dim = spec.head_dim;
  s.bits = static_cast<int>(reader.integer("bits", 1, kMaxBits));
  s.scale =
      static_cast<RabitqScale>(reader.choice("scale", {"unbiased", "reconstruction", "norm"}));
  s.mean = has_mean;
  return s;
}

std::optional<std::string> no_kernel_because(const BlockKernelShape& s) {
  if (s.dim > 256) return "head_dim above 256";
  return std::nullopt;
}

Call encode_blocks_call(const BlockKernelShape& s) {
  static const Kernel kernel =
      make_kernel("vq_rabitq_encode_blocks", {"x", "signs", "mean"}, {"blocks"}, kBlocks, R"(
  threadgroup float rows[8 * DIM];
  threadgroup float moved[8 * DIM];
  threadgroup float trials[8 * veloxquant::kStepTrials];
  threadgroup float steps[8];
  threadgroup float sums[24];
  veloxquant::rabitq_encode_blocks<DIM, BITS, SCALE, MEAN>(
      x, x_shape[2], x_shape[1], (int)threadgroups_per_grid.y, signs, mean, blocks, rows, moved,
      trials, steps, sums, threadgroup_position_in_grid, thread_index_in_threadgroup,
      threads_per_threadgroup.x);)");
  Call call{&kernel, {}};
  call.launch.arguments = arguments_of(s);
  call.launch.arguments.push_back({"SCALE", static_cast<int>(s.scale)});
  metal::set_encode_grid(call, s.batch, s.heads, s.n_blocks(), s.block_bytes());
  return call;
}

Call decode_blocks_call(const BlockKernelShape& s) {
  static const Kernel kernel =
      make_kernel("vq_rabitq_decode_blocks", {"blocks", "mean"}, {"out"}, kBlocks, R"(
  veloxquant::rabitq_decode_blocks<DIM, BITS, MEAN>(
      (const device uint32_t*)blocks, blocks_shape[2], blocks_shape[1], mean, out,
      thread_position_in_grid);)");
  Call call{&kernel, {}};
  call.launch.arguments = arguments_of(s);
  metal::set_decode_grid(call, s.batch, s.heads, s.n_blocks(), s.dim);
  return call;
}

Call encode_rows_call(int n, int dim) {
  static const Kernel kernel =
      make_kernel("vq_rabitq_encode_rows", {"x", "signs"}, {"codes", "factors"}, kBlocks, R"(
  threadgroup float rows[ROWS * DIM];
  threadgroup float moved[ROWS * DIM];
  veloxquant::rabitq_encode_rows<DIM, ROWS>(
      x, x_shape[0], signs, codes, factors, rows, moved, threadgroup_position_in_grid.x,
      thread_index_in_threadgroup, threads_per_threadgroup.x);)");
  const int rows = std::clamp(2048 / dim, 1, 8);
  Call call{&kernel, {}};
  call.launch.arguments = {{"DIM", dim}, {"ROWS", rows}};
  call.launch.grid = {(n + rows - 1) / rows * kThreads, 1, 1};
  call.launch.threadgroup = {kThreads, 1, 1};
  call.launch.outputs = {{Type::uint8, {n, dim / 8}}, {Type::float32, {n}}};
  return call;
}

Call popcount_queries_call(int rows, int dim, int query_bits) {
  static const Kernel kernel =
      make_kernel("vq_popcount_queries", {"q", "signs"}, {"planes", "numbers"},
                  "src/codecs/rabitq/metal.h", R"(
  threadgroup float rows[ROWS * DIM];
  threadgroup float moved[ROWS * DIM];
  threadgroup float ranges[ROWS * 2];
  veloxquant::popcount_queries<DIM, ROWS>(
      q, q_shape[0], signs, QUERY_BITS, planes, numbers, rows, moved, ranges,
      threadgroup_position_in_grid.x, thread_index_in_threadgroup, threads_per_threadgroup.x);)");
  const int tile = std::clamp(2048 / dim, 1, 8);
  Call call{&kernel, {}};
  call.launch.arguments = {{"DIM", dim}, {"ROWS", tile}, {"QUERY_BITS", query_bits}};
  call.launch.grid = {(rows + tile - 1) / tile * kThreads, 1, 1};
  call.launch.threadgroup = {kThreads, 1, 1};
  call.launch.outputs = {{Type::uint8, {rows, query_bits, dim / 8}}, {Type::float32, {rows, 4}}};
  return call;
}

Call popcount_scores_call(int rows, int group, int n, int dim) {
  static const Kernel kernel =
      make_kernel("vq_popcount_scores", {"planes", "numbers", "codes", "factors"}, {"scores"},
                  "src/codecs/rabitq/metal.h", R"(
  veloxquant::popcount_scores<DIM>(planes, numbers, planes_shape[1], codes, factors,
                                   threads_per_grid.x, GROUP, scores, thread_position_in_grid);)");
  Call call{&kernel, {}};
  call.launch.arguments = {{"DIM", dim}, {"GROUP", group}};
  call.launch.grid = {n, rows, 1};
  call.launch.threadgroup = {kThreads, 1, 1};
  call.launch.outputs = {{Type::float32, {rows, n}}};
  return call;
}

}  // namespace veloxquant::rabitq
