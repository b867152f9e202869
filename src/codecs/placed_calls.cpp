#include "src/codecs/placed_calls.h"

#include <map>
#include <mutex>

#include "src/backends/metal/source.h"

namespace veloxquant {
namespace {

using metal::Call;
using metal::Kernel;
using metal::Type;

constexpr int kThreads = 256;
using Arguments = std::vector<metal::TemplateArgument>;

// What differs between codecs.
struct Text {
  const char* name;
  std::string header;
  std::vector<std::string> encode_inputs, decode_inputs;
  std::string memory, encode, decode;
  Arguments arguments;
  bool decodes_in_groups = false;  // a threadgroup an eighth of a block, as encode; memory serves
};

const char* const kSelf =
    "eighth, thread_index_in_threadgroup,\n      threads_per_threadgroup.x);\n";

Text text_of(const vecinfer::BlockShape& s) {
  Text t;
  t.name = "vecinfer";
  t.header = "src/codecs/vecinfer/metal_blocks.h";
  t.encode_inputs = {"tables", "forward"};
  t.decode_inputs = {"tables"};
  t.memory = R"(
  threadgroup float rows[8 * DIM];
  threadgroup float moved[8 * DIM];
  threadgroup ushort tile[8 * (DIM / SUB)];
)";
  const std::string table =
      "tables + ((int64_t)(SEQUENCES == 1 ? 0 : batch) * HEADS + head) * (TABLES * C * SUB)";
  t.encode =
      "  veloxquant::vecinfer_encode_blocks<DIM, SUB, C, BITS, TABLES, TRANSFORM>(\n"
      "      tokens, n_tokens, 1, 1, " +
      table +
      ",\n      forward + (int64_t)head * (TRANSFORM == 0 ? 0 : TRANSFORM == 1 ? DIM : DIM * "
      "DIM), block,\n      rows, moved, tile, " +
      kSelf;
  t.decode = "  veloxquant::vecinfer_decode_blocks<DIM, SUB, C, BITS, TABLES>(words, 1, 1, 1, " +
             table + ", to, at);\n";
  t.arguments = {{"SUB", s.sub_dim},
                 {"C", s.n_centroids},
                 {"BITS", s.bits},
                 {"TABLES", s.tables},
                 {"TRANSFORM", s.transform}};
  return t;
}

Text text_of(const turboquant::BlockKernelShape& s) {
  Text t;
  t.name = "scalar";
  t.header = "src/codecs/turboquant/metal_blocks.h";
  t.encode_inputs = {"signs", "quantizers", "columns"};
  t.decode_inputs = {"quantizers", "sketch"};
  t.memory = R"(
  threadgroup float rows[8 * DIM];
  threadgroup float moved[8 * DIM];
  threadgroup uchar codes[(STAGES + SKETCH) * 8 * DIM];
  threadgroup float norms[8];
  threadgroup ushort scalars[16];
)";
  t.encode = std::string(R"(
  veloxquant::scalar_encode_blocks<DIM, STAGES, BITS, SCALE, SKETCH, BY_TOKEN>(
      tokens, n_tokens, 1, signs, quantizers, columns, block, rows, moved, codes, norms, scalars,
      )") + kSelf;
  t.decode = R"(
  veloxquant::scalar_decode_blocks<DIM, STAGES, BITS, SKETCH, BY_TOKEN>(words, 1, quantizers, sketch,
                                                                        to, at);
)";
  t.arguments = {{"STAGES", s.stages},
                 {"BITS", s.bits},
                 {"SCALE", static_cast<int>(s.scale)},
                 {"SKETCH", s.prod ? 1 : 0},
                 {"BY_TOKEN", s.by_token ? 1 : 0}};
  return t;
}

