#include "tests/msl/machine.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <set>

#include "tests/msl/compiler.h"
#include "tests/msl/fibre.h"

namespace veloxquant::msl {
namespace {

using metal::ArrayShape;
using metal::Kernel;
using metal::Launch;

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr int kThreadgroupBytes = 32768;
constexpr int kCudaBytes = 227 << 10;  // of a kernel with a pool (kPoolText), which CUDA alone runs
constexpr int kSlotBytes = 16;

enum class State { ready, barrier, simd_barrier, exchange, done };

struct Thread {
  State state = State::ready;
  Moment moment;
  uint32_t attributes[20][3] = {};
  uint32_t operation = 0, argument = 0, flags = 0;
  void* site = nullptr;  // of the barrier or operation it waits at
};

// Two sets of slots: a fast lane may be at the next operation while others read this one's.
struct Simdgroup {
  char slots[2][kLanes * kSlotBytes];
  int side[kLanes] = {};
};

struct Variable {
  std::vector<uint64_t> storage;
  uint32_t bytes = 0;
};

class Machine {
 public:
  Machine(const Kernel& kernel, const Launch& launch, const std::vector<Input>& inputs,
          bool counting = false);
  const Compiled& compiled() const { return compiled_; }
  Result run(bool backwards, const Options& options);

  // Called from the kernel, on its fibre.
  const uint32_t* attributes() const { return threads_[running_].attributes[0]; }
  void* variable(uint32_t index, uint32_t bytes);
  void wait(State state, uint32_t flags, void* site);
  const char* exchange(uint32_t operation, uint32_t argument, const void* value, uint32_t bytes,
                       uint32_t* present, void* site);
  void access(uintptr_t address, uint32_t bytes, Memory::Access access, const void* site);
  [[noreturn]] void fail(const std::string& what);
  uint32_t lane() const { return running_ % kLanes; }
  void run_thread(int i) { compiled_.entry(pointers_.data()), threads_[i].state = State::done; }

 private:
  void run_threadgroup(const std::array<int, 3>& at, bool backwards);
  bool release();
  bool release_simdgroup(int first);
  void set_attributes(Thread& thread, int index, const std::array<int, 3>& at,
                      const std::array<int, 3>& size);
  std::string who(int thread) const;
  std::string stuck() const;

