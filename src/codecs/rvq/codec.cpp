// Two-stage residual scalar quantisation: the scalar codec with two planes.
#include "src/codecs/registry.h"
#include "src/codecs/turboquant/scalar_codec.h"

namespace veloxquant {

CodecPtr make_rvq_codec(Side side, int n_kv_heads, int head_dim, const RvqOptions& options) {
  turboquant::ScalarCodecParams params{"turboquant_rvq", side, n_kv_heads, head_dim};
  params.n_stages = 2;
  params.bits = options.bits;
  params.scale = options.scale;
  params.seed = options.seed;
  return turboquant::make_scalar_codec(params);
}

CodecPtr rvq_from_spec(const CodecSpec& spec, const CodecTables& tables) {
  SpecReader reader(spec, tables);
  RvqOptions options;
  options.bits = static_cast<int>(reader.integer("bits", 1, kMaxScalarBits));
  options.scale =
      static_cast<ScalarScale>(reader.choice("scale", {"norm_corrected", "raw", "unbiased"}));
  options.seed = static_cast<uint64_t>(reader.integer_or("seed", 0, 0, INT64_MAX));
  reader.finish();
  return make_rvq_codec(spec.side, spec.n_kv_heads, spec.head_dim, options);
}

}  // namespace veloxquant
