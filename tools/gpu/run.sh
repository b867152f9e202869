#!/usr/bin/env bash
# On a GPU machine, in the folder that pack.sh made: builds, verifies, times, runs the sanitizers, prints the tables.
#   tools/gpu/run.sh [OUT]     a minute on 16 cores and an H200; logs in OUT
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-/tmp/veloxquant_gpu}
build=/tmp/veloxquant_gpu_build
mkdir -p "$out" "$build"
export LD_LIBRARY_PATH=$PWD:${LD_LIBRARY_PATH:-}
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
[ "$arch" = 90 ] && arch=90a
flags="-std=c++20 -O3 -I. -Iinclude -gencode arch=compute_$arch,code=sm_$arch -DVELOXQUANT_HAVE_CUDA"
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader
python3 tools/gpu/sdpa.py > "$out/sdpa.txt" 2>&1 &
for source in tools/gpu/{cuda_bench,cuda_check,problem}.cpp src/codecs/vecinfer/cuda_tables.cpp \
  src/backends/cuda/cuda_device.cu src/attention/cuda.cu; do
  nvcc $flags -c -o "$build/$(basename "$source").o" "$source" &
done
nvcc $flags --fmad=false -c -o "$build/encode.o" src/codecs/vecinfer/cuda.cu &
for dim in 64 96 128 256; do
  nvcc $flags --split-compile=4 -c -o "$build/$dim.o" "src/attention/cuda_$dim.cu" &
done
wait
shared="$build/problem.cpp.o $build/cuda_tables.cpp.o $build/cuda_device.cu.o $build/cuda.cu.o $build/encode.o
  $build/64.o $build/96.o $build/128.o $build/256.o core.a -L. -l:libhwy.so.1 -l:libtbb.so.12 -l:libz.so.1"
for program in cuda_bench cuda_check; do
  nvcc -o "$build/$program" "$build/$program.cpp.o" $shared || exit 1
done
echo "built after $SECONDS s"
cat "$out/sdpa.txt"
"$build/cuda_check" > "$out/check.log" 2>&1
status=$?
tail -1 "$out/check.log"
"$build/cuda_bench" || status=1
# A sanitizer that did not run must not pass: its summary and the program's last line are both wanted.
for tool in memcheck racecheck initcheck synccheck; do
  compute-sanitizer --tool $tool --error-exitcode 3 "$build/cuda_check" quick > "$out/$tool.log" 2>&1 &&
    grep -qE "(ERROR SUMMARY: 0 errors|0 hazards)" "$out/$tool.log" && grep -q " 0 failures" "$out/$tool.log" &&
    echo "$tool: clean" || { echo "$tool: FAILED, see $out/$tool.log"; status=1; }
done
nvidia-smi --query-gpu=clocks.sm,clocks.mem,temperature.gpu --format=csv,noheader
echo "done after $SECONDS s, status $status"
exit $status
