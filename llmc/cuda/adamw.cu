// Updates of the master weights and the working values made from them: adamw_fq, sgd_fq, weight_fq, weight_ste_mask
// (ops.h). The arithmetic and its order are the CPU wing's (llmc/cpu/adamw.c), to the bit.
//
// AdamW moves 30 bytes a weight with bf16 working values (p, g, m and v read, p, m and v written, work written) and has
// no arithmetic to speak of but three divisions and a root, about half of what the multiprocessors can issue in that
// time. So every kernel here reads and writes each value once, 16 bytes at a time, and the range that a scale is made
// from is taken of values that are still at hand:
//   - team_kernel   blocks of quantization (groups above all) of up to 256 values: a power of two of lanes holds one in
//                   registers and finds its range by shuffles
//   - block_kernel  longer ones, rows above all: a block of threads each; the weights stay in shared memory as the
//                   bf16 values that quantization sees (4096 columns: 8 KB)
//   - flat_kernel   no quantization, or no working values at all (28 bytes a weight); and the first pass of one scale
//                   for the whole tensor, whose partial ranges tensor_kernel reads (6 bytes a weight more)
// A thread has 64 bytes of loads under way (AdamW), a multiprocessor of 1024 threads or more 64 KB: twice what hides
// the latency of memory at 3 TB/s.
#include "adamw.cuh"
#include "quantblock.cuh"

#define THREADS 256              // of team_kernel, flat_kernel and tensor_kernel
#define MAX_BLOCK_THREADS 512    // of block_kernel
#define MAX_CACHE (96 << 10)     // bytes of weights that block_kernel keeps; longer ones are read again
#define MAX_PARTIALS 1024        // blocks of flat_kernel that leave a range

template <int V> struct Values { Vec<float, V> p, g, m, v; };

template <int KIND, int V>
static __device__ __forceinline__ Vec<float, V> load_masters(const float *master, size_t at) {
    if constexpr (KIND == UPDATE_BF16) return from_bf16(vec_load<bf16, V>((const bf16 *)master + at));
    else return vec_load<float, V>(master + at);
}

template <int KIND, int V>
static __device__ __forceinline__ Values<V> load_values(const float *master, const float *m, const float *v,
                                                        const float *grad, size_t at) {
    Values<V> x = {};
    x.p = load_masters<KIND, V>(master, at);
    if (KIND != UPDATE_NONE && KIND != UPDATE_BF16) x.g = vec_load<float, V>(grad + at);
    if (KIND == UPDATE_ADAMW || KIND == UPDATE_SGD) x.m = vec_load<float, V>(m + at);
    if (KIND == UPDATE_ADAMW) x.v = vec_load<float, V>(v + at);
    return x;
}

// One step of the values, which go back to memory; the masters stay in x->p.
template <int KIND, int V>
static __device__ __forceinline__ void update_values(Values<V> *x, const Step *s, float *master, float *m, float *v,
                                                     size_t at) {
    (void)x, (void)s, (void)master, (void)m, (void)v, (void)at;
    if constexpr (KIND == UPDATE_ADAMW || KIND == UPDATE_SGD) {
        for (int i = 0; i < V; i++) {
            if (KIND == UPDATE_ADAMW) {
                adamw_value(&x->p.v[i], &x->m.v[i], &x->v.v[i], x->g.v[i], s);
                continue;
            }
            float p = x->p.v[i], g = x->g.v[i] * s->grad_scale;
            x->m.v[i] = s->c1 * x->m.v[i] + (g + s->decay * p);
            x->p.v[i] = p - s->lr * x->m.v[i];
        }
        vec_store(master + at, x->p);
        vec_store(m + at, x->m);
        if (KIND == UPDATE_ADAMW) vec_store(v + at, x->v);
    }
}

// ---------------------------------------------------------------------------------------------
// Quantization.

// A store of working values rounds by itself in the bf16 build; in the fp32 build quantized ones are rounded before.
template <int V> static __device__ __forceinline__ void store_x(floatX *work, Vec<float, V> f) {
#ifdef PRECISION_FP32
    vec_store(work, f);
#else
    vec_store(work, to_bf16(f));
#endif
}

