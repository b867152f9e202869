#!/usr/bin/env bash
# Compiles the CUDA sources for one architecture, of the decode kernels the smallest set (head_dim 64):
#   tools/gpu/compile.sh NVCC FOLDER
# What is compiled already from the same sources is not compiled again.
set -euo pipefail
cd "$(dirname "$0")/../.."
nvcc=$1 folder=$2
mkdir -p "$folder"
stamp=$(cat src/attention/cuda* src/cache/cuda* src/codecs/*/*cuda* src/backends/cuda/* src/math/*.h include/veloxquant/*.h \
  "$0" | sha256sum | cut -c1-16)
[ "$(cat "$folder/stamp" 2>/dev/null)" = "$stamp" ] && exit 0
for source in src/backends/cuda/*.cu src/codecs/*/*.cu src/cache/*.cu src/attention/cuda.cu src/attention/cuda_general*.cu src/attention/cuda_64.cu; do
  echo "$source"
  "$nvcc" -std=c++20 -O1 -I. -Iinclude -gencode arch=compute_80,code=sm_80 -DVELOXQUANT_HAVE_CUDA \
    -cubin -o "$folder/last.cubin" "$source"
done
echo "$stamp" > "$folder/stamp"
