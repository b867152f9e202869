#include "tools/gpu/problem.h"

#include <algorithm>

using namespace veloxquant;

namespace {

DType exact_dtype(const ProblemShape& s) { return s.bf16 ? DType::bfloat16 : DType::float16; }
uint16_t narrow(const ProblemShape& s, float x) { return s.bf16 ? f32_to_bf16(x) : f32_to_f16(x); }
float widen(const ProblemShape& s, uint16_t x) { return s.bf16 ? bf16_to_f32(x) : f16_to_f32(x); }

}  // namespace

TensorView Problem::SideData::table_view(int sequence, const ProblemShape& s) const {
  const int64_t m = s.tables == 1 ? 1 : n_subvectors;
  const int64_t size = s.n_kv_heads * m * s.n_centroids * sub_dim;
  TensorView view(tables.data() + (s.per_sequence_tables ? sequence * size : 0), DType::float16,
                  {s.n_kv_heads, m, s.n_centroids, sub_dim});
  return view;
}

Transform Problem::SideData::transform(const ProblemShape& s) const {
  Transform t;
  t.kind = s.transform;
  const int64_t h = s.n_kv_heads, d = s.head_dim;
  if (t.kind == TransformKind::dense) {
    t.encode_matrix = TensorView(encode.data(), DType::float32, {h, d, d});
    t.query_matrix = TensorView(query.data(), DType::float32, {h, d, d});
  } else if (t.kind == TransformKind::hadamard && side == Side::keys) {
    t.scale = TensorView(lambda.data(), DType::float32, {h, d});
  }
  return t;
}

CodecPtr Problem::SideData::codec(int sequence, const ProblemShape& s) const {
  return make_vecinfer_codec(side, s.n_kv_heads, s.head_dim, n_subvectors, table_view(sequence, s),
                             transform(s));
}