  const Kernel& kernel_;
  const Launch& launch_;
  const std::vector<Input>& inputs_;
  Compiled compiled_;
  std::array<int, 3> group_size_, groups_;
  std::vector<std::vector<int64_t>> numbers_;  // shapes and strides that the kernel asked for
  std::vector<std::vector<uint8_t>> output_storage_;
  std::vector<void*> pointers_;
  Memory memory_;
  Fibres fibres_;
  std::vector<Thread> threads_;
  std::vector<Simdgroup> simdgroups_;
  std::vector<Variable> variables_;
  std::array<int, 3> position_{};
  int running_ = 0;
  uint32_t group_ = 0;
  bool count_loads_ = false;
  std::string fault_;
  Report report_;
};

Machine* machine = nullptr;  // the one that runs; the hooks have no other way to it

Machine::Machine(const Kernel& kernel, const Launch& launch, const std::vector<Input>& inputs,
                 bool counting)
    : kernel_(kernel), launch_(launch), inputs_(inputs) {
  std::vector<ArrayShape> shapes;
  for (const Input& input : inputs) shapes.push_back({input.type, input.shape});
  compiled_ = compile(kernel, launch, shapes, counting);
  int threads = 1;
  for (int d = 0; d < 3; ++d) {
    group_size_[d] = std::min(launch.threadgroup[d], launch.grid[d]);
    if (group_size_[d] < 1) throw Fault("[" + kernel.name + "] grid: got an empty one");
    groups_[d] = (launch.grid[d] + group_size_[d] - 1) / group_size_[d];
    threads *= group_size_[d];
  }
  if (threads > kMaxThreads) {
    throw Fault("[" + kernel.name + "] threadgroup: got " + std::to_string(threads) +
                " threads, wanted at most 1024");
  }
}

std::string Machine::who(int thread) const {
  const Thread& t = threads_[thread];
  auto triple = [](int x, int y, int z) {
    return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
  };
  (void)t;
  return "[" + kernel_.name + "] thread " + std::to_string(thread) + " of threadgroup " +
         triple(position_[0], position_[1], position_[2]) + " ";
}

void Machine::fail(const std::string& what) {
  fault_ = who(running_) + what;
  for (;;) fibres_.yield();  // never resumed
}

void* Machine::variable(uint32_t index, uint32_t bytes) {
  if (variables_.size() <= index) variables_.resize(index + 1);
  Variable& v = variables_[index];
  if (v.bytes == 0) {
    v.bytes = bytes;
    // Room on both sides, so that what runs over the end meets no other variable.
    v.storage.resize((bytes + 7) / 8 + 512);
    memory_.add("threadgroup variable " + std::to_string(index), Space::threadgroup,
                v.storage.data() + 256, bytes, true, false);
    int total = 0;
    for (const Variable& each : variables_) total += (each.bytes + 15) / 16 * 16;
    report_.threadgroup_bytes = std::max(report_.threadgroup_bytes, total);
    const int most = launch_.pool_bytes > 0 ? kCudaBytes : kThreadgroupBytes;
    if (total > most) {
      fail("needs " + std::to_string(total) + " bytes of threadgroup memory, more than " +
           std::to_string(most));
    }
  }
  return v.storage.data() + 256;
}

void Machine::wait(State state, uint32_t flags, void* site) {
  Thread& t = threads_[running_];
  t.state = state;
  t.flags = flags;
  t.site = site;
  fibres_.yield();
}

const char* Machine::exchange(uint32_t operation, uint32_t argument, const void* value,
                              uint32_t bytes, uint32_t* present, void* site) {
  if (bytes > kSlotBytes) fail("simdgroup operation on a type of more than 16 bytes");
  const int lane = running_ % kLanes, first = running_ - lane;
  Simdgroup& group = simdgroups_[running_ / kLanes];
  const int side = group.side[lane] ^= 1;
  std::memcpy(group.slots[side] + lane * kSlotBytes, value, bytes);
  Thread& t = threads_[running_];
  t.operation = operation;
  t.argument = argument;
  wait(State::exchange, 0, site);
  const int n = std::min<int>(kLanes, static_cast<int>(threads_.size()) - first);
  *present = n == kLanes ? ~0u : (1u << n) - 1u;
  return group.slots[side];
}

void Machine::access(uintptr_t address, uint32_t bytes, Memory::Access access, const void* site) {
  if (fibres_.contains(address)) return;
  const char* slots = reinterpret_cast<const char*>(simdgroups_.data());
  if (address - reinterpret_cast<uintptr_t>(slots) < simdgroups_.size() * sizeof(Simdgroup)) return;
  if (address - compiled_.begin < compiled_.end - compiled_.begin) {  // a table in the text
    if (access != Memory::Access::read) fail("writes to a constant");
    return;
  }
  std::string wrong = memory_.access(address, bytes, access, threads_[running_].moment);
  if (!wrong.empty()) fail(wrong);
  if (count_loads_ && access == Memory::Access::read) {
    memory_.load(address, bytes, site, threads_[running_].moment);
  }
}

void Machine::set_attributes(Thread& t, int index, const std::array<int, 3>& at,
                             const std::array<int, 3>& size) {
  const int n = size[0] * size[1] * size[2];
  const int in_group[3] = {index % size[0], index / size[0] % size[1], index / (size[0] * size[1])};
  const int full = group_size_[0] * group_size_[1] * group_size_[2];
  auto set = [&](const char* name, uint32_t x, uint32_t y = 0, uint32_t z = 0) {
    for (size_t i = 0; i < msl::attributes().size(); ++i) {
      if (std::strcmp(msl::attributes()[i].name, name) != 0) continue;
      t.attributes[i][0] = x, t.attributes[i][1] = y, t.attributes[i][2] = z;
    }
  };
  set("dispatch_simdgroups_per_threadgroup", (full + kLanes - 1) / kLanes);
  set("dispatch_quadgroups_per_threadgroup", (full + 3) / 4);
  set("dispatch_threads_per_threadgroup", group_size_[0], group_size_[1], group_size_[2]);
  set("grid_size", launch_.grid[0], launch_.grid[1], launch_.grid[2]);
  set("threads_per_grid", launch_.grid[0], launch_.grid[1], launch_.grid[2]);
  set("quadgroup_index_in_threadgroup", index / 4);
  set("quadgroups_per_threadgroup", (n + 3) / 4);
  set("simdgroup_index_in_threadgroup", index / kLanes);
  set("simdgroups_per_threadgroup", (n + kLanes - 1) / kLanes);
  set("thread_execution_width", kLanes);
  set("threads_per_simdgroup", kLanes);
  set("thread_index_in_quadgroup", index % 4);
  set("thread_index_in_simdgroup", index % kLanes);
  set("thread_index_in_threadgroup", index);
  set("thread_position_in_threadgroup", in_group[0], in_group[1], in_group[2]);
  set("thread_position_in_grid", at[0] * group_size_[0] + in_group[0],
      at[1] * group_size_[1] + in_group[1], at[2] * group_size_[2] + in_group[2]);
  set("threadgroup_position_in_grid", at[0], at[1], at[2]);
  set("threadgroups_per_grid", groups_[0], groups_[1], groups_[2]);
  set("threads_per_threadgroup", size[0], size[1], size[2]);
}

std::string Machine::stuck() const {
  int at_barrier = 0, at_simd = 0, done = 0;
  std::set<const void*> sites;
  for (const Thread& t : threads_) {
    at_barrier += t.state == State::barrier;
    at_simd += t.state == State::simd_barrier || t.state == State::exchange;
    done += t.state == State::done;
    if (t.state != State::done) sites.insert(t.site);
  }
  return "divergence: of " + std::to_string(threads_.size()) + " threads " +
         std::to_string(at_barrier) + " wait at a threadgroup_barrier, " + std::to_string(at_simd) +
         " at a simdgroup operation, " + std::to_string(done) + " have returned; at " +
         std::to_string(sites.size()) + " places";
}

bool Machine::release_simdgroup(int first) {
  const int last = std::min(first + kLanes, static_cast<int>(threads_.size()));
  const Thread& lead = threads_[first];
  if (lead.state != State::exchange && lead.state != State::simd_barrier) return false;
  for (int i = first; i < last; ++i) {
    const Thread& t = threads_[i];
    if (t.state != lead.state || t.site != lead.site || t.flags != lead.flags) return false;
    if (t.state == State::exchange &&
        (t.operation != lead.operation || t.argument != lead.argument)) {
      return false;
    }
  }
  ++(lead.state == State::exchange ? report_.simd_operations : report_.barriers);
  for (int i = first; i < last; ++i) {
    Thread& t = threads_[i];
    if (t.state == State::simd_barrier) {
      if (t.flags & 1u) ++t.moment.simd_barriers[0];
      if (t.flags & 2u) ++t.moment.simd_barriers[1];
    }
    t.state = State::ready;
  }
  return true;
}

// Lets go whoever all have arrived; false where nobody moves.
bool Machine::release() {
  bool moved = false;
  for (size_t first = 0; first < threads_.size(); first += kLanes) {
    moved = release_simdgroup(static_cast<int>(first)) || moved;
  }
  if (moved) return true;
  for (const Thread& t : threads_) {
    if (t.state != State::barrier || t.site != threads_[0].site || t.flags != threads_[0].flags)
      return false;
  }
  ++report_.barriers;
  for (Thread& t : threads_) {
    if (t.flags & 1u) ++t.moment.barriers[0];
    if (t.flags & 2u) ++t.moment.barriers[1];
    t.state = State::ready;
  }
  return true;
}

void Machine::run_threadgroup(const std::array<int, 3>& at, bool backwards) {
  position_ = at;
  std::array<int, 3> size;
  for (int d = 0; d < 3; ++d) {
    size[d] = std::min(group_size_[d], launch_.grid[d] - at[d] * group_size_[d]);
  }
  const int n = size[0] * size[1] * size[2];
  threads_.assign(n, {});
  simdgroups_.assign((n + kLanes - 1) / kLanes, {});
  memory_.remove_threadgroup();
  variables_.clear();
  fibres_.reset(n);
  for (int i = 0; i < n; ++i) {
    threads_[i].moment.group = group_;
    threads_[i].moment.thread = static_cast<uint16_t>(i);
    threads_[i].moment.simdgroup = static_cast<uint16_t>(i / kLanes);
    set_attributes(threads_[i], i, at, size);
  }
  ++group_;
  for (;;) {
    bool all_done = true;
    for (int k = 0; k < n; ++k) {
      const int i = backwards ? n - 1 - k : k;
      if (threads_[i].state == State::ready) {
        running_ = i;
        fibres_.resume(i, [](int thread) { machine->run_thread(thread); });
        if (!fault_.empty()) throw Fault(fault_);
      }
      all_done = all_done && threads_[i].state == State::done;
    }
    if (all_done) break;
    if (!release()) throw Fault("[" + kernel_.name + "] " + stuck());
  }
  report_.threads += n;
  ++report_.threadgroups;
}

Result Machine::run(bool backwards, const Options& options) {
  count_loads_ = options.loads;
  memory_ = {};
  report_ = {};
  numbers_.clear();
  pointers_.clear();
  output_storage_.clear();
  // Shapes are 32-bit, strides 64-bit numbers; each gets its own exact region.
  numbers_.reserve(3 * inputs_.size());
  auto add_numbers = [&](const std::string& name, const std::vector<int64_t>& values, bool wide) {
    numbers_.emplace_back(values);
    void* at = numbers_.back().data();
    if (!wide) {
      for (size_t i = 0; i < values.size(); ++i) {
        static_cast<int32_t*>(at)[i] = static_cast<int32_t>(values[i]);
      }
    }
    memory_.add(name, Space::device, at, static_cast<int64_t>(values.size()) * (wide ? 8 : 4),
                false, true);
    pointers_.push_back(at);
  };
  for (size_t i = 0; i < inputs_.size(); ++i) {
    const Input& input = inputs_[i];
    std::vector<int64_t> strides = input.strides;
    if (strides.empty()) {
      strides.resize(input.shape.size());
      int64_t step = 1;
      for (int d = static_cast<int>(input.shape.size()) - 1; d >= 0; --d) {
        strides[d] = step;
        step *= input.shape[d];
      }
    } else if (kernel_.row_contiguous) {
      throw Fault("[" + kernel_.name + "] " + kernel_.inputs[i] +
                  ": got strides, but MLX would copy it (row_contiguous)");
    }
    int64_t extent = 1;
    for (size_t d = 0; d < input.shape.size(); ++d) extent += (input.shape[d] - 1) * strides[d];
    memory_.add(kernel_.inputs[i], Space::device, const_cast<void*>(input.data),
                extent * metal::type_bytes(input.type), false, true);
    pointers_.push_back(const_cast<void*>(input.data));
    if (input.shape.empty()) continue;
    const Extras extras = extras_of(kernel_, i);
    const std::string& name = kernel_.inputs[i];
    if (extras.shape) add_numbers(name + "_shape", input.shape, false);
    if (extras.strides) add_numbers(name + "_strides", strides, true);
    if (extras.ndim) add_numbers(name + "_ndim", {static_cast<int64_t>(input.shape.size())}, false);
  }
  for (size_t i = 0; i < launch_.outputs.size(); ++i) {
    output_storage_.emplace_back(launch_.outputs[i].nbytes());
    memory_.add(kernel_.outputs[i], Space::device, output_storage_.back().data(),
                launch_.outputs[i].nbytes(), true, false);
    pointers_.push_back(output_storage_.back().data());
  }
  machine = this;
  const int total = groups_[0] * groups_[1] * groups_[2];
  for (int k = 0; k < total; ++k) {
    const int g = backwards ? total - 1 - k : k;
    run_threadgroup({g % groups_[0], g / groups_[0] % groups_[1], g / (groups_[0] * groups_[1])},
                    backwards);
  }
  machine = nullptr;
  if (options.all_written) {
    for (const std::string& name : kernel_.outputs) {
      if (const int64_t n = memory_.never_written(name); n > 0) {
        throw Fault("[" + kernel_.name + "] " + name + ": " + std::to_string(n) +
                    " bytes were never written");
      }
    }
  }
  Result result;
  result.outputs = output_storage_;
  result.report = report_;
  result.report.traffic = memory_.traffic;
  result.report.buffers = memory_.buffers();
  return result;
}

}  // namespace

Result run(const Kernel& kernel, const Launch& launch, const std::vector<Input>& inputs,
           const Options& options) {
  Machine m(kernel, launch, inputs);
  Result result = m.run(false, options);
  if (options.both_orders && m.run(true, options).outputs != result.outputs) {
    throw Fault("[" + kernel.name + "] results depend on the order of the threads");
  }
  return result;
}

Operations count(const Kernel& kernel, const Launch& launch, const std::vector<Input>& inputs) {
  Machine m(kernel, launch, inputs, true);
  const Compiled& code = m.compiled();
  std::fill(code.counts, code.counts + code.n_blocks, 0);
  m.run(false, {.all_written = false});
  Operations all;
  for (int b = 0; b < code.n_blocks; ++b) {
    const auto times = static_cast<int64_t>(code.counts[b]);
    all.floating += times * code.weights[b][0];
    all.integer += times * code.weights[b][1];
    all.memory += times * code.weights[b][2];
  }
  return all;
}

}  // namespace veloxquant::msl

