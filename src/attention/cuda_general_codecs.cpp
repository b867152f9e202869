// The host's part of veloxquant/cuda_general.h: without CUDA too.
#include "src/attention/device_codec.h"
#include "veloxquant/cuda_general.h"

namespace veloxquant::cuda {

int64_t GpuCodec::block_bytes() const { return codec_->block_bytes; }
const std::vector<uint8_t>& GpuCodec::blob() const { return codec_->blob; }

GpuCodec prepare_codec(const CodecSpec& spec, const CodecTables& tables) {
  return GpuCodec(attention::device_codec(spec, tables));
}
GpuCodec prepare_codec(const SideFormat& format) {
  return GpuCodec(attention::device_codec(format));
}

}  // namespace veloxquant::cuda
