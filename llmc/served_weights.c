#include "served_weights.h"
#include <stdlib.h>
#include "device.h"

static int add_linear(ServedWeights *s, const ParamTable *table, const Param *first, int n, Err *err) {
    int i = (int)(first - table->p);
    ServedLinear l = {.first = i, .n = n, .C = (int)first->cols, .wq = &first->scheme.weight, .act = &first->scheme.act};
    for (int k = 0; k < n; k++) {
        const Param *p = first + k;
        l.OC += (int)p->rows;
        if (quant_spec_equal(&p->scheme.weight, l.wq) && quant_spec_equal(&p->scheme.act, l.act)) continue;
        return err_set(err, E_USAGE, "--forward integer: %s and %s are one matmul and need one scheme; change the --rule, or "
                       "use --forward float", first->name, p->name);
    }
    if (!l.act->bits) return 0;
    l.bytes = l.wq->bits && !quant_has_zero(l.wq) ? ops->served_bytes(l.wq, l.act, l.OC, l.C) : 0;
    if (!l.bytes) {
        char weight[QUANT_SPEC_TEXT];
        quant_spec_text(weight, sizeof weight, l.wq);
        return err_set(err, E_USAGE, "--forward integer: %s with weights %s has no integer product; it needs symmetric weights "
                       "with a scale a row or a group, as in 8da4w-32 or int8dq", first->name, weight);
    }
    for (int k = 0; k < n; k++) {
        const Param *p = first + k;
        int64_t block[2];
        int rc = quant_block_shape(l.wq, p->rows, p->cols, block, err);
        if (rc < 0) return rc;
        size_t wire = quant_wire_layout(l.wq, p->rows, p->cols, block).bytes;
        size_t scales = (size_t)p->rows * (size_t)(p->cols / block[1]);
        if (wire > s->wire_bytes) s->wire_bytes = wire;
        if (scales > s->scales) s->scales = scales;
    }
    s->of[i] = s->n;
    s->linear[s->n++] = l;
    s->bytes += l.bytes;
    return 0;
}

int served_weights_plan(ServedWeights *s, const ParamTable *table, const LlamaConfig *c, Err *err) {
    static const struct { ParamRole first; int n; } matmuls[] = {{ROLE_Q, 3}, {ROLE_O, 1}, {ROLE_GATE, 2},
                                                                 {ROLE_DOWN, 1}};
    *s = (ServedWeights){.linear = xcalloc(4 * (size_t)c->L + 1, sizeof *s->linear),
                         .of = xcalloc((size_t)table->n, sizeof *s->of)};
    for (int i = 0; i < table->n; i++) s->of[i] = -1;
    int rc = 0;
    for (int l = 0; l < c->L; l++)
        for (int k = 0; k < 4 && rc == 0; k++)
            rc = add_linear(s, table, param_get(table, l, matmuls[k].first), matmuls[k].n, err);
    if (rc == 0 && !c->tied) rc = add_linear(s, table, param_get(table, -1, ROLE_HEAD), 1, err);
    if (rc == 0 && s->n == 0)
        rc = err_set(err, E_USAGE, "--forward integer: no linear's input is quantized; choose a scheme that does, as in "
                     "8da4w-32 or int8dq (weight-only schemes are trained with the arithmetic they are served with)");
    s->bytes += s->wire_bytes + s->scales * sizeof *s->scale;
    if (rc < 0) served_weights_free(s);
    return rc;
}

int served_weights_alloc(ServedWeights *s, Err *err) {
    int rc = 0;
    void *p = NULL;
    for (int i = 0; i < s->n && rc == 0; i++) {
        rc = device_alloc(&p, s->linear[i].bytes, "integer weights", err);
        if (rc == 0) s->linear[i].served = p;
    }
    if (rc == 0 && (rc = device_alloc(&p, s->wire_bytes, "integer weights", err)) == 0) s->wire = p;
    if (rc == 0 && (rc = device_alloc(&p, s->scales * sizeof *s->scale, "integer weights", err)) == 0) s->scale = p;
    return rc;
}

void served_weights_free(ServedWeights *s) {
    for (int i = 0; i < s->n; i++)
        if (s->linear[i].served) device_free(s->linear[i].served);
    if (s->wire) device_free(s->wire);
    if (s->scale) device_free(s->scale);
    free(s->linear);
    free(s->of);
    *s = (ServedWeights){0};
}

const ServedLinear *served_weights_get(const ServedWeights *s, int i) {
    return s && s->of[i] >= 0 ? &s->linear[s->of[i]] : NULL;
}

void served_weights_update(const ServedWeights *s, const Store *store) {
    for (int k = 0; k < s->n; k++) {
        const ServedLinear *l = &s->linear[k];
        int64_t row = 0;
        for (int i = l->first; i < l->first + l->n; i++) {
            const Param *p = &store->shard->own.table->p[i];
            int64_t block[2];
            Err err;
            if (quant_block_shape(l->wq, p->rows, p->cols, block, &err) < 0) {
                ops_set_error(err.code, "%s", err.text);
                return;
            }
            QuantWire at = quant_wire_layout(l->wq, p->rows, p->cols, block);
            ops->weight_pack(s->wire, store->t[i].p.data, l->wq, p->rows, p->cols, p->rows);
            ops->widen(s->scale, (const bf16 *)(const void *)(s->wire + at.scale),
                       (size_t)p->rows * (size_t)(p->cols / block[1]));
            ops->served_pack(l->served, s->wire + at.codes, s->scale, NULL, l->wq, l->act, row, p->rows, l->OC, l->C);
            row += p->rows;
        }
    }
}
