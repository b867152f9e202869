// QJL as a Codec. With one orthogonal block and no outliers its coordinates are the sketched ones,
// and a decoded key is its signs times one number; otherwise they are the original ones, and decode
// brings the signs back through S^T. Either way q . k^ is the QJL estimate of q . k.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "src/codecs/qjl/format.h"
#include "src/codecs/qjl/kernels.h"
#include "src/codecs/qjl/sketch.h"
#include "src/codecs/rabitq/byte_codes.h"
#include "src/codecs/registry.h"
#include "veloxquant/qjl.h"

namespace veloxquant {
namespace qjl {
namespace {

using Channels = std::array<uint8_t, kMaxOutliers>;  // ascending

class QjlCodec final : public Codec {
 public:
  QjlCodec(int n_kv_heads, int head_dim, const QjlOptions& options)
      : heads_(n_kv_heads), dim_(head_dim), n_outliers_(options.outliers) {
    require(n_kv_heads >= 1, "[qjl] n_kv_heads: got ", n_kv_heads, ", wanted at least 1");
    require(head_dim >= 8 && head_dim <= kMaxHeadDim && head_dim % 8 == 0, "[qjl] head_dim: got ",
            head_dim, ", wanted a multiple of 8 up to ", kMaxHeadDim);
    require(n_outliers_ >= 0 && n_outliers_ <= kMaxOutliers && n_outliers_ < head_dim,
            "[qjl] outliers: got ", n_outliers_, ", wanted 0..",
            std::min(kMaxOutliers, head_dim - 1));
    set_sketches(options);
    set_channels(options.outlier_channels);
  }

  std::string name() const override {
    std::string text = "qjl m" + std::to_string(layout_.m);
    if (n_outliers_ == 0) return text;
    return text + " + " + std::to_string(n_outliers_) + " outliers m" +
           std::to_string(layout_.m_out);
  }
  Side side() const override { return Side::keys; }
  int n_kv_heads() const override { return heads_; }
  int head_dim() const override { return dim_; }
  int64_t block_bytes() const override { return layout_.bytes(); }

  void encode_block(Backend backend, const BlockPlace& place, const float* x, int n_tokens,
                    uint8_t* block) const override {
    std::vector<float> rows(static_cast<size_t>(dim_) * kBlockTokens, 0.0f);
    std::copy(x, x + static_cast<size_t>(n_tokens) * dim_, rows.begin());
    if (n_outliers_ > 0) {
      const Channels channels =
          fixed_.empty() ? largest_channels(x, n_tokens) : fixed_[place.kv_head];
      std::copy_n(channels.begin(), layout_.n_channels, block + layout_.channels_at());
      std::vector<float> outliers(rows.size(), 0.0f);
      for (int i = 0; i < n_outliers_; ++i) {
        for (int t = 0; t < n_tokens; ++t) {
          std::swap(outliers[t * dim_ + channels[i]], rows[t * dim_ + channels[i]]);
        }
      }
      store_part(backend, outlier_sketch_, outliers, n_tokens, block + layout_.outlier_planes_at(),
                 block + layout_.outlier_norms_at());
    }
    store_part(backend, sketch_, rows, n_tokens, block, block + layout_.norms_at());
  }

  void decode_block(Backend backend, const BlockPlace& place, const uint8_t* block, int n_tokens,
                    float* y, int64_t y_stride) const override {
    std::vector<float> tile(static_cast<size_t>(dim_) * kBlockTokens);
    decode_block_transposed(backend, place, block, n_tokens, tile.data());
    rabitq::from_tile(tile.data(), n_tokens, dim_, y, y_stride);
  }

