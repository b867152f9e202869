// What the makers of a GpuCodec share, one for each family of codecs.
#pragma once

#include <mlx/ops.h>

#include <utility>
#include <vector>

#include "src/codecs/vecinfer/kernel_calls.h"
#include "src/mlx/gpu_codec.h"

namespace veloxquant {

MaybeGpuCodec vecinfer_gpu_codec(const CodecArrays& codec);
MaybeGpuCodec exact_gpu_codec(const CodecArrays& codec);
MaybeGpuCodec scalar_gpu_codec(const CodecArrays& codec);
MaybeGpuCodec rabitq_gpu_codec(const CodecArrays& codec);
MaybeGpuCodec qjl_gpu_codec(const CodecArrays& codec);
MaybeGpuCodec commvq_gpu_codec(const CodecArrays& codec);
MaybeGpuCodec vecinfer_rope_gpu_codec(const CodecArrays& codec);

// The blocks of vecinfer's tables, and those with a sequence in front; or why there is no kernel.
struct VecInferTables {
  vecinfer::BlockShape blocks;
  mlx::core::array tables;
};
std::variant<VecInferTables, std::string> vecinfer_tables(const CodecArrays& codec);

inline mlx::core::array floats_of(const std::vector<float>& numbers, mlx::core::Shape shape) {
  return mlx::core::array(numbers.data(), std::move(shape), mlx::core::float32);
}
inline mlx::core::array floats_of(const std::vector<float>& numbers) {
  return floats_of(numbers, {static_cast<int>(numbers.size())});
}
inline mlx::core::array one_number() { return floats_of({0.0f}); }

inline const mlx::core::array* find(const CodecArrays& codec, const char* name) {
  const auto it = codec.arrays.find(name);
  return it == codec.arrays.end() ? nullptr : &it->second;
}

inline int64_t integer_of(const CodecSpec& spec, const char* name, int64_t otherwise) {
  const auto it = spec.options.find(name);
  return it == spec.options.end() ? otherwise : std::get<int64_t>(it->second);
}
inline uint64_t seed_of(const CodecSpec& spec) {
  return static_cast<uint64_t>(integer_of(spec, "seed", 0));
}

template <class Shape>
void set_tokens(Shape& shape, int n_tokens) {
  shape.n_tokens = n_tokens;
}
inline void set_tokens(vecinfer::BlockShape& shape, int n_tokens) {
  shape.n_blocks = (n_tokens + kBlockTokens - 1) / kBlockTokens;
}

// One launch, of what is given and `inputs`; tokens: those of its third dimension's unit.
template <class Shape>
GpuCodec::Step step_of(const Shape& blocks, metal::Call (*call)(const Shape&),
                       std::vector<mlx::core::array> inputs, int tokens) {
  return [=](const mlx::core::array& of, int64_t, const GpuStream& gpu) {
    Shape shape = blocks;
    shape.batch = of.shape(0);
    set_tokens(shape, of.shape(2) * tokens);
    std::vector<mlx::core::array> all = inputs;
    all.insert(all.begin(), of);
    return launch(call(shape), std::move(all), gpu)[0];
  };
}
template <class Shape>
void set_steps(GpuCodec& gpu, const Shape& blocks, metal::Call (*encode)(const Shape&),
               std::vector<mlx::core::array> encode_inputs, metal::Call (*decode)(const Shape&),
               std::vector<mlx::core::array> decode_inputs) {
  gpu.encode = step_of(blocks, encode, std::move(encode_inputs), 1);
  gpu.decode = step_of(blocks, decode, std::move(decode_inputs), kBlockTokens);
}

}  // namespace veloxquant
