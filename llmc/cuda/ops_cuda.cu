// The CUDA wing's table: the operations that have kernels. The others are NULL, and no program offers the wing before
// it is whole; tests walk the table and compare what there is with the CPU wing.
#include "cuda.cuh"

static constexpr Ops make_table() {
    Ops t = {};
#ifdef __CUDACC__
    t.name = "cuda";
#else
    t.name = "cudasim";
#endif
    t.rmsnorm_fq_forward = cuda_rmsnorm_fq_forward;
    t.rmsnorm_backward = cuda_rmsnorm_backward;
    t.embedding_forward = cuda_embedding_forward;
    t.embedding_backward = cuda_embedding_backward;
    t.linear_forward = cuda_linear_forward;
    t.linear_forward_f32 = cuda_linear_forward_f32;
    t.linear_backward_input = cuda_linear_backward_input;
    t.linear_backward_weight = cuda_linear_backward_weight;
    t.attention_forward = cuda_attention_forward;
    t.fakequant_forward = cuda_fakequant_forward;
    t.mask_backward = cuda_mask_backward;
    t.rope = cuda_rope;
    t.swiglu_fq_forward = cuda_swiglu_fq_forward;
    t.swiglu_backward = cuda_swiglu_backward;
    t.classifier = cuda_classifier;
    t.loss_accumulate = cuda_loss_accumulate;
    t.attention_backward = cuda_attention_backward;
    t.dequant_rows = cuda_dequant_rows;
    t.qmatvec_forward = cuda_qmatvec_forward;
    t.global_norm = cuda_global_norm;
    t.adamw_fq = cuda_adamw_fq;
    t.sgd_fq = cuda_sgd_fq;
    t.weight_fq = cuda_weight_fq;
    t.weight_ste_mask = cuda_weight_ste_mask;
    return t;
}
const Ops ops_cuda = make_table();
