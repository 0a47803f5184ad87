// Quantization plans: which tensor gets which scheme, from options, and as JSON.
#include "quant.h"
#include <fnmatch.h>
#include <stdlib.h>
#include <string.h>
#include "json.h"

// ---------------------------------------------------------------------------------------------
// Plans.

void quant_plan_none(QuantPlan *p) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "none");
}

static int rows_check_scheme(const QuantScheme *s, const char *what, Err *err) {
    if (!quant_is_int8_rows(&s->act) || quant_is_int8_rows(&s->weight)) return 0;
    char text[QUANT_SPEC_TEXT];
    quant_spec_text(text, sizeof text, &s->weight);
    return err_set(err, E_USAGE, "%s: inputs of int8,token,rows multiply weights of int8,channel,rows, not of %s; take "
                   "both, as int8qt-int8 does", what, text);
}

// Where INT8 rows may stand (quant.h).
static int rows_check(const QuantPlan *p, Err *err) {
    if (quant_is_int8_rows(&p->embedding))
        return err_set(err, E_USAGE, "an embedding has no INT8 rows: they are scaled after a matmul, and it has none; "
                       "leave it, or take int8,channel");
    int rc = rows_check_scheme(&p->linear, "linears", err);
    for (int i = 0; i < p->n_rules && rc == 0; i++)
        rc = rows_check_scheme(&p->rules[i].scheme, p->rules[i].pattern, err);
    return rc;
}

int quant_plan_from_options(QuantPlan *p, const QuantPlan *base, const char *scheme, const char *weight,
                            const char *activation, const char *embedding, const char *head, const char *const *rules,
                            int n_rules, Err *err) {
    quant_plan_none(p);
    if (base) *p = *base;
    if (scheme && weight)
        return err_set(err, E_USAGE, "--scheme %s and --weight %s both say how weights are quantized; give one", scheme,
                       weight);
    int rc = 0;
    if (scheme || weight) p->n_rules = 0, p->linear = (QuantScheme){0};
    if (scheme && (rc = quant_scheme_from_name(&p->linear, scheme, err))) return rc;
    if (weight && (rc = quant_spec_parse(&p->linear.weight, weight, false, err))) return rc;
    if (activation && (rc = quant_spec_parse(&p->linear.act, activation, true, err))) return rc;
    if (embedding && (rc = quant_spec_parse(&p->embedding, embedding, false, err))) return rc;
    if (head && (rc = quant_spec_parse(&p->tied_head, head, false, err))) return rc;
    for (int i = 0; i < n_rules; i++)
        if ((rc = quant_plan_add_rule(p, rules[i], err))) return rc;
    if ((rc = rows_check(p, err))) return rc;
    QuantPlan alone = {0};                       // the scheme and nothing else
    if (scheme && (rc = quant_scheme_from_name(&alone.linear, scheme, err))) return rc;
    if (quant_is_int8_rows(&alone.linear.weight) && quant_is_int8_rows(&p->tied_head)) alone.tied_head = p->tied_head;
    const char *name = quant_plan_is_none(p)                    ? "none"
                       : scheme && quant_plan_equal(p, &alone) ? scheme
                       : base && quant_plan_equal(p, base)     ? base->name
                                                               : "custom";
    snprintf(p->name, sizeof p->name, "%s", name);
    return 0;
}

// Tensor names are printable ASCII, so patterns are too; anything else would only make files that others cannot read.
static bool pattern_is_printable(const char *pattern) {
    for (; *pattern; pattern++)
        if (*pattern <= ' ' || *pattern > '~') return false;
    return true;
}

static int rule_parse(QuantRule *rule, const char *text, Err *err) {
    const char *equals = strchr(text, '=');
    if (!equals || equals == text || !equals[1])
        return err_set(err, E_USAGE,
                       "rule \"%.100s\": expected PATTERN=SCHEME or PATTERN=WEIGHT;ACTIVATION, for instance "
                       "'*.down_proj.*=int8wo'",
                       text);
    size_t len = (size_t)(equals - text);
    if (len >= sizeof rule->pattern)
        return err_set(err, E_USAGE, "rule \"%.60s...\": the pattern is longer than %zu bytes", text,
                       sizeof rule->pattern - 1);
    memcpy(rule->pattern, text, len);
    rule->pattern[len] = 0;
    if (!pattern_is_printable(rule->pattern))
        return err_set(err, E_USAGE, "rule \"%.100s\": the pattern has a character that no tensor name has", text);

    const char *value = equals + 1, *semicolon = strchr(value, ';');
    if (!semicolon && !strchr(value, ',')) return quant_scheme_from_name(&rule->scheme, value, err);
    char weight[128];
    size_t wlen = semicolon ? (size_t)(semicolon - value) : strlen(value);
    if (wlen >= sizeof weight) return err_set(err, E_USAGE, "rule \"%.60s...\": the quantization is too long", text);
    memcpy(weight, value, wlen);
    weight[wlen] = 0;
    int rc = quant_spec_parse(&rule->scheme.weight, weight, false, err);
    return rc || !semicolon ? rc : quant_spec_parse(&rule->scheme.act, semicolon + 1, true, err);
}

