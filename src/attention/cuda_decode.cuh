// The decode attention kernel. cuda_plan.h says how its work is cut, cuda_fragments.cuh what a step
// is.
#pragma once

#include "src/attention/cuda_exact.cuh"
#include "src/codecs/vecinfer/cuda_layout.h"

namespace veloxquant::attention::cuda {

constexpr int kPrefixInts = kMaxBatch + 4;  // one more than sequences, and whole 16 bytes

// What a kernel is made for. KC, VC: chunks of 8 sub-vectors of keys and values.
template <Kind kKeyKind, Kind kValueKind, int kHeads, bool kIsByLane, int kDim>
struct Shape {
  static constexpr Kind kKey = kKeyKind, kValue = kValueKind;
  static constexpr int HEADS = kHeads, DIM = kDim;
  static constexpr bool kByLane = kIsByLane;
  static constexpr int KC = kDim / (kKey == kHalf2 ? 16 : 32),
                       VC = kDim / (kValue == kHalf2 ? 16 : 32);
  static constexpr int kValueTable = kByLane ? 128 : 8192 * KC;  // where the values' tables begin
  static constexpr int kTableBytes = kByLane ? 65536 : 8192 * (KC + VC);
  // As many warps as their registers allow without spilling in the loop: local memory would go
  // through the sliver of first-level cache that the tables leave.
  static constexpr int WARPS = kDim == 256 ? 8 : 12;
  // The next step's codes set out before this one's are used, where registers allow.
  static constexpr bool kEarly = KC <= 4 && VC <= 4;

  static int merge_bytes(int head_dim) { return 4 * WARPS * HEADS * head_dim; }
  static constexpr int kFixedBytes = 4 * (2 * WARPS * HEADS + 2 * kPrefixInts);
};

// Tables of one head -> shared memory.
template <class S>
__device__ __forceinline__ void load_tables(const uint8_t* keys, const uint8_t* values,
                                            char* shared) {
  if constexpr (S::kByLane) {
    // keys: [256][4], values: [256][8]; thread t of the first 256 writes row t, each 16 bytes (the
    // same entries for lanes 4g .. 4g + 3) at another place of it, so that the threads of a store
    // meet in no bank.
    const int t = threadIdx.x;
    if (t >= 256) return;
    const uint4 k = __ldg(reinterpret_cast<const uint4*>(keys) + t);
    uint4* row = reinterpret_cast<uint4*>(shared) + 16 * t;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int g = (i + t) & 7;
      const uint32_t v = __ldg(reinterpret_cast<const uint32_t*>(values) + 8 * t + g);
      row[g] = k;
      row[8 + g] = make_uint4(v, v, v, v);
    }
  } else {
    uint4* to = reinterpret_cast<uint4*>(shared);
#pragma unroll 8
    for (int e = threadIdx.x; e < 512 * S::KC; e += 32 * S::WARPS)
      to[e] = __ldg(reinterpret_cast<const uint4*>(keys) + e);
#pragma unroll 8
    for (int e = threadIdx.x; e < 512 * S::VC; e += 32 * S::WARPS) {
      to[512 * S::KC + e] = __ldg(reinterpret_cast<const uint4*>(values) + e);
    }
  }
}

// A lane's words of one step.
template <int CHUNKS>
__device__ __forceinline__ void load_words(const uint8_t* step, int lane,
                                           uint32_t (&words)[2 * CHUNKS]) {
  if constexpr (CHUNKS % 2 == 0) {
#pragma unroll
    for (int i = 0; i < CHUNKS / 2; ++i) {
      const uint4 w = __ldcs(reinterpret_cast<const uint4*>(step) + i * 32 + lane);
      words[4 * i] = w.x;
      words[4 * i + 1] = w.y;
      words[4 * i + 2] = w.z;
      words[4 * i + 3] = w.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      const uint2 w = __ldcs(reinterpret_cast<const uint2*>(step) + i * 32 + lane);
      words[2 * i] = w.x;
      words[2 * i + 1] = w.y;
    }
  }
}

