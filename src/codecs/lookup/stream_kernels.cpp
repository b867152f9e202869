#include "src/codecs/lookup/stream_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/codecs/lookup/stream_kernels.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <cstring>

#include "src/codecs/lookup/byte_kernels.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant::lookup::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr int kTokens = 64;

#if HWY_TARGET == HWY_SCALAR  // has no 128-bit registers: no look-ups either
void JoinPairs(const uint8_t*, int, uint8_t*) {}
void JoinTriples(const uint8_t*, int, uint8_t*) {}
void JoinHalves(const uint8_t*, int, uint8_t*) {}
void JoinFolded(const uint8_t*, int, uint8_t*) {}
void JoinTokens(const uint8_t*, int, int, uint8_t*) {}
#else

using Bytes = hn::FixedTag<uint8_t, 16>;
using Halves = hn::FixedTag<uint16_t, 8>;
using ByteVector = hn::Vec<Bytes>;

// Swaps the bits of `mask` with those `shift` higher.
template <int shift, class D, class V>
HWY_INLINE V exchange(D d, V x, uint32_t mask) {
  const auto moved = hn::And(hn::Xor(hn::ShiftRight<shift>(x), x), hn::Set(d, mask));
  return hn::Xor(x, hn::Or(moved, hn::ShiftLeft<shift>(moved)));
}

// 2 bits: byte k of a stream holds tokens 4 k to 4 k + 3. The bytes k of four streams side by side
// are a 4 x 4 matrix of codes, transposed in two rounds of exchanges.
void JoinPairs(const uint8_t* streams, int n_rows, uint8_t* rows) {
  constexpr int kStream = kTokens / 4;
  const Bytes d;
  const Halves d16;
  for (int row = 0; row < n_rows; ++row, streams += 4 * kStream) {
    const auto s0 = hn::LoadU(d, streams), s1 = hn::LoadU(d, streams + kStream);
    const auto s2 = hn::LoadU(d, streams + 2 * kStream), s3 = hn::LoadU(d, streams + 3 * kStream);
    const auto low01 = hn::BitCast(d16, hn::InterleaveLower(d, s0, s1));
    const auto high01 = hn::BitCast(d16, hn::InterleaveUpper(d, s0, s1));
    const auto low23 = hn::BitCast(d16, hn::InterleaveLower(d, s2, s3));
    const auto high23 = hn::BitCast(d16, hn::InterleaveUpper(d, s2, s3));
    uint8_t* to = rows + row * kTokens;
    hn::StoreU(hn::BitCast(d, hn::InterleaveLower(d16, low01, low23)), d, to);
    hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(d16, low01, low23)), d, to + 16);
    hn::StoreU(hn::BitCast(d, hn::InterleaveLower(d16, high01, high23)), d, to + 32);
    hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(d16, high01, high23)), d, to + 48);
  }
  const hn::CappedTag<uint8_t, kTokens> widest;
  const hn::Repartition<uint32_t, decltype(widest)> words;
  for (int i = 0; i < n_rows * kTokens; i += static_cast<int>(hn::Lanes(widest))) {
    auto x = hn::BitCast(words, hn::LoadU(widest, rows + i));
    x = exchange<12>(words, x, 0x0000f0f0u);
    x = exchange<6>(words, x, 0x00cc00ccu);
    hn::StoreU(hn::BitCast(widest, x), widest, rows + i);
  }
}

