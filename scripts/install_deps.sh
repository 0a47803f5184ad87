#!/bin/bash
# Installs what is missing on Debian 12 (or a relative of it): scripts/install_deps.sh [--ci] [--dry-run]
# Plain: compilers, make, cJSON and PCRE2 (required); oneDNN (fast matmuls), Open MPI (many ranks; an MPICH that is there
# already does too), cmocka (make test), gnuplot (plot.sh).
# --ci:  also clang with libFuzzer (make fuzz). --dry-run: only print what would be installed.
# Works as root or with sudo; needs no other tool than bash, dpkg and apt-get.
set -eu

packages=(gcc g++ libc6-dev make libcjson-dev libpcre2-dev libdnnl-dev libcmocka-dev gnuplot-nox fonts-dejavu-core)
# mpicc of any MPI will do.
command -v mpicc >/dev/null || packages+=(libopenmpi-dev openmpi-bin)
dry_run=
for argument in "$@"; do
    case $argument in
    --ci) packages+=(clang libclang-rt-dev) ;;
    --dry-run) dry_run=y ;;
    *) sed -n '2,6s/^# //p' "$0"; exit 2 ;;
    esac
done

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
    echo "install_deps.sh: no apt-get here; install by hand: a C compiler, make, cJSON and PCRE2 (required)," >&2
    echo "oneDNN, MPI, cmocka, gnuplot and clang (optional), with their headers" >&2
    exit 1
fi
missing=()
for package in "${packages[@]}"; do
    state=$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true)
    [ "$state" = "install ok installed" ] || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then echo "everything is installed"; exit 0; fi
echo "missing: ${missing[*]}"
[ -z "$dry_run" ] || exit 0

root=()
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
        echo "install_deps.sh: not root and no sudo; run as root: apt-get install ${missing[*]}" >&2
        exit 1
    fi
    root=(sudo)
fi
"${root[@]}" apt-get update -q
"${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}"
