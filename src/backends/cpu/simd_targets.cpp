#include "src/backends/cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/backends/cpu/simd_targets.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace veloxquant::HWY_NAMESPACE {
const char* target_name() { return hwy::TargetName(HWY_TARGET); }
}  // namespace veloxquant::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <mutex>

#include "src/backends/environment.h"
#include "veloxquant/error.h"

namespace veloxquant {
HWY_EXPORT(target_name);

namespace cpu {
namespace {

// Targets that are both compiled in and supported, as bits; Highway orders better ones lower.
int64_t usable_targets() {
  hwy::SetSupportedTargetsForTest(0);
  return hwy::SupportedTargets() & HWY_TARGETS;
}

int64_t& allowed() {
  static int64_t targets = 0;  // 0: no restriction
  return targets;
}

void apply() {
  hwy::SetSupportedTargetsForTest(allowed());
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

std::mutex& mutex() {
  static std::mutex instance;
  return instance;
}

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

std::vector<std::string> names_of(int64_t targets) {
  std::vector<std::string> names;
  for (; targets != 0; targets &= targets - 1) {
    names.push_back(hwy::TargetName(targets & -targets));
  }
  return names;
}

void restrict_locked(const std::string& name, const char* argument) {
  int64_t usable = usable_targets();
  allowed() = 0;
  if (!name.empty()) {
    for (int64_t rest = usable; rest != 0; rest &= rest - 1) {
      if (name == hwy::TargetName(rest & -rest)) allowed() = rest & -rest;
    }
    if (allowed() == 0) {
      apply();
      fail("[simd] ", argument, ": got '", name, "', wanted one of ", join(names_of(usable)));
    }
  }
  apply();
}

}  // namespace

std::vector<std::string> supported_targets() {
  apply_environment();
  std::lock_guard<std::mutex> lock(mutex());
  int64_t targets = usable_targets();
  apply();
  return names_of(targets);
}

void restrict_target(const std::string& name) {
  apply_environment();
  std::lock_guard<std::mutex> lock(mutex());
  restrict_locked(name, "level");
}

void apply_environment() {
  static std::once_flag once;
  std::call_once(once, [] {
    const std::string& level = environment().simd;
    std::lock_guard<std::mutex> lock(mutex());
    restrict_locked(level, "VELOXQUANT_SIMD");
  });
}

std::string current_target() {
  apply_environment();
  return HWY_DYNAMIC_DISPATCH(target_name)();
}

}  // namespace cpu
}  // namespace veloxquant
#endif  // HWY_ONCE
