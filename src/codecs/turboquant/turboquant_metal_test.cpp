// The scalar codecs' Metal kernels (turboquant, prod, rvq) on the MSL machine against the CPU:
// equal codes, bytes and decoded bits.
#include <cmath>

#include "src/codecs/turboquant/kernel_calls.h"
#include "src/codecs/turboquant/sketch.h"
#include "tests/msl/support.h"
#include "tests/support/codec_cases.h"
#include "tests/support/random.h"
#include "veloxquant/words.h"

namespace veloxquant::turboquant {
namespace {

using metal::Type;
using msl::floats;
using msl::Input;
using msl::same_bytes;
using msl::Values;
using test::Random;

// Normal rows with NaN, infinities, zeros, and rows of one outlier.
std::vector<float> hard_rows(Random& random, int n, int dim) {
  std::vector<float> x = random.normal(int64_t{n} * dim);
  for (int r = 0; r < n; ++r) {
    float* row = x.data() + r * dim;
    if (r % 9 == 1) row[r % dim] = NAN;
    if (r % 9 == 2) row[r % dim] = r % 2 ? INFINITY : -INFINITY;
    if (r % 9 == 3) std::fill_n(row, dim, r % 2 ? 0.0f : -0.0f);
    if (r % 9 == 4) row[r % dim] *= 1000.0f;
  }
  return x;
}

TEST(MetalScalarRows, QuantizeAndDequantizeEqualTheCpu) {
  struct Rows {
    int n, dim, bits;
    ScalarScale scale;
    bool rotate;
    Type type;
  };
  for (const Rows& c : {Rows{37, 128, 2, ScalarScale::norm_corrected, true, Type::float16},
                        Rows{9, 80, 3, ScalarScale::unbiased, true, Type::float32},
                        Rows{8, 64, 4, ScalarScale::raw, false, Type::bfloat16},
                        Rows{3, 1024, 1, ScalarScale::norm_corrected, true, Type::float32},
                        Rows{17, 37, 3, ScalarScale::norm_corrected, false, Type::float16},
                        Rows{20, 1, 1, ScalarScale::raw, true, Type::float32}}) {
    SCOPED_TRACE(testing::Message() << c.n << " rows of " << c.dim << ", " << c.bits << " bits");
    Random random(static_cast<uint64_t>(c.dim));
    const Values x(hard_rows(random, c.n, c.dim), c.type);
    const ScalarQuantParams params{c.dim, c.bits, c.scale, c.rotate, 5};
    std::vector<uint32_t> words(c.n * words_per_row(c.dim, c.bits));
    std::vector<uint16_t> scalars(c.n);
    scalar_quantize(Backend::reference, params, msl::dtype_of(c.type), x.data(), c.n, words.data(),
                    scalars.data());
    const RowShape shape{c.n, c.dim, c.bits, c.scale, c.rotate};
    ASSERT_FALSE(no_kernel_because(shape));
    const std::vector<float> signs =
        c.rotate ? rotation_signs(c.dim, params.seed) : std::vector<float>{0};
    const std::vector<int64_t> signs_shape =
        c.rotate ? std::vector<int64_t>{2, c.dim} : std::vector<int64_t>{1};
    const std::vector<float> quantizers = quantizer_numbers(c.dim, c.bits, 1);
    metal::Call call = quantize_call(shape);
    const msl::Result got =
        msl::run(*call.kernel, call.launch,
                 {x.input({c.n, c.dim}), floats(signs, signs_shape), floats(quantizers, {1, 16})});
    EXPECT_TRUE(same_bytes(got.outputs[0], words)) << "codes";
    EXPECT_TRUE(same_bytes(got.outputs[1], scalars)) << "scalars";

    std::vector<uint8_t> back(c.n * c.dim * metal::type_bytes(c.type));
    scalar_dequantize(Backend::reference, params, words.data(), scalars.data(), c.n,
                      msl::dtype_of(c.type), back.data());
    call = dequantize_call(shape, c.type);
    const msl::Result rows =
        msl::run(*call.kernel, call.launch,
                 {Input(Type::uint32, {c.n, words_per_row(c.dim, c.bits)}, words.data()),
                  Input(Type::float16, {c.n}, scalars.data()), floats(signs, signs_shape),
                  floats(quantizers, {1, 16})});
    EXPECT_TRUE(same_bytes(rows.outputs[0], back)) << "rows";
  }
}

TEST(MetalScalarRows, PublishedFormsEqualTheCpu) {
  Random random(8);
  for (int dim : {1, 64, 256}) {
    for (int n_centroids : {2, 16, 200}) {
      SCOPED_TRACE(testing::Message() << dim << " values, " << n_centroids << " centroids");
      const int rows = 11, n = rows * dim;
      const Type type = dim == 64 ? Type::float16 : Type::float32;
      const Values x(hard_rows(random, rows, dim), type);
      std::vector<float> centroids = random.normal(n_centroids), diag(dim);
      centroids.back() = centroids[0];  // a tie: the lower index wins
      for (float& d : diag) d = random.next() & 1 ? 1.0f : -1.0f;
      std::vector<uint8_t> codes(n);
      nearest_scalar(Backend::reference, msl::dtype_of(type), x.data(), n, centroids.data(),
                     n_centroids, codes.data());
      metal::Call call = nearest_call(n, n_centroids);
      const Input table = floats(centroids, {n_centroids});
      EXPECT_TRUE(
          same_bytes(msl::run(*call.kernel, call.launch, {x.input({n}), table}).outputs[0], codes));

      std::vector<uint16_t> values(n);
      codes[0] = 255;  // beyond the table: its last entry
      scalar_centroids(codes.data(), n, centroids.data(), n_centroids, values.data());
      call = centroids_call(n, n_centroids);
      EXPECT_TRUE(same_bytes(
          msl::run(*call.kernel, call.launch, {Input(Type::uint8, {n}, codes.data()), table})
              .outputs[0],
          values));

      nearest_scalar_of_hadamard(Backend::reference, msl::dtype_of(type), x.data(), rows, dim,
                                 diag.data(), centroids.data(), n_centroids, codes.data());
      call = hadamard_nearest_call(rows, dim, n_centroids);
      EXPECT_TRUE(same_bytes(
          msl::run(*call.kernel, call.launch, {x.input({rows, dim}), floats(diag, {dim}), table})
              .outputs[0],
          codes));
    }
  }
}

// Blocks of several heads and batches, the last one cut: bytes of encode_block, values of
// decode_block, whatever the width, scale and form.
TEST(MetalScalarBlocks, BytesAndDecodedBitsEqualTheCpu) {
  struct Form {
    int dim, bits, stages;
    ScalarScale scale;
    bool prod;
    Side side;
    int n_tokens;
    Type type;
  };
  for (const Form& c :
       {Form{128, 2, 1, ScalarScale::norm_corrected, false, Side::keys, 128, Type::float16},
        Form{80, 3, 1, ScalarScale::unbiased, false, Side::values, 90, Type::bfloat16},
        Form{64, 1, 2, ScalarScale::norm_corrected, false, Side::keys, 64, Type::float32},
        Form{96, 3, 2, ScalarScale::norm_corrected, false, Side::values, 65, Type::float16},
        Form{64, 3, 1, ScalarScale::raw, true, Side::keys, 71, Type::float16},
        Form{8, 1, 1, ScalarScale::raw, true, Side::values, 100, Type::float32},
        Form{256, 4, 1, ScalarScale::raw, false, Side::keys, 64, Type::float16}}) {
    SCOPED_TRACE(testing::Message() << "D" << c.dim << ", " << c.stages << " x " << c.bits
                                    << " bits" << (c.prod ? ", prod" : ""));
    const int B = 2, H = 2;
    TurboQuantOptions options;
    options.bits = c.bits, options.scale = c.scale, options.prod = c.prod, options.seed = 9;
    RvqOptions rvq;
    rvq.bits = c.bits, rvq.scale = c.scale, rvq.seed = 9;
    const CodecPtr codec = c.stages == 2 ? make_rvq_codec(c.side, H, c.dim, rvq)
                                         : make_turboquant_codec(c.side, H, c.dim, options);
    BlockKernelShape s;
    s.batch = B, s.heads = H, s.n_tokens = c.n_tokens, s.dim = c.dim;
    s.stages = c.stages, s.bits = c.bits - (c.prod ? 1 : 0), s.scale = c.scale, s.prod = c.prod;
    s.by_token = c.side == Side::values;
    ASSERT_FALSE(no_kernel_because(s));
    ASSERT_EQ(s.block_bytes(), codec->block_bytes());
    test::ExactRandom random(static_cast<uint64_t>(c.dim));
    const Values x(test::case_rows(random, int64_t{B} * H * c.n_tokens, c.dim), c.type);
    const int64_t n_blocks = s.n_blocks();
    std::vector<uint8_t> blocks(B * H * n_blocks * s.block_bytes());
    std::vector<float> decoded(B * H * n_blocks * 64 * c.dim);
    for (int i = 0; i < B * H * n_blocks; ++i) {
      const int plane = static_cast<int>(i / n_blocks), first = static_cast<int>(i % n_blocks) * 64;
      const BlockPlace place{plane / H, plane % H, first};
      uint8_t* block = blocks.data() + i * s.block_bytes();
      codec->encode_block(Backend::reference, place,
                          x.wide.data() + (int64_t{plane} * c.n_tokens + first) * c.dim,
                          std::min(64, c.n_tokens - first), block);
      codec->decode_block(Backend::reference, place, block, 64, decoded.data() + i * 64 * c.dim,
                          c.dim);
    }
    const auto sketch =
        c.prod ? gaussian_sketch(c.dim, 9) : std::make_shared<const Sketch>(Sketch{{0}, {0}});
    const std::vector<int64_t> sketch_shape =
        c.prod ? std::vector<int64_t>{c.dim, c.dim} : std::vector<int64_t>{1};
    const std::vector<float> signs = rotation_signs(c.dim, 9);
    const std::vector<float> quantizers = quantizer_numbers(c.dim, s.bits, c.stages);
    metal::Call call = encode_blocks_call(s);
    const msl::Result got =
        msl::run(*call.kernel, call.launch,
                 {x.input({B, H, c.n_tokens, c.dim}), floats(signs, {2, c.dim}),
                  floats(quantizers, {c.stages, 16}), floats(sketch->columns, sketch_shape)});
    EXPECT_TRUE(same_bytes(got.outputs[0], blocks));
    call = decode_blocks_call(s);
    const msl::Result rows =
        msl::run(*call.kernel, call.launch,
                 {Input(Type::uint8, {B, H, n_blocks, s.block_bytes()}, blocks.data()),
                  floats(quantizers, {c.stages, 16}), floats(sketch->rows, sketch_shape)});
    EXPECT_TRUE(same_bytes(rows.outputs[0], decoded));
    EXPECT_LE(got.report.threadgroup_bytes, 24 * 1024);
  }
}

}  // namespace
}  // namespace veloxquant::turboquant
