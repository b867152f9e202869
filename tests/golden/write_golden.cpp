// Writes tests/golden/<method>.bin with the reference: after a deliberate change of a format (raise
// kGoldenVersion), or for a new codec.
//
//   cmake --build build/dev --target write_golden && build/dev/write_golden tests/golden [method
//   ...]
#include <cstdio>

#include "tests/support/golden.h"

int main(int argc, char** argv) {
  using namespace veloxquant;
  if (argc < 2) {
    std::fprintf(stderr, "usage: write_golden DIRECTORY [method ...]\n");
    return 2;
  }
  std::vector<std::string> methods(argv + 2, argv + argc);
  if (methods.empty()) {
    for (const auto& maker : test::case_makers()) methods.push_back(maker.first);
  }
  try {
    for (const std::string& method : methods) {
      const std::string path = std::string(argv[1]) + "/" + method + ".bin";
      const auto entries = test::golden_entries(method, Backend::reference);
      test::write_golden(path, entries);
      std::printf("%s: %zu entries\n", path.c_str(), entries.size());
    }
  } catch (const Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
