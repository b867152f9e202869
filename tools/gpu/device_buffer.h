// Device memory with guard bands, for the programs that check and time the CUDA kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

inline void cuda_ok(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// `bytes` bytes between two bands of 4 KB that nothing may write.
class DeviceBuffer {
 public:
  static constexpr size_t kGuard = 4096;
  static constexpr int kFill = 0xff;  // fp16, bf16 and fp32 NaN: an unwritten output shows

  explicit DeviceBuffer(size_t bytes) : bytes_(bytes) {
    cuda_ok(cudaMalloc(reinterpret_cast<void**>(&base_), bytes + 2 * kGuard), "cudaMalloc");
    cuda_ok(cudaMemset(base_, kFill, bytes + 2 * kGuard), "cudaMemset");
  }
  template <class T>
  explicit DeviceBuffer(const std::vector<T>& data) : DeviceBuffer(data.size() * sizeof(T)) {
    if (!data.empty())
      cuda_ok(cudaMemcpy(get(), data.data(), bytes_, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  ~DeviceBuffer() { cudaFree(base_); }

  uint8_t* get() const { return base_ + kGuard; }
  size_t bytes() const { return bytes_; }
  void fill(int byte) { cuda_ok(cudaMemset(get(), byte, bytes_), "cudaMemset"); }

  template <class T>
  std::vector<T> host() const {
    std::vector<T> data(bytes_ / sizeof(T));
    cuda_ok(cudaMemcpy(data.data(), get(), data.size() * sizeof(T), cudaMemcpyDeviceToHost),
            "cudaMemcpy");
    return data;
  }
  bool guards_intact() const {
    std::vector<uint8_t> band(kGuard);
    for (uint8_t* at : {base_, base_ + kGuard + bytes_}) {
      cuda_ok(cudaMemcpy(band.data(), at, kGuard, cudaMemcpyDeviceToHost), "cudaMemcpy");
      for (uint8_t byte : band) {
        if (byte != kFill) return false;
      }
    }
    return true;
  }

 private:
  uint8_t* base_ = nullptr;
  size_t bytes_;
};
