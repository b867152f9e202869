// A codec of the core together with the MLX arrays that hold its tables.
#pragma once

#include <mlx/array.h>

#include <optional>
#include <string>
#include <vector>

#include "veloxquant/codec.h"
#include "veloxquant/vecinfer.h"

namespace veloxquant {

struct CodecArrays {
  enum class Method { exact, vecinfer };

  Method method = Method::exact;
  Side side = Side::keys;
  int n_kv_heads = 0;
  int head_dim = 0;
  int n_subvectors = 0;
  TransformKind transform = TransformKind::none;
  bool has_scale = false;
  DType exact_dtype = DType::float16;  // exact only
  std::string name;                    // of the core codec, e.g. "vecinfer d4x256"
  int64_t block_bytes = 0;             // of the core codec
  // vecinfer: tables, then scale | encode_matrix, query_matrix.
  std::vector<mlx::core::array> arrays;

  // The core codec over the memory of evaluated `inputs` (as many as `arrays`), which must outlive
  // it.
  CodecPtr over(const mlx::core::array* inputs) const;

  // How many arrays the codec has, also after without_arrays().
  int n_arrays() const;

  // Everything but the arrays: what a primitive keeps, the arrays being its inputs.
  CodecArrays without_arrays() const;

  int64_t nbytes() const;           // of the arrays, an array that serves twice counted once
  double bits_per_element() const;  // of packed tokens
};

CodecArrays exact_codec_arrays(Side side, int n_kv_heads, int head_dim, DType dtype);

// tables: floats [H, M or 1, C, d] (optional leading batch axis), rounded to fp16 here.
// scale (lambda): fp32 [H, D], Hadamard transform. encode_matrix and query_matrix: fp32 [H, D, D];
// the same array given for both (an orthogonal matrix) is held and counted once.
// With neither: no transform, unless `hadamard` is set. Throws Error where shapes do not fit.
CodecArrays vecinfer_codec_arrays(Side side, const mlx::core::array& tables, int n_subvectors,
                                  bool hadamard, const std::optional<mlx::core::array>& scale,
                                  const std::optional<mlx::core::array>& encode_matrix,
                                  const std::optional<mlx::core::array>& query_matrix);

// The codec that `described` (method, side, sizes, transform, exact dtype) was, with arrays from a
// file. Throws Error where they are not exactly what such a codec has.
CodecArrays restored_codec_arrays(const CodecArrays& described,
                                  const std::vector<mlx::core::array>& arrays);

}  // namespace veloxquant
