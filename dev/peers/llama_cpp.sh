#!/bin/sh
# llama.cpp beside us: the same model, the same machine, the same threads, in one run.
#
#   dev/peers/llama_cpp.sh build                     fetches the source package from PyPI and builds it, natively
#   dev/peers/llama_cpp.sh speed MODEL               prompts of 128 and 512, 256 new tokens: float, Q8_0, Q4_0
#   dev/peers/llama_cpp.sh perplexity MODEL TEXT     token perplexity over the windows of `eval --text`
#
# MODEL is anything that ./quantize reads as floats. It is packed as int8wo and 8da4w-32 and exported; llama.cpp reads
# the exports (Q8_0, Q4_0, and the floats as BF16) and we read what they were made from. Nothing of llama.cpp enters
# this repository: sources and build stand in PEER_DIR.
#
#   PEER_DIR   where to build and to keep exports   (default: qllm-llama-cpp in TMPDIR)
#   BIN        our programs                         (default: the repository's root)
#   THREADS    2    REPEATS 5    M 512 (tokens of a window)
#
# `result llamacpp_*` lines: tokens a second of llama.cpp, ours, and our figure over theirs. Windows: the tokens of the
# whole text without bos, cut into windows of M inputs that do not overlap; every token but the first is predicted once,
# from those of its own window before it. llama_windows.cpp does that with llama.cpp's tokenizer and model, so that both
# score the same tokens; their number is compared. (llama-perplexity scores the second half of each window only.)
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
PEER_DIR=${PEER_DIR:-${TMPDIR:-/tmp}/qllm-llama-cpp}
BIN=${BIN:-$root}
THREADS=${THREADS:-2}
REPEATS=${REPEATS:-5}
M=${M:-512}
tools=$PEER_DIR/build/bin
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-active}"

die() { echo "llama_cpp.sh: $*" >&2; exit 1; }

fetch() {
    [ -d "$PEER_DIR/source" ] && return
    command -v cmake > /dev/null || die "cmake is needed to build llama.cpp"
    mkdir -p "$PEER_DIR/fetch"
    python3 -m venv "$PEER_DIR/venv"
    # pip asks the package for its metadata, and that takes its build backend.
    "$PEER_DIR/venv/bin/pip" install -q scikit-build-core
    "$PEER_DIR/venv/bin/pip" download -q --no-deps --no-build-isolation --no-binary llama-cpp-python \
        -d "$PEER_DIR/fetch" llama-cpp-python
    archive=$(ls "$PEER_DIR"/fetch/llama_cpp_python-*.tar.gz)
    tar xzf "$archive" -C "$PEER_DIR/fetch"
    basename "$archive" .tar.gz > "$PEER_DIR/version"
    mv "${archive%.tar.gz}/vendor/llama.cpp" "$PEER_DIR/source"
}

build() {
    fetch
    if [ ! -x "$tools/llama-bench" ]; then
        cmake -S "$PEER_DIR/source" -B "$PEER_DIR/build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
            -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF \
            -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_TOOLS=ON -DLLAMA_OPENSSL=OFF > "$PEER_DIR/cmake.log"
        cmake --build "$PEER_DIR/build" --target llama-bench -j "$THREADS" > "$PEER_DIR/build.log" 2>&1 ||
            die "the build failed: see $PEER_DIR/build.log"
    fi
    if [ ! "$tools/llama_windows" -nt "$root/dev/peers/llama_windows.cpp" ]; then
        b=$PEER_DIR/build
        "${CXX:-c++}" -O3 -march=native -std=c++17 -I"$PEER_DIR/source/include" -I"$PEER_DIR/source/ggml/include" \
            "$root/dev/peers/llama_windows.cpp" -o "$tools/llama_windows" "$b/src/libllama.a" \
            "$b/ggml/src/libggml.a" "$b/ggml/src/libggml-cpu.a" "$b/ggml/src/libggml-base.a" -fopenmp -ldl -lpthread -lm
    fi
    echo "built $(cat "$PEER_DIR/version") in $PEER_DIR"
}

# MODEL packed in each scheme and exported, made anew where these are of another model (a folder is known by its weights).
exports() {
    mkdir -p "$PEER_DIR/models"
    of=$(find -L "$1" -type f -exec stat -L -c '%n %s %Y' {} + | sort)
    [ "$(cat "$PEER_DIR/models/of" 2> /dev/null)" = "$of" ] && return
    rm -f "$PEER_DIR/models/of"
    for scheme in none int8wo 8da4w-32; do
        packed=$PEER_DIR/models/$scheme.bin gguf=$PEER_DIR/models/$scheme.gguf
        "$BIN/quantize" "$1" --scheme $scheme --dtype bf16 --out "$packed" --quiet > /dev/null
        "$BIN/quantize" "$packed" --to gguf --out "$gguf" --quiet
        "$BIN/quantize" "$packed" --to dequantized --out "$PEER_DIR/models/$scheme-dequantized" --quiet > /dev/null
        "$BIN/quantize" "$PEER_DIR/models/$scheme-dequantized" --to gguf --quiet \
            --out "$PEER_DIR/models/$scheme-dequantized.gguf"
    done
    echo "$of" > "$PEER_DIR/models/of"
}

form_of() { case $1 in none) echo bf16;; int8wo) echo q8_0;; 8da4w-32) echo q4_0;; esac; }

