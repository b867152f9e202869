#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>

#include "python/bindings/module.h"
#include "veloxquant/artifacts.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace veloxquant {
namespace {

// An array in transit: (dtype name, shape, little-endian bytes). Python makes numpy or MLX arrays
// of it; the module itself needs neither.
using RawArray = std::tuple<std::string, std::vector<int64_t>, nb::bytes>;

DType dtype_named(const std::string& name) {
  for (DType dtype : {DType::float32, DType::float16, DType::bfloat16, DType::uint8, DType::uint16,
                      DType::int32, DType::boolean}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  fail("[artifacts] dtype: got '", name,
       "', wanted float32, float16, bfloat16, uint8, uint16, int32 or bool");
}

void save(const ArtifactStore& store, const std::string& name, const std::string& kind,
          const std::string& attributes, const std::map<std::string, RawArray>& arrays) {
  Artifact artifact;
  artifact.kind = kind;
  artifact.attributes = attributes;
  for (const auto& [key, raw] : arrays) {
    Array& array = artifact.arrays[key];
    array.dtype = dtype_named(std::get<0>(raw));
    array.shape = std::get<1>(raw);
    const nb::bytes& bytes = std::get<2>(raw);
    array.bytes.resize(bytes.size());
    std::memcpy(array.bytes.data(), bytes.c_str(), bytes.size());
  }
  store.save(name, artifact);
}

nb::tuple load(const ArtifactStore& store, const std::string& name) {
  const Artifact artifact = store.load(name);
  nb::dict arrays;
  for (const auto& [key, array] : artifact.arrays) {
    arrays[nb::str(key.c_str())] =
        nb::make_tuple(std::string(dtype_name(array.dtype)), array.shape,
                       nb::bytes(array.bytes.data(), array.bytes.size()));
  }
  return nb::make_tuple(artifact.kind, artifact.attributes, arrays);
}

}  // namespace

void bind_artifacts(nb::module_& m) {
  nb::class_<ArtifactStore>(m, "ArtifactStore", "Named arrays on disk. See artifacts.h.")
      .def(nb::init<const std::string&>(), "directory"_a)
      .def("save", &save, "name"_a, "kind"_a, "attributes"_a, "arrays"_a)
      .def("load", &load, "name"_a, "-> (kind, attributes as JSON text, {name: raw array})")
      .def("exists", &ArtifactStore::exists, "name"_a)
      .def("names", &ArtifactStore::names);
}

}  // namespace veloxquant
