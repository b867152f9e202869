// The packed block of QJL, drawn in README.md.
#pragma once

#include "src/codecs/rabitq/format.h"

namespace veloxquant::qjl {

constexpr int kMaxHeadDim = 256;  // a channel takes one byte
constexpr int kMaxSketchBits = 8192;
constexpr int kMaxOutliers = 64;

struct BlockLayout {
  int m = 0;           // signs of the sketch
  int m_out = 0;       // signs of the outliers' sketch; 0: no outliers
  int n_channels = 0;  // outlier channels that the block itself names

  int64_t outlier_planes_at() const { return rabitq::plane_bytes(m, 1); }
  int64_t norms_at() const { return outlier_planes_at() + rabitq::plane_bytes(m_out, 1); }
  int64_t outlier_norms_at() const { return norms_at() + rabitq::kScalarBytes; }
  int64_t channels_at() const {
    return outlier_norms_at() + (m_out > 0 ? rabitq::kScalarBytes : 0);
  }
  int64_t bytes() const { return channels_at() + n_channels; }

  // One token in files: signs, outliers' signs, channels of its block, norms.
  int64_t token_signs() const { return (m + m_out) / 8; }
  int64_t scalar_bytes() const { return m_out > 0 ? 4 : 2; }
  int64_t token_bytes() const { return token_signs() + n_channels + scalar_bytes(); }
};

}  // namespace veloxquant::qjl