void Problem::make_side(SideData& data, Side side, int sub_dim, std::mt19937& rng) {
  const ProblemShape& s = shape;
  std::normal_distribution<float> normal;
  const int h = s.n_kv_heads, d = s.head_dim, b = batch();
  data.side = side;
  data.sub_dim = sub_dim;
  data.n_subvectors = d / sub_dim;
  // A random rotation made of plane rotations, with a metric: E = W U, F = W^-1 U.
  data.encode.assign(static_cast<size_t>(h) * d * d, 0.0f);
  data.query = data.encode;
  data.lambda.resize(h * d);
  for (float& x : data.lambda) x = std::exp(0.3f * normal(rng));
  for (int head = 0; head < h; ++head) {
    std::vector<double> u(d * d, 0.0);
    for (int i = 0; i < d; ++i) u[i * d + i] = 1.0;
    for (int k = 0; k < 8 * d; ++k) {
      const int i = rng() % d, j = rng() % d;
      if (i == j) continue;
      const double angle = normal(rng), c = std::cos(angle), n = std::sin(angle);
      for (int r = 0; r < d; ++r) {
        const double x = u[r * d + i], y = u[r * d + j];
        u[r * d + i] = c * x - n * y;
        u[r * d + j] = n * x + c * y;
      }
    }
    for (int i = 0; i < d; ++i) {
      const double w = side == Side::keys ? data.lambda[head * d + i] : 1.0;
      for (int j = 0; j < d; ++j) {
        data.encode[(head * d + i) * d + j] = static_cast<float>(u[i * d + j] * w);
        data.query[(head * d + i) * d + j] = static_cast<float>(u[i * d + j] / w);
      }
    }
  }
  // Centroids: Gaussian, a little smaller than the data, of different size in each sub-vector.
  const int sequences = s.per_sequence_tables ? b : 1,
            m_stored = s.tables == 1 ? 1 : data.n_subvectors;
  const int period = s.tables == 2 ? (side == Side::keys ? 4 : 8) : m_stored;
  const size_t table = static_cast<size_t>(s.n_centroids) * sub_dim;
  data.tables.resize(sequences * h * m_stored * table);
  for (int head = 0; head < sequences * h; ++head) {
    for (int m = 0; m < m_stored; ++m) {
      uint16_t* to = data.tables.data() + (head * m_stored + m) * table;
      if (m >= period) {
        std::copy_n(data.tables.data() + (head * m_stored + m % period) * table, table, to);
        continue;
      }
      const float size = 0.8f * std::exp(0.4f * normal(rng));
      for (size_t i = 0; i < table; ++i) to[i] = f32_to_f16(size * normal(rng));
    }
  }
  if (sub_dim == 4) {
    const int64_t rows = data.tables.size() / table;
    cuda::round_tables_to_int8(
        MutableTensorView(data.tables.data(), DType::float16, {rows, s.n_centroids, sub_dim}));
  }
  data.history.resize(static_cast<size_t>(b) * h * max_blocks * 64 * d);
  data.exact.resize(static_cast<size_t>(b) * h * std::max(max_exact, 1) * d);
  for (auto* tokens : {&data.history, &data.exact}) {
    for (uint16_t& x : *tokens) x = narrow(s, normal(rng));
  }
  const int64_t bytes = int64_t{64} * data.n_subvectors;
  data.blocks.assign(static_cast<size_t>(b) * h * max_blocks * bytes, 0);
  parallel_for(static_cast<long>(b) * h * max_blocks, [&](long i) {
    const int block = static_cast<int>(i % max_blocks), head = static_cast<int>(i / max_blocks % h);
    const int sequence = static_cast<int>(i / max_blocks / h);
    if (64 * block >= s.n_packed[sequence]) return;
    std::vector<float> x(64 * d);
    const int n = std::min(64, s.n_packed[sequence] - 64 * block);
    for (int e = 0; e < n * d; ++e) x[e] = widen(s, data.history[i * 64 * d + e]);
    data.codec(sequence, s)
        ->encode_block(default_backend(), {0, head, 64 * block}, x.data(), n,
                       data.blocks.data() + i * bytes);
  });

  TensorView all = data.table_view(0, s);
  if (s.per_sequence_tables) {
    all = TensorView(data.tables.data(), DType::float16, {b, h, m_stored, s.n_centroids, sub_dim});
  }
  data.prepared = cuda::prepare_side(side, h, d, data.n_subvectors, all, data.transform(s));
  data.blob = std::make_unique<DeviceBuffer>(data.prepared.blob);
  data.portable = std::make_unique<DeviceBuffer>(data.blocks);
  data.fragments = std::make_unique<DeviceBuffer>(static_cast<size_t>(b) * h * max_blocks *
                                                  data.prepared.format.block_bytes());
  data.exact_device = std::make_unique<DeviceBuffer>(data.exact);
  cuda::pack_blocks(data.prepared.format, data.portable->get(), int64_t{b} * h, max_blocks,
                    data.fragments->get(), max_blocks * data.prepared.format.block_bytes(),
                    nullptr);
}

Problem::Problem(const ProblemShape& s) : shape(s) {
  std::mt19937 rng(s.seed);
  for (int n : s.n_packed) max_blocks = std::max(max_blocks, (n + 63) / 64);
  max_blocks = std::max(max_blocks, 1);
  for (int n : s.n_exact) max_exact = std::max(max_exact, n);
  make_side(keys, Side::keys, s.key_sub_dim, rng);
  make_side(values, Side::values, s.value_sub_dim, rng);
  std::normal_distribution<float> normal;
  q.resize(static_cast<size_t>(batch()) * s.n_q_heads * s.head_dim);
  for (uint16_t& x : q) x = narrow(s, s.logit_std * normal(rng));
  q_device = std::make_unique<DeviceBuffer>(q);
  n_packed = std::make_unique<DeviceBuffer>(s.n_packed);
  n_exact = std::make_unique<DeviceBuffer>(s.n_exact);
  out = std::make_unique<DeviceBuffer>(q.size() * 4);
  lse = std::make_unique<DeviceBuffer>(static_cast<size_t>(batch()) * s.n_q_heads * 4);
  workspace = std::make_unique<DeviceBuffer>(cuda::decode_workspace_bytes(args()));
}

