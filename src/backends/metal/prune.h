// Kernel text without what a kernel does not use: MLX puts a kernel's whole text together, and
// hashes it, at every launch.
#pragma once

#include <string>

namespace veloxquant::metal {

// `header` less its functions, structs and constants whose names `body` does not need, directly or
// through others. Names count as words of the text: what merely might be used stays.
std::string needed_by(const std::string& body, const std::string& header);

// No indentation, no empty lines.
std::string flush_left(const std::string& text);

}  // namespace veloxquant::metal