  void decode_block_transposed(Backend backend, const BlockPlace& place, const uint8_t* block,
                               int n_tokens, float* y_t) const override {
    float scale[kBlockTokens];
    load_scale(sketch_, block + layout_.norms_at(), scale);
    if (is_sketched()) {
      rabitq::levels_of(backend).decode(block, dim_, 1, scale, nullptr, y_t);
    } else {
      sketch_.back(backend, block, y_t);
      for (int d = 0; d < dim_; ++d) multiply_row(scale, y_t + d * kBlockTokens);
    }
    if (n_outliers_ > 0) add_outliers(backend, place, block, y_t);
    if (n_tokens == kBlockTokens) return;
    for (int d = 0; d < dim_; ++d) {
      std::fill(y_t + d * kBlockTokens + n_tokens, y_t + (d + 1) * kBlockTokens, 0.0f);
    }
  }

  // Scores need the sketched query only, and S^T never. Outlier channels would take a table of
  // look-ups for every block.
  std::string code_kernel(Backend backend) const override {
    if (backend == Backend::reference || n_outliers_ > 0) return {};
    return lookup::byte_code_kernel(rabitq::byte_codes(layout_.m, 1, layout_.bytes()), Side::keys);
  }
  std::unique_ptr<const CodeScores> code_scores(const BlockPlace&, const float* q,
                                                int n_rows) const override {
    lookup::ByteCodes codes = rabitq::byte_codes(layout_.m, 1, layout_.bytes());
    codes.factors = [this](const uint8_t* block, float* to) {
      load_scale(sketch_, block + layout_.norms_at(), to);
    };
    if (is_sketched()) return lookup::byte_code_scores(codes, q, n_rows);
    std::vector<float> sketched(static_cast<size_t>(n_rows) * layout_.m);
    sketch_.project(q, n_rows, sketched.data());
    return lookup::byte_code_scores(codes, sketched.data(), n_rows);
  }

  void transform_query(int, float* q, int64_t n) const override { move(q, n, false); }
  void inverse(int, float* y, int64_t n) const override { move(y, n, true); }
  void forward(int, float* x, int64_t n) const override { move(x, n, false); }

  int64_t token_bytes() const override { return layout_.token_bytes(); }
  int64_t scalar_bytes() const override { return layout_.scalar_bytes(); }

  void unpack_tokens(const uint8_t* block, int n_tokens, uint8_t* rows) const override {
    const int64_t stride = token_bytes();
    rabitq::planes_to_rows(block, layout_.m, n_tokens, rows, stride);
    rabitq::planes_to_rows(block + layout_.outlier_planes_at(), layout_.m_out, n_tokens,
                           rows + layout_.m / 8, stride);
    for (int t = 0; t < n_tokens; ++t) {
      uint8_t* row = rows + t * stride + layout_.token_signs();
      row = std::copy_n(block + layout_.channels_at(), layout_.n_channels, row);
      row = std::copy_n(block + layout_.norms_at() + 2 * t, 2, row);
      if (n_outliers_ > 0) std::copy_n(block + layout_.outlier_norms_at() + 2 * t, 2, row);
    }
  }

  void pack_tokens(const uint8_t* rows, int n_tokens, uint8_t* block) const override {
    const int64_t stride = token_bytes();
    std::memset(block, 0, static_cast<size_t>(block_bytes()));
    rabitq::rows_to_planes(rows, stride, layout_.m, n_tokens, block);
    rabitq::rows_to_planes(rows + layout_.m / 8, stride, layout_.m_out, n_tokens,
                           block + layout_.outlier_planes_at());
    for (int t = 0; t < n_tokens; ++t) {
      const uint8_t* row = rows + t * stride + layout_.token_signs();
      if (t == 0) std::copy_n(row, layout_.n_channels, block + layout_.channels_at());
      row += layout_.n_channels;
      float norms[2];
      rabitq::load_scalars(row, n_outliers_ > 0 ? 2 : 1, norms);
      rabitq::store_scalars(norms, 1, block + layout_.norms_at() + 2 * t);
      if (n_outliers_ > 0) {
        rabitq::store_scalars(norms + 1, 1, block + layout_.outlier_norms_at() + 2 * t);
      }
    }
  }

