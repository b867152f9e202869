#!/usr/bin/env bash
# MLX on CUDA as a real device for the extension. Here, then on a GPU machine that has nvcc, g++, PyTorch's CUDA 13
# libraries and Python 3.12, but none of our dependencies and no internet:
#   tools/gpu/mlx.sh pack BUILD MLX.tar.xz FOLDER    BUILD: has libveloxquant.a; MLX.tar.xz: site-packages of mlx[cuda13]
#   FOLDER/tools/gpu/mlx.sh run [OUT] [ARGUMENT...]  builds the extension there, then mlx_check.py OUT ARGUMENT...
# The build is kept in /tmp/veloxquant_mlx while the machine is; kernels that MLX has compiled (2 s each) come back as
# OUT/ptx.tar.gz, and are taken from FOLDER/ptx.tar.gz where that is.
set -euo pipefail
mode=$1
shift
if [ "$mode" = pack ]; then
  build=$(realpath "$1") mlx=$(realpath "$2") folder=$(realpath -m "$3")
  cd "$(dirname "$0")/../.."
  rm -rf "$folder"
  mkdir -p "$folder/site" "$folder/tools"
  cp -r include src "$folder"
  cp -r tools/gpu "$folder/tools"
  cp -r python "$folder/python"
  grep -oE 'VERSION [0-9.]+ LANGUAGES' CMakeLists.txt | cut -d' ' -f2 > "$folder/version"
  cp "$mlx" "$folder/mlx.tar.xz"
  # Pure Python; nanobind as MLX has it.
  site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  cp -r "$site"/mlx_lm "$site"/mlx_lm-*.dist-info "$site"/nanobind "$site"/gguf "$folder/site"
  find "$folder" \( -name '*.so' -o -name __pycache__ \) -prune -exec rm -r {} +
  strip -g -o "$folder/core.a" "$build/libveloxquant.a"
  for library in libhwy.so.1 libtbb.so.12 libz.so.1; do
    cp -L "$(ldconfig -p | awk -v name="$library" '$1 == name { print $NF; exit }')" "$folder"
  done
  du -sh "$folder"
  exit
fi
cd "$(dirname "$0")/../.."
out=$(realpath -m "${1:-/tmp/veloxquant_mlx_out}")
shift || true
build=/tmp/veloxquant_mlx python=${PYTHON:-python3}
mkdir -p "$out" "$build/objects" "$build/site"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
[ -d "$build/site/mlx" ] || tar -xJf mlx.tar.xz -C "$build/site" &
cp -r site/. "$build/site"
cp ./*.so.* "$build"
rm -rf "$build/python"
cp -r python "$build/python"
cp core.a "$build/core.a"
ln -sfn "$($python -c 'import nvidia; print(list(nvidia.__path__)[0])')" "$build/site/nvidia"
wait
digest=$(for file in $(printf '%s\n' python/bindings/*.cpp | LC_ALL=C sort); do sha256sum "$file" | cut -d' ' -f1; done | tr -d '\n' | sha256sum | cut -d' ' -f1)
nanobind=$build/site/nanobind
flags="-std=c++20 -O2 -fPIC -fvisibility=hidden -fno-strict-aliasing -ffp-contract=off -DNB_DOMAIN=mlx -DNDEBUG -I. -Iinclude
  -I$($python -c 'import sysconfig; print(sysconfig.get_path("include"))') -I$nanobind/include -I$nanobind/ext/robin_map/include
  -isystem $build/site/mlx/include -DVELOXQUANT_VERSION=\"$(cat version)\" -DVELOXQUANT_MLX_VERSION=\"0.32.4\"
  -DVELOXQUANT_BINDINGS=\"$digest\""
for source in src/mlx/*.cpp python/bindings/*.cpp "$nanobind/src/nb_combined.cpp"; do
  object=$build/objects/$(echo "${source#"$build"/}" | tr / _).o
  # shellcheck disable=SC2086
  [ "$object" -nt "$source" ] && [ "$source" = "$nanobind/src/nb_combined.cpp" ] || g++ $flags -c -o "$object" "$source" &
done
wait
g++ -shared -o "$build/python/veloxquant_mlx/_ext.so" "$build"/objects/*.o "$build/core.a" -L"$build/site/mlx/lib" -lmlx \
  -Wl,-rpath,"$build/site/mlx/lib" -L"$build" -l:libhwy.so.1 -l:libtbb.so.12 -l:libz.so.1 -Wl,-rpath,"$build"
echo "built after $SECONDS s"
export PYTHONPATH=$build/python:$build/python/tests:$build/site PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 MLX_PTX_CACHE_DIR=$build/ptx
# Products of a model in fp32, as the CPU has them: what differs then is ours.
export MLX_ENABLE_TF32=${MLX_ENABLE_TF32:-0}
mkdir -p "$MLX_PTX_CACHE_DIR"
[ ! -f ptx.tar.gz ] || tar -xzf ptx.tar.gz -C "$MLX_PTX_CACHE_DIR"
trap 'tar -czf "$out/ptx.tar.gz" -C "$MLX_PTX_CACHE_DIR" .' EXIT
$python tools/gpu/mlx_check.py "$out" "$@"