// --- what compiled kernels call
// -------------------------------------------------------------------
using veloxquant::msl::machine;
using veloxquant::msl::Memory;
using veloxquant::msl::State;

#define MSL_EXPORT extern "C" __attribute__((visibility("default"), used))
MSL_EXPORT const uint32_t* msl_attributes() { return machine->attributes(); }
MSL_EXPORT void* msl_threadgroup_variable(uint32_t index, uint32_t bytes) {
  return machine->variable(index, bytes);
}
MSL_EXPORT void msl_threadgroup_barrier(uint32_t flags) {
  machine->wait(State::barrier, flags, __builtin_return_address(0));
}
MSL_EXPORT void msl_simdgroup_barrier(uint32_t flags) {
  machine->wait(State::simd_barrier, flags, __builtin_return_address(0));
}
MSL_EXPORT const char* msl_exchange(uint32_t operation, uint32_t argument, const void* value,
                                    uint32_t bytes, uint32_t* present) {
  return machine->exchange(operation, argument, value, bytes, present, __builtin_return_address(0));
}
MSL_EXPORT uint32_t msl_lane() { return machine->lane(); }
MSL_EXPORT void msl_bad_lane(uint32_t lane) {
  machine->fail("simdgroup operation names lane " + std::to_string(lane) +
                ", which does not exist");
}
MSL_EXPORT void msl_atomic(const volatile void* p, uint32_t bytes) {
  machine->access(reinterpret_cast<uintptr_t>(p), bytes, Memory::Access::atomic, nullptr);
}

