// Named arrays on disk: .npy files plus a manifest, atomic to replace, validated before use.
//
//   DIR/<name>.json                    manifest: magic, version, kind, attributes, per array the
//                                      file name, dtype, shape, bytes and CRC-32
//   DIR/<name>.<array>.<crc>.npy       one file per array, readable by numpy.load
//
// save writes the new .npy files under names that no older manifest uses, then replaces the
// manifest by rename, then removes the files that only the old one named: whenever the process
// dies, the old artifact or the new one is whole.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "veloxquant/tensor_view.h"

namespace veloxquant {

// An owned row-major array.
struct Array {
  DType dtype = DType::float32;
  std::vector<int64_t> shape;
  std::vector<uint8_t> bytes;

  TensorView view() const;
};

struct Artifact {
  std::string kind;  // e.g. "vecinfer_codebook", "smooth_factors", "array"
  // A JSON object as text, e.g. {"model": "...", "head_dim": 64}; empty means {}. load gives it in
  // compact form, keys in their order.
  std::string attributes;
  std::map<std::string, Array> arrays;  // at most kMaxDims dimensions each
};

class ArtifactStore {
 public:
  // Creates the directory on the first save.
  explicit ArtifactStore(const std::string& directory);

  // name, and the names of arrays: up to 100 letters, digits, '_', '-', '.'; not starting with '.'.
  // Refuses to replace a <name>.json that is not an artifact.
  void save(const std::string& name, const Artifact& artifact) const;
  // Throws Error with one sentence for a missing, truncated, altered, foreign or oversized file.
  Artifact load(const std::string& name) const;
  bool exists(const std::string& name) const;
  std::vector<std::string> names() const;  // sorted

 private:
  std::string directory_;
};

}  // namespace veloxquant
