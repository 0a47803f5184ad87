// Sharding by rows: who holds what, what a chunk on the wire is, and, on one rank that sends everything to itself, that
// gathered weights and summed gradients are what they are without sharding. test_mpi.sh does it on several ranks.
#include "test_common.h"
#include <stdlib.h>
#include <string.h>
#include "device.h"
#include "rng.h"
#include "shard.h"
#include "store.h"

typedef struct { LlamaConfig c; QuantPlan plan; ParamTable table; } Model;

static void make_model(Model *m, const char *shape, const char *scheme, const char *weight, const char *embedding,
                       const char *head, const char *rule) {
    Err err;
    assert_int_equal(llama_config_named(&m->c, shape, &err), 0);
    assert_int_equal(quant_plan_from_options(&m->plan, NULL, scheme, weight, NULL, embedding, head, &rule, rule != NULL,
                                             &err), 0);
    assert_int_equal(param_table_build(&m->table, &m->c, &m->plan, &err), 0);
}

static const struct { const char *shape, *scheme, *weight, *embedding, *head, *rule; } models[] = {
    {"tiny", "none", NULL, NULL, NULL, NULL},
    {"tiny-untied", "8da4w-32", NULL, NULL, NULL, NULL},
    {"tiny", "int8wo", NULL, "int4,group=32", "int8,channel", NULL},
    {"tiny-untied", NULL, "int5,block=2x16,asymmetric", "int8,channel", NULL, NULL},
    {"tiny", NULL, "int8,tensor,symmetric", "int4,block=3x32", "int8,block=2x16", NULL},
    {"tiny", "int4wo-32", NULL, NULL, NULL, NULL},
    {"tiny", "int8wo", NULL, NULL, NULL, "*layers.1.self_attn.k_proj*=none"},
    {"tiny-untied", "int8wo", NULL, NULL, NULL, "*.up_proj*=int4wo-32"},
    {"tiny", "int8qt", NULL, NULL, NULL, NULL},
    {"tiny-untied", "int8qt", NULL, NULL, NULL, NULL},
    {"tiny", "int8qt", NULL, NULL, "int8,channel,rows", "*layers.1.mlp.down_proj*=none"},
    {"tiny", "int8qt", NULL, "int4,group=32", "int8,channel,rows", "*layers.0.self_attn.?_proj*=int8wo"},
};
#define N_MODELS ((int)(sizeof models / sizeof *models))
static void make(Model *m, int i) {
    make_model(m, models[i].shape, models[i].scheme, models[i].weight, models[i].embedding, models[i].head,
               models[i].rule);
}

// Every row of every tensor belongs to one rank, in rank order, and no block of a scale to two.
static void test_rows_are_dealt_out(void **state) {
    (void)state;
    for (int k = 0; k < N_MODELS; k++) {
        Model m;
        Err err;
        make(&m, k);
        for (int R = 1; R <= 9; R++) {
            int64_t *next = xcalloc((size_t)m.table.n, sizeof *next), smallest = INT64_MAX, largest = 0;
            for (int r = 0; r < R; r++) {
                OwnTable o;
                assert_int_equal(own_table_build(&o, &m.table, &m.plan.tied_head, R, r, false, &err), 0);
                for (int i = 0; i < m.table.n; i++) {
                    const Param *p = &o.held.p[i];
                    int64_t block[2] = {1, 1};
                    if (p->scheme.weight.bits)
                        assert_int_equal(quant_block_shape(&p->scheme.weight, m.table.p[i].rows, p->cols, block, &err),
                                         0);
                    assert_int_equal(o.row0[i], next[i]);
                    assert_int_equal(p->rows % block[0], 0);
                    assert_true(p->offset % 16 == 0 && p->offset + (size_t)(p->rows * p->cols) <= o.held.n_elements);
                    next[i] += p->rows;
                }
                if ((int64_t)o.held.n_params < smallest) smallest = (int64_t)o.held.n_params;
                if ((int64_t)o.held.n_params > largest) largest = (int64_t)o.held.n_params;
                own_table_free(&o);
            }
            for (int i = 0; i < m.table.n; i++) assert_int_equal(next[i], m.table.p[i].rows);
            // Ranks differ by at most a unit of each tensor; where units are rows, by little.
            if (k < 2) assert_true(largest - smallest <= (int64_t)m.table.n * 192);
            free(next);
        }
        param_table_free(&m.table);
    }
}

