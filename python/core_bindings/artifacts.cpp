#include "veloxquant/artifacts.h"

#include <nanobind/stl/string.h>

#include "python/core_bindings/module.h"

namespace veloxquant {
namespace {

nb::dlpack::dtype dlpack_of(DType dtype, const std::string& name) {
  switch (dtype) {
    case DType::float32:
      return nb::dtype<float>();
    case DType::float16:
      return {static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};
    case DType::uint8:
      return nb::dtype<uint8_t>();
    case DType::uint16:
      return nb::dtype<uint16_t>();
    case DType::int32:
      return nb::dtype<int32_t>();
    default:
      fail("[load_artifact] ", name, ": got ", dtype_name(dtype), ", which NumPy has not");
  }
}

nb::object numpy_of(Array&& array, const std::string& name) {
  const nb::dlpack::dtype dtype = dlpack_of(array.dtype, name);
  auto* kept = new Array(std::move(array));
  nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<Array*>(p); });
  const std::vector<size_t> shape(kept->shape.begin(), kept->shape.end());
  return nb::cast(nb::ndarray<nb::numpy>(kept->bytes.data(), shape.size(), shape.data(), owner,
                                         nullptr, dtype));
}

}  // namespace

void bind_artifacts(nb::module_& m) {
  m.def(
      "load_artifact",
      [](const std::string& directory, const std::string& name) {
        Artifact artifact = ArtifactStore(directory).load(name);
        nb::dict arrays;
        for (auto& [key, array] : artifact.arrays)
          arrays[key.c_str()] = numpy_of(std::move(array), key);
        return nb::make_tuple(artifact.kind, artifact.attributes, arrays);
      },
      nb::arg("directory"), nb::arg("name"),
      "(kind, attributes as JSON, {name: NumPy array}) of what `veloxquant calibrate` wrote, its "
      "checksums verified.");
}

}  // namespace veloxquant
