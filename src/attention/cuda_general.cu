// The general attention on CUDA (veloxquant/cuda_general.h): makes the plan of a call once,
// launches two or three kernels of the shared text.
#include <algorithm>
#include <map>
#include <mutex>

#include "src/attention/cuda_general_call.h"
#include "src/backends/cuda/check.h"

namespace veloxquant::cuda {
namespace {

using attention::DecodeShape;
using attention::RaggedItems;
using attention::RaggedShape;
using backends::CudaKernel;
using metal::Type;

// What a call launches; kept for as long as the process.
struct Plan {
  RaggedItems items;
  const CudaKernel *turn = nullptr, *first = nullptr, *second = nullptr;
  metal::Launch turn_launch, first_launch, second_launch;
};

struct Prepared {
  RaggedShape shape;
  RaggedItems items;
  Workspace at;
};

RaggedShape shape_of(const AttendArgs& args) {
  RaggedShape shape = checked_call(args);
  shape.shared_bytes = backends::current_device().shared_per_block;
  return shape;
}

Prepared prepared(const AttendArgs& args) {
  Prepared p;
  p.shape = shape_of(args);
  p.items = attention::ragged_items(p.shape, backends::current_device().multiprocessors);
  p.at = workspace_of(p.shape, p.items);
  return p;
}

const char* not_fast(const AttendArgs& args) {
  return not_fast_because(args, backends::current_device().shared_per_block);
}

// The inputs of the kernels, in their order (ragged_calls.h).
struct Numbers {
  std::array<int32_t, attention::kRaggedCount> ragged;
  std::array<int32_t, 4> counts;
  std::array<float, 2> params;
  std::array<int64_t, 6> steps;
};

Inputs turn_inputs(const AttendArgs& args, const DecodeShape& s) {
  Inputs in;
  in.add(type_of(args.q_dtype), args.q, {s.batch, args.n_q_heads, s.n_queries, s.head_dim});
  in.add_blob(args.keys, args.keys.codec->turn);
  return in;
}

Inputs first_inputs(const AttendArgs& args, const Prepared& p, const Numbers& numbers) {
  const DecodeShape& s = p.shape.decode;
  Inputs in;
  in.add(type_of(args.q_dtype), args.q, {s.batch, args.n_q_heads, s.n_queries, s.head_dim});
  if (s.n_spans > 0 && s.key_transform == 2) {
    in.add(Type::float32, static_cast<const uint8_t*>(args.workspace) + p.at.turned, {});
  }
  in.add_numbers(Type::int32, numbers.ragged.data(), attention::kRaggedCount);
  if (s.n_spans > 0) in.add(Type::int32, args.n_packed, {});
  if (s.n_exact > 0) in.add(Type::int32, args.n_exact, {});
  in.add_numbers(Type::float32, numbers.params.data(), 2);
  if (s.n_spans > 0) {
    in.add_blob(args.keys, args.keys.codec->move);
    in.add_blob(args.keys, args.keys.codec->table);
    in.add_blob(args.values, args.values.codec->table);
    in.add_numbers(Type::int64, numbers.steps.data(), 6);
    in.add(Type::uint8, args.keys.blocks, {});
    in.add(Type::uint8, args.values.blocks, {});
    if (p.shape.paged) in.add(Type::int32, args.table.blocks, {});
  }
  for (const ExactSide* side : {&args.exact_keys, &args.exact_values}) {
    if (s.n_exact == 0) continue;
    in.add(type_of(args.exact_dtype), side->data, {}).strides = {
        side->batch_stride, side->head_stride, side->token_stride, 1};
  }
  if (s.mask) {
    std::copy_n(args.mask_strides, 4, in.add(Type::float32, args.mask, {}).strides.begin());
  }
  return in;
}

Inputs second_inputs(const AttendArgs& args, const Prepared& p, const Numbers& numbers) {
  const uint8_t* workspace = static_cast<const uint8_t*>(args.workspace);
  Inputs in;
  in.add(Type::float32, workspace + p.at.parts, {});
  in.add(Type::float32, workspace + p.at.sums, {});
  in.add_numbers(Type::int32, numbers.counts.data(), 4);
  in.add(Type::float32, args.sink_logits, {});
  if (p.shape.decode.n_spans > 0) {
    in.add_blob(args.values, args.values.codec->move);
  } else {
    in.add(Type::float32, nullptr, {});
  }
  return in;
}

Numbers numbers_of(const AttendArgs& args, const Prepared& p) {
  Numbers n;
  n.ragged = attention::ragged_numbers(p.shape, p.items);
  n.counts = attention::ragged_counts(p.shape, p.items);
  n.params = {args.scale, args.logit_softcap};
  n.steps = {args.keys.sequence_stride / 4, args.keys.head_stride / 4,
             args.keys.block_stride / 4,    args.values.sequence_stride / 4,
             args.values.head_stride / 4,   args.values.block_stride / 4};
  return n;
}

// Everything that text and grids follow from.
std::vector<int64_t> key_of(const AttendArgs& args, const Prepared& p) {
  const DecodeShape& s = p.shape.decode;
  int device = 0;
  backends::check(cudaGetDevice(&device), "attend");
  std::vector<int64_t> key = {device,
                              s.batch,
                              s.n_kv_heads,
                              s.group,
                              s.n_queries,
                              s.head_dim,
                              s.key_transform,
                              s.value_transform,
                              s.n_spans,
                              s.n_exact,
                              static_cast<int>(args.exact_dtype),
                              s.key_transform == 2 ? args.keys.codec->turn.shape[0] : 0,
                              s.softcap,
                              s.mask,
                              s.sinks,
                              static_cast<int>(s.out),
                              static_cast<int>(args.q_dtype),
                              p.shape.paged,
                              p.shape.wide_exact,
                              p.items.packed,
                              p.items.exact,
                              p.items.apart};
  for (const attention::CodeFormat* f : {&s.keys, &s.values}) {
    key.insert(key.end(),
               {f->sub_dim, f->n_centroids, f->bits, f->tables, static_cast<int>(f->kind),
                f->stages, f->by_token, f->mean, f->n_rows, f->chunks});
  }
  return key;
}

const Plan& plan_of(const AttendArgs& args, const Prepared& p, Stream stream) {
  static std::mutex mutex;
  static std::map<std::vector<int64_t>, Plan> plans;
  const std::vector<int64_t> key = key_of(args, p);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto it = plans.find(key);
    if (it != plans.end()) return it->second;
  }
  const DecodeShape& s = p.shape.decode;
  const Numbers numbers = numbers_of(args, p);
  const auto kernel = [&](const metal::Call& call, const Inputs& in, metal::Launch& launch) {
    launch = call.launch;
    return &CudaKernel::get(call, in.types(), true, stream);
  };
  Plan plan;
  plan.items = p.items;
  if (s.n_spans > 0 && s.key_transform == 2) {
    plan.turn =
        kernel(attention::turn_queries_call(s, static_cast<int>(args.keys.codec->turn.shape[0])),
               turn_inputs(args, s), plan.turn_launch);
  }
  plan.first = kernel(attention::ragged_first_pass_call(p.shape, p.items),
                      first_inputs(args, p, numbers), plan.first_launch);
  plan.second = kernel(attention::ragged_second_pass_call(p.shape), second_inputs(args, p, numbers),
                       plan.second_launch);
  const std::lock_guard<std::mutex> lock(mutex);
  return plans.emplace(key, std::move(plan)).first->second;
}

}  // namespace

