#!/bin/sh
# All that is to be seen on a GPU, in one call: builds the CUDA wing with nvcc and compares every operation that it has
# with the CPU wing, in both precisions. Run from anywhere; needs a GPU, the CUDA toolkit and what `make` needs.
#   BUILD=build    where to build
#   ARCH_FLAGS     nvcc's -arch (default: native)
set -eu
cd "$(dirname "$0")/../.."
BUILD=${BUILD:-build}

nvcc=
for candidate in "${CUDA_HOME:-/nowhere}/bin/nvcc" "$(command -v nvcc || true)" /usr/local/cuda/bin/nvcc; do
    if [ -x "$candidate" ]; then nvcc=$candidate; break; fi
done
if [ -z "$nvcc" ]; then
    echo "check.sh: skipped, no nvcc found (set CUDA_HOME, or put nvcc in PATH)"
    exit 0
fi
if ! nvidia-smi -L > /dev/null 2>&1; then
    echo "check.sh: skipped, no GPU here (nvidia-smi finds none)"
    exit 0
fi
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv,noheader
"$nvcc" --version | tail -n 2 | head -n 1

for precision in bf16 fp32; do
    out=$BUILD/$precision
    make -s BUILD="$BUILD" PRECISION=$precision "$out/libqllm.a"
    libs=$(make -s BUILD="$BUILD" PRECISION=$precision cuda-link-libs | tail -n 1)
    # -fmad=false: see llmc/cuda/cuda.cuh.
    flags="-std=c++17 -O3 ${ARCH_FLAGS:--arch=native} -fmad=false -DQLLM_FMAD_FALSE -I. -Illmc"
    if [ $precision = fp32 ]; then flags="$flags -DPRECISION_FP32"; fi
    "$nvcc" $flags -x cu -c test/test_cudasim.cpp -o "$out/test_cuda.o"
    "$nvcc" $flags llmc/cuda/*.cu "$out/test_cuda.o" "$out/libqllm.a" -Xcompiler -fopenmp $libs -o "$out/test_cuda"
    "$out/test_cuda"
done
