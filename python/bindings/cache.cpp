#include <mlx/array.h>
#include <mlx/utils.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <map>

#include "python/bindings/module.h"
#include "src/mlx/array_cache.h"
#include "src/mlx/codec_ops.h"
#include "src/mlx/gpu_cache.h"
#include "src/mlx/views.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace veloxquant {
namespace mx = mlx::core;
namespace {

Side side_named(const std::string& name) {
  require(name == "keys" || name == "values", "[codec] side: got '", name,
          "', wanted 'keys' or 'values'");
  return name == "keys" ? Side::keys : Side::values;
}

// What Python holds. Not nanobind's own shared_ptr: its last copy takes the GIL to go away, which
// deadlocks on MLX's thread while another thread waits for that one and holds the GIL.
struct CodecHandle {
  SharedCodec codec;
  const Codec& core() const { return *codec->core; }
};

CodecHandle codec(const std::string& side, const std::string& method, int n_kv_heads, int head_dim,
                  const std::map<std::string, CodecOption>& options,
                  const std::map<std::string, mx::array>& arrays) {
  return {make_codec_arrays({method, side_named(side), n_kv_heads, head_dim, options}, arrays)};
}

void bind_codec(nb::module_& m) {
  nb::class_<CodecHandle>(m, "Codec", "A codec of one side of one layer, with its tables.")
      .def_prop_ro("name", [](const CodecHandle& self) { return self.core().name(); })
      .def_prop_ro("method", [](const CodecHandle& self) { return self.codec->spec.method; })
      .def_prop_ro("n_kv_heads",
                   [](const CodecHandle& self) { return self.codec->spec.n_kv_heads; })
      .def_prop_ro("head_dim", [](const CodecHandle& self) { return self.codec->spec.head_dim; })
      .def_prop_ro("options", [](const CodecHandle& self) { return self.codec->spec.options; })
      .def_prop_ro("arrays", [](const CodecHandle& self) { return self.codec->arrays; })
      .def_prop_ro("n_sequences", [](const CodecHandle& self) { return self.core().n_sequences(); })
      .def_prop_ro("block_bytes", [](const CodecHandle& self) { return self.core().block_bytes(); })
      .def_prop_ro("token_bytes", [](const CodecHandle& self) { return self.core().token_bytes(); })
      .def_prop_ro("scalar_bytes",
                   [](const CodecHandle& self) { return self.core().scalar_bytes(); })
      .def_prop_ro("nbytes", [](const CodecHandle& self) { return self.codec->nbytes(); })
      .def_prop_ro("kept_nbytes", [](const CodecHandle& self) { return self.core().kept_bytes(); })
      .def_prop_ro("bits_per_element",
                   [](const CodecHandle& self) { return self.core().bits_per_element(); })
      .def(
          "encode_blocks",
          [](const CodecHandle& self, const mx::array& x, int64_t position, mx::StreamOrDevice s) {
            return encode_blocks_op(self.codec, x, position, s);
          },
          "x"_a, "position"_a = 0, "stream"_a = nb::none(),
          "x [B, H_kv, n, D] as packed blocks, u8 [B, H_kv, ceil(n / 64), block_bytes].")
      .def(
          "decode_blocks",
          [](const CodecHandle& self, const mx::array& blocks, int64_t position,
             mx::StreamOrDevice s) { return decode_blocks_op(self.codec, blocks, position, s); },
          "blocks"_a, "position"_a = 0, "stream"_a = nb::none(),
          "Blocks as fp32 [B, H_kv, 64 n, D] in the codec's coordinates.");
  m.def("codec", &codec, "side"_a, "method"_a, "n_kv_heads"_a, "head_dim"_a,
        "options"_a = std::map<std::string, CodecOption>(),
        "arrays"_a = std::map<std::string, mx::array>(), WithoutGil(),
        "A codec from its description (codec_spec.h); the README of its folder lists options and "
        "arrays. ValueError where they do not fit together.");
  m.def("codec_methods", &codec_methods);
  m.def(
      "checksum",
      [](const std::string& text, const std::vector<mx::array>& arrays) {
        return checksum_op(text, arrays);
      },
      "text"_a, "arrays"_a, "CRC-32 of text, dtypes, shapes and bytes: a lazy uint32 [1].");
}

void bind_snapshot(nb::module_& m) {
  nb::class_<Snapshot>(m, "EncodedTensor",
                       "Keys or values of a cache at one moment: [B, H_kv, length, D].")
      .def_prop_ro("codec", [](const Snapshot& s) { return CodecHandle{s.codec}; })
      .def_ro("dtype", &Snapshot::dtype)
      .def_ro("spans", &Snapshot::spans)
      .def_prop_ro("nbytes", &Snapshot::nbytes)
      .def_prop_ro("length", [](const Snapshot& s) { return s.layout.length; })
      .def_prop_ro("ndim", [](const Snapshot&) { return 4; })
      .def(
          "dequantize",
          [](const Snapshot& self, mx::StreamOrDevice s) { return dequantize_op(self, s); },
          "stream"_a = nb::none(), "The dense [B, H_kv, length, D]; counted by dequantize_calls().")
      .def(
          "exact_like",
          [](const Snapshot& self, const mx::array& x, mx::StreamOrDevice s) {
            return exact_like(self, x, s);
          },
          "x"_a, "stream"_a = nb::none(),
          "x [B, H_kv, length, D] in 16 bits, laid out as this tensor is.")
      .def_prop_ro("shape", [](const Snapshot& s) {
        return std::vector<int64_t>{s.batch, s.codec->spec.n_kv_heads, s.layout.length,
                                    s.codec->spec.head_dim};
      });
  m.def(
      "attend",
      [](const mx::array& q, const Snapshot& keys, const Snapshot& values, float scale, bool causal,
         int64_t sliding_window, float logit_softcap, const std::optional<mx::array>& mask,
         const std::optional<mx::array>& sinks, mx::StreamOrDevice s) {
        return attend_op(q, keys, values,
                         {scale, causal, sliding_window, logit_softcap, mask, sinks}, s);
      },
      "q"_a, "keys"_a, "values"_a, nb::kw_only(), "scale"_a, "causal"_a = false,
      "sliding_window"_a = 0, "logit_softcap"_a = 0.0f, "mask"_a = nb::none(),
      "sinks"_a = nb::none(), "stream"_a = nb::none(),
      "Fused attention on packed codes: (out [B, H_q, L_q, D], log-sum-exp fp32 [B, H_q, L_q]).");
  m.def(
      "kernel_name",
      [](const CodecHandle& keys, const CodecHandle& values) {
        const auto gpu = gpu_stream({});
        if (gpu && !no_gpu_cache_because(*keys.codec, *values.codec)) {
          return std::string(gpu->gpu == Gpu::metal ? "metal" : "cuda") + " codes (" +
                 keys.core().name() + ")";
        }
        KeyValueSource history;
        history.key_codec = keys.codec->core;
        history.value_codec = values.codec->core;
        history.packed.emplace_back();
        history.packed.back().n_blocks = 64;
        return attention_kernel_name(default_backend(), history);
      },
      "keys"_a, "values"_a, "Which attention kernel runs in decoding, on a history of 64 blocks.");
}

void bind_array_cache(nb::module_& m) {
  nb::class_<ArrayCache>(m, "ArrayCache", "The cache of one layer. See array_cache.h.")
      .def(
          "__init__",
          [](ArrayCache* self, const CodecHandle& keys, const CodecHandle& values, int window,
             int sinks, mx::Dtype exact_dtype) {
            new (self) ArrayCache(keys.codec, values.codec, window, sinks, dtype_of(exact_dtype));
          },
          "keys"_a, "values"_a, "window"_a, "sinks"_a, "exact_dtype"_a)
      .def("update", &ArrayCache::update, "keys"_a, "values"_a, "strict"_a = false,
           "stream"_a = nb::none())
      .def("snapshot", &ArrayCache::snapshot)
      .def("trim", &ArrayCache::trim, "n"_a, "stream"_a = nb::none())
      .def("copy", [](const ArrayCache& self) { return ArrayCache(self); })
      .def("arrays", &ArrayCache::arrays)
      .def("interchange_arrays", &ArrayCache::interchange_arrays, WithoutGil())
      .def("positions", &ArrayCache::positions)
      .def("restore", &ArrayCache::restore, "arrays"_a, "positions"_a, "interchange"_a = false,
           WithoutGil())
      .def_prop_ro("length", [](const ArrayCache& self) { return self.geometry().length; })
      .def_prop_ro("exact_tokens",
                   [](const ArrayCache& self) { return self.geometry().exact_count(); })
      .def_prop_ro("nbytes", &ArrayCache::nbytes)
      .def_prop_ro("nonfinite", &ArrayCache::nonfinite);
}

}  // namespace

void bind_cache(nb::module_& m) {
  bind_codec(m);
  bind_snapshot(m);
  bind_array_cache(m);
}

}  // namespace veloxquant
