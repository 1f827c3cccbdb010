#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes: build the extension in place, test the CUDA kernels, look for memory
# errors and races with compute-sanitizer, run all benchmarks in the time that is left. cuda.json and the plots go to $OUT,
# or to benchmarks/results; all output to gpu.log in $OUT, or in build. Goes on after a stage that fails, and fails in the
# end. QUICK=1 takes few shapes; PYTHON chooses the interpreter. `python -m benchmarks --readme` then writes the page.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-benchmarks/results} log=${OUT:-build}/gpu.log
mkdir -p "$out" "$(dirname "$log")"
: >"$log"
output=$(mktemp)
trap 'rm -f "$output"' EXIT
python=${PYTHON:-python3}
export PRECISEBN_BACKEND=native PRECISEBN_REQUIRE_NATIVE=1
failed=()

# stage NAME SECONDS COMMAND...: runs it, keeps its output in the log, shows the end of it.
stage() {
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    timeout --kill-after=10 "$limit" "$@" >"$output" 2>&1 || status=$?
    printf '\n== %s\n' "$name" >>"$log"
    cat "$output" >>"$log"
    printf '\n== %s: %s, %d s\n' "$name" "$([ "$status" = 0 ] && echo ok || echo "FAILED ($status)")" $((SECONDS - start))
    tail -n "${LINES_SHOWN:-25}" "$output"
    [ "$status" = 0 ] || failed+=("$name")
    return "$status"
}
has() { "$python" -c "import $1" 2>/dev/null; }

total=530 # seconds

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
stage build 100 "$python" setup.py build_ext --inplace --parallel 8
stage backend 30 "$python" -c 'from precisebn import ops; b = ops.backend(); print(b); assert b.cuda == "native", b' ||
    exit 1 # nothing to test or to time

pytest=("$python" -m pytest tests/ops/test_cuda.py tests/nn/test_sync_one_rank.py -q -p no:cacheprovider)
has pytest_timeout || pytest+=(-o timeout=0 -W "ignore::pytest.PytestConfigWarning" -o addopts="--doctest-modules --strict-markers")
workers=()
has xdist && workers=(-n 8)
OMP_NUM_THREADS=2 stage tests 110 "${pytest[@]}" "${workers[@]}" -k "not sanitizer" # threads of each worker

if command -v compute-sanitizer >/dev/null; then
    # Without torch's cache every tensor is an allocation of its own, whose ends are then watched.
    for tool in memcheck racecheck synccheck initcheck; do
        OMP_NUM_THREADS=2 LINES_SHOWN=8 PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$tool" 40 \
            compute-sanitizer --tool "$tool" --error-exitcode 9 "${pytest[@]}" -k sanitizer -o timeout=0
    done
else
    echo "compute-sanitizer is not installed"
fi

flags=()
[ "${QUICK:-0}" = 1 ] && flags=(--quick)
has matplotlib && flags+=(--plot)
# What is begun when the budget ends is finished, so the stage may take somewhat longer.
left=$((total - SECONDS))
LINES_SHOWN=80 stage benchmarks "$left" \
    "$python" -m benchmarks --device cuda --budget $((left - 40)) --json "$out/cuda.json" "${flags[@]}"

printf '\n%d s in all' "$SECONDS"
if ((${#failed[@]})); then
    printf '; failed: %s\n' "${failed[*]}"
    exit 1
fi
printf '; all stages ok\n'
