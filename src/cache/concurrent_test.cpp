// Several caches in one process, each used by a thread of its own, all at once: they share codecs,
// the pool of look-up buffers and the worker threads, and must not share anything else.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "src/codecs/lookup/plane_codes.h"
#include "src/math/float16.h"
#include "tests/support/random.h"
#include "veloxquant/cache.h"
#include "veloxquant/codec_spec.h"
#include "veloxquant/exact.h"
#include "veloxquant/vecinfer.h"

namespace veloxquant {
namespace {

constexpr int kHeads = 2, kGroup = 2, kDim = 64;

// Codecs that all caches share, one pair for each way of attending on codes, and the exact one.
class SharedCodecs {
 public:
  SharedCodecs() {
    for (int sub_dim : {4, 2, 8})
      add(vecinfer(Side::keys, sub_dim), vecinfer(Side::values, sub_dim));
    for (int bits : {1, 2, 4}) add(scalar(Side::keys, bits), scalar(Side::values, bits));
    add(scalar(Side::keys, 3), vecinfer(Side::values, 4));
    add(make_exact_codec(Side::keys, kHeads, kDim, DType::float16),
        make_exact_codec(Side::values, kHeads, kDim, DType::float16));
  }
  KvCacheConfig config(int i) const {
    KvCacheConfig config;
    config.n_kv_heads = kHeads;
    config.head_dim = kDim;
    config.key_codec = keys_[i];
    config.value_codec = values_[i];
    return config;
  }
  int size() const { return static_cast<int>(keys_.size()); }

 private:
  void add(CodecPtr keys, CodecPtr values) {
    keys_.push_back(std::move(keys));
    values_.push_back(std::move(values));
  }
  static CodecPtr scalar(Side side, int bits) {
    const std::map<std::string, CodecOption> options = {{"bits", int64_t{bits}}};
    return make_codec({"turboquant", side, kHeads, kDim, options}, {});
  }
  CodecPtr vecinfer(Side side, int sub_dim) {
    test::Random random(sub_dim);
    tables_.emplace_back();
    for (float v : random.normal(kHeads * kDim * 256)) tables_.back().push_back(f32_to_f16(v));
    Transform hadamard;
    hadamard.kind = TransformKind::hadamard;
    return make_vecinfer_codec(
        side, kHeads, kDim, kDim / sub_dim,
        {tables_.back().data(), DType::float16, {kHeads, kDim / sub_dim, 256, sub_dim}}, hadamard);
  }

  std::vector<std::vector<uint16_t>> tables_;
  std::vector<CodecPtr> keys_, values_;
};

// A conversation: a prompt, then steps that append a token and attend. Every output, as bytes.
std::vector<float> converse(const KvCacheConfig& config, uint32_t seed) {
  test::Random random(seed);
  KvCache cache(config);
  std::vector<float> outputs;
  AttentionParams params;
  params.scale = 1 / std::sqrt(static_cast<float>(kDim));
  for (int64_t n : {900, 1, 1, 3, 70, 1}) {
    const std::vector<float> keys = random.normal(kHeads * n * kDim);
    const std::vector<float> values = random.normal(kHeads * n * kDim);
    const std::vector<float> queries = random.normal(kHeads * kGroup * n * kDim);
    auto view = [&](const std::vector<float>& x, int64_t heads) {
      return TensorView(x.data(), DType::float32, {1, heads, n, kDim});
    };
    std::vector<float> out(queries.size(), NAN);
    cache.append_and_attend(
        view(queries, kHeads * kGroup), view(keys, kHeads), view(values, kHeads), false, params,
        MutableTensorView(out.data(), DType::float32, {1, kHeads * kGroup, n, kDim}), {});
    outputs.insert(outputs.end(), out.begin(), out.end());
  }
  return outputs;
}

void run_at_once(lookup::PlaneUse use) {
  lookup::set_plane_use(use);
  const SharedCodecs codecs;
  ASSERT_EQ(codecs.size(), 8);
  std::vector<std::vector<float>> alone, together(codecs.size());
  for (int i = 0; i < codecs.size(); ++i) alone.push_back(converse(codecs.config(i), 100 + i));
  std::vector<std::thread> threads;
  for (int i = 0; i < codecs.size(); ++i) {
    threads.emplace_back([&, i] { together[i] = converse(codecs.config(i), 100 + i); });
  }
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < codecs.size(); ++i) {
    SCOPED_TRACE(codecs.config(i).key_codec->name());
    ASSERT_EQ(together[i].size(), alone[i].size());
    EXPECT_EQ(std::memcmp(together[i].data(), alone[i].data(), alone[i].size() * sizeof(float)), 0);
    for (float x : alone[i]) ASSERT_TRUE(std::isfinite(x));
  }
  lookup::set_plane_use(lookup::PlaneUse::fast);
}

TEST(ConcurrentCaches, EightGiveTheBitsThatEachGivesAlone) { run_at_once(lookup::PlaneUse::never); }
TEST(ConcurrentCaches, EightWithLookUpsInRegisters) { run_at_once(lookup::PlaneUse::always); }

}  // namespace
}  // namespace veloxquant
