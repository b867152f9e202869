// Attention of chunks of queries on Metal (metal_prefill.h), run on the MSL machine, against the
// fp64 oracle, and what it reads.
#include "src/attention/decode_metal_fixture.h"
#include "src/attention/prefill_text.h"

namespace veloxquant::attention {
namespace {

Case prefill_case(int head_dim, int group, int64_t length, int64_t queries) {
  Case c = decode_case(head_dim, group, length);
  c.n_queries = queries;
  c.n_kv_heads = 1;
  return c;
}

TEST(MetalPrefill, HeadDimsAndCodecs) {
  Case c = prefill_case(128, 2, 300, 20);
  test::Random random(11);
  check(c, vecinfer_side(random, Side::keys, c, {}), vecinfer_side(random, Side::values, c, {}));
  c = prefill_case(80, 3, 290, 17);
  check(c, scalar_side(Side::keys, c, 3, 1), scalar_side(Side::values, c, 2, 2));
  c = prefill_case(256, 1, 260, 18);
  check(c, rabitq_side(Side::keys, c, 2, true), rabitq_side(Side::values, c, 1, false));
  c = prefill_case(64, 4, 300, 33);
  check(c, qjl_side(c, 2), scalar_side(Side::values, c, 4, 1));
  check(c, qjl_side(c, 7), rabitq_side(Side::values, c, 4, true));  // queries of 448 numbers
}

// Chunks that see one another as codes and as they are; several sequences, cut spans.
TEST(MetalPrefill, OptionsOfAttention) {
  Case c = prefill_case(64, 2, 500, 90);
  c.n_kv_heads = 2;
  c.batch = 2;
  c.cut = 17;
  c.n_new_blocks = 1;
  c.strict = true;
  test::Random random(5);
  const Codes dense{4, 256, false, TransformKind::dense};
  check(c, vecinfer_side(random, Side::keys, c, dense),
        vecinfer_side(random, Side::values, c, dense));
  c.batch = 1;
  c.cut = 0;
  c.strict = false;
  c.sliding_window = 150;
  c.softcap = 20;
  c.sink_logits = true;
  c.q_dtype = c.out_dtype = DType::float16;
  check(c, scalar_side(Side::keys, c, 4, 1), scalar_side(Side::values, c, 2, 1));
  c.mask = MaskKind::boolean;
  c.exact_dtype = DType::bfloat16;
  check(c, scalar_side(Side::keys, c, 4, 1), scalar_side(Side::values, c, 2, 1));
  c.mask = MaskKind::additive;
  c.mask_broadcast = true;
  c.causal = false;
  check(c, scalar_side(Side::keys, c, 4, 1), scalar_side(Side::values, c, 2, 1));
}

TEST(MetalPrefill, WithoutPackedBlocks) {
  Case c = prefill_case(96, 2, 60, 40);
  test::Random random(3);
  check(c, vecinfer_side(random, Side::keys, c, {}), vecinfer_side(random, Side::values, c, {}));
}

// By both kernels, as on the CPU.
TEST(MetalPrefill, AQueryThatIsNotFiniteGivesARowOfNaNAndTouchesNoOther) {
  for (int64_t queries : {2, 20}) {
    Case c = prefill_case(64, 2, 220, queries);
    const MetalSide values = scalar_side(Side::values, c, 2, 1);
    for (const MetalSide& keys : {scalar_side(Side::keys, c, 2, 1), qjl_side(c, 2)}) {
      Scenario p(c, keys.codec, values.codec);
      const Result want = MetalDecode(p, keys, values).run(4);
      store_element(p.q.view.at(0, 0, 1), c.q_dtype, 3, std::numeric_limits<float>::quiet_NaN());
      store_element(p.q.view.at(0, 1, 0), c.q_dtype, 5, -std::numeric_limits<float>::infinity());
      const Result got = MetalDecode(p, keys, values).run(4);
      for (int h = 0; h < 2; ++h) {
        for (int64_t i = 0; i < queries; ++i) {
          const bool bad = (h == 0 && i == 1) || (h == 1 && i == 0);
          const float lse = got.lse[h * queries + i];
          EXPECT_TRUE(bad ? std::isnan(lse) : lse == want.lse[h * queries + i]) << h << " " << i;
          for (int d = 0; d < 64; ++d) {
            const float x = load_element(got.out.view.at(0, h, i), c.out_dtype, d);
            const float y = load_element(want.out.view.at(0, h, i), c.out_dtype, d);
            ASSERT_TRUE(bad ? std::isnan(x) : x == y) << h << " " << i << " " << d;
          }
        }
      }
    }
  }
}

// Shapes fit into 32 KB whatever the codecs; few queries and very long ones go to the other kernel.
TEST(MetalPrefill, ShapesFit) {
  for (int dim = 8; dim <= kMaxDecodeDim; dim += 8) {
    for (int blocks : {0, 1, 2, 5}) {
      DecodeShape s;
      s.head_dim = dim, s.n_spans = 1, s.n_queries = 100, s.group = 4;
      s.keys.n_rows = blocks * dim;
      const PrefillShape p = prefill_shape(s);
      const bool short_enough = std::max(1, blocks) * dim <= 2 * kMaxDecodeDim;
      ASSERT_EQ(p.rows > 0, short_enough) << dim << " " << blocks;
      if (p.rows == 0) continue;
      const int widest = std::max(p.key_stride, p.value_stride);
      EXPECT_LE(4 * (p.rows * (s.key_rows() + p.tokens) + p.tokens * widest), 32 * 1024 - 256);
      EXPECT_EQ(p.rows % 8, 0);
      EXPECT_EQ(16 % p.tokens, 0);
    }
  }
  DecodeShape s;
  s.head_dim = 128, s.n_spans = 1, s.group = 8;
  for (int queries : {1, 16, 17}) {
    s.n_queries = queries;
    EXPECT_EQ(prefill_shape(s).rows > 0, queries > 16);
  }
}

// 32 rows share what is decoded: a quarter of what the decode kernel's 8 would ask for.
TEST(MetalPrefill, ThirtyTwoRowsShareTheCodes) {
  Case c = prefill_case(128, 4, 64 * 16 + 4 + 64, 64);
  c.causal = false;
  test::Random random(11);
  const MetalSide keys = vecinfer_side(random, Side::keys, c, {});
  const msl::Report report = check(c, keys, vecinfer_side(random, Side::values, c, {}), 1)[0];
  const int64_t side = 16 * 2048, tiles = 64 * 4 / 32;
  for (const char* name : {"k0", "v0"}) {
    EXPECT_EQ(report.buffers.at(name).requested, tiles * side) << name;
    EXPECT_EQ(report.buffers.at(name).once, side) << name;
  }
  EXPECT_LE(report.threadgroup_bytes, 32 * 1024);
  int64_t all = 0;
  for (const auto& [name, traffic] : report.buffers) all += traffic.requested;
  std::printf("prefill of 64 queries, 4 heads: %lld device bytes asked for, %lld of threadgroup\n",
              static_cast<long long>(all), static_cast<long long>(report.threadgroup_bytes));
}

}  // namespace
}  // namespace veloxquant::attention
