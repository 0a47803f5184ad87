// Any bytes as a chat template, rendered over a conversation: refused, or text that ends. The first byte chooses whether
// an answer is to be begun.
#include <stdlib.h>
#include "jinja.h"

static const char variables[] =
    "{\"messages\": [{\"role\": \"system\", \"content\": \" s \"}, {\"role\": \"user\", \"content\": \"u\\n\"},"
    " {\"role\": \"assistant\", \"content\": \"\303\244\"}, {\"role\": \"user\", \"content\": \"\"}], \"bos_token\": \"<s>\","
    " \"eos_token\": \"</s>\", \"tools\": null}";

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static cJSON *v;
    Err err;
    Jinja *t;
    char *text;
    size_t len;
    if (size < 1 || size > 1 << 14) return 0;
    if (!v) {
        v = json_parse(variables, strlen(variables), "variables", &err);
        if (!v) abort();
        cJSON_AddBoolToObject(v, "add_generation_prompt", false);
    }
    cJSON_ReplaceItemInObjectCaseSensitive(v, "add_generation_prompt", cJSON_CreateBool(data[0] & 1));
    if (jinja_parse(&t, (const char *)data + 1, size - 1, &err) == 0) {
        if (jinja_render(t, v, &text, &len, &err) == 0) {
            if (text[len] != 0) abort();
            free(text);
        }
        jinja_free(t);
    }
    return 0;
}
