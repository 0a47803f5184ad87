// Text to batches. Sources: .txt, .jsonl (field `text` of each line), .bin token shards in llm.c's two formats
// (magic 20240520 version 1 with u16 tokens, 20240801 version 7 with u32 tokens; 256 int32 header words, [2] = count).
// Text is tokenized once, in parallel, and cached next to the output folder under a key of content and tokenizer.
#ifndef QLLM_DATALOADER_H
#define QLLM_DATALOADER_H
#include "common.h"
#include "tokenizer.h"
#ifdef __cplusplus
extern "C" {
#endif

// All tokens of a source, one after another. A text file by itself is its tokens and nothing else. Where a source has
// several documents (lines of .jsonl, several text files) each is bos, tokens, eos, as far as the tokenizer has them.
// Special tokens spelled in the text become those tokens, as in `tokenizers`.
typedef struct { const int32_t *tokens; size_t n; FileMap map; int32_t *owned; uint64_t hash; } TokenData;

// path may be a file, a folder (its .txt, .jsonl or .bin files in the order of their names), or a pattern
// ("data/*.bin"). A file with another ending is text. Text and shards do not mix. cache_dir NULL: no cache.
// Every id is checked against V. Empty sources and sources shorter than two tokens are E_USAGE. tok may be NULL where
// the source is shards.
int token_data_load(TokenData *d, const char *path, const Tokenizer *tok, int V, const char *cache_dir, Err *err);
void token_data_free(TokenData *d);

// Parts of token_data_load, for tests and fuzzing.
// Where the tokens of a shard are, after its header is checked against its size. width is 2 or 4 bytes a token.
int shard_parse(const uint8_t *file, size_t size, const char *what, const uint8_t **tokens, size_t *n, int *width,
                Err *err);
// The text of line number `line` of a .jsonl file: malloc'ed; *text NULL for a blank line.
int jsonl_text(const char *s, size_t len, const char *what, size_t line, char **text, size_t *text_len, Err *err);

// Batches of B sequences of T+1 tokens. The data are cut into windows of T tokens (the target of the last is the first
// of the next); windows are visited in an order shuffled by (seed, epoch); the tail shorter than a window is dropped.
// When the data hold fewer than one window, one window of what there is, padded with token 0 and target -1, is made.
typedef struct {
    const TokenData *data;
    int B, T;
    bool shuffle;
    uint64_t seed;
    int rank, R;                         // this loader's rank of R; 0 of 1 unless dataloader_ranks says otherwise
    uint64_t position;                   // windows handed out so far, by all ranks: all of the state a checkpoint needs
    uint64_t n_windows;
    uint32_t *order; uint64_t order_epoch;
} DataLoader;

int dataloader_init(DataLoader *dl, const TokenData *data, int B, int T, bool shuffle, uint64_t seed, Err *err);
// Call right after init: R loaders, one a rank, hand out the windows together. Of the next B*R windows rank r keeps
// r, r + R, ...: its sequence b is number b*R + r of the batch that one rank with B*R sequences gets.
void dataloader_ranks(DataLoader *dl, int rank, int R);
void dataloader_free(DataLoader *dl);
// tokens, targets: (B, T) i32 of this rank; position moves on by B*R.
void dataloader_next(DataLoader *dl, int32_t *tokens, int32_t *targets);
void dataloader_seek(DataLoader *dl, uint64_t position);

#ifdef __cplusplus
}
#endif
#endif
