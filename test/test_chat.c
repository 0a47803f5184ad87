// Chat templates: text that transformers' apply_chat_template makes (Jinja2 3.1.6, transformers 5.23) of the same
// templates and messages, the built-in templates, what is refused and how it is named, and bounds.
#include "test_common.h"
#include "chat.h"
#include "jinja.h"

static const char variables[] =
    "{\"messages\": [{\"role\": \"system\", \"content\": \" Be brief. \"},"
    " {\"role\": \"user\", \"content\": \"Hi\\n\"},"
    " {\"role\": \"assistant\", \"content\": \" Yes? \"}, {\"role\": \"user\", \"content\": \"N\303\244h\302\240\"}],"
    " \"bos_token\": \"<s>\", \"eos_token\": \"</s>\", \"add_generation_prompt\": true, \"tools\": null}";

static const struct { const char *source, *text; } cases[] = {
    {"{% for m in messages %}{{ m['role'] + ':' + m.content | trim }}{% if not loop.last %}, {% endif %}{% end"
     "for %}",
     "system:Be brief., user:Hi, assistant:Yes?, user:N\303\244h"},
    {"{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] "
     "+ eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_tok"
     "en }}\n{% else %}\n{{ '<|assistant|>\n' + message['content'] + eos_token }}\n{% endif %}\n{% if loop.las"
     "t and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}\n",
     "<|system|>\n Be brief. </s>\n<|user|>\nHi\n</s>\n<|assistant|>\n Yes? </s>\n<|user|>\nN\303\244h"
     "\302\240</s>\n<|assistant|>\n"},
    {"  {%- if true %}  \n  x\n  {% endif %}\n y {#- c -#} z\n  {# d #}\n\t{%+ if true %}w{% endif +%}\n{{- 1 "
     "}}\n\n",
     "  \n  x\n yz\n\tw1\n"},
    {"{%- set ns = namespace(n=0) -%}{%- for m in messages -%}{%- set x = m.role -%}{%- if m.role == 'user' -%"
     "}{%- set ns.n = ns.n + 1 -%}{%- endif -%}{%- endfor -%}{{ ns.n }} {{ x is defined }} {% set b %}[{{ ns.n"
     " * 2 }}]{% endset %}{{ b ~ b|length }}",
     "2 False [4]3"},
    {"{% set q %}a{% set z = 1 %}{% endset %}{{ q }}{{ z is defined }}", "aFalse"},
    {"{% for m in messages if m.role != 'system' %}{{ loop.index }}/{{ loop.length }}{{ '!' if loop.first }}{%"
     " if loop.index0 == 1 %}{% break %}{% endif %};{% endfor %}{% for x in [] %}{% else %} none{% endfor %}{%"
     " for k, v in {'a': 1, 'b': 2}.items() %} {{ k }}={{ v }}{% endfor %}",
     "1/3!;2/3 none a=1 b=2"},
    {"{{ messages[1:]|length }}{{ messages[-1].content[1:] }}|{{ '\303\244\342\202\254x'[::-1] }}{{ '"
     "\303\244\342\202\254x'[1] }}{{ messages[9] is defined }}",
     "3\303\244h\302\240|x\342\202\254\303\244\342\202\254False"},
    {"{{ 7 // 2 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 2 * 3 - 1 }} {{ (1, 2)|last }} {{ 'a' < 'b' and not 1 == 2 }}"
     " {{ none or 'd' }} {{ missing|default('e') }}",
     "3 -4 2 5 2 True d e"},
    {"{{ '  x '.strip() ~ 'a</t>b'.split('</t>')[-1] ~ 'aXa'.replace('X', 'yy') }} {{ 'user'|upper }} {{ 'it'."
     "title() }} {{ 'abc'.startswith('ab') }} {{ ['a', 'b']|join('-') }} {{ 'x' in 'yxy' }} {{ 'role' in messa"
     "ges[0] }}",
     "xbayya USER It True a-b True True"},
    {"{{ {'a': [1, none, true], 'b': '\303\251\"\n'} | tojson }}",
     "{\"a\": [1, null, true], \"b\": \"\303\251\\\"\\n\"}"},
    {"{{ tools is none }}{{ missing is not defined }}{{ 'a' is string }}{{ messages[0] is mapping }}{{ 3 is od"
     "d }}{{ raise_exception is defined }}",
     "TrueTrueTrueTrueTrueTrue"},
};

