// A layer's tensors on the device, checked and held, as the kernels of both kinds take them.
#pragma once

#include <utility>

#include "python/core_bindings/module.h"

namespace veloxquant {

inline const void* pointer(uintptr_t address) { return reinterpret_cast<const void*>(address); }
inline cuda::Stream stream_of(uintptr_t address) { return reinterpret_cast<void*>(address); }

inline const void* blob_of(const CudaArray& array, const SideTables& side, const char* name) {
  require(array.nbytes() == side.cuda_blob().size(), "[cuda] ", name, ": got ", array.nbytes(),
          " bytes, wanted the ", side.cuda_blob().size(), " of cuda_blob()");
  return array.data();
}

// One new token: [B][H][1][D] at these addresses, strides of batch and head in elements. args: as
// the kernels of either kind take it.
template <class Args>
void set_tokens(Args& args, uintptr_t keys, int64_t key_batch, int64_t key_head, uintptr_t values,
                int64_t value_batch, int64_t value_head, int dtype) {
  args.new_keys = {pointer(keys), key_batch, key_head, 0};
  args.new_values = {pointer(values), value_batch, value_head, 0};
  args.dtype = static_cast<DType>(dtype);
}

// q, out: [B][Hq][D], row-major, of one dtype; lse: fp32, or 0.
template <class Args>
void set_query(Args& args, uintptr_t q, uintptr_t out, uintptr_t lse, int dtype, float scale,
               uintptr_t workspace, int64_t workspace_bytes) {
  args.scale = scale;
  args.q = pointer(q);
  args.out = const_cast<void*>(pointer(out));
  args.q_dtype = args.out_dtype = static_cast<DType>(dtype);
  args.lse = static_cast<float*>(const_cast<void*>(pointer(lse)));
  args.workspace = const_cast<void*>(pointer(workspace));
  args.workspace_bytes = workspace_bytes;
}

//   codes   uint8 [B, H, blocks, cuda_block_bytes]     exact   16 bits [B, H, slots, D]
//   lengths int32 [4, B]
class CudaStorage {
 public:
  struct Wanted {
    int64_t heads, dim, key_block_bytes, value_block_bytes, slots;
  };
  CudaStorage() = default;
  // user: the class of Python that binds, for Errors.
  CudaStorage(const char* user, const Wanted& wanted, CudaArray key_codes, CudaArray value_codes,
              CudaArray exact_keys, CudaArray exact_values, CudaArray lengths);

  int batch() const { return static_cast<int>(key_codes_.shape[0]); }
  int64_t blocks() const { return key_codes_.shape[2]; }
  const TensorView& key_codes() const { return key_codes_; }
  const TensorView& value_codes() const { return value_codes_; }
  cuda::ExactSide exact_keys() const { return exact_side(exact_keys_); }
  cuda::ExactSide exact_values() const { return exact_side(exact_values_); }
  DType exact_dtype() const { return exact_keys_.dtype; }
  int32_t* counts() const { return counts_; }

 private:
  static cuda::ExactSide exact_side(const TensorView& view) {
    return {view.data, view.stride[0], view.stride[1], view.stride[2]};
  }

  CudaArray arrays_[5];
  TensorView key_codes_, value_codes_, exact_keys_, exact_values_;
  int32_t* counts_ = nullptr;
};

}  // namespace veloxquant
