// The general CUDA path before it reaches a device: what it refuses, which kernels take a call, how
// much scratch it wants. What the kernels compute: ragged_metal_test, placed_metal_test.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "src/attention/cuda_general_call.h"
#include "tests/support/ragged_problem.h"

namespace veloxquant::cuda {
namespace {

using test::ragged_codec;
using testing::HasSubstr;

// Pointers are looked at, never followed.
void* device(int64_t at = 4096) { return reinterpret_cast<void*>(at); }

BlockSide side_of(const GpuCodec& codec) {
  BlockSide side;
  side.codec = codec;
  side.blob = device();
  side.blocks = static_cast<uint8_t*>(device());
  side.block_stride = codec.block_bytes();
  side.head_stride = 16 * side.block_stride;
  side.sequence_stride = 2 * side.head_stride;
  return side;
}

GpuCodec codec_of(const char* method, const char* what, Side side, int dim = 128) {
  const test::CasePtr one = ragged_codec(method, what, side, dim);
  return prepare_codec(one->spec(), one->tables());
}

AttendArgs call(const GpuCodec& keys, const GpuCodec& values) {
  AttendArgs args;
  args.batch = 3;
  args.n_q_heads = 8;
  args.keys = side_of(keys);
  args.values = side_of(values);
  args.n_packed = args.n_exact = static_cast<int32_t*>(device());
  args.max_packed = 1000;
  args.max_exact = 132;
  args.sinks = 4;
  args.exact_keys = args.exact_values = {device(), 2 * 132 * 128, 132 * 128, 128};
  args.q = args.out = device();
  return args;
}

AttendArgs turboquant() {
  return call(codec_of("turboquant", "2", Side::keys), codec_of("turboquant", "4", Side::values));
}

std::string refused(const std::function<void(AttendArgs&)>& change) {
  AttendArgs args = turboquant();
  change(args);
  try {
    checked_call(args);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(CudaGeneral, NamesWhatDoesNotFit) {
  EXPECT_EQ(refused([](AttendArgs&) {}), "");
  const auto expect = [](const char* words, const std::function<void(AttendArgs&)>& change) {
    EXPECT_THAT(refused(change), HasSubstr(words));
  };
  expect("[attend] batch: got 0", [](AttendArgs& a) { a.batch = 0; });
  expect("batch: got 40000 of 2 KV heads", [](AttendArgs& a) { a.batch = 40000; });
  expect("n_packed, n_exact: got null", [](AttendArgs& a) { a.n_packed = a.n_exact = nullptr; });
  expect("keys: got no codec", [](AttendArgs& a) { a.keys.codec = GpuCodec(); });
  expect("values: got a codec of the other side", [](AttendArgs& a) { a.values = a.keys; });
  expect("keys: got no blob", [](AttendArgs& a) { a.keys.blob = nullptr; });
  expect("values: got blocks or strides off 4 bytes",
         [](AttendArgs& a) { ++a.values.head_stride; });
  expect("block_stride of 4", [](AttendArgs& a) { a.keys.block_stride = 4; });
  expect("max_packed: got 0", [](AttendArgs& a) { a.max_packed = 0; });
  expect("max_exact: got 0", [](AttendArgs& a) { a.max_exact = 0; });
  expect("exact_dtype: got float32", [](AttendArgs& a) { a.exact_dtype = DType::float32; });
  expect("exact_keys, exact_values: got null", [](AttendArgs& a) { a.exact_keys.data = nullptr; });
  expect("n_q_heads: got 7", [](AttendArgs& a) { a.n_q_heads = 7; });
  expect("n_q_heads: got 34", [](AttendArgs& a) { a.n_q_heads = 34; });
  expect("n_queries: got 0", [](AttendArgs& a) { a.n_queries = 0; });
  expect("n_queries: got 16384, wanted 1 to 16383", [](AttendArgs& a) { a.n_queries = 16384; });
  expect("scale: got 0", [](AttendArgs& a) { a.scale = 0; });
  expect("sliding_window", [](AttendArgs& a) { a.sliding_window = -1; });
  expect("q_dtype: got int32", [](AttendArgs& a) { a.q_dtype = DType::int32; });
  expect("out_dtype: got uint8", [](AttendArgs& a) { a.out_dtype = DType::uint8; });
  expect("table: got 0 blocks in the pool",
         [](AttendArgs& a) { a.table.blocks = static_cast<int32_t*>(device()); });
  expect("table: got 15 blocks a sequence, wanted 16", [](AttendArgs& a) {
    a.table = {static_cast<int32_t*>(device()), 15, 100};
  });
  expect("values: got 2 heads of 64",
         [](AttendArgs& a) { a.values = side_of(codec_of("turboquant", "4", Side::values, 64)); });
  expect("outlier channels of qjl",
         [](AttendArgs& a) { a.keys = side_of(codec_of("qjl", "1 outliers", Side::keys)); });
  expect("prod",
         [](AttendArgs& a) { a.values = side_of(codec_of("turboquant", "2 prod", Side::values)); });
  expect("keys: got a sketch of 1152 signs, wanted at most 1024",
         [](AttendArgs& a) { a.keys = side_of(codec_of("qjl", "9", Side::keys)); });
}

TEST(CudaGeneral, TakesTheFastKernelsWhereTheyCoverTheCall) {
  test::RaggedCase c;
  const test::CasePtr k = ragged_codec("vecinfer", "4x256 hadamard head int8", Side::keys, 128);
  const test::CasePtr v = ragged_codec("vecinfer", "4x256 dense head int8", Side::values, 128);
  const test::RaggedProblem p(c, k, v);
  const AttendArgs fast = call(prepare_codec(test::FragmentSide(p, p.keys).prepared.format),
                               prepare_codec(test::FragmentSide(p, p.values).prepared.format));
  constexpr int kShared = 227 << 10;
  checked_call(fast);
  EXPECT_EQ(not_fast_because(fast, kShared), nullptr);
  const DecodeArgs given = fast_args(fast);
  EXPECT_EQ(given.keys.format.n_chunks, fast.keys.codec->fragments->n_chunks);
  EXPECT_EQ(given.values.head_stride, fast.values.head_stride);
  EXPECT_EQ(given.n_packed, fast.n_packed);
  const auto expect = [&](const char* reason, const std::function<void(AttendArgs&)>& change) {
    AttendArgs args = fast;
    change(args);
    checked_call(args);
    EXPECT_STREQ(not_fast_because(args, kShared), reason);
  };
  expect("more than one query", [](AttendArgs& a) { a.n_queries = 2; });
  expect("a sliding window", [](AttendArgs& a) { a.sliding_window = 5; });
  expect("a mask", [](AttendArgs& a) { a.mask = static_cast<float*>(device()); });
  expect("capped logits", [](AttendArgs& a) { a.logit_softcap = 30; });
  expect("logits of sinks", [](AttendArgs& a) { a.sink_logits = static_cast<float*>(device()); });
  expect("paged blocks", [](AttendArgs& a) {
    a.table = {static_cast<int32_t*>(device()), 16, 100};
  });
  expect("blocks off 16 bytes", [](AttendArgs& a) { a.keys.blocks += 4; });
  expect("blocks apart from each other", [](AttendArgs& a) { a.keys.block_stride += 16; });
  expect("exact tokens off 16 bytes", [](AttendArgs& a) { a.exact_keys.token_stride = 132; });
  expect("queries or outputs off two elements", [](AttendArgs& a) { a.out = device(4098); });
  expect("no packed tokens", [](AttendArgs& a) { a.n_packed = nullptr; });
  EXPECT_STREQ(not_fast_because(turboquant(), kShared), "blocks are not in fragment order");
}

TEST(CudaGeneral, ScratchHoldsEveryPart) {
  const attention::RaggedShape shape = checked_call(turboquant());
  const attention::RaggedItems items = attention::ragged_items(shape, 132);
  const Workspace at = workspace_of(shape, items);
  const int64_t rows = 3 * 8 * items.all();
  EXPECT_GE(at.sums - at.parts, 4 * rows * 128);
  EXPECT_GE(at.lse - at.sums, 8 * rows);
  EXPECT_GE(at.bytes - at.lse, 4 * 3 * 8);
  EXPECT_EQ(at.sums % 256 + at.lse % 256 + at.bytes % 256, 0);
}

TEST(CudaGeneral, SaysWhenItIsNotThere) {
  if (built()) GTEST_SKIP() << "this library has the kernels";
  const AttendArgs args = turboquant();
  EXPECT_THROW(attend(args, nullptr), Error);
  EXPECT_THROW(attend_workspace_bytes(args), Error);
  EXPECT_THROW(prepare_append({}), Error);
}

}  // namespace
}  // namespace veloxquant::cuda
