#!/bin/bash
# Gathers English text that every Debian machine has: scripts/machine_text.sh FOLDER [ROOT]
# Writes FOLDER/train.txt (at most 4 MB) and FOLDER/held-out.txt (at most 160 kB) and prints what they were made from.
# Sources: the manual pages, without their markup; the licence texts; where these give less than 1 MB (container images
# often leave manual pages out), also the packages' copyright files and the comments of C headers.
# Of 16 documents one is held out whole. A line is used once: no held-out line occurs in the training text.
set -eu
export LC_ALL=C
out=${1:?usage: scripts/machine_text.sh FOLDER [ROOT]} root=${2:-}
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Manual page source to text: requests are dropped (the words of font macros stay), escapes are resolved.
cat >"$work/man.awk" <<'AWK'
/^\.(TH|Dd)[ \t]/ { skip = 0 }     # the next page
/^['.][ \t]*(de|ig|TS|EQ)/ { skip = 1; next }
skip { if (/^\.\./ || /^['.][ \t]*(TE|EN)/) skip = 0; next }
/^\.[ \t]*(B|I|BR|IR|BI|IB|RB|RI|SM|SB|SH|SS)[ \t]/ { sub(/^\.[ \t]*[A-Z]+[ \t]+/, ""); gsub(/"/, "") }
/^['.]/ { next }
{
    gsub(/\\f(\[[^]]*\]|\(..|.)/, ""); gsub(/\\s[-+]?[0-9]+/, ""); gsub(/\\\*(\[[^]]*\]|\(..|.)/, "")
    gsub(/\\\((aq|cq)/, "'"); gsub(/\\\((lq|rq|dq)/, "\""); gsub(/\\\((em|en)/, "--"); gsub(/\\\((..)/, "")
    gsub(/\\\[[^]]*\]/, ""); gsub(/\\[ ~0]/, " "); gsub(/\\-/, "-"); gsub(/\\".*/, ""); gsub(/\\[&,\/|^%c:d)u]/, "")
    gsub(/\\[e\\]/, "\\"); gsub(/[^\t -~]/, ""); sub(/[ \t]+$/, "")
    if (length($0) > 2) print
}
AWK
# Comments of a C header.
cat >"$work/header.awk" <<'AWK'
{
    line = $0
    if (!inside && !match(line, /\/\*/)) next
    if (!inside) { line = substr(line, RSTART + 2); inside = 1 }
    if (match(line, /\*\//)) { line = substr(line, 1, RSTART - 1); inside = 0 }
    gsub(/[^\t -~]/, "", line); sub(/^[ \t*]+/, "", line); sub(/[ \t]+$/, "", line)
    if (length(line) > 20) print line
}
AWK
cat >"$work/plain.awk" <<'AWK'
{ gsub(/[^\t -~]/, ""); sub(/[ \t]+$/, ""); if (length($0) > 2) print }
AWK

limit=$((4 * 1024 * 1024))
: >"$work/train" && : >"$work/held"
gathered() { cat "$work/train" "$work/held" | wc -c; }
# gather NAME AWK FILE-LIST: the documents through the filter, in pieces of 64, until there is enough.
gather() {
    local name=$1 filter=$2 list=$3 before first=1 files
    before=$(gathered)
    files=$(wc -l <"$list")
    while [ "$first" -le "$files" ] && [ "$(stat -c %s "$work/train")" -lt $((limit * 3 / 2)) ]; do
        sed -n "$first,$((first + 63))p" "$list" | awk -v train="$work/a" -v held="$work/b" \
            'BEGIN { printf "" > train; printf "" > held } { print > (NR % 16 ? train : held) }'
        tr '\n' '\0' <"$work/a" | xargs -0 -r gzip -dcf -- 2>/dev/null | awk -f "$work/$filter" >>"$work/train" || true
        tr '\n' '\0' <"$work/b" | xargs -0 -r gzip -dcf -- 2>/dev/null | awk -f "$work/$filter" >>"$work/held" || true
        first=$((first + 64))
    done
    [ "$first" -gt "$files" ] || files=$((first - 1))
    echo "  $name: $files files, $((($(gathered) - before) / 1000)) kB of text"
}
unique_bytes() { awk '!seen[$0]++ { n += length($0) + 1 } END { print n + 0 }' "$work/train"; }

echo "text of this machine:"
find "$root/usr/share/common-licenses" -type f 2>/dev/null | sort >"$work/list" || true
gather "$root/usr/share/common-licenses" plain.awk "$work/list"
find "$root/usr/share/man" -path '*/man/man*' -name '*.gz' -type f 2>/dev/null | sort >"$work/list" || true
gather "$root/usr/share/man (English)" man.awk "$work/list"
if [ "$(unique_bytes)" -lt 1000000 ]; then
    find "$root/usr/share/doc" -name copyright -type f 2>/dev/null | sort >"$work/list" || true
    gather "$root/usr/share/doc/*/copyright" plain.awk "$work/list"
    find "$root/usr/include" -name '*.h' -type f 2>/dev/null | sort >"$work/list" || true
    gather "$root/usr/include (comments)" header.awk "$work/list"
fi
awk '!seen[$0]++' "$work/train" | head -c "$limit" >"$out/train.txt"
# "Shares no line" is checked after the cut, so that a line cut in half counts as it stands.
awk 'NR == FNR { seen[$0] = 1; next } !seen[$0]++' "$out/train.txt" "$work/held" | head -c 160000 | sed '$d' \
    >"$out/held-out.txt"
train=$(stat -c %s "$out/train.txt") held=$(stat -c %s "$out/held-out.txt")
echo "  each line once: train.txt $((train / 1000)) kB, held-out.txt $((held / 1000)) kB"
if [ "$train" -lt 500000 ] || [ "$held" -lt 20000 ]; then
    echo "machine_text.sh: too little text on this machine (500 kB are needed);" \
        "give a text of your own to train_llama_qat" >&2
    exit 1
fi
