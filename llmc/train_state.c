// Checkpoints that a run goes on from: see train_state.h, and doc/formats.md for the files.
//
// How a save can be killed at any moment. Everything is written in OUT/step-N.tmp, each file aside, synced and renamed.
// A rank whose file is there puts rank-K-of-R.done beside it. When rank 0 sees all of them it writes the marker,
// removes the .done files, syncs the folder, renames it to step-N, syncs OUT and only then moves OUT/latest. Where a
// run that was resumed meets a step-N of the past, both folders change names in one call, so that step-N is complete
// at every moment. File systems without such a call get step-N.old for that moment, and the reader knows of it.
#include "train_state.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include "checksum.h"
#include "device.h"
#include "safetensors.h"

#define MARKER_NAME "checkpoint.json"
#define MAX_OUT 900                    // of OUT's name: names below it fit into PATH bytes
#define PATH 1024

// ---------------------------------------------------------------------------------------------
// Names

static void tensor_name(char *buf, size_t size, const char *array, const char *name) {
    snprintf(buf, size, "%s.%s", array, name);
}

// "step-N" with `end` after it, N as it is printed; -1 for any other name.
static int64_t step_of_name(const char *name, const char *end) {
    if (strncmp(name, "step-", 5)) return -1;
    const char *digits = name + 5;
    size_t n = strspn(digits, "0123456789");
    if (n == 0 || n > 10 || (n > 1 && digits[0] == '0') || strcmp(digits + n, end)) return -1;
    return strtoll(digits, NULL, 10);
}

// Whether a file in a checkpoint's folder, or in the one where it is made, bears a name that is given here.
static bool our_file(const char *name) {
    const char *end = name;
    if (!strncmp(name, MARKER_NAME, strlen(MARKER_NAME))) {
        end += strlen(MARKER_NAME);
    } else {
        for (const char *form = "rank-00000-of-00000."; *form; form++, end++)
            if (*form == '0' ? *end < '0' || *end > '9' : *end != *form) return false;
        if (!strncmp(end, "safetensors", 11)) end += 11;
        else if (!strncmp(end, "done", 4)) end += 4;
        else return false;
    }
    if (!*end) return true;
    if (strncmp(end, ".tmp-", 5) || !end[5]) return false;
    return strspn(end + 5, "0123456789") == strlen(end + 5);
}

// ---------------------------------------------------------------------------------------------
// Folders. Only what bears our names is removed, only below OUT, and links are not followed.

static int sync_folder(const char *path, Err *err) {
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int failed = fd < 0 || (fsync(fd) && errno != EINVAL) ? errno : 0;    // EINVAL: a file system with nothing to sync
    if (fd >= 0) close(fd);
    return failed ? err_set(err, E_FAIL, "cannot sync folder %s: %s", path, strerror(failed)) : 0;
}

static DIR *open_folder(const char *out, const char *name) {
    char path[PATH];
    snprintf(path, sizeof path, "%s/%s", out, name);
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *d = fd >= 0 ? fdopendir(fd) : NULL;
    if (fd >= 0 && !d) close(fd);
    return d;
}

static bool is_dots(const char *name) { return !strcmp(name, ".") || !strcmp(name, ".."); }

static void remove_folder(const char *out, const char *name) {
    DIR *d = open_folder(out, name);
    if (!d) return;
    for (struct dirent *e; (e = readdir(d));)
        if (our_file(e->d_name)) unlinkat(dirfd(d), e->d_name, 0);
    closedir(d);
    char path[PATH];
    snprintf(path, sizeof path, "%s/%s", out, name);
    rmdir(path);
}

// What a folder holds: its marker, and anything that is not ours.
static bool folder_complete(const char *out, const char *name, bool *foreign) {
    bool marker = false;
    *foreign = false;
    DIR *d = open_folder(out, name);
    if (!d) return false;
    for (struct dirent *e; (e = readdir(d));) {
        if (!strcmp(e->d_name, MARKER_NAME)) marker = true;
        else if (!is_dots(e->d_name) && !our_file(e->d_name)) *foreign = true;
    }
    closedir(d);
    return marker;
}

// The steps of OUT's entries "step-N" + end; malloc'ed.
static int64_t *list_steps(const char *out, const char *end, int *n) {
    int64_t *steps = NULL;
    *n = 0;
    DIR *d = opendir(out);
    if (!d) return NULL;
    for (struct dirent *e; (e = readdir(d));) {
        int64_t s = step_of_name(e->d_name, end);
        if (s < 0) continue;
        if ((*n & (*n - 1)) == 0) {                              // full at every power of two
            int64_t *more = realloc(steps, (size_t)(*n ? 2 * *n : 1) * sizeof *steps);
            if (!more) break;
            steps = more;
        }
        steps[(*n)++] = s;
    }
    closedir(d);
    return steps;
}

// "latest" or "model.bin" as a process that was killed left it: with .tmp- and digits after it.
static bool left_aside(const char *name) {
    static const char *const begin[] = {"latest.tmp-", "model.bin.tmp-"};
    for (int i = 0; i < 2; i++) {
        size_t n = strlen(begin[i]);
        if (!strncmp(name, begin[i], n)) return name[n] && strspn(name + n, "0123456789") == strlen(name + n);
    }
    return false;
}

