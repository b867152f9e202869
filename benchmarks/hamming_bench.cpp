// The Hamming scan on data larger than every cache, against reading the same memory.
//
//   hamming_bench [MB of codes, default 512] [runs, default 11]
//
// Outputs are verified before anything is timed. The scan and the read alternate; medians. "read"
// counts the bytes of codes and offsets, "moved" the scores as well.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "veloxquant/backend.h"
#include "veloxquant/rabitq.h"

using namespace veloxquant;

namespace {

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// Sums 64-byte lines in eight chains; the result keeps the loop alive.
uint64_t read_memory(const uint8_t* bytes, int64_t n) {
  constexpr int64_t kPiece = 1 << 20;
  std::vector<uint64_t> sums((n + kPiece - 1) / kPiece);
  parallel_for(static_cast<long>(sums.size()), [&](long i) {
    const auto* words = reinterpret_cast<const uint64_t*>(bytes + i * kPiece);
    const int64_t n_words = std::min(kPiece, n - i * kPiece) / 8;
    uint64_t chains[8] = {};
    for (int64_t w = 0; w + 8 <= n_words; w += 8) {
      for (int c = 0; c < 8; ++c) chains[c] += words[w + c];
    }
    for (uint64_t chain : chains) sums[i] += chain;
  });
  uint64_t sum = 0;
  for (uint64_t part : sums) sum += part;
  return sum;
}

struct FreeAligned {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Aligned = std::unique_ptr<T[], FreeAligned>;
template <class T>
Aligned<T> aligned(int64_t n) {
  const size_t bytes = (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
  return Aligned<T>(static_cast<T*>(std::aligned_alloc(64, bytes)));
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t code_bytes = (argc > 1 ? std::atoll(argv[1]) : 512) << 20;
  const int runs = argc > 2 ? std::atoi(argv[2]) : 11;
  std::printf("%-9s %6s %8s %10s %12s %12s %14s %8s\n", "simd", "dim", "threads", "ms", "read GB/s",
              "moved GB/s", "memory GB/s", "read/mem");
  for (int dims : {64, 128, 256}) {
    const int n_bytes = dims / 8;
    const int64_t n = code_bytes / n_bytes;
    Aligned<uint8_t> codes = aligned<uint8_t>(code_bytes);
    Aligned<float> offsets = aligned<float>(n), scores = aligned<float>(n);
    std::vector<uint8_t> query(n_bytes, 0x5a);
    for (int64_t i = 0; i < code_bytes; ++i)
      codes[i] = static_cast<uint8_t>((i * 2654435761u) >> 11);
    for (int64_t i = 0; i < n; ++i) offsets[i] = static_cast<float>(i % 7);
    for (int threads : {1, num_threads()}) {
      set_num_threads(threads);
      hamming_score(Backend::cpu, query.data(), codes.get(), n, dims, offsets.get(), 0.5f,
                    scores.get());
      std::vector<float> expected(1000);
      for (int64_t first : {int64_t{0}, n - 1000}) {
        hamming_score(Backend::reference, query.data(), codes.get() + first * n_bytes, 1000, dims,
                      offsets.get() + first, 0.5f, expected.data());
        if (!std::equal(expected.begin(), expected.end(), scores.get() + first)) {
          std::printf("wrong scores\n");
          return 1;
        }
      }
      std::vector<double> scan, read;
      uint64_t kept = 0;
      for (int run = 0; run < runs; ++run) {
        const double start = seconds();
        hamming_score(Backend::cpu, query.data(), codes.get(), n, dims, offsets.get(), 0.5f,
                      scores.get());
        const double middle = seconds();
        kept += read_memory(codes.get(), code_bytes);
        scan.push_back(middle - start);
        read.push_back(seconds() - middle);
      }
      const double memory = code_bytes / median(read), taken = median(scan);
      const double in = static_cast<double>(code_bytes + 4 * n) / taken;
      std::printf("%-9s %6d %8d %10.1f %12.2f %12.2f %14.2f %7.0f%%  (%llu)\n",
                  simd_level().c_str(), dims, threads, 1e3 * taken, in / 1e9,
                  (code_bytes + 8 * n) / taken / 1e9, memory / 1e9, 100 * in / memory,
                  static_cast<unsigned long long>(kept & 1));
    }
    set_num_threads(0);
  }
}