 private:
  void set_sketches(const QjlOptions& options) {
    const TensorView& given = options.sketch;
    int m = options.sketch_bits;
    int m_out = n_outliers_ == 0 ? 0 : options.outlier_bits;
    if (n_outliers_ > 0 && m_out == 0) m_out = dim_;
    if (given.empty()) {
      require(m >= dim_ && m <= kMaxSketchBits && m % dim_ == 0, "[qjl] sketch_bits: got ", m,
              ", wanted a multiple of head_dim = ", dim_, " up to ", kMaxSketchBits);
      require(m_out >= 0 && m_out <= kMaxSketchBits && m_out % dim_ == 0,
              "[qjl] outlier_bits: got ", m_out, ", wanted a multiple of head_dim = ", dim_,
              " up to ", kMaxSketchBits);
      sketch_ = Sketch::structured(dim_, m, options.seed, 0);
      outlier_sketch_ = Sketch::structured(dim_, m_out, options.seed, m / dim_);
    } else {
      require(given.dtype == DType::float32 && given.ndim == 2 && given.shape[1] == dim_ &&
                  given.shape[0] >= 8 && given.shape[0] <= kMaxSketchBits &&
                  given.shape[0] % 8 == 0 && given.stride[1] == 1 && given.stride[0] == dim_,
              "[qjl] sketch: got ", dtype_name(given.dtype), " with ", given.ndim,
              " dimensions, wanted row-major float32 [a multiple of 8 up to ", kMaxSketchBits, ", ",
              dim_, "]");
      require(m == 0 || m == given.shape[0], "[qjl] sketch_bits: got ", m,
              ", wanted the rows of the sketch, ", given.shape[0]);
      m = static_cast<int>(given.shape[0]);
      m_out = std::min(m_out, m);
      require(m_out % 8 == 0, "[qjl] outlier_bits: got ", m_out, ", wanted a multiple of 8");
      const float* matrix = static_cast<const float*>(given.data);
      for (int64_t i = 0; i < given.size(); ++i) {
        require(std::isfinite(matrix[i]), "[qjl] sketch: got ", matrix[i],
                ", wanted finite values");
      }
      sketch_ = Sketch::dense(dim_, m, matrix);
      if (n_outliers_ > 0) outlier_sketch_ = Sketch::dense(dim_, m_out, matrix);
    }
    layout_.m = m;
    layout_.m_out = m_out;
    layout_.n_channels = n_outliers_;
  }

  void set_channels(const TensorView& view) {
    if (view.empty()) return;
    require(view.dtype == DType::int32 && view.ndim == 2 && view.shape[0] == heads_ &&
                view.shape[1] == n_outliers_ && n_outliers_ > 0 && view.stride[1] == 1,
            "[qjl] outlier_channels: got ", dtype_name(view.dtype), " with ", view.ndim,
            " dimensions, wanted row-major int32 [", heads_, ", outliers = ", n_outliers_, "]");
    for (int h = 0; h < heads_; ++h) {
      const int32_t* row = static_cast<const int32_t*>(view.at(h));
      Channels channels{};
      for (int i = 0; i < n_outliers_; ++i) {
        require(row[i] >= 0 && row[i] < dim_, "[qjl] outlier_channels: got ", row[i],
                ", wanted 0..", dim_ - 1);
        channels[i] = static_cast<uint8_t>(row[i]);
      }
      std::sort(channels.begin(), channels.begin() + n_outliers_);
      require(std::adjacent_find(channels.begin(), channels.begin() + n_outliers_) ==
                  channels.begin() + n_outliers_,
              "[qjl] outlier_channels: got a channel twice, wanted different ones");
      fixed_.push_back(channels);
    }
    layout_.n_channels = 0;
  }

  bool is_sketched() const {
    return n_outliers_ == 0 && sketch_.is_structured() && sketch_.m() == dim_;
  }

  void move(float* rows, int64_t n, bool back) const {
    if (!is_sketched()) return;
    const Rotation& rotation = sketch_.rotation();
    back ? rotation.inverse(default_backend(), rows, n)
         : rotation.forward(default_backend(), rows, n);
  }

