// The CUDA wing's table: the operations that have kernels. The others are NULL, and no program offers the wing before
// it is whole; tests walk the table and compare what there is with the CPU wing.
#include "cuda.cuh"

cudaStream_t cuda_stream = 0;

void *cuda_workspace(size_t bytes) {
    static void *p;
    static size_t size;
    if (bytes <= size) return p;
    CUDA_CHECK(cudaFree(p));
    size = 0;
    cudaError_t e = cudaMalloc(&p, bytes);
    if (e != cudaSuccess) {
        (void)cudaGetLastError();
        p = nullptr;
        ops_set_error(E_NOMEM, "working memory: no %zu bytes left on the device; use a smaller batch", bytes);
        return nullptr;
    }
    size = bytes;
    return p;
}

static constexpr Ops make_table() {
    Ops t = {};
#ifdef __CUDACC__
    t.name = "cuda";
#else
    t.name = "cudasim";
#endif
    t.rmsnorm_fq_forward = cuda_rmsnorm_fq_forward;
    t.linear_forward = cuda_linear_forward;
    t.linear_forward_f32 = cuda_linear_forward_f32;
    t.fakequant_forward = cuda_fakequant_forward;
    t.attention_backward = cuda_attention_backward;
    t.dequant_rows = cuda_dequant_rows;
    t.qmatvec_forward = cuda_qmatvec_forward;
    return t;
}
const Ops ops_cuda = make_table();
