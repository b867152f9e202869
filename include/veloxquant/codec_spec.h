// Any codec from a description: what files store, bindings pass and configurations name.
//
// Each codec folder has one function from a spec to a codec; src/codecs/registry.cpp lists them.
#pragma once

#include <map>
#include <string>
#include <variant>
#include <vector>

#include "veloxquant/codec.h"
#include "veloxquant/tensor_view.h"

namespace veloxquant {

using CodecOption = std::variant<int64_t, double, std::string>;

struct CodecSpec {
  std::string method;  // one of codec_methods()
  Side side = Side::keys;
  int n_kv_heads = 0;
  int head_dim = 0;
  // The codec's own settings; its README lists them. Unknown names are an Error.
  std::map<std::string, CodecOption> options;
};

// Named arrays of a codec (tables, transforms), row-major; they must outlive the codec.
using CodecTables = std::map<std::string, TensorView>;

// Throws Error for an unknown method, option or table, and for whatever does not fit together.
CodecPtr make_codec(const CodecSpec& spec, const CodecTables& tables);

std::vector<std::string> codec_methods();  // sorted

}  // namespace veloxquant