// The text (malloc'ed), or NULL and the message in err.
static char *render(const char *source, size_t len, Err *err) {
    Jinja *t;
    char *text = NULL;
    size_t n;
    cJSON *v = json_parse(variables, strlen(variables), "variables", err);
    assert_non_null(v);
    if (jinja_parse(&t, source, len, err) == 0) {
        if (jinja_render(t, v, &text, &n, err) == 0) assert_int_equal(strlen(text), n);
        jinja_free(t);
    }
    cJSON_Delete(v);
    return text;
}

static void test_as_transformers(void **u) {
    (void)u;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Err err = {0};
        char *text = render(cases[i].source, strlen(cases[i].source), &err);
        if (!text) fail_msg("case %zu: %s", i, err.text);
        if (strcmp(text, cases[i].text) != 0) fail_msg("case %zu: \"%s\", expected \"%s\"", i, text, cases[i].text);
        free(text);
    }
}

// What is not understood, or goes wrong, is named with its line.
static void test_refused(void **u) {
    (void)u;
    static const struct { const char *source, *names; } bad[] = {
        {"\n{% macro f(x) %}{% endmacro %}", "line 2: {% macro %} is not supported"},
        {"{% if true %}\n{{ 1 }}", "line 1: {% if %} is not closed"},
        {"\n\n{{ messages | groupby('role') }}", "line 3: the filter groupby is not supported"},
        {"{{ 1 is filtered }}", "the test \"is filtered\" is not supported"},
        {"{{ 'x'.format(1) }}", "the method format of a string is not supported"},
        {"{{ lipsum() }}", "the function lipsum is not supported"},
        {"{{ raise_exception('roles must alternate') }}", "it refuses this conversation: roles must alternate"},
        {"{{ missing.role }}", "\"role\" is asked of something undefined: missing"},
        {"{{ 'a' + missing }}", "a string + undefined is not supported"},
        {"{{ 'a' + 1 }}", "a string + an integer is not supported"},
        {"{{ 1.5 }}", "numbers with a point"},
        {"{{ 2 ** 3 }}", "the operator ** is not supported"},
        {"{{ 1 // 0 }}", "division by zero"},
        {"{{ 999999999999999999 * 999999999999999999 }}", "too large"},
        {"{{ 1 < 2 < 3 }}", "chains of comparisons"},
        {"{{ 'open }}", "does not end"},
        {"{{ 1", "not closed by }}"},
        {"{# open", "a comment is not closed"},
        {"{% set x.y = 1 %}", "x is not a namespace"},
        {"{% break %}", "outside of a loop"},
        {"{% for i in [1] %}{% set x %}{% break %}{% endset %}{% endfor %}", "outside of a loop"},
        {"{{ messages }}", "a list cannot be written as text"},
        {"{% for a, b in [1] %}{% endfor %}", "unpacks two values"},
        {"{{ '\\ud800' }}", "is no character"},
        {"{{ ) }}", "\")\" where an expression is expected"},
        {"{{ 1 2 }}", "\"2\" where the end of the tag is expected"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        Err err = {0};
        char *text = render(bad[i].source, strlen(bad[i].source), &err);
        if (text) fail_msg("%s is taken: %s", bad[i].source, text);
        if (!strstr(err.text, bad[i].names))
            fail_msg("%s: \"%s\" does not say \"%s\"", bad[i].source, err.text, bad[i].names);
        assert_int_equal(err.code, E_FORMAT);
    }
}

// Text of `n` times a, m in between, n times b.
static char *repeated(const char *a, const char *m, const char *b, int n) {
    char *s = malloc((size_t)n * (strlen(a) + strlen(b)) + strlen(m) + 1), *p = s;
    for (int i = 0; i < n; i++) p = stpcpy(p, a);
    p = stpcpy(p, m);
    for (int i = 0; i < n; i++) p = stpcpy(p, b);
    return s;
}

static void test_bounds(void **u) {
    (void)u;
    static const struct { const char *a, *m, *b; int n; const char *names; } deep[] = {
        {"(", "1", ")", 10000, "nested deeper"},
        {"not ", "1", "", 10000, "nested deeper"},
        {"-", "1", "", 10000, "nested deeper"},
        {"[", "1", "]", 10000, "nested deeper"},
        {"1 + ", "1", "", 10000, "nested deeper"},
        {"1 if 1 else ", "1", "", 10000, "nested deeper"},
        {"", "1", ".a", 10000, "nested deeper"},
        {"", "1", "|trim", 10000, "nested deeper"},
    };
    for (size_t i = 0; i < sizeof deep / sizeof *deep; i++) {
        Err err = {0};
        char *inner = repeated(deep[i].a, deep[i].m, deep[i].b, deep[i].n), *all = repeated("{{ ", inner, " }}", 1);
        if (render(all, strlen(all), &err)) fail_msg("%s is taken", deep[i].a);
        if (!strstr(err.text, deep[i].names)) fail_msg("%s%s: %s", deep[i].a, deep[i].b, err.text);
        free(inner);
        free(all);
    }
    static const struct { const char *source, *names; } endless[] = {
        {"{% for a in range(9000) %}{% for b in range(9000) %}{% endfor %}{% endfor %}", "more than"},
        {"{% for a in range(99999999) %}{% endfor %}", "the range is longer"},
        {"{% set n = namespace(x='0123456789') %}{% for a in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
         "memory"},
        {"{% set n = namespace(x=[]) %}{% for a in range(99) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x | tojson }}",
         "nested deeper"},
    };
    for (size_t i = 0; i < sizeof endless / sizeof *endless; i++) {
        Err err = {0};
        if (render(endless[i].source, strlen(endless[i].source), &err)) fail_msg("%s is taken", endless[i].source);
        if (!strstr(err.text, endless[i].names)) fail_msg("%s: %s", endless[i].source, err.text);
    }
    // Names that are looked for among many count.
    char *many = xmalloc(1 << 20);
    size_t n = 0;
    for (int i = 0; i < 20000; i++) n += (size_t)sprintf(many + n, "{%%set a%d=1%%}", i);
    sprintf(many + n, "{%% for i in range(1000) %%}{%% if unknown %%}{%% endif %%}{%% endfor %%}");
    Err slow = {0};
    if (render(many, strlen(many), &slow)) fail_msg("20,000 variables are taken");
    if (!strstr(slow.text, "more than")) fail_msg("%s", slow.text);
    free(many);
    // A chain of elif is long, not deep.
    Err err = {0};
    char *chain = repeated("{% elif 1 == 2 %}", "{% else %}x{% endif %}", "", 5000);
    char *all = repeated("{% if 1 == 2 %}", chain, "", 1), *text = render(all, strlen(all), &err);
    if (!text) fail_msg("%s", err.text);
    assert_string_equal(text, "x");
    free(text);
    free(all);
    free(chain);
}

static const ChatMessage talk[] = {{"system", " Be brief. "}, {"user", "Hi\n"}, {"assistant", " Yes? "},
                                   {"user", "Why"}};

static void test_built_in(void **u) {
    (void)u;
    static const struct { const char *name, *text; } of[] = {
        {"llama3", "<|bos|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
                   "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
                   "<|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>"
                   "<|start_header_id|>user<|end_header_id|>\n\nWhy<|eot_id|>"
                   "<|start_header_id|>assistant<|end_header_id|>\n\n"},
        {"chatml", "<|im_start|>system\n Be brief. <|im_end|>\n<|im_start|>user\nHi\n<|im_end|>\n"
                   "<|im_start|>assistant\n Yes? <|im_end|>\n<|im_start|>user\nWhy<|im_end|>\n<|im_start|>assistant\n"},
        {"zephyr", "<|system|>\n Be brief. <|eos|>\n<|user|>\nHi\n<|eos|>\n<|assistant|>\n Yes? <|eos|>\n"
                   "<|user|>\nWhy<|eos|>\n<|assistant|>\n"},
        {"llama2", "<|bos|>[INST] <<SYS>>\n Be brief. \n<</SYS>>\n\nHi [/INST] Yes? <|eos|><|bos|>[INST] Why [/INST]"},
    };
    Tokenizer *tok = tokenizer_bytes();
    for (size_t i = 0; i < sizeof of / sizeof *of; i++) {
        ChatTemplate *t;
        Err err = {0};
        char *text;
        size_t len;
        if (chat_template_open(&t, tok, of[i].name, &err) < 0) fail_msg("%s", err.text);
        if (chat_render(t, talk, 4, true, &text, &len, &err) < 0) fail_msg("%s", err.text);
        assert_string_equal(text, of[i].text);
        assert_int_equal(chat_end_token(t, tok), of[i].name[0] == 'z' || of[i].name[5] == '2' ? 257 : -1);
        free(text);
        chat_template_close(t);
    }
    ChatTemplate *t;
    Err err = {0};
    assert_int_equal(chat_template_open(&t, tok, "vicuna", &err), E_USAGE);
    if (!strstr(err.text, "\"vicuna\"") || !strstr(err.text, "llama3")) fail_msg("%s", err.text);
    assert_int_equal(chat_template_open(&t, tok, NULL, &err), E_MISSING);
    if (!strstr(err.text, "--template")) fail_msg("%s", err.text);
    tokenizer_free(tok);
}

// The template that comes with a tokenizer: a text, or a list with a default; what it cannot run names the way out.
static void test_of_the_model(void **u) {
    (void)u;
    static const struct { const char *config, *text; } of[] = {
        {"{\"eos_token\": {\"content\": \"<|eos|>\"}, \"chat_template\": \"{{ messages[3].content }}{{ eos_token }}\"}",
         "Why<|eos|>"},
        {"{\"chat_template\": [{\"name\": \"rag\", \"template\": \"x\"}, {\"name\": \"default\", \"template\": \"d\"}]}",
         "d"},
        {"{\"chat_template\": \"{% include 'x' %}\"}", NULL},
        {"{\"chat_template\": \"{{ tools.x() }}\"}", NULL},
    };
    for (size_t i = 0; i < sizeof of / sizeof *of; i++) {
        Tokenizer *tok = tokenizer_bytes();
        ChatTemplate *t = NULL;
        Err err = {0};
        char *text = NULL;
        size_t len;
        tokenizer_set_config(tok, of[i].config, strlen(of[i].config));
        int rc = chat_template_open(&t, tok, NULL, &err);
        if (rc == 0) rc = chat_render(t, talk, 4, true, &text, &len, &err);
        if (of[i].text) {
            if (rc < 0) fail_msg("%s", err.text);
            assert_string_equal(text, of[i].text);
        } else {
            assert_int_equal(rc, E_FORMAT);
            if (!strstr(err.text, "line 1") || !strstr(err.text, "--template")) fail_msg("%s", err.text);
        }
        free(text);
        chat_template_close(t);
        tokenizer_free(tok);
    }
}

static char *read_file(const char *path, size_t *len) {
    char *text;
    Err err = {0};
    if (file_read(&text, len, path, (size_t)1 << 26, &err) < 0) fail_msg("%s", err.text);
    return text;
}

// Llama-3's own tokenizer and template: the ids of apply_chat_template(tokenize=True).
static void test_llama3_ids(void **u) {
    (void)u;
    static const int32_t want[] = {128000, 128006, 9125, 128007, 271, 3513, 10015, 13, 128009, 128006, 882, 128007, 271,
                                   13347, 128009, 128006, 78191, 128007, 271, 9642, 30, 128009, 128006, 882, 128007,
                                   271, 10445, 128009, 128006, 78191, 128007, 271};
    const char *path = test_data("tokenizers/llama3/tokenizer.json");
    if (!path) skip();
    size_t len, n;
    Tokenizer *tok;
    ChatTemplate *t;
    Err err = {0};
    int32_t *ids;
    char *text = read_file(path, &len);
    if (tokenizer_from_json(&tok, text, len, &err) < 0) fail_msg("%s", err.text);
    free(text);
    text = read_file(test_data("tokenizers/llama3/tokenizer_config.json"), &len);
    tokenizer_set_config(tok, text, len);
    free(text);
    if (chat_template_open(&t, tok, NULL, &err) < 0 || chat_render(t, talk, 4, true, &text, &len, &err) < 0 ||
        tokenizer_encode(tok, text, len, true, &ids, &n, &err) < 0)
        fail_msg("%s", err.text);
    assert_int_equal(n, sizeof want / sizeof *want);
    assert_memory_equal(ids, want, sizeof want);
    assert_int_equal(chat_end_token(t, tok), 128009);
    free(ids);
    free(text);
    chat_template_close(t);
    tokenizer_free(tok);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_as_transformers), cmocka_unit_test(test_refused), cmocka_unit_test(test_bounds),
    cmocka_unit_test(test_built_in), cmocka_unit_test(test_of_the_model), cmocka_unit_test(test_llama3_ids),
};
TEST_MAIN(tests)
