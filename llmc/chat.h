// Chat templates: the text that a model expects around the turns of a conversation.
#ifndef QLLM_CHAT_H
#define QLLM_CHAT_H
#include "common.h"
#include "tokenizer.h"
#ifdef __cplusplus
extern "C" {
#endif

typedef struct { const char *role, *content; } ChatMessage;      // "system", "user", "assistant"
typedef struct ChatTemplate ChatTemplate;

#define CHAT_BUILT_IN "llama3, chatml, zephyr, llama2"
// name: one of CHAT_BUILT_IN, else E_USAGE. NULL: the template that came with the model's tokenizer ("chat_template" of
// tokenizer_config.json: a text, or a list of which "default" is taken), which jinja.h runs; E_MISSING where there is
// none, E_FORMAT where it cannot be run: both name the built-in ones as the way out. The special tokens that a template
// may ask for (bos_token, eos_token, ...) are the tokenizer's.
int chat_template_open(ChatTemplate **out, const Tokenizer *tok, const char *name, Err *err);
void chat_template_close(ChatTemplate *t);
// The conversation as text (malloc'ed, len bytes and a NUL), as transformers' apply_chat_template writes it. reply:
// with the beginning of the assistant's next turn (add_generation_prompt). Special tokens are spelled out, bos among
// them: encode it with `special` on and put nothing in front.
int chat_render(const ChatTemplate *t, const ChatMessage *messages, int n, bool reply, char **text, size_t *len,
                Err *err);
// The special token that ends the assistant's turn in this template; -1 if it has none.
int chat_end_token(const ChatTemplate *t, const Tokenizer *tok);

#ifdef __cplusplus
}
#endif
#endif
