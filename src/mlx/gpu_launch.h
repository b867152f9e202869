// GPU kernels of the core (src/backends/metal/kernel.h: text and grid) through MLX: one text,
// launched by mlx::core::fast::metal_kernel on a Mac and by fast::cuda_kernel on an NVIDIA card.
//
//   if (auto out = on_gpu(name, s, no_kernel_because(shape), [&] { return quantize_call(shape); },
//                         [&](const mx::Stream& gpu) { return arrays(...); }, {{2, 3}})) return
//                         (*out)[0];
//   ... the CPU's way ...
//
// A launch is a lazy operation like any other: it takes part in mx.compile, streams and async_eval.
#pragma once

#include <mlx/array.h>
#include <mlx/fast.h>
#include <mlx/utils.h>

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "src/backends/metal/kernel.h"

namespace veloxquant {

enum class Gpu { metal, cuda };

struct GpuStream {
  mlx::core::Stream stream;
  Gpu gpu;
};

// Where an operation of this stream runs; nothing where that is the CPU.
std::optional<GpuStream> gpu_stream(mlx::core::StreamOrDevice s);

// What MLX is handed, all of it.
struct GpuLaunch {
  Gpu gpu = Gpu::metal;
  std::string name, header, body;
  std::vector<std::string> inputs, outputs;
  bool row_contiguous = true;
  std::vector<std::pair<std::string, mlx::core::fast::TemplateArg>> arguments;
  std::tuple<int, int, int> grid, threadgroup;
  std::vector<mlx::core::Shape> shapes;
  std::vector<mlx::core::Dtype> dtypes;
};

using Launcher = std::function<std::vector<mlx::core::array>(
    const GpuLaunch&, const std::vector<mlx::core::array>& inputs, const mlx::core::Stream&)>;

// For tests: `launcher` takes the place of MLX's, and every stream counts as one of that GPU. An
// empty function restores MLX.
void set_gpu_launcher(Launcher launcher, Gpu gpu);

// Inputs in the order of the kernel's names. Throws Error for a call that `no_launch_because`
// refuses.
std::vector<mlx::core::array> launch(const metal::Call& call, std::vector<mlx::core::array> inputs,
                                     const GpuStream& gpu);

// The outputs, in `shapes`, where the stream is a GPU's and the kernel takes the call; else
// nothing, and why in the debug log.
std::optional<std::vector<mlx::core::array>> on_gpu(
    const std::string& name, mlx::core::StreamOrDevice s,
    const std::optional<std::string>& no_kernel_because, const std::function<metal::Call()>& call,
    const std::function<std::vector<mlx::core::array>(const mlx::core::Stream&)>& inputs,
    const std::vector<mlx::core::Shape>& shapes);

// Says once that the operation runs on the CPU though its stream is a GPU's; nothing where an
// earlier reason was given.
void note_cpu(const std::string& name, mlx::core::StreamOrDevice s, const std::string& because);

// What runs on a GPU stream, and within which limits; all else runs on the CPU and says so.
struct GpuOperation {
  std::string name, limits;
};
const std::vector<GpuOperation>& gpu_operations();

// Kernels handed to MLX by this process, and how often: names without the hash of their text.
std::map<std::string, int64_t> gpu_launches();

metal::Type metal_type(mlx::core::Dtype dtype);  // throws Error for one that kernels have not

}  // namespace veloxquant
