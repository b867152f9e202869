#include "tests/msl/front_end.h"

#include <regex>

namespace veloxquant::msl {
namespace {

using metal::ArrayShape;
using metal::Kernel;
using metal::Launch;
using metal::type_name;

constexpr int64_t kMaxConstantElements = 7;  // MLX: shorter arrays are `constant`

bool is_constant(const ArrayShape& input) { return input.size() <= kMaxConstantElements; }

std::string value_text(const std::variant<int, bool, metal::Type>& value) {
  if (const int* i = std::get_if<int>(&value)) return std::to_string(*i);
  if (const bool* b = std::get_if<bool>(&value)) return *b ? "1" : "0";
  return type_name(std::get<metal::Type>(value));
}

std::string template_text(const Launch& launch) {
  std::string text;
  for (const auto& argument : launch.arguments) {
    text += (text.empty() ? "" : ", ") + value_text(argument.value);
  }
  return text;
}

std::string replace_all(std::string text, const std::string& from, const std::string& to) {
  for (size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size()) {
    text.replace(at, from.size(), to);
  }
  return text;
}

std::string without_comments(const std::string& text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text.compare(i, 2, "//") == 0) {
      while (i < text.size() && text[i] != '\n') ++i;
    } else if (text.compare(i, 2, "/*") == 0) {
      i = text.find("*/", i) + 1;
      continue;
    }
    if (i < text.size()) out += text[i];
  }
  return out;
}

// A statement that declares a threadgroup variable (not a pointer to one): type, name, dimensions.
const std::regex& threadgroup_variable() {
  static const std::regex pattern(
      R"(threadgroup\s+(?:alignas\s*\([^)]*\)\s*)?([A-Za-z_][\w:<>, ]*?)\s+(\w+)\s*((?:\[[^;=\]]*\]\s*)*);)");
  return pattern;
}

// Declarations of threadgroup variables become static ones of that address space (check), or
// references to memory of the machine, which knows their sizes and guards their ends.
std::string place_threadgroup_variables(const std::string& body, bool check) {
  std::string out;
  auto at = std::sregex_iterator(body.begin(), body.end(), threadgroup_variable());
  size_t from = 0;
  for (int index = 0; at != std::sregex_iterator(); ++at, ++index) {
    const std::smatch& m = *at;
    out += body.substr(from, m.position() - from);
    if (check) {
      out += "static " + m.str();
    } else {
      const std::string name = m[2].str(), type = name + "_msl_type";
      out += "typedef " + m[1].str() + " " + type + m[3].str() + "; " + type + "& " + name +
             " = *(" + type + "*)msl_threadgroup_variable(" + std::to_string(index) + ", sizeof(" +
             type + "));";
    }
    from = m.position() + m.length();
  }
  return out + body.substr(from);
}

}  // namespace

const std::vector<Attribute>& attributes() {
  static const std::vector<Attribute> all = {{"dispatch_quadgroups_per_threadgroup", false},
                                             {"dispatch_simdgroups_per_threadgroup", false},
                                             {"dispatch_threads_per_threadgroup", true},
                                             {"grid_origin", true},
                                             {"grid_size", true},
                                             {"quadgroup_index_in_threadgroup", false},
                                             {"quadgroups_per_threadgroup", false},
                                             {"simdgroup_index_in_threadgroup", false},
                                             {"simdgroups_per_threadgroup", false},
                                             {"thread_execution_width", false},
                                             {"thread_index_in_quadgroup", false},
                                             {"thread_index_in_simdgroup", false},
                                             {"thread_index_in_threadgroup", false},
                                             {"thread_position_in_grid", true},
                                             {"thread_position_in_threadgroup", true},
                                             {"threadgroup_position_in_grid", true},
                                             {"threadgroups_per_grid", true},
                                             {"threads_per_grid", true},
                                             {"threads_per_simdgroup", false},
                                             {"threads_per_threadgroup", true}};
  return all;
}

