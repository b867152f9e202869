#include "src/codecs/turboquant/sketch.h"

#include <map>
#include <mutex>
#include <utility>

#include "src/math/portable.h"
#include "src/math/random.h"

namespace veloxquant::turboquant {
namespace {

std::shared_ptr<const Sketch> make(int dim, uint64_t seed) {
  auto sketch = std::make_shared<Sketch>();
  sketch->rows.resize(static_cast<size_t>(dim) * dim);
  sketch->columns.resize(sketch->rows.size());
  SplitMix64 random(seed, 2);  // streams 0 and 1 are the rotation's
  // Variance of a uniform 16-bit number: (2^32 - 1) / 12.
  const float scale = 1.3214498961e-5f;  // 1 / sqrt(16 (2^32 - 1) / 12)
  for (int i = 0; i < dim; ++i) {
    for (int j = 0; j < dim; ++j) {
      int32_t sum = 0;
      for (int k = 0; k < 4; ++k) {
        const uint64_t bits = random.next();
        for (int part = 0; part < 4; ++part) sum += static_cast<int32_t>(bits >> 16 * part & 65535);
      }
      const float entry = mul(static_cast<float>(sum - 524280), scale);
      sketch->rows[i * dim + j] = entry;
      sketch->columns[j * dim + i] = entry;
    }
  }
  return sketch;
}

}  // namespace

std::shared_ptr<const Sketch> gaussian_sketch(int dim, uint64_t seed) {
  static std::mutex mutex;
  static std::map<std::pair<int, uint64_t>, std::weak_ptr<const Sketch>> known;
  std::lock_guard<std::mutex> lock(mutex);
  std::weak_ptr<const Sketch>& slot = known[{dim, seed}];
  std::shared_ptr<const Sketch> sketch = slot.lock();
  if (sketch == nullptr) slot = sketch = make(dim, seed);
  return sketch;
}

}  // namespace veloxquant::turboquant
