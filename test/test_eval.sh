#!/bin/bash
# eval: distance from a reference, batches and ranks that do not change a digit, refusals by name.
# Usage: QLLM_BIN=folder-of-programs test/test_eval.sh [case]
# Prints "ok NAME", "not ok NAME" or "skip NAME" a case.
# shellcheck disable=SC2317
set -u
bin=${QLLM_BIN:?set QLLM_BIN to the folder of the programs}
only=${1:-}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
. scripts/mpi.sh
failed=0
check() { # check NAME COMMAND...
    local name=$1
    shift
    if [ -n "$only" ] && [ "$only" != "$name" ]; then return; fi
    if "$@" >"$tmp/case.txt" 2>&1; then echo "ok $name"; else
        echo "not ok $name"
        sed 's/^/    /' "$tmp/case.txt"
        failed=1
    fi
}

# A model of a few steps, its packed file, and texts that nobody wrote: wikitext's form, and HellaSwag's in six lines
# (the right ending is a sentence of the same grammar, the others are its words in another order).
awk -v seed=1 -v lines=400 -f test/babble.awk >"$tmp/train.txt"
awk -v seed=2 -v lines=40 -f test/babble.awk >"$tmp/val.txt"
awk -v seed=3 -v lines=30 -f test/babble.awk | awk 'NR % 10 == 1 { print " = Page " NR " = \n" } { print " " $0 " " }' \
    >"$tmp/wiki.txt"
awk -v seed=4 -v lines=60 -f test/babble.awk | awk '
    { n = split($0, word, " "); right = NR % 4; half = 2 + NR % 3
      context = word[1]; for (i = 2; i <= half; i++) context = context " " word[i]
      print context "\n" right
      for (k = 0; k < 4; k++) {
          line = ""
          for (i = half + 1; i <= n; i++) line = line (i > half + 1 ? " " : "") \
              word[half + 1 + (i - half - 1 + (k == right ? 0 : k + 1)) % (n - half)]
          print line (k % 2 && k != right ? " again" : "")
      } }' >"$tmp/tasks.txt"
make_model() { # make_model OUT ARGUMENTS...
    local out=$tmp/$1
    shift
    "$bin/train_llama_qat" --train-data "$tmp/train.txt" --batch 4 --seq-len 64 --lr 3e-3 --warmup 0 --out "$out" "$@" \
        >"$out.txt" 2>&1 || { cat "$out.txt"; exit 1; }
}
make_model m --init tiny --scheme 8da4w-32 --steps 12
"$bin/quantize" "$tmp/m/model.bin" --scheme int4wo-32 --out "$tmp/q.bin" >"$tmp/log" 2>&1 || { cat "$tmp/log"; exit 1; }
float=$tmp/m/model.bin
all=(--wikitext "$tmp/wiki.txt" --text "$tmp/val.txt" --val-data "$tmp/val.txt" --hellaswag "$tmp/tasks.txt"
    --seq-len 64)

# digits NAME LAUNCHER... -- ARGUMENTS: what eval finds, in the digits of its JSON, without what is a matter of time
digits() {
    local name=$1 json=$tmp/$1.json
    shift
    rm -f "$json"
    "$@" --threads 1 --json "$json" >"$tmp/$name.txt" 2>&1 || { cat "$tmp/$name.txt"; return 1; }
    sed -e 's/"time": [0-9.]*, //' -e 's/"ranks": [0-9]*, //' -e 's/, "seconds".*//' "$json" >"$tmp/$name.digits"
}
same() { diff "$tmp/$1.digits" "$tmp/$2.digits" || { echo "$1 and $2 differ"; return 1; }; }
field() { sed -n "s/.*\"event\": \"$2\".*\"$3\": \([^,}]*\).*/\1/p" "$tmp/$1.json"; }
# near A B TOLERANCE: relative to B
near() { awk -v a="$1" -v b="$2" -v t="$3" 'BEGIN { d = a - b; if (d < 0) d = -d; if (b < 0) b = -b
    if (a == "" || b == "" || !(d <= t * b)) { print "found " a ", expected " b; exit 1 } }'; }