Extras extras_of(const Kernel& kernel, size_t input) {
  const std::string& name = kernel.inputs[input];
  auto has = [&](const char* suffix) {
    return kernel.body.find(name + suffix) != std::string::npos;
  };
  return {has("_shape"), has("_strides"), has("_ndim")};
}

std::string mlx_function_name(const Kernel& kernel, const Launch& launch,
                              const std::vector<ArrayShape>& inputs) {
  std::string name = "custom_kernel_" + kernel.name;
  if (!launch.arguments.empty()) name += "__" + replace_all(template_text(launch), ", ", "_");
  for (const ArrayShape& input : inputs) {
    name += std::string("_") + type_name(input.type);
    if (input.shape.empty()) {
      name += "s";
    } else if (is_constant(input)) {
      name += "c";
    }
  }
  for (const ArrayShape& output : launch.outputs) name += std::string("_") + type_name(output.type);
  return name;
}

std::string mlx_source(const Kernel& kernel, const Launch& launch,
                       const std::vector<ArrayShape>& inputs) {
  if (inputs.size() != kernel.inputs.size() || launch.outputs.size() != kernel.outputs.size()) {
    throw Fault("[" + kernel.name + "] inputs, outputs: got another number than names");
  }
  const std::string function = mlx_function_name(kernel, launch, inputs);
  std::string source = kernel.header;
  if (!launch.arguments.empty()) {
    std::string list;
    for (const auto& argument : launch.arguments) {
      const size_t kind = argument.value.index();
      list += (list.empty() ? "" : ", ") +
              std::string(kind == 0   ? "int "
                          : kind == 1 ? "bool "
                                      : "typename ") +
              argument.name;
    }
    source += "template <" + list + ">\n";
  }
  source += "[[kernel]] void " + function + "(\n";
  int index = 0;
  auto buffer = [&] { return " [[buffer(" + std::to_string(index++) + ")]]"; };
  for (size_t i = 0; i < inputs.size(); ++i) {
    const std::string& name = kernel.inputs[i];
    source += std::string("  const ") + (is_constant(inputs[i]) ? "constant " : "device ") +
              type_name(inputs[i].type) + (inputs[i].shape.empty() ? "& " : "* ") + name +
              buffer() + ",\n";
    if (inputs[i].shape.empty()) continue;
    const Extras extras = extras_of(kernel, i);
    if (extras.shape) source += "  const constant int* " + name + "_shape" + buffer() + ",\n";
    if (extras.strides)
      source += "  const constant int64_t* " + name + "_strides" + buffer() + ",\n";
    if (extras.ndim) source += "  const constant int& " + name + "_ndim" + buffer() + ",\n";
  }
  std::string rest;
  for (size_t i = 0; i < launch.outputs.size(); ++i) {
    rest += std::string(rest.empty() ? "" : ",\n") + "  device " +
            type_name(launch.outputs[i].type) + "* " + kernel.outputs[i] + buffer();
  }
  for (const Attribute& a : attributes()) {
    if (kernel.body.find(a.name) == std::string::npos) continue;
    rest +=
        std::string(",\n  ") + (a.is_vector ? "uint3 " : "uint ") + a.name + " [[" + a.name + "]]";
  }
  source += rest + ") {\n" + kernel.body + "\n}\n";
  if (!launch.arguments.empty()) {
    const std::string full = function + "<" + template_text(launch) + ">";
    source += "\ntemplate [[host_name(\"" + function + "\")]] [[kernel]] decltype(" + full + ") " +
              full + ";\n";
  }
  return source;
}