void train_state_clean(const char *out) {
    if (strlen(out) > MAX_OUT) return;
    int n;
    char name[64], path[PATH], old[PATH];
    int64_t *steps = list_steps(out, ".old", &n);
    for (int i = 0; i < n; i++) {
        snprintf(name, sizeof name, "step-%" PRId64 ".old", steps[i]);
        snprintf(old, sizeof old, "%s/%s", out, name);
        snprintf(path, sizeof path, "%s/step-%" PRId64, out, steps[i]);
        if (path_exists(path)) remove_folder(out, name);
        else rename(old, path);                                  // killed between the two renames of place_folder
    }
    free(steps);
    steps = list_steps(out, ".tmp", &n);
    for (int i = 0; i < n; i++) {
        snprintf(name, sizeof name, "step-%" PRId64 ".tmp", steps[i]);
        remove_folder(out, name);
    }
    free(steps);
    DIR *d = opendir(out);
    if (!d) return;
    for (struct dirent *e; (e = readdir(d));)
        if (left_aside(e->d_name)) unlinkat(dirfd(d), e->d_name, 0);
    closedir(d);
}

static int by_step_down(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x < y) - (x > y);
}

// Later steps than `newest` are of a past that was left behind; they are nobody's to count or to remove.
static void remove_old_checkpoints(const char *out, int64_t newest, int keep) {
    if (keep <= 0) return;
    int n, kept = 0;
    int64_t *steps = list_steps(out, "", &n);
    if (n) qsort(steps, (size_t)n, sizeof *steps, by_step_down);
    for (int i = 0; i < n; i++) {
        char name[32], dying[64], path[PATH], aside[PATH];
        bool foreign;
        snprintf(name, sizeof name, "step-%" PRId64, steps[i]);
        if (steps[i] > newest || !folder_complete(out, name, &foreign)) continue;
        if (kept++ < keep || foreign) continue;
        // Renamed first: what is half removed must not look like a checkpoint, and is swept up at the next start.
        snprintf(dying, sizeof dying, "%s.tmp", name);
        snprintf(path, sizeof path, "%s/%s", out, name);
        snprintf(aside, sizeof aside, "%s/%s", out, dying);
        remove_folder(out, dying);
        if (rename(path, aside) == 0) remove_folder(out, dying);
    }
    free(steps);
}

// OUT/step-N.tmp becomes OUT/step-N. *left: the folder that holds the checkpoint which had this name, "" for none.
static int place_folder(const char *out, int64_t step, char *left, size_t size, Err *err) {
    char dir[PATH], aside[PATH], old[PATH], old_name[64];
    snprintf(dir, sizeof dir, "%s/step-%" PRId64, out, step);
    snprintf(aside, sizeof aside, "%s/step-%" PRId64 ".tmp", out, step);
    snprintf(old_name, sizeof old_name, "step-%" PRId64 ".old", step);
    snprintf(old, sizeof old, "%s/%s", out, old_name);
    left[0] = 0;
    if (rename(aside, dir) == 0) return 0;
    if (errno == ENOTEMPTY || errno == EEXIST) {
#ifdef RENAME_EXCHANGE
        if (renameat2(AT_FDCWD, aside, AT_FDCWD, dir, RENAME_EXCHANGE) == 0) {
            snprintf(left, size, "step-%" PRId64 ".tmp", step);
            return 0;
        }
#endif
        remove_folder(out, old_name);
        if (rename(dir, old) == 0) {
            if (rename(aside, dir) == 0) {
                snprintf(left, size, "%s", old_name);
                return 0;
            }
            int failed = errno;
            rename(old, dir);
            errno = failed;
        }
    }
    return err_set(err, E_FAIL, "cannot rename %s to %s: %s", aside, dir, strerror(errno));
}

// ---------------------------------------------------------------------------------------------
// What is saved

// What the arrays are kept in: the same text wherever the same bits go on.
static void formats_text(char *buf, size_t size, const ParamTable *t, const TrainProgress *p) {
    static const char *const states[] = {[STATE_F32] = "fp32", [STATE_BF16] = "bf16", [STATE_INT8] = "int8",
                                         [STATE_INT4] = "int4", [STATE_FP8] = "fp8"};
    bool narrow = false, rows = false;
    StateFormat state = STATE_F32;                       // small tensors' moments are f32 whatever the others' are
    for (int i = 0; i < t->n; i++) {
        narrow = narrow || t->p[i].format == PARAM_BF16;
        rows = rows || t->p[i].format == PARAM_INT8;
        if (t->p[i].state != STATE_F32) state = t->p[i].state;
    }
    snprintf(buf, size, "masters %s%s, moments %s%s", narrow ? "bf16" : "fp32", rows ? " and int8 rows" : "",
             states[state], !narrow && !rows ? "" : p->rounding == ROUND_NEAREST ? ", rounded to nearest"
                                                                                : ", rounded stochastically");
    size_t n = strlen(buf);
    if (p->products) snprintf(buf + n, size - n, ", integer products %s", p->products);
}