// Blocks that share a scale of moments stay on one rank too, in tensors of any width.
static void test_blocks_of_moments(void **state) {
    (void)state;
    static const StateFormat formats[] = {STATE_INT8, STATE_INT4, STATE_FP8};
    for (int k = 0; k < N_MODELS; k++)
        for (int f = 0; f < 3; f++) {
            Model m;
            Err err;
            make(&m, k);
            param_table_formats(&m.table, PARAM_BF16, formats[f]);
            int blocked = 0;
            for (int R = 1; R <= 5; R++) {
                int64_t *next = xcalloc((size_t)m.table.n, sizeof *next);
                for (int r = 0; r < R; r++) {
                    OwnTable o;
                    assert_int_equal(own_table_build(&o, &m.table, &m.plan.tied_head, R, r, false, &err), 0);
                    for (int i = 0; i < m.table.n; i++) {
                        const Param *p = &o.held.p[i];
                        int block = state_block(p->state);
                        assert_int_equal(o.row0[i], next[i]);
                        next[i] += p->rows;
                        assert_int_equal(p->state, m.table.p[i].state);
                        if (!block) continue;
                        blocked++;
                        assert_int_equal(o.row0[i] * p->cols % block, 0);
                        assert_int_equal(p->rows * p->cols % block, 0);
                    }
                    own_table_free(&o);
                }
                for (int i = 0; i < m.table.n; i++) assert_int_equal(next[i], m.table.p[i].rows);
                free(next);
            }
            assert_true(blocked > 0);
            param_table_free(&m.table);
        }
}

// One linear cannot read codes and values.
static void test_fused_linears_are_of_one_kind(void **state) {
    (void)state;
    static const struct { const char *rule, *word; } bad[] = {
        {"*layers.1.self_attn.k_proj*=none", "layers.1.self_attn.k_proj"},
        {"*layers.0.self_attn.v_proj*=int8wo", "layers.0.self_attn.v_proj"},
        {"*.gate_proj*=int4wo-32", "layers.0.mlp.gate_proj"},
    };
    for (int k = 0; k < 3; k++) {
        Model m;
        Err err;
        Shard s;
        make_model(&m, "tiny", "int8qt", NULL, NULL, NULL, bad[k].rule);
        param_table_formats(&m.table, PARAM_BF16, STATE_F32);
        assert_int_equal(shard_plan(&s, &m.c, &m.plan, &m.table, SHARD_NONE, true, 1, 0, &err), E_USAGE);
        if (!strstr(err.text, bad[k].word)) fail_msg("%s", err.text);
        param_table_free(&m.table);
    }
}