// 3 bits: 8 tokens are 3 bytes. Each 16-bit lane takes the two bytes that hold its code, and a
// product moves it to bit 8.
void JoinTriples(const uint8_t* streams, int n_rows, uint8_t* rows) {
  constexpr int kStream = kTokens * 3 / 8;
  const hn::CappedTag<uint16_t, 16> d;
  const hn::Repartition<uint8_t, decltype(d)> bytes;
  const hn::Repartition<uint64_t, decltype(d)> words;
  const hn::RebindToSigned<decltype(d)> d_signed;
  const hn::Rebind<uint8_t, decltype(d)> out;
  const int lanes = static_cast<int>(hn::Lanes(d));
  HWY_ALIGN uint8_t bytes_of[32];
  HWY_ALIGN uint16_t factor_of[16];
  for (int i = 0; i < 16; ++i) {
    bytes_of[2 * i] = static_cast<uint8_t>(3 * i / 8);
    bytes_of[2 * i + 1] = static_cast<uint8_t>(3 * i / 8 + 1);
    factor_of[i] = static_cast<uint16_t>(1u << (8 - 3 * i % 8));
  }
  const auto index = hn::Load(bytes, bytes_of);
  const auto factor = hn::Load(d, factor_of);
  auto moved = [&](const uint8_t* stream) {
    uint64_t few;
    std::memcpy(&few, stream, 8);
    const auto all = hn::BitCast(bytes, hn::Set(words, few));
    return hn::Mul(hn::BitCast(d, hn::TableLookupBytes(all, index)), factor);
  };
  for (int row = 0; row < n_rows; ++row, streams += 2 * kStream) {
    for (int t = 0; t < kTokens; t += lanes) {
      const uint8_t* from = streams + t * 3 / 8;
      const auto low = hn::And(hn::ShiftRight<8>(moved(from)), hn::Set(d, uint16_t{0x07}));
      const auto high =
          hn::And(hn::ShiftRight<5>(moved(from + kStream)), hn::Set(d, uint16_t{0x38}));
      const auto both = hn::BitCast(d_signed, hn::Or(low, high));
      hn::StoreU(hn::DemoteTo(out, both), out, rows + row * kTokens + t);
    }
  }
}

// The low halves of two bytes as one, and their high halves.
template <class D, class V>
HWY_INLINE void join_halves(D d, V first, V second, V& of_low, V& of_high) {
  const hn::Repartition<uint16_t, D> d16;
  const auto low = hn::Set(d, uint8_t{0x0f});
  const auto up = hn::BitCast(d, hn::ShiftLeft<4>(hn::BitCast(d16, second)));
  const auto down = hn::BitCast(d, hn::ShiftRight<4>(hn::BitCast(d16, first)));
  of_low = hn::Or(hn::And(first, low), hn::AndNot(low, up));
  of_high = hn::Or(hn::And(down, low), hn::AndNot(low, second));
}

// 4 bits: byte k of a stream holds tokens 2 k and 2 k + 1.
void JoinHalves(const uint8_t* streams, int n_rows, uint8_t* rows) {
  constexpr int kStream = kTokens / 2;
  const Bytes d;
  for (int row = 0; row < n_rows; ++row, streams += 2 * kStream) {
    for (int k = 0; k < kStream; k += 16) {
      ByteVector even, odd;
      join_halves(d, hn::LoadU(d, streams + k), hn::LoadU(d, streams + kStream + k), even, odd);
      uint8_t* to = rows + row * kTokens + 2 * k;
      hn::StoreU(hn::InterleaveLower(d, even, odd), d, to);
      hn::StoreU(hn::InterleaveUpper(d, even, odd), d, to + 16);
    }
  }
}

// 4 bits, byte k holds tokens k and k + 32.
void JoinFolded(const uint8_t* folded, int n_rows, uint8_t* rows) {
  constexpr int kHalf = kTokens / 2;
  const hn::CappedTag<uint8_t, kHalf> d;
  for (int row = 0; row < n_rows; ++row, folded += 2 * kHalf, rows += kTokens) {
    for (int k = 0; k < kHalf; k += static_cast<int>(hn::Lanes(d))) {
      hn::Vec<decltype(d)> low, high;
      join_halves(d, hn::LoadU(d, folded + k), hn::LoadU(d, folded + kHalf + k), low, high);
      hn::StoreU(low, d, rows + k);
      hn::StoreU(high, d, rows + kHalf + k);
    }
  }
}

// [64][n_columns] bytes -> [n_columns][64]. A round of interleaving turns the address bits of a
// 16 x 16 matrix by one: four exchange rows and columns.
HWY_INLINE void transpose_bytes(const uint8_t* from, int n_columns, uint8_t* to) {
  const Bytes d;
  int column = 0;
  for (; column + 16 <= n_columns; column += 16) {
    for (int t = 0; t < kTokens; t += 16) {
      ByteVector a[16], b[16];
      HWY_UNROLL(16)
      for (int i = 0; i < 16; ++i) a[i] = hn::LoadU(d, from + (t + i) * n_columns + column);
      HWY_UNROLL(2)
      for (int pair = 0; pair < 2; ++pair) {
        HWY_UNROLL(8)
        for (int i = 0; i < 8; ++i) {
          b[2 * i] = hn::InterleaveLower(d, a[i], a[i + 8]);
          b[2 * i + 1] = hn::InterleaveUpper(d, a[i], a[i + 8]);
        }
        HWY_UNROLL(8)
        for (int i = 0; i < 8; ++i) {
          a[2 * i] = hn::InterleaveLower(d, b[i], b[i + 8]);
          a[2 * i + 1] = hn::InterleaveUpper(d, b[i], b[i + 8]);
        }
      }
      HWY_UNROLL(16)
      for (int i = 0; i < 16; ++i) hn::StoreU(a[i], d, to + (column + i) * kTokens + t);
    }
  }
  for (; column < n_columns; ++column) {
    for (int t = 0; t < kTokens; ++t) to[column * kTokens + t] = from[t * n_columns + column];
  }
}

