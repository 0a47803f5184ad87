// AdamW on parameters and moments that are kept in few bits (adamw_low), INT8 rows made of floats (int8_rows), bf16 to
// f32 (widen): the bits of the CPU wing (llmc/cpu/adamw_low.c), by the scalar arithmetic of optimizer.h.
//
// Bytes a weight, read and written; scales of blocks and rows add less than 0.1:
//
//   parameter   gradient | moments  f32   bf16   8 bits   4 bits
//   INT8 1 + 1      4    |           22    14      10        8
//   bf16 2 + 2      4    |           24    16      12       10
//   f32  4 + 4      4    |           28    20      16       14
//
// Each value is read and written once: INT8 with 8-bit states takes 3.0 us a million weights on an H100 (3.35 TB/s).
// What it costs to compute is more: two codes to values, a root and three divisions for AdamW, two more divisions and
// two searches for the new codes, a quarter of a Philox block and the new code. So four of the five divisions, by
// numbers that many values share, are made by quotient (adamw.cuh), and a search takes two lookups in shared memory,
// not eight. That leaves some 130 instructions a weight, by the machine code for sm_90, where the multiprocessors issue
// 88 in the time of 10 bytes: 0.65 of the bandwidth is what to expect, and all of it with states in f32 or bf16.
//
// A warp takes 256 values in a row, aligned by their place in the whole tensor: two groups of four values a lane, at
// 4 lane and at 128 + 4 lane. So 256 values are one block of 8-bit states, or two of 4 bits; a group is one Philox
// block of INT8 rounding; each load and store of a warp is one run of memory.
//
//   flat_kernel   parameters in f32 and bf16: one pass
//   rows_kernel   INT8 parameters: a block of threads takes a tile of whole rows that are whole blocks of states. The
//                 first pass updates them, stores the moments and keeps the new values in shared memory (16 KB or
//                 more); the second knows the rows' ranges and makes the codes. A tile that shared memory cannot hold
//                 (rows above some 54,000 columns on an H100, or many rows of an odd length) is computed twice from
//                 what memory holds: between the two the rows' new scales are written, of which the old ones are kept
//                 in shared memory; codes and moments are written the second time
#include "adamw.cuh"
#include "ptx.cuh"

#define FLAT_THREADS 256
#define TILE_VALUES 4096         // of a tile of short rows
#define TILE_ROWS 1024           // at most, unless states need more for whole blocks
#define MAX_THREADS 1024         // of rows_kernel; half of it where values move one by one

// ---------------------------------------------------------------------------------------------
// Maps of states. Nearest code of u: the number of edges (state_maps.h) that are not above it. The sign, the exponent
// and some bits of the mantissa of u pick a bucket of floats with one edge in it at most: `base` counts the edges below
// it, and one comparison decides.

template <int N, bool SIGNED, int LOW, int MANTISSA> struct StateMap {
    static constexpr bool is_signed = SIGNED;
    static constexpr int low = LOW, steps = 1 << MANTISSA, shift = 23 - MANTISSA, first = (127 + LOW) * steps,
                         count = -LOW * steps + 1;
    alignas(16) float value[N];
    float edge[N];
    uint8_t base[((SIGNED ? 2 : 1) * count + 15) / 16 * 16];   // of [0, 1], the first from 0 on; of [-1, -0]
};
typedef StateMap<256, true, -22, 6> MapS8;
typedef StateMap<256, false, -23, 7> MapU8;
typedef StateMap<16, true, -9, 3> MapS4;
typedef StateMap<16, false, -9, 3> MapU4;

template <class Map> struct MapMaker {
    Map map;
    bool one_edge;                                             // in each bucket, at most: what the search relies on
    // Bucket of [lo, hi]: exact in double.
    constexpr int below(double x, int n) const {
        int c = 0;
        while (c < n - 1 && (double)map.edge[c] <= x) c++;
        return c;
    }
    constexpr void bucket(int at, double lo, double hi, int n) {
        map.base[at] = (uint8_t)below(lo, n);
        one_edge = one_edge && below(hi, n) <= map.base[at] + 1;
    }
};
template <class Map, int N>
static constexpr MapMaker<Map> make_map(const float (&value)[N], const float (&edge)[N]) {
    MapMaker<Map> m = {};
    m.one_edge = true;
    for (int i = 0; i < N; i++) {
        m.map.value[i] = value[i];
        m.map.edge[i] = edge[i];
    }
    double power = 1.0, ulp = 1.0 / 8388608.0;
    for (int i = 0; i < -Map::low; i++) power /= 2;
    for (int k = 0; k < Map::count; k++) {
        int fraction = k & (Map::steps - 1);
        if (k && !fraction) power *= 2;
        double lo = power * (1.0 + (double)fraction / Map::steps);
        double hi = k == Map::count - 1 ? 1.0 : power * (1.0 + (double)(fraction + 1) / Map::steps - ulp);
        m.bucket(k, k ? lo : 0.0, hi, N);
        if (Map::is_signed) m.bucket(Map::count + k, -hi, k ? -lo : 0.0, N);
    }
    return m;
}
static constexpr float value_s8[] = {STATE_MAP_S8}, edge_s8[] = {STATE_EDGES_S8};
static constexpr float value_u8[] = {STATE_MAP_U8}, edge_u8[] = {STATE_EDGES_U8};
static constexpr float value_s4[] = {STATE_MAP_S4}, edge_s4[] = {STATE_EDGES_S4};
static constexpr float value_u4[] = {STATE_MAP_U4}, edge_u4[] = {STATE_EDGES_U4};
static constexpr auto made_s8 = make_map<MapS8>(value_s8, edge_s8);
static constexpr auto made_u8 = make_map<MapU8>(value_u8, edge_u8);
static constexpr auto made_s4 = make_map<MapS4>(value_s4, edge_s4);
static constexpr auto made_u4 = make_map<MapU4>(value_u4, edge_u4);
static_assert(made_s8.one_edge && made_u8.one_edge && made_s4.one_edge && made_u4.one_edge, "buckets are too wide");

