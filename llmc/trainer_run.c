// A run around the model (trainer.h): its start, what stands around a step, its end.
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "checksum.h"
#include "comm.h"
#include "device.h"
#include "profile.h"
#include "trainer.h"

// ---------------------------------------------------------------------------------------------
// The start of a run

static const char *const level_names[] = {"none", "optim", "grad", "full"};

// Rank 0 leaves a file in --out that all others must see: checkpoints are made of the files of all ranks.
static int check_out_is_shared(const char *out, Err *err) {
    char path[1100];
    int64_t token = (int64_t)getpid();
    int rc = comm_host_broadcast(&token, sizeof token, 0, err);
    if (rc < 0 || comm_size() == 1) return rc;
    snprintf(path, sizeof path, "%s/ranks-%lld.tmp", out, (long long)token);
    if (comm_rank() == 0) {
        AtomicFile f;
        if ((rc = atomic_open(&f, path, err)) < 0 || (rc = atomic_commit(&f, err)) < 0) return rc;
    }
    if ((rc = comm_barrier(err)) < 0) return rc;
    if (!path_exists(path))
        return err_set(err, E_USAGE, "this rank does not see in --out %s what rank 0 wrote there; name a folder on a file "
                                     "system that all ranks share", out);
    rc = comm_barrier(err);
    if (comm_rank() == 0) remove(path);
    return rc;
}

int trainer_begin(Trainer *t, const TrainOptions *o, const Option *options, int n_options, Err *err) {
    int rc;
    t->o = o;
    t->options = options;
    t->n_options = n_options;
    if (!o->train_data) return err_set(err, E_USAGE, "no --train-data; name a .txt, .jsonl or .bin file");
    if (!o->model == !o->init)
        return err_set(err, E_USAGE, "give either --model PATH or --init NAME (%s)", llama_config_names());
    t->settings = cli_json(options, n_options);
    if ((rc = comm_check_same("options", t->settings, err)) < 0) return rc;
    device_choose(comm_local_rank(), comm_local_size());
    if ((rc = device_init(o->device, o->threads ? o->threads : comm_default_threads(), err)) < 0) return rc;
    if ((rc = comm_choose(o->comm, err)) < 0) return rc;
    if ((rc = make_dir(o->out, err)) < 0) return rc;
    if ((rc = check_out_is_shared(o->out, err)) < 0) return rc;
    if (!o->model) return llama_config_named(&t->c, o->init, err);
    if ((rc = model_open_with(&t->file, o->model, o->no_verify ? MODEL_NO_VERIFY : 0, err)) < 0) return rc;
    t->c = t->file.config;
    return 0;
}

static int load_tokenizer(Trainer *t, Err *err) {
    const TrainOptions *o = t->o;
    if (o->tokenizer && strcmp(o->tokenizer, "bytes")) {
        char *text;
        size_t len;
        int rc = file_read(&text, &len, o->tokenizer, (size_t)256 << 20, err);
        if (rc == 0) { rc = tokenizer_from_json(&t->tok, text, len, err); free(text); }
        return rc;
    }
    if (!o->tokenizer && o->model && t->file.tokenizer) {
        t->tok = t->file.tokenizer;
        t->file.tokenizer = NULL;
        return 0;
    }
    if (!o->tokenizer && o->model)
        return err_set(err, E_USAGE, "%s carries no tokenizer; name one with --tokenizer FILE (or bytes)", o->model);
    t->tok = tokenizer_bytes();
    return 0;
}

// Ranks that were started with different models or data would train nonsense together.
static int check_ranks_agree(const Trainer *t, Err *err) {
    char *config = llama_config_to_json(&t->c, FLOATX_NAME), text[200];
    Checksum weights;                                      // of a row of each tensor
    checksum_begin(&weights);
    int rc = 0;
    for (int i = 0; i < t->table.n && t->o->model && rc == 0; i++) {
        const Param *p = &t->table.p[i];
        float *row = xmalloc((size_t)p->cols * sizeof *row);
        rc = model_read_rows(&t->file, p, p->rows / 2, 1, row, err);
        if (rc == 0) checksum_add(&weights, row, (size_t)p->cols * sizeof *row);
        free(row);
    }
    snprintf(text, sizeof text, "%s " QLLM_VERSION " " FLOATX_NAME " on %s, weights %016llx, training data %016llx, "
             "validation data %016llx", program_name, ops->name, (unsigned long long)checksum_end(&weights),
             (unsigned long long)t->train.hash, (unsigned long long)t->val.hash);
    if (rc == 0) rc = comm_check_same("program, model and data", text, err);
    if (rc == 0) rc = comm_check_same("model configuration", config, err);
    if (rc == 0) rc = comm_check_same("quantization scheme", t->plan_json, err);
    free(config);
    return rc;
}