static void describe(TrainMarker *m, const TrainProgress *p, const LlamaConfig *c, const QuantPlan *plan,
                     const OwnTable *own, const StateArray *arrays, int n_arrays) {
    *m = (TrainMarker){.progress = *p, .ranks = own->R, .n_tensors = own->table->n, .n_arrays = n_arrays};
    m->config = llama_config_to_json(c, "float32");
    m->quant = quant_plan_to_json(plan);
    formats_text(m->formats, sizeof m->formats, own->table, p);
    for (int a = 0; a < n_arrays; a++) snprintf(m->arrays[a], sizeof m->arrays[a], "%s", arrays[a].name);
    m->tensors = xcalloc((size_t)m->n_tensors, sizeof *m->tensors);
    for (int i = 0; i < m->n_tensors; i++) {
        snprintf(m->tensors[i].name, sizeof m->tensors[i].name, "%s", own->table->p[i].name);
        m->tensors[i].split = own->split[i];
    }
    m->files = xcalloc((size_t)m->ranks, sizeof *m->files);
}

// ---------------------------------------------------------------------------------------------
// Saving

#define PIECE ((size_t)1 << 20)        // bytes that are summed and written while the cache holds them
enum {
    READ_TRIES = 20,                   // of what other ranks wrote, one after the other, with waits up to 0.1 s
    TELL_SECONDS = 60,                 // of waiting for other ranks' files, before they are named
    TOLD_RANKS = 16                    // at most so many of them
};

typedef struct { const uint8_t *data; size_t bytes; } Stretch;

// One save at a time. What the writer's thread uses is set before it starts and read after it was joined, but for
// `abandoned` and `failed`.
static struct {
    bool running;                      // the thread is to be joined
    pthread_t thread;
    atomic_bool abandoned, failed;     // failed: err holds why
    Err err;

    uint8_t *copy;                     // of this rank's rows, in the order of the file
    size_t copy_bytes;

    char out[MAX_OUT + 1];
    int rank, keep;
    TrainMarker m;
    StWriter *writer;
    Stretch *stretches;                // (n_stretches) the file's data
    int n_stretches;

    char saved_out[MAX_OUT + 1];       // the last save that succeeded
    int64_t saved_step;
} save;

// What this rank writes of tensor i of an array: all rows it holds, or, where all ranks hold all, its part by `split`.
static Stretch stretch_of(const OwnTable *own, const StateArray *array, int i) {
    const StateTensor *t = &array->t[i];
    size_t row = (size_t)t->values * dtype_size(t->dtype);
    int64_t skip = (split_begin(&own->split[i], own->rank) - own->row0[i]) / t->unit;
    int64_t rows = split_count(&own->split[i], own->rank) / t->unit;
    return (Stretch){rows && t->data ? (const uint8_t *)t->data + (size_t)skip * row : NULL, (size_t)rows * row};
}

size_t train_state_copy_bytes(const OwnTable *own, const StateArray *arrays, int n_arrays) {
    size_t bytes = 0;
    for (int a = 0; a < n_arrays; a++)
        for (int i = 0; i < own->held.n; i++) bytes += stretch_of(own, &arrays[a], i).bytes;
    return bytes;
}

// On the CPU one thread alone does not fill the memory's bandwidth.
static void copy_out(void *host, const void *dev, size_t bytes) {
    const size_t part = (size_t)4 << 20;
    if (!device_is_host() || bytes <= part) {
        device_copy_out(host, dev, bytes);
        return;
    }
#pragma omp parallel for schedule(static) num_threads(device_threads())
    for (size_t k = 0; k < bytes; k += part)
        memcpy((uint8_t *)host + k, (const uint8_t *)dev + k, bytes - k < part ? bytes - k : part);
}

// in_place: the file is written from the arrays themselves. Else they are copied, what lies together in one piece.
static void copy_arrays(const OwnTable *own, const StateArray *arrays, int n_arrays, bool in_place) {
    save.stretches = xcalloc((size_t)n_arrays * (size_t)own->held.n + 1, sizeof *save.stretches);
    save.n_stretches = 0;
    Stretch run = {0};                                           // still to be copied, to `copy`
    uint8_t *copy = save.copy;
    for (int a = 0; a < n_arrays; a++)
        for (int i = 0; i < own->held.n; i++) {
            Stretch s = stretch_of(own, &arrays[a], i);
            if (!s.bytes) continue;
            if (in_place) {
                save.stretches[save.n_stretches++] = s;
                continue;
            }
            if (run.bytes && s.data != run.data + run.bytes) {
                copy_out(copy, run.data, run.bytes);
                copy += run.bytes;
                run.bytes = 0;
            }
            if (!run.bytes) run.data = s.data;
            save.stretches[save.n_stretches++] = (Stretch){copy + run.bytes, s.bytes};
            run.bytes += s.bytes;
        }
    if (run.bytes) copy_out(copy, run.data, run.bytes);
}

