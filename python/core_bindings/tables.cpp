#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cstring>

#include "python/core_bindings/module.h"

using namespace nanobind::literals;

namespace veloxquant {
namespace {

Side side_named(const std::string& side) {
  require(side == "keys" || side == "values", "[SideTables] side: got '", side,
          "', wanted keys or values");
  return side == "keys" ? Side::keys : Side::values;
}

TransformKind transform_named(const std::string& name) {
  if (name == "none") return TransformKind::none;
  if (name == "hadamard") return TransformKind::hadamard;
  require(name == "dense", "[SideTables] transform: got '", name,
          "', wanted none, hadamard or dense");
  return TransformKind::dense;
}

bool row_major(const CpuArray& array) {
  int64_t dense = 1;
  for (int d = static_cast<int>(array.ndim()) - 1; d >= 0; --d) {
    if (array.shape(d) != 1 && array.stride(d) != dense) return false;
    dense *= static_cast<int64_t>(array.shape(d));
  }
  return true;
}

// A copy of a row-major array, and a view of the copy.
template <class T>
TensorView keep(const CpuArray& array, DType dtype, const char* name, std::vector<T>& to) {
  TensorView view = view_of(array, "SideTables", name);
  require(view.dtype == dtype, "[SideTables] ", name, ": got ", dtype_name(view.dtype), ", wanted ",
          dtype_name(dtype));
  require(row_major(array), "[SideTables] ", name, ": got a strided array, wanted a row-major one");
  to.resize(view.nbytes() / sizeof(T));
  std::memcpy(to.data(), view.data, view.nbytes());
  view.data = to.data();
  return view;
}

nb::object numpy_bytes(const std::vector<uint8_t>& bytes) {
  auto* copy = new std::vector<uint8_t>(bytes);
  nb::capsule owner(copy, [](void* p) noexcept { delete static_cast<std::vector<uint8_t>*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, uint8_t>(copy->data(), {copy->size()}, owner));
}

// [H][D][D]: row i of head h is what `apply` makes of unit vector i.
template <class Apply>
nb::object matrix_of(const Codec& codec, const Apply& apply) {
  const size_t h = codec.n_kv_heads(), d = codec.head_dim();
  auto* data = new std::vector<float>(h * d * d, 0.0f);
  nb::capsule owner(data, [](void* p) noexcept { delete static_cast<std::vector<float>*>(p); });
  for (size_t head = 0; head < h; ++head) {
    float* rows = data->data() + head * d * d;
    for (size_t i = 0; i < d; ++i) rows[i * d + i] = 1.0f;
    apply(static_cast<int>(head), rows, static_cast<int64_t>(d));
  }
  return nb::cast(nb::ndarray<nb::numpy, float>(data->data(), {h, d, d}, owner));
}

}  // namespace

SideTables::SideTables(const std::string& side, int n_kv_heads, int head_dim,
                       const CpuArray& tables, const std::string& transform,
                       const std::optional<CpuArray>& scale,
                       const std::optional<CpuArray>& encode_matrix,
                       const std::optional<CpuArray>& query_matrix) {
  const TensorView table_view = keep(tables, DType::float16, "tables", tables_);
  Transform t;
  t.kind = transform_named(transform);
  if (scale) t.scale = keep(*scale, DType::float32, "scale", scale_);
  if (encode_matrix)
    t.encode_matrix = keep(*encode_matrix, DType::float32, "encode_matrix", encode_matrix_);
  if (query_matrix)
    t.query_matrix = keep(*query_matrix, DType::float32, "query_matrix", query_matrix_);
  require(table_view.ndim == 4, "[SideTables] tables: got ", table_view.ndim,
          " dimensions, wanted [KV heads, sub-vectors or 1, centroids, dimensions]");
  const int sub_dim = static_cast<int>(table_view.shape[3]);
  require(sub_dim >= 1 && head_dim % sub_dim == 0, "[SideTables] tables: got entries of ", sub_dim,
          " dimensions, wanted a divisor of head_dim = ", head_dim);
  const int n_subvectors = head_dim / sub_dim;
  codec_ = make_vecinfer_codec(side_named(side), n_kv_heads, head_dim, n_subvectors, table_view, t);
  try {
    prepared_ =
        cuda::prepare_side(codec_->side(), n_kv_heads, head_dim, n_subvectors, table_view, t);
  } catch (const Error& error) {
    cuda_problem_ = error.what();
  }
}

SideTables::SideTables(const CodecSpec& spec) : codec_(make_codec(spec, {})) {
  try {
    general_ = cuda::prepare_codec(spec, {});
  } catch (const Error& error) {
    cuda_problem_ = error.what();
  }
}

const std::vector<uint8_t>& SideTables::cuda_blob() const {
  return is_general() ? general_.blob() : prepared().blob;
}

int64_t SideTables::cuda_block_bytes() const {
  return is_general() ? general_.block_bytes() : prepared().format.block_bytes();
}

const cuda::PreparedSide& SideTables::prepared() const {
  require(cuda_problem_.empty(), cuda_problem_);
  return prepared_;
}

void bind_tables(nb::module_& m) {
  nb::class_<SideTables>(m, "SideTables",
                         "Tables and transform of the keys or the values of one layer. tables: "
                         "fp16 [KV heads, sub-vectors or 1, centroids, dimensions]; scale fp32 "
                         "[KV heads, D] (hadamard); encode_matrix, query_matrix fp32 [KV heads, D, "
                         "D] (dense). Arrays are copied.")
      .def(nb::init<const std::string&, int, int, const CpuArray&, const std::string&,
                    const std::optional<CpuArray>&, const std::optional<CpuArray>&,
                    const std::optional<CpuArray>&>(),
           "side"_a, "n_kv_heads"_a, "head_dim"_a, "tables"_a, "transform"_a = "none",
           "scale"_a = nb::none(), "encode_matrix"_a = nb::none(), "query_matrix"_a = nb::none())
      .def_static(
          "turboquant",
          [](const std::string& side, int n_kv_heads, int head_dim, int bits, int64_t seed) {
            return SideTables(CodecSpec{"turboquant",
                                        side_named(side),
                                        n_kv_heads,
                                        head_dim,
                                        {{"bits", int64_t{bits}}, {"seed", seed}}});
          },
          "side"_a, "n_kv_heads"_a, "head_dim"_a, "bits"_a, "seed"_a = 0,
          "A side without tables: a random rotation and a fixed quantiser, 1 to 4 bits.")
      .def_prop_ro("n_kv_heads", [](const SideTables& s) { return s.codec()->n_kv_heads(); })
      .def_prop_ro("head_dim", [](const SideTables& s) { return s.codec()->head_dim(); })
      .def_prop_ro("name", [](const SideTables& s) { return s.codec()->name(); })
      .def_prop_ro("bits", [](const SideTables& s) { return s.codec()->bits_per_element(); })
      .def_prop_ro(
          "block_bytes", [](const SideTables& s) { return s.codec()->block_bytes(); },
          "Bytes of 64 tokens of one KV head, in the order that files have.")
      .def_prop_ro("cuda_problem", &SideTables::cuda_problem,
                   "Why these tables cannot be used on CUDA; empty where they can.")
      .def_prop_ro("is_general", &SideTables::is_general,
                   "Whether CUDA's general kernels serve it: blocks in the order that files have.")
      .def_prop_ro(
          "by_lane",
          [](const SideTables& s) {
            return !s.is_general() && s.prepared().format.lookup == cuda::Lookup::by_lane;
          },
          "CUDA looks these tables up by lane, the fastest way.")
      .def_prop_ro("cuda_block_bytes", &SideTables::cuda_block_bytes)
      .def(
          "cuda_blob", [](const SideTables& s) { return numpy_bytes(s.cuda_blob()); },
          "What the kernels read: to be copied to the device.")
      .def(
          "query_matrix",
          [](const SideTables& s) {
            return matrix_of(*s.codec(), [&](int head, float* rows, int64_t n) {
              s.codec()->transform_query(head, rows, n);
            });
          },
          "fp32 [KV heads, D, D]: q' = q F, for keys in the codec's coordinates.")
      .def(
          "inverse_matrix",
          [](const SideTables& s) {
            return matrix_of(*s.codec(), [&](int head, float* rows, int64_t n) {
              s.codec()->inverse(head, rows, n);
            });
          },
          "fp32 [KV heads, D, D]: x = y G, from the codec's coordinates back.");
}

}  // namespace veloxquant