Text text_of(const rabitq::BlockKernelShape& s) {
  Text t;
  t.name = "rabitq";
  t.header = "src/codecs/rabitq/metal_blocks.h";
  t.encode_inputs = {"signs", "mean"};
  t.decode_inputs = {"mean"};
  t.memory = R"(
  threadgroup float rows[8 * DIM];
  threadgroup float moved[8 * DIM];
  threadgroup float trials[8 * veloxquant::kStepTrials];
  threadgroup float level_steps[8];
  threadgroup float sums[24];
)";
  t.encode = std::string(R"(
  veloxquant::rabitq_encode_blocks<DIM, BITS, SCALE, MEAN>(
      tokens, n_tokens, 1, 1, signs, mean + (MEAN ? head * DIM : 0), block, rows, moved, trials,
      level_steps, sums, )") +
             kSelf;
  t.decode = R"(
  veloxquant::rabitq_decode_blocks<DIM, BITS, MEAN>(words, 1, 1, mean + (MEAN ? head * DIM : 0), to, at);
)";
  t.arguments = {{"BITS", s.bits}, {"SCALE", static_cast<int>(s.scale)}, {"MEAN", s.mean ? 1 : 0}};
  return t;
}

Text text_of(const qjl::BlockKernelShape& s) {
  Text t;
  t.name = "qjl";
  t.header = "src/codecs/qjl/metal_blocks.h";
  t.encode_inputs = {"sketch", "channels"};
  t.decode_inputs = {"sketch", "channels", "constants"};
  t.memory = R"(
  threadgroup float whole[8 * DIM];
  threadgroup float rows[8 * DIM];
  threadgroup float moved[8 * DIM];
)";
  t.encode = std::string(R"(
  threadgroup float energy[DIM];
  threadgroup uchar chosen[DIM];
  veloxquant::qjl_encode_blocks<DIM, M, M_OUT, DENSE, OUTLIERS, FIXED>(
      tokens, n_tokens, 1, 1, sketch, channels + (FIXED ? head * OUTLIERS : 0), block, whole, rows,
      moved, energy, chosen, )") +
             kSelf;
  t.decode = std::string(R"(
  veloxquant::qjl_decode_blocks<DIM, M, M_OUT, DENSE, OUTLIERS, FIXED, SKETCHED>(
      block, 1, 1, sketch, channels + (FIXED ? head * OUTLIERS : 0), constants, to, rows, moved,
      whole, )") +
             kSelf;
  t.decodes_in_groups = true;
  t.arguments = {{"M", s.layout.m},
                 {"M_OUT", s.layout.m_out},
                 {"DENSE", s.dense ? 1 : 0},
                 {"OUTLIERS", s.outliers},
                 {"FIXED", s.outliers > 0 && s.layout.n_channels == 0 ? 1 : 0},
                 {"SKETCHED", s.sketched() ? 1 : 0}};
  return t;
}

Text text_of(std::monostate) { fail("[placed_calls] kernels: got none, wanted a codec's"); }

Text text_of(const PlacedShape& s) {
  return std::visit([](const auto& kernels) { return text_of(kernels); }, s.kernels);
}

// `base` moved to block `number` of this sequence and head, in bytes.
std::string at_block(const PlacedShape& s, const std::string& base) {
  if (s.paged) {
    return "veloxquant::paged_number(table, (int64_t)batch * range[3] + number, range[2]) * "
           "steps[2] + head * steps[1] + " +
           base;
  }
  return base + " + batch * steps[0] + head * steps[1] + number * steps[2]";
}

const Kernel* kernel_once(const std::string& name, const std::vector<std::string>& inputs,
                          const char* output, const std::string& header, const std::string& body) {
  static std::mutex mutex;
  static std::map<std::string, Kernel> kernels;
  const std::lock_guard<std::mutex> lock(mutex);
  auto it = kernels.find(body);
  if (it == kernels.end()) {
    const std::vector<std::string> headers = {header, "src/codecs/metal_placed.h"};
    it = kernels.emplace(body, metal::make_kernel(name, inputs, {output}, headers, body)).first;
  }
  return &it->second;
}

Arguments arguments_of(const PlacedShape& s, const Text& text) {
  Arguments arguments = text.arguments;
  arguments.insert(arguments.begin(),
                   {{"DIM", s.dim()}, {"HEADS", s.heads}, {"SEQUENCES", s.n_sequences}});
  return arguments;
}

}  // namespace

