// Decode attention on Metal, run on the MSL machine, against the fp64 oracle: shapes, options, the
// plan, traffic. decode_codecs_metal_test has every codec's cases.
#include "src/attention/decode_metal_fixture.h"

namespace veloxquant::attention {
namespace {

std::vector<msl::Report> check(const Case& c, const Codes& key_codes = {},
                               const Codes& value_codes = {}, int cores = 4, uint64_t seed = 11) {
  test::Random random(seed);
  const MetalSide keys = vecinfer_side(random, Side::keys, c, key_codes);
  return check(c, keys, vecinfer_side(random, Side::values, c, value_codes), cores);
}

TEST(MetalDecode, GroupsAndHeadDims) {
  check(decode_case(128, 4, 400));
  check(decode_case(64, 8, 300), Codes{8, 256, false}, Codes{4, 256, true, TransformKind::none});
  check(decode_case(256, 1, 200), Codes{4, 256, true}, Codes{8, 256, true});
}

TEST(MetalDecode, OddHeadDimsAndCodeWidths) {
  check(decode_case(80, 3, 270), Codes{4, 64, true}, Codes{2, 16, true, TransformKind::none});
  check(decode_case(96, 2, 330), Codes{2, 300, true}, Codes{3, 2000, false, TransformKind::none});
  check(decode_case(64, 5, 260), Codes{1, 5, true, TransformKind::none}, Codes{16, 100, true});
  check(decode_case(16, 2, 200), Codes{8, 20, true}, Codes{16, 30, true});  // one sub-vector
}

TEST(MetalDecode, DenseTransforms) {
  const Codes dense{4, 256, false, TransformKind::dense};
  check(decode_case(64, 2, 300), dense, dense);
}

TEST(MetalDecode, ScalarCodecs) {
  const auto both = [](Case c, int key_bits, int value_bits, int stages) {
    check(c, scalar_side(Side::keys, c, key_bits, stages),
          scalar_side(Side::values, c, value_bits, stages));
  };
  both(decode_case(128, 4, 400), 2, 2, 1);
  both(decode_case(80, 3, 270), 3, 1, 1);
  both(decode_case(64, 8, 300), 4, 3, 1);
  both(decode_case(96, 1, 330), 1, 2, 2);
  both(decode_case(256, 2, 200), 3, 4, 2);
}

TEST(MetalDecode, BitPlanes) {
  Case c = decode_case(128, 4, 400);
  check(c, rabitq_side(Side::keys, c, 1, false), rabitq_side(Side::values, c, 2, false));
  c = decode_case(80, 2, 270);
  check(c, rabitq_side(Side::keys, c, 3, true), rabitq_side(Side::values, c, 4, true));
  c = decode_case(64, 3, 300);
  check(c, qjl_side(c, 1), scalar_side(Side::values, c, 4, 1));
  check(c, qjl_side(c, 2), rabitq_side(Side::values, c, 4, false));
}

// Codecs of two kinds, each with its own transform and table; several queries and a cut span.
TEST(MetalDecode, MixedCodecs) {
  Case c = decode_case(64, 2, 400);
  c.n_queries = 3;
  c.batch = 2;
  c.cut = 17;
  c.n_new_blocks = 2;
  c.strict = true;
  test::Random random(5);
  check(c, scalar_side(Side::keys, c, 4, 1), vecinfer_side(random, Side::values, c, {}));
  const Codes dense{4, 256, false, TransformKind::dense};
  check(c, rabitq_side(Side::keys, c, 2, false), vecinfer_side(random, Side::values, c, dense));
  check(c, vecinfer_side(random, Side::keys, c, dense), scalar_side(Side::values, c, 2, 2));
}

TEST(MetalDecode, ManyQueriesMasksCapsSinksAndTypes) {
  Case c = decode_case(64, 3, 400);
  c.n_queries = 5;
  c.batch = 2;
  c.n_new_blocks = 2;
  c.strict = true;
  c.cut = 17;
  c.q_dtype = c.out_dtype = DType::float16;
  check(c);
  c.strict = false;
  c.sliding_window = 150;
  c.q_dtype = c.out_dtype = c.exact_dtype = DType::bfloat16;
  c.sink_logits = true;
  check(c);
  c.cut = 0;  // a mask, three spans and three exact arrays would be more buffers than Metal has
  c.mask = MaskKind::boolean;
  c.softcap = 20;
  c.q_dtype = c.out_dtype = DType::float32;
  check(c);
  c.mask = MaskKind::additive;
  c.mask_broadcast = true;
  c.causal = false;
  check(c);
}

// Prefill: more queries than share a threadgroup's rows, and tokens that none of them sees.
TEST(MetalDecode, HundredsOfQueries) {
  Case c = decode_case(64, 2, 700);
  c.n_queries = 70;
  c.n_new_blocks = 1;
  check(c);
  c.strict = true;
  c.sliding_window = 200;
  check(c, scalar_side(Side::keys, c, 2, 1), scalar_side(Side::values, c, 2, 1));
}

TEST(MetalDecode, PartsThatAreSeen) {
  const std::vector<int32_t> seen = {100, 400, 300, 50, 130, 401, 320, 50};
  const Stretch packed = seen_part({true, 1, 2, 1000, 20, 99}, seen);
  EXPECT_EQ(packed.first, 3);  // whole blocks below position 100 are left out
  EXPECT_EQ(packed.position, 84);
  EXPECT_EQ(packed.count, 320 - 84);
  const Stretch exact = seen_part({false, 1, 2, 1000, 20, 0}, seen);
  EXPECT_EQ(exact.first, 82);
  EXPECT_EQ(exact.position, 100);
  EXPECT_EQ(exact.count, 401 - 100);
  EXPECT_EQ(seen_part({false, 1, 2, 70, 20, 0}, seen).count, 0);
  EXPECT_EQ(seen_part({true, 1, 2, 70, 320, 9}, seen).count, 0);
}

TEST(MetalDecode, WithoutPackedBlocks) {
  Case c = decode_case(96, 4, 40);
  check(c);
  c.n_queries = 3;
  c.length = 3;
  check(c);
}

TEST(MetalDecode, ResultsDoNotDependOnTheCut) {
  for (int cores : {1, 3, 64}) check(decode_case(64, 2, 900), Codes{}, Codes{}, cores);
}

// GQA shares each load: the first pass asks for every packed byte once, at any ratio.
TEST(MetalDecode, ReadsThePackedBytesOnce) {
  for (int group = 1; group <= 8; ++group) {
    SCOPED_TRACE(group);
    Case c = decode_case(128, group, 64 * 16 + 4 + 64);
    c.n_kv_heads = 1;
    const msl::Report report = check(c, Codes{4, 256, true}, Codes{4, 256, true}, 1)[0];
    const int64_t side = 16 * 2048;  // 16 blocks of 64 tokens of 32 codes of a byte
    for (const char* name : {"k0", "v0"}) {
      EXPECT_EQ(report.buffers.at(name).requested, side) << name;
      EXPECT_EQ(report.buffers.at(name).once, side) << name;
    }
    // All the rest but the exact tokens: what does not grow with the context is the tables and q.
    int64_t once = 0;
    for (const auto& [name, traffic] : report.buffers) {
      if (name[0] != 'e' && name != "q" && name != "k_tables" && name != "v_tables") {
        once += traffic.once;
      }
    }
    EXPECT_LE(once, 1.05 * 2 * side);
    EXPECT_LE(report.threadgroup_bytes, 17 * 1024);
  }
}

TEST(MetalDecode, CoresByTheNameOfTheArchitecture) {
  EXPECT_EQ(metal_cores("applegpu_g13p"), 6);
  EXPECT_EQ(metal_cores("applegpu_g16g"), 20);
  EXPECT_EQ(metal_cores("applegpu_g15s"), 40);
  EXPECT_EQ(metal_cores("applegpu_g14d"), 80);
  for (const char* other : {"", "applegpu_", "sm_90", "NVIDIA H200s"}) {
    EXPECT_EQ(metal_cores(other), 20) << other;
  }
}

// At 4096 tokens and batch 1 every core of an M1 (8) to an M5 Max (40) has 8 threadgroups.
TEST(MetalDecode, PlanFillsTheCores) {
  DecodeShape s;
  s.head_dim = 128;
  s.group = 4;
  s.n_kv_heads = 8;
  for (int cores : {8, 10, 20, 40}) {
    const std::vector<Item> items = plan_items(
        s, {{true, 0, 0, 4096, 4, 64}, {false, 0, 0, 4, 0, 0}, {false, 0, 4, 90, 4100, 0}}, cores);
    EXPECT_GE(static_cast<int>(items.size()) * s.n_kv_heads, 8 * cores) << cores;
    int position = 4, packed = 0;
    for (const Item& item : items) {
      if (!item.packed) continue;
      EXPECT_EQ(item.position, position);
      EXPECT_EQ(item.first, packed / 64);
      position += item.count;
      packed += item.count;
    }
    EXPECT_EQ(packed, 4096);
  }
}

}  // namespace
}  // namespace veloxquant::attention
