// What the CUDA functions are in a library built without CUDA: one clear Error.
#ifndef VELOXQUANT_HAVE_CUDA

#include "veloxquant/cuda_general.h"

namespace veloxquant::cuda {
namespace {

[[noreturn]] void absent(const char* what) {
  fail("[", what,
       "] CUDA: got a library built without it, wanted one configured with -DVELOXQUANT_CUDA=ON "
       "and nvcc");
}

}  // namespace

bool built() { return false; }
std::string device_name() { absent("device_name"); }
int64_t decode_workspace_bytes(const DecodeArgs&) { absent("decode_workspace_bytes"); }
void decode_attention(const DecodeArgs&, Stream) { absent("decode_attention"); }
void pack_blocks(const SideFormat&, const uint8_t*, int64_t, int, uint8_t*, int64_t, Stream) {
  absent("pack_blocks");
}
void unpack_blocks(const SideFormat&, const uint8_t*, int64_t, int, int64_t, uint8_t*, Stream) {
  absent("unpack_blocks");
}
void encode_blocks(const PackedSide&, uint8_t*, int, const ExactSide&, DType, int, int, Stream) {
  absent("encode_blocks");
}
void decode_blocks(const PackedSide&, int, int, int, void*, int64_t, int64_t, Stream) {
  absent("decode_blocks");
}
void advance_lengths(int32_t*, int, int, int, Stream) { absent("advance_lengths"); }
void append_token(const AppendArgs&, Stream) { absent("append_token"); }

int64_t attend_workspace_bytes(const AttendArgs&) { absent("attend_workspace_bytes"); }
void prepare_attend(const AttendArgs&) { absent("prepare_attend"); }
std::string attend_kernel(const AttendArgs&) { absent("attend_kernel"); }
void attend(const AttendArgs&, Stream) { absent("attend"); }
void encode_blocks(const BlockSide&, const BlockTable&, int, const ExactSide&, DType, int, int,
                   Stream) {
  absent("encode_blocks");
}
void decode_blocks(const BlockSide&, const BlockTable&, int, int, int, float*, int64_t, int64_t,
                   Stream) {
  absent("decode_blocks");
}
void prepare_append(const BlockAppendArgs&) { absent("prepare_append"); }
void append_token(const BlockAppendArgs&, Stream) { absent("append_token"); }

}  // namespace veloxquant::cuda
#endif
