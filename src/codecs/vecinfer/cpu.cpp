// VecInfer on the CPU: compiled once per SIMD level, vectorised over the tokens of a block, so
// that every sum keeps the order of the reference.
#include "src/codecs/vecinfer/kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/codecs/vecinfer/cpu.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <hwy/aligned_allocator.h>

#include <algorithm>
#include <cstring>

#include "src/codecs/vecinfer/nearest-inl.h"
#include "src/math/float16.h"
#include "src/math/hadamard.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant::vecinfer::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// fp16 bits -> fp32, n a multiple of 8 or anything (the tail is scalar).
HWY_INLINE void widen(const uint16_t* HWY_RESTRICT from, int n, float* HWY_RESTRICT to) {
  const F32 df;
  const hn::Rebind<hwy::float16_t, F32> df16;
  const hn::Rebind<uint16_t, F32> du16;
  const int lanes = static_cast<int>(hn::Lanes(df));
  int i = 0;
  for (; i + lanes <= n; i += lanes) {
    hn::StoreU(hn::PromoteTo(df, hn::BitCast(df16, hn::LoadU(du16, from + i))), df, to + i);
  }
  for (; i < n; ++i) to[i] = f16_to_f32(from[i]);
}

// One plane of a row: `width` bits from bit `shift` of each of 64 codes (format.h).
HWY_INLINE void store_plane(const uint16_t* HWY_RESTRICT codes, int shift, int width,
                            uint8_t* HWY_RESTRICT plane) {
  if (width == 8) {
    for (int t = 0; t < 64; ++t) plane[t] = static_cast<uint8_t>(codes[t] >> shift);
  } else if (width == 4) {
    for (int t = 0; t < 32; ++t) {
      const int a = (codes[t] >> shift) & 15, b = (codes[t + 32] >> shift) & 15;
      plane[t] = static_cast<uint8_t>(a | (b << 4));
    }
  } else {
    for (int t = 0; t < 16; ++t) {
      int byte = 0;
      for (int k = 0; k < 4; ++k) byte |= ((codes[t + 16 * k] >> shift) & 3) << (2 * k);
      plane[t] = static_cast<uint8_t>(byte);
    }
  }
}

void encode_block(const HeadTables& head, const float* y_t, uint8_t* block) {
  uint16_t codes[kBlockTokens];
  const int table_size = head.n_centroids * head.sub_dim;
  const auto owned = hwy::AllocateAligned<float>(table_size);
  float* HWY_RESTRICT table = owned.get();
  for (int m = 0; m < head.n_subvectors; ++m) {
    if (m == 0 || head.table_stride != 0) widen(head.table(m), table_size, table);
    HWY_NAMESPACE::nearest_centroids(y_t + m * head.sub_dim * kBlockTokens, kBlockTokens,
                                     kBlockTokens, table, head.n_centroids, head.sub_dim, codes,
                                     nullptr);
    uint8_t* row = block + m * row_bytes(head.bits);
    const int low = low_bits(head.bits);
    store_plane(codes, 0, low, row);
    if (head.bits > low) store_plane(codes, low, head.bits - low, row + row_bytes(low));
  }
}

// The 64 codes of one sub-vector, clamped to the table.
HWY_INLINE void load_codes(const HeadTables& head, const uint8_t* block, int m,
                           uint16_t* HWY_RESTRICT codes) {
  const uint8_t* HWY_RESTRICT row = block + m * row_bytes(head.bits);
  const int low = low_bits(head.bits);
  if (low == 8) {
    for (int t = 0; t < 64; ++t) codes[t] = row[t];
  } else {
    for (int t = 0; t < 32; ++t) {
      codes[t] = row[t] & 15;
      codes[t + 32] = row[t] >> 4;
    }
  }
  const uint8_t* HWY_RESTRICT high = row + row_bytes(low);
  if (head.bits - low == 4) {
    for (int t = 0; t < 32; ++t) {
      codes[t] = static_cast<uint16_t>(codes[t] | ((high[t] & 15) << low));
      codes[t + 32] = static_cast<uint16_t>(codes[t + 32] | ((high[t] >> 4) << low));
    }
  } else if (head.bits - low == 2) {
    for (int k = 0; k < 4; ++k) {
      for (int t = 0; t < 16; ++t) {
        const int field = (high[t] >> (2 * k)) & 3;
        codes[t + 16 * k] = static_cast<uint16_t>(codes[t + 16 * k] | (field << low));
      }
    }
  }
  if (head.n_centroids != (1 << head.bits)) {
    const uint16_t last = static_cast<uint16_t>(head.n_centroids - 1);
    for (int t = 0; t < 64; ++t) codes[t] = std::min(codes[t], last);
  }
}

