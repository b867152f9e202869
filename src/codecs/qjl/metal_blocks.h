// Packed blocks of QJL on Metal: 64 tokens of a KV head to the bytes of format.h, and back. A
// threadgroup takes eight neighbouring tokens, which share the bytes of the sign planes.
//
// sketch: signs of stacked rotations [(M + M_OUT) / DIM][2][DIM], or (DENSE) a matrix [M][DIM].
#pragma once

#include "src/codecs/qjl/metal.h"

namespace veloxquant {

// Places in a block: BlockLayout of format.h.
VQ_FN int qjl_norms_at(int m, int m_out) { return 8 * (m + m_out); }
VQ_FN int qjl_block_bytes(int m, int m_out, int channels) {
  return qjl_norms_at(m, m_out) + (m_out > 0 ? 256 : 128) + channels;
}

// A part of the key: all of it, what is on its outlier channels, or all but that.
template <int DIM, class Rows, class Chosen>
VQ_FN void qjl_part(Rows whole, Chosen chosen, bool outliers, bool all, Rows part, uint self,
                    uint n_threads) {
  barrier_of_group();
  for (uint i = self; i < 8 * DIM; i += n_threads) {
    const bool own = all || (chosen[i % DIM] != 0) == outliers;
    part[i] = own ? whole[i] : 0.0f;
  }
  barrier_of_group();
}

// Signs and norms of the eight tokens of one part. whole: kept. planes, norms: of the block.
template <int DIM, int M, int DENSE, class Rows, class Chosen, class Sketch, class Bytes>
VQ_FN void qjl_store_part(Rows whole, Chosen chosen, bool outliers, bool all, Rows rows, Rows moved,
                          Sketch sketch, int n_present, Bytes planes, Bytes norms, int eighth,
                          uint self, uint n_threads) {
  qjl_part<DIM>(whole, chosen, outliers, all, rows, self, n_threads);
  for (int r = (int)self; r < 8; r += (int)n_threads) {
    const float size = r < n_present ? sketch_norm<DIM>(rows + r * DIM) : 0.0f;
    const ushort scalar = as_type<ushort>(finite_half(size));
    norms[2 * (8 * eighth + r)] = (uint8_t)scalar;
    norms[2 * (8 * eighth + r) + 1] = (uint8_t)(scalar >> 8);
  }
  for (int block = 0; block < (DENSE ? 1 : M / DIM); ++block) {
    if (block > 0) qjl_part<DIM>(whole, chosen, outliers, all, rows, self, n_threads);
    if (!DENSE) rotate_rows<DIM>(sketch + block * 2 * DIM, rows, moved, 8, self, n_threads);
    for (int j = (int)self; j < (DENSE ? M : DIM); j += (int)n_threads) {
      uint32_t field = 0u;
      for (int r = 0; r < n_present; ++r) {
        const float y =
            DENSE ? sketch_product<DIM>(sketch + j * DIM, rows + r * DIM) : rows[r * DIM + j];
        field |= (y >= 0.0f ? 1u : 0u) << r;
      }
      planes[(block * DIM + j) * 8 + eighth] = (uint8_t)field;
    }
  }
}

// The CHANNELS channels of the largest norm over the tokens of a block; the lowest wins ties.
template <int DIM, int CHANNELS, class X, class Energy, class Chosen>
VQ_FN void largest_channels(X x, int n_tokens, Energy energy, Chosen chosen, uint self,
                            uint n_threads) {
  for (int d = (int)self; d < DIM; d += (int)n_threads) {
    float sum = 0.0f;
    for (int t = 0; t < n_tokens; ++t) {
      const float value = (float)x[(int64_t)t * DIM + d];
      sum = sum + mul(value, value);
    }
    energy[d] = sum;
    chosen[d] = 0;
  }
  barrier_of_group();
  for (int i = 0; i < CHANNELS && self == 0; ++i) {
    int largest = 0;
    for (int d = 1; d < DIM; ++d) {
      if (energy[d] > energy[largest]) largest = d;
    }
    energy[largest] = -1.0f;
    chosen[largest] = 1;
  }
  barrier_of_group();
}

// x [n_tokens][DIM] of one plane -> blocks. OUTLIERS channels; FIXED: channels [heads][OUTLIERS],
// else a block has its own behind its norms. group: (eighth, block, plane).
template <int DIM, int M, int M_OUT, int DENSE, int OUTLIERS, int FIXED, class X, class Sketch,
          class Channels, class Bytes, class Rows, class Energy, class Chosen>
VQ_FN void qjl_encode_blocks(X x, int n_tokens, int n_heads, int n_blocks, Sketch sketch,
                             Channels channels, Bytes blocks, Rows whole, Rows rows, Rows moved,
                             Energy energy, Chosen chosen, uint3 group, uint self, uint n_threads) {
  const int eighth = (int)group.x, first = 64 * (int)group.y + 8 * eighth;
  const int64_t plane = group.z;
  const int present = min(8, max(0, n_tokens - first)), own = FIXED ? 0 : OUTLIERS;
  Bytes block = blocks + (plane * n_blocks + group.y) * qjl_block_bytes(M, M_OUT, own);
  Bytes norms = block + qjl_norms_at(M, M_OUT);
  load_tile<DIM, 8>(x + plane * n_tokens * DIM, first, n_tokens, whole, self, n_threads);
  if (FIXED) {
    for (int d = (int)self; d < DIM; d += (int)n_threads) {
      chosen[d] = 0;
      for (int i = 0; i < OUTLIERS; ++i) {
        if (channels[plane % n_heads * OUTLIERS + i] == d) chosen[d] = 1;
      }
    }
  }
  if (OUTLIERS > 0 && !FIXED) {
    const int of_block = min(64, n_tokens - 64 * (int)group.y);
    largest_channels<DIM, OUTLIERS>(x + (plane * n_tokens + 64 * (int)group.y) * DIM, of_block,
                                    energy, chosen, self, n_threads);
    for (int d = 0, i = 0; d < DIM && self == 0 && eighth == 0; ++d) {
      if (chosen[d] != 0) norms[256 + i++] = (uint8_t)d;
    }
  }
  qjl_store_part<DIM, M, DENSE>(whole, chosen, false, OUTLIERS == 0, rows, moved, sketch, present,
                                block, norms, eighth, self, n_threads);
  if (OUTLIERS > 0) {
    qjl_store_part<DIM, M_OUT, DENSE>(whole, chosen, true, false, rows, moved,
                                      sketch + (DENSE ? 0 : M / DIM * 2 * DIM), present,
                                      block + 8 * M, norms + 128, eighth, self, n_threads);
  }
}

VQ_FN float qjl_sign(uint byte, int bit) { return (byte >> bit) & 1u ? 1.0f : -1.0f; }

// sum of the eight tokens' signs times the sketch's rows, into `total`. Complete after.
template <int DIM, int M, int DENSE, class Bytes, class Sketch, class Rows>
VQ_FN void qjl_back(Bytes planes, int eighth, Sketch sketch, Rows rows, Rows moved, Rows total,
                    uint self, uint n_threads) {
  if (DENSE) {
    barrier_of_group();
    for (int i = (int)self; i < 8 * DIM; i += (int)n_threads) {
      float sum = mul(sketch[i % DIM], qjl_sign(planes[eighth], i / DIM));
      for (int j = 1; j < M; ++j) {
        sum = sum + mul(sketch[j * DIM + i % DIM], qjl_sign(planes[j * 8 + eighth], i / DIM));
      }
      total[i] = sum;
    }
  }
  for (int block = 0; block < (DENSE ? 0 : M / DIM); ++block) {
    barrier_of_group();
    for (int i = (int)self; i < 8 * DIM; i += (int)n_threads) {
      rows[i] = qjl_sign(planes[(block * DIM + i % DIM) * 8 + eighth], i / DIM);
    }
    rotate_rows_back<DIM>(sketch + block * 2 * DIM, rows, moved, 8, self, n_threads);
    for (int i = (int)self; i < 8 * DIM; i += (int)n_threads) {
      total[i] = block == 0 ? rows[i] : total[i] + rows[i];
    }
  }
  barrier_of_group();
}

template <class Bytes>
VQ_FN float qjl_scale(Bytes norms, int t, float constant_factor) {
  return mul(f16_to_f32((ushort)((uint)norms[2 * t] | ((uint)norms[2 * t + 1] << 8))),
             constant_factor);
}

// blocks -> y [n_blocks * 64][DIM] in the codec's coordinates: sketched ones where SKETCHED (one
// block of rotations, no outliers). constants: of the sketch, of the outliers' sketch.
template <int DIM, int M, int M_OUT, int DENSE, int OUTLIERS, int FIXED, int SKETCHED, class Bytes,
          class Sketch, class Channels, class Constants, class Out, class Rows>
VQ_FN void qjl_decode_blocks(Bytes blocks, int n_blocks, int n_heads, Sketch sketch,
                             Channels channels, Constants constants, Out out, Rows rows, Rows moved,
                             Rows total, uint3 group, uint self, uint n_threads) {
  const int eighth = (int)group.x, own = FIXED ? 0 : OUTLIERS;
  const int64_t plane = group.z, at = plane * n_blocks + group.y;
  Bytes block = blocks + at * qjl_block_bytes(M, M_OUT, own);
  Bytes norms = block + qjl_norms_at(M, M_OUT);
  Out y = out + (at * 64 + 8 * eighth) * DIM;
  if (!SKETCHED) {
    qjl_back<DIM, M, DENSE>(block, eighth, sketch, rows, moved, total, self, n_threads);
  }
  for (int i = (int)self; i < 8 * DIM; i += (int)n_threads) {
    const float scale = qjl_scale(norms, 8 * eighth + i / DIM, constants[0]);
    const float value =
        SKETCHED ? qjl_sign(block[(i % DIM) * 8 + eighth], i / DIM) : (float)total[i];
    bool outlier = false;
    for (int k = 0; k < OUTLIERS; ++k) {
      const int channel = FIXED ? (int)channels[plane % n_heads * OUTLIERS + k]
                                : min((int)norms[256 + k], DIM - 1);
      outlier = outlier || channel == i % DIM;
    }
    if (!outlier) y[i] = mul(value, scale);
  }
  if (OUTLIERS == 0) return;
  qjl_back<DIM, M_OUT, DENSE>(block + 8 * M, eighth, sketch + (DENSE ? 0 : M / DIM * 2 * DIM), rows,
                              moved, total, self, n_threads);
  for (int i = (int)self; i < 8 * OUTLIERS; i += (int)n_threads) {
    const int r = i / OUTLIERS, k = i % OUTLIERS;
    const int channel = FIXED ? (int)channels[plane % n_heads * OUTLIERS + k]
                              : min((int)norms[256 + k], DIM - 1);
    // A garbage block may name a channel twice: one thread writes it, scaled as often.
    const float scale = qjl_scale(norms + 128, 8 * eighth + r, constants[1]);
    float value = total[r * DIM + channel];
    bool written = false;
    for (int other = 0; other < OUTLIERS; ++other) {
      const int same = FIXED ? (int)channels[plane % n_heads * OUTLIERS + other]
                             : min((int)norms[256 + other], DIM - 1);
      if (same != channel) continue;
      written = written || other < k;
      value = mul(value, scale);
    }
    if (!written) y[r * DIM + channel] = value;
  }
}

}  // namespace veloxquant
