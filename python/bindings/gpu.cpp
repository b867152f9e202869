#include <mlx/array.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "python/bindings/module.h"
#include "src/mlx/gpu_launch.h"
#include "veloxquant/error.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace veloxquant {
namespace mx = mlx::core;
namespace {

nb::dict described(const GpuLaunch& launch) {
  nb::dict d;
  d["gpu"] = launch.gpu == Gpu::metal ? "metal" : "cuda";
  d["name"] = launch.name;
  d["header"] = launch.header;
  d["body"] = launch.body;
  d["inputs"] = launch.inputs;
  d["outputs"] = launch.outputs;
  d["row_contiguous"] = launch.row_contiguous;
  nb::list arguments;
  for (const auto& [name, value] : launch.arguments) {
    arguments.append(nb::make_tuple(
        name, std::visit([](const auto& v) { return nb::object(nb::cast(v)); }, value)));
  }
  d["template"] = arguments;
  d["grid"] = launch.grid;
  d["threadgroup"] = launch.threadgroup;
  nb::list shapes, dtypes;
  for (const mx::Shape& shape : launch.shapes) {
    shapes.append(nb::cast(std::vector<int>(shape.begin(), shape.end())));
  }
  for (const mx::Dtype& dtype : launch.dtypes) dtypes.append(nb::cast(dtype));
  d["output_shapes"] = shapes;
  d["output_dtypes"] = dtypes;
  return d;
}

}  // namespace

void bind_gpu(nb::module_& m) {
  m.def(
      "gpu_operations",
      [] {
        std::vector<std::pair<std::string, std::string>> all;
        for (const GpuOperation& o : gpu_operations()) all.emplace_back(o.name, o.limits);
        return all;
      },
      "(name, limits) of what runs on a GPU stream; all else runs on the CPU.");
  m.def(
      "gpu_backend",
      []() -> std::string {
        const auto gpu = gpu_stream({});
        return !gpu ? "" : gpu->gpu == Gpu::metal ? "metal" : "cuda";
      },
      "'metal' or 'cuda': what launches kernels on MLX's default device; '' where that is the "
      "CPU.");
  m.def("gpu_launches", &gpu_launches,
        "Kernels handed to MLX's GPU by this process, by name, and how often.");
  m.def(
      "_set_gpu_launcher",
      [](const nb::object& run, const std::string& gpu) {
        require(gpu == "metal" || gpu == "cuda", "[_set_gpu_launcher] gpu: got '", gpu,
                "', wanted 'metal' or 'cuda'");
        const Gpu kind = gpu == "metal" ? Gpu::metal : Gpu::cuda;
        if (run.is_none()) return set_gpu_launcher({}, kind);
        set_gpu_launcher(
            [run](const GpuLaunch& launch, const std::vector<mx::array>& inputs,
                  const mx::Stream&) {
              return nb::cast<std::vector<mx::array>>(run(described(launch), inputs));
            },
            kind);
      },
      "launcher"_a.none(), "gpu"_a = "metal",
      "For tests: every operation that has a GPU kernel calls launcher(launch, inputs) instead of "
      "MLX, on any "
      "device; it returns the outputs. None ends that.");
}

}  // namespace veloxquant
