// The public scans: arguments checked, the last byte masked, long scans cut over the threads.
#include "src/codecs/rabitq/scan.h"

#include <algorithm>
#include <cmath>

#include "src/math/portable.h"
#include "veloxquant/rabitq.h"

namespace veloxquant {
namespace {

// Codes of one piece of work: some 15 us. Waking a thread takes as long, so that a shorter scan is
// faster without.
constexpr int64_t kPieceBytes = 1 << 19;
// From here on scores are written past the caches (read and written through them they would cost
// twice the traffic), if they start at the beginning of a cache line.
constexpr int64_t kStreamedScores = int64_t{4} << 20;
constexpr uintptr_t kLine = 64;

int code_bytes(int n_dims) { return (n_dims + 7) / 8; }

// Ones for the bits that are dimensions.
std::vector<uint8_t> dimension_mask(int n_dims) {
  std::vector<uint8_t> mask(code_bytes(n_dims), 0xff);
  if (n_dims % 8 != 0) mask.back() = static_cast<uint8_t>((1 << (n_dims % 8)) - 1);
  return mask;
}

void check_dims(const char* function, int n_dims) {
  require(n_dims >= 1 && n_dims <= 8 * rabitq::kMaxCodeBytes, "[", function, "] n_dims: got ",
          n_dims, ", wanted 1..", 8 * rabitq::kMaxCodeBytes);
}

// body(first key, keys)
template <class Body>
void for_pieces(int64_t n, int n_bytes, const Body& body) {
  const int64_t step = std::max<int64_t>(64, kPieceBytes / n_bytes / 64 * 64);
  parallel_for((n + step - 1) / step, [&](long i) {
    const int64_t first = i * step;
    body(first, std::min(step, n - first));
  });
}

}  // namespace

void hamming_score(Backend backend, const uint8_t* query, const uint8_t* codes, int64_t n,
                   int n_dims, const float* offset, float scale, float* out) {
  check_dims("hamming_score", n_dims);
  const int n_bytes = code_bytes(n_dims);
  const std::vector<uint8_t> mask = dimension_mask(n_dims);
  const bool stream = n >= kStreamedScores && reinterpret_cast<uintptr_t>(out) % kLine == 0;
  for_pieces(n, n_bytes, [&](int64_t first, int64_t keys) {
    rabitq::HammingScan scan;
    scan.stream = stream;
    scan.query = query;
    scan.mask = mask.data();
    scan.codes = codes + first * n_bytes;
    scan.n = keys;
    scan.n_bytes = n_bytes;
    scan.offset = offset + first;
    scan.scale = scale;
    scan.out = out + first;
    rabitq::scans_of(backend).hamming(scan);
  });
}

PopcountQuery quantize_popcount_query(const float* q, int n_dims, int n_bits) {
  check_dims("quantize_popcount_query", n_dims);
  require(n_bits >= 1 && n_bits <= 8, "[quantize_popcount_query] n_bits: got ", n_bits,
          ", wanted 1..8");
  PopcountQuery query;
  query.n_dims = n_dims;
  query.n_bits = n_bits;
  float high = q[0];
  query.low = q[0];
  for (int i = 0; i < n_dims; ++i) {
    require(is_finite_bits(bits_of(q[i])), "[quantize_popcount_query] q: got ", q[i],
            " at dimension ", i, ", wanted finite values");
    query.low = std::min(query.low, q[i]);
    high = std::max(high, q[i]);
  }
  const int most = (1 << n_bits) - 1;
  query.step = (high - query.low) / static_cast<float>(most);
  query.planes.assign(static_cast<size_t>(n_bits) * code_bytes(n_dims), 0);
  if (!(query.step > 0.0f)) query.step = 0.0f;  // a constant query: every u[i] is 0
  for (int i = 0; i < n_dims && query.step > 0.0f; ++i) {
    const float level = (q[i] - query.low) / query.step + 0.5f;
    const uint32_t u = level >= static_cast<float>(most) ? most : static_cast<uint32_t>(level);
    query.sum += u;
    for (int j = 0; j < n_bits; ++j) {
      query.planes[j * code_bytes(n_dims) + i / 8] |= ((u >> j) & 1u) << (i % 8);
    }
  }
  return query;
}

void popcount_dots(Backend backend, const PopcountQuery& query, const uint8_t* codes, int64_t n,
                   uint32_t* dots, uint32_t* counts) {
  check_dims("popcount_dots", query.n_dims);
  const int n_bytes = code_bytes(query.n_dims);
  require(query.planes.size() == static_cast<size_t>(query.n_bits) * n_bytes,
          "[popcount_dots] query: got ", query.planes.size(), " bytes of planes, wanted ",
          query.n_bits, " x ", n_bytes);
  const std::vector<uint8_t> mask = dimension_mask(query.n_dims);
  rabitq::PopcountScan scan;
  scan.planes = query.planes.data();
  scan.n_planes = query.n_bits;
  scan.mask = mask.data();
  scan.codes = codes;
  scan.n = n;
  scan.n_bytes = n_bytes;
  scan.dots = dots;
  scan.counts = counts;
  rabitq::scans_of(backend).popcount(scan);
}

void popcount_score(Backend backend, const PopcountQuery& query, const uint8_t* codes, int64_t n,
                    const float* factors, float* out) {
  const int n_bytes = code_bytes(query.n_dims);
  const float per_dot = mul(2.0f, query.step), per_count = mul(2.0f, query.low);
  const float constant = mul(query.step, static_cast<float>(query.sum)) +
                         mul(query.low, static_cast<float>(query.n_dims));
  for_pieces(n, n_bytes, [&](int64_t first, int64_t keys) {
    constexpr int64_t kTile = 512;
    uint32_t dots[kTile], counts[kTile];
    for (int64_t i = first; i < first + keys; i += kTile) {
      const int64_t tile = std::min(kTile, first + keys - i);
      popcount_dots(backend, query, codes + i * n_bytes, tile, dots, counts);
      for (int64_t k = 0; k < tile; ++k) {
        const float dot = static_cast<float>(static_cast<int32_t>(dots[k]));
        const float count = static_cast<float>(static_cast<int32_t>(counts[k]));
        const float sum = mul(per_dot, dot) + mul(per_count, count) - constant;
        out[i + k] = mul(factors[i + k], sum);
      }
    }
  });
}

}  // namespace veloxquant
