// Codecs of every method over seeded tables: what the conformance suite, the golden files and the
// fuzzer run on. Adding a codec: a function below, or in a header of its own, and a line in
// case_makers().
#pragma once

#include <functional>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "src/math/hadamard.h"
#include "tests/support/exact_random.h"
#include "veloxquant/codec_spec.h"
#include "veloxquant/rope.h"

namespace veloxquant::test {

constexpr int kCaseHeads = 2;

// A codec with the arrays that it views.
class CodecCase {
 public:
  CodecCase(std::string label, std::string method, Side side, int head_dim,
            int n_kv_heads = kCaseHeads)
      : label_(std::move(label)) {
    spec_.method = std::move(method);
    spec_.side = side;
    spec_.n_kv_heads = n_kv_heads;
    spec_.head_dim = head_dim;
  }

  CodecCase& option(const std::string& name, CodecOption value) {
    spec_.options[name] = std::move(value);
    return *this;
  }
  CodecCase& table(const std::string& name, std::vector<float> data,
                   std::initializer_list<int64_t> shape) {
    floats_.push_back(std::move(data));
    tables_[name] = TensorView(floats_.back().data(), DType::float32, shape);
    return *this;
  }
  CodecCase& table(const std::string& name, std::vector<uint16_t> float16,
                   std::initializer_list<int64_t> shape) {
    halves_.push_back(std::move(float16));
    tables_[name] = TensorView(halves_.back().data(), DType::float16, shape);
    return *this;
  }
  CodecCase& table(const std::string& name, std::vector<int32_t> data,
                   std::initializer_list<int64_t> shape) {
    integers_.push_back(std::move(data));
    tables_[name] = TensorView(integers_.back().data(), DType::int32, shape);
    return *this;
  }
  // Something is chosen for a block as a whole: a token's codes depend on its neighbours.
  CodecCase& shares_a_block() {
    shares_a_block_ = true;
    return *this;
  }
  CodecCase& make() {
    codec_ = make_codec(spec_, tables_);
    return *this;
  }

  const Codec& codec() const { return *codec_; }
  CodecPtr codec_ptr() const { return codec_; }
  const CodecSpec& spec() const { return spec_; }
  const CodecTables& tables() const { return tables_; }
  const TensorView& given(const std::string& table) const { return tables_.at(table); }
  bool has_table(const std::string& table) const { return tables_.count(table) != 0; }
  std::string label() const { return spec_.method + " " + label_; }
  bool tokens_are_independent() const { return !shares_a_block_; }

