#include "llama.h"
#include <stdlib.h>
#include "json.h"
#include "rng.h"

// ---------------------------------------------------------------------------------------------
// Configuration

// Shapes that anyone can repeat without weights (--init). 135M is SmolLM2's, 1B Llama-3.2's, 8B, 70B and 405B Llama-3's,
// 8B-4 the first four layers of one, mini the torchao tutorial's.
static const struct { const char *name; LlamaConfig c; } named_shapes[] = {
#define SHAPE(name, c_, l, nh, nkv, hs, ff, v, maxt, theta, tie) \
    {name, {.C = c_, .L = l, .NH = nh, .NKV = nkv, .HS = hs, .FF = ff, .V = v, .max_T = maxt, .norm_eps = 1e-5f, \
            .rope_theta = theta, .rope_factor = 1, .tied = tie, .bos = -1}}
    SHAPE("tiny", 64, 2, 4, 2, 16, 192, 258, 512, 10000, true),
    SHAPE("tiny-untied", 64, 2, 4, 2, 16, 192, 258, 512, 10000, false),
    SHAPE("1M", 128, 4, 4, 2, 32, 384, 258, 1024, 10000, true),
    SHAPE("5M", 256, 6, 8, 4, 32, 768, 258, 1024, 10000, true),
    SHAPE("15M", 288, 6, 6, 6, 48, 768, 32000, 1024, 10000, true),
    SHAPE("135M", 576, 30, 9, 3, 64, 1536, 49152, 2048, 10000, true),
    SHAPE("mini", 2048, 16, 16, 4, 128, 5632, 4096, 2048, 500000, false),
    SHAPE("1B", 2048, 16, 32, 8, 64, 8192, 128256, 131072, 500000, true),
    SHAPE("8B", 4096, 32, 32, 8, 128, 14336, 128256, 8192, 500000, false),
    SHAPE("8B-4", 4096, 4, 32, 8, 128, 14336, 128256, 8192, 500000, false),
    SHAPE("70B", 8192, 80, 64, 8, 128, 28672, 128256, 8192, 500000, false),
    SHAPE("405B", 16384, 126, 128, 8, 128, 53248, 128256, 131072, 500000, false),
#undef SHAPE
};
#define N_SHAPES (sizeof named_shapes / sizeof *named_shapes)

int llama_config_named(LlamaConfig *c, const char *name, Err *err) {
    for (size_t i = 0; i < N_SHAPES; i++)
        if (!strcmp(name, named_shapes[i].name)) {
            *c = named_shapes[i].c;
            return 0;
        }
    return err_set(err, E_USAGE, "unknown shape \"%s\"; known are %s", name, llama_config_names());
}

const char *llama_config_names(void) {
    static char names[256];
    if (!names[0])
        for (size_t i = 0; i < N_SHAPES; i++) {
            if (i) strcat(names, ", ");
            strcat(names, named_shapes[i].name);
        }
    return names;
}

int llama_config_validate(const LlamaConfig *c, Err *err) {
    const struct { const char *name; int v, lo, hi; } sizes[] = {
        {"hidden_size", c->C, 1, 1 << 17},
        {"num_hidden_layers", c->L, 1, 1024},
        {"num_attention_heads", c->NH, 1, 1024},
        {"num_key_value_heads", c->NKV, 1, 1024},
        {"head_dim", c->HS, 2, 1024},
        {"intermediate_size", c->FF, 1, 1 << 19},
        {"vocab_size", c->V, 2, 1 << 24},
        {"max_position_embeddings", c->max_T, 1, 1 << 24},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i].v < sizes[i].lo || sizes[i].v > sizes[i].hi)
            return err_set(err, E_FORMAT, "%s is %d; expected %d to %d", sizes[i].name, sizes[i].v, sizes[i].lo,
                           sizes[i].hi);
    if (c->NH % c->NKV)
        return err_set(err, E_FORMAT, "num_key_value_heads %d does not divide num_attention_heads %d", c->NKV, c->NH);
    if (c->HS % 2) return err_set(err, E_FORMAT, "head_dim %d is odd; rope needs pairs", c->HS);
    if (!(c->norm_eps >= 0 && c->norm_eps < 1))
        return err_set(err, E_FORMAT, "rms_norm_eps %g; expected 0 to 1", (double)c->norm_eps);
    if (!(c->rope_theta > 1 && c->rope_theta < 1e12))
        return err_set(err, E_FORMAT, "rope_theta %g; expected 1 to 1e12", c->rope_theta);
    if (c->rope_scaling != ROPE_DEFAULT && !(c->rope_factor > 0 && c->rope_factor < 1e6))
        return err_set(err, E_FORMAT, "rope_scaling factor %g; expected 0 to 1e6", c->rope_factor);
    if (c->rope_scaling == ROPE_LLAMA3 && !(c->rope_original_max_T > 0 && c->rope_low_freq_factor > 0 &&
                                            c->rope_high_freq_factor > c->rope_low_freq_factor))
        return err_set(err, E_FORMAT, "rope_scaling llama3 needs original_max_position_embeddings > 0 and "
                       "0 < low_freq_factor < high_freq_factor; found %d, %g, %g", c->rope_original_max_T,
                       c->rope_low_freq_factor, c->rope_high_freq_factor);
    return 0;
}

