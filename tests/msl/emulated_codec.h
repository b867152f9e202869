// `metal-emulated`: a codec's blocks by its Metal kernels on the MSL machine, as a test takes a
// backend.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <utility>

#include "src/codecs/commvq/kernel_calls.h"
#include "src/codecs/exact/kernel_calls.h"
#include "src/codecs/qjl/kernel_calls.h"
#include "src/codecs/rabitq/kernel_calls.h"
#include "src/codecs/rope/kernel_calls.h"
#include "src/codecs/rotation.h"
#include "src/codecs/turboquant/kernel_calls.h"
#include "src/codecs/turboquant/sketch.h"
#include "src/codecs/vecinfer/format.h"
#include "src/codecs/vecinfer/kernel_calls.h"
#include "tests/msl/support.h"
#include "tests/support/codec_cases.h"

namespace veloxquant::msl {

class EmulatedCodec {
 public:
  // One head of a case of the suites, for a block at `position`. Throws Fault for a method without
  // kernels.
  EmulatedCodec(const test::CodecCase& one, int head, int64_t position = 0)
      : dim_(one.codec().head_dim()) {
    const std::string& method = one.spec().method;
    if (method == "vecinfer") {
      vecinfer(one, head);
    } else if (method == "rabitq") {
      rabitq(one, head);
    } else if (method == "vecinfer_rope") {
      vecinfer_rope(one, head, position);
    } else if (method == "commvq") {
      commvq(one, head, position);
    } else if (method == "qjl") {
      qjl(one, head);
    } else if (method == "turboquant" || method == "turboquant_rvq") {
      scalar(one);
    } else if (method == "exact") {
      exact_blocks(one);
    } else {
      throw Fault("no Metal kernels of " + method);
    }
    block_bytes_ = one.codec().block_bytes();
  }

  std::vector<uint8_t> encode(const std::vector<float>& x, int n_tokens) const {
    std::vector<Input> inputs = encode_inputs_;
    const std::vector<float> given = rope_ ? slots(x, n_tokens, RopeDirection::inverse) : x;
    inputs.insert(inputs.begin(), floats(given, {1, 1, n_tokens, dim_}));
    const metal::Call call = encode_(n_tokens);
    return run(*call.kernel, call.launch, inputs).outputs[0];
  }
  std::vector<float> decode(const std::vector<uint8_t>& block, int n_tokens) const {
    std::vector<Input> inputs = decode_inputs_;
    inputs.insert(inputs.begin(), Input(metal::Type::uint8, {1, 1, 1, block_bytes_}, block.data()));
    const metal::Call call = decode_();
    std::vector<float> y = run(*call.kernel, call.launch, inputs).output<float>(0);
    if (rope_) y = slots(y, kBlockTokens, RopeDirection::forward);
    y.resize(static_cast<size_t>(n_tokens) * dim_);
    return y;
  }

  // What encoding n tokens, and decoding the block of them, executes (RoPE apart).
  std::pair<Counted, Counted> counts(const std::vector<float>& x, int n_tokens) const {
    std::vector<Input> inputs = encode_inputs_;
    inputs.insert(inputs.begin(), floats(x, {1, 1, n_tokens, dim_}));
    metal::Call call = encode_(n_tokens);
    const Counted encode = counted(*call.kernel, call.launch, inputs);
    const std::vector<uint8_t> block = run(*call.kernel, call.launch, inputs).outputs[0];
    inputs = decode_inputs_;
    inputs.insert(inputs.begin(), Input(metal::Type::uint8, {1, 1, 1, block_bytes_}, block.data()));
    call = decode_();
    return {encode, counted(*call.kernel, call.launch, inputs)};
  }

 private:
  static int choice(const test::CodecCase& one, const char* name,
                    std::initializer_list<const char*> values) {
    const auto& options = one.spec().options;
    const auto it = options.find(name);
    int i = 0;
    for (const char* value : values) {
      if (it != options.end() && std::get<std::string>(it->second) == value) return i;
      ++i;
    }
    return 0;
  }

  void exact_blocks(const test::CodecCase& one) {
    exact::BlockKernelShape s;
    s.dim = dim_;
    s.bfloat = choice(one, "dtype", {"float16", "bfloat16"}) == 1;
    set_calls(s, exact::encode_blocks_call, exact::decode_blocks_call);
  }