// m's and v's. Kernels look up in a copy in shared memory: lanes ask for different entries.
template <class M, class V> struct Maps { M m; V v; };
static __device__ const Maps<MapS8, MapU8> maps_8 = {made_s8.map, made_u8.map};
static __device__ const Maps<MapS4, MapU4> maps_4 = {made_s4.map, made_u4.map};
struct NoMaps { int m, v; };

// Of each format: bits a value, and the maps.
template <int STATE> struct Format;
template <> struct Format<STATE_F32> { enum { bits = 32 }; typedef NoMaps Tables; };
template <> struct Format<STATE_BF16> { enum { bits = 16 }; typedef NoMaps Tables; };
template <> struct Format<STATE_INT8> { enum { bits = 8 }; typedef Maps<MapS8, MapU8> Tables; };
template <> struct Format<STATE_FP8> { enum { bits = 8 }; typedef NoMaps Tables; };
template <> struct Format<STATE_INT4> { enum { bits = 4 }; typedef Maps<MapS4, MapU4> Tables; };
template <int STATE> constexpr bool has_map = STATE == STATE_INT8 || STATE == STATE_INT4;
template <int STATE> constexpr bool has_scale = has_map<STATE> || STATE == STATE_FP8;

// Four values of so many bits as they lie in memory: four, two or one word; of 4 bits half a word.
template <int BITS> using Group = Vec<uint32_t, (BITS + 7) / 8>;

// All threads call it; step_begin's barrier follows.
template <class T> static __device__ __forceinline__ void copy_tables(T *to, const T *from) {
    static_assert(sizeof(T) % 16 == 0, "copied 16 bytes at a time");
    const int n = (int)(sizeof(T) / 16);
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) ((uint4 *)to)[i] = ((const uint4 *)from)[i];
}
template <int STATE> static __device__ __forceinline__ void load_tables(typename Format<STATE>::Tables *t) {
    if constexpr (STATE == STATE_INT8) copy_tables(t, &maps_8);
    else if constexpr (STATE == STATE_INT4) copy_tables(t, &maps_4);
    else (void)t;
}

template <int N, bool SIGNED, int LOW, int MANTISSA>
static __device__ __forceinline__ unsigned encode(const StateMap<N, SIGNED, LOW, MANTISSA> *map, float u) {
    typedef StateMap<N, SIGNED, LOW, MANTISSA> Map;
    // fmaxf takes NaN, which is for zero, to the first bucket; an unsigned map's, everything that is negative too.
    float a = fmaxf(SIGNED ? fabsf(u) : u, f32_from_bits((uint32_t)(127 + LOW) << 23));
    int k = (int)(f32_bits(a) >> Map::shift) - Map::first;
    if (SIGNED && f32_bits(u) >> 31) k += Map::count;
    unsigned c = map->base[k];
    return c + (u >= map->edge[c] ? 1u : 0u);
}
// f8_e4m3_from_f32 with the sign of x, and 0 for NaN, without branches: adding 2^14 rounds subnormals to a multiple of
// 2^-9.
static __device__ __forceinline__ unsigned encode_fp8(float u, float x) {
    uint32_t a = f32_bits(u) & 0x7fffffffu;
    uint32_t normal = (a + 0x7ffffu + ((a >> 20) & 1u) - 0x3c000000u) >> 20;
    uint32_t small = f32_bits(f32_from_bits(a) + 16384.0f) - 0x46800000u;
    uint32_t code = a < 0x3c800000u ? small : normal;
    code = (code < 0x7eu ? code : 0x7eu) | (f32_bits(x) >> 24 & 0x80u);
    return u == u ? code : 0u;
}

// Value i of a group in bf16.
static __device__ __forceinline__ float bf16_of(Group<16> q, int i) {
    return f32_from_bits(i % 2 ? q.v[i / 2] & 0xffff0000u : q.v[i / 2] << 16);
}

