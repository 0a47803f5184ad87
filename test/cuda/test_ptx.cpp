// The instructions of ptx.cuh and the barriers that vote, against plain products and the fragment layouts as NVIDIA's
// "Parallel Thread Execution ISA" states them, element by element ("Matrix Fragments for mma.m16n8k16 with floating
// point type", "... mma.m16n8k32", "ldmatrix"): written from there, not from the table in ptx.cuh, and the same on a GPU.
// The simulator alone also shows asynchronous copies that nobody waited for.
#include "cuda_test.h"
#include "cuda/ptx.cuh"

// Row and column of element i of a lane's fragment, elements numbered from the low end of the first register.
struct At { int row, col; };
static __device__ At bf16_a(int lane, int i) {
    return {i < 2 || (i >= 4 && i < 6) ? lane / 4 : lane / 4 + 8, lane % 4 * 2 + (i & 1) + (i < 4 ? 0 : 8)};
}
static __device__ At bf16_b(int lane, int i) { return {lane % 4 * 2 + (i & 1) + (i < 2 ? 0 : 8), lane / 4}; }
static __device__ At s8_a(int lane, int i) {
    return {i < 4 || (i >= 8 && i < 12) ? lane / 4 : lane / 4 + 8, lane % 4 * 4 + (i & 3) + (i < 8 ? 0 : 16)};
}
static __device__ At s8_b(int lane, int i) { return {lane % 4 * 4 + (i & 3) + (i < 4 ? 0 : 16), lane / 4}; }
static __device__ At accumulator(int lane, int i) { return {lane / 4 + (i < 2 ? 0 : 8), lane % 4 * 2 + (i & 1)}; }

// d (16, 8) += a (16, 16) . b (16, 8); whole numbers, so that sums are exact in any order.
static __global__ void mma_bf16_kernel(float *d, const bf16 *a, const bf16 *b) {
    int lane = (int)threadIdx.x % 32;
    uint32_t ra[4] = {}, rb[2] = {};
    float rd[4];
    for (int i = 0; i < 8; i++) {
        At p = bf16_a(lane, i);
        ra[i / 2] |= (uint32_t)a[p.row * 16 + p.col] << 16 * (i % 2);
    }
    for (int i = 0; i < 4; i++) {
        At p = bf16_b(lane, i), q = accumulator(lane, i);
        rb[i / 2] |= (uint32_t)b[p.row * 8 + p.col] << 16 * (i % 2);
        rd[i] = d[q.row * 8 + q.col];
    }
    mma_bf16(rd, ra, rb);
    for (int i = 0; i < 4; i++) d[accumulator(lane, i).row * 8 + accumulator(lane, i).col] = rd[i];
}
// d (16, 8) += a (16, 32) . b (32, 8).
static __global__ void mma_s8_kernel(int *d, const int8_t *a, const int8_t *b) {
    int lane = (int)threadIdx.x % 32;
    uint32_t ra[4] = {}, rb[2] = {};
    int rd[4];
    for (int i = 0; i < 16; i++) {
        At p = s8_a(lane, i);
        ra[i / 4] |= (uint32_t)(uint8_t)a[p.row * 32 + p.col] << 8 * (i % 4);
    }
    for (int i = 0; i < 8; i++) {
        At p = s8_b(lane, i);
        rb[i / 4] |= (uint32_t)(uint8_t)b[p.row * 8 + p.col] << 8 * (i % 4);
    }
    for (int i = 0; i < 4; i++) rd[i] = d[accumulator(lane, i).row * 8 + accumulator(lane, i).col];
    mma_s8(rd, ra, rb);
    for (int i = 0; i < 4; i++) d[accumulator(lane, i).row * 8 + accumulator(lane, i).col] = rd[i];
}

