// Environment variables: their values, one sentence for any other, and that it comes at first use.
#include "src/backends/environment.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <map>

#include "veloxquant/codec_spec.h"
#include "veloxquant/error.h"

namespace veloxquant {
namespace {

Environment of(const std::map<std::string, std::string>& variables) {
  return environment_of([&](const char* name) {
    const auto found = variables.find(name);
    return found == variables.end() ? nullptr : found->second.c_str();
  });
}

std::string error_of(const char* name, const char* value) {
  try {
    of({{name, value}});
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(Environment, ReadsItsVariables) {
  const Environment none = of({});
  EXPECT_EQ(none.backend, Backend::cpu);
  EXPECT_EQ(none.threads, 0);
  EXPECT_TRUE(none.simd.empty() && none.lookups_in_registers && !none.debug);
  const Environment all = of({{"VELOXQUANT_BACKEND", "reference"},
                              {"VELOXQUANT_SIMD", "AVX2"},
                              {"VELOXQUANT_THREADS", "3"},
                              {"VELOXQUANT_LOOKUPS", "memory"},
                              {"VELOXQUANT_DEBUG", "1"}});
  EXPECT_EQ(all.backend, Backend::reference);
  EXPECT_EQ(all.simd, "AVX2");
  EXPECT_EQ(all.threads, 3);
  EXPECT_TRUE(!all.lookups_in_registers && all.debug);
  EXPECT_TRUE(of({{"VELOXQUANT_LOOKUPS", "registers"}}).lookups_in_registers);
  EXPECT_FALSE(of({{"VELOXQUANT_DEBUG", "0"}}).debug);
  EXPECT_TRUE(of({{"MLX_METAL_DEBUG", "1"}}).debug);
}

TEST(Environment, NamesTheVariableItsValueAndWhatWasWanted) {
  EXPECT_EQ(error_of("VELOXQUANT_BACKEND", "gpu"),
            "[environment] VELOXQUANT_BACKEND: got 'gpu', wanted cpu or reference");
  EXPECT_EQ(error_of("VELOXQUANT_LOOKUPS", "Memory"),
            "[environment] VELOXQUANT_LOOKUPS: got 'Memory', wanted registers or memory");
  for (const std::string value : {"two", "2x", "-1", "99999999999999999999"}) {
    EXPECT_EQ(
        error_of("VELOXQUANT_THREADS", value.c_str()),
        "[environment] VELOXQUANT_THREADS: got '" + value + "', wanted 0 (every core) or more");
  }
}

// In processes of their own: a codec of memory alone and a question are uses of the library.
TEST(EnvironmentDeathTest, IsCheckedAtFirstUse) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto use = [](auto&& call) {
    setenv("VELOXQUANT_LOOKUPS", "disk", 1);
    try {
      call();
    } catch (const Error& error) {
      std::fputs(error.what(), stderr);
      std::exit(3);
    }
    std::exit(0);
  };
  const char* wanted = "VELOXQUANT_LOOKUPS: got 'disk', wanted registers or memory";
  EXPECT_EXIT(use([] {
                make_codec({"turboquant", Side::keys, 1, 64, {}}, {});
              }),
              ::testing::ExitedWithCode(3), wanted);
  EXPECT_EXIT(use([] { default_backend(); }), ::testing::ExitedWithCode(3), wanted);
  EXPECT_EXIT(use([] { simd_level(); }), ::testing::ExitedWithCode(3), wanted);
}

}  // namespace
}  // namespace veloxquant
