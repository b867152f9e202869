// Attention on the codes of the scalar codecs (src/codecs/lookup).
#pragma once

#include <memory>
#include <string>

#include "src/codecs/turboquant/kernels.h"
#include "src/codecs/turboquant/sketch.h"

namespace veloxquant::turboquant {

// The codes of a block as attention reads them. `sketch`: of the `prod` form, else null.
struct CodeView {
  BlockShape shape;
  const RowEncoder* encoder = nullptr;
  const Sketch* sketch = nullptr;
};

std::string code_kernel(const CodeView& view, Side side);
std::unique_ptr<const CodeScores> code_scores(const CodeView& view, const float* q, int n_rows);
std::unique_ptr<CodeSums> code_sums(const CodeView& view, int n_rows);

}  // namespace veloxquant::turboquant
