#!/usr/bin/env bash
# Cross-compiles src/math, src/codecs and src/backends with their tests for AArch64 and runs them
# under qemu: the NEON kernels give the reference's bits and those of tests/golden. `make neon`.
#
#   tools/neon.sh [TEST ...]     names without .cpp; default: every test of those layers
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
  ! grep -qE '#include [<"](rapidcheck|src/(attention|cache|calibration|artifacts)/|nlohmann)' "$1" &&
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
  grep -vE '_test\.cpp$|backends/threads\.cpp$|cuda')
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

for source in "${tests[@]}"; do
  name=$(basename "$source" .cpp)
  printf '%s: ' "$name"
  if qemu-aarch64 "$out/$name" --gtest_brief=1 > "$out/$name.log" 2>&1; then
    tail -n 1 "$out/$name.log"
  else
    echo FAILED
    tail -n 40 "$out/$name.log" >&2
    exit 1
  fi
done
