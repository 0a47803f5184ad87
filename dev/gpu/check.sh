#!/bin/bash
# All that is to be seen on a GPU, in one call of under 8 minutes: builds; runs every operation against the CPU wing and
# fp64 references over the shapes of the tests; compute-sanitizer on small shapes; 20 training steps GPU against CPU;
# then measures, each figure beside a ceiling of the same run. What is missing is said and left out.
#   dev/gpu/check.sh          on a machine with a GPU
#   dev/gpu/check.sh --sim    the same steps on the simulator and small shapes: a rehearsal without a GPU, no figures
#   BUILD=build               where to build; the results also go to BUILD/gpu-results.txt
#   CUDA_HOME= CUBLAS_HOME=   the toolkit and cuBLAS, if they come from Python packages, say
#   DEPS_HOME=                a folder of cJSON, PCRE2 and oneDNN (scripts/pack_deps.sh) where they are not installed
# Ends with a line: N passed, N failed[, N skipped].
set -u
cd "$(dirname "$0")/../.." || exit 1
sim=
[ "${1:-}" = --sim ] && sim=1
BUILD=${BUILD:-build}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
passed=0 failed=0 skipped=0
mkdir -p "$BUILD"
results=$BUILD/gpu-results.txt
log=$BUILD/gpu-check.log
: >"$results"

say() { printf '%s\n' "$*" | tee -a "$results"; }
skip() { say "skip $*"; skipped=$((skipped + 1)); }
# step NAME LIMIT COMMAND...: counts lines "ok ..." and "not ok ..." if there are any, else the exit status.
step() {
    local name=$1 limit=$2 before=$SECONDS status ok bad
    shift 2
    timeout "$limit" "$@" >"$log" 2>&1
    status=$?
    ok=$(grep -c '^ok ' "$log")
    bad=$(grep -c '^not ok ' "$log")
    [ $((ok + bad)) -gt 0 ] || ok=$((status == 0))
    [ "$status" -eq 0 ] || [ "$bad" -gt 0 ] || bad=1
    passed=$((passed + ok)) failed=$((failed + bad))
    grep -E '^(result |not ok |ok losses |ran )' "$log" | tee -a "$results"
    [ "$bad" -eq 0 ] || tail -n 15 "$log"
    [ "$status" -ne 124 ] || say "$name: not done after $limit s"
    say "=== $name: $([ "$bad" -eq 0 ] && echo ok || echo FAILED), $((SECONDS - before)) s"
    [ "$bad" -eq 0 ]
}

if [ -n "$sim" ]; then
    say "rehearsal on the simulator: no figure below is a GPU's"
else
    nvcc=
    for candidate in "${CUDA_HOME:-/nowhere}/bin/nvcc" "$(command -v nvcc || true)" /usr/local/cuda/bin/nvcc; do
        if [ -x "$candidate" ]; then nvcc=$candidate; break; fi
    done
    [ -n "$nvcc" ] || { echo "check.sh: no nvcc found (set CUDA_HOME, or put nvcc in PATH)"; echo "0 passed, 0 failed, 1 skipped"; exit 0; }
    nvidia-smi -L >/dev/null 2>&1 || { echo "check.sh: no GPU here (nvidia-smi finds none)"; echo "0 passed, 0 failed, 1 skipped"; exit 0; }
    say "$(nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader | head -n 1)"
    say "$("$nvcc" --version | grep release)"
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
    case $capability in [0-9]*) ;; *) capability=90 ;; esac
    export CUDA_ARCHS=$capability CUDA_HOME=${nvcc%/bin/nvcc}
fi
say "$(date -u +%Y-%m-%d) $(git rev-parse --short HEAD 2>/dev/null || true)"

# What a program needs and this machine may not have.
jobs=$(nproc 2>/dev/null || echo 2)
deps_flags=${DEPS_HOME:+-I$DEPS_HOME/include -L$DEPS_HOME/lib}
have() { printf '%s\nint main(void){return 0;}\n' "$1" | "${CC:-cc}" $deps_flags -x c - -o /dev/null $2 >/dev/null 2>&1; }
programs=1
have '#include <cjson/cJSON.h>' -lcjson || { skip "cJSON is missing: no training, no decoding (set DEPS_HOME)"; programs=; }
have '#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>' -lpcre2-8 || { skip "PCRE2 is missing: no training, no decoding (set DEPS_HOME)"; programs=; }
have '#include <dnnl.h>' -ldnnl || say "oneDNN is missing: the CPU wing's own matmuls are compared with"
have '#include <mpi.h>' -lmpi || say "MPI is missing: one rank, which is all that is checked here"
printf '#include <nccl.h>\n' | "${CC:-cc}" ${NCCL_HOME:+-I$NCCL_HOME/include} -E -x c - >/dev/null 2>&1 ||
    say "NCCL's headers are missing: one rank, which is all that is checked here"

