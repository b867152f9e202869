// Times the general CUDA path: median of CUDA-graph replays over rotating buffers, as cuda_bench.
//
//   general_bench [WORD...]     only rows and formats whose name has one of the words
//
// us: of the device; host: a call of attend() while it is captured. 32/8 heads of 128, 100 exact
// tokens a sequence, blocks of CPU-encoded tokens repeated over the storage; many queries see all
// tokens. Bytes are those of blocks. Outputs are checked by general_check; here they must be finite
// and equal before and after.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <exception>
#include <thread>

#include "tools/gpu/general_device.h"

using namespace veloxquant;
using test::ragged_codec;

namespace {

struct Row {
  const char* name;
  int batch, context, n_queries;
};
constexpr Row kRows[] = {{"1x32k", 1, 32768, 1},         {"8x32k", 8, 32768, 1},
                         {"1x131k", 1, 131072, 1},       {"1x32k q8", 1, 32768, 8},
                         {"1x32k q64", 1, 32768, 64},    {"1x32k q512", 1, 32768, 512},
                         {"1x32k q2048", 1, 32768, 2048}};

struct Format {
  const char *name, *key_method, *key, *value_method, *value;
  bool fragments;
};
constexpr Format kFormats[] = {
    {"vecinfer d4x256, 2 bits", "vecinfer", "4x256 dense head", "vecinfer", "4x256 dense head",
     false},
    {"the same in fragments", "vecinfer", "4x256 dense head int8", "vecinfer",
     "4x256 dense head int8", true},
    {"vecinfer d2x256, 4 bits", "vecinfer", "2x256 dense head", "vecinfer", "2x256 dense head",
     false},
    {"turboquant 2 bits", "turboquant", "2", "turboquant", "2", false},
    {"turboquant 4 bits", "turboquant", "4", "turboquant", "4", false},
    {"turboquant 3 bits", "turboquant", "3", "turboquant", "3", false},
    {"rvq 1+1 bits", "turboquant_rvq", "1", "turboquant_rvq", "1", false},
    {"rabitq 2 bits", "rabitq", "2", "rabitq", "2 reconstruction", false},
    {"qjl m128 | turboquant 2", "qjl", "1", "turboquant", "2", false},
};
constexpr int kExact = 100, kHeads = 8, kQueryHeads = 32, kDim = 128, kThreads = 14;

struct Event {
  cudaEvent_t event;
  Event() { cuda_ok(cudaEventCreate(&event), "event"); }
  ~Event() { cudaEventDestroy(event); }
};

template <class Call>
double graph_us(cudaStream_t stream, int calls, const Call& call, double* host_us = nullptr) {
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  cuda_ok(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < calls; ++i) call(i);
  if (host_us != nullptr) {
    const std::chrono::duration<double, std::micro> host = std::chrono::steady_clock::now() - begin;
    *host_us = host.count() / calls;
  }
  cuda_ok(cudaStreamEndCapture(stream, &graph), "capture");
  cuda_ok(cudaGraphInstantiate(&replay, graph, 0), "instantiate");
  Event start, stop;
  std::vector<float> times;
  for (int i = 0; i < 14; ++i) {
    cudaEventRecord(start.event, stream);
    cuda_ok(cudaGraphLaunch(replay, stream), "launch");
    cudaEventRecord(stop.event, stream);
    cuda_ok(cudaEventSynchronize(stop.event), "replay");
    float ms;
    cudaEventElapsedTime(&ms, start.event, stop.event);
    if (i >= 4) times.push_back(ms * 1e3f / static_cast<float>(calls));
  }
  std::sort(times.begin(), times.end());
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  return times[times.size() / 2];
}

// A row of a format, compiled.
struct Work {
  const Row& row;
  const Format& format;
  test::RaggedProblem problem;
  DeviceProblem device;
  DeviceBuffer n_packed;
  cuda::AttendArgs args;

