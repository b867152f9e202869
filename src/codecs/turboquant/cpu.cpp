// The scalar codecs on the CPU: compiled once per SIMD level. A token is encoded in registers, as
// one row: norm, rotation, codes, scalar. Sums keep the 16 partial sums of src/math/row_sums.h.
#include "src/codecs/turboquant/kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/codecs/turboquant/cpu.cpp"
#include <hwy/aligned_allocator.h>
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "src/backends/cpu/unroll.h"
#include "src/codecs/hadamard-inl.h"
#include "src/math/row_sums.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant::turboquant::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
using veloxquant::HWY_NAMESPACE::rotate_row_simd;

using F32 = hn::CappedTag<float, kRowLanes>;
using I32 = hn::RebindToSigned<F32>;
using VF = hn::Vec<F32>;
using VI = hn::Vec<I32>;

// The partial sums of a row in as many vectors as the level needs for 16 lanes.
class RowSum {
 public:
  static constexpr int kVectors = kRowLanes / HWY_LANES(float) > 0 ? kRowLanes / HWY_LANES(float)
                                                                   : 1;
  RowSum() {
    for (int i = 0; i < kVectors; ++i) sum_[i] = hn::Zero(F32());
  }
  // part: which vector of the 16 lanes
  HWY_INLINE void add(int part, VF a, VF b) { sum_[part] = hn::Add(sum_[part], hn::Mul(a, b)); }
  HWY_INLINE float fold() const {
    HWY_ALIGN float partial[kRowLanes];
    const F32 d;
    for (int i = 0; i < kVectors; ++i) hn::Store(sum_[i], d, partial + i * hn::Lanes(d));
    return fold_row_lanes(partial);
  }

 private:
  VF sum_[kVectors];
};

// One quantiser spread over vectors.
template <int kBits>
struct VectorQuantizer {
  static constexpr int kHalf = kBits == 0 ? 1 : 1 << (kBits - 1);
  VF boundary[kHalf], level[kHalf], table;

  explicit VectorQuantizer(const ScalarQuantizer& quantizer) {
    const F32 d;
    for (int k = 0; k < kHalf; ++k) {
      boundary[k] = hn::Set(d, quantizer.boundary[k]);
      level[k] = hn::Set(d, quantizer.level[k]);
    }
    HWY_ALIGN float entries[kRowLanes];
    for (int k = 0; k < kRowLanes; ++k) entries[k] = quantizer.level[k % 8];
    table = hn::Load(d, entries);
  }

  // scalar_code and scalar_level of src/codecs/turboquant/math.h.
  HWY_INLINE void quantise(VF u, VI& code, VF& value) const {
    const F32 d;
    const I32 di;
    if constexpr (kBits == 0) {
      code = hn::Zero(di);
      value = hn::Zero(d);
      return;
    }
    const VF magnitude = hn::Abs(u);
    VI k = hn::Zero(di);
    VELOXQUANT_UNROLL
    for (int i = 1; i < kHalf; ++i) {
      const auto above = hn::Ge(magnitude, boundary[i]);
#if HWY_TARGET <= HWY_AVX3
      k = hn::IfThenElse(hn::RebindMask(di, above), hn::Set(di, i), k);
#else
      k = hn::Sub(k, hn::BitCast(di, hn::VecFromMask(d, above)));
#endif
    }
    VF size;
    if constexpr (kHalf == 1) {
      size = level[0];
    } else {
#if HWY_MAX_BYTES >= 32
      size = hn::TableLookupLanes(table, hn::IndicesFromVec(d, k));
#else
      size = level[0];
      VELOXQUANT_UNROLL
      for (int i = 1; i < kHalf; ++i) {
        size = hn::IfThenElse(hn::Ge(magnitude, boundary[i]), level[i], size);
      }
#endif
    }
    const auto positive = hn::Ge(u, hn::Zero(d));
    value = hn::IfThenElse(positive, size, hn::Neg(size));
    // half + k is the complement of half - 1 - k.
    const VI negative_code = hn::Sub(hn::Set(di, kHalf - 1), k);
    code = hn::Xor(negative_code,
                   hn::IfThenElseZero(hn::RebindMask(di, positive), hn::Set(di, 2 * kHalf - 1)));
  }
};

