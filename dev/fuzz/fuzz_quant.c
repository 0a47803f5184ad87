// Quantization by name and as JSON. The first byte chooses the parser; what it takes must come back from its own text.
#include <stdlib.h>

#include "quant.h"

static void check(bool ok) {
    if (!ok) abort();
}

static void check_spec(const QuantSpec *s, bool is_activation) {
    QuantSpec back;
    char text[QUANT_SPEC_TEXT];
    quant_spec_text(text, sizeof text, s);
    check(quant_spec_parse(&back, text, is_activation, NULL) == 0 && quant_spec_equal(s, &back));
    if (!s->bits) return;
    check(s->bits >= 2 && s->bits <= 8 && s->qmin < s->qmax && (s->eps > 0 || s->mapping == QM_ROWS));
    const float ends[][2] = {{-1, 1}, {0, 0}, {3e38f, 3.1e38f}, {-1e-40f, 1e-45f}};
    for (int i = 0; i < 4; i++) {
        QParams p = quant_choose(ends[i][0], ends[i][1], s, QD_BF16);
        int code = quant_code(ends[i][1], p, s, QD_BF16);
        check(code >= s->qmin && code <= s->qmax);
    }
}

static void check_scheme(const QuantScheme *s) {
    check_spec(&s->weight, false);
    check_spec(&s->act, true);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (!size) return 0;
    Err err;
    QuantSpec spec;
    QuantScheme scheme;
    QuantPlan plan, back;
    char *text = malloc(size);
    if (!text) return 0;
    memcpy(text, data + 1, size - 1);
    text[size - 1] = 0;
    switch (data[0] % 5) {
    case 0:
    case 1:
        if (quant_spec_parse(&spec, text, data[0] % 5, &err) == 0) check_spec(&spec, data[0] % 5);
        break;
    case 2:
        if (quant_scheme_from_name(&scheme, text, &err) == 0) check_scheme(&scheme);
        break;
    case 3:
        quant_plan_none(&plan);
        if (quant_plan_add_rule(&plan, text, &err) == 0) {
            check_scheme(&plan.rules[0].scheme);
            quant_plan_linear(&plan, "model.layers.0.mlp.down_proj.weight");
        }
        break;
    default:
        if (quant_plan_from_json(&plan, text, size - 1, &err) == 0) {
            char *json = quant_plan_to_json(&plan);
            check(quant_plan_from_json(&back, json, strlen(json), &err) == 0 && quant_plan_equal(&plan, &back));
            free(json);
        }
    }
    free(text);
    return 0;
}
