#!/usr/bin/env bash
# Everything that needs a GPU, in ten minutes: builds, tests, sanitizers, benchmarks.
#
#   scripts/gpu_check.sh [--only PART]... [--out DIR] [--text FILE]... [--seconds N] [--list]
#
# Needs a GPU, nvcc, a C++20 compiler, cmake, and a Python ($PYTHON, else python3) with torch for CUDA,
# pybind11 and pytest; no network. Every part has a time of its own: one that overruns is stopped,
# and the rest runs. Figures go to DIR, by default benchmarks/results/<gpu>/, as JSON; those that are
# looked at last to DIR/more.tar.gz, as some machines hand back eight files and no more; what the
# parts print, as they print it, to DIR/gpu_check.log. Where the checkout has no git history,
# L3EXT_COMMIT names the commit.
#
# Exits with 0 if all parts passed, 1 if one failed or was stopped, 2 for a wrong call, 3 where there
# is nothing to check with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# --- parts: name, seconds, what -------------------------------------------------------------------
parts() {
  cat <<'PARTS'
build      180  compile the Python module, the device's tests and the benchmarks for this GPU
device      50  C++: every kernel on the device against the CPU's; the runtime's device
tests      120  pytest tests/gpu: values, data, plans, bits, errors
memcheck    90  compute-sanitizer: memcheck
compiled   120  pytest tests/gpu: what torch compiles, graphs, models, offloading
bench      100  forward, backward, decode and plan against the floor, Zipf's law
profile     40  where the time of these goes, kernel by kernel
tied        35  forward and decode of a tied table
graph       60  a decode step in one graph, its table on the device and in host memory
sanitize   150  compute-sanitizer: synccheck, initcheck, racecheck
peers      150  forward and backward beside what users write today
choices     60  tiles, splits and paths that the kernels could take, against those that they do
text        60  the same as bench on real text and its real allocation
cpp        120  the other C++ tests, the emulation's too: compile and run them
fetch       60  rows from host memory: copy engines, kernel, prefetcher (needs google-benchmark)
benchcpp    45  the C++ benchmark program (needs google-benchmark)
PARTS
}

build() {
  local google=OFF
  if [[ -e /usr/include/benchmark/benchmark.h || -e /usr/local/include/benchmark/benchmark.h ]]; then
    google=ON
  fi
  local generator=()
  if command -v ninja >/dev/null; then generator=(-G Ninja); fi
  rm -f l3ext/_C.*.so
  cmake -S . -B "$build" "${generator[@]}" -DL3EXT_CUDA=ON -DL3EXT_TESTS=ON \
    -DL3EXT_BENCHMARKS="$google" -DCMAKE_CUDA_ARCHITECTURES="$(architecture)" -DSKBUILD=ON \
    -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)"
  make_targets _C
  cp "$build"/_C.*.so l3ext/
  local failed=0
  make_targets "${device_tests[@]}" || failed=1
  if [[ $google == ON ]]; then make_targets "${benchmarks[@]}" || failed=1; fi
  return "$failed"
}

# $@: targets. One that fails takes no other with it.
make_targets() {
  local keep_going=(-k)
  if [[ -e $build/build.ninja ]]; then keep_going=(-k 0); fi
  cmake --build "$build" --parallel "$(nproc)" --target "$@" -- "${keep_going[@]}"
}

device() {
  local program failed=0
  for program in "${device_tests[@]}"; do
    echo "== $program"
    limited 30 "$build/tests/cpp/$program" || failed=1
  done
  return "$failed"
}

# Two processes: where one has lost the device, all else in it fails too.
tests() { run_pytest 60 "${value_tests[@]}"; }

compiled() { run_pytest 90 "${compiled_tests[@]}"; }

# $1: seconds of a test; the rest: which of tests/gpu. -q is in pyproject.toml: this is -v.
run_pytest() {
  local limit=$1 files=("${@:2}")
  # One that hangs says where: from outside of Python, and where the plugin is it ends, too.
  local options=(-vv -k "not cpu" -o faulthandler_timeout="$((limit - 5))")
  if "$python" -c 'import pytest_timeout' 2>/dev/null; then
    options+=(--timeout="$limit" --timeout-method=thread)
  fi
  files=("${files[@]/#/tests/gpu/test_}")
  "$python" -m pytest "${options[@]}" "${files[@]/%/.py}"
}

bench() { run_bench "$out/attention-bench.json" --peer none --budget 8; }

profile() {
  "$python" benchmarks/profile_attention.py --device cuda --output "$out/attention-profile.json"
}

tied() { run_bench "$out/attention-tied.json" --tied --regime forward --regime decode --budget 3; }