  void scalar(const test::CodecCase& one) {
    const turboquant::BlockKernelShape s = turboquant::block_shape_of(one.spec());
    const uint64_t seed = static_cast<uint64_t>(test::integer_option(one, "seed", 0));
    arrays_ = {turboquant::rotation_signs(dim_, seed),
               turboquant::quantizer_numbers(dim_, s.bits, s.stages),
               {0},
               {0}};
    std::vector<int64_t> square = {1};
    if (s.prod) {
      const auto sketch = turboquant::gaussian_sketch(dim_, seed);
      arrays_[2] = sketch->columns;
      arrays_[3] = sketch->rows;
      square = {dim_, dim_};
    }
    const Input numbers = floats(arrays_[1], {s.stages, 16});
    encode_inputs_ = {floats(arrays_[0], {2, dim_}), numbers, floats(arrays_[2], square)};
    decode_inputs_ = {numbers, floats(arrays_[3], square)};
    set_calls(s, turboquant::encode_blocks_call, turboquant::decode_blocks_call);
  }

  void rabitq(const test::CodecCase& one, int head) {
    const rabitq::BlockKernelShape s = rabitq::block_shape_of(one.spec(), one.has_table("mean"));
    const uint64_t seed = static_cast<uint64_t>(test::integer_option(one, "seed", 0));
    arrays_ = {turboquant::rotation_signs(dim_, seed), {0}};
    if (s.mean) {
      const auto* row = static_cast<const float*>(one.given("mean").at(head));
      arrays_[1].assign(row, row + dim_);
      Rotation(dim_, seed).forward(Backend::reference, arrays_[1].data(), 1);
    }
    const Input mean =
        floats(arrays_[1], s.mean ? std::vector<int64_t>{1, dim_} : std::vector<int64_t>{1});
    encode_inputs_ = {floats(arrays_[0], {2, dim_}), mean};
    decode_inputs_ = {mean};
    set_calls(s, rabitq::encode_blocks_call, rabitq::decode_blocks_call);
  }

  // RoPE undone before encoding, redone behind decoding, by their own kernels.
  std::vector<float> slots(const std::vector<float>& x, int n, RopeDirection direction) const {
    const bool back = direction == RopeDirection::forward;
    rope::SlotShape s;
    s.n_tokens = n, s.dim = dim_, s.planes = planes_;
    s.rotating = rope_->spec().rotary_dims() / 2;
    const rope::BlockTables tables = rope::block_tables(*rope_, direction, position_, 1);
    const auto size = static_cast<int64_t>(tables.cosines.size());
    const metal::Call call = back ? rope::from_slots_call(s) : rope::to_slots_call(s);
    return run(*call.kernel, call.launch,
               {floats(x, {1, 1, n, dim_}),
                Input(metal::Type::int32, {1, dim_ / 2, 3}, slot_numbers_.data()),
                floats(back ? inverse_weights_ : weights_, {1, dim_ / 2}),
                floats(tables.cosines, {size}), floats(tables.sines, {size})})
        .output<float>(0);
  }

  void set_rope(const test::CodecCase& one, int head, const std::vector<int32_t>& order,
                int64_t position) {
    rope_ = std::make_shared<Rope>(test::rope_spec(one));
    position_ = position;
    slot_numbers_ = rope::slot_numbers(*rope_, order);
    for (int32_t pair : order) {
      const float weight = one.has_table("weight")
                               ? static_cast<const float*>(one.given("weight").at(head))[pair]
                               : 1.0f;
      weights_.push_back(weight);
      inverse_weights_.push_back(1.0f / weight);
    }
  }

  void vecinfer_rope(const test::CodecCase& one, int head, int64_t position) {
    vecinfer(one, head);
    const auto* order = static_cast<const int32_t*>(one.given("order").at(head));
    set_rope(one, head, {order, order + dim_ / 2}, position);
  }

  void commvq(const test::CodecCase& one, int head, int64_t position) {
    std::vector<int32_t> order(dim_ / 2);
    std::iota(order.begin(), order.end(), 0);
    set_rope(one, head, order, position);
    planes_ = true;
    const TensorView& all = one.given("codebook");
    TensorView own = all;
    own.data = all.at(head);
    own.shape[0] = 1;
    commvq::BlockKernelShape s;
    s.dim = dim_;
    s.n_stages = static_cast<int>(all.shape[1]);
    s.n_entries = static_cast<int>(all.shape[2]);
    const commvq::StageProducts products = commvq::stage_products(own);
    arrays_ = {products.norms, products.cross};
    const Input entries(metal::Type::float16, {1, s.n_stages, s.n_entries, 2, dim_ / 2}, own.data);
    encode_inputs_ = {entries, floats(arrays_[0], {1, s.n_stages, 64}),
                      floats(arrays_[1], {1, s.n_stages, 64, 64})};
    decode_inputs_ = {entries};
    set_calls(s, commvq::encode_blocks_call, commvq::decode_blocks_call);
  }