  // The channels of the largest norm over the block; the lowest wins ties.
  Channels largest_channels(const float* x, int n_tokens) const {
    std::vector<float> energy(dim_, 0.0f);
    for (int t = 0; t < n_tokens; ++t) {
      for (int d = 0; d < dim_; ++d) energy[d] += mul(x[t * dim_ + d], x[t * dim_ + d]);
    }
    Channels channels{};
    for (int i = 0; i < n_outliers_; ++i) {
      const auto largest = std::max_element(energy.begin(), energy.end());
      channels[i] = static_cast<uint8_t>(largest - energy.begin());
      *largest = -1.0f;
    }
    std::sort(channels.begin(), channels.begin() + n_outliers_);
    return channels;
  }

  void store_part(Backend backend, const Sketch& sketch, const std::vector<float>& rows,
                  int n_tokens, uint8_t* planes, uint8_t* scalars) const {
    sketch.signs(backend, rows.data(), planes);
    rabitq::clear_tokens_from(n_tokens, sketch.m(), planes);
    std::vector<float> tile(rows.size());
    rabitq::to_tile(rows.data(), kBlockTokens, dim_, tile.data());
    float norms[kBlockTokens];
    column_norms(tile.data(), dim_, norms);
    rabitq::store_scalars(norms, kBlockTokens, scalars);
  }

  static void load_scale(const Sketch& sketch, const uint8_t* scalars, float* scale) {
    rabitq::load_scalars(scalars, kBlockTokens, scale);
    for (int t = 0; t < kBlockTokens; ++t) scale[t] = mul(scale[t], sketch.score_constant());
  }

  static void multiply_row(const float* factors, float* row) {
    for (int t = 0; t < kBlockTokens; ++t) row[t] = mul(row[t], factors[t]);
  }

  // Outlier channels are decoded from their own sketch.
  void add_outliers(Backend backend, const BlockPlace& place, const uint8_t* block,
                    float* y_t) const {
    float scale[kBlockTokens];
    load_scale(outlier_sketch_, block + layout_.outlier_norms_at(), scale);
    std::vector<float> tile(static_cast<size_t>(dim_) * kBlockTokens);
    outlier_sketch_.back(backend, block + layout_.outlier_planes_at(), tile.data());
    const uint8_t* channels =
        fixed_.empty() ? block + layout_.channels_at() : fixed_[place.kv_head].data();
    for (int i = 0; i < n_outliers_; ++i) {
      const int d = std::min<int>(channels[i], dim_ - 1);
      multiply_row(scale, tile.data() + d * kBlockTokens);
      std::copy_n(tile.data() + d * kBlockTokens, kBlockTokens, y_t + d * kBlockTokens);
    }
  }

  int heads_;
  int dim_;
  int n_outliers_;
  BlockLayout layout_;
  Sketch sketch_, outlier_sketch_;
  std::vector<Channels> fixed_;  // per head; empty: every block names its own
};

}  // namespace
}  // namespace qjl

CodecPtr make_qjl_codec(int n_kv_heads, int head_dim, const QjlOptions& options) {
  return std::make_shared<qjl::QjlCodec>(n_kv_heads, head_dim, options);
}

CodecPtr qjl_from_spec(const CodecSpec& spec, const CodecTables& tables) {
  SpecReader reader(spec, tables);
  QjlOptions options;
  options.sketch_bits =
      static_cast<int>(reader.integer_or("sketch_bits", 0, 0, qjl::kMaxSketchBits));
  options.outliers = static_cast<int>(reader.integer_or("outliers", 0, 0, qjl::kMaxOutliers));
  options.outlier_bits =
      static_cast<int>(reader.integer_or("outlier_bits", 0, 0, qjl::kMaxSketchBits));
  options.seed = static_cast<uint64_t>(reader.integer_or("seed", 0, 0, INT64_MAX));
  options.sketch = reader.table_or_empty("sketch");
  options.outlier_channels = reader.table_or_empty("outlier_channels");
  reader.finish();
  require(spec.side == Side::keys,
          "[qjl] side: got values, wanted keys (S^T signs is no "
          "reconstruction: choose another codec for the values)");
  return make_qjl_codec(spec.n_kv_heads, spec.head_dim, options);
}

}  // namespace veloxquant
