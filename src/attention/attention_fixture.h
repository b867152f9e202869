// What the attention tests share: a simple codec, strided tensors, a cache built from a Case
// without the cache's own code, so that attention is tested alone, and the comparison with the
// oracle.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "src/attention/element.h"
#include "veloxquant/attention.h"

namespace veloxquant::attention {

// 8-bit codes of smoothed and pairwise rotated vectors, a step that depends on sequence and head:
// simple, but wrong answers show wherever attention forgets a transform, a head or a sequence.
class TestCodec : public Codec {
 public:
  TestCodec(Side side, int n_kv_heads, int head_dim)
      : side_(side), n_kv_heads_(n_kv_heads), head_dim_(head_dim) {}

  std::string name() const override { return "test8"; }
  Side side() const override { return side_; }
  int n_kv_heads() const override { return n_kv_heads_; }
  int head_dim() const override { return head_dim_; }
  int64_t block_bytes() const override { return int64_t{kBlockTokens} * head_dim_; }

  void encode_block(Backend, const BlockPlace& place, const float* x, int n_tokens,
                    uint8_t* block) const override {
    std::vector<float> y(x, x + n_tokens * head_dim_);
    forward(place.kv_head, y.data(), n_tokens);
    std::fill(block, block + block_bytes(), uint8_t{255});
    for (size_t i = 0; i < y.size(); ++i) {
      float code = std::round(y[i] / step(place)) + 128;
      block[i] = static_cast<uint8_t>(std::fmin(255.0f, std::fmax(0.0f, code)));
    }
  }
  void decode_block(Backend, const BlockPlace& place, const uint8_t* block, int n_tokens, float* y,
                    int64_t y_stride) const override {
    for (int t = 0; t < n_tokens; ++t) {
      for (int d = 0; d < head_dim_; ++d) {
        y[t * y_stride + d] = (block[t * head_dim_ + d] - 128.0f) * step(place);
      }
    }
  }
  void decode_block_transposed(Backend, const BlockPlace& place, const uint8_t* block, int n_tokens,
                               float* y_t) const override {
    for (int d = 0; d < head_dim_; ++d) {
      for (int t = 0; t < kBlockTokens; ++t) {
        float y = (block[t * head_dim_ + d] - 128.0f) * step(place);
        y_t[d * kBlockTokens + t] = t < n_tokens ? y : 0.0f;
      }
    }
  }
  void transform_query(int kv_head, float* q, int64_t n) const override {
    for (int64_t i = 0; i < n * head_dim_; ++i) q[i] *= smooth(kv_head, i % head_dim_);
    rotate(q, n, 0.8f, 0.6f);
  }
  void inverse(int kv_head, float* y, int64_t n) const override {
    rotate(y, n, 0.8f, -0.6f);
    for (int64_t i = 0; i < n * head_dim_; ++i) y[i] *= smooth(kv_head, i % head_dim_);
  }
  void forward(int kv_head, float* x, int64_t n) const override {
    for (int64_t i = 0; i < n * head_dim_; ++i) x[i] /= smooth(kv_head, i % head_dim_);
    rotate(x, n, 0.8f, 0.6f);
  }
  int64_t token_bytes() const override { return head_dim_; }
  void unpack_tokens(const uint8_t* block, int n_tokens, uint8_t* rows) const override {
    std::copy(block, block + n_tokens * head_dim_, rows);
  }
  void pack_tokens(const uint8_t* rows, int n_tokens, uint8_t* block) const override {
    std::copy(rows, rows + n_tokens * head_dim_, block);
  }

 private:
  float step(const BlockPlace& place) const {
    return 0.03f + 0.01f * place.sequence + 0.002f * place.kv_head;
  }
  float smooth(int kv_head, int64_t d) const {
    return 0.5f + 0.1f * static_cast<float>((d + 3 * kv_head + (side_ == Side::keys)) % 11);
  }
  void rotate(float* x, int64_t n, float c, float s) const {
    for (int64_t i = 0; i < n * head_dim_; i += 2) {
      float a = x[i], b = x[i + 1];
      x[i] = c * a - s * b;
      x[i + 1] = s * a + c * b;
    }
  }

