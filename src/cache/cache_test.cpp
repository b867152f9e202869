// The cache against a simple model of it: a list of tokens and the rule of which are sealed.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "src/math/float16.h"
#include "tests/support/random.h"
#include "veloxquant/cache.h"
#include "veloxquant/exact.h"

namespace veloxquant {
namespace {

using test::OwnedCodec;
using test::Random;
using test::random_codec;

constexpr int kBatch = 2, kHeads = 3, kDim = 16;

struct Fixture {
  OwnedCodec keys, values;
  KvCacheConfig config;

  Fixture(int window, int sinks, uint64_t seed = 3) {
    Random random(seed);
    keys = random_codec(random, Side::keys, kHeads, kDim, 4, 256, false, TransformKind::hadamard);
    values = random_codec(random, Side::values, kHeads, kDim, 8, 16, true, TransformKind::none);
    config.batch = kBatch;
    config.n_kv_heads = kHeads;
    config.head_dim = kDim;
    config.window = window;
    config.sinks = sinks;
    config.key_codec = keys.codec;
    config.value_codec = values.codec;
  }
};

// Tokens as the model of the cache keeps them: [position][b][h][d] of keys and values.
struct Tokens {
  std::vector<std::vector<float>> keys, values;

  void push(Random& random) {
    keys.push_back(random.normal(kBatch * kHeads * kDim));
    values.push_back(random.normal(kBatch * kHeads * kDim));
  }
  // [B, H, n, D] of tokens [first, first + n)
  static std::vector<float> chunk(const std::vector<std::vector<float>>& side, int64_t first,
                                  int64_t n) {
    std::vector<float> out;
    for (int line = 0; line < kBatch * kHeads; ++line) {
      for (int64_t t = first; t < first + n; ++t) {
        out.insert(out.end(), side[t].begin() + line * kDim, side[t].begin() + (line + 1) * kDim);
      }
    }
    return out;
  }
};

void append(KvCache& cache, const Tokens& tokens, int64_t first, int64_t n) {
  std::vector<float> k = Tokens::chunk(tokens.keys, first, n);
  std::vector<float> v = Tokens::chunk(tokens.values, first, n);
  cache.append(TensorView(k.data(), DType::float32, {kBatch, kHeads, n, kDim}),
               TensorView(v.data(), DType::float32, {kBatch, kHeads, n, kDim}));
}

// Everything a cache holds, per line and by position, however the spans are cut.
std::vector<uint16_t> contents(const KvCache& cache, const Fixture& fixture) {
  std::vector<uint16_t> all;
  const KeyValueSource source = cache.source();
  for (int b = 0; b < kBatch; ++b) {
    for (int h = 0; h < kHeads; ++h) {
      for (int side = 0; side < 2; ++side) {
        for (const PackedRun& run : source.packed) {
          const Codec& codec = side == 0 ? *fixture.keys.codec : *fixture.values.codec;
          const uint8_t* base =
              side == 0 ? run.keys + b * run.key_batch_stride + h * run.key_head_stride
                        : run.values + b * run.value_batch_stride + h * run.value_head_stride;
          for (int i = 0; i < run.n_blocks; ++i) {
            const int n = i + 1 < run.n_blocks ? kBlockTokens : run.last_count;
            std::vector<uint8_t> codes(n * codec.token_bytes());
            codec.unpack_tokens(base + i * codec.block_bytes(), n, codes.data());
            all.insert(all.end(), codes.begin(), codes.end());
          }
        }
      }
      for (const ExactRun& run : source.exact) {
        all.push_back(static_cast<uint16_t>(run.start));
        for (int64_t t = 0; t < run.keys.shape[2]; ++t) {
          for (const TensorView& view : {run.keys, run.values}) {
            const auto* bits = static_cast<const uint16_t*>(view.at(b, h, t));
            all.insert(all.end(), bits, bits + kDim);
          }
        }
      }
    }
  }
  return all;
}

TEST(Cache, AnyChunkingGivesTheSameBytes) {
  for (auto [window, sinks] : {std::pair{64, 4}, {0, 0}, {1, 7}, {100, 64}}) {
    Fixture fixture(window, sinks);
    Random random(5);
    Tokens tokens;
    for (int i = 0; i < 700; ++i) tokens.push(random);
    KvCache whole(fixture.config);
    append(whole, tokens, 0, 700);
    const auto expected = contents(whole, fixture);
    for (int trial = 0; trial < 6; ++trial) {
      KvCache cache(fixture.config);
      for (int64_t done = 0; done < 700;) {
        int64_t n = trial == 0 ? 1 : std::min<int64_t>(700 - done, 1 + random.next() % 150);
        append(cache, tokens, done, n);
        done += n;
      }
      EXPECT_EQ(cache.geometry().tail_start, whole.geometry().tail_start);
      EXPECT_EQ(cache.nbytes(), whole.nbytes());
      EXPECT_EQ(contents(cache, fixture), expected);
    }
  }
}

TEST(Cache, WhatIsExactFollowsTheRule) {
  Fixture fixture(64, 4);
  Random random(6);
  Tokens tokens;
  KvCache cache(fixture.config);
  for (int64_t length = 1; length <= 300; ++length) {
    tokens.push(random);
    append(cache, tokens, length - 1, 1);
    const CacheGeometry& g = cache.geometry();
    const int64_t sealed = length >= 4 + 64 + 64 ? (length - 4 - 64) / 64 : 0;
    ASSERT_EQ(g.tail_start, 4 + 64 * sealed) << length;
    if (sealed > 0) {
      ASSERT_GE(g.tail_count(), 64);
      ASSERT_LE(g.tail_count(), 127);
    }
  }
}

// Every block must hold the codes of its own tokens, every exact slot the rounded token itself.
void expect_holds(const KvCache& cache, const Fixture& fixture, const Tokens& tokens) {
  const KeyValueSource source = cache.source();
  int64_t covered = 0;
  for (const PackedRun& run : source.packed) {
    covered += run.end() - run.start;
    for (int b = 0; b < kBatch; ++b) {
      for (int h = 0; h < kHeads; ++h) {
        for (int i = 0; i < run.n_blocks; ++i) {
          const int n = i + 1 < run.n_blocks ? kBlockTokens : run.last_count;
          const int64_t start = run.start + int64_t{kBlockTokens} * i;
          std::vector<float> x;
          for (int t = 0; t < n; ++t) {
            for (int d = 0; d < kDim; ++d) {
              x.push_back(
                  f16_to_f32(f32_to_f16(tokens.keys[start + t][(b * kHeads + h) * kDim + d])));
            }
          }
          const Codec& codec = *fixture.keys.codec;
          std::vector<uint8_t> block(codec.block_bytes());
          codec.encode_block(Backend::cpu, {b, h, start}, x.data(), n, block.data());
          std::vector<uint8_t> expected(n * codec.token_bytes()), got(expected.size());
          codec.unpack_tokens(block.data(), n, expected.data());
          codec.unpack_tokens(run.keys + b * run.key_batch_stride + h * run.key_head_stride +
                                  i * codec.block_bytes(),
                              n, got.data());
          ASSERT_EQ(got, expected) << "block at " << start;
        }
      }
    }
  }
  for (const ExactRun& run : source.exact) {
    covered += run.keys.shape[2];
    for (int64_t t = 0; t < run.keys.shape[2]; ++t) {
      for (int d = 0; d < kDim; ++d) {
        ASSERT_EQ(*static_cast<const uint16_t*>(run.values.at(1, 2, t, d)),
                  f32_to_f16(tokens.values[run.start + t][(kHeads + 2) * kDim + d]));
      }
    }
  }
  ASSERT_EQ(covered, cache.length());
}

TEST(Cache, RandomAppendsAndTrimsKeepEveryToken) {
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    Random random(seed);
    Fixture fixture(static_cast<int>(random.next() % 3) * 40, static_cast<int>(random.next() % 9));
    KvCache cache(fixture.config);
    Tokens tokens;
    for (int step = 0; step < 25; ++step) {
      if (random.next() % 3 == 0) {
        const int64_t wanted = static_cast<int64_t>(random.next() % 200);
        const int64_t forgotten = cache.trim(wanted);
        ASSERT_EQ(forgotten, std::min<int64_t>(wanted, tokens.keys.size()));
        tokens.keys.resize(tokens.keys.size() - forgotten);
        tokens.values.resize(tokens.values.size() - forgotten);
      } else {
        const int64_t n = static_cast<int64_t>(random.next() % 180), first = cache.length();
        for (int64_t i = 0; i < n; ++i) tokens.push(random);
        append(cache, tokens, first, n);
      }
      ASSERT_EQ(cache.length(), static_cast<int64_t>(tokens.keys.size())) << "seed " << seed;
      expect_holds(cache, fixture, tokens);
      if (HasFatalFailure()) FAIL() << "seed " << seed << " step " << step;
    }
  }
}

TEST(Cache, NonfiniteInputIsReplacedAndCounted) {
  Fixture fixture(0, 0);
  KvCache cache(fixture.config);
  std::vector<float> k(kBatch * kHeads * 70 * kDim, 0.5f), v = k;
  k[3] = std::nanf("");
  k[4] = std::numeric_limits<float>::infinity();
  v[5] = -1e30f;
  cache.append(TensorView(k.data(), DType::float32, {kBatch, kHeads, 70, kDim}),
               TensorView(v.data(), DType::float32, {kBatch, kHeads, 70, kDim}));
  EXPECT_EQ(cache.nonfinite(), 3);
}

TEST(Cache, BytesAreWhatItHolds) {
  Fixture fixture(64, 4);
  KvCache cache(fixture.config);
  Random random(9);
  Tokens tokens;
  for (int i = 0; i < 2000; ++i) tokens.push(random);
  append(cache, tokens, 0, 2000);
  const int64_t blocks = (2000 - 4 - 64) / 64, lines = kBatch * kHeads;
  // keys: 4 bytes a token (d4 x 256), values: 8 codes of 4 bits = 4 bytes a token
  EXPECT_EQ(cache.nbytes(), lines * (blocks * 64 * (4 + 4) + 2 * 2 * (4 + 64 + 64) * kDim));
}

TEST(Cache, SealsOnlyIntoOtherStorage) {
  Fixture fixture(64, 4);
  CacheGeometry geometry;
  geometry.window = 64;
  geometry.sinks = 4;
  geometry.tail_start = 4;
  const int64_t n = 132;  // seals 64
  std::vector<float> tokens(kBatch * kHeads * n * kDim, 1.0f);
  std::vector<uint16_t> storage(kBatch * kHeads * geometry.exact_capacity() * kDim);
  AppendBuffers buffers;
  buffers.new_keys = buffers.new_values =
      TensorView(tokens.data(), DType::float32, {kBatch, kHeads, n, kDim});
  buffers.exact_keys = buffers.exact_values =
      TensorView(storage.data(), DType::float16, {kBatch, kHeads, geometry.exact_capacity(), kDim});
  buffers.next_exact_keys = buffers.next_exact_values = MutableTensorView(
      storage.data(), DType::float16, {kBatch, kHeads, geometry.exact_capacity(), kDim});
  const AppendPlan plan = geometry.plan_append(n);
  ASSERT_FALSE(plan.keeps_places());
  EXPECT_THROW(
      run_append(Backend::cpu, geometry, plan, *fixture.keys.codec, *fixture.values.codec, buffers),
      Error);
}

TEST(Cache, RefusesWhatDoesNotFit) {
  Fixture fixture(64, 4);
  KvCacheConfig config = fixture.config;
  config.head_dim = 32;
  EXPECT_THROW(KvCache{config}, Error);
  config = fixture.config;
  config.window = -1;
  EXPECT_THROW(KvCache{config}, Error);
  config = fixture.config;
  config.value_codec = nullptr;
  EXPECT_THROW(KvCache{config}, Error);
  KvCache cache(fixture.config);
  std::vector<float> k(kBatch * kHeads * 5 * 8);
  TensorView narrow(k.data(), DType::float32, {kBatch, kHeads, 5, 8});
  EXPECT_THROW(cache.append(narrow, narrow), Error);
  EXPECT_EQ(cache.length(), 0);
}

}  // namespace
}  // namespace veloxquant
