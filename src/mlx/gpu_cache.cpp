#include "src/mlx/gpu_cache.h"

#include <mlx/ops.h>

#include <algorithm>
#include <climits>
#include <limits>

#include "src/attention/kernel_calls.h"
#include "src/codecs/vecinfer/format.h"
#include "src/codecs/vecinfer/kernel_calls.h"
#include "src/mlx/function_op.h"
#include "src/mlx/views.h"

namespace veloxquant {
namespace mx = mlx::core;
namespace {

using attention::DecodeShape;
using attention::Item;

// Threadgroups are cut for so many cores; MLX does not say how many a Mac has.
constexpr int kMetalCores = 20, kCudaCores = 128;

int transform_of(const CodecArrays& codec) {
  const auto option = codec.spec.options.find("transform");
  const std::string kind =
      option == codec.spec.options.end() ? "none" : std::get<std::string>(option->second);
  return kind == "dense" ? 2 : kind == "hadamard" ? 1 : 0;
}

const mx::array* find(const CodecArrays& codec, const char* name) {
  const auto it = codec.arrays.find(name);
  return it == codec.arrays.end() ? nullptr : &it->second;
}

// [sequences, H, M or 1, C, d]
mx::array tables_of(const CodecArrays& codec, const mx::Stream& gpu) {
  const mx::array& tables = codec.arrays.at("tables");
  if (tables.ndim() == 5) return tables;
  mx::Shape shape = tables.shape();
  shape.insert(shape.begin(), 1);
  return mx::reshape(tables, shape, gpu);
}

mx::array factors_of(const CodecArrays& codec, const mx::Stream& gpu) {
  if (const mx::array* scale = find(codec, "scale")) return *scale;
  return mx::ones({codec.spec.n_kv_heads, codec.spec.head_dim}, mx::float32, gpu);
}

// The matrix that turns queries, and takes sums of values back: an orthogonal one is given once.
const mx::array& query_matrix(const CodecArrays& codec) {
  const mx::array* matrix = find(codec, "query_matrix");
  return matrix != nullptr ? *matrix : codec.arrays.at("encode_matrix");
}

attention::CodeFormat format_of(const CodecArrays& codec) {
  const mx::array& tables = codec.arrays.at("tables");
  const int n_centroids = tables.shape(-2);
  return {tables.shape(-1), n_centroids, vecinfer::code_bits(n_centroids), tables.shape(-3)};
}

vecinfer::BlockShape block_shape(const CodecArrays& codec, int batch, int n_blocks) {
  const attention::CodeFormat format = format_of(codec);
  vecinfer::BlockShape s;
  s.batch = batch;
  s.heads = codec.spec.n_kv_heads;
  s.n_blocks = n_blocks;
  s.dim = codec.spec.head_dim;
  s.sub_dim = format.sub_dim;
  s.n_centroids = format.n_centroids;
  s.bits = format.bits;
  s.tables = format.tables;
  s.transform = transform_of(codec);
  return s;
}

// What encode multiplies with: 1 / lambda as the CPU rounds it, a matrix, or one number.
mx::array forward_of(const CodecArrays& codec, const mx::Stream& gpu) {
  const int transform = transform_of(codec);
  if (transform == 2) return codec.arrays.at("encode_matrix");
  const mx::array* scale = find(codec, "scale");
  if (transform == 0) return mx::zeros({1}, mx::float32, gpu);
  if (scale == nullptr) return factors_of(codec, gpu);
  std::vector<float> inverse(scale->data<float>(), scale->data<float>() + scale->size());
  for (float& x : inverse) x = 1.0f / x;
  return mx::array(inverse.data(), scale->shape(), mx::float32);
}

mx::array tokens_of(const mx::array& a, int64_t begin, int64_t end, const mx::Stream& gpu) {
  return mx::slice(a, {0, 0, static_cast<int>(begin), 0},
                   {a.shape(0), a.shape(1), static_cast<int>(end), a.shape(3)}, gpu);
}

// One side of an append: exact storage after it, tokens to seal, elements that were not finite.
struct SideAppend {
  mx::array next, sealed, nonfinite;
};

SideAppend append_side(const mx::array& given, const mx::array& exact, const CacheGeometry& g,
                       const AppendPlan& plan, const mx::Stream& gpu) {
  const mx::Dtype dtype = exact.dtype();
  const float largest = dtype == mx::float16 ? 65504.0f : 3.38953138925153547590e38f;
  const mx::array top(largest, dtype), bottom(-largest, dtype), zero(0.0f, dtype);
  const mx::array rounded = mx::astype(given, dtype, gpu);
  // A comparison with NaN is false.
  const mx::array finite = mx::less_equal(mx::abs(rounded, gpu), top, gpu);
  const mx::array held = mx::minimum(mx::maximum(rounded, bottom, gpu), top, gpu);
  const mx::array fresh = mx::where(mx::isnan(rounded, gpu), zero, held, gpu);
  const mx::array nonfinite =
      mx::sum(mx::astype(mx::logical_not(finite, gpu), mx::int32, gpu), false, gpu);

  const int64_t n = plan.n_new, in_sinks = std::min<int64_t>(plan.first, g.sinks);
  const int64_t to_sinks = std::clamp<int64_t>(g.sinks - plan.first, 0, n);
  const int64_t in_tail = std::max<int64_t>(0, plan.first - plan.tail_start);
  const int64_t sealed = int64_t{kBlockTokens} * plan.n_sealed;
  auto zeros = [&](int64_t count) {
    return mx::zeros({exact.shape(0), exact.shape(1), static_cast<int>(count), exact.shape(3)},
                     dtype, gpu);
  };
  std::vector<mx::array> tail;
  if (in_tail > 0) tail.push_back(tokens_of(exact, g.sinks, g.sinks + in_tail, gpu));
  if (to_sinks < n) tail.push_back(tokens_of(fresh, to_sinks, n, gpu));
  const int64_t n_tail = in_tail + n - to_sinks;
  const mx::array tokens = tail.empty() ? zeros(0) : mx::concatenate(tail, 2, gpu);

  std::vector<mx::array> parts;
  if (in_sinks > 0) parts.push_back(tokens_of(exact, 0, in_sinks, gpu));
  if (to_sinks > 0) parts.push_back(tokens_of(fresh, 0, to_sinks, gpu));
  if (in_sinks + to_sinks < g.sinks) parts.push_back(zeros(g.sinks - in_sinks - to_sinks));
  if (n_tail > sealed) parts.push_back(tokens_of(tokens, sealed, n_tail, gpu));
  const int64_t left = g.exact_capacity() - g.sinks - (n_tail - sealed);
  if (left > 0) parts.push_back(zeros(left));
  return {mx::concatenate(parts, 2, gpu),
          mx::contiguous(tokens_of(tokens, 0, sealed, gpu), false, gpu), nonfinite};
}

// Numbers of a plan and of what queries see, as metal_decode.h reads them.
mx::array ints(const std::vector<int32_t>& numbers, int columns) {
  const int rows = static_cast<int>(numbers.size()) / columns;
  return mx::array(numbers.data(), {rows, columns}, mx::int32);
}

std::vector<Item> stretches_of(const Snapshot& keys) {
  const SnapshotLayout& layout = keys.layout;
  std::vector<Item> stretches;
  for (size_t i = 0; i < layout.packed.size(); ++i) {
    const PackedSpan& span = layout.packed[i];
    stretches.push_back({true, static_cast<int>(i), 0, static_cast<int>(span.end() - span.start),
                         static_cast<int>(span.start), keys.spans[i].shape(2)});
  }
  auto exact = [&](int source, int64_t first, int64_t count, int64_t position) {
    if (count <= 0) return;
    stretches.push_back({false, source, static_cast<int>(first), static_cast<int>(count),
                         static_cast<int>(position), 0});
  };
  if (keys.exact) {
    exact(0, 0, std::min<int64_t>(layout.exact_length, layout.sinks), 0);
    exact(0, layout.sinks, layout.exact_length - layout.exact_tail_start, layout.exact_tail_start);
  }
  if (keys.chunk) {
    exact(keys.exact ? 1 : 0, 0, layout.length - layout.chunk_start, layout.chunk_start);
  }
  return stretches;
}

std::vector<int32_t> seen_of(const SnapshotLayout& layout, int n_queries,
                             const AttendOptions& options) {
  std::vector<int32_t> seen;
  const Visibility& v = layout.visibility;
  for (int64_t i = 0; i < n_queries; ++i) {
    const int64_t t = layout.length - n_queries + i;
    const int64_t end = options.causal ? std::min(layout.length, t + 1) : layout.length;
    const int64_t begin =
        options.sliding_window > 0 ? std::max<int64_t>(0, t + 1 - options.sliding_window) : 0;
    const bool both = v.n_new_blocks > 0;
    for (int64_t number :
         {begin, end, both ? v.code_end(t) : INT_MAX, both ? v.tail_start : INT_MAX}) {
      seen.push_back(static_cast<int32_t>(number));
    }
  }
  return seen;
}

// Rows of each KV head's group times its matrix, in fp32: MLX's own product may round to TF32.
mx::array turned_queries(const mx::array& q, const CodecArrays& keys, const mx::Stream& gpu) {
  const int batch = q.shape(0), heads = keys.spec.n_kv_heads, dim = q.shape(3);
  const int rows = q.shape(1) / heads * q.shape(2);
  const mx::array from =
      mx::reshape(mx::astype(q, mx::float32, gpu), {batch, heads, rows, dim, 1}, gpu);
  const mx::array matrix = mx::reshape(query_matrix(keys), {1, heads, 1, dim, dim}, gpu);
  return mx::reshape(mx::sum(mx::multiply(from, matrix, gpu), 3, false, gpu), q.shape(), gpu);
}

}  // namespace

std::optional<std::string> no_gpu_cache_because(const CodecArrays& keys,
                                                const CodecArrays& values) {
  for (const CodecArrays* codec : {&keys, &values}) {
    if (codec->spec.method != "vecinfer") {
      return "method " + codec->spec.method + " has no GPU kernels yet";
    }
    if (auto reason = vecinfer::no_kernel_because(block_shape(*codec, 1, 1))) return reason;
  }
  DecodeShape shape;
  shape.n_kv_heads = keys.spec.n_kv_heads;
  shape.head_dim = keys.spec.head_dim;
  shape.keys = format_of(keys);
  shape.values = format_of(values);
  shape.key_transform = transform_of(keys);
  shape.value_transform = transform_of(values);
  shape.n_spans = shape.n_exact = 1;
  return attention::no_decode_kernel_because(shape);
}

GpuAppend append_on_gpu(const mx::array& keys, const mx::array& values, const mx::array& exact_keys,
                        const mx::array& exact_values, const CodecArrays& key_codec,
                        const CodecArrays& value_codec, const CacheGeometry& geometry,
                        const AppendPlan& plan, const GpuStream& gpu) {
  const int batch = keys.shape(0);
  const SideAppend k = append_side(keys, exact_keys, geometry, plan, gpu.stream);
  const SideAppend v = append_side(values, exact_values, geometry, plan, gpu.stream);
  GpuAppend append{{k.next, v.next}, mx::add(k.nonfinite, v.nonfinite, gpu.stream)};
  for (const CodecArrays* codec : {&key_codec, &value_codec}) {
    const int64_t sequences = codec->core->n_sequences();
    require(sequences == 1 || sequences == batch, "[append] keys: got ", batch,
            " sequences, wanted ", sequences, " as the tables of the codec have");
    if (plan.n_sealed == 0) continue;
    const SideAppend& side = codec == &key_codec ? k : v;
    append.outputs.push_back(launch(
        vecinfer::encode_blocks_call(block_shape(*codec, batch, plan.n_sealed)),
        {side.sealed, tables_of(*codec, gpu.stream), forward_of(*codec, gpu.stream)}, gpu)[0]);
  }
  return append;
}

std::optional<std::pair<mx::array, mx::array>> attend_on_gpu(
    const mx::array& q, const Snapshot& keys, const Snapshot& values, const AttendOptions& options,
    const std::optional<mx::array>& mask, mx::StreamOrDevice s) {
  const std::optional<GpuStream> gpu = gpu_stream(s);
  if (!gpu) return std::nullopt;
  const mx::Stream& stream = gpu->stream;
  auto on_cpu = [&](const std::string& because) {
    note_cpu("attend", s, because);
    return std::nullopt;
  };
  const int n_spans = static_cast<int>(keys.spans.size());
  DecodeShape shape;
  if (n_spans > 0) {
    if (auto reason = no_gpu_cache_because(*keys.codec, *values.codec)) return on_cpu(*reason);
    shape.keys = format_of(*keys.codec);
    shape.values = format_of(*values.codec);
    shape.key_transform = transform_of(*keys.codec);
    shape.value_transform = transform_of(*values.codec);
  }
  const int heads = keys.codec->spec.n_kv_heads;
  shape.batch = q.shape(0);
  shape.n_kv_heads = heads;
  shape.group = q.shape(1) / heads;
  shape.n_queries = q.shape(2);
  shape.head_dim = q.shape(3);
  shape.n_spans = n_spans;
  shape.n_exact = (keys.exact ? 1 : 0) + (keys.chunk ? 1 : 0);
  shape.bfloat_cache = keys.layout.exact_dtype == DType::bfloat16;
  shape.softcap = options.logit_softcap > 0;
  shape.mask = mask.has_value();
  shape.out = metal_type(q.dtype());
  if (shape.n_queries < 1 || shape.n_rows() < 1 || keys.layout.length < 1) return std::nullopt;
  if (auto reason = attention::no_decode_kernel_because(shape)) return on_cpu(*reason);

  const int cores = gpu->gpu == Gpu::metal ? kMetalCores : kCudaCores;
  const std::vector<Item> items = attention::plan_items(shape, stretches_of(keys), cores);
  std::vector<int32_t> plan;
  int packed = 0;
  for (const Item& item : items) {
    plan.insert(plan.end(), {item.packed ? 0 : 1, item.source, item.first, item.count,
                             item.position, item.capacity});
    packed += item.packed;
  }
  if (items.size() < 2) plan.resize(12, 0);  // at least two rows: see first_pass_call

  std::vector<mx::array> inputs{dense_on(stream, q, q.dtype())};
  if (n_spans > 0 && shape.key_transform == 2) {
    inputs.push_back(turned_queries(q, *keys.codec, stream));
  }
  inputs.push_back(ints(plan, 6));
  inputs.push_back(ints(seen_of(keys.layout, shape.n_queries, options), 4));
  inputs.push_back(mx::array({options.scale, options.logit_softcap}, mx::float32));
  if (n_spans > 0) {
    inputs.push_back(factors_of(*keys.codec, stream));
    inputs.push_back(tables_of(*keys.codec, stream));
    inputs.push_back(tables_of(*values.codec, stream));
  }
  for (int i = 0; i < n_spans; ++i) {
    inputs.push_back(dense_on(stream, keys.spans[i], mx::uint8));
    inputs.push_back(dense_on(stream, values.spans[i], mx::uint8));
  }
  // The exact storage is row-major, and goes in as it is.
  if (keys.exact) inputs.insert(inputs.end(), {*keys.exact, *values.exact});
  if (keys.chunk) {
    for (const Snapshot* side : {&keys, &values}) {
      inputs.push_back(dense_on(stream, *side->chunk, core_float(side->chunk->dtype())));
    }
  }
  if (mask) {
    const float hidden = -std::numeric_limits<float>::infinity();
    inputs.push_back(mask->dtype() == mx::bool_
                         ? mx::where(*mask, mx::array(0.0f), mx::array(hidden), stream)
                         : *mask);
  }
  const metal::Call first = attention::first_pass_call(shape, static_cast<int>(items.size()));
  std::vector<mx::array> parts = launch(first, inputs, *gpu);

  const float no_sink = -std::numeric_limits<float>::infinity();
  const mx::array sinks = options.sinks ? dense_on(stream, *options.sinks, mx::float32)
                                        : mx::full({q.shape(1)}, no_sink, mx::float32, stream);
  const mx::array inverse = n_spans == 0 ? mx::ones({heads, shape.head_dim}, mx::float32, stream)
                            : shape.value_transform == 2 ? query_matrix(*values.codec)
                                                         : factors_of(*values.codec, stream);
  const mx::array counts =
      mx::array({static_cast<int>(items.size()), packed, shape.group}, mx::int32);
  const std::vector<mx::array> out = launch(attention::second_pass_call(shape),
                                            {parts[0], parts[1], counts, sinks, inverse}, *gpu);
  return std::make_pair(out[0], out[1]);
}

}  // namespace veloxquant
