#include "src/codecs/registry.h"

#include <algorithm>

#include "src/backends/environment.h"

namespace veloxquant {
namespace {

using FromSpec = CodecPtr (*)(const CodecSpec&, const CodecTables&);

const std::map<std::string, FromSpec>& registry() {
  static const std::map<std::string, FromSpec> methods{
      {"commvq", commvq_from_spec},
      {"exact", exact_from_spec},
      {"qjl", qjl_from_spec},
      {"rabitq", rabitq_from_spec},
      {"turboquant", turboquant_from_spec},
      {"turboquant_rvq", rvq_from_spec},
      {"vecinfer", vecinfer_from_spec},
      {"vecinfer_rope", vecinfer_rope_from_spec},
  };
  return methods;
}

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

std::string shape_text(const int64_t* shape, int n) {
  std::string text = "[";
  for (int d = 0; d < n; ++d) {
    text += (d ? ", " : "") + (shape[d] < 0 ? "any" : std::to_string(shape[d]));
  }
  return text + "]";
}

}  // namespace

CodecPtr make_codec(const CodecSpec& spec, const CodecTables& tables) {
  environment();  // checked before anything is stored
  const auto found = registry().find(spec.method);
  require(found != registry().end(), "[codec] method: got '", spec.method, "', wanted one of ",
          joined(codec_methods()));
  return found->second(spec, tables);
}

std::vector<std::string> codec_methods() {
  std::vector<std::string> names;
  for (const auto& entry : registry()) names.push_back(entry.first);
  return names;
}

bool SpecReader::has(const std::string& name) const {
  return spec_.options.count(name) > 0 || tables_.count(name) > 0;
}

const CodecOption* SpecReader::option(const std::string& name) {
  used_[name] = true;
  const auto found = spec_.options.find(name);
  return found == spec_.options.end() ? nullptr : &found->second;
}

int64_t SpecReader::integer(const std::string& name, int64_t least, int64_t most) {
  const CodecOption* value = option(name);
  require(value != nullptr, "[", spec_.method, "] ", name, ": got none, wanted an integer of ",
          least, " to ", most);
  const int64_t* number = std::get_if<int64_t>(value);
  require(number != nullptr, "[", spec_.method, "] ", name,
          ": got another type, wanted an integer of ", least, " to ", most);
  require(*number >= least && *number <= most, "[", spec_.method, "] ", name, ": got ", *number,
          ", wanted ", least, " to ", most);
  return *number;
}

int64_t SpecReader::integer_or(const std::string& name, int64_t fallback, int64_t least,
                               int64_t most) {
  return option(name) == nullptr ? fallback : integer(name, least, most);
}

double SpecReader::number_or(const std::string& name, double fallback) {
  const CodecOption* value = option(name);
  if (value == nullptr) return fallback;
  if (const int64_t* number = std::get_if<int64_t>(value)) return static_cast<double>(*number);
  const double* number = std::get_if<double>(value);
  require(number != nullptr, "[", spec_.method, "] ", name, ": got a text, wanted a number");
  return *number;
}

int SpecReader::choice(const std::string& name, std::initializer_list<const char*> names) {
  const CodecOption* value = option(name);
  if (value == nullptr) return 0;
  const std::string* text = std::get_if<std::string>(value);
  const auto found = text == nullptr
                         ? names.end()
                         : std::find_if(names.begin(), names.end(),
                                        [&](const char* candidate) { return *text == candidate; });
  require(found != names.end(), "[", spec_.method, "] ", name, ": got '",
          text == nullptr ? "a number" : *text, "', wanted one of ",
          joined(std::vector<std::string>(names.begin(), names.end())));
  return static_cast<int>(found - names.begin());
}

TensorView SpecReader::table_or_empty(const std::string& name) {
  used_[name] = true;
  const auto found = tables_.find(name);
  return found == tables_.end() ? TensorView() : found->second;
}

TensorView SpecReader::table(const std::string& name, DType dtype,
                             std::initializer_list<int64_t> shape) {
  const TensorView view = table_or_empty(name);
  const int ndim = static_cast<int>(shape.size());
  const std::string wanted =
      std::string("row-major ") + dtype_name(dtype) + " " + shape_text(shape.begin(), ndim);
  require(!view.empty(), "[", spec_.method, "] ", name, ": got none, wanted ", wanted);
  bool fits = view.dtype == dtype && view.ndim == ndim;
  int64_t dense = 1;
  for (int d = ndim - 1; fits && d >= 0; --d) {
    const int64_t size = shape.begin()[d];
    fits = (size < 0 || view.shape[d] == size) && (view.shape[d] == 1 || view.stride[d] == dense);
    dense *= view.shape[d];
  }
  require(fits, "[", spec_.method, "] ", name, ": got ", dtype_name(view.dtype), " ",
          shape_text(view.shape.data(), view.ndim), ", wanted ", wanted);
  return view;
}

RopeSpec rope_from_spec(const CodecSpec& spec, SpecReader& reader) {
  const TensorView inv_freq = reader.table("inv_freq", DType::float32, {-1});
  RopeSpec rope;
  rope.head_dim = spec.head_dim;
  rope.traditional = reader.integer_or("traditional", 0, 0, 1) != 0;
  rope.position_scale = static_cast<float>(reader.number_or("position_scale", 1.0));
  rope.attention_factor = static_cast<float>(reader.number_or("attention_factor", 1.0));
  const auto* frequencies = static_cast<const float*>(inv_freq.data);
  rope.inv_freq.assign(frequencies, frequencies + inv_freq.size());
  return rope;
}

void SpecReader::finish() const {
  auto check = [&](const std::string& name) {
    std::vector<std::string> known;
    for (const auto& entry : used_) known.push_back(entry.first);
    require(used_.count(name) > 0, "[", spec_.method, "] ", name, ": got an unknown name, wanted ",
            known.empty() ? "no option" : "one of " + joined(known));
  };
  for (const auto& entry : spec_.options) check(entry.first);
  for (const auto& entry : tables_) check(entry.first);
}

}  // namespace veloxquant
