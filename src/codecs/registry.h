// The functions from a spec to a codec, one per codec folder, and what they read a spec with.
#pragma once

#include <initializer_list>
#include <string>

#include "veloxquant/codec_spec.h"
#include "veloxquant/rope.h"

namespace veloxquant {

// Reads the options and tables of a spec. Every Error names the method and the option or table,
// what it got and what it wanted. finish() refuses what was never asked for.
class SpecReader {
 public:
  SpecReader(const CodecSpec& spec, const CodecTables& tables) : spec_(spec), tables_(tables) {}

  bool has(const std::string& name) const;  // an option or a table
  int64_t integer(const std::string& name, int64_t least, int64_t most);
  int64_t integer_or(const std::string& name, int64_t fallback, int64_t least, int64_t most);
  double number_or(const std::string& name, double fallback);
  // The index in `names` of a text option; the first name where the option is not given.
  int choice(const std::string& name, std::initializer_list<const char*> names);
  // A table as it is, for codecs that check shapes themselves; empty where there is none.
  TensorView table_or_empty(const std::string& name);
  // A row-major table of exactly this dtype and shape; -1 stands for any size.
  TensorView table(const std::string& name, DType dtype, std::initializer_list<int64_t> shape);
  void finish() const;

 private:
  const CodecOption* option(const std::string& name);

  const CodecSpec& spec_;
  const CodecTables& tables_;
  std::map<std::string, bool> used_;
};

// The model's rotary embedding, for codecs of pre-RoPE keys: table inv_freq fp32 [pairs], options
// traditional (0, 1), position_scale, attention_factor.
RopeSpec rope_from_spec(const CodecSpec& spec, SpecReader& reader);

// Adding a codec: its line here and one in registry.cpp.
CodecPtr commvq_from_spec(const CodecSpec& spec, const CodecTables& tables);
CodecPtr exact_from_spec(const CodecSpec& spec, const CodecTables& tables);
CodecPtr qjl_from_spec(const CodecSpec& spec, const CodecTables& tables);
CodecPtr rabitq_from_spec(const CodecSpec& spec, const CodecTables& tables);
CodecPtr rvq_from_spec(const CodecSpec& spec, const CodecTables& tables);
CodecPtr turboquant_from_spec(const CodecSpec& spec, const CodecTables& tables);
CodecPtr vecinfer_from_spec(const CodecSpec& spec, const CodecTables& tables);
CodecPtr vecinfer_rope_from_spec(const CodecSpec& spec, const CodecTables& tables);

}  // namespace veloxquant
