#include "python/bindings/module.h"

#include "veloxquant/error.h"

namespace nb = nanobind;

NB_MODULE(_ext, m) {
  m.doc() = "VeloxQuant's C++ core and its MLX operations.";
  m.attr("version") = VELOXQUANT_VERSION;
  m.attr("bindings") = VELOXQUANT_BINDINGS;  // digest of the sources of this module
  // The core's one-sentence errors are ValueErrors in Python.
  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const veloxquant::Error& e) {
      PyErr_SetString(PyExc_ValueError, e.what());
    }
  });
  veloxquant::bind_runtime(m);
  veloxquant::bind_cache(m);
  veloxquant::bind_calibration(m);
  veloxquant::bind_commvq(m);
  veloxquant::bind_artifacts(m);
  veloxquant::bind_scalar(m);
  veloxquant::bind_vecinfer(m);
  veloxquant::bind_signs(m);
  veloxquant::bind_gpu(m);
}
