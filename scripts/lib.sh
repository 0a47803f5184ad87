# What the recipes share; read by `. scripts/lib.sh` with the repository root as working folder.
# shellcheck shell=bash disable=SC2154
# The caller sets: out (folder of the run), table (file), EVENT and PPL (the result of eval that counts).
# THREADS=N limits the CPU threads: on a machine that is busy otherwise, fewer can be faster.
bin=${QLLM_BIN:-.}
threads=(--threads "${THREADS:-0}")

need_programs() {
    local p
    for p in train_llama_qat train_llama_qt quantize eval generate; do
        [ -x "$bin/$p" ] || { echo "$bin/$p is not there: run make first" >&2; exit 1; }
    done
}

# say TEXT: a heading with the seconds since the start.
say() { printf '\n== %s (%d:%02d)\n' "$*" $((SECONDS / 60)) $((SECONDS % 60)); }

# run LOG COMMAND...: shows the command, keeps what it prints in LOG, shows the last lines if it fails.
run() {
    local log=$1
    shift
    echo "\$ $*"
    if ! "$@" >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        echo "failed: $* (all it printed: $log)" >&2
        exit 1
    fi
}

# train LOG ARGUMENTS...: the same for a training run, with every 50th step line (STEP_LINES) and the validations shown.
# PROGRAM names the trainer.
train() {
    local log=$1 program=$bin/${PROGRAM:-train_llama_qat}
    shift
    set -- "$@" "${threads[@]}"
    echo "\$ $program $*"
    if ! "$program" "$@" 2>&1 | tee "$log" | awk -v every="${STEP_LINES:-50}" '
            /^step/ { split($2, s, "/"); if (s[1] % every == 0) print; fflush(); next }
            /^val/ { print; fflush() }'; then
        tail -n 20 "$log" >&2
        echo "failed: $program $* (all it printed: $log)" >&2
        exit 1
    fi
}

# json_field FILE EVENT KEY: the number KEY of the last line of EVENT.
json_field() {
    awk -v event="\"event\": \"$2\"" -v key="\"$3\": " 'index($0, event) && (i = index($0, key)) {
        v = substr($0, i + length(key)); sub(/[,}].*/, "", v) } END { print v }' "$1"
}

# measure NAME FILE [ARGUMENTS OF EVAL]: appends "NAME perplexity bytes tokens/s" to $table.
measure() {
    local name=$1 file=$2 base ppl json
    shift 2
    base=$out/${name/:/-} json=$out/${name/:/-}.json
    rm -f "$json"
    run "$base-eval.txt" "$bin/eval" "$file" "$@" "${threads[@]}" --json "$json"
    run "$base-speed.txt" "$bin/generate" "$file" --benchmark --runs 3 "${threads[@]}" --json "$json"
    ppl=$(json_field "$json" "$EVENT" "$PPL")
    printf '%s %s %s %s\n' "$name" "$ppl" "$(stat -c %s "$file")" \
        "$(awk '$1 == "result" && $2 == "generate_decode" { print $3 }' "$base-speed.txt")" >>"$table"
}

# print_table TITLE: what was measured under the names `untouched`, `float`, `rtn:SCHEME` and `qat:SCHEME`, and for each
# scheme the fraction of the loss of rounding to nearest that QAT won back, in log perplexity (the unit cancels).
print_table() {
    awk -v title="$1" '
        BEGIN { printf "%-22s %16s %10s %10s\n", "model", title, "size MB", "tokens/s" }
        {
            split($1, part, ":")
            label = part[1] == "rtn" ? part[2] ", rounded" : part[1] == "qat" ? part[2] ", QAT" : $1
            printf "%-22s %16.4f %10.2f %10.1f\n", label, $2, $3 / 1e6, $4
            ppl[$1] = $2
            if (part[1] == "qat") scheme[n++] = part[2]
        }
        END {
            for (i = 0; i < n; i++) {
                s = scheme[i]
                lost = log(ppl["rtn:" s] / ppl["float"]); won = log(ppl["rtn:" s] / ppl["qat:" s])
                if (lost > 0) printf "%s: QAT recovers %.1f %% of what rounding to nearest loses (%.4f of %.4f nats)\n",
                    s, 100 * won / lost, won, lost
                else printf "%s: rounding to nearest loses nothing here, so there is nothing to recover\n", s
            }
        }' "$table"
}
