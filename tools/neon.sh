#!/usr/bin/env bash
# Cross-compiles src/math, src/codecs and src/backends with their tests for AArch64 and runs them
# under qemu: the NEON kernels give the reference's bits and those of tests/golden. `make neon`.
#
#   tools/neon.sh [TEST ...]     names without .cpp; default: every test of those layers
#   VELOXQUANT_CONFORMANCE=<n>   every n-th case of conformance_test (default 4; 1: all)
#   GTEST_FILTER=<pattern>       some tests of a program only
#
# Needs g++-aarch64-linux-gnu, qemu-user and the googletest sources, nothing else built for AArch64.
set -euo pipefail
cd "$(dirname "$0")/.."

wanted=(g++-aarch64-linux-gnu qemu-user libgtest-dev libhwy-dev)
missing=()
for package in "${wanted[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [[ ${#missing[@]} -gt 0 ]]; then
  if [[ $(id -u) -ne 0 ]]; then
    echo "Missing: sudo apt-get install -y --no-install-recommends ${missing[*]}" >&2
    exit 1
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null
fi

out=build/neon
googletest=/usr/src/googletest/googletest
compiler="aarch64-linux-gnu-g++"
command -v ccache > /dev/null && compiler="ccache $compiler"
flags="-std=c++20 -O2 -Wall -Wextra -Wno-restrict -Wno-psabi -ffp-contract=off -I. -Iinclude"
flags="$flags '-DHWY_DISABLED_TARGETS=(HWY_SVE|HWY_SVE2|HWY_SVE_256|HWY_SVE2_128)'"  # as CMakeLists.txt
mkdir -p "$out"

is_ours() {  # a test that needs only the layers built here
  ! grep -qE '#include [<"](rapidcheck|src/(attention|cache|calibration|artifacts)/|tests/msl/|nlohmann)|train_vecinfer_rope' "$1" &&
    ! grep -qE '#include "veloxquant/(attention|cache|calibration|artifacts|cuda|rvq_attend)\.h"' "$1"
}
tests=()
for source in src/math/*_test.cpp src/codecs/*_test.cpp src/codecs/*/*_test.cpp tests/*_test.cpp; do
  if [[ -f $source ]] && is_ours "$source"; then
    name=$(basename "$source" .cpp)
    if [[ $# -eq 0 || " $* " == *" $name "* ]]; then tests+=("$source"); fi
  fi
done
library=$(ls src/backends/*.cpp src/backends/cpu/*.cpp src/codecs/*.cpp src/codecs/*/*.cpp |
  grep -vE '_test\.cpp$|backends/threads\.cpp$|cuda|kernel_calls')
library="$library tests/neon/one_target.cpp"

# A makefile, so that only what changed is compiled again and -j works.
{
  echo "CXX = $compiler"
  echo "FLAGS = $flags"
  objects=""
  for source in $library "${tests[@]}"; do
    object="$out/${source//\//_}.o"
    echo "$object: $source; \$(CXX) \$(FLAGS) -DVELOXQUANT_GOLDEN_DIR='\"$PWD/tests/golden\"' -MMD -c \$< -o \$@"
    [[ " $library " == *" $source "* || $library == *"$source"* ]] && objects="$objects $object"
  done
  for source in gtest-all gtest_main; do
    echo "$out/$source.o: $googletest/src/$source.cc; \$(CXX) -std=c++20 -O1 -I$googletest -c \$< -o \$@"
    objects="$objects $out/$source.o"
  done
  programs=""
  for source in "${tests[@]}"; do
    program="$out/$(basename "$source" .cpp)"
    echo "$program: $out/${source//\//_}.o $objects; \$(CXX) -static \$^ -o \$@"
    programs="$programs $program"
  done
  echo "all: $programs"
  echo "-include $out/*.d"
} > "$out/Makefile"
make -f "$out/Makefile" -j "${CMAKE_BUILD_PARALLEL_LEVEL:-$(getconf _NPROCESSORS_ONLN)}" --no-print-directory all \
  > "$out/build.log" 2>&1 || { grep -E 'error|undefined' "$out/build.log" | head -20 >&2; exit 1; }

# An emulated core does a hundredth of the work of a real one: every fourth case of the conformance
# suite (all head dims; all forms of a codec, each at some of them), tests spread over the cores.
export VELOXQUANT_CONFORMANCE=${VELOXQUANT_CONFORMANCE:-4}
GTEST_TOTAL_SHARDS=$(getconf _NPROCESSORS_ONLN)
export GTEST_TOTAL_SHARDS

run() { GTEST_SHARD_INDEX=$2 qemu-aarch64 "$out/$1" --gtest_brief=1 > "$out/$1.$2.log" 2>&1; }
for source in "${tests[@]}"; do
  name=$(basename "$source" .cpp)
  started=$SECONDS
  shards=()
  for ((i = 0; i < GTEST_TOTAL_SHARDS; ++i)); do
    run "$name" "$i" &
    shards+=($!)
  done
  for ((i = 0; i < GTEST_TOTAL_SHARDS; ++i)); do
    if ! wait "${shards[$i]}"; then
      echo "$name: FAILED" >&2
      tail -n 40 "$out/$name.$i.log" >&2
      exit 1
    fi
  done
  passed=$(sed -n 's/.*PASSED  \] \([0-9]*\) test.*/\1/p' "$out/$name".*.log | awk '{ n += $1 } END { print n }')
  echo "$name: $passed passed in $((SECONDS - started)) s"
done