// What the kind makes of quantized weights r (bf16 values) at `at`: working values, or gradients g masked.
template <int KIND, int V>
static __device__ __forceinline__ void emit(floatX *work, float *grad, Vec<float, V> r, Vec<float, V> g,
                                            const BlockQuant *b, size_t at) {
    for (int i = 0; i < V; i++) {
        if (KIND == UPDATE_MASK) {
            float q = unclamped(r.v[i], b);
            g.v[i] = q >= b->lo && q <= b->hi ? g.v[i] : 0.0f;
            continue;
        }
        float q = clamped(r.v[i], b);
        // Adding 0 turns -0, of codes rounded from below, into 0.
        if (b->zero_is_float) q = fmaf(q - b->mid, b->scale, b->zp);
        else if (b->codes) q = q + b->zp;
        else q = fmaf(q, b->scale, 0.0f);
#ifdef PRECISION_FP32
        q = bf16_round(q);
#endif
        r.v[i] = q;
    }
    if (KIND == UPDATE_MASK) vec_store(grad + at, g);
    else store_x(work + at, r);
}

// Row scales of 1, by all threads of the grid.
static __device__ __forceinline__ void ones(float *wscale, size_t rows) {
    if (!wscale) return;
    for (size_t r = (size_t)blockIdx.x * blockDim.x + threadIdx.x; r < rows; r += (size_t)gridDim.x * blockDim.x)
        wscale[r] = 1.0f;
}

// ---------------------------------------------------------------------------------------------
// Kernels.

// A team of `team` lanes (a power of two) a block of at most team * V * U values.
template <int KIND, int V, int U>
static __global__ void __launch_bounds__(THREADS)
team_kernel(float *master, float *m, float *v, floatX *work, float *wscale, float *grad, const StepState *state, Hyper h,
            Blocks b, int team, QuantSpec s, bool codes) {
    Step step = {};
    if (!step_begin<KIND>(&step, state, h)) return;
    if (!codes) ones(wscale, b.rows);
    int lane = (int)threadIdx.x & (team - 1), vectors = (int)(b.b0 * b.b1) / V, teams = THREADS / team;
    size_t member = threadIdx.x / (unsigned)team;
    for (size_t first = (size_t)blockIdx.x * teams; first < b.count; first += (size_t)gridDim.x * teams) {
        size_t k = first + member, at[U];
        bool have[U];                                          // lanes without a value go along, for the shuffles
        Values<V> x[U];
        for (int u = 0; u < U; u++) {
            have[u] = k < b.count && lane + u * team < vectors;
            at[u] = have[u] ? block_at(&b, k, (size_t)(lane + u * team) * V) : 0;
            if (have[u]) x[u] = load_values<KIND, V>(master, m, v, grad, at[u]);
        }
        float mn = INFINITY, mx = -INFINITY;
        Vec<float, V> r[U];
        for (int u = 0; u < U; u++) {
            if (!have[u]) continue;
            update_values<KIND, V>(&x[u], &step, master, m, v, at[u]);
            r[u] = from_bf16(to_bf16(x[u].p));
            add_range(&mn, &mx, r[u]);
        }
        for (int bits = team / 2; bits; bits >>= 1) {
            mn = fminf(mn, __shfl_xor_sync(FULL_WARP, mn, bits));
            mx = fmaxf(mx, __shfl_xor_sync(FULL_WARP, mx, bits));
        }
        BlockQuant q = block_quant(mn, mx, &s, codes);
        for (int u = 0; u < U; u++)
            if (have[u]) emit<KIND, V>(work, grad, r[u], x[u].g, &q, at[u]);
        if (codes && wscale && lane == 0 && k < b.count) wscale[k] = q.scale;
    }
}

