// Codecs behind the seeded rotation for the GPU: turboquant and rvq, rabitq, qjl.
#include <algorithm>

#include "src/attention/code_format.h"
#include "src/codecs/qjl/kernel_calls.h"
#include "src/codecs/rabitq/kernel_calls.h"
#include "src/codecs/turboquant/kernel_calls.h"
#include "src/codecs/turboquant/sketch.h"
#include "src/mlx/gpu_codec_parts.h"
#include "veloxquant/rabitq.h"

namespace veloxquant {
namespace mx = mlx::core;
namespace {

GpuCodec rotated(const attention::CodeFormat& format, const mx::array& signs,
                 const mx::array& tables) {
  return {format, 3, signs, tables, signs, {}, {}, {}, 3};
}

}  // namespace

MaybeGpuCodec scalar_gpu_codec(const CodecArrays& codec) {
  const turboquant::BlockKernelShape blocks = turboquant::block_shape_of(codec.spec);
  if (auto reason = turboquant::no_kernel_because(blocks)) return *reason;
  const int dim = blocks.dim, stages = blocks.stages;
  const uint64_t seed = seed_of(codec.spec);
  const std::vector<float> signs = turboquant::rotation_signs(dim, seed);
  const mx::array rotation = floats_of(signs, {2, dim});
  const mx::array quantizers =
      floats_of(turboquant::quantizer_numbers(dim, blocks.bits, stages), {stages, 16});
  GpuCodec gpu =
      rotated(attention::code_format(blocks), rotation,
              floats_of(turboquant::level_numbers(dim, blocks.bits, stages), {stages, 16}));
  mx::array columns = one_number(), rows = columns;
  if (blocks.prod) {
    const auto sketch = turboquant::gaussian_sketch(dim, seed);
    columns = floats_of(sketch->columns, {dim, dim});
    rows = floats_of(sketch->rows, {dim, dim});
    if (blocks.by_token) {  // sums of signs, then those of both, go back
      std::vector<float> both = signs;
      both.insert(both.end(), sketch->rows.begin(), sketch->rows.end());
      gpu.inverse = floats_of(both, {2 + dim, dim});
    } else {
      gpu.transform = 2;
      gpu.query_matrix = floats_of(turboquant::sketched_queries(dim, seed), {1, dim, 2 * dim});
    }
  }
  set_steps(gpu, blocks, turboquant::encode_blocks_call, {rotation, quantizers, columns},
            turboquant::decode_blocks_call, {quantizers, rows});
  return gpu;
}

MaybeGpuCodec rabitq_gpu_codec(const CodecArrays& codec) {
  const mx::array* mean = find(codec, "mean");
  const rabitq::BlockKernelShape blocks = rabitq::block_shape_of(codec.spec, mean != nullptr);
  if (auto reason = rabitq::no_kernel_because(blocks)) return *reason;
  const int heads = blocks.heads, dim = blocks.dim;
  std::vector<float> numbers = {1.0f};  // of the stored scalars; then the means, rotated
  mx::array means = one_number();
  if (mean != nullptr) {
    std::vector<float> moved(mean->data<float>(), mean->data<float>() + mean->size());
    rabitq_rotate(Backend::reference, moved.data(), heads, dim, seed_of(codec.spec));
    means = floats_of(moved, {heads, dim});
    numbers.insert(numbers.end(), moved.begin(), moved.end());
  }
  const mx::array signs = floats_of(turboquant::rotation_signs(dim, seed_of(codec.spec)), {2, dim});
  GpuCodec gpu = rotated(attention::code_format(blocks), signs, floats_of(numbers));
  set_steps(gpu, blocks, rabitq::encode_blocks_call, {signs, means}, rabitq::decode_blocks_call,
            {means});
  return gpu;
}

MaybeGpuCodec qjl_gpu_codec(const CodecArrays& codec) {
  const mx::array *given = find(codec, "sketch"), *chosen = find(codec, "outlier_channels");
  const qjl::BlockKernelShape blocks =
      qjl::block_shape_of(codec.spec, given == nullptr ? 0 : given->shape(0), chosen != nullptr);
  if (auto reason = qjl::no_kernel_because(blocks)) return *reason;
  const int dim = blocks.dim, m = blocks.layout.m, m_out = blocks.layout.m_out;
  const uint64_t seed = seed_of(codec.spec);
  const float* matrix = blocks.dense ? given->data<float>() : nullptr;
  const attention::CodeFormat format = attention::code_format(blocks, chosen != nullptr);
  // Signs of the rotations, or the matrix; queries meet the keys' signs behind the same.
  const std::vector<float> rotations =
      blocks.dense ? std::vector<float>{} : qjl::sketch_signs(blocks, seed);
  const mx::array sketch =
      blocks.dense ? *given : floats_of(rotations, {(m + m_out) / dim, 2, dim});
  std::vector<int32_t> channels = {0};  // of a head, ascending
  if (chosen != nullptr) {
    channels.assign(chosen->data<int32_t>(), chosen->data<int32_t>() + chosen->size());
    for (auto row = channels.begin(); row != channels.end(); row += blocks.outliers) {
      std::sort(row, row + blocks.outliers);
    }
  }
  const int per_head = chosen != nullptr ? blocks.outliers : 1;
  const mx::array named(channels.data(), {static_cast<int>(channels.size()) / per_head, per_head},
                        mx::int32);
  const std::vector<float> constants = qjl::score_constants(blocks);
  GpuCodec gpu{format, 0, one_number(), floats_of({constants[0]}), one_number(), {}, {}, {}, 0};
  if (blocks.sketched()) {
    gpu.transform = gpu.inverse_transform = 3;
    gpu.smooth = gpu.inverse =
        floats_of({rotations.begin(), rotations.begin() + 2 * dim}, {2, dim});
  } else {
    gpu.transform = 2;
    gpu.query_matrix = floats_of(qjl::query_matrix(blocks, matrix, seed), {1, dim, format.n_rows});
  }
  if (blocks.outliers > 0) {
    gpu.tables = floats_of(qjl::outlier_numbers(
        blocks, matrix, seed, chosen != nullptr ? channels : std::vector<int32_t>{}));
  }
  set_steps(gpu, blocks, qjl::encode_blocks_call, {sketch, named}, qjl::decode_blocks_call,
            {sketch, named, floats_of(constants)});
  return gpu;
}

}  // namespace veloxquant
