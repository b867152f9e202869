// The parts of veloxquant_mlx._ext, one function per file of this folder.
#pragma once

#include <nanobind/nanobind.h>

namespace veloxquant {

// For functions that evaluate arrays: MLX's threads may need the GIL to go on.
using WithoutGil = nanobind::call_guard<nanobind::gil_scoped_release>;

void bind_runtime(nanobind::module_& m);      // devices, SIMD levels, threads, counters
void bind_cache(nanobind::module_& m);        // codecs, snapshots, the cache, attention
void bind_calibration(nanobind::module_& m);  // smooth factors, codebooks
void bind_commvq(nanobind::module_& m);       // RoPE, CommVQ's training and functions
void bind_artifacts(nanobind::module_& m);    // the store
void bind_scalar(nanobind::module_& m);       // turboquant, rvq, bit packing
void bind_vecinfer(nanobind::module_& m);     // the functions of metal/_vecinfer.py
void bind_gpu(nanobind::module_& m);          // GPU kernels, as tests see them
void bind_signs(nanobind::module_& m);        // RaBitQ and QJL functions

}  // namespace veloxquant
