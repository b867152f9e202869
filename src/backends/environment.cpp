#include "src/backends/environment.h"

#include <cerrno>
#include <cstdlib>
#include <limits>

#include "veloxquant/error.h"

namespace veloxquant {
namespace {

// One of two words; nothing is the first.
bool is_second(const char* name, const std::string& value, const char* first, const char* second) {
  require(value.empty() || value == first || value == second, "[environment] ", name, ": got '",
          value, "', wanted ", first, " or ", second);
  return value == second;
}

int count_of(const char* name, const std::string& value) {
  if (value.empty()) return 0;
  char* end = nullptr;
  errno = 0;
  const long n = std::strtol(value.c_str(), &end, 10);
  require(*end == '\0' && errno == 0 && n >= 0 && n <= std::numeric_limits<int>::max(),
          "[environment] ", name, ": got '", value, "', wanted 0 (every core) or more");
  return static_cast<int>(n);
}

}  // namespace

Environment environment_of(const std::function<const char*(const char*)>& get) {
  const auto value = [&](const char* name) {
    const char* text = get(name);
    return std::string(text == nullptr ? "" : text);
  };
  const auto flag = [&](const char* name) { return !value(name).empty() && value(name) != "0"; };
  const auto second = [&](const char* name, const char* a, const char* b) {
    return is_second(name, value(name), a, b);
  };
  Environment e;
  e.backend = second("VELOXQUANT_BACKEND", "cpu", "reference") ? Backend::reference : Backend::cpu;
  e.simd = value("VELOXQUANT_SIMD");
  e.threads = count_of("VELOXQUANT_THREADS", value("VELOXQUANT_THREADS"));
  e.lookups_in_registers = !second("VELOXQUANT_LOOKUPS", "registers", "memory");
  e.debug = flag("VELOXQUANT_DEBUG") || flag("MLX_METAL_DEBUG");
  return e;
}

const Environment& environment() {
  static const Environment instance =
      environment_of([](const char* name) -> const char* { return std::getenv(name); });
  return instance;
}

}  // namespace veloxquant