// INT8 rows: a code a value and four bytes a row, half of bf16 but for those, under either way of gathering; gradients
// and norms as ever.
static void test_bytes_of_int8_rows(void **state) {
    (void)state;
    Model m, plain;
    Err err;
    make_model(&m, "1M", "int8qt", NULL, NULL, NULL, NULL);
    make_model(&plain, "1M", "none", NULL, NULL, NULL, NULL);
    param_table_formats(&m.table, PARAM_BF16, STATE_F32);
    double values = 0, rows = 0;                           // of the linears of a block
    int linears = 0;
    for (int i = 0; i < m.table.n; i++)
        if (m.table.p[i].layer == 0 && m.table.p[i].decay) {
            assert_int_equal(m.table.p[i].format, PARAM_INT8);
            values += (double)m.table.p[i].rows * (double)m.table.p[i].cols;
            rows += (double)m.table.p[i].rows;
            linears++;
        }
    for (int R = 1; R <= 4; R++)
        for (int level = SHARD_OPTIM; level <= SHARD_FULL; level++) {
            WireBytes wire[2], floats;
            Shard s;
            for (int quantized = 0; quantized < 2; quantized++) {
                assert_int_equal(shard_plan(&s, &m.c, &m.plan, &m.table, (ShardLevel)level, quantized, R, R - 1, &err),
                                 0);
                wire[quantized] = shard_plan_wire(&s, 1);
                if (quantized) break;
                shard_free(&s);
            }
            Shard f;
            assert_int_equal(shard_plan(&f, &plain.c, &plain.plan, &plain.table, (ShardLevel)level, true, R, R - 1,
                                        &err), 0);
            floats = shard_plan_wire(&f, 1);
            assert_true(wire[0].linears == wire[1].linears && wire[0].others == wire[1].others);
            assert_true(wire[1].others == floats.others && wire[1].gradients == floats.gradients);
            // Of each rank but one its rows, padded to those of the rank with most (a row more of each tensor at most)
            // and to 16 bytes.
            double times = level == SHARD_FULL ? 2 * m.c.L - 1 : m.c.L, most = 512, per_rank = (values + 4 * rows) / R;
            assert_true(wire[1].linears >= times * (R - 1) * per_rank);
            assert_true(wire[1].linears <= times * (R - 1) * (per_rank + linears * (most + 4 + 2 * 16)));
            if (R > 1) assert_true(wire[1].linears <= (0.5 + 2.0 / 64) * floats.linears * 2 / sizeof(floatX));
            // What is whole: codes instead of floatX, with the same row scales.
            double blocks = level == SHARD_FULL ? 1 : m.c.L, saved = f.memory.weights - s.memory.weights;
            double expected = blocks * values * (double)(sizeof(floatX) - 1);
            assert_true(saved > expected - blocks * 1024 && saved < expected + blocks * 1024);
            assert_true(s.memory.gradients == f.memory.gradients);
            shard_free(&s);
            shard_free(&f);
        }
    param_table_free(&m.table);
    param_table_free(&plain.table);
}

// Codes with bf16 scales of int4 groups of 32 are 0.28 of bf16; nothing is sent that no rank needs.
static void test_bytes_on_the_wire(void **state) {
    (void)state;
    Model m;
    Err err;
    make_model(&m, "1M", "8da4w-32", NULL, NULL, NULL, NULL);
    for (int R = 2; R <= 8; R++) {
        Shard quant, full;
        assert_int_equal(shard_plan(&quant, &m.c, &m.plan, &m.table, SHARD_FULL, true, R, R - 1, &err), 0);
        assert_int_equal(shard_plan(&full, &m.c, &m.plan, &m.table, SHARD_FULL, false, R, R - 1, &err), 0);
        WireBytes q = shard_plan_wire(&quant, 2), f = shard_plan_wire(&full, 2);
        assert_true(q.linears / f.linears <= 0.29 * 2 / sizeof(floatX));
        assert_true(q.linears / f.linears >= 0.28 * 2 / sizeof(floatX));
        assert_true(q.others == f.others && q.gradients == f.gradients);
        // Gathers of 4 blocks forward and backward twice, less what stays; of each R-1 of R parts, padded to whole
        // rows.
        double linears = 0, rows = 0;
        for (int i = 0; i < m.table.n; i++)
            if (m.table.p[i].layer == 1 && m.table.p[i].decay) {
                linears += (double)m.table.p[i].rows * (double)m.table.p[i].cols * sizeof(floatX);
                rows += R * (double)m.table.p[i].cols * sizeof(floatX);
            }
        double times = 4 * 4 - 2 - 1, share = (double)(R - 1) / R;
        assert_true(f.linears >= times * share * linears && f.linears <= times * share * (linears + rows));
        shard_free(&quant);
        shard_free(&full);
    }
    param_table_free(&m.table);
}

