// Positions only: which tokens are sinks, sealed, or in the tail, and what an append or trim moves.
#include <algorithm>

#include "veloxquant/cache.h"

namespace veloxquant {
namespace {

constexpr int kSpanBlocks = 16;  // a span is extended by copying until it holds this many

}  // namespace

CacheGeometry::CacheGeometry(int window, int sinks)
    : window(window), sinks(sinks), tail_start(sinks) {
  require(window >= 0 && window <= 1 << 20, "[cache] window: got ", window,
          ", wanted 0..1048576 tokens");
  require(sinks >= 0 && sinks <= 1 << 20, "[cache] sinks: got ", sinks,
          ", wanted 0..1048576 tokens");
}

AppendPlan CacheGeometry::plan_append(int64_t n_new) const {
  require(n_new >= 0, "[cache] n_new: got ", n_new, ", wanted at least 0 tokens");
  AppendPlan plan;
  plan.first = length;
  plan.n_new = n_new;
  plan.tail_start = tail_start;
  const int64_t old_enough = length + n_new - window - tail_start;
  plan.n_sealed = old_enough > 0 ? static_cast<int>(old_enough / kBlockTokens) : 0;
  plan.next_tail_start = tail_start + int64_t{kBlockTokens} * plan.n_sealed;
  plan.extends_last_span = plan.n_sealed > 0 && !packed.empty() &&
                           packed.back().last_count == kBlockTokens &&
                           packed.back().n_blocks < kSpanBlocks;
  return plan;
}

void CacheGeometry::commit(const AppendPlan& plan) {
  length = plan.first + plan.n_new;
  tail_start = plan.next_tail_start;
  if (plan.n_sealed == 0) return;
  if (plan.extends_last_span) {
    packed.back().n_blocks += plan.n_sealed;
  } else {
    packed.push_back({plan.tail_start, plan.n_sealed, kBlockTokens});
  }
}

int64_t CacheGeometry::trim(int64_t n) {
  const int64_t forgotten = std::clamp<int64_t>(n, 0, length);
  length -= forgotten;
  if (length >= tail_start) return forgotten;
  while (!packed.empty() && packed.back().start >= length) packed.pop_back();
  tail_start = std::max<int64_t>(length, sinks);
  if (!packed.empty()) {
    PackedSpan& last = packed.back();
    const int64_t kept = std::min(length, last.end()) - last.start;
    last.n_blocks = static_cast<int>((kept + kBlockTokens - 1) / kBlockTokens);
    last.last_count = static_cast<int>(kept - int64_t{kBlockTokens} * (last.n_blocks - 1));
  }
  return forgotten;
}

}  // namespace veloxquant