graph() {
  "$python" benchmarks/compare_graph_steps.py --device cuda --budget 1.5 \
    --output "$out/graph-steps.json"
}

peers() {
  run_bench "$out/attention-peers.json" --regime forward --regime backward --runs 20 --budget 8 \
    --peer "paper's listing compiled" --peer "grouped GEMM" --peer "loop of mm" \
    --peer "padded gather" --peer FlexAttention
}

choices() {
  "$python" benchmarks/compare_choices.py --device cuda --output "$out/choices.json"
}

text() {
  local files=("${text_files[@]}")
  if ((${#files[@]} == 0)); then
    mapfile -t files < <("$python" -c 'import glob, sysconfig
print("\n".join(sorted(glob.glob(sysconfig.get_path("stdlib") + "/*.py"))))')
  fi
  run_bench "$more/attention-text.json" "${files[@]}" --peer none --budget 5
}

# $1: the result; the rest: arguments of `l3ext bench attention`
run_bench() { "$python" -m l3ext bench attention --device cuda --output "$@"; }

memcheck() { under_sanitizer memcheck; }

sanitize() { under_sanitizer synccheck initcheck racecheck; } # the slowest last

# $@: tools
under_sanitizer() {
  local sanitizer tool program options output=$build/sanitizer.txt failed=0
  sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
  if [[ ! -x $sanitizer ]]; then
    skip "no compute-sanitizer here"
  fi
  for tool in "$@"; do
    for program in "${device_tests[@]}"; do
      echo "== $tool $program"
      options=() # refused calls are part of the tests, which check what comes of them
      if [[ $tool == memcheck ]]; then options=(--report-api-errors no); fi
      if limited 60 "$sanitizer" --tool "$tool" "${options[@]}" --error-exitcode 1 \
        "$build/tests/cpp/$program" 2>&1 | tee "$output"; then
        continue
      fi
      # Some virtual machines have a GPU that it cannot look into.
      if ((!failed)) && grep -qF "Device not supported" "$output"; then
        skip "compute-sanitizer does not support the device here"
      fi
      failed=1
    done
  done
  return "$failed"
}

cpp() {
  local failed=0
  make_targets all || failed=$?
  ctest --test-dir "$build" --output-on-failure --timeout 60 --parallel "$(nproc)" || failed=$?
  return "$failed"
}

fetch() { run_program bench_prefetch prefetch-cpp; }

benchcpp() { run_program bench_segmented_attention attention-cpp; }

# $1: the program, $2: name of the result
run_program() {
  local program=$build/benchmarks/$1
  if [[ ! -x $program ]]; then
    skip "google-benchmark is not here: the C++ benchmark was not built"
  fi
  "$program" --benchmark_filter=Cuda --benchmark_out="$more/$2.json" --benchmark_out_format=json
}

# --- the rest -------------------------------------------------------------------------------------
# $1: seconds; the rest: a command. It stays in the process group of its part, with which it ends.
limited() {
  local status=0
  timeout --foreground --kill-after=5 "$@" || status=$?
  if ((status == 124 || status == 137)); then echo "stopped after $1 s"; fi
  return "$status"
}

skip() {
  echo "skipped: $1"
  exit "$skipped"
}

fail() { # $1: exit status, $2: why
  echo "gpu_check: $2" >&2
  exit "$1"
}

part_names() { parts | awk '{print $1}'; }

# As CMake names it: 9.0 -> 90a-real.
architecture() {
  local capability
  capability=$(query compute_cap)
  case $capability in
    9.0) echo 90a-real ;;
    *) echo "${capability/./}-real" ;;
  esac
}

query() { nvidia-smi --query-gpu="$1" --format=csv,noheader --id=0; }

require() {
  command -v nvidia-smi >/dev/null || fail 3 "no GPU here: nvidia-smi is not on PATH"
  query name >/dev/null 2>&1 || fail 3 "no GPU here: nvidia-smi finds none"
  if ! command -v nvcc >/dev/null && [[ -x /usr/local/cuda/bin/nvcc ]]; then
    export PATH=/usr/local/cuda/bin:$PATH
  fi
  local tool
  for tool in nvcc cmake ctest "$python"; do
    command -v "$tool" >/dev/null || fail 3 "$tool: not on PATH"
  done
  "$python" -c 'import torch, pybind11, pytest; assert torch.cuda.is_available()' ||
    fail 3 "$python: expected one with torch for CUDA, pybind11 and pytest"
}

# Runs one part in a process of its own, so that its time can be limited. What it says is in the log
# while it runs, and what it has measured in files: nothing is lost where all of this is stopped.
run_part() { # $1: name, $2: seconds
  local began=$SECONDS status=0 log=$out/gpu_check.log said word
  echo "=== $1" >>"$log"
  said=$(($(stat -c %s "$log") + 1))
  timeout --signal=INT --kill-after=10 "$2" "$BASH" "$self" --inside "$1" >>"$log" 2>&1 || status=$?
  case $status in
    0) word=passed ;;
    "$skipped") word="$(tail -n 1 "$log")" ;;
    124 | 137) word="stopped after $2 s" ;;
    *) word="failed with exit status $status" ;;
  esac
  results+=("$(printf '%-10s %4d s  %s' "$1" "$((SECONDS - began))" "$word")")
  echo "${results[-1]}"
  if [[ $word != passed && $status != "$skipped" ]]; then
    good=false
    tail -c "+$said" "$log" | tail -n 30 | sed 's/^/    /'
  fi
  echo "=== $1: $word" >>"$log"
  rm -f "$out"/*.tmp.* "$more"/*.tmp.* # of a program that was stopped as it wrote
  if compgen -G "$more/*" >/dev/null; then tar -C "$more" -czf "$out/$archive" .; fi
}

self=$PWD/scripts/$(basename "${BASH_SOURCE[0]}")
skipped=77
build=build/gpu
device_tests=(cuda_device_test cuda_runtime_test)
benchmarks=(bench_prefetch bench_segmented_attention)
value_tests=(values data plans sparse_and_directory bits errors) # the first that matter
compiled_tests=(torch graphs models offload bench freed_in_capture)
more=$build/more # what goes into the archive
archive=more.tar.gz
python=${PYTHON:-python3}
out=
total=570
only=()
text_files=()
inside=
while (($#)); do
  case $1 in
    --list)
      parts
      exit 0
      ;;
    --only | --out | --text | --seconds | --inside)
      (($# > 1)) || fail 2 "$1: expected a value, got none"
      case $1 in
        --only)
          part_names | grep -qxF -- "$2" ||
            fail 2 "--only: expected one of $(part_names | paste -sd ' '), got $2"
          only+=("$2")
          ;;
        --out) out=$2 ;;
        --text)
          [[ -r $2 ]] || fail 2 "--text: cannot read $2"
          text_files+=("$(realpath -- "$2")")
          ;;
        --seconds)
          [[ $2 =~ ^[1-9][0-9]*$ ]] || fail 2 "--seconds: expected a whole number, got $2"
          total=$2
          ;;
        --inside) inside=$2 ;;
      esac
      shift 2
      ;;
    *) fail 2 "expected --only, --out, --text, --seconds or --list, got $1" ;;
  esac
done

if [[ -n $inside ]]; then # started by run_part, with what it needs in the environment
  out=$GPU_CHECK_OUT
  mapfile -t text_files <<<"${GPU_CHECK_TEXT-}"
  if [[ -z ${text_files[0]} ]]; then text_files=(); fi
  "$inside"
  exit 0
fi

require
if [[ -z $out ]]; then
  out=benchmarks/results/$(query name | tr '[:upper:]' '[:lower:]' | tr -cs 'a-z0-9\n' -)
fi
mkdir -p "$out" "$build"
out=$(realpath -- "$out")
: >"$out/gpu_check.log"
rm -rf "$more"
mkdir "$more"
if [[ -e $out/$archive ]]; then tar -C "$more" -xzf "$out/$archive"; fi
export GPU_CHECK_OUT=$out PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
GPU_CHECK_TEXT=$(printf '%s\n' "${text_files[@]}")
export GPU_CHECK_TEXT
if [[ -z ${L3EXT_COMMIT-} ]]; then
  L3EXT_COMMIT=$(git describe --always --dirty 2>/dev/null || echo unknown)
  export L3EXT_COMMIT
fi
echo "$(query name), driver $(query driver_version), commit $L3EXT_COMMIT; results in $out" |
  tee -a "$out/gpu_check.log"

results=()
good=true
while read -r name seconds _; do
  # Everything stands on the build, which does nothing where nothing has changed.
  if ((${#only[@]})) && [[ $name != build ]] && ! printf '%s\n' "${only[@]}" | grep -qxF "$name"; then
    continue
  fi
  left=$((total - SECONDS))
  if ((left < 3)); then
    results+=("$(printf '%-10s    0 s  not run: the time is up' "$name")")
    good=false
    continue
  fi
  run_part "$name" "$((seconds < left ? seconds : left))"
  if [[ $name == build ]] && ! compgen -G "l3ext/_C.*.so" >/dev/null; then
    break # nothing stands without it
  fi
done < <(parts)

echo
printf '%s\n' "${results[@]}"
mapfile -t figures < <(compgen -G "$out/*.json"; compgen -G "$more/*.json")
if ((${#figures[@]})); then "$python" scripts/summarize_bench.py "${figures[@]}" || good=false; fi
"$good"