static StWriter *declare_file(const TrainMarker *m, const OwnTable *own, const StateArray *arrays) {
    StWriter *w = st_writer_new();
    TrainFileMeta meta[TRAIN_FILE_META];
    train_file_meta(meta, m, own->rank);
    for (int i = 0; i < TRAIN_FILE_META; i++) st_writer_meta(w, meta[i].key, meta[i].text);
    train_file_meta_free(meta);
    for (int a = 0; a < m->n_arrays; a++)
        for (int i = 0; i < m->n_tensors; i++) {
            char name[128];
            const StateTensor *t = &arrays[a].t[i];
            int64_t shape[2] = {split_count(&own->split[i], own->rank) / t->unit, t->values};
            tensor_name(name, sizeof name, m->arrays[a], m->tensors[i].name);
            if (shape[0] && shape[1]) st_writer_tensor(w, name, t->dtype, 2, shape);
        }
    return w;
}

static void aside_path(char *buf, size_t size, const char *name) {
    snprintf(buf, size, "%s/step-%" PRId64 ".tmp/%s", save.out, save.m.progress.step, name);
}

static int given_up(Err *err) {
    return err_set(err, E_FAIL, "it was given up, since another rank could not go on");
}

// This rank's file, then the word that it is there.
static int write_file(Err *err) {
    char path[PATH], done[PATH], name[64], text[64];
    aside_path(path, sizeof path, "");
    path[strlen(path) - 1] = 0;
    int rc = make_dir(path, err);
    StWriter *w = save.writer;
    save.writer = NULL;
    if (rc < 0) { st_writer_abort(w); return rc; }
    train_file_name(name, sizeof name, save.rank, save.m.ranks, ".done");
    aside_path(done, sizeof done, name);
    unlink(done);
    train_file_name(name, sizeof name, save.rank, save.m.ranks, ".safetensors");
    aside_path(path, sizeof path, name);

    Checksum sum;
    st_writer_checksum(w, &sum);
    if ((rc = st_writer_begin(w, path, err)) < 0) { st_writer_abort(w); return rc; }
    for (int i = 0; i < save.n_stretches; i++) {
        const Stretch *s = &save.stretches[i];
        for (size_t k = 0; k < s->bytes; k += PIECE) {
            if (save.abandoned) { st_writer_abort(w); return given_up(err); }
            st_writer_data(w, s->data + k, s->bytes - k < PIECE ? s->bytes - k : PIECE);
        }
    }
    if ((rc = st_writer_finish(w, err)) < 0) return rc;
    save.m.files[save.rank].bytes = sum.bytes;
    save.m.files[save.rank].checksum = checksum_end(&sum);
    if (save.rank == 0) return 0;

    // Rank 0 syncs the folder too, but what a machine has not sent yet, only that machine can.
    aside_path(path, sizeof path, "");
    if ((rc = sync_folder(path, err)) < 0) return rc;
    AtomicFile f;
    if ((rc = atomic_open(&f, done, err)) < 0) return rc;
    int n = snprintf(text, sizeof text, "%" PRIu64 " %016" PRIx64 "\n", sum.bytes, save.m.files[save.rank].checksum);
    atomic_write(&f, text, (size_t)n);
    return atomic_commit(&f, err);
}

// What rank `rank` says of its file. 1: the word is not there any more, since that rank begins anew.
static int read_done(int rank, Err *err) {
    char path[PATH], name[64], *text, again[64];
    uint64_t bytes, checksum;
    size_t len;
    struct stat st;
    train_file_name(name, sizeof name, rank, save.m.ranks, ".done");
    aside_path(path, sizeof path, name);
    int rc = file_read(&text, &len, path, 63, err);
    if (rc < 0) return rc == E_MISSING ? 1 : rc;
    bool good = sscanf(text, "%" SCNu64 " %" SCNx64, &bytes, &checksum) == 2;
    if (good) snprintf(again, sizeof again, "%" PRIu64 " %016" PRIx64 "\n", bytes, checksum);
    good = good && !strcmp(text, again);
    free(text);
    if (!good) return err_set(err, E_FORMAT, "%s is not what rank %d writes there", path, rank);
    train_file_name(name, sizeof name, rank, save.m.ranks, ".safetensors");
    aside_path(path, sizeof path, name);
    if (stat(path, &st) || (uint64_t)st.st_size != bytes)
        return err_set(err, E_FAIL, "rank %d wrote %" PRIu64 " bytes to %s, but they are not there: do all ranks see "
                       "the same file system under --out?", rank, bytes, path);
    save.m.files[rank].bytes = bytes;
    save.m.files[rank].checksum = checksum;
    return 0;
}

// Said once, when rank 0 has waited long: a rank that computes on does not know that its file is missed.
static void tell_missing(int missing) {
    char text[256] = "";
    size_t n = 0;
    for (int r = 1, told = 0; r < save.m.ranks; r++) {
        if (save.m.files[r].bytes) continue;
        if (told == TOLD_RANKS) {
            snprintf(text + n, sizeof text - n, " and %d more", missing - told);
            break;
        }
        n += (size_t)snprintf(text + n, sizeof text - n, "%s%d", told++ ? ", " : "", r);
    }
    fprintf(stderr, "rank 0: step %" PRId64 " is not saved yet: waiting for the files of rank%s %s: do all ranks see "
            "the same file system under --out (%s)?\n", save.m.progress.step, missing == 1 ? "" : "s", text, save.out);
}