// A block of threads a block. `cached`: there is shared memory for its weights.
template <int KIND, int V>
static __global__ void __launch_bounds__(MAX_BLOCK_THREADS)
block_kernel(float *master, float *m, float *v, floatX *work, float *wscale, float *grad, const StepState *state,
             Hyper h, Blocks b, QuantSpec s, bool codes, bool cached) {
    DYN_SHARED(bf16, cache);
    Step step = {};
    if (!step_begin<KIND>(&step, state, h)) return;
    if (!codes) ones(wscale, b.rows);
    size_t k = blockIdx.x, size = b.b0 * b.b1, stride = (size_t)blockDim.x * V, mine = (size_t)threadIdx.x * V;
    float mn = INFINITY, mx = -INFINITY;
    for (size_t e = mine; e < size; e += stride) {
        size_t at = block_at(&b, k, e);
        // Of MASK's gradients, only the second pass has need.
        Values<V> x = load_values<KIND == UPDATE_MASK ? UPDATE_NONE : KIND, V>(master, m, v, grad, at);
        update_values<KIND, V>(&x, &step, master, m, v, at);
        Vec<bf16, V> r = to_bf16(x.p);
        add_range(&mn, &mx, from_bf16(r));
        if (cached) vec_store(cache + e, r);
    }
    block_range(&mn, &mx);
    BlockQuant q = block_quant(mn, mx, &s, codes);
    for (size_t e = mine; e < size; e += stride) {             // each thread reads what it wrote itself
        size_t at = block_at(&b, k, e);
        Vec<float, V> g = {};
        if (KIND == UPDATE_MASK) g = vec_load<float, V>(grad + at);
        Vec<bf16, V> r = cached ? vec_load<bf16, V>(cache + e) : to_bf16(load_masters<KIND, V>(master, at));
        emit<KIND, V>(work, grad, from_bf16(r), g, &q, at);
    }
    if (codes && wscale && threadIdx.x == 0) wscale[k] = q.scale;
}

// V values at a time of n in a row; the rest one by one.
template <int KIND, int V, bool RANGE>
static __device__ __forceinline__ void flat_step(float *master, float *m, float *v, floatX *work, const float *grad,
                                                 const Step *step, float *mn, float *mx, size_t at) {
    Values<V> x = load_values<KIND, V>(master, m, v, grad, at);
    update_values<KIND, V>(&x, step, master, m, v, at);
    if (RANGE) add_range(mn, mx, from_bf16(to_bf16(x.p)));
    else if (work) store_x(work + at, x.p);
}
// Without RANGE, working values unquantized, or none (work NULL); with it, the range of what each block of threads has
// updated.
template <int KIND, int V, bool RANGE>
static __global__ void __launch_bounds__(THREADS)
flat_kernel(float *master, float *m, float *v, floatX *work, float *wscale, const float *grad, const StepState *state,
            Hyper h, size_t rows, size_t n, float2 *partials) {
    Step step = {};
    if (!step_begin<KIND>(&step, state, h)) return;
    if (!RANGE) ones(wscale, rows);
    float mn = INFINITY, mx = -INFINITY;
    size_t id = (size_t)blockIdx.x * THREADS + threadIdx.x, vectors = n / V;
    for (size_t i = id; i < vectors; i += (size_t)gridDim.x * THREADS)
        flat_step<KIND, V, RANGE>(master, m, v, work, grad, &step, &mn, &mx, i * V);
    if (id < n - vectors * V)
        flat_step<KIND, 1, RANGE>(master, m, v, work, grad, &step, &mn, &mx, vectors * V + id);
    if (RANGE) {
        block_range(&mn, &mx);
        if (threadIdx.x == 0) partials[blockIdx.x] = {mn, mx};
    }
}

