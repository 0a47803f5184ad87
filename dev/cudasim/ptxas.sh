#!/bin/sh
# Reads what `nvcc -Xptxas -v` printed: a line for each kernel and architecture with its registers, shared memory, stack
# and spills, then whatever else the compilers said (warnings). Fails when a kernel spills registers to memory. A stack
# without spills is an array that the compiler could not keep in registers, for being indexed by what it does not know:
# slow in a loop, and not always wrong.
out=$(awk '
    /Compiling entry function/ { kernel = $0; sub(/^[^\047]*\047/, "", kernel); sub(/\047.*/, "", kernel)
                                 arch = $0; sub(/.* for \047/, "", arch); sub(/\047.*/, "", arch)
                                 stack = 0; next }
    /spill stores/             { stores = $0; sub(/ bytes spill stores.*/, "", stores); sub(/.* /, "", stores)
                                 if ($1 + 0 > stack) stack = $1 + 0
                                 next }
    /Used [0-9]+ registers/    { regs = $0; sub(/.*Used /, "", regs); sub(/ registers.*/, "", regs)
                                 smem = "0"; if (match($0, /[0-9]+ bytes smem/)) smem = substr($0, RSTART, RLENGTH - 11)
                                 printf "  %-6s %3d registers %6d B shared %4d B stack %4d B spilled  %s\n", \
                                        arch, regs, smem, stack, stores, kernel
                                 if (stores > 0) bad = 1; next }
    /Function properties for|bytes gmem|Compile time/ { next }
    { print }
    END { exit bad }
' "$1")
status=$?
[ -n "$out" ] || exit $status
if command -v c++filt > /dev/null; then printf '%s\n' "$out" | c++filt; else printf '%s\n' "$out"; fi
exit $status
