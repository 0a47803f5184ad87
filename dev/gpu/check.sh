#!/bin/bash
# All that is to be seen on a GPU, in one call of under 8 minutes: builds; runs every operation against the CPU wing and
# fp64 references over the shapes of the tests; compute-sanitizer on small shapes; 20 training steps GPU against CPU;
# sharded training against training that is not;
# then measures, each figure beside a ceiling of the same run. What is missing is said and left out, and so is what the
# time is too short for.
#   dev/gpu/check.sh          on a machine with a GPU
#   dev/gpu/check.sh --sim    the same steps on the simulator and small shapes: a rehearsal without a GPU, no figures
#   BUILD=build               where to build; the results also go to BUILD/gpu-results.txt
#   CUDA_HOME= CUBLAS_HOME= NCCL_HOME=   the toolkit, cuBLAS, NCCL, if they come from Python packages, say
#   DEPS_HOME=                a folder of cJSON, PCRE2 and oneDNN (scripts/pack_deps.sh) where they are not installed
# Ends with a line: N passed, N failed[, N skipped].
set -u
cd "$(dirname "$0")/../.." || exit 1
sim=
[ "${1:-}" = --sim ] && sim=1
BUILD=${BUILD:-build}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
passed=0 failed=0 skipped=0
time_for_all=470                        # seconds, on a GPU
mkdir -p "$BUILD" || exit 1
results=$BUILD/gpu-results.txt
log=$BUILD/gpu-check.log
: >"$results"

say() { printf '%s\n' "$*" | tee -a "$results"; }
skip() { say "skip $*"; skipped=$((skipped + 1)); }
# step NAME LIMIT COMMAND...: counts lines "ok ...", "not ok ..." and "skip ..." if there are any, else the exit status.
# With cut=1 what was done until LIMIT counts, and that it was cut off is one that is skipped.
step() {
    local name=$1 limit=$2 before=$SECONDS left=$((time_for_all - SECONDS)) status ok bad left_out late=
    shift 2
    if [ -z "$sim" ] && [ "$limit" -gt "$left" ]; then limit=$left; fi
    if [ "$limit" -lt 5 ]; then
        skip "$name: no time is left"
        return 1
    fi
    timeout -k 5 "$limit" "$@" >"$log" 2>&1 </dev/null
    status=$?
    ok=$(grep -c '^ok ' "$log")
    bad=$(grep -c '^not ok ' "$log")
    left_out=$(grep -c '^skip ' "$log")
    [ $((ok + bad + left_out)) -gt 0 ] || ok=$((status == 0))
    if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then late="not done after $limit s"; fi
    [ "$status" -eq 0 ] || [ "$bad" -gt 0 ] || [ "${cut:-}${late:+late}" = 1late ] || bad=1
    passed=$((passed + ok)) failed=$((failed + bad)) skipped=$((skipped + left_out))
    grep -E '^(result |not ok |skip |ok losses |ran |device )' "$log" | tee -a "$results"
    [ "$bad" -eq 0 ] || tail -n 15 "$log"
    if [ -n "$late" ]; then
        if [ "$bad" -eq 0 ]; then skip "the rest of $name: $late"; else say "$name: $late"; fi
    fi
    say "=== $name: $([ "$bad" -eq 0 ] && echo ok || echo FAILED), $((SECONDS - before)) s"
    [ "$bad" -eq 0 ]
}
# nothing WHY: the end, where there is nothing to check.
nothing() {
    echo "check.sh: $*"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
}

if [ -n "$sim" ]; then
    say "rehearsal on the simulator: no figure below is a GPU's"
