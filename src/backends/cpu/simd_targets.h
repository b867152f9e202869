// Which of the SIMD levels that were compiled in can run here, and which one does.
#pragma once

#include <string>
#include <vector>

namespace veloxquant::cpu {

std::vector<std::string> supported_targets();  // best first
std::string current_target();
void restrict_target(const std::string& name);  // "" lifts the restriction

// Reads VELOXQUANT_SIMD the first time it is called. Every dispatched entry point calls it.
void apply_environment();

}  // namespace veloxquant::cpu
