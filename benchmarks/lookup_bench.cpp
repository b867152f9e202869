// The look-up loops of attention on codes, alone and on one thread, 1024 tokens in the caches and 4
// query heads: cycles a token, and look-ups a cycle. Outputs are held against plain loops first.
//
//   build/bench/lookup_bench [SIMD level]
//
// A look-up is one number for one token: a key code gives one for each query head, a value code one
// for each of its dimensions. Loads, additions and products with weights are in the times.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "benchmarks/cycles.h"
#include "src/codecs/lookup/buffer.h"
#include "src/codecs/lookup/plane_kernels.h"
#include "src/math/random.h"
#include "veloxquant/backend.h"
#include "veloxquant/codec.h"

using namespace veloxquant;
using namespace veloxquant::lookup;

namespace {

constexpr int kBlocks = 32, kTokens = kBlocks * kBlockTokens, kRows = 4;

SplitMix64 source(1, 0);
float uniform() { return static_cast<float>(source.uniform() * 2 - 1); }

template <class T, class Make>
std::vector<T> filled(int64_t n, const Make& make) {
  std::vector<T> x(n);
  for (T& v : x) v = static_cast<T>(make());
  return x;
}

// The kernels load whole registers: aligned.
template <class T>
class Aligned {
 public:
  explicit Aligned(int64_t n) : size_(n), floats_(take_buffer((n * sizeof(T) + 3) / 4)) {
    std::fill(data(), data() + n, T{0});
  }
  Aligned(const std::vector<T>& x) : Aligned(static_cast<int64_t>(x.size())) {
    std::copy(x.begin(), x.end(), data());
  }
  T* data() const { return reinterpret_cast<T*>(floats_.get()); }
  int64_t size() const { return size_; }

 private:
  int64_t size_;
  Buffer floats_;
};

struct Codes {
  std::vector<uint8_t> bytes;
  Blocks blocks;
  explicit Codes(int n_codes)
      : bytes(filled<uint8_t>(int64_t{kTokens} * n_codes, [] { return source.next() & 255; })) {
    blocks.data = bytes.data();
    blocks.stride = int64_t{n_codes} * kBlockTokens;
    blocks.n = kBlocks;
    blocks.n_codes = n_codes;
    blocks.n_values = 256;
  }
  int at(int token, int m) const {
    return blocks
        .data[token / kBlockTokens * blocks.stride + m * kBlockTokens + token % kBlockTokens];
  }
};

bool all_right = true;
void report(const char* name, double error, double tolerance, int64_t look_ups,
            const std::function<void()>& run) {
  if (!(error <= tolerance)) {
    std::printf("%-34s WRONG: error %.2g, wanted at most %.2g\n", name, error, tolerance);
    all_right = false;
    return;
  }
  const bench::Spread cycles = bench::time_of(run, 20, true);
  std::printf("%-34s %7.1f cycles a token", name, cycles.median / kTokens);
  if (look_ups > 0) std::printf(" %6.1f look-ups a cycle", look_ups * kTokens / cycles.median);
  std::printf("   (best %.1f)\n", cycles.best / kTokens);
}

// fp32 entries of 4 heads side by side, in memory.
void keys_in_memory(int n_codes) {
  const Codes codes(n_codes);
  const Aligned<float> entries(filled<float>(int64_t{n_codes} * 256 * kRows, uniform));
  const Aligned<float> tokens(kTokens * kRows);
  const auto run = [&] { look_up(codes.blocks, entries.data(), kRows, tokens.data()); };
  run();
  double error = 0;
  for (int t = 0; t < kTokens; ++t) {
    for (int r = 0; r < kRows; ++r) {
      double sum = 0;
      for (int m = 0; m < n_codes; ++m) {
        sum += entries.data()[(int64_t{m} * 256 + codes.at(t, m)) * kRows + r];
      }
      error = std::max(error, std::abs(sum - tokens.data()[t * kRows + r]));
    }
  }
  const std::string name = "keys, memory, " + std::to_string(n_codes) + " x 8 bits";
  report(name.c_str(), error, 1e-4, int64_t{n_codes} * kRows, run);
}

void values_in_memory(int n_codes) {
  const Codes codes(n_codes);
  const Aligned<float> weights(filled<float>(kTokens * kRows, uniform));
  const Aligned<float> sums(int64_t{n_codes} * 256 * kRows);
  const auto run = [&] { add_up(codes.blocks, weights.data(), kRows, sums.data()); };
  run();
  std::vector<double> wanted(sums.size());
  double error = 0;
  for (int t = 0; t < kTokens; ++t) {
    for (int m = 0; m < n_codes; ++m) {
      for (int r = 0; r < kRows; ++r) {
        wanted[(int64_t{m} * 256 + codes.at(t, m)) * kRows + r] += weights.data()[t * kRows + r];
      }
    }
  }
  for (size_t i = 0; i < wanted.size(); ++i) {
    error = std::max(error, std::abs(sums.data()[i] - wanted[i]));
  }
  const std::string name = "values, memory, " + std::to_string(n_codes) + " x 8 bits";
  report(name.c_str(), error, 1e-4, int64_t{n_codes} * kRows, run);
}

int digit(const Codes& codes, int token, int k, const PlaneDigits& digits) {
  return codes.at(token, k / digits.a_byte) >> k % digits.a_byte * digits.bits &
         ((1 << digits.bits) - 1);
}

// Products of 14 bits, as planes in registers.
void keys_in_registers(int n_codes, const PlaneDigits& digits) {
  const Codes codes(n_codes);
  const int n = n_codes * digits.a_byte, size = plane_size(digits.bits);
  const Aligned<uint8_t> tables(
      filled<uint8_t>(int64_t{n} * kRows * 2 * size, [] { return source.next() & 127; }));
  std::vector<float> scores(kRows * kTokens);
  const auto run = [&] {
    constexpr int step = 16;
    for (int first = 0; first < kBlocks; first += step) {
      Blocks blocks = codes.blocks;
      blocks.n = std::min(step, kBlocks - first);
      blocks.data += first * blocks.stride;
      for (int r = 0; r < kRows; ++r) {
        score_planes(blocks, digits, tables.data() + int64_t{r} * n * 2 * size, n << 13, 1.0f,
                     nullptr, scores.data() + r * kTokens + first * kBlockTokens);
      }
    }
  };
  run();
  double error = 0;
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) {
      int sum = -(n << 13);
      for (int k = 0; k < n; ++k) {
        const uint8_t* table = tables.data() + (int64_t{r} * n + k) * 2 * size;
        const int code = digit(codes, t, k, digits);
        sum += table[size + code] * 128 + table[code];
      }
      error = std::max(error, std::abs(static_cast<double>(sum - scores[r * kTokens + t])));
    }
  }
  const std::string name =
      "keys, registers, " + std::to_string(n) + " x " + std::to_string(digits.bits) + " bits of 14";
  report(name.c_str(), error, 0, int64_t{n} * kRows, run);
}

