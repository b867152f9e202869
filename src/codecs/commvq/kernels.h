// What a backend implements for CommVQ. `reference` is the executable specification, `cpu` the
// Highway kernels; both give the same bits. Tiles hold 64 tokens in planes: z [2][pairs][64], the
// first members of all pairs, then the second ones.
#pragma once

#include "src/codecs/commvq/format.h"
#include "veloxquant/backend.h"

namespace veloxquant::commvq {

// Normalises each token by its rms and encodes it. z is left as the residual. Writes every byte of
// the block.
using EncodeTile = void (*)(const HeadTables& head, float* z, uint8_t* block);

// z: the centres of every token times its rms.
using DecodeTile = void (*)(const HeadTables& head, const uint8_t* block, float* z);

// One stage in fp32, as the encoder and the trainer see it.
struct StageTables {
  int n_pairs = 0;
  int n_entries = 0;
  const float* entries = nullptr;  // [entries][2][pairs]
  const float* norms = nullptr;    // [entries]: sum x^2 + y^2
  const float* cross = nullptr;    // [64][64]: 2 <u_a, w_b>
};

// |z - c_ab|^2 - |z|^2 = of_a[a] + (of_b[b] + cross[a][b]); least[a]: its minimum over b.
// For the trainer, [entries][64 tokens] each.
struct Scores {
  float of_a[kMaxEntries * kBlockTokens];
  float of_b[kMaxEntries * kBlockTokens];
  float least[kMaxEntries * kBlockTokens];
};

// The nearest centre of each of 64 tokens: codes [64]. The lowest a wins ties, then the lowest b.
// `scores` may be null.
using NearestTile = void (*)(const StageTables& stage, const float* z, uint16_t* codes,
                             Scores* scores);

// z -= the centres of the codes.
using SubtractCentres = void (*)(const StageTables& stage, const uint16_t* codes, float* z);

// norms and cross of a stage from its entries.
using Products = void (*)(const float* entries, int n_pairs, int n_entries, float* norms,
                          float* cross);

struct Kernels {
  EncodeTile encode_tile;
  DecodeTile decode_tile;
  NearestTile nearest_tile;
  SubtractCentres subtract_centres;
  Products products;
};

const Kernels& reference_kernels();
const Kernels& cpu_kernels();
inline const Kernels& kernels_of(Backend backend) {
  return backend == Backend::reference ? reference_kernels() : cpu_kernels();
}

}  // namespace veloxquant::commvq