// The codes of a pair on their way into registers: warp after warp takes a step.
template <int KC, int VC>
struct Walk {
  const uint8_t* keys;
  const uint8_t* values;
  uint32_t k[2 * KC], v[2 * VC];
  int step, end;

  __device__ __forceinline__ void load_keys(int lane) {
    if (step < end) load_words<KC>(keys + static_cast<int64_t>(step) * (256 * KC), lane, k);
  }
  __device__ __forceinline__ void load_values(int lane) {
    if (step < end) load_words<VC>(values + static_cast<int64_t>(step) * (256 * VC), lane, v);
  }
  __device__ __forceinline__ void begin(const DecodeParams& p, const Pair& pair, int first,
                                        int stop) {
    keys = p.keys.codes + pair.sequence * p.keys.batch_stride + pair.kv_head * p.keys.head_stride;
    values = p.values.codes + pair.sequence * p.values.batch_stride +
             pair.kv_head * p.values.head_stride;
    step = first + (threadIdx.x >> 5);
    end = stop;
    load_keys(threadIdx.x & 31);
    load_values(threadIdx.x & 31);
  }
};

// Of 16 bits of a probability 13 are left, or more, under the largest score.
constexpr float kMarginBits = 2.0f;

// The largest of a head's scores over the lanes that have them.
template <int HEADS>
__device__ __forceinline__ float largest_of_head(const float (&s)[HEADS == 4 ? 4 : 8]) {
  float top = s[0];
#pragma unroll
  for (int j = 1; j < (HEADS == 4 ? 4 : 8); ++j) top = fmaxf(top, s[j]);
  top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
  top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
  if (HEADS == 4) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 16));
  return top;
}

// The last step may end in tokens that are none.
template <int HEADS>
__device__ __forceinline__ void hide_padding(float (&s)[HEADS == 4 ? 4 : 8], int step, int n_tokens,
                                             int lane) {
  if ((step + 1) * vecinfer::kStepTokens <= n_tokens) return;
#pragma unroll
  for (int j = 0; j < (HEADS == 4 ? 4 : 8); ++j) {
    const int in_step = HEADS == 4 ? 16 * (lane >> 4) + j : j + (j < 4 ? 0 : 12);
    if (step * vecinfer::kStepTokens + 4 * (lane & 3) + in_step >= n_tokens) s[j] = -INFINITY;
  }
}

