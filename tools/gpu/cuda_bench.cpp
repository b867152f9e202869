// Times decode attention on packed codes: random codes, cold L2, a CUDA graph of launches over
// rotating buffers.
//
//   cuda_bench [exact=N] [transform=0|1|2] [format=WORD] [NAME...]
//
// Rows whose name contains one of the words; all without. exact: exact tokens beside the packed
// ones.
//
// Bytes are those of the codes. The outputs are checked against the fp64 oracle by cuda_check; here
// every buffer's output must be finite and equal before and after the timing.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>

#include "tools/gpu/problem.h"

using namespace veloxquant;

namespace {

struct Row {
  const char* name;
  int batch, context, n_q_heads, n_kv_heads, head_dim;
};

constexpr Row kRows[] = {
    {"1x131k", 1, 131072, 32, 8, 128}, {"1x196k", 1, 196608, 32, 8, 128},
    {"32x4k", 32, 4096, 32, 8, 128},   {"8x32k", 8, 32768, 32, 8, 128},
    {"32x16k", 32, 16384, 32, 8, 128}, {"mha16x4k", 16, 4096, 32, 32, 128},
    {"1x32k", 1, 32768, 32, 8, 128},   {"1x4k", 1, 4096, 32, 8, 128},
    {"d64 8x8k", 8, 8192, 9, 3, 64},   {"g8 1x131k", 1, 131072, 64, 8, 128},
};

struct Format {
  const char* name;
  int sub_dim, tables;
};
constexpr Format kFormats[] = {{"2-bit lane", 4, 1},
                               {"2-bit subvector", 4, 0},
                               {"4-bit lane", 2, 1},
                               {"4-bit subvector", 2, 0}};

int exact_tokens = 100;
TransformKind transform_kind = TransformKind::dense;

// Median time of one call in microseconds.
double time_row(const Row& row, const Format& format, cudaStream_t stream) {
  const int exact = exact_tokens, packed = row.context - exact;
  ProblemShape small;
  small.n_q_heads = row.n_q_heads;
  small.n_kv_heads = row.n_kv_heads;
  small.head_dim = row.head_dim;
  small.key_sub_dim = small.value_sub_dim = format.sub_dim;
  small.tables = format.tables;
  small.transform = transform_kind;
  small.n_packed.assign(row.batch, 64);
  small.n_exact.assign(row.batch, exact);
  Problem problem(small);
  const int n_blocks = (packed + 63) / 64;
  cuda::DecodeArgs args = problem.args();
  const int64_t head_stride = n_blocks * args.keys.format.block_bytes();
  const int64_t side_bytes = head_stride * row.n_kv_heads * row.batch;
  const int copies = std::max<int>(2, static_cast<int>((300ll << 20) / (2 * side_bytes) + 1));
  std::vector<int32_t> lengths(row.batch, packed);
  DeviceBuffer n_packed(lengths);
  args.n_packed = reinterpret_cast<const int32_t*>(n_packed.get());
  args.out_dtype = DType::float16;
  std::mt19937_64 rng(7);
  std::vector<uint64_t> noise(1 << 20);
  for (uint64_t& x : noise) x = rng();
  std::vector<std::unique_ptr<DeviceBuffer>> codes;
  for (int i = 0; i < 2 * copies; ++i) {
    codes.push_back(std::make_unique<DeviceBuffer>(side_bytes));
    const int64_t piece = static_cast<int64_t>(noise.size()) * 8;
    for (int64_t at = 0; at < side_bytes; at += piece) {
      cuda_ok(cudaMemcpy(codes.back()->get() + at, noise.data(), std::min(piece, side_bytes - at),
                         cudaMemcpyHostToDevice),
              "copy");
    }
  }
  const auto call = [&](int i) {
    cuda::DecodeArgs a = args;
    a.keys.codes = codes[2 * i]->get();
    a.values.codes = codes[2 * i + 1]->get();
    a.keys.head_stride = a.values.head_stride = head_stride;
    a.keys.batch_stride = a.values.batch_stride = head_stride * row.n_kv_heads;
    cuda::decode_attention(a, stream);
  };
  const auto output = [&] {
    problem.out->fill(0xff);
    call(0);
    cuda_ok(cudaStreamSynchronize(stream), "decode_attention");
    std::vector<uint16_t> out = problem.out->host<uint16_t>();
    out.resize(static_cast<size_t>(row.batch) * row.n_q_heads * row.head_dim);
    return out;
  };
  const std::vector<uint16_t> before = output();
  for (uint16_t x : before) {
    if (!std::isfinite(f16_to_f32(x))) throw std::runtime_error("an output is not finite");
  }
  const int calls = (7 + copies) / copies * copies;
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  cuda_ok(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int i = 0; i < calls; ++i) call(i % copies);
  cuda_ok(cudaStreamEndCapture(stream, &graph), "capture");
  cuda_ok(cudaGraphInstantiate(&replay, graph, 0), "instantiate");
  cudaEvent_t start, stop;
  cudaEventCreate(&start);
  cudaEventCreate(&stop);
  std::vector<float> times;
  for (int i = 0; i < 24; ++i) {
    cudaEventRecord(start, stream);
    cuda_ok(cudaGraphLaunch(replay, stream), "launch");
    cudaEventRecord(stop, stream);
    cuda_ok(cudaEventSynchronize(stop), "replay");
    float ms;
    cudaEventElapsedTime(&ms, start, stop);
    if (i >= 4) times.push_back(ms * 1e3f / calls);
  }
  std::sort(times.begin(), times.end());
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  if (output() != before) throw std::runtime_error("the output changed");
  return times[times.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  try {
    std::vector<const char*> words;
    const char* format_word = "";
    for (int i = 1; i < argc; ++i) {
      int transform = 0;
      if (std::sscanf(argv[i], "exact=%d", &exact_tokens) == 1) continue;
      if (std::sscanf(argv[i], "transform=%d", &transform) == 1) {
        transform_kind = static_cast<TransformKind>(transform);
      } else if (std::strncmp(argv[i], "format=", 7) == 0) {
        format_word = argv[i] + 7;
      } else {
        words.push_back(argv[i]);
      }
    }
    std::printf("%s\n%-12s %-18s %10s %10s %8s\n", cuda::device_name().c_str(), "work", "format",
                "us", "code MB", "TB/s");
    cudaStream_t stream;
    cuda_ok(cudaStreamCreate(&stream), "stream");
    for (const Row& row : kRows) {
      bool wanted = words.empty();
      for (const char* word : words) wanted |= std::strstr(row.name, word) != nullptr;
      if (!wanted) continue;
      for (const Format& format : kFormats) {
        if (std::strstr(format.name, format_word) == nullptr) continue;
        const double us = time_row(row, format, stream);
        const double bytes =
            2.0 * row.batch * row.context * row.n_kv_heads * (row.head_dim / format.sub_dim);
        std::printf("%-12s %-18s %10.1f %10.1f %8.2f\n", row.name, format.name, us, bytes / 1e6,
                    bytes / us / 1e6);
        std::fflush(stdout);
      }
    }
    return 0;
  } catch (const std::exception& error) {
    std::printf("cuda_bench: %s\n", error.what());
    return 2;
  }
}
