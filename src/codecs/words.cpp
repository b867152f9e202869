#include "veloxquant/words.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/codecs/words.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <algorithm>

#include "veloxquant/error.h"

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

template <class Code>
void pack_row(const Code* HWY_RESTRICT codes, int64_t n, int bits, uint32_t* HWY_RESTRICT words) {
  const U32 d;
  const int per_word = 32 / bits, lanes = static_cast<int>(hn::Lanes(d));
  const uint32_t mask = (1u << bits) - 1u;
  int64_t i = 0;
  if (per_word % lanes == 0) {
    const auto in_lane = hn::Mul(hn::Iota(d, 0), hn::Set(d, static_cast<uint32_t>(bits)));
    const auto masks = hn::Set(d, mask);
    for (; i + per_word <= n; i += per_word) {
      auto word = hn::Zero(d);
      for (int k = per_word - lanes; k >= 0; k -= lanes) {
        if (k + lanes < per_word) word = hn::ShiftLeftSame(word, lanes * bits);
        word = hn::Or(word, hn::And(load_codes(codes + i + k), masks));
      }
      *words++ = or_lanes(hn::Shl(word, in_lane));
    }
  }
  while (i < n) {
    uint32_t word = 0;
    const int count = static_cast<int>(std::min<int64_t>(per_word, n - i));
    for (int k = 0; k < count; ++k)
      word |= (static_cast<uint32_t>(codes[i + k]) & mask) << (k * bits);
    *words++ = word;
    i += count;
  }
}

template <class Code>
void unpack_row(const uint32_t* HWY_RESTRICT words, int64_t n, int bits, Code* HWY_RESTRICT codes) {
  const U32 d;
  const int per_word = 32 / bits, lanes = static_cast<int>(hn::Lanes(d));
  const uint32_t mask = (1u << bits) - 1u;
  int64_t i = 0;
  if (per_word % lanes == 0) {
    const auto in_lane = hn::Mul(hn::Iota(d, 0), hn::Set(d, static_cast<uint32_t>(bits)));
    const auto masks = hn::Set(d, mask);
    for (; i + per_word <= n; i += per_word) {
      auto word = hn::Shr(hn::Set(d, *words++), in_lane);
      for (int k = 0; k < per_word; k += lanes) {
        store_codes(hn::And(word, masks), codes + i + k);
        word = hn::ShiftRightSame(word, lanes * bits % 32);
      }
    }
  }
  while (i < n) {
    uint32_t word = *words++;
    const int count = static_cast<int>(std::min<int64_t>(per_word, n - i));
    for (int k = 0; k < count; ++k, word >>= bits) codes[i + k] = static_cast<Code>(word & mask);
    i += count;
  }
}

void pack_row_int32(const int32_t* codes, int64_t n, int bits, uint32_t* words) {
  pack_row(codes, n, bits, words);
}
void pack_row_uint8(const uint8_t* codes, int64_t n, int bits, uint32_t* words) {
  pack_row(codes, n, bits, words);
}
void unpack_row_int32(const uint32_t* words, int64_t n, int bits, int32_t* codes) {
  unpack_row(words, n, bits, codes);
}
void unpack_row_uint8(const uint32_t* words, int64_t n, int bits, uint8_t* codes) {
  unpack_row(words, n, bits, codes);
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

// run(row, first code, n): whole words of a row at a time; long rows are cut as well.
template <class Run>
void for_ranges(int64_t rows, int64_t n, int bits, const Run& run) {
  if (rows == 0 || n == 0) return;
  const int64_t step = kRangeCodes / codes_per_word(bits) * codes_per_word(bits);
  if (n > step) {
    const int64_t pieces = (n + step - 1) / step;
    parallel_for(static_cast<long>(rows * pieces), [&](long i) {
      const int64_t first = i % pieces * step;
      run(i / pieces, first, std::min(step, n - first));
    });
    return;
  }
  parallel_ranges(rows, std::max<int64_t>(1, step / n), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) run(row, int64_t{0}, n);
  });
}

template <class Code>
void pack_row_reference(const Code* codes, int64_t n, int bits, uint32_t* words) {
  const int per_word = codes_per_word(bits);
  for (int64_t i = 0; i < n; ++i) {
    if (i % per_word == 0) words[i / per_word] = 0;
    const uint32_t code = static_cast<uint32_t>(codes[i]) & ((1u << bits) - 1u);
    words[i / per_word] |= code << (i % per_word * bits);
  }
}

template <class Code>
void unpack_row_reference(const uint32_t* words, int64_t n, int bits, Code* codes) {
  const int per_word = codes_per_word(bits);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t code = words[i / per_word] >> (i % per_word * bits);
    codes[i] = static_cast<Code>(code & ((1u << bits) - 1u));
  }
}

template <class Code, class Row>
void pack_all(const Code* codes, int64_t rows, int64_t n, int bits, uint32_t* words, Row row) {
  check_bits("pack_words", bits);
  const int64_t row_words = words_per_row(n, bits);
  for_ranges(rows, n, bits, [&](int64_t r, int64_t first, int64_t count) {
    row(codes + r * n + first, count, bits, words + r * row_words + first / codes_per_word(bits));
  });
}

template <class Code, class Row>
void unpack_all(const uint32_t* words, int64_t rows, int64_t row_words, int64_t n, int bits,
                Code* codes, Row row) {
  check_bits("unpack_words", bits);
  require(words_per_row(n, bits) <= row_words, "[unpack_words] n: got ", n, " codes of ", bits,
          " bits, wanted at most ", row_words * codes_per_word(bits), " (", row_words, " words)");
  for_ranges(rows, n, bits, [&](int64_t r, int64_t first, int64_t count) {
    row(words + r * row_words + first / codes_per_word(bits), count, bits, codes + r * n + first);
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
