#!/bin/sh
# generate as a program: the text of a model that knows one sentence by heart, on every path; stop strings, many prompts,
# chat, the benchmark's output, and bad input.
# Usage: QLLM_BIN=folder-of-programs test/test_generate.sh [case]. Prints "ok NAME" or "not ok NAME" a case.
set -u
bin=${QLLM_BIN:?set QLLM_BIN to the folder of the programs}
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
failed=0
only=${1:-}

check() { # check NAME command...: runs a case
    name=$1; shift
    if [ -n "$only" ] && [ "$only" != "$name" ]; then return; fi
    if "$@" > "$tmp/case.txt" 2>&1; then echo "ok $name"; else echo "not ok $name"; sed 's/^/    /' "$tmp/case.txt"; failed=1; fi
}

# A model that has seen nothing else says nothing else: its likeliest byte is far ahead of the next, whatever rounding does.
sentence="Seven quiet ships left the old harbour at dawn; nobody on the quay counted more than five. "
prompt="Seven quiet ships left the old"
rest=" harbour at dawn; nobody on the quay counted more than five. "
awk -v s="$sentence" 'BEGIN { for (i = 0; i < 400; i++) printf "%s", s }' > "$tmp/text.txt"
"$bin/train_llama_qat" --init tiny --train-data "$tmp/text.txt" --batch 4 --seq-len 128 --steps 150 --lr 2e-3 --warmup 20 --scheme none \
    --out "$tmp/m" > "$tmp/log" 2>&1 || { cat "$tmp/log"; echo "not ok train"; exit 1; }
model=$tmp/m/model.bin

