// Kernel text out of headers that the CPU shares: flattened, each file once.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "src/backends/metal/kernel.h"

namespace veloxquant::metal {

struct EmbeddedFile {
  const char* path;
  const char* text;
};
const std::vector<EmbeddedFile>& embedded_files();  // written by CMake

// The file with what it includes of ours in front, less comments; standard headers are dropped
// (Metal has none).
// `path`: as in #include, "src/codecs/vecinfer/metal.h". Throws Error for a file that is not there.
std::string flattened(const std::string& path);
std::string flattened(const std::vector<std::string>& paths);  // each file once

// A kernel of what it needs of these headers. Its name carries a hash of the text: MLX keeps
// libraries by name, and so does Apple's own cache.
Kernel make_kernel(const std::string& name, std::vector<std::string> inputs,
                   std::vector<std::string> outputs, const std::vector<std::string>& header_paths,
                   const std::string& body, bool row_contiguous = true);
inline Kernel make_kernel(const std::string& name, std::vector<std::string> inputs,
                          std::vector<std::string> outputs, const std::string& header_path,
                          const std::string& body, bool row_contiguous = true) {
  return make_kernel(name, std::move(inputs), std::move(outputs), std::vector{header_path}, body,
                     row_contiguous);
}

}  // namespace veloxquant::metal
