// RaBitQ's Metal kernels on the MSL machine against the CPU: equal codes, bytes and decoded bits.
#include <algorithm>
#include <cmath>

#include "src/codecs/rabitq/kernel_calls.h"
#include "src/codecs/rotation.h"
#include "src/codecs/turboquant/kernel_calls.h"
#include "tests/msl/support.h"
#include "tests/support/codec_cases.h"
#include "tests/support/random.h"

namespace veloxquant::rabitq {
namespace {

using metal::Type;
using msl::floats;
using msl::Input;
using msl::same_bytes;
using msl::Values;

TEST(MetalRabitqBlocks, BytesAndDecodedBitsEqualTheCpu) {
  struct Form {
    int dim, bits;
    RabitqScale scale;
    bool mean;
    int n_tokens;
    Type type;
  };
  for (const Form& c : {Form{128, 1, RabitqScale::unbiased, false, 64, Type::float16},
                        Form{80, 2, RabitqScale::reconstruction, true, 100, Type::bfloat16},
                        Form{64, 3, RabitqScale::norm, false, 65, Type::float32},
                        Form{8, 4, RabitqScale::unbiased, true, 128, Type::float32},
                        Form{256, 4, RabitqScale::reconstruction, false, 63, Type::float16}}) {
    SCOPED_TRACE(testing::Message() << "D" << c.dim << ", " << c.bits << " bits");
    const int B = 2, H = 2;
    test::ExactRandom random(static_cast<uint64_t>(c.dim));
    std::vector<float> mean = random.values(H * c.dim);
    RabitqOptions options;
    options.bits = c.bits, options.scale = c.scale, options.seed = 3;
    if (c.mean) options.mean = TensorView(mean.data(), DType::float32, {H, c.dim});
    const CodecPtr codec = make_rabitq_codec(Side::keys, H, c.dim, options);
    const Rotation rotation(c.dim, options.seed);
    rotation.forward(Backend::reference, mean.data(), H);  // what the kernel subtracts
    if (!c.mean) mean = {0};
    BlockKernelShape s;
    s.batch = B, s.heads = H, s.n_tokens = c.n_tokens, s.dim = c.dim, s.bits = c.bits;
    s.scale = c.scale, s.mean = c.mean;
    ASSERT_FALSE(no_kernel_because(s));
    ASSERT_EQ(s.block_bytes(), codec->block_bytes());
    const Values x(test::case_rows(random, int64_t{B} * H * c.n_tokens, c.dim), c.type);
    const int n_blocks = s.n_blocks();
    std::vector<uint8_t> blocks(B * H * n_blocks * s.block_bytes());
    std::vector<float> decoded(B * H * n_blocks * 64 * c.dim);
    for (int i = 0; i < B * H * n_blocks; ++i) {
      const int plane = i / n_blocks, first = i % n_blocks * 64;
      const BlockPlace place{plane / H, plane % H, first};
      uint8_t* block = blocks.data() + i * s.block_bytes();
      codec->encode_block(Backend::reference, place,
                          x.wide.data() + (int64_t{plane} * c.n_tokens + first) * c.dim,
                          std::min(64, c.n_tokens - first), block);
      codec->decode_block(Backend::reference, place, block, 64, decoded.data() + i * 64 * c.dim,
                          c.dim);
    }
    const std::vector<float> signs(rotation.signs(), rotation.signs() + 2 * c.dim);
    const Input means =
        floats(mean, c.mean ? std::vector<int64_t>{H, c.dim} : std::vector<int64_t>{1});
    metal::Call call = encode_blocks_call(s);
    EXPECT_TRUE(
        same_bytes(msl::run(*call.kernel, call.launch,
                            {x.input({B, H, c.n_tokens, c.dim}), floats(signs, {2, c.dim}), means})
                       .outputs[0],
                   blocks));
    call = decode_blocks_call(s);
    EXPECT_TRUE(same_bytes(
        msl::run(*call.kernel, call.launch,
                 {Input(Type::uint8, {B, H, n_blocks, s.block_bytes()}, blocks.data()), means})
            .outputs[0],
        decoded));
  }
}

TEST(MetalRabitqRows, CodesAndFactorsEqualTheCpu) {
  test::Random random(4);
  for (int dim : {8, 96, 128, 1024}) {
    const int n = dim == 1024 ? 3 : 21;
    std::vector<float> x = random.normal(int64_t{n} * dim);
    x[3] = NAN, x[dim + 1] = INFINITY, x[dim + 5] = -0.0f;
    std::fill_n(x.begin() + 2 * dim, dim, 0.0f);
    std::vector<uint8_t> codes(n * dim / 8);
    std::vector<float> factors(n);
    rabitq_encode(Backend::reference, x.data(), n, dim, 6, codes.data(), factors.data());
    const Rotation rotation(dim, 6);
    const std::vector<float> signs(rotation.signs(), rotation.signs() + 2 * dim);
    const metal::Call call = encode_rows_call(n, dim);
    const msl::Result got =
        msl::run(*call.kernel, call.launch, {floats(x, {n, dim}), floats(signs, {2, dim})});
    EXPECT_TRUE(same_bytes(got.outputs[0], codes)) << dim;
    EXPECT_TRUE(same_bytes(got.outputs[1], factors)) << dim;
  }
}

TEST(MetalRabitqScores, PopcountScoresEqualTheCpu) {
  struct Scores {
    int heads, group, n, dim, bits;
  };
  for (const Scores& c : {Scores{2, 3, 70, 128, 4}, Scores{1, 1, 5, 80, 8}, Scores{3, 2, 300, 8, 1}}) {
    SCOPED_TRACE(testing::Message() << "D" << c.dim << ", queries of " << c.bits << " bits");
    test::Random random(static_cast<uint64_t>(c.dim));
    const int rows = c.heads * c.group;
    std::vector<float> q = random.normal(rows * c.dim);
    std::fill_n(q.begin(), c.dim, 0.0f);  // every integer is 0
    if (rows > 1) q[c.dim + 3] = NAN;
    if (rows > 2) q[2 * c.dim + 1] = INFINITY;
    std::vector<uint8_t> codes(c.heads * c.n * c.dim / 8);
    for (uint8_t& byte : codes) byte = static_cast<uint8_t>(random.next());
    const std::vector<float> factors = random.normal(c.heads * c.n);
    std::vector<float> rotated = q, want(rows * c.n);
    rabitq_rotate(Backend::reference, rotated.data(), rows, c.dim, 9);
    for (int r = 0; r < rows; ++r) {
      const float* row = rotated.data() + r * c.dim;
      if (!std::all_of(row, row + c.dim, [](float v) { return std::isfinite(v); })) {
        std::fill_n(want.begin() + r * c.n, c.n, NAN);
        continue;
      }
      const int keys = r / c.group * c.n;
      popcount_score(Backend::reference, quantize_popcount_query(row, c.dim, c.bits),
                     codes.data() + keys * (c.dim / 8), c.n, factors.data() + keys,
                     want.data() + r * c.n);
    }
    const std::vector<float> signs = turboquant::rotation_signs(c.dim, 9);
    metal::Call call = popcount_queries_call(rows, c.dim, c.bits);
    const msl::Result queries = msl::run(*call.kernel, call.launch,
                                         {floats(q, {rows, c.dim}), floats(signs, {2, c.dim})});
    call = popcount_scores_call(rows, c.group, c.n, c.dim);
    const msl::Result got = msl::run(
        *call.kernel, call.launch,
        {Input(Type::uint8, {rows, c.bits, c.dim / 8}, queries.outputs[0].data()),
         Input(Type::float32, {rows, 4}, queries.outputs[1].data()),
         Input(Type::uint8, {c.heads, c.n, c.dim / 8}, codes.data()),
         floats(factors, {c.heads, c.n})});
    EXPECT_TRUE(same_bytes(got.outputs[0], want));
  }
}

}  // namespace
}  // namespace veloxquant::rabitq