static int parse_rope_scaling(LlamaConfig *c, const cJSON *rs, Err *err) {
    if (!cJSON_IsObject(rs)) return err_set(err, E_FORMAT, "rope_scaling is not an object");
    const char *type = json_string(rs, "rope_type");
    if (!type) type = json_string(rs, "type");
    if (!type || !strcmp(type, "default")) return 0;
    if (!strcmp(type, "linear")) c->rope_scaling = ROPE_LINEAR;
    else if (!strcmp(type, "llama3")) c->rope_scaling = ROPE_LLAMA3;
    else return err_set(err, E_FORMAT, "rope_scaling type \"%s\" is unknown; linear and llama3 are supported", type);
    int rc = json_double(rs, "factor", true, 1e-6, 1e6, &c->rope_factor, err);
    if (rc < 0 || c->rope_scaling == ROPE_LINEAR) return rc;
    int64_t original = 0;
    if ((rc = json_double(rs, "low_freq_factor", true, 1e-6, 1e6, &c->rope_low_freq_factor, err)) < 0) return rc;
    if ((rc = json_double(rs, "high_freq_factor", true, 1e-6, 1e6, &c->rope_high_freq_factor, err)) < 0) return rc;
    if ((rc = json_int(rs, "original_max_position_embeddings", true, 1, 1 << 24, &original, err)) < 0) return rc;
    c->rope_original_max_T = (int)original;
    return 0;
}