 private:
  std::string label_;
  bool shares_a_block_ = false;
  CodecSpec spec_;
  std::list<std::vector<float>> floats_;
  std::list<std::vector<uint16_t>> halves_;
  std::list<std::vector<int32_t>> integers_;
  CodecTables tables_;
  CodecPtr codec_;
};

inline int64_t integer_option(const CodecCase& one, const char* name, int64_t otherwise) {
  const auto it = one.spec().options.find(name);
  return it == one.spec().options.end() ? otherwise : std::get<int64_t>(it->second);
}

// Of a codec of keys before RoPE.
inline RopeSpec rope_spec(const CodecCase& one) {
  RopeSpec spec;
  spec.head_dim = one.spec().head_dim;
  spec.traditional = integer_option(one, "traditional", 0) != 0;
  const auto factor = one.spec().options.find("attention_factor");
  if (factor != one.spec().options.end()) {
    spec.attention_factor = static_cast<float>(std::get<double>(factor->second));
  }
  const TensorView& frequencies = one.given("inv_freq");
  const auto* numbers = static_cast<const float*>(frequencies.data);
  spec.inv_freq.assign(numbers, numbers + frequencies.shape[0]);
  return spec;
}

using CasePtr = std::shared_ptr<const CodecCase>;
using Cases = std::vector<CasePtr>;
using CaseMaker = std::function<Cases(int head_dim)>;

inline Cases exact_cases(int head_dim) {
  Cases cases;
  for (const char* dtype : {"float16", "bfloat16"}) {
    auto one = std::make_shared<CodecCase>(dtype, "exact", Side::keys, head_dim);
    one->option("dtype", std::string(dtype)).make();
    cases.push_back(one);
  }
  return cases;
}

inline Cases vecinfer_cases(int head_dim) {
  struct Tables {
    int sub_dim, n_centroids;
    bool per_head;
    const char* transform;
  };
  Cases cases;
  for (const Tables& t : {Tables{4, 256, false, "hadamard"}, Tables{2, 16, true, "none"},
                          Tables{8, 200, true, "dense"}, Tables{2, 64, false, "hadamard"},
                          Tables{8, 1000, true, "none"}}) {
    ExactRandom random(static_cast<uint64_t>(head_dim * 1000 + t.n_centroids));
    const int m = head_dim / t.sub_dim, groups = t.per_head ? 1 : m;
    auto one = std::make_shared<CodecCase>(
        "d" + std::to_string(t.sub_dim) + "x" + std::to_string(t.n_centroids) + " " + t.transform,
        "vecinfer", Side::keys, head_dim);
    one->option("n_subvectors", int64_t{m}).option("transform", std::string(t.transform));
    one->table("tables", random.halves(int64_t{kCaseHeads} * groups * t.n_centroids * t.sub_dim),
               {kCaseHeads, groups, t.n_centroids, t.sub_dim});
    if (std::string(t.transform) == "hadamard") {
      std::vector<float> scale;
      for (int i = 0; i < kCaseHeads * head_dim; ++i) scale.push_back(random.scale());
      one->table("scale", scale, {kCaseHeads, head_dim});
    }
    if (std::string(t.transform) == "dense") {
      // Any matrix will do: the suite compares backends, not reconstructions.
      std::vector<float> matrix = random.values(int64_t{kCaseHeads} * head_dim * head_dim);
      for (float& v : matrix) v *= hadamard_scale(hadamard_block(head_dim));
      one->table("encode_matrix", matrix, {kCaseHeads, head_dim, head_dim});
    }
    one->make();
    cases.push_back(one);
  }
  return cases;
}

inline Cases rabitq_cases(int head_dim) {
  Cases cases;
  const char* const scales[] = {"unbiased", "reconstruction", "norm", "unbiased"};
  for (int bits = 1; bits <= 4; ++bits) {
    const bool has_mean = bits % 2 == 0;
    auto one = std::make_shared<CodecCase>(
        std::to_string(bits) + " bits " + scales[bits - 1] + (has_mean ? " mean" : ""), "rabitq",
        Side::keys, head_dim);
    one->option("bits", int64_t{bits}).option("scale", std::string(scales[bits - 1]));
    one->option("seed", int64_t{bits});
    if (has_mean) {
      ExactRandom random(static_cast<uint64_t>(head_dim + bits));
      one->table("mean", random.values(int64_t{kCaseHeads} * head_dim), {kCaseHeads, head_dim});
    }
    one->make();
    cases.push_back(one);
  }
  return cases;
}

inline Cases qjl_cases(int head_dim) {
  Cases cases;
  for (int blocks : {1, 2}) {
    for (bool outliers : {false, true}) {
      auto one = std::make_shared<CodecCase>(
          std::to_string(blocks) + (outliers ? " blocks, outliers" : " blocks"), "qjl", Side::keys,
          head_dim);
      one->option("sketch_bits", int64_t{blocks} * head_dim);
      if (outliers) {
        one->option("outliers", int64_t{3});
        one->table("outlier_channels", std::vector<int32_t>{7, 0, 4, 1, 2, 3}, {kCaseHeads, 3});
      }
      one->make();
      cases.push_back(one);
    }
  }
  ExactRandom random(static_cast<uint64_t>(head_dim));
  auto dense = std::make_shared<CodecCase>("given sketch", "qjl", Side::keys, head_dim);
  dense->table("sketch", random.values(int64_t{24} * head_dim), {24, head_dim}).make();
  cases.push_back(dense);
  auto chosen = std::make_shared<CodecCase>("chosen outliers", "qjl", Side::keys, head_dim);
  chosen->option("sketch_bits", int64_t{2} * head_dim).option("outliers", int64_t{4});
  chosen->shares_a_block().make();
  cases.push_back(chosen);
  return cases;
}

inline Cases commvq_cases(int head_dim) {
  struct Tables {
    int n_stages, n_entries, rotary_dims;
    bool traditional, weighted;
  };
  Cases cases;
  for (const Tables& t :
       {Tables{4, 64, head_dim, false, true}, Tables{3, 11, head_dim / 2, true, false}}) {
    ExactRandom random(static_cast<uint64_t>(head_dim * 1000 + t.n_entries));
    const int pairs = head_dim / 2;
    auto one =
        std::make_shared<CodecCase>(std::to_string(t.n_stages) + "x" + std::to_string(t.n_entries),
                                    "commvq", Side::keys, head_dim);
    one->option("traditional", int64_t{t.traditional}).option("attention_factor", 1.25);
    one->table("codebook",
               random.halves(int64_t{kCaseHeads} * t.n_stages * t.n_entries * 2 * pairs),
               {kCaseHeads, t.n_stages, t.n_entries, 2, pairs});
    std::vector<float> frequencies;
    for (int j = 0; j < t.rotary_dims / 2; ++j) {
      frequencies.push_back(1.0f / static_cast<float>(1 + 3 * j * j));
    }
    one->table("inv_freq", frequencies, {t.rotary_dims / 2});
    if (t.weighted) {
      std::vector<float> weight;
      for (int i = 0; i < kCaseHeads * pairs; ++i) weight.push_back(random.scale());
      one->table("weight", weight, {kCaseHeads, pairs});
    }
    one->make();
    cases.push_back(one);
  }
  return cases;
}

inline Cases vecinfer_rope_cases(int head_dim) {
  Cases cases;
  for (int sub_dim : {2, 4}) {
    ExactRandom random(static_cast<uint64_t>(head_dim * 1000 + sub_dim));
    const int pairs = head_dim / 2, m = head_dim / sub_dim, n_centroids = sub_dim == 2 ? 16 : 100;
    auto one = std::make_shared<CodecCase>(
        "d" + std::to_string(sub_dim) + "x" + std::to_string(n_centroids), "vecinfer_rope",
        Side::keys, head_dim);
    one->option("n_subvectors", int64_t{m}).option("traditional", int64_t{sub_dim == 2});
    one->table("tables", random.halves(int64_t{kCaseHeads} * m * n_centroids * sub_dim),
               {kCaseHeads, m, n_centroids, sub_dim});
    std::vector<int32_t> order;
    std::vector<float> weight, frequencies;
    for (int h = 0; h < kCaseHeads; ++h) {
      for (int j = 0; j < pairs; ++j) {
        order.push_back((j * 3 + h) % pairs);  // a permutation: no head_dim here has 3 | pairs ...
        weight.push_back(random.scale());
      }
      if (pairs % 3 == 0) {  // ... but 48 and 96
        for (int j = 0; j < pairs; ++j) order[h * pairs + j] = pairs - 1 - j;
      }
    }
    for (int j = 0; j < head_dim / 4; ++j) {  // half of the dimensions turn
      frequencies.push_back(1.0f / static_cast<float>(1 + 3 * j * j));
    }
    one->table("order", order, {kCaseHeads, pairs}).table("weight", weight, {kCaseHeads, pairs});
    one->table("inv_freq", frequencies, {head_dim / 4});
    one->make();
    cases.push_back(one);
  }
  return cases;
}

inline Cases turboquant_cases(int head_dim);  // scalar_cases.h
inline Cases turboquant_rvq_cases(int head_dim);

inline const std::map<std::string, CaseMaker>& case_makers() {
  static const std::map<std::string, CaseMaker> makers{
      {"commvq", commvq_cases},
      {"exact", exact_cases},
      {"qjl", qjl_cases},
      {"rabitq", rabitq_cases},
      {"turboquant", turboquant_cases},
      {"turboquant_rvq", turboquant_rvq_cases},
      {"vecinfer", vecinfer_cases},
      {"vecinfer_rope", vecinfer_rope_cases},
  };
  return makers;
}

// Empty where the codec has no such head_dim; an Error names a method without cases.
inline Cases codec_cases(const std::string& method, int head_dim) {
  const auto maker = case_makers().find(method);
  require(maker != case_makers().end(), "[codec_cases] method: got '", method,
          "', wanted one with a line in case_makers() (tests/support/codec_cases.h)");
  return maker->second(head_dim);
}

// Rows that are hard in one way or another: bell-shaped, zeros, one outlier channel, tiny, large,
// constant, alternating signs, negative zeros.
inline std::vector<float> case_rows(ExactRandom& random, int64_t n, int head_dim) {
  std::vector<float> x = random.values(n * head_dim);
  for (int64_t t = 0; t < n; ++t) {
    float* row = x.data() + t * head_dim;
    const int kind = t < 40 ? 0 : random.below(12);
    for (int i = 0; i < head_dim; ++i) {
      if (kind == 1) row[i] = 0.0f;
      if (kind == 2 && i == static_cast<int>(t) % head_dim) row[i] *= 100.0f;
      if (kind == 3) row[i] *= 0x1p-40f;
      if (kind == 4) row[i] *= 0x1p+12f;
      if (kind == 5) row[i] = row[0];
      if (kind == 6) row[i] = (i & 1) ? -1.0f : 1.0f;
      if (kind == 7) row[i] = -0.0f;
    }
  }
  return x;
}

}  // namespace veloxquant::test

#include "tests/support/scalar_cases.h"
