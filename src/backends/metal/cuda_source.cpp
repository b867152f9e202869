#include "src/backends/metal/cuda_source.h"

#include "src/backends/metal/source.h"
#include "veloxquant/error.h"

namespace veloxquant::metal {
namespace {

const char* spelled(Type type) {
  if (type == Type::float16) return "__half";
  if (type == Type::bfloat16) return "__nv_bfloat16";
  return type_name(type);
}

std::string numbers(const char* type, int n) {
  return "const __grid_constant__ VqNumbers<" + std::string(type) + ", " + std::to_string(n) + "> ";
}

std::string parameters_of(const Kernel& kernel, const CudaInput& input, const std::string& name) {
  std::string text = input.by_value > 0 ? numbers(spelled(input.type), input.by_value) + name
                                        : "const " + std::string(spelled(input.type)) + "* " + name;
  const CudaNames names = names_of(kernel, name);
  if (names.shape) text += ",\n    " + numbers("int32_t", input.ndim) + name + "_shape";
  if (names.strides) text += ",\n    " + numbers("int64_t", input.ndim) + name + "_strides";
  return text;
}

std::string argument_text(const TemplateArgument& a) {
  if (const int* n = std::get_if<int>(&a.value)) {
    return "  constexpr int " + a.name + " = " + std::to_string(*n) + ";\n";
  }
  if (const bool* b = std::get_if<bool>(&a.value)) {
    return "  constexpr bool " + a.name + " = " + (*b ? "true" : "false") + ";\n";
  }
  return "  using " + a.name + " = " + spelled(std::get<Type>(a.value)) + ";\n";
}

}  // namespace

CudaNames names_of(const Kernel& kernel, const std::string& input) {
  const auto has = [&](const char* suffix) {
    return kernel.body.find(input + suffix) != std::string::npos;
  };
  return {has("_shape"), has("_strides")};
}

std::string cuda_program(const Call& call, const std::vector<CudaInput>& given) {
  const Kernel kernel = cuda_kernel_of(*call.kernel);
  std::vector<CudaInput> inputs = given;
  if (threads_are_single(*call.kernel)) inputs.push_back({Type::int32, 1, 3});
  require(inputs.size() == kernel.inputs.size(), "[cuda] ", kernel.name, ": got ", given.size(),
          " inputs, wanted ", call.kernel->inputs.size());
  const std::vector<ArrayShape>& outputs = call.launch.outputs;
  std::string text = flattened("src/backends/metal/cuda_types.h") + kernel.header;
  int threads = 1;
  for (int n : cuda_grid_of(*call.kernel, call.launch).threadgroup) threads *= n;
  text += "extern \"C\" __global__ void __launch_bounds__(" + std::to_string(threads);
  if (call.launch.at_once > 0) text += ", " + std::to_string(call.launch.at_once);
  text += ") " + std::string(kCudaEntry) + "(\n    ";
  for (size_t i = 0; i < inputs.size(); ++i) {
    text += parameters_of(kernel, inputs[i], kernel.inputs[i]) + ",\n    ";
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    text += std::string(spelled(outputs[i].type)) + "* " + kernel.outputs[i] +
            (i + 1 < outputs.size() ? ",\n    " : ") {\n");
  }
  for (const TemplateArgument& a : call.launch.arguments) text += argument_text(a);
  std::string body = kernel.body;
  if (const size_t at = body.find(kPoolText); at != std::string::npos) {
    body.replace(at, std::string(kPoolText).size(), "extern threadgroup uint4 pool[];");
  }
  return text + body + "\n}\n";
}

}  // namespace veloxquant::metal
