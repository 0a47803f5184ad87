#!/bin/sh
# Gathers the libraries that qllm.c is built with (cJSON, PCRE2, oneDNN where there is one) in a folder, to be taken to a
# machine of the same kind where nothing can be installed: scripts/pack_deps.sh DIR, there: make DEPS_HOME=DIR
# DEPS_WITHOUT="dnnl"   leaves libraries out
set -eu
[ $# = 1 ] || { sed -n '2,4s/^# //p' "$0"; exit 2; }
dir=$1
mkdir -p "$dir/include" "$dir/lib"
# header: as the compiler finds it
find_header() {
    printf '#include <%s>\n' "$1" | "${CC:-cc}" -E -x c - 2> /dev/null | sed -n 's/^# 1 "\([^"]*\)".*/\1/p' |
        grep "/$1\$" | head -n 1
}
find_library() { "${CC:-cc}" -print-file-name="lib$1.so"; }
missing=
for item in cjson:cjson/cJSON.h pcre2-8:pcre2.h dnnl:dnnl.h; do
    name=${item%%:*} header=${item#*:}
    case " ${DEPS_WITHOUT:-} " in *" $name "*) continue ;; esac
    from=$(find_header "$header") library=$(find_library "$name")
    if [ -z "$from" ] || [ ! -e "$library" ]; then
        [ "$name" = dnnl ] || missing="$missing $name"
        echo "pack_deps: no $name here"
        continue
    fi
    mkdir -p "$dir/include/$(dirname "$header")"
    case $name in
    cjson) cp -L "$(dirname "$from")"/*.h "$dir/include/cjson/" ;;
    dnnl) cp -L "$(dirname "$from")"/dnnl*.h "$dir/include/" && mkdir -p "$dir/include/oneapi" &&
          cp -LR "$(dirname "$from")/oneapi/dnnl" "$dir/include/oneapi/" ;;
    *) cp -L "$from" "$dir/include/" ;;
    esac
    # Under the name that the linker asks for and the one that programs look for when they start.
    real=$(readlink -f "$library")
    soname=$(LC_ALL=C readelf -d "$real" | sed -n 's/.*SONAME.*\[\(.*\)\].*/\1/p')
    cp -L "$real" "$dir/lib/$soname"
    ln -sf "$soname" "$dir/lib/lib$name.so"
    # And what it needs in turn, but for what comes with a compiler.
    ldd "$real" | sed -n 's/^[[:space:]]*\([^ ]*\) => \(\/[^ ]*\) .*/\1 \2/p' | while read -r needed at; do
        case $needed in
        libc.* | libm.* | libdl.* | librt.* | libpthread.* | libstdc++.* | libgcc_s.* | libgomp.*) ;;
        *) cp -L "$at" "$dir/lib/$needed" ;;
        esac
    done
    echo "pack_deps: $name, $(du -h "$dir/lib/$soname" | cut -f1)"
done
[ -z "$missing" ] || { echo "pack_deps: required and missing:$missing" >&2; exit 1; }
