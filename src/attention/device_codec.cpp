#include "src/attention/device_codec.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "src/attention/code_format.h"
#include "src/codecs/turboquant/sketch.h"
#include "src/codecs/vecinfer/format.h"
#include "veloxquant/rabitq.h"

namespace veloxquant::attention {
namespace {

using metal::Type;

constexpr int kMaxDim = 256;

// Reads what make_codec has checked.
struct Options {
  const CodecSpec& spec;
  const CodecTables& tables;

  uint64_t seed() const {
    const auto it = spec.options.find("seed");
    return it == spec.options.end() ? 0 : static_cast<uint64_t>(std::get<int64_t>(it->second));
  }
  int choice(const char* name, std::initializer_list<const char*> values) const {
    const auto it = spec.options.find(name);
    int i = 0;
    for (const char* value : values) {
      if (it != spec.options.end() && std::get<std::string>(it->second) == value) return i;
      ++i;
    }
    return 0;
  }
  const TensorView* table(const char* name) const {
    const auto it = tables.find(name);
    return it == tables.end() || it->second.empty() ? nullptr : &it->second;
  }
};

BlobArray add(DeviceCodec& codec, Type type, std::vector<int64_t> shape, const void* data) {
  BlobArray array{static_cast<int64_t>(codec.blob.size()), type, std::move(shape)};
  const int64_t bytes = metal::ArrayShape{type, array.shape}.nbytes();
  codec.blob.resize(array.at + (bytes + 15) / 16 * 16);
  std::memcpy(codec.blob.data() + array.at, data, bytes);
  return array;
}
BlobArray add(DeviceCodec& codec, std::vector<int64_t> shape, const std::vector<float>& numbers) {
  return add(codec, Type::float32, std::move(shape), numbers.data());
}
BlobArray one_number(DeviceCodec& codec) { return add(codec, {1}, {0.0f}); }

void set_vecinfer(DeviceCodec& codec, const Options& options) {
  const TensorView& tables = *options.table("tables");
  const int last = tables.ndim - 1;
  const int64_t heads = codec.n_kv_heads, dim = codec.head_dim;
  codec.n_sequences = tables.ndim == 5 ? static_cast<int>(tables.shape[0]) : 1;
  vecinfer::BlockShape s;
  s.dim = codec.head_dim;
  s.sub_dim = static_cast<int>(tables.shape[last]);
  s.n_centroids = static_cast<int>(tables.shape[last - 1]);
  s.tables = static_cast<int>(tables.shape[last - 2]);
  s.bits = vecinfer::code_bits(s.n_centroids);
  s.transform = options.choice("transform", {"none", "hadamard", "dense"});
  codec.kernels = s;
  codec.format = code_format(s);
  codec.transform = s.transform;
  codec.table = add(codec, Type::float16,
                    {codec.n_sequences, heads, s.tables, s.n_centroids, s.sub_dim}, tables.data);

  BlobArray forward = one_number(codec);
  codec.move = add(codec, {heads, dim}, std::vector<float>(heads * dim, 1.0f));
  if (s.transform == 1) forward = codec.move;  // factors of 1
  if (const TensorView* scale = options.table("scale")) {
    const float* lambda = static_cast<const float*>(scale->data);
    std::vector<float> inverse(lambda, lambda + heads * dim);
    codec.move = add(codec, {heads, dim}, inverse);
    for (float& x : inverse) x = 1.0f / x;
    forward = add(codec, {heads, dim}, inverse);
  }
  if (s.transform == 2) {
    const TensorView* matrix = options.table("encode_matrix");
    forward = add(codec, Type::float32, {heads, dim, dim}, matrix->data);
    // An orthogonal one is given once.
    if (const TensorView* other = options.table("query_matrix")) matrix = other;
    codec.turn = add(codec, Type::float32, {heads, dim, dim}, matrix->data);
    if (codec.side == Side::values) codec.move = codec.turn;
  }
  codec.encode_arrays = {codec.table, forward};
  codec.decode_arrays = {codec.table};
}

// Signs of the rotation that a codec's coordinates have.
BlobArray add_rotation(DeviceCodec& codec, uint64_t seed) {
  codec.transform = 3;
  return add(codec, {2, codec.head_dim}, turboquant::rotation_signs(codec.head_dim, seed));
}

void set_scalar(DeviceCodec& codec, const Options& options) {
  const int64_t dim = codec.head_dim;
  const uint64_t seed = options.seed();
  const turboquant::BlockKernelShape s = turboquant::block_shape_of(options.spec);
  codec.kernels = s;
  codec.format = code_format(s);
  codec.move = add_rotation(codec, seed);
  const BlobArray quantizers =
      add(codec, {s.stages, 16}, turboquant::quantizer_numbers(s.dim, s.bits, s.stages));
  BlobArray columns = one_number(codec), rows = columns;
  if (s.prod) {
    codec.no_attention = "attention has no kernel for the sketch of the `prod` form";
    const auto sketch = turboquant::gaussian_sketch(s.dim, seed);
    columns = add(codec, {dim, dim}, sketch->columns);
    rows = add(codec, {dim, dim}, sketch->rows);
  } else {
    codec.table = add(codec, {s.stages, 16}, turboquant::level_numbers(s.dim, s.bits, s.stages));
  }
  codec.encode_arrays = {codec.move, quantizers, columns};
  codec.decode_arrays = {quantizers, rows};
}

void set_rabitq(DeviceCodec& codec, const Options& options) {
  const int64_t heads = codec.n_kv_heads, dim = codec.head_dim;
  const TensorView* mean = options.table("mean");
  const rabitq::BlockKernelShape s = rabitq::block_shape_of(options.spec, mean != nullptr);
  codec.kernels = s;
  codec.format = code_format(s);
  const uint64_t seed = options.seed();
  codec.move = add_rotation(codec, seed);
  std::vector<float> numbers = {1.0f};
  BlobArray moved = one_number(codec);
  if (s.mean) {
    const float* given = static_cast<const float*>(mean->data);
    std::vector<float> rows(given, given + heads * dim);
    rabitq_rotate(Backend::reference, rows.data(), heads, codec.head_dim, seed);
    moved = add(codec, {heads, dim}, rows);
    numbers.insert(numbers.end(), rows.begin(), rows.end());
  }
  codec.table = add(codec, {static_cast<int64_t>(numbers.size())}, numbers);
  codec.encode_arrays = {codec.move, moved};
  codec.decode_arrays = {moved};
}

// Channels of each head, ascending, as the codec keeps them.
std::vector<int32_t> sorted_rows(const TensorView& channels) {
  const int64_t n = channels.shape[1];
  std::vector<int32_t> rows;
  for (int64_t h = 0; h < channels.shape[0]; ++h) {
    const auto* row = static_cast<const int32_t*>(channels.at(h));
    rows.insert(rows.end(), row, row + n);
    std::sort(rows.end() - n, rows.end());
  }
  return rows;
}

void set_qjl(DeviceCodec& codec, const Options& options) {
  const int dim = codec.head_dim;
  const uint64_t seed = options.seed();
  const TensorView *given = options.table("sketch"), *channels = options.table("outlier_channels");
  const qjl::BlockKernelShape s = qjl::block_shape_of(
      options.spec, given == nullptr ? 0 : static_cast<int>(given->shape[0]), channels != nullptr);
  const int m = s.layout.m;
  codec.kernels = s;
  const BlobArray numbers =
      s.dense ? add(codec, Type::float32, {m, dim}, given->data)
              : add(codec, {(m + s.layout.m_out) / dim, 2, dim}, qjl::sketch_signs(s, seed));
  const BlobArray named =
      channels == nullptr
          ? add(codec, Type::int32, {1}, std::array{0}.data())
          : add(codec, Type::int32, {codec.n_kv_heads, s.outliers}, sorted_rows(*channels).data());
  codec.encode_arrays = {numbers, named};
  codec.decode_arrays = {numbers, named, add(codec, {2}, qjl::score_constants(s))};
  codec.format = code_format(s, channels != nullptr);
  if (s.outliers > 0) {
    codec.no_attention = "attention has no kernel for outlier channels of qjl";
    return;
  }
  codec.table = add(codec, {1}, {qjl::score_constants(s)[0]});
  if (s.sketched()) {  // one rotation: the codec's coordinates are the sketched
    codec.transform = 3;
    codec.move = {numbers.at, Type::float32, {2, dim}};
    return;
  }
  const float* matrix = s.dense ? static_cast<const float*>(given->data) : nullptr;
  codec.transform = 2;
  codec.turn = add(codec, {1, dim, m}, qjl::query_matrix(s, matrix, seed));
  codec.move = one_number(codec);
}

}  // namespace

std::shared_ptr<const DeviceCodec> device_codec(const CodecSpec& spec, const CodecTables& tables) {
  const CodecPtr made = make_codec(spec, tables);
  auto codec = std::make_shared<DeviceCodec>();
  codec->name = made->name();
  codec->side = made->side();
  codec->n_kv_heads = made->n_kv_heads();
  codec->head_dim = made->head_dim();
  codec->block_bytes = made->block_bytes();
  require(codec->head_dim <= kMaxDim, "[cuda] head_dim: got ", codec->head_dim, ", wanted up to ",
          kMaxDim);
  const Options options{spec, tables};
  if (spec.method == "vecinfer") {
    set_vecinfer(*codec, options);
  } else if (spec.method == "turboquant" || spec.method == "turboquant_rvq") {
    set_scalar(*codec, options);
  } else if (spec.method == "rabitq") {
    set_rabitq(*codec, options);
  } else if (spec.method == "qjl") {
    set_qjl(*codec, options);
  } else {
    fail("[cuda] method: got '", spec.method,
         "', wanted one with GPU kernels: vecinfer, turboquant, turboquant_rvq, rabitq, qjl");
  }
  return codec;
}

std::shared_ptr<const DeviceCodec> device_codec(const cuda::SideFormat& f) {
  require(f.n_chunks > 0, "[cuda] format: got an empty one, wanted one of prepare_side");
  auto codec = std::make_shared<DeviceCodec>();
  codec->name = "vecinfer d" + std::to_string(f.sub_dim) + "x" + std::to_string(f.n_centroids) +
                ", fragment order";
  codec->side = f.side;
  codec->n_kv_heads = f.n_kv_heads;
  codec->head_dim = f.head_dim;
  codec->n_sequences = f.n_sequences;
  codec->block_bytes = f.block_bytes();
  codec->fragments = f;
  codec->format = {f.sub_dim, f.n_centroids, 8, f.n_tables};
  codec->format.chunks = f.n_chunks;
  codec->transform = static_cast<int>(f.transform);
  codec->no_blocks =
      "blocks in fragment order are made and read by encode_blocks, decode_blocks and "
      "append_token of cuda.h";
  const int64_t heads = f.n_kv_heads, dim = f.head_dim;
  codec->table = {
      f.tables, Type::float16, {f.n_sequences, heads, f.n_tables, f.n_centroids, f.sub_dim}};
  codec->move = {f.lambda, Type::float32, {heads, dim}};
  if (f.transform == TransformKind::dense) {
    codec->turn = {f.read_matrix, Type::float32, {heads, dim, dim}};
    if (f.side == Side::values) {
      codec->move = codec->turn;
      codec->transform = 4;  // written for x = y F^T
    }
  }
  return codec;
}

}  // namespace veloxquant::attention