static int whole(uint64_t stream, size_t i, int limit) {        // in [-limit, limit)
    return (int)floorf((float)limit * uniform(stream, i));
}
CUDA_TEST(mma) {
    for (int order = 0; order < ORDERS; order++)
        for (uint64_t seed = 0; seed < 3; seed++) {
            set_order(order);
            std::vector<bf16> a(16 * 16), b(16 * 8);
            std::vector<int8_t> sa(16 * 32), sb(32 * 8);
            std::vector<float> d(16 * 8), want;
            std::vector<int> sd(16 * 8), swant;
            for (size_t i = 0; i < a.size(); i++) a[i] = bf16_from_f32((float)whole(10 + seed, i, 100));
            for (size_t i = 0; i < b.size(); i++) b[i] = bf16_from_f32((float)whole(20 + seed, i, 100));
            for (size_t i = 0; i < d.size(); i++) d[i] = (float)whole(30 + seed, i, 1000);
            for (size_t i = 0; i < sa.size(); i++) sa[i] = (int8_t)whole(40 + seed, i, 128);
            for (size_t i = 0; i < sb.size(); i++) sb[i] = (int8_t)whole(50 + seed, i, 128);
            for (size_t i = 0; i < sd.size(); i++) sd[i] = whole(60 + seed, i, 1 << 24);
            sa[5] = sb[3] = -128;
            want = d;
            swant = sd;
            for (int r = 0; r < 16; r++)
                for (int c = 0; c < 8; c++) {
                    for (int k = 0; k < 16; k++)
                        want[r * 8 + c] += bf16_to_f32(a[r * 16 + k]) * bf16_to_f32(b[k * 8 + c]);
                    for (int k = 0; k < 32; k++) swant[r * 8 + c] += (int)sa[r * 32 + k] * (int)sb[k * 8 + c];
                }
            Device<bf16> da(a), db(b);
            Device<float> dd(d);
            LAUNCH(mma_bf16_kernel, 1, 32, 0, cuda_stream)(dd.p, da.p, db.p);
            check_same("mma_bf16", "d", dd.host(), want);
            Device<int8_t> dsa(sa), dsb(sb);
            Device<int> dsd(sd);
            LAUNCH(mma_s8_kernel, 1, 32, 0, cuda_stream)(dsd.p, dsa.p, dsb.p);
            CHECK(dsd.host() == swant, "mma_s8, seed %d", (int)seed);
        }
}

// Four matrices whose rows lie scattered: row r of matrix i at place 11 (8 i + r) % 32, 24 values apart.
static __global__ void ldmatrix_kernel(uint32_t *out, int trans) {
    __shared__ __align__(16) uint16_t s[32 * 24];
    int t = (int)threadIdx.x;
    for (int r = 0; r < 8; r++)
        if (t < 32) s[11 * (t / 8 * 8 + r) % 32 * 24 + t % 8] = (uint16_t)(t / 8 * 64 + r * 8 + t % 8);
    __syncthreads();
    uint32_t reg[4];
    const uint16_t *row = &s[11 * (t % 32) % 32 * 24];
    if (trans) ldmatrix_x4_trans(reg, row);
    else ldmatrix_x4(reg, row);
    for (int i = 0; i < 4; i++) out[t * 4 + i] = reg[i];
}
CUDA_TEST(ldmatrix) {
    for (int order = 0; order < ORDERS; order++)
        for (int trans = 0; trans < 2; trans++) {
            set_order(order);
            Device<uint32_t> out(64 * 4);
            LAUNCH(ldmatrix_kernel, 1, 64, 0, cuda_stream)(out.p, trans);
            std::vector<uint32_t> o = out.host();
            for (int t = 0; t < 64; t++)
                for (int i = 0; i < 4; i++)
                    for (int half = 0; half < 2; half++) {
                        int line = t % 32 / 4, pair = t % 4 * 2 + half;        // of what the lane is given
                        int want = i * 64 + (trans ? pair * 8 + line : line * 8 + pair);
                        int got = (int)(o[t * 4 + i] >> 16 * half & 0xffff);
                        CHECK(got == want, "trans %d, thread %d, register %d, half %d: %d, expected %d", trans, t, i,
                              half, got, want);
                    }
        }
}

