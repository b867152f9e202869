// Training CommVQ: keys before RoPE, one stage after the other on what the stages before left over.
#include "veloxquant/commvq.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "src/calibration/commvq_em.h"
#include "src/calibration/progress.h"
#include "src/calibration/sampling.h"
#include "src/codecs/commvq/kernels.h"
#include "src/codecs/commvq/planes.h"
#include "src/codecs/commvq/rms.h"

namespace veloxquant {
namespace {

constexpr uint64_t kTokenStream = uint64_t{1} << 62;

// The vectors of a head as encoding sees them: RoPE undone, weighted, divided by their rms. Zero
// keys are left out: nothing is encoded of them.
StageVectors load_vectors(const TensorView& x, int64_t head, const std::vector<int64_t>& positions,
                          const Rope& rope, const float* weight, uint64_t seed) {
  std::vector<int64_t> tokens = finite_tokens(x, head);
  const auto picks = subsample(static_cast<int64_t>(tokens.size()), kMaxCommVQVectors,
                               SplitMix64(seed, kTokenStream + head));
  const int64_t dims = x.shape[2], n_pairs = dims / 2, n = static_cast<int64_t>(picks.size());
  std::vector<int64_t> at(n);
  std::vector<float> rows(n * dims);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t token = tokens[picks[i]];
    at[i] = positions[token];
    read_row(x, head, token, rows.data() + i * dims);
  }
  rope.turn_rows(default_backend(), RopeDirection::inverse, at.data(), n, rows.data(), dims);

  StageVectors vectors;
  vectors.n_pairs = static_cast<int>(n_pairs);
  vectors.tiles.assign((n + 63) / 64 * 64 * dims, 0.0f);
  for (int64_t i = 0; i < n; ++i) {
    const float* row = rows.data() + i * dims;
    float sum = 0.0f;
    for (int64_t j = 0; j < n_pairs; ++j) {
      const float a = row[rope.pairs()[j].first] * weight[j];
      const float b = row[rope.pairs()[j].second] * weight[j];
      sum += a * a + b * b;
    }
    const float inverse =
        commvq::inverse_rms(sum, commvq::rounded_rms(sum, static_cast<int>(dims)));
    if (inverse == 0.0f) continue;
    float* tile = vectors.tile(vectors.count / 64);
    const int64_t t = vectors.count++ % 64;
    for (int64_t j = 0; j < n_pairs; ++j) {
      tile[j * 64 + t] = row[rope.pairs()[j].first] * weight[j] * inverse;
      tile[(n_pairs + j) * 64 + t] = row[rope.pairs()[j].second] * weight[j] * inverse;
    }
  }
  return vectors;
}

// z_l = v / (1 + i) for vectors v drawn without repetition: code (l, l) is then v itself.
std::vector<float> seed_entries(const StageVectors& vectors, int n_entries, SplitMix64 random) {
  const int pairs = vectors.n_pairs;
  std::vector<float> entries(static_cast<size_t>(n_entries) * 2 * pairs, 0.0f);
  const std::vector<int64_t> picks = subsample(vectors.count, n_entries, random);
  for (int l = 0; l < n_entries && !picks.empty(); ++l) {
    const int64_t pick = picks[l % picks.size()];
    const float* tile = vectors.tile(pick / 64);
    for (int j = 0; j < pairs; ++j) {
      const float x = tile[j * 64 + pick % 64], y = tile[(pairs + j) * 64 + pick % 64];
      entries[l * 2 * pairs + j] = 0.5f * (x + y);
      entries[l * 2 * pairs + pairs + j] = 0.5f * (y - x);
    }
  }
  return entries;
}

// Stops when a step at the final temperature gains less than this.
constexpr double kLeastGain = 1e-4;

std::vector<float> train_stage(const StageVectors& vectors, int n_entries,
                               const CommVQParams& params, SplitMix64 random) {
  std::vector<float> entries = seed_entries(vectors, n_entries, random);
  const double mean = vectors.energy() / std::max<double>(1.0, static_cast<double>(vectors.count));
  if (!(mean > 0.0)) return entries;
  const double cooling = std::log(params.cold / params.hot);
  double previous = INFINITY;
  for (int step = 0; step < params.max_steps; ++step) {
    // Cools down over two thirds of the steps, then stays cold.
    const double progress = std::min(1.0, step / std::max(1.0, params.max_steps * 2.0 / 3.0));
    const double temperature = mean * params.hot * std::exp(cooling * progress);
    const StageMoments moments = soft_assignment(vectors, entries, n_entries, temperature);
    if (progress == 1.0 && previous - moments.nearest_error < kLeastGain * previous) break;
    previous = moments.nearest_error;
    refit_entries(moments, vectors.n_pairs, entries);
  }
  return entries;
}

// What encoding leaves over, with the rounded entries.
void encode_stage(const std::vector<float>& entries, int n_entries, StageVectors& vectors) {
  const commvq::Kernels& kernels = commvq::kernels_of(default_backend());
  std::vector<float> norms(commvq::kMaxEntries), cross(norms.size() * norms.size());
  kernels.products(entries.data(), vectors.n_pairs, n_entries, norms.data(), cross.data());
  const commvq::StageTables stage{vectors.n_pairs, n_entries, entries.data(), norms.data(),
                                  cross.data()};
  parallel_for(vectors.n_tiles(), [&](long i) {
    uint16_t codes[kBlockTokens];
    kernels.nearest_tile(stage, vectors.tile(i), codes, nullptr);
    kernels.subtract_centres(stage, codes, vectors.tile(i));
  });
}

void require_arguments(const TensorView& x, const std::vector<int64_t>& positions, const Rope& rope,
                       const TensorView& weight, const CommVQParams& params,
                       const MutableTensorView& codebook) {
  require_float_rows(x, "train_commvq");
  require(x.shape[2] == rope.spec().head_dim, "[train_commvq] x: got head_dim ", x.shape[2],
          ", wanted ", rope.spec().head_dim, " of the RoPE");
  require(static_cast<int64_t>(positions.size()) == x.shape[1], "[train_commvq] positions: got ",
          positions.size(), ", wanted one per token: ", x.shape[1]);
  require(params.max_steps >= 1 && params.hot >= params.cold && params.cold > 0.0,
          "[train_commvq] got max_steps ", params.max_steps, ", hot ", params.hot, ", cold ",
          params.cold, ", wanted at least one step and hot >= cold > 0");
  require(!codebook.empty() && codebook.dtype == DType::float16 && codebook.ndim == 5 &&
              codebook.shape[0] == x.shape[0] && codebook.shape[3] == 2 &&
              codebook.shape[4] * 2 == x.shape[2],
          "[train_commvq] codebook: got ", dtype_name(codebook.dtype), " with ", codebook.ndim,
          " dimensions, wanted float16 [", x.shape[0], ", stages, entries, 2, ", x.shape[2] / 2,
          "]");
  // Checks the rest, as a codec would.
  std::vector<uint16_t> zeros(read_only(codebook).size(), 0);
  TensorView view = read_only(codebook);
  view.data = zeros.data();
  make_commvq_codec(static_cast<int>(x.shape[0]), rope, view, weight);
}

}  // namespace

