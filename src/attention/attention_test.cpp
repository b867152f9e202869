// Every path and SIMD level against the fp64 oracle, over shapes, masks, forms and dtypes.
#include "veloxquant/attention.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "src/attention/attention_fixture.h"
#include "src/attention/cpu_kernels.h"

namespace veloxquant::attention {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

using Attention = AttentionTest;

TEST_F(Attention, Lengths) {
  for (int64_t length : {0, 1, 3, 63, 64, 65, 127, 128, 200, 261, 517}) {
    for (int64_t n_queries : {1, 2, 5, 70}) {
      SCOPED_TRACE(testing::Message() << length << " tokens, " << n_queries << " queries");
      Case c;
      c.length = length;
      c.n_queries = n_queries;
      check(c);
    }
  }
}

TEST_F(Attention, LongContextIsSplit) {
  Case c;
  c.length = 8191;
  c.n_kv_heads = 1;
  c.group = 3;
  c.n_queries = 1;
  c.head_dim = 128;
  check(c);
  c.n_queries = 40;  // two tiles of rows, not split
  check(c);
}

TEST_F(Attention, GroupsBatchesAndHeadDims) {
  for (int group : {1, 3, 4, 8}) {
    for (int batch : {1, 3}) {
      for (int head_dim : {64, 128}) {
        SCOPED_TRACE(testing::Message() << group << " " << batch << " " << head_dim);
        Case c;
        c.group = group;
        c.batch = batch;
        c.head_dim = head_dim;
        check(c);
      }
    }
  }
  for (int head_dim : {8, 24, 80, 96, 120, 256}) {
    SCOPED_TRACE(head_dim);
    Case c;
    c.head_dim = head_dim;
    c.n_queries = 7;
    check(c);
  }
}

TEST_F(Attention, Masks) {
  for (int64_t n_queries : {1, 5, 70, 150}) {
    for (int kind = 0; kind < 9; ++kind) {
      SCOPED_TRACE(testing::Message() << "kind " << kind << ", " << n_queries << " queries");
      Case c;
      c.n_queries = n_queries;
      c.length = 333;
      c.causal = kind != 0;
      if (kind == 1) c.sliding_window = 1;
      if (kind == 2) c.sliding_window = 100;
      if (kind == 3 || kind == 4) c.mask = MaskKind::boolean;
      if (kind == 5 || kind == 6) c.mask = MaskKind::additive;
      c.mask_broadcast = kind == 4 || kind == 6;
      if (kind == 7) c.softcap = 3;
      if (kind == 8) c.sink_logits = true;
      check(c);
    }
  }
}

TEST_F(Attention, EverythingAtOnce) {
  Case c;
  c.batch = 2;
  c.group = 3;
  c.length = 700;
  c.n_queries = 150;
  c.n_new_blocks = 2;
  c.cut = 17;
  c.strict = true;
  c.sliding_window = 300;
  c.mask = MaskKind::additive;
  c.softcap = 20;
  c.sink_logits = true;
  check(c);
}

TEST_F(Attention, NewBlocksInBothForms) {
  for (bool strict : {false, true}) {
    for (int window : {0, 1, 64, 100}) {
      for (int64_t n_queries : {1, 70, 200}) {
        SCOPED_TRACE(testing::Message() << strict << " " << window << " " << n_queries);
        Case c;
        c.strict = strict;
        c.window = window;
        c.n_queries = n_queries;
        c.length = 450;
        c.n_new_blocks = 3;
        check(c);
      }
    }
  }
}

// The first append of a prompt: its exact run starts below tail_start, with the sinks.
TEST_F(Attention, PromptHoldsTheSinks) {
  for (bool strict : {false, true}) {
    Case c;
    c.whole_prompt = true;
    c.strict = strict;
    c.length = c.n_queries = 301;
    c.n_new_blocks = 100;
    check(c);
  }
}

TEST_F(Attention, PartialBlockInTheMiddle) {
  for (int cut : {1, 31, 63}) {
    Case c;
    c.cut = cut;
    c.length = 600;
    c.n_queries = 33;
    c.n_new_blocks = 1;
    check(c);
  }
}

TEST_F(Attention, Dtypes) {
  for (DType q : {DType::float32, DType::float16, DType::bfloat16}) {
    for (DType exact : {DType::float32, DType::float16, DType::bfloat16}) {
      for (DType chunk : {DType::float32, DType::float16, DType::bfloat16}) {
        SCOPED_TRACE(testing::Message()
                     << dtype_name(q) << " " << dtype_name(exact) << " " << dtype_name(chunk));
        Case c;
        c.q_dtype = c.out_dtype = q;
        c.exact_dtype = exact;
        c.chunk_dtype = chunk;
        c.n_queries = 9;
        check(c);
      }
    }
  }
}

TEST_F(Attention, ExactOnly) {
  Case c;
  c.exact_only = true;
  c.length = 300;
  c.n_queries = 300;
  check(c);
}

TEST_F(Attention, QueriesAnywhere) {
  for (int64_t first : {0, 3, 100, 190, 5000}) {
    Case c;
    c.first_query_position = first;
    c.n_queries = 10;
    check(c);
  }
}

TEST_F(Attention, HugeLogits) {
  Case c;
  c.key_size = 300;  // logits of some thousands: rounding of fp32 scores shows
  c.scale = 1;
  c.n_queries = 20;
  check(c, 2e-3);
}

TEST_F(Attention, RowsThatSeeNothing) {
  Case c;
  c.length = 150;
  c.n_queries = 3;
  c.mask = MaskKind::boolean;
  for (bool sinks : {false, true}) {
    c.sink_logits = sinks;
    Scenario p(c);
    std::fill(p.mask_bytes.begin(), p.mask_bytes.end(), 0);
    for (Backend backend : {Backend::reference, Backend::cpu}) {
      Result got = run(p, backend);
      for (int h = 0; h < 4; ++h) {
        for (int64_t i = 0; i < c.n_queries; ++i) {
          for (int d = 0; d < c.head_dim; ++d) {
            EXPECT_EQ(load_element(got.out.view.at(0, h, i), DType::float32, d), 0.0f);
          }
          float want = sinks ? p.sink_logits[h] : -kInfinity;
          EXPECT_FLOAT_EQ(got.lse[h * c.n_queries + i], want);
        }
      }
    }
  }
}

TEST_F(Attention, SameBitsEveryRunAndThreadCount) {
  for (int64_t n_queries : {1, 130}) {
    Case c;
    c.length = 5000;
    c.n_queries = n_queries;
    c.batch = 2;
    Scenario p(c);
    set_num_threads(1);
    Result first = run(p, Backend::cpu);
    for (int threads : {1, 2}) {
      set_num_threads(threads);
      Result again = run(p, Backend::cpu);
      EXPECT_EQ(again.out.bytes, first.out.bytes);
      EXPECT_EQ(std::memcmp(again.lse.data(), first.lse.data(), first.lse.size() * 4), 0);
    }
  }
}

// What shards and cascades rely on: two parts of the tokens, merged by their log-sum-exp.
TEST_F(Attention, PartsMergeByLogSumExp) {
  Case c;
  c.length = 900;
  c.n_queries = 6;
  c.sink_logits = true;
  c.causal = false;
  Scenario p(c);
  Result want = oracle(p);
  auto packed = p.source.packed;
  auto exact = p.source.exact;
  p.source.packed.clear();  // sinks and tail, with the sink logits
  Result tail = run(p, Backend::cpu);
  p.source.packed = packed;
  p.source.exact.clear();  // the history, without them
  p.params.sink_logits = {};
  Result history = run(p, Backend::cpu);

  Result merged(c, DType::float32);
  for (int h = 0; h < 4; ++h) {
    for (int64_t i = 0; i < c.n_queries; ++i) {
      int64_t row = h * c.n_queries + i;
      double a = std::exp(tail.lse[row] - want.lse[row]);
      double b = std::exp(history.lse[row] - want.lse[row]);
      merged.lse[row] = static_cast<float>(want.lse[row] + std::log(a + b));
      for (int d = 0; d < c.head_dim; ++d) {
        double x = a * load_element(tail.out.view.at(0, h, i), DType::float32, d) +
                   b * load_element(history.out.view.at(0, h, i), DType::float32, d);
        store_element(merged.out.view.at(0, h, i), DType::float32, d,
                      static_cast<float>(x / (a + b)));
      }
    }
  }
  expect_close(merged, want, 1e-5);
}

TEST_F(Attention, RandomProblems) {
  EXPECT_TRUE(rc::check("fast path agrees with the oracle", [&] {
    Case c;
    c.batch = *rc::gen::inRange(1, 3);
    c.n_kv_heads = *rc::gen::inRange(1, 4);
    c.group = *rc::gen::inRange(1, 6);
    c.head_dim = 8 * *rc::gen::inRange(1, 14);
    c.length = *rc::gen::inRange<int64_t>(1, 600);
    c.n_queries = *rc::gen::inRange<int64_t>(1, 120);
    c.sinks = *rc::gen::inRange(0, 70);
    c.window = *rc::gen::inRange(0, 130);
    c.n_new_blocks = *rc::gen::inRange(0, 5);
    c.cut = *rc::gen::inRange(0, 64);
    c.strict = *rc::gen::arbitrary<bool>();
    c.causal = *rc::gen::arbitrary<bool>();
    c.sliding_window = *rc::gen::inRange<int64_t>(0, 200);
    c.mask = *rc::gen::element(MaskKind::none, MaskKind::boolean, MaskKind::additive);
    c.sink_logits = *rc::gen::arbitrary<bool>();
    Scenario p(c);
    RC_ASSERT(worst_error(run(p, Backend::cpu), oracle(p)) <= 1e-5);
  }));
}

// Vector rounding against the scalar rule, over all kinds of numbers.
TEST_F(Attention, ExactTokensAreRoundedAsKept) {
  std::mt19937 random(3);
  std::vector<float> x(64 * 24);
  for (float& value : x) {
    uint32_t bits = random();
    if (random() % 2) bits = (bits & 0x87ffffffu) | 0x30000000u;  // about the edges of fp16
    std::memcpy(&value, &bits, 4);
  }
  x[0] = kNaN, x[1] = kInfinity, x[2] = -kInfinity, x[3] = 65519.99f, x[4] = 65520, x[5] = 3e38f;
  x[6] = -0.0f, x[7] = 2.98023224e-8f, x[8] = 2.98023259e-8f, x[9] = 6.1020e-5f;
  for (const std::string& level : simd_levels()) {
    set_simd_level(level);
    for (DType keep : {DType::float32, DType::float16, DType::bfloat16}) {
      std::vector<float> rows(x.size());
      load_exact_rows(x.data(), DType::float32, 24, keep, 64, 24, rows.data(), 24);
      for (size_t i = 0; i < x.size(); ++i) {
        ASSERT_EQ(rows[i], as_kept(x[i], keep)) << level << " " << dtype_name(keep) << " " << x[i];
      }
    }
  }
}

TEST_F(Attention, RefusesWhatDoesNotFit) {
  auto error_of = [](const Scenario& p) -> std::string {
    try {
      run(p, Backend::cpu);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  using testing::HasSubstr;
  Scenario heads((Case()));
  heads.q = Tensor(DType::float32, 1, 5, 2, 64, 0);
  EXPECT_THAT(error_of(heads), HasSubstr("q heads: got 5, wanted a multiple of the 2"));
  Scenario dims((Case()));
  dims.q = Tensor(DType::float32, 1, 4, 2, 72, 0);
  EXPECT_THAT(error_of(dims), HasSubstr("head_dim: got 64, wanted that of q, 72"));
  Scenario odd((Case()));
  odd.q = Tensor(DType::float32, 1, 4, 2, 60, 0);
  EXPECT_THAT(error_of(odd), HasSubstr("head_dim: got 60, wanted a multiple of 8"));
  Scenario dtype((Case()));
  dtype.q.view.dtype = DType::int32;
  EXPECT_THAT(error_of(dtype), HasSubstr("q dtype: got int32"));
  Scenario codec((Case()));
  codec.source.value_codec = codec.source.key_codec;
  EXPECT_THAT(error_of(codec), HasSubstr("value_codec: got a codec of the other side"));
  Scenario length((Case()));
  length.source.length = 190;
  EXPECT_THAT(error_of(length), HasSubstr("exact run: got tokens"));
  Case masked;
  masked.mask = MaskKind::boolean;
  Scenario mask(masked);
  mask.params.mask.array.shape[3] = 7;
  EXPECT_THAT(error_of(mask), HasSubstr("mask.array shape: got [1, 4, 2, 7], wanted one that"));
}

TEST_F(Attention, NamesItsKernel) {
  Scenario p((Case()));
  EXPECT_EQ(attention_kernel_name(Backend::cpu, p.source),
            "cpu/" + simd_level() + " tiles (test8: few blocks)");
  EXPECT_EQ(attention_kernel_name(Backend::reference, p.source), "reference loops (test8)");
}

}  // namespace
}  // namespace veloxquant::attention