// The second pass: every block of threads makes the tensor's scale for itself.
template <int KIND, int V>
static __device__ __forceinline__ void tensor_step(floatX *work, float *grad, const float *master, const BlockQuant *q,
                                                   size_t at) {
    Vec<float, V> g = {};
    if (KIND == UPDATE_MASK) g = vec_load<float, V>(grad + at);
    emit<KIND, V>(work, grad, from_bf16(to_bf16(load_masters<KIND, V>(master, at))), g, q, at);
}
template <int KIND, int V>
static __global__ void __launch_bounds__(THREADS)
tensor_kernel(floatX *work, float *wscale, float *grad, const float *master, const StepState *state,
              const float2 *partials, int n_partials, size_t rows, size_t n, QuantSpec s) {
    if (state && state->skip) return;
    ones(wscale, rows);
    float mn = INFINITY, mx = -INFINITY;
    for (int i = (int)threadIdx.x; i < n_partials; i += THREADS) widen(&mn, &mx, partials[i].x, partials[i].y);
    block_range(&mn, &mx);
    BlockQuant q = block_quant(mn, mx, &s, false);
    size_t id = (size_t)blockIdx.x * THREADS + threadIdx.x, vectors = n / V;
    for (size_t i = id; i < vectors; i += (size_t)gridDim.x * THREADS)
        tensor_step<KIND, V>(work, grad, master, &q, i * V);
    if (id < n - vectors * V) tensor_step<KIND, 1>(work, grad, master, &q, vectors * V + id);
}

// ---------------------------------------------------------------------------------------------
// Launching.

struct Args {
    float *master, *m, *v;
    floatX *work;
    float *wscale, *grad;
    const StepState *state;
    Hyper h;
};

template <int KIND, int V, int U>
static void launch_teams(const Args *a, const Blocks *b, const QuantSpec *s, bool codes) {
    int team = 1;
    while ((size_t)(team * V * U) < b->b0 * b->b1) team *= 2;
    unsigned grid = grid_for((b->count * (size_t)team + THREADS - 1) / THREADS);
    LAUNCH((team_kernel<KIND, V, U>), grid, THREADS, 0, cuda_stream)
        (a->master, a->m, a->v, a->work, a->wscale, a->grad, a->state, a->h, *b, team, *s, codes);
}

template <int KIND, int V>
static void launch_blocks(const Args *a, const Blocks *b, const QuantSpec *s, bool codes) {
    size_t size = b->b0 * b->b1, bytes = size * sizeof(bf16), quarter = (size / V + 3) / 4;
    unsigned threads = quarter > MAX_BLOCK_THREADS ? MAX_BLOCK_THREADS : quarter < 64 ? 64
                       : (unsigned)(quarter + 31) / 32 * 32;
    bool cached = bytes <= MAX_CACHE;
    if (cached && !allow_shared(block_kernel<KIND, V>, bytes)) return;
    LAUNCH((block_kernel<KIND, V>), (unsigned)b->count, threads, cached ? bytes : 0, cuda_stream)
        (a->master, a->m, a->v, a->work, a->wscale, a->grad, a->state, a->h, *b, *s, codes, cached);
}

template <int KIND, int V> static void launch_tensor(const Args *a, size_t rows, size_t n, const QuantSpec *s) {
    const bool updates = KIND == UPDATE_ADAMW || KIND == UPDATE_SGD;
    const int first_pass = KIND == UPDATE_MASK ? UPDATE_NONE : KIND, second_pass = updates ? UPDATE_NONE : KIND;
    size_t blocks = (n / V + THREADS) / THREADS;               // one thread at least, for the rest
    unsigned first = blocks < MAX_PARTIALS ? (unsigned)blocks : MAX_PARTIALS;
    float2 *partials = (float2 *)cuda_workspace(MAX_PARTIALS * sizeof(float2));
    if (!partials) return;
    LAUNCH((flat_kernel<first_pass, V, true>), first, THREADS, 0, cuda_stream)
        (a->master, a->m, a->v, a->work, a->wscale, a->grad, a->state, a->h, rows, n, partials);
    LAUNCH((tensor_kernel<second_pass, V>), grid_for(blocks), THREADS, 0, cuda_stream)
        (a->work, a->wscale, a->grad, a->master, a->state, partials, (int)first, rows, n, *s);
}

template <int KIND, int V>
static void update_and_quantize_v(const Args *a, const Blocks *b, const QuantSpec *s) {
    size_t size = b->b0 * b->b1;
    bool codes = quant_works_as_codes(s);
    if (size <= 32u * V) launch_teams<KIND, V, 1>(a, b, s, codes);
    else if (V > 1 && size <= 64u * V) launch_teams<KIND, V, (V > 1 ? 2 : 1)>(a, b, s, codes);
    else if (b->count == 1 && b->rows > 1) launch_tensor<KIND, V>(a, b->rows, size, s);
    else launch_blocks<KIND, V>(a, b, s, codes);
}

