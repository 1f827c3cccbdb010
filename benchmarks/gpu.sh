#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes: build the extension in place, test the CUDA kernels, look for memory
# errors and races with compute-sanitizer, run all benchmarks in the time that is left. cuda.json and the plots go to $OUT,
# or to benchmarks/results; all output, as it comes, to gpu.log in $OUT, or in build. Goes on after a stage that fails, and
# fails in the end. QUICK=1 takes few shapes; PYTHON chooses the interpreter. `python -m benchmarks --readme` then writes
# the page.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-benchmarks/results} log=${OUT:-build}/gpu.log
mkdir -p "$out" "$(dirname "$log")"
: >"$log"
python=${PYTHON:-python3}
export PRECISEBN_BACKEND=native PRECISEBN_REQUIRE_NATIVE=1 PRECISEBN_CUDA=1 PYTHONUNBUFFERED=1
failed=()

# stage NAME SECONDS COMMAND...: runs it, its output going to the log, and shows the end of that.
stage() {
    local name=$1 limit=$2 start=$SECONDS status=0 size
    shift 2
    printf '\n== %s\n' "$name" >>"$log"
    size=$(stat -c %s "$log")
    timeout --kill-after=10 "$limit" "$@" >>"$log" 2>&1 || status=$?
    ended "$name" "$status" $((SECONDS - start))
    tail -c "+$((size + 1))" "$log" | tail -n "${LINES_SHOWN:-25}"
    return "$status"
}
ended() {
    printf '\n== %s: %s, %d s\n' "$1" "$([ "$2" = 0 ] && echo ok || echo "FAILED ($2)")" "$3" | tee -a "$log"
    [ "$2" = 0 ] || failed+=("$1")
}
has() { "$python" -c "import $1" 2>/dev/null; }

total=530 # seconds

gpu=$(nvidia-smi --query-gpu=compute_cap,name,driver_version,memory.total --format=csv,noheader | sort -u)
printf '%s\n' "$gpu" | tee -a "$log"
# For what is here alone, in a third of the time; .ci/compile-cuda compiles for all.
TORCH_CUDA_ARCH_LIST=$(printf '%s\n' "$gpu" | cut -d, -f1 | sort -u | paste -sd ';')
export TORCH_CUDA_ARCH_LIST
stage build 150 "$python" setup.py build_ext --inplace --parallel 16
stage backend 60 "$python" -c 'from precisebn import ops; b = ops.backend(); print(b); assert b.cuda == "native", b' ||
    exit 1 # nothing to test or to time

# Of all the plugins that happen to be installed only those that are asked for: others change what a test is.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
pytest=("$python" -m pytest -q -p no:cacheprovider --durations=8)
workers=()
if has pytest_timeout; then
    pytest+=(-p pytest_timeout)
else
    pytest+=(-o timeout=0 -W "ignore::pytest.PytestConfigWarning" -o addopts="--doctest-modules --strict-markers")
fi
has xdist && workers=(-p xdist.plugin -n 8)
OMP_NUM_THREADS=2 stage tests 130 "${pytest[@]}" "${workers[@]}" tests/ops/test_cuda.py tests/nn/test_sync_one_rank.py \
    -k "not sanitizer"

# All tools at once: each mostly waits, and none is timed.
if command -v compute-sanitizer >/dev/null; then
    start=$SECONDS jobs=()
    for tool in memcheck racecheck synccheck initcheck; do
        # Without torch's cache every tensor is an allocation of its own, whose ends are then watched.
        OMP_NUM_THREADS=2 PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --kill-after=10 100 \
            compute-sanitizer --tool "$tool" --error-exitcode 9 "${pytest[@]}" -o timeout=0 tests/ops/test_cuda.py \
            -k sanitizer >"$log.$tool" 2>&1 &
        jobs+=("$tool:$!")
    done
    for job in "${jobs[@]}"; do
        tool=${job%:*} status=0
        wait "${job#*:}" || status=$?
        cat "$log.$tool" >>"$log"
        ended "$tool" "$status" $((SECONDS - start))
        tail -n 8 "$log.$tool"
        rm "$log.$tool"
    done
else
    echo "compute-sanitizer is not installed" | tee -a "$log"
fi

for peer in fvcore timm torchvision apex; do
    has "$peer" || echo "$peer is not installed: its rows are left out" | tee -a "$log"
done
flags=()
[ "${QUICK:-0}" = 1 ] && flags=(--quick)
has matplotlib && flags+=(--plot)
# What is begun when the budget ends is finished, so the stage may take somewhat longer. What a benchmark has found is
# saved when it ends, whatever becomes of the next.
left=$((total - SECONDS))
LINES_SHOWN=80 stage benchmarks "$left" \
    "$python" -m benchmarks --device cuda --budget $((left - 40)) --json "$out/cuda.json" "${flags[@]}"

printf '\n%d s in all' "$SECONDS"
if ((${#failed[@]})); then
    printf '; failed: %s\n' "${failed[*]}"
    exit 1
fi
printf '; all stages ok\n'
