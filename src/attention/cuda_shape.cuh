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
  int before_exact;  // parts before the first with exact tokens; known at the end of the item
  int padding;
};
static_assert(sizeof(Item) % 16 == 0);

// KC, VC: chunks of 8 sub-vectors of keys and values. kDim: head_dim, or what it is padded to.
template <Kind kKeyKind, Kind kValueKind, int kHeads, bool kIsByLane, int kDim, bool kIsBf16>
struct Shape {
  static constexpr Kind kKey = kKeyKind, kValue = kValueKind;
  static constexpr int HEADS = kHeads, DIM = kDim;
  static constexpr bool kByLane = kIsByLane, kBf16 = kIsBf16;  // kBf16: exact tokens
  static constexpr int kKeySub = kKey == kHalf2 ? 2 : 4, kValueSub = kValue == kHalf2 ? 2 : 4;
  static constexpr int KC = kDim / (8 * kKeySub), VC = kDim / (8 * kValueSub);
  static constexpr int kValueTable = kByLane ? 128 : 8192 * KC;  // where the values' tables begin
  static constexpr int kTableBytes = kByLane ? 65536 : 8192 * (KC + VC);
  // As many warps as their registers allow without spilling in the loop: local memory would go
  // through the sliver of first-level cache that the tables leave. With int8 entries and 168
  // registers, all there are, the compiler makes more addresses at once than are good for the loop.
  static constexpr int WARPS = kDim == 256 ? 8 : 12, THREADS = 32 * WARPS;
  static constexpr int kRegisters = kDim == 256 ? 255 : kValue == kInt8 ? 160 : 168;
  // The last warp makes the plan while the others transform the queries. compute-sanitizer's
  // racecheck takes what that warp and the others do for races, across any barrier behind a barrier
  // that only some warps meet at: in a build for it the last warp joins the others.
  static constexpr int kPlanWarp = WARPS - 1;
#ifdef VELOXQUANT_RACECHECK
  static constexpr int kQueryWarps = WARPS;
#else
  static constexpr int kQueryWarps = WARPS - 1;
#endif
  // Warps that may have exact tokens of an item, and of one that has the place of two: shared
  // memory has no room for more results.
  static constexpr int kExactWarps = 4, kMostExactWarps = kHeads == 4 && kDim <= 128 ? 8 : 4;
  static constexpr int kResults = WARPS + kExactWarps;

  // Heads that are transformed together: of several items where they have fewer.
  static constexpr int kColumns = 8;

  // Operand rows of the queries, padded so that a warp's loads meet in few banks.
  static constexpr int kRowBytes = 32 * KC + 16;

  __device__ __forceinline__ static int head_dim(const DecodeParams& p) {
    return kDim == 96 ? p.head_dim : kDim;
  }
};

// Rounds of steps that take about as long as a warp's turn with exact tokens.
constexpr int kExactRounds = 2;

// How an item's work is dealt to the warps. The last ones have its exact tokens, a chunk each in
// turn, and so fewer steps: those from `border` on, the others the steps before it.
template <class S>
struct Deal {
  int plain, exact;  // warps
  int border, n_steps;

  // At most 4 << more warps have exact tokens.
  static_assert(S::kExactWarps == 4);
  __device__ __forceinline__ Deal(const Item& item, int more)
      : exact(min(item.n_chunks, 4 << more)), n_steps(item.end_step - item.first_step) {
    plain = S::WARPS - exact;
    const int turns = (item.n_chunks + (4 << more) - 1) >> (2 + more);
    border = n_steps - max(n_steps - plain * kExactRounds * turns, 0) * exact / S::WARPS;
  }
  // The number of a warp's result, if it has steps, and of all results.
  __device__ __forceinline__ int result(int warp) const {
    return warp < plain ? warp : min(plain, border) + warp - plain;
  }
  __device__ __forceinline__ int n_results() const {
    return min(plain, border) + min(exact, n_steps - border);
  }
};

// What is kept of an item of a group: its queries until its exact tokens are done, then its record
// where it is all of its pair.
template <class S>
struct Slot {
  static constexpr int kQueryStride = S::DIM + 8, kOperand = S::HEADS * kQueryStride;
  static constexpr int kQueries = kOperand + 2 * S::HEADS * S::kRowBytes / 4;
  static constexpr int kRecord = 2 * S::HEADS * S::DIM;
  static constexpr int kTops = kQueries > kRecord ? kQueries : kRecord;
  static constexpr int kUnits = kTops + 4 * S::HEADS, kFloats = kUnits + 2 * S::HEADS;

