// The executable specification of the scans.
#include <bit>

#include "src/codecs/rabitq/scan.h"
#include "src/math/portable.h"

namespace veloxquant::rabitq {
namespace {

void hamming(const HammingScan& scan) {
  for (int64_t i = 0; i < scan.n; ++i) {
    const uint8_t* code = scan.codes + i * scan.n_bytes;
    int distance = 0;
    for (int b = 0; b < scan.n_bytes; ++b) {
      distance += std::popcount(static_cast<uint8_t>((scan.query[b] ^ code[b]) & scan.mask[b]));
    }
    scan.out[i] = mul(static_cast<float>(distance), scan.scale) + scan.offset[i];
  }
}

void popcount(const PopcountScan& scan) {
  for (int64_t i = 0; i < scan.n; ++i) {
    const uint8_t* code = scan.codes + i * scan.n_bytes;
    uint32_t dot = 0, count = 0;
    for (int b = 0; b < scan.n_bytes; ++b) {
      count += std::popcount(static_cast<uint8_t>(code[b] & scan.mask[b]));
      for (int j = 0; j < scan.n_planes; ++j) {
        const uint8_t both = code[b] & scan.planes[j * scan.n_bytes + b];
        dot += static_cast<uint32_t>(std::popcount(both)) << j;
      }
    }
    scan.dots[i] = dot;
    scan.counts[i] = count;
  }
}

}  // namespace

const ScanKernels& reference_scans() {
  static const ScanKernels kernels{hamming, popcount};
  return kernels;
}

}  // namespace veloxquant::rabitq
