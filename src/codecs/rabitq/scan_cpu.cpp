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

#include "src/backends/cpu/unroll.h"

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
constexpr int kAhead = 2048;  // bytes that a scan asks for in advance

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
// kChunks: the same at compile time, 0 where only n_chunks says it.
template <bool kPairs, int kChunks, class Count>
HWY_INLINE Group sum_group(const uint8_t* HWY_RESTRICT p, int64_t n_bytes, int n_chunks,
                           const Count count) {
  const U64 d64;
  const U32 d32;
  const int blocks = blocks_per_vector(), chunks = kChunks > 0 ? kChunks : n_chunks;
  VU64 sums[kVectors];
  VELOXQUANT_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    // Vector i, block b: key 4 b + i; with pairs the pair 2 b + i, or 2 (blocks + b) + i - 2.
    const uint8_t* start = kPairs ? p + kBlock * (i < 2 ? i : 2 * blocks + i - 2) : p + i * n_bytes;
    const int64_t step = kPairs ? 2 * kBlock : 4 * n_bytes;
    sums[i] = hn::SumsOf8(count(load_blocks(start, step), 0));
    for (int c = 1; c < chunks; ++c) {
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

// Keys of the groups that can be read in place: without pairs the last chunk of a key may reach
// beyond it.
template <bool kPairs>
HWY_INLINE int64_t keys_in_place(int64_t n, int64_t n_bytes, int64_t n_chunks) {
  const int64_t beyond = kPairs ? 0 : n_chunks * kBlock - n_bytes;
  const int64_t readable = n - (beyond + n_bytes - 1) / n_bytes;
  return readable <= 0 ? 0 : readable / group_keys<kPairs>() * group_keys<kPairs>();
}

// The rest of the keys in turn, one or two groups: a padded copy of the codes, zeros behind them.
template <bool kPairs>
class Rest {
 public:
  Rest(const uint8_t* codes, int64_t first, int64_t n, int64_t n_bytes)
      : codes_(codes), at_(first), n_(n), n_bytes_(n_bytes) {}
  // Copies the next group; its first key and how many keys it has, 0 at the end.
  HWY_INLINE int64_t next(int64_t& first) {
    const int64_t keys = group_keys<kPairs>(), count = std::min(keys, n_ - at_);
    if (count <= 0) return 0;
    std::memset(padded_, 0, static_cast<size_t>(keys * n_bytes_ + kBlock));
    std::memcpy(padded_, codes_ + at_ * n_bytes_, static_cast<size_t>(count * n_bytes_));
    first = at_;
    at_ += count;
    return count;
  }
  const uint8_t* codes() const { return padded_; }

 private:
  static constexpr int kMostKeys = kVectors * (HWY_MAX_BYTES / kBlock) * 2;
  const uint8_t* codes_;
  int64_t at_, n_, n_bytes_;
  HWY_ALIGN uint8_t padded_[kMostKeys * kMaxCodeBytes + kBlock];
};

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

template <bool kPairs, bool kStream, int kChunks, class Count>
HWY_INLINE void hamming_run(const HammingScan& scan, int n_chunks, const Count count) {
  const F32 df;
  const hn::Repartition<int32_t, U8> di;
  const auto scale = hn::Set(df, scan.scale);
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df)), n_bytes = scan.n_bytes;
  const auto score = [&](VU32 distance, const float* offset) HWY_ATTR {
    const auto product = hn::Mul(hn::ConvertTo(df, hn::BitCast(di, distance)), scale);
    return hn::Add(product, hn::LoadU(df, offset));
  };
  const auto store = [&](hn::Vec<F32> scores, float* out) HWY_ATTR {
    kStream ? hn::Stream(scores, df, out) : hn::StoreU(scores, df, out);
  };
  const int64_t in_place = keys_in_place<kPairs>(scan.n, n_bytes, n_chunks);
  const uint8_t* HWY_RESTRICT codes = scan.codes;
  const float* HWY_RESTRICT offset = scan.offset;
  float* HWY_RESTRICT out = scan.out;
  for (int64_t i = 0; i < in_place; i += group_keys<kPairs>()) {
    const uint8_t* from = codes + i * n_bytes;
    hwy::Prefetch(from + kAhead);
    const Group sums = sum_group<kPairs, kChunks>(from, n_bytes, n_chunks, count);
    store(score(sums.first, offset + i), out + i);
    if (kPairs) store(score(sums.second, offset + i + lanes), out + i + lanes);
  }
  Rest<kPairs> rest(codes, in_place, scan.n, n_bytes);
  int64_t i = 0;
  while (const int64_t keys = rest.next(i)) {
    const Group sums = sum_group<kPairs, 0>(rest.codes(), n_bytes, n_chunks, count);
    HWY_ALIGN float some_offset[2 * HWY_MAX_BYTES / sizeof(float)] = {};
    HWY_ALIGN float some_out[2 * HWY_MAX_BYTES / sizeof(float)];
    std::memcpy(some_offset, offset + i, sizeof(float) * static_cast<size_t>(keys));
    hn::StoreU(score(sums.first, some_offset), df, some_out);
    if (kPairs) hn::StoreU(score(sums.second, some_offset + lanes), df, some_out + lanes);
    std::memcpy(out + i, some_out, sizeof(float) * static_cast<size_t>(keys));
  }
}

