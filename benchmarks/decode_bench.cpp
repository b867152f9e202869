// One decode step over caches of several widths and lengths: time, bytes, and the share of what a
// plain copy of memory reaches on this machine. Every output is held against the fp64 oracle
// before it is timed. Run by `make bench`; exits with 1 if an output is wrong.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "src/math/float16.h"
#include "veloxquant/cache.h"
#include "veloxquant/exact.h"
#include "veloxquant/vecinfer.h"

namespace vq = veloxquant;

namespace {

constexpr double kTolerance = 2e-3;  // relative L2 error of a query row, fast path (DESIGN.md)

struct Shape {
  const char* name;
  int kv_heads, query_heads, head_dim;
};
constexpr Shape kShapes[] = {{"SmolLM2-135M layer", 3, 9, 64}, {"Llama-3-8B layer", 8, 32, 128}};
constexpr int kLengths[] = {1024, 8192, 32768};

std::vector<float> random_values(int64_t n, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& v : x) v = normal(generator);
  return x;
}

// Median seconds of one call: at least 5 calls and 0.3 s.
double seconds(const std::function<void()>& call) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> times;
  double total = 0;
  while (times.size() < 5 || total < 0.3) {
    auto start = Clock::now();
    call();
    times.push_back(std::chrono::duration<double>(Clock::now() - start).count());
    total += times.back();
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

// Bytes read and written per second by a copy that is larger than any cache, on all threads.
double copy_bandwidth() {
  constexpr int64_t kBytes = int64_t{256} << 20;
  std::vector<char> from(kBytes, 1), to(kBytes, 2);
  int64_t parts = 4 * vq::num_threads(), part = kBytes / parts;
  double time = seconds([&] {
    vq::parallel_for(
        parts, [&](long i) { std::memcpy(to.data() + i * part, from.data() + i * part, part); });
  });
  return 2.0 * static_cast<double>(part * parts) / time;
}

struct Tables {
  std::vector<uint16_t> data;
  vq::TensorView view;
};

// Random centroids: the speed does not depend on their values.
Tables random_tables(const Shape& shape, int sub_dim) {
  int n_sub = shape.head_dim / sub_dim;
  Tables tables;
  for (float v : random_values(int64_t{shape.kv_heads} * shape.head_dim * 256, 7))
    tables.data.push_back(vq::f32_to_f16(v));
  tables.view = {tables.data.data(), vq::DType::float16, {shape.kv_heads, n_sub, 256, sub_dim}};
  return tables;
}

double worst_row_error(const std::vector<float>& got, const std::vector<float>& wanted, int dim) {
  double worst = 0;
  for (size_t row = 0; row < got.size(); row += dim) {
    double error = 0, norm = 0;
    for (int i = 0; i < dim; ++i) {
      error += std::pow(static_cast<double>(got[row + i]) - wanted[row + i], 2);
      norm += std::pow(static_cast<double>(wanted[row + i]), 2);
    }
    double relative = std::sqrt(error / norm);
    if (!(relative <= worst)) worst = relative;  // NaN counts as an error, too
  }
  return worst;
}

// One line of the table; false if the output is wrong.
bool measure(const Shape& shape, int length, int sub_dim, double copy) {
  Tables tables;
  vq::KvCacheConfig config;
  config.n_kv_heads = shape.kv_heads;
  config.head_dim = shape.head_dim;
  auto codec = [&](vq::Side side) {
    if (sub_dim == 0)
      return vq::make_exact_codec(side, shape.kv_heads, shape.head_dim, config.exact_dtype);
    vq::Transform hadamard;
    hadamard.kind = vq::TransformKind::hadamard;
    return vq::make_vecinfer_codec(side, shape.kv_heads, shape.head_dim, shape.head_dim / sub_dim,
                                   tables.view, hadamard);
  };
  if (sub_dim != 0) tables = random_tables(shape, sub_dim);
  config.key_codec = codec(vq::Side::keys);
  config.value_codec = codec(vq::Side::values);
  std::string label = config.key_codec->name();
  vq::KvCache cache(config);
  std::vector<float> keys = random_values(int64_t{shape.kv_heads} * length * shape.head_dim, 1);
  std::vector<float> values = random_values(int64_t{shape.kv_heads} * length * shape.head_dim, 2);
  vq::TensorView k(keys.data(), vq::DType::float32, {1, shape.kv_heads, length, shape.head_dim});
  vq::TensorView v(values.data(), vq::DType::float32, {1, shape.kv_heads, length, shape.head_dim});
  auto start = std::chrono::steady_clock::now();
  cache.append(k, v);
  double append = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();

  std::vector<float> query = random_values(shape.query_heads * shape.head_dim, 3);
  std::vector<float> out(query.size(), NAN), wanted(query.size(), NAN);
  auto view = [&](std::vector<float>& x) {
    return vq::MutableTensorView(x.data(), vq::DType::float32,
                                 {1, shape.query_heads, 1, shape.head_dim});
  };
  vq::TensorView q = vq::read_only(view(query));
  vq::AttentionParams params;
  params.scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
  vq::attend_oracle(q, cache.source(), params, view(wanted), {});
  cache.attend(q, params, view(out), {});
  double error = worst_row_error(out, wanted, shape.head_dim);
  if (!(error <= kTolerance)) {
    std::printf("  %-16s %6d  WRONG: relative error %.2g, wanted at most %.0e\n", label.c_str(),
                length, error, kTolerance);
    return false;
  }
  double time = seconds([&] { cache.attend(q, params, view(out), {}); });
  double rate = static_cast<double>(cache.nbytes()) / time;
  std::printf("  %-16s %6d %9.1f %10.3f %8.2f %7.0f %%  %9.2f   %.1e\n", label.c_str(), length,
              static_cast<double>(cache.nbytes()) / 1024, time * 1e3, rate / 1e9, 100 * rate / copy,
              append * 1e6 / length, error);
  return true;
}

}  // namespace

int main() {
  double copy = copy_bandwidth();
  std::printf("backend %s, SIMD %s, %d threads; copy %.1f GB/s (read + written)\n",
              vq::backend_name(vq::default_backend()), vq::simd_level().c_str(), vq::num_threads(),
              copy / 1e9);
  bool right = true;
  for (const Shape& shape : kShapes) {
    std::printf("\n%s: %d KV heads, %d query heads, head_dim %d, one query token\n", shape.name,
                shape.kv_heads, shape.query_heads, shape.head_dim);
    std::printf("  %-16s %6s %9s %10s %8s %9s  %9s   %s\n", "cache", "tokens", "KiB", "ms/step",
                "GB/s", "of copy", "us/append", "error");
    for (int length : kLengths) {
      for (int sub_dim : {0, 2, 4}) right &= measure(shape, length, sub_dim, copy);
    }
  }
  return right ? 0 : 1;
}
