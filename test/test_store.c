// What a rank keeps for its update: places and bytes of every format, what is kept once where it works as it is stored,
// rows in and out, and the arrays of a checkpoint.
#include "test_common.h"
#include "device.h"
#include "rng.h"
#include "store.h"

typedef struct { LlamaConfig c; QuantPlan plan; ParamTable table; Shard shard; Store store; } Kept;

static void kept_plan(Kept *k, const char *shape, const char *scheme, ParamFormat others, StateFormat state,
                      ShardLevel level, int R, int rank, bool has_v) {
    Err err;
    if (llama_config_named(&k->c, shape, &err) ||
        quant_plan_from_options(&k->plan, NULL, scheme, NULL, NULL, NULL, NULL, NULL, 0, &err) ||
        param_table_build(&k->table, &k->c, &k->plan, &err))
        fail_msg("%s", err.text);
    param_table_formats(&k->table, others, state);
    if (shard_plan(&k->shard, &k->c, &k->plan, &k->table, level, true, R, rank, &err) ||
        store_plan(&k->store, &k->shard, has_v, &err))
        fail_msg("%s", err.text);
}

static void kept_open(Kept *k, const char *shape, const char *scheme, ParamFormat others, StateFormat state,
                      ShardLevel level, int R, int rank, bool has_v) {
    Err err;
    kept_plan(k, shape, scheme, others, state, level, R, rank, has_v);
    if (shard_alloc(&k->shard, &err) || store_alloc(&k->store, &err)) fail_msg("%s", err.text);
}

static void kept_close(Kept *k) {
    store_free(&k->store);
    shard_free(&k->shard);
    param_table_free(&k->table);
}

static bool is_zero(const void *p, size_t bytes) {
    for (size_t i = 0; i < bytes; i++)
        if (((const uint8_t *)p)[i]) return false;
    return true;
}

// Places of 64 bytes that do not overlap, as many bytes as planned, zeros to begin with; what works as it is stored is
// where it works.
static void test_places(void **u) {
    (void)u;
    static const char *const schemes[] = {"none", "int8qt", "8da4w-32"};
    for (int scheme = 0; scheme < 3; scheme++)
        for (int others = PARAM_F32; others <= PARAM_BF16; others++)
            for (int state = STATE_F32; state <= STATE_FP8; state++)
                for (int level = SHARD_NONE; level <= SHARD_FULL; level += SHARD_FULL)
                    for (int has_v = 0; has_v < 2; has_v++) {
                        Kept k;
                        kept_open(&k, "tiny", schemes[scheme], (ParamFormat)others, (StateFormat)state,
                                  (ShardLevel)level, level ? 3 : 1, level ? 1 : 0, has_v);
                        Store *s = &k.store;
                        double params = 0, states = 0;
                        const uint8_t *end = s->arena, *last = s->arena + (size_t)(s->param_bytes + s->state_bytes);
                        for (int i = 0; i < k.table.n; i++) {
                            const Param *p = &k.shard.own.held.p[i];
                            size_t n = (size_t)(p->rows * p->cols);
                            const StoredTensor *t = &s->t[i];
                            assert_int_equal(t->p.format, scheme == 1 && p->layer >= 0 && p->decay ? (int)PARAM_INT8 :
                                                          param_is_norm(p) ? (int)PARAM_F32 : others);
                            bool works = t->p.format == PARAM_INT8 ||
                                         (t->p.format == PARAM_BF16 && sizeof(floatX) == 2 && !p->scheme.weight.bits);
                            bool once = level == SHARD_NONE && works;
                            assert_int_equal(store_work(s, i) == NULL, once || level != SHARD_NONE);
                            if (once) {
                                assert_ptr_equal(t->p.data, shard_weight(&k.shard, i));
                                if (t->p.format == PARAM_INT8)
                                    assert_ptr_equal(t->p.scale, shard_weight_scale(&k.shard, i));
                            } else {
                                params += (double)(n * param_value_bytes(t->p.format));
                                if (t->p.format == PARAM_INT8) params += 4.0 * (double)p->rows;
                            }
                            assert_int_equal(t->p.scale != NULL, t->p.format == PARAM_INT8 && p->rows > 0);
                            const struct { const void *at; size_t bytes; bool mine; } places[] = {
                                {t->p.data, n * param_value_bytes(t->p.format), !once},
                                {t->p.scale, 4 * (size_t)p->rows, !once && t->p.format == PARAM_INT8},
                                {t->m.data, state_data_bytes(t->m.format, n), true},
                                {t->m.scale, 4 * state_scales(t->m.format, n), true},
                                {t->v.data, has_v ? state_data_bytes(t->v.format, n) : 0, has_v},
                                {t->v.scale, has_v ? 4 * state_scales(t->v.format, n) : 0, has_v},
                            };
                            for (int j = 0; j < 6; j++) {
                                const uint8_t *at = places[j].at;
                                if (!places[j].mine || !places[j].bytes) continue;
                                assert_int_equal((uintptr_t)at % 64, 0);
                                assert_true(at >= end && at + places[j].bytes <= last);
                                assert_true(is_zero(at, places[j].bytes));
                                memset((void *)(uintptr_t)at, 1, places[j].bytes);     // found by what overlaps
                                if (j >= 2) states += (double)places[j].bytes;
                            }
                            assert_int_equal(t->m.format, k.table.p[i].state);
                        }
                        double padding = 6 * 64.0 * k.table.n;
                        assert_true(s->param_bytes >= params && s->param_bytes <= params + padding);
                        assert_true(s->state_bytes >= states && s->state_bytes <= states + padding);
                        kept_close(&k);
                    }
}

