#!/bin/bash
# What each scheme costs a model: scripts/compare_schemes.sh MODEL WIKITEXT HELLASWAG [OUT]
# Rounds MODEL (a Hugging Face folder, a .gguf file or a model.bin) to each of SCHEMES, scores it in served arithmetic
# on wikitext and HellaSwag, and measures its distance from MODEL. Ends with a table; OUT (runs/compare) keeps the
# files, what eval printed and its JSON lines. What is there already is not made again. Seconds passed, and seconds that
# threads ran: of wikitext the model's and MODEL's beside it, save for the line of MODEL itself.
# Settings: SCHEMES="int8wo int8dq int4wo-32 8da4w-32" PAGES=0 (of wikitext, 0: all) TASKS=400 (0: all) THREADS=0
# RANKS=1 (with mpirun).
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 3 ] || { sed -n '2,9s/^# //p' "$0"; exit 2; }
model=$1 wiki=$2 hellaswag=$3 out=${4:-runs/compare}
. scripts/lib.sh
. scripts/mpi.sh
for p in quantize eval; do [ -x "$bin/$p" ] || { echo "$bin/$p is not there: run make first" >&2; exit 1; }; done
for f in "$model" "$wiki" "$hellaswag"; do [ -e "$f" ] || { echo "$f is not there" >&2; exit 1; }; done
mkdir -p "$out"
# What is there is of this question, or in the way.
asked=$(stat -c '%n %s %Y' "$model" "$wiki" "$hellaswag"; echo "pages ${PAGES:-0} tasks ${TASKS:-400}")
if [ -e "$out/asked" ] && [ "$(cat "$out/asked")" != "$asked" ]; then
    echo "$out holds the scores of something else ($(tr '\n' ' ' < "$out/asked")): name another folder, or remove it" >&2
    exit 1
fi
echo "$asked" > "$out/asked"

start() { if [ "${RANKS:-1}" -gt 1 ]; then MPI_TIMEOUT=${MPI_TIMEOUT:-7200} mpi_run "$RANKS" "$@"; else "$@"; fi; }
reference=()
# score NAME MODEL ARGUMENTS...: two calls, so that each has its own limit
score() {
    local name=$1 file=$2 json=$out/$1.json
    shift 2
    [ ! -e "$json" ] || return 0
    rm -f "$json.part"
    run "$out/$name-wikitext.txt" start "$bin/eval" "$file" "$@" "${reference[@]}" --wikitext "$wiki" --limit "${PAGES:-0}" \
        "${threads[@]}" --json "$json.part"
    run "$out/$name-hellaswag.txt" start "$bin/eval" "$file" "$@" --hellaswag "$hellaswag" \
        --limit "${TASKS:-400}" "${threads[@]}" --json "$json.part"
    mv "$json.part" "$json"
}

# row NAME: its line of the table
row() {
    local json=$out/$1.json
    w() { json_field "$json" wikitext "$1"; }
    h() { json_field "$json" hellaswag "$1"; }
    awk -v name="$1" -v ppl="$(w word_perplexity)" -v kl="$(w kl)" -v kle="$(w kl_stderr)" -v p99="$(w kl_p99)" \
        -v same="$(w same_top1)" -v acc="$(h acc)" -v norm="$(h acc_norm)" -v err="$(h acc_norm_stderr)" \
        -v size="$(w model_bytes)" -v ws="$(w seconds)" -v wp="$(w processor_seconds)" -v hs="$(h seconds)" \
        -v hp="$(h processor_seconds)" 'BEGIN {
        if (kl == "") distance = sprintf("%20s %8s %7s", "-", "-", "-")
        else distance = sprintf("%9.5f +- %s %8.4f %6.2f%%", kl, kle == "null" ? "   -   " : sprintf("%.5f", kle), p99,
            100 * same)
        printf "%-10s %10.4f %s %7.4f %8.4f +- %.4f %8.1f %8.0f %8.0f %8.0f %8.0f\n", name, ppl, distance, acc, norm, err,
            size / 1e6, ws, wp, hs, hp }'
}

# A trained model.bin is its scheme's: --float takes what is compared with.
score float "$model" --float --arithmetic trained
reference=(--reference "$model")
for scheme in ${SCHEMES:-int8wo int8dq int4wo-32 8da4w-32}; do
    [ -e "$out/$scheme.bin" ] || run "$out/$scheme-quantize.txt" "$bin/quantize" "$model" --scheme "$scheme" \
        --out "$out/$scheme.bin"
    score "$scheme" "$out/$scheme.bin" --arithmetic served
done
say "$model: wikitext, and HellaSwag with ${TASKS:-400} tasks"
{
    printf '%-10s %10s %20s %8s %7s %7s %18s %8s %8s %8s %8s %8s\n' scheme "word ppl" "KL from float" "KL 99%" "top-1" acc \
        acc_norm "size MB" "wiki s" "(cpu s)" "hella s" "(cpu s)"
    for name in float ${SCHEMES:-int8wo int8dq int4wo-32 8da4w-32}; do row "$name"; done
} | tee "$out/table.txt"
