#!/bin/sh
# How fast is decoding against what memory can be read with? For each shape and scheme, generate --benchmark and the
# ceiling (read_bandwidth, as many bytes as the file has, at least four caches) in turns: on a machine that others use,
# memory is fast in one minute and slow in the next, so each run is compared with the ceilings just before and just after
# it (their mean), and the median of TURNS such shares counts. Prints the table of torchao with that share.
# Usage: bench_generate.sh BIN-FOLDER RANDOM_SHARD
#   SHAPES="135M 1B"   SCHEMES="bf16 int8wo int8dq int4wo-32 8da4w-32"   TURNS=5
#   THREADS=0          of decoding and of the ceiling (0: all)
#   MODELS=FOLDER      where the random models lie (made where missing: 7 GB for both shapes)
#   OPTIONS=           more of generate's: --kv int8
set -eu
bin=$1
tools=$(dirname "$2")
shapes=${SHAPES:-135M 1B} schemes=${SCHEMES:-bf16 int8wo int8dq int4wo-32 8da4w-32} turns=${TURNS:-5} threads=${THREADS:-0}
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
# GB/s of reading BYTES from memory, the fastest of 10 runs.
ceiling() { "$tools/read_bandwidth" "$1" 10 "$threads" | awk '$2 == "read_bandwidth" { print $3 }'; }
# turn FILE NEW CEILING-BEFORE BYTES: one run; a line of its figures, and the ceiling after it in $top.
turn() {
    # shellcheck disable=SC2086
    "$bin/generate" "$1" --benchmark --runs 1 --bench-prompt 128 --bench-new "$2" --threads "$threads" \
        ${OPTIONS:-} >"$tmp/out"
    top=$(ceiling "$4")
    awk -v before="$3" -v after="$top" '
        /^\| Technique/ { row = NR + 2 }
        NR == row { split($0, cell, "|"); torchao = cell[3] "|" cell[4] "|" cell[5] "|" cell[6] }
        $1 == "result" { v[$2] = $3 }
        END {
            ceiling = (before + after) / 2
            print v["generate_bandwidth"] / ceiling, v["generate_decode"], v["generate_prefill"], v["generate_bandwidth"],
                ceiling, v["generate_start_ready"], v["generate_start_first_token"] "|" torchao }' "$tmp/out" >>"$tmp/turns"
}
# The value in column N of the turns: first, median and last in order.
spread() { cut -d '|' -f 1 "$tmp/turns" | cut -d ' ' -f "$1" | sort -g |
    awk '{ v[NR] = $1 } END { print v[1], v[int((NR + 1) / 2)], v[NR] }'; }

: >"$tmp/table"
for shape in $shapes; do
    case $shape in *B) new=48 ;; *) new=256 ;; esac
    for scheme in $schemes; do
        file=$(model "$shape" "$scheme")
        cat "$file" >/dev/null                       # starts are measured with the file in the page cache
        bytes=$(stat -c %s "$file")
        : >"$tmp/turns"
        top=$(ceiling "$bytes")
        i=0
        while [ $i -lt "$turns" ]; do
            turn "$file" $new "$top" "$bytes"
            i=$((i + 1))
        done
        # The row of the source is that of the turn with the median share.
        row=$(sort -g "$tmp/turns" | sed -n "$(((turns + 1) / 2))p" | cut -d '|' -f 2-)
        echo "$(spread 1) $(spread 2) $(spread 3) $(spread 4) $(spread 5) $(spread 6) $(spread 7)" |
            awk -v row="$row" -v shape="$shape" -v scheme="$scheme" -v table="$tmp/table" '{
            printf "| %s %-9s |%s| %8.1f %8.1f %8.1f | %8.1f | %9.2f | %7.2f | %5.2f %5.2f %5.2f |\n", shape, scheme, row,
                $4, $5, $6, $8, $11, $14, $1, $2, $3 >> table
            name = "generate_" shape "_" scheme
            printf "result %s_decode %.2f tok/s\nresult %s_prefill %.1f tok/s\n", name, $5, name, $8
            printf "result %s_bandwidth %.3f GB/s\nresult %s_ceiling %.3f GB/s\n", name, $11, name, $14
            printf "result %s_share %.4f ratio\nresult %s_share_best %.4f ratio\n", name, $2, name, $3
            printf "result %s_start_ready %.1f ms\nresult %s_start_first_token %.1f ms\n", name, $17, name, $20 }'
    done
done
grep '^# ' "$tmp/out" | sed 's/^# [^,]*, /# /; s/, 1 runs//'
echo "# Tokens/Second and Memory Bandwidth as torchao has them (prompt included, model size times tokens); then decoding"
echo "# alone (min, median, max), the prompt alone, what decoding reads, what memory gives, and the share of that (min,"
echo "# median, max of $turns turns)."
echo "| Technique      | Tokens/Second | Memory Bandwidth (GB/s) | Peak Memory (GB) | Model Size (GB) | decode tokens/s            |  prefill | read GB/s | ceiling | share             |"
echo "| -------------- | ------------- | ----------------------- | ---------------- | --------------- | -------------------------- | -------- | --------- | ------- | ----------------- |"
cat "$tmp/table"