static int sum_over_ranks(double *x, Err *err) {
    double *all = xmalloc((size_t)comm_size() * sizeof *all);
    int rc = comm_host_all_gather(all, x, sizeof *x, err);
    *x = 0;
    for (int r = 0; r < comm_size(); r++) *x += all[r];
    free(all);
    return rc;
}

static int load_data(Trainer *t, Err *err) {
    const TrainOptions *o = t->o;
    char cache[1100];
    int rc;
    snprintf(cache, sizeof cache, "%s/cache", o->out);
    // One rank of a machine tokenizes; the others find its tokens in the cache.
    for (int turn = 0; turn < 2; turn++) {
        if ((comm_local_rank() > 0) == (turn > 0)) {
            if ((rc = token_data_load(&t->train, o->train_data, t->tok, t->c.V, cache, err)) < 0) return rc;
            if (o->val_data && (rc = token_data_load(&t->val, o->val_data, t->tok, t->c.V, cache, err)) < 0) return rc;
        }
        if ((rc = comm_barrier(err)) < 0) return rc;
    }
    if ((rc = dataloader_init(&t->train_dl, &t->train, o->B, o->T, true, (uint64_t)o->seed, err)) < 0) return rc;
    dataloader_ranks(&t->train_dl, comm_rank(), comm_size());
    if (!o->val_data) return 0;
    if ((rc = dataloader_init(&t->val_dl, &t->val, o->B, o->T, false, 0, err)) < 0) return rc;
    dataloader_ranks(&t->val_dl, comm_rank(), comm_size());
    return 0;
}

int trainer_prepare(Trainer *t, ParamFormat others, bool gather_quantized, bool has_v, Err *err) {
    const TrainOptions *o = t->o;
    char buf[32], buf2[32];
    int rc, R = comm_size();
    if ((rc = param_table_build(&t->table, &t->c, &t->plan, err)) < 0) return rc;
    param_table_formats(&t->table, others, (StateFormat)o->optim_state);
    ShardLevel level = o->shard ? (ShardLevel)(o->shard - 1) : R > 1 ? SHARD_FULL : SHARD_NONE;
    if ((rc = shard_plan(&t->shard, &t->c, &t->plan, &t->table, level, gather_quantized, R, comm_rank(), err)) < 0)
        return rc;
    if ((rc = store_plan(&t->store, &t->shard, has_v, err)) < 0) return rc;
    if ((rc = load_tokenizer(t, err)) < 0) return rc;
    if (tokenizer_vocab_size(t->tok) > t->c.V)
        return err_set(err, E_USAGE,
                       "the tokenizer has %d tokens, the model %d; use the tokenizer the model was made with",
                       tokenizer_vocab_size(t->tok), t->c.V);
    if (o->T > t->c.max_T)
        return err_set(err, E_USAGE, "--seq-len %d exceeds the model's %d positions", o->T, t->c.max_T);
    if ((rc = load_data(t, err)) < 0) return rc;
    t->plan_json = quant_plan_to_json(&t->plan);
    if ((rc = check_ranks_agree(t, err)) < 0) return rc;

    t->peak = device_peak_flops(&t->peak_source);
    if ((rc = sum_over_ranks(&t->peak, err)) < 0) return rc;
    printf("device  %s; peak %.0f GFLOP/s measured (%s)\n", device_description(), t->peak / 1e9, t->peak_source);
    if (R > 1) printf("ranks   %s; --shard %s\n", comm_description(), level_names[level]);
    printf("model   %s: %s parameters, %d layers, width %d, %d heads on %d, feed-forward %d, vocabulary %d%s\n",
           o->model ? o->model : o->init, fmt_count(buf, (double)t->table.n_params), t->c.L, t->c.C, t->c.NH, t->c.NKV,
           t->c.FF, t->c.V, t->c.tied ? ", tied" : "");
    printf("scheme  %s; tokenizer %s\n", t->plan.name, tokenizer_name(t->tok));
    printf("data    %s training tokens%s%s%s\n", fmt_count(buf, (double)t->train.n), o->val_data ? ", " : "",
           o->val_data ? fmt_count(buf2, (double)t->val.n) : "",
           o->val_data ? " for validation" : "; no --val-data, so no validation");
    printf("FLOPs   a token: 6 * %.0f matmul parameters + 6 * %d layers * %d * %d tokens = %.3g\n",
           llama_matmul_params(&t->c), t->c.L, t->c.NH * t->c.HS, o->T, llama_train_flops_per_token(&t->c, o->T));
    fflush(stdout);
    return 0;
}