int PlacedShape::dim() const {
  return std::visit(
      [](const auto& kernels) {
        if constexpr (std::is_same_v<std::decay_t<decltype(kernels)>, std::monostate>) {
          return 0;
        } else {
          return kernels.dim;
        }
      },
      kernels);
}

Call placed_encode_call(const PlacedShape& s, int n_blocks) {
  const Text text = text_of(s);
  std::vector<std::string> inputs = {"x", "x_steps", "steps", "range"};
  if (s.paged) inputs.push_back("table");
  if (s.seal) inputs.push_back("lengths");
  inputs.insert(inputs.end(), text.encode_inputs.begin(), text.encode_inputs.end());
  std::string body = text.memory + R"(
  const int plane = (int)threadgroup_position_in_grid.z, head = plane % HEADS, batch = plane / HEADS;
  const int index = (int)threadgroup_position_in_grid.y;
  uint3 eighth = threadgroup_position_in_grid;
  eighth.y = 0u;
  eighth.z = 0u;
)";
  body += s.seal ? R"(
  const int batches = lengths_shape[1];
  if (lengths[2 * batches + batch] == lengths[batch]) return;
  const int number = lengths[batch] / 64;
)"
                 : "  const int number = range[1] + index;\n";
  body += R"(
  const int n_tokens = min(64, range[0] - 64 * index);
  veloxquant::TokenRows<DIM, decltype(x)> tokens;
  tokens.x = x + batch * x_steps[0] + head * x_steps[1] + 64 * (int64_t)index * x_steps[2];
  tokens.step = x_steps[2];
  device uint8_t* block = )" +
          at_block(s, "blocks") + ";\n" + text.encode;
  Call call{kernel_once(std::string("vq_encode_") + text.name, inputs, "blocks", text.header, body),
            {}};
  call.launch.arguments = arguments_of(s, text);
  call.launch.grid = {8 * kThreads, n_blocks, s.batch * s.heads};
  call.launch.threadgroup = {kThreads, 1, 1};
  call.launch.outputs = {{Type::uint8, {1}}};
  return call;
}

Call placed_decode_call(const PlacedShape& s, int n_blocks) {
  const Text text = text_of(s);
  std::vector<std::string> inputs = {"blocks", "out_steps", "steps", "range"};
  if (s.paged) inputs.push_back("table");
  inputs.insert(inputs.end(), text.decode_inputs.begin(), text.decode_inputs.end());
  const std::string position =
      text.decodes_in_groups ? "threadgroup_position_in_grid" : "thread_position_in_grid";
  const std::string at = text.decodes_in_groups ? "eighth" : "at";
  std::string body = text.decodes_in_groups ? text.memory : std::string();
  body += "  const int plane = (int)" + position +
          ".z, head = plane % HEADS, batch = plane / HEADS;\n  const int index = (int)" + position +
          ".y, number = range[1] + index;\n  uint3 " + at + " = " + position + ";\n  " + at +
          ".y = 0u;\n  " + at +
          ".z = 0u;\n  const device uint8_t* block = " + at_block(s, "blocks") + ";\n" +
          (text.decodes_in_groups
               ? ""
               : "  const device uint32_t* words = (const device uint32_t*)block;\n") +
          "  device float* to = out + batch * out_steps[0] + head * out_steps[1] + 64 * DIM * "
          "(int64_t)index;\n" +
          text.decode;
  Call call{kernel_once(std::string("vq_decode_") + text.name, inputs, "out", text.header, body),
            {}};
  call.launch.arguments = arguments_of(s, text);
  const int threads = text.decodes_in_groups ? 8 * kThreads : 64 * s.dim();
  call.launch.grid = {threads, n_blocks, s.batch * s.heads};
  call.launch.threadgroup = {kThreads, 1, 1};
  call.launch.outputs = {{Type::float32, {1}}};
  return call;
}

}  // namespace veloxquant