// Waits for the files of the other ranks. The folder is listed anew each time: a network file system that remembers
// that a name was not there looks again. Such a file system also refuses a read now and then that succeeds later.
static int await_files(Err *err) {
    char dir[64];
    int missing = save.m.ranks - 1, wait_ms = 5, tries = READ_TRIES;
    bool told = false;
    double begin = now_seconds();
    snprintf(dir, sizeof dir, "step-%" PRId64 ".tmp", save.m.progress.step);
    while (missing) {
        int found = 0, refused = 0;
        DIR *d = open_folder(save.out, dir);
        if (!d) return err_set(err, E_FAIL, "cannot open folder %s/%s: %s", save.out, dir, strerror(errno));
        for (struct dirent *e; (e = readdir(d));) {
            char name[64];
            int rank, ranks;
            if (sscanf(e->d_name, "rank-%5d-of-%5d.done", &rank, &ranks) != 2) continue;
            train_file_name(name, sizeof name, rank, save.m.ranks, ".done");
            if (strcmp(name, e->d_name) || rank < 1 || rank >= save.m.ranks || save.m.files[rank].bytes) continue;
            int rc = read_done(rank, err);
            if (rc < 0 && rc != E_FAIL) { closedir(d); return rc; }
            if (rc < 0) refused = rc;
            found += rc == 0;
        }
        closedir(d);
        tries = refused ? tries - 1 : READ_TRIES;
        if (!tries) return refused;
        missing -= found;
        if (!missing) break;
        if (save.abandoned) return given_up(err);
        if (!told && now_seconds() - begin > TELL_SECONDS) {
            tell_missing(missing);
            told = true;
        }
        nanosleep(&(struct timespec){.tv_nsec = wait_ms * 1000000L}, NULL);
        wait_ms = found && !refused ? 5 : wait_ms < 50 ? 2 * wait_ms : 100;
    }
    return save.abandoned ? given_up(err) : 0;
}

static int write_text(const char *path, const char *text, Err *err) {
    AtomicFile f;
    int rc = atomic_open(&f, path, err);
    if (rc < 0) return rc;
    atomic_write(&f, text, strlen(text));
    return atomic_commit(&f, err);
}

// Rank 0, when every file is there. *placed: the folder bears its name now, and nothing is to be undone.
static int complete(bool *placed, Err *err) {
    char path[PATH], name[64], left[64], text[64];
    int64_t step = save.m.progress.step;
    aside_path(path, sizeof path, MARKER_NAME);
    char *marker = train_marker_to_json(&save.m);
    int rc = !marker ? err_set(err, E_NOMEM, "no memory for %s", path)
             : strlen(marker) > MARKER_MAX_BYTES
                 ? err_set(err, E_USAGE, "%s would have %zu bytes, and %zu are read of it: the model has too many "
                           "tensors, or the run too many ranks", path, strlen(marker), MARKER_MAX_BYTES)
                 : write_text(path, marker, err);
    free(marker);
    if (rc < 0) return rc;
    for (int r = 1; r < save.m.ranks; r++) {
        train_file_name(name, sizeof name, r, save.m.ranks, ".done");
        aside_path(path, sizeof path, name);
        unlink(path);
    }
    aside_path(path, sizeof path, "");
    if ((rc = sync_folder(path, err)) < 0) return rc;
    if ((rc = place_folder(save.out, step, left, sizeof left, err)) < 0) return rc;
    *placed = true;
    if ((rc = sync_folder(save.out, err)) < 0) return rc;
    snprintf(path, sizeof path, "%s/latest", save.out);
    snprintf(text, sizeof text, "step-%" PRId64 "\n", step);
    if ((rc = write_text(path, text, err)) < 0) return rc;
    // What `latest` named before is removed only when the disk has what it names now.
    if ((rc = sync_folder(save.out, err)) < 0) return rc;
    if (left[0]) remove_folder(save.out, left);
    remove_old_checkpoints(save.out, step, save.keep);
    return 0;
}

static void undo(void) {
    char name[64], path[PATH];
    if (save.rank == 0) {
        snprintf(name, sizeof name, "step-%" PRId64 ".tmp", save.m.progress.step);
        remove_folder(save.out, name);
        return;
    }
    train_file_name(name, sizeof name, save.rank, save.m.ranks, ".done");
    aside_path(path, sizeof path, name);
    unlink(path);
    train_file_name(name, sizeof name, save.rank, save.m.ranks, ".safetensors");
    aside_path(path, sizeof path, name);
    unlink(path);
    aside_path(path, sizeof path, "");
    rmdir(path);                                                 // if this was the last rank in it
}

static void *write_state(void *unused) {
    (void)unused;
    Err err = {0};
    bool placed = false;
    int rc = write_file(&err);
    if (rc == 0 && save.rank == 0) rc = await_files(&err);
    if (rc == 0 && save.rank == 0) rc = complete(&placed, &err);
    if (rc == 0) return NULL;
    if (!placed) undo();
    err_set(&save.err, rc, "the state of step %" PRId64 " was not saved: %.800s", save.m.progress.step, err.text);
    save.failed = true;
    return NULL;
}