int quant_plan_add_rule(QuantPlan *p, const char *text, Err *err) {
    if (p->n_rules == QUANT_MAX_RULES)
        return err_set(err, E_USAGE, "more than %d rules; join some with patterns, as in '*.mlp.*=int8wo'",
                       QUANT_MAX_RULES);
    QuantRule rule = {0};
    int rc = rule_parse(&rule, text, err);
    if (rc) return rc;
    p->rules[p->n_rules++] = rule;
    strcpy(p->name, "custom");
    return 0;
}

QuantScheme quant_plan_linear(const QuantPlan *p, const char *name) {
    for (int i = p->n_rules - 1; i >= 0; i--)
        if (fnmatch(p->rules[i].pattern, name, 0) == 0) return p->rules[i].scheme;
    return p->linear;
}

static bool scheme_equal(const QuantScheme *a, const QuantScheme *b) {
    return quant_spec_equal(&a->weight, &b->weight) && quant_spec_equal(&a->act, &b->act);
}

bool quant_plan_is_none(const QuantPlan *p) {
    static const QuantScheme none;
    bool all = scheme_equal(&p->linear, &none) && !p->embedding.bits && !p->tied_head.bits;
    for (int i = 0; i < p->n_rules; i++) all = all && scheme_equal(&p->rules[i].scheme, &none);
    return all;
}

bool quant_plan_has_rows(const QuantPlan *p) {
    bool any = quant_is_int8_rows(&p->linear.weight) || quant_is_int8_rows(&p->tied_head);
    for (int i = 0; i < p->n_rules; i++) any = any || quant_is_int8_rows(&p->rules[i].scheme.weight);
    return any;
}

bool quant_plan_equal(const QuantPlan *a, const QuantPlan *b) {
    bool same = scheme_equal(&a->linear, &b->linear) && quant_spec_equal(&a->embedding, &b->embedding) &&
                quant_spec_equal(&a->tied_head, &b->tied_head) && a->n_rules == b->n_rules;
    for (int i = 0; same && i < a->n_rules; i++)
        same =
            !strcmp(a->rules[i].pattern, b->rules[i].pattern) && scheme_equal(&a->rules[i].scheme, &b->rules[i].scheme);
    return same;
}

// ---------------------------------------------------------------------------------------------
// JSON: {"name": "8da4w-32", "linear": {"weight": SPEC, "activation": SPEC}, "embedding": SPEC, "tied_head": SPEC,
// "rules": [{"pattern": P, "weight": SPEC, "activation": SPEC}, ...]} with specs in their canonical text.

static void json_no_memory(void) {
    Err e;
    err_set(&e, E_NOMEM, "no memory for the quantization plan's JSON");
    die(&e);
}

static void json_add_text(cJSON *obj, const char *key, const char *text) {
    if (!cJSON_AddStringToObject(obj, key, text)) json_no_memory();
}

static void json_add_spec(cJSON *obj, const char *key, const QuantSpec *s) {
    char text[QUANT_SPEC_TEXT];
    quant_spec_text(text, sizeof text, s);
    json_add_text(obj, key, text);
}

char *quant_plan_to_json(const QuantPlan *p) {
    cJSON *root = cJSON_CreateObject();
    json_add_text(root, "name", p->name);
    cJSON *linear = cJSON_AddObjectToObject(root, "linear");
    json_add_spec(linear, "weight", &p->linear.weight);
    json_add_spec(linear, "activation", &p->linear.act);
    json_add_spec(root, "embedding", &p->embedding);
    json_add_spec(root, "tied_head", &p->tied_head);
    cJSON *rules = cJSON_AddArrayToObject(root, "rules");
    for (int i = 0; i < p->n_rules; i++) {
        cJSON *rule = cJSON_CreateObject();
        json_add_text(rule, "pattern", p->rules[i].pattern);
        json_add_spec(rule, "weight", &p->rules[i].scheme.weight);
        json_add_spec(rule, "activation", &p->rules[i].scheme.act);
        cJSON_AddItemToArray(rules, rule);
    }
    char *text = cJSON_PrintUnformatted(root);
    cJSON_Delete(root);
    if (!text) json_no_memory();
    char *copy = xstrdup(text);      // cJSON's own allocator need not be malloc
    cJSON_free(text);
    return copy;
}

