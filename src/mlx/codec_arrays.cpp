#include "src/mlx/codec_arrays.h"

#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "src/mlx/views.h"
#include "veloxquant/exact.h"

namespace veloxquant {
namespace mx = mlx::core;
namespace {

// Builds the core codec once: it validates, and knows its name and size.
CodecArrays described(CodecArrays codec) {
  mx::eval(codec.arrays);
  const CodecPtr core = codec.over(codec.arrays.data());
  codec.name = core->name();
  codec.block_bytes = core->block_bytes();
  return codec;
}

}  // namespace

CodecPtr CodecArrays::over(const mx::array* inputs) const {
  if (method == Method::exact) return make_exact_codec(side, n_kv_heads, head_dim, exact_dtype);
  Transform map;
  map.kind = transform;
  if (has_scale) map.scale = view_of(inputs[1]);
  if (transform == TransformKind::dense) {
    map.encode_matrix = view_of(inputs[1]);
    map.query_matrix = view_of(inputs[2]);
  }
  return make_vecinfer_codec(side, n_kv_heads, head_dim, n_subvectors, view_of(inputs[0]), map);
}

int CodecArrays::n_arrays() const {
  if (method == Method::exact) return 0;
  if (transform == TransformKind::dense) return 3;
  return has_scale ? 2 : 1;
}

CodecArrays CodecArrays::without_arrays() const {
  CodecArrays copy = *this;
  copy.arrays.clear();
  return copy;
}

int64_t CodecArrays::nbytes() const {
  int64_t bytes = 0;
  for (const mx::array& a : arrays) bytes += static_cast<int64_t>(a.nbytes());
  return bytes;
}

double CodecArrays::bits_per_element() const {
  return 8.0 * static_cast<double>(block_bytes) / (kBlockTokens * head_dim);
}

CodecArrays exact_codec_arrays(Side side, int n_kv_heads, int head_dim, DType dtype) {
  CodecArrays codec;
  codec.side = side;
  codec.n_kv_heads = n_kv_heads;
  codec.head_dim = head_dim;
  codec.exact_dtype = dtype;
  return described(codec);
}

CodecArrays vecinfer_codec_arrays(Side side, const mx::array& tables, int n_subvectors,
                                  bool hadamard, const std::optional<mx::array>& scale,
                                  const std::optional<mx::array>& encode_matrix,
                                  const std::optional<mx::array>& query_matrix) {
  require(tables.ndim() == 4 || tables.ndim() == 5, "[vecinfer] tables: got ", tables.ndim(),
          " dimensions, wanted [H, M or 1, C, d] with an optional leading batch axis");
  require(encode_matrix.has_value() == query_matrix.has_value(),
          "[vecinfer] query_matrix: got one of the two matrices, wanted both or none");
  require(!(scale && encode_matrix),
          "[vecinfer] scale: got smooth factors and matrices, wanted one of the two");
  CodecArrays codec;
  codec.method = CodecArrays::Method::vecinfer;
  codec.side = side;
  codec.n_kv_heads = tables.shape(-4);
  codec.n_subvectors = n_subvectors;
  codec.head_dim = n_subvectors * tables.shape(-1);
  codec.has_scale = scale.has_value();
  codec.transform = encode_matrix       ? TransformKind::dense
                    : hadamard || scale ? TransformKind::hadamard
                                        : TransformKind::none;
  const mx::Device cpu = mx::Device::cpu;
  auto keep = [&](const mx::array& a, mx::Dtype dtype) {
    codec.arrays.push_back(mx::contiguous(mx::astype(a, dtype, cpu), false, cpu));
  };
  keep(tables, mx::float16);
  if (scale) keep(*scale, mx::float32);
  if (encode_matrix) {
    keep(*encode_matrix, mx::float32);
    keep(*query_matrix, mx::float32);
  }
  return described(codec);
}

}  // namespace veloxquant