// Waits for the thread, if there is one.
static void join(void) {
    if (!save.running) return;
    pthread_join(save.thread, NULL);
    save.running = false;
    save.abandoned = false;
    if (!save.failed) {
        strcpy(save.saved_out, save.out);
        save.saved_step = save.m.progress.step;
    }
    train_marker_free(&save.m);
    free(save.stretches);
    save.stretches = NULL;
}

int train_state_poll(Err *err) { return save.failed ? err_set(err, save.err.code, "%s", save.err.text) : 0; }

int train_state_finish(Err *err) {
    join();
    int rc = train_state_poll(err);
    save.failed = false;
    return rc;
}

void train_state_abandon(void) {
    save.abandoned = save.running;
    join();
}

// Memory for the copy. It is not cleared: the copy is what first touches it, with all threads.
static int take_copy(size_t bytes, Err *err) {
    const size_t page = 4096;
    if (bytes <= save.copy_bytes) return 0;
    free(save.copy);
    save.copy_bytes = 0;
    save.copy = bytes < SIZE_MAX - page ? aligned_alloc(page, (bytes + page - 1) & ~(page - 1)) : NULL;
    if (!save.copy)
        return err_set(err, E_NOMEM, "no memory for the copy of the state that a checkpoint is written from: %.2f GiB; "
                       "take more ranks with --shard optim or above, or --save-every 0", (double)bytes / (1 << 30));
    save.copy_bytes = bytes;
    return 0;
}

static int start_save(const char *out, const TrainProgress *p, const LlamaConfig *c, const QuantPlan *plan,
                      const OwnTable *own, const StateArray *arrays, int n_arrays, int keep, bool in_place, Err *err) {
    join();
    int rc = train_state_poll(err);
    if (rc < 0) return rc;
    // Other ranks may have been faster: their thread would write to a folder that rank 0 is about to rename.
    if (save.saved_step == p->step && !strcmp(save.saved_out, out)) return 0;
    if (strlen(out) > MAX_OUT)
        return err_set(err, E_USAGE, "--out has a name of %zu bytes; %d are possible", strlen(out), MAX_OUT);
    size_t bytes = in_place ? 0 : train_state_copy_bytes(own, arrays, n_arrays);
    if ((rc = take_copy(bytes, err)) < 0) return rc;
    copy_arrays(own, arrays, n_arrays, in_place);
    if ((rc = device_sync(err)) < 0) {
        free(save.stretches);
        save.stretches = NULL;
        return rc;
    }
    strcpy(save.out, out);
    save.rank = own->rank;
    save.keep = keep;
    describe(&save.m, p, c, plan, own, arrays, n_arrays);
    save.writer = declare_file(&save.m, own, arrays);

    // Signals are the training thread's.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&save.thread, NULL, write_state, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed) {
        st_writer_abort(save.writer);
        save.writer = NULL;
        train_marker_free(&save.m);
        free(save.stretches);
        save.stretches = NULL;
        return err_set(err, E_FAIL, "cannot start the thread that writes checkpoints: %s", strerror(failed));
    }
    save.running = true;
    return 0;
}

int train_state_save(const char *out, const TrainProgress *p, const LlamaConfig *c, const QuantPlan *plan,
                     const OwnTable *own, const StateArray *arrays, int n_arrays, int keep, Err *err) {
    return start_save(out, p, c, plan, own, arrays, n_arrays, keep, false, err);
}

int train_state_save_last(const char *out, const TrainProgress *p, const LlamaConfig *c, const QuantPlan *plan,
                          const OwnTable *own, const StateArray *arrays, int n_arrays, int keep, Err *err) {
    int rc = start_save(out, p, c, plan, own, arrays, n_arrays, keep, device_is_host(), err);
    return rc < 0 ? rc : train_state_finish(err);
}

// ---------------------------------------------------------------------------------------------
// Loading

// The stored JSON texts are compared as they were written: the writer is deterministic.
static int check_same(const char *what, const char *stored, const char *mine, const char *path, Err *err) {
    if (!strcmp(stored, mine)) return 0;
    return err_set(err, E_USAGE,
                   "%s was written by a run with another %s; resume with the settings it was started with, "
                   "or choose another --out",
                   path, what);
}

static void names_of(char *buf, size_t size, const TrainMarker *m) {
    size_t n = 0;
    buf[0] = 0;
    for (int a = 0; a < m->n_arrays && n < size; a++)
        n += (size_t)snprintf(buf + n, size - n, "%s%s", a ? ", " : "", m->arrays[a]);
}

