// Decode attention on Metal over the codecs whose tiles do more than look a code up: exact blocks,
// turboquant's `prod` form, outlier channels, keys before RoPE; against the fp64 oracle.
#include "src/attention/decode_metal_sides.h"

namespace veloxquant::attention {
namespace {

using test::integer_option;

TEST(MetalDecodeCodecs, ExactBlocks) {
  for (DType dtype : {DType::float16, DType::bfloat16}) {
    Case c = decode_case(dtype == DType::float16 ? 128 : 80, 4, 300);
    c.exact_dtype = dtype;
    check(c, exact_side(Side::keys, c, dtype), exact_side(Side::values, c, dtype));
  }
  Case c = decode_case(64, 3, 300);
  c.n_queries = 2;
  check(c, scalar_side(Side::keys, c, 4, 1), exact_side(Side::values, c, DType::float16));
}

TEST(MetalDecodeCodecs, TheProdForm) {
  for (int bits = 1; bits <= 4; ++bits) {
    SCOPED_TRACE(bits);
    Case c = decode_case(bits == 2 ? 128 : bits == 4 ? 256 : 48 + 16 * bits, bits, 300);
    check(c, prod_side(Side::keys, c, bits), prod_side(Side::values, c, bits));
  }
  Case c = decode_case(64, 2, 400);
  c.n_queries = 3;
  c.batch = 2;
  c.cut = 17;
  check(c, prod_side(Side::keys, c, 3), scalar_side(Side::values, c, 2, 1));
  check(c, scalar_side(Side::keys, c, 2, 1), prod_side(Side::values, c, 2));
}

TEST(MetalDecodeCodecs, OutlierChannels) {
  int tested = 0;
  for (int head_dim : {64, 80, 256}) {
    for (const test::CasePtr& one : test::codec_cases("qjl", head_dim)) {
      if (integer_option(*one, "outliers", 0) == 0) continue;
      SCOPED_TRACE(one->label() + ", head_dim " + std::to_string(head_dim));
      Case c = decode_case(head_dim, 3, 300);
      c.cut = head_dim == 80 ? 17 : 0;
      check(c, outlier_side(*one), scalar_side(Side::values, c, 2, 1));
      ++tested;
    }
  }
  EXPECT_EQ(tested, 9);
}

TEST(MetalDecodeCodecs, KeysBeforeRope) {
  int tested = 0;
  for (const char* method : {"commvq", "vecinfer_rope"}) {
    for (int head_dim : {64, 80, 128}) {
      for (const test::CasePtr& one : test::codec_cases(method, head_dim)) {
        SCOPED_TRACE(one->label() + ", head_dim " + std::to_string(head_dim));
        Case c = decode_case(head_dim, 4, 400);
        c.cut = head_dim == 80 ? 17 : 0;
        check(c, turned_side(*one), scalar_side(Side::values, c, 2, 1));
        ++tested;
      }
    }
  }
  EXPECT_EQ(tested, 12);
}

// Chunks of queries, by the kernel of metal_prefill.h.
TEST(MetalDecodeCodecs, Prefill) {
  Case c = decode_case(64, 2, 280);
  c.n_queries = 20;
  c.cut = 17;
  check(c, exact_side(Side::keys, c, DType::float16), exact_side(Side::values, c, DType::float16));
  check(c, prod_side(Side::keys, c, 3), prod_side(Side::values, c, 2));
  for (const char* method : {"qjl", "commvq", "vecinfer_rope"}) {
    const test::CasePtr one = test::codec_cases(method, 64).back();  // qjl: chosen outliers
    SCOPED_TRACE(one->label());
    const bool turned = std::string(method) != "qjl";
    check(c, turned ? turned_side(*one) : outlier_side(*one), scalar_side(Side::values, c, 2, 1));
  }
}

}  // namespace
}  // namespace veloxquant::attention
