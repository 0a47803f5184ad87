// The CUDA wing's table: the operations that have kernels. The others are NULL, and no program offers the wing before
// it is whole; tests walk the table and compare what there is with the CPU wing.
#include "cuda.cuh"

cudaStream_t cuda_stream = 0;

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
    return t;
}
const Ops ops_cuda = make_table();