  Side side_;
  int n_kv_heads_, head_dim_;
};

// A tensor that owns its data; `gap` elements of padding after each row, heads inside tokens.
struct Tensor {
  std::vector<uint8_t> bytes;
  MutableTensorView view;

  Tensor() = default;
  Tensor(DType dtype, int64_t B, int64_t H, int64_t n, int64_t D, int64_t gap) {
    view.dtype = dtype;
    view.ndim = 4;
    view.shape = {B, H, n, D};
    view.stride = {n * H * (D + gap), D + gap, H * (D + gap), 1};
    bytes.resize(std::max<int64_t>(1, B * n * H * (D + gap)) * dtype_bytes(dtype), 0xff);
    view.data = bytes.data();
  }
  template <class Value>
  void fill(const Value& value) {
    for (int64_t b = 0; b < view.shape[0]; ++b) {
      for (int64_t h = 0; h < view.shape[1]; ++h) {
        for (int64_t i = 0; i < view.shape[2]; ++i) {
          for (int64_t d = 0; d < view.shape[3]; ++d) {
            store_element(view.at(b, h, i), view.dtype, d, value(b, h, i, d));
          }
        }
      }
    }
  }
};

enum class MaskKind { none, boolean, additive };

struct Case {
  int batch = 1, n_kv_heads = 2, group = 2, head_dim = 64;
  int64_t n_queries = 2, length = 200;
  int sinks = 4, window = 64;
  int n_new_blocks = 0;  // last sealed blocks that exist in both forms
  int cut = 0;           // > 0: tokens left in a partial block in the middle
  bool strict = false;
  bool exact_only = false;
  bool whole_prompt = false;  // one exact run holds every token, all blocks are new
  DType q_dtype = DType::float32, out_dtype = DType::float32;
  DType exact_dtype = DType::float16, chunk_dtype = DType::float32;
  bool causal = true;
  int64_t sliding_window = 0;
  MaskKind mask = MaskKind::none;
  bool mask_broadcast = false;
  float softcap = 0, scale = 0.125f, key_size = 1;
  bool sink_logits = false;
  int64_t first_query_position = -1;
  int gap = 8;
};

// A cache as Case says: sinks | packed (maybe cut) | packed new = exact | exact.
struct Scenario {
  Case c;
  Tensor q;
  std::vector<Tensor> exact;
  std::vector<std::vector<uint8_t>> blocks;
  std::vector<uint8_t> mask_bytes;
  std::vector<float> sink_logits;
  KeyValueSource source;
  AttentionParams params;

  explicit Scenario(const Case& c)
      : Scenario(c, std::make_shared<TestCodec>(Side::keys, c.n_kv_heads, c.head_dim),
                 std::make_shared<TestCodec>(Side::values, c.n_kv_heads, c.head_dim)) {}

  Scenario(const Case& c, CodecPtr keys, CodecPtr values) : c(c) {
    const int n_q_heads = c.n_kv_heads * c.group;
    source.length = c.length;
    source.exact_dtype = c.exact_dtype;
    source.key_codec = std::move(keys);
    source.value_codec = std::move(values);
    q = Tensor(c.q_dtype, c.batch, n_q_heads, c.n_queries, c.head_dim, c.gap);
    q.fill([&](auto...) { return normal(); });

    int64_t position = std::min<int64_t>(c.sinks, c.length);
    if (c.whole_prompt) {
      add_history(position);
      add_exact(0, c.length, c.chunk_dtype);
      add_params(n_q_heads);
      return;
    }
    if (position > 0) add_exact(0, position, c.exact_dtype);
    if (!c.exact_only) position = add_history(position);
    int64_t chunk = std::max(position, c.length - c.n_queries);
    if (chunk > position) add_exact(position, chunk, c.exact_dtype);
    if (c.length > chunk) add_exact(chunk, c.length, c.chunk_dtype);
    add_params(n_q_heads);
  }

 private:
  std::mt19937 random{7};
  float normal() { return std::normal_distribution<float>()(random); }

