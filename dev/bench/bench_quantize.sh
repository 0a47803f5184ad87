#!/bin/sh
# quantize against copying: the time to convert a bf16 model of a shape (default 1B) to a scheme, until the output is on
# the disk, over that of `cp` of the input followed by `sync` of the copy; both read from a warm page cache and write to
# the same disk, taking turns, and the best of each counts; --no-verify, since cp compares nothing either. Peak resident
# memory, mapped files included.
# BIG=8B-4 (or 8B: 32 GB of disk): the peak of a large model too. BENCH_DIR: where the files go. Usage:
# bench_quantize.sh BIN RANDOM_SHARD [shape] [rounds]
set -eu
bin=$1 random_model=$(dirname "$2")/random_model shape=${3:-1B} rounds=${4:-3}
tmp=$(mktemp -d "${BENCH_DIR:-${TMPDIR:-/tmp}}/bench-quantize.XXXXXX"); trap 'rm -rf "$tmp"' EXIT
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
"$random_model" "$tmp/model.bin" "$shape"
cat "$tmp/model.bin" > /dev/null

now() { date +%s.%N; }
took() { awk -v a="$1" -v b="$2" 'BEGIN { printf "%.4f\n", b - a }'; }
least() { sort -g "$1" | head -n 1; }
# Peak resident memory of a conversion in bytes: VmHWM, polled.
peak() {
    "$@" > /dev/null &
    pid=$!; high=0
    while kill -0 "$pid" 2> /dev/null; do
        kb=$(awk '/^VmHWM/ { print $2 }' "/proc/$pid/status" 2> /dev/null || true)
        [ "${kb:-0}" -gt "$high" ] && high=$kb
        sleep 0.05
    done
    wait "$pid"; echo $((high * 1024))
}

bytes=$(stat -c %s "$tmp/model.bin")
schemes="8da4w-32 int8wo int4wo-32"
for round in $(seq "$rounds"); do
    a=$(now); cp "$tmp/model.bin" "$tmp/copy.bin"; sync "$tmp/copy.bin"; took "$a" "$(now)" >> "$tmp/copy"
    rm "$tmp/copy.bin"
    for scheme in $schemes; do
        a=$(now)
        "$bin/quantize" "$tmp/model.bin" --scheme "$scheme" --no-verify --quiet --out "$tmp/out.bin" > /dev/null
        took "$a" "$(now)" >> "$tmp/$scheme"
        rm "$tmp/out.bin"
    done
done
copy=$(least "$tmp/copy")
awk -v b="$bytes" -v s="$copy" 'BEGIN { printf "result quantize_copy_rate %.3f GB/s\n", b / s / 1e9 }'
for scheme in $schemes; do
    name=$([ "$scheme" = 8da4w-32 ] || echo "_$scheme" | tr - _)
    awk -v b="$bytes" -v c="$copy" -v s="$(least "$tmp/$scheme")" -v n="$name" 'BEGIN {
        printf "result quantize%s_rate %.3f GB/s\n", n, b / s / 1e9
        printf "result quantize%s_copy_share %.3f ratio\n", n, c / s }'
done
quantize() { peak "$bin/quantize" "$tmp/model.bin" --scheme 8da4w-32 --quiet --out "$tmp/out.bin"; }
memory=$(quantize)
echo "result quantize_peak_memory $memory bytes"
if [ -n "${BIG:-}" ]; then
    rm -f "$tmp"/*.bin
    "$random_model" "$tmp/model.bin" "$BIG"
    name=$(echo "$BIG" | tr - _)
    memory=$(quantize)
    echo "result quantize_${name}_peak_memory $memory bytes"
fi
