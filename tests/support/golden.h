// Golden files: what every codec wrote when its format was last changed on purpose, one file per
// method in tests/golden. golden_test compares, write_golden writes.
//
//   "VQGOLDEN" | u32 version | u32 entries | entries, little-endian
//   entry: string name | u64 hash of the inputs | bytes blocks | u64 hashes of the token
//          rows, of the decoded floats and of the transposed ones
//   string, bytes: u32 length, then the bytes
//
// The inputs come from ExactRandom, so that every machine makes the same ones.
#pragma once

#include <cmath>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "tests/support/codec_cases.h"

namespace veloxquant::test {

// Raise it with every deliberate change of a packed format, and write the files again.
constexpr uint32_t kGoldenVersion = 1;
constexpr char kGoldenMagic[] = "VQGOLDEN";
constexpr int kGoldenHeadDims[] = {80, 128};
constexpr int kGoldenTokens = 70;  // a whole block and a tail of 6

struct GoldenEntry {
  std::string name;
  uint64_t inputs = 0;
  std::vector<uint8_t> blocks;
  uint64_t rows = 0, decoded = 0, transposed = 0;
};

// FNV-1a
inline uint64_t hash_bytes(const void* data, size_t n, uint64_t hash = 0xcbf29ce484222325ull) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  for (size_t i = 0; i < n; ++i) hash = (hash ^ bytes[i]) * 0x100000001b3ull;
  return hash;
}

inline GoldenEntry golden_entry(const CodecCase& one, Backend backend) {
  const Codec& codec = one.codec();
  const int dim = codec.head_dim();
  GoldenEntry entry;
  entry.name = one.label() + " dim " + std::to_string(dim);
  ExactRandom random(static_cast<uint64_t>(dim));
  entry.inputs = entry.rows = entry.decoded = entry.transposed = hash_bytes(nullptr, 0);
  for (int start = 0; start < kGoldenTokens; start += kBlockTokens) {
    const int n = std::min(kBlockTokens, kGoldenTokens - start);
    const BlockPlace place{0, start == 0 ? 0 : 1, 4 + start};
    const std::vector<float> x = case_rows(random, n, dim);
    std::vector<uint8_t> block(codec.block_bytes()), rows(n * codec.token_bytes());
    std::vector<float> y(static_cast<size_t>(n) * dim),
        y_t(static_cast<size_t>(kBlockTokens) * dim);
    codec.encode_block(backend, place, x.data(), n, block.data());
    codec.unpack_tokens(block.data(), n, rows.data());
    codec.decode_block(backend, place, block.data(), n, y.data(), dim);
    codec.decode_block_transposed(backend, place, block.data(), n, y_t.data());
    entry.inputs = hash_bytes(x.data(), x.size() * sizeof(float), entry.inputs);
    entry.blocks.insert(entry.blocks.end(), block.begin(), block.end());
    entry.rows = hash_bytes(rows.data(), rows.size(), entry.rows);
    entry.decoded = hash_bytes(y.data(), y.size() * sizeof(float), entry.decoded);
    entry.transposed = hash_bytes(y_t.data(), y_t.size() * sizeof(float), entry.transposed);
  }
  return entry;
}

inline std::vector<GoldenEntry> golden_entries(const std::string& method, Backend backend) {
  std::vector<GoldenEntry> entries;
  for (int head_dim : kGoldenHeadDims) {
    for (const CasePtr& one : codec_cases(method, head_dim)) {
      entries.push_back(golden_entry(*one, backend));
    }
  }
  return entries;
}

namespace golden_detail {

template <class Number>
void put(std::string& to, Number value) {
  for (size_t i = 0; i < sizeof(Number); ++i) {
    to.push_back(static_cast<char>(static_cast<uint64_t>(value) >> (8 * i)));
  }
}
template <class Bytes>
void put_bytes(std::string& to, const Bytes& bytes) {
  put(to, static_cast<uint32_t>(bytes.size()));
  to.append(bytes.begin(), bytes.end());
}

class Reader {
 public:
  explicit Reader(std::string data) : data_(std::move(data)) {}
  std::string take(size_t n) {
    require(n <= data_.size() - at_, "[golden] file: got its end, wanted ", n, " more bytes");
    at_ += n;
    return data_.substr(at_ - n, n);
  }
  template <class Number>
  Number number() {
    const std::string bytes = take(sizeof(Number));
    uint64_t value = 0;
    for (size_t i = 0; i < sizeof(Number); ++i) {
      value |= static_cast<uint64_t>(static_cast<uint8_t>(bytes[i])) << (8 * i);
    }
    return static_cast<Number>(value);
  }
  std::string bytes() { return take(number<uint32_t>()); }
  bool at_end() const { return at_ == data_.size(); }

 private:
  std::string data_;
  size_t at_ = 0;
};

}  // namespace golden_detail

inline void write_golden(const std::string& path, const std::vector<GoldenEntry>& entries) {
  using namespace golden_detail;
  std::string data(kGoldenMagic);
  put(data, kGoldenVersion);
  put(data, static_cast<uint32_t>(entries.size()));
  for (const GoldenEntry& entry : entries) {
    put_bytes(data, entry.name);
    put(data, entry.inputs);
    put_bytes(data, entry.blocks);
    put(data, entry.rows);
    put(data, entry.decoded);
    put(data, entry.transposed);
  }
  std::ofstream file(path, std::ios::binary);
  file.write(data.data(), static_cast<std::streamsize>(data.size()));
  file.close();
  require(file.good(), "[golden] ", path, ": cannot be written");
}

inline std::vector<GoldenEntry> read_golden(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  require(file.good(), "[golden] ", path, ": got no such file, wanted one written by write_golden");
  std::stringstream text;
  text << file.rdbuf();
  golden_detail::Reader reader(text.str());
  require(reader.take(sizeof(kGoldenMagic) - 1) == kGoldenMagic, "[golden] ", path,
          ": got another kind of file");
  const auto version = reader.number<uint32_t>();
  require(version == kGoldenVersion, "[golden] ", path, ": got format version ", version,
          ", wanted ", kGoldenVersion);
  std::vector<GoldenEntry> entries(reader.number<uint32_t>());
  for (GoldenEntry& entry : entries) {
    entry.name = reader.bytes();
    entry.inputs = reader.number<uint64_t>();
    const std::string blocks = reader.bytes();
    entry.blocks.assign(blocks.begin(), blocks.end());
    entry.rows = reader.number<uint64_t>();
    entry.decoded = reader.number<uint64_t>();
    entry.transposed = reader.number<uint64_t>();
  }
  require(reader.at_end(), "[golden] ", path, ": got more bytes than entries");
  return entries;
}

}  // namespace veloxquant::test
