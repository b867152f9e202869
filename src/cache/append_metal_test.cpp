// The append kernel on the MSL machine: the exact storage, sealed tokens and counts of run_append,
// byte for byte, through appends of many sizes.
#include <cmath>

#include "src/cache/kernel_calls.h"
#include "tests/msl/support.h"
#include "tests/support/random.h"
#include "veloxquant/exact.h"

namespace veloxquant {
namespace {

using metal::Type;
using msl::Input;

constexpr int kBatch = 2, kHeads = 2, kDim = 24;

TensorView view_of(const std::vector<uint16_t>& data, DType dtype, int64_t n) {
  return TensorView(data.data(), dtype, {kBatch, kHeads, n, kDim});
}

// One cache by run_append (blocks of an exact codec are its tokens), and one by the kernel.
struct Both {
  DType dtype;
  CacheGeometry geometry;
  CodecPtr codec;
  std::vector<uint16_t> exact[2];
  std::vector<int32_t> counts = std::vector<int32_t>(2 * kBatch * kHeads, 0);
  int64_t changed = 0;

  Both(DType dtype, int window, int sinks) : dtype(dtype), geometry(window, sinks) {
    codec = make_exact_codec(Side::keys, kHeads, kDim, dtype);
    for (auto& side : exact) side.resize(kBatch * kHeads * geometry.exact_capacity() * kDim, 0);
  }

  // Tokens [B, n, H, D] in memory, seen as [B, H, n, D].
  void append(const msl::Values& keys, const msl::Values& values, int n) {
    const AppendPlan plan = geometry.plan_append(n);
    const int64_t slots = geometry.exact_capacity(), tokens = int64_t{64} * plan.n_sealed;
    const int64_t strides[4] = {int64_t{n} * kHeads * kDim, kDim, kHeads * kDim, 1};
    std::vector<uint16_t> next[2], sealed[2];
    AppendBuffers buffers;
    const msl::Values* fresh[2] = {&keys, &values};
    TensorView views[2];
    for (int side = 0; side < 2; ++side) {
      next[side].resize(exact[side].size());
      sealed[side].resize(kBatch * kHeads * tokens * kDim);
      views[side] = TensorView(fresh[side]->data(), msl::dtype_of(fresh[side]->type),
                               {kBatch, kHeads, n, kDim});
      std::copy_n(strides, 4, views[side].stride.begin());
    }
    buffers.new_keys = views[0];
    buffers.new_values = views[1];
    buffers.exact_keys = view_of(exact[0], dtype, slots);
    buffers.exact_values = view_of(exact[1], dtype, slots);
    buffers.next_exact_keys =
        MutableTensorView(next[0].data(), dtype, {kBatch, kHeads, slots, kDim});
    buffers.next_exact_values =
        MutableTensorView(next[1].data(), dtype, {kBatch, kHeads, slots, kDim});
    buffers.key_blocks = reinterpret_cast<uint8_t*>(sealed[0].data());
    buffers.value_blocks = reinterpret_cast<uint8_t*>(sealed[1].data());
    changed += run_append(Backend::reference, geometry, plan, *codec, *codec, buffers);

    const Type kept = dtype == DType::float16 ? Type::float16 : Type::bfloat16;
    const std::vector<int32_t> numbers = append_numbers(geometry, plan);
    const metal::Call call = append_call({kBatch, kHeads, kDim, kept}, geometry, plan);
    const std::vector<int64_t> shape{kBatch, kHeads, n, kDim}, by{strides, strides + 4};
    const std::vector<int64_t> storage{kBatch, kHeads, slots, kDim};
    const msl::Result got = msl::run(
        *call.kernel, call.launch,
        {Input(keys.type, shape, keys.data(), by), Input(values.type, shape, values.data(), by),
         Input(kept, storage, exact[0].data()), Input(kept, storage, exact[1].data()),
         Input(Type::int32, {2, kBatch * kHeads}, counts.data()),
         Input(Type::int32, {8}, numbers.data())});
    counts = got.output<int32_t>(2);
    for (int side = 0; side < 2; ++side) {
      EXPECT_TRUE(msl::same_bytes(got.outputs[side], next[side]));
      if (plan.n_sealed > 0) {
        EXPECT_TRUE(msl::same_bytes(got.outputs[3 + side], sealed[side]));
      }
      exact[side] = next[side];
    }
    int64_t counted = 0;
    for (int32_t count : counts) counted += count;
    EXPECT_EQ(counted, changed);
    geometry.commit(plan);
  }
};

void drive(DType dtype, int window, int sinks, Type keys, Type values,
           const std::vector<int>& steps) {
  test::Random random(7);
  Both both(dtype, window, sinks);
  for (int n : steps) {
    SCOPED_TRACE("at " + std::to_string(both.geometry.length) + ", " + std::to_string(n));
    std::vector<float> k = random.normal(kBatch * n * kHeads * kDim), v = random.normal(k.size());
    k[3] = NAN;
    v[k.size() - 1] = -INFINITY;
    v[1] = 1e30f;
    k[5] = 65519.9f;
    both.append({k, keys}, {v, values}, n);
    if (::testing::Test::HasFailure()) return;
  }
}

TEST(MetalAppend, EqualsTheCpuFromEmptyThroughSinksSealsAndPrefill) {
  drive(DType::float16, 64, 4, Type::float32, Type::float16, {3, 2, 90, 36, 1, 1, 200, 16});
}

TEST(MetalAppend, OtherTypesAndSizes) {
  drive(DType::bfloat16, 5, 0, Type::bfloat16, Type::float32, {1, 63, 5, 6, 300});
  drive(DType::float16, 0, 70, Type::float16, Type::bfloat16, {60, 30, 40, 64});
}

}  // namespace
}  // namespace veloxquant
