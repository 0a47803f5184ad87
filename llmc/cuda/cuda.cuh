// Inside the CUDA wing: what every .cu file shares. Semantics of the operations are documented in ops.h.
//
// A .cu file is read by two compilers. nvcc builds it for the GPU; g++ builds it against dev/cudasim, which runs the
// same kernels on the CPU for the tests. So kernels are launched by LAUNCH and dynamic shared memory is declared by
// DYN_SHARED.
// The form of an operation: kernels and device functions, static, then cuda_NAME, which picks a kernel (a template
// where rows are read in vectors), launches it on cuda_stream and keeps a launch's error, and which
// ops_cuda.cu's table takes by its name; a test in test/cuda/.
//
// Arithmetic. The whole wing is compiled with -fmad=false, as the CPU wing is with -ffp-contract=off: a multiplication
// and an addition in the source are two roundings everywhere, and where one is meant, fmaf stands. Together with nvcc's
// defaults (-prec-div=true -prec-sqrt=true -ftz=false: division, square root and subnormals as in IEEE 754) scalar.h
// and quant.h then give the same bits on CPU, GPU and simulator. No __expf, rsqrtf or -use_fast_math: their bits are
// the GPU's own.
#ifndef QLLM_CUDA_CUH
#define QLLM_CUDA_CUH
#include <type_traits>
#ifdef __CUDACC__
#include <cuda_runtime.h>
#ifndef QLLM_FMAD_FALSE     // the flag itself leaves no trace that the preprocessor sees
#error "compile with -fmad=false -DQLLM_FMAD_FALSE: contraction would change bits that the CPU wing shares"
#endif
#define LAUNCH(kernel, grid, block, smem, stream) kernel<<<(grid), (block), (smem), (stream)>>>
#define DYN_SHARED(type, name) \
    extern __shared__ __align__(16) unsigned char dyn_shared_bytes[]; \
    type *name = (type *)dyn_shared_bytes
#else
#include "cudasim.h"
#endif
#include "ops.h"

// cuda_NAME for every entry of the table, with the table's own signature: a definition that differs does not compile.
extern "C" {
#define CUDA_OP(name) std::remove_pointer<decltype(Ops::name)>::type cuda_##name;
QLLM_OPS(CUDA_OP)
#undef CUDA_OP
extern const Ops ops_cuda;            // ops_cuda.cu
extern cudaStream_t cuda_stream;      // where operations are launched
// Working memory of one operation, 256-byte aligned, kept from call to call and grown when a larger one comes: what a
// step needs is there after the first. Operations run one after another on one stream, so they share it. NULL when
// there is none left; the error is then set. OUTER: a second one, for an operation that calls another one, which has
// the first for itself.
enum CudaWorkspace { INNER, OUTER };
void *cuda_workspace(size_t bytes, CudaWorkspace which = INNER);
int cuda_mark(cudaStream_t stream);   // device_mark (device.h), on any stream
}

// Keeps a failed call as the backend's first error: operations have no return value.
#define CUDA_CHECK(call) \
    do { \
        cudaError_t cuda_check_error = (call); \
        if (cuda_check_error != cudaSuccess) \
            ops_set_error(E_FAIL, "%s:%d: %s: %s", __FILE__, __LINE__, #call, cudaGetErrorString(cuda_check_error)); \
    } while (0)

// dtype of the activations for quant.h.
#ifdef PRECISION_FP32
#define QD_X QD_F32
#else
#define QD_X QD_BF16
#endif

#define FULL_WARP 0xffffffffu

// N values that move in one load or store. N is 16 bytes' worth where rows allow it, else 1.
template <class T, int N> struct alignas(sizeof(T) * N) Vec { T v[N]; };
template <class T, int N>
static __device__ __forceinline__ Vec<T, N> vec_load(const T *p) { return *(const Vec<T, N> *)p; }
template <class T, int N>
static __device__ __forceinline__ void vec_store(T *p, Vec<T, N> v) { *(Vec<T, N> *)p = v; }

#define VEC_X (16 / (int)sizeof(floatX))          // floatX values in 16 bytes

// Whether rows of C values starting at each of these pointers (NULL counts as aligned) can be read 16 bytes at a time.
static inline bool rows_take_vec(int C, const void *a, const void *b = nullptr, const void *c = nullptr,
                                 const void *d = nullptr, const void *e = nullptr) {
    uintptr_t bits = (uintptr_t)a | (uintptr_t)b | (uintptr_t)c | (uintptr_t)d | (uintptr_t)e;
    return bits % 16 == 0 && C % VEC_X == 0;
}

// Blocks of threads for so many to do: enough to fill any GPU some times over, and beyond that up to eight turns each,
// so that what a block sets up is not all it does.
static inline unsigned grid_for(size_t blocks) {
    const size_t fill = 2048;
    size_t eighth = (blocks + 7) / 8;
    return (unsigned)(blocks <= fill ? blocks : eighth < fill ? fill : eighth);
}

// Lets a kernel have `bytes` of dynamic shared memory: above 48 KiB that must be asked for. False, and the error kept,
// if the device has less. What the kernel declares by __shared__ counts among the 48: 16 are left for that.
template <class Kernel> static inline bool allow_shared(Kernel *kernel, size_t bytes) {
    if (bytes <= 32 << 10) return true;
    cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (e == cudaSuccess) return true;
    (void)cudaGetLastError();
    ops_set_error(E_FAIL, "a kernel needs %zu bytes of shared memory, more than this device allows: %s; use a narrower "
                  "model", bytes, cudaGetErrorString(e));
    return false;
}
#endif