else
    command -v nvidia-smi >/dev/null || nothing "no GPU here (nvidia-smi is not installed)"
    gpu() { nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null | head -n 1; }
    [ -n "$(gpu name)" ] || nothing "no GPU here: $(nvidia-smi 2>&1 | tail -n 1)"
    nvcc=
    for candidate in "${CUDA_HOME:-/nowhere}/bin/nvcc" "$(command -v nvcc || true)" /usr/local/cuda/bin/nvcc; do
        if [ -x "$candidate" ]; then nvcc=$candidate; break; fi
    done
    [ -n "$nvcc" ] || nothing "no nvcc found (set CUDA_HOME, or put nvcc in PATH)"
    say "$(gpu name,driver_version,memory.total,clocks.max.sm)"
    say "$("$nvcc" --version | grep release)"
    nvcc=$(readlink -f "$nvcc")
    export CUDA_HOME=${nvcc%/bin/nvcc}
    # Code for this GPU alone, which halves the build; if it or nvcc cannot say, for what make builds for.
    capability=$(gpu compute_cap | tr -dc 0-9)
    if [ -n "$capability" ] && [ "$capability" -lt 80 ]; then
        nothing "this GPU has compute capability ${capability%?}.${capability: -1}, and 8.0 or newer is needed"
    fi
    if "$nvcc" --list-gpu-arch 2>/dev/null | grep -qx "compute_$capability"; then export CUDA_ARCHS=$capability; fi
fi
say "$(date -u +%Y-%m-%d) $(git rev-parse --short HEAD 2>/dev/null || true)"

# What a program needs and this machine may not have.
jobs=$(nproc 2>/dev/null || echo 2)
# have HEADER [LIBRARY]
have() {
    printf '#define PCRE2_CODE_UNIT_WIDTH 8\n#include <%s>\nint main(void) { return 0; }\n' "$1" |
        "${CC:-cc}" -x c - -o /dev/null \
            ${DEPS_HOME:+"-I$DEPS_HOME/include" "-L$DEPS_HOME/lib" "-Wl,-rpath,$DEPS_HOME/lib"} \
            ${DNNL_HOME:+"-I$DNNL_HOME/include" "-L$DNNL_HOME/lib"} ${2:+"-l$2"} -lm >/dev/null 2>&1
}
programs=1
have cjson/cJSON.h cjson || { skip "cJSON is missing: no training, no decoding (set DEPS_HOME)"; programs=; }
have pcre2.h pcre2-8 || { skip "PCRE2 is missing: no training, no decoding (set DEPS_HOME)"; programs=; }
have dnnl.h dnnl || say "oneDNN is missing: the CPU wing's own matmuls are compared with"
command -v mpicc >/dev/null || have mpi.h mpi || say "MPI is missing: one rank is all that is checked here"
printf '#include <nccl.h>\n' | "${CC:-cc}" -E -x c - ${NCCL_HOME:+"-I$NCCL_HOME/include"} \
    "-I${CUDA_HOME:-/usr/local/cuda}/include" >/dev/null 2>&1 ||
    say "NCCL is missing: ranks are checked through the host's memory only (NCCL_HOME)"

# 1. Build.
make_=(make -j"$jobs" BUILD="$BUILD" QLLM_QUIET=1)
for precision in bf16 fp32; do
    if [ -n "$sim" ]; then
        # The simulator stands in for the GPU: what nvcc says is ptx-report's to show.
        step "build $precision" 1800 "${make_[@]}" NO_CUDA=1 PRECISION=$precision sim-kernels \
            ${programs:+programs sim-programs}
    else
        step "build $precision" 200 "${make_[@]}" PRECISION=$precision gpu-kernels ${programs:+programs}
    fi
done
# The limits are for a GPU; the simulator takes its time.
if [ -n "$sim" ]; then slow=10 gpu=sim; else slow=1 gpu=gpu; fi
test_program() { if [ -n "$sim" ]; then echo "$BUILD/$1/test/test_cudasim"; else echo "$BUILD/$1/gpu/test_cuda"; fi; }
bin() { if [ -n "$sim" ]; then echo "$BUILD/$1/sim"; else echo "$BUILD/$1/bin"; fi; }

