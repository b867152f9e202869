#!/usr/bin/env bash
# Gathers what tools/gpu/run.sh needs on a GPU machine that has nvcc, g++ and PyTorch but none of our
# dependencies:   tools/gpu/pack.sh BUILD FOLDER
# BUILD: a build folder here with libveloxquant.a. FOLDER: 3 MB to carry along.
set -euo pipefail
build=$(realpath "$1") folder=$(realpath -m "$2")
cd "$(dirname "$0")/../.."
rm -rf "$folder"
mkdir -p "$folder/src" "$folder/core"
cp -r include tools "$folder"
cp -r src/attention src/cache src/codecs src/backends src/math "$folder/src"
mkdir "$folder/python"
mkdir "$folder/tests"
cp -r tests/support "$folder/tests"
cp -r python/core_bindings python/veloxquant python/tests_core "$folder/python"
find "$folder/python" \( -name '*.so' -o -name __pycache__ \) -exec rm -r {} +
grep -oE 'VERSION [0-9.]+ LANGUAGES' CMakeLists.txt | cut -d' ' -f2 > "$folder/version"
# The host's part of the core; the CUDA sources are compiled there.
(cd "$build/CMakeFiles/veloxquant.dir" && find . -name '*.cpp.o' ! -name 'cuda_absent*' ! -name 'cuda_tables*') | while read -r object; do
  [ -e "${object%.o}" ] || [ -e "$build/${object%.o}" ] || continue # of a source that is no longer there
  cp "$build/CMakeFiles/veloxquant.dir/$object" "$folder/core/$(echo "${object#./}" | tr / _)"
done
strip -g "$folder"/core/*.o
ar rcs "$folder/core.a" "$folder"/core/*.o
rm -r "$folder/core"
for library in libhwy.so.1 libtbb.so.12 libz.so.1; do
  cp -L "$(ldconfig -p | awk -v name="$library" '$1 == name { print $NF; exit }')" "$folder"
done
du -sh "$folder"
