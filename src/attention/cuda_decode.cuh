// The decode attention kernel. cuda_plan.h says how its work is cut, cuda_fragments.cuh what a step
// is.
#pragma once

#include "src/attention/cuda_parts.cuh"
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

  // Steps of codes that a warp has under way, where registers allow.
  static constexpr int DEPTH = HEADS == 4 && KC <= 4 && VC <= 4 ? 2 : 1;

  static int merge_bytes(int head_dim) { return 4 * WARPS * HEADS * head_dim; }
  static constexpr int kFixedBytes = 4 * (2 * WARPS * HEADS + 2 * kPrefixInts);
};

// Tables of one head on their way to shared memory. by_lane: keys [256][4], values [256][8]; thread
// t of the first 256 has row t, which it fetches ahead of storing it.
template <class S>
struct TableRow {
  uint4 k, v[2];

  __device__ __forceinline__ void fetch(const uint8_t* keys, const uint8_t* values) {
    if (!S::kByLane || threadIdx.x >= 256) return;
    k = __ldg(reinterpret_cast<const uint4*>(keys) + threadIdx.x);
    v[0] = __ldg(reinterpret_cast<const uint4*>(values) + 2 * threadIdx.x);
    v[1] = __ldg(reinterpret_cast<const uint4*>(values) + 2 * threadIdx.x + 1);
  }

  __device__ __forceinline__ void store(const uint8_t* keys, const uint8_t* values,
                                        char* shared) const {
    if constexpr (S::kByLane) {
      // Each 16 bytes (the same entries for lanes 4g .. 4g + 3) at another place of the row, so
      // that the threads of a store meet in fewer banks.
      const int t = threadIdx.x;
      if (t >= 256) return;
      uint4* row = reinterpret_cast<uint4*>(shared) + 16 * t;
      const uint32_t words[8] = {v[0].x, v[0].y, v[0].z, v[0].w, v[1].x, v[1].y, v[1].z, v[1].w};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int g = (i + t) & 7;
        row[g] = k;
      }
#pragma unroll
      for (int g = 0; g < 8; ++g) {
        // Word (g + t) mod 8, chosen by three bits of t: registers take no index.
        const uint32_t a = t & 1 ? words[(g + 1) & 7] : words[g];
        const uint32_t c = t & 1 ? words[(g + 3) & 7] : words[(g + 2) & 7];
        const uint32_t e = t & 1 ? words[(g + 5) & 7] : words[(g + 4) & 7];
        const uint32_t h = t & 1 ? words[(g + 7) & 7] : words[(g + 6) & 7];
        const uint32_t low = t & 2 ? c : a, high = t & 2 ? h : e;
        const uint32_t word = t & 4 ? high : low;
        row[8 + ((g + t) & 7)] = make_uint4(word, word, word, word);
      }
    } else {
      uint4* to = reinterpret_cast<uint4*>(shared);
#pragma unroll 8
      for (int e = threadIdx.x; e < 512 * S::KC; e += 32 * S::WARPS)
        to[e] = __ldg(reinterpret_cast<const uint4*>(keys) + e);
#pragma unroll 8
      for (int e = threadIdx.x; e < 512 * S::VC; e += 32 * S::WARPS)
        to[512 * S::KC + e] = __ldg(reinterpret_cast<const uint4*>(values) + e);
    }
  }
};

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

// The codes of a pair on their way into registers: warp after warp takes a step. A warp's n-th step
// lies in buffer n % DEPTH, and a buffer is filled again as soon as its codes are looked up.
template <int KC, int VC, int WARPS, int DEPTH>
struct Walk {
  const uint8_t* keys;
  const uint8_t* values;
  uint32_t k[DEPTH][2 * KC], v[DEPTH][2 * VC];
  int step, end;

