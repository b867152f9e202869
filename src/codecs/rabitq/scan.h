// Scans over packed sign codes, [n][n_bytes], least significant bit first: Hamming distances and
// the integer dot products of the popcount score. Exact in integers, so equal everywhere.
//
// Bits beyond the dimension (a last byte that is not full) are the caller's to clear: the entry
// points of scan.cpp clear them on the query's side, where one AND serves every key.
#pragma once

#include <cstdint>

#include "veloxquant/backend.h"

namespace veloxquant::rabitq {

constexpr int kMaxCodeBytes = 4096;

// out[i] = popcount((query ^ codes[i]) & mask) * scale + offset[i]: one product, one sum.
// mask holds n_bytes bytes; only its last byte may have zeros.
struct HammingScan {
  const uint8_t* query = nullptr;
  const uint8_t* mask = nullptr;
  const uint8_t* codes = nullptr;
  int64_t n = 0;
  int n_bytes = 0;
  const float* offset = nullptr;
  float scale = 1.0f;
  float* out = nullptr;
  // Write past the caches: for more scores than they hold. out must be 64-byte aligned.
  bool stream = false;
};

// dots[i] = sum_j 2^j popcount(codes[i] & planes[j]), counts[i] = popcount(codes[i] & mask).
// planes: [n_planes][n_bytes], zero wherever mask is.
struct PopcountScan {
  const uint8_t* planes = nullptr;
  int n_planes = 0;
  const uint8_t* mask = nullptr;
  const uint8_t* codes = nullptr;
  int64_t n = 0;
  int n_bytes = 0;
  uint32_t* dots = nullptr;
  uint32_t* counts = nullptr;
};

struct ScanKernels {
  void (*hamming)(const HammingScan& scan);
  void (*popcount)(const PopcountScan& scan);
};

const ScanKernels& reference_scans();
const ScanKernels& cpu_scans();
inline const ScanKernels& scans_of(Backend backend) {
  return backend == Backend::reference ? reference_scans() : cpu_scans();
}

}  // namespace veloxquant::rabitq
