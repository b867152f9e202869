#include "src/mlx/gpu_codec.h"

#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "src/codecs/qjl/kernel_calls.h"
#include "src/codecs/qjl/sketch.h"
#include "src/codecs/rabitq/kernel_calls.h"
#include "src/codecs/turboquant/kernel_calls.h"
#include "src/codecs/turboquant/sketch.h"
#include "src/codecs/vecinfer/format.h"
#include "src/codecs/vecinfer/kernel_calls.h"

namespace veloxquant {
namespace mx = mlx::core;
namespace {

using attention::TileKind;

mx::array floats(const std::vector<float>& numbers, mx::Shape shape) {
  return mx::array(numbers.data(), std::move(shape), mx::float32);
}
mx::array one_number() { return floats({0.0f}, {1}); }

const mx::array* find(const CodecArrays& codec, const char* name) {
  const auto it = codec.arrays.find(name);
  return it == codec.arrays.end() ? nullptr : &it->second;
}

uint64_t seed_of(const CodecSpec& spec) {
  const auto it = spec.options.find("seed");
  return it == spec.options.end() ? 0 : static_cast<uint64_t>(std::get<int64_t>(it->second));
}

// ---- vecinfer ----

int transform_of(const CodecSpec& spec) {
  const auto it = spec.options.find("transform");
  const std::string kind = it == spec.options.end() ? "none" : std::get<std::string>(it->second);
  return kind == "dense" ? 2 : kind == "hadamard" ? 1 : 0;
}

MaybeGpuCodec vecinfer_codec(const CodecArrays& codec) {
  const int heads = codec.spec.n_kv_heads, dim = codec.spec.head_dim;
  const mx::array& given = codec.arrays.at("tables");  // [sequences?, H, M or 1, C, d]
  mx::Shape shape = given.shape();
  if (shape.size() == 4) shape.insert(shape.begin(), 1);
  vecinfer::BlockShape blocks;
  blocks.heads = heads;
  blocks.dim = dim;
  blocks.sub_dim = shape[4];
  blocks.n_centroids = shape[3];
  blocks.bits = vecinfer::code_bits(shape[3]);
  blocks.tables = shape[2];
  blocks.transform = transform_of(codec.spec);
  if (auto reason = vecinfer::no_kernel_because(blocks)) return *reason;

  mx::array tables = given;
  if (given.ndim() == 4) {
    tables = mx::reshape(given, shape, mx::Device::cpu);
    mx::eval(tables);  // codecs are shared by threads
  }
  std::vector<float> factors(static_cast<size_t>(heads) * dim, 1.0f), inverse;
  if (const mx::array* scale = find(codec, "scale")) {
    factors.assign(scale->data<float>(), scale->data<float>() + scale->size());
  }
  for (float x : factors) inverse.push_back(1.0f / x);  // as the CPU rounds it
  const mx::array smooth = floats(factors, {heads, dim});
  GpuCodec gpu{{blocks.sub_dim, blocks.n_centroids, blocks.bits, blocks.tables},
               blocks.transform,
               smooth,
               tables,
               smooth,
               {},
               {},
               {}};
  mx::array forward = blocks.transform == 1 ? floats(inverse, {heads, dim}) : one_number();
  if (blocks.transform == 2) {
    // An orthogonal matrix is given once. It turns queries, and takes sums of values back.
    forward = codec.arrays.at("encode_matrix");
    const mx::array* queries = find(codec, "query_matrix");
    gpu.query_matrix = gpu.inverse = queries != nullptr ? *queries : forward;
  }
  gpu.encode_inputs = {tables, forward};
  gpu.encode = [blocks](int batch, int n_tokens) {
    vecinfer::BlockShape s = blocks;
    s.batch = batch;
    s.n_blocks = (n_tokens + kBlockTokens - 1) / kBlockTokens;
    return vecinfer::encode_blocks_call(s);
  };
  return gpu;
}

// ---- codecs behind the seeded rotation ----

template <class Shape>
std::function<metal::Call(int, int)> encode_of(const Shape& blocks,
                                               metal::Call (*call)(const Shape&)) {
  return [blocks, call](int batch, int n_tokens) {
    Shape s = blocks;
    s.batch = batch;
    s.n_tokens = n_tokens;
    return call(s);
  };
}

MaybeGpuCodec scalar_codec(const CodecArrays& codec) {
  const turboquant::BlockKernelShape blocks = turboquant::block_shape_of(codec.spec);
  if (auto reason = turboquant::no_kernel_because(blocks)) return *reason;
  if (blocks.prod) return "decode attention has no kernel for the prod form";
  attention::CodeFormat format;
  format.kind = TileKind::scalar;
  format.bits = blocks.bits;
  format.stages = blocks.stages;
  format.by_token = blocks.by_token;
  const int dim = blocks.dim, stages = blocks.stages;
  const mx::array signs = floats(turboquant::rotation_signs(dim, seed_of(codec.spec)), {2, dim});
  GpuCodec gpu{
      format, 3,  signs, floats(turboquant::level_numbers(dim, blocks.bits, stages), {stages, 16}),
      signs,  {}, {},    {}};
  gpu.encode_inputs = {
      signs, floats(turboquant::quantizer_numbers(dim, blocks.bits, stages), {stages, 16}),
      one_number()};
  gpu.encode = encode_of(blocks, turboquant::encode_blocks_call);
  return gpu;
}

MaybeGpuCodec rabitq_codec(const CodecArrays& codec) {
  const mx::array* mean = find(codec, "mean");
  const rabitq::BlockKernelShape blocks = rabitq::block_shape_of(codec.spec, mean != nullptr);
  if (auto reason = rabitq::no_kernel_because(blocks)) return *reason;
  const int heads = blocks.heads, dim = blocks.dim;
  attention::CodeFormat format;
  format.kind = TileKind::planes;
  format.bits = blocks.bits;
  format.mean = blocks.mean;
  std::vector<float> numbers = {1.0f};  // of the stored scalars; then the means, rotated
  mx::array means = one_number();
  if (mean != nullptr) {
    std::vector<float> rotated(mean->data<float>(), mean->data<float>() + mean->size());
    rabitq_rotate(Backend::reference, rotated.data(), heads, dim, seed_of(codec.spec));
    means = floats(rotated, {heads, dim});
    numbers.insert(numbers.end(), rotated.begin(), rotated.end());
  }
  const mx::array signs = floats(turboquant::rotation_signs(dim, seed_of(codec.spec)), {2, dim});
  GpuCodec gpu{format, 3,  signs, floats(numbers, {static_cast<int>(numbers.size())}),
               signs,  {}, {},    {}};
  gpu.encode_inputs = {signs, means};
  gpu.encode = encode_of(blocks, rabitq::encode_blocks_call);
  return gpu;
}

MaybeGpuCodec qjl_codec(const CodecArrays& codec) {
  const mx::array* given = find(codec, "sketch");
  const qjl::BlockKernelShape blocks = qjl::block_shape_of(
      codec.spec, given == nullptr ? 0 : given->shape(0), find(codec, "outlier_channels") != nullptr);
  if (auto reason = qjl::no_kernel_because(blocks)) return *reason;
  if (blocks.outliers > 0) return "decode attention has no kernel for outlier channels";
  const int dim = blocks.dim, m = blocks.layout.m;
  attention::CodeFormat format;
  format.kind = TileKind::planes;
  format.bits = 1;
  format.n_rows = m;
  // Signs of the rotations, or the matrix; queries meet the keys' signs behind the same.
  const std::vector<float> rotations =
      blocks.dense ? std::vector<float>{} : qjl::sketch_signs(blocks, seed_of(codec.spec));
  const mx::array sketch = blocks.dense ? *given : floats(rotations, {m / dim, 2, dim});
  const mx::array smooth = blocks.dense ? one_number() : floats({rotations.begin(), rotations.begin() + 2 * dim}, {2, dim});
  GpuCodec gpu{format, blocks.sketched() ? 3 : 2, smooth,
               floats({qjl::score_constants(blocks)[0]}, {1}), smooth, {}, {}, {}};
  if (!blocks.sketched()) {
    const qjl::Sketch rows =
        blocks.dense ? qjl::Sketch::dense(dim, m, given->data<float>())
                     : qjl::Sketch::structured(dim, m, seed_of(codec.spec), 0);
    std::vector<float> identity(static_cast<size_t>(dim) * dim, 0.0f);
    std::vector<float> matrix(static_cast<size_t>(dim) * m);
    for (int d = 0; d < dim; ++d) identity[static_cast<size_t>(d) * dim + d] = 1.0f;
    rows.project(identity.data(), dim, matrix.data());
    gpu.query_matrix = floats(matrix, {1, dim, m});
  }
  gpu.encode_inputs = {sketch, one_number()};
  gpu.encode = encode_of(blocks, qjl::encode_blocks_call);
  return gpu;
}

MaybeGpuCodec make(const CodecArrays& codec) {
  const std::string& method = codec.spec.method;
  if (method == "vecinfer") return vecinfer_codec(codec);
  if (method == "turboquant" || method == "turboquant_rvq") return scalar_codec(codec);
  if (method == "rabitq") return rabitq_codec(codec);
  if (method == "qjl") return qjl_codec(codec);
  return "method " + method + " has no GPU kernels";
}

}  // namespace

struct GpuCodecSlot {
  MaybeGpuCodec codec;
};

const MaybeGpuCodec& gpu_codec(const CodecArrays& codec) {
  std::call_once(codec.gpu_once,
                 [&] { codec.gpu = std::make_shared<GpuCodecSlot>(GpuCodecSlot{make(codec)}); });
  return codec.gpu->codec;
}

}  // namespace veloxquant