// Entries of one sub-vector for n tokens, gathered token by token into out[t * out_stride].
template <int kSubDim>
HWY_INLINE void gather(const uint16_t* HWY_RESTRICT table, const uint16_t* HWY_RESTRICT codes,
                       int n, int sub_dim, uint16_t* HWY_RESTRICT out, int out_stride) {
  const int dims = kSubDim == 0 ? sub_dim : kSubDim;
  for (int t = 0; t < n; ++t) {
    std::memcpy(out + t * out_stride, table + codes[t] * dims, sizeof(uint16_t) * dims);
  }
}

HWY_INLINE void gather_any(const HeadTables& head, int m, const uint16_t* codes, int n,
                           uint16_t* out, int out_stride) {
  const uint16_t* table = head.table(m);
  switch (head.sub_dim) {
    case 1:
      return gather<1>(table, codes, n, 1, out, out_stride);
    case 2:
      return gather<2>(table, codes, n, 2, out, out_stride);
    case 4:
      return gather<4>(table, codes, n, 4, out, out_stride);
    case 8:
      return gather<8>(table, codes, n, 8, out, out_stride);
    default:
      return gather<0>(table, codes, n, head.sub_dim, out, out_stride);
  }
}

void decode_block(const HeadTables& head, const uint8_t* block, int n_tokens, float* y,
                  int64_t y_stride) {
  HWY_ALIGN uint16_t tile[kBlockTokens * kMaxHeadDim];
  uint16_t codes[kBlockTokens];
  for (int m = 0; m < head.n_subvectors; ++m) {
    load_codes(head, block, m, codes);
    gather_any(head, m, codes, n_tokens, tile + m * head.sub_dim, head.head_dim);
  }
  for (int t = 0; t < n_tokens; ++t) {
    widen(tile + t * head.head_dim, head.head_dim, y + t * y_stride);
  }
}

// De-interleaves 64 gathered entries into kSubDim rows of 64 values.
template <int kSubDim>
HWY_INLINE void deinterleave(const uint16_t* HWY_RESTRICT entries, uint16_t* HWY_RESTRICT rows) {
  const hn::CappedTag<uint16_t, 64> d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  for (int t = 0; t < 64; t += lanes) {
    hn::Vec<decltype(d)> a, b, c, e;
    if (kSubDim == 2) {
      hn::LoadInterleaved2(d, entries + 2 * t, a, b);
    } else {
      hn::LoadInterleaved4(d, entries + 4 * t, a, b, c, e);
      hn::StoreU(c, d, rows + 2 * 64 + t);
      hn::StoreU(e, d, rows + 3 * 64 + t);
    }
    hn::StoreU(a, d, rows + t);
    hn::StoreU(b, d, rows + 64 + t);
  }
}

void decode_block_transposed(const HeadTables& head, const uint8_t* block, int n_tokens,
                             float* y_t) {
  HWY_ALIGN uint16_t entries[kBlockTokens * kMaxSubDim];
  HWY_ALIGN uint16_t rows[kBlockTokens * kMaxSubDim];
  uint16_t codes[kBlockTokens];
  for (int m = 0; m < head.n_subvectors; ++m) {
    load_codes(head, block, m, codes);
    gather_any(head, m, codes, kBlockTokens, entries, head.sub_dim);
    const uint16_t* source = rows;
    switch (head.sub_dim) {
      case 1:
        source = entries;
        break;
      case 2:
        deinterleave<2>(entries, rows);
        break;
      case 4:
        deinterleave<4>(entries, rows);
        break;
      default:
        for (int t = 0; t < 64; ++t) {
          for (int i = 0; i < head.sub_dim; ++i) rows[i * 64 + t] = entries[t * head.sub_dim + i];
        }
    }
    widen(source, 64 * head.sub_dim, y_t + m * head.sub_dim * 64);
  }
  if (n_tokens < kBlockTokens) {
    for (int d = 0; d < head.head_dim; ++d) {
      std::fill(y_t + d * 64 + n_tokens, y_t + d * 64 + 64, 0.0f);
    }
  }
}

