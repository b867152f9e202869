// What runs on a GPU stream, by name: what `veloxquant devices` lists, and its selftest covers.
#include "src/attention/kernel_calls.h"
#include "src/attention/rvq_calls.h"
#include "src/codecs/qjl/kernel_calls.h"
#include "src/codecs/turboquant/kernel_calls.h"
#include "src/codecs/vecinfer/kernel_calls.h"
#include "src/mlx/gpu_launch.h"

namespace veloxquant {
namespace {

std::vector<GpuOperation> operations() {
  const std::string rows = vecinfer::row_limits(), values = turboquant::row_limits();
  const std::string caches = "caches of " + attention::decode_limits();
  return {{"vecinfer_quantize_metal", rows},
          {"vecinfer_dequant_metal", rows},
          {"vecinfer_encode_decode_metal", rows},
          {"vecinfer_encode_decode_simple_metal", rows},
          {"compute_query_lut", rows},
          {"turboquant_scalar_quantize", values},
          {"turboquant_scalar_dequantize", values},
          {"turboquant_hadamard_quantize", values},
          {"turboquant_bit_pack", "any"},
          {"turboquant_bit_unpack", "any"},
          {"rabitq_hamming_score", "one query"},
          {"rabitq_encode", "any"},
          {"rabitq_popcount_score", "any"},
          {"qjl_encode", qjl::row_limits()},
          {"qjl_inner_product", "any"},
          {"comm_vq_decode_metal", "any; cosines and sines by the CPU, in double precision"},
          {"turboquant_fused_rvq_decode_attend", attention::rvq_limits()},
          {"append", caches},
          {"attend", caches + ", few spans"},
          {"dequantize", caches}};
}

}  // namespace

const std::vector<GpuOperation>& gpu_operations() {
  static const std::vector<GpuOperation> all = operations();
  return all;
}

}  // namespace veloxquant
