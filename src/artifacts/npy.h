// The .npy format, version 1.0, little-endian and row-major only:
//
//   offset 0   93 'N' 'U' 'M' 'P' 'Y'  01 00     magic, version
//          8   header length, uint16
//         10   {'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }   spaces   \n
//   64 * k     the elements
//
// numpy has no bfloat16: such arrays are stored as '<u2', and the manifest keeps the true dtype.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "veloxquant/tensor_view.h"

namespace veloxquant {

// Ours never need more than 192 bytes; numpy itself refuses to parse more than 10,000.
constexpr size_t kMaxNpyHeaderBytes = 4096;
// A file that claims more is refused before anything is allocated.
constexpr int64_t kMaxArrayBytes = int64_t{1} << 36;

struct NpyHeader {
  DType dtype = DType::float32;  // as stored: never bfloat16
  std::vector<int64_t> shape;
  size_t data_offset = 0;
};

// The dtype of the .npy file that holds an array of this dtype.
DType npy_dtype(DType dtype);

// Bytes of the elements. Throws Error, starting with `what`, for more than kMaxDims dimensions,
// a negative dimension, or more than kMaxArrayBytes (an empty array counts its 0 as 1, so that
// strides cannot overflow either).
int64_t checked_array_bytes(DType dtype, const std::vector<int64_t>& shape,
                            const std::string& what);

// Everything in front of the elements, byte for byte as numpy.save writes it.
std::string write_npy_header(DType dtype, const std::vector<int64_t>& shape);

// `start`: the first bytes of a file, up to 10 + kMaxNpyHeaderBytes of them. Throws Error,
// starting with `what`.
NpyHeader read_npy_header(std::string_view start, const std::string& what);

}  // namespace veloxquant
