#include "chat.h"
#include <stdlib.h>
#include <string.h>
#include "jinja.h"

struct ChatTemplate {
    Jinja *jinja;
    cJSON *tokens;                   // {"bos_token": "<s>", ...}
};

static const struct { const char *name, *text; } built_in[] = {
    {"llama3",
     "{{ bos_token }}{% for m in messages %}"
     "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content.strip() + '<|eot_id|>' }}{% endfor %}"
     "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"},
    {"chatml",
     "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
     "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"},
    {"zephyr",
     "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{% endfor %}"
     "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"},
    {"llama2",
     "{% set ns = namespace(system='') %}{% for m in messages %}"
     "{% if m.role == 'system' %}{% set ns.system = '<<SYS>>\\n' + m.content + '\\n<</SYS>>\\n\\n' %}"
     "{% elif m.role == 'user' %}{{ bos_token + '[INST] ' + (ns.system + m.content).strip() + ' [/INST]' }}"
     "{% set ns.system = '' %}"
     "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"},
};

// Fields such as "bos_token", which are a text or an object that has one as its "content".
static void take_tokens(cJSON *tokens, const cJSON *config) {
    const cJSON *k;
    cJSON_ArrayForEach(k, config) {
        size_t n = k->string ? strlen(k->string) : 0;
        if (n < 6 || strcmp(k->string + n - 6, "_token") != 0) continue;
        const char *text = cJSON_IsObject(k) ? json_string(k, "content") : cJSON_GetStringValue(k);
        if (text) cJSON_AddStringToObject(tokens, k->string, text);
    }
}

static const char *template_of(const cJSON *config) {
    const cJSON *t = cJSON_GetObjectItemCaseSensitive(config, "chat_template"), *k;
    if (!cJSON_IsArray(t)) return cJSON_GetStringValue(t);
    cJSON_ArrayForEach(k, t) {
        const char *name = json_string(k, "name");
        if (name && strcmp(name, "default") == 0) return json_string(k, "template");
    }
    return NULL;
}

static int find_template(const char **text, const cJSON *config, const char *name, Err *err) {
    if (!name) {
        *text = template_of(config);
        if (*text) return 0;
        return err_set(err, E_MISSING, "this model brings no chat template (\"chat_template\" of its "
                       "tokenizer_config.json): choose one that it was trained with, --template " CHAT_BUILT_IN);
    }
    for (size_t i = 0; i < sizeof built_in / sizeof *built_in; i++) {
        *text = built_in[i].text;
        if (strcmp(built_in[i].name, name) == 0) return 0;
    }
    return err_set(err, E_USAGE, "there is no chat template \"%.60s\"; known: " CHAT_BUILT_IN, name);
}

static int with_way_out(int rc, Err *err) {
    char why[700];
    snprintf(why, sizeof why, "%.699s", err->text);
    return err_set(err, rc, "%s; if one of the built-in templates is the model's, choose it: --template "
                            CHAT_BUILT_IN, why);
}

int chat_template_open(ChatTemplate **out, const Tokenizer *tok, const char *name, Err *err) {
    Err local;
    if (!err) err = &local;
    *out = NULL;
    char *config_text = tokenizer_config_json(tok);
    cJSON *config = config_text ? json_parse(config_text, strlen(config_text), "tokenizer_config.json", NULL) : NULL;
    free(config_text);
    const char *text;
    int rc = find_template(&text, config, name, err);
    if (rc == 0) {
        ChatTemplate *t = xcalloc(1, sizeof *t);
        t->tokens = cJSON_CreateObject();
        take_tokens(t->tokens, config);
        rc = jinja_parse(&t->jinja, text, strlen(text), err);
        if (rc == 0) *out = t;
        else {
            rc = with_way_out(rc, err);
            chat_template_close(t);
        }
    }
    cJSON_Delete(config);
    return rc;
}

void chat_template_close(ChatTemplate *t) {
    if (!t) return;
    jinja_free(t->jinja);
    cJSON_Delete(t->tokens);
    free(t);
}

int chat_render(const ChatTemplate *t, const ChatMessage *messages, int n, bool reply, char **text, size_t *len,
                Err *err) {
    Err local;
    if (!err) err = &local;
    cJSON *variables = cJSON_Duplicate(t->tokens, true);
    cJSON *list = cJSON_AddArrayToObject(variables, "messages");
    for (int i = 0; i < n; i++) {
        cJSON *m = cJSON_CreateObject();
        cJSON_AddStringToObject(m, "role", messages[i].role);
        cJSON_AddStringToObject(m, "content", messages[i].content);
        cJSON_AddItemToArray(list, m);
    }
    cJSON_AddBoolToObject(variables, "add_generation_prompt", reply);
    cJSON_AddNullToObject(variables, "tools");       // transformers sets both, to none where there are none
    cJSON_AddNullToObject(variables, "documents");
    int rc = jinja_render(t->jinja, variables, text, len, err);
    cJSON_Delete(variables);
    return rc < 0 ? with_way_out(rc, err) : 0;
}

// What follows an answer that is easy to find again.
int chat_end_token(const ChatTemplate *t, const Tokenizer *tok) {
    static const char answer[] = "qllm-answer";
    const ChatMessage m[] = {{"user", "qllm"}, {"assistant", answer}};
    char *text;
    size_t len, n = 0;
    int32_t *ids = NULL;
    int end = -1;
    if (chat_render(t, m, 2, false, &text, &len, NULL) < 0) return -1;
    const char *at = strstr(text, answer);
    const char *rest = at ? at + sizeof answer - 1 : text + len;
    if (tokenizer_encode_more(tok, rest, len - (size_t)(rest - text), true, &ids, &n, NULL) < 0) n = 0;
    for (size_t i = 0; i < n && end < 0; i++)
        if (tokenizer_is_special(tok, ids[i])) end = ids[i];
    free(ids);
    free(text);
    return end;
}
