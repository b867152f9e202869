// The CUDA kernels for arrays on the device. What is the same in every step is bound once; a step
// passes addresses, since one layer's step takes microseconds and a DLPack exchange costs some too.
#include <nanobind/stl/string.h>

#include "python/core_bindings/cuda_storage.h"

using namespace nanobind::literals;

namespace veloxquant {
namespace {

// The storage of one layer on the device, and its kernels. Blobs are of SideTables.cuda_blob.
class CudaLayer {
 public:
  CudaLayer(const SideTables& keys, const SideTables& values, CudaArray key_blob,
            CudaArray value_blob, int n_q_heads, int sinks, int window)
      : key_blob_(std::move(key_blob)),
        value_blob_(std::move(value_blob)),
        sinks_(sinks),
        window_(window) {
    keys_.format = keys.prepared().format;
    values_.format = values.prepared().format;
    keys_.tables = blob_of(key_blob_, keys, "key_blob");
    values_.tables = blob_of(value_blob_, values, "value_blob");
    args_.n_q_heads = n_q_heads;
  }

  void bind(CudaArray key_codes, CudaArray value_codes, CudaArray exact_keys,
            CudaArray exact_values, CudaArray lengths) {
    held_ = CudaStorage("CudaLayer",
                        {keys_.format.n_kv_heads, keys_.format.head_dim, keys_.format.block_bytes(),
                         values_.format.block_bytes(), sinks_ + window_ + kBlockTokens},
                        std::move(key_codes), std::move(value_codes), std::move(exact_keys),
                        std::move(exact_values), std::move(lengths));
    set_codes(keys_, held_.key_codes());
    set_codes(values_, held_.value_codes());
    args_.batch = held_.batch();
    args_.keys = keys_;
    args_.values = values_;
    args_.exact_keys = held_.exact_keys();
    args_.exact_values = held_.exact_values();
    args_.exact_dtype = held_.exact_dtype();
    args_.n_packed = held_.counts() + 2 * held_.batch();
    args_.n_exact = held_.counts() + 3 * held_.batch();
  }

  int64_t workspace_bytes() const { return cuda::decode_workspace_bytes(args_); }

  void append(uintptr_t keys, int64_t key_batch, int64_t key_head, uintptr_t values,
              int64_t value_batch, int64_t value_head, int dtype, uintptr_t stream) const {
    cuda::AppendArgs a;
    a.batch = held_.batch();
    a.sinks = sinks_;
    a.window = window_;
    a.lengths = held_.counts();
    a.keys = keys_;
    a.values = values_;
    a.key_codes = const_cast<uint8_t*>(keys_.codes);
    a.value_codes = const_cast<uint8_t*>(values_.codes);
    a.exact_keys = held_.exact_keys();
    a.exact_values = held_.exact_values();
    a.exact_dtype = held_.exact_dtype();
    set_tokens(a, keys, key_batch, key_head, values, value_batch, value_head, dtype);
    cuda::append_token(a, stream_of(stream));
  }

  void attend(uintptr_t q, uintptr_t out, uintptr_t lse, int dtype, float scale,
              uintptr_t workspace, int64_t workspace_bytes, uintptr_t stream) const {
    cuda::DecodeArgs a = args_;
    set_query(a, q, out, lse, dtype, scale, workspace, workspace_bytes);
    cuda::decode_attention(a, stream_of(stream));
  }

 private:
  static void set_codes(cuda::PackedSide& side, const TensorView& view) {
    side.codes = static_cast<const uint8_t*>(view.data);
    side.batch_stride = view.stride[0];
    side.head_stride = view.stride[1];
  }

