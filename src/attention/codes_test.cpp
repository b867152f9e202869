// Attention on codes: every codec that has kernels for it, on every SIMD level, against the fp64
// oracle; and that attention says which kernel ran.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "src/attention/attention_fixture.h"
#include "src/codecs/lookup/plane_codes.h"
#include "src/math/float16.h"
#include "veloxquant/codec_spec.h"
#include "veloxquant/vecinfer.h"

namespace veloxquant::attention {
namespace {

using testing::HasSubstr;

struct Format {
  int sub_dim, n_centroids;
  bool shared_table = false;   // one for all sub-vectors of a head
  bool own_sequences = false;  // one for each row of the batch
};

std::string text_of(const Format& f) {
  return "d" + std::to_string(f.sub_dim) + "x" + std::to_string(f.n_centroids) +
         (f.shared_table ? " shared" : "") + (f.own_sequences ? " per sequence" : "");
}

// Codes of 8, 6 and 4 bits, the last in pairs or (three sub-vectors of 16) one by one; tables that
// are not full.
constexpr Format kFormats[] = {{4, 256},
                               {2, 256},
                               {8, 256},
                               {1, 256},
                               {2, 100},
                               {4, 256, true},
                               {4, 256, false, true},
                               {16, 130, true, true},
                               {4, 64},
                               {1, 33},
                               {2, 16},
                               {1, 16},
                               {4, 13},
                               {2, 16, true}};

// VecInfer codecs with random tables, and what the tables live in.
struct Codecs {
  std::vector<std::vector<uint16_t>> tables;
  CodecPtr keys, values;

  Codecs(const Case& c, const Format& f) : Codecs(c, f, f) {}
  Codecs(const Case& c, const Format& keys_as, const Format& values_as) {
    keys = make(Side::keys, c, keys_as, 11);
    values = make(Side::values, c, values_as, 12);
  }
  Scenario scenario(const Case& c) const { return Scenario(c, keys, values); }

