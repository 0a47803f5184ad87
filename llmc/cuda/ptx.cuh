// The instructions of the GPU that C++ has no name for, one function each, in two forms: inline PTX for nvcc, and a
// form for dev/cudasim that does the same to the same registers. Needs sm_80. Names and register layouts: NVIDIA's
// "Parallel Thread Execution ISA", chapters "Data Movement: cp.async" and "Warp Level Matrix Instructions".
//
// How a warp holds a matrix. lane = 4 g + t, g = 0..7, t = 0..3. A register of 32 bits holds two neighbouring bf16 of a
// row of A or a column of B (the lower index in the low half), or four int8.
//
//   mma_bf16, D (16, 8) f32 += A (16, 16) bf16 . B (16, 8) bf16
//     a[0] A[g  ][2t, 2t+1]    a[1] A[g+8][2t, 2t+1]    a[2] A[g  ][2t+8, 2t+9]   a[3] A[g+8][2t+8, 2t+9]
//     b[0] B[2t, 2t+1][g]      b[1] B[2t+8, 2t+9][g]
//     d[0] D[g  ][2t]          d[1] D[g  ][2t+1]        d[2] D[g+8][2t]           d[3] D[g+8][2t+1]
//   mma_s8, D (16, 8) i32 += A (16, 32) int8 . B (32, 8) int8
//     a[0] A[g  ][4t .. 4t+3]  a[1] A[g+8][4t ..]       a[2] A[g  ][16+4t ..]     a[3] A[g+8][16+4t ..]
//     b[0] B[4t .. 4t+3][g]    b[1] B[16+4t ..][g]      d as above
//   ldmatrix: an 8 x 8 matrix of 16-bit values is eight rows of 16 bytes. Lane 8i + r gives the address of row r of
//     matrix i; register i of lane (g, t) becomes M_i[g][2t, 2t+1], or with _trans M_i[2t, 2t+1][g].
#ifndef QLLM_PTX_CUH
#define QLLM_PTX_CUH
#include "cuda.cuh"

#ifdef __CUDACC__
static __device__ __forceinline__ unsigned shared_address(const void *p) {
    return (unsigned)__cvta_generic_to_shared(p);
}
// Sixteen bytes from device memory into shared memory, both 16-byte aligned; zeros where not `valid` (gmem is then not
// read, but must be an address). They are there after cp_async_wait by this thread and, for others, a barrier.
static __device__ __forceinline__ void cp_async16(void *smem, const void *gmem, bool valid = true) {
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(smem)), "l"(gmem), "r"(bytes)
                 : "memory");
}
// Ends a group of copies.
static __device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the `newest` latest groups of this thread have arrived.
template <int newest> static __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory");
}
static __device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// D = A . B: spares the zeros in D.
static __device__ __forceinline__ void mma_bf16_first(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%10,%10,%10,%10};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f));
}
static __device__ __forceinline__ void mma_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
static __device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
static __device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
// Sixteen, four or two bytes, or zeros where not `there` (nothing is read then), without a branch around the load; of
// what no kernel writes meanwhile. The sixteen bytes take no place in the first cache.
static __device__ __forceinline__ uint4 load16_once_if(const void *p, bool there) {
    uint4 v;
    asm volatile("{.reg .pred p; setp.ne.b32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0; "
                 "@p ld.global.nc.L1::no_allocate.v4.b32 {%0,%1,%2,%3}, [%4];}"
                 : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w) : "l"(p), "r"((int)there));
    return v;
}
static __device__ __forceinline__ float load4_if(const float *p, bool there) {
    float v;
    asm volatile("{.reg .pred p; setp.ne.b32 p, %2, 0; mov.b32 %0, 0; @p ld.global.nc.f32 %0, [%1];}"
                 : "=&f"(v) : "l"(p), "r"((int)there));
    return v;
}
static __device__ __forceinline__ uint16_t load2_if(const uint16_t *p, bool there) {
    uint16_t v;
    asm volatile("{.reg .pred p; setp.ne.b32 p, %2, 0; mov.b16 %0, 0; @p ld.global.nc.u16 %0, [%1];}"
                 : "=&h"(v) : "l"(p), "r"((int)there));
    return v;
}
// (a & mask) ^ c in one instruction, which the compiler does not find where mask and c are constants.
static __device__ __forceinline__ uint32_t and_xor(uint32_t a, uint32_t mask, uint32_t c) {
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(r) : "r"(a), "r"(mask), "r"(c));
    return r;
}
// Two f32 to bf16, nearest even, lo in the low half: the bits of bf16_from_f32 but for the payload of a NaN.
static __device__ __forceinline__ uint32_t pack_bf16(float lo, float hi) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
// The largest of the lanes' numbers, none of which is negative or NaN, in one instruction: their bits order as they do.
static __device__ __forceinline__ float warp_max_abs(float a) {
    return __uint_as_float(__reduce_max_sync(FULL_WARP, __float_as_uint(a)));
}
#else
static inline void cp_async16(void *smem, const void *gmem, bool valid = true, CUDASIM_HERE) {
    cudasim::cp_async(smem, gmem, valid ? 16 : 0, file, line);
}
static inline void cp_async_commit() { cudasim::cp_async_commit(); }
template <int newest> static inline void cp_async_wait() { cudasim::cp_async_wait(newest); }
static inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CUDASIM_HERE) {
    cudasim::mma_bf16(d, a, b, file, line);
}
static inline void mma_bf16_first(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CUDASIM_HERE) {
    for (int i = 0; i < 4; i++) d[i] = 0.0f;
    cudasim::mma_bf16(d, a, b, file, line);
}
static inline void mma_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CUDASIM_HERE) {
    cudasim::mma_s8(d, a, b, file, line);
}
static inline void ldmatrix_x4(uint32_t (&r)[4], const void *row, CUDASIM_HERE) {
    cudasim::ldmatrix_x4(r, row, false, file, line);
}
static inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row, CUDASIM_HERE) {
    cudasim::ldmatrix_x4(r, row, true, file, line);
}
static inline uint4 load16_once_if(const void *p, bool there) { return there ? *(const uint4 *)p : uint4{}; }
static inline float load4_if(const float *p, bool there) { return there ? *p : 0.0f; }
static inline uint16_t load2_if(const uint16_t *p, bool there) { return there ? *p : (uint16_t)0; }
static inline uint32_t and_xor(uint32_t a, uint32_t mask, uint32_t c) { return (a & mask) ^ c; }
static inline uint32_t pack_bf16(float lo, float hi) {
    return (uint32_t)bf16_from_f32(lo) | (uint32_t)bf16_from_f32(hi) << 16;
}
static inline float warp_max_abs(float a, CUDASIM_HERE) {
    for (int bits = 16; bits; bits >>= 1) a = fmaxf(a, __shfl_xor_sync(FULL_WARP, a, bits, 32, file, line));
    return a;
}
#endif
#endif
