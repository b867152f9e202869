#include "src/backends/cuda/nvrtc.h"

#include <dlfcn.h>
#include <nvrtc.h>

#include <cstdlib>
#include <vector>

#include "veloxquant/error.h"

namespace veloxquant::backends {
namespace {

struct Nvrtc {
  decltype(&nvrtcCreateProgram) create;
  decltype(&nvrtcCompileProgram) compile;
  decltype(&nvrtcGetProgramLogSize) log_size;
  decltype(&nvrtcGetProgramLog) log;
  decltype(&nvrtcGetCUBINSize) cubin_size;
  decltype(&nvrtcGetCUBIN) cubin;
  decltype(&nvrtcDestroyProgram) destroy;
};

void* open_library() {
  std::vector<std::string> names;
  if (const char* given = std::getenv("VELOXQUANT_NVRTC")) names.emplace_back(given);
  for (const char* name :
       {"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so", "/usr/local/cuda/lib64/libnvrtc.so"}) {
    names.emplace_back(name);
  }
  for (const std::string& name : names) {
    if (void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
  }
  fail(
      "[cuda] libnvrtc: got none that loads, wanted NVRTC of CUDA 12 or 13 for the general kernels "
      "(install cuda-nvrtc or nvidia-cuda-nvrtc, or set VELOXQUANT_NVRTC to its path)");
}

// Throws again at each call until a library is there.
const Nvrtc& nvrtc() {
  static const Nvrtc functions = [] {
    void* library = open_library();
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      require(function != nullptr, "[cuda] libnvrtc: got one without ", name,
              ", wanted NVRTC of CUDA 12 or 13");
    };
    Nvrtc n;
    find(n.create, "nvrtcCreateProgram");
    find(n.compile, "nvrtcCompileProgram");
    find(n.log_size, "nvrtcGetProgramLogSize");
    find(n.log, "nvrtcGetProgramLog");
    find(n.cubin_size, "nvrtcGetCUBINSize");
    find(n.cubin, "nvrtcGetCUBIN");
    find(n.destroy, "nvrtcDestroyProgram");
    return n;
  }();
  return functions;
}

}  // namespace

std::string nvrtc_cubin(const std::string& program, int architecture, bool fused) {
  const Nvrtc& n = nvrtc();
  nvrtcProgram handle = nullptr;
  require(n.create(&handle, program.c_str(), "veloxquant.cu", 0, nullptr, nullptr) == NVRTC_SUCCESS,
          "[cuda] nvrtcCreateProgram: got a failure, wanted a program");
  const std::string arch = "--gpu-architecture=sm_" + std::to_string(architecture);
  const char* options[] = {arch.c_str(), "--std=c++17", "--device-as-default-execution-space",
                           fused ? "--fmad=true" : "--fmad=false"};
  const nvrtcResult status = n.compile(handle, 4, options);
  std::string text;
  if (status == NVRTC_SUCCESS) {
    size_t bytes = 0;
    if (n.cubin_size(handle, &bytes) == NVRTC_SUCCESS) {
      text.resize(bytes);
      if (n.cubin(handle, text.data()) != NVRTC_SUCCESS) text.clear();
    }
  } else {
    size_t bytes = 0;
    n.log_size(handle, &bytes);
    text.resize(bytes);
    n.log(handle, text.data());
  }
  n.destroy(&handle);
  require(status == NVRTC_SUCCESS && !text.empty(), "[cuda] NVRTC, ", arch, ": got ",
          text.substr(0, 600), ", wanted a kernel that compiles");
  return text;
}

}  // namespace veloxquant::backends
