// Holds the general CUDA path (veloxquant/cuda_general.h) against the CPU: codes byte for byte,
// decoded numbers bit for bit, attention against the fp64 oracle.
//
//   general_check [quick | codes | attention | append | graph]...    quick: few small cases, for
//   compute-sanitizer
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

#include "tests/support/ragged_problem.h"
#include "tools/gpu/general_device.h"
#include "veloxquant/cache.h"

using namespace veloxquant;
using test::ragged_codec;
using test::RaggedCase;
using test::RaggedProblem;

namespace {

std::mutex mutex;  // of these numbers
int failures = 0, cases = 0;
double worst_of_all = 0;

void expect(bool ok, const std::string& what, const std::string& detail) {
  if (ok) return;
  const std::lock_guard<std::mutex> lock(mutex);
  ++failures;
  std::printf("  FAILED %s: %s\n", what.c_str(), detail.c_str());
  std::fflush(stdout);
}

// Cases side by side: most of their time is NVRTC's and the oracle's.
constexpr int kThreads = 12;
std::vector<std::function<void()>> jobs;
void run_jobs(int n_threads) {
  std::atomic<size_t> next = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < n_threads; ++i) {
    threads.emplace_back([&] {
      for (size_t job; (job = next++) < jobs.size();) {
        try {
          jobs[job]();
        } catch (const std::exception& error) {
          expect(false, "case " + std::to_string(job), error.what());
        }
        const std::lock_guard<std::mutex> lock(mutex);
        ++cases;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  jobs.clear();
}

struct Form {
  const char *method, *what;
  Side side;
  int dim;
};

constexpr Form kForms[] = {
    {"vecinfer", "2x16 hadamard", Side::keys, 64},
    {"vecinfer", "4x256 dense head", Side::values, 128},
    {"vecinfer", "8x256 none", Side::keys, 96},
    {"vecinfer", "4x64 hadamard head", Side::values, 80},
    {"vecinfer", "8x1000 dense", Side::keys, 128},
    {"vecinfer", "4x4000 none head", Side::keys, 256},
    {"turboquant", "1", Side::keys, 128},
    {"turboquant", "2", Side::values, 64},
    {"turboquant", "3 unbiased", Side::keys, 80},
    {"turboquant", "4 raw", Side::values, 256},
    {"turboquant", "4", Side::keys, 96},
    {"turboquant", "3 prod", Side::keys, 128},
    {"turboquant", "1 prod", Side::values, 64},
    {"turboquant_rvq", "1", Side::keys, 128},
    {"turboquant_rvq", "3", Side::values, 96},
    {"rabitq", "1", Side::keys, 128},
    {"rabitq", "2 mean reconstruction", Side::values, 64},
    {"rabitq", "3 norm", Side::keys, 80},
    {"rabitq", "4 mean", Side::values, 256},
    {"qjl", "1", Side::keys, 128},
    {"qjl", "2", Side::keys, 64},
    {"qjl", "1 outliers fixed", Side::keys, 96},
    {"qjl", "2 outliers", Side::keys, 64},
};

// Encode of a history in three types of input, strided or paged, and decode.
void codes_case(const Form& form, bool paged, DType dtype, int n_tokens) {
  RaggedCase c;
  c.n_q_heads = 2;
  c.n_packed = {n_tokens, n_tokens};
  c.n_exact = {1, 1};
  c.paged = paged;
  const test::CasePtr one = ragged_codec(form.method, form.what, form.side, form.dim);
  const RaggedProblem p(c, one, one);
  const std::string label = std::string(form.method) + " " + form.what + " d" +
                            std::to_string(form.dim) + (paged ? " paged " : " ") +
                            dtype_name(dtype) + " " + std::to_string(n_tokens);
  DeviceSide side(p, p.keys);
  // Blocks beyond what is encoded must stay as they are.
  std::vector<uint8_t> want = p.keys.blocks;
  DeviceBuffer made(std::vector<uint8_t>(want.size(), 0xa5));
  DeviceTable table(p);
  const int64_t tokens = 64 * p.max_blocks, d = p.dim;
  std::vector<uint8_t> x(p.keys.history.size() * dtype_bytes(dtype));
  for (size_t i = 0; i < p.keys.history.size(); ++i) {
    attention::store_element(x.data(), dtype, static_cast<int64_t>(i), p.keys.history[i]);
  }
  DeviceBuffer history(x);
  cuda::BlockSide to = side.view;
  to.blocks = made.get();
  cuda::encode_blocks(to, table.view, p.batch, {history.get(), p.heads * tokens * d, tokens * d, d},
                      dtype, n_tokens, 0, nullptr);
  cuda_ok(cudaDeviceSynchronize(), "encode_blocks");
  const std::vector<uint8_t> got = made.host<uint8_t>();
  size_t wrong = 0;
  for (size_t i = 0; i < got.size(); ++i) wrong += got[i] != want[i];
  expect(wrong == 0, "encode " + label,
         std::to_string(wrong) + " of " + std::to_string(got.size()) + " bytes differ");
  expect(made.guards_intact(), "encode " + label, "wrote outside its buffer");

  DeviceBuffer y(static_cast<size_t>(p.batch) * p.heads * tokens * d * 4);
  cuda::decode_blocks(side.view, table.view, p.batch, 0, p.max_blocks,
                      reinterpret_cast<float*>(y.get()), p.heads * tokens * d, tokens * d, nullptr);
  cuda_ok(cudaDeviceSynchronize(), "decode_blocks");
  const std::vector<float> decoded = y.host<float>();
  std::vector<float> rows(64 * d);
  wrong = 0;
  for (int pair = 0; pair < p.batch * p.heads; ++pair) {
    const int b = pair / p.heads, h = pair % p.heads;
    for (int n = 0; n < p.max_blocks; ++n) {
      const auto step = p.steps(p.keys);
      const int64_t at = paged ? p.table[b * p.max_blocks + n] : n;
      one->codec().decode_block(default_backend(), {b, h, 0},
                                want.data() + b * step[0] + h * step[1] + at * step[2], 64,
                                rows.data(), d);
      wrong += std::memcmp(rows.data(), &decoded[(pair * int64_t{p.max_blocks} + n) * 64 * d],
                           rows.size() * 4) != 0;
    }
  }
  expect(wrong == 0, "decode " + label, std::to_string(wrong) + " blocks differ");
  expect(y.guards_intact(), "decode " + label, "wrote outside its buffer");
}

// `fragments`: vecinfer's codes in the order of cuda.h.
void attention_case(const RaggedCase& c, const Form& key, const Form& value, DType dtype, int runs,
                    bool fragments, const char* kernel) {
  const RaggedProblem p(c, ragged_codec(key.method, key.what, Side::keys, key.dim),
                        ragged_codec(value.method, value.what, Side::values, key.dim));
  std::string label = std::string(key.method) + " " + key.what + " | " + value.method + " " +
                      value.what + " d" + std::to_string(key.dim) + " " +
                      std::to_string(c.n_q_heads) + " heads, " + std::to_string(c.n_queries) +
                      " queries, window " + std::to_string(c.window) + (c.paged ? ", paged" : "") +
                      (fragments ? ", fragments" : "");
  DeviceProblem device(p, dtype, fragments);
  const std::string chosen = cuda::attend_kernel(device.args);
  expect(chosen.rfind(kernel, 0) == 0, label, "runs " + chosen);
  std::vector<float> want, want_lse, first;
  p.oracle(want, want_lse);
  for (int run = 0; run < runs; ++run) {
    device.poison();
    cuda::attend(device.args, nullptr);
    cuda_ok(cudaDeviceSynchronize(), "attend");
    const std::vector<float> got = device.output();
    if (run == 0) {
      first = got;
    } else if (std::memcmp(first.data(), got.data(), got.size() * 4) != 0) {
      expect(false, label, "run " + std::to_string(run) + " differs");
      break;
    }
  }
  const double error = test::worst_row(first, want, p.dim);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (dtype == DType::float32) worst_of_all = std::max(worst_of_all, error);
  }
  const double rounding = dtype == DType::bfloat16 ? 0x1p-8 : dtype == DType::float16 ? 0x1p-11 : 0;
  expect(error <= 2e-3 + rounding, label, "relative error " + std::to_string(error));
  const std::vector<float> lse = device.lse->host<float>();
  double worst_lse = 0;
  for (size_t i = 0; i < want_lse.size(); ++i) {
    if (std::isinf(want_lse[i])) {
      expect(lse[i] == want_lse[i], label, "lse of an empty row is " + std::to_string(lse[i]));
      continue;
    }
    const double off = std::fabs(lse[i] - want_lse[i]) / (1 + std::fabs(want_lse[i]));
    worst_lse = std::isfinite(off) ? std::max(worst_lse, off) : 1e9;
  }
  expect(worst_lse <= 2e-3, label, "lse is off by " + std::to_string(worst_lse));
  expect(device.guards_intact(), label, "wrote outside its buffers");
}

void check_codes(const Form& form, bool paged, DType dtype, int n_tokens) {
  jobs.emplace_back([=] { codes_case(form, paged, dtype, n_tokens); });
}
void check_attention(const RaggedCase& c, const Form& key, const Form& value, DType dtype,
                     int runs = 2, bool fragments = false, const char* kernel = "general") {
  jobs.emplace_back([=] { attention_case(c, key, value, dtype, runs, fragments, kernel); });
}

void check_all_attention() {
  RaggedCase c;
  c.n_packed = {0, 1, 63, 64, 65, 8191, 0, 500};
  c.n_exact = {70, 4, 10, 68, 1, 90, 0, 300};
  const Form value = {"turboquant", "4", Side::values, 128};
  const auto with = [](Form form, int dim) {
    form.dim = dim;
    return form;
  };
  // Every codec, on its side.
  const int dims[] = {64, 80, 96, 128, 256};
  int turn = 0;
  for (const Form& form : kForms) {
    const std::string what = form.what;
    if (what.find("prod") != what.npos || std::string(form.method) == "qjl") continue;
    const int dim = dims[turn % 5];
    c.paged = turn % 2 == 0;
    c.n_packed[5] = turn % 3 == 0 ? 8191 : 1023;
    c.n_q_heads = 2 << (turn % 4);
    c.n_queries = turn % 3 == 0 ? 1 : turn % 3 == 1 ? 5 : 40;
    c.window = turn % 4 == 3 ? 100 : 0;
    c.bf16 = turn % 2 == 1;
    c.sink_logits = turn % 5 == 0;
    ++turn;
    if (form.side == Side::keys) {
      check_attention(c, with(form, dim), with(value, dim), DType::float32);
    } else {
      check_attention(c, with(value, dim), with(form, dim), DType::float16);
    }
  }
  for (const char* blocks : {"1", "2", "3"}) {
    check_attention(c, {"qjl", blocks, Side::keys, 64}, value, DType::bfloat16);
  }
  // Options of one codec.
  const Form tq = {"turboquant", "2", Side::keys, 128};
  c = RaggedCase();
  c.n_packed = {700, 0, 64, 3};
  c.n_exact = {90, 7, 1, 700};
  for (int queries : {1, 5, 16, 200}) {
    c.n_queries = queries;
    for (bool mask : {false, true}) {
      for (int window : {0, 50, 300}) {
        c.mask = mask, c.window = window, c.softcap = mask ? 15.0f : 0.0f;
        c.sink_logits = window == 50;
        check_attention(c, tq, tq, DType::bfloat16);
      }
    }
  }
  c = RaggedCase();
  c.n_queries = 4, c.causal = false;
  check_attention(c, tq, tq, DType::float32);
  c.n_q_heads = 32;  // 16 a KV head
  check_attention(c, tq, tq, DType::float32);
  c.n_packed = {0, 0}, c.n_exact = {9, 600};
  check_attention(c, tq, tq, DType::float32);
  c.n_packed = {100, 130}, c.n_exact = {0, 0}, c.n_queries = 1;
  check_attention(c, tq, tq, DType::float32, 1000);
  c.n_packed = {3000, 130}, c.n_exact = {600, 90}, c.n_queries = 77;  // 1232 rows
  check_attention(c, tq, tq, DType::float16, 300);
}

// The same codes by the tensor-core kernels where they cover the call, by the general ones where
// not.
void check_fragments() {
  RaggedCase c;
  c.n_packed = {0, 1, 65, 3000};
  c.n_exact = {70, 4, 1, 90};
  const Form keys = {"vecinfer", "4x256 hadamard head int8", Side::keys, 128};
  const Form values = {"vecinfer", "2x256 dense", Side::values, 128};
  check_attention(c, keys, {"vecinfer", "4x256 dense head int8", Side::values, 128}, DType::float16,
                  2, true, "fast");
  check_attention(c, keys, values, DType::float16, 2, true, "general: tables by lane");
  c.n_queries = 5;
  check_attention(c, keys, values, DType::float16, 2, true, "general: more than one query");
  c.window = 70, c.paged = true;
  check_attention(c, {"vecinfer", "4x256 none int8", Side::keys, 80}, values, DType::bfloat16, 2,
                  true);
  c.n_queries = 1;
  check_attention(c, {"vecinfer", "2x256 dense head", Side::keys, 256}, values, DType::float32, 2,
                  true, "general: a sliding window");
}

}  // namespace

// general_append.cpp: n_tokens appended one by one on the device and on the CPU.
std::string general_append(const test::CasePtr& keys, const test::CasePtr& values, int batch,
                           int n_tokens, int sinks, int window, bool paged, bool captured);
// What is refused while a stream is captured; a graph's replays.
std::string general_graph();

namespace {

void check_append(bool small) {
  struct One {
    Form keys, values;
    int sinks, window, tokens;
  };
  const One all[] = {
      {{"turboquant", "2", Side::keys, 64}, {"turboquant", "3", Side::values, 64}, 4, 64, 300},
      {{"rabitq", "2 mean", Side::keys, 96},
       {"turboquant_rvq", "1", Side::values, 96},
       0,
       100,
       400},
      {{"vecinfer", "2x16 dense", Side::keys, 80},
       {"vecinfer", "8x256 hadamard", Side::values, 80},
       70,
       0,
       330}};
  int turn = 0;
  for (const One& one : all) {
    ++cases;
    const std::string why = general_append(
        ragged_codec(one.keys.method, one.keys.what, Side::keys, one.keys.dim),
        ragged_codec(one.values.method, one.values.what, Side::values, one.keys.dim), 3,
        small ? 140 : one.tokens, one.sinks, one.window, turn % 2 == 0, turn == 1 && !small);
    expect(why.empty(), std::string("append ") + one.keys.method, why);
    ++turn;
    if (small) break;
  }
}

void check_quick() {
  for (const Form& form : {kForms[0], kForms[4], kForms[8], kForms[11], kForms[17]}) {
    check_codes(form, form.dim == 80, DType::bfloat16, 70);
  }
  RaggedCase c;
  c.n_packed = {0, 65, 130};
  c.n_exact = {5, 70, 0};
  c.n_queries = 3, c.window = 60, c.paged = true, c.mask = true;
  check_attention(c, kForms[4], {"turboquant", "2", Side::values, 128}, DType::float16);
  check_attention(c, {"qjl", "2", Side::keys, 64}, {"rabitq", "3 mean", Side::values, 64},
                  DType::float32);
  c.paged = c.mask = false;
  c.n_queries = 50;
  check_attention(c, {"turboquant_rvq", "3", Side::keys, 80}, kForms[0], DType::float32);
  c.n_queries = 3;
  check_attention(c, {"vecinfer", "4x256 hadamard head int8", Side::keys, 64},
                  {"vecinfer", "2x256 dense", Side::values, 64}, DType::float16, 1, true);
  run_jobs(1);
  check_append(true);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const auto start = std::chrono::steady_clock::now();
    std::setvbuf(stdout, nullptr, _IOLBF, 0);  // a run that is cut short has said what it did
    std::vector<std::string> words(argv + 1, argv + argc);
    if (words.empty()) words = {"codes", "attention", "append", "graph"};
    const auto wanted = [&](const char* word) {
      return std::find(words.begin(), words.end(), word) != words.end();
    };
    std::printf("%s\n", cuda::device_name().c_str());
    const auto seconds = [&] {
      return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    };
    if (wanted("quick")) check_quick();
    if (wanted("codes")) {
      int turn = 0;
      for (const Form& form : kForms) {
        const DType dtypes[] = {DType::float32, DType::float16, DType::bfloat16};
        check_codes(form, turn % 2 == 0, dtypes[turn % 3], 64 * 3 + (turn % 2) * 17);
        check_codes(form, turn % 2 == 1, dtypes[(turn + 1) % 3], 128);
        ++turn;
      }
      run_jobs(kThreads);
      std::printf("codes: %d cases, %d failures, %.1f s\n", cases, failures, seconds());
    }
    if (wanted("attention")) {
      check_all_attention();
      check_fragments();
      run_jobs(kThreads);
      std::printf("attention: %d cases, %d failures, %.1f s\n", cases, failures, seconds());
    }
    if (wanted("append")) check_append(false);
    if (wanted("graph")) {
      ++cases;
      const std::string why = general_graph();
      expect(why.empty(), "graph", why);
    }
    std::printf("general_check: %d cases, worst relative error in fp32 %.2e, %d failures, %.1f s\n",
                cases, worst_of_all, failures, seconds());
    return failures == 0 ? 0 : 1;
  } catch (const std::exception& error) {
    std::printf("general_check: %s\n", error.what());
    return 2;
  }
}
