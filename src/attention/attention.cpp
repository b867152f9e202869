#include "veloxquant/attention.h"

#include "src/attention/problem.h"

namespace veloxquant {

void attend(Backend backend, const TensorView& q, const KeyValueSource& source,
            const AttentionParams& params, const MutableTensorView& out,
            const MutableTensorView& lse) {
  attention::Problem problem = attention::prepare(q, source, params, out, lse);
  if (debug_enabled()) log_once("attend: " + attention_kernel_name(backend, source));
  if (backend == Backend::reference) {
    attention::attend_reference(problem);
  } else {
    attention::attend_cpu(problem);
  }
}

std::string attention_kernel_name(Backend backend, const KeyValueSource& source) {
  std::string name =
      backend == Backend::reference ? "reference loops" : "cpu/" + simd_level() + " tiles";
  if (source.packed.empty() || source.key_codec == nullptr || source.value_codec == nullptr) {
    return name + " (exact)";
  }
  std::string keys = source.key_codec->name();
  std::string values = source.value_codec->name();
  return name + " (" + (keys == values ? keys : keys + " keys, " + values + " values") + ")";
}

}  // namespace veloxquant
