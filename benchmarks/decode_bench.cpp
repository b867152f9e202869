// Decode steps of the C++ cache: every codec beside the exact cache, interleaved in one run,
// medians. Every output is held against the fp64 oracle before it is timed; exits with 1 if one is
// wrong.
//
//   decode_bench [--shapes 32/8x128,9/3x64] [--contexts 1024,8192,32768] [--rounds 7] [--only TEXT]
//                [--registers never|fast|always]
//
// --only keeps the caches whose name contains TEXT (or one of several, with commas), and fp16.
// --registers: look-ups in registers (src/codecs/lookup/plane_codes.h). VELOXQUANT_SIMD and
// VELOXQUANT_THREADS choose what is measured.
#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "src/codecs/lookup/plane_codes.h"
#include "src/math/float16.h"
#include "veloxquant/cache.h"
#include "veloxquant/codec_spec.h"
#include "veloxquant/exact.h"
#include "veloxquant/vecinfer.h"

namespace vq = veloxquant;

namespace {

using Clock = std::chrono::steady_clock;

constexpr double kTolerance = 2e-3;  // relative L2 error of a query row, fast path (DESIGN.md)

double since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

std::vector<float> random_values(int64_t n, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& v : x) v = normal(generator);
  return x;
}

double median(std::vector<double> times) {
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

// Bytes per second that all threads read together from an array larger than the caches.
double read_bandwidth() {
  constexpr int64_t kWords = int64_t{32} << 20;
  const std::vector<uint64_t> words(kWords, 1);
  const int64_t parts = 4 * vq::num_threads(), part = kWords / parts;
  std::vector<uint64_t> sums(parts);
  double best = INFINITY;
  for (int round = 0; round < 5; ++round) {
    const auto start = Clock::now();
    vq::parallel_for(parts, [&](long i) {
      const uint64_t* from = words.data() + i * part;
      uint64_t sum[8] = {};
      for (int64_t k = 0; k + 8 <= part; k += 8) {
        for (int j = 0; j < 8; ++j) sum[j] += from[k + j];
      }
      for (uint64_t s : sum) sums[i] += s;
    });
    best = std::min(best, since(start));
  }
  return static_cast<double>(parts * part) * 8 / best;
}

struct Shape {
  int query_heads, kv_heads, head_dim;
};

// A side of a method: a codec of the registry, or VecInfer with random tables (the speed does not
// depend on their values).
struct SideOf {
  std::string codec;  // "fp16", "vecinfer", or a name of the registry
  int sub_dim = 0, n_centroids = 0;
  int bits = 0;
};
struct Method {
  std::string name;
  SideOf keys, values;
};

std::vector<Method> methods() {
  std::vector<Method> all = {{"fp16", {"fp16"}, {"fp16"}}};
  auto add = [&](const std::string& name, const SideOf& keys, const SideOf& values) {
    all.push_back({name, keys, values});
  };
  const SideOf d2{"vecinfer", 2, 256}, d4{"vecinfer", 4, 256}, d8{"vecinfer", 8, 256};
  const SideOf d1x16{"vecinfer", 1, 16}, d2x16{"vecinfer", 2, 16};
  add("vecinfer d2x256", d2, d2);
  add("vecinfer d1x16", d1x16, d1x16);
  add("vecinfer d4x256", d4, d4);
  add("vecinfer d2x16", d2x16, d2x16);
  add("vecinfer d8x256", d8, d8);
  add("vecinfer d8x256/d4x256", d8, d4);
  const SideOf sign{"rabitq", 0, 0, 1};
  add("rabitq 1/vecinfer d4x256", sign, d4);
  for (int bits : {1, 4}) {
    const SideOf side{"rabitq", 0, 0, bits};
    add("rabitq " + std::to_string(bits), side, side);
  }
  for (int bits = 1; bits <= 4; ++bits) {
    const SideOf side{"turboquant", 0, 0, bits};
    add("turboquant " + std::to_string(bits), side, side);
  }
  const SideOf rvq{"turboquant_rvq", 0, 0, 1};
  add("turboquant_rvq 1+1", rvq, rvq);
  return all;
}

class Candidate {
 public:
  Candidate(const Method& method, const Shape& shape, int64_t length) : name(method.name) {
    vq::KvCacheConfig config;
    config.n_kv_heads = shape.kv_heads;
    config.head_dim = shape.head_dim;
    config.key_codec = codec(vq::Side::keys, method.keys, shape, config.exact_dtype);
    config.value_codec = codec(vq::Side::values, method.values, shape, config.exact_dtype);
    bits = (config.key_codec->bits_per_element() + config.value_codec->bits_per_element()) / 2;
    cache = std::make_unique<vq::KvCache>(config);
    const int64_t size = shape.kv_heads * length * shape.head_dim;
    const std::vector<float> keys = random_values(size, 1), values = random_values(size, 2);
    auto view = [&](const std::vector<float>& x) {
      return vq::TensorView(x.data(), vq::DType::float32,
                            {1, shape.kv_heads, length, shape.head_dim});
    };
    const auto start = Clock::now();
    cache->append(view(keys), view(values));
    append_seconds = since(start) / static_cast<double>(length);
  }

  // The mean of decode steps, in which two blocks are sealed.
  double append_token_seconds(const Shape& shape) {
    constexpr int kSteps = 2 * vq::kBlockTokens;
    const std::vector<float> token = random_values(shape.kv_heads * shape.head_dim, 4);
    const vq::TensorView view(token.data(), vq::DType::float32,
                              {1, shape.kv_heads, 1, shape.head_dim});
    const auto start = Clock::now();
    for (int i = 0; i < kSteps; ++i) cache->append(view, view);
    return since(start) / kSteps;
  }

  std::string name;
  double bits = 0, append_seconds = 0, error = 0;
  std::unique_ptr<vq::KvCache> cache;
  std::vector<double> times;

 private:
  vq::CodecPtr codec(vq::Side side, const SideOf& of, const Shape& shape, vq::DType exact) {
    if (of.codec == "fp16")
      return vq::make_exact_codec(side, shape.kv_heads, shape.head_dim, exact);
    if (of.codec != "vecinfer") {
      const std::map<std::string, vq::CodecOption> options = {{"bits", int64_t{of.bits}}};
      return vq::make_codec({of.codec, side, shape.kv_heads, shape.head_dim, options}, {});
    }
    tables_.emplace_back();
    const int n_sub = shape.head_dim / of.sub_dim;
    for (float v : random_values(int64_t{shape.kv_heads} * shape.head_dim * of.n_centroids, 7)) {
      tables_.back().push_back(vq::f32_to_f16(v));
    }
    vq::Transform hadamard;
    hadamard.kind = vq::TransformKind::hadamard;
    return vq::make_vecinfer_codec(side, shape.kv_heads, shape.head_dim, n_sub,
                                   {tables_.back().data(),
                                    vq::DType::float16,
                                    {shape.kv_heads, n_sub, of.n_centroids, of.sub_dim}},
                                   hadamard);
  }
  std::vector<std::vector<uint16_t>> tables_;
};

double worst_row_error(const std::vector<float>& got, const std::vector<float>& wanted, int dim) {
  double worst = 0;
  for (size_t row = 0; row < got.size(); row += dim) {
    double error = 0, norm = 0;
    for (int i = 0; i < dim; ++i) {
      error += std::pow(static_cast<double>(got[row + i]) - wanted[row + i], 2);
      norm += std::pow(static_cast<double>(wanted[row + i]), 2);
    }
    const double relative = std::sqrt(error / norm);
    if (!(relative <= worst)) worst = relative;  // NaN counts as an error, too
  }
  return worst;
}

struct Options {
  std::vector<Shape> shapes = {{9, 3, 64}, {32, 8, 128}};
  std::vector<int64_t> contexts = {1024, 8192, 32768};
  int rounds = 7;
  std::vector<std::string> only;
};

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

bool parse(int argc, char** argv, Options& options) {
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    const std::vector<std::string> parts = split(argv[i + 1]);
    if (name == "--rounds") {
      options.rounds = std::atoi(argv[i + 1]);
    } else if (name == "--registers") {
      using Use = vq::lookup::PlaneUse;
      const std::map<std::string, Use> uses = {
          {"never", Use::never}, {"fast", Use::fast}, {"always", Use::always}};
      if (uses.count(argv[i + 1]) == 0) return false;
      vq::lookup::set_plane_use(uses.at(argv[i + 1]));
    } else if (name == "--only") {
      options.only = parts;
    } else if (name == "--contexts") {
      options.contexts.clear();
      for (const std::string& part : parts) options.contexts.push_back(std::atoll(part.c_str()));
    } else if (name == "--shapes") {
      options.shapes.clear();
      for (const std::string& part : parts) {
        Shape shape{};
        std::sscanf(part.c_str(), "%d/%dx%d", &shape.query_heads, &shape.kv_heads, &shape.head_dim);
        options.shapes.push_back(shape);
      }
    } else {
      return false;
    }
  }
  bool good = argc % 2 == 1 && options.rounds >= 1;
  for (const Shape& s : options.shapes) {
    good &= s.kv_heads > 0 && s.head_dim > 0 && s.head_dim % 8 == 0 && s.query_heads > 0 &&
            s.query_heads % s.kv_heads == 0;
  }
  for (int64_t context : options.contexts) good &= context >= 1;
  return good;
}

