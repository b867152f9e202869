// A RaggedProblem on the device, for the programs that check and time the general CUDA path.
#pragma once

#include <memory>

#include "src/attention/element.h"
#include "tests/support/ragged_problem.h"
#include "tools/gpu/device_buffer.h"
#include "veloxquant/cuda_general.h"

struct DeviceSide {
  std::unique_ptr<DeviceBuffer> blob, blocks;
  veloxquant::cuda::BlockSide view;

  DeviceSide(const veloxquant::test::RaggedProblem& p,
             const veloxquant::test::RaggedProblem::SideData& side, bool fragments = false) {
    using namespace veloxquant;
    if (fragments) {
      const test::FragmentSide made(p, side);
      set(cuda::prepare_codec(made.prepared.format), made.prepared.blob, made.blocks, made.steps);
    } else {
      const cuda::GpuCodec codec = cuda::prepare_codec(side.codec->spec(), side.codec->tables());
      set(codec, codec.blob(), side.blocks, p.steps(side));
    }
  }

 private:
  void set(const veloxquant::cuda::GpuCodec& codec, const std::vector<uint8_t>& numbers,
           const std::vector<uint8_t>& bytes, const std::array<int64_t, 3>& steps) {
    blob = std::make_unique<DeviceBuffer>(numbers);
    blocks = std::make_unique<DeviceBuffer>(bytes);
    view = {codec, blob->get(), blocks->get(), steps[0], steps[1], steps[2]};
  }
};

struct DeviceTable {
  std::unique_ptr<DeviceBuffer> numbers;
  veloxquant::cuda::BlockTable view;

  explicit DeviceTable(const veloxquant::test::RaggedProblem& p) {
    if (!p.c.paged) return;
    numbers = std::make_unique<DeviceBuffer>(p.table);
    view = {reinterpret_cast<const int32_t*>(numbers->get()), p.max_blocks, p.pool};
  }
};

// Queries and outputs in one type.
struct DeviceProblem {
  const veloxquant::test::RaggedProblem& p;
  veloxquant::DType dtype;
  DeviceSide keys, values;
  DeviceTable table;
  std::unique_ptr<DeviceBuffer> n_packed, n_exact, exact_keys, exact_values, q, mask, sinks, out,
      lse, workspace;
  veloxquant::cuda::AttendArgs args;

  DeviceProblem(const veloxquant::test::RaggedProblem& problem, veloxquant::DType type,
                bool fragments = false)
      : p(problem),
        dtype(type),
        keys(p, p.keys, fragments),
        values(p, p.values, fragments),
        table(p) {
    using namespace veloxquant;
    const auto& c = p.c;
    const auto buffer = [](auto& to, const auto& data) {
      to = std::make_unique<DeviceBuffer>(data);
      return to->get();
    };
    args.batch = p.batch;
    args.n_q_heads = c.n_q_heads;
    args.n_queries = c.n_queries;
    args.scale = p.scale;
    args.causal = c.causal;
    args.sliding_window = c.window;
    args.logit_softcap = c.softcap;
    args.keys = keys.view;
    args.values = values.view;
    args.table = table.view;
    args.n_packed = reinterpret_cast<const int32_t*>(buffer(n_packed, c.n_packed));
    args.max_packed = 64 * p.max_blocks;
    args.n_exact = reinterpret_cast<const int32_t*>(buffer(n_exact, c.n_exact));
    args.max_exact = p.max_exact;
    args.sinks = c.sinks;
    const int64_t d = p.dim, head = p.max_exact * d;
    args.exact_keys = {buffer(exact_keys, p.keys.exact), p.heads * head, head, d};
    args.exact_values = {buffer(exact_values, p.values.exact), p.heads * head, head, d};
    args.exact_dtype = c.bf16 ? DType::bfloat16 : DType::float16;
    std::vector<uint8_t> queries(p.q.size() * dtype_bytes(dtype));
    for (size_t i = 0; i < p.q.size(); ++i) {
      attention::store_element(queries.data(), dtype, static_cast<int64_t>(i), p.q[i]);
    }
    args.q = buffer(q, queries);
    args.q_dtype = args.out_dtype = dtype;
    if (c.mask) {
      args.mask = reinterpret_cast<const float*>(buffer(mask, p.mask));
      const int64_t strides[4] = {int64_t{c.n_queries} * p.max_length, 0, p.max_length, 1};
      std::copy(strides, strides + 4, args.mask_strides);
    }
    if (c.sink_logits)
      args.sink_logits = reinterpret_cast<const float*>(buffer(sinks, p.sink_logits));
    out = std::make_unique<DeviceBuffer>(queries.size());
    lse = std::make_unique<DeviceBuffer>(p.q.size() / d * 4);
    args.out = out->get();
    args.lse = reinterpret_cast<float*>(lse->get());
    args.workspace_bytes = cuda::attend_workspace_bytes(args);
    workspace = std::make_unique<DeviceBuffer>(args.workspace_bytes);
    args.workspace = workspace->get();
  }

  void poison() {
    for (const auto& buffer : {&out, &lse, &workspace}) (*buffer)->fill(0xff);
  }
  std::vector<float> output() const {
    const std::vector<uint8_t> bytes = out->host<uint8_t>();
    std::vector<float> numbers(p.q.size());
    for (size_t i = 0; i < numbers.size(); ++i) {
      numbers[i] =
          veloxquant::attention::load_element(bytes.data(), dtype, static_cast<int64_t>(i));
    }
    return numbers;
  }
  bool guards_intact() const {
    return out->guards_intact() && lse->guards_intact() && workspace->guards_intact() &&
           keys.blocks->guards_intact() && values.blocks->guards_intact();
  }
};