// Of one row, with room for whole vectors.
struct RowScratch {
  explicit RowScratch(int64_t n)
      : floats(hwy::AllocateAligned<float>(3 * n)),
        bytes(hwy::AllocateAligned<uint8_t>(kMaxPlanes * n)) {
    u = floats.get();
    moved = u + n;
    rest = moved + n;
    for (int p = 0; p < kMaxPlanes; ++p) codes[p] = bytes.get() + p * n;
  }
  hwy::AlignedFreeUniquePtr<float[]> floats;
  hwy::AlignedFreeUniquePtr<uint8_t[]> bytes;
  float *u, *moved, *rest;
  uint8_t* codes[kMaxPlanes];
};

HWY_INLINE float squared_norm(const float* HWY_RESTRICT x, int padded_dim) {
  const F32 d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  RowSum sum;
  for (int i = 0; i < padded_dim; i += kRowLanes) {
    VELOXQUANT_UNROLL
    for (int part = 0; part < RowSum::kVectors; ++part) {
      const VF v = hn::Load(d, x + i + part * lanes);
      sum.add(part, v, v);
    }
  }
  return sum.fold();
}

template <int kBits, int kStages>
void encode_rows_of(const RowEncoder& encoder, const float* x, int64_t n, uint8_t* codes,
                    int64_t stage_stride, uint16_t* scalars, float* left) {
  const F32 d;
  const hn::Rebind<uint8_t, I32> du8;
  const int lanes = static_cast<int>(hn::Lanes(d)), dim = encoder.dim;
  const int padded_dim = (dim + kRowLanes - 1) / kRowLanes * kRowLanes;
  const int step = encoder.signs == nullptr ? 1 : rotation_step(dim);
  const float root_dim = std::sqrt(static_cast<float>(dim));
  const VectorQuantizer<kBits> first(encoder.stage[0]);
  const VectorQuantizer<kStages == 2 ? kBits : 0> second(encoder.stage[1]);
  RowScratch s(padded_dim);
  std::fill(s.u + dim, s.u + padded_dim, 0.0f);
  for (int64_t r = 0; r < n; ++r) {
    std::memcpy(s.u, x + r * dim, sizeof(float) * dim);
    const float norm = std::sqrt(squared_norm(s.u, padded_dim));
    if (encoder.signs != nullptr) rotate_row_simd(encoder.signs, dim, step, s.u, s.moved);
    const VF factor = hn::Set(d, unit_factor(norm, root_dim));
    RowSum sum;
    const bool unbiased = encoder.scale == ScalarScale::unbiased;
    for (int i = 0; i < padded_dim; i += kRowLanes) {
      VELOXQUANT_UNROLL
      for (int part = 0; part < RowSum::kVectors; ++part) {
        const int at = i + part * lanes;
        const VF u = hn::Mul(hn::Load(d, s.u + at), factor);
        VI code;
        VF z;
        first.quantise(u, code, z);
        hn::Store(hn::DemoteTo(du8, code), du8, s.codes[0] + at);
        VF rest = hn::Sub(u, z);
        if constexpr (kStages == 2) {
          VF level;
          second.quantise(rest, code, level);
          hn::Store(hn::DemoteTo(du8, code), du8, s.codes[1] + at);
          rest = hn::Sub(rest, level);
          z = hn::Add(z, level);
        }
        if (left != nullptr) hn::Store(rest, d, s.rest + at);
        if (at + lanes > dim) {  // lanes beyond the row quantise 0 to a level: not summed
          z = hn::IfThenElseZero(hn::FirstN(d, std::max(0, dim - at)), z);
        }
        sum.add(part, unbiased ? u : z, z);
      }
    }
    for (int stage = 0; stage < kStages; ++stage) {
      std::memcpy(codes + stage * stage_stride + r * dim, s.codes[stage], dim);
    }
    if (left != nullptr) std::memcpy(left + r * dim, s.rest, sizeof(float) * dim);
    const float total = sum.fold();
    scalars[r] = encoder.scale == ScalarScale::norm_corrected
                     ? stored_scalar(norm, std::sqrt(total))
                     : (unbiased ? stored_scalar(mul(norm, root_dim), total)
                                 : stored_scalar(norm, root_dim));
  }
}

