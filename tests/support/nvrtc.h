// NVRTC of a CUDA toolkit, for tests that compile kernel text without a GPU. Where CMake found
// none, get() is null.
#pragma once

#include <dlfcn.h>

#include <string>
#include <type_traits>
#include <vector>

namespace veloxquant::test {

#if !defined(VELOXQUANT_NVRTC)
#define VELOXQUANT_NVRTC ""
#endif

struct Nvrtc {
  using Program = struct OpaqueProgram*;
  int (*create)(Program*, const char*, const char*, int, const char* const*, const char* const*);
  int (*compile)(Program, int, const char* const*);
  int (*log_size)(Program, size_t*);
  int (*log)(Program, char*);
  int (*destroy)(Program*);

  static const Nvrtc* get() {
    static const Nvrtc* nvrtc = []() -> const Nvrtc* {
      void* library = dlopen(VELOXQUANT_NVRTC, RTLD_NOW);
      if (library == nullptr) return nullptr;
      auto* n = new Nvrtc;  // for the whole process
      auto find = [&](auto& function, const char* name) {
        function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
        return function != nullptr;
      };
      const bool all =
          find(n->create, "nvrtcCreateProgram") && find(n->compile, "nvrtcCompileProgram") &&
          find(n->log_size, "nvrtcGetProgramLogSize") && find(n->log, "nvrtcGetProgramLog") &&
          find(n->destroy, "nvrtcDestroyProgram");
      return all ? n : nullptr;
    }();
    return nvrtc;
  }

  // What it says; "" where it compiles.
  std::string errors(const std::string& source, const std::vector<const char*>& options) const {
    Program program = nullptr;
    if (create(&program, source.c_str(), "kernel.cu", 0, nullptr, nullptr) != 0) return "create";
    const int status = compile(program, static_cast<int>(options.size()), options.data());
    size_t size = 0;
    log_size(program, &size);
    std::string text(size, 0);
    log(program, text.data());
    destroy(&program);
    return status == 0 ? std::string() : "NVRTC: " + text.substr(0, 3000);
  }
};

}  // namespace veloxquant::test