CommVQReport train_commvq(const TensorView& x, const std::vector<int64_t>& positions,
                          const Rope& rope, const TensorView& weight, const CommVQParams& params,
                          const MutableTensorView& codebook,
                          const std::function<void(double)>& progress) {
  require_arguments(x, positions, rope, weight, params, codebook);
  const int64_t heads = x.shape[0], n_stages = codebook.shape[1], n_pairs = x.shape[2] / 2;
  const int n_entries = static_cast<int>(codebook.shape[2]);
  CommVQReport report;
  report.relative_error.resize(heads);
  Progress done(heads * n_stages, progress);
  parallel_for(heads, [&](long h) {
    const std::vector<float> ones(n_pairs, 1.0f);
    const float* w = weight.empty() ? ones.data() : static_cast<const float*>(weight.at(h));
    StageVectors vectors = load_vectors(x, h, positions, rope, w, params.seed);
    const double energy = vectors.energy();
    for (int64_t r = 0; r < n_stages; ++r) {
      std::vector<float> entries =
          train_stage(vectors, n_entries, params, SplitMix64(params.seed, h * n_stages + r));
      auto* rounded = static_cast<uint16_t*>(codebook.at(h, r));
      for (size_t i = 0; i < entries.size(); ++i) {
        rounded[i] = f32_to_f16(std::clamp(entries[i], -65504.0f, 65504.0f));
        entries[i] = f16_to_f32(rounded[i]);
      }
      encode_stage(entries, n_entries, vectors);
      report.relative_error[h].push_back(energy > 0.0 ? vectors.energy() / energy : 0.0);
      done.step();
    }
  });
  return report;
}

void commvq_weight(const TensorView& query_moments, const Rope& rope,
                   const MutableTensorView& weight) {
  constexpr double kFloor = 1e-3;
  const int64_t heads = query_moments.empty() ? 0 : query_moments.shape[0];
  const int64_t n_pairs = static_cast<int64_t>(rope.pairs().size());
  require(!query_moments.empty() && query_moments.dtype == DType::float32 &&
              query_moments.ndim == 2 && query_moments.shape[1] == rope.spec().head_dim,
          "[commvq_weight] query_moments: got ", dtype_name(query_moments.dtype), " with ",
          query_moments.ndim, " dimensions, wanted float32 [H, ", rope.spec().head_dim, "]");
  require(!weight.empty() && weight.dtype == DType::float32 && weight.ndim == 2 &&
              weight.shape[0] == heads && weight.shape[1] == n_pairs,
          "[commvq_weight] weight: got ", dtype_name(weight.dtype), " with ", weight.ndim,
          " dimensions, wanted float32 [", heads, ", ", n_pairs, "]");
  const auto moment = [&](int64_t h, int d) {
    const float m = *static_cast<const float*>(query_moments.at(h, d));
    return std::isfinite(m) && m > 0.0f ? static_cast<double>(m) : 0.0;
  };
  for (int64_t h = 0; h < heads; ++h) {
    std::vector<double> root(n_pairs);
    for (int64_t j = 0; j < n_pairs; ++j) {
      root[j] =
          std::sqrt((moment(h, rope.pairs()[j].first) + moment(h, rope.pairs()[j].second)) / 2);
    }
    const double mean =
        std::accumulate(root.begin(), root.end(), 0.0) / static_cast<double>(n_pairs);
    for (int64_t j = 0; j < n_pairs; ++j) {
      *static_cast<float*>(weight.at(h, j)) =
          mean > 0.0 ? static_cast<float>(std::max(root[j] / mean, kFloor)) : 1.0f;
    }
  }
}

}  // namespace veloxquant