// c (16, 16) = a (16, 16) . b (16, 16), both by rows in shared memory: as kernels use the two together. The matrices of
// a are above one another first, those of b too, so that registers come as mma takes them.
static __global__ void product_kernel(float *c, const bf16 *a, const bf16 *b) {
    __shared__ __align__(16) bf16 sa[16 * 24], sb[16 * 24];
    int lane = (int)threadIdx.x;
    for (int i = lane; i < 256; i += 32) sa[i / 16 * 24 + i % 16] = a[i], sb[i / 16 * 24 + i % 16] = b[i];
    __syncthreads();
    uint32_t ra[4], rb[4];
    int row = lane % 16, col = lane / 16 * 8;
    ldmatrix_x4(ra, &sa[row * 24 + col]);
    ldmatrix_x4_trans(rb, &sb[row * 24 + col]);
    for (int n = 0; n < 2; n++) {
        float d[4] = {};
        uint32_t half[2] = {rb[2 * n], rb[2 * n + 1]};
        mma_bf16(d, ra, half);
        for (int i = 0; i < 4; i++) c[accumulator(lane, i).row * 16 + n * 8 + accumulator(lane, i).col] = d[i];
    }
}
CUDA_TEST(ldmatrix_and_mma) {
    std::vector<bf16> a(256), b(256);
    std::vector<float> want(256);
    for (size_t i = 0; i < 256; i++) {
        a[i] = bf16_from_f32((float)whole(71, i, 100));
        b[i] = bf16_from_f32((float)whole(72, i, 100));
    }
    for (int r = 0; r < 16; r++)
        for (int c = 0; c < 16; c++)
            for (int k = 0; k < 16; k++) want[r * 16 + c] += bf16_to_f32(a[r * 16 + k]) * bf16_to_f32(b[k * 16 + c]);
    for (int order = 0; order < ORDERS; order++) {
        set_order(order);
        Device<bf16> da(a), db(b);
        Device<float> c(256);
        LAUNCH(product_kernel, 1, 32, 0, cuda_stream)(c.p, da.p, db.p);
        check_same("product", "c", c.host(), want);
    }
}

static __global__ void pack_kernel(uint32_t *out, const float *x, int n) {
    int i = (int)threadIdx.x;
    if (i < n) out[i] = pack_bf16(x[i], -2.0f * x[i]);
}
CUDA_TEST(pack_bf16) {
    std::vector<float> x = {0.0f, -0.0f, 1.0f, 1.00390625f, 1.01171875f, 3.0e38f, 3.4e38f, INFINITY, 1e-40f, -1e-45f, 0.1f};
    for (uint64_t i = 0; i < 50; i++) x.push_back(100.0f * uniform(80, i));
    Device<float> dx(x);
    Device<uint32_t> out(x.size());
    LAUNCH(pack_kernel, 1, 64, 0, cuda_stream)(out.p, dx.p, (int)x.size());
    std::vector<uint32_t> o = out.host();
    for (size_t i = 0; i < x.size(); i++)
        CHECK(o[i] == ((uint32_t)bf16_from_f32(-2.0f * x[i]) << 16 | bf16_from_f32(x[i])), "%g: %08x", (double)x[i], o[i]);
}

static __global__ void votes_kernel(int *out, const int *x) {
    int t = (int)threadIdx.x;
    if (t >= 60) return;                                       // who has ended has no vote
    int count = __syncthreads_count(x[t]), any = __syncthreads_or(x[t] > 6), all = __syncthreads_and(x[t] < 8);
    int none = __syncthreads_or(x[t] > 100), not_all = __syncthreads_and(x[t]);
    out[t] = count + 100 * (any != 0) + 200 * (all != 0) + 400 * (none != 0) + 800 * (not_all != 0);
}
CUDA_TEST(barrier_votes) {
    for (int order = 0; order < ORDERS; order++) {
        set_order(order);
        std::vector<int> x(64);
        for (int t = 0; t < 64; t++) x[t] = t < 60 ? t % 8 : 200;
        Device<int> dx(x), out(64);
        LAUNCH(votes_kernel, 1, 64, 0, cuda_stream)(out.p, dx.p);
        std::vector<int> o = out.host();
        for (int t = 0; t < 60; t++) CHECK(o[t] == 52 + 100 + 200, "thread %d: %d", t, o[t]);
    }
}

// ---------------------------------------------------------------------------------------------
// Asynchronous copies.

