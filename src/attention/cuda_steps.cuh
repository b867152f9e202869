// The steps of a pair that fall to a warp: codes on their way into registers, scores, values.
#pragma once

#include "src/attention/cuda_query.cuh"
#include "src/codecs/vecinfer/cuda_layout.h"

namespace veloxquant::attention::cuda {

// Tables of one head on their way to shared memory. by_lane: keys [256][4], values [256][8]; thread
// t has rows t, t + THREADS, which it fetches ahead of storing them. With them their scales.
template <class S>
struct TableRows {
  static constexpr int kRows = (256 + S::THREADS - 1) / S::THREADS;
  uint4 k[kRows], v[kRows][2];
  float key_scale, value_scale;  // of sub-vector t

  // Of a head, and of a sequence if each has its own.
  __device__ __forceinline__ static int index(const DecodeParams& p, const SideView& side,
                                              int kv_head, int sequence) {
    return (side.n_sequences == 1 ? 0 : sequence) * p.n_kv_heads + kv_head;
  }
  __device__ __forceinline__ static const uint4* entries(const SideView& side, int index) {
    return reinterpret_cast<const uint4*>(side.entries + index * side.entries_stride);
  }

  __device__ __forceinline__ static TableRows fetch(const DecodeParams& p, int kv_head,
                                                    int sequence) {
    TableRows rows;
    const int keys = index(p, p.keys, kv_head, sequence);
    const int values = index(p, p.values, kv_head, sequence);
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      const int t = threadIdx.x + n * S::THREADS;
      if (S::kByLane && t < 256) {
        const uint4* of_values = entries(p.values, values) + 2 * t;
        rows.k[n] = __ldg(entries(p.keys, keys) + t);
        rows.v[n][0] = __ldg(of_values);
        rows.v[n][1] = __ldg(of_values + 1);
      }
    }
    const int t = threadIdx.x;
    if (t < 8 * S::KC) rows.key_scale = __ldg(p.keys.scales + keys * 8 * S::KC + t);
    if (t < 8 * S::VC) rows.value_scale = __ldg(p.values.scales + values * 8 * S::VC + t);
    return rows;
  }

  // Each 16 bytes (the same entries for lanes 4g .. 4g + 3) at another place of the row, so that
  // the threads of a store meet in fewer banks.
  __device__ __forceinline__ static void store_row(int t, uint4 k, const uint4 (&v)[2],
                                                   char* tables) {
    uint4* row = reinterpret_cast<uint4*>(tables) + 16 * t;
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
  }

  __device__ __forceinline__ void store_scales(const Shared<S>& shared) const {
    if (threadIdx.x < 8 * S::KC) shared.key_scales()[threadIdx.x] = key_scale;
    if (threadIdx.x < 8 * S::VC) shared.value_scales()[threadIdx.x] = value_scale;
  }

  __device__ __forceinline__ void store(const DecodeParams& p, int kv_head, int sequence,
                                        const Shared<S>& shared) const {
    if constexpr (S::kByLane) {
#pragma unroll
      for (int n = 0; n < kRows; ++n) {
        const int t = threadIdx.x + n * S::THREADS;
        if (t < 256) store_row(t, k[n], v[n], shared.tables);
      }
    } else {
      uint4* to = reinterpret_cast<uint4*>(shared.tables);
      const uint4* keys = entries(p.keys, index(p, p.keys, kv_head, sequence));
      const uint4* values = entries(p.values, index(p, p.values, kv_head, sequence));
#pragma unroll 8
      for (int e = threadIdx.x; e < 512 * S::KC; e += 32 * S::WARPS) to[e] = __ldg(keys + e);
#pragma unroll 8
      for (int e = threadIdx.x; e < 512 * S::VC; e += 32 * S::WARPS)
        to[512 * S::KC + e] = __ldg(values + e);
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
template <class S>
struct Walk {
  static constexpr int KC = S::KC, VC = S::VC, WARPS = S::WARPS, DEPTH = S::DEPTH;
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
  __device__ __forceinline__ static Walk begin(const DecodeParams& p, const Pair& pair, int first,
                                               int stop) {
    const int lane = threadIdx.x & 31;
    Walk walk;
    walk.keys =
        p.keys.codes + pair.sequence * p.keys.batch_stride + pair.kv_head * p.keys.head_stride;
    walk.values = p.values.codes + pair.sequence * p.values.batch_stride +
                  pair.kv_head * p.values.head_stride;
    walk.step = first + (threadIdx.x >> 5);
    walk.end = stop;
#pragma unroll
    for (int n = 0; n < DEPTH; ++n) {
#pragma unroll
      for (int w = 0; w < 2 * KC; ++w) walk.k[n][w] = 0;
      walk.load_keys(n, walk.step + n * WARPS, lane);
      walk.load_values(n, walk.step + n * WARPS, lane);
    }
    return walk;
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

// The steps of an item that fall to this warp -> its result in `shared`.
//
// A turn multiplies the values of one step and the keys of the next, so that the look-ups of the
// latter fill the time that the exponentials take, and the other way round.
template <class S>
__device__ __forceinline__ void attend_steps(const DecodeParams& p, Walk<S>& walk, int n_tokens,
                                             const Shared<S>& shared) {
  constexpr int HEADS = S::HEADS, kMine = HEADS / 4;  // heads of a lane
  constexpr int kStride = Shared<S>::kWeights;
  constexpr bool kHalfV = S::kValue != kInt8;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, first_head = kMine * (lane & 3);
  const Tables<S::kByLane> key_tables(shared.tables, lane, lane & 3);
  const Tables<S::kByLane> value_tables(shared.tables + S::kValueTable, lane, lane >> 2);
  walk.step = same_in_warp(walk.step);
  walk.end = same_in_warp(walk.end);
  n_tokens = same_in_warp(n_tokens);
  Query<S::kKey, HEADS, S::KC> query;
  query.load(shared.operand(), S::kRowBytes, lane);
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
  for (int e = 0; e < kMine; ++e) scale[e] = shared.units()[first_head + e];
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
      shared.top()[(first_head + e) * kStride + warp] = walk.step < walk.end ? top[e] : kNothing;
  }
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kMine; ++e) {
    float reference = kNothing;
#pragma unroll
    for (int w = 0; w < S::WARPS; ++w)
      reference = fmaxf(reference, shared.top()[(first_head + e) * kStride + w]);
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
  const int D = S::head_dim(p);
  output.write(shared.rows + warp * HEADS * D, shared.sum() + warp, kStride, D, lane);
  if (lane < 4) {
#pragma unroll
    for (int e = 0; e < kMine; ++e)
      shared.top()[(first_head + e) * kStride + warp] = Sums::kProbabilityBits - offset[e];
  }
}

}  // namespace veloxquant::attention::cuda
