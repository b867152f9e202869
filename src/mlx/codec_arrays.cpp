#include "src/mlx/codec_arrays.h"

#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "src/mlx/views.h"

namespace veloxquant {
namespace mx = mlx::core;

int64_t CodecArrays::nbytes() const {
  int64_t bytes = 0;
  for (const auto& [name, array] : arrays) bytes += static_cast<int64_t>(array.nbytes());
  return bytes;
}

SharedCodec make_codec_arrays(CodecSpec spec, std::map<std::string, mx::array> arrays) {
  auto codec = std::make_shared<CodecArrays>();
  codec->spec = std::move(spec);
  CodecTables tables;
  for (auto& [name, array] : arrays) {
    array = mx::contiguous(array, false, mx::Device::cpu);
    mx::eval(array);
    tables[name] = view_of(array);
  }
  codec->arrays = std::move(arrays);
  codec->core = make_codec(codec->spec, tables);
  return codec;
}

SharedCodec exact_codec_arrays(Side side, int n_kv_heads, int head_dim, DType dtype) {
  CodecSpec spec{"exact", side, n_kv_heads, head_dim, {}};
  spec.options["dtype"] = std::string(dtype_name(dtype));
  return make_codec_arrays(std::move(spec), {});
}

}  // namespace veloxquant
