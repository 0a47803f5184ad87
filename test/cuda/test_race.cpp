// What dev/cudasim/race.cpp finds (make test-cudasim RACE=1): races are planted in kernels whose results are right in
// the order that runs, and must be caught; their correct twins must not be.
#ifdef CUDASIM_RACE
#include "cuda_test.h"
#include "cuda/ptx.cuh"

enum Sync { NONE, WARP, BLOCK };

static __device__ void sync(Sync s) {
    if (s == WARP) __syncwarp();
    if (s == BLOCK) __syncthreads();
}
// Thread t reads what thread t - distance wrote: in order 0 it is there.
template <Sync S> static __global__ void read_after_write(float *y, int distance) {
    __shared__ float s[64];
    s[threadIdx.x] = (float)threadIdx.x;
    sync(S);
    y[threadIdx.x] = s[(threadIdx.x + 64 - distance) % 64];
}
// Thread t overwrites what thread t - 1 has read.
template <Sync S> static __global__ void write_after_read(float *y) {
    DYN_SHARED(float, s);
    s[threadIdx.x] = 1.0f;
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x];
    sync(S);
    s[(threadIdx.x + 63) % 64] = 2.0f;
}
// A shuffle orders nothing in memory.
static __global__ void shuffle_is_no_barrier(float *y) {
    __shared__ float s[32];
    s[threadIdx.x] = 1.0f;
    float any = __shfl_sync(FULL_WARP, 1.0f, 0);
    y[threadIdx.x] = any * s[31 - threadIdx.x];
}
template <bool BARRIER> static __global__ void copied(float *y, const float *x) {
    __shared__ __align__(16) float s[256];
    cp_async16(s + threadIdx.x * 4, x + threadIdx.x * 4);
    cp_async_commit();
    cp_async_wait<0>();
    if (BARRIER) __syncthreads();
    y[threadIdx.x] = s[(threadIdx.x + 32) % 64 * 4];
}
template <bool APART> static __global__ void blocks_share(float *y) {
    y[APART ? blockIdx.x : 0] = 1.0f;
}
static __global__ void block_reads(float *y) {
    if (blockIdx.x == 0) y[0] = 1.0f;
    else y[1] = y[0];
}
static __global__ void block_writes(float *y) {
    if (blockIdx.x == 0) y[1] = y[0];
    else y[0] = 1.0f;
}
static __global__ void counts(int *y) { atomicAdd(y, 1); }

#define RUN(kernel, grid, block, smem, ...) \
    set_order(0); \
    Device<float> y(256), x(256); \
    LAUNCH(kernel, grid, block, smem, cuda_stream)(__VA_ARGS__)
#define RACE(word, kernel, grid, block, smem, ...) \
    check_dies(#kernel, [] { RUN((kernel), grid, block, smem, __VA_ARGS__); }, word, nullptr)

CUDA_TEST(races_planted) {
    RACE("race: thread", read_after_write<NONE>, 1, 64, 0, y.p, 1);
    RACE("race: thread", read_after_write<NONE>, 1, 64, 0, y.p, 32);
    RACE("race: thread", read_after_write<WARP>, 1, 64, 0, y.p, 32);       // another warp
    RACE("race: thread", write_after_read<NONE>, 1, 64, 256, y.p);
    RACE("race: thread", write_after_read<WARP>, 1, 64, 256, y.p);
    RACE("race: thread", shuffle_is_no_barrier, 1, 32, 0, y.p);
    RACE("race: thread", copied<false>, 1, 64, 0, y.p, x.p);
    RACE("another block wrote", blocks_share<false>, 2, 1, 0, y.p);
    RACE("another block wrote", block_reads, 2, 1, 0, y.p);
    RACE("another block read", block_writes, 2, 1, 0, y.p);
}
CUDA_TEST(races_absent) {
    { RUN(read_after_write<BLOCK>, 1, 64, 0, y.p, 32); }
    { RUN(read_after_write<WARP>, 1, 32, 0, y.p, 0); }
    { RUN(write_after_read<BLOCK>, 1, 64, 256, y.p); }
    { RUN(copied<true>, 1, 64, 0, y.p, x.p); }
    { RUN(blocks_share<true>, 2, 1, 0, y.p); }
    Device<int> n(std::vector<int>(1, 0));
    LAUNCH(counts, 4, 64, 0, cuda_stream)(n.p);
    CHECK(n.host()[0] == 256, "%d", n.host()[0]);
}
#endif
