// Cases of the scalar codecs, which need no tables: every width, scale and form, on both sides.
#pragma once

#include "tests/support/codec_cases.h"

namespace veloxquant::test {

inline Cases turboquant_cases(int head_dim) {
  struct Form {
    int64_t bits;
    const char* scale;
  };
  Cases cases;
  for (Side side : {Side::keys, Side::values}) {
    for (const Form& form :
         {Form{1, "norm_corrected"}, Form{2, "norm_corrected"}, Form{3, "norm_corrected"},
          Form{4, "norm_corrected"}, Form{3, "raw"}, Form{2, "unbiased"}, Form{4, "unbiased"},
          Form{1, "prod"}, Form{3, "prod"}}) {
      auto one = std::make_shared<CodecCase>(std::to_string(form.bits) + " bits " + form.scale +
                                                 (side == Side::keys ? " keys" : " values"),
                                             "turboquant", side, head_dim);
      one->option("bits", form.bits).option("seed", int64_t{7});
      if (std::string(form.scale) == "prod") {
        one->option("prod", int64_t{1});
      } else {
        one->option("scale", std::string(form.scale));
      }
      one->make();
      cases.push_back(one);
    }
  }
  return cases;
}

inline Cases turboquant_rvq_cases(int head_dim) {
  Cases cases;
  for (Side side : {Side::keys, Side::values}) {
    for (int64_t bits = 1; bits <= 4; ++bits) {
      auto one = std::make_shared<CodecCase>(
          std::to_string(bits) + (side == Side::keys ? " bits keys" : " bits values"),
          "turboquant_rvq", side, head_dim);
      one->option("bits", bits).option("seed", int64_t{7}).make();
      cases.push_back(one);
    }
  }
  return cases;
}

}  // namespace veloxquant::test
