#!/usr/bin/env bash
# MLX on CUDA as a real device for the extension. Here, then on a GPU machine that has nvcc, PyTorch's CUDA 13 libraries
# and Python 3.12, but none of our dependencies and no internet:
#   tools/gpu/mlx.sh pack BUILD MLX.tar.xz FOLDER    BUILD: has libveloxquant.a; MLX.tar.xz: site-packages of mlx[cuda13];
#                                                    $PYTHON312: a directory with Python.h of 3.12
#   FOLDER/tools/gpu/mlx.sh run OUT PART...          mlx_check.py by parts: those that time something one after the other
#                                                    at the end, all others at once (MLX compiles a kernel in 2 to 3 s, in
#                                                    every process again: PART:0/4 ... are shares); OUT/mlx_check.log
set -euo pipefail
mode=$1
shift
if [ "$mode" = pack ]; then
  build=$(realpath "$1") mlx=$(realpath "$2") folder=$(realpath -m "$3") objects=$(realpath -m "$1")/mlx_cuda
  include=${PYTHON312:?a directory with Python.h of 3.12}
  cd "$(dirname "$0")/../.."
  mkdir -p "$folder" "$objects/site"
  find "$folder" -mindepth 1 -delete
  mkdir -p "$folder/site" "$folder/tools"
  cp -r tools/gpu "$folder/tools"
  cp -r python "$folder/python"
  cp README.md "$folder"
  seeds=${VELOXQUANT_SEEDS:-../shared/seeds}
  [ ! -d "$seeds" ] || cp -r "$seeds" "$folder/seeds"
  cp "$mlx" "$folder/mlx.tar.xz"
  # Pure Python; nanobind as MLX has it.
  site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  cp -r "$site"/mlx_lm "$site"/mlx_lm-*.dist-info "$site"/gguf "$folder/site"
  find "$folder" \( -name '*.so' -o -name __pycache__ \) -prune -exec rm -r {} +
  for library in libhwy.so.1 libtbb.so.12 libz.so.1; do
    cp -L "$(ldconfig -p | awk -v name="$library" '$1 == name { print $NF; exit }')" "$folder"
  done
  [ -d "$objects/site/mlx" ] || tar -xJf "$mlx" -C "$objects/site"
  digest=$(for file in $(printf '%s\n' python/bindings/*.cpp | LC_ALL=C sort); do sha256sum "$file" | cut -d' ' -f1; done | tr -d '\n' | sha256sum | cut -d' ' -f1)
  version=$(grep -oE 'VERSION [0-9.]+ LANGUAGES' CMakeLists.txt | cut -d' ' -f2)
  flags="-std=c++20 -O2 -fPIC -fvisibility=hidden -fno-strict-aliasing -ffp-contract=off -DNB_DOMAIN=mlx -DNDEBUG -I. -Iinclude
    -I$include -I$site/nanobind/include -I$site/nanobind/ext/robin_map/include -isystem $objects/site/mlx/include
    -DVELOXQUANT_VERSION=\"$version\" -DVELOXQUANT_MLX_VERSION=\"0.32.4\" -DVELOXQUANT_BINDINGS=\"$digest\""
  rm -f "$objects"/*.o
  # shellcheck disable=SC2086
  for source in src/mlx/*.cpp python/bindings/*.cpp "$site/nanobind/src/nb_combined.cpp"; do
    printf '%s\n' "$source"
  done | xargs -P "$(nproc)" -I{} sh -c \
    "${CMAKE_CXX_COMPILER_LAUNCHER:-} g++ $(echo $flags | sed 's/"/\\"/g') -c -o $objects/\$(echo {} | tr / _).o {}"
  # What MLX's library needs itself is on the other machine.
  g++ -shared -s -o "$folder/python/veloxquant_mlx/_ext.so" "$objects"/*.o "$build/libveloxquant.a" \
    -L"$objects/site/mlx/lib" -lmlx -Wl,--allow-shlib-undefined -L"$folder" -l:libhwy.so.1 -l:libtbb.so.12 -l:libz.so.1
  du -sh "$folder"
  exit
fi
cd "$(dirname "$0")/../.."
out=$(realpath -m "$1")
shift
build=/tmp/veloxquant_mlx python=${PYTHON:-python3}
mkdir -p "$out" "$build/site"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
[ -d "$build/site/mlx" ] || tar -xJf mlx.tar.xz -C "$build/site"
cp -r site/. "$build/site"
ln -sfn "$($python -c 'import nvidia; print(list(nvidia.__path__)[0])')" "$build/site/nvidia"
export LD_LIBRARY_PATH=$PWD:$build/site/mlx/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export PYTHONPATH=$PWD/python:$PWD/python/tests:$build/site PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# Products of a model in fp32, as the CPU has them: what differs then is ours.
export MLX_ENABLE_TF32=${MLX_ENABLE_TF32:-0} VELOXQUANT_SEEDS=$PWD/seeds
# ALONE=0: figures are not the point of this run.
timed() { [[ ${ALONE:-1} = 1 && ${1%%:*} =~ ^(speed|bench|launches)$ ]]; }
part() {  # its own kernels: MLX writes them without a lock
  local log=$build/${1//[:\/]/_}.log
  MLX_PTX_CACHE_DIR=${log%.log} timeout "${LIMIT:-100}" $python tools/gpu/mlx_check.py "$out" "$1" > "$log" 2>&1 || echo "exit status $?" >> "$log"
  cat "$log" >> "$out/mlx_check.log"
  echo "$1 after $SECONDS s: $(tail -n 1 "$log" | cut -c1-300)"
}
for name in "$@"; do
  timed "$name" || part "$name" &
done
wait
for name in "$@"; do
  ! timed "$name" || part "$name"
done
grep -h -E '^(FAILED|speed:|Traceback|[A-Za-z.]*Error)' "$out/mlx_check.log" || true