void encode_rows(const RowEncoder& encoder, const float* x, int64_t n, uint8_t* codes,
                 int64_t stage_stride, uint16_t* scalars, float* left) {
  const int bits = encoder.stage[0].bits;
  using Run = decltype(&encode_rows_of<1, 1>);
  static constexpr Run kOneStage[] = {encode_rows_of<0, 1>, encode_rows_of<1, 1>,
                                      encode_rows_of<2, 1>, encode_rows_of<3, 1>,
                                      encode_rows_of<4, 1>};
  static constexpr Run kTwoStages[] = {nullptr, encode_rows_of<1, 2>, encode_rows_of<2, 2>,
                                       encode_rows_of<3, 2>, encode_rows_of<4, 2>};
  (encoder.n_stages == 2 ? kTwoStages : kOneStage)[bits](encoder, x, n, codes, stage_stride,
                                                         scalars, left);
}

// 8 codes of `kBits` bits in the bytes of a 64-bit word <-> the low 8 * kBits bits of it.
template <int kBits>
HWY_INLINE uint64_t gather_word(uint64_t x) {
  constexpr uint64_t kAll = ~uint64_t{0};
  constexpr uint64_t kPairs = (kAll / 0xffff) * ((1u << (2 * kBits)) - 1);
  constexpr uint64_t kQuads = (kAll / 0xffffffff) * ((uint64_t{1} << (4 * kBits)) - 1);
  x = (x | (x >> (8 - kBits))) & kPairs;
  x = (x | (x >> (16 - 2 * kBits))) & kQuads;
  return x | (x >> (32 - 4 * kBits));
}

template <int kBits>
HWY_INLINE uint64_t scatter_word(uint64_t x) {
  constexpr uint64_t kAll = ~uint64_t{0};
  constexpr uint64_t kQuads = (kAll / 0xffffffff) * ((uint64_t{1} << (4 * kBits)) - 1);
  constexpr uint64_t kPairs = (kAll / 0xffff) * ((1u << (2 * kBits)) - 1);
  constexpr uint64_t kOnes = (kAll / 0xff) * ((1u << kBits) - 1);
  x = (x | (x << (32 - 4 * kBits))) & kQuads;
  x = (x | (x << (16 - 2 * kBits))) & kPairs;
  return (x | (x << (8 - kBits))) & kOnes;
}

template <int kBits>
void pack_codes_of(const uint8_t* HWY_RESTRICT codes, int64_t n, uint8_t* HWY_RESTRICT packed) {
  for (int64_t i = 0; i < n; i += 8, packed += kBits) {
    uint64_t word;
    std::memcpy(&word, codes + i, 8);
    word = gather_word<kBits>(word & ((~uint64_t{0} / 0xff) * ((1u << kBits) - 1)));
    std::memcpy(packed, &word, kBits);
  }
}

template <int kBits>
void unpack_codes_of(const uint8_t* HWY_RESTRICT packed, int64_t n, uint8_t* HWY_RESTRICT codes) {
  for (int64_t i = 0; i < n; i += 8, packed += kBits) {
    uint64_t word = 0;
    std::memcpy(&word, packed, kBits);
    word = scatter_word<kBits>(word);
    std::memcpy(codes + i, &word, 8);
  }
}

void pack_codes(const uint8_t* codes, int64_t n, int bits, uint8_t* packed) {
  switch (bits) {
    case 1:
      return pack_codes_of<1>(codes, n, packed);
    case 2:
      return pack_codes_of<2>(codes, n, packed);
    case 3:
      return pack_codes_of<3>(codes, n, packed);
    default:
      return pack_codes_of<4>(codes, n, packed);
  }
}

void unpack_codes(const uint8_t* packed, int64_t n, int bits, uint8_t* codes) {
  switch (bits) {
    case 1:
      return unpack_codes_of<1>(packed, n, codes);
    case 2:
      return unpack_codes_of<2>(packed, n, codes);
    case 3:
      return unpack_codes_of<3>(packed, n, codes);
    default:
      return unpack_codes_of<4>(packed, n, codes);
  }
}

