#include "python/core_bindings/cuda_storage.h"

namespace veloxquant {

CudaStorage::CudaStorage(const char* user, const Wanted& wanted, CudaArray key_codes,
                         CudaArray value_codes, CudaArray exact_keys, CudaArray exact_values,
                         CudaArray lengths)
    : arrays_{std::move(key_codes), std::move(value_codes), std::move(exact_keys),
              std::move(exact_values), std::move(lengths)},
      key_codes_(view_of(arrays_[0], user, "key_codes")),
      value_codes_(view_of(arrays_[1], user, "value_codes")),
      exact_keys_(view_of(arrays_[2], user, "exact_keys")),
      exact_values_(view_of(arrays_[3], user, "exact_values")) {
  const TensorView n = view_of(arrays_[4], user, "lengths");
  const int64_t batch = key_codes_.shape[0];
  const auto codes_ok = [&](const TensorView& view, int64_t block_bytes) {
    return view.ndim == 4 && view.dtype == DType::uint8 && view.shape[0] == batch &&
           view.shape[1] == wanted.heads && view.shape[3] == block_bytes && view.stride[3] == 1 &&
           view.stride[2] == block_bytes;
  };
  require(codes_ok(key_codes_, wanted.key_block_bytes) &&
              codes_ok(value_codes_, wanted.value_block_bytes) &&
              key_codes_.shape[2] == value_codes_.shape[2],
          "[", user, "] codes: got another shape, wanted uint8 [B, ", wanted.heads,
          ", blocks, cuda_block_bytes], block after block");
  const auto exact_ok = [&](const TensorView& view) {
    return view.ndim == 4 && view.shape[0] == batch && view.shape[1] == wanted.heads &&
           view.shape[2] == wanted.slots && view.shape[3] == wanted.dim && view.stride[3] == 1 &&
           view.dtype == exact_keys_.dtype &&
           (view.dtype == DType::float16 || view.dtype == DType::bfloat16);
  };
  require(exact_ok(exact_keys_) && exact_ok(exact_values_), "[", user,
          "] exact: got another shape or dtype, wanted float16 or bfloat16 [B, ", wanted.heads,
          ", ", wanted.slots, ", ", wanted.dim, "]");
  require(n.ndim == 2 && n.dtype == DType::int32 && n.shape[0] == 4 && n.shape[1] == batch &&
              n.stride[1] == 1 && n.stride[0] == batch,
          "[", user, "] lengths: got another shape or dtype, wanted int32 [4, ", batch, "]");
  counts_ = static_cast<int32_t*>(const_cast<void*>(n.data));
}

}  // namespace veloxquant
