// A device for the tests that run kernels on the machine.
#pragma once

#include "src/backends/cuda/check.h"

namespace cuda_machine {

// What the code under test is told of the device; tests change it.
veloxquant::backends::Device& device();

}  // namespace cuda_machine
