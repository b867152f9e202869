#include "tests/msl/compiler.h"

#include <dlfcn.h>
#include <link.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <future>
#include <map>
#include <sstream>

#include "tests/msl/front_end.h"

namespace veloxquant::msl {
namespace {

namespace fs = std::filesystem;

// As on a Mac, a product may be fused with the sum it goes into unless the text forbids it. Locals
// start as garbage. No loop is turned into vectors, so that every access is one that was written.
// read-before-write: by default two accesses to a word next to each other count as one.
const std::string kCommon = "-x c++ -std=c++14 -I" VELOXQUANT_MSL_SHIM
                            " -Wall -Wextra -Wno-unknown-attributes -Wno-unused-function"
                            " -Wno-unused-parameter -Wno-ignored-attributes";
const std::string kCheck =
    " -Werror -Wconditional-uninitialized -DMSL_ADDRESS_SPACES -fsyntax-only";
const std::string kCode =
    " -w -O2 -fPIC -mavx2 -mfma -mf16c -ffp-contract=fast-honor-pragmas"
    " -Xclang -ffloat16-excess-precision=none -fno-vectorize -fno-slp-vectorize -fno-exceptions";
const std::string kCount = kCode + " -DMSL_COUNTING -S -emit-llvm";
const std::string kRun =
    kCode +
    " -shared -ftrivial-auto-var-init=pattern -fsanitize=thread"
    " -mllvm -tsan-instrument-func-entry-exit=0 -mllvm -tsan-instrument-read-before-write=1"
    " -mllvm -tsan-handle-cxx-exceptions=0 -Wl,-z,undefs"
    // A barrier is known by where it is called: no second copy of it, nor of functions that wait.
    " -fconvergent-functions";

uint64_t hash_of(const std::string& text) {  // FNV-1a
  uint64_t h = 0xcbf29ce484222325ull;
  for (unsigned char c : text) h = (h ^ c) * 0x100000001b3ull;
  return h;
}

std::string contents(const fs::path& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

std::string run_clang(const std::string& arguments, const fs::path& log) {
  const std::string command =
      std::string(VELOXQUANT_MSL_CLANG) + " " + arguments + " >" + log.string() + " 2>&1";
  return std::system(command.c_str()) == 0 ? std::string() : contents(log);
}

std::string compile_counted(const fs::path& source, const fs::path& object, const fs::path& log) {
  const std::string ir = object.string() + ".ll", counted = object.string() + ".counted.ll";
  std::string errors = run_clang(kCommon + kCount + " -o " + ir + " " + source.string(), log);
  const std::string command = "python3 " VELOXQUANT_MSL_SHIM "/../count.py " + ir + " " + counted +
                              " >" + log.string() + " 2>&1";
  if (errors.empty() && std::system(command.c_str()) != 0) errors = contents(log);
  if (errors.empty()) {
    errors =
        run_clang("-w -O1 -fPIC -shared -Wl,-z,undefs -o " + object.string() + " " + counted, log);
  }
  fs::remove(ir);
  fs::remove(counted);
  return errors;
}

// The range of the library that holds `address`, from its segments.
int find_range(dl_phdr_info* info, size_t, void* data) {
  auto* found = static_cast<Compiled*>(data);
  uintptr_t begin = UINTPTR_MAX, end = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
    const uintptr_t at = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
    begin = std::min(begin, at);
    end = std::max(end, at + info->dlpi_phdr[i].p_memsz);
  }
  const auto address = reinterpret_cast<uintptr_t>(found->entry);
  if (address < begin || address >= end) return 0;
  found->begin = begin;
  found->end = end;
  return 1;
}

Compiled load(const fs::path& library) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) throw Fault(std::string("dlopen: ") + dlerror());
  Compiled compiled;
  compiled.entry = reinterpret_cast<void (*)(void* const*)>(dlsym(handle, "msl_entry"));
  compiled.counts = static_cast<uint64_t*>(dlsym(handle, "vq_counts"));
  compiled.weights = static_cast<const uint32_t(*)[3]>(dlsym(handle, "vq_weights"));
  if (const void* n = dlsym(handle, "vq_blocks")) compiled.n_blocks = *static_cast<const int*>(n);
  if (compiled.entry == nullptr) throw Fault("msl_entry is not in " + library.string());
  dl_iterate_phdr(find_range, &compiled);
  return compiled;
}

}  // namespace

Compiled compile(const metal::Kernel& kernel, const metal::Launch& launch,
                 const std::vector<metal::ArrayShape>& inputs, bool counting) {
  static const std::string shim = contents(VELOXQUANT_MSL_SHIM "/metal_stdlib");
  static std::map<uint64_t, Compiled> loaded;
  const std::string check = clang_source(kernel, launch, inputs, true);
  const std::string run = clang_source(kernel, launch, inputs, false);
  static const std::string counter = contents(VELOXQUANT_MSL_SHIM "/../count.py");
  const uint64_t hash = hash_of(shim + kCommon + kCheck +
                                (counting ? "counted" + counter + kCount : kRun) + check + run);
  if (auto it = loaded.find(hash); it != loaded.end()) return it->second;

  check_dialect(kernel);
  char name[32];
  std::snprintf(name, sizeof name, "%016llx", static_cast<unsigned long long>(hash));
  const fs::path folder = VELOXQUANT_MSL_CACHE, library = folder / (std::string(name) + ".so");
  if (!fs::exists(library)) {
    fs::create_directories(folder);
    // Tests run side by side: each writes under names of its own and moves the result.
    const fs::path own = folder / (std::string(name) + "." + std::to_string(getpid()));
    const fs::path source = own.string() + ".cpp", object = own.string() + ".so",
                   log = own.string() + ".log";
    auto checked = std::async(std::launch::async, [&] {  // beside the code
      const fs::path text = own.string() + ".check.cpp", its_log = own.string() + ".check.log";
      std::ofstream(text) << check;
      std::string wrong = run_clang(kCommon + kCheck + " " + text.string(), its_log);
      fs::remove(text);
      fs::remove(its_log);
      return wrong;
    });
    std::ofstream(source) << run;
    std::string errors =
        counting
            ? compile_counted(source, object, log)
            : run_clang(kCommon + kRun + " -o " + object.string() + " " + source.string(), log);
    if (std::string wrong = checked.get(); !wrong.empty()) errors = wrong;
    if (std::getenv("VELOXQUANT_MSL_KEEP") != nullptr) {
      fs::rename(source, folder / (std::string(name) + ".cpp"));
    } else {
      fs::remove(source);
    }
    fs::remove(log);
    if (!errors.empty()) throw Fault("[" + kernel.name + "] does not compile:\n" + errors);
    fs::rename(object, library);
  }
  return loaded[hash] = load(library);
}

}  // namespace veloxquant::msl