// The steps of a pair that fall to this warp -> its partial result in `space`.
template <class S>
__device__ __forceinline__ void attend_steps(const DecodeParams& p, const Pair& pair,
                                             Walk<S::KC, S::VC>& walk, int n_tokens,
                                             const char* tables,
                                             const MergeSpace<S::HEADS, S::WARPS>& space) {
  constexpr int HEADS = S::HEADS, kScores = HEADS == 4 ? 4 : 8;
  constexpr bool kHalfV = S::kValue != kInt8;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2;
  const Tables<S::kByLane> key_tables(tables, lane, lane & 3);
  const Tables<S::kByLane> value_tables(tables + S::kValueTable, lane, g);
  Query<S::kKey, HEADS, S::KC> query;
  query.load(p.workspace + p.query_at + static_cast<int64_t>(pair.index) * 16 * p.query_row_bytes,
             p.query_row_bytes, lane);
  const float scale = __ldcg(reinterpret_cast<const float*>(p.workspace + p.query_scale_at) +
                             pair.index * 8 + (HEADS == 4 ? g & 3 : g));
  using Sums = Output<S::kValue, HEADS, S::VC>;
  Sums output;
  output.clear();
  // probability = 2^(score + offset), offset = bits - reference. All warps begin with one
  // reference, the largest score of their first steps and a margin, so that few must ever raise it.
  if (walk.step < walk.end) {
    float s[kScores];
    step_scores<S::kKey, HEADS, S::KC>(walk.k, key_tables, query, lane, s);
    hide_padding<HEADS>(s, walk.step, n_tokens, lane);
    const float top = largest_of_head<HEADS>(s);
    if ((lane & 3) == 0 && g < HEADS) space.maximum[warp * HEADS + g] = top * scale;
  } else if ((lane & 3) == 0 && g < HEADS) {
    space.maximum[warp * HEADS + g] = kNothing;
  }
  __syncthreads();
  float reference = kNothing;
#pragma unroll
  for (int w = 0; w < S::WARPS; ++w) {
    reference = fmaxf(reference, space.maximum[w * HEADS + (HEADS == 4 ? g & 3 : g)]);
  }
  __syncthreads();
  if (!kHalfV) reference = ceilf(reference) + kMarginBits;
  float offset = Sums::kProbabilityBits - reference;
  int guard = walk.step + 1024 * S::WARPS;
#pragma unroll 1
  while (walk.step < walk.end) {
    const int step = walk.step;
    walk.step += S::WARPS;
    uint32_t k[2 * S::KC];
#pragma unroll
    for (int i = 0; i < 2 * S::KC; ++i) k[i] = walk.k[i];
    if constexpr (S::kEarly) walk.load_keys(lane);
    float s[kScores];
    step_scores<S::kKey, HEADS, S::KC>(k, key_tables, query, lane, s);
    if constexpr (!S::kEarly) walk.load_keys(lane);
    hide_padding<HEADS>(s, step, n_tokens, lane);
    // Exponents relative to the reference, which is at least about as large as any score so far.
    float exponent[kScores], top;
#pragma unroll
    for (int j = 0; j < kScores; ++j) exponent[j] = fmaf(s[j], scale, offset);
    top = exponent[0];
#pragma unroll
    for (int j = 1; j < kScores; ++j) top = fmaxf(top, exponent[j]);
    bool raise = top > Sums::kProbabilityBits + Sums::kHeadroom;
    if constexpr (!kHalfV) {
      // The integers of a column grow by at most 255 * 127 * 32 a step: look every 1024 steps
      // whether they have passed 2^30, and if so halve them by raising the reference.
      raise |= step >= guard;
    }
    if (__any_sync(0xffffffffu, raise)) {
      top = largest_of_head<HEADS>(s) * scale;
      reference = Sums::kProbabilityBits - offset;
      float risen = reference;
      if (top > reference) risen = kHalfV ? top : ceilf(top) + kMarginBits;
      if constexpr (!kHalfV) {
        if (step >= guard) {
          guard = step + 1024 * S::WARPS;
          if (output.large()) risen = fmaxf(risen, reference + 1.0f);
        }
      }
      output.lower(risen - reference, lane);
      offset = Sums::kProbabilityBits - risen;
#pragma unroll
      for (int j = 0; j < kScores; ++j) exponent[j] = fmaf(s[j], scale, offset);
    }
    float probability[kScores];
#pragma unroll
    for (int j = 0; j < kScores; ++j) probability[j] = exp2_fast(exponent[j]);
    uint32_t b[2][2];
    output.pack(probability, lane, b);
    uint32_t v[2 * S::VC];
#pragma unroll
    for (int i = 0; i < 2 * S::VC; ++i) v[i] = walk.v[i];
    if constexpr (S::kEarly) walk.load_values(lane);
    output.step(v, value_tables, b);
    if constexpr (!S::kEarly) walk.load_values(lane);
  }
  if (p.merge_over_tables) __syncthreads();  // others still look up
  output.write(space.warps + warp * HEADS * p.head_dim, space.sum + warp * HEADS, p.head_dim, lane);
  if ((lane & 3) == 0 && g < HEADS) {
    space.maximum[warp * HEADS + g] = Sums::kProbabilityBits - offset;
  }
}

// Units and items of the sequences of one head: prefix sums in shared memory, and T.
struct Cut {
  int* units;  // [batch + 1]
  int* items;  // [batch + 1]
  int per_head;

