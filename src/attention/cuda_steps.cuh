// The steps of a pair that fall to a warp: codes on their way into registers, scores, values.
#pragma once

#include "src/attention/cuda_shape.cuh"
#include "src/codecs/vecinfer/cuda_layout.h"

namespace veloxquant::attention::cuda {

// A lane's words of one step.
template <int CHUNKS>
__device__ __forceinline__ void load_words(const uint8_t* step, int lane,
                                           uint32_t (&words)[2 * CHUNKS]) {
  if constexpr (CHUNKS % 2 == 0) {
#pragma unroll
    for (int i = 0; i < CHUNKS / 2; ++i) {
      const uint4 w = ptx::load_once(reinterpret_cast<const uint4*>(step) + i * 32 + lane);
      words[4 * i] = w.x;
      words[4 * i + 1] = w.y;
      words[4 * i + 2] = w.z;
      words[4 * i + 3] = w.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      const uint2 w = ptx::load_once(reinterpret_cast<const uint2*>(step) + i * 32 + lane);
      words[2 * i] = w.x;
      words[2 * i + 1] = w.y;
    }
  }
}

// The codes of a pair on their way into registers: warp after warp takes a step. The next step's
// are sent for as soon as a step's are looked up.
template <class S>
struct Walk {
  static constexpr int KC = S::KC, VC = S::VC;
  const uint8_t* keys;
  const uint8_t* values;
  uint32_t k[2 * KC], v[2 * VC];
  int step, end, stride;

  __device__ __forceinline__ void load_keys(int at, int lane) {
    if (at < end) load_words<KC>(keys + static_cast<int64_t>(at) * (256 * KC), lane, k);
  }
  __device__ __forceinline__ void load_values(int at, int lane) {
    if (at < end) load_words<VC>(values + static_cast<int64_t>(at) * (256 * VC), lane, v);
  }
  __device__ __forceinline__ static Walk none() {
    Walk walk;
    walk.keys = walk.values = nullptr;
    walk.step = walk.end = walk.stride = 0;
#pragma unroll
    for (int w = 0; w < 2 * KC; ++w) walk.k[w] = 0;
#pragma unroll
    for (int w = 0; w < 2 * VC; ++w) walk.v[w] = 0;
    return walk;
  }
  __device__ __forceinline__ static Walk begin(const DecodeParams& p, const Item& item,
                                               const Deal<S>& deal) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const Pair& pair = item.pair;
    Walk walk;
    walk.keys =
        p.keys.codes + pair.sequence * p.keys.batch_stride + pair.kv_head * p.keys.head_stride;
    walk.values = p.values.codes + pair.sequence * p.values.batch_stride +
                  pair.kv_head * p.values.head_stride;
    const bool plain = warp < deal.plain;
    walk.step = item.first_step + (plain ? warp : deal.border + warp - deal.plain);
    walk.end = plain ? item.first_step + deal.border : item.end_step;
    walk.stride = plain ? deal.plain : deal.exact;
#pragma unroll
    for (int w = 0; w < 2 * KC; ++w) walk.k[w] = 0;
    walk.load_keys(walk.step, lane);
    walk.load_values(walk.step, lane);
    return walk;
  }
};

// A warp: the codes of an item's first round of steps, of a long item two, set out for the
// second-level cache, a microsecond before they can be loaded. More, or further ahead, costs what
// it gains; of an item with less than two rounds too.
template <class S>
__device__ __forceinline__ void prefetch_codes(const DecodeParams& p, const Item& item) {
  const int n_steps = item.end_step - item.first_step;
  const int rounds = n_steps >= 16 * S::WARPS ? 2 : n_steps >= 2 * S::WARPS ? 1 : 0;
  const auto side = [&](const SideView& view, int step_bytes) {
    ptx::prefetch_bulk(view.codes + item.pair.sequence * view.batch_stride +
                           item.pair.kv_head * view.head_stride +
                           static_cast<int64_t>(item.first_step) * step_bytes,
                       rounds * S::WARPS * step_bytes);
  };
  side(p.keys, 256 * S::KC);
  side(p.values, 256 * S::VC);
}

// Of 16 bits of a probability so many less, and one for rounding, are left under the largest score.
// With 2 one shape of a thousand is beyond an error of 2e-3.
constexpr float kMarginBits = 1.0f;

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