// Whether the checkpoint is one of this run, as `mine` describes it.
static int check_run(const TrainMarker *m, const TrainMarker *mine, const StateArray *arrays, const char *path,
                     Err *err) {
    const TrainProgress *p = &m->progress, *now = &mine->progress;
    int rc = check_same("model configuration", m->config, mine->config, path, err);
    if (rc == 0) rc = check_same("quantization scheme", m->quant, mine->quant, path, err);
    if (rc < 0) return rc;
    if (p->data_hash != now->data_hash || p->T != now->T || p->seed != now->seed)
        return err_set(err, E_USAGE,
                       "%s was written with other training data, --seq-len (%d) or --seed (%llu); resume with "
                       "the same, or choose another --out",
                       path, p->T, (unsigned long long)p->seed);
    if (strcmp(m->formats, mine->formats))
        return err_set(err, E_USAGE, "%s holds %s; this run has %s; resume with the --master, --optim-state, "
                       "--rounding and --int8 it was started with, or choose another --out", path, m->formats, mine->formats);
    char theirs[160], ours[160];
    names_of(theirs, sizeof theirs, m);
    names_of(ours, sizeof ours, mine);
    if (strcmp(theirs, ours))
        return err_set(err, E_USAGE, "%s holds %s, this run has %s; was it written with another --optimizer?", path,
                       theirs, ours);
    if (m->n_tensors != mine->n_tensors)
        return err_set(err, E_FORMAT, "%s lists %d tensors; its configuration has %d", path, m->n_tensors,
                       mine->n_tensors);
    for (int i = 0; i < m->n_tensors; i++) {
        const char *name = m->tensors[i].name, *expected = mine->tensors[i].name;
        int64_t rows = m->tensors[i].split.rows, expected_rows = mine->tensors[i].split.rows;
        if (strcmp(name, expected) || rows != expected_rows)
            return err_set(err, E_FORMAT, "%s: tensor %d is %s of %lld rows; its configuration has %s of %lld", path, i,
                           name, (long long)rows, expected, (long long)expected_rows);
        for (int a = 0; a < m->n_arrays; a++)
            if (m->tensors[i].split.unit % arrays[a].t[i].unit)
                return err_set(err, E_FORMAT, "%s deals out %s in %lld rows; %lld of it share a scale in %s", path,
                               name, (long long)m->tensors[i].split.unit, (long long)arrays[a].t[i].unit,
                               arrays[a].name);
    }
    return 0;
}

// The rows of tensor i that file `rank` has and this rank holds: *begin and their number.
static int64_t shared_rows(const TrainMarker *m, const OwnTable *own, int i, int rank, int64_t *begin) {
    const RowSplit *s = &m->tensors[i].split;
    int64_t b = split_begin(s, rank), e = b + split_count(s, rank), ob = own->row0[i], oe = ob + own->held.p[i].rows;
    *begin = b > ob ? b : ob;
    e = e < oe ? e : oe;
    return e > *begin ? e - *begin : 0;
}

static int check_header(const Safetensors *st, const TrainMarker *m, const StateArray *arrays, int rank, Err *err) {
    TrainFileMeta meta[TRAIN_FILE_META];
    int rc = 0, expected = 0;
    train_file_meta(meta, m, rank);
    for (int i = 0; i < TRAIN_FILE_META && rc == 0; i++) {
        const char *stored = safetensors_meta(st, meta[i].key);
        if (!stored || !meta[i].text || strcmp(stored, meta[i].text))
            rc = err_set(err, E_FORMAT, "%s: its \"%s\" is not what %s beside it says: of another checkpoint?",
                         st->path, meta[i].key, MARKER_NAME);
    }
    train_file_meta_free(meta);
    for (int a = 0; a < m->n_arrays && rc == 0; a++)
        for (int i = 0; i < m->n_tensors && rc == 0; i++) {
            char name[128];
            const StateTensor *want = &arrays[a].t[i];
            int64_t rows = split_count(&m->tensors[i].split, rank) / want->unit;
            if (!rows || !want->values) continue;
            expected++;
            tensor_name(name, sizeof name, m->arrays[a], m->tensors[i].name);
            const StTensor *t = safetensors_find(st, name);
            if (!t) rc = err_set(err, E_FORMAT, "%s: no tensor %s", st->path, name);
            else if (t->dtype != want->dtype || t->ndim != 2 || t->shape[0] != rows || t->shape[1] != want->values)
                rc = err_set(err, E_FORMAT, "%s: %s is not %s of %lld by %lld", st->path, name, dtype_name(want->dtype),
                             (long long)rows, (long long)want->values);
        }
    if (rc == 0 && st->n != expected)
        rc = err_set(err, E_FORMAT, "%s has %d tensors, expected %d", st->path, st->n, expected);
    return rc;
}

// One file: its checksum, its header, and then the rows that this rank holds.
static int load_file(const char *path, const TrainMarker *m, int rank, const OwnTable *own, const StateArray *arrays,
                     Err *err) {
    FileMap map;
    int rc = file_map(&map, path, err);
    if (rc < 0) return rc;
    if (map.size != m->files[rank].bytes)
        rc = err_set(err, E_FORMAT, "%s has %zu bytes, %s says %" PRIu64 ": truncated or replaced; name an earlier "
                     "checkpoint in the file latest", path, map.size, MARKER_NAME, m->files[rank].bytes);
    else if (checksum_of(map.data, map.size) != m->files[rank].checksum)
        rc = err_set(err, E_FORMAT, "%s: its checksum is not the one in %s: damaged or replaced; name an earlier "
                     "checkpoint in the file latest", path, MARKER_NAME);
    Safetensors st = {0};
    if (rc == 0) rc = safetensors_parse(&st, map.data, map.size, path, err);
    if (rc == 0) rc = check_header(&st, m, arrays, rank, err);
    for (int a = 0; a < m->n_arrays && rc == 0; a++)
        for (int i = 0; i < m->n_tensors; i++) {
            const StateTensor *t = &arrays[a].t[i];
            int64_t begin, rows = shared_rows(m, own, i, rank, &begin);
            if (!rows || !t->values) continue;
            char name[128];
            tensor_name(name, sizeof name, m->arrays[a], m->tensors[i].name);
            const uint8_t *data = safetensors_find(&st, name)->data;
            size_t row = (size_t)t->values * dtype_size(t->dtype);
            size_t to = (size_t)((begin - own->row0[i]) / t->unit);
            size_t from = (size_t)((begin - split_begin(&m->tensors[i].split, rank)) / t->unit);
            device_copy_in((uint8_t *)t->data + to * row, data + from * row, (size_t)(rows / t->unit) * row);
        }
    safetensors_close(&st);
    file_unmap(&map);
    return rc;
}

