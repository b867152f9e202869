#include "src/cache/kernel_calls.h"

#include "src/backends/metal/source.h"

namespace veloxquant {
namespace {

using metal::Call;
using metal::Kernel;

constexpr int kThreads = 256;

std::string side_text(const char* side, bool seal) {
  const std::string s = side, sealed = seal ? "sealed_" + s : "next_" + s;
  return "    const int64_t from = plane / heads * " + s + "_strides[0] + plane % heads * " + s +
         "_strides[1];\n    append_element<KEPT, DIM, SEAL>(plan, " + s + " + from, " + s +
         "_strides[2], " + s + "_strides[3], exact_" + s + " + plane * slots, next_" + s +
         " + plane * slots, " + sealed + " + plane * sealed, i);\n" +
         "    if (group.x == 0) found = count_nonfinite<KEPT, DIM>(" + s + " + from, " + s +
         "_strides[2], " + s + "_strides[3], plan[kAppendNew], partial, self, 256);\n";
}

Kernel kernel_of(bool seal) {
  std::vector<std::string> outputs = {"next_keys", "next_values", "next_counts"};
  if (seal) outputs.insert(outputs.end(), {"sealed_keys", "sealed_values"});
  return metal::make_kernel(seal ? "vq_append_seal" : "vq_append",
                            {"keys", "values", "exact_keys", "exact_values", "counts", "plan"},
                            outputs, "src/cache/metal_append.h",
                            R"(
  using namespace veloxquant;
  threadgroup int partial[8];
  const uint3 group = threadgroup_position_in_grid;
  const uint self = thread_index_in_threadgroup;
  const int i = (int)(group.x * 256 + self), heads = keys_shape[1];
  const int64_t plane = group.y, slots = (int64_t)plan[kAppendSlots] * DIM;
  const int64_t sealed = (int64_t)64 * plan[kAppendSealed] * DIM;
  int found = 0;
  if (group.z == 0) {
)" + side_text("keys", seal) + "  } else {\n" +
                                side_text("values", seal) + R"(  }
  if (group.x == 0 && self == 0) {
    const int64_t at = group.z * (int64_t)threadgroups_per_grid.y + plane;
    next_counts[at] = counts[at] + found;
  }
)",
                            false);
}

}  // namespace

std::vector<int32_t> append_numbers(const CacheGeometry& geometry, const AppendPlan& plan) {
  std::vector<int32_t> numbers;
  for (int64_t n :
       {plan.first, plan.n_new, int64_t{geometry.sinks}, plan.tail_start, plan.next_tail_start,
        geometry.exact_capacity(), int64_t{plan.n_sealed}, int64_t{0}}) {
    numbers.push_back(static_cast<int32_t>(n));
  }
  return numbers;
}

Call append_call(const AppendShape& s, const CacheGeometry& geometry, const AppendPlan& plan) {
  static const Kernel kernels[2] = {kernel_of(false), kernel_of(true)};
  const bool seal = plan.n_sealed > 0;
  const int64_t slots = geometry.exact_capacity(), tokens = int64_t{kBlockTokens} * plan.n_sealed;
  Call call{&kernels[seal], {}};
  call.launch.arguments = {{"DIM", s.head_dim}, {"KEPT", s.kept}, {"SEAL", seal ? 1 : 0}};
  const int64_t elements = (slots + tokens) * s.head_dim;
  call.launch.grid = {static_cast<int>((elements + kThreads - 1) / kThreads * kThreads),
                      s.batch * s.heads, 2};
  call.launch.threadgroup = {kThreads, 1, 1};
  const metal::ArrayShape exact{s.kept, {s.batch, s.heads, slots, s.head_dim}};
  const metal::ArrayShape sealed{s.kept, {s.batch, s.heads, tokens, s.head_dim}};
  call.launch.outputs = {exact, exact, {metal::Type::int32, {2, s.batch * s.heads}}};
  if (seal) call.launch.outputs.insert(call.launch.outputs.end(), {sealed, sealed});
  return call;
}

}  // namespace veloxquant
