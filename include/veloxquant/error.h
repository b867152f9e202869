// Errors of the core. Every public function that can refuse its input throws
// veloxquant::Error with one sentence: what was asked, what it got, what it wanted.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace veloxquant {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// fail("[attend] head_dim: got ", 7, ", wanted a multiple of 8")
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

template <class... Parts>
void require(bool ok, const Parts&... parts) {
  if (!ok) fail(parts...);
}

}  // namespace veloxquant
