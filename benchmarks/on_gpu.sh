#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under nine minutes: build, tests, timings,
# compute-sanitizer. See usage() for how to call it and what it writes.
# Job control: without it bash has a background command ignore SIGINT, and pytest never sums up.
set -muo pipefail

usage() {
  cat <<'TEXT'
bash benchmarks/on_gpu.sh [--dry-run] [--choose] [--seconds N] [FOLDER]

Builds the native code in place, then tests every backend on the GPU, times it against eager PyTorch
and torch.compile, and runs it under compute-sanitizer. Each step has a time limit of its own; a step
that fails or runs out of time is noted, and the rest goes on. Installs nothing.

  FOLDER       where the results go; default $OUT, else gpu-results
  --dry-run    list the steps with their limits and write an empty report; needs no GPU
  --choose     rewrite fused/backends/gpu_choice.json: what "auto" takes on this kind of GPU
  --seconds N  time for everything, default 540; what a step leaves over, the later ones get

compute-sanitizer runs beside the tests; while the timings run, nothing else does.

Environment: PYTHON (default python3; must have torch and pytest), WORKERS (test processes),
TORCH_CUDA_ARCH_LIST (default: this GPU's), CUDA_HOME.

Writes FOLDER/report.md (for reading), timings.json (every row), steps.jsonl (a line a step) and
log.txt (all output). Exit status: 0; 1 if a result was wrong; 2 if nothing could be run.
TEXT
}

refuse() {
  echo "error: $1" >&2
  exit 2
}

DRY=0
CHOOSE=()
BUDGET=540
FOLDER=
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --dry-run) DRY=1 ;;
    --choose) CHOOSE=(--write) ;;
    --seconds)
      [ $# -gt 1 ] || refuse "--seconds needs a number"
      shift
      BUDGET=$1
      [[ $BUDGET =~ ^[1-9][0-9]{0,6}$ ]] || refuse "--seconds $BUDGET is not a whole number above 0"
      ;;
    -*) refuse "unknown option $1, see --help" ;;
    *)
      [ -z "$FOLDER" ] || refuse "more than one folder: $FOLDER and $1"
      FOLDER=$1
      ;;
  esac
  shift
done

