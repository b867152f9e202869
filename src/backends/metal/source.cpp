#include "src/backends/metal/source.h"

#include <cstdint>
#include <cstdio>
#include <set>
#include <sstream>

#include "src/backends/metal/prune.h"
#include "veloxquant/error.h"

namespace veloxquant::metal {
namespace {

const char* text_of(const std::string& path) {
  for (const EmbeddedFile& file : embedded_files()) {
    if (path == file.path) return file.text;
  }
  fail("[metal] source: got ", path, ", wanted a header that CMake embeds (cmake/metal.cmake)");
}

std::string without_comment(const std::string& line) {
  const size_t end = line.find("//");
  if (end == std::string::npos) return line;
  const size_t last = line.find_last_not_of(' ', end == 0 ? 0 : end - 1);
  return end == 0 || last == std::string::npos ? std::string() : line.substr(0, last + 1);
}

void append(const std::string& path, std::set<std::string>& done, std::string& out) {
  if (!done.insert(path).second) return;
  std::istringstream lines(text_of(path));
  for (std::string line; std::getline(lines, line);) {
    line = without_comment(line);
    if (line.empty() || line.rfind("#pragma once", 0) == 0) continue;
    if (line.rfind("#include <", 0) == 0) continue;
    if (line.rfind("#include \"", 0) == 0) {
      append(line.substr(10, line.rfind('"') - 10), done, out);
      continue;
    }
    out += line + "\n";
  }
}

uint64_t hash_of(const std::string& text) {  // FNV-1a
  uint64_t h = 0xcbf29ce484222325ull;
  for (unsigned char c : text) h = (h ^ c) * 0x100000001b3ull;
  return h;
}

}  // namespace

std::string flattened(const std::string& path) { return flattened(std::vector{path}); }

std::string flattened(const std::vector<std::string>& paths) {
  std::set<std::string> done;
  std::string out;
  for (const std::string& path : paths) append(path, done, out);
  return out;
}

Kernel make_kernel(const std::string& name, std::vector<std::string> inputs,
                   std::vector<std::string> outputs, const std::vector<std::string>& header_paths,
                   const std::string& body, bool row_contiguous) {
  Kernel kernel;
  kernel.header = flush_left(needed_by(body, flattened(header_paths)));
  kernel.body = flush_left(body);
  char hash[20];
  std::snprintf(hash, sizeof hash, "_%08x",
                static_cast<uint32_t>(hash_of(kernel.header + kernel.body)));
  kernel.name = name + hash;
  kernel.inputs = std::move(inputs);
  kernel.outputs = std::move(outputs);
  kernel.row_contiguous = row_contiguous;
  return kernel;
}

}  // namespace veloxquant::metal