static float value_at(int tensor, int64_t element) {
    return ((float)philox(5, (uint64_t)tensor, (uint64_t)element).v[0] / 4294967296.0f - 0.5f) * 0.1f;
}

// Every rank's rows, put in pieces, come out as what their format makes of them, whatever the piece.
static void test_rows(void **u) {
    (void)u;
    for (int level = SHARD_NONE; level <= SHARD_FULL; level += SHARD_FULL)
        for (int others = PARAM_F32; others <= PARAM_BF16; others++)
            for (int r = 0; r < (level ? 3 : 1); r++) {
                Kept k;
                Err err;
                kept_open(&k, "tiny", "int8qt", (ParamFormat)others, STATE_INT8, (ShardLevel)level, level ? 3 : 1, r,
                          true);
                for (int i = 0; i < k.table.n; i++) {
                    const Param *p = &k.table.p[i], *own = &k.shard.own.held.p[i];
                    int64_t cols = p->cols, row0 = k.shard.own.row0[i];
                    if (!own->rows) continue;
                    size_t bytes = (size_t)(own->rows * cols) * 4;
                    float *rows = xmalloc(bytes), *out = xmalloc(bytes);
                    for (int64_t e = 0; e < own->rows * cols; e++) rows[e] = value_at(i, row0 * cols + e);
                    if (i == 3) rows[1] = NAN, rows[2] = INFINITY;
                    for (int64_t a = 0; a < own->rows; a += 5) {
                        int64_t n = own->rows - a < 5 ? own->rows - a : 5;
                        assert_int_equal(store_set_rows(&k.store, i, a, n, rows + a * cols, &err), 0);
                    }
                    for (int64_t a = 0; a < own->rows; a += 3) {
                        int64_t n = own->rows - a < 3 ? own->rows - a : 3;
                        assert_int_equal(store_rows(&k.store, p, row0 + a, n, out + a * cols, &err), 0);
                    }
                    for (int64_t a = 0; a < own->rows; a++) {
                        float amax = 0;
                        for (int64_t c = 0; c < cols; c++) amax = fmaxf(amax, fabsf(rows[a * cols + c]));
                        float scale = int8_row_scale(amax), inv = int8_row_inv(scale);
                        for (int64_t c = 0; c < cols; c++) {
                            float x = rows[a * cols + c], y = out[a * cols + c];
                            float want = p->format == PARAM_F32 ? x : p->format == PARAM_BF16 ? bf16_round(x)
                                         : (float)int8_nearest(x, inv) * scale;
                            assert_true(want == y || (want != want && y != y));
                        }
                    }
                    if (p->format == PARAM_INT8) {          // as they are, at an offset
                        int8_t *codes = xmalloc((size_t)(2 * cols)), *got = xmalloc((size_t)(2 * cols));
                        float scale[2] = {0.5f, -0.0f}, got_scale[2];
                        for (int64_t e = 0; e < 2 * cols; e++) codes[e] = (int8_t)(e * 37 - 128);
                        store_set_codes(&k.store, i, own->rows - 2, 2, codes, scale);
                        assert_int_equal(store_codes(&k.store, p, row0 + own->rows - 2, 2, got, got_scale, &err), 0);
                        assert_memory_equal(got, codes, (size_t)(2 * cols));
                        assert_memory_equal(got_scale, scale, 8);
                        StoredParam at = store_param(&k.store, i, own->rows - 1);
                        assert_memory_equal(at.data, codes + cols, (size_t)cols);
                        assert_true(at.scale[0] == 0);
                        free(codes);
                        free(got);
                    }
                    free(rows);
                    free(out);
                }
                kept_close(&k);
            }
}