  static test::RaggedCase case_of(const Row& row) {
    test::RaggedCase c;
    c.n_q_heads = kQueryHeads;
    c.n_queries = row.n_queries;
    c.causal = row.n_queries < 64;  // as sdpa.py: the same products for every query
    c.n_packed.assign(row.batch, 64 * 4);
    c.n_exact.assign(row.batch, kExact);
    return c;
  }
  Work(const Row& r, const Format& f)
      : row(r),
        format(f),
        problem(case_of(r), ragged_codec(f.key_method, f.key, Side::keys, kDim, kHeads),
                ragged_codec(f.value_method, f.value, Side::values, kDim, kHeads)),
        device(problem, DType::float16, f.fragments),
        n_packed(std::vector<int32_t>(r.batch, r.context - kExact)),
        args(device.args) {
    args.n_packed = reinterpret_cast<const int32_t*>(n_packed.get());
    args.max_packed = r.context - kExact;
    cuda::prepare_attend(args);
  }
};

void time_row(Work& work, cudaStream_t stream) {
  const Row& row = work.row;
  const Format& format = work.format;
  DeviceProblem& device = work.device;
  cuda::AttendArgs args = work.args;
  const int n_blocks = (row.context - kExact + 63) / 64;
  int64_t bytes = 0;
  std::vector<std::vector<std::unique_ptr<DeviceBuffer>>> copies;
  for (cuda::BlockSide* side : {&args.keys, &args.values}) {
    bytes += int64_t{row.batch} * kHeads * n_blocks * side->codec.block_bytes();
  }
  const int n_copies =
      args.causal ? std::max<int>(2, static_cast<int>((300ll << 20) / bytes + 1)) : 2;
  for (cuda::BlockSide* side : {&args.keys, &args.values}) {
    const int64_t block = side->codec.block_bytes(), head = n_blocks * block;
    auto& buffers = copies.emplace_back();
    for (int i = 0; i < n_copies; ++i) {
      buffers.push_back(std::make_unique<DeviceBuffer>(row.batch * kHeads * head));
      for (int pair = 0; pair < row.batch * kHeads; ++pair) {
        for (int n = 0; n < n_blocks; n += 4) {
          cuda_ok(
              cudaMemcpyAsync(buffers.back()->get() + pair * head + n * block,
                              side->blocks + pair * 4 * block, std::min(4, n_blocks - n) * block,
                              cudaMemcpyDeviceToDevice, stream),
              "copy");
        }
      }
    }
    side->head_stride = head;
    side->sequence_stride = kHeads * head;
    side->block_stride = block;
  }
  args.workspace_bytes = cuda::attend_workspace_bytes(args);
  DeviceBuffer workspace(args.workspace_bytes);
  args.workspace = workspace.get();
  const auto call = [&](int i) {
    cuda::AttendArgs a = args;
    a.keys.blocks = copies[0][i % n_copies]->get();
    a.values.blocks = copies[1][i % n_copies]->get();
    cuda::attend(a, stream);
  };
  const auto output = [&] {
    device.out->fill(0xff);
    call(0);
    cuda_ok(cudaStreamSynchronize(stream), "attend");
    return device.output();
  };
  const std::vector<float> before = output();
  for (float x : before) {
    if (!std::isfinite(x)) throw std::runtime_error("an output is not finite");
  }
  const int calls = std::max(4, n_copies) / n_copies * n_copies;
  double host = 0;
  const double us = graph_us(stream, calls, call, &host);
  if (output() != before) throw std::runtime_error("the output changed");
  std::printf("%-11s %-26s %-8s %9.1f us %8.1f MB %6.2f TB/s, host %5.1f us\n", row.name,
              format.name, cuda::attend_kernel(args).substr(0, 7).c_str(), us,
              static_cast<double>(bytes) / 1e6, static_cast<double>(bytes) / us / 1e6, host);
  std::fflush(stdout);
}

// One layer's keys of 32k tokens into blocks.
void time_encode(const Format& format, cudaStream_t stream) {
  if (format.fragments || std::string(format.key_method) == "qjl") return;
  constexpr int kTokens = 32768;
  const test::CasePtr one = ragged_codec(format.key_method, format.key, Side::keys, kDim, kHeads);
  const cuda::GpuCodec codec = cuda::prepare_codec(one->spec(), one->tables());
  const int64_t head = kTokens / 64 * codec.block_bytes();
  DeviceBuffer blob(codec.blob()), blocks(kHeads * head);
  test::ExactRandom random(3);
  DeviceBuffer x(random.halves(int64_t{kHeads} * kTokens * kDim));
  const cuda::BlockSide side{codec, blob.get(), blocks.get(), 0, head, codec.block_bytes()};
  const auto call = [&](int) {
    cuda::encode_blocks(side, {}, 1, {x.get(), 0, int64_t{kTokens} * kDim, kDim}, DType::float16,
                        kTokens, 0, stream);
  };
  call(0);
  std::printf("encode    %-26s %-8s %9.1f us for %d tokens of %d heads\n", format.name, "",
              graph_us(stream, 4, call), kTokens, kHeads);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const std::vector<std::string> words(argv + 1, argv + argc);
    const auto wanted = [&](const std::string& name) {
      return words.empty() || std::any_of(words.begin(), words.end(), [&](const std::string& word) {
               return name.find(word) != std::string::npos;
             });
    };
    std::printf("%s\n", cuda::device_name().c_str());
    cudaStream_t stream;
    cuda_ok(cudaStreamCreate(&stream), "stream");
    std::vector<std::pair<const Row*, const Format*>> rows;
    for (const Row& row : kRows) {
      for (const Format& format : kFormats) {
        if (wanted(std::string(row.name) + " " + format.name)) rows.emplace_back(&row, &format);
      }
    }
    // Most of the time would be NVRTC's: side by side.
    std::vector<std::unique_ptr<Work>> works(rows.size());
    std::atomic<size_t> next = 0;
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; ++i) {
      threads.emplace_back([&] {
        for (size_t n; (n = next++) < rows.size();) {
          try {
            works[n] = std::make_unique<Work>(*rows[n].first, *rows[n].second);
          } catch (const std::exception& error) {
            std::printf("%s %s: %s\n", rows[n].first->name, rows[n].second->name, error.what());
          }
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (std::unique_ptr<Work>& work : works) {
      if (work == nullptr) return 2;
      time_row(*work, stream);
      work.reset();
    }
    for (const Format& format : kFormats) {
      if (wanted(std::string("encode ") + format.name)) time_encode(format, stream);
    }
    return 0;
  } catch (const std::exception& error) {
    std::printf("general_bench: %s\n", error.what());
    return 2;
  }
}