# bench_theirs NAME -> lines "TEST RATE": medians of llama-bench's samples. Decoding begins behind 128 tokens, as ours.
bench_theirs() {
    for what in "-p 128,512 -n 0" "-p 0 -n 256 -d 128"; do
        # shellcheck disable=SC2086
        "$tools/llama-bench" -m "$PEER_DIR/models/$1.gguf" -t "$THREADS" $what -r "$REPEATS" -o jsonl \
            2> "$PEER_DIR/bench.log"
    done | sed -n 's/.*"n_prompt": \([0-9]*\), "n_gen": \([0-9]*\).*"samples_ts": \[\([^]]*\)\].*/\1 \2 \3/p' |
        while read -r prompt new samples; do
            rate=$(echo "$samples" | tr -d ' ' | tr ',' '\n' | sort -g | awk '{ a[NR] = $1 } END { print a[int((NR + 1) / 2)] }')
            if [ "$new" = 0 ]; then echo "prefill$prompt $rate"; else echo "decode $rate"; fi
        done
}

# NAME PROMPT NEW: the same of ours.
bench_one() {
    "$BIN/generate" "$PEER_DIR/models/$1.bin" --benchmark --bench-prompt "$2" --bench-new "$3" --runs "$REPEATS" \
        --threads "$THREADS" --device cpu 2> "$PEER_DIR/ours.log" |
        sed -n -e "s/^result generate_prefill \([0-9.]*\) .*/prefill$2 \1/p" \
            -e "s/^result generate_decode \([0-9.]*\) .*/decode \1/p"
}

bench_ours() {
    bench_one "$1" 128 256
    bench_one "$1" 512 2 | grep prefill
}

# They take turns, and of each the better median counts: a slow spell of a shared machine meets either.
speed() {
    exports "$1"
    echo "llama.cpp of $(cat "$PEER_DIR/version"), $THREADS threads, better median of two turns of $REPEATS; tokens a second"
    printf '%-10s %-12s %12s %12s %8s\n' file test llama.cpp ours ratio
    for scheme in none int8wo 8da4w-32; do
        form=$(form_of $scheme)
        : > "$PEER_DIR/theirs.txt"
        : > "$PEER_DIR/ours.txt"
        for turn in 1 2; do
            bench_theirs $scheme >> "$PEER_DIR/theirs.txt"
            bench_ours $scheme >> "$PEER_DIR/ours.txt"
        done
        for test in decode prefill128 prefill512; do
            theirs=$(sed -n "s/^$test //p" "$PEER_DIR/theirs.txt" | sort -gr | head -n 1)
            ours=$(sed -n "s/^$test //p" "$PEER_DIR/ours.txt" | sort -gr | head -n 1)
            [ -n "$theirs" ] || die "llama-bench gave no figure for $test: see $PEER_DIR/bench.log"
            [ -n "$ours" ] || die "generate gave no figure for $test: see $PEER_DIR/ours.log"
            awk -v f=$form -v t="$test" -v a="$theirs" -v b="$ours" 'BEGIN {
                printf "%-10s %-12s %12.2f %12.2f %8.3f\n", f, t, a, b, b / a
                printf "result llamacpp_%s_%s %.2f tok/s\n", t, f, a
                printf "result ours_%s_%s %.2f tok/s\n", t, f, b
                printf "result llamacpp_%s_ratio_%s %.4f ratio\n", t, f, b / a }'
        done
    done
}

perplexity() {
    exports "$1"
    printf '%-24s %10s %12s %12s %12s\n' model tokens llama.cpp ours difference
    for scheme in none int8wo int8wo-dequantized 8da4w-32 8da4w-32-dequantized; do
        model=$PEER_DIR/models/$scheme.bin
        [ -e "$model" ] || model=$PEER_DIR/models/$scheme
        theirs=$("$tools/llama_windows" "$PEER_DIR/models/$scheme.gguf" "$2" "$M" "$THREADS")
        ours=$("$BIN/eval" "$model" --text "$2" --seq-len "$M" --threads "$THREADS" --device cpu \
            --arithmetic served 2> "$PEER_DIR/ours.log" |
            sed -n 's/^text: .*no bos: \([0-9.]*\) (loss [0-9.]*, \([0-9]*\) .*/\2 \1/p')
        [ -n "$ours" ] || die "eval gave no perplexity: see $PEER_DIR/ours.log"
        # shellcheck disable=SC2086
        set -- "$1" "$2" $theirs $ours
        [ "$4" = "${11}" ] || die "$scheme: llama.cpp scored $4 tokens, we ${11}: the tokenizers differ"
        awk -v s=$scheme -v n="$4" -v a="$6" -v b="${12}" 'BEGIN {
            printf "%-24s %10d %12.4f %12.4f %+11.4f%%\n", s, n, a, b, 100 * (b / a - 1)
            printf "result llamacpp_perplexity_%s %.5f\nresult ours_perplexity_%s %.5f\n", s, a, s, b }'
    done
}

case ${1:-} in
build) build;;
speed) [ $# = 2 ] || die "usage: llama_cpp.sh speed MODEL"; build; speed "$2";;
perplexity) [ $# = 3 ] || die "usage: llama_cpp.sh perplexity MODEL TEXT"; build; perplexity "$2" "$3";;
*) die "usage: llama_cpp.sh build | speed MODEL | perplexity MODEL TEXT";;
esac
