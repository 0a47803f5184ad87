#!/bin/sh
# How fast is decoding against what memory can be read with? For each shape and scheme, generate --benchmark between two
# measurements of the ceiling (read_bandwidth, as many bytes as the file has, at least four caches; the faster of the two
# counts), and the table of torchao with the share of the ceiling. Usage: bench_generate.sh BIN-FOLDER RANDOM_SHARD
#   SHAPES="135M 1B"   SCHEMES="bf16 int8wo int8dq int4wo-32 8da4w-32"   RUNS=3
#   MODELS=FOLDER      where the random models lie (made where missing: 7 GB for both shapes)
#   OPTIONS=           more of generate's: --kv int8
set -eu
bin=$1
tools=$(dirname "$2")
shapes=${SHAPES:-135M 1B} schemes=${SCHEMES:-bf16 int8wo int8dq int4wo-32 8da4w-32} runs=${RUNS:-3}
models=${MODELS:-$bin/../bench-models}
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
mkdir -p "$models"

# The file of a shape in a scheme, written once; it appears whole or not at all.
model() {
    float=$models/$1.bin
    [ -f "$float" ] || "$tools/random_model" "$float" "$1" >&2
    [ "$2" = bf16 ] && { echo "$float"; return; }
    packed=$models/$1-$2.bin
    [ -f "$packed" ] || "$bin/quantize" "$float" --scheme "$2" --out "$packed" --quiet >"$tmp/log" 2>&1 ||
        { cat "$tmp/log" >&2; return 1; }
    echo "$packed"
}
# GB/s of reading BYTES from memory, the fastest of 20 runs.
ceiling() { "$tools/read_bandwidth" "$1" 20 | awk '$2 == "read_bandwidth" { print $3 }'; }
figure() { awk -v name="generate_$1" '$1 == "result" && $2 == name { print $3 }' "$tmp/out"; }

: >"$tmp/table"
for shape in $shapes; do
    case $shape in *B) new=48 ;; *) new=256 ;; esac
    for scheme in $schemes; do
        file=$(model "$shape" "$scheme")
        cat "$file" >/dev/null                       # starts are measured with the file in the page cache
        bytes=$(stat -c %s "$file")
        before=$(ceiling "$bytes")
        # shellcheck disable=SC2086
        "$bin/generate" "$file" --benchmark --runs "$runs" --bench-prompt 128 --bench-new $new ${OPTIONS:-} >"$tmp/out"
        after=$(ceiling "$bytes")
        row=$(sed -n '/^| Technique/,/^$/p' "$tmp/out" | sed -n 3p)
        awk -v row="$row" -v shape="$shape" -v scheme="$scheme" -v a="$before" -v b="$after" -v decode="$(figure decode)" \
            -v lo="$(figure decode_min)" -v hi="$(figure decode_max)" -v fill="$(figure prefill)" \
            -v read="$(figure bandwidth)" -v most="$(figure bandwidth_max)" -v ready="$(figure start_ready)" \
            -v first="$(figure start_first_token)" -v table="$tmp/table" 'BEGIN {
            top = a > b ? a : b
            split(row, cell, "|")
            printf "| %s %-9s |%s|%s|%s|%s| %8.1f %8.1f %8.1f | %8.1f | %9.2f | %7.2f | %5.2f |\n", shape, scheme, cell[3], \
                cell[4], cell[5], cell[6], lo, decode, hi, fill, read, top, read / top >> table
            name = "generate_" shape "_" scheme
            printf "result %s_decode %.2f tok/s\nresult %s_prefill %.1f tok/s\n", name, decode, name, fill
            printf "result %s_bandwidth %.3f GB/s\nresult %s_ceiling %.3f GB/s\n", name, read, name, top
            printf "result %s_share %.4f ratio\nresult %s_share_best %.4f ratio\n", name, read / top, name, most / top
            printf "result %s_start_ready %.1f ms\nresult %s_start_first_token %.1f ms\n", name, ready, name, first }'
    done
done
grep '^# ' "$tmp/out" | sed 's/^# [^,]*, /# /'
echo "# Tokens/Second and Memory Bandwidth as torchao has them (prompt included, model size times tokens); then decoding"
echo "# alone (min, median, max), the prompt alone, what decoding reads, what memory gives, and the share of that."
echo "| Technique      | Tokens/Second | Memory Bandwidth (GB/s) | Peak Memory (GB) | Model Size (GB) | decode tokens/s            |  prefill | read GB/s | ceiling | share |"
echo "| -------------- | ------------- | ----------------------- | ---------------- | --------------- | -------------------------- | -------- | --------- | ------- | ----- |"
cat "$tmp/table"
