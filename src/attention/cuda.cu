// Decode attention on the device: checks the arguments, lays out the scratch, launches the kernel.
#include <algorithm>

#include "src/attention/cuda_launch.cuh"
#include "veloxquant/cuda.h"

namespace veloxquant::cuda {
namespace {

namespace impl = veloxquant::attention::cuda;

struct Plan {
  impl::DecodeParams params;
  impl::Launcher launcher = nullptr;
  int64_t bytes = 0;
};

int type_of(DType dtype, const char* name) {
  require(dtype == DType::float32 || dtype == DType::float16 || dtype == DType::bfloat16,
          "[decode_attention] ", name, ": got ", dtype_name(dtype),
          ", wanted float32, float16 or bfloat16");
  return dtype == DType::float32 ? 0 : dtype == DType::float16 ? 1 : 2;
}

impl::SideView view_of(const PackedSide& side) {
  const SideFormat& f = side.format;
  const uint8_t* blob = static_cast<const uint8_t*>(side.tables);
  impl::SideView view = {};
  view.codes = side.codes;
  view.entries = blob + f.entries;
  view.scales = reinterpret_cast<const float*>(blob + f.scales);
  if (f.transform == TransformKind::dense) view.matrix = blob + f.read_fragments;
  if (f.has_scale) view.lambda = reinterpret_cast<const float*>(blob + f.lambda);
  view.batch_stride = side.batch_stride;
  view.head_stride = side.head_stride;
  view.entries_stride = f.entries_stride;
  view.hadamard = f.transform == TransformKind::hadamard;
  view.n_sequences = f.n_sequences;
  return view;
}

void check_side(const PackedSide& side, Side wanted, const DecodeArgs& args, const char* name) {
  const SideFormat& f = side.format;
  require(f.side == wanted && f.n_chunks > 0, "[decode_attention] ", name,
          ": got a format of the other side or none, wanted one of prepare_side");
  require(side.tables != nullptr && side.codes != nullptr, "[decode_attention] ", name,
          ": got no tables or codes, wanted device pointers");
  require(side.batch_stride % 16 == 0 && side.head_stride % 16 == 0 &&
              reinterpret_cast<uintptr_t>(side.codes) % 16 == 0 &&
              reinterpret_cast<uintptr_t>(side.tables) % 16 == 0,
          "[decode_attention] ", name,
          ": got addresses or strides off 16 bytes, wanted multiples of 16");
  require(f.n_sequences == 1 || f.n_sequences == args.batch, "[decode_attention] ", name,
          ": got tables for ", f.n_sequences, " sequences, wanted 1 or batch = ", args.batch);
}

Plan make_plan(const DecodeArgs& args) {
  const backends::Device& device = backends::current_device();
  const SideFormat &k = args.keys.format, &v = args.values.format;
  require(args.batch >= 1 && args.batch <= impl::kMaxBatch, "[decode_attention] batch: got ",
          args.batch, ", wanted 1 to ", impl::kMaxBatch);
  check_side(args.keys, Side::keys, args, "keys");
  check_side(args.values, Side::values, args, "values");
  require(k.head_dim == v.head_dim && k.n_kv_heads == v.n_kv_heads,
          "[decode_attention] values: got ", v.n_kv_heads, " heads of ", v.head_dim,
          ", wanted those of the keys: ", k.n_kv_heads, " of ", k.head_dim);
  require(args.n_q_heads >= k.n_kv_heads && args.n_q_heads % k.n_kv_heads == 0,
          "[decode_attention] n_q_heads: got ", args.n_q_heads, ", wanted a multiple of ",
          k.n_kv_heads, " KV heads");
  const int group = args.n_q_heads / k.n_kv_heads;
  require(group <= 16, "[decode_attention] n_q_heads: got ", group,
          " a KV head, wanted at most 16");
  require(args.scale > 0.0f, "[decode_attention] scale: got ", args.scale, ", wanted more than 0");
  require(args.n_packed != nullptr,
          "[decode_attention] n_packed: got null, wanted a device pointer");

  Plan plan;
  impl::DecodeParams& p = plan.params;
  p = {};
  p.keys = view_of(args.keys);
  p.values = view_of(args.values);
  const auto exact = [](const ExactSide& side) {
    return impl::ExactView{static_cast<const uint16_t*>(side.data), side.batch_stride,
                           side.head_stride, side.token_stride};
  };
  p.exact_keys = exact(args.exact_keys);
  p.exact_values = exact(args.exact_values);
  p.n_packed = args.n_packed;
  p.n_exact = args.n_exact;
  if (args.n_exact != nullptr) {
    require(args.exact_dtype != DType::float32,
            "[decode_attention] exact_dtype: got float32, wanted float16 or bfloat16");
    require(args.exact_keys.data != nullptr && args.exact_values.data != nullptr,
            "[decode_attention] exact_keys: got null, wanted exact tokens where n_exact is given");
    for (const ExactSide* side : {&args.exact_keys, &args.exact_values}) {
      require(side->token_stride % 8 == 0 && side->head_stride % 8 == 0 &&
                  side->batch_stride % 8 == 0 && reinterpret_cast<uintptr_t>(side->data) % 16 == 0,
              "[decode_attention] exact tokens: got addresses or strides off 16 bytes, wanted "
              "multiples of 16");
    }
  }
  p.q = args.q;
  p.out = args.out;
  p.lse = args.lse;
  p.workspace = static_cast<uint8_t*>(args.workspace);
  p.scale = args.scale;
  p.batch = args.batch;
  p.n_q_heads = args.n_q_heads;
  p.n_kv_heads = k.n_kv_heads;
  p.head_dim = k.head_dim;
  p.group = group;
  p.heads_per_group = impl::heads_together(group);
  p.n_groups = impl::divide_up(group, p.heads_per_group);
  p.q_type = type_of(args.q_dtype, "q_dtype");
  p.out_type = type_of(args.out_dtype, "out_dtype");
  p.n_pairs = args.batch * k.n_kv_heads * p.n_groups;

  impl::Choice choice;
  choice.keys = static_cast<impl::Kind>(k.entry);
  choice.values = static_cast<impl::Kind>(v.entry);
  require(k.lookup == v.lookup,
          "[decode_attention] tables: got one side with tables by lane and one by sub-vector, "
          "wanted the same for both");
  choice.by_lane = k.lookup == Lookup::by_lane;
  choice.heads = p.heads_per_group <= 4 ? 4 : 8;
  choice.bf16 = type_of(args.exact_dtype, "exact_dtype") == 2;
  switch (k.head_dim) {
    case 64:
      plan.launcher = impl::launcher_64(choice);
      break;
    case 80:
    case 96:
      plan.launcher = impl::launcher_96(choice);
      break;
    case 128:
      plan.launcher = impl::launcher_128(choice);
      break;
    default:
      plan.launcher = impl::launcher_256(choice);
      break;
  }
  p.n_ctas = device.multiprocessors;
  p.most_pieces = std::max(p.n_ctas / (k.n_kv_heads * p.n_groups), 1);
  p.even_pieces = std::max(p.n_ctas / p.n_pairs, 1);

  const int64_t most = impl::max_items(p.n_ctas);
  p.records_at = (8 * most + 255) / 256 * 256;
  plan.bytes = p.records_at + 4 * most * impl::record_floats(choice.heads, k.head_dim);
  return plan;
}

}  // namespace

bool built() { return true; }

std::string device_name() {
  const backends::Device& device = backends::current_device();
  int index = 0;
  cudaDeviceProp properties;
  backends::check(cudaGetDevice(&index), "cuda");
  backends::check(cudaGetDeviceProperties(&properties, index), "cuda");
  return std::string(properties.name) + " (sm_" + std::to_string(device.major) +
         std::to_string(device.minor) + ")";
}

int64_t decode_workspace_bytes(const DecodeArgs& args) { return make_plan(args).bytes; }

void decode_attention(const DecodeArgs& args, Stream stream) {
  const Plan plan = make_plan(args);
  require(args.q != nullptr && args.out != nullptr,
          "[decode_attention] q, out: got null, wanted device pointers");
  const auto pairs_of_elements = [](const void* at, DType dtype) {
    return reinterpret_cast<uintptr_t>(at) % (dtype == DType::float32 ? 8 : 4) == 0;
  };
  require(pairs_of_elements(args.q, args.q_dtype) && pairs_of_elements(args.out, args.out_dtype),
          "[decode_attention] q, out: got an address off two elements, wanted multiples of them");
  require(args.workspace != nullptr && args.workspace_bytes >= plan.bytes,
          "[decode_attention] workspace: got ",
          args.workspace == nullptr ? 0 : args.workspace_bytes, " bytes, wanted ", plan.bytes);
  plan.launcher(plan.params, backends::current_device(), static_cast<cudaStream_t>(stream));
}

}  // namespace veloxquant::cuda