bool wanted(const Options& options, const std::string& name) {
  if (options.only.empty() || name == "fp16") return true;
  return std::any_of(options.only.begin(), options.only.end(),
                     [&](const std::string& text) { return name.find(text) != std::string::npos; });
}

// The rows of one shape and context; false if an output is wrong.
bool measure(const Shape& shape, int64_t length, const Options& options, double bandwidth) {
  std::vector<Candidate> candidates;
  for (const Method& method : methods()) {
    if (wanted(options, method.name)) candidates.emplace_back(method, shape, length);
  }
  const std::vector<float> query = random_values(shape.query_heads * shape.head_dim, 3);
  std::vector<float> out(query.size()), expected(query.size());
  const std::array<int64_t, 4> dims = {1, shape.query_heads, 1, shape.head_dim};
  const vq::TensorView q(query.data(), vq::DType::float32, {dims[0], dims[1], dims[2], dims[3]});
  auto view = [&](std::vector<float>& x) {
    std::fill(x.begin(), x.end(), NAN);
    return vq::MutableTensorView(x.data(), vq::DType::float32,
                                 {dims[0], dims[1], dims[2], dims[3]});
  };
  vq::AttentionParams params;
  params.scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
  for (Candidate& c : candidates) {
    vq::attend_oracle(q, c.cache->source(), params, view(expected), {});
    c.cache->attend(q, params, view(out), {});
    c.error = worst_row_error(out, expected, shape.head_dim);
    if (!(c.error <= kTolerance)) {
      std::printf("  %-24s %6d  WRONG: relative error %.2g, wanted at most %.0e\n", c.name.c_str(),
                  static_cast<int>(length), c.error, kTolerance);
      return false;
    }
  }
  const vq::MutableTensorView target = view(out);
  for (int round = 0; round < options.rounds; ++round) {
    for (Candidate& c : candidates) {  // short calls are repeated: all see the same weather
      double total = 0;
      do {
        const auto start = Clock::now();
        c.cache->attend(q, params, target, {});
        c.times.push_back(since(start));
        total += c.times.back();
      } while (total < 0.02);
    }
  }
  const double exact = median(candidates[0].times);
  for (Candidate& c : candidates) {
    const double time = median(c.times), append = c.append_token_seconds(shape);
    const double rate = static_cast<double>(c.cache->nbytes()) / time;
    std::printf("  %-24s %6d %5.2f %9.3f %6.2f %7.1f %6.2f %4.0f %% %8.2f %8.2f %5.1f %%  %.1e\n",
                c.name.c_str(), static_cast<int>(length), c.bits, time * 1e3, exact / time,
                time * 1e9 / static_cast<double>(length * shape.kv_heads), rate / 1e9,
                100 * rate / bandwidth, c.append_seconds * 1e6, append * 1e6, 100 * append / time,
                c.error);
  }
  std::fflush(stdout);
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  if (!parse(argc, argv, options)) {
    std::fprintf(
        stderr,
        "decode_bench: got arguments it does not know, wanted [--shapes 32/8x128,...] "
        "[--contexts 1024,...] [--rounds 7] [--only TEXT,...] [--registers never|fast|always]\n");
    return 2;
  }
  const double bandwidth = read_bandwidth();
  std::printf("backend %s, SIMD %s, %d threads; reads %.1f GB/s\n",
              vq::backend_name(vq::default_backend()), vq::simd_level().c_str(), vq::num_threads(),
              bandwidth / 1e9);
  bool right = true;
  for (const Shape& shape : options.shapes) {
    std::printf("\n%d query heads, %d KV heads, head_dim %d, one query token\n", shape.query_heads,
                shape.kv_heads, shape.head_dim);
    std::printf("  %-24s %6s %5s %9s %6s %7s %6s %6s %8s %8s %7s  %s\n", "cache", "tokens", "bits",
                "ms/step", "times", "ns/t/h", "GB/s", "read", "us/tok", "us/app", "of step",
                "error");
    std::printf(
        "  (us/tok: a token of a long append; us/app: of a decode step, beside attention)\n");
    for (int64_t length : options.contexts) right &= measure(shape, length, options, bandwidth);
  }
  return right ? 0 : 1;
}