template <int KIND>
static void update_and_quantize(const Args *a, const QuantSpec *s, int64_t rows, int64_t cols) {
    uintptr_t bits = (uintptr_t)a->master | (uintptr_t)a->m | (uintptr_t)a->v | (uintptr_t)a->work | (uintptr_t)a->grad;
    bool aligned = bits % 16 == 0;
    size_t n = (size_t)rows * (size_t)cols;
    bool update_alone = (KIND == UPDATE_ADAMW || KIND == UPDATE_SGD) && !a->work;
    if (n == 0) return;
    if (update_alone || !quant_is_on(s)) {
        if (KIND == UPDATE_MASK) return;
        const int kind = KIND == UPDATE_MASK ? UPDATE_NONE : KIND;
        auto kernel = aligned ? flat_kernel<kind, 4, false> : flat_kernel<kind, 1, false>;
        unsigned grid = grid_for((n / (aligned ? 4 : 1) + THREADS) / THREADS);
        LAUNCH(kernel, grid, THREADS, 0, cuda_stream)
            (a->master, a->m, a->v, a->work, update_alone ? nullptr : a->wscale, a->grad, a->state, a->h, (size_t)rows,
             n, nullptr);
    } else {
        int64_t block[2];
        Err err;
        if (quant_block_shape(s, rows, cols, block, &err) < 0) {
            ops_set_error(err.code, "%s", err.text);
            return;
        }
        size_t b0 = (size_t)block[0], b1 = (size_t)block[1];
        Blocks b = {n / (b0 * b1), (size_t)cols / b1, b0, b1, (size_t)rows, (size_t)cols};
        if (aligned && b1 % 4 == 0) update_and_quantize_v<KIND, 4>(a, &b, s);
        else update_and_quantize_v<KIND, 1>(a, &b, s);
    }
    CUDA_CHECK(cudaGetLastError());
}

void cuda_adamw_fq(float *master, float *m, float *v, floatX *work, float *wscale, const float *grad,
                   const StepState *state, const AdamWParams *h, const QuantSpec *wq, int64_t rows, int64_t cols) {
    Args a = {master, m, v, work, wscale, (float *)(uintptr_t)grad, state, adamw_hyper(h)};
    update_and_quantize<UPDATE_ADAMW>(&a, wq, rows, cols);
}

void cuda_sgd_fq(float *master, float *buf, floatX *work, float *wscale, const float *grad, const StepState *state,
                 float momentum, float weight_decay, const QuantSpec *wq, int64_t rows, int64_t cols) {
    Hyper hyper = {0.0f, 0.0f, weight_decay, momentum, 0.0f, 0.0f};
    Args a = {master, buf, nullptr, work, wscale, (float *)(uintptr_t)grad, state, hyper};
    update_and_quantize<UPDATE_SGD>(&a, wq, rows, cols);
}

void stored_weight_fq(floatX *work, float *wscale, StoredParam from, const StepState *state, const QuantSpec *wq,
                      int64_t rows, int64_t cols) {
    Args a = {(float *)from.data, nullptr, nullptr, work, wscale, nullptr, state, {}};
    if (from.format == PARAM_BF16) update_and_quantize<UPDATE_BF16>(&a, wq, rows, cols);
    else update_and_quantize<UPDATE_NONE>(&a, wq, rows, cols);
}

void cuda_weight_fq(floatX *work, float *wscale, const float *master, const QuantSpec *wq, int64_t rows, int64_t cols) {
    stored_weight_fq(work, wscale, {PARAM_F32, (float *)(uintptr_t)master, nullptr}, nullptr, wq, rows, cols);
}

void cuda_weight_ste_mask(float *grad, const float *master, const QuantSpec *wq, int64_t rows, int64_t cols) {
    Args a = {(float *)(uintptr_t)master, nullptr, nullptr, nullptr, nullptr, grad, nullptr, {}};
    update_and_quantize<UPDATE_MASK>(&a, wq, rows, cols);
}