  int64_t add_history(int64_t position) {
    int n_blocks =
        static_cast<int>(std::max<int64_t>(0, c.length - position - c.window) / kBlockTokens);
    int n_new = std::min(n_blocks, c.n_new_blocks);
    int n_old = n_blocks - n_new;
    if (c.cut > 0 && n_old > 1) {
      position = add_packed(position, n_old / 2, c.cut);
      position = add_packed(position, n_old - n_old / 2, kBlockTokens);
    } else if (n_old > 0) {
      position = add_packed(position, n_old, kBlockTokens);
    }
    if (n_new > 0) add_packed(position, n_new, kBlockTokens);
    source.visibility.tail_start = position;
    source.visibility.n_new_blocks = n_new;
    source.visibility.window = c.window;
    source.visibility.strict = c.strict;
    source.visibility.first_query = c.length - c.n_queries;
    return position;
  }

  int64_t add_packed(int64_t start, int n_blocks, int last_count) {
    PackedRun run;
    for (int side = 0; side < 2; ++side) {
      const Codec& codec = side == 0 ? *source.key_codec : *source.value_codec;
      const int64_t bytes = codec.block_bytes();
      std::vector<uint8_t> data(c.batch * c.n_kv_heads * n_blocks * bytes);
      std::vector<float> x(kBlockTokens * c.head_dim);
      for (int64_t i = 0; i < int64_t{c.batch} * c.n_kv_heads * n_blocks; ++i) {
        for (float& value : x) value = normal() * (side == 0 ? c.key_size : 1);
        int head = static_cast<int>(i / n_blocks);
        const BlockPlace place{head / c.n_kv_heads, head % c.n_kv_heads,
                               start + kBlockTokens * (i % n_blocks)};
        codec.encode_block(Backend::cpu, place, x.data(), kBlockTokens, data.data() + i * bytes);
      }
      blocks.push_back(std::move(data));
      (side == 0 ? run.keys : run.values) = blocks.back().data();
      (side == 0 ? run.key_head_stride : run.value_head_stride) = n_blocks * bytes;
      (side == 0 ? run.key_batch_stride : run.value_batch_stride) = c.n_kv_heads * n_blocks * bytes;
    }
    run.n_blocks = n_blocks;
    run.last_count = last_count;
    run.start = start;
    source.packed.push_back(run);
    return run.end();
  }

  void add_exact(int64_t begin, int64_t end, DType dtype) {
    ExactRun run;
    run.start = begin;
    for (int side = 0; side < 2; ++side) {
      exact.emplace_back(dtype, c.batch, c.n_kv_heads, end - begin, c.head_dim, c.gap);
      exact.back().fill([&](auto...) { return normal() * (side == 0 ? c.key_size : 1); });
      (side == 0 ? run.keys : run.values) = read_only(exact.back().view);
    }
    source.exact.push_back(run);
  }

  void add_params(int n_q_heads) {
    params.scale = c.scale;
    params.logit_softcap = c.softcap;
    params.first_query_position = c.first_query_position;
    params.mask.causal = c.causal;
    params.mask.sliding_window = c.sliding_window;
    if (c.sink_logits) {
      for (int h = 0; h < n_q_heads; ++h) sink_logits.push_back(normal() + 2);
      params.sink_logits = TensorView(sink_logits.data(), DType::float32, {n_q_heads});
    }
    if (c.mask == MaskKind::none || c.length == 0) return;
    DType dtype = c.mask == MaskKind::boolean ? DType::boolean : DType::float32;
    int64_t B = c.mask_broadcast ? 1 : c.batch, H = c.mask_broadcast ? 1 : n_q_heads;
    mask_bytes.resize(B * H * c.n_queries * c.length * dtype_bytes(dtype));
    for (int64_t i = 0; i < B * H * c.n_queries * c.length; ++i) {
      float x = normal();
      if (dtype == DType::boolean) {
        mask_bytes[i] = x > 0;
      } else {
        store_element(mask_bytes.data(), dtype, i,
                      x < -1 ? -std::numeric_limits<float>::infinity() : x);
      }
    }
    params.mask.array = TensorView(mask_bytes.data(), dtype, {B, H, c.n_queries, c.length});
    if (c.mask_broadcast) {  // as MLX broadcasts: full shape, strides of 0
      params.mask.array.shape = {c.batch, n_q_heads, c.n_queries, c.length};
      params.mask.array.stride[0] = params.mask.array.stride[1] = 0;
    }
  }
};

struct Result {
  Tensor out;
  std::vector<float> lse;

