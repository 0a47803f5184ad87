// The CUDA wing's table.
#include "cuda.cuh"

static constexpr Ops make_table() {
    Ops t = {};
#ifdef __CUDACC__
    t.name = "cuda";
#else
    t.name = "cudasim";
#endif
#define ENTRY(name) t.name = cuda_##name;
    QLLM_OPS(ENTRY)
#undef ENTRY
    return t;
}
const Ops ops_cuda = make_table();
