#!/bin/sh
# Reads what `nvcc -Xptxas -v` printed: a line for each kernel and architecture with its registers, shared memory and
# spills, then whatever else the compilers said (warnings). Fails when a kernel spills registers to memory.
out=$(awk '
    /Compiling entry function/ { kernel = $0; sub(/^[^\047]*\047/, "", kernel); sub(/\047.*/, "", kernel)
                                 arch = $0; sub(/.* for \047/, "", arch); sub(/\047.*/, "", arch); next }
    /spill stores/             { stores = $0; sub(/ bytes spill stores.*/, "", stores); sub(/.* /, "", stores); next }
    /Used [0-9]+ registers/    { regs = $0; sub(/.*Used /, "", regs); sub(/ registers.*/, "", regs)
                                 smem = "0"; if (match($0, /[0-9]+ bytes smem/)) smem = substr($0, RSTART, RLENGTH - 11)
                                 printf "  %-6s %3d registers %6d B shared %4d B spilled  %s\n", \
                                        arch, regs, smem, stores, kernel
                                 if (stores > 0) bad = 1; next }
    /Function properties for|bytes gmem|Compile time/ { next }
    { print }
    END { exit bad }
' "$1")
status=$?
[ -n "$out" ] || exit $status
if command -v c++filt > /dev/null; then printf '%s\n' "$out" | c++filt; else printf '%s\n' "$out"; fi
exit $status
