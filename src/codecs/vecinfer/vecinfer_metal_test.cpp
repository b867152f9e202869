// VecInfer's Metal kernels on the MSL machine against the CPU: equal codes, equal bits.
#include <cmath>
#include <cstring>

#include "src/codecs/vecinfer/format.h"
#include "src/codecs/vecinfer/kernel_calls.h"
#include "src/math/float16.h"
#include "src/math/hadamard.h"
#include "tests/msl/support.h"
#include "tests/support/random.h"
#include "veloxquant/vecinfer_functions.h"

namespace veloxquant::vecinfer {
namespace {

using metal::Type;
using msl::dtype_of;
using msl::Input;
using msl::same_bytes;
using msl::Values;
using test::Random;

struct Case {
  int dim, sub_dim, n_centroids, table_heads, tables;
  Type type;
  int rows;
};

void PrintTo(const Case& c, std::ostream* out) {
  *out << "D" << c.dim << " d" << c.sub_dim << "x" << c.n_centroids << " tables " << c.table_heads
       << "x" << c.tables << " " << metal::type_name(c.type) << " rows " << c.rows;
}

RowShape shape_of(const Case& c, int heads) {
  RowShape s;
  s.planes = 2 * heads;
  s.heads = heads;
  s.rows = c.rows;
  s.dim = c.dim;
  s.sub_dim = c.sub_dim;
  s.n_centroids = c.n_centroids;
  s.table_heads = c.table_heads;
  s.tables = c.tables;
  return s;
}

// Sylvester's matrix with the scale of src/math/hadamard.h.
std::vector<float> walsh_hadamard(int dim) {
  std::vector<float> m(dim * dim);
  for (int i = 0; i < dim * dim; ++i) {
    m[i] = __builtin_parity((i / dim) & (i % dim)) ? -hadamard_scale(dim) : hadamard_scale(dim);
  }
  return m;
}

class VecInferFunctions : public ::testing::TestWithParam<Case> {
 protected:
  void check(const Case& c, uint64_t seed) {
    Random random(seed);
    const int heads = c.table_heads;
    const RowShape s = shape_of(c, heads);
    const int64_t B = 2, H = heads, S = c.rows, D = c.dim, M = s.n_subvectors();
    const int64_t C = c.n_centroids, d = c.sub_dim;
    std::vector<float> rows = random.normal(B * H * S * D);
    for (float& v : rows) {
      if (random.next() % 97 == 0) v = random.next() % 2 ? NAN : INFINITY;
      if (random.next() % 11 == 0) v = 0.0f;
    }
    const Values x(rows, c.type);
    std::vector<float> codebook = random.normal(c.table_heads * c.tables * C * d);
    std::copy_n(codebook.begin(), d, codebook.end() - d);  // a tie: the lower index wins
    const TensorView xv(x.data(), dtype_of(c.type), {B, H, S, D});
    const TensorView table(codebook.data(), DType::float32, {c.table_heads, c.tables, C, d});
    const Input x3(c.type, {B * H, S, D}, x.data());
    const Input tables(Type::float32, {c.table_heads, c.tables, C, d}, codebook.data());

    std::vector<int32_t> codes(B * H * S * M);
    vecinfer_quantize(Backend::reference, xv, table,
                      MutableTensorView(codes.data(), DType::int32, {B, H, S, M}));
    metal::Call call = quantize_call(s);
    EXPECT_TRUE(same_bytes(msl::run(*call.kernel, call.launch, {x3, tables}).outputs[0], codes));

    // Codes out of range read the last centroid.
    codes[0] = -1;
    codes[codes.size() - 1] = 1 << 20;
    const Values typed(codebook, c.type);
    const TensorView typed_table(typed.data(), dtype_of(c.type), {c.table_heads, c.tables, C, d});
    std::vector<uint8_t> decoded(B * H * S * D * metal::type_bytes(c.type));
    vecinfer_dequantize(TensorView(codes.data(), DType::int32, {B, H, S, M}), typed_table,
                        MutableTensorView(decoded.data(), dtype_of(c.type), {B, H, S, D}));
    call = dequantize_call(s, c.type);
    EXPECT_TRUE(same_bytes(msl::run(*call.kernel, call.launch,
                                    {Input(Type::int32, {B * H, S, M}, codes.data()),
                                     Input(c.type, {c.table_heads, c.tables, C, d}, typed.data())})
                               .outputs[0],
                           decoded));

    std::vector<uint8_t> lut(B * H * S * M * C * metal::type_bytes(c.type));
    vecinfer_query_lut(Backend::reference, xv, table,
                       MutableTensorView(lut.data(), dtype_of(c.type), {B, H, S, M, C}));
    call = query_lut_call(s, c.type);
    const auto got = msl::run(*call.kernel, call.launch, {x3, tables}).outputs[0];
    // NaNs have many bits; every other entry is equal.
    const int item = metal::type_bytes(c.type);
    for (size_t i = 0; i < lut.size(); i += item) {
      if (std::memcmp(&lut[i], &got[i], item) == 0) continue;
      uint32_t a = 0, b = 0;
      std::memcpy(&a, &lut[i], item);
      std::memcpy(&b, &got[i], item);
      const auto value = [&](uint32_t bits) {
        return item == 4                 ? float_of(bits)
               : c.type == Type::float16 ? f16_to_f32(static_cast<uint16_t>(bits))
                                         : bf16_to_f32(static_cast<uint16_t>(bits));
      };
      ASSERT_TRUE(std::isnan(value(a)) && std::isnan(value(b))) << "lut " << i / item;
    }
  }