// ---------------------------------------------------------------------------------------------
// Memory and weights

static const char *const param_names[] = {"fp32", "bf16", "INT8"};
static const char *const state_names[] = {"fp32", "bf16", "int8", "int4", "fp8"};

// What a GPU's INT8 linears take beside: the largest weight as X or transposed, or the codes of both sides of a weight's
// gradient, and 64 MiB of sums. (The CPU goes through pieces that fit its caches.)
static double linears_take(const Trainer *t) {
    const LlamaConfig *c = &t->c;
    double rows = 2.0 * c->FF, qkv = (double)(c->NH + 2 * c->NKV) * c->HS;
    bool int8 = false, int8_gradients = t->products && strstr(t->products, "grad_weight");
    for (int i = 0; i < t->table.n; i++) int8 = int8 || t->table.p[i].format == PARAM_INT8;
    if (qkv > rows) rows = qkv;
    double codes = int8_gradients ? (double)t->o->B * t->o->T * (rows + c->C) : 0;
    if (c->V > rows) rows = c->V;
    double weight = int8 ? rows * c->C * sizeof(floatX) : 0;
    if (device_is_host() || !(int8 || int8_gradients)) return 0;
    return (weight > codes ? weight : codes) + (64 << 20);
}

// Prints the memory plan. Activations are counted by the function that allocates them, for one sequence and for two.
static int print_memory_plan(Trainer *t, const StateArray *arrays, int n_arrays, Err *err) {
    const TrainOptions *o = t->o;
    const ShardMemory *shard = &t->shard.memory;
    ActsShape one = t->shape, two = t->shape;
    one.B = 1;
    two.B = 2;
    double b1 = acts_bytes(&t->c, &one), b2 = acts_bytes(&t->c, &two), all = acts_bytes(&t->c, &t->shape);
    double per = o->B > 1 ? (all - b1) / (o->B - 1) : b2 - b1;
    bool int8 = false;
    ParamFormat others = PARAM_F32;
    for (int i = 0; i < t->table.n; i++)
        if (t->table.p[i].format == PARAM_INT8) int8 = true;
        else if (!param_is_norm(&t->table.p[i])) others = t->table.p[i].format;
    char master[64], moments[64], work[64];
    // bf16 that works as it is stored is counted below, once.
    bool once = others == PARAM_BF16 && store_work(&t->store, 0) == NULL && t->shard.level == SHARD_NONE;
    snprintf(master, sizeof master, "master weights, %s", once ? "fp32 (norms)" : param_names[others]);
    snprintf(moments, sizeof moments, "%s, %s", t->store.has_v ? "AdamW moments" : "momentum",
             state_names[o->optim_state]);
    snprintf(work, sizeof work, int8 ? "INT8 weights, and %s ones" : "working weights, %s", FLOATX_NAME);
    MemoryItem items[] = {
        {master, t->store.param_bytes, 0},
        {"gradients, fp32", shard->gradients + shard->own_gradients, 0},
        {moments, t->store.state_bytes, 0},
        {work, shard->weights, 0},
        {"weights in served form", t->served_bytes, 0},
        {"on the way between ranks", shard->buffers, 0},
        {"activations and logits", all - per * o->B, per},
        {"working memory of INT8 linears", linears_take(t), 0},
        {"copy of the state while it is saved", device_is_host() && o->save_every && !o->no_save
             ? (double)train_state_copy_bytes(&t->shard.own, arrays, n_arrays) : 0, 0},
        {"tokens", t->train.owned && device_is_host() ? 4.0 * (double)t->train.n : 0, 0},
    };
    int rc = memory_plan_print(&t->planned, items, sizeof items / sizeof *items, o->B, stdout, err);
    fflush(stdout);
    return rc;
}

