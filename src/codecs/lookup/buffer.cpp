#include "src/codecs/lookup/buffer.h"

#include <iterator>
#include <map>
#include <mutex>
#include <vector>

namespace veloxquant::lookup {
namespace {

constexpr int64_t kMostKept = int64_t{16} << 20;  // bytes that wait for their next use

struct Pool {
  std::mutex mutex;
  std::multimap<int64_t, hwy::AlignedFreeUniquePtr<float[]>> free;
  int64_t kept = 0;
};

// Never destroyed: buffers may come back while the process ends.
Pool& pool() {
  static Pool* instance = new Pool;
  return *instance;
}

}  // namespace

void GiveBack::operator()(float* data) const {
  if (data == nullptr) return;
  const int64_t bytes = size * static_cast<int64_t>(sizeof(float));
  Pool& p = pool();
  {
    std::lock_guard<std::mutex> lock(p.mutex);
    if (p.kept + bytes <= kMostKept) {
      p.kept += bytes;
      p.free.emplace(size,
                     hwy::AlignedFreeUniquePtr<float[]>(data, hwy::AlignedFreer(nullptr, nullptr)));
      return;
    }
  }
  hwy::FreeAlignedBytes(data, nullptr, nullptr);
}

Buffer take_buffer(int64_t size) {
  Pool& p = pool();
  {
    std::lock_guard<std::mutex> lock(p.mutex);
    const auto next = p.free.upper_bound(size);
    // The one that came back last: it may still be in this core's caches.
    const auto found = next == p.free.begin() ? p.free.end() : std::prev(next);
    if (found != p.free.end() && found->first == size) {
      float* data = found->second.release();
      p.free.erase(found);
      p.kept -= size * static_cast<int64_t>(sizeof(float));
      return Buffer(data, GiveBack{size});
    }
  }
  return Buffer(hwy::AllocateAligned<float>(size).release(), GiveBack{size});
}

}  // namespace veloxquant::lookup