// 3 bytes of a token are 4 pairs of codes.
HWY_INLINE void split_triples(const uint8_t* from, int n_triples, uint8_t* rows) {
  const hn::CappedTag<uint8_t, kTokens> d;
  const hn::Repartition<uint16_t, decltype(d)> d16;
  const auto mask = [&](int bits) HWY_ATTR { return hn::Set(d, static_cast<uint8_t>(bits)); };
  for (int i = 0; i < n_triples; ++i, from += 3 * kTokens, rows += 4 * kTokens) {
    for (int t = 0; t < kTokens; t += static_cast<int>(hn::Lanes(d))) {
      const auto a = hn::LoadU(d, from + t), b = hn::LoadU(d, from + kTokens + t);
      const auto c = hn::LoadU(d, from + 2 * kTokens + t);
      const auto a16 = hn::BitCast(d16, a), b16 = hn::BitCast(d16, b), c16 = hn::BitCast(d16, c);
      const auto a_high = hn::And(hn::BitCast(d, hn::ShiftRight<6>(a16)), mask(0x03));
      const auto b_low = hn::And(hn::BitCast(d, hn::ShiftLeft<2>(b16)), mask(0x3c));
      const auto b_high = hn::And(hn::BitCast(d, hn::ShiftRight<4>(b16)), mask(0x0f));
      const auto c_low = hn::And(hn::BitCast(d, hn::ShiftLeft<4>(c16)), mask(0x30));
      const auto c_high = hn::And(hn::BitCast(d, hn::ShiftRight<2>(c16)), mask(0x3f));
      hn::StoreU(hn::And(a, mask(0x3f)), d, rows + t);
      hn::StoreU(hn::Or(a_high, b_low), d, rows + kTokens + t);
      hn::StoreU(hn::Or(b_high, c_low), d, rows + 2 * kTokens + t);
      hn::StoreU(c_high, d, rows + 3 * kTokens + t);
    }
  }
}

void JoinTokens(const uint8_t* streams, int head_dim, int bits, uint8_t* rows) {
  const int n_columns = head_dim * bits / 8;
  if (bits != 3) return transpose_bytes(streams, n_columns, rows);  // a byte is whole codes already
  constexpr int kMaxDim = 1024;
  HWY_ALIGN uint8_t turned[kMaxDim * 3 / 8 * kTokens];
  transpose_bytes(streams, n_columns, turned);
  split_triples(turned, n_columns / 3, rows);
}
#endif  // HWY_TARGET == HWY_SCALAR

}  // namespace veloxquant::lookup::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant::lookup {

HWY_EXPORT(JoinPairs);
HWY_EXPORT(JoinTriples);
HWY_EXPORT(JoinHalves);
HWY_EXPORT(JoinFolded);
HWY_EXPORT(JoinTokens);

void join_columns(const uint8_t* streams, int head_dim, int bits, uint8_t* rows) {
  switch (bits) {
    case 1:  // 64 codes of 1 bit are a bit plane
      return spread_planes(streams, head_dim / 8, 8, rows);
    case 2:
      return HWY_DYNAMIC_DISPATCH(JoinPairs)(streams, head_dim / 4, rows);
    case 3:
      return HWY_DYNAMIC_DISPATCH(JoinTriples)(streams, head_dim / 2, rows);
    default:
      return HWY_DYNAMIC_DISPATCH(JoinHalves)(streams, head_dim / 2, rows);
  }
}

void join_folded(const uint8_t* folded, int n_rows, uint8_t* rows) {
  HWY_DYNAMIC_DISPATCH(JoinFolded)(folded, n_rows, rows);
}

void join_tokens(const uint8_t* streams, int head_dim, int bits, uint8_t* rows) {
  HWY_DYNAMIC_DISPATCH(JoinTokens)(streams, head_dim, bits, rows);
}

}  // namespace veloxquant::lookup
#endif  // HWY_ONCE
