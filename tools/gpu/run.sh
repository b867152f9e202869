#!/usr/bin/env bash
# On a GPU machine, in the folder that pack.sh made: builds, then verifies, times, runs the sanitizers, prints the tables.
#   tools/gpu/run.sh [OUT] [PART...]     parts: check bench sanitize torch general general_bench torch_bench; all but the last two
#   where none is named
# Two minutes on 16 cores and an H200; logs in OUT.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-/tmp/veloxquant_gpu}
shift
parts=" ${*:-check bench sanitize torch general} "
build=/tmp/veloxquant_gpu_build
mkdir -p "$out" "$build"
export LD_LIBRARY_PATH=$PWD:${LD_LIBRARY_PATH:-} PYTHONPATH=$PWD/python PYTHONDONTWRITEBYTECODE=1
wanted() { [[ $parts == *" $1 "* ]]; }
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
[ "$arch" = 90 ] && arch=90a
# -lineinfo leaves the machine code as it is; a sanitizer's report names lines by it.
flags="-std=c++20 -O3 -lineinfo -I. -Iinclude -gencode arch=compute_$arch,code=sm_$arch -DVELOXQUANT_HAVE_CUDA -Xcompiler -fPIC"
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader
wanted bench && { python3 tools/gpu/sdpa.py > "$out/sdpa.txt" 2>&1 & }
sources="src/codecs/vecinfer/cuda_tables.cpp src/backends/cuda/cuda_device.cu src/attention/cuda.cu"
if wanted check || wanted bench || wanted sanitize; then
  sources+=" tools/gpu/cuda_bench.cpp tools/gpu/cuda_check.cpp tools/gpu/append_check.cpp tools/gpu/problem.cpp"
fi
exact="src/codecs/vecinfer/cuda.cu src/cache/cuda_append.cu"
general=false
if wanted general || wanted general_bench || wanted torch || wanted torch_bench; then
  general=true
  sources+=" src/backends/cuda/kernel.cu src/backends/cuda/nvrtc.cu src/attention/cuda_general.cu src/attention/cuda_general_blocks.cu"
  exact+=" src/cache/cuda_append_general.cu"
fi
if wanted general || wanted general_bench; then
  sources+=" tools/gpu/general_check.cpp tools/gpu/general_append.cpp tools/gpu/general_bench.cpp"
fi
for source in $sources; do
  nvcc $flags -c -o "$build/$(basename "$source").o" "$source" &
done
for source in $exact; do
  nvcc $flags --fmad=false -c -o "$build/exact_$(basename "$source").o" "$source" &
done
for dim in 64 96 128 256; do
  nvcc $flags --split-compile=4 -c -o "$build/$dim.o" "src/attention/cuda_$dim.cu" &
  # For racecheck; cuda_shape.cuh says why.
  wanted sanitize && { nvcc $flags -DVELOXQUANT_RACECHECK -c -o "$build/race_$dim.o" "src/attention/cuda_$dim.cu" & }
