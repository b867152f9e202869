// JSON from files that may be damaged or hostile.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace veloxquant {

// Keeps the order of keys. Throws Error, starting with `what`, for text that is not JSON, for
// duplicate keys, for nesting deeper than 32 and for integers that do not fit 64 bits (all of
// which nlohmann_json would read as something else than was written).
nlohmann::ordered_json parse_strict_json(std::string_view text, const std::string& what);

}  // namespace veloxquant
