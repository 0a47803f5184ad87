// The operations between ranks: all ranks' parts on one device, against the CPU wing, bit for bit.
#include <algorithm>
#include "cuda_test.h"

// Calls an operation that may have nothing to do, and must not launch a kernel then.
#define MAYBE(nothing, name, ...) \
    do { \
        size_t maybe_before = kernels_launched(); \
        if (!(nothing)) OP(name)(__VA_ARGS__); \
        else ops_cuda.name(__VA_ARGS__); \
        CHECK(!(nothing) || !counts_launches || kernels_launched() == maybe_before, "a launch for nothing"); \
    } while (0)
#ifdef __CUDACC__
static const bool counts_launches = false;
#else
static const bool counts_launches = true;
#endif

static int64_t rows_in_window(const RowSplit *s, int r, int64_t k0, int64_t kn) {
    return std::max((int64_t)0, std::min(kn, split_count(s, r) - k0));
}
static bool nobody(const RowSplit *s, int64_t k0) { return k0 >= split_most(s); }

// Windows of a split: one that holds all, and two or more, the last of which may go beyond what any rank has.
static std::vector<int64_t> windows(const RowSplit *s) {
    int64_t most = split_most(s), part = s->unit * ((most / s->unit + 2) / 2);
    std::vector<int64_t> kn = {most};
    if (part < most) kn.push_back(part);
    return kn;
}

static void check_bytes(const char *what, const char *where, const std::vector<uint8_t> &got,
                        const std::vector<uint8_t> &want) {
    size_t i = 0;
    while (i < want.size() && got[i] == want[i]) i++;
    CHECK(i == want.size(), "%s, %s: byte %zu of %zu is %02x, expected %02x", where, what, i, want.size(),
          i < want.size() ? got[i] : 0, i < want.size() ? want[i] : 0);
}

// ---------------------------------------------------------------------------------------------

CUDA_TEST(rows_between_ranks) {
    // Rows of 1, 2, 4, 8 and 16 bytes' alignment; pieces of more than one turn of a block.
    const size_t row_bytes[] = {2, 6, 20, 24, 37, 96, 1040};
    const int ranks[] = {1, 2, 3, 8};
    for (size_t bytes : row_bytes)
        for (int R : ranks)
            for (int unit = 1; unit <= 3; unit += 2) {
                RowSplit split = {(bytes == 2 ? 1205 : 21) * unit, unit, R, R * 2 / 3};
                // As far from alignment as the rows allow.
                size_t offset = unit == 3 ? bytes & (~bytes + 1) & 15 : 0, n = (size_t)split.rows * bytes;
                std::vector<uint8_t> tensor(n);
                for (size_t i = 0; i < n; i++) tensor[i] = (uint8_t)philox(7, 80, i).v[0];
                for (int64_t kn : windows(&split))
                    for (int order = 0; order < ORDERS; order++) {
                        set_order(order);
                        char where[96];
                        snprintf(where, sizeof where, "%zu bytes R=%d unit=%d kn=%lld order=%d", bytes, R, unit,
                                 (long long)kn, order);
                        size_t stride = ((size_t)kn * bytes + 15) / 16 * 16 + (unit == 3 ? 16 : 0);
                        Device<uint8_t> from(tensor, offset), to(n, offset);
                        std::vector<uint8_t> back(n, 0xff);
                        for (int64_t k0 = 0; k0 < split_most(&split) + (order ? 0 : kn); k0 += kn) {
                            Device<uint8_t> wire((size_t)R * stride, offset);
                            std::vector<uint8_t> want((size_t)R * stride, 0xff);
                            MAYBE(nobody(&split, k0), rows_pack, wire.p, stride, from.p, &split, k0, kn, bytes);
                            ops_cpu.rows_pack(want.data(), stride, tensor.data(), &split, k0, kn, bytes);
                            check_bytes("wire", where, wire.host(), want);
                            MAYBE(nobody(&split, k0), rows_unpack, to.p, wire.p, stride, &split, k0, kn, bytes);
                            ops_cpu.rows_unpack(back.data(), want.data(), stride, &split, k0, kn, bytes);
                            check_bytes("unpacked", where, to.host(), back);
                        }
                        check_bytes("all rows", where, to.host(), tensor);
                    }
            }
}