 private:
  CodecPtr make(Side side, const Case& c, const Format& f, int seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const int64_t sequences = f.own_sequences ? c.batch : 1;
    const int64_t n_tables = f.shared_table ? 1 : c.head_dim / f.sub_dim;
    tables.emplace_back(sequences * c.n_kv_heads * n_tables * f.n_centroids * f.sub_dim);
    for (uint16_t& x : tables.back()) x = f32_to_f16(normal(random));
    const TensorView view(tables.back().data(), DType::float16,
                          {sequences, c.n_kv_heads, n_tables, f.n_centroids, f.sub_dim});
    Transform transform;
    transform.kind = TransformKind::hadamard;
    return make_vecinfer_codec(side, c.n_kv_heads, c.head_dim, c.head_dim / f.sub_dim, view,
                               transform);
  }
};

Case decode_case() {
  Case c;
  c.n_queries = 1;
  c.length = 64 * 11 + 40;
  return c;
}

class AttentionOnCodes : public AttentionTest {
 protected:
  void SetUp() override {
    AttentionTest::SetUp();
    lookup::set_plane_use(lookup::PlaneUse::never);
  }
  void TearDown() override {
    lookup::set_plane_use(lookup::PlaneUse::fast);
    AttentionTest::TearDown();
  }
  void check_on_codes(const Case& c, const Codecs& codecs) {
    const Scenario p = codecs.scenario(c);
    ASSERT_THAT(attention_kernel_name(Backend::cpu, p.source, c.n_queries * c.group),
                HasSubstr(" codes ("));
    check_both(p);
  }
  // In fp32, and by 16-bit look-ups in registers wherever there is such a kernel (codec.h: 1e-3).
  void check_both(const Scenario& p) {
    lookup::set_plane_use(lookup::PlaneUse::never);
    check(p);
    lookup::set_plane_use(lookup::PlaneUse::always);
    check(p, 1e-3, 1e-4);
    lookup::set_plane_use(lookup::PlaneUse::never);
  }
};

TEST_F(AttentionOnCodes, EveryFormat) {
  for (const Format& format : kFormats) {
    for (int64_t n_queries : {1, 3}) {
      SCOPED_TRACE(text_of(format) + ", queries " + std::to_string(n_queries));
      Case c = decode_case();
      c.batch = format.own_sequences ? 2 : 1;
      c.n_queries = n_queries;
      check_on_codes(c, Codecs(c, format));
    }
  }
}

TEST_F(AttentionOnCodes, OddNumberOfFourBitCodes) {
  Case c = decode_case();
  c.head_dim = 24;
  check_on_codes(c, Codecs(c, {8, 16}));
}

// Codecs of single dimensions: bits in planes, a factor for each token.
TEST_F(AttentionOnCodes, ScalarCodecs) {
  struct Method {
    const char* name;
    std::map<std::string, CodecOption> options;
  };
  const Method methods[] = {{"rabitq", {{"bits", int64_t{1}}}},
                            {"rabitq", {{"bits", int64_t{2}}}},
                            {"rabitq", {{"bits", int64_t{3}}}},
                            {"rabitq", {{"bits", int64_t{4}}}},
                            {"turboquant", {{"bits", int64_t{1}}}},
                            {"turboquant", {{"bits", int64_t{2}}}},
                            {"turboquant", {{"bits", int64_t{3}}}},
                            {"turboquant", {{"bits", int64_t{4}}}},
                            {"turboquant", {{"bits", int64_t{1}}, {"prod", int64_t{1}}}},
                            {"turboquant", {{"bits", int64_t{3}}, {"prod", int64_t{1}}}},
                            {"turboquant_rvq", {{"bits", int64_t{1}}}},
                            {"turboquant_rvq", {{"bits", int64_t{3}}}},
                            {"qjl", {{"sketch_bits", int64_t{64}}}}};
  for (const Method& method : methods) {
    for (int64_t n_queries : {1, 4}) {
      Case c = decode_case();
      c.n_queries = n_queries;
      c.cut = 40;
      const bool keys_only = std::string(method.name) == "qjl";
      const CodecPtr keys =
          make_codec({method.name, Side::keys, c.n_kv_heads, c.head_dim, method.options}, {});
      const Codecs vecinfer(c, {4, 256});
      const CodecPtr values =
          keys_only
              ? vecinfer.values
              : make_codec({method.name, Side::values, c.n_kv_heads, c.head_dim, method.options},
                           {});
      SCOPED_TRACE(keys->name());
      const Scenario p(c, keys, values);
      ASSERT_THAT(attention_kernel_name(Backend::cpu, p.source), HasSubstr("byte look-ups)"));
      check_both(p);
    }
  }
}

// More than 256 centroids: no form in bytes, tiles are decoded and the name says so.
TEST_F(AttentionOnCodes, TwelveBitCodesAreDecoded) {
  Case c = decode_case();
  const Codecs codecs(c, {4, 1024});
  const Scenario p = codecs.scenario(c);
  EXPECT_THAT(attention_kernel_name(Backend::cpu, p.source), HasSubstr("no kernel on these codes"));
  check(p);
}

// Panels of 4 and 8 query rows, with and without rows to spare.
TEST_F(AttentionOnCodes, QueryRows) {
  for (int group : {1, 3, 4, 5, 8}) {
    for (int64_t n_queries : {1, 2, 7}) {
      SCOPED_TRACE(testing::Message() << group << " heads a group, " << n_queries << " queries");
      Case c = decode_case();
      c.group = group;
      c.n_queries = n_queries;
      check_on_codes(c, Codecs(c, {4, 256}));
      check_on_codes(c, Codecs(c, {2, 256}));
    }
  }
  Case c = decode_case();
  c.group = 4;
  c.n_queries = 16;
  check_on_codes(c, Codecs(c, {4, 256}));
  check_on_codes(c, Codecs(c, {1, 16}));
}

TEST_F(AttentionOnCodes, HeadDims) {
  for (int head_dim : {8, 24, 80, 96, 128, 256}) {
    SCOPED_TRACE(head_dim);
    Case c = decode_case();
    c.head_dim = head_dim;
    check_on_codes(c, Codecs(c, {4, 256}));
    check_on_codes(c, Codecs(c, {2, 256}));
  }
}

// From the shortest history that goes this way to several segments with a remainder.
TEST_F(AttentionOnCodes, Lengths) {
  for (int64_t blocks : {8, 9, 16, 17, 31, 70}) {
    SCOPED_TRACE(blocks);
    Case c = decode_case();
    c.n_kv_heads = 1;
    c.length = 64 * (blocks + 1) + 21;
    check_on_codes(c, Codecs(c, {4, 256}));
  }
}

TEST_F(AttentionOnCodes, Masks) {
  for (int64_t n_queries : {1, 5}) {
    for (int kind = 0; kind < 9; ++kind) {
      SCOPED_TRACE(testing::Message() << "kind " << kind << ", " << n_queries << " queries");
      Case c = decode_case();
      c.n_queries = n_queries;
      c.causal = kind != 0;
      if (kind == 1) c.sliding_window = 1;
      if (kind == 2) c.sliding_window = 300;
      if (kind == 3 || kind == 4) c.mask = MaskKind::boolean;
      if (kind == 5 || kind == 6) c.mask = MaskKind::additive;
      c.mask_broadcast = kind == 4 || kind == 6;
      if (kind == 7) c.softcap = 3;
      if (kind == 8) c.sink_logits = true;
      check_on_codes(c, Codecs(c, {4, 256}));
    }
  }
}

// Blocks that rows see as codes or exact, trimmed blocks in the middle, queries anywhere.
TEST_F(AttentionOnCodes, VisibilityAndTrimmedBlocks) {
  for (bool strict : {false, true}) {
    for (int cut : {0, 1, 31, 63}) {
      for (int64_t first : {int64_t{-1}, int64_t{200}}) {
        SCOPED_TRACE(testing::Message() << strict << " " << cut << " " << first);
        Case c = decode_case();
        c.batch = 2;
        c.n_queries = 9;
        c.n_new_blocks = 3;
        c.window = 1;
        c.strict = strict;
        c.cut = cut;
        c.first_query_position = first;
        check_on_codes(c, Codecs(c, {4, 256}));
      }
    }
  }
}

// Whatever a block holds beyond its last token must not matter.
TEST_F(AttentionOnCodes, TokensTrimmedAwayDoNotCount) {
  Case c = decode_case();
  c.cut = 20;
  const Codecs codecs(c, {4, 256});
  Scenario p = codecs.scenario(c);
  const Result before = run(p, Backend::cpu);
  for (size_t run = 0; run < p.source.packed.size(); ++run) {
    const PackedRun& packed = p.source.packed[run];
    for (int side = 0; side < 2; ++side) {
      std::vector<uint8_t>& bytes = p.blocks[2 * run + side];
      for (size_t row = 0; row < bytes.size() / 64; ++row) {
        const size_t block = row / (c.head_dim / 4);
        if (static_cast<int>(block % packed.n_blocks) != packed.n_blocks - 1) continue;
        for (int t = packed.last_count; t < 64; ++t) bytes[row * 64 + t] ^= 0xa5;
      }
    }
  }
  EXPECT_EQ(run(p, Backend::cpu).out.bytes, before.out.bytes);
}

TEST_F(AttentionOnCodes, OneSideOnCodesTheOtherDecoded) {
  Case c = decode_case();
  c.n_queries = 2;
  const Codecs codecs(c, {4, 256});
  const auto test_keys = std::make_shared<TestCodec>(Side::keys, c.n_kv_heads, c.head_dim);
  const auto test_values = std::make_shared<TestCodec>(Side::values, c.n_kv_heads, c.head_dim);
  const Scenario keys(c, codecs.keys, test_values), values(c, test_keys, codecs.values);
  EXPECT_THAT(attention_kernel_name(Backend::cpu, keys.source),
              HasSubstr("byte look-ups keys, decoded values"));
  EXPECT_THAT(attention_kernel_name(Backend::cpu, values.source),
              HasSubstr("decoded keys, byte look-ups values"));
  check_both(keys);
  check_both(values);
}

TEST_F(AttentionOnCodes, HugeLogits) {
  Case c = decode_case();
  c.key_size = 300;  // logits of some thousands: rounding of fp32 scores shows
  c.scale = 1;
  const Codecs codecs(c, {4, 256});
  check(codecs.scenario(c), 2e-3);
  lookup::set_plane_use(lookup::PlaneUse::always);  // of values: such queries take keys in fp32
  check(codecs.scenario(c), 2e-3);
  check(Codecs(c, {1, 16}).scenario(c), 2e-3);
}

TEST_F(AttentionOnCodes, AQueryThatIsNotFiniteGivesARowOfNaNAndTouchesNoOther) {
  Case c = decode_case();
  c.n_queries = 2;
  const Codecs codecs(c, {4, 256});
  const Scenario clean = codecs.scenario(c);
  const Result want = oracle(clean);
  for (float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                    -std::numeric_limits<float>::infinity()}) {
    Scenario p = codecs.scenario(c);
    store_element(p.q.view.at(0, 1, 0), p.q.view.dtype, 5, bad);
    for (auto use : {lookup::PlaneUse::never, lookup::PlaneUse::always}) {
      lookup::set_plane_use(use);
      for (Backend backend : {Backend::reference, Backend::cpu}) {
        Result got = run(p, backend);
        EXPECT_TRUE(std::isnan(got.lse[1 * c.n_queries]));
        for (int d = 0; d < c.head_dim; ++d) {
          EXPECT_TRUE(std::isnan(load_element(got.out.view.at(0, 1, 0), DType::float32, d)));
          store_element(got.out.view.at(0, 1, 0), DType::float32, d,
                        load_element(want.out.view.at(0, 1, 0), DType::float32, d));
        }
        EXPECT_LE(worst_error(got, want), 1e-3);
      }
    }
  }
}

TEST_F(AttentionOnCodes, SameBitsEveryRunAndThreadCount) {
  Case c = decode_case();
  c.length = 6000;
  const Codecs codecs(c, {4, 256});
  const Scenario p = codecs.scenario(c);
  set_num_threads(1);
  const Result first = run(p, Backend::cpu);
  for (int threads : {1, 2, 3}) {
    set_num_threads(threads);
    const Result again = run(p, Backend::cpu);
    EXPECT_EQ(again.out.bytes, first.out.bytes);
    EXPECT_EQ(std::memcmp(again.lse.data(), first.lse.data(), first.lse.size() * 4), 0);
  }
}

TEST_F(AttentionOnCodes, FormsOfTablesAreKeptAndCounted) {
  const Case c = decode_case();
  const Codecs codecs(c, {4, 256});
  const Scenario p = codecs.scenario(c);
  run(p, Backend::cpu);
  EXPECT_EQ(codecs.keys->kept_bytes() + codecs.values->kept_bytes(), 0);
  lookup::set_plane_use(lookup::PlaneUse::always);
  for (int i = 0; i < 2; ++i) {
    run(p, Backend::cpu);
    const int64_t dims = int64_t{c.n_kv_heads} * c.head_dim;
    EXPECT_EQ(codecs.keys->kept_bytes(), dims * 256 * 2);          // fp16 columns
    EXPECT_EQ(codecs.values->kept_bytes(), dims * (256 * 2 + 4));  // two planes and a step
  }
}

TEST_F(AttentionOnCodes, SaysWhichKernelRunsAndWhyNotAFasterOne) {
  const std::string level = "cpu/" + simd_level();
  Case c = decode_case();
  const Codecs codecs(c, {4, 256});
  const Scenario p = codecs.scenario(c);
  auto name = [](const Scenario& s, int64_t rows) {
    return attention_kernel_name(Backend::cpu, s.source, rows);
  };
  EXPECT_EQ(name(p, 4), level + " codes (vecinfer d4x256: byte look-ups)");
  lookup::set_plane_use(lookup::PlaneUse::always);
  EXPECT_EQ(name(p, 4), level + " codes (vecinfer d4x256: register look-ups)");
  EXPECT_EQ(name(p, 65), level + " tiles (vecinfer d4x256: many query rows share a decoded tile)");
  EXPECT_EQ(name(Scenario(c), 4), level + " tiles (test8: no kernel on these codes)");
  c.length = 300;
  EXPECT_EQ(name(codecs.scenario(c), 4), level + " tiles (vecinfer d4x256: few blocks)");
  EXPECT_EQ(attention_kernel_name(Backend::reference, p.source),
            "reference loops (vecinfer d4x256)");
}

}  // namespace
}  // namespace veloxquant::attention