// State falls as 1/R; under full what is whole is embedding, head and one block.
static void test_memory(void **state) {
    (void)state;
    Model m;
    Err err;
    make_model(&m, "8B-4", "8da4w-32", NULL, NULL, NULL, NULL);
    double block = 0, ends = 0;
    for (int i = 0; i < m.table.n; i++) {
        double n = (double)m.table.p[i].rows * (double)m.table.p[i].cols;
        if (m.table.p[i].layer == 0) block += n;
        if (m.table.p[i].layer < 0) ends += n;
    }
    for (int R = 1; R <= 1024; R *= 4) {
        Shard s;
        assert_int_equal(shard_plan(&s, &m.c, &m.plan, &m.table, SHARD_FULL, true, R, 0, &err), 0);
        double n = (double)m.table.n_params;
        assert_true((double)s.own.held.n_elements <= n / R * 1.001 + 40 * 14336);
        assert_true(s.memory.weights <= (block + ends) * sizeof(floatX) * 1.01);
        assert_true(s.memory.gradients <= (block + ends) * 4 * 1.001);
        // To send and to receive: a block's gradients each; packed: own rows, and a block of floats.
        assert_true(s.memory.buffers <= 2 * block * 4 * 1.05 + block * sizeof(floatX) * 1.05 +
                                            n / R * sizeof(floatX) * 1.01 + 40 * 14336 * 4);
        shard_free(&s);
    }
    param_table_free(&m.table);
}

static void random_values(float *x, size_t n, uint64_t seed) {
    for (size_t i = 0; i < n; i++) x[i] = ((float)philox(seed, 1, i).v[0] / 4294967296.0f - 0.5f) * 0.1f;
}

// What the store is to hold of tensor i in round `round`, and, as f32, what it then stands for.
static void fill(Store *store, const Model *m, int i, int round, float *values) {
    Err err;
    const Param *p = &m->table.p[i];
    size_t n = (size_t)(p->rows * p->cols);
    random_values(values, n, (uint64_t)(100 * round + i));
    if (p->format != PARAM_INT8) {
        assert_int_equal(store_set_rows(store, i, 0, p->rows, values, &err), 0);
        for (size_t k = 0; k < n && p->format == PARAM_BF16; k++) values[k] = bf16_round(values[k]);
        return;
    }
    int8_t *codes = xcalloc(n, 1);
    float *scale = xcalloc((size_t)p->rows, 4);
    for (size_t k = 0; k < n; k++) codes[k] = (int8_t)philox(7, (uint64_t)(100 * round + i), k).v[0];
    for (int64_t r = 0; r < p->rows; r++) scale[r] = values[r] + 1;
    store_set_codes(store, i, 0, p->rows, codes, scale);
    for (size_t k = 0; k < n; k++) values[k] = (float)codes[k] * scale[k / (size_t)p->cols];
    free(codes);
    free(scale);
}

// Codes and scales that stand for `values`, and the scales that `fill` drew.
static void same_codes(const int8_t *codes, const float *scale, const float *values, int64_t rows, int64_t cols) {
    for (int64_t k = 0; k < rows * cols; k++) assert_true((float)codes[k] * scale[k / cols] == values[k]);
}