// Values of a group of codes with their block's scale, and back; map: m's or v's.
template <int STATE, class Map>
static __device__ __forceinline__ void decode_group(float *x, Group<Format<STATE>::bits> q, const Map *map, float s) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if constexpr (STATE == STATE_F32) x[i] = f32_from_bits(q.v[i]);
        else if constexpr (STATE == STATE_BF16) x[i] = bf16_of(q, i);
        else if constexpr (STATE == STATE_INT8) x[i] = map->value[q.v[0] >> 8 * i & 255] * s;
        else if constexpr (STATE == STATE_FP8) x[i] = f8_e4m3_to_f32((f8_e4m3)(q.v[0] >> 8 * i)) * s;
        else x[i] = map->value[q.v[0] >> (4 * i ^ 4) & 15] * s;
    }
}
// A scale from which on quotient might overflow is left to division. Below, values too small for it get the code of 0
// either way: what they are over the scale, of 2^-49 or more, lies far below the first edge.
template <int STATE, class Map>
static __device__ __forceinline__ Group<Format<STATE>::bits> encode_group(const float *x, const Map *map, float s) {
    Group<Format<STATE>::bits> q = {};
    if constexpr (STATE == STATE_F32) {
#pragma unroll
        for (int i = 0; i < 4; i++) q.v[i] = f32_bits(x[i]);
    } else if constexpr (STATE == STATE_BF16) {
#pragma unroll
        for (int i = 0; i < 2; i++)
            q.v[i] = (uint32_t)bf16_from_f32(x[2 * i]) | (uint32_t)bf16_from_f32(x[2 * i + 1]) << 16;
    } else {
        float u[4];
        if (s < 0x1p100f) {
            Divisor d = divisor(s);
#pragma unroll
            for (int i = 0; i < 4; i++) u[i] = quotient(x[i], d);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) u[i] = x[i] / s;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if constexpr (STATE == STATE_INT8) q.v[0] |= encode(map, u[i]) << 8 * i;
            else if constexpr (STATE == STATE_FP8) q.v[0] |= encode_fp8(u[i], x[i]) << 8 * i;
            else q.v[0] |= encode(map, u[i]) << (4 * i ^ 4);
        }
    }
    return q;
}

// ---------------------------------------------------------------------------------------------
// The 256 values of a warp.

struct Update {
    StoredParam p;
    StoredState m, v;
    const float *grad;
    const StepState *state;
    Hyper h;
    Rounding rounding;
    int tensor;
    int64_t start;               // of these rows' first value in the tensor
    int64_t rows, cols;
};

// Where a lane's two groups stand: at[] counts from the first value of these rows, have[] has a bit for each value that
// is among those to be updated.
struct Place { int64_t at[2]; uint32_t have[2]; };

// Block k of 256 values of the tensor, of which those from `begin` to `end` (counted like at[]) are to be updated. VEC:
// groups lie inside or outside as a whole.
template <bool VEC>
static __device__ __forceinline__ Place place_of(int64_t k, int64_t start, int64_t begin, int64_t end) {
    Place x;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        x.at[h] = k * 256 - start + h * 128 + 4 * (int)(threadIdx.x & 31);
        if (VEC) x.have[h] = x.at[h] >= begin && x.at[h] < end ? 15 : 0;
        else {
            x.have[h] = 0;
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (x.at[h] + i >= begin && x.at[h] + i < end) x.have[h] |= 1u << i;
        }
    }
    return x;
}

// Loads and stores a group. What is not there is 0; of 4 bits two values come or go together.
template <int BITS, bool VEC>
static __device__ __forceinline__ Group<BITS> load_group(const void *from, int64_t at, uint32_t have) {
    Group<BITS> x = {};
    if constexpr (BITS == 4) {
        const uint8_t *p = (const uint8_t *)from + at / 2;
        if (VEC) {
            if (have) x.v[0] = *(const uint16_t *)p;
        } else {
            if (have & 3) x.v[0] = p[0];
            if (have & 12) x.v[0] |= (uint32_t)p[1] << 8;
        }
    } else if constexpr (VEC) {
        if (have) x = *(const Group<BITS> *)((const uint8_t *)from + at * (BITS / 8));
    } else {
        const uint8_t *p = (const uint8_t *)from + at * (BITS / 8);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (!(have >> i & 1)) continue;
            if constexpr (BITS == 32) x.v[i] = ((const uint32_t *)p)[i];
            else if constexpr (BITS == 16) x.v[i / 2] |= (uint32_t)((const uint16_t *)p)[i] << i % 2 * 16;
            else x.v[0] |= (uint32_t)p[i] << i * 8;
        }
    }
    return x;
}
template <int BITS, bool VEC>
static __device__ __forceinline__ void store_group(void *to, int64_t at, uint32_t have, Group<BITS> x) {
    if constexpr (BITS == 4) {
        uint8_t *p = (uint8_t *)to + at / 2;
        if (VEC) {
            if (have) *(uint16_t *)p = (uint16_t)x.v[0];
        } else {
            if (have & 3) p[0] = (uint8_t)x.v[0];
            if (have & 12) p[1] = (uint8_t)(x.v[0] >> 8);
        }
    } else if constexpr (VEC) {
        if (have) *(Group<BITS> *)((uint8_t *)to + at * (BITS / 8)) = x;
    } else {
        uint8_t *p = (uint8_t *)to + at * (BITS / 8);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (!(have >> i & 1)) continue;
            if constexpr (BITS == 32) ((uint32_t *)p)[i] = x.v[i];
            else if constexpr (BITS == 16) ((uint16_t *)p)[i] = (uint16_t)(x.v[i / 2] >> i % 2 * 16);
            else p[i] = (uint8_t)(x.v[0] >> i * 8);
        }
    }
}
static __device__ __forceinline__ Group<32> group_of(const float *x) {
    return {{f32_bits(x[0]), f32_bits(x[1]), f32_bits(x[2]), f32_bits(x[3])}};
}

