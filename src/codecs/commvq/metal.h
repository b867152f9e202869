// CommVQ on Metal, between planes of pairs (src/codecs/rope/metal.h) and packed blocks, and the
// published look-up: the arithmetic of reference.cpp and plain.cpp, in their order.
#pragma once

#include "src/codecs/metal_rows.h"
#include "src/math/square_root.h"

namespace veloxquant {

// rms.h: what a token is divided by, rounded to fp16, at most its largest number.
VQ_FN float commvq_rms(float sum_of_squares, int dims, VQ_THREAD float* inverse) {
  const float rms = square_root(sum_of_squares / (float)dims);
  const float rounded = f16_to_f32((ushort)f32_to_f16(rms < 65504.0f ? rms : 65504.0f));
  const bool none = rounded == 0.0f || !is_finite_bits(bits_of(sum_of_squares));
  *inverse = none ? 0.0f : 1.0f / rounded;
  return rounded;
}

// The nearest centre of a token: a * 64 + b. All lanes of its simdgroup, which get the same.
// z: [2 P] of the token; of_b: [64], this simdgroup's.
template <int P, int N, class Z, class Entries, class Norms, class Scores>
VQ_FN uint32_t nearest_factors(Z z, Entries entries, Norms norms, Norms cross, Scores of_b,
                               uint lane) {
  float of_a[2];
  for (int k = 0; k < 2; ++k) {
    const int l = (int)lane + 32 * k;
    of_a[k] = 0.0f;
    if (l >= N) continue;
    Entries x = entries + l * 2 * P, y = x + P;
    float u = 0.0f, w = 0.0f;
    for (int j = 0; j < P; ++j) {
      const float first = z[j], second = z[P + j], xj = (float)x[j], yj = (float)y[j];
      u = u + (mul(first, xj) + mul(second, yj));
      w = w + (mul(second, xj) - mul(first, yj));
    }
    of_a[k] = norms[l] - mul(2.0f, u);
    of_b[l] = norms[l] - mul(2.0f, w);
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  float best = float_of(0x7f800000u);
  uint32_t code = 0u, best_a = 0u;
  for (int k = 0; k < 2; ++k) {
    const int a = (int)lane + 32 * k;
    if (a >= N) continue;
    float least = float_of(0x7f800000u);
    uint32_t at = 0u;
    for (int b = 0; b < N; ++b) {
      const float score = of_b[b] + cross[a * 64 + b];
      if (score < least) {
        least = score;
        at = (uint32_t)b;
      }
    }
    const float score = of_a[k] + least;
    if (score < best) {
      best = score;
      best_a = (uint32_t)a;
      code = (uint32_t)a * 64u + at;
    }
  }
  for (ushort width = 16; width > 0; width /= 2) {
    const float other = simd_shuffle_xor(best, width);
    const uint32_t other_a = simd_shuffle_xor(best_a, width);
    const uint32_t other_code = simd_shuffle_xor(code, width);
    if (other < best || (other == best && other_a < best_a)) {
      best = other;
      best_a = other_a;
      code = other_code;
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  return code;
}

VQ_FN int commvq_block_bytes(int stages) { return 96 * stages + 128; }

// z [n_tokens][2 P] of one plane -> blocks; absent tokens are zeros. A threadgroup of 8 simdgroups
// takes eight tokens, one each. codebook [heads][stages][N][2][P]; norms [heads][stages][64]; cross
// [heads][stages][64][64]. group: (eighth, block, plane). codes: [8].
template <int P, int N, class Z, class Codebook, class Norms, class Bytes, class Rows, class Scores,
          class Codes>
VQ_FN void commvq_encode_blocks(Z z, int n_tokens, int n_heads, int n_blocks, Codebook codebook,
                                int n_stages, Norms norms, Norms cross, Bytes blocks, Rows rows,
                                Scores scores, Codes codes, uint3 group, uint self,
                                uint n_threads) {
  const int eighth = (int)group.x, first = 64 * (int)group.y + 8 * eighth;
  const int64_t plane = group.z, head = plane % n_heads;
  const uint lane = self % 32, r = self / 32;
  load_tile<2 * P, 8>(z + plane * n_tokens * 2 * P, first, n_tokens, rows, self, n_threads);
  barrier_of_group();
  Rows row = rows + (int)r * 2 * P;
  float sum = 0.0f, inverse;
  for (int j = 0; j < P; ++j) sum = sum + (mul(row[j], row[j]) + mul(row[P + j], row[P + j]));
  const float rms = commvq_rms(sum, 2 * P, &inverse);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = (int)lane; i < 2 * P; i += 32) row[i] = mul(row[i], inverse);
  Bytes block = blocks + (plane * n_blocks + group.y) * commvq_block_bytes(n_stages);
  if (lane == 0) {
    const uint32_t half_bits = f32_to_f16(rms);
    Bytes to = block + 96 * n_stages + 2 * (8 * eighth + (int)r);
    to[0] = (uint8_t)half_bits;
    to[1] = (uint8_t)(half_bits >> 8);
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int s = 0; s < n_stages; ++s) {
    const int64_t stage = head * n_stages + s;
    Codebook entries = codebook + stage * N * 2 * P;
    const uint32_t code = nearest_factors<P, N>(
        row, entries, norms + stage * 64, cross + stage * 64 * 64, scores + (int)r * 64, lane);
    Codebook a = entries + (int)(code / 64u) * 2 * P, b = entries + (int)(code % 64u) * 2 * P;
    for (int j = (int)lane; j < P; j += 32) {
      row[j] = row[j] - ((float)a[j] - (float)b[P + j]);
      row[P + j] = row[P + j] - ((float)a[P + j] + (float)b[j]);
    }
    if (lane == 0) codes[r] = (ushort)code;
    barrier_of_group();
    if (self < 4) {  // two codes in three bytes
      const uint32_t low = codes[2 * self], high = codes[2 * self + 1];
      Bytes to = block + 96 * s + 12 * eighth + 3 * (int)self;
      to[0] = (uint8_t)low;
      to[1] = (uint8_t)((low >> 8) | ((high & 15u) << 4));
      to[2] = (uint8_t)(high >> 4);
    }
    barrier_of_group();
  }
}

// blocks (as 32-bit words) -> z [n_blocks * 64][2 P]. thread: (pair and token of a block, block,
// plane).
template <int P, int N, class Words, class Codebook, class Z>
VQ_FN void commvq_decode_blocks(Words blocks, int n_blocks, int n_heads, Codebook codebook,
                                int n_stages, Z z, uint3 at) {
  const int t = (int)at.x / P, j = (int)at.x % P;
  const int64_t block = at.z * (int64_t)n_blocks + at.y, head = at.z % n_heads;
  Words words = blocks + block * (commvq_block_bytes(n_stages) / 4);
  float x = 0.0f, y = 0.0f;
  for (int s = 0; s < n_stages; ++s) {
    const uint32_t code = bits_at(words + 24 * s, 12 * t, 12);
    Codebook entries = codebook + (head * n_stages + s) * N * 2 * P;
    Codebook a = entries + (int)min(code / 64u, (uint32_t)(N - 1)) * 2 * P;
    Codebook b = entries + (int)min(code % 64u, (uint32_t)(N - 1)) * 2 * P;
    x = x + ((float)a[j] - (float)b[P + j]);
    y = y + ((float)a[P + j] + (float)b[j]);
  }
  const float scale = half_at(words + 24 * n_stages, t);
  z[(block * 64 + t) * 2 * P + j] = mul(x, scale);
  z[(block * 64 + t) * 2 * P + P + j] = mul(y, scale);
}

// comm_vq_decode: indices [n][stages][M], codebook [stages][M][C][SUB] -> out [n][M SUB], pairs
// (j, j + M SUB / 2) turned. cosines, sines: [n][M SUB / 2]. thread: (j, token).
template <int M, int SUB, class Out, class Indices, class Codebook, class Table, class To>
VQ_FN void comm_vq_look_up(Indices indices, int n_stages, Codebook codebook, int n_entries,
                           Table cosines, Table sines, To out, uint3 at) {
  const int pairs = M * SUB / 2;
  const int64_t token = at.y;
  float pair[2];
  for (int k = 0; k < 2; ++k) {
    const int d = (int)at.x + k * pairs;
    float sum = 0.0f;
    for (int s = 0; s < n_stages; ++s) {
      const int64_t book = (int64_t)s * M + d / SUB;
      const uint32_t code =
          min((uint32_t)indices[token * n_stages * M + book], (uint32_t)(n_entries - 1));
      sum = sum + (float)codebook[(book * n_entries + code) * SUB + d % SUB];
    }
    pair[k] = sum;
  }
  const float c = cosines[token * pairs + at.x], s = sines[token * pairs + at.x];
  out[token * 2 * pairs + at.x] = Narrow<Out>::of(mul(pair[0], c) - mul(pair[1], s));
  out[token * 2 * pairs + pairs + at.x] = Narrow<Out>::of(mul(pair[0], s) + mul(pair[1], c));
}

}  // namespace veloxquant