CUDA_TEST(sum_ranks) {
    const size_t lengths[] = {1, 3, 64, 1027};
    const int ranks[] = {1, 2, 3, 5, 8, 17, 300};
    for (size_t n : lengths)
        for (int R : ranks) {
            if (R == 300 && n != 64) continue;
            for (int variant = 0; variant < 4; variant++) {     // 0 aligned, 1 odd stride, 2 odd out, 3 odd in
                size_t stride = variant == 1 ? n + 1 : (n + 3) / 4 * 4 + 4;
                std::vector<float> in(stride * (size_t)R), start(n);
                for (size_t i = 0; i < in.size(); i++) in[i] = uniform(81, i) * (i % 7 == 3 ? 1e8f : 1.0f);
                for (size_t i = 0; i < n; i++) start[i] = uniform(82, i);
                for (size_t r = 0; r < (size_t)R; r++) {
                    if (n > 2) in[r * stride + 2] = start[2] = -0.0f;
                    if (n > 20) in[r * stride + 20] = r % 2 ? -INFINITY : INFINITY;
                    if (n > 21) in[r * stride + 21] = 3e38f;
                }
                for (int accumulate = 0; accumulate < 2; accumulate++) {
                    std::vector<float> want = start;
                    ops_cpu.sum_ranks(want.data(), in.data(), stride, R, n, accumulate);
                    for (int order = 0; order < ORDERS; order++) {
                        set_order(order);
                        char where[96];
                        snprintf(where, sizeof where, "n=%zu R=%d variant=%d accumulate=%d order=%d", n, R, variant,
                                 accumulate, order);
                        Device<float> out(start, variant == 2), din(in, variant == 3);
                        OP(sum_ranks)(out.p, din.p, stride, R, n, (bool)accumulate);
                        check_same("sum", where, out.host(), want);
                    }
                }
            }
        }
    Device<float> out(1), in(1);
    MAYBE(true, sum_ranks, out.p, in.p, 1, 1, 0, false);
}