  void qjl(const test::CodecCase& one, int head) {
    const int rows = one.has_table("sketch") ? static_cast<int>(one.given("sketch").shape[0]) : 0;
    const bool fixed = one.has_table("outlier_channels");
    const qjl::BlockKernelShape s = qjl::block_shape_of(one.spec(), rows, fixed);
    channels_ = {0};
    if (fixed) {
      const auto* row = static_cast<const int32_t*>(one.given("outlier_channels").at(head));
      channels_.assign(row, row + s.outliers);
      std::sort(channels_.begin(), channels_.end());
    }
    arrays_ = {{}, qjl::score_constants(s)};
    std::vector<int64_t> shape;
    if (s.dense) {
      const auto* matrix = static_cast<const float*>(one.given("sketch").data);
      arrays_[0].assign(matrix, matrix + rows * dim_);
      shape = {rows, dim_};
    } else {
      arrays_[0] =
          qjl::sketch_signs(s, static_cast<uint64_t>(test::integer_option(one, "seed", 0)));
      shape = {(s.layout.m + s.layout.m_out) / dim_, 2, dim_};
    }
    const Input sketch = floats(arrays_[0], shape);
    const Input channels(metal::Type::int32, {1, static_cast<int64_t>(channels_.size())},
                         channels_.data());
    encode_inputs_ = {sketch, channels};
    decode_inputs_ = {sketch, channels, floats(arrays_[1], {2})};
    set_calls(s, qjl::encode_blocks_call, qjl::decode_blocks_call);
  }

  void vecinfer(const test::CodecCase& one, int head) {
    const TensorView& tables = one.given("tables");
    vecinfer::BlockShape s;
    s.n_blocks = 1;
    s.dim = dim_;
    s.tables = static_cast<int>(tables.shape[1]);
    s.n_centroids = static_cast<int>(tables.shape[2]);
    s.sub_dim = static_cast<int>(tables.shape[3]);
    s.bits = vecinfer::code_bits(s.n_centroids);
    s.transform = choice(one, "transform", {"none", "hadamard", "dense"});
    arrays_ = {{0}};
    std::vector<int64_t> shape = {1};
    if (s.transform == 1) {
      const auto* scale = static_cast<const float*>(one.given("scale").at(head));
      arrays_[0].clear();
      for (int i = 0; i < dim_; ++i) arrays_[0].push_back(1.0f / scale[i]);
      shape = {1, dim_};
    }
    if (s.transform == 2) {
      const auto* matrix = static_cast<const float*>(one.given("encode_matrix").at(head));
      arrays_[0].assign(matrix, matrix + dim_ * dim_);
      shape = {1, dim_, dim_};
    }
    const Input entries(metal::Type::float16, {1, 1, s.tables, s.n_centroids, s.sub_dim},
                        tables.at(head));
    encode_inputs_ = {entries, floats(arrays_[0], shape)};
    decode_inputs_ = {entries};
    encode_ = [s](int) { return vecinfer::encode_blocks_call(s); };
    decode_ = [s] { return vecinfer::decode_blocks_call(s); };
  }

  template <class Shape>
  void set_calls(Shape s, metal::Call (*encode)(const Shape&),
                 metal::Call (*decode)(const Shape&)) {
    encode_ = [s, encode](int n_tokens) {
      Shape shape = s;
      shape.heads = 1;
      shape.n_tokens = n_tokens;
      return encode(shape);
    };
    s.heads = 1;
    s.n_tokens = 64;
    decode_ = [s, decode] { return decode(s); };
  }

  int dim_;
  int64_t block_bytes_ = 0;
  std::vector<std::vector<float>> arrays_;
  std::vector<int32_t> channels_;
  std::shared_ptr<const Rope> rope_;
  int64_t position_ = 0;
  bool planes_ = false;
  std::vector<int32_t> slot_numbers_;
  std::vector<float> weights_, inverse_weights_;
  std::vector<Input> encode_inputs_, decode_inputs_;
  std::function<metal::Call(int)> encode_;
  std::function<metal::Call()> decode_;
};

}  // namespace veloxquant::msl
