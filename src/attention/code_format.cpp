#include "src/attention/code_format.h"

namespace veloxquant::attention {

CodeFormat code_format(const vecinfer::BlockShape& s) {
  return {s.sub_dim, s.n_centroids, s.bits, s.tables};
}

CodeFormat code_format(const turboquant::BlockKernelShape& s) {
  CodeFormat format;
  format.kind = s.prod ? TileKind::sketched : TileKind::scalar;
  format.bits = s.bits;
  format.stages = s.stages;
  format.by_token = s.by_token;
  if (s.prod && !s.by_token) format.n_rows = 2 * s.dim;  // behind the rotation, behind the sketch
  return format;
}

CodeFormat code_format(const rabitq::BlockKernelShape& s) {
  CodeFormat format;
  format.kind = TileKind::planes;
  format.bits = s.bits;
  format.mean = s.mean;
  return format;
}

CodeFormat code_format(const qjl::BlockKernelShape& s, bool fixed_channels) {
  CodeFormat format;
  const bool outliers = s.outliers > 0;
  format.kind = outliers ? TileKind::outliers : TileKind::planes;
  format.bits = outliers ? s.layout.m : 1;
  format.n_rows = outliers ? s.layout.m + s.dim : s.layout.m;
  format.m_out = s.layout.m_out;
  format.outliers = s.outliers;
  format.fixed = fixed_channels;
  return format;
}

}  // namespace veloxquant::attention