static int parse_config(LlamaConfig *c, const cJSON *root, Err *err) {
    if (!cJSON_IsObject(root)) return err_set(err, E_FORMAT, "config.json: not an object");
    const char *type = json_string(root, "model_type");
    const cJSON *archs = cJSON_GetObjectItemCaseSensitive(root, "architectures");
    const char *arch = cJSON_GetStringValue(cJSON_GetArrayItem(archs, 0));
    if ((arch && strcmp(arch, "LlamaForCausalLM")) || (!arch && (!type || strcmp(type, "llama"))))
        return err_set(err, E_FORMAT, "config.json: architecture \"%s\"; only LlamaForCausalLM is supported",
                       arch ? arch : type ? type : "(none)");
    const char *act = json_string(root, "hidden_act");
    if (act && strcmp(act, "silu"))
        return err_set(err, E_FORMAT, "config.json: hidden_act \"%s\"; only silu is supported", act);
    bool attention_bias = false, mlp_bias = false;
    if (json_bool(root, "attention_bias", &attention_bias, err) < 0 || json_bool(root, "mlp_bias", &mlp_bias, err) < 0)
        return err->code;
    if (attention_bias || mlp_bias)
        return err_set(err, E_FORMAT, "config.json: attention_bias or mlp_bias is true; biases are not supported");

    *c = (LlamaConfig){.rope_theta = 10000, .rope_factor = 1, .bos = -1};
    int64_t C = 0, L = 0, NH = 0, NKV, HS, FF = 0, V = 0, max_T = 2048;
    if (json_int(root, "hidden_size", true, 1, 1 << 17, &C, err) < 0) return err->code;
    if (json_int(root, "num_hidden_layers", true, 1, 1024, &L, err) < 0) return err->code;
    if (json_int(root, "num_attention_heads", true, 1, 1024, &NH, err) < 0) return err->code;
    if (json_int(root, "intermediate_size", true, 1, 1 << 19, &FF, err) < 0) return err->code;
    if (json_int(root, "vocab_size", true, 2, 1 << 24, &V, err) < 0) return err->code;
    if (json_int(root, "max_position_embeddings", false, 1, 1 << 24, &max_T, err) < 0) return err->code;
    NKV = NH;
    if (json_int(root, "num_key_value_heads", false, 1, 1024, &NKV, err) < 0) return err->code;
    if (C % NH && !cJSON_GetObjectItemCaseSensitive(root, "head_dim"))
        return err_set(err, E_FORMAT, "config.json: num_attention_heads %lld does not divide hidden_size %lld and there "
                       "is no head_dim", (long long)NH, (long long)C);
    HS = C / NH;
    if (json_int(root, "head_dim", false, 2, 1024, &HS, err) < 0) return err->code;
    double eps = 1e-6;
    if (json_double(root, "rms_norm_eps", false, 0, 1, &eps, err) < 0) return err->code;
    if (json_bool(root, "tie_word_embeddings", &c->tied, err) < 0) return err->code;
    c->C = (int)C; c->L = (int)L; c->NH = (int)NH; c->NKV = (int)NKV; c->HS = (int)HS; c->FF = (int)FF; c->V = (int)V;
    c->max_T = (int)max_T;
    c->norm_eps = (float)eps;

    // transformers 5 keeps theta and scaling together under rope_parameters; before, they stood apart.
    const cJSON *rp = cJSON_GetObjectItemCaseSensitive(root, "rope_parameters");
    if (json_double(root, "rope_theta", false, 1, 1e12, &c->rope_theta, err) < 0) return err->code;
    if (cJSON_IsObject(rp) && json_double(rp, "rope_theta", false, 1, 1e12, &c->rope_theta, err) < 0) return err->code;
    const cJSON *rs = cJSON_GetObjectItemCaseSensitive(root, "rope_scaling");
    if (!rs || cJSON_IsNull(rs)) rs = rp;
    if (rs && !cJSON_IsNull(rs) && parse_rope_scaling(c, rs, err) < 0) return err->code;

    int64_t id = -1;
    if (json_int(root, "bos_token_id", false, -1, V - 1, &id, err) < 0) return err->code;
    c->bos = (int)id;
    const cJSON *eos = cJSON_GetObjectItemCaseSensitive(root, "eos_token_id");
    int n = cJSON_IsArray(eos) ? cJSON_GetArraySize(eos) : cJSON_IsNumber(eos) ? 1 : 0;
    for (int i = 0; i < n && i < 8; i++) {
        const cJSON *e = cJSON_IsArray(eos) ? cJSON_GetArrayItem(eos, i) : eos;
        double v = cJSON_IsNumber(e) ? e->valuedouble : -1;
        if (!(v >= 0 && v < (double)V))
            return err_set(err, E_FORMAT, "config.json: eos_token_id %g; expected 0 to %lld", v, (long long)V - 1);
        c->eos[c->n_eos++] = (int)v;
    }
    return llama_config_validate(c, err);
}

int llama_config_from_json(LlamaConfig *c, const char *text, size_t len, Err *err) {
    Err local;
    if (!err) err = &local;
    cJSON *root = json_parse(text, len, "config.json", err);
    if (!root) return err->code;
    int rc = parse_config(c, root, err);
    cJSON_Delete(root);
    return rc;
}

