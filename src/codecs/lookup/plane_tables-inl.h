// Tables of plane_kernels.h in registers, once per SIMD level.
#if defined(VELOXQUANT_CODECS_LOOKUP_PLANE_TABLES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef VELOXQUANT_CODECS_LOOKUP_PLANE_TABLES_INL_H_
#undef VELOXQUANT_CODECS_LOOKUP_PLANE_TABLES_INL_H_
#else
#define VELOXQUANT_CODECS_LOOKUP_PLANE_TABLES_INL_H_
#endif

#include <hwy/highway.h>

#include "src/codecs/lookup/plane_kernels.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant::lookup::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr int kTokens = 64;

#if HWY_TARGET != HWY_SCALAR  // has no 128-bit registers
#undef VELOXQUANT_VBMI        // of the level before
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3_DL
#define VELOXQUANT_VBMI 1
#else
#define VELOXQUANT_VBMI 0
#endif

using Bytes = hn::CappedTag<uint8_t, kTokens>;
using Words = hn::Repartition<uint16_t, Bytes>;
using Shorts = hn::Repartition<int16_t, Bytes>;
using Ints = hn::Repartition<int32_t, Bytes>;
using Floats = hn::Repartition<float, Bytes>;
using ByteVector = hn::Vec<Bytes>;
constexpr int kLanes = HWY_MIN(kTokens, HWY_MAX_BYTES);
constexpr int kVectors = kTokens / kLanes;  // of the tokens of a block
constexpr int kUnitBlocks = kVectorsAUnit / kVectors;

// 16 entries in each 128-bit block of a register.
struct Table16 {
  static constexpr int kBytes = 32;
  ByteVector low, high;

  HWY_INLINE explicit Table16(const uint8_t* table)
      : low(hn::LoadDup128(Bytes(), table)), high(hn::LoadDup128(Bytes(), table + 16)) {}
  HWY_INLINE void look_up(ByteVector code, ByteVector& l, ByteVector& h) const {
    l = hn::TableLookupBytes(low, code);
    h = hn::TableLookupBytes(high, code);
  }
};

#if VELOXQUANT_VBMI
HWY_INLINE __m512i kept_in_register(const uint8_t* from) {
  __m512i x = hn::Load(Bytes(), from).raw;
  // Or else compilers load it again for every permutation, and loads are what runs out.
  asm("" : "+v"(x));
  return x;
}

// 256 entries.
struct Registers {
  __m512i a, b, c, d;

  HWY_INLINE explicit Registers(const uint8_t* table)
      : a(kept_in_register(table)),
        b(kept_in_register(table + 64)),
        c(kept_in_register(table + 128)),
        d(kept_in_register(table + 192)) {}
};

// A permutation takes 6 bits of a code, and the upper two choose where it is written: one
// micro-operation each everywhere.
struct Quarters {
  Registers r;
  struct Choice {
    __mmask64 odd, upper, last;
    HWY_INLINE explicit Choice(__m512i code)
        : odd(_mm512_movepi8_mask(_mm512_add_epi8(code, code))),
          upper(_mm512_movepi8_mask(code)),
          last(_kand_mask64(upper, odd)) {}
  };

  HWY_INLINE explicit Quarters(const uint8_t* table) : r(table) {}
  HWY_INLINE __m512i at(__m512i code, const Choice& choice) const {
    __m512i x = _mm512_permutexvar_epi8(code, r.a);
    x = _mm512_mask_permutexvar_epi8(x, choice.odd, code, r.b);
    x = _mm512_mask_permutexvar_epi8(x, choice.upper, code, r.c);
    return _mm512_mask_permutexvar_epi8(x, choice.last, code, r.d);
  }
};

// Permutations of two registers take 7 bits: half as many, but three micro-operations each on
// Intel; one on AMD.
struct Halves {
  Registers r;
  struct Choice {
    __mmask64 upper;
    HWY_INLINE explicit Choice(__m512i code) : upper(_mm512_movepi8_mask(code)) {}
  };

  HWY_INLINE explicit Halves(const uint8_t* table) : r(table) {}
  HWY_INLINE __m512i at(__m512i code, const Choice& choice) const {
    return _mm512_mask_blend_epi8(choice.upper, _mm512_permutex2var_epi8(r.a, code, r.b),
                                  _mm512_permutex2var_epi8(r.c, code, r.d));
  }
};

template <class Plane>
struct WideTable {
  static constexpr int kBytes = 512;
  Plane low, high;

  HWY_INLINE explicit WideTable(const uint8_t* table) : low(table), high(table + 256) {}
  HWY_INLINE void look_up(ByteVector code, ByteVector& l, ByteVector& h) const {
    const typename Plane::Choice choice(code.raw);
    l = ByteVector{low.at(code.raw, choice)};
    h = ByteVector{high.at(code.raw, choice)};
  }
};
#else
// Sixteen tables of 16: slower than other look-ups, so that only tests come here.
struct WideTable {
  static constexpr int kBytes = 512;
  const uint8_t* table;

  HWY_INLINE explicit WideTable(const uint8_t* from) : table(from) {}
  HWY_INLINE void look_up(ByteVector code, ByteVector& l, ByteVector& h) const {
    const Bytes d;
    const auto low_half = hn::And(code, hn::Set(d, uint8_t{15}));
    const auto high_half = hn::AndNot(hn::Set(d, uint8_t{15}), code);
    l = h = hn::Zero(d);
    for (int k = 0; k < 16; ++k) {
      const auto here = hn::Eq(high_half, hn::Set(d, static_cast<uint8_t>(16 * k)));
      const auto low = hn::LoadDup128(d, table + 16 * k);
      const auto high = hn::LoadDup128(d, table + 256 + 16 * k);
      l = hn::IfThenElse(here, hn::TableLookupBytes(low, low_half), l);
      h = hn::IfThenElse(here, hn::TableLookupBytes(high, low_half), h);
    }
  }
};
#endif

template <class Table>
struct Form {
  using Type = Table;
};
// body(Form of the table that these digits are looked up in)
template <class Body>
HWY_INLINE void with_table(const PlaneDigits& digits, const Body& body) {
  if (digits.bits <= 4) return body(Form<Table16>());
#if VELOXQUANT_VBMI
  digits.by_halves ? body(Form<WideTable<Halves> >()) : body(Form<WideTable<Quarters> >());
#else
  body(Form<WideTable>());
#endif
}

// The digit of each byte: wide tables take whole bytes.
template <class Table>
HWY_INLINE ByteVector digit_of(ByteVector code, int shift, ByteVector mask) {
  if constexpr (Table::kBytes > 32) {
    return code;
  } else {
    const auto moved = hn::ShiftRightSame(hn::BitCast(Words(), code), shift);
    return hn::And(hn::BitCast(Bytes(), moved), mask);
  }
}
#endif  // HWY_TARGET != HWY_SCALAR

}  // namespace veloxquant::lookup::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // VELOXQUANT_CODECS_LOOKUP_PLANE_TABLES_INL_H_
