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
  for (size_t i = 0; i < arrays.size(); ++i) {
    const bool shared = i > 0 && arrays[i].id() == arrays[i - 1].id();
    if (!shared) bytes += static_cast<int64_t>(arrays[i].nbytes());
  }
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
    if (query_matrix->id() == encode_matrix->id()) {
      codec.arrays.push_back(codec.arrays.back());
    } else {
      keep(*query_matrix, mx::float32);
    }
  }
  return described(codec);
}

CodecArrays restored_codec_arrays(const CodecArrays& described,
                                  const std::vector<mx::array>& arrays) {
  const size_t wanted = static_cast<size_t>(described.n_arrays());
  require(arrays.size() == wanted, "[codec] arrays: got ", arrays.size(), ", wanted ", wanted);
  if (described.method == CodecArrays::Method::exact) {
    return exact_codec_arrays(described.side, described.n_kv_heads, described.head_dim,
                              described.exact_dtype);
  }
  for (size_t i = 0; i < arrays.size(); ++i) {
    const mx::Dtype dtype = i == 0 ? mx::float16 : mx::float32;
    require(arrays[i].dtype() == dtype, "[codec] arrays: got ", dtype_text(arrays[i].dtype()),
            ", wanted ", dtype_text(dtype));
  }
  const bool dense = described.transform == TransformKind::dense;
  auto optional = [&](bool there, size_t i) {
    return there ? std::optional<mx::array>(arrays[i]) : std::nullopt;
  };
  // A batch axis would have to fit the batch of the cache: such tables are not saved.
  require(arrays[0].ndim() == 4, "[codec] tables: got ", arrays[0].ndim(),
          " dimensions, wanted [H, M or 1, C, d]");
  require(int64_t{described.n_subvectors} * arrays[0].shape(3) == described.head_dim,
          "[codec] n_subvectors: got ", described.n_subvectors, " of ", arrays[0].shape(3),
          " dimensions, wanted ", described.head_dim, " in all");
  CodecArrays codec = vecinfer_codec_arrays(described.side, arrays[0], described.n_subvectors,
                                            described.transform == TransformKind::hadamard,
                                            optional(described.has_scale, 1), optional(dense, 1),
                                            optional(dense, 2));
  require(codec.n_kv_heads == described.n_kv_heads, "[codec] tables: got ", codec.n_kv_heads,
          " heads, wanted ", described.n_kv_heads);
  return codec;
}

}  // namespace veloxquant
