// The kernels of the calibration-free codecs on one thread: cycles per vector of 128, measured
// against a loop of dependent additions in the same run, so that the clock need not be known.
//
//   build/bench/scalar_bench [SIMD level]
#include <cstdio>
#include <cstring>
#include <functional>
#include <vector>

#include "benchmarks/cycles.h"
#include "src/codecs/rotation.h"
#include "src/codecs/turboquant/kernels.h"
#include "src/math/random.h"
#include "veloxquant/scalar_quant.h"
#include "veloxquant/words.h"

using namespace veloxquant;

namespace {

struct Row {
  const char* name;
  double n;  // vectors (or bytes) of one run
  const char* unit;
  std::function<void()> run;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) set_simd_level(argv[1]);
  set_num_threads(1);
  constexpr int kDim = 128, kRows = 64;
  SplitMix64 random(1, 0);
  std::vector<float> x(kRows * kDim), tile(x);
  for (float& v : x) v = static_cast<float>(random.uniform() * 4 - 2);
  tile = x;
  const Rotation rotation(kDim, 7);
  std::vector<uint8_t> codes(2 * x.size()), packed(2 * x.size());
  std::vector<uint16_t> scalars(kRows, 0x3c00);
  std::vector<turboquant::RowEncoder> encoders;
  std::vector<Row> rows{
      {"hadamard-128", kRows, "cycles a vector",
       [&] { hadamard_rows(Backend::cpu, kDim, tile.data(), kRows); }},
      {"rotation-128", kRows, "cycles a vector",
       [&] { rotation.forward(Backend::cpu, tile.data(), kRows); }},
  };
  // The published forms: codes of given centroids.
  const std::vector<float> diag(kDim, -1.0f);
  std::vector<std::vector<float>> tables;
  for (int bits : {2, 4}) {
    tables.emplace_back(1 << bits);
    for (int c = 0; c < 1 << bits; ++c) tables.back()[c] = (2 * c + 1 - (1 << bits)) * 0.25f;
  }
  static const char* kNearestNames[] = {"nearest scalar 2", "nearest scalar 4"};
  static const char* kRotatedNames[] = {"hadamard + nearest 2", "hadamard + nearest 4"};
  for (int i = 0; i < 2; ++i) {
    const std::vector<float>* table = &tables[i];
    const int n_centroids = 4 << 2 * i;
    rows.push_back({kNearestNames[i], kRows, "cycles a vector", [&, table, n_centroids] {
                      nearest_scalar(Backend::cpu, DType::float32, x.data(), kRows * kDim,
                                     table->data(), n_centroids, codes.data());
                    }});
    rows.push_back({kRotatedNames[i], kRows, "cycles a vector", [&, table, n_centroids] {
                      nearest_scalar_of_hadamard(Backend::cpu, DType::float32, x.data(), kRows,
                                                 kDim, diag.data(), table->data(), n_centroids,
                                                 codes.data());
                    }});
  }
  const turboquant::Kernels& kernels = turboquant::cpu_kernels();
  for (int stages = 1; stages <= 2; ++stages) {
    for (int bits = 1; bits <= 4; ++bits) {
      turboquant::RowEncoder encoder;
      encoder.dim = kDim;
      encoder.signs = rotation.signs();
      encoder.n_stages = stages;
      encoder.stage[0] = scalar_quantizer(lloyd_max_levels(kDim, bits), bits);
      encoder.stage[1] = scalar_quantizer(lloyd_max_residual_levels(kDim, bits), bits);
      encoders.push_back(encoder);
    }
  }
  static const char* kNames[] = {"encode 1",   "encode 2",   "encode 3",   "encode 4",
                                 "encode 1+1", "encode 2+2", "encode 3+3", "encode 4+4"};
  static const char* kDecodeNames[] = {"decode 1",   "decode 2",   "decode 3",   "decode 4",
                                       "decode 1+1", "decode 2+2", "decode 3+3", "decode 4+4"};
  for (int i = 0; i < 8; ++i) {
    rows.push_back({kNames[i], kRows, "cycles a vector", [&, i] {
                      kernels.encode_rows(encoders[i], x.data(), kRows, codes.data(), kRows * kDim,
                                          scalars.data(), nullptr);
                    }});
  }
  for (int i = 0; i < 8; ++i) {
    rows.push_back({kDecodeNames[i], kRows, "cycles a vector", [&, i] {
                      turboquant::DecodeRowsArgs args{};
                      for (int s = 0; s < encoders[i].n_stages; ++s) {
                        args.plane[s] = packed.data() + s * kRows * kDim;
                        args.quantizer[s] = &encoders[i].stage[s];
                      }
                      args.rows = kRows;
                      args.columns = kDim;
                      args.scalars = scalars.data();
                      args.by_row = true;
                      kernels.decode_rows(args, tile.data(), kDim);
                    }});
  }
  rows.push_back({"transpose codes", kRows, "cycles a vector",
                  [&] { kernels.transpose_codes(codes.data(), kRows, kDim, packed.data()); }});
  rows.push_back({"pack codes 4", kRows, "cycles a vector",
                  [&] { kernels.pack_codes(codes.data(), kRows * kDim, 4, packed.data()); }});
  // Larger than the last-level cache: against a copy of the bytes of the codes.
  const int64_t n = int64_t{16} << 20;
  std::vector<int32_t> wide(n), other(n);
  for (int64_t i = 0; i < n; ++i) wide[i] = static_cast<int32_t>(random.next() & 15);
  std::vector<uint32_t> words(n);
  rows.push_back({"copy of int32 codes", 1e-9 * 4 * n, "GB/s of codes",
                  [&] { std::memcpy(other.data(), wide.data(), 4 * n); }});
  static const char* kPackNames[] = {"pack words 1", "pack words 2", "pack words 3",
                                     "pack words 4"};
  static const char* kUnpackNames[] = {"unpack words 1", "unpack words 2", "unpack words 3",
                                       "unpack words 4"};
  for (int bits = 1; bits <= 4; ++bits) {
    rows.push_back({kPackNames[bits - 1], 1e-9 * 4 * n, "GB/s of codes", [&, bits] {
                      pack_words(Backend::cpu, wide.data(), 1, n, bits, words.data());
                    }});
    rows.push_back({kUnpackNames[bits - 1], 1e-9 * 4 * n, "GB/s of codes", [&, bits] {
                      unpack_words(Backend::cpu, words.data(), 1, words_per_row(n, bits), n, bits,
                                   other.data());
                    }});
  }
  std::printf("%s\n", simd_level().c_str());
  for (const Row& row : rows) {
    const bool cycles = row.n > 1;
    const bench::Spread time = bench::time_of(row.run, cycles ? 200 : 1, cycles);
    const auto figure = [&](double of_a_run) {
      return cycles ? of_a_run / row.n : row.n / of_a_run;
    };
    std::printf("%-22s %8.1f %s   (best %.1f)\n", row.name, figure(time.median), row.unit,
                figure(time.best));
  }
}
