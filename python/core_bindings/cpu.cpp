// Encoding and attention on CPU arrays: blocks in the portable order, exact tokens in slots.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <vector>

#include "python/core_bindings/module.h"
#include "src/backends/cpu/convert.h"
#include "veloxquant/attention.h"

using namespace nanobind::literals;

namespace veloxquant {
namespace {

void check_shape(const TensorView& view, std::initializer_list<int64_t> wanted, const char* what,
                 const char* name) {
  bool same = view.ndim == static_cast<int>(wanted.size());
  int d = 0;
  for (const int64_t n : wanted) {
    if (same && n >= 0 && view.shape[d] != n) same = false;
    ++d;
  }
  std::ostringstream got, want;
  for (int i = 0; i < view.ndim; ++i) got << (i > 0 ? ", " : "") << view.shape[i];
  d = 0;
  for (const int64_t n : wanted) {
    if (d++ > 0) want << ", ";
    if (n >= 0) {
      want << n;
    } else {
      want << "any";
    }
  }
  require(same, "[", what, "] ", name, ": got [", got.str(), "], wanted [", want.str(), "]");
}

// x: [B, H, 64 n, D], 16 bits, finite; codes: uint8 [B, H, blocks, block_bytes], blocks first_block
// .. are written.
void encode(const SideTables& side, const CpuArray& x_array, const CpuArray& code_array,
            int64_t first_block) {
  const TensorView x = view_of(x_array, "encode", "x");
  const MutableTensorView codes = writable(code_array, "encode", "codes");
  const Codec& codec = *side.codec();
  const int64_t dim = codec.head_dim(), heads = codec.n_kv_heads();
  check_shape(x, {-1, heads, -1, dim}, "encode", "x");
  check_shape(read_only(codes), {x.shape[0], heads, -1, codec.block_bytes()}, "encode", "codes");
  const int64_t n_blocks = x.shape[2] / kBlockTokens;
  require(x.shape[2] % kBlockTokens == 0 && x.stride[3] == 1 && codes.stride[3] == 1 &&
              codes.dtype == DType::uint8,
          "[encode] x: got ", x.shape[2],
          " tokens, wanted whole blocks of 64 and a last stride of "
          "1, codes of uint8");
  require(first_block >= 0 && first_block + n_blocks <= codes.shape[2],
          "[encode] first_block: got ", first_block, ", wanted room for ", n_blocks, " blocks in ",
          codes.shape[2]);
  nb::gil_scoped_release release;
  parallel_for(static_cast<long>(x.shape[0] * heads * n_blocks), [&](long i) {
    const int64_t block = i % n_blocks, head = i / n_blocks % heads, b = i / n_blocks / heads;
    std::vector<float> rows(kBlockTokens * dim);
    for (int64_t t = 0; t < kBlockTokens; ++t) {
      cpu::to_float(x.dtype, x.at(b, head, kBlockTokens * block + t), dim, rows.data() + t * dim);
    }
    codec.encode_block(
        default_backend(),
        {static_cast<int>(b), static_cast<int>(head), kBlockTokens * (first_block + block)},
        rows.data(), kBlockTokens, static_cast<uint8_t*>(codes.at(b, head, first_block + block)));
  });
}

// One sequence. Arrays without the batch axis: q [Hq, n, D]; codes [H, blocks, bytes], of which
// n_packed tokens count; exact [H, slots, D], of which n_exact count: the sinks, then the tail;
// chunk [H, n, D] or None: the queries' own tokens, seen causally. n_sealed: so many blocks of the
// codes beyond n_packed hold tokens that are exact or chunk, too; a query sees them as codes where
// they had left the window when its token came (strict decoding).
void attend_row(const SideTables& key_side, const SideTables& value_side, const CpuArray& q_array,
                const CpuArray& key_codes, const CpuArray& value_codes, int64_t n_packed,
                const CpuArray& exact_keys, const CpuArray& exact_values, int64_t n_exact,
                int64_t sinks, const std::optional<CpuArray>& chunk_keys,
                const std::optional<CpuArray>& chunk_values, float scale, const CpuArray& out,
                const std::optional<CpuArray>& lse, int n_sealed, int window) {
  const char* what = "attend";
  const auto batched = [what](const CpuArray& array, const char* name) {
    TensorView view = view_of(array, what, name);
    require(view.ndim == 3, "[attend] ", name, ": got ", view.ndim, " dimensions, wanted 3");
    for (int d = 3; d > 0; --d) {
      view.shape[d] = view.shape[d - 1];
      view.stride[d] = view.stride[d - 1];
    }
    view.shape[0] = 1;
    view.stride[0] = 0;
    view.ndim = 4;
    return view;
  };
  const int64_t heads = key_side.codec()->n_kv_heads(), dim = key_side.codec()->head_dim();
  const TensorView q = batched(q_array, "q"), result = batched(out, "out");
  KeyValueSource source;
  source.key_codec = key_side.codec();
  source.value_codec = value_side.codec();
  if (n_packed > 0 || n_sealed > 0) {
    const TensorView k = batched(key_codes, "key_codes"), v = batched(value_codes, "value_codes");
    check_shape(k, {1, heads, -1, source.key_codec->block_bytes()}, what, "key_codes");
    check_shape(v, {1, heads, k.shape[2], source.value_codec->block_bytes()}, what, "value_codes");
    PackedRun run;
    require(n_sealed == 0 || n_packed % kBlockTokens == 0, "[attend] n_sealed: got ", n_sealed,
            " behind ", n_packed, " tokens, wanted whole blocks");
    run.n_blocks = static_cast<int>((n_packed + kBlockTokens - 1) / kBlockTokens) + n_sealed;
    require(run.n_blocks <= k.shape[2] && k.dtype == DType::uint8 && v.dtype == DType::uint8 &&
                k.stride[3] == 1 && v.stride[3] == 1 && k.stride[2] == k.shape[3] &&
                v.stride[2] == v.shape[3],
            "[attend] n_packed: got ", n_packed, " tokens, wanted at most ",
            k.shape[2] * kBlockTokens, " and uint8 codes, block after block");
    run.last_count = n_sealed > 0 ? kBlockTokens
                                  : static_cast<int>(n_packed - kBlockTokens * (run.n_blocks - 1));
    run.keys = static_cast<const uint8_t*>(k.data);
    run.values = static_cast<const uint8_t*>(v.data);
    run.key_head_stride = k.stride[1];
    run.value_head_stride = v.stride[1];
    run.start = sinks;
    source.packed.push_back(run);
  }
  const TensorView ek = batched(exact_keys, "exact_keys"),
                   ev = batched(exact_values, "exact_values");
  check_shape(ek, {1, heads, -1, dim}, what, "exact_keys");
  check_shape(ev, {1, heads, ek.shape[2], dim}, what, "exact_values");
  require(n_exact <= ek.shape[2], "[attend] n_exact: got ", n_exact, ", wanted at most ",
          ek.shape[2]);
  source.exact_dtype = ek.dtype;
  const auto add_exact = [&](TensorView keys, TensorView values, int64_t slot, int64_t n,
                             int64_t start) {
    if (n <= 0) return;
    ExactRun run;
    run.keys = keys;
    run.values = values;
    for (TensorView* view : {&run.keys, &run.values}) {
      view->data = view->at(0, 0, slot);
      view->shape[2] = n;
    }
    run.start = start;
    source.exact.push_back(run);
  };
  const int64_t n_sinks = n_exact < sinks ? n_exact : sinks, tail_start = sinks + n_packed;
  add_exact(ek, ev, 0, n_sinks, 0);
  add_exact(ek, ev, n_sinks, n_exact - n_sinks, tail_start);
  source.length = n_packed + n_exact;
  source.visibility = {tail_start, n_sealed, window, n_sealed > 0, source.length};
  AttentionParams params;
  params.scale = scale;
  if (chunk_keys && chunk_values) {
    const TensorView k = batched(*chunk_keys, "chunk_keys"),
                     v = batched(*chunk_values, "chunk_values");
    check_shape(k, {1, heads, q.shape[2], dim}, what, "chunk_keys");
    check_shape(v, {1, heads, q.shape[2], dim}, what, "chunk_values");
    add_exact(k, v, 0, k.shape[2], source.length);
    source.length += k.shape[2];
    params.mask.causal = true;
  }
  TensorView log_sums;
  if (lse) {
    log_sums = view_of(*lse, what, "lse");
    check_shape(log_sums, {q.shape[1], q.shape[2]}, what, "lse");
    log_sums.ndim = 3;
    for (int d = 2; d > 0; --d) {
      log_sums.shape[d] = log_sums.shape[d - 1];
      log_sums.stride[d] = log_sums.stride[d - 1];
    }
    log_sums.shape[0] = 1;
    log_sums.stride[0] = 0;
  }
  nb::gil_scoped_release release;
  attend(default_backend(), q, source, params, writable(result),
         lse ? writable(log_sums) : MutableTensorView());
}

// Codes of one sequence -> x fp32 [H, n, D] in the original coordinates.
void decode_row(const SideTables& side, const CpuArray& code_array, int64_t first_block,
                const CpuArray& x_array) {
  const Codec& codec = *side.codec();
  const TensorView codes = view_of(code_array, "decode", "codes");
  const MutableTensorView x = writable(x_array, "decode", "x");
  const int64_t heads = codec.n_kv_heads(), dim = codec.head_dim();
  check_shape(codes, {heads, -1, codec.block_bytes()}, "decode", "codes");
  check_shape(read_only(x), {heads, -1, dim}, "decode", "x");
  const int64_t n = x.shape[1], n_blocks = (n + kBlockTokens - 1) / kBlockTokens;
  require(first_block >= 0 && first_block + n_blocks <= codes.shape[1] && codes.stride[2] == 1 &&
              x.dtype == DType::float32 && x.stride[2] == 1 && x.stride[1] == dim,
          "[decode] x: got ", n, " tokens from block ", first_block, ", wanted at most ",
          codes.shape[1], " blocks, fp32 and row-major");
  nb::gil_scoped_release release;
  parallel_for(static_cast<long>(heads * n_blocks), [&](long i) {
    const int64_t block = i % n_blocks, head = i / n_blocks;
    const int count = static_cast<int>(std::min<int64_t>(kBlockTokens, n - kBlockTokens * block));
    float* rows = static_cast<float*>(x.at(head, kBlockTokens * block));
    codec.decode_block(
        default_backend(), {0, static_cast<int>(head), kBlockTokens * (first_block + block)},
        static_cast<const uint8_t*>(codes.at(head, first_block + block)), count, rows, dim);
    codec.inverse(static_cast<int>(head), rows, count);
  });
}

}  // namespace

void bind_cpu(nb::module_& m) {
  m.def("cpu_encode", &encode, "side"_a, "x"_a, "codes"_a, "first_block"_a);
  m.def("cpu_attend_row", &attend_row, "keys"_a, "values"_a, "q"_a, "key_codes"_a, "value_codes"_a,
        "n_packed"_a, "exact_keys"_a, "exact_values"_a, "n_exact"_a, "sinks"_a, "chunk_keys"_a,
        "chunk_values"_a, "scale"_a, "out"_a, "lse"_a = nb::none(), "n_sealed"_a = 0,
        "window"_a = 64);
  m.def("cpu_decode_row", &decode_row, "side"_a, "codes"_a, "first_block"_a, "x"_a);
}

}  // namespace veloxquant
