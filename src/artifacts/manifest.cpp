#include "src/artifacts/manifest.h"

#include <zlib.h>

#include <algorithm>
#include <charconv>

#include "src/artifacts/npy.h"
#include "src/artifacts/printable.h"
#include "src/artifacts/strict_json.h"

namespace veloxquant {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kMagic = "veloxquant-artifact";
constexpr int kVersion = 1;
constexpr std::string_view kStart = "{\n  \"magic\": \"veloxquant-artifact\",";
// The text ends with kTail, eight hex digits, kEnd; the checksum covers what is before kTail.
constexpr std::string_view kTail = ",\n  \"crc32\": \"";
constexpr std::string_view kEnd = "\"\n}\n";

// The names in files: they never change, whatever happens to dtype_name.
struct DTypeName {
  DType dtype;
  std::string_view name;
};
constexpr DTypeName kDTypeNames[] = {{DType::float32, "float32"},   {DType::float16, "float16"},
                                     {DType::bfloat16, "bfloat16"}, {DType::uint8, "uint8"},
                                     {DType::uint16, "uint16"},     {DType::int32, "int32"},
                                     {DType::boolean, "bool"}};

bool is_hex(char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); }

std::string hex8(uint32_t value) {
  std::string text(8, '0');
  for (int i = 7; i >= 0; --i, value >>= 4) text[i] = "0123456789abcdef"[value & 15];
  return text;
}

uint32_t read_hex8(const std::string& text, const std::string& what) {
  require(text.size() == 8 && std::all_of(text.begin(), text.end(), is_hex), what, ": crc32: got '",
          printable(text), "', wanted eight hex digits");
  uint32_t value = 0;
  std::from_chars(text.data(), text.data() + text.size(), value, 16);
  return value;
}

const Json& field(const Json& object, const char* key, Json::value_t type,
                  const std::string& what) {
  const auto it = object.find(key);
  require(it != object.end(), what, ": the field '", key, "' is missing");
  require(it->type() == type, what, ": ", key, ": got ", it->type_name(), ", wanted ",
          Json(type).type_name());
  return *it;
}

std::string text_field(const Json& object, const char* key, const std::string& what) {
  return field(object, key, Json::value_t::string, what).get<std::string>();
}

int64_t integer(const Json& value, const char* key, const std::string& what) {
  require(value.is_number_integer(), what, ": ", key, ": got ", value.type_name(),
          ", wanted an integer");
  // An unsigned value above the largest int64 turns negative here, and is refused as that.
  return value.get<int64_t>();
}

void check_text_checksum(std::string_view text, const std::string& what) {
  const size_t tail_bytes = kTail.size() + 8 + kEnd.size();
  require(text.size() > tail_bytes && text.ends_with(kEnd) &&
              text.substr(text.size() - tail_bytes).starts_with(kTail),
          what, ": does not end with its checksum");
  const std::string_view covered = text.substr(0, text.size() - tail_bytes);
  const std::string stored(text.substr(covered.size() + kTail.size(), 8));
  const std::string computed = hex8(crc32_of(covered));
  require(stored == computed, what, ": checksum: got ", computed, ", wanted ", printable(stored),
          " (the manifest was altered)");
}

ManifestEntry read_entry(const Json& json, const std::string& artifact, const std::string& what) {
  require(json.is_object(), what, ": got ", json.type_name(), ", wanted an object");
  ManifestEntry entry;
  entry.file = text_field(json, "file", what);
  require(valid_name(artifact) && owner_of_array_file(entry.file) == artifact, what,
          ": file: got '", printable(entry.file), "', wanted a plain name like ",
          array_file_name(artifact, "array", 0, 0));
  const std::string dtype = text_field(json, "dtype", what);
  const auto known = std::find_if(std::begin(kDTypeNames), std::end(kDTypeNames),
                                  [&](const DTypeName& d) { return d.name == dtype; });
  require(known != std::end(kDTypeNames), what, ": dtype: got '", printable(dtype),
          "', wanted one of float32 float16 bfloat16 uint8 uint16 int32 bool");
  entry.dtype = known->dtype;
  for (const Json& n : field(json, "shape", Json::value_t::array, what)) {
    entry.shape.push_back(integer(n, "shape", what));
  }
  checked_array_bytes(entry.dtype, entry.shape, what);
  const auto bytes = json.find("bytes");
  require(bytes != json.end(), what, ": the field 'bytes' is missing");
  entry.file_bytes = integer(*bytes, "bytes", what);
  entry.crc = read_hex8(text_field(json, "crc32", what), what);
  return entry;
}

}  // namespace

bool valid_name(std::string_view name) {
  const auto allowed = [](char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' ||
           c == '-' || c == '.';
  };
  return !name.empty() && name.size() <= kMaxNameBytes && name[0] != '.' &&
         std::all_of(name.begin(), name.end(), allowed);
}