  float* at;

  // [HEADS][kQueryStride]: fp32, then 16 bits, a row of high and one of low terms.
  __device__ __forceinline__ float* queries() const { return at; }
  __device__ __forceinline__ uint8_t* operand() const {
    return reinterpret_cast<uint8_t*>(at + kOperand);
  }
  __device__ __forceinline__ float* record() const { return at; }        // [2][HEADS][D]
  __device__ __forceinline__ float* tops() const { return at + kTops; }  // [2][maximum, sum][HEADS]
  // Of the operand's rows and of the queries in 16 bits.
  __device__ __forceinline__ float* units() const { return at + kUnits; }
};

// What the warps have found of an item: first those of its steps, then those of its exact tokens.
constexpr int kWeights = 20;  // results of a head, at most
template <class S>
struct Results {
  float* rows;  // [results][HEADS][D]
  float* tops;  // [HEADS][kWeights]
  float* sums;
};

// One of them.
template <class S>
struct Result {
  Results<S> all;
  int index;

  __device__ __forceinline__ float* row(int head_dim) const {
    return all.rows + index * S::HEADS * head_dim;
  }
  __device__ __forceinline__ float* tops() const { return all.tops + index; }
  __device__ __forceinline__ float* sums() const { return all.sums + index; }
};

// Items side by side, of one head and with the same tables, whose queries are transformed together.
constexpr int kGroupItems = 4;
struct Group {
  int first, n, end;  // of all items; `end`: of the CTA's
  int number;         // of the CTA's groups before it
  int ends;           // of items, at which warps arrived in those
  int guessed;        // whether its pairs are those that were thought before the plan was known
  int padding[2];
  Item items[kGroupItems];
};

// Shared memory a block may have, by the architecture of the code.
constexpr int shared_limit(int arch) {
  return arch == 800 || arch == 870 ? 166912 : arch == 900 || arch == 1000 ? 232448 : 101376;
}

// Where things lie in kLimit bytes of shared memory, all known to the compiler: tables; the results
// of warps, of two items in turn where there is room, and in their place, before and after,
// whatever transforms need (over the tables where there is no room beside them); what is always
// there; slots for the items of a group; a transform's matrix, where there is room.
template <class S, int kLimit>
struct Layout {
  static constexpr int kPlanInts = kMaxBatch + 4;  // one more than sequences, and whole 16 bytes
  static_assert(S::WARPS + S::kMostExactWarps <= kWeights);
  // Offsets in floats of what is always there.
  static constexpr int kTokens = 0, kExact = kTokens + kPlanInts, kItems = kExact + kPlanInts;
  static constexpr int kTop = kItems + kPlanInts, kTopFloats = 2 * S::HEADS * kWeights;
  static constexpr int kFirstTops = kTop + 2 * kTopFloats;
  static constexpr int kMergedTops = kFirstTops + S::HEADS * S::WARPS;
  static constexpr int kScales = kMergedTops + 4 * S::kColumns;
  static constexpr int kGroup = kScales + 8 * (S::KC + S::VC);
  static constexpr int kArrival = kGroup + 2 * sizeof(Group) / 4;
  static constexpr int kDone = kArrival + 2, kFixed = kDone + 2;
  static_assert(kFixed % 4 == 0 && kGroup % 4 == 0 && Slot<S>::kFloats % 4 == 0);