// The rows of tensor i that this rank holds, from the model file or drawn at random.
static int load_rows(Trainer *t, int i, float *rows, int64_t tile, Err *err) {
    const OwnTable *own = &t->shard.own;
    const Param *p = &t->table.p[i];
    int64_t held = own->held.p[i].rows;
    int rc = 0;
    for (int64_t r = 0; r < held && rc == 0; r += tile) {
        int64_t n = held - r < tile ? held - r : tile, row = own->row0[i] + r;
        if (t->o->model) rc = model_read_rows(&t->file, p, row, n, rows, err);
        else param_init_random(rows, p, &t->c, (uint64_t)t->o->seed, (size_t)(row * p->cols), (size_t)(n * p->cols));
        if (rc == 0) rc = store_set_rows(&t->store, i, r, n, rows, err);
    }
    return rc;
}

static int load_weights(Trainer *t, Err *err) {
    const OwnTable *own = &t->shard.own;
    int rc = 0;
    for (int i = 0; i < t->table.n && rc == 0; i++) {
        const Param *p = &t->table.p[i];
        int64_t tile = (1 << 20) / p->cols + 1, row0 = own->row0[i];
        PackedTensor packed;
        // Trained codes go on as they are: values would have to be quantized again.
        QuantSpec in = quant_plan_linear(&t->file.plan, p->name).weight;
        bool codes = p->format == PARAM_INT8 && t->o->model && t->file.packed && in.bits == 8 &&
                     quant_works_as_codes(&in);
        if (codes) rc = model_packed(&t->file, p, &packed, err);
        if (rc < 0) break;
        if (codes && rc == 1) {
            store_set_codes(&t->store, i, 0, own->held.p[i].rows, (const int8_t *)packed.codes + row0 * p->cols,
                            packed.scale + row0);
            packed_tensor_free(&packed);
            rc = 0;
            continue;
        }
        float *rows = xmalloc((size_t)tile * (size_t)p->cols * sizeof *rows);
        rc = load_rows(t, i, rows, tile, err);
        free(rows);
    }
    return rc;
}

int trainer_alloc(Trainer *t, ActsShape shape, Err *err) {
    StateArray arrays[STORE_MAX_ARRAYS];
    int rc, n_arrays = store_arrays(&t->store, arrays);
    t->shape = shape;
    if ((rc = print_memory_plan(t, arrays, n_arrays, err)) < 0) return rc;
    // Weights first, so that the mapped model file is gone before the rest is touched.
    if ((rc = shard_alloc(&t->shard, err)) < 0 || (rc = store_alloc(&t->store, err)) < 0) return rc;
    if ((rc = load_weights(t, err)) < 0) return rc;
    if (t->o->model) model_close(&t->file);
    if ((rc = acts_alloc(&t->acts, &t->c, &shape, err)) < 0) return rc;
    size_t n = t->acts.N * (size_t)shape.grad_accum;
    t->tokens = xmalloc(n * sizeof *t->tokens);
    t->targets = xmalloc(n * sizeof *t->targets);
    return 0;
}