char *llama_config_to_json(const LlamaConfig *c, const char *torch_dtype) {
    cJSON *o = cJSON_CreateObject();
    const char *arch = "LlamaForCausalLM";
    cJSON_AddItemToObject(o, "architectures", cJSON_CreateStringArray(&arch, 1));
    cJSON_AddStringToObject(o, "model_type", "llama");
    cJSON_AddStringToObject(o, "hidden_act", "silu");
    cJSON_AddNumberToObject(o, "hidden_size", c->C);
    cJSON_AddNumberToObject(o, "intermediate_size", c->FF);
    cJSON_AddNumberToObject(o, "num_hidden_layers", c->L);
    cJSON_AddNumberToObject(o, "num_attention_heads", c->NH);
    cJSON_AddNumberToObject(o, "num_key_value_heads", c->NKV);
    cJSON_AddNumberToObject(o, "head_dim", c->HS);
    cJSON_AddNumberToObject(o, "vocab_size", c->V);
    cJSON_AddNumberToObject(o, "max_position_embeddings", c->max_T);
    // The shortest decimal that reads back as the same f32.
    char eps[32];
    for (int digits = 1; digits < 10; digits++) {
        snprintf(eps, sizeof eps, "%.*g", digits, (double)c->norm_eps);
        if (strtof(eps, NULL) == c->norm_eps) break;
    }
    cJSON_AddRawToObject(o, "rms_norm_eps", eps);
    cJSON_AddNumberToObject(o, "rope_theta", c->rope_theta);
    if (c->rope_scaling == ROPE_DEFAULT) {
        cJSON_AddNullToObject(o, "rope_scaling");
    } else {
        cJSON *rs = cJSON_AddObjectToObject(o, "rope_scaling");
        cJSON_AddStringToObject(rs, "rope_type", c->rope_scaling == ROPE_LINEAR ? "linear" : "llama3");
        cJSON_AddNumberToObject(rs, "factor", c->rope_factor);
        if (c->rope_scaling == ROPE_LLAMA3) {
            cJSON_AddNumberToObject(rs, "low_freq_factor", c->rope_low_freq_factor);
            cJSON_AddNumberToObject(rs, "high_freq_factor", c->rope_high_freq_factor);
            cJSON_AddNumberToObject(rs, "original_max_position_embeddings", c->rope_original_max_T);
        }
    }
    cJSON_AddBoolToObject(o, "tie_word_embeddings", c->tied);
    cJSON_AddBoolToObject(o, "attention_bias", 0);
    cJSON_AddBoolToObject(o, "mlp_bias", 0);
    if (c->bos >= 0) cJSON_AddNumberToObject(o, "bos_token_id", c->bos);
    else cJSON_AddNullToObject(o, "bos_token_id");
    if (c->n_eos == 1) cJSON_AddNumberToObject(o, "eos_token_id", c->eos[0]);
    else if (c->n_eos > 1) cJSON_AddItemToObject(o, "eos_token_id", cJSON_CreateIntArray(c->eos, c->n_eos));
    else cJSON_AddNullToObject(o, "eos_token_id");
    cJSON_AddStringToObject(o, "torch_dtype", torch_dtype);
    char *text = cJSON_Print(o);
    cJSON_Delete(o);
    return text;
}

// Source of the llama3 formula: transformers' _compute_llama3_parameters (Llama 3.1's reference code).
void llama_rope_inv_freq(float *inv_freq, const LlamaConfig *c) {
    for (int i = 0; i < c->HS / 2; i++) {
        double f = 1.0 / pow(c->rope_theta, 2.0 * i / c->HS);
        if (c->rope_scaling == ROPE_LINEAR) {
            f /= c->rope_factor;
        } else if (c->rope_scaling == ROPE_LLAMA3) {
            double wavelen = 2.0 * 3.14159265358979323846 / f;
            double low = c->rope_original_max_T / c->rope_low_freq_factor,
                   high = c->rope_original_max_T / c->rope_high_freq_factor;
            if (wavelen > low) {
                f /= c->rope_factor;
            } else if (wavelen >= high) {
                double smooth = (c->rope_original_max_T / wavelen - c->rope_low_freq_factor) /
                                (c->rope_high_freq_factor - c->rope_low_freq_factor);
                f = (1.0 - smooth) * f / c->rope_factor + smooth * f;
            }
        }
        inv_freq[i] = (float)f;
    }
}

void llama_rope_table(float *cos_t, float *sin_t, const LlamaConfig *c, int T) {
    int half = c->HS / 2;
    float *inv = xmalloc((size_t)half * sizeof *inv);
    llama_rope_inv_freq(inv, c);
    // The angle is a product in f32, as transformers forms it; cos and sin of it are then exact to f32 rounding.
    for (int t = 0; t < T; t++)
        for (int i = 0; i < half; i++) {
            float angle = (float)t * inv[i];
            cos_t[(size_t)t * half + i] = (float)cos((double)angle);
            sin_t[(size_t)t * half + i] = (float)sin((double)angle);
        }
    free(inv);
}

