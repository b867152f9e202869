// The machine itself: what is right runs, and faults planted one by one are caught, each by name.
#include "tests/msl/machine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

namespace veloxquant::msl {
namespace {

using metal::Kernel;
using metal::Launch;
using metal::Type;

Kernel kernel_of(const std::string& body, const std::string& header = "") {
  return {"planted", {"x"}, {"y"}, header, body, true};
}

struct Grid {
  int n = 256, threads = 64, out = 256;
  Type type = Type::float32, out_type = Type::float32;
  std::vector<metal::TemplateArgument> arguments{};
};

Result run_on(const Kernel& kernel, const std::vector<float>& x, const Grid& s = {}) {
  Launch launch;
  launch.arguments = s.arguments;
  launch.grid = {s.n, 1, 1};
  launch.threadgroup = {s.threads, 1, 1};
  launch.outputs = {{s.out_type, {s.out}}};
  return run(kernel, launch, {Input(s.type, {static_cast<int64_t>(x.size())}, x.data())});
}

std::vector<float> ramp(int n) {
  std::vector<float> x(n);
  std::iota(x.begin(), x.end(), 1.0f);
  return x;
}

// The text of the fault; a test fails where there is none.
std::string fault_of(const Kernel& kernel, const Grid& s = {}, int n_x = 256) {
  try {
    run_on(kernel, ramp(n_x), s);
  } catch (const Fault& fault) {
    return fault.what();
  }
  return "no fault";
}

const std::string kIndex =
    "uint i = thread_position_in_grid.x; uint t = thread_position_in_threadgroup.x; (void)t;\n";
const std::string kSumOfGroup = R"(
  threadgroup float part[64];
  part[t] = x[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint half_width = 32; half_width > 0; half_width /= 2) {
    if (t < half_width) part[t] += part[t + half_width];
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  y[i] = part[0];)";

TEST(Machine, RunsThreadgroupsBarriersAndSimdgroups) {
  const std::vector<float> x = ramp(256);
  const Result sum = run_on(kernel_of(kIndex + kSumOfGroup), x);
  for (int i = 0; i < 256; ++i) {
    const int g = i / 64;
    EXPECT_EQ(sum.output<float>(0)[i], 64 * (64 * g + 32.5f));
  }
  EXPECT_EQ(sum.report.threadgroups, 4);
  EXPECT_EQ(sum.report.threadgroup_bytes, 256);
  EXPECT_EQ(sum.report.traffic.device_read, 1024);
  EXPECT_EQ(sum.report.traffic.device_distinct, 1024);
  EXPECT_EQ(sum.report.traffic.device_written, 1024);

  const Result simd = run_on(kernel_of(kIndex + R"(
    float a = simd_sum(x[i]), b = simd_max(x[i]), c = simd_shuffle_xor(x[i], 1);
    float d = simd_broadcast(x[i], 3), e = simd_prefix_exclusive_sum(1.0f);
    y[i] = a + 1e4f * b + 1e7f * (c - x[i]) + 0.25f * (d - x[i] + e);)"),
                             x);
  for (int i = 0; i < 256; ++i) {
    const int first = i / 32 * 32;
    const float a = 32 * (first + 16.5f), b = first + 32, c = i % 2 ? -1 : 1;
    EXPECT_EQ(simd.output<float>(0)[i], a + 1e4f * b + 1e7f * c + 0.25f * 3) << i;
  }
}

// What lanes share counts once a load, what is loaded again counts again.
TEST(Machine, CountsLoadsOfSimdgroups) {
  Options options;
  options.loads = true;
  Launch launch;
  launch.grid = {256, 1, 1};
  launch.threadgroup = {64, 1, 1};
  launch.outputs = {{Type::float32, {256}}};
  const std::vector<float> x = ramp(256);
  const Kernel kernel =
      kernel_of(kIndex + "y[i] = 0.0f; for (uint n = 0; n < 3; ++n) y[i] += x[i / 4 + n];");
  const BufferTraffic traffic =
      run(kernel, launch, {Input(Type::float32, {256}, x.data())}, options).report.buffers.at("x");
  EXPECT_EQ(traffic.requested, 256 * 3 * 4);
  EXPECT_EQ(traffic.loaded, 8 * 3 * 8 * 4);
  EXPECT_EQ(traffic.once, (64 + 2) * 4);
}

TEST(Machine, CutsTheLastThreadgroupAndKnowsTypes) {
  const std::vector<uint16_t> x = {0x3c00, 0x7bff, 0xc000};  // 1, 65504, -2 as half
  Kernel kernel{"types",
                {"x", "factor"},
                {"y", "z"},
                "",
                "uint i = thread_position_in_grid.x; y[i] = T(x[i]) * factor; z[i] = x[i] * x[i];",
                true};
  const float factor = 3;
  Launch launch;
  launch.arguments = {{"T", Type::float32}};
  launch.grid = {3, 1, 1};
  launch.threadgroup = {2, 1, 1};
  launch.outputs = {{Type::bfloat16, {3}}, {Type::float16, {3}}};
  const Result r =
      run(kernel, launch, {Input(Type::float16, {3}, x.data()), Input(Type::float32, {}, &factor)});
  EXPECT_EQ(r.output<uint16_t>(0), (std::vector<uint16_t>{0x4040, 0x4840, 0xc0c0}));
  EXPECT_EQ(r.output<uint16_t>(1), (std::vector<uint16_t>{0x3c00, 0x7c00, 0x4400}));  // inf
  EXPECT_EQ(r.report.threadgroups, 2);
}

TEST(Machine, StridedInputsComeAsTheyAre) {
  const std::vector<float> x = ramp(64);
  Kernel kernel{"strided",
                {"x"},
                {"y"},
                "",
                "uint i = thread_position_in_grid.x;"
                "y[i] = x[(i / x_shape[1]) * x_strides[0] + (i % x_shape[1]) * x_strides[1]];",
                false};
  Launch launch;
  launch.grid = {24, 1, 1};
  launch.threadgroup = {32, 1, 1};
  launch.outputs = {{Type::float32, {8, 3}}};
  const Result r = run(kernel, launch, {Input(Type::float32, {8, 3}, x.data(), {8, 1})});
  for (int i = 0; i < 24; ++i) EXPECT_EQ(r.output<float>(0)[i], x[i / 3 * 8 + i % 3]);
}

// The source that MLX 0.32.4 prints for this kernel (verbose=True, while exporting a function).
TEST(FrontEnd, WritesTheSignatureThatMlxWrites) {
  Kernel kernel{"foo",
                {"x", "n"},
                {"y"},
                "// hdr\n",
                "uint i=thread_position_in_grid.x; y[i]=x[i*x_strides[0]]*n[0]*T(2);",
                true};
  Launch launch;
  launch.arguments = {{"T", Type::float16}, {"N", 3}};
  launch.outputs = {{Type::float32, {64}}};
  EXPECT_EQ(mlx_source(kernel, launch, {{Type::float32, {64}}, {Type::int32, {3}}}),
            R"(// hdr
template <typename T, int N>
[[kernel]] void custom_kernel_foo__float16_t_3_float_int32_tc_float(
  const device float* x [[buffer(0)]],
  const constant int64_t* x_strides [[buffer(1)]],
  const constant int32_t* n [[buffer(2)]],
  device float* y [[buffer(3)]],
  uint3 thread_position_in_grid [[thread_position_in_grid]]) {
uint i=thread_position_in_grid.x; y[i]=x[i*x_strides[0]]*n[0]*T(2);
}

template [[host_name("custom_kernel_foo__float16_t_3_float_int32_tc_float")]] [[kernel]] decltype(custom_kernel_foo__float16_t_3_float_int32_tc_float<float16_t, 3>) custom_kernel_foo__float16_t_3_float_int32_tc_float<float16_t, 3>;
)");
}

struct Planted {
  const char* what;
  std::string body, header, fault;
  Grid setup{};
};

void PrintTo(const Planted& p, std::ostream* out) { *out << p.what; }

class PlantedFaults : public ::testing::TestWithParam<Planted> {};

TEST_P(PlantedFaults, IsCaught) {
  const Planted& p = GetParam();
  EXPECT_THAT(fault_of(kernel_of(kIndex + p.body, p.header), p.setup),
              ::testing::HasSubstr(p.fault));
}

std::string without(std::string text, const std::string& part) {
  const size_t at = text.find(part);
  return text.erase(at, part.size());
}
const std::string kBarrier = "threadgroup_barrier(mem_flags::mem_threadgroup);";

INSTANTIATE_TEST_SUITE_P(
    Machine, PlantedFaults,
    ::testing::Values(
        Planted{"missing_barrier", without(kSumOfGroup, kBarrier), "", "nobody wrote"},
        Planted{"missing_barrier_in_loop",
                kSumOfGroup.substr(0, kSumOfGroup.rfind(kBarrier)) + "}\n y[i] = part[0];", "",
                "race"},
        Planted{"barrier_for_other_memory",
                "threadgroup float part[64]; part[t] = x[i]; "
                "threadgroup_barrier(mem_flags::mem_device);"
                "y[i] = part[63 - t];",
                "", "race"},
        Planted{
            "barrier_without_memory",
            "threadgroup float part[64]; part[t] = x[i]; threadgroup_barrier(mem_flags::mem_none);"
            "y[i] = part[63 - t];",
            "", "race"},
        Planted{"simdgroup_barrier_across_simdgroups",
                "threadgroup float part[64]; part[t] = x[i];"
                "simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = part[63 - t];",
                "", "race"},
        Planted{"barrier_in_a_branch",
                "if (t < 32) threadgroup_barrier(mem_flags::mem_none); y[i] = 0;", "",
                "divergence"},
        Planted{"return_before_a_barrier",
                "y[i] = 0; if (t == 63) return; threadgroup_barrier(mem_flags::mem_none);", "",
                "divergence"},
        Planted{"two_barriers_taken_for_one",
                "if (t < 32) threadgroup_barrier(mem_flags::mem_none);"
                "else threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = 0;",
                "", "divergence"},
        Planted{"simd_sum_of_half_a_simdgroup",
                "float s = 0; if (t % 32 < 16) s = simd_sum(x[i]); y[i] = s;", "", "divergence"},
        Planted{"simdgroups_taken_for_64_wide", "y[i] = simd_shuffle(x[i], ushort(t ^ 32));", "",
                "lane"},
        Planted{
            "simdgroup_cut_short", "y[i] = simd_shuffle(x[i], 31);", "", "lane 31", {48, 48, 48}},
        Planted{"read_one_too_far", "y[i] = x[i + 1];", "",
                "reads out of bounds: 4 bytes at byte 1024"},
        Planted{"read_before_the_start", "y[i] = x[int(i) - 1];", "", "at byte -4 of `x`"},
        Planted{"write_one_too_far", "y[i] = 0; if (i == 255) y[256] = 1;", "",
                "writes out of bounds"},
        Planted{"threadgroup_array_overrun",
                "threadgroup float part[64]; part[t + 1] = x[i]; y[i] = 0;", "",
                "threadgroup variable 0"},
        Planted{"wide_load_over_the_end", "y[i] = (*(const device float4*)(x + i)).x;", "",
                "16 bytes at byte 1012"},
        Planted{"uninitialised_threadgroup_memory",
                "threadgroup float part[64]; if (t < 32) part[t] = x[i];"
                "threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = part[t];",
                "", "nobody wrote"},
        Planted{"reads_an_output_first", "y[i] += x[i];", "", "nobody wrote"},
        Planted{"threadgroup_memory_kept_from_the_last_threadgroup",
                "threadgroup float part[64]; if (threadgroup_position_in_grid.x == 0) part[t] = 1;"
                "y[i] = part[t];",
                "", "nobody wrote"},
        Planted{"forgets_the_last_tile", "if (i < 192) y[i] = x[i];", "", "never written"},
        Planted{"uninitialised_variable", "float s; if (i > 300) s = 1; y[i] = s;", "",
                "uninitialized"},
        Planted{"too_much_threadgroup_memory",
                "threadgroup float part[8193]; part[t] = x[i]; y[i] = part[t];", "",
                "more than 32768"},
        Planted{"too_much_in_sum",
                "threadgroup float a[4096]; threadgroup float b[4097]; a[t] = x[i]; b[t] = a[t];"
                "y[i] = b[t];",
                "", "more than 32768"},
        Planted{"too_many_threads", "y[i] = x[i];", "", "at most 1024", {2048, 2048, 2048}},
        Planted{"constant_taken_for_device", "y[i] = first(x) + i;",
                "static inline float first(const constant float* p) { return p[0]; }",
                "cannot pass pointer to address space"},
        Planted{"device_taken_for_threadgroup",
                "threadgroup float part[64]; part[t] = x[i]; y[i] = first(part);",
                "static inline float first(const device float* p) { return p[0]; }",
                "no known conversion from 'threadgroup"},
        Planted{"writes_to_an_input", "((device float*)x)[i] = 1; y[i] = 0;", "",
                "writes to an input"},
        Planted{"threadgroups_share_an_output", "y[i] = 0; y[0] = x[i];", "", "race"},
        Planted{"threadgroups_talk", "y[i] = x[i]; if (i >= 64) y[i] = y[i - 64];", "", "race"},
        Planted{"wide_store_over_the_neighbour",
                "((device uint*)y)[i] = 0; if (i % 64 < 62) ((device float2*)(y + i))[0] = "
                "float2{1, 2};",
                "", "race"},
        Planted{"bare_pointer", "y[i] = first(x + i);",
                "static inline float first(const float* p) { return p[0]; }",
                "without an address space"},
        Planted{"double_precision", "double z = x[i]; y[i] = z;", "", "Metal has no"},
        Planted{"a_lambda", "auto f = [&](float z) { return z; }; y[i] = f(x[i]);", "", "lambdas"},
        Planted{"threadgroup_variable_in_a_function", "y[i] = f(x[i]);",
                "static inline float f(float z) { threadgroup float p[2]; p[0] = z; return p[0]; }",
                "outside the kernel"},
        Planted{"syntax", "y[i] = x[i]", "", "does not compile"},
        Planted{"narrow_vector_constructor",
                "float4 v = float4(x[i]); y[i] = v.w + undefined_name;", "", "does not compile"}),
    [](const auto& info) { return std::string(info.param.what); });

// A product that the compiler fuses with its sum rounds once instead of twice, as a Mac's would:
// the pragma of src/math/portable.h keeps it from that.
TEST(Contraction, HappensUnlessThePragmaForbidsIt) {
  const float a = 1.0f + 0x1p-12f;
  const std::vector<float> x = {a, a, -(1.0f + 0x1p-11f), 0, 0, 0, 0, 0};
  const std::string body = "y[thread_position_in_grid.x] = f(x[0], x[1], x[2]);";
  const std::string function =
      "static inline float f(float a, float b, float c) { return a * b + c; }\n";
  const Grid one{1, 1, 1};
  EXPECT_EQ(run_on(kernel_of(body, function), x, one).output<float>(0)[0], 0x1p-24f);
  EXPECT_EQ(run_on(kernel_of(body, "#pragma METAL fp contract(off)\n" + function), x, one)
                .output<float>(0)[0],
            0.0f);
}

TEST(Order, ResultsThatDependOnItAreCaught) {
  // Atomics are no race, but who comes first is open.
  Kernel kernel = kernel_of(kIndex + R"(
    threadgroup uint next;
    if (t == 0) next = 0;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint place = atomic_fetch_add_explicit((threadgroup atomic_uint*)&next, 1u, memory_order_relaxed);
    y[i - t + place] = x[i];)");
  EXPECT_THAT(fault_of(kernel), ::testing::HasSubstr("order of the threads"));
}

TEST(Output, OfHalvesOverflowsAsOnAMac) {
  const std::vector<float> x = {70000.0f, 65519.0f, 65520.0f, -1e9f, 1, 2, 3, 4};
  const Result r = run_on(kernel_of("uint i = thread_position_in_grid.x; y[i] = half(x[i]);"), x,
                          {8, 8, 8, Type::float32, Type::float16});
  EXPECT_EQ(r.output<uint16_t>(0), (std::vector<uint16_t>{0x7c00, 0x7bff, 0x7c00, 0xfc00, 0x3c00,
                                                          0x4000, 0x4200, 0x4400}));
}

}  // namespace
}  // namespace veloxquant::msl
