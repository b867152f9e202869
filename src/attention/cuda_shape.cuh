// What a kernel is made for, an item of its work, and its shared memory.
#pragma once

#include "src/attention/cuda_parts.cuh"

namespace veloxquant::attention::cuda {

// A part of a pair: steps of packed tokens, and a share of the exact ones.
struct Item {
  Pair pair;
  int index, part, n_parts;  // index: of the pair's first part among all items
  int first_step, end_step, n_tokens;
  int n_exact, first_chunk, n_chunks;
  int padding[2];
};
static_assert(sizeof(Item) % 16 == 0);

// KC, VC: chunks of 8 sub-vectors of keys and values. kDim: head_dim, or what it is padded to.
template <Kind kKeyKind, Kind kValueKind, int kHeads, bool kIsByLane, int kDim>
struct Shape {
  static constexpr Kind kKey = kKeyKind, kValue = kValueKind;
  static constexpr int HEADS = kHeads, DIM = kDim;
  static constexpr bool kByLane = kIsByLane;
  static constexpr int kKeySub = kKey == kHalf2 ? 2 : 4, kValueSub = kValue == kHalf2 ? 2 : 4;
  static constexpr int KC = kDim / (8 * kKeySub), VC = kDim / (8 * kValueSub);
  static constexpr int kValueTable = kByLane ? 128 : 8192 * KC;  // where the values' tables begin
  static constexpr int kTableBytes = kByLane ? 65536 : 8192 * (KC + VC);
  // As many warps as their registers allow without spilling in the loop: local memory would go
  // through the sliver of first-level cache that the tables leave.
  static constexpr int WARPS = kDim == 256 ? 8 : 12, THREADS = 32 * WARPS;
  // The last warp makes the plan while the others transform the queries.
  static constexpr int kQueryWarps = WARPS - 1;
  // Warps that may have exact tokens: shared memory has no room for more results.
  static constexpr int kExactWarps = kHeads == 4 && kDim <= 128 ? 8 : 4;
  static constexpr int kResults = WARPS + kExactWarps;

  // Steps of codes that a warp has under way, where registers allow.
  static constexpr int DEPTH = HEADS == 4 && KC <= 4 && VC <= 4 ? 2 : 1;

  // Shares of the parts of a pair that as many threads put together; a further one is the exact
  // tokens'.
  static constexpr int kFit = THREADS / (kHeads * kDim / 4), kGroups = kFit < 2 ? 1 : kFit - 1;

  // Operand rows of the queries, padded so that a warp's loads meet in few banks.
  static constexpr int kRowBytes = 32 * KC + 16;

  __device__ __forceinline__ static int head_dim(const DecodeParams& p) {
    return kDim == 96 ? p.head_dim : kDim;
  }
};

// Shared memory: tables; what is not in use while they are (over them where there is no room
// beside them); and what is always there.
template <class S>
struct Shared {
  static constexpr int kPlanInts = kMaxBatch + 4;  // one more than sequences, and whole 16 bytes
  static constexpr int kWeights = 20;              // results of a head
  static_assert(S::kResults <= kWeights);
  // Offsets in floats of what is always there.
  static constexpr int kTokens = 0, kExact = kTokens + kPlanInts, kItems = kExact + kPlanInts;
  static constexpr int kTop = kItems + kPlanInts, kSum = kTop + S::HEADS * kWeights;
  static constexpr int kQueries = kSum + S::HEADS * kWeights, kQueryStride = S::DIM + 8;
  static constexpr int kOutput = kQueries;  // the queries are not needed any more then
  static constexpr int kMergedTops = kQueries + S::HEADS * kQueryStride;
  static constexpr int kScales = kMergedTops + 2 * S::HEADS * (S::kGroups + 1);
  static constexpr int kOperand = kScales + 8 * (S::KC + S::VC);
  static constexpr int kUnits = kOperand + 2 * S::HEADS * S::kRowBytes / 4, kLast = kUnits + 8;
  static constexpr int kItem = kLast + 4, kFloats = kItem + sizeof(Item) / 4;
  static constexpr int kFixedBytes = 4 * kFloats;

  __host__ __device__ static constexpr int rows_bytes(int head_dim) {
    return 4 * S::HEADS * (S::kResults * head_dim + 3 * S::DIM);
  }

  char* tables;
  float* rows;    // [results][HEADS][D], of warps and then of exact tokens
  float* turned;  // [D][HEADS] the queries, [HEADS][D] what the exact tokens add to the output
  float* merged;  // [2][HEADS][D] an item's record
  float* fixed;
  float* matrix;  // a transform's, where p.matrix_in_shared

  __device__ __forceinline__ Shared(char* base, const DecodeParams& p, int head_dim) {
    const int over = p.merge_over_tables;
    tables = base;
    rows = reinterpret_cast<float*>(base + (over ? 0 : S::kTableBytes));
    turned = rows + S::kResults * S::HEADS * head_dim;
    merged = turned + S::HEADS * S::DIM;
    fixed = reinterpret_cast<float*>(base + (over ? over : S::kTableBytes + rows_bytes(head_dim)));
    matrix = fixed + kFloats;
  }

  __device__ __forceinline__ int* tokens() const { return ints(kTokens); }  // [batch]
  __device__ __forceinline__ int* exact() const { return ints(kExact); }    // [batch]
  __device__ __forceinline__ int* items() const { return ints(kItems); }    // [batch + 1]
  __device__ __forceinline__ float* top() const { return fixed + kTop; }    // [HEADS][kWeights]
  __device__ __forceinline__ float* sum() const { return fixed + kSum; }
  __device__ __forceinline__ float* queries() const { return fixed + kQueries; }
  __device__ __forceinline__ float* output() const { return fixed + kOutput; }  // [D][HEADS]
  // [groups + 1][maximum and sum][HEADS]
  __device__ __forceinline__ float* merged_tops() const { return fixed + kMergedTops; }
  __device__ __forceinline__ float* key_scales() const { return fixed + kScales; }
  __device__ __forceinline__ float* value_scales() const { return fixed + kScales + 8 * S::KC; }
  __device__ __forceinline__ uint8_t* operand() const {
    return reinterpret_cast<uint8_t*>(fixed + kOperand);
  }
  __device__ __forceinline__ float* units() const { return fixed + kUnits; }
  __device__ __forceinline__ int* last() const { return ints(kLast); }
  // Kept here, since registers are short in the loop over the steps.
  __device__ __forceinline__ Item& item() const { return *reinterpret_cast<Item*>(fixed + kItem); }

 private:
  __device__ __forceinline__ int* ints(int at) const { return reinterpret_cast<int*>(fixed + at); }
};

}  // namespace veloxquant::attention::cuda