template <int STATE> struct Moment {
    Group<Format<STATE>::bits> q[2];
    float s[2];
};

template <int STATE, bool VEC>
static __device__ __forceinline__ Moment<STATE> load_moment(StoredState state, const Place *x) {
    Moment<STATE> r = {};
#pragma unroll
    for (int h = 0; h < 2; h++) {
        r.q[h] = load_group<Format<STATE>::bits, VEC>(state.data, x->at[h], x->have[h]);
        // A block of 256 lies inside as a whole, and so do both halves.
        if (has_scale<STATE> && x->have[h]) r.s[h] = state.scale[x->at[h] >> (STATE == STATE_INT4 ? 7 : 8)];
    }
    return r;
}

static __device__ __forceinline__ float to_f32(float x) { return x; }
static __device__ __forceinline__ float to_f32(bf16 x) { return bf16_to_f32(x); }

static __device__ __forceinline__ float max_abs(const float *x) {       // fmaxf passes NaN over
    float a = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) a = fmaxf(a, fabsf(x[i]));
    return a;
}

// Stores a moment's new values. All lanes of the warp call it.
template <int STATE, bool VEC, class Map>
static __device__ __forceinline__ void store_moment(StoredState state, const Place *x, const float (&f)[2][4],
                                                    const Map *map) {
    float s[2] = {1.0f, 1.0f};
    if constexpr (has_scale<STATE>) {
        if (STATE == STATE_INT4) {
#pragma unroll
            for (int h = 0; h < 2; h++) s[h] = state_scale(STATE_INT4, warp_max_abs(max_abs(f[h])));
        } else {
            s[0] = s[1] = state_scale((StateFormat)STATE, warp_max_abs(fmaxf(max_abs(f[0]), max_abs(f[1]))));
        }
        __syncwarp();                                          // all lanes have read the old scales
#pragma unroll
        for (int h = 0; h < 2; h++)
            if (threadIdx.x % 32 == 0 && x->have[h] && (h == 0 || STATE == STATE_INT4))
                state.scale[x->at[h] >> (STATE == STATE_INT4 ? 7 : 8)] = s[h];
    }
#pragma unroll
    for (int h = 0; h < 2; h++)
        store_group<Format<STATE>::bits, VEC>(state.data, x->at[h], x->have[h], encode_group<STATE>(f[h], map, s[h]));
}

// What is read of 256 values, all loads before the first use. PBITS: of a parameter.
template <int PBITS, int STATE> struct Loaded {
    Group<PBITS> p[2];
    Group<32> g[2];
    Moment<STATE> m, v;
};
template <int PBITS, int STATE, bool VEC>
static __device__ __forceinline__ Loaded<PBITS, STATE> load_values(const Update *u, const Place *x) {
    Loaded<PBITS, STATE> l;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        l.g[h] = load_group<32, VEC>(u->grad, x->at[h], x->have[h]);
        l.p[h] = load_group<PBITS, VEC>(u->p.data, x->at[h], x->have[h]);
    }
    l.m = load_moment<STATE, VEC>(u->m, x);
    l.v = load_moment<STATE, VEC>(u->v, x);
    return l;
}

// A step, with its corrections as divisors. `quick`: these are far from the ends of the range.
struct LowStep {
    Step s;
    Divisor bc1, sqrt_bc2;
    bool quick;
};
static __device__ __forceinline__ bool low_begin(LowStep *step, const StepState *state, Hyper h) {
    step->s = {};
    if (!step_begin<UPDATE_ADAMW>(&step->s, state, h)) return false;
    step->bc1 = divisor(step->s.bc1);
    step->sqrt_bc2 = divisor(step->s.sqrt_bc2);
    step->quick = step->s.bc1 > 0x1p-20f && step->s.bc1 <= 1.0f && step->s.sqrt_bc2 > 0x1p-20f &&
                  step->s.sqrt_bc2 <= 1.0f;
    return true;
}