done
if wanted torch || wanted torch_bench; then
  # The extension for PyTorch; elsewhere `pip install python/core` builds it.
  python=$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')
  nanobind=$(python3 -c 'import nanobind, os; print(os.path.dirname(nanobind.__file__))')
  bind="-std=c++20 -O2 -fPIC -fvisibility=hidden -fno-strict-aliasing -I. -Iinclude -I$python -I$nanobind/include"
  bind+=" -I$nanobind/ext/robin_map/include -I$nanobind/src -DVELOXQUANT_VERSION=\"$(cat version)\""
  for source in python/core_bindings/*.cpp "$nanobind/src/nb_combined.cpp"; do
    g++ $bind -c -o "$build/bind_$(basename "$source").o" "$source" &
  done
fi
wait
kernels="$build/64.o $build/96.o $build/128.o $build/256.o"
shared="$build/cuda_tables.cpp.o $build/cuda_device.cu.o $build/cuda.cu.o $build/exact_cuda.cu.o
  $build/exact_cuda_append.cu.o core.a -L. -l:libhwy.so.1 -l:libtbb.so.12 -l:libz.so.1"
status=0
if wanted check || wanted bench || wanted sanitize; then
  nvcc -o "$build/cuda_bench" "$build"/{cuda_bench,problem}.cpp.o $kernels $shared || exit 1
  nvcc -o "$build/cuda_check" "$build"/{cuda_check,append_check,problem}.cpp.o $kernels $shared || exit 1
  wanted sanitize && { nvcc -o "$build/race_check" "$build"/{cuda_check,append_check,problem}.cpp.o \
    "$build"/race_{64,96,128,256}.o $shared || exit 1; }
fi
if $general; then
  parts_of_general="$build/kernel.cu.o $build/nvrtc.cu.o $build/cuda_general.cu.o $build/cuda_general_blocks.cu.o
    $build/exact_cuda_append_general.cu.o"
fi
if wanted general || wanted general_bench; then
  nvcc -o "$build/general_check" "$build"/general_{check,append}.cpp.o $parts_of_general $kernels $shared -ldl || exit 1
  nvcc -o "$build/general_bench" "$build/general_bench.cpp.o" $parts_of_general $kernels $shared -ldl || exit 1
fi
if wanted torch || wanted torch_bench; then
  nvcc -shared -o python/veloxquant/_core.so "$build"/bind_*.o $parts_of_general $kernels $shared -ldl || exit 1
fi
echo "built after $SECONDS s"
if wanted check; then
  "$build/cuda_check" > "$out/check.log" 2>&1 || status=1
  grep FAILED "$out/check.log" | head -20
  tail -1 "$out/check.log"
fi
if wanted bench; then
  cat "$out/sdpa.txt"
  "$build/cuda_bench" || status=1
fi
if wanted sanitize; then
  # A sanitizer that did not run must not pass: its summary and the program's last line are both wanted.
  for tool in memcheck racecheck initcheck synccheck; do
    program=cuda_check
    [ $tool = racecheck ] && program=race_check
    compute-sanitizer --tool $tool --error-exitcode 3 "$build/$program" quick > "$out/$tool.log" 2>&1 &&
      grep -qE "(ERROR SUMMARY: 0 errors|0 hazards)" "$out/$tool.log" && grep -q " 0 failures" "$out/$tool.log" &&
      echo "$tool: clean" || { echo "$tool: FAILED, see $out/$tool.log"; status=1; }
  done
fi
if wanted general; then
  "$build/general_check" > "$out/general.log" 2>&1 || status=1
  grep FAILED "$out/general.log" | head -20
  tail -1 "$out/general.log"
  compute-sanitizer --tool memcheck --error-exitcode 3 "$build/general_check" quick > "$out/general_memcheck.log" 2>&1 &&
    grep -q "ERROR SUMMARY: 0 errors" "$out/general_memcheck.log" && grep -q " 0 failures" "$out/general_memcheck.log" &&
    echo "general memcheck: clean" || { echo "general memcheck: FAILED, see $out/general_memcheck.log"; status=1; }
fi
if wanted general_bench; then
  python3 tools/gpu/sdpa.py 1x32k 8x32k 1x131k | tee "$out/general_sdpa.txt"
  "$build/general_bench" | tee "$out/general_bench.txt" || status=1
fi
if wanted torch; then
  # Nothing of this may be skipped for want of a GPU or of PyTorch.
  python3 -m pytest -q -rs -p no:cacheprovider python/tests_core > "$out/torch.log" 2>&1 || status=1
  grep -E "^(FAILED|ERROR|SKIPPED)|^E  " "$out/torch.log" | cut -c1-200 | head -20
  tail -1 "$out/torch.log"
  grep -qE "^SKIPPED.*(no GPU|could not import '(torch|transformers))" "$out/torch.log" && { echo "torch: tests were skipped"; status=1; }
fi
if wanted torch_bench; then
  python3 tools/gpu/torch_bench.py ${TORCH_BENCH:-} 2>&1 | tee "$out/torch_bench.txt" || status=1
fi
nvidia-smi --query-gpu=clocks.sm,clocks.mem,temperature.gpu --format=csv,noheader
echo "done after $SECONDS s, status $status"
exit $status