CUDA_TEST(state_sum) {
    const int ranks[] = {1, 2, 3, 8, 128, 129, 300};
    for (int R : ranks) {
        std::vector<StepState> all((size_t)R);
        memset(all.data(), 0, all.size() * sizeof(StepState));
        for (size_t r = 0; r < all.size(); r++) {
            all[r].loss_sum = (double)uniform(83, r) * (r % 5 == 2 ? 1e16 : 1.0);
            all[r].grad_squares = 1.0 + (double)uniform(84, r);
            all[r].tokens = (int64_t)r << 33 | 5;
            all[r].stop = r % 3 == 1 ? 1 << r % 31 : 0;
        }
        StepState state = {}, want;
        state.t = 3; state.lr = 0.5f; state.grad_scale = 2.0f; state.norm = 4.0f; state.skip = 1; state.seed = 11;
        state.loss_sum = state.grad_squares = 1e9;
        state.tokens = 1 << 20;
        state.stop = 1 << 30;
        want = state;
        ops_cpu.state_sum(&want, all.data(), R);
        for (int order = 0; order < ORDERS; order++) {
            set_order(order);
            Device<StepState> dstate(std::vector<StepState>(1, state)), dall(all);
            OP(state_sum)(dstate.p, dall.p, R);
            StepState got = dstate.host()[0];
            CHECK(got.loss_sum == want.loss_sum && got.grad_squares == want.grad_squares && got.tokens == want.tokens &&
                  got.stop == want.stop, "R=%d order=%d: %.17g %.17g %lld %d, expected %.17g %.17g %lld %d", R, order,
                  got.loss_sum, got.grad_squares, (long long)got.tokens, got.stop, want.loss_sum, want.grad_squares,
                  (long long)want.tokens, want.stop);
            CHECK(got.t == 3 && got.lr == 0.5f && got.grad_scale == 2.0f && got.norm == 4.0f && got.skip == 1 &&
                  got.seed == 11, "the rest stays");
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Weights. Groups of whole eights in teams of every size; longer ones; rows short, long, odd and longer than shared
// memory; groups that end within a byte or within eight; blocks of rows; one scale for all.
static const struct { const char *spec; int rows, cols; } cases[] = {
    {"int4,group=32,symmetric", 37, 96}, {"int8,group=16,symmetric-no-clip", 19, 80},
    {"uint4,group=64,float", 13, 192}, {"uint4,group=32,asymmetric", 17, 64}, {"int3,group=32", 13, 64},
    {"int4,group=48", 9, 144}, {"int4,group=8", 11, 24}, {"uint8,group=256,float", 4, 512},
    {"uint5,group=40,asymmetric", 9, 120}, {"int4,group=512", 5, 1024},
    {"int8,channel", 29, 64}, {"int8,channel", 11, 33}, {"int8,channel,symmetric-no-clip", 3, 2056},
    {"int4,channel", 10, 576}, {"uint4,channel,float", 9, 301}, {"uint8,channel,asymmetric", 7, 260},
    {"int3,channel", 8, 45}, {"int8,channel", 1, 1}, {"int8,channel,range=-127..127", 2, 50000},
    {"int7,channel", 1, 50001},
    {"int4,group=7", 11, 21}, {"int2,group=2", 9, 14}, {"int6,group=30,asymmetric", 5, 90},
    {"uint2,group=9,float", 7, 63},
    {"int5,block=2x16", 26, 48}, {"uint6,block=3x7,asymmetric", 24, 35}, {"uint4,block=32x32,float", 96, 96},
    {"int8,block=4x1", 20, 9},
    {"int8,tensor", 7, 33}, {"uint8,tensor,asymmetric", 40, 260}, {"uint4,tensor,float", 16, 100},
    {"int3,tensor", 5, 13}};

// Of weights, and where `odd`, of zeros, subnormals, infinities and NaN.
static std::vector<float> weights(size_t n, bool odd) {
    std::vector<float> v(n);
    for (size_t i = 0; i < n; i++) {
        v[i] = 0.05f * uniform(85, i);
        if (odd && i / 40 % 5 == 1) v[i] = i % 3 ? 0.0f : -0.0f;
        if (odd && i / 40 % 5 == 2) v[i] *= 1e-38f;
        if (odd && i / 40 % 5 == 3 && i % 17 == 0) v[i] = NAN;
        if (odd && i / 40 % 25 == 4 && i % 32 == 11) v[i] = i % 64 > 32 ? INFINITY : -INFINITY;
        if (odd && i / 40 % 25 == 9) v[i] *= 3e38f;
    }
    return v;
}

// Processors differ in the NaN they make: all scales and zero points that are one become the same.
static std::vector<uint8_t> one_nan(std::vector<uint8_t> wire, size_t stride, const QuantSpec *s, QuantWire at) {
    size_t end = s->zero == QZ_FLOAT ? at.bytes : at.zero;
    for (size_t part = 0; part < wire.size(); part += stride)
        for (size_t i = part + at.scale; i < part + end; i += 2) {
            bf16 h, nan = 0x7fc0;
            memcpy(&h, &wire[i], 2);
            if (bf16_to_f32(h) != bf16_to_f32(h)) memcpy(&wire[i], &nan, 2);
        }
    return wire;
}

// Variants: 1 masters and working values unaligned, no row scales; 2 odd values; 3 all rows at once.
static void check_weights(const char *text, int64_t rows, int64_t cols, int R, int variant, int orders) {
    QuantSpec s = spec(text, false);
    int64_t block[2];
    Err err;
    if (quant_block_shape(&s, rows, cols, block, &err) < 0) {
        CHECK(false, "%s", err.text);
        return;
    }
    RowSplit split = {rows, block[0], R, R * 2 / 3};
    size_t n = (size_t)(rows * cols), offset = variant == 1;
    bool scales = variant != 1;
    std::vector<float> master = weights(n, variant == 2), wscale((size_t)rows);
    std::vector<floatX> work(n);
    ops_cpu.weight_fq(work.data(), wscale.data(), master.data(), &s, rows, cols);
    Device<float> dmaster(master, offset);
    for (int64_t kn : windows(&split)) {
        if (variant == 3 && kn < split_most(&split)) continue;
        QuantWire at = quant_wire_layout(&s, kn, cols, block);
        size_t stride = at.bytes + (variant == 2 ? 16 : 0);
        for (int order = 0; order < orders; order++) {
            set_order(order);
            char where[128];
            snprintf(where, sizeof where, "%s %lldx%lld R=%d kn=%lld variant=%d order=%d", text, (long long)rows,
                     (long long)cols, R, (long long)kn, variant, order);
            Device<floatX> dwork(n, offset);
            Device<float> dscale((size_t)rows);
            for (int64_t k0 = 0; k0 < split_most(&split) + kn; k0 += kn) {
                Device<uint8_t> wire((size_t)R * stride);
                std::vector<uint8_t> want((size_t)R * stride, 0xff);
                for (int r = 0; r < R; r++) {
                    int64_t mine = rows_in_window(&split, r, k0, kn);
                    size_t first = mine ? (size_t)((split_begin(&split, r) + k0) * cols) : 0, part = (size_t)r * stride;
                    MAYBE(mine == 0, weight_pack, wire.p + part, dmaster.p + first, &s, mine, cols, kn);
                    if (mine) ops_cpu.weight_pack(want.data() + part, master.data() + first, &s, mine, cols, kn);
                }
                check_bytes("wire", where, one_nan(wire.host(), stride, &s, at), one_nan(want, stride, &s, at));
                MAYBE(nobody(&split, k0), weight_unpack, dwork.p, scales ? dscale.p : nullptr, wire.p, stride, &split,
                      k0, kn, &s, cols);
            }
            check_same("work", where, dwork.host(), work);
            if (scales) check_same("wscale", where, dscale.host(), wscale);
        }
    }
}

CUDA_TEST(weights_between_ranks) {
    const int ranks[] = {1, 2, 3, 8};
    for (auto &c : cases)
        for (int R : ranks)
            for (int variant = 0; variant < 3; variant++) {
                if (c.cols > 5000 && (R > 2 || variant == 0)) continue;
                bool often = (size_t)c.rows * (size_t)c.cols < 4000 && R == 3;
                check_weights(c.spec, c.rows, c.cols, R, variant, often ? ORDERS : 1 + (variant == 0));
            }
}

// A window of some rows, not all of them in turn: those of other rows stay as they were, and the CPU wing agrees.
CUDA_TEST(ranks_window) {
    QuantSpec s = spec("int4,group=32", false);
    RowSplit split = {23, 1, 3, 1};
    const int64_t cols = 64, block[2] = {1, 32}, k0 = 2, kn = 3;
    size_t n = (size_t)(split.rows * cols), stride = quant_wire_layout(&s, kn, cols, block).bytes;
    std::vector<float> master = weights(n, false), wscale((size_t)split.rows, -7.0f);
    std::vector<floatX> work(n, f2x(-7.0f));
    std::vector<uint8_t> wire(3 * stride, 0xff);
    Device<uint8_t> dwire(wire);
    Device<floatX> dwork(work);
    Device<float> dscale(wscale), dmaster(master);
    for (int r = 0; r < 3; r++) {
        int64_t first = (split_begin(&split, r) + k0) * cols;
        OP(weight_pack)(dwire.p + (size_t)r * stride, dmaster.p + first, &s, kn, cols, kn);
        ops_cpu.weight_pack(wire.data() + (size_t)r * stride, master.data() + first, &s, kn, cols, kn);
    }
    OP(weight_unpack)(dwork.p, dscale.p, dwire.p, stride, &split, k0, kn, &s, cols);
    ops_cpu.weight_unpack(work.data(), wscale.data(), wire.data(), stride, &split, k0, kn, &s, cols);
    check_same("work", "a window", dwork.host(), work);
    check_same("wscale", "a window", dscale.host(), wscale);
    CHECK(wscale[0] == -7.0f && wscale[1] == -7.0f && wscale[2] != -7.0f, "the window begins at a rank's third row");
}

// As many ranks as there may be, most of them without rows.
CUDA_TEST(many_ranks) {
    check_weights("int8,channel", 5, 8, 1024, 0, 1);
    check_weights("int8,tensor", 3, 16, 1000, 0, 1);
    RowSplit split = {1500, 1, 1024, 1000};
    std::vector<uint8_t> tensor(1500 * 4);
    for (size_t i = 0; i < tensor.size(); i++) tensor[i] = (uint8_t)philox(7, 86, i).v[0];
    Device<uint8_t> from(tensor), to(tensor.size()), wire(1024 * 16);
    OP(rows_pack)(wire.p, (size_t)16, from.p, &split, (int64_t)0, (int64_t)2, (size_t)4);
    std::vector<uint8_t> want(1024 * 16, 0xff);
    ops_cpu.rows_pack(want.data(), 16, tensor.data(), &split, 0, 2, 4);
    check_bytes("wire", "1024 ranks", wire.host(), want);
    OP(rows_unpack)(to.p, wire.p, (size_t)16, &split, (int64_t)0, (int64_t)2, (size_t)4);
    check_bytes("rows", "1024 ranks", to.host(), tensor);
}

#ifndef __SANITIZE_ADDRESS__            // millions of accesses
// More than all blocks take in one turn (grid_for).
CUDA_TEST(between_ranks_large) {
    if (small_run()) return;
    check_weights("int4,group=136", 2113, 1088, 1, 3, 1);
    check_weights("int4,group=3", 2060, 1032, 1, 3, 1);
    RowSplit split = {2100000, 1, 1, 0};
    std::vector<uint8_t> tensor(2 * 2100000);
    for (size_t i = 0; i < tensor.size(); i++) tensor[i] = (uint8_t)(i * 2654435761u >> 13);
    Device<uint8_t> from(tensor), wire(tensor.size());
    OP(rows_pack)(wire.p, tensor.size(), from.p, &split, (int64_t)0, split.rows, (size_t)2);
    check_bytes("rows", "two bytes a row", wire.host(), tensor);
    const size_t n = 530000;
    std::vector<float> in(2 * n + 1), want(n);
    for (size_t i = 0; i < in.size(); i++) in[i] = (float)(i % 977) * 0.25f;
    ops_cpu.sum_ranks(want.data(), in.data(), n + 1, 2, n, false);
    Device<float> din(in), out(n);
    OP(sum_ranks)(out.p, din.p, n + 1, 2, n, false);
    check_same("sum", "one value a turn", out.host(), want);
}
#endif