// The step of a group, whose parameters come as f32 in p. quotient needs values that are neither huge nor, but for the
// root, tiny; the root of the least number is 2^-74.5, and 0 is divided rightly.
template <int STATE, class Maps, class L>
static __device__ __forceinline__ void update_group(float *p, float *m, float *v, const L *l, int h, uint32_t have,
                                                    const Maps *maps, const LowStep *step) {
    decode_group<STATE>(m, l->m.q[h], &maps->m, l->m.s[h]);
    decode_group<STATE>(v, l->v.q[h], &maps->v, l->v.s[h]);
    float corrected_m[4], root[4], least = INFINITY;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        adamw_moments(&m[i], &v[i], f32_from_bits(l->g[h].v[i]), &step->s);
        least = fminf(least, fabsf(m[i]));
        root[i] = sqrtf(v[i]);
    }
    bool quick = step->quick && least >= 0x1p-75f && fmaxf(max_abs(m), max_abs(v)) <= 0x1p100f;
    if (quick || !have) {                                      // NaN stays NaN either way
#pragma unroll
        for (int i = 0; i < 4; i++) {
            corrected_m[i] = quotient(m[i], step->bc1);
            root[i] = quotient(root[i], step->sqrt_bc2);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            corrected_m[i] = m[i] / step->s.bc1;
            root[i] = root[i] / step->s.sqrt_bc2;
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) p[i] = adamw_weight(p[i], corrected_m[i], root[i], &step->s);
}

// ---------------------------------------------------------------------------------------------
// Parameters in f32 and bf16.

template <int PBITS, int STATE, bool VEC>
static __global__ void __launch_bounds__(FLAT_THREADS, VEC ? 4 : 2) flat_kernel(Update u) {
    __shared__ typename Format<STATE>::Tables maps;
    LowStep step;
    load_tables<STATE>(&maps);
    if (!low_begin(&step, u.state, u.h)) return;
    const int64_t n = u.rows * u.cols, end = (u.start + n + 255) / 256;
    const bool stochastic = PBITS == 16 && u.rounding == ROUND_STOCHASTIC;
    const uint64_t seed = u.state->seed, stream = rounding_stream(u.tensor, u.state->t);
    const int lane = (int)threadIdx.x & 31, warps = FLAT_THREADS / 32;
    for (int64_t k = u.start / 256 + (int64_t)blockIdx.x * warps + threadIdx.x / 32; k < end;
         k += (int64_t)gridDim.x * warps) {
        Place x = place_of<VEC>(k, u.start, 0, n);
        Loaded<PBITS, STATE> l = load_values<PBITS, STATE, VEC>(&u, &x);
        float p[2][4], m[2][4], v[2][4];
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if constexpr (PBITS == 32) p[h][i] = f32_from_bits(l.p[h].v[i]);
                else p[h][i] = bf16_of(l.p[h], i);
            }
            update_group<STATE>(p[h], m[h], v[h], &l, h, x.have[h], &maps, &step);
        }
        store_moment<STATE, VEC>(u.m, &x, m, &maps.m);
        store_moment<STATE, VEC>(u.v, &x, v, &maps.v);
        if constexpr (PBITS == 32) {
#pragma unroll
            for (int h = 0; h < 2; h++)
                store_group<32, VEC>(u.p.data, x.at[h], x.have[h], group_of(p[h]));
        } else {
            // A Philox block serves the groups of two neighbours. The even one makes that of their first groups, the
            // odd one that of their second, and each gives the other what is its.
            uint32_t bits[2][2] = {};
            if (stochastic) {
                int odd = lane & 1;
                Philox r = philox(seed, stream, (uint64_t)(k * 32 + odd * 16 + lane / 2));
#pragma unroll
                for (int w = 0; w < 2; w++) {
                    uint32_t mine = odd ? r.v[2 + w] : r.v[w];
                    uint32_t other = __shfl_xor_sync(FULL_WARP, odd ? r.v[w] : r.v[2 + w], 1);
                    bits[0][w] = odd ? other : mine;
                    bits[1][w] = odd ? mine : other;
                }
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                Group<16> q = {};
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    uint32_t word = bits[h][i / 2];
                    bf16 b = stochastic ? bf16_stochastic(p[h][i], i % 2 ? word >> 16 : word & 0xffffu)
                                        : bf16_from_f32(p[h][i]);
                    q.v[i / 2] |= (uint32_t)b << i % 2 * 16;
                }
                store_group<16, VEC>(u.p.data, x.at[h], x.have[h], q);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------
// INT8 parameters.

// Rows of a tile. kept: shared memory holds its values; magic = 2^32 / cols, rounded up, then divides by cols.
struct Tiles { int64_t rows; bool kept; uint64_t magic; };

// The row of a tile that value `at` of it lies in. Where values are kept, at * cols < 2^32.
static __device__ __forceinline__ int tile_row(const Tiles *t, int64_t at, int64_t cols) {
    if (t->rows == 1) return 0;
    return t->kept ? (int)((uint64_t)(uint32_t)at * t->magic >> 32) : (int)(at / cols);
}

// New values of a warp's 256 from memory; `store`: their moments go back. scale: of the tile's rows, which begin at
// `begin`.
template <int STATE, bool VEC, class Maps>
static __device__ __forceinline__ void update_rows(float (&p)[2][4], const Update *u, const Tiles *t, const Place *x,
                                                   const float *scale, int64_t begin, const Maps *maps,
                                                   const LowStep *step, bool store) {
    Loaded<8, STATE> l = load_values<8, STATE, VEC>(u, x);
    float m[2][4], v[2][4];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float s = VEC && x->have[h] ? scale[tile_row(t, x->at[h] - begin, u->cols)] : 0.0f;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (!VEC && x->have[h] >> i & 1) s = scale[tile_row(t, x->at[h] + i - begin, u->cols)];
            p[h][i] = (float)(int8_t)(l.p[h].v[0] >> 8 * i) * s;
        }
        update_group<STATE>(p[h], m[h], v[h], &l, h, x->have[h], maps, step);
    }
    if (store) {
        store_moment<STATE, VEC>(u->m, x, m, &maps->m);
        store_moment<STATE, VEC>(u->v, x, v, &maps->v);
    }
}

