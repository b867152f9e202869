// Holds the CUDA kernels against the CPU: codes bit for bit, attention against the fp64 oracle.
//
//   cuda_check [quick | DIM...]     `quick`: few small cases, for compute-sanitizer. DIM: only
//   these head_dims
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>

#include "tools/gpu/problem.h"

using namespace veloxquant;

namespace {

int failures = 0;

void expect(bool ok, const char* what, const std::string& detail) {
  if (ok) return;
  ++failures;
  std::printf("  FAILED %s: %s\n", what, detail.c_str());
}

std::string describe(const ProblemShape& s) {
  std::string text = std::to_string(s.n_q_heads) + "/" + std::to_string(s.n_kv_heads) + " d" +
                     std::to_string(s.head_dim) + " k" + std::to_string(s.key_sub_dim) + " v" +
                     std::to_string(s.value_sub_dim) +
                     (s.tables == 1   ? " head"
                      : s.tables == 2 ? " lane"
                                      : " subvector") +
                     (s.per_sequence_tables ? " seq" : "") + " t" +
                     std::to_string(static_cast<int>(s.transform)) + (s.bf16 ? " bf16" : "") +
                     " std" + std::to_string(static_cast<int>(s.logit_std)) + " packed";
  for (int n : s.n_packed) text += " " + std::to_string(n);
  text += " exact";
  for (int n : s.n_exact) text += " " + std::to_string(n);
  return text;
}

// The device's encoder and its layout against the CPU's blocks.
void check_codes(const Problem& problem) {
  const ProblemShape& s = problem.shape;
  for (const auto* data : {&problem.keys, &problem.values}) {
    const cuda::SideFormat& f = data->prepared.format;
    const int64_t pairs = int64_t{problem.batch()} * s.n_kv_heads, d = s.head_dim;
    const std::vector<uint8_t> fragments = data->fragments->host<uint8_t>();
    DeviceBuffer back(data->blocks.size());
    cuda::unpack_blocks(f, data->fragments->get(), pairs, problem.max_blocks,
                        problem.max_blocks * f.block_bytes(), back.get(), nullptr);
    expect(back.host<uint8_t>() == data->blocks, "unpack", "differs from the CPU's blocks");
    expect(back.guards_intact(), "unpack", "wrote outside its buffer");
    // Encode the whole history where every sequence has whole blocks or the same rest.
    const bool uniform = std::all_of(s.n_packed.begin(), s.n_packed.end(),
                                     [&](int n) { return n == s.n_packed[0]; });
    if (!uniform || s.n_packed[0] == 0) continue;
    DeviceBuffer history(data->history), codes(fragments.size());
    cuda::PackedSide packed;
    packed.format = f;
    packed.tables = data->blob->get();
    packed.head_stride = problem.max_blocks * f.block_bytes();
    packed.batch_stride = s.n_kv_heads * packed.head_stride;
    const int64_t tokens = 64 * problem.max_blocks;
    cuda::encode_blocks(packed, codes.get(), problem.batch(),
                        {history.get(), s.n_kv_heads * tokens * d, tokens * d, d},
                        s.bf16 ? DType::bfloat16 : DType::float16, s.n_packed[0], 0, nullptr);
    const std::vector<uint8_t> made = codes.host<uint8_t>();
    size_t wrong = 0;
    for (size_t i = 0; i < made.size(); ++i) wrong += made[i] != fragments[i];
    expect(wrong == 0, "encode",
           std::to_string(wrong) + " of " + std::to_string(made.size()) +
               " bytes differ from the CPU's");
    expect(codes.guards_intact(), "encode", "wrote outside its buffer");
  }
}

double check_attention(Problem& problem, int runs, double tolerance) {
  const ProblemShape& s = problem.shape;
  std::vector<float> want, want_lse;
  problem.oracle(want, want_lse);
  std::vector<float> first;
  for (int run = 0; run < runs; ++run) {
    problem.out->fill(0xff);
    problem.lse->fill(0xff);
    cuda::decode_attention(problem.args(), nullptr);
    cuda_ok(cudaDeviceSynchronize(), "decode_attention");
    std::vector<float> got = problem.out->host<float>();
    got.resize(want.size());
    if (run == 0) {
      first = got;
    } else if (std::memcmp(first.data(), got.data(), got.size() * 4) != 0) {
      expect(false, "determinism", "run " + std::to_string(run) + " differs");
      break;
    }
  }
  const std::vector<float> got_lse = problem.lse->host<float>();
  double worst = 0.0, worst_lse = 0.0;
  for (size_t row = 0; row < want_lse.size(); ++row) {
    double error = 0.0, norm = 0.0;
    for (int d = 0; d < s.head_dim; ++d) {
      const double w = want[row * s.head_dim + d], g = first[row * s.head_dim + d];
      error += (g - w) * (g - w);
      norm += w * w;
    }
    const double relative = norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
    if (!(relative <= worst)) worst = relative;
    if (std::isinf(want_lse[row])) {
      expect(got_lse[row] == want_lse[row], "lse",
             "got " + std::to_string(got_lse[row]) + ", wanted -inf");
    } else if (const double e = std::fabs(got_lse[row] - want_lse[row]); !(e <= worst_lse)) {
      worst_lse = e;
    }
  }
  expect(worst <= tolerance, "attention", "relative error " + std::to_string(worst));
  // A query is kept in 16 bits of its largest element: the error of a score is absolute and grows
  // with it.
  expect(worst_lse <= 2e-3 * std::max(1.0f, s.logit_std / 10), "lse",
         "error " + std::to_string(worst_lse));
  for (const auto* buffer : {problem.out.get(), problem.lse.get(), problem.workspace.get()}) {
    expect(buffer->guards_intact(), "attention", "wrote outside its buffers");
  }
  return worst;
}

// Many short sequences, so that a CTA of the combination takes several rows: 4 with 35 sequences of
// 2 KV heads and 5 query heads each, 8 with 70.
ProblemShape many_sequences(int dim, int batch, int group, int kind) {
  ProblemShape s;
  s.head_dim = dim;
  s.n_q_heads = 2 * group;
  s.transform = static_cast<TransformKind>(kind);
  s.key_sub_dim = s.value_sub_dim = kind == 1 ? 2 : 4;
  s.seed = dim + batch + group;
  s.n_packed.clear();
  s.n_exact.clear();
  for (int i = 0; i < batch; ++i) {
    s.n_packed.push_back((i * 37) % 5 == 0 ? 0 : 130 * (i % 3) + i % 7);
    s.n_exact.push_back(i % 4 == 0 ? 0 : i % 40);
  }
  return s;
}

std::vector<ProblemShape> cases(bool quick, const std::vector<int>& dims) {
  std::vector<ProblemShape> all;
  ProblemShape base;
  base.n_packed = {130};
  all.push_back(base);
  if (quick) {
    base.key_sub_dim = base.value_sub_dim = 2;
    base.tables = 0;
    base.n_packed = {0, 65};
    base.n_exact = {3, 0};
    all.push_back(base);
    base.head_dim = 64;
    base.n_q_heads = 16;
    all.push_back(base);
    all.push_back(many_sequences(64, 70, 5, 2));
    return all;
  }
  for (int n : {0, 1, 31, 32, 33, 63, 64, 65, 8191}) {
    for (int exact : {0, 1, 68}) {
      if (n > 64 && exact == 1) continue;
      ProblemShape s = base;
      s.n_packed = {n};
      s.n_exact = {exact};
      all.push_back(s);
    }
  }
  for (int dim : dims) {
    for (int group : {1, 3, 4, 5, 8, 16}) {
      for (int mode = 0; mode < 6; ++mode) {
        if (dim != 128 && dim != 64 && (group == 3 || group == 5)) continue;
        ProblemShape s = base;
        s.head_dim = dim;
        s.n_q_heads = 2 * group;
        s.key_sub_dim = mode == 0 || mode == 3 || mode == 4 ? 4 : 2;
        s.value_sub_dim = mode == 0 || mode == 3 || mode == 5 ? 4 : 2;
        if (mode == 2) s.key_sub_dim = s.value_sub_dim = 2;
        s.tables = mode == 3 || mode == 2 ? 0 : mode == 0 ? 2 : 1;
        s.transform = static_cast<TransformKind>(mode % 3);
        if (dim == 256 && s.tables == 0 && s.key_sub_dim == 2)
          continue;  // 256 KB of tables: refused
        s.n_packed = {700, 0, 1333};
        s.n_exact = {68, 5, 131};
        s.bf16 = mode % 2 == 1;
        s.seed = 10 * group + mode;
        all.push_back(s);
      }
    }
  }
  for (int dim : dims) {
    for (int kind = 0; kind < 3; ++kind) {
      all.push_back(many_sequences(dim, 35, 5, kind));
      all.push_back(many_sequences(dim, 70, 5, kind));
      all.push_back(many_sequences(dim, 43, 9, kind));
    }
  }
  for (float std : {0.1f, 1.0f, 4.0f, 8.0f}) {
    ProblemShape s = base;
    s.n_q_heads = 32;
    s.n_kv_heads = 8;
    s.logit_std = std;
    s.n_packed = {8192};
    s.transform = TransformKind::dense;
    all.push_back(s);
    s.n_q_heads = 64;
    all.push_back(s);
    s.key_sub_dim = s.value_sub_dim = 2;
    all.push_back(s);
  }
  // Large logits and few tokens: the padding of a block, near 0, must not count against scores far
  // below.
  for (int sub_dim : {4, 2}) {
    for (int heads : {8, 16}) {
      ProblemShape s = base;
      s.n_q_heads = heads;
      s.key_sub_dim = s.value_sub_dim = sub_dim;
      s.logit_std = 40.0f;
      s.n_packed = {1, 2, 33, 65, 1};
      s.n_exact = {0, 0, 0, 0, 1};
      all.push_back(s);
    }
  }
  ProblemShape s = base;
  s.per_sequence_tables = true;
  s.n_packed = {300, 200, 700, 64, 1, 900};
  s.n_exact = {0, 68, 1, 100, 68, 131};
  all.push_back(s);
  s.tables = 0;
  all.push_back(s);
  s.n_centroids = 200;
  all.push_back(s);
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const bool quick = argc > 1 && std::strcmp(argv[1], "quick") == 0;
    std::vector<int> dims;
    for (int i = 1; i < argc && !quick; ++i) dims.push_back(std::stoi(argv[i]));
    if (dims.empty()) dims = {64, 80, 96, 128, 256};
    std::printf("%s\n", cuda::device_name().c_str());
    double worst = 0.0;
    int n = 0;
    for (const ProblemShape& shape : cases(quick, dims)) {
      const int before = failures;
      double error = 0.0;
      try {
        Problem problem(shape);
        check_codes(problem);
        error = check_attention(problem, quick ? 2 : 3, 2e-3);
      } catch (const std::exception& failed) {
        // The device may be of no use after this, so it is the last shape; at least it has a name.
        throw std::runtime_error(describe(shape) + ": " + failed.what());
      }
      worst = std::max(worst, error);
      ++n;
      if (failures > before || quick)
        std::printf("%-70s error %.2e\n", describe(shape).c_str(), error);
    }
    for (int mode = 0; mode < (quick ? 1 : 6); ++mode) {
      ProblemShape shape;
      shape.head_dim = mode == 3 ? 80 : mode == 4 ? 256 : 128;
      shape.key_sub_dim = mode % 2 == 0 ? 4 : 2;
      shape.value_sub_dim = mode == 1 ? 4 : shape.key_sub_dim;
      shape.tables = mode % 3;
      shape.transform = static_cast<TransformKind>(mode % 3);
      shape.bf16 = mode >= 3;
      shape.n_packed = {512, 512};
      shape.n_exact = {1, 1};
      const std::string problem =
          append_problem(shape, quick ? 140 : 450, mode == 5 ? 0 : 4, mode == 2 ? 100 : 64);
      expect(problem.empty(), "append", "mode " + std::to_string(mode) + ": " + problem);
      ++n;
    }
    if (!quick) {
      ProblemShape shape;
      shape.n_packed = {3000, 100, 2000};
      shape.n_exact = {68, 68, 131};
      Problem problem(shape);
      check_attention(problem, 1000, 2e-3);
    }
    std::printf("cuda_check: %d cases, worst relative error %.2e, %d failures\n", n, worst,
                failures);
    return failures == 0 ? 0 : 1;
  } catch (const std::exception& error) {
    std::printf("cuda_check: %s\n", error.what());
    return 2;
  }
}
