#include <array>
#include <mutex>

#include "src/backends/cuda/check.h"

namespace veloxquant::backends {

const Device& current_device() {
  constexpr int kMaxDevices = 64;
  static std::array<Device, kMaxDevices> devices;
  static std::array<std::once_flag, kMaxDevices> known;
  int index = 0;
  const cudaError_t status = cudaGetDevice(&index);
  require(status == cudaSuccess, "[cuda] device: got ", cudaGetErrorString(status),
          ", wanted an NVIDIA GPU of compute capability 8.0 or newer");
  require(index < kMaxDevices, "[cuda] device: got number ", index, ", wanted less than ",
          kMaxDevices);
  std::call_once(known[index], [index] {
    Device device;
    const auto read = [index](int* value, cudaDeviceAttr attribute) {
      check(cudaDeviceGetAttribute(value, attribute, index), "cuda");
    };
    read(&device.major, cudaDevAttrComputeCapabilityMajor);
    read(&device.minor, cudaDevAttrComputeCapabilityMinor);
    read(&device.multiprocessors, cudaDevAttrMultiProcessorCount);
    read(&device.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    read(&device.shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    require(device.major >= 8, "[cuda] device: got compute capability ", device.major, ".",
            device.minor, ", wanted 8.0 or newer");
    devices[index] = device;
  });
  return devices[index];
}

}  // namespace veloxquant::backends
