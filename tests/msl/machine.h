// Runs a Metal kernel on the CPU: threadgroups one after the other, their threads as fibres that
// take turns at barriers and simdgroup operations.
//
// run() throws Fault for all that a Mac would answer with an error or with wrong numbers: text that
// does not compile, more than 32 KB of threadgroup memory, a barrier that not all threads reach,
// simdgroup operations of half a simdgroup, reads and writes out of bounds or of poison, races. It
// runs the grid twice, threads and threadgroups in opposite orders: results must not depend on it.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "src/backends/metal/kernel.h"
#include "tests/msl/front_end.h"
#include "tests/msl/memory.h"

namespace veloxquant::msl {

struct Input {
  metal::Type type = metal::Type::float32;
  std::vector<int64_t> shape;
  const void* data = nullptr;
  std::vector<int64_t> strides{};  // elements; empty: row-major

  Input(metal::Type type, std::vector<int64_t> shape, const void* data,
        std::vector<int64_t> strides = {})
      : type(type), shape(std::move(shape)), data(data), strides(std::move(strides)) {}
};

struct Report {
  Traffic traffic;
  std::map<std::string, BufferTraffic> buffers;
  int threadgroup_bytes = 0;
  int64_t threadgroups = 0, threads = 0, barriers = 0, simd_operations = 0;
};

// What all threads of a grid execute, as clang -O2 leaves it (count.py): loops of constant length
// are unrolled, as a GPU's compiler does. Barriers and simdgroup operations are not counted.
struct Operations {
  int64_t floating = 0, integer = 0, memory = 0;
};
Operations count(const metal::Kernel& kernel, const metal::Launch& launch,
                 const std::vector<Input>& inputs);

struct Result {
  std::vector<std::vector<uint8_t>> outputs;
  Report report;

  template <class T>
  std::vector<T> output(size_t i) const {
    const auto* begin = reinterpret_cast<const T*>(outputs[i].data());
    return std::vector<T>(begin, begin + outputs[i].size() / sizeof(T));
  }
};

struct Options {
  bool both_orders = true;
  bool all_written = true;  // an output byte that no thread writes is a fault
  bool loads = false;       // BufferTraffic::loaded is counted
};

Result run(const metal::Kernel& kernel, const metal::Launch& launch,
           const std::vector<Input>& inputs, const Options& options = {});

}  // namespace veloxquant::msl
