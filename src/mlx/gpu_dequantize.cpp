// dequantize() of a cache on the GPU: blocks by the codec's kernels, then everything in its place.
#include <mlx/ops.h>

#include <algorithm>
#include <limits>

#include "src/codecs/kernel_calls.h"
#include "src/mlx/function_op.h"
#include "src/mlx/gpu_cache.h"
#include "src/mlx/gpu_codec.h"
#include "src/mlx/views.h"
#include "veloxquant/backend.h"
#include "veloxquant/dequantize.h"

namespace veloxquant {
namespace mx = mlx::core;
namespace {

mx::array tokens_of(const mx::array& a, int64_t first, int64_t end, const mx::Stream& stream) {
  if (first == 0 && end == a.shape(2)) return a;
  return mx::slice(a, {0, 0, static_cast<int>(first), 0},
                   {a.shape(0), a.shape(1), static_cast<int>(end), a.shape(3)}, stream);
}

// Tokens as given, as the cache keeps them: NaN is 0, what is too large the largest number.
mx::array as_kept(const mx::array& x, DType kept, const mx::Stream& stream) {
  const mx::Dtype dtype = mlx_dtype(kept);
  if (x.dtype() == dtype) return mx::nan_to_num(x, 0.0f, std::nullopt, std::nullopt, stream);
  const float most = kept == DType::float16 ? 65504.0f : 3.38953139e38f;
  const mx::array wide =
      mx::nan_to_num(mx::astype(x, mx::float32, stream), 0.0f, most, -most, stream);
  return mx::astype(mx::clip(wide, mx::array(-most), mx::array(most), stream), dtype, stream);
}

}  // namespace

std::optional<mx::array> dequantize_on_gpu(const Snapshot& snapshot, mx::StreamOrDevice s) {
  const std::optional<GpuStream> gpu = gpu_stream(s);
  if (!gpu) return std::nullopt;
  const MaybeGpuCodec& made = gpu_codec(*snapshot.codec);
  const SnapshotLayout& layout = snapshot.layout;
  if (const auto* reason = std::get_if<std::string>(&made)) {
    note_cpu("dequantize", s, *reason);
    return std::nullopt;
  }
  if (layout.length == 0) return std::nullopt;
  const auto& codec = std::get<GpuCodec>(made);
  const CodecSpec& spec = snapshot.codec->spec;
  const mx::Stream& stream = gpu->stream;
  const mx::Dtype dtype = core_float(snapshot.dtype);
  const int64_t tail = layout.visibility.tail_start;
  const int64_t code_end = layout.visibility.code_end(layout.visibility.first_query);
  std::vector<mx::array> parts;
  auto exact = [&](const mx::array& a, int64_t slot, int64_t position, int64_t end, bool as_given) {
    // Of tokens in both forms the codes count.
    const int64_t from = position >= tail ? std::max(position, code_end) : position;
    if (from >= end) return;
    const mx::array tokens = tokens_of(a, slot + from - position, slot + end - position, stream);
    parts.push_back(
        mx::astype(as_given ? as_kept(tokens, layout.exact_dtype, stream) : tokens, dtype, stream));
  };
  const int64_t sinks = std::min<int64_t>(layout.exact_length, layout.sinks);
  if (snapshot.exact) exact(*snapshot.exact, 0, 0, sinks, false);
  // A chunk from the first token on holds the sinks as well.
  if (snapshot.chunk && layout.chunk_start < tail) {
    const int64_t end = std::min<int64_t>(tail, layout.length);
    parts.push_back(
        mx::astype(as_kept(tokens_of(*snapshot.chunk, 0, end - layout.chunk_start, stream),
                           layout.exact_dtype, stream),
                   dtype, stream));
  }
  for (size_t i = 0; i < layout.packed.size(); ++i) {
    const PackedSpan& span = layout.packed[i];
    const int64_t end = std::min(span.end(), code_end);
    if (span.start >= end) continue;
    const mx::array rows = codec.decode(snapshot.spans[i], span.start, *gpu);
    const mx::array moved =
        launch(metal::inverse_rows_call(rows.shape(0), rows.shape(1), rows.shape(2), spec.head_dim,
                                        codec.inverse_transform, metal_type(dtype)),
               {rows, codec.inverse}, *gpu)[0];
    parts.push_back(tokens_of(moved, 0, end - span.start, stream));
  }
  if (snapshot.exact) {
    exact(*snapshot.exact, layout.sinks, layout.exact_tail_start, layout.exact_length, false);
  }
  if (snapshot.chunk) {
    const int64_t from = std::max(layout.chunk_start, std::min<int64_t>(tail, layout.length));
    exact(*snapshot.chunk, from - layout.chunk_start, from, layout.length, true);
  }
  count_dequantize_call();
  if (debug_enabled()) log_once("dequantize: on the GPU, caches of " + spec.method);
  const mx::array whole = parts.size() == 1 ? parts[0] : mx::concatenate(parts, 2, stream);
  require(whole.shape(2) == layout.length, "[dequantize] tokens: got ", whole.shape(2), ", wanted ",
          layout.length);
  return dtype == snapshot.dtype ? whole : mx::astype(whole, snapshot.dtype, stream);
}

}  // namespace veloxquant
