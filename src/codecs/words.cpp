#include "veloxquant/words.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/codecs/words.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <algorithm>
#include <type_traits>

#include "src/backends/cpu/unroll.h"
#include "veloxquant/error.h"

#ifndef VELOXQUANT_CODECS_ONE_WORD  // once, though this file is compiled per target
#define VELOXQUANT_CODECS_ONE_WORD
namespace veloxquant {

// One word of `count` codes: the specification, and the ends of rows in the kernels.
template <class Code>
inline uint32_t packed_word(const Code* codes, int64_t count, int bits) {
  uint32_t word = 0;
  for (int64_t k = 0; k < count; ++k) {
    word |= (static_cast<uint32_t>(codes[k]) & ((1u << bits) - 1u)) << (k * bits);
  }
  return word;
}
template <class Code>
inline void unpack_word(uint32_t word, int64_t count, int bits, Code* codes) {
  for (int64_t k = 0; k < count; ++k) {
    codes[k] = static_cast<Code>((word >> (k * bits)) & ((1u << bits) - 1u));
  }
}

}  // namespace veloxquant
#endif

HWY_BEFORE_NAMESPACE();
namespace veloxquant::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using U32 = hn::CappedTag<uint32_t, 8>;

HWY_INLINE hn::Vec<U32> load_codes(const int32_t* codes) {
  return hn::LoadU(U32(), reinterpret_cast<const uint32_t*>(codes));
}
HWY_INLINE hn::Vec<U32> load_codes(const uint8_t* codes) {
  const U32 d;
  return hn::PromoteTo(d, hn::LoadU(hn::Rebind<uint8_t, U32>(), codes));
}
HWY_INLINE void store_codes(hn::Vec<U32> v, int32_t* codes) {
  hn::StoreU(v, U32(), reinterpret_cast<uint32_t*>(codes));
}
HWY_INLINE void store_codes(hn::Vec<U32> v, uint8_t* codes) {
  const hn::RebindToSigned<U32> di;
  const hn::Rebind<uint8_t, U32> du8;
  hn::StoreU(hn::DemoteTo(du8, hn::BitCast(di, v)), du8, codes);
}

// How the codes of a word lie in vectors: kParts of them, the last perhaps in part.
template <int kBits>
class WordLayout {
 public:
  static constexpr int kLanes = HWY_MIN(8, HWY_LANES(uint32_t));
  static constexpr int kPerWord = 32 / kBits;
  static constexpr int kParts = (kPerWord + kLanes - 1) / kLanes;
  static constexpr int kRead = kParts * kLanes;  // codes read or written for a word

  WordLayout() {
    const U32 d;
    constexpr uint32_t kMask = (1u << kBits) - 1u;
    HWY_ALIGN uint32_t masks[kLanes], shifts[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      masks[i] = (kParts - 1) * kLanes + i < kPerWord ? kMask : 0;
      shifts[i] = static_cast<uint32_t>(i * kBits < 31 ? i * kBits : 31);
    }
    in_lane_ = hn::Load(d, shifts);
    mask_ = hn::Set(d, kMask);
    last_mask_ = hn::Load(d, masks);
  }

  // A vector whose lanes, OR-ed together, are the word of the codes.
  template <class Code>
  HWY_INLINE hn::Vec<U32> spread(const Code* HWY_RESTRICT codes) const {
    auto sum = hn::And(load_codes(codes + (kParts - 1) * kLanes), last_mask_);
    VELOXQUANT_UNROLL
    for (int k = kParts - 2; k >= 0; --k) {
      sum = hn::Or(hn::ShiftLeft<kPartBits>(sum), hn::And(load_codes(codes + k * kLanes), mask_));
    }
    return hn::Shl(sum, in_lane_);
  }

  template <class Code>
  HWY_INLINE void unpack(uint32_t word, Code* HWY_RESTRICT codes) const {
    auto rest = hn::Shr(hn::Set(U32(), word), in_lane_);
    VELOXQUANT_UNROLL
    for (int k = 0; k < kParts; ++k) {
      store_codes(hn::And(rest, mask_), codes + k * kLanes);
      rest = hn::ShiftRight<kPartBits>(rest);
    }
  }

 private:
  static constexpr int kPartBits =
      kLanes * kBits % 32;  // % 32: never used where a word is one part
  hn::Vec<U32> in_lane_, mask_, last_mask_;
};

