#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes: build the extension in place, test the CUDA kernels, look for memory
# errors and races with compute-sanitizer, run the benchmarks. JSON goes to $OUT, or to benchmarks/results. Goes on after
# a stage that fails, and fails in the end. QUICK=1 takes few shapes; PYTHON chooses the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-benchmarks/results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
export PRECISEBN_BACKEND=native PRECISEBN_REQUIRE_NATIVE=1
failed=()

# stage NAME SECONDS COMMAND...: runs it, keeps its output in $out/NAME.log, shows the end of it.
stage() {
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
    printf '\n== %s: %s, %d s\n' "$name" "$([ "$status" = 0 ] && echo ok || echo "FAILED ($status)")" $((SECONDS - start))
    tail -n "${LINES_SHOWN:-25}" "$out/$name.log"
    [ "$status" = 0 ] || failed+=("$name")
    return "$status"
}
has() { "$python" -c "import $1" 2>/dev/null; }

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
stage build 110 "$python" setup.py build_ext --inplace --parallel 8
stage backend 30 "$python" -c 'from precisebn import ops; b = ops.backend(); print(b); assert b.cuda == "native", b' ||
    exit 1 # nothing to test or to time

pytest=("$python" -m pytest tests/test_cuda.py -q -p no:cacheprovider)
has pytest_timeout || pytest+=(-o timeout=0 -W "ignore::pytest.PytestConfigWarning" -o addopts="--doctest-modules --strict-markers")
workers=()
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} # of each worker
has xdist && workers=(-n 8)
stage tests 130 "${pytest[@]}" "${workers[@]}" -k "not sanitizer"

if command -v compute-sanitizer >/dev/null; then
    # Without torch's cache every tensor is an allocation of its own, whose ends are then watched.
    for tool in memcheck racecheck; do
        LINES_SHOWN=8 PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$tool" 60 \
            compute-sanitizer --tool "$tool" --error-exitcode 9 "${pytest[@]}" -k sanitizer -o timeout=0
    done
else
    echo "compute-sanitizer is not installed"
fi

quick=()
[ "${QUICK:-0}" = 1 ] && quick=(--quick)
LINES_SHOWN=60 stage kernels 150 "$python" -m benchmarks.kernels_cuda --budget 100 --json "$out/kernels_cuda.json" "${quick[@]}"

printf '\n%d s in all' "$SECONDS"
if ((${#failed[@]})); then
    printf '; failed: %s\n' "${failed[*]}"
    exit 1
fi
printf '; all stages ok\n'