  void check_round_trip(const Case& c, bool has_matrix, bool random_matrix, int lambda_rows,
                        uint64_t seed) {
    Random random(seed);
    const int heads = 3;
    RowShape s = shape_of(c, heads);
    const int64_t B = 2, H = heads, S = c.rows, D = c.dim, M = s.n_subvectors();
    const int64_t C = c.n_centroids, d = c.sub_dim;
    const Values x(random.normal(B * H * S * D), c.type);
    const std::vector<float> codebook = random.normal(c.table_heads * c.tables * C * d);
    const std::vector<float> matrix = random_matrix ? random.normal(D * D) : walsh_hadamard(c.dim);
    std::vector<float> lambda;
    for (int i = 0; i < lambda_rows * D; ++i) {
      lambda.push_back(i % 7 == 3 ? 0.0f : static_cast<float>(0.1 + 10 * random.uniform()));
    }
    std::vector<uint16_t> decoded(B * H * S * D);
    std::vector<int32_t> codes(B * H * S * M);
    vecinfer_encode_decode(
        Backend::reference, TensorView(x.data(), dtype_of(c.type), {B, H, S, D}),
        TensorView(codebook.data(), DType::float32, {c.table_heads, c.tables, C, d}),
        has_matrix ? TensorView(matrix.data(), DType::float32, {D, D}) : TensorView(),
        lambda_rows ? TensorView(lambda.data(), DType::float32, {lambda_rows, D}) : TensorView(),
        MutableTensorView(decoded.data(), DType::float16, {B, H, S, D}),
        MutableTensorView(codes.data(), DType::int32, {B, H, S, M}));

    const float none = 0;
    uint32_t flag = 0;
    if (has_matrix) {
      const metal::Call call = is_hadamard_call(c.dim);
      flag = msl::run(*call.kernel, call.launch, {Input(Type::float32, {D, D}, matrix.data())})
                 .output<uint32_t>(0)[0];
      EXPECT_EQ(flag, random_matrix ? 0u : 1u);
    }
    const metal::Call call = encode_decode_call(s, has_matrix, lambda_rows, Type::int32);
    const msl::Result got =
        msl::run(*call.kernel, call.launch,
                 {Input(c.type, {B, H, S, D}, x.data()),
                  Input(Type::float32, {c.table_heads, c.tables, C, d}, codebook.data()),
                  has_matrix ? Input(Type::float32, {D, D}, matrix.data())
                             : Input(Type::float32, {1}, &none),
                  Input(Type::uint32, {1}, &flag),
                  lambda_rows ? Input(Type::float32, {lambda_rows, D}, lambda.data())
                              : Input(Type::float32, {1}, &none)});
    EXPECT_TRUE(same_bytes(got.outputs[1], codes));
    EXPECT_TRUE(same_bytes(got.outputs[0], decoded));
  }
};

TEST_P(VecInferFunctions, EqualTheCpuBitForBit) { check(GetParam(), 5); }

INSTANTIATE_TEST_SUITE_P(Metal, VecInferFunctions,
                         ::testing::Values(Case{128, 4, 256, 1, 1, Type::float16, 19},
                                           Case{64, 8, 256, 2, 8, Type::float32, 5},
                                           Case{96, 2, 16, 3, 1, Type::bfloat16, 9},
                                           Case{80, 4, 64, 1, 20, Type::float32, 8},
                                           Case{256, 8, 300, 1, 1, Type::float16, 1},
                                           Case{24, 3, 5, 2, 8, Type::float16, 7},
                                           Case{128, 4, 4096, 1, 1, Type::float32, 2},
                                           Case{32, 1, 256, 1, 1, Type::bfloat16, 17}));

TEST_F(VecInferFunctions, EncodeAndDecodeWithTransforms) {
  check_round_trip({128, 4, 256, 1, 1, Type::float16, 11}, true, false, 1, 21);
  check_round_trip({64, 8, 256, 1, 8, Type::bfloat16, 8}, true, false, 3, 22);
  check_round_trip({64, 4, 16, 3, 1, Type::float32, 3}, true, true, 0, 23);
  check_round_trip({80, 4, 64, 1, 1, Type::float16, 9}, true, true, 1, 24);
  check_round_trip({96, 2, 64, 3, 48, Type::float32, 2}, false, false, 0, 25);
}

// Every width of codes, every transform: the bytes of encode_block, the values of decode_block.
TEST(MetalBlocks, BytesAndDecodedBitsEqualTheCpu) {
  struct Blocks {
    int dim, sub_dim, n_centroids;
    bool per_head;
    TransformKind kind;
  };
  for (const Blocks& c : {Blocks{64, 2, 16, true, TransformKind::hadamard},
                          Blocks{80, 4, 40, false, TransformKind::none},
                          Blocks{64, 8, 256, false, TransformKind::dense},
                          Blocks{96, 4, 700, true, TransformKind::hadamard},
                          Blocks{32, 4, 4000, true, TransformKind::none}}) {
    SCOPED_TRACE(testing::Message() << "D" << c.dim << " d" << c.sub_dim << "x" << c.n_centroids);
    Random random(31);
    const int H = 2, B = 2, n = 2;
    const auto owned = test::random_codec(random, Side::keys, H, c.dim, c.dim / c.sub_dim,
                                          c.n_centroids, c.per_head, c.kind);
    const Values x(random.normal(B * H * 64 * n * c.dim), Type::float16);
    BlockShape s;
    s.batch = B, s.heads = H, s.n_blocks = n, s.dim = c.dim, s.sub_dim = c.sub_dim;
    s.n_centroids = c.n_centroids, s.bits = code_bits(c.n_centroids);
    s.tables = c.per_head ? 1 : c.dim / c.sub_dim;
    s.transform = static_cast<int>(c.kind);
    ASSERT_EQ(s.block_bytes(), owned.codec->block_bytes());
    std::vector<uint8_t> blocks(B * H * n * s.block_bytes());
    std::vector<float> decoded(B * H * n * 64 * c.dim), rows(64 * c.dim);
    for (int i = 0; i < B * H * n; ++i) {
      const BlockPlace place{0, i / n % H, 0};
      for (int k = 0; k < 64 * c.dim; ++k) rows[k] = f16_to_f32(x.narrow[i * 64 * c.dim + k]);
      uint8_t* block = blocks.data() + i * s.block_bytes();
      owned.codec->encode_block(Backend::reference, place, rows.data(), 64, block);
      owned.codec->decode_block(Backend::reference, place, block, 64,
                                decoded.data() + i * 64 * c.dim, c.dim);
    }
    std::vector<float> forward = {0};
    std::vector<int64_t> forward_shape = {1};
    if (c.kind == TransformKind::hadamard) {
      forward.clear();
      for (float lambda : owned.scale) forward.push_back(1.0f / lambda);
      forward_shape = {H, c.dim};
    } else if (c.kind == TransformKind::dense) {
      forward = owned.encode_matrix;
      forward_shape = {H, c.dim, c.dim};
    }
    const Input tables(Type::float16, {1, H, s.tables, c.n_centroids, c.sub_dim},
                       owned.tables.data());
    metal::Call call = encode_blocks_call(s);
    EXPECT_TRUE(same_bytes(msl::run(*call.kernel, call.launch,
                                    {Input(Type::float16, {B, H, 64 * n, c.dim}, x.data()), tables,
                                     Input(Type::float32, forward_shape, forward.data())})
                               .outputs[0],
                           blocks));
    call = decode_blocks_call(s);
    EXPECT_TRUE(
        same_bytes(msl::run(*call.kernel, call.launch,
                            {Input(Type::uint8, {B, H, n, s.block_bytes()}, blocks.data()), tables})
                       .outputs[0],
                   decoded));
  }
}

// A product that is fused with the sum it goes into gives other codes: without the pragma of
// portable.h the kernel is caught.
TEST(Mutation, FusedMultiplyAddInEncodeChangesCodes) {
  Random random(3);
  const int S = 64, D = 64;
  const std::vector<float> x = random.normal(S * D);
  // Pairs of centroids one step of a float apart, so that rounding decides.
  std::vector<float> codebook = random.normal(128 * 4);
  for (int i = 0; i < 128 * 4; ++i) {
    codebook.push_back(i % 4 == 3 ? std::nextafter(codebook[i], 0.0f) : codebook[i]);
  }
  RowShape s;
  s.rows = S, s.dim = D, s.sub_dim = 4, s.n_centroids = 256;
  std::vector<int32_t> codes(S * 16);
  vecinfer_quantize(Backend::reference, TensorView(x.data(), DType::float32, {1, 1, S, D}),
                    TensorView(codebook.data(), DType::float32, {1, 1, 256, 4}),
                    MutableTensorView(codes.data(), DType::int32, {1, 1, S, 16}));
  const metal::Call call = quantize_call(s);
  const std::vector<Input> inputs = {Input(Type::float32, {1, S, D}, x.data()),
                                     Input(Type::float32, {1, 1, 256, 4}, codebook.data())};
  EXPECT_EQ(msl::run(*call.kernel, call.launch, inputs).output<int32_t>(0), codes);
  metal::Kernel fused = *call.kernel;
  const std::string pragma = "#pragma METAL fp contract(off)";
  fused.header.erase(fused.header.find(pragma), pragma.size());
  EXPECT_NE(msl::run(fused, call.launch, inputs).output<int32_t>(0), codes);
}

}  // namespace
}  // namespace veloxquant::vecinfer
