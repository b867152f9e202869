// What a kernel may touch, byte by byte: bounds, what was never written, and races.
//
// Two accesses to one byte by different threads, one of them a write, must be ordered: by a
// threadgroup_barrier that names that memory, or, inside a simdgroup, by a simdgroup_barrier.
// Threads of different threadgroups are never ordered. Atomics are ordered among themselves.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace veloxquant::msl {

enum class Space : uint8_t { device, threadgroup };

// Where a thread stands.
struct Moment {
  uint32_t group = 0;   // a number of its own for every threadgroup
  uint16_t thread = 0;  // in the threadgroup
  uint16_t simdgroup = 0;
  uint32_t barriers[2] = {0, 0};  // passed, by space
  uint32_t simd_barriers[2] = {0, 0};
};

// Bytes read of one buffer: as threads asked for them, each once a load of a simdgroup (which a GPU
// makes one, whatever its lanes share; counted where Options::loads says so), and each once.
struct BufferTraffic {
  int64_t requested = 0, loaded = 0, once = 0;
};

struct Traffic {
  int64_t device_read = 0, device_written = 0;  // bytes that threads asked for
  int64_t device_distinct = 0;  // bytes read, each once a threadgroup: what a cache lets through
  int64_t threadgroup_accesses = 0;
};

class Memory {
 public:
  // `written`: the kernel finds something there (inputs). Otherwise every byte is poison until a
  // thread writes it.
  void add(const std::string& name, Space space, void* begin, int64_t bytes, bool writable,
           bool written);
  void remove_threadgroup();  // forgets the variables of a threadgroup

  enum class Access { read, write, atomic };
  // Empty, or what is wrong.
  std::string access(uintptr_t address, uint32_t bytes, Access access, const Moment& moment);

  // A read of device memory by the instruction at `site`: the n-th time that a thread comes there
  // is one load of its simdgroup.
  void load(uintptr_t address, uint32_t bytes, const void* site, const Moment& moment);

  // Bytes of an output that no thread wrote.
  int64_t never_written(const std::string& name) const;

  Traffic traffic;
  std::map<std::string, BufferTraffic> buffers() const;  // in device memory

 private:
  struct Mark {  // who, when; thread + 1, 0: nobody
    uint32_t group = 0, barriers = 0, simd_barriers = 0;
    uint16_t thread = 0, simdgroup = 0;
    bool atomic = false;
  };
  struct Byte {
    bool written = false;
    Mark writer, reader, other_reader;  // the last two readers, of different simdgroups if any
  };
  struct Region {
    std::string name;
    Space space;
    uintptr_t begin, end;
    bool writable;
    std::vector<Byte> bytes;        // of writable regions
    std::vector<uint32_t> read_by;  // device: the threadgroup that last read a byte, + 1
    BufferTraffic traffic;
  };

  Region* region_of(uintptr_t address, uint32_t bytes);
  std::string outside(uintptr_t address, uint32_t bytes, Access access) const;
  static bool ordered(const Mark& mark, const Moment& moment, Space space);

  std::vector<Region> regions_;
  std::unordered_map<uint64_t, uint32_t> times_;  // of a site and thread, in this threadgroup
  std::unordered_set<uint64_t> loaded_;           // bytes of loads, in this threadgroup
};

}  // namespace veloxquant::msl