// 8 rows x 8 columns of bytes at once, as three rounds of exchanges between 64-bit words.
HWY_INLINE void transpose_8x8(const uint8_t* HWY_RESTRICT from, int from_stride,
                              uint8_t* HWY_RESTRICT to, int to_stride) {
  uint64_t w[8];
  for (int i = 0; i < 8; ++i) std::memcpy(&w[i], from + i * from_stride, 8);
  auto exchange = [](uint64_t& a, uint64_t& b, int shift, uint64_t mask) {
    const uint64_t moved = ((a >> shift) ^ b) & mask;
    b ^= moved;
    a ^= moved << shift;
  };
  for (int i = 0; i < 4; ++i) exchange(w[i], w[i + 4], 32, 0x00000000ffffffffull);
  for (int i : {0, 1, 4, 5}) exchange(w[i], w[i + 2], 16, 0x0000ffff0000ffffull);
  for (int i : {0, 2, 4, 6}) exchange(w[i], w[i + 1], 8, 0x00ff00ff00ff00ffull);
  for (int i = 0; i < 8; ++i) std::memcpy(to + i * to_stride, &w[i], 8);
}

void transpose_codes(const uint8_t* codes, int rows, int columns, uint8_t* out) {
  for (int r = 0; r < rows; r += 8) {
    for (int c = 0; c < columns; c += 8) {
      transpose_8x8(codes + r * columns + c, columns, out + c * rows + r, rows);
    }
  }
}

// 8 lanes at most: a unit of 8 codes is kBits bytes at any width.
using F8 = hn::CappedTag<float, 8>;
using U8x32 = hn::RebindToUnsigned<F8>;
using V8 = hn::Vec<F8>;

// The levels of 8 consecutive codes.
template <int kBits>
class LevelTable {
 public:
  explicit LevelTable(const ScalarQuantizer* quantizer) {
    const F8 d;
    for (int c = 0; c < 16; ++c) {
      entries_[c] = quantizer == nullptr ? 0.0f : scalar_level(*quantizer, c & ((1 << kBits) - 1));
    }
    low_ = hn::Load(d, entries_);
    high_ = hn::Load(d, entries_ + 16 - hn::Lanes(d));
    HWY_ALIGN uint32_t shifts[8];
    for (int i = 0; i < 8; ++i) shifts[i] = i * kBits;
    for (size_t i = 0; i < 8; i += hn::Lanes(d)) {
      shift_[i / hn::Lanes(d)] = hn::Load(U8x32(), shifts + i);
    }
  }

  // part: which vector of the 8 codes in `word`
  HWY_INLINE V8 look_up(uint32_t word, size_t part) const {
    const F8 d;
    const U8x32 du;
    const hn::RebindToSigned<F8> di;
    const auto code = hn::BitCast(
        di, hn::And(hn::Shr(hn::Set(du, word), shift_[part]), hn::Set(du, (1u << kBits) - 1u)));
#if HWY_MAX_BYTES >= 32
    if constexpr (kBits <= 3) {
      return hn::TableLookupLanes(low_, hn::IndicesFromVec(d, code));
    } else {
      const auto index = hn::IndicesFromVec(d, hn::And(code, hn::Set(di, 7)));
      const V8 upper = hn::BitCast(d, hn::ShiftLeft<28>(code));
      return hn::IfNegativeThenElse(upper, hn::TableLookupLanes(high_, index),
                                    hn::TableLookupLanes(low_, index));
    }
#else
    return hn::GatherIndex(d, entries_, code);
#endif
  }

 private:
  HWY_ALIGN float entries_[16];
  V8 low_, high_;
  hn::Vec<U8x32> shift_[8 / HWY_MIN(8, HWY_LANES(float))];
};

template <int kBits>
HWY_INLINE uint32_t load_unit(const uint8_t* packed) {
  if constexpr (kBits == 3) {  // a copy of 3 bytes through memory is slow
    uint16_t low;
    std::memcpy(&low, packed, 2);
    return low | uint32_t{packed[2]} << 16;
  } else {
    uint32_t word = 0;
    std::memcpy(&word, packed, kBits);
    return word;
  }
}