std::string clang_source(const Kernel& kernel, const Launch& launch,
                         const std::vector<ArrayShape>& inputs, bool check) {
  Kernel placed = kernel;
  placed.body = place_threadgroup_variables(kernel.body, check);
  // Clang's spelling of a pragma of Metal's, as far as this machine has the notion. Lines are kept.
  placed.header =
      std::regex_replace(kernel.header, std::regex("#pragma METAL fp contract\\(off\\)"),
                         "#pragma clang fp contract(off)");
  placed.header = std::regex_replace(placed.header, std::regex("#pragma METAL[^\n]*"), "");
  const std::string function = mlx_function_name(kernel, launch, inputs);
  std::string source = mlx_source(placed, launch, inputs);
  const std::string full =
      function + (launch.arguments.empty() ? "" : "<" + template_text(launch) + ">");
  if (!launch.arguments.empty()) {
    source.resize(source.rfind("\ntemplate [[host_name"));
    source += "\ntemplate decltype(" + full + ") " + full + ";\n";
  }
  // The library in front: lines of the kernel keep their numbers.
  source = "#include <metal_stdlib>\n#line 1 \"" + kernel.name + "\"\n" + source;
  if (check) return source;
  source +=
      "\n#line 1 \"entry\"\nextern \"C\" __attribute__((no_sanitize(\"thread\"))) void "
      "msl_entry(void* const* buffers) {\n"
      "  const uint* a = msl_attributes();\n  (void)a;\n  " +
      full + "(\n";
  std::string list;
  int index = 0;
  auto argument = [&](const std::string& type, bool reference) {
    list += (list.empty() ? "    " : ",\n    ") + std::string(reference ? "*(" : "(") + type +
            "*)buffers[" + std::to_string(index++) + "]";
  };
  for (size_t i = 0; i < inputs.size(); ++i) {
    argument(std::string("const ") + type_name(inputs[i].type), inputs[i].shape.empty());
    if (inputs[i].shape.empty()) continue;
    const Extras extras = extras_of(kernel, i);
    if (extras.shape) argument("const int", false);
    if (extras.strides) argument("const int64_t", false);
    if (extras.ndim) argument("const int", true);
  }
  for (const ArrayShape& output : launch.outputs) argument(type_name(output.type), false);
  for (size_t i = 0; i < attributes().size(); ++i) {
    const Attribute& a = attributes()[i];
    if (kernel.body.find(a.name) == std::string::npos) continue;
    const std::string at = "a[" + std::to_string(3 * i);
    list += ",\n    " +
            (a.is_vector ? "uint3{" + at + "], " + at + " + 1], " + at + " + 2]}" : at + "]");
  }
  return source + list + ");\n}\n";
}

void check_dialect(const Kernel& kernel) {
  auto refuse = [&](const std::string& what, const std::string& where) {
    throw Fault("[" + kernel.name + "] Metal has no " + what + ": " + where);
  };
  const std::string header = without_comments(kernel.header), body = without_comments(kernel.body);
  std::smatch m;
  if (std::regex_search(header, m, threadgroup_variable())) {
    refuse("threadgroup variables outside the kernel", m.str());
  }
  static const std::regex pointer(
      R"(([\w ]*?)\b(float|half|bfloat|bool|u?char|u?short|u?int|u?int(?:8|16|32|64)_t|b?float16_t|(?:float|half|u?int|u?short|u?char)[234])\s*(?:const\s*)?[*&]+\s*\w+)");
  static const std::regex space(R"(\b(device|constant|threadgroup|thread|VQ_THREAD|VQ_GROUP)\b)");
  for (const std::string* text : {&header, &body}) {
    for (auto at = std::sregex_iterator(text->begin(), text->end(), pointer);
         at != std::sregex_iterator(); ++at) {
      if (!std::regex_search(at->str(1), space)) {
        refuse("pointers or references without an address space", at->str());
      }
    }
    if (std::regex_search(*text, m, std::regex(R"(\[[&=]?\]\s*\([^)]*\)\s*\{)"))) {
      refuse("lambdas", m.str());
    }
    if (std::regex_search(
            *text, m,
            std::regex(R"(\b(if\s+constexpr|long|double|static_cast<double>|std::\w+))"))) {
      refuse("such construct", m.str());
    }
  }
}

}  // namespace veloxquant::msl
