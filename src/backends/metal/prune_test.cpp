// What is left of a header when a kernel does not need all of it.
#include "src/backends/metal/prune.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace veloxquant::metal {
namespace {

using testing::HasSubstr;
using testing::Not;

const char* const kHeader = R"(#define VQ_FN static inline
#define TWO_LINES(x) \
  x + 1
typedef unsigned int uint;
namespace veloxquant {
VQ_CONSTANT int kUsed = 3;
VQ_CONSTANT int kUnused[2] = {4, 5};
template <int N>
struct Wide {
  enum { SIZE = N };
};
#if defined(HERE)
VQ_FN int deep(int x) { return x + kUsed; }
#else
VQ_FN int deep(int x) {
  if (x) {
    return kUsed;
  }
  return 0;
}
#endif
template <class T,
          int N>
VQ_FN T middle(T x,
               int y) {
  return deep(x) + y;
}
VQ_FN int deeper(int x) { return x; }
VQ_FN int other() { return Wide<3>::SIZE; }
}
)";

TEST(Prune, KeepsWhatIsNamedDirectlyOrThroughOthers) {
  const std::string text = needed_by("out[0] = middle<int, 2>(1, 2);", kHeader);
  for (const char* kept :
       {"#define VQ_FN", "  x + 1", "typedef", "namespace", "kUsed = 3", "T middle", "#if",
        "deep(int x) { return x + kUsed; }", "  return 0;", "#endif", "class T,"}) {
    EXPECT_THAT(text, HasSubstr(kept));
  }
  for (const char* gone : {"kUnused", "Wide", "deeper", "other"}) {
    EXPECT_THAT(text, Not(HasSubstr(gone)));
  }
  EXPECT_THAT(needed_by("other()", kHeader), HasSubstr("struct Wide"));
}

TEST(Prune, TextOfABodyIsFlushLeft) {
  EXPECT_EQ(flush_left("\n  a;\n\n    b;\n#if 1\n"), "a;\nb;\n#if 1\n");
}

}  // namespace
}  // namespace veloxquant::metal
