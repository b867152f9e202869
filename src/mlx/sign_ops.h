// Lazy MLX operations over the sign codes of RaBitQ and QJL (python: metal/_rabitq.py, _qjl.py).
#pragma once

#include <mlx/array.h>
#include <mlx/utils.h>

#include <utility>

namespace veloxquant {

// qbits [..., D/8] and bits [..., N, D/8] (integers, used as uint8), cx [..., N], scale of one
// element -> fp32 [..., N]: popcount(qbits ^ bits) * scale + cx. Leading axes broadcast.
mlx::core::array rabitq_hamming_score_op(const mlx::core::array& qbits,
                                         const mlx::core::array& bits, const mlx::core::array& cx,
                                         const mlx::core::array& scale,
                                         mlx::core::StreamOrDevice s = {});

// x [..., D] -> (uint8 [..., D/8], fp32 factors [...]), rabitq_encode() of the core.
std::pair<mlx::core::array, mlx::core::array> rabitq_encode_op(const mlx::core::array& x,
                                                               uint64_t seed,
                                                               mlx::core::StreamOrDevice s = {});

// q [..., H_q, D], codes [..., H, N, D/8], factors [..., H, N] -> fp32 [..., H_q, N]: estimates of
// q . k from integers, q rounded to query_bits bits after its rotation.
mlx::core::array rabitq_popcount_score_op(const mlx::core::array& q, const mlx::core::array& codes,
                                          const mlx::core::array& factors, uint64_t seed,
                                          int query_bits, mlx::core::StreamOrDevice s = {});

// x [..., d], sketch [m, d] -> (uint8 [..., m/8], fp16 norms [...]).
std::pair<mlx::core::array, mlx::core::array> qjl_encode_op(const mlx::core::array& x,
                                                            const mlx::core::array& sketch,
                                                            mlx::core::StreamOrDevice s = {});

// q_proj [..., H_q, m], signs uint8 [..., S, H, m/8], norms [..., S, H] -> fp16 [..., H_q, S].
mlx::core::array qjl_inner_product_op(const mlx::core::array& q_proj, const mlx::core::array& signs,
                                      const mlx::core::array& norms,
                                      mlx::core::StreamOrDevice s = {});

// fp32 [m, d]: the structured sketch of a seed.
mlx::core::array qjl_sketch_op(int dim, int m, uint64_t seed, mlx::core::StreamOrDevice s = {});

}  // namespace veloxquant