# 2. Every operation.
for precision in bf16 fp32; do
    step "operations $precision" $((120 * slow)) "$(test_program $precision)"
done
# Each kind of kernel on small shapes, slowed down a hundredfold.
sanitizer=
for candidate in "${CUDA_HOME:-/nowhere}/bin/compute-sanitizer" "$(command -v compute-sanitizer || true)" \
    "${CUDA_HOME:-/nowhere}/compute-sanitizer/compute-sanitizer"; do
    if [ -x "$candidate" ]; then sanitizer=$candidate; break; fi
done
export QLLM_TEST_SMALL=1
if [ -n "$sim" ]; then
    step "small shapes" 300 "$(test_program bf16)"
elif [ -n "$sanitizer" ]; then
    for tool in memcheck racecheck; do
        cut=1 step "compute-sanitizer $tool" 60 "$sanitizer" --tool $tool --error-exitcode 9 --print-limit 5 \
            "$(test_program bf16)"
    done
else
    skip "compute-sanitizer is not in the toolkit"
fi
unset QLLM_TEST_SMALL

# 3. Training, GPU against CPU.
if [ -n "$programs" ]; then
    if [ -n "$sim" ]; then shape=(20 tiny 1 16); else shape=(20 1M 4 128); fi
    for precision in fp32 bf16; do
        step "losses $precision" $((90 * slow)) dev/gpu/compare.sh "$BUILD/$precision/bin" "$(bin $precision)" \
            $precision "${shape[@]}"
    done
    # Sharded: weights packed, sent and unpacked on the device, gradients summed there.
    if [ -n "$sim" ]; then shape=(tiny 2 16); else shape=(1M 4 128); fi
    step "ranks" $((60 * slow)) dev/gpu/ranks.sh "$(bin bf16)" bf16 "${shape[@]}"
fi

# 4. Figures.
step "kernels" $((120 * slow)) "$BUILD/bf16/$gpu/bench_cuda"

