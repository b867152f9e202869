// Kernel text out of headers that the CPU shares: flattened, each file once.
#pragma once

#include <string>
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

// A kernel of what it needs of this header. Its name carries a hash of the text: MLX keeps
// libraries by name, and so does Apple's own cache.
Kernel make_kernel(const std::string& name, std::vector<std::string> inputs,
                   std::vector<std::string> outputs, const std::string& header_path,
                   const std::string& body, bool row_contiguous = true);

}  // namespace veloxquant::metal