  // The first warp, then all after a barrier.
  __device__ __forceinline__ void make(const DecodeParams& p) {
    const int lane = threadIdx.x & 31, heads = p.n_kv_heads * p.n_groups;
    if (threadIdx.x < 32) {
      int longest = 0;
#pragma unroll 1
      for (int b = lane; b < p.batch; b += 32) {
        units[b] = (p.n_packed[b] + 63) / 64 + exact_units(p.n_exact == nullptr ? 0 : p.n_exact[b]);
        longest = max(longest, units[b]);
      }
      longest = __reduce_max_sync(0xffffffffu, longest);
      __syncwarp();
      // A lane tries one T: the longest sequence in 1 .. all items of a wave.
      const int most = max(p.n_ctas / heads, 1), even = max(p.n_ctas / (heads * p.batch), 1);
      const int pieces = lane == 31 ? even : max(divide_up((lane + 1) * most, 31), 1);
      const int t = max(divide_up(longest, pieces), kLeastUnits);
      const float inverse = 1.0f / static_cast<float>(t);
      int count = 0;
#pragma unroll 1
      for (int b = 0; b < p.batch; ++b) count += pieces_of(units[b], inverse);
      const int total = count * heads;
      int cost = divide_up(total, p.n_ctas) * (t + kItemUnits);
      if (total > max_items(p.n_pairs, p.n_ctas)) cost = 0x7fffffff;
      const int best = __reduce_min_sync(0xffffffffu, cost);
      const int chosen = __ffs(__ballot_sync(0xffffffffu, cost == best)) - 1;
      const float chosen_inverse = __shfl_sync(0xffffffffu, inverse, chosen);
      int before = 0;
#pragma unroll 1
      for (int start = 0; start < p.batch; start += 32) {
        const int b = start + lane;
        int sum = b < p.batch ? pieces_of(units[b], chosen_inverse) : 0;
#pragma unroll 1
        for (int step = 1; step < 32; step *= 2) {
          const int other = __shfl_up_sync(0xffffffffu, sum, step);
          if (lane >= step) sum += other;
        }
        if (b < p.batch) items[b + 1] = before + sum;
        before += __shfl_sync(0xffffffffu, sum, 31);
      }
      if (lane == 0) items[0] = 0;
    }
    __syncthreads();
    per_head = items[p.batch];
  }

  // ceil(units / T), up to rounding: any cut is right that all agree on.
  __device__ __forceinline__ static int pieces_of(int units, float inverse) {
    return max(1, static_cast<int>(ceilf(static_cast<float>(units) * inverse - 0.01f)));
  }
  // Sequences are cut into at least so many units where they have them: a step for each warp.
  static constexpr int kLeastUnits = 4;
};

