#include "src/backends/cuda/kernel.h"

#include <cudaTypedefs.h>

#include <map>
#include <mutex>

#include "src/backends/cuda/check.h"
#include "src/backends/cuda/nvrtc.h"
#include "veloxquant/backend.h"

namespace veloxquant::backends {
namespace {

using metal::Call;
using metal::CudaInput;

constexpr size_t kMaxInputs = 24, kMaxParameters = 3 * kMaxInputs + 8;

// The driver's own functions, without linking to it.
struct Driver {
  PFN_cuModuleLoadData_v2000 load;
  PFN_cuModuleGetFunction_v2000 function;
  PFN_cuFuncSetAttribute_v9000 set;
  PFN_cuLaunchKernel_v4000 launch;
  PFN_cuGetErrorString_v6000 error;
};

template <class Function>
void find(Function& function, const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result), "cuda");
#else
  check(cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result), "cuda");
#endif
  require(result == cudaDriverEntryPointSuccess && found != nullptr,
          "[cuda] driver: got none with ", name, ", wanted one of CUDA 12 or newer");
  function = reinterpret_cast<Function>(found);
}

const Driver& driver() {
  static const Driver functions = [] {
    Driver d;
    find(d.load, "cuModuleLoadData");
    find(d.function, "cuModuleGetFunction");
    find(d.set, "cuFuncSetAttribute");
    find(d.launch, "cuLaunchKernel");
    find(d.error, "cuGetErrorString");
    return d;
  }();
  return functions;
}

void check_driver(CUresult status, const std::string& what) {
  if (status == CUDA_SUCCESS) return;
  const char* text = nullptr;
  driver().error(status, &text);
  fail("[cuda] ", what, ": got ", text == nullptr ? "an unknown error" : text, ", wanted success");
}

void* compiled(const std::string& name, const std::string& program, bool fused, int pool_bytes) {
  const Device& device = current_device();
  check(cudaFree(nullptr), "cuda");  // the device's primary context is current
  const std::string cubin = nvrtc_cubin(program, 10 * device.major + device.minor, fused);
  CUmodule module = nullptr;
  CUfunction function = nullptr;
  check_driver(driver().load(&module, cubin.data()), "cuModuleLoadData of " + name);
  check_driver(driver().function(&function, module, metal::kCudaEntry), name);
  if (pool_bytes > 0) {
    check_driver(
        driver().set(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, pool_bytes), name);
  }
  log_once("cuda: compiled " + name);
  return function;
}

}  // namespace

const CudaKernel& CudaKernel::get(const Call& call, const std::vector<CudaInput>& inputs,
                                  bool fused, void* stream) {
  const std::string& name = call.kernel->name;
  require(inputs.size() <= kMaxInputs, "[cuda] ", name, ": got ", inputs.size(),
          " inputs, wanted at most ", kMaxInputs);
  const std::string program = metal::cuda_program(call, inputs);
  current_device();
  int device = 0;
  check(cudaGetDevice(&device), "cuda");
  // Who wants the same kernel waits for it; others are compiled meanwhile.
  struct Entry {
    std::mutex mutex;
    CudaKernel kernel;
  };
  static std::mutex mutex;
  static std::map<std::pair<int, std::string>, Entry> entries;
  std::unique_lock<std::mutex> all(mutex);
  Entry& entry = entries[{device, (fused ? "1" : "0") + program}];
  all.unlock();
  const std::lock_guard<std::mutex> lock(entry.mutex);
  CudaKernel& kernel = entry.kernel;
  if (kernel.function_ != nullptr) return kernel;
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capture), "cuda");
  require(capture == cudaStreamCaptureStatusNone, "[cuda] ", name,
          ": got a stream that is captured, wanted the kernel compiled before (prepare_attend, or "
          "one call outside the graph)");
  kernel.kernel_ = call.kernel;
  kernel.single_ = metal::threads_are_single(*call.kernel);
  kernel.n_outputs_ = call.launch.outputs.size();
  kernel.parameters_.clear();
  for (size_t i = 0; i < inputs.size(); ++i) {
    const metal::CudaNames names = metal::names_of(*call.kernel, call.kernel->inputs[i]);
    kernel.parameters_.push_back({inputs[i].by_value > 0, names.shape, names.strides});
  }
  kernel.function_ = compiled(name, program, fused, call.launch.pool_bytes);
  return kernel;
}

void CudaKernel::launch(const metal::Launch& launch, std::span<const CudaArgument> inputs,
                        std::span<void* const> outputs, void* stream) const {
  require(inputs.size() == parameters_.size() && outputs.size() == n_outputs_, "[cuda] ",
          kernel_->name, ": got ", inputs.size(), " inputs and ", outputs.size(),
          " outputs, wanted ", parameters_.size(), " and ", n_outputs_);
  if (const auto reason = metal::no_cuda_launch_because(*kernel_, launch)) {
    fail("[cuda] ", kernel_->name, ": got ", *reason, ", wanted a grid that CUDA launches");
  }
  std::array<void*, kMaxParameters> parameters;
  size_t n = 0;
  const auto add = [&](const void* at) { parameters[n++] = const_cast<void*>(at); };
  for (size_t i = 0; i < inputs.size(); ++i) {
    add(parameters_[i].by_value ? inputs[i].data : static_cast<const void*>(&inputs[i].data));
    if (parameters_[i].shape) add(inputs[i].shape.data());
    if (parameters_[i].strides) add(inputs[i].strides.data());
  }
  if (single_) add(launch.grid.data());
  for (void* const& output : outputs) add(&output);
  const metal::CudaGrid grid = metal::cuda_grid_of(*kernel_, launch);
  const auto blocks = [&](int d) {
    return static_cast<unsigned>(grid.grid[d] / grid.threadgroup[d]);
  };
  const auto threads = [&](int d) { return static_cast<unsigned>(grid.threadgroup[d]); };
  check_driver(
      driver().launch(static_cast<CUfunction>(function_), blocks(0), blocks(1), blocks(2),
                      threads(0), threads(1), threads(2), static_cast<unsigned>(launch.pool_bytes),
                      static_cast<CUstream>(stream), parameters.data(), nullptr),
      kernel_->name);
}

}  // namespace veloxquant::backends