double llama_matmul_params(const LlamaConfig *c) {
    double attn = (double)c->C * c->HS * (2.0 * c->NH + 2.0 * c->NKV), ffn = 3.0 * c->C * c->FF;
    return c->L * (attn + ffn) + (double)c->V * c->C;
}

double llama_train_flops_per_token(const LlamaConfig *c, int T) {
    return 6.0 * llama_matmul_params(c) + 6.0 * c->L * (double)c->NH * c->HS * T;
}

// ---------------------------------------------------------------------------------------------
// Parameter table

static const struct { const char *name; bool starts_group, in_block; } roles[ROLE_COUNT] = {
    [ROLE_EMBED] = {"model.embed_tokens.weight", true, false},
    [ROLE_NORM1] = {"input_layernorm.weight", true, true},
    [ROLE_Q] = {"self_attn.q_proj.weight", true, true},
    [ROLE_K] = {"self_attn.k_proj.weight", false, true},
    [ROLE_V] = {"self_attn.v_proj.weight", false, true},
    [ROLE_O] = {"self_attn.o_proj.weight", true, true},
    [ROLE_NORM2] = {"post_attention_layernorm.weight", true, true},
    [ROLE_GATE] = {"mlp.gate_proj.weight", true, true},
    [ROLE_UP] = {"mlp.up_proj.weight", false, true},
    [ROLE_DOWN] = {"mlp.down_proj.weight", true, true},
    [ROLE_FINAL_NORM] = {"model.norm.weight", true, false},
    [ROLE_HEAD] = {"lm_head.weight", true, false},
};

static void role_shape(const LlamaConfig *c, ParamRole r, int64_t *rows, int64_t *cols) {
    *cols = c->C;
    switch (r) {
    case ROLE_EMBED: case ROLE_HEAD: *rows = c->V; break;
    case ROLE_Q: *rows = (int64_t)c->NH * c->HS; break;
    case ROLE_K: case ROLE_V: *rows = (int64_t)c->NKV * c->HS; break;
    case ROLE_O: *rows = c->C; *cols = (int64_t)c->NH * c->HS; break;
    case ROLE_GATE: case ROLE_UP: *rows = c->FF; break;
    case ROLE_DOWN: *rows = c->C; *cols = c->FF; break;
    default: *rows = 1; break;
    }
}

QuantSpec llama_embedding_spec(const QuantPlan *plan, const LlamaConfig *c) {
    QuantSpec s = plan->embedding;
    if (quant_works_as_codes(&s)) {
        s.gran = QG_GROUP;
        s.group = c->C;
    }
    return s;
}

static int add_param(ParamTable *t, const LlamaConfig *c, const QuantPlan *plan, ParamRole role, int layer, Err *err) {
    Param *p = &t->p[t->n++];
    *p = (Param){.role = role, .layer = layer, .trainable = true};
    if (roles[role].in_block) snprintf(p->name, sizeof p->name, "model.layers.%d.%s", layer, roles[role].name);
    else snprintf(p->name, sizeof p->name, "%s", roles[role].name);
    role_shape(c, role, &p->rows, &p->cols);
    bool norm = param_is_norm(p);
    p->decay = !norm;
    if (roles[role].starts_group) t->n_elements = (t->n_elements + 63) & ~(size_t)63;
    p->offset = t->n_elements;
    p->row_offset = t->n_rows;
    size_t size;
    if (!mul_size((size_t)p->rows, (size_t)p->cols, &size) || !add_size(t->n_elements, size, &t->n_elements) ||
        t->n_elements > (size_t)1 << 42)
        return err_set(err, E_FORMAT, "%s: %lld by %lld values are too many", p->name, (long long)p->rows,
                       (long long)p->cols);
    t->n_params += size;
    t->n_rows += (size_t)p->rows;
    if (plan && role == ROLE_EMBED) p->scheme.weight = llama_embedding_spec(plan, c);
    if (plan && role != ROLE_EMBED && !norm) p->scheme = quant_plan_linear(plan, p->name);
    int64_t block[2];
    if (p->scheme.weight.bits && quant_block_shape(&p->scheme.weight, p->rows, p->cols, block, err) < 0) {
        char why[600];
        snprintf(why, sizeof why, "%.599s", err ? err->text : "");
        return err_set(err, E_USAGE, "%s: %s", p->name, why);
    }
    return 0;
}

