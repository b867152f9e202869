// Scans with Highway: a 128-bit block of a vector holds one key (or 16 bytes of a longer one, or
// two keys of 8 bytes), four vectors make one group, and the byte counts of a group are summed by
// SumsOf8 and interleaved so that the results leave in the order of the keys. The query stays in
// registers. PopulationCount is VPOPCNTB on AVX3_DL, two nibble shuffles below.
#include "src/codecs/rabitq/scan.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/codecs/rabitq/scan_cpu.cpp"
#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <algorithm>
#include <cstring>

HWY_BEFORE_NAMESPACE();
namespace veloxquant::rabitq::HWY_NAMESPACE {
#if HWY_TARGET == HWY_SCALAR  // the baseline of x86 builds: no vectors, the specification as it is
void hamming(const HammingScan& scan) { reference_scans().hamming(scan); }
void popcount(const PopcountScan& scan) { reference_scans().popcount(scan); }
#else
namespace hn = hwy::HWY_NAMESPACE;

using U8 = hn::ScalableTag<uint8_t>;
using U32 = hn::Repartition<uint32_t, U8>;
using U64 = hn::Repartition<uint64_t, U8>;
using F32 = hn::Repartition<float, U8>;
using VU8 = hn::Vec<U8>;
using VU32 = hn::Vec<U32>;
using VU64 = hn::Vec<U64>;

constexpr int kBlock = 16;  // bytes of a 128-bit block
constexpr int kVectors = 4;

HWY_INLINE int blocks_per_vector() { return static_cast<int>(hn::Lanes(U8())) / kBlock; }

// A vector whose block b is the 16 bytes at p + b * step.
HWY_INLINE VU8 load_blocks(const uint8_t* HWY_RESTRICT p, int64_t step) {
#if HWY_MAX_BYTES == 32
  const hn::FixedTag<uint8_t, 16> d16;
  return hn::Combine(U8(), hn::LoadU(d16, p + step), hn::LoadU(d16, p));
#elif HWY_MAX_BYTES == 64
  const hn::FixedTag<uint8_t, 16> d16;
  const hn::FixedTag<uint8_t, 32> d32;
  const auto low = hn::Combine(d32, hn::LoadU(d16, p + step), hn::LoadU(d16, p));
  const auto high = hn::Combine(d32, hn::LoadU(d16, p + 3 * step), hn::LoadU(d16, p + 2 * step));
  return hn::Combine(U8(), high, low);
#else
  (void)step;
  return hn::LoadU(U8(), p);
#endif
}

// Keys of one group. kPairs: two keys a block.
template <bool kPairs>
HWY_INLINE int64_t group_keys() {
  return static_cast<int64_t>(kVectors) * blocks_per_vector() * (kPairs ? 2 : 1);
}

// The results of one group, in the order of the keys; without pairs only `first` is used.
struct Group {
  VU32 first, second;
};

// count(block vector, chunk) gives byte counts of at most 255; they are summed per key.
// n_chunks: blocks of 16 bytes a key takes; the last may reach beyond it (count masks it).
template <bool kPairs, class Count>
HWY_INLINE Group sum_group(const uint8_t* HWY_RESTRICT p, int64_t n_bytes, int n_chunks,
                           const Count& count) {
  const U64 d64;
  const U32 d32;
  const int blocks = blocks_per_vector();
  VU64 sums[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    // Vector i, block b: key 4 b + i; with pairs the pair 2 b + i, or 2 (blocks + b) + i - 2.
    const uint8_t* start = kPairs ? p + kBlock * (i < 2 ? i : 2 * blocks + i - 2) : p + i * n_bytes;
    const int64_t step = kPairs ? 2 * kBlock : 4 * n_bytes;
    sums[i] = hn::SumsOf8(count(load_blocks(start, step), 0));
    for (int c = 1; c < n_chunks; ++c) {
      sums[i] = hn::Add(sums[i], hn::SumsOf8(count(load_blocks(start + c * kBlock, step), c)));
    }
  }
  const VU64 a = hn::Or(sums[0], hn::ShiftLeft<32>(sums[1]));
  const VU64 b = hn::Or(sums[2], hn::ShiftLeft<32>(sums[3]));
  const VU32 low = hn::BitCast(d32, hn::InterleaveLower(d64, a, b));
  const VU32 high = hn::BitCast(d32, hn::InterleaveUpper(d64, a, b));
  if (kPairs) {
    return {hn::InterleaveLower(d32, low, high), hn::InterleaveUpper(d32, low, high)};
  }
  const VU32 sum = hn::Add(low, high);
  return {sum, sum};
}

// Calls group(p, n_bytes, first key, keys) for every full group, then once or twice for the rest
// with a padded copy of the codes, of which only `keys` results count.
template <bool kPairs, class Each>
HWY_INLINE void for_groups(const uint8_t* codes, int64_t n, int n_bytes, int n_chunks,
                           const Each& each) {
  const int64_t keys = group_keys<kPairs>();
  const int64_t reach = static_cast<int64_t>(n_chunks) * kBlock - n_bytes;  // read beyond a key
  int64_t i = 0;
  if (kPairs) {
    for (; i + keys <= n; i += keys) each(codes + i * n_bytes, i, keys);
  } else {
    for (; (i + keys) * n_bytes + reach <= n * n_bytes; i += keys) {
      each(codes + i * n_bytes, i, keys);
    }
  }
  if (i == n) return;
  constexpr int kMostKeys = kVectors * (HWY_MAX_BYTES / kBlock) * 2;
  HWY_ALIGN uint8_t padded[kMostKeys * kMaxCodeBytes + kBlock];
  while (i < n) {
    const int64_t rest = std::min(keys, n - i);
    std::memset(padded, 0, static_cast<size_t>(keys * n_bytes + kBlock));
    std::memcpy(padded, codes + i * n_bytes, static_cast<size_t>(rest * n_bytes));
    each(padded, i, rest);
    i += rest;
  }
}

// 16 n_chunks bytes, zero beyond n.
HWY_INLINE void copy_padded(const uint8_t* from, int n, int n_chunks, uint8_t* to) {
  std::memset(to, 0, static_cast<size_t>(n_chunks) * kBlock);
  std::memcpy(to, from, static_cast<size_t>(n));
}

// Both halves of a block are one key of 8 bytes.
HWY_INLINE void copy_twice(const uint8_t* from, uint8_t* to) {
  std::memcpy(to, from, 8);
  std::memcpy(to + 8, from, 8);
}

struct HammingOneChunk {
  VU8 query, mask;
  HWY_INLINE VU8 operator()(VU8 code, int) const {
    return hn::PopulationCount(hn::And(hn::Xor(code, query), mask));
  }
};
struct HammingOneWholeChunk {
  VU8 query;
  HWY_INLINE VU8 operator()(VU8 code, int) const {
    return hn::PopulationCount(hn::Xor(code, query));
  }
};
struct HammingChunks {
  const uint8_t* query;
  const uint8_t* mask;
  HWY_INLINE VU8 operator()(VU8 code, int c) const {
    const U8 d;
    const VU8 different = hn::Xor(code, hn::LoadDup128(d, query + c * kBlock));
    return hn::PopulationCount(hn::And(different, hn::LoadDup128(d, mask + c * kBlock)));
  }
};

template <bool kPairs, bool kStream, class Count>
HWY_INLINE void hamming_run(const HammingScan& scan, int n_chunks, const Count& count) {
  const F32 df;
  const hn::Repartition<int32_t, U8> di;
  const auto scale = hn::Set(df, scan.scale);
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  const auto score = [&](VU32 distance, const float* offset) HWY_ATTR {
    const auto product = hn::Mul(hn::ConvertTo(df, hn::BitCast(di, distance)), scale);
    return hn::Add(product, hn::LoadU(df, offset));
  };
  const auto store = [&](hn::Vec<F32> scores, float* out) HWY_ATTR {
    kStream ? hn::Stream(scores, df, out) : hn::StoreU(scores, df, out);
  };
  for_groups<kPairs>(scan.codes, scan.n, scan.n_bytes, n_chunks,
                     [&](const uint8_t* p, int64_t i, int64_t keys) HWY_ATTR {
                       const Group sums = sum_group<kPairs>(p, scan.n_bytes, n_chunks, count);
                       if (keys == group_keys<kPairs>()) {
                         store(score(sums.first, scan.offset + i), scan.out + i);
                         if (kPairs)
                           store(score(sums.second, scan.offset + i + lanes), scan.out + i + lanes);
                         return;
                       }
                       HWY_ALIGN float offset[2 * HWY_MAX_BYTES / sizeof(float)] = {};
                       HWY_ALIGN float out[2 * HWY_MAX_BYTES / sizeof(float)];
                       std::memcpy(offset, scan.offset + i,
                                   sizeof(float) * static_cast<size_t>(keys));
                       hn::StoreU(score(sums.first, offset), df, out);
                       if (kPairs) hn::StoreU(score(sums.second, offset + lanes), df, out + lanes);
                       std::memcpy(scan.out + i, out, sizeof(float) * static_cast<size_t>(keys));
                     });
}

template <bool kStream>
HWY_INLINE void hamming_any(const HammingScan& scan) {
  const U8 d;
  HWY_ALIGN uint8_t query[kMaxCodeBytes + kBlock], mask[kMaxCodeBytes + kBlock];
  const int n_chunks = (scan.n_bytes + kBlock - 1) / kBlock;
  if (scan.n_bytes == 8) {
    copy_twice(scan.query, query);
    copy_twice(scan.mask, mask);
    return hamming_run<true, kStream>(
        scan, 1, HammingOneChunk{hn::LoadDup128(d, query), hn::LoadDup128(d, mask)});
  }
  copy_padded(scan.query, scan.n_bytes, n_chunks, query);
  copy_padded(scan.mask, scan.n_bytes, n_chunks, mask);
  if (scan.n_bytes == kBlock && scan.mask[kBlock - 1] == 0xff) {
    return hamming_run<false, kStream>(scan, 1, HammingOneWholeChunk{hn::LoadDup128(d, query)});
  }
  if (n_chunks == 1) {
    return hamming_run<false, kStream>(
        scan, 1, HammingOneChunk{hn::LoadDup128(d, query), hn::LoadDup128(d, mask)});
  }
  hamming_run<false, kStream>(scan, n_chunks, HammingChunks{query, mask});
}

void hamming(const HammingScan& scan) {
  scan.stream ? hamming_any<true>(scan) : hamming_any<false>(scan);
  if (scan.stream) hwy::FlushStream();
}

// Weighted counts of up to four planes: at most 8 * 15 a byte.
template <int kPlanes>
struct PlaneCounts {
  const uint8_t* planes;  // [kPlanes][stride]
  int64_t stride;
  HWY_INLINE VU8 operator()(VU8 code, int c) const {
    const U8 d;
    VU8 sum = hn::Zero(d);
    for (int j = kPlanes - 1; j >= 0; --j) {
      const VU8 plane = hn::LoadDup128(d, planes + j * stride + c * kBlock);
      sum = hn::Add(hn::Add(sum, sum), hn::PopulationCount(hn::And(code, plane)));
    }
    return sum;
  }
};

// out[i] += sum << shift, or = where shift is 0.
template <class Count>
HWY_INLINE void add_counts(const PopcountScan& scan, int n_chunks, const Count& count, int shift,
                           uint32_t* out) {
  const U32 d32;
  for_groups<false>(scan.codes, scan.n, scan.n_bytes, n_chunks,
                    [&](const uint8_t* p, int64_t i, int64_t keys) HWY_ATTR {
                      const VU32 sum = sum_group<false>(p, scan.n_bytes, n_chunks, count).first;
                      if (keys == group_keys<false>() && shift == 0) {
                        hn::StoreU(sum, d32, out + i);
                        return;
                      }
                      HWY_ALIGN uint32_t sums[HWY_MAX_BYTES / sizeof(uint32_t)];
                      hn::Store(sum, d32, sums);
                      for (int64_t k = 0; k < keys; ++k) {
                        out[i + k] = (shift == 0 ? 0 : out[i + k]) + (sums[k] << shift);
                      }
                    });
}

void popcount(const PopcountScan& scan) {
  const int n_chunks = (scan.n_bytes + kBlock - 1) / kBlock;
  const int64_t stride = static_cast<int64_t>(n_chunks) * kBlock;
  HWY_ALIGN uint8_t planes[4 * (kMaxCodeBytes + kBlock)];
  copy_padded(scan.mask, scan.n_bytes, n_chunks, planes);
  add_counts(scan, n_chunks, PlaneCounts<1>{planes, stride}, 0, scan.counts);
  for (int first = 0; first < scan.n_planes; first += 4) {
    const int n = std::min(4, scan.n_planes - first);
    for (int j = 0; j < n; ++j) {
      copy_padded(scan.planes + (first + j) * scan.n_bytes, scan.n_bytes, n_chunks,
                  planes + j * stride);
    }
    switch (n) {
      case 1:
        add_counts(scan, n_chunks, PlaneCounts<1>{planes, stride}, first, scan.dots);
        break;
      case 2:
        add_counts(scan, n_chunks, PlaneCounts<2>{planes, stride}, first, scan.dots);
        break;
      case 3:
        add_counts(scan, n_chunks, PlaneCounts<3>{planes, stride}, first, scan.dots);
        break;
      default:
        add_counts(scan, n_chunks, PlaneCounts<4>{planes, stride}, first, scan.dots);
    }
  }
}

#endif  // HWY_SCALAR
}  // namespace veloxquant::rabitq::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "src/backends/cpu/simd_targets.h"

namespace veloxquant::rabitq {

HWY_EXPORT(hamming);
HWY_EXPORT(popcount);

const ScanKernels& cpu_scans() {
  cpu::apply_environment();
  static const ScanKernels kernels{[](const HammingScan& scan) {
                                     HWY_DYNAMIC_DISPATCH(hamming)
                                     (scan);
                                   },
                                   [](const PopcountScan& scan) {
                                     HWY_DYNAMIC_DISPATCH(popcount)
                                     (scan);
                                   }};
  return kernels;
}

}  // namespace veloxquant::rabitq
#endif  // HWY_ONCE
