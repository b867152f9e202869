// A decode attention problem with CPU-made codes: on the device for the kernels, on the host for
// the oracle.
#pragma once

#include <cmath>
#include <memory>
#include <random>

#include "src/math/float16.h"
#include "tools/gpu/device_buffer.h"
#include "veloxquant/attention.h"
#include "veloxquant/cuda.h"

struct ProblemShape {
  int n_q_heads = 8, n_kv_heads = 2, head_dim = 128;
  int key_sub_dim = 4, value_sub_dim = 4;
  int tables = 1;  // a head: 1 one, 2 by lane (4 and 8 different ones), 0 one a sub-vector
  bool per_sequence_tables = false;
  veloxquant::TransformKind transform = veloxquant::TransformKind::hadamard;
  std::vector<int> n_packed{130};  // of each sequence
  std::vector<int> n_exact{70};
  bool bf16 = false;
  float logit_std = 2.0f;
  int n_centroids = 256;
  unsigned seed = 1;
};

class Problem {
 public:
  explicit Problem(const ProblemShape& shape);

  int batch() const { return static_cast<int>(shape.n_packed.size()); }
  veloxquant::cuda::DecodeArgs args() const;
  // fp64 over the dequantised tokens; [batch][n_q_heads][D] and [batch][n_q_heads].
  void oracle(std::vector<float>& out, std::vector<float>& lse) const;

  struct SideData {
    veloxquant::Side side;
    int sub_dim, n_subvectors;
    std::vector<uint16_t> tables;  // [S][H][M or 1][C][d]
    std::vector<float> encode, query, lambda;
    std::vector<uint16_t> history, exact;  // [B][H][n][D], 16 bits
    std::vector<uint8_t> blocks;           // portable, [B][H][max blocks][bytes]
    veloxquant::cuda::PreparedSide prepared;
    std::unique_ptr<DeviceBuffer> blob, portable, fragments, exact_device;

    veloxquant::TensorView table_view(int sequence, const ProblemShape& shape) const;
    veloxquant::Transform transform(const ProblemShape& shape) const;
    veloxquant::CodecPtr codec(int sequence, const ProblemShape& shape) const;
  };

  ProblemShape shape;
  int max_blocks = 0, max_exact = 0;
  SideData keys, values;
  std::vector<uint16_t> q;
  std::unique_ptr<DeviceBuffer> q_device, n_packed, n_exact, out, lse, workspace;

 private:
  void make_side(SideData& data, veloxquant::Side side, int sub_dim, std::mt19937& rng);
};

// append_check.cpp: n_tokens appended one by one on the device and on the CPU. Empty, or what
// differs.
std::string append_problem(const ProblemShape& shape, int n_tokens, int sinks, int window);