  Result(const Case& c, DType dtype)
      : out(dtype, c.batch, c.n_kv_heads * c.group, c.n_queries, c.head_dim, 8),
        lse(c.batch * c.n_kv_heads * c.group * c.n_queries,
            std::numeric_limits<float>::quiet_NaN()) {
    out.fill([](auto...) { return std::numeric_limits<float>::quiet_NaN(); });
  }
  MutableTensorView lse_view(const Case& c) {
    return {lse.data(), DType::float32, {c.batch, c.n_kv_heads * c.group, c.n_queries}};
  }
};

inline Result run(const Scenario& p, Backend backend) {
  Result result(p.c, p.c.out_dtype);
  attend(backend, read_only(p.q.view), p.source, p.params, result.out.view, result.lse_view(p.c));
  return result;
}

inline Result oracle(const Scenario& p) {
  Result result(p.c, DType::float32);
  attend_oracle(read_only(p.q.view), p.source, p.params, result.out.view, result.lse_view(p.c));
  return result;
}

// The largest relative L2 error of an output row; infinite where anything is not finite.
inline double worst_error(const Result& got, const Result& want) {
  const auto& shape = want.out.view.shape;
  double worst = 0;
  for (int64_t b = 0; b < shape[0]; ++b) {
    for (int64_t h = 0; h < shape[1]; ++h) {
      for (int64_t i = 0; i < shape[2]; ++i) {
        double error = 0, norm = 0;
        for (int64_t d = 0; d < shape[3]; ++d) {
          double x = load_element(got.out.view.at(b, h, i), got.out.view.dtype, d);
          double y = load_element(want.out.view.at(b, h, i), DType::float32, d);
          error += (x - y) * (x - y);
          norm += y * y;
        }
        double relative = error == 0 ? 0 : std::sqrt(error / norm);
        worst = std::isfinite(relative) ? std::max(worst, relative)
                                        : std::numeric_limits<float>::infinity();
      }
    }
  }
  return worst;
}

inline void expect_close(const Result& got, const Result& want, double tolerance,
                         double lse_tolerance = 3e-6) {
  EXPECT_LE(worst_error(got, want), tolerance);
  for (size_t i = 0; i < want.lse.size(); ++i) {
    if (std::isinf(want.lse[i])) {
      ASSERT_EQ(got.lse[i], want.lse[i]) << "row " << i;
    } else {
      ASSERT_NEAR(got.lse[i], want.lse[i], lse_tolerance * (1 + std::fabs(want.lse[i])))
          << "row " << i;
    }
  }
}

// Restores what a test changed about SIMD levels and threads.
class AttentionTest : public ::testing::Test {
 protected:
  void TearDown() override {
    set_simd_level("");
    set_num_threads(0);
  }

  void check(const Case& c, double tolerance = 1e-5) { check(Scenario(c), tolerance); }

  void check(const Scenario& p, double tolerance = 1e-5, double lse_tolerance = 3e-6) {
    const Case& c = p.c;
    Result want = oracle(p);
    // One rounding of the result on top.
    if (c.out_dtype == DType::float16) tolerance += 0x1p-11;
    if (c.out_dtype == DType::bfloat16) tolerance += 0x1p-8;
    {
      SCOPED_TRACE("reference");
      expect_close(run(p, Backend::reference), want, tolerance);
    }
    for (const std::string& level : simd_levels()) {
      SCOPED_TRACE(level);
      set_simd_level(level);
      expect_close(run(p, Backend::cpu), want, tolerance, lse_tolerance);
    }
    set_simd_level("");
  }
};

}  // namespace veloxquant::attention
