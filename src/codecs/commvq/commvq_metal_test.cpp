// CommVQ's and RoPE's Metal kernels on the MSL machine against the CPU, bit for bit: blocks of
// several heads and sequences, and the published look-up. conformance_metal_test has the forms of a
// block.
#include <numeric>

#include "src/codecs/commvq/kernel_calls.h"
#include "src/codecs/rope/kernel_calls.h"
#include "src/codecs/rope/kernels.h"
#include "tests/msl/support.h"
#include "tests/support/exact_random.h"
#include "tests/support/random.h"
#include "veloxquant/commvq.h"

namespace veloxquant::commvq {
namespace {

using metal::Type;
using msl::floats;
using msl::Input;
using msl::same_bytes;

TEST(MetalCommVQ, BlocksOfHeadsAndSequencesEqualTheCpu) {
  const int B = 2, H = 2, D = 32, P = D / 2, n = 100, stages = 3, entries = 40;
  test::ExactRandom random(9);
  RopeSpec spec;
  spec.head_dim = D, spec.attention_factor = 1.5f, spec.position_scale = 0.25f;
  for (int j = 0; j < 10; ++j) spec.inv_freq.push_back(1.0f / static_cast<float>(1 + j));
  const Rope rope(spec);
  const std::vector<uint16_t> codebook = random.halves(H * stages * entries * D);
  std::vector<float> weights, inverse;
  for (int i = 0; i < H * P; ++i) {
    weights.push_back(random.scale());
    inverse.push_back(1.0f / weights.back());
  }
  const TensorView book(codebook.data(), DType::float16, {H, stages, entries, 2, P});
  const CodecPtr codec =
      make_commvq_codec(H, rope, book, TensorView(weights.data(), DType::float32, {H, P}));
  BlockKernelShape s;
  s.batch = B, s.heads = H, s.n_tokens = n, s.dim = D, s.n_stages = stages, s.n_entries = entries;
  ASSERT_EQ(s.block_bytes(), codec->block_bytes());
  const int first = 1000;
  const msl::Values x(random.values(B * H * n * D), Type::bfloat16);
  std::vector<uint8_t> blocks(B * H * s.n_blocks() * s.block_bytes());
  std::vector<float> decoded(B * H * s.n_blocks() * 64 * D);
  for (int i = 0; i < B * H * s.n_blocks(); ++i) {
    const int plane = i / s.n_blocks(), at = i % s.n_blocks() * 64;
    const BlockPlace place{plane / H, plane % H, first + at};
    uint8_t* block = blocks.data() + i * s.block_bytes();
    codec->encode_block(Backend::reference, place, x.wide.data() + (plane * n + at) * D,
                        std::min(64, n - at), block);
    codec->decode_block(Backend::reference, place, block, 64, decoded.data() + i * 64 * D, D);
  }

  std::vector<int32_t> order;
  for (int h = 0; h < H; ++h) {
    for (int j = 0; j < P; ++j) order.push_back(j);
  }
  const std::vector<int32_t> slots = rope::slot_numbers(rope, order);
  rope::SlotShape r;
  r.batch = B, r.heads = H, r.n_tokens = n, r.dim = D, r.rotating = 10, r.planes = true;
  const auto turned = [&](RopeDirection direction, const Input& rows) {
    const bool back = direction == RopeDirection::forward;
    const rope::BlockTables t = rope::block_tables(rope, direction, first, s.n_blocks());
    const metal::Call call = back ? rope::from_slots_call(r) : rope::to_slots_call(r);
    return msl::run(
               *call.kernel, call.launch,
               {rows, Input(Type::int32, {H, P, 3}, slots.data()),
                floats(back ? inverse : weights, {H, P}), floats(t.cosines, {s.n_blocks(), 10, 64}),
                floats(t.sines, {s.n_blocks(), 10, 64})})
        .output<float>(0);
  };
  const std::vector<float> z = turned(RopeDirection::inverse, x.input({B, H, n, D}));
  const StageProducts products = stage_products(book);
  const Input tables(Type::float16, {H, stages, entries, 2, P}, codebook.data());
  metal::Call call = encode_blocks_call(s);
  const msl::Result got =
      msl::run(*call.kernel, call.launch,
               {floats(z, {B, H, n, D}), tables, floats(products.norms, {H, stages, 64}),
                floats(products.cross, {H, stages, 64, 64})});
  EXPECT_TRUE(same_bytes(got.outputs[0], blocks));
  call = decode_blocks_call(s);
  const std::vector<float> centres =
      msl::run(*call.kernel, call.launch,
               {Input(Type::uint8, {B, H, s.n_blocks(), s.block_bytes()}, blocks.data()), tables})
          .output<float>(0);
  r.n_tokens = 64 * s.n_blocks();
  const std::vector<float> y =
      turned(RopeDirection::forward, floats(centres, {B, H, r.n_tokens, D}));
  ASSERT_EQ(y.size(), decoded.size());
  EXPECT_EQ(std::memcmp(y.data(), decoded.data(), 4 * y.size()), 0);
}

TEST(MetalCommVQ, TheLookUpEqualsTheCpu) {
  struct Form {
    int n, stages, books, entries, sub_dim;
    Type type;
  };
  for (const Form& c : {Form{70, 1, 8, 16, 4, Type::float32}, Form{3, 3, 5, 7, 2, Type::float16},
                        Form{65, 2, 2, 200, 1, Type::bfloat16}}) {
    SCOPED_TRACE(testing::Message() << c.books << " books of " << c.entries);
    test::Random random(static_cast<uint64_t>(c.n));
    const int dims = c.books * c.sub_dim, pairs = dims / 2;
    std::vector<int32_t> indices(c.n * c.stages * c.books), positions(c.n);
    for (int32_t& i : indices) i = static_cast<int32_t>(random.next() % (c.entries + 2)) - 1;
    for (int32_t& p : positions) p = static_cast<int32_t>(random.next() % 100000) - 50;
    const msl::Values book(random.normal(c.stages * c.books * c.entries * c.sub_dim), c.type);
    std::vector<float> frequencies = random.normal(pairs);
    const DType dtype = msl::dtype_of(c.type);
    std::vector<uint8_t> want(c.n * dims * metal::type_bytes(c.type));
    comm_vq_decode(Backend::reference,
                   TensorView(indices.data(), DType::int32, {c.n, c.stages, c.books}),
                   TensorView(book.data(), dtype, {c.stages, c.books, c.entries, c.sub_dim}),
                   TensorView(positions.data(), DType::int32, {c.n}),
                   TensorView(frequencies.data(), DType::float32, {pairs}),
                   MutableTensorView(want.data(), dtype, {c.n, dims}));
    std::vector<float> cosines(c.n * pairs), sines(c.n * pairs);
    for (int t = 0; t < c.n; ++t) {
      std::vector<float> scaled(rope::kTokens, static_cast<float>(positions[t]));
      std::vector<float> tile(2 * pairs * rope::kTokens);
      rope::reference_kernels().tables(frequencies.data(), pairs, scaled.data(), 1.0, tile.data(),
                                       tile.data() + pairs * rope::kTokens);
      for (int j = 0; j < pairs; ++j) {
        cosines[t * pairs + j] = tile[j * rope::kTokens];
        sines[t * pairs + j] = tile[(pairs + j) * rope::kTokens];
      }
    }
    const metal::Call call = look_up_call(c.n, c.books, c.sub_dim, c.type);
    const msl::Result got = msl::run(*call.kernel, call.launch,
                                     {Input(Type::int32, {c.n, c.stages, c.books}, indices.data()),
                                      book.input({c.stages, c.books, c.entries, c.sub_dim}),
                                      floats(cosines, {c.n, pairs}), floats(sines, {c.n, pairs})});
    EXPECT_TRUE(same_bytes(got.outputs[0], want));
  }
}

}  // namespace
}  // namespace veloxquant::commvq
