// Bytes that decode attention asks of packed blocks, by codec and query heads of a KV head.
#include <cstdio>
#include <functional>
#include <map>

#include "src/attention/decode_metal_sides.h"

namespace veloxquant::attention {
namespace {

// A method's case, by number; it has the tables of the codecs made from it.
const test::CodecCase& case_of(const std::string& method, int head_dim, int number) {
  static std::map<std::pair<std::string, int>, test::Cases> cases;
  test::Cases& own = cases[{method, head_dim}];
  if (own.empty()) own = test::codec_cases(method, head_dim);
  return *own.at(number);
}

struct Pair {
  const char* name;
  std::function<MetalSide(const Case&)> keys, values;
};

std::vector<Pair> pairs() {
  const auto vectors = [](Side side, Codes codes) {
    return [=](const Case& c) {
      test::Random random(11);
      return vecinfer_side(random, side, c, codes);
    };
  };
  const auto scalar = [](Side side, int bits, int stages) {
    return [=](const Case& c) { return scalar_side(side, c, bits, stages); };
  };
  const auto planes = [](Side side, int bits, bool mean) {
    return [=](const Case& c) { return rabitq_side(side, c, bits, mean); };
  };
  const auto prod = [](Side side, int bits) {
    return [=](const Case& c) { return prod_side(side, c, bits); };
  };
  const auto exact = [](Side side) {
    return [=](const Case& c) { return exact_side(side, c, DType::float16); };
  };
  const auto outliers = [](int number) {
    return [=](const Case& c) { return outlier_side(case_of("qjl", c.head_dim, number)); };
  };
  const auto turned = [](const char* method, int number) {
    return [=](const Case& c) { return turned_side(case_of(method, c.head_dim, number)); };
  };
  const Side K = Side::keys, V = Side::values;
  std::vector<Pair> all = {
      {"vecinfer d4x256", vectors(K, {4, 256}), vectors(V, {4, 256})},
      {"vecinfer d2x16 / d4x64", vectors(K, {2, 16}), vectors(V, {4, 64})},
      {"vecinfer d4x1000 / d8x4096", vectors(K, {4, 1000, false}), vectors(V, {8, 4096, false})},
  };
  for (int bits = 1; bits <= 4; ++bits) {
    static const char* names[] = {"turboquant 1 bit", "turboquant 2 bits", "turboquant 3 bits",
                                  "turboquant 4 bits"};
    all.push_back({names[bits - 1], scalar(K, bits, 1), scalar(V, bits, 1)});
  }
  all.push_back({"rvq 1 + 1 / 3 + 3 bits", scalar(K, 1, 2), scalar(V, 3, 2)});
  all.push_back({"rvq 2 + 2 / 4 + 4 bits", scalar(K, 2, 2), scalar(V, 4, 2)});
  all.push_back({"prod 1 / 1 bits", prod(K, 1), prod(V, 1)});
  all.push_back({"prod 2 / 3 bits", prod(K, 2), prod(V, 3)});
  all.push_back({"prod 4 / 4 bits", prod(K, 4), prod(V, 4)});
  all.push_back({"rabitq 1 / 2 bits", planes(K, 1, false), planes(V, 2, false)});
  all.push_back({"rabitq 3 / 4 bits, means", planes(K, 3, true), planes(V, 4, true)});
  all.push_back({"qjl, 128 signs / rabitq 1 bit", [](const Case& c) { return qjl_side(c, 1); },
                 planes(V, 1, true)});
  all.push_back({"qjl, 256 signs / rabitq 3 bits", [](const Case& c) { return qjl_side(c, 2); },
                 planes(V, 3, false)});
  all.push_back({"qjl, 3 outliers / exact", outliers(3), exact(V)});
  all.push_back({"qjl, 4 chosen / exact", outliers(5), exact(V)});
  all.push_back({"exact", exact(K), exact(V)});
  all.push_back({"commvq 4x64 / turboquant 2", turned("commvq", 0), scalar(V, 2, 1)});
  all.push_back({"commvq 3x11 / turboquant 2", turned("commvq", 1), scalar(V, 2, 1)});
  all.push_back(
      {"vecinfer_rope d2x16 / turboquant 2", turned("vecinfer_rope", 0), scalar(V, 2, 1)});
  all.push_back(
      {"vecinfer_rope d4x100 / turboquant 2", turned("vecinfer_rope", 1), scalar(V, 2, 1)});
  return all;
}

// Every packed byte once, whatever the group: by loads of simdgroups, without the help of a cache.
void check_traffic(const Pair& pair, int head_dim, int group) {
  const std::string what = std::string(pair.name) + ", head_dim " + std::to_string(head_dim) +
                           ", " + std::to_string(group) + " query heads";
  SCOPED_TRACE(what);
  msl::Options options;
  options.loads = true;
  options.both_orders = false;
  const int blocks = 3;
  Case c = decode_case(head_dim, group, 64 * blocks + 4 + 64);
  c.n_kv_heads = test::kCaseHeads;
  c.scale *= 0.25f;  // commvq's keys are long
  const MetalSide keys = pair.keys(c), values = pair.values(c);
  const msl::Report report = check(c, keys, values, 1, options)[0];
  const auto loaded = [&](const char* name) {
    return static_cast<double>(report.buffers.at(name).loaded);
  };
  const int all = blocks * c.n_kv_heads;
  const double k = static_cast<double>(all * keys.codec->block_bytes());
  const double v = static_cast<double>(all * values.codec->block_bytes());
  EXPECT_LE(loaded("k0"), 1.05 * k);
  EXPECT_LE(loaded("v0"), 1.05 * v);
  std::printf("%s: keys %.2f, values %.2f of packed, tables %.1f bytes a token\n", what.c_str(),
              loaded("k0") / k, loaded("v0") / v,
              (loaded("k_tables") + loaded("v_tables")) / (64 * all));
}

TEST(MetalTraffic, EveryCodecLoadsPackedBytesOnce) {
  for (const Pair& pair : pairs()) {
    for (int group : {1, 8}) check_traffic(pair, 128, group);
  }
}

// Queries of 768 numbers, all of them beside their weights in threadgroup memory.
TEST(MetalTraffic, LongSketchesOfEightQueryHeads) {
  for (const Pair& pair : pairs()) {
    if (std::string(pair.name) == "qjl, 4 chosen / exact") check_traffic(pair, 256, 8);
  }
}

TEST(MetalTraffic, AtOtherGroupsAndHeadDims) {
  int i = 0;
  for (const Pair& pair : pairs()) {
    check_traffic(pair, 80, 2 + i % 3);
    check_traffic(pair, i % 2 == 0 ? 64 : 256, 5 + i % 3);
    check_traffic(pair, 96, 1 + i % 8);
    ++i;
  }
}

}  // namespace
}  // namespace veloxquant::attention
