// Codecs of keys before RoPE for the GPU: commvq, vecinfer_rope. RoPE is undone before encoding and
// redone behind decoding by kernels of their own; attention turns keys as it reads them.
#include <deque>
#include <mutex>

#include "src/attention/code_format.h"
#include "src/codecs/commvq/kernel_calls.h"
#include "src/codecs/registry.h"
#include "src/codecs/rope/kernel_calls.h"
#include "src/mlx/gpu_codec_parts.h"
#include "src/mlx/views.h"

namespace veloxquant {
namespace mx = mlx::core;
namespace {

using attention::TileKind;

struct KeptTables {
  RopeSpec spec;
  RopeDirection direction;
  int64_t first;
  int n_blocks;
  mx::array cosines, sines;

  bool are(const RopeSpec& s, RopeDirection d, int64_t at, int n) const {
    return spec.inv_freq == s.inv_freq && spec.position_scale == s.position_scale &&
           spec.attention_factor == s.attention_factor && direction == d && first == at &&
           n_blocks == n;
  }
};

// Cosines and sines of blocks: the layers of a model ask for the same in turn.
std::pair<mx::array, mx::array> block_tables(const Rope& rope, RopeDirection direction,
                                             int64_t first, int n_blocks) {
  static std::mutex mutex;
  static auto* kept = new std::deque<KeptTables>;  // MLX may be gone before the process ends
  const std::lock_guard<std::mutex> lock(mutex);
  for (const KeptTables& one : *kept) {
    if (one.are(rope.spec(), direction, first, n_blocks)) return {one.cosines, one.sines};
  }
  const rope::BlockTables tables = rope::block_tables(rope, direction, first, n_blocks);
  kept->push_front({rope.spec(), direction, first, n_blocks, floats_of(tables.cosines),
                    floats_of(tables.sines)});
  if (kept->size() > 4) kept->pop_back();
  return {kept->front().cosines, kept->front().sines};
}

struct Slots {
  std::shared_ptr<const Rope> rope;
  mx::array numbers, weights, inverse_weights;  // as rope::slot_call's inputs
  bool planes;

  mx::array turned(const mx::array& x, RopeDirection direction, int64_t position,
                   const GpuStream& gpu) const {
    const bool back = direction == RopeDirection::forward;
    rope::SlotShape shape;
    shape.batch = x.shape(0), shape.heads = x.shape(1);
    shape.n_tokens = x.shape(2), shape.dim = x.shape(3);
    shape.rotating = rope->spec().rotary_dims() / 2, shape.planes = planes;
    const auto [cosines, sines] =
        block_tables(*rope, direction, position, (x.shape(2) + kBlockTokens - 1) / kBlockTokens);
    return launch(back ? rope::from_slots_call(shape) : rope::to_slots_call(shape),
                  {x, numbers, back ? inverse_weights : weights, cosines, sines}, gpu)[0];
  }
};

// A codec of slots, whose steps are set, becomes one of keys.
void set_slots(GpuCodec& gpu, const CodecArrays& codec, const std::vector<int32_t>& order,
               bool planes) {
  const int heads = codec.spec.n_kv_heads, dim = codec.spec.head_dim, pairs = dim / 2;
  CodecTables tables;
  for (const auto& [name, array] : codec.arrays) tables[name] = view_of(array);
  SpecReader reader(codec.spec, tables);
  const auto rope = std::make_shared<const Rope>(rope_from_spec(codec.spec, reader));
  std::vector<float> weights, inverse;
  const mx::array* given = find(codec, "weight");
  for (size_t i = 0; i < order.size(); ++i) {
    weights.push_back(given == nullptr ? 1.0f : given->data<float>()[i / pairs * pairs + order[i]]);
    inverse.push_back(1.0f / weights.back());
  }
  const std::vector<int32_t> numbers = rope::slot_numbers(*rope, order);
  const Slots slots{rope, mx::array(numbers.data(), {heads, pairs, 3}, mx::int32),
                    floats_of(weights, {heads, pairs}), floats_of(inverse, {heads, pairs}), planes};
  gpu.transform = 2;
  gpu.query_matrix = floats_of(rope::slot_queries(*rope, order, inverse), {heads, dim, dim});
  gpu.smooth = floats_of(rope::turn_numbers(*rope, order));
  gpu.inverse_transform = 0;
  gpu.encode = [slots, inner = gpu.encode](const mx::array& x, int64_t position,
                                           const GpuStream& stream) {
    return inner(slots.turned(x, RopeDirection::inverse, position, stream), position, stream);
  };
  gpu.decode = [slots, inner = gpu.decode](const mx::array& blocks, int64_t position,
                                           const GpuStream& stream) {
    return slots.turned(inner(blocks, position, stream), RopeDirection::forward, position, stream);
  };
}

}  // namespace

MaybeGpuCodec commvq_gpu_codec(const CodecArrays& codec) {
  const mx::array& codebook = codec.arrays.at("codebook");  // [H, stages, entries, 2, pairs]
  commvq::BlockKernelShape blocks;
  blocks.heads = codec.spec.n_kv_heads;
  blocks.dim = codec.spec.head_dim;
  blocks.n_stages = codebook.shape(1);
  blocks.n_entries = codebook.shape(2);
  attention::CodeFormat format;
  format.kind = TileKind::commvq;
  format.stages = blocks.n_stages;
  format.n_centroids = blocks.n_entries;
  GpuCodec gpu{format, 0, one_number(), codebook, one_number(), {}, {}, {}, 0};
  const commvq::StageProducts products = commvq::stage_products(view_of(codebook));
  const int heads = blocks.heads, stages = blocks.n_stages;
  set_steps(gpu, blocks, commvq::encode_blocks_call,
            {codebook, floats_of(products.norms, {heads, stages, 64}),
             floats_of(products.cross, {heads, stages, 64, 64})},
            commvq::decode_blocks_call, {codebook});
  std::vector<int32_t> order(static_cast<size_t>(heads) * blocks.dim / 2);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i % (blocks.dim / 2));
  set_slots(gpu, codec, order, true);
  return gpu;
}

MaybeGpuCodec vecinfer_rope_gpu_codec(const CodecArrays& codec) {
  const auto made = vecinfer_tables(codec);
  if (const auto* reason = std::get_if<std::string>(&made)) return *reason;
  const auto& [blocks, tables] = std::get<VecInferTables>(made);
  attention::CodeFormat format = attention::code_format(blocks);
  format.kind = TileKind::pairs;
  const mx::array none = one_number();
  GpuCodec gpu{format, 0, none, tables, none, {}, {}, {}, 0};
  set_steps(gpu, blocks, vecinfer::encode_blocks_call, {tables, none}, vecinfer::decode_blocks_call,
            {tables});
  const mx::array& order = codec.arrays.at("order");
  set_slots(gpu, codec, {order.data<int32_t>(), order.data<int32_t>() + order.size()}, false);
  return gpu;
}

}  // namespace veloxquant