# 1. Build.
make_() { make -j"$jobs" BUILD="$BUILD" QLLM_QUIET=1 "$@"; }
for precision in bf16 fp32; do
    out=$BUILD/$precision
    if [ -n "$sim" ]; then
        step "build $precision" 1800 make_ PRECISION=$precision programs sim-programs "$out/test/test_cudasim" "$out/sim/bench_cuda" || continue
    else
        step "build $precision" 300 make_ PRECISION=$precision gpu-kernels ${programs:+programs} || continue
    fi
done
test_program() { if [ -n "$sim" ]; then echo "$BUILD/$1/test/test_cudasim"; else echo "$BUILD/$1/gpu/test_cuda"; fi; }
bin() { if [ -n "$sim" ]; then echo "$BUILD/$1/sim"; else echo "$BUILD/$1/bin"; fi; }

# 2. Every operation.
for precision in bf16 fp32; do
    step "operations $precision" 300 "$(test_program $precision)"
done
if [ -z "$sim" ]; then
    sanitizer=
    for candidate in "$CUDA_HOME/bin/compute-sanitizer" "$(command -v compute-sanitizer || true)"; do
        if [ -x "$candidate" ]; then sanitizer=$candidate; break; fi
    done
    if [ -n "$sanitizer" ]; then
        for tool in memcheck racecheck; do
            QLLM_TEST_SMALL=1 step "compute-sanitizer $tool" 60 "$sanitizer" --tool $tool --error-exitcode 9 --print-limit 5 \
                "$(test_program bf16)"
        done
    else
        skip "compute-sanitizer is not in the toolkit"
    fi
fi

# 3. Training, GPU against CPU.
if [ -n "$programs" ]; then
    if [ -n "$sim" ]; then shape="20 tiny 1 16"; else shape="20 1M 4 128"; fi
    for precision in fp32 bf16; do
        # shellcheck disable=SC2086
        step "losses $precision" 600 dev/gpu/compare.sh "$BUILD/$precision/bin" "$(bin $precision)" $precision $shape
    done
fi

# 4. Figures.
step "kernels" 120 "$(bin bf16 | sed 's,/bin$,/gpu,')/bench_cuda"

# train NAME SCHEME OPTIONS...: ms a step and share of the measured matmul rate, medians of the steps after the fourth.
train() {
    local name=$1 scheme=$2 out
    shift 2
    out=$(mktemp -d)
    cat doc/*.md llmc/*.c llmc/cuda/*.cu >"$out/text.txt"
    if "$(bin bf16)/train_llama_qat" --train-data "$out/text.txt" --scheme "$scheme" --device cuda --out "$out/run" "$@" \
        >"$out/log" 2>&1; then
        field() { sed -n "s/.*\"$1\": *\([0-9.e+-]*\).*/\1/p" "$out/run/log.jsonl" | tail -n +5 | sort -g |
            awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'; }
        ms=$(field ms) share=$(field peak_share)
        [ -n "$sim" ] || {
            echo "result train_${name}_${scheme}_step $ms ms"
            echo "result train_${name}_${scheme}_peak_share $share ratio"
        }
        echo "$ms" >"$BUILD/ms-$name-$scheme"
        echo "ok train $name $scheme"
    else
        echo "not ok train $name $scheme"
        tail -n 3 "$out/log"
    fi
    rm -rf "$out"
}
overhead() {
    [ -n "$sim" ] && return 0
    awk -v name="$1" '{ v[NR] = $1 } END { if (v[1] > 0) printf "result qat_overhead_8da4w_%s %.4f ratio\n", name, v[2] / v[1] }' \
        "$BUILD/ms-$1-none" "$BUILD/ms-$1-8da4w-32"
}
train_all() {
    if [ -n "$sim" ]; then
        train tiny none --init tiny --batch 1 --seq-len 16 --steps 6 --no-save
        train tiny 8da4w-32 --init tiny --batch 1 --seq-len 16 --steps 6 --no-save
        return
    fi
    # 16k tokens a micro-step.
    for item in "135M 135M 8 14" "1B 1B 8 10" "8B-4 8B-4 8 10"; do
        set -- $item
        for scheme in none 8da4w-32; do
            train "$1" $scheme --init "$2" --batch "$3" --seq-len 2048 --steps "$4" --lr 1e-4 --no-save
        done
        overhead "$1"
    done
}
if [ -n "$programs" ]; then
    export -f train train_all overhead bin
    export BUILD sim
    step "training" 240 bash -c train_all
fi
say "took $((SECONDS / 60)) min $((SECONDS % 60)) s"
say "$passed passed, $failed failed$([ "$skipped" -gt 0 ] && echo ", $skipped skipped")"
[ "$failed" -eq 0 ]