gen() { "$bin/generate" --bos no "$@" 2>"$tmp/err"; }      # the text had no beginnings in its midst
says() { # says EXPECTED arguments...: the greedy continuation of the prompt
    want=$1; shift
    got=$(gen "$@" --prompt "$prompt" --max-new-tokens ${#rest} --temperature 0) || { cat "$tmp/err"; return 1; }
    [ "$got" = "$want" ] || { echo "$*: $got"; return 1; }
}

whole=$prompt$rest
stored_text() {
    says "$whole" "$model" --arithmetic trained --prefill 7 && says "$whole" "$model" --arithmetic served &&
        says "$whole" "$model" --kv int8 --threads 1 || return 1
    for scheme in int8wo int8dq int4wo-32 8da4w-32; do
        "$bin/quantize" "$model" --scheme $scheme --out "$tmp/$scheme.bin" --quiet >"$tmp/log" 2>&1 || { cat "$tmp/log"; return 1; }
        for how in "--arithmetic trained" "--arithmetic served" "--arithmetic served --kv int8" "--prefill 5 --threads 1"; do
            # shellcheck disable=SC2086
            says "$whole" "$tmp/$scheme.bin" $how || return 1
        done
    done
}

stop_strings() {
    says "$prompt harbour at dawn" "$model" --stop ";" --stop "quay" && says "$prompt" "$model" --stop " harbour" || return 1
    # One that begins and does not go on is text after all.
    says "$whole" "$model" --stop "harbour at noon" --stop "five. Eight" || return 1
    gen "$model" --prompt "$prompt" --temperature 0 --stop "dawn; no" --format json | grep -q '"finish": "stop", .*"text": " harbour at "}$' ||
        { cat "$tmp/err"; return 1; }
    fails 2 'every text begins with that' "$model" --prompt x --stop ""
}

# fails STATUS TEXT arguments...: exit status and what the message says
fails() {
    status=$1 text=$2; shift 2
    gen "$@" >"$tmp/out" </dev/null
    got=$?
    [ $got = "$status" ] || { echo "status $got, expected $status: $*"; cat "$tmp/err"; return 1; }
    grep -q -e "$text" "$tmp/err" || { echo "no \"$text\" in: $(cat "$tmp/err")"; return 1; }
}

text_of() { sed -n 's/.*"text": "\(.*\)"}$/\1/p' "$1"; }
many_prompts() {
    printf '%s\n{"prompt": "nobody on"}\n\n{"text": 1}\nab\377c\n%s\n' "$prompt" "$prompt" >"$tmp/lines"
    gen "$model" --stdin --format json --temperature 0 --max-new-tokens 8 <"$tmp/lines" >"$tmp/out"
    [ $? = 2 ] && grep -q '3 prompts were refused, the first in line 3' "$tmp/err" || { cat "$tmp/err"; return 1; }
    [ "$(grep -c '"event": "generate"' "$tmp/out")" = 3 ] && [ "$(grep -c '"event": "refused"' "$tmp/out")" = 3 ] || { cat "$tmp/out"; return 1; }
    grep -q '"index": 2, .*"prompt": "nobody on", "text": " the qua"}$' "$tmp/out" || { cat "$tmp/out"; return 1; }
    grep -q '"index": 5, "error": "the line is not valid UTF-8: byte 2 is 0xff' "$tmp/out" || { cat "$tmp/out"; return 1; }
    # What came before does not matter, even where small differences show.
    printf 'the quay\nnobody on\nthe quay\n' | gen "$model" --stdin --format json --temperature 3 --max-new-tokens 40 >"$tmp/out" ||
        { cat "$tmp/err"; return 1; }
    [ "$(text_of "$tmp/out" | sed -n 1p)" = "$(text_of "$tmp/out" | sed -n 3p)" ] || { cat "$tmp/out"; return 1; }
    printf 'nobody on\nthe quay\n' | gen "$model" --stdin --temperature 0 --max-new-tokens 4 >"$tmp/out" &&
        [ "$(cat "$tmp/out")" = "--- 1: nobody on
 the
--- 2: the quay
 cou" ] || { cat "$tmp/out"; return 1; }
}

# JSON that spells a NUL or no character at all is refused, not cut; messages want --chat, and get --system's in front.
json_lines() {
    printf '%s\n' '{"prompt": "abc\u0000def"}' '{"prompt": "xy\uZZZZ"}' '{"prompt": "x", "messages": []}' '{"prompt": "caf\u00e9"}' >"$tmp/lines"
    gen "$model" --stdin --format json --temperature 0 --max-new-tokens 4 <"$tmp/lines" >"$tmp/out"
    [ $? = 1 ] && grep -q '3 prompts were refused, the first in line 1' "$tmp/err" || { cat "$tmp/err"; return 1; }
    [ "$(grep -c 'u is not followed by four hexadecimal digits' "$tmp/out")" = 2 ] && grep -q 'messages.* are for --chat' "$tmp/out" &&
        [ "$(grep -c '"event": "generate"' "$tmp/out")" = 1 ] || { cat "$tmp/out"; return 1; }
    printf '%s\n' '{"prompt": "the quay"}' '{"messages": [{"role": "user", "content": "the quay"}]}' >"$tmp/lines"
    gen "$model" --chat --template chatml --system "Be brief." --stdin --format json --temperature 0 --max-new-tokens 4 <"$tmp/lines" >"$tmp/out" ||
        { cat "$tmp/err"; return 1; }
    [ "$(sed -n 's/.*"prompt_tokens": \([0-9]*\),.*/\1/p' "$tmp/out" | uniq | wc -l)" = 1 ] || { cat "$tmp/out"; return 1; }
    gen "$model" --stdin <"$tmp" >"$tmp/out"
    [ $? = 1 ] && grep -q 'stdin cannot be read' "$tmp/err" || { cat "$tmp/err"; return 1; }
}

# A model may say any byte, and end within a character: a conversation goes on, and JSON holds all of the text.
any_bytes() {
    for seed in 1 2 3 4; do
        set -- --temperature 80 --top-k 0 --seed $seed --max-new-tokens 40
        printf 'hello\nagain\nand again\n' | gen "$model" --chat --template chatml --format json "$@" >"$tmp/turns" || { cat "$tmp/err"; return 1; }
        [ "$(wc -l <"$tmp/turns")" = 3 ] || { cat "$tmp/turns"; return 1; }
    done
    seed=1
    while gen "$model" --prompt The --temperature 80 --top-k 0 --seed $seed --max-new-tokens 400 >"$tmp/out" &&
        [ "$(tr -d '\000' <"$tmp/out" | wc -c)" = "$(wc -c <"$tmp/out")" ] && [ $seed -lt 40 ]; do seed=$((seed + 1)); done
    [ $seed -lt 40 ] || { echo "no seed says a NUL"; return 1; }
    gen "$model" --prompt The --temperature 80 --top-k 0 --seed $seed --max-new-tokens 400 --format json >"$tmp/json" || { cat "$tmp/err"; return 1; }
    text_of "$tmp/json" | LC_ALL=C sed 's/\\\\/ /g; s/\\u[0-9a-f]\{4\}//g; s/\\[a-z]//g' | LC_ALL=C tr -dc 'a-zA-Z' >"$tmp/letters"
    tail -c +4 "$tmp/out" | LC_ALL=C tr -dc 'a-zA-Z' | cmp - "$tmp/letters"
}

# A token that the tokenizer has and the model does not is an error of its prompt alone.
unknown_token() {
    mkdir -p "$tmp/pad" && "$bin/quantize" "$model" --scheme int8wo --out "$tmp/q.bin" --hf-out "$tmp/pad" --quiet >"$tmp/log" 2>&1 ||
        { cat "$tmp/log"; return 1; }
    pad='{"id": 258, "content": "[PAD]", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}'
    sed -i "s/\"added_tokens\": \[/&$pad,/" "$tmp/pad/tokenizer.json"
    printf 'hello\nuse [PAD] here\nthird\n' | gen "$tmp/pad" --stdin --format json --max-new-tokens 4 >"$tmp/out"
    [ $? = 1 ] && [ "$(grep -c '"event": "generate"' "$tmp/out")" = 2 ] &&
        grep -q '"index": 2, "error": "token 4 of the prompt is 258, but the model has ids 0 to 257' "$tmp/out" ||
        { cat "$tmp/out" "$tmp/err"; return 1; }
}

number_of() { sed -n "s/.*\"$2\": \([0-9]*\),.*/\1/p" "$1" | tail -n 1; }
# The second turn says what it says when the whole conversation is given at once, though the first was in the cache; also
# where the first was cut by a stop string, of which the cache holds the beginning.
chat_turns() {
    two_turns && first=$(text_of "$tmp/turns" | head -n 1) && two_turns --stop "$(printf %s "$first" | cut -c 4-7)" &&
        [ "$(text_of "$tmp/turns" | head -n 1)" = "$(printf %s "$first" | cut -c 1-3)" ] || { cat "$tmp/turns"; return 1; }
    # A byte a token: what is kept are the first prompt and three of the answer.
    kept=$(number_of "$tmp/turns" cached_tokens)
    head -n 1 "$tmp/turns" >"$tmp/turn"
    [ "$kept" = $(($(number_of "$tmp/turn" prompt_tokens) + 3)) ] || { echo "$kept kept"; cat "$tmp/turns"; return 1; }
}
two_turns() {
    set -- --chat --template chatml --arithmetic trained --temperature 0 --max-new-tokens 12 --format json "$@"
    printf '%s\n\n%s\n' "$prompt" "nobody on" | gen "$model" "$@" --system "Be brief." >"$tmp/turns" || { cat "$tmp/err"; return 1; }
    [ "$(wc -l <"$tmp/turns")" = 2 ] && [ "$(number_of "$tmp/turns" cached_tokens)" -gt 60 ] || { cat "$tmp/turns"; return 1; }
    first=$(text_of "$tmp/turns" | head -n 1) second=$(text_of "$tmp/turns" | tail -n 1)
    printf '{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "%s"}, {"role": "assistant", "content": "%s"}, {"role": "user", "content": "nobody on"}]}\n' \
        "$prompt" "$first" >"$tmp/line"
    gen "$model" "$@" --stdin <"$tmp/line" >"$tmp/once" || { cat "$tmp/err"; return 1; }
    [ -n "$second" ] && [ "$(text_of "$tmp/once")" = "$second" ] || { cat "$tmp/turns" "$tmp/once"; return 1; }
    [ "$(number_of "$tmp/once" prompt_tokens)" = "$(number_of "$tmp/turns" prompt_tokens)" ]
}

# The template that stands in a file of its own, as in newer folders; one that cannot be run is named.
template_file() {
    mkdir -p "$tmp/chat" && "$bin/quantize" "$model" --scheme int8wo --out "$tmp/q.bin" --hf-out "$tmp/chat" --quiet >"$tmp/log" 2>&1 ||
        { cat "$tmp/log"; return 1; }
    printf '{%% for m in messages %%}{{ m.content }}{%% endfor %%}' >"$tmp/chat/chat_template.jinja"
    gen "$tmp/chat" --chat --prompt "$prompt" --temperature 0 --max-new-tokens 8 >"$tmp/out" || { cat "$tmp/err"; return 1; }
    [ "$(cat "$tmp/out")" = " harbour" ] || { cat "$tmp/out"; return 1; }
    printf '\n{%% macro f() %%}' >"$tmp/chat/chat_template.jinja"
    fails 1 'line 2: {% macro %} is not supported.*--template' "$tmp/chat" --chat --prompt x
}

benchmark_output() {
    gen "$model" --benchmark --runs 3 --bench-prompt 16 --bench-new 24 >"$tmp/out" || { cat "$tmp/err"; return 1; }
    grep -q '^| Technique    | Tokens/Second | Memory Bandwidth (GB/s) | Peak Memory (GB) | Model Size (GB) |$' "$tmp/out" || { cat "$tmp/out"; return 1; }
    awk '$1 == "result" { v[$2] = $3 } END {
        if (!(v["generate_decode_min"] > 0 && v["generate_decode_min"] <= v["generate_decode"] && v["generate_decode"] <= v["generate_decode_max"])) exit 1
        if (!(v["generate_whole"] > 0 && v["generate_whole"] < 1.05 * v["generate_decode_max"])) exit 1
        exit !(v["generate_start_ready"] > 0 && v["generate_start_first_token"] > v["generate_start_ready"]) }' "$tmp/out" || { cat "$tmp/out"; return 1; }
    gen "$model" --benchmark --runs 2 --bench-prompt 8 --bench-new 4 --format json >"$tmp/out" && [ "$(wc -l <"$tmp/out")" = 1 ] &&
        grep -q '"event": "benchmark", .*"decode_tokens_per_s_min": [0-9.]*, ' "$tmp/out" || { cat "$tmp/out"; return 1; }
}

bad_input() {
    awk 'BEGIN { for (i = 0; i < 600; i++) printf "x" }' >"$tmp/long"
    printf 'ab\303' >"$tmp/half"; printf 'ab\000c' >"$tmp/nul"; : >"$tmp/empty"
    fails 2 'the prompt has 600 tokens and the context 512' "$model" --prompt-file "$tmp/long" &&
        fails 2 'the context 4: .* or raise --ctx' "$model" --prompt abcdef --ctx 4 &&
        fails 2 'the prompt is empty' "$model" --prompt "" &&
        fails 2 'the prompt is empty' "$model" --prompt-file "$tmp/empty" &&
        fails 2 'byte 2 is 0xc3' "$model" --prompt-file "$tmp/half" &&
        fails 2 'NUL at byte 2' "$model" --prompt-file "$tmp/nul" &&
        fails 2 'no chat template "vicuna"; known: llama3' "$model" --chat --template vicuna --prompt x &&
        fails 1 'brings no chat template.*--template' "$model" --chat --prompt x &&
        fails 2 'is for --chat' "$model" --template llama3 --prompt x &&
        fails 2 '--stdin reads the prompts' "$model" --stdin --prompt x &&
        fails 2 'a prompt of its own' "$model" --benchmark --chat &&
        fails 2 'leave out --ctx' "$model" --benchmark --ctx 8 &&
        fails 2 'INT8 cache' "$model" --prompt x --kv int8 --arithmetic trained || return 1
    # Weights without a tokenizer.
    mkdir -p "$tmp/hf" && "$bin/quantize" "$model" --scheme int8wo --out "$tmp/q.bin" --hf-out "$tmp/hf" --quiet >"$tmp/log" 2>&1
    rm -f "$tmp/hf/tokenizer.json"
    fails 1 'carries no tokenizer, so a conversation cannot be read' "$tmp/hf" --chat --prompt x &&
        fails 1 'carries no tokenizer, so a prompt cannot be read' "$tmp/hf" --prompt x
}

# A model.bin that was changed is found out, unless nobody looks.
verify() {
    cp "$model" "$tmp/changed.bin"
    size=$(stat -c %s "$tmp/changed.bin")
    byte=$(od -An -tu1 -j $((size / 2)) -N 1 "$tmp/changed.bin")
    # shellcheck disable=SC2059
    printf "\\$(printf %o $((byte ^ 1)))" | dd of="$tmp/changed.bin" bs=1 seek=$((size / 2)) conv=notrunc 2>/dev/null
    fails 1 'checksum' "$tmp/changed.bin" --prompt x && gen "$tmp/changed.bin" --no-verify --prompt x >/dev/null || { cat "$tmp/err"; return 1; }
}

check stored_text stored_text
check stop_strings stop_strings
check many_prompts many_prompts
check json_lines json_lines
check any_bytes any_bytes
check unknown_token unknown_token
check chat_turns chat_turns
check template_file template_file
check benchmark_output benchmark_output
check bad_input bad_input
check verify verify
exit $failed
