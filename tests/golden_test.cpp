// The bytes of tests/golden, written on one machine, come out on every backend and SIMD level of
// this one. A difference means that files and caches in the wild would no longer be read alike:
// find out why before writing new ones (write_golden).
#include <gtest/gtest.h>

#include "tests/support/golden.h"
#include "veloxquant/backend.h"

namespace veloxquant {
namespace {

class Golden : public ::testing::TestWithParam<std::string> {
 protected:
  void TearDown() override { set_simd_level(""); }

  void compare(Backend backend) {
    const std::string path = VELOXQUANT_GOLDEN_DIR "/" + GetParam() + ".bin";
    const auto wanted = test::read_golden(path);
    const auto got = test::golden_entries(GetParam(), backend);
    ASSERT_EQ(got.size(), wanted.size());
    ASSERT_GE(got.size(), 3u);
    for (size_t i = 0; i < got.size(); ++i) {
      SCOPED_TRACE(wanted[i].name);
      EXPECT_EQ(got[i].name, wanted[i].name);
      ASSERT_EQ(got[i].inputs, wanted[i].inputs) << "the inputs themselves differ";
      EXPECT_TRUE(got[i].blocks == wanted[i].blocks) << "blocks";
      EXPECT_EQ(got[i].rows, wanted[i].rows) << "token rows";
      EXPECT_EQ(got[i].decoded, wanted[i].decoded) << "decoded values";
      EXPECT_EQ(got[i].transposed, wanted[i].transposed) << "decoded values, transposed";
    }
  }
};

TEST_P(Golden, Reference) { compare(Backend::reference); }

TEST_P(Golden, EverySimdLevel) {
  for (const std::string& level : simd_levels()) {
    SCOPED_TRACE(level);
    set_simd_level(level);
    compare(Backend::cpu);
  }
}

INSTANTIATE_TEST_SUITE_P(Codecs, Golden, ::testing::ValuesIn(codec_methods()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace veloxquant