// Before a warp writes what it has found of an item: what lay there before is read, which all warps
// have said at the ends of `ends` items.
template <class S>
__device__ __forceinline__ void wait_for_place(int ends, const Shared<S>& shared) {
  if constexpr (Shared<S>::kBuffers == 1) {
    __syncthreads();
  } else {
    if (ends > 0) ptx::wait_for_phase(shared.done(), ends);
  }
}

// The steps of an item that fall to this warp -> a result. `place` waits until it may be written
// and says where; it is asked after the steps, so that nothing of it is kept in registers
// meanwhile. `together`: all warps begin with a step, at the same time.
//
// A turn multiplies the values of one step and the keys of the next, so that the look-ups of the
// latter fill the time that the exponentials take, and the other way round.
template <class S, class PlaceOf>
__device__ __forceinline__ void attend_steps(const DecodeParams& p, Walk<S>& walk, int n_tokens,
                                             bool together, const Slot<S>& slot, PlaceOf place,
                                             const Shared<S>& shared) {
  constexpr int HEADS = S::HEADS, kMine = HEADS / 4;  // heads of a lane
  constexpr bool kHalfV = S::kValue != kInt8;
  const int lane = threadIdx.x & 31, first_head = kMine * (lane & 3);
  const Tables<S::kByLane> key_tables(shared.tables, lane, lane & 3);
  const Tables<S::kByLane> value_tables(shared.tables + S::kValueTable, lane, lane >> 2);
  walk.step = same_in_warp(walk.step);
  walk.end = same_in_warp(walk.end);
  const int stride = same_in_warp(walk.stride);
  n_tokens = same_in_warp(n_tokens);
  if (walk.step >= walk.end) {
    place();
    return;
  }
  Query<S::kKey, HEADS, S::KC> query;
  query.load(slot.operand(), S::kRowBytes, lane);
  using Sums = Output<S::kValue, HEADS, S::VC>;
  Sums output;
  output.clear();
  Scores<S::kKey, HEADS> scores;
  float s[HEADS], scale[kMine], top[kMine];
  // probability = 2^(score + offset), offset = bits - reference. The first reference is the largest
  // score of the first step and a margin, so that it must rarely be raised; where the warps begin
  // together, of all their first steps.
  float offset[kMine];
#pragma unroll
  for (int e = 0; e < kMine; ++e) scale[e] = slot.units()[first_head + e];
  scores.make(walk.k, key_tables, query);
  walk.load_keys(walk.step + stride, lane);
  scores.join(s);
  if (walk.step >= n_tokens / vecinfer::kStepTokens)
    hide_padding<HEADS>(s, walk.step, n_tokens, lane);
#pragma unroll
  for (int x = 0; x < HEADS; ++x) s[x] *= scale[x / 4];
  largest_of_heads<HEADS>(s, top);
  if (together) {
    float* const tops = shared.first_tops() + first_head * S::WARPS;
    if (lane < 4) {
#pragma unroll
      for (int e = 0; e < kMine; ++e) tops[e * S::WARPS + (threadIdx.x >> 5)] = top[e];
    }
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kMine; ++e) {
#pragma unroll
      for (int w = 0; w < S::WARPS; ++w) top[e] = fmaxf(top[e], tops[e * S::WARPS + w]);
    }
  }
#pragma unroll
  for (int e = 0; e < kMine; ++e)
    offset[e] = Sums::kProbabilityBits - (kHalfV ? top[e] : ceilf(top[e]) + kMarginBits);
  // Steps from here on need a look: the last ones' padding; and integers of a column, which grow by
  // at most 255 * 127 * 32 a step, may have passed 2^30 after 1024 steps.
  int guard = walk.step + (kHalfV ? 1 << 30 : 1024 * stride);
  const int n_full = n_tokens / vecinfer::kStepTokens;
#pragma unroll 1
  while (walk.step < walk.end) {
    const int step = walk.step;
    walk.step += stride;
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
          guard = step + 1024 * stride;
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
    output.step(walk.v, value_tables, b);
    walk.load_values(step + stride, lane);
    // After the last step these are scores of codes left in the registers, and nobody's.
    scores.make(walk.k, key_tables, query);
    walk.load_keys(walk.step + stride, lane);
  }
  const Result<S> to = place();
  const int D = S::head_dim(p);
  output.write(to.row(D), to.sums(), kWeights, D, lane);
  if (lane < 4) {
#pragma unroll
    for (int e = 0; e < kMine; ++e)
      to.tops()[(first_head + e) * kWeights] = Sums::kProbabilityBits - offset[e];
  }
}

}  // namespace veloxquant::attention::cuda