// Dimensions of 14 bits times weights of up to 15; n_dims dimensions a digit.
void values_in_registers(int n_codes, const PlaneDigits& digits, int n_dims) {
  const Codes codes(n_codes);
  const int n = n_codes * digits.a_byte, size = plane_size(digits.bits);
  const Aligned<uint8_t> tables(int64_t{n} * n_dims * 2 * size);
  std::vector<int> values(int64_t{n} * n_dims << digits.bits);
  for (int k = 0; k < n * n_dims; ++k) {
    for (int v = 0; v < 1 << digits.bits; ++v) {
      const int value = static_cast<int>(source.next() % 16383) - 8191;
      values[(int64_t{k} << digits.bits) + v] = value;
      tables.data()[int64_t{k} * 2 * size + v] = static_cast<uint8_t>(value & 255);
      tables.data()[(int64_t{k} * 2 + 1) * size + v] = static_cast<uint8_t>(value >> 8 & 255);
    }
  }
  const auto weights = filled<float>(kRows * kTokens, [] { return std::abs(uniform()); });
  const Aligned<int16_t> integers(kRows * kTokens);
  const Aligned<float> sums(int64_t{n} * n_dims * kRows * kPlaneFloats);
  const auto run = [&] {
    const int unit = kVectorsAUnit * plane_lanes(), a_byte = n_dims * digits.a_byte;
    std::vector<float> units;
    for (int t = 0; t < kTokens; t += unit) {
      const int tokens = std::min(unit, kTokens - t);
      for (int r = 0; r < kRows; ++r) {
        units.push_back(weights_to_planes(weights.data() + r * kTokens + t, tokens, nullptr, r,
                                          kRows, integers.data() + int64_t{t} * kRows));
      }
    }
    float* to = sums.data();
    for (int m = 0; m < n_codes; ++m, to += a_byte * kRows * kPlaneFloats) {
      add_planes(codes.blocks, m, digits, a_byte, tables.data() + int64_t{m} * a_byte * 2 * size,
                 integers.data(), units.data(), kRows, to);
    }
  };
  run();
  double error = 0, norm = 0;
  std::vector<float> folded(int64_t{n} * n_dims * kRows);
  fold_plane_sums(sums.data(), static_cast<int>(folded.size()), folded.data());
  for (int k = 0; k < n * n_dims; ++k) {
    for (int r = 0; r < kRows; ++r) {
      double sum = 0;
      for (int t = 0; t < kTokens; ++t) {
        sum += static_cast<double>(weights[r * kTokens + t]) *
               values[(int64_t{k} << digits.bits) + digit(codes, t, k / n_dims, digits)];
      }
      error += std::pow(sum - folded[k * kRows + r], 2);
      norm += sum * sum;
    }
  }
  const std::string name = "values, registers, " + std::to_string(n) + " x " +
                           std::to_string(digits.bits) + " bits of 14";
  report(name.c_str(), std::sqrt(error / norm), 1e-3, int64_t{n} * n_dims, run);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) set_simd_level(argv[1]);
  std::printf("%s; 4 query heads, head_dim 128, %d tokens\n", simd_level().c_str(), kTokens);
  keys_in_memory(32);
  values_in_memory(32);
  if (plane_lanes() == 0) return all_right ? 0 : 1;
  if (has_wide_tables()) {
    keys_in_registers(32, {8, 1});
    values_in_registers(32, {8, 1}, 4);
  }
  keys_in_registers(32, {4, 2});
  values_in_registers(32, {4, 2}, 2);
  keys_in_registers(64, {4, 2});
  values_in_registers(64, {4, 2}, 1);
  return all_right ? 0 : 1;
}
