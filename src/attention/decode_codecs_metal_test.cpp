// Decode attention on Metal over the codecs whose tiles do more than look a code up: exact blocks,
// turboquant's `prod` form, outlier channels, keys before RoPE; against the fp64 oracle.
#include <numeric>

#include "src/attention/decode_metal_fixture.h"
#include "src/codecs/qjl/kernel_calls.h"
#include "src/codecs/rope/kernel_calls.h"
#include "src/codecs/turboquant/sketch.h"
#include "tests/support/codec_cases.h"
#include "veloxquant/exact.h"

namespace veloxquant::attention {
namespace {

using test::CodecCase;
using test::integer_option;

MetalSide exact_side(Side side, const Case& c, DType dtype) {
  MetalSide s;
  s.codec = make_exact_codec(side, c.n_kv_heads, c.head_dim, dtype);
  s.format.kind = TileKind::halves;
  s.format.bfloat = dtype == DType::bfloat16;
  s.numbers = s.moved = {0.0f};
  s.table_shape = s.moved_shape = {1};
  return s;
}

MetalSide prod_side(Side side, const Case& c, int bits) {
  TurboQuantOptions options;
  options.bits = bits, options.seed = kSeed, options.prod = true, options.scale = ScalarScale::raw;
  CodeFormat format;
  format.kind = TileKind::sketched;
  format.bits = bits - 1, format.by_token = side == Side::values;
  MetalSide s = rotated(make_turboquant_codec(side, c.n_kv_heads, c.head_dim, options), format,
                        turboquant::level_numbers(c.head_dim, bits - 1, 1), {1, 16});
  if (side == Side::keys) {
    s.format.n_rows = 2 * c.head_dim;
    s.transform = 2;
    s.queries = turboquant::sketched_queries(c.head_dim, kSeed);
  } else {
    const auto sketch = turboquant::gaussian_sketch(c.head_dim, kSeed);
    s.moved.insert(s.moved.end(), sketch->rows.begin(), sketch->rows.end());
    s.moved_shape = {2 + c.head_dim, c.head_dim};
  }
  return s;
}

// A case of the suites with outlier channels.
MetalSide outlier_side(const CodecCase& one) {
  const bool fixed = one.has_table("outlier_channels");
  const qjl::BlockKernelShape shape = qjl::block_shape_of(one.spec(), 0, fixed);
  std::vector<int32_t> channels;
  if (fixed) {
    const auto* given = static_cast<const int32_t*>(one.given("outlier_channels").data);
    channels.assign(given, given + shape.heads * shape.outliers);
  }
  MetalSide s;
  s.codec = one.codec_ptr();
  s.format.kind = TileKind::outliers;
  s.format.bits = shape.layout.m, s.format.m_out = shape.layout.m_out;
  s.format.outliers = shape.outliers, s.format.fixed = fixed;
  s.format.n_rows = shape.layout.m + shape.dim;
  s.transform = 2;
  s.queries = qjl::query_matrix(shape, nullptr, 0);
  s.numbers = qjl::outlier_numbers(shape, nullptr, 0, channels);
  s.table_shape = {static_cast<int64_t>(s.numbers.size())};
  s.moved = {0.0f};
  s.moved_shape = {1};
  return s;
}

// commvq or vecinfer_rope.
MetalSide turned_side(const CodecCase& one) {
  const int heads = one.spec().n_kv_heads, dim = one.spec().head_dim, pairs = dim / 2;
  const RopeSpec spec = test::rope_spec(one);
  std::vector<int32_t> order(heads * pairs);
  std::vector<float> inverse(order.size(), 1.0f);
  for (size_t i = 0; i < order.size(); ++i) {
    order[i] = one.has_table("order") ? static_cast<const int32_t*>(one.given("order").data)[i]
                                      : static_cast<int32_t>(i) % pairs;
    const size_t pair = i / pairs * pairs + order[i];
    if (one.has_table("weight")) {
      inverse[i] = 1.0f / static_cast<const float*>(one.given("weight").data)[pair];
    }
  }
  MetalSide s;
  s.codec = one.codec_ptr();
  const bool vectors = one.spec().method == "vecinfer_rope";
  const TensorView& tables = one.given(vectors ? "tables" : "codebook");
  const auto* halves = static_cast<const uint16_t*>(tables.data);
  s.halves.assign(halves, halves + tables.size());
  s.table_shape.assign(tables.shape.begin(), tables.shape.begin() + tables.ndim);
  if (vectors) {
    s.table_shape.insert(s.table_shape.begin(), 1);
    s.format = {static_cast<int>(tables.shape[3]), static_cast<int>(tables.shape[2]),
                vecinfer::code_bits(static_cast<int>(tables.shape[2])),
                static_cast<int>(tables.shape[1])};
    s.format.kind = TileKind::pairs;
  } else {
    s.format.kind = TileKind::commvq;
    s.format.stages = static_cast<int>(tables.shape[1]);
    s.format.n_centroids = static_cast<int>(tables.shape[2]);
  }
  const Rope rope(spec);
  s.transform = 2;
  s.matrices = heads;
  s.queries = rope::slot_queries(rope, order, inverse);
  s.moved = rope::turn_numbers(rope, order);
  s.moved_shape = {static_cast<int64_t>(s.moved.size())};
  return s;
}

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
