#include "veloxquant/attention.h"

#include <limits>
#include <vector>

#include "src/attention/cpu_parts.h"
#include "src/attention/element.h"
#include "src/math/portable.h"

namespace veloxquant {
namespace {

// Loops that compare and round may lose a NaN on the way to the output, which would hide a model
// that has gone wrong: rows of queries that are not finite become NaN here, whatever the loops did.
void spread_nan(const attention::Problem& p) {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> row(p.head_dim);
  for (int b = 0; b < p.batch; ++b) {
    for (int kv_head = 0; kv_head < p.n_kv_heads; ++kv_head) {
      for (int64_t r = 0; r < p.n_rows(); ++r) {
        p.load_queries(b, kv_head, r, 1, row.data());
        bool finite = true;
        for (float x : row) finite &= is_finite_bits(bits_of(x));
        if (finite) continue;
        const int head = p.q_head_of(kv_head, r);
        for (int d = 0; d < p.head_dim; ++d) {
          attention::store_element(p.out.at(b, head, p.query_of(r)), p.out.dtype, d, kNaN);
        }
        if (!p.lse.empty()) *static_cast<float*>(p.lse.at(b, head, p.query_of(r))) = kNaN;
      }
    }
  }
}

}  // namespace

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
  spread_nan(problem);
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