int trainer_start(Trainer *t, Err *err) {
    const TrainOptions *o = t->o;
    TrainProgress *p = &t->progress;
    StateArray arrays[STORE_MAX_ARRAYS];
    int rc, n_arrays = store_arrays(&t->store, arrays);
    char path[1100];
    bool first = comm_rank() == 0;
    *p = (TrainProgress){.data_hash = t->train.hash, .seed = (uint64_t)o->seed, .T = o->T,
                         .rounding = t->rounding, .products = t->products};
    if (first) train_state_clean(o->out);
    snprintf(path, sizeof path, "%s/latest", o->out);
    if (!o->resume && path_exists(path) && !o->no_save)
        printf("note    %s holds checkpoints of an earlier run, which this one replaces; --resume would go on from them\n",
               o->out);
    if ((rc = comm_barrier(err)) < 0) return rc;
    if (o->resume) {
        if ((rc = train_state_load(o->out, p, &t->c, &t->plan, &t->shard.own, arrays, n_arrays, err)) < 0) return rc;
        t->resumed = rc == 1;
        char found[96];
        snprintf(found, sizeof found, "%s step %lld, update %lld, window %llu", t->resumed ? "a checkpoint of" : "none,",
                 (long long)p->step, (long long)p->t, (unsigned long long)p->loader_position);
        if ((rc = comm_check_same("checkpoint in --out", found, err)) < 0) return rc;
        if (t->resumed) printf("resume  from step %lld\n", (long long)p->step);
        else printf("resume  %s has no checkpoint; starting at step 0\n", o->out);
        dataloader_seek(&t->train_dl, p->loader_position);
    }

    snprintf(path, sizeof path, "%s/log.jsonl", o->out);
    if ((rc = jsonlog_open(&t->json, first ? path : NULL, t->resumed, err)) < 0) return rc;
    jsonlog_begin(&t->json, "start");
    snprintf(path, sizeof path, "%s " QLLM_VERSION " " FLOATX_NAME, program_name);
    jsonlog_str(&t->json, "program", path);
    jsonlog_raw(&t->json, "options", t->settings);
    jsonlog_raw(&t->json, "quant", t->plan_json);
    jsonlog_str(&t->json, "device", device_description());
    jsonlog_num(&t->json, "peak_flops", t->peak);
    jsonlog_int(&t->json, "parameters", (long long)t->table.n_params);
    jsonlog_num(&t->json, "memory_plan", t->planned);
    jsonlog_int(&t->json, "ranks", comm_size());
    jsonlog_str(&t->json, "shard", level_names[t->shard.level]);
    jsonlog_end(&t->json);
    free(t->settings);
    free(t->plan_json);
    t->settings = t->plan_json = NULL;

    t->log = (StepLog){.json = &t->json,
                       .flops_per_token = llama_train_flops_per_token(&t->c, o->T),
                       .peak = t->peak,
                       .peak_source = t->peak_source,
                       .steps = o->steps};
    t->schedule = (Schedule){.kind = (ScheduleKind)o->schedule,
                             .lr = o->lr,
                             .min_lr = o->min_lr,
                             .warmup = o->warmup,
                             .steps = o->steps,
                             .decay = o->decay_steps ? o->decay_steps : o->steps / 5 + 1};
    trainer_catch_signals();
    if (o->profile && (rc = profile_begin(o->profile, comm_rank(), err)) < 0) return rc;
    t->profile_from = p->step + 2;             // the first steps build the matmul primitives
    t->wire_from = p->step;
    return 0;
}

// ---------------------------------------------------------------------------------------------
// Around a step

bool trainer_goes_on(const Trainer *t) { return t->progress.step < t->o->steps && !t->stop; }

bool trainer_may_record(const Trainer *t) {
    return !t->o->profile && comm_size() == 1 && t->shard.level == SHARD_NONE;
}

int trainer_begin_step(Trainer *t, Err *err) {
    const TrainOptions *o = t->o;
    const TrainProgress *p = &t->progress;
    int rc = train_state_poll(err);
    if (rc < 0) return rc;
    if (p->step == t->profile_from) profile_reset();
    t->began = now_seconds();
    comm_times(&t->busy0, &t->blocked0);
    StepState state = {.t = (int32_t)p->t + 1, .lr = (float)schedule_lr(&t->schedule, (int)p->step),
                       .seed = (uint64_t)o->seed, .stop = trainer_signal() != 0};
    device_copy_in(t->acts.state, &state, sizeof state);
    size_t N = t->acts.N, n = N * (size_t)o->grad_accum;
    for (size_t i = 0; i < n; i += N) dataloader_next(&t->train_dl, t->tokens + i, t->targets + i);
    device_copy_in(t->acts.tokens, t->tokens, n * sizeof *t->tokens);
    device_copy_in(t->acts.targets, t->targets, n * sizeof *t->targets);
    return 0;
}