// Whole weights, after each change of the store, are those of weight_fq, or the codes; under full blocks come and go.
static void one_model_weights(Model *m, ShardLevel level, bool quantized) {
    Err err;
    Shard s;
    assert_int_equal(shard_plan(&s, &m->c, &m->plan, &m->table, level, quantized, 1, 0, &err), 0);
    assert_int_equal(shard_alloc(&s, &err), 0);
    size_t most = 0, rows = 0;
    for (int i = 0; i < m->table.n; i++) {
        size_t n = (size_t)(m->table.p[i].rows * m->table.p[i].cols);
        if (n > most) most = n;
        if ((size_t)m->table.p[i].rows > rows) rows = (size_t)m->table.p[i].rows;
    }
    Store store;
    assert_int_equal(store_plan(&store, &s, false, &err), 0);
    assert_int_equal(store_alloc(&store, &err), 0);
    float *scale = xcalloc(rows, 4), **values = xcalloc((size_t)m->table.n, sizeof *values);
    floatX *want = xcalloc(most, sizeof *want);
    for (int i = 0; i < m->table.n; i++) values[i] = xcalloc((size_t)(m->table.p[i].rows * m->table.p[i].cols), 4);
    for (int round = 0; round < 3; round++) {
        bool fq = round != 1;
        for (int i = 0; i < m->table.n; i++) fill(&store, m, i, round, values[i]);
        shard_requantize(&s, &store, fq);
        for (int pass = 0; pass < 2; pass++)
            for (int k = 0; k < m->c.L + 2; k++) {
                int l = pass ? m->c.L - k : k - 1;
                if (pass) shard_backward(&s, l, 0);
                else shard_forward(&s, l);
                for (int i = 0; i < m->table.n; i++) {
                    const Param *p = &m->table.p[i];
                    int unit = p->role == ROLE_EMBED ? SHARD_EMBED : p->layer < 0 ? m->c.L : p->layer;
                    if (unit != l) continue;
                    if (p->format == PARAM_INT8) {
                        same_codes(shard_codes(&s, i), shard_weight_scale(&s, i), values[i], p->rows, p->cols);
                        continue;
                    }
                    ops->weight_fq(want, scale, values[i], fq ? &p->scheme.weight : NULL, p->rows, p->cols);
                    assert_memory_equal(shard_weight(&s, i), want, (size_t)(p->rows * p->cols) * sizeof *want);
                    // Where one linear works as codes, others fused with it have scales too: ones.
                    bool scales = quant_works_as_codes(&p->scheme.weight) ||
                                  (p->layer >= 0 && p->decay && quant_works_as_codes(&m->plan.linear.weight) &&
                                   !quant_is_int8_rows(&m->plan.linear.weight));
                    if (scales)
                        assert_memory_equal(shard_weight_scale(&s, i), scale, (size_t)p->rows * 4);
                }
            }
        if (s.head && quant_is_int8_rows(&m->plan.tied_head)) {
            for (int64_t r = 0; r < m->c.V; r++) {
                const float *row = values[0] + r * m->c.C;
                float amax = 0;
                for (int c = 0; c < m->c.C; c++) amax = fmaxf(amax, fabsf(row[c]));
                assert_true(s.head_scale[r] == int8_row_scale(amax));
                for (int c = 0; c < m->c.C; c++)
                    assert_int_equal(shard_head_codes(&s)[r * m->c.C + c],
                                     int8_nearest(row[c], int8_row_inv(int8_row_scale(amax))));
            }
        } else if (s.head) {
            ops->weight_fq(want, scale, values[0], fq ? &m->plan.tied_head : NULL, m->c.V, m->c.C);
            assert_memory_equal(s.head, want, (size_t)m->c.V * (size_t)m->c.C * sizeof *want);
            if (s.head_scale) assert_memory_equal(s.head_scale, scale, (size_t)m->c.V * 4);
        }
    }
    for (int i = 0; i < m->table.n; i++) free(values[i]);
    free(values); free(scale); free(want);
    store_free(&store);
    shard_free(&s);
}

static void test_weights(void **state) {
    (void)state;
    for (int k = 0; k < N_MODELS; k++)
        for (int others = PARAM_F32; others <= PARAM_BF16; others++) {
            Model m;
            make(&m, k);
            param_table_formats(&m.table, (ParamFormat)others, STATE_F32);
            for (int level = SHARD_NONE; level <= SHARD_FULL; level++)
                for (int quantized = 0; quantized < 2; quantized++) one_model_weights(&m, (ShardLevel)level, quantized);
            param_table_free(&m.table);
        }
}

