#!/bin/bash
# Draws the loss curves of one or more runs into a PNG: scripts/plot.sh [-o FILE.png] [-l LABEL=LOSS]... RUN...
# RUN is the folder given to --out, or a log.jsonl. Training loss is smoothed (mean of the last 5 % of steps, at least
# 1); validation is drawn with points: with fake quantization and, beside it, in float. -l adds a horizontal line, for
# what is no run (a model rounded to nearest). Default file: loss.png.
set -eu
out=loss.png
levels=()
while getopts "o:l:h" option; do
    case $option in
    o) out=$OPTARG ;;
    l) levels+=("$OPTARG") ;;
    *) sed -n '2,5s/^# //p' "$0"; exit 2 ;;
    esac
done
shift $((OPTIND - 1))
[ $# -gt 0 ] || { echo "plot.sh: name at least one run (a folder with log.jsonl)" >&2; exit 2; }
command -v gnuplot >/dev/null || { echo "plot.sh: gnuplot is not installed: apt-get install gnuplot-nox" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# field LINE KEY of awk below: a number of a JSON line, or "" (null too).
cat >"$work/read.awk" <<'AWK'
function field(key,   s) {
    if (!match($0, "\"" key "\": *-?[0-9][-+0-9.eE]*")) return ""
    s = substr($0, RSTART, RLENGTH)
    sub(/^.*: */, "", s)
    return s + 0
}
/"event": *"step"/ {
    # After a resume the log may hold a step twice: the later one counts.
    s = field("step"); l = field("loss")
    if (s != "" && l != "") { if (!(s in loss)) order[n++] = s; loss[s] = l }
}
/"event": *"val"/ { s = field("step"); if (s != "") { vals[s] = 1; v[s] = field("loss"); q[s] = field("loss_fq") } }
END {
    span = int(n / 20); if (span < 1) span = 1
    for (i = 0; i < n; i++) {
        sum += loss[order[i]]
        if (i >= span) sum -= loss[order[i - span]]
        count = i + 1 < span ? i + 1 : span
        print order[i], sum / count > train
    }
    for (s in vals) { if (v[s] != "") print s, v[s] > val; if (q[s] != "") print s, q[s] > valq }
}
AWK

commands=() index=0
for run in "$@"; do
    log=$run
    [ -d "$run" ] && log=$run/log.jsonl
    if [ ! -r "$log" ]; then
        echo "plot.sh: $log is not there or cannot be read; name the --out folder of a run" >&2
        exit 1
    fi
    title=$(basename "${run%/log.jsonl}")
    title=${title//[\"\\]/}
    base=$work/$index
    : >"$base.train" && : >"$base.val" && : >"$base.valq"
    awk -v train="$base.train" -v val="$base.val" -v valq="$base.valq" -f "$work/read.awk" "$log"
    for kind in val valq; do sort -g -o "$base.$kind" "$base.$kind"; done
    cat "$base.train" "$base.val" "$base.valq" | grep -q . || { echo "plot.sh: $log has no step yet" >&2; exit 1; }
    colour=$((index % 8 + 1)) points="with linespoints lt $((index % 8 + 1)) lw 2 ps 0.7"
    [ ! -s "$base.train" ] || commands+=("'$base.train' with lines lt $colour lw 1 title \"$title: train\"")
    [ ! -s "$base.valq" ] || commands+=("'$base.valq' $points pt 7 title \"$title: held out, quantized\"")
    # A run with one held-out loss (no fake quantization, or INT8 weights) has nothing to tell apart.
    held="held out, float"
    [ -s "$base.valq" ] || held="held out"
    [ ! -s "$base.val" ] || commands+=("'$base.val' $points pt 6 dt 2 title \"$title: $held\"")
    index=$((index + 1))
done
for level in "${levels[@]}"; do
    [[ ${level##*=} =~ ^[0-9.eE+-]+$ ]] || { echo "plot.sh: -l $level: expected LABEL=NUMBER" >&2; exit 2; }
    label=${level%=*}
    commands+=("${level##*=} with lines lt 7 lw 2 dt 3 title \"${label//[\"\\]/}\"")
done
plots=$(printf '%s, ' "${commands[@]}")
gnuplot <<PLOT
set terminal pngcairo size 800,480 font "DejaVu Sans,10" noenhanced
set output '$work/plot.png'
set grid lc rgb "#dddddd"
set border 3
set tics nomirror
set xlabel "step"
set ylabel "loss (nats a token)"
set key top right
plot ${plots%, }
PLOT
mv "$work/plot.png" "$out"
echo "$out"