cuda::DecodeArgs Problem::args() const {
  cuda::DecodeArgs a;
  const int64_t h = shape.n_kv_heads, d = shape.head_dim;
  a.batch = batch();
  a.n_q_heads = shape.n_q_heads;
  a.scale = 1.0f / std::sqrt(static_cast<float>(d));
  const auto packed = [&](const SideData& data) {
    cuda::PackedSide side;
    side.format = data.prepared.format;
    side.tables = data.blob->get();
    side.codes = data.fragments->get();
    side.head_stride = max_blocks * side.format.block_bytes();
    side.batch_stride = h * side.head_stride;
    return side;
  };
  a.keys = packed(keys);
  a.values = packed(values);
  a.n_packed = reinterpret_cast<const int32_t*>(n_packed->get());
  const int64_t n = std::max(max_exact, 1);
  a.exact_keys = {keys.exact_device->get(), h * n * d, n * d, d};
  a.exact_values = {values.exact_device->get(), h * n * d, n * d, d};
  a.exact_dtype = exact_dtype(shape);
  a.n_exact = reinterpret_cast<const int32_t*>(n_exact->get());
  a.q = q_device->get();
  a.q_dtype = exact_dtype(shape);
  a.out = out->get();
  a.out_dtype = DType::float32;
  a.lse = reinterpret_cast<float*>(lse->get());
  if (workspace) {
    a.workspace = workspace->get();
    a.workspace_bytes = static_cast<int64_t>(workspace->bytes());
  }
  return a;
}

void Problem::oracle(std::vector<float>& result, std::vector<float>& log_sums) const {
  const ProblemShape& s = shape;
  const int64_t h = s.n_kv_heads, d = s.head_dim, n = std::max(max_exact, 1);
  result.assign(q.size(), 0.0f);
  log_sums.assign(static_cast<size_t>(batch()) * s.n_q_heads, 0.0f);
  for (int b = 0; b < batch(); ++b) {
    KeyValueSource source;
    source.key_codec = keys.codec(b, s);
    source.value_codec = values.codec(b, s);
    source.exact_dtype = exact_dtype(s);
    const int n_packed_here = s.n_packed[b], n_exact_here = s.n_exact[b];
    if (n_packed_here > 0) {
      PackedRun run;
      run.n_blocks = (n_packed_here + 63) / 64;
      run.last_count = n_packed_here - 64 * (run.n_blocks - 1);
      run.key_head_stride = int64_t{max_blocks} * 64 * keys.n_subvectors;
      run.value_head_stride = int64_t{max_blocks} * 64 * values.n_subvectors;
      run.key_batch_stride = h * run.key_head_stride;
      run.value_batch_stride = h * run.value_head_stride;
      run.keys = keys.blocks.data() + b * run.key_batch_stride;
      run.values = values.blocks.data() + b * run.value_batch_stride;
      source.packed.push_back(run);
    }
    if (n_exact_here > 0) {
      ExactRun run;
      run.start = n_packed_here;
      run.keys = TensorView(keys.exact.data() + b * h * n * d, source.exact_dtype, {1, h, n, d});
      run.values =
          TensorView(values.exact.data() + b * h * n * d, source.exact_dtype, {1, h, n, d});
      run.keys.shape[2] = run.values.shape[2] = n_exact_here;
      source.exact.push_back(run);
    }
    source.length = n_packed_here + n_exact_here;
    source.visibility.tail_start = n_packed_here;
    AttentionParams params;
    params.scale = 1.0f / std::sqrt(static_cast<float>(d));
    const int64_t row = b * s.n_q_heads * d;
    if (source.length == 0) {
      std::fill_n(log_sums.begin() + b * s.n_q_heads, s.n_q_heads, -INFINITY);
      continue;
    }
    attend_oracle(
        TensorView(q.data() + row, source.exact_dtype, {1, s.n_q_heads, 1, d}), source, params,
        MutableTensorView(result.data() + row, DType::float32, {1, s.n_q_heads, 1, d}),
        MutableTensorView(log_sums.data() + b * s.n_q_heads, DType::float32, {1, s.n_q_heads, 1}));
  }
}