# The divergence from logits that eval wrote, by its definition, between models so far apart that the one in the other
# direction is another.
divergence_by_definition() {
    local ids mean most alike
    make_model n --init tiny --scheme none --steps 24 --seed 5
    head -c 60 "$tmp/val.txt" >"$tmp/short.txt"
    ids=$(od -An -v -tu1 "$tmp/short.txt" | tr -s ' \n' ',' | sed 's/^,//; s/,$//')
    "$bin/eval" "$tmp/q.bin" --tokens "$ids" --logits-out "$tmp/logits-q" --seq-len 64 || return 1
    "$bin/eval" "$tmp/n/model.bin" --tokens "$ids" --logits-out "$tmp/logits-n" --seq-len 64 || return 1
    values() { # behind the header, whose length stands in front
        local n
        n=$(od -An -tu8 -N8 "$1" | tr -d ' ')
        od -An -v -tf4 -w1032 -j $((8 + n)) "$1"         # 258 logits a line
    }
    paste -d ' ' <(values "$tmp/logits-q") <(values "$tmp/logits-n") | awk '
        NR == 60 { exit }                                # nothing follows the last token
        { V = NF / 2; ta = tb = 1
          for (i = 1; i <= V; i++) { if ($i > $ta) ta = i; if ($(V + i) > $(V + tb)) tb = i }
          za = zb = kl = 0
          for (i = 1; i <= V; i++) { za += exp($i - $ta); zb += exp($(V + i) - $(V + tb)) }
          for (i = 1; i <= V; i++) { b = $(V + i) - $(V + tb) - log(zb); kl += exp(b) * (b - ($i - $ta - log(za))) }
          sum += kl; if (kl > most) most = kl; same += ta == tb; n++ }
        END { printf "%.9g %.9g %.9g\n", sum / n, most, same / n }' >"$tmp/expected"
    digits kl "$bin/eval" "$tmp/q.bin" --text "$tmp/short.txt" --seq-len 64 --reference "$tmp/n/model.bin" || return 1
    read -r mean most alike <"$tmp/expected"
    # od prints 8 digits: a logit below 16 is off by less than 5e-7 there, and a divergence, whose derivative in a logit
    # is p - p_ref, by at most 1e-6 times sum |p - p_ref| <= sqrt(2 kl): less than 2e-5 of any kl above 0.01.
    awk -v kl="$mean" 'BEGIN { exit !(kl > 0.01) }' || { echo "the models are too near: $mean"; return 1; }
    near "$(field kl text kl)" "$mean" 2e-5 && near "$(field kl text kl_max)" "$most" 2e-5 &&
        near "$(field kl text same_top1)" "$alike" 1e-6
}

itself_is_no_distance() {
    digits self "$bin/eval" "$float" --float --text "$tmp/val.txt" --seq-len 64 --reference "$float" || return 1
    [ "$(field self text kl_max) $(field self text same_top1) $(field self text perplexity_ratio)" = "0 1 1" ] ||
        { cat "$tmp/self.json"; return 1; }
}

batches_do_not_matter() {
    digits b1 "$bin/eval" "$tmp/q.bin" "${all[@]}" --reference "$float" --batch 1 || return 1
    for batch in 3 8 0; do
        digits bn "$bin/eval" "$tmp/q.bin" "${all[@]}" --reference "$float" --batch "$batch" &&
            same b1 bn || return 1
    done
    digits bn "$bin/eval" "$tmp/q.bin" "${all[@]}" --reference "$float" --batch 3 --step 7 && same b1 bn
}

ranks_do_not_matter() {
    digits r1 "$bin/eval" "$tmp/q.bin" "${all[@]}" --reference "$float" --batch 2 --arithmetic "$1" || return 1
    for R in 2 3; do
        digits rn mpi_run "$R" "$bin/eval" "$tmp/q.bin" "${all[@]}" --reference "$float" --batch 2 \
            --arithmetic "$1" && same r1 rn || return 1
        [ "$(grep -c '^hellaswag: 60 tasks' "$tmp/rn.txt")" = 1 ] || { echo "not one rank speaks"; return 1; }
    done
}

