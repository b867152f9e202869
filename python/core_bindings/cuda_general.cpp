// The general CUDA kernels (veloxquant/cuda_general.h) for sides without tables; calls as in
// cuda.cpp.
#include <nanobind/stl/string.h>

#include "python/core_bindings/cuda_storage.h"

using namespace nanobind::literals;

namespace veloxquant {
namespace {

cuda::BlockSide block_side(const SideTables& side, const void* blob, const TensorView& codes) {
  cuda::BlockSide s;
  s.codec = side.general();
  s.blob = blob;
  s.blocks = static_cast<uint8_t*>(const_cast<void*>(codes.data));
  s.sequence_stride = codes.stride[0];
  s.head_stride = codes.stride[1];
  s.block_stride = codes.stride[2];
  return s;
}

class CudaGeneralLayer {
 public:
  CudaGeneralLayer(const SideTables& keys, const SideTables& values, CudaArray key_blob,
                   CudaArray value_blob, int n_q_heads, int sinks, int window)
      : keys_(keys), values_(values), blobs_{std::move(key_blob), std::move(value_blob)} {
    require(keys.is_general() && values.is_general(),
            "[CudaGeneralLayer] keys, values: got a side with tables, wanted none");
    blob_of(blobs_[0], keys, "key_blob");
    blob_of(blobs_[1], values, "value_blob");
    attend_.n_q_heads = n_q_heads;
    attend_.sinks = append_.sinks = sinks;
    append_.window = window;
  }

  void bind(CudaArray key_codes, CudaArray value_codes, CudaArray exact_keys,
            CudaArray exact_values, CudaArray lengths) {
    const int64_t slots = append_.sinks + append_.window + kBlockTokens;
    const Codec& codec = *keys_.codec();
    held_ = CudaStorage("CudaGeneralLayer",
                        {codec.n_kv_heads(), codec.head_dim(), keys_.cuda_block_bytes(),
                         values_.cuda_block_bytes(), slots},
                        std::move(key_codes), std::move(value_codes), std::move(exact_keys),
                        std::move(exact_values), std::move(lengths));
    attend_.batch = append_.batch = held_.batch();
    attend_.keys = append_.keys = block_side(keys_, blobs_[0].data(), held_.key_codes());
    attend_.values = append_.values = block_side(values_, blobs_[1].data(), held_.value_codes());
    attend_.exact_keys = append_.exact_keys = held_.exact_keys();
    attend_.exact_values = append_.exact_values = held_.exact_values();
    attend_.exact_dtype = append_.exact_dtype = held_.exact_dtype();
    append_.lengths = held_.counts();
    attend_.n_packed = held_.counts() + 2 * held_.batch();
    attend_.n_exact = held_.counts() + 3 * held_.batch();
    attend_.max_packed = kBlockTokens * held_.blocks();
    attend_.max_exact = slots;
  }

  int64_t workspace_bytes() const { return cuda::attend_workspace_bytes(attend_); }

  void append(uintptr_t keys, int64_t key_batch, int64_t key_head, uintptr_t values,
              int64_t value_batch, int64_t value_head, int dtype, uintptr_t stream) const {
    cuda::BlockAppendArgs a = append_;
    set_tokens(a, keys, key_batch, key_head, values, value_batch, value_head, dtype);
    cuda::append_token(a, stream_of(stream));
  }

  void attend(uintptr_t q, uintptr_t out, uintptr_t lse, int dtype, float scale,
              uintptr_t workspace, int64_t workspace_bytes, uintptr_t stream) const {
    cuda::AttendArgs a = attend_;
    set_query(a, q, out, lse, dtype, scale, workspace, workspace_bytes);
    cuda::attend(a, stream_of(stream));
  }

