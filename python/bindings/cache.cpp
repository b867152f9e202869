#include <mlx/array.h>
#include <mlx/utils.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "python/bindings/module.h"
#include "src/mlx/array_cache.h"
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

std::string kernel_name(const CodecArrays& keys, const CodecArrays& values) {
  const std::string codecs = keys.name == values.name ? keys.name : keys.name + " / " + values.name;
  return std::string(backend_name(default_backend())) + "/" + simd_level() + " " + codecs;
}

// (method, heads, head_dim, sub-vectors, transform, has scale): numbers and words for a file.
using CodecDescription = std::tuple<std::string, int, int, int, std::string, bool>;

const char* const kTransformNames[] = {"none", "hadamard", "dense"};

CodecDescription describe(const CodecArrays& codec) {
  const bool exact = codec.method == CodecArrays::Method::exact;
  return {exact ? "exact" : "vecinfer",
          codec.n_kv_heads,
          codec.head_dim,
          codec.n_subvectors,
          kTransformNames[static_cast<int>(codec.transform)],
          codec.has_scale};
}

CodecArrays restored_codec(const std::string& side, const CodecDescription& description,
                           mx::Dtype exact_dtype, const std::vector<mx::array>& arrays) {
  const auto& [method, heads, dim, subvectors, transform, has_scale] = description;
  require(method == "exact" || method == "vecinfer", "[codec] method: got '", method,
          "', wanted exact or vecinfer");
  CodecArrays codec;
  codec.method = method == "exact" ? CodecArrays::Method::exact : CodecArrays::Method::vecinfer;
  codec.side = side_named(side);
  codec.n_kv_heads = heads;
  codec.head_dim = dim;
  codec.n_subvectors = subvectors;
  codec.has_scale = has_scale;
  codec.exact_dtype = dtype_of(exact_dtype);
  const auto* name = std::find(std::begin(kTransformNames), std::end(kTransformNames), transform);
  require(name != std::end(kTransformNames), "[codec] transform: got '", transform,
          "', wanted none, hadamard or dense");
  codec.transform = static_cast<TransformKind>(name - kTransformNames);
  require(!has_scale || codec.transform == TransformKind::hadamard,
          "[codec] scale: got smooth factors and transform '", transform, "', wanted hadamard");
  return restored_codec_arrays(codec, arrays);
}

void bind_codec(nb::module_& m) {
  nb::class_<CodecArrays>(m, "Codec", "A codec of one side of one layer, with its tables.")
      .def_ro("name", &CodecArrays::name)
      .def_ro("n_kv_heads", &CodecArrays::n_kv_heads)
      .def_ro("head_dim", &CodecArrays::head_dim)
      .def_ro("n_subvectors", &CodecArrays::n_subvectors)
      .def_ro("block_bytes", &CodecArrays::block_bytes)
      .def_ro("arrays", &CodecArrays::arrays)
      .def_prop_ro("description", &describe,
                   "What restored_codec needs beside the arrays: (method, heads, head_dim, "
                   "n_subvectors, transform, has scale).")
      .def_prop_ro("nbytes", &CodecArrays::nbytes)
      .def_prop_ro("bits_per_element", &CodecArrays::bits_per_element);
  m.def(
      "exact_codec",
      [](const std::string& side, int n_kv_heads, int head_dim, mx::Dtype dtype) {
        return exact_codec_arrays(side_named(side), n_kv_heads, head_dim, dtype_of(dtype));
      },
      "side"_a, "n_kv_heads"_a, "head_dim"_a, "dtype"_a);
  m.def(
      "vecinfer_codec",
      [](const std::string& side, const mx::array& tables, int n_subvectors, bool hadamard,
         const std::optional<mx::array>& scale, const std::optional<mx::array>& encode_matrix,
         const std::optional<mx::array>& query_matrix) {
        return vecinfer_codec_arrays(side_named(side), tables, n_subvectors, hadamard, scale,
                                     encode_matrix, query_matrix);
      },
      "side"_a, "tables"_a, "n_subvectors"_a, "hadamard"_a = true, "scale"_a = nb::none(),
      "encode_matrix"_a = nb::none(), "query_matrix"_a = nb::none(),
      "tables: [H, M or 1, C, d]; scale: [H, D]; matrices: [H, D, D]. See codec_arrays.h.");
  m.def("restored_codec", &restored_codec, "side"_a, "description"_a, "exact_dtype"_a, "arrays"_a,
        "The codec of a file; ValueError where the arrays are not what the description says.");
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
      .def_ro("codec", &Snapshot::codec)
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
        return std::vector<int64_t>{s.batch, s.codec.n_kv_heads, s.layout.length, s.codec.head_dim};
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
  m.def("kernel_name", &kernel_name, "keys"_a, "values"_a, "Which attention kernel runs.");
}

void bind_array_cache(nb::module_& m) {
  nb::class_<ArrayCache>(m, "ArrayCache", "The cache of one layer. See array_cache.h.")
      .def(
          "__init__",
          [](ArrayCache* self, const CodecArrays& keys, const CodecArrays& values, int window,
             int sinks, mx::Dtype exact_dtype) {
            new (self) ArrayCache(keys, values, window, sinks, dtype_of(exact_dtype));
          },
          "keys"_a, "values"_a, "window"_a, "sinks"_a, "exact_dtype"_a)
      .def("update", &ArrayCache::update, "keys"_a, "values"_a, "strict"_a = false,
           "stream"_a = nb::none())
      .def("snapshot", &ArrayCache::snapshot)
      .def("trim", &ArrayCache::trim, "n"_a, "stream"_a = nb::none())
      .def("copy", [](const ArrayCache& self) { return ArrayCache(self); })
      .def("arrays", &ArrayCache::arrays)
      .def("interchange_arrays", &ArrayCache::interchange_arrays)
      .def("positions", &ArrayCache::positions)
      .def("restore", &ArrayCache::restore, "arrays"_a, "positions"_a, "interchange"_a = false)
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