int64_t attend_workspace_bytes(const AttendArgs& args) {
  const Prepared p = prepared(args);
  return not_fast(args) == nullptr ? decode_workspace_bytes(fast_args(args)) : p.at.bytes;
}

void prepare_attend(const AttendArgs& args) {
  const Prepared p = prepared(args);
  if (not_fast(args) != nullptr) plan_of(args, p, nullptr);
}

std::string attend_kernel(const AttendArgs& args) {
  const RaggedShape shape = shape_of(args);
  const char* reason = not_fast(args);
  if (reason == nullptr) return "fast";
  const attention::RaggedCut cut = attention::ragged_cut(shape);
  return std::string("general: ") + reason + " (a tile of tokens is decoded for up to " +
         std::to_string(16 * cut.row_tiles()) + " query rows)";
}

void attend(const AttendArgs& args, Stream stream) {
  const Prepared p = prepared(args);
  const DecodeShape& s = p.shape.decode;
  const char* reason = not_fast(args);
  if (debug_enabled()) {
    log_once("cuda attend: " +
             (reason == nullptr ? std::string("fast") : std::string("general: ") + reason) + " (" +
             args.keys.codec->name + " | " +
             (s.n_spans > 0 ? args.values.codec->name : std::string("exact")) + ")");
  }
  if (reason == nullptr) return decode_attention(fast_args(args), stream);
  require(args.q != nullptr && args.out != nullptr,
          "[attend] q, out: got null, wanted device pointers");
  require(args.workspace != nullptr && args.workspace_bytes >= p.at.bytes &&
              reinterpret_cast<uintptr_t>(args.workspace) % 16 == 0,
          "[attend] workspace: got ", args.workspace == nullptr ? 0 : args.workspace_bytes,
          " bytes, wanted ", p.at.bytes, " at a multiple of 16");
  const Plan& plan = plan_of(args, p, stream);
  const Numbers numbers = numbers_of(args, p);
  uint8_t* workspace = static_cast<uint8_t*>(args.workspace);
  if (plan.turn != nullptr) {
    void* const turned[] = {workspace + p.at.turned};
    plan.turn->launch(plan.turn_launch, turn_inputs(args, s).arguments(), turned, stream);
  }
  void* const parts[] = {workspace + p.at.parts, workspace + p.at.sums};
  plan.first->launch(plan.first_launch, first_inputs(args, p, numbers).arguments(), parts, stream);
  void* const out[] = {args.out,
                       args.lse != nullptr ? static_cast<void*>(args.lse) : workspace + p.at.lse};
  plan.second->launch(plan.second_launch, second_inputs(args, p, numbers).arguments(), out, stream);
}

}  // namespace veloxquant::cuda