  __device__ __forceinline__ void load_keys(int buffer, int at, int lane) {
    if (at < end) load_words<KC>(keys + static_cast<int64_t>(at) * (256 * KC), lane, k[buffer]);
  }
  __device__ __forceinline__ void load_values(int buffer, int at, int lane) {
    if (at < end) load_words<VC>(values + static_cast<int64_t>(at) * (256 * VC), lane, v[buffer]);
  }
  __device__ __forceinline__ void begin(const DecodeParams& p, const Pair& pair, int first,
                                        int stop) {
    const int lane = threadIdx.x & 31;
    keys = p.keys.codes + pair.sequence * p.keys.batch_stride + pair.kv_head * p.keys.head_stride;
    values = p.values.codes + pair.sequence * p.values.batch_stride +
             pair.kv_head * p.values.head_stride;
    // By a shuffle, so that the compiler knows it to be the same in the whole warp.
    step = first + __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0);
    end = stop;
#pragma unroll
    for (int n = 0; n < DEPTH; ++n) {
#pragma unroll
      for (int w = 0; w < 2 * KC; ++w) k[n][w] = 0;
      load_keys(n, step + n * WARPS, lane);
      load_values(n, step + n * WARPS, lane);
    }
  }
};

// Of 16 bits of a probability 13 are left, or more, under the largest score.
constexpr float kMarginBits = 2.0f;

// The largest score of each of the lane's heads over the lanes that have its others.
template <int HEADS>
__device__ __forceinline__ void largest_of_heads(const float (&s)[HEADS], float (&top)[HEADS / 4]) {
#pragma unroll
  for (int e = 0; e < HEADS / 4; ++e) {
    top[e] = fmaxf(fmaxf(s[4 * e], s[4 * e + 1]), fmaxf(s[4 * e + 2], s[4 * e + 3]));
#pragma unroll
    for (int step = 4; step <= 16; step *= 2)
      top[e] = fmaxf(top[e], __shfl_xor_sync(0xffffffffu, top[e], step));
  }
}

// The last step may end in tokens that are none.
template <int HEADS>
__device__ __forceinline__ void hide_padding(float (&s)[HEADS], int step, int n_tokens, int lane) {
#pragma unroll
  for (int n = 0; n < HEADS; ++n) {
    const int in_step = vecinfer::key_token(n / 2 % 2, lane >> 2, n % 2);
    if (step * vecinfer::kStepTokens + in_step >= n_tokens) s[n] = -INFINITY;
  }
}

// The steps of a pair that fall to this warp -> its partial result in `space`.
//
// A turn multiplies the values of one step and the keys of the next, so that the look-ups of the
// latter fill the time that the exponentials take, and the other way round.
template <class S>
__device__ __forceinline__ void attend_steps(const DecodeParams& p, const Pair& pair,
                                             Walk<S::KC, S::VC, S::WARPS, S::DEPTH>& walk,
                                             int n_tokens, const char* tables,
                                             const MergeSpace<S::HEADS, S::WARPS>& space) {
  constexpr int HEADS = S::HEADS, kMine = HEADS / 4;  // heads of a lane
  constexpr bool kHalfV = S::kValue != kInt8;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, first_head = kMine * (lane & 3);
  const Tables<S::kByLane> key_tables(tables, lane, lane & 3);
  const Tables<S::kByLane> value_tables(tables + S::kValueTable, lane, lane >> 2);
  Query<S::kKey, HEADS, S::KC> query;
  query.load(p.workspace + p.query_at + static_cast<int64_t>(pair.index) * 16 * p.query_row_bytes,
             p.query_row_bytes, lane);
  using Sums = Output<S::kValue, HEADS, S::VC>;
  Sums output;
  output.clear();
  Scores<S::kKey, HEADS> scores;
  float s[HEADS], scale[kMine], top[kMine];
  // probability = 2^(score + offset), offset = bits - reference. All warps begin with one
  // reference, the largest score of their first steps and a margin, so that few must ever raise it.
  //
  // Also a warp without steps computes here, on whatever its registers hold: so what the loop uses
  // of the loads above has been used on every way to it, and the loop does not wait for them.
  float offset[kMine];
#pragma unroll
  for (int e = 0; e < kMine; ++e) {
    scale[e] = __ldcg(reinterpret_cast<const float*>(p.workspace + p.query_scale_at) +
                      pair.index * 8 + first_head + e);
  }
  scores.make(walk.k[0], key_tables, query);
  walk.load_keys(0, walk.step + S::DEPTH * S::WARPS, lane);
  scores.join(s);
  if (walk.step >= n_tokens / vecinfer::kStepTokens)
    hide_padding<HEADS>(s, walk.step, n_tokens, lane);
#pragma unroll
  for (int x = 0; x < HEADS; ++x) s[x] *= scale[x / 4];
  largest_of_heads<HEADS>(s, top);
  if (lane < 4) {
#pragma unroll
    for (int e = 0; e < kMine; ++e)
      space.maximum[warp * HEADS + first_head + e] = walk.step < walk.end ? top[e] : kNothing;
  }
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kMine; ++e) {
    float reference = kNothing;
#pragma unroll
    for (int w = 0; w < S::WARPS; ++w)
      reference = fmaxf(reference, space.maximum[w * HEADS + first_head + e]);
    if (!kHalfV) reference = ceilf(reference) + kMarginBits;
    offset[e] = Sums::kProbabilityBits - reference;
  }
  __syncthreads();
  // Steps from here on need a look: the last ones' padding; and integers of a column, which grow by
  // at most 255 * 127 * 32 a step, may have passed 2^30 after 1024 steps.
  int guard = walk.step + (kHalfV ? 1 << 30 : 1024 * S::WARPS);
  const int n_full = n_tokens / vecinfer::kStepTokens;