FOLDER=${FOLDER:-${OUT:-gpu-results}}
PYTHON=${PYTHON:-python3}
command -v "$PYTHON" >/dev/null || refuse "PYTHON=$PYTHON is not there"
PYTHON=$(command -v "$PYTHON")
case $PYTHON in */*) PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON") ;; esac
mkdir -p "$FOLDER" || refuse "the folder $FOLDER cannot be made"
FOLDER=$(cd "$FOLDER" && pwd)
cd "$(dirname "$0")/.." || refuse "the project's folder cannot be entered"

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# The interpreter's switches would keep the kernels off the GPU.
unset FUSED_TRITON_INTERPRETER TRITON_INTERPRET FUSED_BACKEND

CORES=$(env -u OMP_NUM_THREADS nproc) # nproc heeds that variable
# Half the cores: compilers and compute-sanitizer run beside the tests.
HALF=$(((CORES + 1) / 2))
WORKERS=${WORKERS:-$((HALF < 16 ? HALF : 16))}
STEPS=$FOLDER/steps.jsonl
LOG=$FOLDER/log.txt
STEP_LOG=$(mktemp)
JOB=
WATCHER=
WARM=
BESIDE=()
ALONE=1
WRONG=0
: >"$STEPS"
: >"$LOG"
rm -f "$FOLDER"/timings.json "$FOLDER"/timings.md
# What pytest and compute-sanitizer print of a failure, also when they are cut short.
FAILURE='^FAILED |^ERROR |\b[1-9][0-9]* (failed|errors?)\b|^========= .*(Invalid|Race reported)'
SECONDS=0

# One line of steps.jsonl: name, status, seconds, limit, command; the last line of output is told.
record() {
  "$PYTHON" - "$STEP_LOG" "$@" >>"$STEPS" <<'CODE'
import json, sys

file, step, status, seconds, limit, *command = sys.argv[1:]
with open(file, errors="replace") as text:
    lines = [line.strip(" =\n") for line in text if line.strip(" =\n")]
facts = {"step": step, "status": status, "seconds": int(seconds), "limit": int(limit)}
print(json.dumps(facts | {"told": lines[-1][:200] if lines else "", "command": " ".join(command)}))
CODE
}

report() {
  "$PYTHON" -m benchmarks.gpu_report "$FOLDER" >/dev/null || echo "the report could not be written"
}

# step NAME KIND MOST RESERVE COMMAND…: runs a command for at most MOST seconds, leaving RESERVE to
# later steps. KIND "correct": its failure makes the exit status 1. @SECONDS@ becomes the limit.
step() {
  local name=$1 kind=$2 most=$3 reserve=$4
  shift 4
  # The figures below are for 540 seconds.
  most=$((most * BUDGET / 540)) reserve=$((reserve * BUDGET / 540))
  local limit=$((BUDGET - SECONDS - reserve)) shown="$*"
  limit=$((limit < most ? limit : most))
  : >"$STEP_LOG"
  if [ "$DRY" = 1 ]; then
    printf '%-16s at most %3d s, %3d s left for later: %s\n' "$name" "$most" "$reserve" \
      "${shown%%$'\n'*}"
    record "$name" planned 0 "$most" "$@"
    return
  fi
  if [ "$limit" -lt 5 ]; then
    echo "== $name: no time left"
    record "$name" "no time left" 0 0 "$@"
    return
  fi
  echo "== $name ($limit s at most, $SECONDS s passed)" | tee -a "$LOG"
  local start=$SECONDS status code
  if [ "$ALONE" = 1 ]; then
    tail -n +1 -f "$STEP_LOG" &
    WATCHER=$!
  fi
  timeout --signal=INT --kill-after=10 "$limit" "${@//@SECONDS@/$((limit * 14 / 15))}" \
    >"$STEP_LOG" 2>&1 </dev/null &
  JOB=$!
  wait "$JOB" # in the background, because bash acts on a signal here and not in the foreground
  code=$?
  JOB=
  if [ "$ALONE" = 1 ]; then
    sleep 0.2 # for the last lines to be shown
    kill "$WATCHER" 2>/dev/null
    wait "$WATCHER" 2>/dev/null
    WATCHER=
  fi
  case $code in
    0) status=passed ;;
    124 | 137) status="ran out of time" ;;
    5) status="nothing to run" ;; # pytest found no test for this machine
    *) status="failed ($code)" ;;
  esac
  # Out of time with failures seen is a failure.
  if [ "$status" = "ran out of time" ] && grep -qE "$FAILURE" "$STEP_LOG"; then
    status="failed, then ran out of time"
  fi
  [ "$kind" = tool ] && [ "$code" = 2 ] && status="could not run"
  case $kind/$status in
    correct/failed* | tool/failed*) WRONG=1 ;;
  esac
  record "$name" "$status" $((SECONDS - start)) "$limit" "$@"
  cat "$STEP_LOG" >>"$LOG"
  echo "== $name: $status after $((SECONDS - start)) s" | tee -a "$LOG"
  [ "$ALONE" = 0 ] || report
}

# The same as `step`, while later steps go on: their time limits must leave it its time.
beside() {
  if [ "$DRY" = 1 ]; then
    step "$@"
    return
  fi
  (
    set -m
    ALONE=0
    WRONG=0
    STEP_LOG=$(mktemp)
    trap 'rm -f "$STEP_LOG"' EXIT
    trap 'kill $JOB 2>/dev/null; exit 0' INT TERM
    step "$@"
    exit "$WRONG"
  ) &
  BESIDE+=($!)
}

together() {
  local job
  for job in "${BESIDE[@]}"; do wait "$job" || WRONG=1; done
  BESIDE=()
  report
}

# Compiles what the timings will need while the tests run; ends with the tests.
warm_start() {
  local jobs=$((CORES / 3))
  [ "$DRY" = 0 ] || return
  timeout 300 "$PYTHON" -m benchmarks.gpu_timings --warm --seconds 290 \
    --jobs $((jobs < 1 ? 1 : jobs)) >"$FOLDER/warm.txt" 2>&1 </dev/null &
  WARM=$!
}

warm_stop() {
  [ -n "$WARM" ] || return
  kill "$WARM" 2>/dev/null
  wait "$WARM" 2>/dev/null
  WARM=
  { echo "== compiled ahead" && cat "$FOLDER/warm.txt"; } >>"$LOG"
  rm -f "$FOLDER/warm.txt"
}

finish() {
  local job
  for job in $JOB $WATCHER "${BESIDE[@]}"; do kill "$job" 2>/dev/null; done
  for job in "${BESIDE[@]}"; do wait "$job" 2>/dev/null; done
  warm_stop
  rm -f "$STEP_LOG"
  report
}
trap finish EXIT
trap 'exit 130' INT TERM

tests() { # NAME MOST RESERVE pytest's arguments…
  local name=$1 most=$2 reserve=$3
  shift 3
  # Reproducible products; only here, because it costs speed.
  step "$name" correct "$most" "$reserve" env CUBLAS_WORKSPACE_CONFIG=:4096:8 OMP_NUM_THREADS=1 \
    "$PYTHON" -m pytest -q -p no:cacheprovider --maxfail=5 "${PARALLEL[@]}" "$@"
}

PARALLEL=()
if "$PYTHON" -c "import xdist" 2>/dev/null; then PARALLEL=(-n "$WORKERS"); fi
ARCHITECTURE=${TORCH_CUDA_ARCH_LIST:-}
if [ "$DRY" = 0 ]; then
  ARCHITECTURE=$("$PYTHON" - <<'CODE'
import os, sys

try:
    import torch
except ImportError as error:
    sys.exit(f"error: {error}")
if not torch.cuda.is_available():
    sys.exit("error: torch sees no GPU")
capability = "{}.{}".format(*torch.cuda.get_device_capability())
print(os.environ.get("TORCH_CUDA_ARCH_LIST") or capability)
CODE
  ) || refuse "nothing can be run with $PYTHON (--dry-run needs no GPU)"
fi

# shellcheck disable=SC2016  # expanded by the inner shell
step machine info 30 400 bash -c '
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  for tool in nvcc compute-sanitizer; do
    echo "$tool: $("$tool" --version 2>/dev/null | grep -i -E "release|version" | tail -n 1)"
  done
  "$0" -c "import torch; print(\"torch\", torch.__version__, \"CUDA\", torch.version.cuda)"
  "$0" -c "import triton; print(\"triton\", triton.__version__)"
' "$PYTHON"
step build info 120 330 env FUSED_BUILD=auto TORCH_CUDA_ARCH_LIST="$ARCHITECTURE" \
  MAX_JOBS="$CORES" "$PYTHON" setup.py -q build_ext --inplace
step doctor info 40 320 "$PYTHON" -m fused.doctor
warm_start
beside check correct 240 240 "$PYTHON" -m benchmarks.gpu_check --quick
for tool in memcheck racecheck; do
  for backend in cuda triton; do
    beside "$tool-$backend" tool 240 240 \
      "$PYTHON" -m benchmarks.gpu_check --quick --backends "$backend" --tool "$tool"
  done
done
STAGES=(tests/test_stages.py tests/test_evaluation_ops.py tests/test_spreadless_maps.py)
tests tests-reference 60 390 "${STAGES[@]}" tests/test_stage_arguments.py -k gpu-reference
tests tests-cuda 60 360 "${STAGES[@]}" tests/test_stage_arguments.py -k gpu-cuda
tests tests-triton 150 250 "${STAGES[@]}" -k "gpu-triton and not strided and not transposed"
tests tests-modules 60 240 tests/test_golden.py tests/test_modules.py tests/test_autocast.py \
  tests/test_inference.py -k gpu
together
warm_stop
step timings correct 330 20 "$PYTHON" -m benchmarks.gpu_timings --json "$FOLDER/timings.json" \
  --seconds @SECONDS@
step choice info 15 0 "$PYTHON" -m benchmarks.gpu_choice "$FOLDER/timings.json" "${CHOOSE[@]}"
tests tests-strides 600 0 "${STAGES[@]}" tests/test_stage_arguments.py \
  -k "gpu-triton and (strided or transposed)"
tests tests-ops 600 0 tests/test_ops.py tests/test_backends.py

report
cat "$FOLDER/report.md"
[ "$WRONG" = 0 ] || echo "something was wrong, see above and $LOG"
exit "$WRONG"
