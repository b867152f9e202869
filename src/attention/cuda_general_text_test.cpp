// The programs that the general CUDA path hands to NVRTC (src/backends/metal/cuda_source.h)
// compile, without any header of a toolkit. Needs libnvrtc, no GPU; what they compute is held on
// the MSL machine and, by tools/gpu/general_check.cpp, on a GPU.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "src/attention/device_codec.h"
#include "src/attention/ragged_calls.h"
#include "src/backends/metal/cuda_source.h"
#include "tests/support/nvrtc.h"
#include "tests/support/ragged_problem.h"

namespace veloxquant::attention {
namespace {

using metal::CudaInput;
using metal::Type;
using test::ragged_codec;
using testing::HasSubstr;

class CudaGeneralText : public testing::Test {
  void SetUp() override {
    if (test::Nvrtc::get() == nullptr) GTEST_SKIP() << "NOT TESTED: no libnvrtc";
  }
};

// Types as cuda_general*.cu have them; numbers by value.
std::vector<CudaInput> inputs_of(const metal::Call& call, Type x, bool half_tables) {
  std::vector<CudaInput> inputs;
  for (const std::string& name : call.kernel->inputs) {
    const auto is = [&](std::initializer_list<const char*> names) {
      return std::find(names.begin(), names.end(), name) != names.end();
    };
    CudaInput input;
    if (is({"q", "x", "ek0", "ev0"})) input.type = x;
    if (is({"k_tables", "v_tables", "tables"}) && half_tables) input.type = Type::float16;
    if (is({"k0", "v0", "blocks"})) input.type = Type::uint8;
    if (is({"n_packed", "n_exact", "table", "lengths"})) input.type = Type::int32;
    if (is({"ragged"})) input = {Type::int32, 4, kRaggedCount};
    if (is({"counts"})) input = {Type::int32, 4, 4};
    if (is({"params"})) input = {Type::float32, 4, 2};
    if (is({"steps"})) input = {Type::int64, 4, call.kernel->inputs[0] == "q" ? 6 : 3};
    if (is({"x_steps"})) input = {Type::int64, 4, 3};
    if (is({"out_steps"})) input = {Type::int64, 4, 2};
    if (is({"range"})) input = {Type::int32, 4, kRangeNumbers};
    input.ndim = 4;
    inputs.push_back(input);
  }
  return inputs;
}

void expect_compiles(const metal::Call& call, Type x, bool half_tables) {
  const std::string program = cuda_program(call, inputs_of(call, x, half_tables));
  EXPECT_THAT(program, testing::Not(HasSubstr("#include")));
  EXPECT_EQ(test::Nvrtc::get()->errors(program, {"--gpu-architecture=sm_90", "--std=c++17",
                                                 "--device-as-default-execution-space"}),
            "")
      << call.kernel->name;
}

TEST_F(CudaGeneralText, BlocksOfEveryCodecCompile) {
  struct One {
    const char *method, *what;
    Side side;
  };
  bool paged = false;
  for (const One& o :
       {One{"vecinfer", "4x256 hadamard head", Side::keys},
        One{"vecinfer", "8x1000 dense", Side::values}, One{"turboquant", "3", Side::keys},
        One{"turboquant", "2 prod", Side::values}, One{"turboquant_rvq", "2", Side::values},
        One{"rabitq", "2 mean", Side::keys}, One{"rabitq", "4", Side::values},
        One{"qjl", "2 outliers", Side::keys}}) {
    const test::CasePtr one = ragged_codec(o.method, o.what, o.side, 96);
    PlacedShape s;
    s.kernels = device_codec(one->spec(), one->tables())->kernels;
    s.heads = 2;
    s.paged = paged = !paged;
    expect_compiles(placed_decode_call(s, 3), Type::float32, true);
    s.seal = paged;
    for (Type type : {Type::float32, Type::bfloat16}) {
      expect_compiles(placed_encode_call(s, 3), type, true);
    }
  }
}

TEST_F(CudaGeneralText, AttentionCompiles) {
  struct Pair {
    const char *key_method, *key, *value_method, *value;
  };
  bool full = false;
  for (const Pair& pair :
       {Pair{"vecinfer", "4x256 hadamard head", "vecinfer", "2x16 dense"},
        Pair{"turboquant", "4", "turboquant", "3"}, Pair{"turboquant_rvq", "2", "rabitq", "4"},
        Pair{"rabitq", "2 mean", "turboquant", "1"}, Pair{"qjl", "2", "turboquant", "2"}}) {
    const test::CasePtr k = ragged_codec(pair.key_method, pair.key, Side::keys, 128);
    const test::CasePtr v = ragged_codec(pair.value_method, pair.value, Side::values, 128);
    const auto keys = device_codec(k->spec(), k->tables());
    const auto values = device_codec(v->spec(), v->tables());
    RaggedShape s;
    s.decode.n_kv_heads = 2, s.decode.group = 4, s.decode.head_dim = 128;
    s.decode.n_queries = full ? 16 : 1;
    s.decode.keys = keys->format, s.decode.values = values->format;
    s.decode.key_transform = keys->transform, s.decode.value_transform = values->transform;
    s.decode.n_spans = s.decode.n_exact = 1;
    s.decode.mask = s.decode.softcap = s.decode.sinks = s.paged = full;
    s.decode.bfloat_cache = full;
    s.decode.out = full ? Type::bfloat16 : Type::float16;
    s.most_packed = s.most_exact = 1000;
    const RaggedItems items = ragged_items(s, 132);
    const bool vecinfer = std::string(pair.key_method) == "vecinfer";
    expect_compiles(ragged_first_pass_call(s, items), s.decode.out, vecinfer);
    expect_compiles(ragged_second_pass_call(s), s.decode.out, vecinfer);
    if (keys->transform == 2) {
      expect_compiles(turn_queries_call(s.decode, static_cast<int>(keys->turn.shape[0])),
                      s.decode.out, vecinfer);
    }
    full = !full;
  }
}

TEST(CudaSource, SignatureHasWhatTheBodyNames) {
  metal::Kernel kernel;
  kernel.name = "k";
  kernel.inputs = {"a", "b", "c"};
  kernel.outputs = {"out"};
  kernel.body = "out[threadgroup_position_in_grid.x] = a[0] + b[b_strides[0]] + a_shape[0] + c[0];";
  metal::Call call{&kernel, {}};
  call.launch.outputs = {{Type::float32, {1}}};
  call.launch.threadgroup = {64, 2, 1};
  call.launch.arguments = {{"N", 3}, {"T", Type::bfloat16}, {"F", true}};
  const std::string text =
      cuda_program(call, {{Type::float16, 2, 0}, {Type::float32, 3, 0}, {Type::int64, 1, 5}});
  EXPECT_THAT(text, HasSubstr("__launch_bounds__(128) vq_kernel"));
  EXPECT_THAT(text, HasSubstr("const __half* a,\n    const __grid_constant__ VqNumbers<int32_t, 2> "
                              "a_shape,\n    const float* b,\n    const __grid_constant__ "
                              "VqNumbers<int64_t, 3> b_strides,\n    const __grid_constant__ "
                              "VqNumbers<int64_t, 5> c,\n    float* out) {"));
  EXPECT_THAT(text, HasSubstr("constexpr int N = 3;"));
  EXPECT_THAT(text, HasSubstr("using T = __nv_bfloat16;"));
  EXPECT_THROW(cuda_program(call, {}), Error);
}

}  // namespace
}  // namespace veloxquant::attention