# One token at a time over an INT8 cache is how generate decodes: near the same text read at once.
served_caches() {
    digits whole "$bin/eval" "$tmp/q.bin" --text "$tmp/val.txt" --seq-len 64 --arithmetic served || return 1
    digits steps "$bin/eval" "$tmp/q.bin" --text "$tmp/val.txt" --seq-len 64 --arithmetic served --step 1 \
        --kv int8 || return 1
    grep -q '"kv": "int8"' "$tmp/steps.json" || return 1
    # keys and values are off by 1/254 of the largest of a head: far less than a hundredth of the loss
    near "$(field steps text loss)" "$(field whole text loss)" 1e-2
}

refused() { # refused STATUS WORDS ARGUMENTS...
    local want=$1 words=$2 status
    shift 2
    "$bin/eval" "$@" >"$tmp/out" 2>"$tmp/err"
    status=$?
    if [ "$status" != "$want" ] || ! grep -q -- "$words" "$tmp/err"; then
        echo "eval $*: status $status, expected $want and \"$words\":"
        cat "$tmp/err"
        return 1
    fi
}
bad_input_is_named() {
    local model=$float ref=(--reference "$float")
    make_model v --init 15M --scheme none --steps 1 --tokenizer bytes --batch 1 --seq-len 16
    printf '%s' '{"model": {"type": "BPE", "vocab": {"t": 0, "h": 1, "e": 2, "th": 3, "a": 4}, "merges": ["t h"]}}' \
        >"$tmp/tokenizer.json"
    make_model t --init tiny --scheme none --steps 1 --tokenizer "$tmp/tokenizer.json"
    : >"$tmp/empty"
    head -n 4 "$tmp/tasks.txt" >"$tmp/cut.txt"
    refused 2 "32000 tokens, .*m/model.bin one of 258\|258 tokens, .* one of 32000" "$model" --text "$tmp/val.txt" \
        --reference "$tmp/v/model.bin" || return 1
    refused 2 "different tokenizers" "$model" --text "$tmp/val.txt" --reference "$tmp/t/model.bin" || return 1
    refused 2 "compares over --wikitext" "$model" --hellaswag "$tmp/tasks.txt" "${ref[@]}" || return 1
    refused 1 "nowhere" "$model" --text "$tmp/val.txt" --reference "$tmp/nowhere" || return 1
    refused 2 "INT8 cache" "$model" --text "$tmp/val.txt" --kv int8 || return 1
    refused 2 "nothing to score" "$model" || return 1
    refused 1 "results could not be written" "$model" --text "$tmp/val.txt" --json /dev/full || return 1
    refused 2 "json is for scores" "$model" --tokens 1,2 --json "$tmp/none.json" || return 1
    refused 0 "not kept: only served arithmetic" "$tmp/q.bin" --text "$tmp/val.txt" --served-cache || return 1
    refused 2 "no text in it" "$model" --wikitext "$tmp/empty" || return 1
    refused 2 "two at least" "$model" --text "$tmp/empty" || return 1
    refused 1 "middle of a task" "$model" --hellaswag "$tmp/cut.txt" || return 1
    refused 2 "codes only" "$tmp/q.bin" --float --text "$tmp/val.txt" || return 1
    refused 2 "too much at once" "$model" --text "$tmp/val.txt" --seq-len 1048576 --batch 65536 || return 1
}
ranks_are_refused_by_name() {
    mpi_run 2 "$bin/eval" "$tmp/q.bin" --tokens 1,2 >"$tmp/log" 2>&1 && return 1
    grep -q "2 ranks cannot share" "$tmp/log" || { cat "$tmp/log"; return 1; }
}

check divergence_by_definition divergence_by_definition
check itself_is_no_distance itself_is_no_distance
check batches_do_not_matter batches_do_not_matter
check served_caches served_caches
check bad_input_is_named bad_input_is_named
if why=$(mpi_missing "$bin/eval"); then echo "skip ranks: $why"; else
    check ranks_do_not_matter_trained ranks_do_not_matter trained
    check ranks_do_not_matter_served ranks_do_not_matter served
    check ranks_are_refused_by_name ranks_are_refused_by_name
fi
exit $failed