// bf16 parameters become working values by tiles: the same as in one piece, also in a last tile that is not full.
static void test_tiles(void **state) {
    (void)state;
    static const char *const weights[] = {"int4,group=32", "int8,channel", "int5,block=11x16,asymmetric"};
    for (int w = 0; w < 3; w++)
        for (int level = SHARD_NONE; level <= SHARD_OPTIM; level++) {
            Model m;
            Err err;
            assert_int_equal(llama_config_named(&m.c, "tiny", &err), 0);
            m.c.FF = 11 * 3200;
            char rule[64];
            snprintf(rule, sizeof rule, "*.up_proj*=%s", weights[w]);
            assert_int_equal(quant_plan_from_options(&m.plan, NULL, "none", NULL, NULL, NULL, NULL,
                                                     (const char *[]){rule}, 1, &err), 0);
            assert_int_equal(param_table_build(&m.table, &m.c, &m.plan, &err), 0);
            param_table_formats(&m.table, PARAM_BF16, STATE_F32);
            assert_true(m.c.FF * m.c.C > 2 << 20);
            one_model_weights(&m, (ShardLevel)level, false);
            param_table_free(&m.table);
        }
}

// What the model writes into gradients, micro-step after micro-step, arrives as its sum, in own rows.
static void test_gradients(void **state) {
    (void)state;
    for (int k = 0; k < N_MODELS; k++)
        for (int level = SHARD_NONE; level <= SHARD_FULL; level++) {
            Model m;
            Err err;
            Shard s;
            make(&m, k);
            param_table_formats(&m.table, PARAM_F32, STATE_F32);
            assert_int_equal(shard_plan(&s, &m.c, &m.plan, &m.table, (ShardLevel)level, true, 1, 0, &err), 0);
            assert_int_equal(shard_alloc(&s, &err), 0);
            Store store;
            assert_int_equal(store_plan(&store, &s, false, &err), 0);
            assert_int_equal(store_alloc(&store, &err), 0);
            shard_requantize(&s, &store, true);
            for (int step = 0; step < 2; step++) {
                double squares = 0;
                for (int micro = 0; micro < 3; micro++)
                    for (int l = m.c.L; l >= SHARD_EMBED; l--) {
                        bool adds = shard_backward(&s, l, micro);
                        for (int i = 0; i < m.table.n; i++) {
                            const Param *p = &m.table.p[i];
                            int unit = p->role == ROLE_EMBED ? SHARD_EMBED : p->layer < 0 ? m.c.L : p->layer;
                            // A tied table's gradient begins at the head, which overwrites or adds, as told.
                            bool tied = m.c.tied && p->role == ROLE_EMBED, sum = adds || !p->decay ||
                                        (p->role == ROLE_EMBED && !tied);
                            if (tied ? l != m.c.L : unit != l) continue;
                            for (int64_t e = 0; e < p->rows * p->cols; e++) {
                                float *g = shard_gradient(&s, i) + e, v = (float)((i * 7 + e + micro + step) % 16);
                                *g = sum ? *g + v : v;
                            }
                        }
                        shard_gradients(&s, l, micro, micro == 2);
                    }
                shard_finish_gradients(&s);
                for (int i = 0; i < m.table.n; i++)
                    for (int64_t e = 0; e < m.table.p[i].rows * m.table.p[i].cols; e++) {
                        float want = 0;
                        for (int micro = 0; micro < 3; micro++) want += (float)((i * 7 + e + micro + step) % 16);
                        assert_true(shard_own_gradient(&s, i)[e] == want);
                        squares += (double)want * want;
                    }
                StepState st = {0};
                shard_sum_state(&s, &st, true);
                assert_true(st.grad_squares == squares);       // small integers: exact in any order
            }
            store_free(&store);
            shard_free(&s);
            param_table_free(&m.table);
        }
}

int main(void) {
    Err err;
    if (device_init("cpu", 0, &err) < 0) die(&err);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows_are_dealt_out), cmocka_unit_test(test_bytes_on_the_wire),
        cmocka_unit_test(test_memory),             cmocka_unit_test(test_weights),
        cmocka_unit_test(test_gradients),          cmocka_unit_test(test_blocks_of_moments),
        cmocka_unit_test(test_bytes_of_int8_rows), cmocka_unit_test(test_fused_linears_are_of_one_kind),
        cmocka_unit_test(test_tiles),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