// y = x reversed by vectors of four, through shared memory that others filled.
template <bool WAIT, bool BARRIER> static __global__ void copy_kernel(float *y, const float *x) {
    __shared__ __align__(16) float s[64 * 4];
    int t = (int)threadIdx.x;
    cp_async16(&s[t * 4], x + t * 4);
    cp_async_commit();
    if (WAIT) cp_async_wait<0>();
    if (BARRIER) __syncthreads();
    for (int i = 0; i < 4; i++) y[t * 4 + i] = s[(63 - t) * 4 + i];
}
// Three groups under way, taken one after the other: what is waited for is there, and with EARLY, one group more is read.
template <bool EARLY> static __global__ void groups_kernel(float *y, const float *x) {
    __shared__ __align__(16) float s[4][64 * 4];
    int t = (int)threadIdx.x;
    for (int g = 0; g < 3; g++) {
        cp_async16(&s[g][t * 4], x + t * 4, g != 2 || t % 2 == 0);
        if (g == 1) cp_async16(&s[3][t * 4], x + (t ^ 1) * 4);                 // two copies in one group
        cp_async_commit();
    }
    cp_async_wait<2>();                                        // a thread's own copies: no barrier
    float sum = s[EARLY ? 1 : 0][t * 4];
    cp_async_wait<1>();
    sum += 1000.0f * s[3][t * 4];
    cp_async_wait<0>();
    y[t] = sum + 1000000.0f * s[2][t * 4 + 3];
}
CUDA_TEST(cp_async) {
    std::vector<float> x(256), reversed(256), sums(64);
    for (int i = 0; i < 256; i++) x[i] = (float)(i % 61);
    for (int i = 0; i < 256; i++) reversed[i] = x[(63 - i / 4) * 4 + i % 4];
    for (int t = 0; t < 64; t++)
        sums[t] = x[t * 4] + 1000.0f * x[(t ^ 1) * 4] + (t % 2 ? 0.0f : 1000000.0f * x[t * 4 + 3]);
    CHECK(wrong_orders(copy_kernel<true, true>, x, reversed) == 0, "the correct kernel");
    CHECK(wrong_orders(groups_kernel<false>, x, sums) == 0, "the correct kernel");
#ifndef __CUDACC__
    CHECK(wrong_orders(copy_kernel<false, true>, x, reversed) == 8, "a read before the wait shows in every order");
#ifndef CUDASIM_RACE                   // which stops there: test_race.cpp
    CHECK(wrong_orders(copy_kernel<true, false>, x, reversed) > 0, "a read of another thread's copy before the barrier");
#endif
    CHECK(wrong_orders(groups_kernel<true>, x, sums) == 8, "a read of a group that is still under way");
#endif
}

#ifndef __CUDACC__
// ---------------------------------------------------------------------------------------------
// Planted mistakes that end the program.

static __global__ void half_warp_kernel(float *y) {
    if (threadIdx.x % 32 >= 16) return;
    float d[4] = {};
    uint32_t a[4] = {}, b[2] = {};
    mma_bf16(d, a, b);
    y[threadIdx.x] = d[0];
}
static __global__ void crooked_kernel(float *y, const float *x) {
    __shared__ __align__(16) float s[8];
    cp_async16(s, x + 1);
    cp_async_commit();
    cp_async_wait<0>();
    y[0] = s[0];
}
static __global__ void crooked_row_kernel(float *y) {
    __shared__ __align__(16) uint16_t s[32 * 9];
    uint32_t r[4];
    ldmatrix_x4(r, &s[threadIdx.x * 9]);
    y[0] = (float)r[0];
}
static void half_warp(void) {
    Device<float> y(32);
    LAUNCH(half_warp_kernel, 1, 32, 0, cuda_stream)(y.p);
}
static void crooked(void) {
    Device<float> y(1), x(8);
    LAUNCH(crooked_kernel, 1, 1, 0, cuda_stream)(y.p, x.p);
}
static void crooked_row(void) {
    Device<float> y(1);
    LAUNCH(crooked_row_kernel, 1, 32, 0, cuda_stream)(y.p);
}
CUDA_TEST(planted_for_tensor_cores) {
    check_dies("mma by half a warp", half_warp, "not all lanes of the warp", nullptr);
    check_dies("cp.async from an address that is not aligned", crooked, "not both 16-byte aligned", nullptr);
    check_dies("ldmatrix of a row that is not aligned", crooked_row, "not 16-byte aligned", nullptr);
}
#endif
