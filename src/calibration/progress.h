// The progress of work that several threads share.
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>

namespace veloxquant {

// Calls report(fraction done) once a step, whichever thread ends it: one call at a time, fractions
// ascending.
class Progress {
 public:
  Progress(int64_t n_steps, const std::function<void(double)>& report)
      : n_steps_(n_steps), report_(report) {}

  void step() {
    if (!report_) return;
    std::lock_guard<std::mutex> lock(mutex_);
    report_(static_cast<double>(++n_done_) / static_cast<double>(n_steps_));
  }

 private:
  int64_t n_steps_, n_done_ = 0;
  const std::function<void(double)>& report_;
  std::mutex mutex_;
};

}  // namespace veloxquant
