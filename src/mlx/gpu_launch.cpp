#include "src/mlx/gpu_launch.h"

#include <mlx/backend/cuda/cuda.h>
#include <mlx/backend/metal/metal.h>
#include <mlx/ops.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <set>

#include "src/backends/metal/cuda_text.h"
#include "src/mlx/views.h"
#include "veloxquant/backend.h"

namespace veloxquant {
namespace mx = mlx::core;
namespace {

struct TestLauncher {
  Launcher run;
  Gpu gpu = Gpu::metal;
};
TestLauncher& test_launcher() {
  static TestLauncher launcher;
  return launcher;
}

mx::Dtype dtype_of_type(metal::Type type) {
  switch (type) {
    case metal::Type::boolean:
      return mx::bool_;
    case metal::Type::uint8:
      return mx::uint8;
    case metal::Type::uint16:
      return mx::uint16;
    case metal::Type::uint32:
      return mx::uint32;
    case metal::Type::int32:
      return mx::int32;
    case metal::Type::int64:
      return mx::int64;
    case metal::Type::float16:
      return mx::float16;
    case metal::Type::bfloat16:
      return mx::bfloat16;
    default:
      return mx::float32;
  }
}

mx::fast::TemplateArg template_argument(const std::variant<int, bool, metal::Type>& value) {
  if (const int* i = std::get_if<int>(&value)) return *i;
  if (const bool* b = std::get_if<bool>(&value)) return *b;
  return dtype_of_type(std::get<metal::Type>(value));
}

std::tuple<int, int, int> as_tuple(const std::array<int, 3>& a) { return {a[0], a[1], a[2]}; }

// MLX's function objects, built once: they hold the text.
const mx::fast::CustomKernelFunction& function_of(const GpuLaunch& launch) {
  static std::mutex mutex;
  static std::map<std::string, mx::fast::CustomKernelFunction> functions;
  const std::lock_guard<std::mutex> lock(mutex);
  auto it = functions.find(launch.name);
  if (it == functions.end()) {
    auto function = launch.gpu == Gpu::metal
                        ? mx::fast::metal_kernel(launch.name, launch.inputs, launch.outputs,
                                                 launch.body, launch.header, launch.row_contiguous)
                        : mx::fast::cuda_kernel(launch.name, launch.inputs, launch.outputs,
                                                launch.body, launch.header, launch.row_contiguous);
    it = functions.emplace(launch.name, std::move(function)).first;
  }
  return it->second;
}

struct Counts {
  std::mutex mutex;
  std::map<std::string, int64_t> of;
};
Counts& counts() {
  static Counts counts;
  return counts;
}

// Kernels with CUDA's text around them, once each.
const metal::Kernel& text_of(const metal::Kernel& kernel, Gpu gpu) {
  if (gpu == Gpu::metal) return kernel;
  static std::mutex mutex;
  static std::map<std::string, metal::Kernel> kernels;
  const std::lock_guard<std::mutex> lock(mutex);
  auto it = kernels.find(kernel.name);
  if (it == kernels.end()) it = kernels.emplace(kernel.name, metal::cuda_kernel_of(kernel)).first;
  return it->second;
}

std::optional<std::string> no_launch_because(const metal::Call& call, Gpu gpu) {
  if (gpu == Gpu::metal) return std::nullopt;
  return metal::no_cuda_launch_because(*call.kernel, call.launch);
}

bool has_empty_output(const metal::Call& call) {
  return std::any_of(call.launch.outputs.begin(), call.launch.outputs.end(),
                     [](const metal::ArrayShape& a) { return a.size() == 0; });
}

}  // namespace

void set_gpu_launcher(Launcher launcher, Gpu gpu) { test_launcher() = {std::move(launcher), gpu}; }

std::optional<GpuStream> gpu_stream(mx::StreamOrDevice s) {
  const mx::Stream stream = mx::to_stream(s);
  if (test_launcher().run) return GpuStream{stream, test_launcher().gpu};
  if (stream.device != mx::Device::gpu) return std::nullopt;
  return GpuStream{stream, mx::metal::is_available() ? Gpu::metal : Gpu::cuda};
}

metal::Type metal_type(mx::Dtype dtype) {
  for (metal::Type type : {metal::Type::boolean, metal::Type::uint8, metal::Type::uint16,
                           metal::Type::uint32, metal::Type::int32, metal::Type::int64,
                           metal::Type::float16, metal::Type::bfloat16, metal::Type::float32}) {
    if (dtype_of_type(type) == dtype) return type;
  }
  fail("[gpu] dtype: got ", dtype_text(dtype), ", wanted one that kernels have");
}

namespace {

// A call that no_launch_because() lets through.
std::vector<mx::array> launch_checked(const metal::Call& call, std::vector<mx::array> inputs,
                                      const GpuStream& gpu) {
  const metal::Kernel& kernel = text_of(*call.kernel, gpu.gpu);
  GpuLaunch launch;
  launch.gpu = gpu.gpu;
  launch.name = kernel.name;
  launch.header = kernel.header;
  launch.body = kernel.body;
  launch.inputs = kernel.inputs;
  launch.outputs = kernel.outputs;
  launch.row_contiguous = kernel.row_contiguous;
  launch.grid = as_tuple(call.launch.grid);
  launch.threadgroup = as_tuple(call.launch.threadgroup);
  if (gpu.gpu == Gpu::cuda) {
    const metal::CudaGrid grid = metal::cuda_grid_of(*call.kernel, call.launch);
    launch.grid = as_tuple(grid.grid);
    launch.threadgroup = as_tuple(grid.threadgroup);
    if (metal::threads_are_single(*call.kernel)) {
      inputs.push_back(mx::array(call.launch.grid.data(), {3}, mx::int32));
    }
  }
  for (const metal::TemplateArgument& argument : call.launch.arguments) {
    launch.arguments.emplace_back(argument.name, template_argument(argument.value));
  }
  for (const metal::ArrayShape& output : call.launch.outputs) {
    launch.shapes.emplace_back(output.shape.begin(), output.shape.end());
    launch.dtypes.push_back(dtype_of_type(output.type));
  }
  require(inputs.size() == launch.inputs.size(), "[", launch.name, "] inputs: got ", inputs.size(),
          ", wanted ", launch.inputs.size());
  {
    const std::lock_guard<std::mutex> lock(counts().mutex);
    ++counts().of[launch.name.substr(0, launch.name.rfind('_'))];
  }
  if (test_launcher().run) return test_launcher().run(launch, inputs, gpu.stream);
  return function_of(launch)(inputs, launch.shapes, launch.dtypes, launch.grid, launch.threadgroup,
                             launch.arguments, std::nullopt, false, gpu.stream);
}

}  // namespace

std::vector<mx::array> launch(const metal::Call& call, std::vector<mx::array> inputs,
                              const GpuStream& gpu) {
  if (const auto reason = no_launch_because(call, gpu.gpu)) {
    fail("[", call.kernel->name, "] grid: got ", *reason);
  }
  return launch_checked(call, std::move(inputs), gpu);
}

std::optional<std::vector<mx::array>> on_gpu(
    const std::string& name, mx::StreamOrDevice s,
    const std::optional<std::string>& no_kernel_because, const std::function<metal::Call()>& make,
    const std::function<std::vector<mx::array>(const mx::Stream&)>& inputs,
    const std::vector<mx::Shape>& shapes) {
  const std::optional<GpuStream> gpu = gpu_stream(s);
  if (!gpu) return std::nullopt;
  std::optional<std::string> reason = no_kernel_because;
  if (!reason) {
    const metal::Call call = make();
    if (has_empty_output(call)) return std::nullopt;
    reason = no_launch_because(call, gpu->gpu);
    if (!reason) {
      std::vector<mx::array> out = launch_checked(call, inputs(gpu->stream), *gpu);
      for (size_t i = 0; i < out.size(); ++i) {
        if (out[i].shape() != shapes[i]) out[i] = mx::reshape(out[i], shapes[i], gpu->stream);
      }
      log_once(name + ": on the GPU, " + call.kernel->name);
      return out;
    }
  }
  note_cpu(name, s, *reason);
  return std::nullopt;
}

std::map<std::string, int64_t> gpu_launches() {
  const std::lock_guard<std::mutex> lock(counts().mutex);
  return counts().of;
}

void note_cpu(const std::string& name, mx::StreamOrDevice s, const std::string& because) {
  if (!debug_enabled() || !gpu_stream(s)) return;
  static std::mutex mutex;
  static std::set<std::string> told;
  const std::lock_guard<std::mutex> lock(mutex);
  if (told.insert(name).second) log_once(name + ": on the CPU, " + because);
}

}  // namespace veloxquant
