// Sides of the codecs whose tiles do more than look a code up, as decode attention's kernels are
// told of them.
#pragma once

#include "src/attention/decode_metal_fixture.h"
#include "src/codecs/qjl/kernel_calls.h"
#include "src/codecs/rope/kernel_calls.h"
#include "src/codecs/turboquant/sketch.h"
#include "tests/support/codec_cases.h"
#include "veloxquant/exact.h"

namespace veloxquant::attention {

inline MetalSide exact_side(Side side, const Case& c, DType dtype) {
  MetalSide s;
  s.codec = make_exact_codec(side, c.n_kv_heads, c.head_dim, dtype);
  s.format.kind = TileKind::halves;
  s.format.bfloat = dtype == DType::bfloat16;
  s.numbers = s.moved = {0.0f};
  s.table_shape = s.moved_shape = {1};
  return s;
}

inline MetalSide prod_side(Side side, const Case& c, int bits) {
  TurboQuantOptions options;
  options.bits = bits, options.seed = kSeed, options.prod = true, options.scale = ScalarScale::raw;
  CodeFormat format;
  format.kind = TileKind::sketched;
  format.bits = bits - 1, format.by_token = side == Side::values;
  MetalSide s = rotated(make_turboquant_codec(side, c.n_kv_heads, c.head_dim, options), format,
                        turboquant::level_numbers(c.head_dim, bits - 1, 1), {1, 16});
  if (side == Side::keys) {
    s.format.n_rows = 2 * c.head_dim;
    s.transform = 2;
    s.queries = turboquant::sketched_queries(c.head_dim, kSeed);
  } else {
    const auto sketch = turboquant::gaussian_sketch(c.head_dim, kSeed);
    s.moved.insert(s.moved.end(), sketch->rows.begin(), sketch->rows.end());
    s.moved_shape = {2 + c.head_dim, c.head_dim};
  }
  return s;
}

// A case of the suites with outlier channels.
inline MetalSide outlier_side(const test::CodecCase& one) {
  const bool fixed = one.has_table("outlier_channels");
  const qjl::BlockKernelShape shape = qjl::block_shape_of(one.spec(), 0, fixed);
  std::vector<int32_t> channels;
  if (fixed) {
    const auto* given = static_cast<const int32_t*>(one.given("outlier_channels").data);
    channels.assign(given, given + shape.heads * shape.outliers);
  }
  MetalSide s;
  s.codec = one.codec_ptr();
  s.format.kind = TileKind::outliers;
  s.format.bits = shape.layout.m, s.format.m_out = shape.layout.m_out;
  s.format.outliers = shape.outliers, s.format.fixed = fixed;
  s.format.n_rows = shape.layout.m + shape.dim;
  s.transform = 2;
  s.queries = qjl::query_matrix(shape, nullptr, 0);
  s.numbers = qjl::outlier_numbers(shape, nullptr, 0, channels);
  s.table_shape = {static_cast<int64_t>(s.numbers.size())};
  s.moved = {0.0f};
  s.moved_shape = {1};
  return s;
}

// commvq or vecinfer_rope.
inline MetalSide turned_side(const test::CodecCase& one) {
  const int heads = one.spec().n_kv_heads, dim = one.spec().head_dim, pairs = dim / 2;
  const RopeSpec spec = test::rope_spec(one);
  std::vector<int32_t> order(heads * pairs);
  std::vector<float> inverse(order.size(), 1.0f);
  for (size_t i = 0; i < order.size(); ++i) {
    order[i] = one.has_table("order") ? static_cast<const int32_t*>(one.given("order").data)[i]
                                      : static_cast<int32_t>(i) % pairs;
    const size_t pair = i / pairs * pairs + order[i];
    if (one.has_table("weight")) {
      inverse[i] = 1.0f / static_cast<const float*>(one.given("weight").data)[pair];
    }
  }
  MetalSide s;
  s.codec = one.codec_ptr();
  const bool vectors = one.spec().method == "vecinfer_rope";
  const TensorView& tables = one.given(vectors ? "tables" : "codebook");
  const auto* halves = static_cast<const uint16_t*>(tables.data);
  s.halves.assign(halves, halves + tables.size());
  s.table_shape.assign(tables.shape.begin(), tables.shape.begin() + tables.ndim);
  if (vectors) {
    s.table_shape.insert(s.table_shape.begin(), 1);
    s.format = {static_cast<int>(tables.shape[3]), static_cast<int>(tables.shape[2]),
                vecinfer::code_bits(static_cast<int>(tables.shape[2])),
                static_cast<int>(tables.shape[1])};
    s.format.kind = TileKind::pairs;
  } else {
    s.format.kind = TileKind::commvq;
    s.format.stages = static_cast<int>(tables.shape[1]);
    s.format.n_centroids = static_cast<int>(tables.shape[2]);
  }
  const Rope rope(spec);
  s.transform = 2;
  s.matrices = heads;
  s.queries = rope::slot_queries(rope, order, inverse);
  s.moved = rope::turn_numbers(rope, order);
  s.moved_shape = {static_cast<int64_t>(s.moved.size())};
  return s;
}

}  // namespace veloxquant::attention
