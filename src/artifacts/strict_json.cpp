#include "src/artifacts/strict_json.h"

#include <set>
#include <vector>

#include "src/artifacts/printable.h"
#include "veloxquant/error.h"

namespace veloxquant {
namespace {

constexpr size_t kMaxDepth = 32;

// A pass over the text that builds nothing; the parser proper runs on text that passed.
class Checker final : public nlohmann::json_sax<nlohmann::ordered_json> {
 public:
  explicit Checker(const std::string& what) : what_(what) {}

  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t& text) override {
    require(text.find_first_of(".eE") != std::string::npos, what_, ": the integer ",
            printable(text), " does not fit 64 bits");
    return true;
  }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_object(size_t) override { return enter(); }
  bool end_object() override { return leave(); }
  bool start_array(size_t) override { return enter(); }
  bool end_array() override { return leave(); }
  bool key(string_t& key) override {
    require(keys_.back().insert(key).second, what_, ": the key '", printable(key),
            "' appears twice");
    return true;
  }
  bool parse_error(size_t position, const std::string&,
                   const nlohmann::detail::exception& error) override {
    fail(what_, ": not JSON at byte ", position, " (", printable(error.what()), ")");
  }

 private:
  bool enter() {
    require(keys_.size() < kMaxDepth, what_, ": nested deeper than ", kMaxDepth);
    keys_.emplace_back();
    return true;
  }
  bool leave() {
    keys_.pop_back();
    return true;
  }

  const std::string& what_;
  std::vector<std::set<std::string>> keys_;  // one set per open object or array
};

}  // namespace

nlohmann::ordered_json parse_strict_json(std::string_view text, const std::string& what) {
  Checker checker(what);
  nlohmann::ordered_json::sax_parse(text.begin(), text.end(), &checker);
  return nlohmann::ordered_json::parse(text.begin(), text.end());
}

}  // namespace veloxquant