void hadamard_tile(const float* inverse_scale, int head_dim, float* x_t) {
  const hn::CappedTag<float, 64> df;
  const int lanes = static_cast<int>(hn::Lanes(df));
  if (inverse_scale != nullptr) {
    for (int d = 0; d < head_dim; ++d) {
      const auto scale = hn::Set(df, inverse_scale[d]);
      for (int t = 0; t < 64; t += lanes) {
        float* p = x_t + d * 64 + t;
        hn::StoreU(hn::Mul(hn::LoadU(df, p), scale), df, p);
      }
    }
  }
  for (int start = 0; start < head_dim;) {
    const int block = hadamard_block(head_dim - start);
    float* base = x_t + start * 64;
    for (int stride = 1; stride < block; stride *= 2) {
      for (int i = 0; i < block; i += 2 * stride) {
        for (int j = i; j < i + stride; ++j) {
          for (int t = 0; t < 64; t += lanes) {
            float* low = base + j * 64 + t;
            float* high = base + (j + stride) * 64 + t;
            const auto a = hn::LoadU(df, low);
            const auto b = hn::LoadU(df, high);
            hn::StoreU(hn::Add(a, b), df, low);
            hn::StoreU(hn::Sub(a, b), df, high);
          }
        }
      }
    }
    const auto scale = hn::Set(df, hadamard_scale(block));
    for (int i = 0; i < block * 64; i += lanes) {
      hn::StoreU(hn::Mul(hn::LoadU(df, base + i), scale), df, base + i);
    }
    start += block;
  }
}

void dense_tile(const float* matrix, int head_dim, const float* x_t, float* y_t) {
  const hn::CappedTag<float, 64> df;
  const int lanes = static_cast<int>(hn::Lanes(df));
  for (int j = 0; j < head_dim; ++j) {
    for (int t = 0; t < 64; t += lanes) {
      auto sum = hn::Mul(hn::LoadU(df, x_t + t), hn::Set(df, matrix[j]));
      for (int i = 1; i < head_dim; ++i) {
        sum = hn::Add(
            sum, hn::Mul(hn::LoadU(df, x_t + i * 64 + t), hn::Set(df, matrix[i * head_dim + j])));
      }
      hn::StoreU(sum, df, y_t + j * 64 + t);
    }
  }
}

// ROWS rows of x times one vector of columns; `columns` has head_dim rows, `stride` apart.
template <int ROWS, class D>
HWY_INLINE void dense_columns(D df, const float* HWY_RESTRICT columns, int stride, int head_dim,
                              const float* HWY_RESTRICT x, float* HWY_RESTRICT y) {
  hn::Vec<D> sums[ROWS];
  const auto first = hn::LoadU(df, columns);
  for (int r = 0; r < ROWS; ++r) sums[r] = hn::Mul(hn::Set(df, x[r * head_dim]), first);
  for (int i = 1; i < head_dim; ++i) {
    const auto column = hn::LoadU(df, columns + i * stride);
    for (int r = 0; r < ROWS; ++r) {
      sums[r] = hn::Add(sums[r], hn::Mul(hn::Set(df, x[r * head_dim + i]), column));
    }
  }
  for (int r = 0; r < ROWS; ++r) hn::StoreU(sums[r], df, y + r * head_dim);
}