// Adds a warp's 256 values to the ranges of their rows. All lanes call it.
template <bool VEC>
static __device__ __forceinline__ void add_rows(unsigned *amax, const float (&p)[2][4], const Place *x, const Tiles *t,
                                                int64_t begin, int64_t cols) {
    const int lane = (int)threadIdx.x & 31;
    if (t->rows == 1) {                                        // values that are not there are 0
        float a = warp_max_abs(fmaxf(max_abs(p[0]), max_abs(p[1])));
        if (lane == 0) atomicMax(amax, f32_bits(a));
        return;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if (!VEC) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (x->have[h] >> i & 1)
                    atomicMax(amax + tile_row(t, x->at[h] + i - begin, cols), f32_bits(fmaxf(0.0f, fabsf(p[h][i]))));
            continue;
        }
        int row = x->have[h] ? tile_row(t, x->at[h] - begin, cols) : -1, first = __shfl_sync(FULL_WARP, row, 0);
        float a = max_abs(p[h]);
        if (__all_sync(FULL_WARP, row == first)) {
            a = warp_max_abs(a);
            if (lane == 0 && row >= 0) atomicMax(amax + row, f32_bits(a));
        } else if (row >= 0) {
            atomicMax(amax + row, f32_bits(a));
        }
    }
}

// int8_stochastic and int8_nearest with the clamp first: its limits are whole numbers, so that changes nothing.
static __device__ __forceinline__ int8_t int8_code(float x, float inv, float uniform, bool stochastic) {
    float q = stochastic ? x * inv + uniform : x * inv;
    q = min_nan_f32(max_nan_f32(q, -128.0f), 127.0f);
    q = stochastic ? floorf(q) : rintf(q);
    return (int8_t)(q == q ? (int)q : 0);
}

template <int STATE, bool VEC>
static __global__ void __launch_bounds__(VEC ? MAX_THREADS : MAX_THREADS / 2) rows_kernel(Update u, Tiles t) {
    __shared__ typename Format<STATE>::Tables maps;
    DYN_SHARED(float, scale);                                  // of the tile's rows before the update
    unsigned *amax = (unsigned *)(scale + t.rows);             // the bits of what is not negative order as it does;
    float *inv = scale + t.rows;                               // in the same place: what values are multiplied by
    float *kept = scale + (2 * t.rows + 3) / 4 * 4;
    LowStep step;
    load_tables<STATE>(&maps);
    if (!low_begin(&step, u.state, u.h)) return;
    const bool stochastic = u.rounding == ROUND_STOCHASTIC;
    const uint64_t seed = u.state->seed, stream = rounding_stream(u.tensor, u.state->t);
    const int lane = (int)threadIdx.x & 31, warps = (int)blockDim.x / 32, warp = (int)threadIdx.x / 32;
    for (int64_t r0 = (int64_t)blockIdx.x * t.rows; r0 < u.rows; r0 += (int64_t)gridDim.x * t.rows) {
        const int nr = (int)(u.rows - r0 < t.rows ? u.rows - r0 : t.rows);
        const int64_t begin = r0 * u.cols, end = begin + nr * u.cols;
        const int64_t k0 = (u.start + begin) / 256 + warp, k1 = (u.start + end + 255) / 256;
        for (int r = (int)threadIdx.x; r < nr; r += (int)blockDim.x) {
            scale[r] = u.p.scale[r0 + r];
            amax[r] = 0;
        }
        __syncthreads();                                       // scale and amax are there
        for (int64_t k = k0; k < k1; k += warps) {
            Place x = place_of<VEC>(k, u.start, begin, end);
            float p[2][4];
            update_rows<STATE, VEC>(p, &u, &t, &x, scale, begin, &maps, &step, t.kept);
            if (t.kept)
#pragma unroll
                for (int h = 0; h < 2; h++)
                    store_group<32, VEC>(kept, x.at[h] - begin, x.have[h], group_of(p[h]));
            add_rows<VEC>(amax, p, &x, &t, begin, u.cols);
        }
        __syncthreads();                                       // amax is complete
        for (int r = (int)threadIdx.x; r < nr; r += (int)blockDim.x) {
            float s = int8_row_scale(f32_from_bits(amax[r]));
            u.p.scale[r0 + r] = s;
            inv[r] = int8_row_inv(s);
        }
        __syncthreads();                                       // inv is there
        for (int64_t k = k0; k < k1; k += warps) {
            Place x = place_of<VEC>(k, u.start, begin, end);
            float p[2][4];
            if (t.kept) {                                      // what this thread has left there
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    Group<32> f = load_group<32, VEC>(kept, x.at[h] - begin, x.have[h]);
#pragma unroll
                    for (int i = 0; i < 4; i++) p[h][i] = f32_from_bits(f.v[i]);
                }
            } else {
                update_rows<STATE, VEC>(p, &u, &t, &x, scale, begin, &maps, &step, true);
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                Philox random = {};
                if (stochastic) random = philox(seed, stream, (uint64_t)(k * 64 + h * 32 + lane));
                float by = VEC && x.have[h] ? inv[tile_row(&t, x.at[h] - begin, u.cols)] : 0.0f;
                Group<8> q = {};
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    if (!VEC && x.have[h] >> i & 1) by = inv[tile_row(&t, x.at[h] + i - begin, u.cols)];
                    int8_t code = int8_code(p[h][i], by, philox_uniform(random.v[i]), stochastic);
                    q.v[0] |= (uint32_t)(uint8_t)code << 8 * i;
                }
                store_group<8, VEC>(u.p.data, x.at[h], x.have[h], q);
            }
        }
        __syncthreads();                                       // nobody reads scale and inv any more
    }
}

