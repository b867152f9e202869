// A codec as the shared GPU kernels know it: which tile reads its blocks, which kernels make them,
// and its numbers (tables, signs, matrices) in one blob for the device.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "src/attention/kernel_calls.h"
#include "src/codecs/placed_calls.h"
#include "veloxquant/codec_spec.h"
#include "veloxquant/cuda.h"

namespace veloxquant::attention {

// An array of the blob, row-major, at a multiple of 16 bytes.
struct BlobArray {
  int64_t at = 0;
  metal::Type type = metal::Type::float32;
  std::vector<int64_t> shape;
};

struct DeviceCodec {
  std::string name;
  Side side = Side::keys;
  int n_kv_heads = 0, head_dim = 0, n_sequences = 1;
  int64_t block_bytes = 0;

  // Attention: see first_pass_call, second_pass_call, turn_queries_call.
  CodeFormat format;
  int transform = 0;
  BlobArray table, move, turn;  // turn: keys of transform 2
  std::string no_attention;     // why there is none; empty where there is

  // Shapes of one block of one head; inputs beside x or blocks, in the kernels' order.
  BlockKernels kernels;
  std::vector<BlobArray> encode_arrays, decode_arrays;
  std::string no_blocks;

  std::vector<uint8_t> blob;
  std::optional<cuda::SideFormat> fragments;  // codes in that order, numbers in that blob
};

// Throws Error for what make_codec refuses, and for a method without GPU kernels.
std::shared_ptr<const DeviceCodec> device_codec(const CodecSpec& spec, const CodecTables& tables);
// The blob is that of prepare_side(), which made the format; attention alone.
std::shared_ptr<const DeviceCodec> device_codec(const cuda::SideFormat& format);

}  // namespace veloxquant::attention