  cuda::PackedSide keys_, values_;
  CudaArray key_blob_, value_blob_;
  CudaStorage held_;
  int sinks_, window_;
  cuda::DecodeArgs args_;
};

cuda::PackedSide packed_of(const SideTables& side, const CudaArray& blob, const TensorView& codes) {
  cuda::PackedSide packed;
  packed.format = side.prepared().format;
  require(codes.ndim == 4 && codes.dtype == DType::uint8 &&
              codes.shape[1] == packed.format.n_kv_heads &&
              codes.shape[3] == packed.format.block_bytes() && codes.stride[3] == 1 &&
              codes.stride[2] == codes.shape[3],
          "[cuda] codes: got another shape, wanted uint8 [B, ", packed.format.n_kv_heads,
          ", blocks, ", packed.format.block_bytes(), "], block after block");
  packed.tables = blob_of(blob, side, "blob");
  packed.codes = static_cast<const uint8_t*>(codes.data);
  packed.batch_stride = codes.stride[0];
  packed.head_stride = codes.stride[1];
  return packed;
}

void encode(const SideTables& side, const CudaArray& blob, const CudaArray& x_array,
            const CudaArray& code_array, int first_block, uintptr_t stream) {
  const TensorView x = view_of(x_array, "cuda_encode", "x"),
                   codes = view_of(code_array, "cuda_encode", "codes");
  const cuda::PackedSide packed = packed_of(side, blob, codes);
  const int64_t n_blocks = (x.shape[2] + kBlockTokens - 1) / kBlockTokens;
  require(x.ndim == 4 && x.shape[0] == codes.shape[0] && x.shape[1] == codes.shape[1] &&
              x.shape[3] == packed.format.head_dim && x.stride[3] == 1 && first_block >= 0 &&
              first_block + n_blocks <= codes.shape[2],
          "[cuda_encode] x: got another shape, wanted [", codes.shape[0], ", ", codes.shape[1],
          ", tokens, ", packed.format.head_dim, "] that fit ", codes.shape[2],
          " blocks from block ", first_block);
  cuda::encode_blocks(packed, const_cast<uint8_t*>(packed.codes), static_cast<int>(x.shape[0]),
                      {x.data, x.stride[0], x.stride[1], x.stride[2]}, x.dtype,
                      static_cast<int>(x.shape[2]), first_block, stream_of(stream));
}

void decode(const SideTables& side, const CudaArray& blob, const CudaArray& code_array,
            int first_block, const CudaArray& y_array, uintptr_t stream) {
  const TensorView y = view_of(y_array, "cuda_decode", "y"),
                   codes = view_of(code_array, "cuda_decode", "codes");
  const cuda::PackedSide packed = packed_of(side, blob, codes);
  require(
      y.ndim == 4 && y.dtype == DType::float16 && y.shape[0] == codes.shape[0] &&
          y.shape[1] == codes.shape[1] && y.shape[2] % kBlockTokens == 0 &&
          y.shape[3] == packed.format.head_dim && y.stride[3] == 1 && y.stride[2] == y.shape[3] &&
          first_block >= 0 && first_block + y.shape[2] / kBlockTokens <= codes.shape[2],
      "[cuda_decode] y: got another shape, wanted float16 [", codes.shape[0], ", ", codes.shape[1],
      ", whole blocks, ", packed.format.head_dim, "] of the ", codes.shape[2], " blocks");
  cuda::decode_blocks(packed, static_cast<int>(codes.shape[0]), first_block,
                      static_cast<int>(y.shape[2] / kBlockTokens), const_cast<void*>(y.data),
                      y.stride[0], y.stride[1], stream_of(stream));
}

// portable [B, H, n, block_bytes] <-> codes [B, H, n, cuda_block_bytes], both contiguous.
void pack(const SideTables& side, const CudaArray& portable_array, const CudaArray& code_array,
          bool unpack, uintptr_t stream) {
  const TensorView portable = view_of(portable_array, "cuda_pack", "portable"),
                   codes = view_of(code_array, "cuda_pack", "codes");
  const cuda::SideFormat& f = side.prepared().format;
  require(portable.ndim == 4 && codes.ndim == 4 && portable.dtype == DType::uint8 &&
              codes.dtype == DType::uint8 && portable.shape[3] == side.codec()->block_bytes() &&
              codes.shape[3] == f.block_bytes() && portable.shape[0] == codes.shape[0] &&
              portable.shape[1] == codes.shape[1] && portable.shape[2] == codes.shape[2] &&
              codes.stride[0] == codes.stride[1] * codes.shape[1] &&
              codes.stride[1] == codes.shape[2] * codes.shape[3] &&
              portable.stride[1] == portable.shape[2] * portable.shape[3],
          "[cuda_pack] portable, codes: got shapes that do not go together, wanted contiguous "
          "uint8 [B, H, blocks, block_bytes] and [B, H, blocks, cuda_block_bytes]");
  const int64_t pairs = codes.shape[0] * codes.shape[1];
  uint8_t* fragments = static_cast<uint8_t*>(const_cast<void*>(codes.data));
  uint8_t* plain = static_cast<uint8_t*>(const_cast<void*>(portable.data));
  const int n_blocks = static_cast<int>(codes.shape[2]);
  if (unpack) {
    cuda::unpack_blocks(f, fragments, pairs, n_blocks, codes.stride[1], plain, stream_of(stream));
  } else {
    cuda::pack_blocks(f, plain, pairs, n_blocks, fragments, codes.stride[1], stream_of(stream));
  }
}

}  // namespace

void bind_cuda(nb::module_& m) {
  m.def("cuda_built", &cuda::built, "Whether the kernels are in this build.");
  m.def("cuda_device_name", &cuda::device_name);
  m.def("cuda_encode", &encode, "side"_a, "blob"_a, "x"_a, "codes"_a, "first_block"_a, "stream"_a);
  m.def("cuda_decode", &decode, "side"_a, "blob"_a, "codes"_a, "first_block"_a, "y"_a, "stream"_a);
  m.def("cuda_pack", &pack, "side"_a, "portable"_a, "codes"_a, "unpack"_a, "stream"_a);
  m.def(
      "cuda_advance",
      [](uintptr_t lengths, int batch, int sinks, int window, uintptr_t stream) {
        cuda::advance_lengths(reinterpret_cast<int32_t*>(lengths), batch, sinks, window,
                              stream_of(stream));
      },
      "lengths"_a, "batch"_a, "sinks"_a, "window"_a, "stream"_a);
  nb::class_<CudaLayer>(m, "CudaLayer")
      .def(nb::init<const SideTables&, const SideTables&, CudaArray, CudaArray, int, int, int>(),
           "keys"_a, "values"_a, "key_blob"_a, "value_blob"_a, "n_q_heads"_a, "sinks"_a, "window"_a)
      .def("bind", &CudaLayer::bind, "key_codes"_a, "value_codes"_a, "exact_keys"_a,
           "exact_values"_a, "lengths"_a)
      .def("workspace_bytes", &CudaLayer::workspace_bytes)
      .def("append", &CudaLayer::append)
      .def("attend", &CudaLayer::attend);
}

}  // namespace veloxquant