// ---------------------------------------------------------------------------------------------
// Rows of floats to INT8: a warp a row, which is read twice, the second time from cache. 4 + 1 bytes a weight (2 + 1).

template <class T, int V>
static __global__ void __launch_bounds__(FLAT_THREADS)
int8_rows_kernel(int8_t *codes, float *scale, const T *from, int64_t rows, int64_t cols) {
    const int lane = (int)threadIdx.x & 31, warps = FLAT_THREADS / 32;
    for (int64_t r = (int64_t)blockIdx.x * warps + threadIdx.x / 32; r < rows; r += (int64_t)gridDim.x * warps) {
        const T *row = from + r * cols;
        float a = 0.0f;
        for (int64_t c = lane * V; c < cols; c += 32 * V) {
            Vec<T, V> x = vec_load<T, V>(row + c);
            for (int i = 0; i < V; i++) a = fmaxf(a, fabsf(to_f32(x.v[i])));
        }
        float s = int8_row_scale(warp_max_abs(a)), inv = int8_row_inv(s);
        if (lane == 0) scale[r] = s;
        for (int64_t c = lane * V; c < cols; c += 32 * V) {
            Vec<T, V> x = vec_load<T, V>(row + c);
            Vec<int8_t, V> q;
            for (int i = 0; i < V; i++) q.v[i] = int8_code(to_f32(x.v[i]), inv, 0.0f, false);
            vec_store(codes + r * cols + c, q);
        }
    }
}

template <int V>
static __global__ void __launch_bounds__(FLAT_THREADS) widen_kernel(float *out, const bf16 *in, size_t n) {
    constexpr int W = V < 4 ? V : 4;
    size_t id = (size_t)blockIdx.x * FLAT_THREADS + threadIdx.x, vectors = n / V;
    for (size_t i = id; i < vectors; i += (size_t)gridDim.x * FLAT_THREADS) {
        Vec<bf16, V> x = vec_load<bf16, V>(in + i * V);
        for (int j = 0; j < V; j += W) {
            Vec<float, W> f;
            for (int w = 0; w < W; w++) f.v[w] = bf16_to_f32(x.v[j + w]);
            vec_store(out + i * V + j, f);
        }
    }
    if (id < n - vectors * V) out[vectors * V + id] = bf16_to_f32(in[vectors * V + id]);
}

// ---------------------------------------------------------------------------------------------
// Launching.

template <int PBITS, int STATE> static void launch_flat(const Update *u, bool vec) {
    int64_t n = u->rows * u->cols, blocks = (u->start + n + 255) / 256 - u->start / 256;
    unsigned grid = grid_for(((size_t)blocks + FLAT_THREADS / 32 - 1) / (FLAT_THREADS / 32));
    auto kernel = vec ? flat_kernel<PBITS, STATE, true> : flat_kernel<PBITS, STATE, false>;
    LAUNCH(kernel, grid, FLAT_THREADS, 0, cuda_stream)(*u);
}

// Bytes of dynamic shared memory that a kernel with `fixed` bytes of its own may ask for.
static size_t shared_limit(size_t fixed) {
    int device = 0, most = 48 << 10;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return (size_t)most - fixed;
}

template <int STATE> static void launch_rows(const Update *u, bool vec) {
    const int64_t unit = state_unit((StateFormat)STATE, u->cols);
    int64_t units = TILE_VALUES / (unit * u->cols);
    if (units > TILE_ROWS / unit) units = TILE_ROWS / unit;
    if (units < 1) units = 1;
    Tiles t = {units * unit < u->rows ? units * unit : u->rows, true, 0};
    const size_t values = (size_t)(t.rows * u->cols), rows = (size_t)(2 * t.rows + 3) / 4 * 4;
    t.magic = (((uint64_t)1 << 32) + (uint64_t)u->cols - 1) / (uint64_t)u->cols;
    // A kilobyte for what the kernel and the driver have of their own.
    const size_t limit = shared_limit(sizeof(typename Format<STATE>::Tables) + 1024);
    t.kept = (rows + values) * sizeof(float) <= limit;
    const size_t bytes = (rows + (t.kept ? values : 0)) * sizeof(float);
    const unsigned threads = values <= 8192 ? 256 : values <= 16384 || !vec ? MAX_THREADS / 2 : MAX_THREADS;
    auto kernel = vec ? rows_kernel<STATE, true> : rows_kernel<STATE, false>;
    static_assert(sizeof(typename Format<STATE>::Tables) <= 16 << 10, "what allow_shared leaves for static memory");
    if (!allow_shared(kernel, bytes)) return;
    LAUNCH(kernel, grid_for((size_t)((u->rows + t.rows - 1) / t.rows)), threads, bytes, cuda_stream)(*u, t);
}