int trainer_end_step(Trainer *t, Err *err) {
    const TrainOptions *o = t->o;
    TrainProgress *p = &t->progress;
    StepState state;
    int rc = device_sync(err);
    if (rc < 0) return rc;
    device_copy_out(&state, t->acts.state, sizeof state);
    // Every rank has the signals of all: they leave together.
    t->stop = state.stop || (comm_size() == 1 && trainer_signal());
    p->step++;
    p->t += !state.skip;
    p->skipped += state.skip;
    p->tokens += state.tokens;
    p->loader_position = t->train_dl.position;
    t->skips_in_a_row = state.skip ? t->skips_in_a_row + 1 : 0;
    double loss = state.tokens ? state.loss_sum / (double)state.tokens : NAN, busy, blocked;
    bool last = p->step == o->steps;
    double seconds = now_seconds() - t->began;
    comm_times(&busy, &blocked);
    t->on_the_way += busy - t->busy0;
    t->waited += blocked - t->blocked0;
    if (p->step > t->profile_from) t->profile_seconds += seconds;
    steplog_print(&t->log, &(StepReport){(int)p->step, loss, state.norm, state.lr, seconds, state.tokens, state.skip},
                  p->step % o->log_every == 0 || last || p->step == 1);
    if (t->skips_in_a_row >= o->max_skips)
        return err_set(err, E_FAIL,
                       "step %lld: %d steps in a row had no finite loss and norm (loss %g, norm %g); lower --lr or check "
                       "the data; the last good weights are in the checkpoint before, if --save-every made one",
                       (long long)p->step, t->skips_in_a_row, loss, (double)state.norm);
    if ((last || t->stop) && o->profile) {
        if (p->step > t->profile_from) profile_print(stdout, (int)(p->step - t->profile_from), t->profile_seconds);
        if ((rc = profile_end(err)) < 0) return rc;
    }
    return 0;
}

static bool last_or_stopped(const Trainer *t) { return t->progress.step == t->o->steps || t->stop; }

bool trainer_validates(const Trainer *t) {
    return t->o->val_data && !last_or_stopped(t) && t->o->val_every && t->progress.step % t->o->val_every == 0;
}

int trainer_save_if_due(Trainer *t, Err *err) {
    const TrainOptions *o = t->o;
    if (!o->save_every || o->no_save || t->progress.step % o->save_every || last_or_stopped(t)) return 0;
    StateArray arrays[STORE_MAX_ARRAYS];
    int n_arrays = store_arrays(&t->store, arrays);
    return train_state_save(o->out, &t->progress, &t->c, &t->plan, &t->shard.own, arrays, n_arrays, o->keep, err);
}

// ---------------------------------------------------------------------------------------------
// Validation

void trainer_val_begin(Trainer *t, Validation *v, int max_batches) {
    uint64_t all = (uint64_t)t->acts.B * (uint64_t)comm_size();
    *v = (Validation){.batches = (t->val_dl.n_windows + all - 1) / all,
                      .tokens = xmalloc(t->acts.N * sizeof *v->tokens),
                      .targets = xmalloc(t->acts.N * sizeof *v->targets),
                      .wire = t->shard.wire};
    if (max_batches > 0 && v->batches > (uint64_t)max_batches) v->batches = (uint64_t)max_batches;
    StepState state = {0};
    device_copy_in(t->acts.state, &state, sizeof state);
    dataloader_seek(&t->val_dl, 0);
}

bool trainer_val_next(Trainer *t, Validation *v) {
    const Acts *s = &t->acts;
    uint64_t R = (uint64_t)comm_size(), first = v->batch * (uint64_t)s->B * R;
    if (v->batch++ >= v->batches) return false;
    dataloader_next(&t->val_dl, v->tokens, v->targets);
    for (int b = 0; b < s->B; b++)
        if (first + (uint64_t)b * R + (uint64_t)comm_rank() >= t->val_dl.n_windows)
            for (int i = 0; i < s->T; i++) v->targets[(size_t)b * (size_t)s->T + (size_t)i] = -1;
    device_copy_in(s->tokens, v->tokens, s->N * sizeof *v->tokens);
    device_copy_in(s->targets, v->targets, s->N * sizeof *v->targets);
    return true;
}

int trainer_val_end(Trainer *t, Validation *v, double *loss, Err *err) {
    StepState state;
    shard_sum_state(&t->shard, t->acts.state, false);
    free(v->tokens);
    free(v->targets);
    int rc = device_sync(err);
    device_copy_out(&state, t->acts.state, sizeof state);
    *loss = state.tokens ? state.loss_sum / (double)state.tokens : NAN;
    t->shard.wire = v->wire;                   // what training sends is counted
    return rc;
}

// ---------------------------------------------------------------------------------------------
// The end of a run

