// Byte-pair tokenizers: byte-level (GPT-2 alphabet, split by a regular expression through PCRE2: Llama-3, SmolLM2),
// SentencePiece style with byte fallback (Llama-2), and the built-in `bytes` (ids 0..255, then bos 256, eos 257).
// Ids are those of Hugging Face's `tokenizers` for the same tokenizer.json.
#ifndef QLLM_TOKENIZER_H
#define QLLM_TOKENIZER_H
#include "common.h"
#include "gguf.h"
#include "gguf_write.h"
#ifdef __cplusplus
extern "C" {
#endif

typedef struct Tokenizer Tokenizer;

int tokenizer_from_json(Tokenizer **out, const char *text, size_t len, Err *err);      // tokenizer.json
int tokenizer_from_gguf(Tokenizer **out, Gguf *g, Err *err);                           // tokenizer.ggml.* metadata
Tokenizer *tokenizer_bytes(void);
void tokenizer_free(Tokenizer *t);

// The binary form inside model.bin: little-endian, self-contained, read in one pass with no JSON.
// Checked like any file.
int tokenizer_from_blob(Tokenizer **out, const uint8_t *blob, size_t size, Err *err);
int tokenizer_to_blob(const Tokenizer *t, uint8_t **blob, size_t *size, Err *err);     // malloc'ed
// As tokenizer.ggml.* metadata of a model with `vocab` ids, those that the tokenizer lacks as unused tokens; bos and eos
// are not among them: the model's configuration has a say in them. E_USAGE for a tokenizer that GGUF has no words for; w
// is then only good for gguf_writer_abort.
int tokenizer_to_gguf(const Tokenizer *t, GgufWriter *w, int vocab, Err *err);
// tokenizer.json text that `tokenizers` loads to the same ids. The original text where it came from one.
int tokenizer_to_json(const Tokenizer *t, char **text, size_t *len, Err *err);         // malloc'ed
// tokenizer_config.json text (bos, eos, chat template if known), for the exported folder. malloc'ed.
char *tokenizer_config_json(const Tokenizer *t);
// Keeps a tokenizer_config.json read with the tokenizer; its bos_token and eos_token replace what was guessed.
void tokenizer_set_config(Tokenizer *t, const char *config_json, size_t len);

int tokenizer_vocab_size(const Tokenizer *t);            // largest id + 1
int tokenizer_bos(const Tokenizer *t);                   // -1: none
int tokenizer_eos(const Tokenizer *t);
const char *tokenizer_name(const Tokenizer *t);          // "bytes", "byte-level bpe", "sentencepiece bpe"
uint64_t tokenizer_hash(const Tokenizer *t);             // of its content: the key of token caches

// Encodes len bytes (any bytes: invalid UTF-8 is encoded as `tokenizers` does after lossy decoding to U+FFFD).
// special: recognize special tokens in the text. No bos is added. *ids is malloc'ed (NULL when *n is 0).
// Thread-safe: several threads may encode with one tokenizer.
int tokenizer_encode(const Tokenizer *t, const char *text, size_t len, bool special, int32_t **ids, size_t *n,
                     Err *err);

// For encoding one long text in parallel. tokenizer_safe_cut: the first position p >= from (p >= 2) such that
// encode(text[0..p)) followed by encode_more(text[p..len)) gives the ids of encode(text[0..len)); len where there is
// none, or where the tokenizer is of a kind for which none is known. Cuts are after "x\n" before an ASCII letter.
size_t tokenizer_safe_cut(const Tokenizer *t, const char *text, size_t len, size_t from);
// Encodes text that continues other text: like tokenizer_encode, without the prefix that begins a text.
int tokenizer_encode_more(const Tokenizer *t, const char *text, size_t len, bool special, int32_t **ids, size_t *n,
                          Err *err);

// Text of one token in a stream; leading-space handling as in decoding a sequence: `first` is the first token of
// the text. Returns bytes, not NUL-terminated, that live as long as the tokenizer; incomplete UTF-8 is passed on
// as bytes.
const char *tokenizer_piece(const Tokenizer *t, int32_t id, bool first, size_t *len);
bool tokenizer_is_special(const Tokenizer *t, int32_t id);

// Bytes before the first that is no part of valid UTF-8; len if all are.
size_t utf8_valid_prefix(const char *text, size_t len);

#ifdef __cplusplus
}
#endif
#endif
