#include "src/mlx/primitives.h"

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>

#include "src/artifacts/manifest.h"
#include "src/mlx/views.h"
#include "veloxquant/dequantize.h"

namespace veloxquant {
namespace mx = mlx::core;
namespace {

void allocate(mx::array& a) { a.set_data(mx::allocator::malloc(a.nbytes())); }

// What a task on the stream's thread may hold: it must not keep arrays alive itself.
std::vector<mx::array> weak_copies(const std::vector<mx::array>& arrays) {
  std::vector<mx::array> copies;
  copies.reserve(arrays.size());
  for (const mx::array& a : arrays) copies.push_back(mx::array::unsafe_weak_copy(a));
  return copies;
}

template <class Task>
void dispatch(const mx::Stream& stream, const std::vector<mx::array>& inputs,
              std::vector<mx::array>& outputs, Task task) {
  auto& encoder = mx::cpu::get_command_encoder(stream);
  for (const mx::array& a : inputs) encoder.set_input_array(a);
  for (mx::array& a : outputs) {
    allocate(a);
    encoder.set_output_array(a);
  }
  encoder.dispatch([in = weak_copies(inputs), out = weak_copies(outputs),
                    task = std::move(task)]() mutable { task(in, out); });
}

}  // namespace

void CpuPrimitive::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) {
  fail("[", name(), "] stream: got a GPU stream, wanted a CPU stream (no GPU kernel is built in)");
}

CacheAppend::CacheAppend(mx::Stream stream, SharedCodec keys, SharedCodec values,
                         CacheGeometry geometry, AppendPlan plan, Counter nonfinite)
    : CpuPrimitive(stream),
      keys_(std::move(keys)),
      values_(std::move(values)),
      geometry_(std::move(geometry)),
      plan_(plan),
      nonfinite_(std::move(nonfinite)) {}

void CacheAppend::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  dispatch(stream(), inputs, outputs,
           [keys = keys_, values = values_, geometry = geometry_, plan = plan_,
            nonfinite = nonfinite_](const std::vector<mx::array>& in, std::vector<mx::array>& out) {
             AppendBuffers buffers;
             buffers.new_keys = view_of(in[0]);
             buffers.new_values = view_of(in[1]);
             buffers.exact_keys = view_of(in[2]);
             buffers.exact_values = view_of(in[3]);
             buffers.next_exact_keys = mutable_view_of(out[0]);
             buffers.next_exact_values = mutable_view_of(out[1]);
             if (plan.n_sealed > 0) {
               buffers.key_blocks = out[2].data<uint8_t>();
               buffers.value_blocks = out[3].data<uint8_t>();
             }
             *nonfinite +=
                 run_append(default_backend(), geometry, plan, *keys->core, *values->core, buffers);
           });
}

CacheAttend::CacheAttend(mx::Stream stream, Spec spec)
    : CpuPrimitive(stream), spec_(std::move(spec)) {}

void CacheAttend::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  dispatch(stream(), inputs, outputs,
           [spec = spec_](const std::vector<mx::array>& in, std::vector<mx::array>& out) {
             const mx::array* keys = in.data() + 1;
             const mx::array* values = keys + spec.n_key_inputs;
             const mx::array* rest = values + spec.n_value_inputs;
             const KeyValueSource source =
                 source_over(spec.layout, spec.keys->core, spec.values->core, spec.has_exact,
                             spec.has_chunk, keys, values);
             AttentionParams params = spec.params;
             if (spec.has_mask) params.mask.array = view_of(*rest++);
             if (spec.has_sinks) params.sink_logits = view_of(*rest++);
             attend(default_backend(), view_of(in[0]), source, params, mutable_view_of(out[0]),
                    mutable_view_of(out[1]));
           });
}

CacheDequantize::CacheDequantize(mx::Stream stream, SnapshotLayout layout, SharedCodec codec,
                                 bool has_exact, bool has_chunk)
    : CpuPrimitive(stream),
      layout_(std::move(layout)),
      codec_(std::move(codec)),
      has_exact_(has_exact),
      has_chunk_(has_chunk) {}

void CacheDequantize::eval_cpu(const std::vector<mx::array>& inputs,
                               std::vector<mx::array>& outputs) {
  dispatch(stream(), inputs, outputs,
           [layout = layout_, codec = codec_, has_exact = has_exact_, has_chunk = has_chunk_](
               const std::vector<mx::array>& in, std::vector<mx::array>& out) {
             const KeyValueSource source = source_over(layout, codec->core, codec->core, has_exact,
                                                       has_chunk, in.data(), in.data());
             dequantize(default_backend(), source, Side::keys, mutable_view_of(out[0]));
           });
}

Checksum::Checksum(mx::Stream stream, uint32_t text_crc)
    : CpuPrimitive(stream), text_crc_(text_crc) {}

void Checksum::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  dispatch(stream(), inputs, outputs,
           [crc = text_crc_](const std::vector<mx::array>& in, std::vector<mx::array>& out) {
             uint32_t sum = crc;
             for (const mx::array& a : in) sum = crc32_of({a.data<char>(), a.nbytes()}, sum);
             *out[0].data<uint32_t>() = sum;
           });
}

}  // namespace veloxquant