// The arrays of a checkpoint hold each byte of the store once, in rows that fit the units in which ranks hold them;
// names and dtypes do not depend on the rank.
static void test_arrays(void **u) {
    (void)u;
    for (int state = STATE_F32; state <= STATE_FP8; state++)
        for (int others = PARAM_F32; others <= PARAM_BF16; others++)
            for (int r = 0; r < 4; r++) {
                Kept k;
                StateArray arrays[STORE_MAX_ARRAYS];
                kept_open(&k, "tiny", "int8qt", (ParamFormat)others, (StateFormat)state, SHARD_FULL, 4, r, true);
                int n = store_arrays(&k.store, arrays);
                bool blocks = state_block((StateFormat)state) > 0;
                assert_int_equal(n, blocks ? 6 : 4);
                static const char *const names[2][6] = {{"master", "master_scale", "m", "v", "", ""},
                                                        {"master", "master_scale", "m", "m_scale", "v", "v_scale"}};
                double bytes = 0;
                for (int a = 0; a < n; a++) {
                    assert_string_equal(arrays[a].name, names[blocks][a]);
                    for (int i = 0; i < k.table.n; i++) {
                        const StateTensor *t = &arrays[a].t[i];
                        const Param *own = &k.shard.own.held.p[i];
                        assert_true(t->unit >= 1 && k.shard.own.split[i].unit % t->unit == 0);
                        size_t size = (size_t)(own->rows / t->unit * t->values) * dtype_size(t->dtype);
                        assert_int_equal(t->data != NULL, size > 0);
                        if (size) memset(t->data, 1, size);
                        bytes += (double)size;
                    }
                }
                double padding = 6 * 64.0 * k.table.n, all = k.store.param_bytes + k.store.state_bytes;
                assert_true(bytes <= all && bytes >= all - padding);
                assert_int_equal(arrays[0].t[0].dtype, others == PARAM_F32 ? DT_F32 : DT_BF16);
                assert_int_equal(arrays[0].t[2].dtype, DT_I8);
                kept_close(&k);
            }
    Kept k;                                                  // as ever where all is f32
    StateArray arrays[STORE_MAX_ARRAYS];
    kept_open(&k, "tiny", "8da4w-32", PARAM_F32, STATE_F32, SHARD_NONE, 1, 0, false);
    assert_int_equal(store_arrays(&k.store, arrays), 2);
    assert_string_equal(arrays[0].name, "master");
    assert_string_equal(arrays[1].name, "m");
    for (int a = 0; a < 2; a++)
        for (int i = 0; i < k.table.n; i++) {
            const StateTensor *t = &arrays[a].t[i];
            assert_true(t->dtype == DT_F32 && t->unit == 1 && t->values == k.table.p[i].cols);
        }
    kept_close(&k);
}

// What INT8 weights with 8-bit moments take at 1B, on one rank and on each of eight, is what arithmetic asks for: of a
// linear's value a code, 2 moments with a scale for each 256 values, a gradient; of the table's bf16, which is also
// where it works. Allowed above it, 0.5 %: row scales, norms in f32 and places that begin at multiples.
static void test_memory_at_1b(void **u) {
    (void)u;
    for (int R = 1; R <= 8; R *= 8) {
        Kept k;
        kept_plan(&k, "1B", "int8qt", PARAM_BF16, STATE_INT8, R > 1 ? SHARD_FULL : SHARD_NONE, R, 0, true);
        double linears = 0, others = 0;
        for (int i = 0; i < k.table.n; i++) {
            double n = (double)k.table.p[i].rows * (double)k.table.p[i].cols;
            if (k.table.p[i].format == PARAM_INT8) linears += n;
            else others += n;
        }
        double moments = 2 * (1 + 4.0 / 256) * (linears + others), kept = k.store.param_bytes + k.store.state_bytes;
        const ShardMemory *m = &k.shard.memory;
        if (R == 1) {
            double works = linears + (double)sizeof(floatX) * others, stored = sizeof(floatX) == 2 ? 0 : 2 * others;
            double want = works + stored + moments + 4 * (linears + others);
            double got = kept + m->weights + m->gradients + m->own_gradients + m->buffers;
            assert_true(got >= want && got <= 1.005 * want);
        } else {
            double want = (linears + 2 * others + moments) / R;
            assert_true(kept >= want && kept <= 1.005 * want);
        }
        kept_close(&k);
    }
}

int main(int argc, char **argv) {
    Err err;
    if (device_init("cpu", 0, &err) < 0) die(&err);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_places),
        cmocka_unit_test(test_rows),
        cmocka_unit_test(test_arrays),
        cmocka_unit_test(test_memory_at_1b),
    };
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, NULL, NULL) != 0;
}