template <class S>
__global__ void __launch_bounds__(32 * S::WARPS, 1)
    decode_kernel(const __grid_constant__ DecodeParams p) {
  constexpr int HEADS = S::HEADS, WARPS = S::WARPS;
  extern __shared__ __align__(1024) char shared[];
  char* const fixed = shared + (p.merge_over_tables ? p.merge_over_tables : S::kTableBytes);
  Cut cut;
  cut.units = reinterpret_cast<int*>(fixed);
  cut.items = cut.units + kPrefixInts;
  MergeSpace<HEADS, WARPS> space;
  space.maximum = reinterpret_cast<float*>(cut.items + kPrefixInts);
  space.sum = space.maximum + WARPS * HEADS;
  space.warps = p.merge_over_tables ? reinterpret_cast<float*>(shared) : space.sum + WARPS * HEADS;

#if __CUDA_ARCH__ >= 900
  // The combination may set out; it waits for the end of this kernel itself.
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  cut.make(p);
  const int n_items = cut.per_head * p.n_kv_heads * p.n_groups;
  int loaded_head = -1, loaded_sequence = -1;
  bool is_first = true;
  // Items side by side: a CTA's are most often of one head, whose tables it loads once.
  const int last_item = divide_into(n_items, blockIdx.x + 1, gridDim.x);
#pragma unroll 1
  for (int item = divide_into(n_items, blockIdx.x, gridDim.x); item < last_item; ++item) {
    const int head_group = item / cut.per_head, at = item - head_group * cut.per_head;
    int b = 0;
#pragma unroll 1
    for (int high = p.batch; high - b > 1;) {
      const int middle = (b + high) / 2;
      if (cut.items[middle] <= at) {
        b = middle;
      } else {
        high = middle;
      }
    }
    const int n_parts = cut.items[b + 1] - cut.items[b], part_index = at - cut.items[b];
    const int units = cut.units[b];
    const int u0 = units * part_index / n_parts, u1 = units * (part_index + 1) / n_parts;
    Pair pair;
    pair.index = head_group * p.batch + b;
    pair.sequence = b;
    pair.kv_head = head_group / p.n_groups;
    const int in_group = head_group % p.n_groups * p.heads_per_group;
    pair.first_head = pair.kv_head * p.group + in_group;
    pair.n_heads = min(p.heads_per_group, p.group - in_group);

    const int n_tokens = p.n_packed[b];
    const int n_blocks = (n_tokens + 63) / 64, n_exact = p.n_exact == nullptr ? 0 : p.n_exact[b];
    const int64_t size = partial_floats(HEADS, p.head_dim);
    float* const exact_partial =
        reinterpret_cast<float*>(p.workspace + p.exact_at) + pair.index * size;
    if (part_index == 0 && n_exact > 0)
      attend_exact<HEADS, S::DIM>(p, pair, n_exact, is_first, space, exact_partial);

    if (part_index == 0 && p.values.matrix != nullptr) {
      // The combination at the end will read the matrix: into the second-level cache with it.
      const char* matrix = reinterpret_cast<const char*>(
          p.values.matrix + static_cast<int64_t>(pair.kv_head) * p.head_dim * p.head_dim);
      for (int at_byte = 128 * threadIdx.x; at_byte < 4 * p.head_dim * p.head_dim;
           at_byte += 128 * 32 * WARPS) {
        asm volatile("prefetch.global.L2 [%0];" ::"l"(matrix + at_byte));
      }
    }
    const int exact = units - n_blocks;
    Walk<S::KC, S::VC> walk;
    walk.begin(p, pair, 2 * max(u0 - exact, 0), min(2 * max(u1 - exact, 0), (n_tokens + 31) / 32));
    const int sequence_k = p.keys.n_sequences == 1 ? 0 : b,
              sequence_v = p.values.n_sequences == 1 ? 0 : b;
    if (pair.kv_head != loaded_head || max(sequence_k, sequence_v) != loaded_sequence ||
        p.merge_over_tables) {
      loaded_head = pair.kv_head;
      loaded_sequence = max(sequence_k, sequence_v);
      load_tables<S>(
          p.keys.entries + (sequence_k * p.n_kv_heads + loaded_head) * p.keys.entries_stride,
          p.values.entries + (sequence_v * p.n_kv_heads + loaded_head) * p.values.entries_stride,
          shared);
      __syncthreads();
    }
    if (is_first) {
      wait_for_queries();
      // Only now is the last call's combination done with the plan.
      if (item == 0) {
        int* plan = reinterpret_cast<int*>(p.workspace + p.plan_at);
        for (int i = threadIdx.x; i <= p.batch; i += 32 * WARPS) plan[i] = cut.items[i];
      }
    }
    is_first = false;
    attend_steps<S>(p, pair, walk, n_tokens, shared, space);
    float* const partials =
        reinterpret_cast<float*>(p.workspace + p.partial_at) + (item - part_index) * size;
    constexpr float kUnit = S::kValue != kInt8 ? 1.0f : 1.5279e-5f;  // 2^-15.998
    merge_warps(space, p.head_dim, kUnit, partials + part_index * size);
  }
}

}  // namespace veloxquant::attention::cuda