// The lanes of a vector OR-ed together.
HWY_INLINE uint32_t or_lanes(hn::Vec<U32> v) {
#if HWY_TARGET != HWY_SCALAR
  v = hn::Or(v, hn::Shuffle2301(v));
  v = hn::Or(v, hn::Shuffle1032(v));
#if HWY_MAX_BYTES >= 32
  v = hn::Or(v, hn::ConcatLowerUpper(U32(), v, v));
#endif
#endif
  return hn::GetLane(v);
}

#if HWY_TARGET != HWY_SCALAR
// As many words as a vector has lanes: their vectors are OR-ed in a tree, which transposes them.
template <int kBits, class Code>
HWY_INLINE hn::Vec<U32> pack_lanes(const WordLayout<kBits>& layout,
                                   const Code* HWY_RESTRICT codes) {
  const U32 d;
  const hn::Repartition<uint64_t, U32> d64;
  constexpr int kStep = WordLayout<kBits>::kPerWord;
  const auto two = [&](int i) HWY_ATTR {
    const auto a = layout.spread(codes + i * kStep), b = layout.spread(codes + (i + 1) * kStep);
    return hn::BitCast(d64, hn::Or(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b)));
  };
  const auto four = [&](int i) HWY_ATTR {
    const auto a = two(i), b = two(i + 2);
    return hn::BitCast(d, hn::Or(hn::InterleaveLower(d64, a, b), hn::InterleaveUpper(d64, a, b)));
  };
  if constexpr (WordLayout<kBits>::kLanes == 4) {
    return four(0);
  } else {
    const auto a = four(0), b = four(4);
    return hn::Or(hn::ConcatLowerLower(d, b, a), hn::ConcatUpperUpper(d, b, a));
  }
}
#endif

template <int kBits, class Code>
void pack_row(const Code* HWY_RESTRICT codes, int64_t n, uint32_t* HWY_RESTRICT words) {
  using Layout = WordLayout<kBits>;
  const Layout layout;
  int64_t i = 0;
#if HWY_TARGET != HWY_SCALAR
  constexpr int64_t kMany = Layout::kLanes;
  for (; i + (kMany - 1) * Layout::kPerWord + Layout::kRead <= n; i += kMany * Layout::kPerWord) {
    hn::StoreU(pack_lanes<kBits>(layout, codes + i), U32(), words);
    words += kMany;
  }
#endif
  for (; i + Layout::kRead <= n; i += Layout::kPerWord) {
    *words++ = or_lanes(layout.spread(codes + i));
  }
  for (; i < n; i += Layout::kPerWord) {
    *words++ = packed_word(codes + i, std::min<int64_t>(Layout::kPerWord, n - i), kBits);
  }
}

template <int kBits, class Code>
void unpack_row(const uint32_t* HWY_RESTRICT words, int64_t n, Code* HWY_RESTRICT codes) {
  using Layout = WordLayout<kBits>;
  const Layout layout;
  int64_t i = 0;
  // What a word writes beyond its codes the next one writes again.
  for (; i + Layout::kRead <= n; i += Layout::kPerWord) layout.unpack(*words++, codes + i);
  for (; i < n; i += Layout::kPerWord) {
    unpack_word(*words++, std::min<int64_t>(Layout::kPerWord, n - i), kBits, codes + i);
  }
}

// run(bits as a constant)
template <class Run>
HWY_INLINE void with_bits(int bits, const Run& run) {
  switch (bits) {
    case 1:
      return run(std::integral_constant<int, 1>());
    case 2:
      return run(std::integral_constant<int, 2>());
    case 3:
      return run(std::integral_constant<int, 3>());
    case 4:
      return run(std::integral_constant<int, 4>());
    case 5:
      return run(std::integral_constant<int, 5>());
    case 6:
      return run(std::integral_constant<int, 6>());
    case 7:
      return run(std::integral_constant<int, 7>());
    default:
      return run(std::integral_constant<int, 8>());
  }
}

void pack_row_int32(const int32_t* codes, int64_t n, int bits, uint32_t* words) {
  with_bits(bits, [&](auto width) { pack_row<decltype(width)::value>(codes, n, words); });
}
void pack_row_uint8(const uint8_t* codes, int64_t n, int bits, uint32_t* words) {
  with_bits(bits, [&](auto width) { pack_row<decltype(width)::value>(codes, n, words); });
}
void unpack_row_int32(const uint32_t* words, int64_t n, int bits, int32_t* codes) {
  with_bits(bits, [&](auto width) { unpack_row<decltype(width)::value>(words, n, codes); });
}
void unpack_row_uint8(const uint32_t* words, int64_t n, int bits, uint8_t* codes) {
  with_bits(bits, [&](auto width) { unpack_row<decltype(width)::value>(words, n, codes); });
}

}  // namespace veloxquant::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "src/backends/cpu/simd_targets.h"

