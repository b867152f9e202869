// VELOXQUANT_UNROLL before a loop of a few constant steps over an array of vectors: the array stays
// in registers only where the loop is gone, and -O2 alone does not unroll it.
#pragma once

#if defined(__clang__)
#define VELOXQUANT_UNROLL _Pragma("clang loop unroll(full)")
#else
#define VELOXQUANT_UNROLL _Pragma("GCC unroll 16")
#endif
