// Encode and decode of blocks that lie anywhere, run on the MSL machine: the CPU's bytes and bits.
#include <gtest/gtest.h>

#include "src/attention/device_codec.h"
#include "src/codecs/placed_calls.h"
#include "tests/msl/support.h"
#include "tests/support/ragged_problem.h"

namespace veloxquant::attention {
namespace {

using metal::Type;
using msl::Input;
using test::ragged_codec;

Input of_blob(const DeviceCodec& codec, const BlobArray& array) {
  return Input(array.type, array.shape, codec.blob.data() + array.at);
}

// Tokens [H-major rows] of two sequences into blocks 1 .. of a storage, and back.
void check(const std::string& method, const std::string& what, Side side, int dim, bool paged,
           int n_tokens) {
  SCOPED_TRACE(method + " " + what + (paged ? " paged" : ""));
  const test::CasePtr one = ragged_codec(method, what, side, dim);
  const auto codec = device_codec(one->spec(), one->tables());
  const int64_t B = 2, H = codec->n_kv_heads, D = dim, bytes = codec->block_bytes;
  const int n_blocks = (n_tokens + 63) / 64, room = n_blocks + 2, first = 1;
  PlacedShape s;
  s.kernels = codec->kernels;
  s.batch = 2, s.heads = static_cast<int>(H), s.n_sequences = codec->n_sequences, s.paged = paged;
  // x [B][n][H][D] with a gap: heads inside tokens.
  test::ExactRandom random(7);
  const int64_t token = H * D + 8, per_sequence = n_tokens * token;
  std::vector<float> wide = random.values(B * per_sequence);
  const msl::Values x(wide, Type::bfloat16);
  const int64_t x_steps[3] = {per_sequence, D, token};
  const std::vector<int32_t> table = {3, 1, 6, 2, 0, 5, 4, 7};
  const int pool = 2 * room;
  ASSERT_LE(pool, 8);
  const int64_t steps[3] = {H * room * bytes, paged ? bytes : room * bytes,
                            paged ? H * bytes : bytes};
  const int32_t range[kRangeNumbers] = {n_tokens, first, pool, room};
  const int64_t total = B * H * room * bytes;

  metal::Call call = placed_encode_call(s, n_blocks);
  call.launch.outputs[0].shape = {total};
  std::vector<Input> inputs = {x.input({static_cast<int64_t>(wide.size())}),
                               Input(Type::int64, {3}, x_steps), Input(Type::int64, {3}, steps),
                               Input(Type::int32, {kRangeNumbers}, range)};
  if (paged) inputs.emplace_back(Type::int32, std::vector<int64_t>{B, room}, table.data());
  for (const BlobArray& array : codec->encode_arrays) inputs.push_back(of_blob(*codec, array));
  msl::Options options;
  options.all_written = false;
  const std::vector<uint8_t> made = msl::run(*call.kernel, call.launch, inputs, options).outputs[0];
  std::vector<uint8_t> want(bytes);
  std::vector<float> rows(64 * D), want_rows(64 * D);
  const auto at = [&](int b, int h, int n) {
    const int64_t number = paged ? table[b * room + first + n] : first + n;
    return (paged ? 0 : b * steps[0]) + h * steps[1] + number * steps[2];
  };
  for (int b = 0; b < B; ++b) {
    for (int h = 0; h < H; ++h) {
      for (int n = 0; n < n_blocks; ++n) {
        const int count = std::min(64, n_tokens - 64 * n);
        for (int t = 0; t < count; ++t) {
          std::copy_n(&x.wide[b * per_sequence + (64 * n + t) * token + h * D], D, &rows[t * D]);
        }
        one->codec().encode_block(Backend::reference, {b, h, 0}, rows.data(), count, want.data());
        EXPECT_TRUE(std::equal(want.begin(), want.end(), made.begin() + at(b, h, n)))
            << b << " " << h << " " << n;
      }
    }
  }

  const int64_t out_steps[2] = {H * n_blocks * 64 * D, n_blocks * 64 * D};
  call = placed_decode_call(s, n_blocks);
  call.launch.outputs[0].shape = {B * H * n_blocks * 64 * D};
  inputs = {Input(Type::uint8, {total}, made.data()), Input(Type::int64, {2}, out_steps),
            Input(Type::int64, {3}, steps), Input(Type::int32, {kRangeNumbers}, range)};
  if (paged) inputs.emplace_back(Type::int32, std::vector<int64_t>{B, room}, table.data());
  for (const BlobArray& array : codec->decode_arrays) inputs.push_back(of_blob(*codec, array));
  const auto decoded = msl::run(*call.kernel, call.launch, inputs).output<float>(0);
  for (int b = 0; b < B; ++b) {
    for (int h = 0; h < H; ++h) {
      for (int n = 0; n < n_blocks; ++n) {
        one->codec().decode_block(Backend::reference, {b, h, 0}, made.data() + at(b, h, n), 64,
                                  want_rows.data(), D);
        EXPECT_TRUE(std::equal(want_rows.begin(), want_rows.end(),
                               decoded.begin() + b * out_steps[0] + h * out_steps[1] + n * 64 * D))
            << b << " " << h << " " << n;
      }
    }
  }
}

TEST(PlacedMetal, EqualBytesAndBitsWhereverTheyLie) {
  for (bool paged : {false, true}) {
    check("vecinfer", "4x256 hadamard head", Side::keys, 64, paged, paged ? 65 : 128);
    check("turboquant", "3 unbiased", Side::keys, 64, paged, 70);
  }
  check("vecinfer", "2x16 dense", Side::values, 64, true, 100);
  check("vecinfer", "8x1000 none", Side::values, 80, false, 65);
  check("turboquant", "2 prod", Side::values, 64, true, 64);
  check("turboquant_rvq", "2", Side::values, 96, false, 128);
  check("rabitq", "3 mean", Side::keys, 64, true, 90);
  check("rabitq", "1", Side::values, 128, false, 64);
  check("qjl", "1", Side::keys, 64, true, 100);
  check("qjl", "2 outliers", Side::keys, 64, false, 70);
  check("qjl", "1 outliers fixed", Side::keys, 64, true, 64);
}

}  // namespace
}  // namespace veloxquant::attention
