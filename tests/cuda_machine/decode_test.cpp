// The decode attention kernels without a GPU: their own source, compiled for the host and run on
// the CUDA machine, against the fp64 oracle. What only hardware shows (time, the memory model,
// cp.async) is for tools/gpu/run.sh.
#include "src/attention/cuda.cu"

#include <gtest/gtest.h>

#include "tests/cuda_machine/runtime.h"
#include "tools/gpu/problem.h"

namespace veloxquant {

namespace attention::cuda {
alignas(1024) char base[232448];
// One head_dim: each takes the compiler half a minute.
Launcher launcher_64(const Choice& choice) {
  return choice.by_lane ? find_launcher<64, true>(choice) : find_launcher<64, false>(choice);
}
Launcher launcher_96(const Choice&) { return nullptr; }
Launcher launcher_128(const Choice&) { return nullptr; }
Launcher launcher_256(const Choice&) { return nullptr; }
}  // namespace attention::cuda

namespace backends {
char* const machine_memory = attention::cuda::base;
}

namespace {

constexpr double kTolerance = 2e-3;

// Two runs with CTAs and warps in different orders: near the oracle, and the same bits.
void check(const ProblemShape& shape, int n_ctas) {
  SCOPED_TRACE(testing::Message() << "seed " << shape.seed << ", " << n_ctas << " CTAs");
  cuda_machine::device().multiprocessors = n_ctas;
  Problem problem(shape);
  std::vector<float> want, want_lse, got, got_lse;
  problem.oracle(want, want_lse);
  for (int run = 0; run < 2; ++run) {
    cuda_machine::machine().random.seed(2 * shape.seed + run);
    problem.out->fill(0xff);
    problem.lse->fill(0xff);
    cuda::decode_attention(problem.args(), nullptr);
    std::vector<float> out = problem.out->host<float>();
    out.resize(want.size());
    if (run == 1) {
      EXPECT_EQ(std::memcmp(out.data(), got.data(), 4 * out.size()), 0) << "the runs differ";
    }
    got = out;
  }
  got_lse = problem.lse->host<float>();
  const int dim = shape.head_dim;
  for (size_t row = 0; row < want_lse.size(); ++row) {
    double error = 0.0, norm = 0.0;
    for (int d = 0; d < dim; ++d) {
      const double w = want[row * dim + d], g = got[row * dim + d];
      error += (g - w) * (g - w);
      norm += w * w;
    }
    EXPECT_LE(std::sqrt(error), kTolerance * (norm > 0 ? std::sqrt(norm) : 1.0)) << "row " << row;
    if (std::isinf(want_lse[row])) {
      EXPECT_EQ(got_lse[row], want_lse[row]);
    } else {
      EXPECT_NEAR(got_lse[row], want_lse[row], kTolerance) << "row " << row;
    }
  }
  for (const auto* buffer : {problem.out.get(), problem.lse.get(), problem.workspace.get()})
    EXPECT_TRUE(buffer->guards_intact());
}

ProblemShape shape_of(int n_q_heads, std::vector<int> n_packed, std::vector<int> n_exact) {
  ProblemShape shape;
  shape.head_dim = 64;
  shape.n_q_heads = n_q_heads;
  shape.tables = 2;
  shape.transform = TransformKind::dense;
  shape.n_packed = std::move(n_packed);
  shape.n_exact = std::move(n_exact);
  return shape;
}

TEST(CudaDecode, EveryFormatGroupOfHeadsAndTransform) {
  unsigned seed = 1;
  for (int group : {1, 4, 5, 16}) {
    for (int mode = 0; mode < 6; ++mode) {
      ProblemShape shape = shape_of(2 * group, {500, 0, 133}, {68, 5, 131});
      shape.key_sub_dim = mode == 0 || mode == 3 || mode == 4 ? 4 : 2;
      shape.value_sub_dim = mode == 0 || mode == 3 || mode == 5 ? 4 : 2;
      shape.tables = mode == 3 || mode == 2 ? 0 : mode == 0 ? 2 : 1;
      shape.transform = static_cast<TransformKind>((mode + group) % 3);
      shape.bf16 = mode % 2 == 1;
      shape.seed = ++seed;
      check(shape, mode % 2 == 1 ? 2 : 24);
    }
  }
}

TEST(CudaDecode, OneSequenceCutIntoPartsAndExactTokensInTheLast) {
  check(shape_of(8, {1500}, {100}), 132);
  check(shape_of(8, {1500}, {100}), 3);
  check(shape_of(8, {0}, {300}), 132);
  check(shape_of(8, {0}, {0}), 132);
  check(shape_of(8, {1}, {0}), 7);
}

TEST(CudaDecode, SeveralItemsACtaAndLengthsThatItsFirstGuessMisses) {
  check(shape_of(8, {300, 200, 700, 64, 1, 0}, {0, 68, 1, 100, 68, 0}), 1);
  check(shape_of(8, {300, 200, 700, 64, 1, 0}, {0, 68, 1, 100, 68, 0}), 5);
  check(shape_of(2, std::vector<int>(9, 200), std::vector<int>(9, 20)), 4);
}

TEST(CudaDecode, TablesOfEachSequence) {
  ProblemShape shape = shape_of(8, {300, 200, 70, 64, 1, 0}, {0, 68, 1, 100, 68, 0});
  shape.per_sequence_tables = true;
  check(shape, 3);
  check(shape, 132);
}

TEST(CudaDecode, SharedMemoryHasRoomForWhatTheMeasuredRowsUse) {
  using namespace attention::cuda;
  using Four = Layout<Shape<kInt8, kInt8, 4, true, 128, false>, shared_limit(900)>;
  EXPECT_EQ(Four::kBuffers, 2);  // warps need not wait for each other
  EXPECT_TRUE(Four::kHasMatrix);
  EXPECT_EQ(Four::kSlotCount, 4);
  EXPECT_LE(Four::bytes(true), 232448);
  using Short = Layout<Shape<kHalf2, kHalf2, 4, true, 256, false>, shared_limit(1200)>;
  EXPECT_TRUE(Short::kOver);
  EXPECT_LE(Short::bytes(false), 101376);
}

TEST(CudaDecode, LargeLogitsRaiseTheReference) {
  ProblemShape shape = shape_of(8, {1200, 33}, {7, 1});
  shape.logit_std = 8.0f;
  check(shape, 6);
}

}  // namespace
}  // namespace veloxquant