// The newest complete checkpoint in OUT: 1, 0 if there is none. A folder step-N with a marker is complete and synced.
static int newest_complete(const char *out, int64_t *step, Err *err) {
    char path[PATH];
    int rc = 0;
    *step = -1;
    DIR *d = opendir(out);
    if (!d) return errno == ENOENT ? 0 : err_set(err, E_FAIL, "cannot open folder %s: %s", out, strerror(errno));
    for (struct dirent *e; rc == 0 && (errno = 0, e = readdir(d));) {
        int64_t s = step_of_name(e->d_name, "");
        if (s <= *step) continue;
        snprintf(path, sizeof path, "%s/step-%" PRId64 "/%s", out, s, MARKER_NAME);
        if (path_exists(path)) *step = s;
        else if (errno != ENOENT && errno != ENOTDIR) rc = err_set(err, E_FAIL, "%s: %s", path, strerror(errno));
    }
    if (rc == 0 && errno) rc = err_set(err, E_FAIL, "cannot read folder %s: %s", out, strerror(errno));
    closedir(d);
    return rc < 0 ? rc : *step >= 0;
}

// Only a `latest` that is not there means that there may be no checkpoint; one that cannot be read must not make a run
// start over. It is not there either where the first save was killed after its folder got its name.
static int read_latest(const char *out, int64_t *step, bool tell, Err *err) {
    char path[PATH], *name;
    size_t len;
    snprintf(path, sizeof path, "%s/latest", out);
    int rc = file_read(&name, &len, path, 256, err);
    if (rc == E_MISSING) {
        rc = newest_complete(out, step, err);
        if (rc == 1 && tell)
            fprintf(stderr, "note: %s is missing; taking step-%" PRId64 ", the newest complete checkpoint beside it\n",
                    path, *step);
        return rc;
    }
    if (rc < 0) return rc;
    name[strcspn(name, "\r\n")] = 0;
    *step = step_of_name(name, "");
    if (*step < 0) {
        for (char *s = name; *s; s++)
            if (*s < 0x20 || *s == 0x7f) *s = '?';
        rc = err_set(err, E_FORMAT, "%s holds \"%.40s\"; expected step-N", path, name);
    }
    free(name);
    return rc < 0 ? rc : 1;
}

int train_state_load(const char *out, TrainProgress *p, const LlamaConfig *c, const QuantPlan *plan,
                     const OwnTable *own, const StateArray *arrays, int n_arrays, Err *err) {
    char dir[PATH], path[PATH + 64], name[64], *text;
    int64_t step;
    size_t len;
    if (strlen(out) > MAX_OUT)
        return err_set(err, E_USAGE, "--out has a name of %zu bytes; %d are possible", strlen(out), MAX_OUT);
    int rc = read_latest(out, &step, own->rank == 0, err);
    if (rc <= 0) return rc;
    snprintf(dir, sizeof dir, "%s/step-%" PRId64, out, step);
    if (!path_exists(dir)) {
        snprintf(path, sizeof path, "%s.old", dir);
        if (path_exists(path)) strcpy(dir, path);
    }
    snprintf(path, sizeof path, "%s/%s", dir, MARKER_NAME);
    if ((rc = file_read(&text, &len, path, MARKER_MAX_BYTES, err)) < 0) return rc;
    TrainMarker m, mine;
    rc = train_marker_parse(&m, text, len, path, err);
    free(text);
    if (rc < 0) return rc;
    describe(&mine, p, c, plan, own, arrays, n_arrays);
    rc = check_run(&m, &mine, arrays, path, err);
    train_marker_free(&mine);
    if (rc == 0 && m.progress.step != step)
        rc = err_set(err, E_FORMAT, "%s is of step %" PRId64 ": was the folder renamed?", path, m.progress.step);
    for (int r = 0; r < m.ranks && rc == 0; r++) {
        bool read = r % own->R == own->rank;
        for (int i = 0; i < m.n_tensors && !read; i++) {
            int64_t begin;
            read = shared_rows(&m, own, i, r, &begin) > 0;
        }
        if (!read) continue;
        train_file_name(name, sizeof name, r, m.ranks, ".safetensors");
        snprintf(path, sizeof path, "%s/%s", dir, name);
        rc = load_file(path, &m, r, own, arrays, err);
    }
    if (rc == 0) {
        m.progress.rounding = p->rounding;
        m.progress.products = p->products;
        *p = m.progress;
    }
    train_marker_free(&m);
    return rc < 0 ? rc : 1;
}