template <int STATE> static void launch_update(const Update *u, bool vec) {
    if (u->p.format == PARAM_INT8) launch_rows<STATE>(u, vec);
    else if (u->p.format == PARAM_BF16) launch_flat<16, STATE>(u, vec);
    else if constexpr (STATE != STATE_F32) launch_flat<32, STATE>(u, vec);
}

// Bytes that four values take, which is what a group must be aligned to.
static size_t state_group_bytes(StateFormat f) { return state_data_bytes(f, 4); }

void cuda_adamw_low(StoredParam p, StoredState m, StoredState v, floatX *work, float *wscale, const float *grad,
                    const StepState *state, const AdamWParams *h, const QuantSpec *wq, Rounding rounding, int tensor,
                    int64_t row0, int64_t rows, int64_t cols) {
    if (rows <= 0 || cols <= 0) return;
    if (m.format != v.format) {
        ops_set_error(E_USAGE, "adamw_low: moments in formats %d and %d; both must be in one", (int)m.format,
                      (int)v.format);
        return;
    }
    if (p.format == PARAM_F32 && m.format == STATE_F32) {
        cuda_adamw_fq((float *)p.data, (float *)m.data, (float *)v.data, work, wscale, grad, state, h, wq, rows, cols);
        return;
    }
    const int block = state_block(m.format);
    Update u = {p, m, v, grad, state, adamw_hyper(h), rounding, tensor, row0 * cols, rows, cols};
    if (block && (u.start % block || rows * cols % block)) {
        ops_set_error(E_USAGE, "adamw_low: rows %lld to %lld of %lld columns are not whole blocks of %d; deal rows out "
                      "by state_unit", (long long)row0, (long long)(row0 + rows), (long long)cols, block);
        return;
    }
    const size_t state_bytes = state_group_bytes(m.format);
    const bool vec = (uintptr_t)grad % 16 == 0 && (uintptr_t)p.data % (4 * param_value_bytes(p.format)) == 0 &&
                     ((uintptr_t)m.data | (uintptr_t)v.data) % state_bytes == 0 && u.start % 4 == 0 && cols % 4 == 0;
    switch (m.format) {
        case STATE_F32: launch_update<STATE_F32>(&u, vec); break;
        case STATE_BF16: launch_update<STATE_BF16>(&u, vec); break;
        case STATE_INT8: launch_update<STATE_INT8>(&u, vec); break;
        case STATE_INT4: launch_update<STATE_INT4>(&u, vec); break;
        case STATE_FP8: launch_update<STATE_FP8>(&u, vec); break;
    }
    if (work) stored_weight_fq(work, wscale, p, state, wq, rows, cols);
}

template <class T>
static void launch_int8_rows(int8_t *codes, float *scale, const T *from, int64_t rows, int64_t cols) {
    const bool vec = (uintptr_t)from % (4 * sizeof(T)) == 0 && (uintptr_t)codes % 4 == 0 && cols % 4 == 0;
    auto kernel = vec ? int8_rows_kernel<T, 4> : int8_rows_kernel<T, 1>;
    LAUNCH(kernel, grid_for(((size_t)rows + FLAT_THREADS / 32 - 1) / (FLAT_THREADS / 32)), FLAT_THREADS, 0, cuda_stream)
        (codes, scale, from, rows, cols);
}
void cuda_int8_rows(int8_t *codes, float *scale, StoredParam from, int64_t rows, int64_t cols) {
    if (rows <= 0 || cols <= 0) return;
    if (from.format == PARAM_F32) launch_int8_rows(codes, scale, (const float *)from.data, rows, cols);
    else if (from.format == PARAM_BF16) launch_int8_rows(codes, scale, (const bf16 *)from.data, rows, cols);
    else ops_set_error(E_USAGE, "int8_rows: rows in format %d; they must be f32 or bf16", (int)from.format);
}

void cuda_widen(float *out, const bf16 *in, size_t n) {
    if (n == 0) return;
    const bool vec = ((uintptr_t)out | (uintptr_t)in) % 16 == 0;
    auto kernel = vec ? widen_kernel<8> : widen_kernel<1>;
    const unsigned grid = grid_for((n / (vec ? 8 : 1) + FLAT_THREADS) / FLAT_THREADS);
    LAUNCH(kernel, grid, FLAT_THREADS, 0, cuda_stream)(out, in, n);
}