  // Offsets in bytes.
  static constexpr int kRowFloats = S::HEADS * S::kResults * S::DIM;
  static constexpr int kColumnBytes = 4 * S::kColumns * S::DIM;  // a number for all columns
  static constexpr int area(int buffers) {
    const int rows = 4 * buffers * kRowFloats, transforms = 3 * kColumnBytes;
    return rows > transforms ? rows : transforms;
  }
  static constexpr int kSlotBytes = 4 * Slot<S>::kFloats, kMatrixBytes = 4 * S::DIM * S::DIM;
  static constexpr int kRest = 4 * kFixed + kSlotBytes;
  static constexpr bool kOver = S::kTableBytes + area(1) + kRest > kLimit;
  static constexpr int kRows = kOver ? 0 : S::kTableBytes;
  static constexpr bool kHasMatrix =
      (kOver && area(1) < S::kTableBytes ? S::kTableBytes : kRows + area(1)) + kRest +
          kMatrixBytes <=
      kLimit;
  static constexpr int kBuffers =
      !kOver && kRows + area(2) + kRest + (kHasMatrix ? kMatrixBytes : 0) <= kLimit ? 2 : 1;
  static constexpr int kAlways =
      kOver && area(1) < S::kTableBytes ? S::kTableBytes : kRows + area(kBuffers);
  static constexpr int kSlots = kAlways + 4 * kFixed;
  static constexpr int kFit = (kLimit - kSlots - (kHasMatrix ? kMatrixBytes : 0)) / kSlotBytes;
  static constexpr int kSlotCount = kOver ? 1 : kFit < kGroupItems ? kFit : kGroupItems;
  static constexpr int kMatrix = kSlots + kSlotCount * kSlotBytes;

  static constexpr int bytes(bool dense) {
    return kMatrix + (dense && kHasMatrix ? kMatrixBytes : 0);
  }
};

#ifdef __CUDA_ARCH__
constexpr int kSharedLimit = shared_limit(__CUDA_ARCH__);
#elif defined(VELOXQUANT_MACHINE_ARCH)  // tests/cuda_machine
constexpr int kSharedLimit = shared_limit(VELOXQUANT_MACHINE_ARCH);
#else
constexpr int kSharedLimit = shared_limit(900);  // of no use on the host
#endif

template <class S>
struct Shared : Layout<S, kSharedLimit> {
  using L = Layout<S, kSharedLimit>;
  char* tables;
  float* area;    // results of warps, or what transforms need
  float* turned;  // the queries (place_of, store_terms), then [columns][DIM] the exact tokens' sums
  float* output;  // the packed tokens' sums (place_of, store_terms)
  float* fixed;
  uint4* matrix;

  __device__ __forceinline__ explicit Shared(char* base) {
    tables = base;
    area = reinterpret_cast<float*>(base + L::kRows);
    turned = area + L::kColumnBytes / 4;
    output = turned + L::kColumnBytes / 4;
    fixed = reinterpret_cast<float*>(base + L::kAlways);
    matrix = reinterpret_cast<uint4*>(base + L::kMatrix);
  }

  __device__ __forceinline__ int* tokens() const { return ints(L::kTokens); }  // [batch]
  __device__ __forceinline__ int* exact() const { return ints(L::kExact); }    // [batch]
  __device__ __forceinline__ int* items() const { return ints(L::kItems); }    // [batch + 1]
  // Results of an item, in one of kBuffers places.
  __device__ __forceinline__ Results<S> results(int buffer) const {
    float* top = fixed + L::kTop + buffer * L::kTopFloats;
    return {area + buffer * L::kRowFloats, top, top + S::HEADS * kWeights};
  }
  // [HEADS][WARPS], of the first steps of a group
  __device__ __forceinline__ float* first_tops() const { return fixed + L::kFirstTops; }
  // [kColumns][packed, exact], maximum and sum
  __device__ __forceinline__ float2* merged_tops() const {
    return reinterpret_cast<float2*>(fixed + L::kMergedTops);
  }
  __device__ __forceinline__ float* key_scales() const { return fixed + L::kScales; }
  __device__ __forceinline__ float* value_scales() const { return fixed + L::kScales + 8 * S::KC; }
  // The present group of items and the next one.
  __device__ __forceinline__ Group& group() const {
    return *reinterpret_cast<Group*>(fixed + L::kGroup);
  }
  __device__ __forceinline__ Group& next_group() const {
    return reinterpret_cast<Group*>(fixed + L::kGroup)[1];
  }
  // Of the matrix, an mbarrier.
  __device__ __forceinline__ uint32_t arrival() const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(fixed + L::kArrival));
  }
  // Of the warps at the end of an item, another one.
  __device__ __forceinline__ uint32_t done() const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(fixed + L::kDone));
  }
  __device__ __forceinline__ Slot<S> slot(int i) const {
    return {fixed + L::kFixed + i * Slot<S>::kFloats};
  }

 private:
  __device__ __forceinline__ int* ints(int at) const { return reinterpret_cast<int*>(fixed + at); }
};

}  // namespace veloxquant::attention::cuda