namespace veloxquant {

HWY_EXPORT(pack_row_int32);
HWY_EXPORT(pack_row_uint8);
HWY_EXPORT(unpack_row_int32);
HWY_EXPORT(unpack_row_uint8);

namespace {

constexpr int64_t kRangeCodes = 1 << 16;  // of one task

void check_bits(const char* function, int bits) {
  require(bits >= 1 && bits <= 8, "[", function, "] bits: got ", bits, ", wanted 1 to 8");
}

// run(first code, first word, n) for pieces of rows that lie in whole words, `row_words` to a row.
// Rows without padding are one row; long ones are cut.
template <class Run>
void for_pieces(int64_t rows, int64_t n, int64_t row_words, int bits, const Run& run) {
  const int64_t per_word = codes_per_word(bits);
  if (rows == 0 || n == 0) return;
  if (n == row_words * per_word) {
    n *= rows;
    row_words *= rows;
    rows = 1;
  }
  const int64_t step = kRangeCodes / per_word * per_word, pieces = (n + step - 1) / step;
  parallel_ranges(rows * pieces, std::max<int64_t>(1, step / n), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / pieces, first = i % pieces * step;
      run(row * n + first, row * row_words + first / per_word, std::min(step, n - first));
    }
  });
}

template <class Code>
void pack_row_reference(const Code* codes, int64_t n, int bits, uint32_t* words) {
  const int64_t step = codes_per_word(bits);
  for (int64_t i = 0; i < n; i += step) {
    *words++ = packed_word(codes + i, std::min(step, n - i), bits);
  }
}

template <class Code>
void unpack_row_reference(const uint32_t* words, int64_t n, int bits, Code* codes) {
  const int64_t step = codes_per_word(bits);
  for (int64_t i = 0; i < n; i += step) {
    unpack_word(*words++, std::min(step, n - i), bits, codes + i);
  }
}

template <class Code, class Row>
void pack_all(const Code* codes, int64_t rows, int64_t n, int bits, uint32_t* words, Row row) {
  check_bits("pack_words", bits);
  for_pieces(rows, n, words_per_row(n, bits), bits, [&](int64_t code, int64_t word, int64_t count) {
    row(codes + code, count, bits, words + word);
  });
}

template <class Code, class Row>
void unpack_all(const uint32_t* words, int64_t rows, int64_t row_words, int64_t n, int bits,
                Code* codes, Row row) {
  check_bits("unpack_words", bits);
  require(words_per_row(n, bits) <= row_words, "[unpack_words] n: got ", n, " codes of ", bits,
          " bits, wanted at most ", row_words * codes_per_word(bits), " (", row_words, " words)");
  for_pieces(rows, n, row_words, bits, [&](int64_t code, int64_t word, int64_t count) {
    row(words + word, count, bits, codes + code);
  });
}

}  // namespace

void pack_words(Backend backend, const int32_t* codes, int64_t rows, int64_t n, int bits,
                uint32_t* words) {
  cpu::apply_environment();
  pack_all(
      codes, rows, n, bits, words,
      backend == Backend::cpu ? HWY_DYNAMIC_DISPATCH(pack_row_int32) : pack_row_reference<int32_t>);
}

void pack_words(Backend backend, const uint8_t* codes, int64_t rows, int64_t n, int bits,
                uint32_t* words) {
  cpu::apply_environment();
  pack_all(
      codes, rows, n, bits, words,
      backend == Backend::cpu ? HWY_DYNAMIC_DISPATCH(pack_row_uint8) : pack_row_reference<uint8_t>);
}

void unpack_words(Backend backend, const uint32_t* words, int64_t rows, int64_t row_words,
                  int64_t n, int bits, int32_t* codes) {
  cpu::apply_environment();
  unpack_all(words, rows, row_words, n, bits, codes,
             backend == Backend::cpu ? HWY_DYNAMIC_DISPATCH(unpack_row_int32)
                                     : unpack_row_reference<int32_t>);
}

void unpack_words(Backend backend, const uint32_t* words, int64_t rows, int64_t row_words,
                  int64_t n, int bits, uint8_t* codes) {
  cpu::apply_environment();
  unpack_all(words, rows, row_words, n, bits, codes,
             backend == Backend::cpu ? HWY_DYNAMIC_DISPATCH(unpack_row_uint8)
                                     : unpack_row_reference<uint8_t>);
}

}  // namespace veloxquant
#endif  // HWY_ONCE