# train NAME SCHEME OPTIONS...: ms a step and share of the measured matmul rate, medians of the steps after the fourth.
# SCHEME: of train_llama_qat, or qt-weight-only, qt-int8 for train_llama_qt.
train() {
    local name=$1 scheme=$2 out ms share program
    shift 2
    case $scheme in
    qt-*) program=(train_llama_qt --matmul "${scheme#qt-}") ;;
    *) program=(train_llama_qat --scheme "$scheme") ;;
    esac
    if [ -z "$sim" ] && [ "$(date +%s)" -gt "$last_start" ]; then
        echo "skip train $name $scheme: no time is left"
        return
    fi
    out=$(mktemp -d)
    cat doc/*.md llmc/*.c llmc/cuda/*.cu >"$out/text.txt"
    if "$(bin bf16)/${program[0]}" "${program[@]:1}" --train-data "$out/text.txt" --device cuda --out "$out/run" \
        "$@" >"$out/log" 2>&1; then
        field() { sed -n "s/.*\"$1\": *\([0-9.e+-]*\).*/\1/p" "$out/run/log.jsonl" | tail -n +5 | sort -g |
            awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'; }
        ms=$(field ms) share=$(field peak_share)
        [ -n "$sim" ] || {
            echo "result train_${name}_${scheme}_step $ms ms"
            echo "result train_${name}_${scheme}_peak_share $share ratio"
        }
        echo "$ms" >"$BUILD/ms-$name-$scheme"
        echo "ok train $name $scheme"
    elif grep -q "largest batch that fits\|too little for one sequence" "$out/log"; then
        echo "skip train $name $scheme: $(tail -n 1 "$out/log")"
    else
        echo "not ok train $name $scheme"
        tail -n 3 "$out/log"
    fi
    rm -rf "$out"
}
# compare SHAPE SCHEME RESULT: the step's time over that of plain training, or for qt-* the other way round.
compare() {
    [ -n "$sim" ] && return 0
    [ -s "$BUILD/ms-$1-none" ] && [ -s "$BUILD/ms-$1-$2" ] &&
        paste "$BUILD/ms-$1-none" "$BUILD/ms-$1-$2" | awk -v name="$3_$1" -v speedup="${2%%-*}" '
            $1 > 0 && $2 > 0 { printf "result %s %.4f ratio\n", name, speedup == "qt" ? $1 / $2 : $2 / $1 }'
}
train_all() {
    if [ -n "$sim" ]; then
        train tiny none --init tiny --batch 1 --seq-len 16 --steps 6 --no-save
        train tiny 8da4w-32 --init tiny --batch 1 --seq-len 16 --steps 6 --no-save
        train tiny qt-int8 --init tiny --batch 1 --seq-len 16 --steps 6 --no-save
        return
    fi
    # 16k tokens a micro-step.
    for shape in 135M 1B 8B-4; do
        for scheme in none 8da4w-32 qt-int8 qt-weight-only; do
            train $shape $scheme --init $shape --batch 8 --seq-len 2048 --steps 12 --lr 1e-4 --no-save
        done
        compare $shape 8da4w-32 qat_overhead_8da4w
        compare $shape qt-int8 qt_int8_speedup
        compare $shape qt-weight-only qt_weight_only_speed
    done
    return 0
}
# decode SHAPE OPTIONS...: tokens a second, and GB/s to hold beside the copy rate of the kernels' figures, by schemes.
decode() {
    local shape=$1 out scheme file field
    shift
    out=$(mktemp -d)
    cat doc/*.md >"$out/text.txt"
    if ! "$(bin bf16)/train_llama_qat" --init "$shape" --scheme none --train-data "$out/text.txt" --batch 1 --seq-len 16 \
        --steps 1 --out "$out/run" >"$out/log" 2>&1; then
        echo "not ok decode $shape: no model"
        tail -n 3 "$out/log"
    else
        for scheme in bf16 int8wo int8dq int4wo-32 8da4w-32; do
            file=$out/run/model.bin
            if [ $scheme != bf16 ]; then
                "$(bin bf16)/quantize" "$file" --scheme $scheme --out "$out/q.bin" --quiet >"$out/log" 2>&1
                file=$out/q.bin
            fi
            if "$(bin bf16)/generate" "$file" --device cuda --benchmark "$@" >"$out/log" 2>&1; then
                [ -n "$sim" ] || for field in "decode tok/s" "bandwidth GB/s" "prefill tok/s" "start_first_token ms"; do
                    awk -v n="${field% *}" -v u="${field#* }" -v as="${shape}_$scheme" '
                        $2 == "generate_" n { print "result generate_" as "_" n, $3, u }' "$out/log"
                done
                echo "ok decode $shape $scheme"
            else
                echo "not ok decode $shape $scheme"
                tail -n 3 "$out/log"
            fi
        done
    fi
    rm -rf "$out"
}
decode_all() {
    if [ -n "$sim" ]; then
        decode tiny --runs 1 --bench-prompt 4 --bench-new 4
    else
        decode 135M --runs 5 --bench-prompt 128 --bench-new 256
        decode 1B --runs 5 --bench-prompt 128 --bench-new 256
    fi
}
if [ -n "$programs" ]; then
    export -f train train_all compare bin
    rm -f "$BUILD"/ms-*
    last_start=$(($(date +%s) + time_for_all - SECONDS - 40))
    export BUILD sim last_start
    step "training" 240 bash -c train_all
    export -f decode decode_all
    step "decoding" $((60 * slow)) bash -c decode_all
fi
say "took $((SECONDS / 60)) min $((SECONDS % 60)) s"
say "$passed passed, $failed failed$([ "$skipped" -gt 0 ] && echo ", $skipped skipped")"
[ "$failed" -eq 0 ]