// What a rank received, a step, and how long it waited for it.
static void print_wire(Trainer *t) {
    const WireBytes *b = &t->shard.wire;
    double n = t->progress.step > t->wire_from ? (double)(t->progress.step - t->wire_from) : 1;
    char linears[32], others[32], gradients[32];
    printf("wire    a step, received by a rank: linears %s, other weights %s, gradients %s; %.1f ms on the way, %.1f ms "
           "waited for\n", fmt_bytes(linears, b->linears / n), fmt_bytes(others, b->others / n),
           fmt_bytes(gradients, b->gradients / n), 1e3 * t->on_the_way / n, 1e3 * t->waited / n);
    jsonlog_begin(&t->json, "wire");
    jsonlog_int(&t->json, "steps", (long long)(t->progress.step - t->wire_from));
    jsonlog_num(&t->json, "linears", b->linears / n);
    jsonlog_num(&t->json, "others", b->others / n);
    jsonlog_num(&t->json, "gradients", b->gradients / n);
    jsonlog_num(&t->json, "busy_seconds", t->on_the_way / n);
    jsonlog_num(&t->json, "blocked_seconds", t->waited / n);
    jsonlog_end(&t->json);
}

int trainer_end(Trainer *t, Err *err) {
    const TrainOptions *o = t->o;
    StateArray arrays[STORE_MAX_ARRAYS];
    int n_arrays = store_arrays(&t->store, arrays);
    if (comm_size() > 1) print_wire(t);
    if (o->no_save) return 0;
    // A stopped run leaves a checkpoint; a finished one leaves the checkpoint, model.bin and, if asked, the folder.
    int rc = train_state_save_last(o->out, &t->progress, &t->c, &t->plan, &t->shard.own, arrays, n_arrays, o->keep, err);
    if (rc < 0 || (rc = comm_barrier(err)) < 0) return rc;
    if (t->stop && t->progress.step < o->steps) {
        printf("stopped by a signal at step %lld; saved. The same command with --resume goes on.\n",
               (long long)t->progress.step);
        return 0;
    }
    return 1;
}

// Whole tensors, from all ranks to the files that rank 0 writes.
int trainer_export(Trainer *t, Err *err) {
    Store *store = &t->store;
    if (comm_rank() > 0) return store_lend_rows(store, err);
    // What is exported is the working type's value of every parameter: quantizing it gives the codes that training
    // used. INT8 weights are codes already.
    DType dtype = sizeof(floatX) == 4 ? DT_F32 : DT_BF16;
    bool int8 = false;
    for (int i = 0; i < t->table.n; i++) int8 = int8 || t->table.p[i].format == PARAM_INT8;
    char path[1100];
    snprintf(path, sizeof path, "%s/model.bin", t->o->out);
    int rc = int8 ? model_write_trained(path, &t->c, &t->plan, &t->table, t->tok, dtype, store_rows, store_codes, store,
                                        err)
                  : model_write_bin(path, &t->c, &t->plan, &t->table, t->tok, dtype, store_rows, store, err);
    if (rc < 0) return rc;
    printf("wrote   %s\n", path);
    if (t->o->hf) {
        snprintf(path, sizeof path, "%s/hf", t->o->out);
        if ((rc = model_write_hf(path, &t->c, &t->table, t->tok, dtype, store_rows, store, err)) < 0) return rc;
        printf("wrote   %s\n", path);
    }
    if (t->progress.skipped)
        printf("%lld steps were skipped for want of a finite loss and norm\n", (long long)t->progress.skipped);
    return store_rows_end(store, err);
}

int trainer_main(int argc, char **argv, const Option *options, int n_options, const char *summary,
                 int (*run_training)(Err *err)) {
    Err err = {0};
    bool asks = false;
    for (int i = 1; i < argc; i++)
        asks = asks || !strcmp(argv[i], "--help") || !strcmp(argv[i], "-h") || !strcmp(argv[i], "--version");
    if (!asks && comm_init(&argc, &argv, &err) < 0) comm_die(&err);     // answers need no other ranks
    // One rank speaks for all.
    if (comm_rank() > 0 && !freopen("/dev/null", "w", stdout)) perror("/dev/null");
    if (cli_parse(options, n_options, summary, NULL, argc, argv, &err) < 0) comm_die(&err);
    if (run_training(&err) < 0 || comm_barrier(&err) < 0) comm_die(&err);
    comm_end();
    return 0;
}
