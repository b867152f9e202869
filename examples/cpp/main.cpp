// A compressed KV cache next to an exact one: same tokens, same query, bytes and error.
//
// The centroids here are random vectors. A real program trains them on keys and values of its
// model (veloxquant/calibration.h) and gets a far smaller error for the same bytes.
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "veloxquant/cache.h"
#include "veloxquant/exact.h"
#include "veloxquant/vecinfer.h"

namespace vq = veloxquant;

constexpr int kHeads = 3, kQueryHeads = 9, kHeadDim = 64, kTokens = 4096;
constexpr int kSubVectors = 16, kCentroids = 256;  // 4 dimensions share one 8-bit code: 2 bits

// fp32 -> fp16 bits, truncated; enough for the normal numbers of a random table.
uint16_t to_half(float x) {
  uint32_t bits = std::bit_cast<uint32_t>(x);
  int exponent = static_cast<int>(bits >> 23 & 0xff) - 127 + 15;
  uint32_t sign = bits >> 16 & 0x8000;
  if (exponent <= 0) return static_cast<uint16_t>(sign);
  return static_cast<uint16_t>(sign | exponent << 10 | (bits >> 13 & 0x3ff));
}

int main() {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  auto random = [&](int64_t n) {
    std::vector<float> x(n);
    for (float& v : x) v = normal(generator);
    return x;
  };

  // One table of centroids per KV head and sub-vector; keys and values share them here.
  std::vector<uint16_t> tables;
  for (float v : random(int64_t{kHeads} * kSubVectors * kCentroids * (kHeadDim / kSubVectors)))
    tables.push_back(to_half(v));
  vq::TensorView table_view(tables.data(), vq::DType::float16,
                            {kHeads, kSubVectors, kCentroids, kHeadDim / kSubVectors});
  vq::Transform transform;
  transform.kind = vq::TransformKind::hadamard;

  vq::KvCacheConfig config;
  config.n_kv_heads = kHeads;
  config.head_dim = kHeadDim;
  config.key_codec = vq::make_exact_codec(vq::Side::keys, kHeads, kHeadDim, config.exact_dtype);
  config.value_codec = vq::make_exact_codec(vq::Side::values, kHeads, kHeadDim, config.exact_dtype);
  vq::KvCache exact(config);  // 16 bits an element: what the other is compared with
  config.key_codec =
      vq::make_vecinfer_codec(vq::Side::keys, kHeads, kHeadDim, kSubVectors, table_view, transform);
  config.value_codec = vq::make_vecinfer_codec(vq::Side::values, kHeads, kHeadDim, kSubVectors,
                                               table_view, transform);
  vq::KvCache packed(config);

  std::vector<float> keys = random(int64_t{kHeads} * kTokens * kHeadDim);
  std::vector<float> values = random(int64_t{kHeads} * kTokens * kHeadDim);
  vq::TensorView k(keys.data(), vq::DType::float32, {1, kHeads, kTokens, kHeadDim});
  vq::TensorView v(values.data(), vq::DType::float32, {1, kHeads, kTokens, kHeadDim});
  exact.append(k, v);
  packed.append(k, v);

  std::vector<float> query = random(kQueryHeads * kHeadDim);
  vq::TensorView q(query.data(), vq::DType::float32, {1, kQueryHeads, 1, kHeadDim});
  vq::AttentionParams params;
  params.scale = 1.0f / std::sqrt(static_cast<float>(kHeadDim));
  auto attend = [&](const vq::KvCache& cache) {
    std::vector<float> out(query.size());
    vq::MutableTensorView view(out.data(), vq::DType::float32, {1, kQueryHeads, 1, kHeadDim});
    cache.attend(q, params, view, {});
    return out;
  };
  std::vector<float> wanted = attend(exact), got = attend(packed);

  double error = 0, norm = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    error += std::pow(got[i] - wanted[i], 2);
    norm += std::pow(wanted[i], 2);
  }
  std::printf("%d tokens, %s, attention by %s\n", kTokens, config.key_codec->name().c_str(),
              vq::attention_kernel_name(vq::default_backend(), packed.source()).c_str());
  std::printf("exact cache   %9lld bytes\n", static_cast<long long>(exact.nbytes()));
  std::printf("packed cache  %9lld bytes, %.2f x smaller\n",
              static_cast<long long>(packed.nbytes()),
              static_cast<double>(exact.nbytes()) / static_cast<double>(packed.nbytes()));
  std::printf("relative error of the attention output: %.3f\n", std::sqrt(error / norm));
  // So that the test which runs this example notices a cache that is broken, or not smaller.
  bool plausible = packed.nbytes() * 6 < exact.nbytes() && std::isfinite(error) && error < norm;
  return plausible ? 0 : 1;
}