std::string array_file_name(const std::string& artifact, const std::string& array, uint32_t crc,
                            int attempt) {
  // Without dots in the middle part, "a" + "b.c" and "a.b" + "c" cannot share a file name.
  std::string middle = array;
  std::replace(middle.begin(), middle.end(), '.', '_');
  const std::string suffix = attempt == 0 ? "" : "-" + std::to_string(attempt);
  return artifact + "." + middle + "." + hex8(crc) + suffix + ".npy";
}

std::string owner_of_array_file(std::string_view file) {
  constexpr std::string_view extension = ".npy";
  if (!file.ends_with(extension)) return "";
  file.remove_suffix(extension.size());
  const size_t crc = file.rfind('.');
  if (crc == std::string_view::npos || crc == 0) return "";
  const std::string_view hash = file.substr(crc + 1);
  if (hash.size() < 8 || !std::all_of(hash.begin(), hash.begin() + 8, is_hex)) return "";
  const std::string_view suffix = hash.substr(8);
  const auto is_digit = [](char c) { return c >= '0' && c <= '9'; };
  if (!suffix.empty() && (suffix[0] != '-' || suffix.size() < 2 ||
                          !std::all_of(suffix.begin() + 1, suffix.end(), is_digit))) {
    return "";
  }
  const size_t array = file.rfind('.', crc - 1);
  if (array == std::string_view::npos || array == 0 ||
      !valid_name(file.substr(array + 1, crc - array - 1))) {
    return "";
  }
  const std::string_view artifact = file.substr(0, array);
  return valid_name(artifact) ? std::string(artifact) : "";
}

bool looks_like_manifest(std::string_view text) { return text.starts_with(kStart); }

uint32_t crc32_of(std::string_view bytes, uint32_t crc) {
  return static_cast<uint32_t>(
      crc32_z(crc, reinterpret_cast<const Bytef*>(bytes.data()), bytes.size()));
}

std::string write_manifest(const Manifest& manifest, const std::string& what) {
  require(valid_name(manifest.kind), what, ": kind: got '", printable(manifest.kind),
          "', wanted letters, digits, '_', '-', '.'");
  const Json attributes = manifest.attributes.empty()
                              ? Json::object()
                              : parse_strict_json(manifest.attributes, what + ": attributes");
  require(attributes.is_object(), what, ": attributes: got JSON of type ", attributes.type_name(),
          ", wanted an object");
  Json arrays = Json::object();
  for (const auto& [name, entry] : manifest.arrays) {
    require(valid_name(name), what, ": array name: got '", printable(name), "', wanted up to ",
            kMaxNameBytes, " letters, digits, '_', '-', '.', not starting with '.'");
    const auto dtype = std::find_if(std::begin(kDTypeNames), std::end(kDTypeNames),
                                    [&](const DTypeName& d) { return d.dtype == entry.dtype; });
    arrays[name] = {{"file", entry.file},
                    {"dtype", dtype->name},
                    {"shape", entry.shape},
                    {"bytes", entry.file_bytes},
                    {"crc32", hex8(entry.crc)}};
  }
  const Json json = {{"magic", kMagic},
                     {"version", kVersion},
                     {"kind", manifest.kind},
                     {"attributes", attributes},
                     {"arrays", arrays}};
  std::string text = json.dump(2);
  text.resize(text.rfind("\n}"));
  const std::string checksum = hex8(crc32_of(text));
  text.append(kTail).append(checksum).append(kEnd);
  require(text.size() <= kMaxManifestBytes, what, ": manifest: got ", text.size(),
          " bytes, wanted at most ", kMaxManifestBytes);
  // What cannot be read back (one level of nesting too deep, say) is not written.
  parse_strict_json(text, what + ": attributes");
  return text;
}

Manifest read_manifest(std::string_view text, const std::string& artifact,
                       const std::string& what) {
  const Json json = parse_strict_json(text, what);
  require(json.is_object(), what, ": got JSON of type ", json.type_name(), ", wanted an object");
  const std::string magic = text_field(json, "magic", what);
  require(magic == kMagic, what, ": magic: got '", printable(magic), "', wanted '", kMagic, "'");
  const auto version = json.find("version");
  require(version != json.end(), what, ": the field 'version' is missing");
  require(integer(*version, "version", what) == kVersion, what, ": version: got ",
          printable(version->dump()), ", wanted ", kVersion);
  check_text_checksum(text, what);

  Manifest manifest;
  manifest.kind = text_field(json, "kind", what);
  require(valid_name(manifest.kind), what, ": kind: got '", printable(manifest.kind),
          "', wanted letters, digits, '_', '-', '.'");
  manifest.attributes = field(json, "attributes", Json::value_t::object, what).dump();
  for (const auto& [name, entry] : field(json, "arrays", Json::value_t::object, what).items()) {
    require(valid_name(name), what, ": array name: got '", printable(name),
            "', wanted letters, digits, '_', '-', '.'");
    manifest.arrays[name] = read_entry(entry, artifact, what + ": array '" + name + "'");
  }
  return manifest;
}

}  // namespace veloxquant
