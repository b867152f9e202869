// metal_texts FOLDER: kernels as Apple's compiler would be given them by MLX, each in a file of its
// own, for a .metallib (cmake/metallib.cmake). One launch of every family: a proof that the text
// compiles; what runs is compiled by MLX for the shapes that it meets.
#include <cstdio>
#include <fstream>
#include <map>

#include "src/attention/rvq_calls.h"
#include "src/cache/kernel_calls.h"
#include "src/codecs/commvq/kernel_calls.h"
#include "src/codecs/kernel_calls.h"
#include "src/codecs/qjl/kernel_calls.h"
#include "src/codecs/rabitq/kernel_calls.h"
#include "src/codecs/rope/kernel_calls.h"
#include "src/codecs/turboquant/kernel_calls.h"
#include "src/codecs/vecinfer/kernel_calls.h"
#include "tests/msl/front_end.h"

namespace veloxquant::msl {
namespace {

using metal::ArrayShape;
using metal::Call;
using metal::Type;

// What MLX puts in front.
const char* const kUtilities =
    "#include <metal_stdlib>\nusing namespace metal;\n"
    "typedef half float16_t;\ntypedef bfloat bfloat16_t;\n";

struct Writer {
  std::string folder;

  void write(const std::string& name, const Call& call,
             const std::vector<ArrayShape>& inputs) const {
    std::ofstream file(folder + "/" + name + ".metal");
    file << kUtilities << mlx_source(*call.kernel, call.launch, inputs);
    if (!file) throw Fault("cannot write " + folder + "/" + name + ".metal");
  }
};

const ArrayShape kRows{Type::float16, {1, 2, 128, 128}}, kSigns{Type::float32, {2, 128}};

void write_blocks(const Writer& to) {
  vecinfer::BlockShape v;
  v.heads = 2, v.n_blocks = 2, v.dim = 128, v.sub_dim = 4, v.n_centroids = 256, v.transform = 1;
  const ArrayShape tables{Type::float16, {1, 2, 1, 256, 4}};
  to.write("vecinfer_encode", vecinfer::encode_blocks_call(v), {kRows, tables, kSigns});
  turboquant::BlockKernelShape t;
  t.heads = 2, t.n_tokens = 128, t.dim = 128, t.bits = 2;
  to.write("scalar_encode", turboquant::encode_blocks_call(t),
           {kRows, kSigns, {Type::float32, {1, 16}}, {Type::float32, {1}}});
  rabitq::BlockKernelShape r;
  r.heads = 2, r.n_tokens = 128, r.dim = 128, r.bits = 4;
  to.write("rabitq_encode", rabitq::encode_blocks_call(r), {kRows, kSigns, {Type::float32, {1}}});
  qjl::BlockKernelShape q;
  q.heads = 2, q.n_tokens = 128, q.dim = 128, q.layout.m = 256;
  to.write("qjl_encode", qjl::encode_blocks_call(q),
           {kRows, {Type::float32, {2, 2, 128}}, {Type::int32, {1}}});
  commvq::BlockKernelShape c;
  c.heads = 2, c.n_tokens = 128, c.dim = 128, c.n_stages = 4, c.n_entries = 64;
  to.write("commvq_encode", commvq::encode_blocks_call(c),
           {{Type::float32, {1, 2, 128, 128}},
            {Type::float16, {2, 4, 64, 2, 64}},
            {Type::float32, {2, 4, 64}},
            {Type::float32, {2, 4, 64, 64}}});
  rope::SlotShape s;
  s.heads = 2, s.n_tokens = 128, s.dim = 128, s.rotating = 64;
  const ArrayShape angles{Type::float32, {2, 64, 64}};
  to.write("rope_to_slots", rope::to_slots_call(s),
           {kRows, {Type::int32, {2, 64, 3}}, {Type::float32, {2, 64}}, angles, angles});
}

void write_cache(const Writer& to) {
  CacheGeometry geometry(64, 4);
  const ArrayShape exact{Type::float16, {1, 2, 132, 128}};
  for (const auto& [name, n] : std::map<std::string, int>{{"append", 1}, {"append_seal", 200}}) {
    const ArrayShape fresh{Type::float16, {1, 2, n, 128}};
    to.write(name, append_call({1, 2, 128, Type::float16}, geometry, geometry.plan_append(n)),
             {fresh, fresh, exact, exact, {Type::int32, {2, 2}}, {Type::int32, {8}}});
  }
  attention::DecodeShape d;
  d.n_kv_heads = 2, d.group = 4, d.head_dim = 128, d.n_spans = d.n_exact = 1;
  d.keys = d.values = {4, 256, 8, 1};
  const ArrayShape q{Type::float32, {1, 8, 1, 128}}, span{Type::uint8, {1, 2, 4, 2048}};
  const ArrayShape tables{Type::float16, {1, 2, 1, 256, 4}};
  const auto inputs = [&](const ArrayShape& smooth, const ArrayShape& k, const ArrayShape& v,
                          const ArrayShape& blocks) {
    return std::vector<ArrayShape>{q,
                                   {Type::int32, {4, 6}},
                                   {Type::int32, {1, 4}},
                                   {Type::float32, {2}},
                                   smooth,
                                   k,
                                   v,
                                   blocks,
                                   blocks,
                                   exact,
                                   exact};
  };
  to.write("vecinfer_attend", attention::first_pass_call(d, 4),
           inputs(kSigns, tables, tables, span));
  to.write("merge", attention::second_pass_call(d),
           {{Type::float32, {1, 2, 4, 4, 128}},
            {Type::float32, {1, 2, 4, 4, 2}},
            {Type::int32, {3}},
            {Type::float32, {8}},
            kSigns});
  d.key_transform = d.value_transform = 3;
  d.keys = d.values = {};
  d.keys.kind = d.values.kind = attention::TileKind::scalar;
  d.keys.bits = d.values.bits = 2, d.values.by_token = true;
  const ArrayShape levels{Type::float32, {1, 16}};
  to.write("scalar_attend", attention::first_pass_call(d, 4),
           inputs(kSigns, levels, levels, {Type::uint8, {1, 2, 4, 2176}}));
  d.keys.kind = d.values.kind = attention::TileKind::planes;
  d.values.by_token = false;
  const ArrayShape one{Type::float32, {1}};
  to.write("planes_attend", attention::first_pass_call(d, 4),
           inputs(kSigns, one, one, {Type::uint8, {1, 2, 4, 2176}}));
  const ArrayShape codes{Type::uint8, {1, 2, 200, 128}};
  to.write("rvq_attend", attention::rvq_pass_call({1, 2, 4, 1, 128, 200, 4, 4, 32, 4, 256}, 4),
           {q,
            codes,
            codes,
            {Type::uint8, {1, 2, 200, 32}},
            {Type::float32, {4}},
            {Type::float32, {4}},
            {Type::float32, {256, 4}},
            one,
            {Type::int32, {4, 6}},
            {Type::int32, {1, 4}},
            {Type::float32, {2}}});
}

}  // namespace
}  // namespace veloxquant::msl

int main(int argc, char** argv) try {
  if (argc != 2) throw veloxquant::msl::Fault("usage: metal_texts FOLDER");
  const veloxquant::msl::Writer writer{argv[1]};
  veloxquant::msl::write_blocks(writer);
  veloxquant::msl::write_cache(writer);
  return 0;
} catch (const std::exception& e) {
  std::fprintf(stderr, "metal_texts: %s\n", e.what());
  return 1;
}
