#include "src/mlx/gpu_codec.h"

#include <mlx/transforms.h>

#include "src/attention/code_format.h"
#include "src/codecs/exact/kernel_calls.h"
#include "src/codecs/vecinfer/format.h"
#include "src/mlx/gpu_codec_parts.h"

namespace veloxquant {
namespace mx = mlx::core;
namespace {

using attention::TileKind;

int transform_of(const CodecSpec& spec) {
  const auto it = spec.options.find("transform");
  const std::string kind = it == spec.options.end() ? "none" : std::get<std::string>(it->second);
  return kind == "dense" ? 2 : kind == "hadamard" ? 1 : 0;
}

MaybeGpuCodec make(const CodecArrays& codec) {
  const std::string& method = codec.spec.method;
  if (method == "vecinfer") return vecinfer_gpu_codec(codec);
  if (method == "turboquant" || method == "turboquant_rvq") return scalar_gpu_codec(codec);
  if (method == "rabitq") return rabitq_gpu_codec(codec);
  if (method == "qjl") return qjl_gpu_codec(codec);
  if (method == "commvq") return commvq_gpu_codec(codec);
  if (method == "vecinfer_rope") return vecinfer_rope_gpu_codec(codec);
  if (method == "exact") return exact_gpu_codec(codec);
  return "method " + method + " has no GPU kernels";
}

}  // namespace

std::variant<VecInferTables, std::string> vecinfer_tables(const CodecArrays& codec) {
  const mx::array& given = codec.arrays.at("tables");  // [sequences?, H, M or 1, C, d]
  mx::Shape shape = given.shape();
  if (shape.size() == 4) shape.insert(shape.begin(), 1);
  VecInferTables made{{}, given};
  vecinfer::BlockShape& blocks = made.blocks;
  blocks.heads = codec.spec.n_kv_heads;
  blocks.dim = codec.spec.head_dim;
  blocks.sub_dim = shape[4];
  blocks.n_centroids = shape[3];
  blocks.bits = vecinfer::code_bits(shape[3]);
  blocks.tables = shape[2];
  blocks.transform = transform_of(codec.spec);
  if (auto reason = vecinfer::no_kernel_because(blocks)) return *reason;
  if (given.ndim() == 4) {
    made.tables = mx::reshape(given, shape, mx::Device::cpu);
    mx::eval(made.tables);  // codecs are shared by threads
  }
  return made;
}

MaybeGpuCodec vecinfer_gpu_codec(const CodecArrays& codec) {
  const auto made = vecinfer_tables(codec);
  if (const auto* reason = std::get_if<std::string>(&made)) return *reason;
  const auto& [blocks, tables] = std::get<VecInferTables>(made);
  const int heads = blocks.heads, dim = blocks.dim;
  std::vector<float> factors(static_cast<size_t>(heads) * dim, 1.0f), inverse;
  if (const mx::array* scale = find(codec, "scale")) {
    factors.assign(scale->data<float>(), scale->data<float>() + scale->size());
  }
  for (float x : factors) inverse.push_back(1.0f / x);  // as the CPU rounds it
  const mx::array smooth = floats_of(factors, {heads, dim});
  GpuCodec gpu{attention::code_format(blocks),
               blocks.transform,
               smooth,
               tables,
               smooth,
               {},
               {},
               {},
               blocks.transform};
  mx::array forward = blocks.transform == 1 ? floats_of(inverse, {heads, dim}) : one_number();
  if (blocks.transform == 2) {
    // An orthogonal matrix is given once. It turns queries, and takes sums of values back.
    forward = codec.arrays.at("encode_matrix");
    const mx::array* queries = find(codec, "query_matrix");
    gpu.query_matrix = gpu.inverse = queries != nullptr ? *queries : forward;
  }
  set_steps(gpu, blocks, vecinfer::encode_blocks_call, {tables, forward},
            vecinfer::decode_blocks_call, {tables});
  return gpu;
}

MaybeGpuCodec exact_gpu_codec(const CodecArrays& codec) {
  exact::BlockKernelShape blocks;
  blocks.heads = codec.spec.n_kv_heads;
  blocks.dim = codec.spec.head_dim;
  const auto it = codec.spec.options.find("dtype");
  blocks.bfloat = it != codec.spec.options.end() && std::get<std::string>(it->second) == "bfloat16";
  attention::CodeFormat format;
  format.kind = TileKind::halves;
  format.bfloat = blocks.bfloat;
  const mx::array none = one_number();
  GpuCodec gpu{format, 0, none, none, none, {}, {}, {}, 0};
  set_steps(gpu, blocks, exact::encode_blocks_call, {}, exact::decode_blocks_call, {});
  return gpu;
}

struct GpuCodecSlot {
  MaybeGpuCodec codec;
};

const MaybeGpuCodec& gpu_codec(const CodecArrays& codec) {
  std::call_once(codec.gpu_once,
                 [&] { codec.gpu = std::make_shared<GpuCodecSlot>(GpuCodecSlot{make(codec)}); });
  return codec.gpu->codec;
}

}  // namespace veloxquant