#pragma unroll 1
  while (walk.step < walk.end) {
#pragma unroll
    for (int n = 0; n < S::DEPTH; ++n) {
      if (n > 0 && walk.step >= walk.end) break;
      const int step = walk.step;
      walk.step += S::WARPS;
      scores.join(s);
      // Exponents relative to the reference, which is at least about as large as any score so far.
      float exponent[HEADS];
#pragma unroll
      for (int x = 0; x < HEADS; ++x) exponent[x] = fmaf(s[x], scale[x / 4], offset[x / 4]);
      const auto too_large = [&] {
        float largest = exponent[0];
#pragma unroll
        for (int x = 1; x < HEADS; ++x) largest = fmaxf(largest, exponent[x]);
        return largest > Sums::kProbabilityBits + Sums::kHeadroom;
      };
      if (__any_sync(0xffffffffu, too_large() || step >= min(guard, n_full))) {
        hide_padding<HEADS>(s, step, n_tokens, lane);
        const auto again = [&] {
#pragma unroll
          for (int x = 0; x < HEADS; ++x) exponent[x] = fmaf(s[x], scale[x / 4], offset[x / 4]);
        };
        again();
        bool halve = false;
        if constexpr (!kHalfV) {
          if (step >= guard) {
            guard = step + 1024 * S::WARPS;
            halve = output.large();
          }
        }
        if (__any_sync(0xffffffffu, too_large() || halve)) {
          largest_of_heads<HEADS>(s, top);
          float delta[kMine];
#pragma unroll
          for (int e = 0; e < kMine; ++e) {
            const float reference = Sums::kProbabilityBits - offset[e], score = top[e] * scale[e];
            float risen = reference;
            if (score > reference) risen = kHalfV ? score : ceilf(score) + kMarginBits;
            if (halve) risen = fmaxf(risen, reference + 1.0f);
            delta[e] = risen - reference;
            offset[e] = Sums::kProbabilityBits - risen;
          }
          output.lower(delta);
          again();
        }
      }
      float probability[HEADS];
#pragma unroll
      for (int x = 0; x < HEADS; ++x) probability[x] = exp2_fast(exponent[x]);
      uint32_t b[2][2];
      output.pack(probability, b);
      output.step(walk.v[n], value_tables, b);
      walk.load_values(n, step + S::DEPTH * S::WARPS, lane);
      // After the last step these are scores of codes left in the registers, and nobody's.
      constexpr int kLast = S::DEPTH - 1;
      scores.make(walk.k[kLast - n], key_tables, query);
      walk.load_keys(kLast - n, walk.step + S::DEPTH * S::WARPS, lane);
    }
  }
  if (p.merge_over_tables) __syncthreads();  // others still look up
  output.write(space.warps + warp * HEADS * p.head_dim, space.sum + warp * HEADS, p.head_dim, lane);
  if (lane < 4) {
#pragma unroll
    for (int e = 0; e < kMine; ++e)
      space.maximum[warp * HEADS + first_head + e] = Sums::kProbabilityBits - offset[e];
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
      int longest = 0, shortest = 0x7fffffff;
#pragma unroll 1
      for (int b = lane; b < p.batch; b += 32) {
        units[b] = (p.n_packed[b] + 63) / 64;
        longest = max(longest, units[b]);
        shortest = min(shortest, units[b]);
      }
      longest = __reduce_max_sync(0xffffffffu, longest);
      shortest = __reduce_min_sync(0xffffffffu, shortest);
      __syncwarp();
      // A lane tries one T: the longest sequence in 1 .. all items of a wave.
      const int pieces =
          lane == 31 ? p.even_pieces : max(divide_up((lane + 1) * p.most_pieces, 31), 1);
      const int t = max(divide_up(longest, pieces), kLeastUnits);
      const float inverse = 1.0f / static_cast<float>(t);
      int count = p.batch * pieces_of(longest, inverse);
      if (shortest < longest) {
        count = 0;
#pragma unroll 1
        for (int b = 0; b < p.batch; ++b) count += pieces_of(units[b], inverse);
      }
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
  // The first item's tables are fetched while the plan is made: which head it is of is known.
  TableRow<S> tables;
  const int first_kv_head =
      divide_into(p.n_kv_heads * p.n_groups, blockIdx.x, gridDim.x) / p.n_groups;
  if (p.keys.n_sequences == 1 && p.values.n_sequences == 1) {
    tables.fetch(p.keys.entries + first_kv_head * p.keys.entries_stride,
                 p.values.entries + first_kv_head * p.values.entries_stride);
  }
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
    const Pair pair = pair_of(p, head_group, b);
    const int n_tokens = p.n_packed[b];
    const int64_t size = partial_floats(HEADS, p.head_dim);
    if (part_index == 0 && p.values.matrix != nullptr) {
      // The combination at the end will read the matrix: into the second-level cache with it.
      const char* matrix = reinterpret_cast<const char*>(
          p.values.matrix + static_cast<int64_t>(pair.kv_head) * p.head_dim * p.head_dim);
      for (int at_byte = 128 * threadIdx.x; at_byte < 4 * p.head_dim * p.head_dim;
           at_byte += 128 * 32 * WARPS) {
        asm volatile("prefetch.global.L2 [%0];" ::"l"(matrix + at_byte));
      }
    }
    Walk<S::KC, S::VC, S::WARPS, S::DEPTH> walk;
    walk.begin(p, pair, 2 * u0, min(2 * u1, (n_tokens + 31) / 32));
    const int sequence_k = p.keys.n_sequences == 1 ? 0 : b,
              sequence_v = p.values.n_sequences == 1 ? 0 : b;
    if (pair.kv_head != loaded_head || max(sequence_k, sequence_v) != loaded_sequence ||
        p.merge_over_tables) {
      loaded_head = pair.kv_head;
      loaded_sequence = max(sequence_k, sequence_v);
      const uint8_t* key_entries =
          p.keys.entries + (sequence_k * p.n_kv_heads + loaded_head) * p.keys.entries_stride;
      const uint8_t* value_entries =
          p.values.entries + (sequence_v * p.n_kv_heads + loaded_head) * p.values.entries_stride;
      if (!is_first || p.keys.n_sequences != 1 || p.values.n_sequences != 1)
        tables.fetch(key_entries, value_entries);
      tables.store(key_entries, value_entries, shared);
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