void dense_rows(const float* HWY_RESTRICT matrix, int head_dim, bool transposed,
                const float* HWY_RESTRICT x, int64_t n, float* HWY_RESTRICT y) {
  const hn::CappedTag<float, 8> df;  // 8 divides every head_dim
  const int lanes = static_cast<int>(hn::Lanes(df));
  float turned[8 * kMaxHeadDim];  // `lanes` rows of the matrix as columns
  for (int j = 0; j < head_dim; j += lanes) {
    const float* columns = matrix + j;
    if (transposed) {
      for (int c = 0; c < lanes; ++c) {
        for (int i = 0; i < head_dim; ++i) turned[i * lanes + c] = matrix[(j + c) * head_dim + i];
      }
      columns = turned;
    }
    const int stride = transposed ? lanes : head_dim;
    int64_t r = 0;
    // Four chains of additions at a time, as many as the query heads of a group often are.
    for (; r + 4 <= n; r += 4) {
      dense_columns<4>(df, columns, stride, head_dim, x + r * head_dim, y + r * head_dim + j);
    }
    const float* rest = x + r * head_dim;
    float* to = y + r * head_dim + j;
    if (n - r == 3) dense_columns<3>(df, columns, stride, head_dim, rest, to);
    if (n - r == 2) dense_columns<2>(df, columns, stride, head_dim, rest, to);
    if (n - r == 1) dense_columns<1>(df, columns, stride, head_dim, rest, to);
  }
}

void query_lut(const float* HWY_RESTRICT q, const float* HWY_RESTRICT columns, int n_centroids,
               int sub_dim, float* HWY_RESTRICT out) {
  const F32 df;
  const int lanes = static_cast<int>(hn::Lanes(df));
  int c = 0;
  for (; c + lanes <= n_centroids; c += lanes) {
    auto sum = hn::Mul(hn::Set(df, q[0]), hn::LoadU(df, columns + c));
    for (int i = 1; i < sub_dim; ++i) {
      sum = hn::Add(
          sum, hn::Mul(hn::Set(df, q[i]), hn::LoadU(df, columns + int64_t{i} * n_centroids + c)));
    }
    hn::StoreU(sum, df, out + c);
  }
  for (; c < n_centroids; ++c) {
    float sum = mul(q[0], columns[c]);
    for (int i = 1; i < sub_dim; ++i) sum += mul(q[i], columns[int64_t{i} * n_centroids + c]);
    out[c] = sum;
  }
}

}  // namespace veloxquant::vecinfer::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "src/backends/cpu/simd_targets.h"

namespace veloxquant::vecinfer {

HWY_EXPORT(encode_block);
HWY_EXPORT(decode_block);
HWY_EXPORT(decode_block_transposed);
HWY_EXPORT(hadamard_tile);
HWY_EXPORT(dense_tile);
HWY_EXPORT(dense_rows);
HWY_EXPORT(nearest_centroids);
HWY_EXPORT(query_lut);

const Kernels& cpu_kernels() {
  cpu::apply_environment();
  static const Kernels kernels{
      [](const HeadTables& head, const float* y_t, uint8_t* block) {
        HWY_DYNAMIC_DISPATCH(encode_block)(head, y_t, block);
      },
      [](const HeadTables& head, const uint8_t* block, int n, float* y, int64_t stride) {
        HWY_DYNAMIC_DISPATCH(decode_block)(head, block, n, y, stride);
      },
      [](const HeadTables& head, const uint8_t* block, int n, float* y_t) {
        HWY_DYNAMIC_DISPATCH(decode_block_transposed)(head, block, n, y_t);
      },
      [](const float* inverse_scale, int head_dim, float* x_t) {
        HWY_DYNAMIC_DISPATCH(hadamard_tile)(inverse_scale, head_dim, x_t);
      },
      [](const float* matrix, int head_dim, const float* x_t, float* y_t) {
        HWY_DYNAMIC_DISPATCH(dense_tile)(matrix, head_dim, x_t, y_t);
      },
      [](const float* matrix, int head_dim, bool transposed, const float* x, int64_t n, float* y) {
        HWY_DYNAMIC_DISPATCH(dense_rows)(matrix, head_dim, transposed, x, n, y);
      },
      [](const float* x, int64_t x_stride, int64_t n, const float* table, int n_centroids,
         int sub_dim, uint16_t* codes, float* distance) {
        HWY_DYNAMIC_DISPATCH(nearest_centroids)
        (x, x_stride, n, table, n_centroids, sub_dim, codes, distance);
      },
      [](const float* q, const float* columns, int n_centroids, int sub_dim, float* out) {
        HWY_DYNAMIC_DISPATCH(query_lut)(q, columns, n_centroids, sub_dim, out);
      }};
  return kernels;
}

}  // namespace veloxquant::vecinfer
#endif  // HWY_ONCE
