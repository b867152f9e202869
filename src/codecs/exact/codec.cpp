#include <algorithm>
#include <cstring>
#include <vector>

#include "src/backends/cpu/convert.h"
#include "src/codecs/registry.h"
#include "veloxquant/exact.h"

namespace veloxquant {
namespace {

class ExactCodec final : public Codec {
 public:
  ExactCodec(Side side, int n_kv_heads, int head_dim, DType dtype)
      : side_(side), heads_(n_kv_heads), dim_(head_dim), dtype_(dtype) {
    require(n_kv_heads >= 1, "[exact] n_kv_heads: got ", n_kv_heads, ", wanted at least 1");
    require(head_dim >= 1, "[exact] head_dim: got ", head_dim, ", wanted at least 1");
    require(dtype == DType::float16 || dtype == DType::bfloat16, "[exact] dtype: got ",
            dtype_name(dtype), ", wanted float16 or bfloat16");
  }

  std::string name() const override { return dtype_ == DType::float16 ? "fp16" : "bf16"; }
  Side side() const override { return side_; }
  int n_kv_heads() const override { return heads_; }
  int head_dim() const override { return dim_; }
  int64_t block_bytes() const override { return int64_t{2} * kBlockTokens * dim_; }

  void encode_block(Backend, const BlockPlace&, const float* x, int n_tokens,
                    uint8_t* block) const override {
    std::memset(block, 0, block_bytes());
    cpu::to_finite_16bit(dtype_, x, int64_t{n_tokens} * dim_, reinterpret_cast<uint16_t*>(block));
  }

  void decode_block(Backend, const BlockPlace&, const uint8_t* block, int n_tokens, float* y,
                    int64_t y_stride) const override {
    for (int t = 0; t < n_tokens; ++t) {
      cpu::to_float(dtype_, block + int64_t{2} * t * dim_, dim_, y + t * y_stride);
    }
  }

  void decode_block_transposed(Backend, const BlockPlace&, const uint8_t* block, int n_tokens,
                               float* y_t) const override {
    std::vector<float> row(dim_);
    std::fill_n(y_t, int64_t{dim_} * kBlockTokens, 0.0f);
    for (int t = 0; t < n_tokens; ++t) {
      cpu::to_float(dtype_, block + int64_t{2} * t * dim_, dim_, row.data());
      for (int d = 0; d < dim_; ++d) y_t[d * kBlockTokens + t] = row[d];
    }
  }

  void transform_query(int, float*, int64_t) const override {}
  void inverse(int, float*, int64_t) const override {}
  void forward(int, float*, int64_t) const override {}

  int64_t token_bytes() const override { return int64_t{2} * dim_; }
  void unpack_tokens(const uint8_t* block, int n_tokens, uint8_t* rows) const override {
    std::memcpy(rows, block, n_tokens * token_bytes());
  }
  void pack_tokens(const uint8_t* rows, int n_tokens, uint8_t* block) const override {
    std::memset(block, 0, block_bytes());
    std::memcpy(block, rows, n_tokens * token_bytes());
  }

 private:
  Side side_;
  int heads_, dim_;
  DType dtype_;
};

}  // namespace

CodecPtr make_exact_codec(Side side, int n_kv_heads, int head_dim, DType dtype) {
  return std::make_shared<ExactCodec>(side, n_kv_heads, head_dim, dtype);
}

CodecPtr exact_from_spec(const CodecSpec& spec, const CodecTables& tables) {
  SpecReader reader(spec, tables);
  const bool bf16 = reader.choice("dtype", {"float16", "bfloat16"}) == 1;
  reader.finish();
  return make_exact_codec(spec.side, spec.n_kv_heads, spec.head_dim,
                          bf16 ? DType::bfloat16 : DType::float16);
}

}  // namespace veloxquant
