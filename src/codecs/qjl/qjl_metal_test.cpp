// QJL's Metal kernels on the MSL machine against the CPU: equal signs, norms and scores; blocks of
// several heads and sequences at once (conformance_metal_test has the forms of a block).
#include <cmath>

#include "src/backends/cpu/convert.h"
#include "src/codecs/qjl/kernel_calls.h"
#include "tests/msl/support.h"
#include "tests/support/random.h"
#include "veloxquant/qjl.h"

namespace veloxquant::qjl {
namespace {

using metal::Type;
using msl::floats;
using msl::Input;
using msl::same_bytes;

TEST(MetalQjl, SignsAndNormsOfRowsEqualTheCpu) {
  struct Rows {
    int n, dim, m;
  };
  for (const Rows& c : {Rows{11, 128, 256}, Rows{9, 80, 320}, Rows{1, 300, 8}, Rows{20, 3, 24}}) {
    SCOPED_TRACE(testing::Message() << c.n << " rows of " << c.dim << ", m " << c.m);
    test::Random random(static_cast<uint64_t>(c.m));
    std::vector<float> x = random.normal(c.n * c.dim), sketch = random.normal(c.m * c.dim);
    x[1] = NAN;
    x[2] = -INFINITY;
    std::fill_n(x.end() - c.dim, c.dim, -0.0f);
    std::vector<uint8_t> signs(c.n * c.m / 8);
    std::vector<uint16_t> norms(c.n);
    qjl_encode(Backend::reference, x.data(), c.n, c.dim, sketch.data(), c.m, signs.data(),
               norms.data());
    const metal::Call call = encode_rows_call(c.n, c.dim, c.m);
    const msl::Result got = msl::run(*call.kernel, call.launch,
                                     {floats(x, {c.n, c.dim}), floats(sketch, {c.m, c.dim})});
    EXPECT_TRUE(same_bytes(got.outputs[0], signs));
    EXPECT_TRUE(same_bytes(got.outputs[1], norms));
  }
}

TEST(MetalQjl, InnerProductsEqualTheCpu) {
  struct Scores {
    int batches, q_heads, heads, n, m;
  };
  for (const Scores& c : {Scores{2, 6, 2, 300, 128}, Scores{1, 1, 1, 3, 264}, Scores{3, 4, 4, 257, 8}}) {
    SCOPED_TRACE(testing::Message() << c.n << " keys, m " << c.m);
    test::Random random(static_cast<uint64_t>(c.n));
    const std::vector<float> q = random.normal(c.batches * c.q_heads * c.m);
    std::vector<uint8_t> signs(c.batches * c.n * c.heads * c.m / 8);
    for (uint8_t& byte : signs) byte = static_cast<uint8_t>(random.next());
    std::vector<float> norms = random.normal(c.batches * c.n * c.heads);
    norms[0] = 1e6f;  // overflows fp16
    std::vector<float> wide(c.q_heads * c.n);
    std::vector<uint16_t> want(c.batches * wide.size());
    for (int b = 0; b < c.batches; ++b) {
      QjlScores work;
      work.queries = q.data() + b * c.q_heads * c.m;
      work.n_query_heads = c.q_heads, work.n_key_heads = c.heads, work.m = c.m;
      work.signs = signs.data() + b * c.n * c.heads * (c.m / 8);
      work.sign_key_stride = c.heads * (c.m / 8), work.sign_head_stride = c.m / 8;
      work.norms = norms.data() + b * c.n * c.heads;
      work.norm_key_stride = c.heads, work.norm_head_stride = 1;
      work.n_keys = c.n, work.scores = wide.data();
      qjl_inner_product(work);
      cpu::to_finite_16bit(DType::float16, wide.data(), static_cast<int64_t>(wide.size()),
                           want.data() + b * wide.size());
    }
    const std::vector<float> factor = {score_constant(c.m)};
    const metal::Call call = inner_product_call(c.batches, c.q_heads, c.heads, c.n);
    const msl::Result got =
        msl::run(*call.kernel, call.launch,
                 {floats(q, {c.batches, c.q_heads, c.m}),
                  Input(Type::uint8, {c.batches, c.n, c.heads, c.m / 8}, signs.data()),
                  floats(norms, {c.batches, c.n, c.heads}), floats(factor, {1})});
    EXPECT_TRUE(same_bytes(got.outputs[0], want));
  }
}

TEST(MetalQjl, BlocksOfHeadsAndSequencesEqualTheCpu) {
  const int B = 2, H = 2, D = 64, n = 100;
  test::Random random(4);
  for (bool fixed : {false, true}) {
    const std::vector<int32_t> channels = {1, 5, 60, 2, 3, 9};
    QjlOptions options;
    options.sketch_bits = 128, options.outliers = 3, options.seed = 8;
    if (fixed) options.outlier_channels = TensorView(channels.data(), DType::int32, {H, 3});
    const CodecPtr codec = make_qjl_codec(H, D, options);
    CodecSpec spec{"qjl", Side::keys, H, D, {}};
    spec.options = {{"sketch_bits", int64_t{128}}, {"outliers", int64_t{3}}};
    BlockKernelShape s = block_shape_of(spec, 0, fixed);
    s.batch = B, s.n_tokens = n;
    ASSERT_EQ(s.layout.bytes(), codec->block_bytes());
    const std::vector<float> x = random.normal(B * H * n * D);
    std::vector<uint8_t> blocks(B * H * s.n_blocks() * codec->block_bytes());
    std::vector<float> decoded(B * H * s.n_blocks() * 64 * D);
    for (int i = 0; i < B * H * s.n_blocks(); ++i) {
      const int plane = i / s.n_blocks(), first = i % s.n_blocks() * 64;
      uint8_t* block = blocks.data() + i * codec->block_bytes();
      const BlockPlace place{plane / H, plane % H, first};
      codec->encode_block(Backend::reference, place, x.data() + (plane * n + first) * D,
                          std::min(64, n - first), block);
      codec->decode_block(Backend::reference, place, block, 64, decoded.data() + i * 64 * D, D);
    }
    const std::vector<float> signs = sketch_signs(s, options.seed), constants = score_constants(s);
    const std::vector<int32_t> none = {0};
    const Input sketch = floats(signs, {3, 2, D});
    const Input given = fixed ? Input(Type::int32, {H, 3}, channels.data())
                              : Input(Type::int32, {1}, none.data());
    metal::Call call = encode_blocks_call(s);
    EXPECT_TRUE(same_bytes(
        msl::run(*call.kernel, call.launch, {floats(x, {B, H, n, D}), sketch, given}).outputs[0],
        blocks));
    call = decode_blocks_call(s);
    const Input packed(Type::uint8, {B, H, s.n_blocks(), codec->block_bytes()}, blocks.data());
    EXPECT_TRUE(same_bytes(msl::run(*call.kernel, call.launch,
                                    {packed, sketch, given, floats(constants, {2})})
                               .outputs[0],
                           decoded));
  }
}

}  // namespace
}  // namespace veloxquant::qjl
