// Metal's kernels as CUDA: the text that MLX would hand to NVRTC compiles, for every kernel there
// is. Needs libnvrtc (of any CUDA toolkit), no GPU. What they compute is proven on one:
// tools/gpu/mlx.sh.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "src/attention/kernel_calls.h"
#include "src/attention/rvq_calls.h"
#include "src/backends/metal/cuda_text.h"
#include "src/cache/kernel_calls.h"
#include "src/codecs/commvq/kernel_calls.h"
#include "src/codecs/exact/kernel_calls.h"
#include "src/codecs/kernel_calls.h"
#include "src/codecs/qjl/kernel_calls.h"
#include "src/codecs/rabitq/kernel_calls.h"
#include "src/codecs/rope/kernel_calls.h"
#include "src/codecs/turboquant/kernel_calls.h"
#include "src/codecs/vecinfer/kernel_calls.h"
#include "tests/support/nvrtc.h"

namespace veloxquant::metal {
namespace {

using testing::HasSubstr;

const char* cuda_type(Type type) {
  if (type == Type::float16) return "__half";
  if (type == Type::bfloat16) return "__nv_bfloat16";
  return type_name(type);
}

// As MLX 0.32 writes it (mlx/backend/cuda/custom_kernel.cpp). Of its headers only what the text
// needs: the whole of them takes NVRTC two seconds a kernel.
std::string mlx_cuda_source(const Kernel& kernel, const Launch& launch,
                            const std::vector<ArrayShape>& inputs) {
  std::string text = R"(
#include <cuda_bf16.h>
#include <cuda_fp16.h>
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef int int32_t;
typedef long long int64_t;
namespace mlx::core::cu {
template <class T> struct Numbers { T of[10]; const T& operator[](int i) const { return of[i]; } };
using Shape = Numbers<int32_t>;
using Strides = Numbers<int64_t>;
}
)" + kernel.header + "namespace mlx::core::cu {\n__global__ void kernel(\n";
  EXPECT_EQ(inputs.size(), kernel.inputs.size()) << kernel.name;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const std::string& name = kernel.inputs[i];
    auto has = [&](const char* suffix) {
      return kernel.body.find(name + suffix) != std::string::npos;
    };
    text += std::string("    const ") + cuda_type(inputs[i].type) + "* " + name + ",\n";
    if (has("_shape")) text += "    const __grid_constant__ Shape " + name + "_shape,\n";
    if (has("_strides")) text += "    const __grid_constant__ Strides " + name + "_strides,\n";
    if (has("_ndim")) text += "    const __grid_constant__ int " + name + "_ndim,\n";
  }
  for (size_t i = 0; i < launch.outputs.size(); ++i) {
    text += std::string("    ") + cuda_type(launch.outputs[i].type) + "* " + kernel.outputs[i] +
            (i + 1 < launch.outputs.size() ? ",\n" : ") {\n");
  }
  for (const TemplateArgument& a : launch.arguments) {
    if (const int* n = std::get_if<int>(&a.value)) {
      text += "  constexpr int " + a.name + " = " + std::to_string(*n) + ";\n";
    } else if (const bool* b = std::get_if<bool>(&a.value)) {
      text += "  constexpr bool " + a.name + " = " + (*b ? "true" : "false") + ";\n";
    } else {
      text += "  using " + a.name + " = " + cuda_type(std::get<Type>(a.value)) + ";\n";
    }
  }
  return text + kernel.body + "\n}\n}\n";
}

#if defined(VELOXQUANT_NVRTC)
void expect_compiles(const Call& call, std::vector<ArrayShape> inputs) {
  ASSERT_FALSE(no_cuda_launch_because(*call.kernel, call.launch)) << call.kernel->name;
  const Kernel cuda = cuda_kernel_of(*call.kernel);
  if (threads_are_single(*call.kernel)) inputs.push_back({Type::int32, {3}});
  EXPECT_EQ(test::Nvrtc::get()->errors(
                mlx_cuda_source(cuda, call.launch, inputs),
                {"--device-as-default-execution-space", "--gpu-architecture=sm_90a",
                 "--include-path=" VELOXQUANT_CUDA_INCLUDE}),
            "")
      << call.kernel->name;
}

class CudaText : public testing::Test {
  void SetUp() override {
    if (test::Nvrtc::get() == nullptr)
      GTEST_SKIP() << "NOT TESTED: no libnvrtc at " VELOXQUANT_NVRTC;
  }
};

TEST_F(CudaText, WordsAndScoresCompile) {
  expect_compiles(pack_words_call(3, 37, 3), {{Type::uint8, {3, 37}}});
  expect_compiles(unpack_words_call(3, 37, 3), {{Type::uint32, {3, 4}}});
  expect_compiles(
      hamming_score_call(300, 61),
      {{Type::uint8, {8}}, {Type::uint8, {300, 8}}, {Type::float32, {300}}, {Type::float32, {1}}});
}

TEST_F(CudaText, VecInferCompiles) {
  for (Type type : {Type::float32, Type::float16, Type::bfloat16}) {
    vecinfer::RowShape s;
    s.planes = 2, s.rows = 9, s.dim = 96, s.sub_dim = 4, s.n_centroids = 64;
    const ArrayShape x{type, {2, 9, 96}}, table{Type::float32, {1, 1, 64, 4}};
    const ArrayShape one{Type::float32, {1}};
    expect_compiles(vecinfer::quantize_call(s), {x, table});
    expect_compiles(vecinfer::dequantize_call(s, type),
                    {{Type::int32, {2, 9, 24}}, {type, {1, 1, 64, 4}}});
    expect_compiles(vecinfer::query_lut_call(s, type), {x, table});
    expect_compiles(
        vecinfer::encode_decode_call(s, true, 1, Type::int32),
        {x, table, {Type::float32, {96, 96}}, {Type::uint32, {1}}, {Type::float32, {1, 96}}});
    expect_compiles(vecinfer::encode_decode_call(s, false, 0, Type::uint32),
                    {x, table, one, {Type::uint32, {1}}, one});
  }
  expect_compiles(vecinfer::is_hadamard_call(96), {{Type::float32, {96, 96}}});
  for (int transform : {0, 1, 2}) {
    vecinfer::BlockShape b;
    b.batch = 2, b.heads = 2, b.n_blocks = 3, b.dim = 64, b.sub_dim = 4;
    b.n_centroids = transform == 0 ? 4000 : 256, b.bits = transform == 0 ? 12 : 8;
    b.transform = transform;
    const ArrayShape tables{Type::float16, {1, 2, 1, b.n_centroids, 4}};
    expect_compiles(vecinfer::encode_blocks_call(b),
                    {{Type::float16, {2, 2, 192, 64}}, tables, {Type::float32, {2, 64, 64}}});
    expect_compiles(vecinfer::decode_blocks_call(b),
                    {{Type::uint8, {2, 2, 3, b.block_bytes()}}, tables});
  }
}

TEST_F(CudaText, ScalarCodecsCompile) {
  const ArrayShape signs{Type::float32, {2, 80}}, quantizers{Type::float32, {2, 16}},
      one{Type::float32, {1}}, square{Type::float32, {80, 80}};
  const turboquant::RowShape rows{19, 80, 3, ScalarScale::norm_corrected, true};
  const ArrayShape words{Type::uint32, {19, 8}}, scalars{Type::float16, {19}};
  expect_compiles(turboquant::quantize_call(rows), {{Type::bfloat16, {19, 80}}, signs, quantizers});
  expect_compiles(turboquant::dequantize_call(rows, Type::bfloat16),
                  {words, scalars, signs, quantizers});
  expect_compiles(turboquant::nearest_call(99, 8), {{Type::float16, {99}}, {Type::float32, {8}}});
  expect_compiles(turboquant::hadamard_nearest_call(19, 64, 8),
                  {{Type::float32, {19, 64}}, {Type::float32, {64}}, {Type::float32, {8}}});
  expect_compiles(turboquant::centroids_call(99, 8), {{Type::uint8, {99}}, {Type::float32, {8}}});
  for (bool prod : {false, true}) {
    turboquant::BlockKernelShape b;
    b.batch = 2, b.heads = 2, b.n_tokens = 130, b.dim = 80, b.bits = 2;
    b.stages = prod ? 1 : 2, b.prod = prod, b.by_token = prod;
    expect_compiles(turboquant::encode_blocks_call(b),
                    {{Type::float16, {2, 2, 130, 80}}, signs, quantizers, prod ? square : one});
    expect_compiles(turboquant::decode_blocks_call(b),
                    {{Type::uint8, {2, 2, 3, b.block_bytes()}}, quantizers, prod ? square : one});
  }
}

TEST_F(CudaText, RabitqCompiles) {
  const ArrayShape signs{Type::float32, {2, 80}};
  expect_compiles(rabitq::encode_rows_call(19, 80), {{Type::float32, {19, 80}}, signs});
  for (bool mean : {false, true}) {
    rabitq::BlockKernelShape b;
    b.batch = 2, b.heads = 2, b.n_tokens = 130, b.dim = 80, b.bits = mean ? 3 : 1, b.mean = mean;
    const ArrayShape means{Type::float32, {mean ? 2 : 1, mean ? 80 : 1}};
    expect_compiles(rabitq::encode_blocks_call(b),
                    {{Type::float16, {2, 2, 130, 80}}, signs, means});
    expect_compiles(rabitq::decode_blocks_call(b),
                    {{Type::uint8, {2, 2, 3, b.block_bytes()}}, means});
  }
}

TEST_F(CudaText, QjlAndPopcountScoresCompile) {
  expect_compiles(qjl::encode_rows_call(19, 80, 160),
                  {{Type::float32, {19, 80}}, {Type::float32, {160, 80}}});
  expect_compiles(qjl::inner_product_call(2, 6, 2, 300), {{Type::float32, {2, 6, 160}},
                                                          {Type::uint8, {2, 300, 2, 20}},
                                                          {Type::float32, {2, 300, 2}},
                                                          {Type::float32, {1}}});
  expect_compiles(rabitq::popcount_queries_call(6, 80, 4),
                  {{Type::float32, {6, 80}}, {Type::float32, {2, 80}}});
  expect_compiles(rabitq::popcount_scores_call(6, 3, 300, 80), {{Type::uint8, {6, 4, 10}},
                                                                {Type::float32, {6, 4}},
                                                                {Type::uint8, {2, 300, 10}},
                                                                {Type::float32, {2, 300}}});
  for (int outliers : {0, 3}) {
    qjl::BlockKernelShape b;
    b.batch = 2, b.heads = 2, b.n_tokens = 130, b.dim = 80, b.outliers = outliers;
    b.layout.m = 160, b.layout.m_out = outliers > 0 ? 80 : 0, b.layout.n_channels = outliers;
    const ArrayShape sketch{Type::float32, {3, 2, 80}}, channels{Type::int32, {1}};
    expect_compiles(qjl::encode_blocks_call(b),
                    {{Type::float16, {2, 2, 130, 80}}, sketch, channels});
    expect_compiles(
        qjl::decode_blocks_call(b),
        {{Type::uint8, {2, 2, 3, b.layout.bytes()}}, sketch, channels, {Type::float32, {2}}});
  }
}

TEST_F(CudaText, CommVQAndRopeCompile) {
  commvq::BlockKernelShape b;
  b.batch = 2, b.heads = 2, b.n_tokens = 130, b.dim = 80, b.n_stages = 3, b.n_entries = 64;
  const ArrayShape book{Type::float16, {2, 3, 64, 2, 40}}, z{Type::float32, {2, 2, 192, 80}};
  expect_compiles(commvq::encode_blocks_call(b), {{Type::float32, {2, 2, 130, 80}},
                                                  book,
                                                  {Type::float32, {2, 3, 64}},
                                                  {Type::float32, {2, 3, 64, 64}}});
  expect_compiles(commvq::decode_blocks_call(b), {{Type::uint8, {2, 2, 3, b.block_bytes()}}, book});
  expect_compiles(commvq::look_up_call(9, 8, 4, Type::bfloat16), {{Type::int32, {9, 2, 8}},
                                                                  {Type::bfloat16, {2, 8, 16, 4}},
                                                                  {Type::float32, {9, 16}},
                                                                  {Type::float32, {9, 16}}});
  rope::SlotShape r;
  r.batch = r.heads = 2, r.n_tokens = 192, r.dim = 80, r.rotating = 20;
  const ArrayShape slots{Type::int32, {2, 40, 3}}, weights{Type::float32, {2, 40}},
      table{Type::float32, {3, 20, 64}};
  expect_compiles(rope::to_slots_call(r),
                  {{Type::float16, {2, 2, 192, 80}}, slots, weights, table, table});
  expect_compiles(rope::from_slots_call(r), {z, slots, weights, table, table});
}

TEST_F(CudaText, RvqAttendCompiles) {
  attention::RvqShape s{1, 2, 3, 2, 64, 200, 4, 16, 16, 4, 256};
  s.norms = s.mask = true;
  const ArrayShape codes{Type::uint8, {1, 2, 200, 64}}, q{Type::float32, {1, 6, 2, 64}};
  expect_compiles(attention::rvq_pass_call(s, 4), {q,
                                                   codes,
                                                   codes,
                                                   {Type::uint8, {1, 2, 200, 16}},
                                                   {Type::float32, {4}},
                                                   {Type::float32, {16}},
                                                   {Type::float32, {256, 4}},
                                                   {Type::float32, {1, 2, 200}},
                                                   {Type::int32, {4, 6}},
                                                   {Type::int32, {2, 4}},
                                                   {Type::float32, {2}},
                                                   {Type::float32, {1, 6, 2, 200}}});
}

TEST_F(CudaText, TilesOfOtherCodecsCompile) {
  const ArrayShape q{Type::float16, {1, 6, 2, 64}}, exact{Type::float16, {1, 2, 132, 64}};
  for (int stages : {0, 1, 2}) {  // 0: bit planes
    attention::DecodeShape s;
    s.batch = 1, s.n_kv_heads = 2, s.group = 3, s.n_queries = 2, s.head_dim = 64;
    s.keys.bits = s.values.bits = 2, s.keys.stages = s.values.stages = stages;
    s.keys.kind = s.values.kind =
        stages == 0 ? attention::TileKind::planes : attention::TileKind::scalar;
    s.values.by_token = stages > 0, s.values.mean = stages == 0;
    s.n_spans = s.n_exact = 1, s.key_transform = s.value_transform = 3, s.out = Type::float16;
    const ArrayShape span{Type::uint8, {1, 2, 4, 2304}}, signs{Type::float32, {2, 64}};
    const ArrayShape levels{Type::float32, {stages, 16}};
    expect_compiles(attention::first_pass_call(s, 4),
                    {q,
                     {Type::int32, {4, 6}},
                     {Type::int32, {2, 4}},
                     {Type::float32, {2}},
                     signs,
                     stages > 0 ? levels : ArrayShape{Type::float32, {1}},
                     stages > 0 ? levels : ArrayShape{Type::float32, {129}},
                     span,
                     span,
                     exact,
                     exact});
    expect_compiles(attention::second_pass_call(s), {{Type::float32, {1, 2, 4, 6, 64}},
                                                     {Type::float32, {1, 2, 4, 6, 2}},
                                                     {Type::int32, {3}},
                                                     {Type::float32, {6}},
                                                     signs});
    s.keys.n_rows = 128;
    expect_compiles(attention::turn_queries_call(s, 1), {q, {Type::float32, {1, 64, 128}}});
  }
}

// Tiles that do more than look up, for few queries and for a chunk.
TEST_F(CudaText, TilesOfTheRestAndPrefillCompile) {
  using attention::TileKind;
  for (int n_queries : {2, 20}) {
    for (TileKind kind :
         {TileKind::vecinfer, TileKind::scalar, TileKind::halves, TileKind::sketched,
          TileKind::outliers, TileKind::pairs, TileKind::commvq}) {
      attention::DecodeShape s;
      s.batch = 1, s.n_kv_heads = 2, s.group = 3, s.n_queries = n_queries, s.head_dim = 64;
      s.keys = {4, 256, 8, 1};
      s.keys.kind = kind;
      if (kind == TileKind::commvq) s.keys.stages = 3, s.keys.n_centroids = 64;
      if (kind == TileKind::sketched || kind == TileKind::scalar) s.keys.bits = 2;
      if (kind == TileKind::outliers) {
        s.keys.bits = 64, s.keys.m_out = 64, s.keys.outliers = 3, s.keys.n_rows = 128;
      }
      if (kind == TileKind::sketched) s.keys.n_rows = 128;
      const bool turned = s.keys.turned() || s.keys.n_rows > 0,
                 same = kind == TileKind::sketched || kind == TileKind::halves;
      s.values = same ? s.keys : attention::CodeFormat{4, 256, 8, 1};
      s.values.n_rows = 0, s.values.by_token = true;
      s.n_spans = 2, s.n_exact = 2;
      s.key_transform = turned ? 2 : kind == TileKind::scalar ? 3 : 1;
      s.value_transform = kind == TileKind::sketched ? 3 : 1;
      const bool half_keys = kind == TileKind::vecinfer || s.keys.turned();
      const ArrayShape q{Type::float16, {1, 6, n_queries, 64}};
      const ArrayShape span{Type::uint8, {1, 2, 4, 9999}}, numbers{Type::float32, {9999}};
      const ArrayShape halves{Type::float16, {1, 2, 1, 256, 4}};
      std::vector<ArrayShape> inputs{q};
      if (turned) inputs.push_back({Type::float32, {1, 6, n_queries, s.key_rows()}});
      inputs.insert(inputs.end(), {{Type::int32, {4, 6}},
                                   {Type::int32, {n_queries, 4}},
                                   {Type::float32, {2}},
                                   numbers,
                                   half_keys ? halves : numbers,
                                   same ? numbers : halves,
                                   span,
                                   span,
                                   span,
                                   span,
                                   q,
                                   q,
                                   q,
                                   q});
      expect_compiles(attention::first_pass_call(s, 4), inputs);
      expect_compiles(attention::second_pass_call(s),
                      {numbers, numbers, {Type::int32, {3}}, {Type::float32, {6}}, numbers});
    }
  }
  const ArrayShape rows{Type::float32, {1, 2, 64, 80}}, numbers{Type::float32, {2, 80, 80}};
  for (int transform = 0; transform < 4; ++transform) {
    expect_compiles(inverse_rows_call(1, 2, 64, 80, transform, Type::bfloat16), {rows, numbers});
  }
  exact::BlockKernelShape blocks;
  blocks.heads = 2, blocks.n_tokens = 64, blocks.dim = 80;
  for (bool bfloat : {false, true}) {
    blocks.bfloat = bfloat;
    expect_compiles(exact::encode_blocks_call(blocks), {rows});
    expect_compiles(exact::decode_blocks_call(blocks), {{Type::uint8, {1, 2, 1, 128 * 80}}});
  }
}

TEST_F(CudaText, AppendCompiles) {
  for (int n : {1, 200}) {  // without a block to seal, and with one
    CacheGeometry geometry(64, 4);
    geometry.length = 50;
    const AppendPlan plan = geometry.plan_append(n);
    const ArrayShape fresh{Type::float32, {1, 2, n, 80}}, exact{Type::bfloat16, {1, 2, 132, 80}};
    expect_compiles(append_call({1, 2, 80, Type::bfloat16}, geometry, plan),
                    {fresh, fresh, exact, exact, {Type::int32, {2, 2}}, {Type::int32, {8}}});
  }
}

TEST_F(CudaText, DecodeAttentionCompiles) {
  for (bool full : {false, true}) {
    attention::DecodeShape s;
    s.batch = 1, s.n_kv_heads = 2, s.group = 3, s.n_queries = 2, s.head_dim = 64;
    s.keys = {4, 256, 8, 1}, s.values = {2, 16, 4, 32};
    s.n_spans = 2, s.n_exact = 2, s.softcap = full, s.mask = full, s.bfloat_cache = full;
    s.key_transform = s.value_transform = full ? 2 : 1;
    s.out = full ? Type::bfloat16 : Type::float16;
    const ArrayShape q{s.out, {1, 6, 2, 64}}, span{Type::uint8, {1, 2, 4, 1024}};
    const ArrayShape tables{Type::float16, {1, 2, 1, 256, 4}};
    const ArrayShape exact{full ? Type::bfloat16 : Type::float16, {1, 2, 132, 64}};
    std::vector<ArrayShape> inputs{q};
    if (full) inputs.push_back({Type::float32, {1, 6, 2, 64}});
    inputs.insert(inputs.end(),
                  {{Type::int32, {4, 6}}, {Type::int32, {2, 4}}, {Type::float32, {2}}});
    inputs.insert(inputs.end(),
                  {{Type::float32, {2, 64}}, tables, {Type::float16, {1, 2, 32, 16, 2}}});
    inputs.insert(inputs.end(), {span, span, span, span, exact, exact, q, q});
    if (full) inputs.push_back({Type::float32, {1, 6, 2, 300}});
    expect_compiles(attention::first_pass_call(s, 4), inputs);
    expect_compiles(attention::second_pass_call(s), {{Type::float32, {1, 2, 4, 6, 64}},
                                                     {Type::float32, {1, 2, 4, 6, 2}},
                                                     {Type::int32, {3}},
                                                     {Type::float32, {6}},
                                                     {Type::float32, {2, 64, 64}}});
  }
}
#else
TEST(CudaText, Compiles) { GTEST_SKIP() << "NOT TESTED: CMake found no libnvrtc"; }
#endif

TEST(CudaGrid, SingleThreadsAreOneRowAndTheRestLeave) {
  const Call call = pack_words_call(70000, 37, 3);
  ASSERT_TRUE(threads_are_single(*call.kernel));
  const Kernel cuda = cuda_kernel_of(*call.kernel);
  EXPECT_EQ(cuda.name, call.kernel->name);
  EXPECT_EQ(cuda.inputs.back(), kGridInput);
  EXPECT_THAT(cuda.body, HasSubstr("return;"));
  EXPECT_THAT(cuda.body, HasSubstr(call.kernel->body));
  EXPECT_THAT(cuda.header, HasSubstr(call.kernel->header));
  const CudaGrid grid = cuda_grid_of(*call.kernel, call.launch);
  EXPECT_EQ(grid.grid[0], (4 * 70000 + 255) / 256 * 256);
  EXPECT_EQ(grid.grid[1], 1);
  EXPECT_FALSE(no_cuda_launch_because(*call.kernel, call.launch));
  const Call large = pack_words_call(1 << 30, 37, 3);
  EXPECT_THAT(*no_cuda_launch_because(*large.kernel, large.launch), HasSubstr("more threads"));
}

TEST(CudaGrid, ThreadgroupsStayAsTheyAre) {
  vecinfer::RowShape s;
  s.planes = 3, s.rows = 9, s.dim = 64, s.sub_dim = 4, s.n_centroids = 16;
  const Call call = vecinfer::quantize_call(s);
  ASSERT_FALSE(threads_are_single(*call.kernel));
  const Kernel cuda = cuda_kernel_of(*call.kernel);
  EXPECT_EQ(cuda.inputs, call.kernel->inputs);
  EXPECT_THAT(cuda.body, HasSubstr("const uint3 threadgroup_position_in_grid = {blockIdx.x"));
  EXPECT_THAT(cuda.body, Not(HasSubstr("const uint3 threadgroups_per_grid")));
  EXPECT_EQ(cuda_grid_of(*call.kernel, call.launch).grid, call.launch.grid);
  s.planes = 65536;
  const Call many = vecinfer::quantize_call(s);
  EXPECT_THAT(*no_cuda_launch_because(*many.kernel, many.launch), HasSubstr("65535"));
}

}  // namespace
}  // namespace veloxquant::metal