#define MSL_HOOK(name, bytes, kind)                                              \
  MSL_EXPORT void __tsan_##name(void* p) {                                       \
    machine->access(reinterpret_cast<uintptr_t>(p), bytes, Memory::Access::kind, \
                    __builtin_return_address(0));                                \
  }
#define MSL_HOOKS(bytes)                       \
  MSL_HOOK(read##bytes, bytes, read)           \
  MSL_HOOK(write##bytes, bytes, write)         \
  MSL_HOOK(unaligned_read##bytes, bytes, read) \
  MSL_HOOK(unaligned_write##bytes, bytes, write)
MSL_HOOKS(1)
MSL_HOOKS(2)
MSL_HOOKS(4)
MSL_HOOKS(8)
MSL_HOOKS(16)
MSL_EXPORT void __tsan_init() {}
MSL_EXPORT void* __tsan_memcpy(void* to, const void* from, size_t n) {
  const auto bytes = static_cast<uint32_t>(n);
  void* site = __builtin_return_address(0);
  machine->access(reinterpret_cast<uintptr_t>(from), bytes, Memory::Access::read, site);
  machine->access(reinterpret_cast<uintptr_t>(to), bytes, Memory::Access::write, site);
  return std::memcpy(to, from, n);
}
MSL_EXPORT void* __tsan_memmove(void* to, const void* from, size_t n) {
  return __tsan_memcpy(to, from, n);
}
MSL_EXPORT void* __tsan_memset(void* to, int value, size_t n) {
  machine->access(reinterpret_cast<uintptr_t>(to), static_cast<uint32_t>(n), Memory::Access::write,
                  nullptr);
  return std::memset(to, value, n);
}
