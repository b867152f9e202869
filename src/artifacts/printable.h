// Text from a damaged or hostile file, made fit for an error message.
#pragma once

#include <string>
#include <string_view>

namespace veloxquant {

// Printable ASCII of at most 120 characters: a NUL would end the message, an escape sequence
// would reach a terminal.
inline std::string printable(std::string_view text) {
  constexpr size_t kMaxBytes = 120;
  std::string shown(text.substr(0, kMaxBytes));
  for (char& c : shown) {
    if (c < ' ' || c > '~') c = '?';
  }
  return text.size() > kMaxBytes ? shown + "..." : shown;
}

}  // namespace veloxquant