template <bool kStream>
HWY_INLINE void hamming_any(const HammingScan& scan) {
  const U8 d;
  HWY_ALIGN uint8_t query[kMaxCodeBytes + kBlock], mask[kMaxCodeBytes + kBlock];
  const int n_chunks = (scan.n_bytes + kBlock - 1) / kBlock;
  if (scan.n_bytes == 8) {
    copy_twice(scan.query, query);
    copy_twice(scan.mask, mask);
    return hamming_run<true, kStream, 1>(
        scan, 1, HammingOneChunk{hn::LoadDup128(d, query), hn::LoadDup128(d, mask)});
  }
  copy_padded(scan.query, scan.n_bytes, n_chunks, query);
  copy_padded(scan.mask, scan.n_bytes, n_chunks, mask);
  if (scan.n_bytes == kBlock && scan.mask[kBlock - 1] == 0xff) {
    return hamming_run<false, kStream, 1>(scan, 1, HammingOneWholeChunk{hn::LoadDup128(d, query)});
  }
  if (n_chunks == 1) {
    return hamming_run<false, kStream, 1>(
        scan, 1, HammingOneChunk{hn::LoadDup128(d, query), hn::LoadDup128(d, mask)});
  }
  hamming_run<false, kStream, 0>(scan, n_chunks, HammingChunks{query, mask});
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
HWY_INLINE void add_counts(const PopcountScan& scan, int n_chunks, const Count count, int shift,
                           uint32_t* HWY_RESTRICT out) {
  const U32 d32;
  const auto total = [&](VU32 sum, const uint32_t* before) HWY_ATTR {
    return shift == 0 ? sum : hn::Add(hn::LoadU(d32, before), hn::ShiftLeftSame(sum, shift));
  };
  const int64_t in_place = keys_in_place<false>(scan.n, scan.n_bytes, n_chunks);
  const uint8_t* HWY_RESTRICT codes = scan.codes;
  for (int64_t i = 0; i < in_place; i += group_keys<false>()) {
    const Group sums = sum_group<false, 0>(codes + i * scan.n_bytes, scan.n_bytes, n_chunks, count);
    hn::StoreU(total(sums.first, out + i), d32, out + i);
  }
  Rest<false> rest(codes, in_place, scan.n, scan.n_bytes);
  int64_t i = 0;
  while (const int64_t keys = rest.next(i)) {
    const Group sums = sum_group<false, 0>(rest.codes(), scan.n_bytes, n_chunks, count);
    HWY_ALIGN uint32_t some[HWY_MAX_BYTES / sizeof(uint32_t)] = {};
    if (shift != 0) std::memcpy(some, out + i, sizeof(uint32_t) * static_cast<size_t>(keys));
    hn::StoreU(total(sums.first, some), d32, some);
    std::memcpy(out + i, some, sizeof(uint32_t) * static_cast<size_t>(keys));
  }
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
