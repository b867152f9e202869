#include "tests/msl/memory.h"

#include <algorithm>
#include <cstring>

namespace veloxquant::msl {
namespace {

const char* verb(Memory::Access access) {
  return access == Memory::Access::read    ? "reads"
         : access == Memory::Access::write ? "writes"
                                           : "updates";
}

std::string place(uint32_t bytes, int64_t offset, const std::string& name) {
  return std::to_string(bytes) + " bytes at byte " + std::to_string(offset) + " of `" + name + "`";
}

// One number of two, by the finaliser of splitmix64: those of a threadgroup do not meet in
// practice.
uint64_t mixed(uint64_t a, uint64_t b) {
  uint64_t x = a * 0x9e3779b97f4a7c15u + b;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace

void Memory::add(const std::string& name, Space space, void* begin, int64_t bytes, bool writable,
                 bool written) {
  Region region;
  region.name = name;
  region.space = space;
  region.begin = reinterpret_cast<uintptr_t>(begin);
  region.end = region.begin + bytes;
  region.writable = writable;
  if (writable) region.bytes.resize(bytes);
  if (space == Space::device) region.read_by.resize(bytes);
  for (Byte& b : region.bytes) b.written = written;
  // Whoever reads it all the same gets something that spoils every result: a NaN of each type.
  if (!written) std::memset(begin, 0xff, bytes);
  regions_.push_back(std::move(region));
}

void Memory::remove_threadgroup() {
  regions_.erase(std::remove_if(regions_.begin(), regions_.end(),
                                [](const Region& r) { return r.space == Space::threadgroup; }),
                 regions_.end());
  times_.clear();
  loaded_.clear();
}

void Memory::load(uintptr_t address, uint32_t bytes, const void* site, const Moment& now) {
  Region* region = region_of(address, bytes);
  if (region == nullptr || region->space != Space::device) return;
  const uint64_t at = reinterpret_cast<uintptr_t>(site);
  const uint64_t n = times_[mixed(at, now.thread)]++;
  for (uint32_t i = 0; i < bytes; ++i) {
    const uint64_t load = mixed(mixed(at, n), now.simdgroup);
    region->traffic.loaded += loaded_.insert(mixed(load, address + i)).second;
  }
}

Memory::Region* Memory::region_of(uintptr_t address, uint32_t bytes) {
  for (Region& r : regions_) {
    if (address >= r.begin && address + bytes <= r.end) return &r;
  }
  return nullptr;
}

std::string Memory::outside(uintptr_t address, uint32_t bytes, Access access) const {
  const Region* nearest = nullptr;
  uint64_t distance = UINT64_MAX;
  for (const Region& r : regions_) {
    const uint64_t d = address < r.begin ? r.begin - address : address - r.begin;
    const uint64_t e = address < r.begin ? d : address < r.end ? 0 : address - r.end;
    if (e < distance) distance = e, nearest = &r;
  }
  std::string text = std::string(verb(access)) + " out of bounds: ";
  if (nearest == nullptr || distance > (1u << 30)) return text + "no buffer is near";
  return text + place(bytes, static_cast<int64_t>(address - nearest->begin), nearest->name) +
         ", which has " + std::to_string(nearest->end - nearest->begin);
}

bool Memory::ordered(const Mark& mark, const Moment& now, Space space) {
  if (mark.thread == 0) return true;
  if (mark.group != now.group) return space == Space::threadgroup;
  if (mark.thread == now.thread + 1) return true;
  const int s = static_cast<int>(space);
  if (mark.barriers < now.barriers[s]) return true;
  return mark.simdgroup == now.simdgroup && mark.simd_barriers < now.simd_barriers[s];
}

std::string Memory::access(uintptr_t address, uint32_t bytes, Access access, const Moment& now) {
  Region* region = region_of(address, bytes);
  if (region == nullptr) return outside(address, bytes, access);
  const int64_t offset = static_cast<int64_t>(address - region->begin);
  const int s = static_cast<int>(region->space);
  if (access != Access::read && !region->writable) {
    return "writes to an input: " + place(bytes, offset, region->name);
  }
  if (region->space == Space::threadgroup) {
    ++traffic.threadgroup_accesses;
  } else if (access == Access::write) {
    traffic.device_written += bytes;
  } else {
    traffic.device_read += bytes;
    region->traffic.requested += bytes;
    for (uint32_t i = 0; i < bytes; ++i) {
      uint32_t& reader = region->read_by[offset + i];
      region->traffic.once += reader == 0;
      if (reader != now.group + 1) ++traffic.device_distinct, reader = now.group + 1;
    }
  }
  if (!region->writable) return {};
  Mark mark;
  mark.group = now.group;
  mark.thread = static_cast<uint16_t>(now.thread + 1);
  mark.simdgroup = now.simdgroup;
  mark.barriers = now.barriers[s];
  mark.simd_barriers = now.simd_barriers[s];
  mark.atomic = access == Access::atomic;
  for (uint32_t i = 0; i < bytes; ++i) {
    Byte& b = region->bytes[offset + i];
    if (access != Access::write && !b.written) {
      return "reads what nobody wrote: " + place(bytes, offset, region->name);
    }
    const bool both_atomic = mark.atomic && b.writer.atomic;
    if (!both_atomic && !ordered(b.writer, now, region->space)) {
      return "race: " + std::string(verb(access)) + " " + place(bytes, offset, region->name) +
             " that thread " + std::to_string(b.writer.thread - 1) +
             " wrote without a barrier between them";
    }
    if (access == Access::read) {
      if (b.reader.thread != 0 &&
          (b.reader.group != mark.group || b.reader.simdgroup != mark.simdgroup ||
           b.other_reader.thread == 0)) {
        if (b.reader.thread != mark.thread || b.reader.group != mark.group)
          b.other_reader = b.reader;
      }
      b.reader = mark;
      continue;
    }
    for (const Mark* r : {&b.reader, &b.other_reader}) {
      if (ordered(*r, now, region->space)) continue;
      return "race: " + std::string(verb(access)) + " " + place(bytes, offset, region->name) +
             " that thread " + std::to_string(r->thread - 1) +
             " read without a barrier between them";
    }
    b.written = true;
    b.writer = mark;
  }
  return {};
}

std::map<std::string, BufferTraffic> Memory::buffers() const {
  std::map<std::string, BufferTraffic> all;
  for (const Region& r : regions_) {
    if (r.space == Space::device) all[r.name] = r.traffic;
  }
  return all;
}

int64_t Memory::never_written(const std::string& name) const {
  int64_t n = 0;
  for (const Region& r : regions_) {
    if (r.name != name || !r.writable) continue;
    for (const Byte& b : r.bytes) n += b.written ? 0 : 1;
  }
  return n;
}

}  // namespace veloxquant::msl