template <int kBits, int kPlanes>
void decode_rows_of(const DecodeRowsArgs& args, float* y, int64_t y_stride) {
  const F8 d;
  const size_t lanes = hn::Lanes(d);
  const LevelTable<kBits> first(args.quantizer[0]), second(args.quantizer[1]);
  HWY_ALIGN float factors[kMaxHeadDim];
  const int n_factors = args.by_row ? args.rows : args.columns;
  for (int i = 0; i < n_factors; ++i) factors[i] = f16_to_f32(args.scalars[i]);
  const int64_t row_bytes = int64_t{args.columns} * kBits / 8;
  for (int r = 0; r < args.rows; ++r) {
    const uint8_t* one = args.plane[0] + r * row_bytes;
    const uint8_t* two = kPlanes == 2 ? args.plane[1] + r * row_bytes : nullptr;
    float* HWY_RESTRICT out = y + r * y_stride;
    const V8 row_factor = hn::Set(d, args.by_row ? factors[r] : 0.0f);
    for (int c = 0; c < args.columns; c += 8) {
      const uint32_t word = load_unit<kBits>(one + c * kBits / 8);
      const uint32_t rest = kPlanes == 2 ? load_unit<kBits>(two + c * kBits / 8) : 0;
      for (size_t part = 0; part * lanes < 8; ++part) {
        V8 level = first.look_up(word, part);
        if constexpr (kPlanes == 2) level = hn::Add(level, second.look_up(rest, part));
        const size_t at = c + part * lanes;
        const V8 factor = args.by_row ? row_factor : hn::Load(d, factors + at);
        hn::StoreU(hn::Mul(factor, level), d, out + at);
      }
    }
  }
}

void decode_rows(const DecodeRowsArgs& args, float* y, int64_t y_stride) {
  using Run = decltype(&decode_rows_of<1, 1>);
  static constexpr Run kOnePlane[] = {decode_rows_of<1, 1>, decode_rows_of<2, 1>,
                                      decode_rows_of<3, 1>, decode_rows_of<4, 1>};
  static constexpr Run kTwoPlanes[] = {decode_rows_of<1, 2>, decode_rows_of<2, 2>,
                                       decode_rows_of<3, 2>, decode_rows_of<4, 2>};
  const int bits = args.quantizer[0]->bits;
  if (bits == 0) {
    for (int r = 0; r < args.rows; ++r) std::fill_n(y + r * y_stride, args.columns, 0.0f);
    return;
  }
  (args.quantizer[1] == nullptr ? kOnePlane : kTwoPlanes)[bits - 1](args, y, y_stride);
}

void row_times_matrix(const float* x, const float* matrix, int dim, float* out) {
  const F8 d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  for (int j = 0; j < dim; j += lanes) {
    V8 sum = hn::Mul(hn::Set(d, x[0]), hn::LoadU(d, matrix + j));
    for (int i = 1; i < dim; ++i) {
      sum = hn::Add(sum, hn::Mul(hn::Set(d, x[i]), hn::LoadU(d, matrix + i * dim + j)));
    }
    hn::StoreU(sum, d, out + j);
  }
}

}  // namespace veloxquant::turboquant::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "src/backends/cpu/simd_targets.h"

namespace veloxquant::turboquant {

HWY_EXPORT(encode_rows);
HWY_EXPORT(pack_codes);
HWY_EXPORT(unpack_codes);
HWY_EXPORT(transpose_codes);
HWY_EXPORT(decode_rows);
HWY_EXPORT(row_times_matrix);

const Kernels& cpu_kernels() {
  cpu::apply_environment();
  static const Kernels kernels{
      [](const RowEncoder& encoder, const float* x, int64_t n, uint8_t* codes, int64_t stage_stride,
         uint16_t* scalars, float* left) {
        HWY_DYNAMIC_DISPATCH(encode_rows)(encoder, x, n, codes, stage_stride, scalars, left);
      },
      [](const uint8_t* codes, int64_t n, int bits, uint8_t* packed) {
        HWY_DYNAMIC_DISPATCH(pack_codes)(codes, n, bits, packed);
      },
      [](const uint8_t* packed, int64_t n, int bits, uint8_t* codes) {
        HWY_DYNAMIC_DISPATCH(unpack_codes)(packed, n, bits, codes);
      },
      [](const uint8_t* codes, int rows, int columns, uint8_t* out) {
        HWY_DYNAMIC_DISPATCH(transpose_codes)(codes, rows, columns, out);
      },
      [](const DecodeRowsArgs& args, float* y, int64_t y_stride) {
        HWY_DYNAMIC_DISPATCH(decode_rows)(args, y, y_stride);
      },
      [](const float* x, const float* matrix, int dim, float* out) {
        HWY_DYNAMIC_DISPATCH(row_times_matrix)(x, matrix, dim, out);
      }};
  return kernels;
}

}  // namespace veloxquant::turboquant
#endif  // HWY_ONCE
