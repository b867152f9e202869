// msl_run FOLDER: one launch on the MSL machine, for tests that are not C++ (python/tests/msl.py).
//
// FOLDER/launch.json: name, header, body, row_contiguous; inputs and outputs, lists of {name, type,
// shape, and for inputs strides}; arguments, a list of {name, int | bool | type}; grid;
// threadgroup. FOLDER/input_<i>: elements as the strides find them. Writes FOLDER/output_<i>. A
// fault of the machine is said on stderr, exit status 1.
#include <cstdio>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "tests/msl/machine.h"

namespace veloxquant::msl {
namespace {

using metal::Type;

Type type_of(const std::string& name) {
  for (Type type : {Type::boolean, Type::uint8, Type::uint16, Type::uint32, Type::int32,
                    Type::int64, Type::float16, Type::bfloat16, Type::float32}) {
    if (name + "_t" == metal::type_name(type) || name == metal::type_name(type)) return type;
  }
  throw std::runtime_error("type: got " + name);
}

std::string contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

void run_folder(const std::string& folder) {
  const nlohmann::json j = nlohmann::json::parse(contents(folder + "/launch.json"));
  metal::Kernel kernel{j["name"], {}, {}, j["header"], j["body"], j["row_contiguous"]};
  metal::Launch launch;
  launch.grid = j["grid"].get<std::array<int, 3>>();
  launch.threadgroup = j["threadgroup"].get<std::array<int, 3>>();
  for (const auto& a : j["arguments"]) {
    metal::TemplateArgument argument{a["name"], 0};
    if (a.contains("int")) argument.value = a["int"].get<int>();
    if (a.contains("bool")) argument.value = a["bool"].get<bool>();
    if (a.contains("type")) argument.value = type_of(a["type"]);
    launch.arguments.push_back(argument);
  }
  for (const auto& a : j["outputs"]) {
    kernel.outputs.push_back(a["name"]);
    launch.outputs.push_back({type_of(a["type"]), a["shape"].get<std::vector<int64_t>>()});
  }
  std::vector<std::string> data;
  for (size_t i = 0; i < j["inputs"].size(); ++i) {
    data.push_back(contents(folder + "/input_" + std::to_string(i)));
  }
  std::vector<Input> inputs;
  for (size_t i = 0; i < data.size(); ++i) {
    const auto& a = j["inputs"][i];
    kernel.inputs.push_back(a["name"]);
    inputs.emplace_back(type_of(a["type"]), a["shape"].get<std::vector<int64_t>>(), data[i].data(),
                        a["strides"].get<std::vector<int64_t>>());
  }
  const Result result = run(kernel, launch, inputs);
  for (size_t i = 0; i < result.outputs.size(); ++i) {
    std::ofstream(folder + "/output_" + std::to_string(i), std::ios::binary)
        .write(reinterpret_cast<const char*>(result.outputs[i].data()),
               static_cast<std::streamsize>(result.outputs[i].size()));
  }
}

}  // namespace
}  // namespace veloxquant::msl

int main(int argc, char** argv) try {
  if (argc != 2) throw std::runtime_error("usage: msl_run FOLDER");
  veloxquant::msl::run_folder(argv[1]);
  return 0;
} catch (const std::exception& e) {
  std::fprintf(stderr, "msl_run: %s\n", e.what());
  return 1;
}