// Linears that read one input must agree on how it is quantized.
static int check_shared_input(const ParamTable *t, int layer, ParamRole a, ParamRole b, Err *err) {
    const Param *pa = param_get(t, layer, a), *pb = param_get(t, layer, b);
    if (quant_spec_equal(&pa->scheme.act, &pb->scheme.act)) return 0;
    return err_set(err, E_USAGE,
                   "%s and %s read the same input but the scheme gives them different activation quantization; "
                   "let one rule cover both",
                   pa->name, pb->name);
}

int param_table_build(ParamTable *t, const LlamaConfig *c, const QuantPlan *plan, Err *err) {
    *t = (ParamTable){.L = c->L};
    t->p = xcalloc(3 + 9 * (size_t)c->L, sizeof *t->p);
    int rc = add_param(t, c, plan, ROLE_EMBED, -1, err);
    for (int l = 0; l < c->L && rc == 0; l++)
        for (int r = ROLE_NORM1; r <= ROLE_DOWN && rc == 0; r++) rc = add_param(t, c, plan, (ParamRole)r, l, err);
    if (rc == 0) rc = add_param(t, c, plan, ROLE_FINAL_NORM, -1, err);
    if (rc == 0 && !c->tied) rc = add_param(t, c, plan, ROLE_HEAD, -1, err);
    for (int l = 0; l < c->L && rc == 0; l++) {
        rc = check_shared_input(t, l, ROLE_Q, ROLE_K, err);
        if (rc == 0) rc = check_shared_input(t, l, ROLE_Q, ROLE_V, err);
        if (rc == 0) rc = check_shared_input(t, l, ROLE_GATE, ROLE_UP, err);
    }
    if (rc == 0 && c->tied && plan && plan->tied_head.bits) {
        int64_t block[2];
        rc = quant_block_shape(&plan->tied_head, c->V, c->C, block, err);
    }
    if (rc < 0) param_table_free(t);
    return rc;
}

void param_table_formats(ParamTable *t, ParamFormat others, StateFormat state) {
    for (int i = 0; i < t->n; i++) {
        Param *p = &t->p[i];
        p->format = quant_is_int8_rows(&p->scheme.weight) ? PARAM_INT8 : param_is_norm(p) ? PARAM_F32 : others;
        p->state = state_format(state, p->rows * p->cols);
    }
}

void param_table_free(ParamTable *t) {
    free(t->p);
    *t = (ParamTable){0};
}

const Param *param_get(const ParamTable *t, int layer, ParamRole role) {
    int per_block = ROLE_DOWN - ROLE_NORM1 + 1, after = 1 + per_block * t->L;
    int i;
    if (role == ROLE_EMBED) i = 0;
    else if (role == ROLE_FINAL_NORM) i = after;
    else if (role == ROLE_HEAD) i = after + 1;
    else i = 1 + per_block * layer + (role - ROLE_NORM1);
    return i < t->n ? &t->p[i] : NULL;
}

const Param *param_find(const ParamTable *t, const char *name) {
    for (int i = 0; i < t->n; i++)
        if (!strcmp(t->p[i].name, name)) return &t->p[i];
    return NULL;
}

// Box-Muller on two uniforms per element: one counter, one value, so that any slice can be made alone.
void param_init_random(float *out, const Param *p, const LlamaConfig *c, uint64_t seed, size_t first, size_t n) {
    if (param_is_norm(p)) {
        for (size_t i = 0; i < n; i++) out[i] = 1.0f;
        return;
    }
    float std = 0.02f;
    if (p->role == ROLE_O || p->role == ROLE_DOWN) std /= sqrtf(2.0f * (float)c->L);
    uint64_t stream = (uint64_t)p->role + (uint64_t)(p->layer + 1) * ROLE_COUNT;
    #pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i++) {
        Philox r = philox(seed, stream, first + i);
        double u = ((double)r.v[0] + 0.5) / 4294967296.0, v = (double)r.v[1] / 4294967296.0;
        out[i] = std * (float)(sqrt(-2.0 * log(u)) * cos(6.28318530717958647692 * v));
    }
}
