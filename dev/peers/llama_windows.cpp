// Token perplexity of a GGUF file by llama.cpp, over the windows of `eval --text`: the text's tokens, no bos, windows of
// M inputs that do not overlap, each target predicted from its own window only. Built by llama_cpp.sh against libllama.
//
//   llama_windows MODEL.gguf TEXT M THREADS     prints: tokens N perplexity P loss L tokens_per_second S
//
// N counts the targets: tokens of the text less one.
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>
#include "llama.h"

static void quiet(ggml_log_level level, const char *text, void *) {
    if (level >= GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

// -log p(target) of one row of logits.
static double loss_of(const float *logits, int V, int target) {
    float top = logits[0];
    for (int v = 1; v < V; v++) top = logits[v] > top ? logits[v] : top;
    double sum = 0;
    for (int v = 0; v < V; v++) sum += std::exp((double)logits[v] - top);
    return std::log(sum) + top - logits[target];
}

int main(int argc, char **argv) {
    if (argc != 5) {
        fprintf(stderr, "usage: llama_windows MODEL.gguf TEXT M THREADS\n");
        return 2;
    }
    int M = atoi(argv[3]), threads = atoi(argv[4]);
    std::ifstream file(argv[2], std::ios::binary);
    std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    llama_log_set(quiet, nullptr);
    llama_model_params mp = llama_model_default_params();
    mp.n_gpu_layers = 0;
    llama_model *model = llama_model_load_from_file(argv[1], mp);
    if (!model || text.empty() || M < 2 || threads < 1) {
        fprintf(stderr, "llama_windows: cannot read %s or %s, or M < 2\n", argv[1], argv[2]);
        return 1;
    }
    llama_context_params cp = llama_context_default_params();
    cp.n_ctx = cp.n_batch = cp.n_ubatch = (uint32_t)M;
    cp.n_threads = cp.n_threads_batch = threads;
    llama_context *ctx = llama_init_from_model(model, cp);
    const llama_vocab *vocab = llama_model_get_vocab(model);
    int V = llama_vocab_n_tokens(vocab);
    std::vector<llama_token> ids(text.size() + 16);
    int n = llama_tokenize(vocab, text.data(), (int32_t)text.size(), ids.data(), (int32_t)ids.size(), false, false);
    if (!ctx || n < 2) {
        fprintf(stderr, "llama_windows: no context, or %d tokens\n", n);
        return 1;
    }
    ids.resize((size_t)n);
    llama_batch batch = llama_batch_init(M, 0, 1);
    double loss = 0, seconds = 0;
    for (int begin = 0; begin < n - 1; begin += M) {
        int len = n - 1 - begin < M ? n - 1 - begin : M;
        batch.n_tokens = len;
        for (int i = 0; i < len; i++) {
            batch.token[i] = ids[(size_t)(begin + i)];
            batch.pos[i] = i;
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i] = 1;
        }
        auto start = std::chrono::steady_clock::now();
        llama_memory_clear(llama_get_memory(ctx), true);
        if (llama_decode(ctx, batch)) {
            fprintf(stderr, "llama_windows: window at token %d failed\n", begin);
            return 1;
        }
        const float *logits = llama_get_logits(ctx);
        seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        for (int i = 0; i < len; i++) loss += loss_of(logits + (size_t)i * (size_t)V, V, ids[(size_t)(begin + i + 1)]);
    }
    loss /= n - 1;
    printf("tokens %d perplexity %.5f loss %.7f tokens_per_second %.1f\n", n - 1, std::exp(loss), loss,
           (n - 1) / seconds);
    llama_batch_free(batch);
    llama_free(ctx);
    llama_model_free(model);
    return 0;
}
