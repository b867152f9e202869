// The manifest of an artifact: JSON text that ends with a checksum of everything before it.
// src/artifacts/README.md draws it.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "veloxquant/tensor_view.h"

namespace veloxquant {

constexpr size_t kMaxManifestBytes = size_t{16} << 20;
// Leaves room for "<artifact>.<array>.<crc>-<n>.npy.tmp" in a 255-byte file name.
constexpr size_t kMaxNameBytes = 100;

struct ManifestEntry {
  std::string file;  // a plain name in the manifest's directory
  DType dtype = DType::float32;
  std::vector<int64_t> shape;
  int64_t file_bytes = 0;
  uint32_t crc = 0;  // of the whole file
};

struct Manifest {
  std::string kind;
  std::string attributes;  // a JSON object
  std::map<std::string, ManifestEntry> arrays;
};

// Letters, digits, '_', '-', '.'; not starting with '.'; 1 to kMaxNameBytes characters.
bool valid_name(std::string_view name);

// "<artifact>.<array>.<crc>.npy"; `attempt` tells files apart whose checksums collide.
std::string array_file_name(const std::string& artifact, const std::string& array, uint32_t crc,
                            int attempt);
// The artifact that array_file_name made `file` for; empty for any other name.
std::string owner_of_array_file(std::string_view file);

// True for text that starts like a manifest of ours, whole or not.
bool looks_like_manifest(std::string_view text);

uint32_t crc32_of(std::string_view bytes, uint32_t crc = 0);

// Both throw Error, starting with `what`.
std::string write_manifest(const Manifest& manifest, const std::string& what);
Manifest read_manifest(std::string_view text, const std::string& artifact, const std::string& what);

}  // namespace veloxquant
