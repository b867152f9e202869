#include "src/artifacts/npy.h"

#include <bit>
#include <charconv>

#include "src/artifacts/printable.h"

namespace veloxquant {
namespace {

static_assert(std::endian::native == std::endian::little, "elements are written as they lie");

constexpr std::string_view kMagic("\x93NUMPY\x01\x00", 8);
constexpr size_t kPreambleBytes = 10;
constexpr size_t kAlignment = 64;

struct Descr {
  DType dtype;
  const char* text;
};
constexpr Descr kDescrs[] = {{DType::float32, "<f4"}, {DType::float16, "<f2"},
                             {DType::uint8, "|u1"},   {DType::uint16, "<u2"},
                             {DType::int32, "<i4"},   {DType::boolean, "|b1"}};

// Reads the Python literal in a header: a dict of a string, a bool and a tuple of integers.
class HeaderParser {
 public:
  HeaderParser(std::string_view text, const std::string& what) : text_(text), what_(what) {}

  NpyHeader parse() {
    NpyHeader header;
    bool has_descr = false, has_order = false, has_shape = false;
    expect('{');
    while (!accept('}')) {
      const std::string_view key = quoted();
      expect(':');
      if (key == "descr" && !has_descr) {
        header.dtype = dtype();
        has_descr = true;
      } else if (key == "fortran_order" && !has_order) {
        row_major();
        has_order = true;
      } else if (key == "shape" && !has_shape) {
        header.shape = shape();
        has_shape = true;
      } else {
        fail(what_, ": .npy header: got an unknown or repeated key '", printable(key),
             "', wanted descr, fortran_order and shape once each");
      }
      if (!accept(',')) {
        expect('}');
        break;
      }
    }
    require(has_descr && has_order && has_shape, what_,
            ": .npy header: a key is missing, wanted descr, fortran_order and shape");
    skip_spaces();
    require(text_.empty(), what_, ": .npy header: got text after the closing brace");
    return header;
  }

 private:
  void skip_spaces() {
    while (!text_.empty() && (text_[0] == ' ' || text_[0] == '\n')) text_.remove_prefix(1);
  }

  bool accept(char c) {
    skip_spaces();
    if (text_.empty() || text_[0] != c) return false;
    text_.remove_prefix(1);
    return true;
  }

  void expect(char c) {
    require(accept(c), what_, ": .npy header: wanted '", c, "', got ",
            text_.empty() ? "its end" : "other text");
  }

  std::string_view quoted() {
    skip_spaces();
    const char quote = text_.empty() ? '\0' : text_[0];
    require(quote == '\'' || quote == '"', what_, ": .npy header: wanted a quoted string");
    const size_t end = text_.find(quote, 1);
    require(end != std::string_view::npos, what_, ": .npy header: a string has no end");
    const std::string_view inside = text_.substr(1, end - 1);
    text_.remove_prefix(end + 1);
    return inside;
  }

  DType dtype() {
    const std::string_view descr = quoted();
    for (const Descr& known : kDescrs) {
      if (descr == known.text) return known.dtype;
    }
    fail(what_, ": .npy dtype: got '", printable(descr),
         "', wanted one of <f4 <f2 |u1 <u2 <i4 |b1");
  }

  void row_major() {
    skip_spaces();
    require(text_.substr(0, 5) == "False", what_,
            ": .npy fortran_order: got something else than False, wanted a row-major array");
    text_.remove_prefix(5);
  }

  std::vector<int64_t> shape() {
    std::vector<int64_t> dims;
    expect('(');
    while (!accept(')')) {
      skip_spaces();
      int64_t n = 0;
      const auto [end, error] = std::from_chars(text_.data(), text_.data() + text_.size(), n);
      require(error == std::errc(), what_,
              ": .npy shape: got a dimension that is no 64-bit integer");
      text_.remove_prefix(static_cast<size_t>(end - text_.data()));
      dims.push_back(n);
      if (!accept(',')) {
        expect(')');
        break;
      }
    }
    return dims;
  }

  std::string_view text_;
  const std::string& what_;
};

}  // namespace

DType npy_dtype(DType dtype) { return dtype == DType::bfloat16 ? DType::uint16 : dtype; }

int64_t checked_array_bytes(DType dtype, const std::vector<int64_t>& shape,
                            const std::string& what) {
  require(shape.size() <= kMaxDims, what, ": shape: got ", shape.size(),
          " dimensions, wanted at most ", kMaxDims);
  int64_t limit = kMaxArrayBytes / dtype_bytes(dtype);
  int64_t size = 1;
  for (int64_t n : shape) {
    require(n >= 0, what, ": shape: got a dimension of ", n, ", wanted 0 or more");
    if (n == 0) {
      size = 0;
      continue;
    }
    // Dividing what is left instead of multiplying what there is cannot overflow.
    limit /= n;
    require(limit > 0, what, ": shape: got more than ", kMaxArrayBytes, " bytes of elements");
    size *= n;
  }
  return size * dtype_bytes(dtype);
}

std::string write_npy_header(DType dtype, const std::vector<int64_t>& shape) {
  std::string dict = "{'descr': '";
  for (const Descr& known : kDescrs) {
    if (known.dtype == npy_dtype(dtype)) dict += known.text;
  }
  dict += "', 'fortran_order': False, 'shape': (";
  for (size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) dict += ", ";
    dict += std::to_string(shape[i]);
  }
  dict += shape.size() == 1 ? ",), }" : "), }";
  // numpy leaves room for the first dimension to grow to 21 digits in place.
  if (!shape.empty()) dict.append(21 - std::to_string(shape[0]).size(), ' ');
  const size_t unpadded = kPreambleBytes + dict.size() + 1;
  dict.append((kAlignment - unpadded % kAlignment) % kAlignment, ' ');
  dict += '\n';

  std::string header(kMagic);
  header += static_cast<char>(dict.size() & 0xff);
  header += static_cast<char>(dict.size() >> 8);
  return header + dict;
}

NpyHeader read_npy_header(std::string_view start, const std::string& what) {
  require(start.size() >= kPreambleBytes, what, ": got ", start.size(),
          " bytes, wanted a .npy file");
  require(start.substr(0, 6) == kMagic.substr(0, 6), what, ": this is no .npy file");
  require(start.substr(6, 2) == kMagic.substr(6, 2), what, ": .npy version: got ",
          int{static_cast<uint8_t>(start[6])}, ".", int{static_cast<uint8_t>(start[7])},
          ", wanted 1.0");
  const size_t length = static_cast<uint8_t>(start[8]) | static_cast<uint8_t>(start[9]) << 8;
  require(length <= kMaxNpyHeaderBytes, what, ": .npy header: got ", length,
          " bytes, wanted at most ", kMaxNpyHeaderBytes);
  require(start.size() >= kPreambleBytes + length, what, ": the file ends inside its .npy header");
  NpyHeader header = HeaderParser(start.substr(kPreambleBytes, length), what).parse();
  header.data_offset = kPreambleBytes + length;
  return header;
}

}  // namespace veloxquant
