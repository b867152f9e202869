#include "veloxquant/attention.h"

#include "src/attention/cpu_parts.h"

namespace veloxquant {

void attend(Backend backend, const TensorView& q, const KeyValueSource& source,
            const AttentionParams& params, const MutableTensorView& out,
            const MutableTensorView& lse) {
  attention::Problem problem = attention::prepare(q, source, params, out, lse);
  if (debug_enabled()) {
    log_once("attend: " + attention_kernel_name(backend, source, problem.n_rows()));
  }
  if (backend == Backend::reference) {
    attention::attend_reference(problem);
  } else {
    attention::attend_cpu(problem);
  }
}

std::string attention_kernel_name(Backend backend, const KeyValueSource& source,
                                  int64_t n_query_rows) {
  const std::string loops =
      backend == Backend::reference ? "reference loops" : "cpu/" + simd_level();
  const std::string decoding = backend == Backend::reference ? loops : loops + " tiles";
  if (source.packed.empty() || source.key_codec == nullptr || source.value_codec == nullptr) {
    return decoding + " (exact)";
  }
  int64_t n_blocks = 0;
  for (const PackedRun& run : source.packed) n_blocks += run.n_blocks;
  const attention::CodeUse use =
      attention::choose_code_use(backend, source, n_query_rows, n_blocks);
  const std::string keys = source.key_codec->name();
  const std::string values = source.value_codec->name();
  const std::string codecs = keys == values ? keys : keys + " keys, " + values + " values";
  if (use.keys || use.values) return loops + " codes (" + codecs + ": " + use.name + ")";
  if (backend == Backend::reference) return decoding + " (" + codecs + ")";
  return decoding + " (" + codecs + (use.name.empty() ? "" : ": " + use.name) + ")";
}

}  // namespace veloxquant
