#include "src/codecs/rope/kernel_calls.h"

#include <algorithm>

#include "src/backends/metal/source.h"
#include "src/codecs/rope/kernels.h"

namespace veloxquant::rope {
namespace {

using metal::Call;
using metal::Kernel;
using metal::make_kernel;
using metal::Type;

const char* const kHeader = "src/codecs/rope/metal.h";

Call slot_call(const Kernel& kernel, const SlotShape& s) {
  Call call{&kernel, {}};
  call.launch.arguments = {{"DIM", s.dim}, {"ROTATING", s.rotating}, {"PLANES", s.planes ? 1 : 0}};
  call.launch.grid = {s.dim / 2, s.n_tokens, s.batch * s.heads};
  call.launch.threadgroup = {std::min(s.dim / 2, 256), 1, 1};
  call.launch.outputs = {{Type::float32, {s.batch, s.heads, s.n_tokens, s.dim}}};
  return call;
}

}  // namespace

std::vector<int32_t> slot_numbers(const Rope& rope, const std::vector<int32_t>& order) {
  std::vector<int32_t> numbers;
  for (int32_t pair : order) {
    const RopePair& dims = rope.pairs()[pair];
    numbers.insert(numbers.end(), {pair, dims.first, dims.second});
  }
  return numbers;
}

BlockTables block_tables(const Rope& rope, RopeDirection direction, int64_t first, int n_blocks) {
  const size_t size = static_cast<size_t>(rope.spec().rotary_dims()) / 2 * kTokens;
  BlockTables tables{std::vector<float>(std::max<size_t>(1, size * n_blocks)),
                     std::vector<float>(std::max<size_t>(1, size * n_blocks))};
  for (int block = 0; block < n_blocks && size > 0; ++block) {
    int64_t positions[kTokens];
    for (int t = 0; t < kTokens; ++t) positions[t] = first + int64_t{kTokens} * block + t;
    rope.tables(Backend::reference, direction, positions, tables.cosines.data() + size * block,
                tables.sines.data() + size * block);
  }
  return tables;
}

std::vector<float> turn_numbers(const Rope& rope, const std::vector<int32_t>& order) {
  const RopeSpec& spec = rope.spec();
  std::vector<float> numbers = {spec.position_scale};
  for (int32_t pair : order) {
    const bool rotates = pair < static_cast<int32_t>(spec.inv_freq.size());
    numbers.push_back(rotates ? spec.inv_freq[pair] : 0.0f);
    numbers.push_back(rotates ? spec.attention_factor : 1.0f);
  }
  return numbers;
}

std::vector<float> slot_queries(const Rope& rope, const std::vector<int32_t>& order,
                                const std::vector<float>& inverse_weights) {
  const size_t dim = rope.spec().head_dim, pairs = dim / 2;
  std::vector<float> matrix(order.size() / pairs * dim * dim, 0.0f);
  for (size_t i = 0; i < order.size(); ++i) {
    const RopePair& dims = rope.pairs()[order[i]];
    float* head = matrix.data() + i / pairs * dim * dim;
    head[dims.first * dim + 2 * (i % pairs)] = inverse_weights[i];
    head[dims.second * dim + 2 * (i % pairs) + 1] = inverse_weights[i];
  }
  return matrix;
}

Call to_slots_call(const SlotShape& s) {
  static const Kernel kernel = make_kernel(
      "vq_rope_to_slots", {"x", "slots", "weights", "cosines", "sines"}, {"z"}, kHeader, R"(
  veloxquant::rope_to_slots<DIM, ROTATING, PLANES>(x, x_shape[2], x_shape[1], slots, weights, cosines,
                                                   sines, z, thread_position_in_grid);)");
  return slot_call(kernel, s);
}

Call from_slots_call(const SlotShape& s) {
  static const Kernel kernel = make_kernel(
      "vq_rope_from_slots", {"z", "slots", "weights", "cosines", "sines"}, {"y"}, kHeader, R"(
  veloxquant::rope_from_slots<DIM, ROTATING, PLANES>(z, z_shape[2], z_shape[1], slots, weights,
                                                     cosines, sines, y, thread_position_in_grid);)");
  return slot_call(kernel, s);
}

}  // namespace veloxquant::rope