// A spec field: a missing one means none.
static int json_spec(const cJSON *obj, const char *key, bool is_activation, QuantSpec *out, Err *err) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(obj, key);
    if (!item) return 0;
    if (!cJSON_IsString(item)) return err_set(err, E_FORMAT, "quantization plan: \"%s\" is not a text", key);
    Err inner = {0};
    if (quant_spec_parse(out, item->valuestring, is_activation, &inner))
        return err_set(err, E_FORMAT, "quantization plan: \"%s\": %.800s", key, inner.text);
    return 0;
}

static int json_scheme(const cJSON *obj, QuantScheme *out, Err *err) {
    int rc = json_spec(obj, "weight", false, &out->weight, err);
    return rc ? rc : json_spec(obj, "activation", true, &out->act, err);
}

// Every key of obj is one of the NULL-terminated list: what a newer version may have added is not silently lost.
static int json_only_keys(const cJSON *obj, const char *const *keys, Err *err) {
    if (!cJSON_IsObject(obj))
        return err_set(err, E_FORMAT, "quantization plan: expected a JSON object with \"%s\"", keys[0]);
    for (const cJSON *item = obj->child; item; item = item->next) {
        int i = 0;
        while (keys[i] && strcmp(keys[i], item->string)) i++;
        if (!keys[i])
            return err_set(err, E_FORMAT, "quantization plan: unknown field \"%.60s\"; written by a newer version?",
                           item->string);
        for (const cJSON *other = item->next; other; other = other->next)
            if (!strcmp(other->string, item->string))
                return err_set(err, E_FORMAT, "quantization plan: field \"%.60s\" appears twice", item->string);
    }
    return 0;
}

static bool name_is_safe(const char *name) {
    static const char allowed[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
    return *name && *name != '.' && *name != '-' && !name[strspn(name, allowed)];
}

static int plan_from_object(QuantPlan *p, const cJSON *root, Err *err) {
    static const char *const keys[] = {"name", "linear", "embedding", "tied_head", "rules", NULL};
    static const char *const linear_keys[] = {"weight", "activation", NULL};
    static const char *const rule_keys[] = {"pattern", "weight", "activation", NULL};
    int rc = json_only_keys(root, keys, err);
    if (rc) return rc;
    const char *name = json_string(root, "name");
    if (!name || strlen(name) >= sizeof p->name || !name_is_safe(name))
        return err_set(err, E_FORMAT,
                       "quantization plan: \"name\" is \"%.80s\"; expected 1 to %zu letters, digits, '.', '_' or "
                       "'-', as in 8da4w-32",
                       name ? name : "", sizeof p->name - 1);
    strcpy(p->name, name);
    const cJSON *linear = cJSON_GetObjectItemCaseSensitive(root, "linear");
    if (linear && ((rc = json_only_keys(linear, linear_keys, err)) || (rc = json_scheme(linear, &p->linear, err))))
        return rc;
    if ((rc = json_spec(root, "embedding", false, &p->embedding, err))) return rc;
    if ((rc = json_spec(root, "tied_head", false, &p->tied_head, err))) return rc;

    const cJSON *rules = cJSON_GetObjectItemCaseSensitive(root, "rules"), *item;
    if (rules && !cJSON_IsArray(rules)) return err_set(err, E_FORMAT, "quantization plan: \"rules\" is not an array");
    cJSON_ArrayForEach(item, rules) {
        if (p->n_rules == QUANT_MAX_RULES)
            return err_set(err, E_FORMAT, "quantization plan: more than %d rules", QUANT_MAX_RULES);
        QuantRule *rule = &p->rules[p->n_rules];
        if ((rc = json_only_keys(item, rule_keys, err))) return rc;
        const char *pattern = json_string(item, "pattern");
        if (!pattern || !*pattern || strlen(pattern) >= sizeof rule->pattern || !pattern_is_printable(pattern))
            return err_set(err, E_FORMAT, "quantization plan: rule %d has no pattern of 1 to %zu printable characters",
                           p->n_rules, sizeof rule->pattern - 1);
        strcpy(rule->pattern, pattern);
        if ((rc = json_scheme(item, &rule->scheme, err))) return rc;
        p->n_rules++;
    }
    Err inner = {0};
    if (rows_check(p, &inner)) return err_set(err, E_FORMAT, "quantization plan: %.900s", inner.text);
    return 0;
}

int quant_plan_from_json(QuantPlan *p, const char *text, size_t len, Err *err) {
    quant_plan_none(p);
    cJSON *root = json_parse(text, len, "quantization plan", err);
    if (!root) return err ? err->code : E_FORMAT;
    int rc = plan_from_object(p, root, err);
    cJSON_Delete(root);
    if (rc) quant_plan_none(p);
    return rc;
}
