// Helpers of the two artifact tests.
#pragma once

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "veloxquant/artifacts.h"

namespace veloxquant {

inline bool operator==(const Array& a, const Array& b) {
  return a.dtype == b.dtype && a.shape == b.shape && a.bytes == b.bytes;
}
inline bool operator==(const Artifact& a, const Artifact& b) {
  return a.kind == b.kind && a.attributes == b.attributes && a.arrays == b.arrays;
}

inline Array random_array(DType dtype, const std::vector<int64_t>& shape, unsigned seed) {
  size_t bytes = static_cast<size_t>(dtype_bytes(dtype));
  for (int64_t n : shape) bytes *= static_cast<size_t>(n);
  Array array{dtype, shape, std::vector<uint8_t>(bytes)};
  std::mt19937 random(seed);
  for (uint8_t& byte : array.bytes) {
    byte = static_cast<uint8_t>(dtype == DType::boolean ? random() & 1 : random());
  }
  return array;
}

inline std::string read_text(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

inline void write_text(const std::filesystem::path& path, const std::string& text) {
  // A new file each time: ext4 flushes one that is truncated and written again.
  std::filesystem::remove(path);
  std::ofstream(path, std::ios::binary | std::ios::trunc) << text;
}

class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string pattern = (std::filesystem::temp_directory_path() / "veloxquant-XXXXXX").string();
    path_ = mkdtemp(pattern.data());
  }
  ~TemporaryDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::string& path() const { return path_; }
  std::filesystem::path file(const std::string& name) const {
    return std::filesystem::path(path_) / name;
  }
  std::vector<std::string> files() const {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(path_)) {
      names.push_back(entry.path().filename().string());
    }
    return names;
  }

 private:
  std::string path_;
};

}  // namespace veloxquant