 private:
  SideTables keys_, values_;
  CudaArray blobs_[2];
  CudaStorage held_;
  cuda::AttendArgs attend_;
  cuda::BlockAppendArgs append_;
};

cuda::BlockSide checked_side(const SideTables& side, const CudaArray& blob, const TensorView& codes,
                             const char* function) {
  require(side.is_general(), "[", function, "] side: got one with tables, wanted one without");
  const Codec& codec = *side.codec();
  require(codes.ndim == 4 && codes.dtype == DType::uint8 && codes.shape[1] == codec.n_kv_heads() &&
              codes.shape[3] == side.cuda_block_bytes() && codes.stride[3] == 1,
          "[", function, "] codes: got another shape, wanted uint8 [B, ", codec.n_kv_heads(),
          ", blocks, ", side.cuda_block_bytes(), "]");
  return block_side(side, blob_of(blob, side, "blob"), codes);
}

void encode(const SideTables& side, const CudaArray& blob, const CudaArray& x_array,
            const CudaArray& code_array, int first_block, uintptr_t stream) {
  const TensorView x = view_of(x_array, "cuda_general_encode", "x"),
                   codes = view_of(code_array, "cuda_general_encode", "codes");
  const cuda::BlockSide to = checked_side(side, blob, codes, "cuda_general_encode");
  const int64_t n_blocks = (x.shape[2] + kBlockTokens - 1) / kBlockTokens;
  require(x.ndim == 4 && x.shape[0] == codes.shape[0] && x.shape[1] == codes.shape[1] &&
              x.shape[3] == side.codec()->head_dim() && x.stride[3] == 1 && first_block >= 0 &&
              first_block + n_blocks <= codes.shape[2],
          "[cuda_general_encode] x: got another shape, wanted [", codes.shape[0], ", ",
          codes.shape[1], ", tokens, ", side.codec()->head_dim(), "] that fit ", codes.shape[2],
          " blocks from block ", first_block);
  cuda::encode_blocks(to, {}, static_cast<int>(x.shape[0]),
                      {x.data, x.stride[0], x.stride[1], x.stride[2]}, x.dtype,
                      static_cast<int>(x.shape[2]), first_block, stream_of(stream));
}

void decode(const SideTables& side, const CudaArray& blob, const CudaArray& code_array,
            int first_block, const CudaArray& y_array, uintptr_t stream) {
  const TensorView y = view_of(y_array, "cuda_general_decode", "y"),
                   codes = view_of(code_array, "cuda_general_decode", "codes");
  const cuda::BlockSide from = checked_side(side, blob, codes, "cuda_general_decode");
  const int64_t dim = side.codec()->head_dim();
  require(y.ndim == 4 && y.dtype == DType::float32 && y.shape[0] == codes.shape[0] &&
              y.shape[1] == codes.shape[1] && y.shape[2] % kBlockTokens == 0 && y.shape[3] == dim &&
              y.stride[3] == 1 && y.stride[2] == dim && first_block >= 0 &&
              first_block + y.shape[2] / kBlockTokens <= codes.shape[2],
          "[cuda_general_decode] y: got another shape, wanted float32 [", codes.shape[0], ", ",
          codes.shape[1], ", whole blocks, ", dim, "] of the ", codes.shape[2], " blocks");
  cuda::decode_blocks(from, {}, static_cast<int>(codes.shape[0]), first_block,
                      static_cast<int>(y.shape[2] / kBlockTokens),
                      static_cast<float*>(const_cast<void*>(y.data)), y.stride[0], y.stride[1],
                      stream_of(stream));
}

}  // namespace

void bind_cuda_general(nb::module_& m) {
  m.def("cuda_general_encode", &encode, "side"_a, "blob"_a, "x"_a, "codes"_a, "first_block"_a,
        "stream"_a);
  m.def("cuda_general_decode", &decode, "side"_a, "blob"_a, "codes"_a, "first_block"_a, "y"_a,
        "stream"_a);
  nb::class_<CudaGeneralLayer>(m, "CudaGeneralLayer")
      .def(nb::init<const SideTables&, const SideTables&, CudaArray, CudaArray, int, int, int>(),
           "keys"_a, "values"_a, "key_blob"_a, "value_blob"_a, "n_q_heads"_a, "sinks"_a, "window"_a)
      .def("bind", &CudaGeneralLayer::bind, "key_codes"_a, "value_codes"_a, "exact_keys"_a,
           "exact_values"_a, "lengths"_a)
      .def("workspace_bytes", &CudaGeneralLayer::workspace_bytes)
      .def("append", &CudaGeneralLayer::append)
      .def("attend", &CudaGeneralLayer::attend);
}

}  // namespace veloxquant
