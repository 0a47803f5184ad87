// Training checkpoints: the state comes back to the bit on any number of ranks; whatever is damaged is refused by name;
// a process killed, or a call that fails, at any point of a save leaves a checkpoint that loads. Ranks are processes.
#include "test_common.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "checksum.h"
#include "device.h"
#include "safetensors.h"
#include "store.h"
#include "train_state.h"

// ---------------------------------------------------------------------------------------------
// What the library asks of the system goes through here: counted, noted, and at a given call killed or refused. Nothing
// here survives a power cut anyway, so nothing is synced.

typedef struct {
    atomic_int calls, writes, begun;   // begun: the step that the rank which is slower has begun to save
    int at, error;                     // at the call of this number: die (error 0), or fail with this error
    bool no_exchange;                  // a file system that cannot exchange names
    int n_notes;
    char notes[410][100];              // a few more: ranks do not wait for each other to count
} Faults;
static Faults *faults;                 // shared with the processes that play ranks

static const char *last_part(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static bool fault(const char *what, const char *name) {
    if (!faults) return false;
    int call = ++faults->calls;
    if (faults->n_notes < 400) snprintf(faults->notes[faults->n_notes++], 100, "%s %s", what, last_part(name));
    if (call != faults->at) return false;
    if (!faults->error) kill(getpid(), SIGKILL);
    errno = faults->error;
    return true;
}

int fsync(int fd) {
    char link[64], path[512] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (readlink(link, path, sizeof path - 1) < 0) return -1;
    return fault("fsync", path) ? -1 : 0;
}
int rename(const char *a, const char *b) {
    return fault("rename to", b) ? -1 : (int)syscall(SYS_renameat2, AT_FDCWD, a, AT_FDCWD, b, 0);
}
int renameat2(int da, const char *a, int db, const char *b, unsigned flags) {
    if (faults && faults->no_exchange) { errno = EINVAL; return -1; }
    return fault("exchange with", b) ? -1 : (int)syscall(SYS_renameat2, da, a, db, b, flags);
}
int unlink(const char *path) { return fault("unlink", path) ? -1 : (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0); }
int unlinkat(int fd, const char *path, int flags) {
    return fault("unlink", path) ? -1 : (int)syscall(SYS_unlinkat, fd, path, flags);
}
int rmdir(const char *path) {
    return fault("rmdir", path) ? -1 : (int)syscall(SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR);
}
int mkdir(const char *path, mode_t mode) {
    int rc = (int)syscall(SYS_mkdirat, AT_FDCWD, path, mode);
    return rc == 0 && fault("mkdir", path) ? -1 : rc;
}
// A clock that can be set ahead.
static atomic_int seconds_ahead;
int clock_gettime(clockid_t clock, struct timespec *t) {
    int rc = (int)syscall(SYS_clock_gettime, clock, t);
    t->tv_sec += seconds_ahead;
    return rc;
}
size_t fwrite(const void *p, size_t size, size_t n, FILE *f) {
    // Of the many writes of a file's data one in eight.
    bool counts = faults && f != stdout && f != stderr && (n < 64 || faults->writes++ % 8 == 0);
    return counts && fault("write", "") ? 0 : fwrite_unlocked(p, size, n, f);
}

// ---------------------------------------------------------------------------------------------
// A model with rows that no number of ranks divides, norms of one row, rows that stay together, and whole tensors.

static LlamaConfig config;
static QuantPlan plan;
static ParamTable table;
static char out[512];
static const char *array_names[3] = {"master", "m", "v"};

static void model(const char *weight, const char *embedding) {
    Err err = {0};
    static bool ready;
    if (!ready && device_init("cpu", 1, &err)) fail_msg("%s", err.text);
    ready = true;
    param_table_free(&table);
    if (llama_config_named(&config, "tiny", &err)) fail_msg("%s", err.text);
    config.C = 16; config.L = 2; config.NH = 2; config.NKV = 1; config.HS = 8; config.FF = 48; config.V = 37;
    config.tied = true;
    if (quant_plan_from_options(&plan, NULL, NULL, weight, NULL, embedding, NULL, NULL, 0, &err) ||
        param_table_build(&table, &config, &plan, &err))
        fail_msg("%s", err.text);
}

// An empty folder OUT.
static void fresh(void) {
    static int n;
    snprintf(out, sizeof out, "%s/out-%d", test_tmpdir(), n++);
    assert_int_equal(mkdir(out, 0777), 0);
}

static const char *in_out(const char *name) {
    static char path[4][700];
    static int turn;
    turn = (turn + 1) % 4;
    snprintf(path[turn], sizeof path[turn], "%s/%s", out, name);
    return path[turn];
}

static TrainProgress progress_of(int64_t step) {
    return (TrainProgress){.step = step, .t = step / 2, .loader_position = (uint64_t)step << 40, .tokens = step << 33,
                           .skipped = 1, .data_hash = 0xfedcba9876543210ull, .seed = UINT64_MAX, .T = 64};
}

static bool same_progress(TrainProgress a, TrainProgress b) {
    return a.step == b.step && a.t == b.t && a.loader_position == b.loader_position && a.tokens == b.tokens &&
           a.skipped == b.skipped && a.data_hash == b.data_hash && a.seed == b.seed && a.T == b.T;
}

// Any bits, NaNs among them, that depend on the step and on the place in the whole model.
static uint32_t value_of(int64_t step, int array, int tensor, int64_t row, int64_t col) {
    uint64_t h = (uint64_t)step * 1000003 + (uint64_t)array;
    h = (h * 131 + (uint64_t)tensor) * 0x9e3779b97f4a7c15ull;
    h = (h ^ h >> 29) + (uint64_t)(row * 4099 + col);
    h *= 0xbf58476d1ce4e5b9ull;
    return (uint32_t)(h >> 32);
}

typedef struct {
    OwnTable own;
    float *data[3];                    // laid out by own.held
    StateTensor *tensors[3];
    StateArray arrays[3];
} Rank;

static void rank_open(Rank *k, int R, int rank, bool replicated) {
    Err err = {0};
    if (own_table_build(&k->own, &table, NULL, R, rank, replicated, &err)) fail_msg("%s", err.text);
    for (int a = 0; a < 3; a++) {
        k->data[a] = calloc(k->own.held.n_elements + 1, sizeof(float));
        k->tensors[a] = calloc((size_t)table.n, sizeof *k->tensors[a]);
        for (int i = 0; i < table.n; i++)
            k->tensors[a][i] = (StateTensor){DT_F32, 1, table.p[i].cols, k->data[a] + k->own.held.p[i].offset};
        k->arrays[a] = (StateArray){array_names[a], k->tensors[a]};
    }
}

static void rank_close(Rank *k) {
    for (int a = 0; a < 3; a++) {
        free(k->data[a]);
        free(k->tensors[a]);
    }
    own_table_free(&k->own);
}

// Writes the values of a step into the rows held, or counts those that differ.
static int64_t rank_values(const Rank *k, int64_t step, bool write) {
    int64_t wrong = 0;
    for (int a = 0; a < 3; a++)
        for (int i = 0; i < table.n; i++) {
            const Param *p = &k->own.held.p[i];
            uint32_t *x = (uint32_t *)(k->data[a] + p->offset);
            for (int64_t r = 0; r < p->rows; r++)
                for (int64_t c = 0; c < p->cols; c++, x++) {
                    uint32_t v = value_of(step, a, i, k->own.row0[i] + r, c);
                    if (write) *x = v;
                    else wrong += *x != v;
                }
        }
    return wrong;
}

static int rank_save(const Rank *k, int64_t step, int keep, Err *err) {
    TrainProgress p = progress_of(step);
    rank_values(k, step, true);
    return train_state_save(out, &p, &config, &plan, &k->own, k->arrays, 3, keep, err);
}

// What the processes report.
typedef struct { int rc; Err err; } Report;
static Report *reports;

static void *shared(size_t bytes) {
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(p != MAP_FAILED);
    return p;
}

// Saves with R processes, some of them by way of a copy, some as at the end of a run; 0 if all of them saw no error.
// -9: one was killed.
static int save_ranks(int R, bool replicated, int64_t step, int keep) {
    if (!reports) reports = shared(64 * sizeof *reports);
    pid_t pids[64];
    for (int r = R - 1; r >= 0; r--) {
        pids[r] = fork();
        if (pids[r]) continue;
        Rank k;
        rank_open(&k, R, r, replicated);
        Err *err = &reports[r].err;
        TrainProgress p = progress_of(step);
        if ((r + step) % 2) {
            reports[r].rc = rank_save(&k, step, keep, err);
            if (reports[r].rc == 0) reports[r].rc = train_state_finish(err);
        } else {
            rank_values(&k, step, true);
            reports[r].rc = train_state_save_last(out, &p, &config, &plan, &k.own, k.arrays, 3, keep, err);
        }
        _exit(0);
    }
    int rc = 0;
    for (int r = 0; r < R; r++) {
        int status;
        waitpid(pids[r], &status, 0);
        if (!WIFEXITED(status) || WEXITSTATUS(status)) rc = -9;
        else if (reports[r].rc && !rc) rc = reports[r].rc;
    }
    return rc;
}

static void must_save(int R, bool replicated, int64_t step, int keep) {
    if (save_ranks(R, replicated, step, keep))
        for (int r = 0; r < R; r++)
            if (reports[r].rc) fail_msg("rank %d of %d: %s", r, R, reports[r].err.text);
}

// Saves in this process, where nothing fails. It would not save the step that it saved last, so the folder gets another
// name each time.
static void save_here(int64_t step, int keep) {
    static int turn;
    char whole[sizeof out];
    Rank k;
    Err err = {0};
    strcpy(whole, out);
    strcat(out, turn++ % 2 ? "/." : "/./.");
    rank_open(&k, 1, 0, false);
    if (rank_save(&k, step, keep, &err) || train_state_finish(&err)) fail_msg("%s", err.text);
    rank_close(&k);
    strcpy(out, whole);
}

static int load_rank(Rank *k, TrainProgress *p, Err *err) {
    *p = progress_of(0);
    return train_state_load(out, p, &config, &plan, &k->own, k->arrays, 3, err);
}

// Loads on one rank; the step, whose values must be those that were saved, 0 if there is none, or the error.
static int64_t load_one(int R, int rank, bool replicated, Err *err) {
    Rank k;
    TrainProgress p;
    rank_open(&k, R, rank, replicated);
    int64_t got = load_rank(&k, &p, err);
    if (got == 1) {
        got = p.step;
        assert_true(same_progress(p, progress_of(p.step)));
        assert_int_equal(rank_values(&k, p.step, false), 0);
    }
    rank_close(&k);
    return got;
}

// Loads on all of R ranks: the error of the first that met one, naming `file`.
static int load_ranks(int R, bool replicated, const char *file) {
    int rc = 0;
    for (int r = 0; r < R; r++) {
        Err err = {0};
        int64_t got = load_one(R, r, replicated, &err);
        if (got < 0) {
            if (!strstr(err.text, file)) fail_msg("expected a message about %s, got: %s", file, err.text);
            if (rc == 0) rc = (int)got;
        }
    }
    return rc;
}

static int64_t must_load(void) {
    Err err = {0};
    int64_t step = load_one(1, 0, false, &err);
    if (step < 0) fail_msg("%s", err.text);
    return step;
}

static int entries(const char *part) {
    int n = 0;
    DIR *d = opendir(out);
    for (struct dirent *e; (e = readdir(d));) n += e->d_name[0] != '.' && strstr(e->d_name, part) != NULL;
    closedir(d);
    return n;
}

static uint8_t *read_whole(const char *path, size_t *size) {
    FileMap map;
    Err err;
    if (file_map(&map, path, &err)) fail_msg("%s", err.text);
    uint8_t *p = malloc(map.size + 1);
    if (map.size) memcpy(p, map.data, map.size);
    p[map.size] = 0;
    *size = map.size;
    file_unmap(&map);
    return p;
}

static void write_whole(const char *path, const void *data, size_t size) {
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    assert_true(fd >= 0 && write(fd, data, size) == (ssize_t)size);
    close(fd);
}

// ---------------------------------------------------------------------------------------------

// The formula of doc/formats.md, word by word.
static uint64_t plain_checksum(const uint8_t *data, size_t n) {
    const uint64_t A = 0x6a09e667f3bcc909ull, B = 0xbb67ae8584caa73bull;
    uint64_t lane[8], h = n;
    for (int k = 0; k < 8; k++) lane[k] = A * (uint64_t)(k + 1);
    for (size_t i = 0; i < (n + 63) / 64 * 64; i += 8) {
        uint64_t word = 0, *l = &lane[i / 8 % 8];
        for (size_t j = 0; j < 8; j++) word |= (uint64_t)(i + j < n ? data[i + j] : 0) << (8 * j);
        *l += word * A;
        *l = (*l << 27 | *l >> 37) * B;
    }
    for (int k = 0; k < 8; k++) {
        h += lane[k] * A;
        h = (h << 27 | h >> 37) * B;
    }
    h = (h ^ h >> 32) * A;
    return h ^ h >> 29;
}

static void checksums(void **state) {
    (void)state;
    uint8_t data[400];
    for (size_t i = 0; i < sizeof data; i++) data[i] = (uint8_t)(i * 37 + i / 7);
    for (size_t n = 0; n <= 200; n++) {
        uint64_t whole = checksum_of(data, n);
        assert_true(whole == plain_checksum(data, n));
        assert_true(n == 0 || whole != checksum_of(data, n - 1));
        for (size_t i = 0; i < 8 * n; i++) {
            data[i / 8] ^= (uint8_t)(1 << i % 8);
            assert_true(checksum_of(data, n) != whole);
            data[i / 8] ^= (uint8_t)(1 << i % 8);
        }
    }
    for (size_t piece = 1; piece < 150; piece++) {
        Checksum s;
        checksum_begin(&s);
        for (size_t k = 0; k < sizeof data; k += piece)
            checksum_add(&s, data + k, sizeof data - k < piece ? sizeof data - k : piece);
        assert_true(checksum_end(&s) == checksum_of(data, sizeof data));
    }
    Checksum s;                                    // nothing, from nowhere, while some bytes wait for more
    checksum_begin(&s);
    checksum_add(&s, data, 10);
    checksum_add(&s, NULL, 0);
    checksum_add(&s, data + 10, 90);
    assert_true(checksum_end(&s) == checksum_of(data, 100));
    uint8_t zeros[130] = {0};                      // the length counts, not only what is in it
    assert_true(checksum_of(zeros, 64) != checksum_of(zeros, 63));
    assert_true(checksum_of(zeros, 128) != checksum_of(zeros, 64));
}

// Any number of ranks to any number of ranks.
static void every_rank_to_every_rank(void **state) {
    (void)state;
    static const int sizes[] = {1, 2, 3, 5, 8};
    for (int scheme = 0; scheme < 3; scheme++) {
        model(scheme == 0 ? NULL : scheme == 1 ? "int5,block=2x16" : "int8,tensor,symmetric",
              scheme == 2 ? "int8,tensor,symmetric" : NULL);
        for (int from = 0; from < 5; from++)
            for (int replicated = 0; replicated < 2; replicated++) {
                fresh();
                assert_int_equal(must_load(), 0);
                must_save(sizes[from], replicated, 7, 0);
                assert_int_equal(entries(""), 2);
                for (int to = 0; to < 5; to++)
                    for (int r = 0; r < sizes[to]; r++)
                        for (int all = 0; all < 2; all++) {
                            Err err = {0};
                            int64_t step = load_one(sizes[to], r, all, &err);
                            if (step != 7) fail_msg("%d to %d: %s", sizes[from], sizes[to], err.text);
                        }
            }
    }
}

// The folder of a checkpoint holds a file a rank and the marker, nothing else.
static void folder_contents(void **state) {
    (void)state;
    model("int5,block=2x16", NULL);
    fresh();
    must_save(3, false, 12, 0);
    int n = 0;
    DIR *d = opendir(in_out("step-12"));
    for (struct dirent *e; (e = readdir(d));) n += e->d_name[0] != '.';
    closedir(d);
    assert_int_equal(n, 4);
    size_t size;
    char *latest = (char *)read_whole(in_out("latest"), &size);
    assert_string_equal(latest, "step-12\n");
    free(latest);
    char *marker = (char *)read_whole(in_out("step-12/checkpoint.json"), &size);
    assert_null(strstr(marker, "formats"));                    // said of other formats than f32 alone
    free(marker);
    // The copy in memory is this rank's share: all that it holds, or its part of what all hold.
    Rank own, all;
    rank_open(&own, 3, 1, false);
    rank_open(&all, 3, 1, true);
    assert_int_equal(train_state_copy_bytes(&own.own, own.arrays, 3), 12 * own.own.held.n_params);
    assert_int_equal(train_state_copy_bytes(&all.own, all.arrays, 2), 8 * own.own.held.n_params);
    rank_close(&own);
    rank_close(&all);
}

static void flip(const char *path, size_t at, int bit) {
    int fd = open(path, O_RDWR);
    uint8_t b;
    assert_true(fd >= 0 && pread(fd, &b, 1, (off_t)at) == 1);
    b ^= (uint8_t)(1 << bit);
    assert_int_equal(pwrite(fd, &b, 1, (off_t)at), 1);
    close(fd);
}

static void flipped_bits(void **state) {
    (void)state;
    model("int5,block=2x16", NULL);
    fresh();
    must_save(2, false, 5, 0);
    static const char *const files[] = {"step-5/rank-00000-of-00002.safetensors",
                                        "step-5/rank-00001-of-00002.safetensors", "step-5/checkpoint.json"};
    for (int f = 0; f < 3; f++) {
        const char *path = in_out(files[f]);
        size_t size;
        uint8_t *data = read_whole(path, &size);
        uint64_t header = 0;
        memcpy(&header, data, 8);
        free(data);
        if (f == 2) header = size;                 // every byte of the marker and the headers, some of each tensor
        for (size_t at = 0; at < size; at += at < header + 8 ? 1 : 13) {
            flip(path, at, (int)(at % 8));
            if (load_ranks(1, false, files[f]) != E_FORMAT) fail_msg("%s: byte %zu is not missed", files[f], at);
            flip(path, at, (int)(at % 8));
        }
        flip(path, size - 1, 7);
        assert_int_equal(load_ranks(1, false, files[f]), E_FORMAT);
        flip(path, size - 1, 7);
    }
    for (size_t at = 0; at < 7; at++)              // "step-5\n"
        for (int bit = 0; bit < 8; bit++) {
            flip(in_out("latest"), at, bit);
            Err err = {0};
            assert_true(load_one(1, 0, false, &err) < 0);
            assert_true(strstr(err.text, "/latest") || strstr(err.text, "/checkpoint.json"));
            flip(in_out("latest"), at, bit);
        }
    assert_int_equal(must_load(), 5);
}

// Whichever file is damaged, some rank finds it, also where no rank has rows of it to read.
static void some_rank_finds_it(void **state) {
    (void)state;
    static const int sizes[] = {1, 2, 3, 24};                  // of 24 some have no rows at all
    model("int8,tensor,symmetric", "int8,tensor,symmetric");
    for (int from = 0; from < 4; from++) {
        fresh();
        must_save(sizes[from], false, 3, 0);
        for (int f = 0; f < sizes[from]; f++) {
            char name[100];
            snprintf(name, sizeof name, "step-3/rank-%05d-of-%05d.safetensors", f, sizes[from]);
            flip(in_out(name), 100, 3);
            for (int to = 0; to < 4; to++) {
                assert_int_equal(load_ranks(sizes[to], false, name), E_FORMAT);
                assert_int_equal(load_ranks(sizes[to], true, name), E_FORMAT);
            }
            flip(in_out(name), 100, 3);
        }
        assert_int_equal(must_load(), 3);
    }
}

static void put_marker(const TrainMarker *m) {
    char *text = train_marker_to_json(m);
    write_whole(in_out("step-5/checkpoint.json"), text, strlen(text));
    free(text);
}

static void get_marker(TrainMarker *m) {
    size_t size;
    Err err = {0};
    char *text = (char *)read_whole(in_out("step-5/checkpoint.json"), &size);
    if (train_marker_parse(m, text, size, "marker", &err)) fail_msg("%s", err.text);
    free(text);
}

static void wrong_files(void **state) {
    (void)state;
    model("int5,block=2x16", NULL);
    fresh();
    must_save(2, false, 4, 0);
    must_save(2, false, 5, 0);
    const char *f0 = "step-5/rank-00000-of-00002.safetensors", *f1 = "step-5/rank-00001-of-00002.safetensors",
               *marker = "step-5/checkpoint.json";
    char p0[700], p1[700], aside[700];
    strcpy(p0, in_out(f0));
    strcpy(p1, in_out(f1));
    strcpy(aside, in_out("aside"));
    size_t size, size1;
    uint8_t *data = read_whole(p1, &size1), *text = read_whole(in_out(marker), &size);

    // truncated, longer, missing, a folder
    static const size_t cuts[] = {0, 1, 7, 8, 100, 4096};
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
        write_whole(p1, data, cuts[i]);
        assert_int_equal(load_ranks(1, false, f1), E_FORMAT);
        if (cuts[i] < size) {
            write_whole(in_out(marker), text, cuts[i]);
            assert_int_equal(load_ranks(1, false, marker), E_FORMAT);
            write_whole(in_out(marker), text, size);
        }
    }
    write_whole(p1, data, size1 - 1);
    assert_int_equal(load_ranks(1, false, f1), E_FORMAT);
    unlink(p1);
    assert_int_equal(load_ranks(1, false, f1), E_MISSING);
    mkdir(p1, 0777);
    assert_true(load_ranks(1, false, f1) < 0);
    rmdir(p1);
    write_whole(p1, data, size1);
    assert_int_equal(must_load(), 5);

    // of another rank, of another step
    rename(p0, aside); rename(p1, p0); rename(aside, p1);
    assert_int_equal(load_ranks(1, false, "step-5/rank-0000"), E_FORMAT);
    rename(p0, aside); rename(p1, p0); rename(aside, p1);
    uint8_t *other = read_whole(in_out("step-4/rank-00001-of-00002.safetensors"), &size1);
    write_whole(p1, other, size1);
    assert_int_equal(load_ranks(1, false, f1), E_FORMAT);
    // and a marker that vouches for it
    TrainMarker m;
    get_marker(&m);
    TrainMarker good = m;
    good.files = malloc(2 * sizeof *good.files);
    memcpy(good.files, m.files, 2 * sizeof *good.files);
    m.files[1].bytes = size1;
    m.files[1].checksum = checksum_of(other, size1);
    put_marker(&m);
    assert_int_equal(load_ranks(1, false, f1), E_FORMAT);
    free(other);
    write_whole(p1, data, (size_t)good.files[1].bytes);
    memcpy(m.files, good.files, 2 * sizeof *m.files);
    free(good.files);

    // A marker that deals out other rows than the files have: what would be a gap and an overlap between ranks.
    m.tensors[0].split.first = 1;
    put_marker(&m);
    assert_int_equal(load_ranks(1, false, f0), E_FORMAT);
    m.tensors[0].split.first = 0;
    m.tensors[0].split.unit = 37;
    put_marker(&m);
    assert_int_equal(load_ranks(1, false, f0), E_FORMAT);
    m.tensors[0].split.unit = 1;
    m.tensors[0].split.rows = 38;
    put_marker(&m);
    assert_int_equal(load_ranks(1, false, marker), E_FORMAT);
    m.tensors[0].split.rows = 37;
    m.n_tensors--;
    put_marker(&m);
    assert_int_equal(load_ranks(1, false, marker), E_FORMAT);
    m.n_tensors++;
    m.progress.step = 6;
    put_marker(&m);
    assert_int_equal(load_ranks(1, false, marker), E_FORMAT);
    m.progress.step = 5;
    put_marker(&m);
    assert_int_equal(must_load(), 5);

    // Files with right checksums and wrong contents.
    for (int kind = 0; kind <= 5; kind++) {
        Safetensors st;
        Err err = {0};
        Checksum sum;
        write_whole(p1, data, (size_t)m.files[1].bytes);
        if (safetensors_open(&st, p1, &err)) fail_msg("%s", err.text);
        StWriter *w = st_writer_new();
        for (int i = 0; i < st.n_meta; i++) {
            bool rows = !strcmp(st.meta[i].key, "rows");
            st_writer_meta(w, st.meta[i].key, kind == 1 && rows ? "{}" : st.meta[i].value);
        }
        int n = st.n - (kind == 2);
        for (int i = 0; i < n; i++) {
            const StTensor *t = &st.tensors[i];
            int64_t shape[2] = {t->shape[kind == 3 && i == 5], t->shape[!(kind == 3 && i == 5)]};
            st_writer_tensor(w, t->name, kind == 4 && i == 7 ? DT_I32 : DT_F32, 2, shape);
        }
        if (kind == 5) st_writer_tensor(w, "more", DT_F32, 2, (int64_t[]){0, 1});
        st_writer_checksum(w, &sum);
        assert_int_equal(st_writer_begin(w, aside, &err), 0);
        for (int i = 0; i < n; i++) st_writer_data(w, st.tensors[i].data, st.tensors[i].bytes);
        assert_int_equal(st_writer_finish(w, &err), 0);
        safetensors_close(&st);
        rename(aside, p1);
        TrainMarker forged;
        get_marker(&forged);
        forged.files[1].bytes = sum.bytes;
        forged.files[1].checksum = checksum_end(&sum);
        put_marker(&forged);
        train_marker_free(&forged);
        if (kind == 0) assert_int_equal(must_load(), 5);       // nothing forged: the tensors' order is free
        else assert_int_equal(load_ranks(1, false, f1), E_FORMAT);
        put_marker(&m);
    }
    free(data);
    free(text);
    train_marker_free(&m);
}

// Markers with a checksum that is right and contents that are not.
static void hostile_markers(void **state) {
    (void)state;
    model(NULL, NULL);
    fresh();
    must_save(1, false, 5, 0);
    size_t size;
    char *text = (char *)read_whole(in_out("step-5/checkpoint.json"), &size);
    static const struct { const char *from, *to; } edits[] = {
        {"\"version\":\t1", "\"version\":\t2"},
        {"\"version\":\t1", "\"version\":\t\"1\""},
        {"qllm.c training checkpoint", "qllm.c training chequepoint"},
        {"\"ranks\":\t1", "\"ranks\":\t2"},
        {"\"ranks\":\t1", "\"ranks\":\t0"},
        {"\"ranks\":\t1", "\"ranks\":\t-1"},
        {"\"ranks\":\t1", "\"ranks\":\t1.5"},
        {"\"ranks\":\t1", "\"ranks\":\t1e300"},
        {"\"ranks\":\t1", "\"ranks\":\t2147483647"},
        {"\"rank-00000-of-00001.safetensors\"", "\"../rank-00000-of-00001.safetensors\""},
        {"\"rank-00000-of-00001.safetensors\"", "\"/etc/passwd\""},
        {"\"rank-00000-of-00001.safetensors\"", "\"rank-00001-of-00001.safetensors\""},
        {"\"rank-00000-of-00001.safetensors\"", "\"rank-00000-of-00001.safetensors\":[1,\"0000000000000000\"],\"x\""},
        {"\"files\":\t{", "\"files\":\t{\"a\":[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["},
        {"\"arrays\":\t[\"master\"", "\"arrays\":\t[\"master\\u001b[2J\""},
        {"\"arrays\":\t[\"master\"", "\"arrays\":\t[\"master of all the arrays\""},
        {"\"arrays\":\t[\"master\"", "\"arrays\":\t[\"a\",\"a\",\"a\",\"a\",\"a\",\"a\",\"a\",\"a\""},
        {"\"arrays\":\t[\"master\"", "\"arrays\":\t[\"v\""},
        {"\"model.embed_tokens.weight\":\t[37, 1, 0]", "\"model.embed_tokens.weight\":\t[37, 0, 0]"},
        {"\"model.embed_tokens.weight\":\t[37, 1, 0]", "\"model.embed_tokens.weight\":\t[37, 2, 0]"},
        {"\"model.embed_tokens.weight\":\t[37, 1, 0]", "\"model.embed_tokens.weight\":\t[37, 1, 1]"},
        {"\"model.embed_tokens.weight\":\t[37, 1, 0]", "\"model.embed_tokens.weight\":\t[37, 1, -1]"},
        {"\"model.embed_tokens.weight\":\t[37, 1, 0]", "\"model.embed_tokens.weight\":\t[1e18, 1, 0]"},
        {"\"model.embed_tokens.weight\":\t[37, 1, 0]", "\"model.embed_tokens.weight\":\t[37, 1]"},
        {"\"model.embed_tokens.weight\"", "\"\\u001b[2J\""},
        {"\"model.embed_tokens.weight\"", "\"model.norm.weight\""},
        {"\"step\":\t5", "\"step\":\t-5"},
        {"\"step\":\t5", "\"step\":\t5e9"},
        {"\"loader_position\":\t\"", "\"loader_position\":\t\"99999999999999999999"},
        {"\"loader_position\":\t\"", "\"loader_position\":\t\"-"},
        {"\"tokens\":\t\"", "\"tokens\":\t\"9999999999"},
        {"\"seq_len\":\t64", "\"seq_len\":\t0"},
        {"\"arrays\":\t[", "\"formats\":\t7, \"arrays\":\t["},
        {"\"arrays\":\t[", "\"formats\":\t\"\", \"arrays\":\t["},
        {"\"arrays\":\t[", "\"formats\":\t\"masters \\u001b[2J\", \"arrays\":\t["},
        {"\"arrays\":\t[", "\"formats\":\t\"masters bf16, moments int8, rounded stochastically, and this makes it "
                          "far too long to be taken as it is\", \"arrays\":\t["},
        {"\"arrays\":\t[", "\"formats\":\t\"masters bf16, moments fp32\", \"arrays\":\t["},
    };
    for (size_t i = 0; i < sizeof edits / sizeof *edits; i++) {
        const char *at = strstr(text, edits[i].from), *sum = strstr(text, ",\n\t\"checksum\"");
        if (!at || !sum) fail_msg("the marker has no %s:\n%s", edits[i].from, text);
        char *forged = malloc(size + 512), tail[64];
        int n = sprintf(forged, "%.*s%s%.*s", (int)(at - text), text, edits[i].to,
                        (int)(sum - at - (long)strlen(edits[i].from)), at + strlen(edits[i].from));
        snprintf(tail, sizeof tail, ",\n\t\"checksum\":\t\"%016llx\"\n}\n",
                 (unsigned long long)checksum_of(forged, (size_t)n));
        strcpy(forged + n, tail);
        write_whole(in_out("step-5/checkpoint.json"), forged, strlen(forged));
        Err err = {0};
        int64_t got = load_one(1, 0, false, &err);
        if (got >= 0 || !strstr(err.text, "checkpoint.json")) fail_msg("%s: %s", edits[i].to, err.text);
        for (const char *c = err.text; *c; c++) assert_true((unsigned char)*c >= 0x20);
        free(forged);
    }
    free(text);
    truncate(in_out("step-5/checkpoint.json"), (off_t)MARKER_MAX_BYTES + 1);
    assert_int_equal(load_ranks(1, false, "checkpoint.json"), E_FORMAT);

    static const char *const names[] = {"", "\n", "step-", "step-05", "step-5x", "../step-5", "/etc", "step-5/../x",
                                        "step-99999999999999999999", "step--5", "\033[2J"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        write_whole(in_out("latest"), names[i], strlen(names[i]));
        assert_int_equal(load_ranks(1, false, "/latest"), E_FORMAT);
    }
    write_whole(in_out("latest"), "step-6", 6);
    assert_int_equal(load_ranks(1, false, "step-6/checkpoint.json"), E_MISSING);
    unlink(in_out("latest"));
    assert_int_equal(load_ranks(1, false, "step-5/checkpoint.json"), E_FORMAT);
    unlink(in_out("step-5/checkpoint.json"));
    assert_int_equal(must_load(), 0);
}

// ---------------------------------------------------------------------------------------------
// Other formats than f32: INT8 rows, bf16, moments in blocks

typedef struct {
    ParamTable table;
    Shard shard;
    Store store;
    StateArray arrays[STORE_MAX_ARRAYS];
    int n;
} Typed;

typedef struct { const char *scheme; ParamFormat others; StateFormat state; Rounding rounding; } Formats;

static void typed_open(Typed *k, const Formats *f, int R, int rank, bool replicated) {
    Err err = {0};
    // Blocks of moments take 4 rows of most tensors, 8 of down_proj; k_proj and norms are too small for any.
    model(NULL, NULL);
    config.C = 64; config.NH = 8; config.NKV = 2; config.FF = 96; config.V = 72;
    if (quant_plan_from_options(&plan, NULL, f->scheme, NULL, NULL, NULL, NULL, NULL, 0, &err) ||
        param_table_build(&k->table, &config, &plan, &err))
        fail_msg("%s", err.text);
    param_table_formats(&k->table, f->others, f->state);
    if (shard_plan(&k->shard, &config, &plan, &k->table, replicated ? SHARD_NONE : SHARD_FULL, true, R, rank, &err) ||
        shard_alloc(&k->shard, &err) || store_plan(&k->store, &k->shard, true, &err) || store_alloc(&k->store, &err))
        fail_msg("%s", err.text);
    k->n = store_arrays(&k->store, k->arrays);
}

static void typed_close(Typed *k) {
    store_free(&k->store);
    shard_free(&k->shard);
    param_table_free(&k->table);
}

// Writes bytes that depend on the step and the place in the whole tensor, or counts those that differ.
static int64_t typed_values(const Typed *k, int64_t step, bool write) {
    int64_t wrong = 0;
    for (int a = 0; a < k->n; a++)
        for (int i = 0; i < k->table.n; i++) {
            const StateTensor *t = &k->arrays[a].t[i];
            int64_t bytes = t->values * (int64_t)dtype_size(t->dtype), row0 = k->shard.own.row0[i] / t->unit;
            uint8_t *x = t->data;
            for (int64_t r = 0; r < k->shard.own.held.p[i].rows / t->unit; r++)
                for (int64_t c = 0; c < bytes; c++, x++) {
                    uint8_t v = (uint8_t)value_of(step, a, i, row0 + r, c);
                    if (write) *x = v;
                    else wrong += *x != v;
                }
        }
    return wrong;
}

static int typed_save(const Formats *f, int R, bool replicated, int64_t step, Err *err) {
    pid_t pids[8];
    for (int r = R - 1; r >= 0; r--) {
        pids[r] = fork();
        if (pids[r]) continue;
        Typed k;
        typed_open(&k, f, R, r, replicated);
        TrainProgress p = progress_of(step);
        p.rounding = f->rounding;
        typed_values(&k, step, true);
        int rc = r % 2 ? train_state_save_last(out, &p, &config, &plan, &k.shard.own, k.arrays, k.n, 0, err)
                       : train_state_save(out, &p, &config, &plan, &k.shard.own, k.arrays, k.n, 0, err);
        if (rc == 0) rc = train_state_finish(err);
        if (rc) fprintf(stderr, "%s\n", err->text);
        _exit(rc != 0);
    }
    int rc = 0;
    for (int r = 0; r < R; r++) {
        int status;
        waitpid(pids[r], &status, 0);
        if (!WIFEXITED(status) || WEXITSTATUS(status)) rc = -1;
    }
    return rc;
}

// The step, 0, or the error.
static int64_t typed_load(const Formats *f, int R, int rank, bool replicated, Err *err) {
    Typed k;
    typed_open(&k, f, R, rank, replicated);
    TrainProgress p = progress_of(0);
    p.rounding = f->rounding;
    int64_t got = train_state_load(out, &p, &config, &plan, &k.shard.own, k.arrays, k.n, err);
    if (got == 1) {
        got = p.step;
        assert_int_equal(p.rounding, f->rounding);
        assert_int_equal(typed_values(&k, p.step, false), 0);
    }
    typed_close(&k);
    return got;
}

static const Formats formats[] = {
    {"none", PARAM_BF16, STATE_F32, ROUND_STOCHASTIC},    {"8da4w-32", PARAM_F32, STATE_INT8, ROUND_STOCHASTIC},
    {"int8qt", PARAM_F32, STATE_F32, ROUND_STOCHASTIC},   {"int8qt", PARAM_BF16, STATE_INT8, ROUND_STOCHASTIC},
    {"int8qt", PARAM_BF16, STATE_INT8, ROUND_NEAREST},    {"int8qt", PARAM_BF16, STATE_INT4, ROUND_STOCHASTIC},
    {"int8qt", PARAM_BF16, STATE_FP8, ROUND_STOCHASTIC},  {"int8qt", PARAM_BF16, STATE_BF16, ROUND_STOCHASTIC},
    {"int8qt", PARAM_F32, STATE_INT8, ROUND_STOCHASTIC},
};
#define N_FORMATS ((int)(sizeof formats / sizeof *formats))

static void typed_arrays(void **state) {
    (void)state;
    static const int sizes[] = {1, 3, 5};
    for (int f = 0; f < N_FORMATS; f++)
        for (int from = 0; from < 3; from++)
            for (int replicated = 0; replicated < 2; replicated++) {
                Err err = {0};
                fresh();
                assert_int_equal(typed_save(&formats[f], sizes[from], replicated, 7, &err), 0);
                for (int to = 0; to < 3; to++)
                    for (int r = 0; r < sizes[to]; r++) {
                        int64_t step = typed_load(&formats[f], sizes[to], r, (r + to) % 2, &err);
                        if (step != 7) fail_msg("format %d, %d to %d: %s", f, sizes[from], sizes[to], err.text);
                    }
            }
}

// Another format or rounding is refused, with what there is, what this run has, and the options that say so.
static void other_formats(void **state) {
    (void)state;
    Err err = {0};
    static const struct { Formats saved, now; const char *has, *wants; } pairs[] = {
        {{"none", PARAM_F32, STATE_F32, 0}, {"none", PARAM_BF16, STATE_F32, 0}, "masters fp32, moments fp32;",
         "masters bf16, moments fp32, rounded stochastically;"},
        {{"none", PARAM_F32, STATE_F32, 0}, {"none", PARAM_F32, STATE_INT8, 0}, "masters fp32, moments fp32;",
         "masters fp32, moments int8;"},
        {{"none", PARAM_F32, STATE_INT4, 0}, {"none", PARAM_F32, STATE_FP8, 0}, "moments int4;", "moments fp8;"},
        {{"int8qt", PARAM_BF16, STATE_INT8, ROUND_NEAREST}, {"int8qt", PARAM_BF16, STATE_INT8, ROUND_STOCHASTIC},
         "masters bf16 and int8 rows, moments int8, rounded to nearest;", "rounded stochastically;"},
        {{"int8qt", PARAM_BF16, STATE_BF16, 0}, {"int8qt", PARAM_F32, STATE_BF16, 0}, "masters bf16 and int8 rows",
         "masters fp32 and int8 rows"},
    };
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++)
        for (int back = 0; back < 2; back++) {
            const Formats *saved = back ? &pairs[i].now : &pairs[i].saved;
            const Formats *now = back ? &pairs[i].saved : &pairs[i].now;
            fresh();
            assert_int_equal(typed_save(saved, 2, false, 5, &err), 0);
            assert_int_equal(typed_load(now, 1, 0, false, &err), E_USAGE);
            if (!strstr(err.text, pairs[i].has) || !strstr(err.text, pairs[i].wants) ||
                !strstr(err.text, "--optim-state") || !strstr(err.text, "--master") || !strstr(err.text, "--rounding"))
                fail_msg("%s", err.text);
            assert_int_equal(typed_load(saved, 3, 1, false, &err), 5);
        }
    // Where no tensor has blocks, or nothing is rounded, it is the same run.
    const Formats exact = {"none", PARAM_F32, STATE_F32, ROUND_STOCHASTIC}, same = {"none", PARAM_F32, STATE_F32,
                                                                                   ROUND_NEAREST};
    fresh();
    assert_int_equal(typed_save(&exact, 1, false, 5, &err), 0);
    assert_int_equal(typed_load(&same, 1, 0, false, &err), 5);
}

// Files and markers with right checksums and wrong contents: another dtype or shape, scales left out, rows dealt out so
// that blocks are cut.
static void wrong_types(void **state) {
    (void)state;
    const Formats f = formats[3];
    const char *file = "step-5/rank-00001-of-00002.safetensors", *marker = "step-5/checkpoint.json";
    const char *const victims[] = {"master.model.layers.0.mlp.up_proj.weight",
                                   "master_scale.model.layers.1.mlp.up_proj.weight",
                                   "m.model.layers.0.mlp.down_proj.weight", "v_scale.model.embed_tokens.weight",
                                   "master.model.embed_tokens.weight"};
    Err err = {0};
    fresh();
    assert_int_equal(typed_save(&f, 2, false, 5, &err), 0);
    TrainMarker m;
    get_marker(&m);
    size_t size, bytes = (size_t)m.files[1].bytes;
    uint64_t checksum = m.files[1].checksum;
    uint8_t *data = read_whole(in_out(file), &size);
    char path[700], aside[700];
    strcpy(path, in_out(file));
    strcpy(aside, in_out("aside"));
    for (int kind = 0; kind <= 4; kind++)                        // as it is, dtype, shape, left out, renamed
        for (int v = 0; v < 5; v++) {
            Safetensors st;
            Checksum sum;
            bool met = false;
            write_whole(path, data, bytes);
            if (safetensors_open(&st, path, &err)) fail_msg("%s", err.text);
            StWriter *w = st_writer_new();
            for (int i = 0; i < st.n_meta; i++) st_writer_meta(w, st.meta[i].key, st.meta[i].value);
            for (int i = 0; i < st.n; i++) {
                const StTensor *t = &st.tensors[i];
                bool it = !strcmp(t->name, victims[v]);
                int64_t shape[2] = {t->shape[0], t->shape[1]};
                DType dtype = t->dtype;
                met = met || it;
                if (it && kind == 1)
                    dtype = dtype == DT_F32 ? DT_I32 : dtype == DT_I8 ? DT_U8 : dtype == DT_U8 ? DT_I8 : DT_F16;
                if (it && kind == 2) shape[0] = t->shape[0] * t->shape[1], shape[1] = 1;
                if (it && kind == 2 && t->shape[1] == 1) shape[0] = 1, shape[1] = t->shape[0];
                if (it && kind == 3) continue;
                st_writer_tensor(w, it && kind == 4 ? "master.other" : t->name, dtype, 2, shape);
            }
            assert_true(met);
            st_writer_checksum(w, &sum);
            assert_int_equal(st_writer_begin(w, aside, &err), 0);
            for (int i = 0; i < st.n; i++)
                if (kind != 3 || strcmp(st.tensors[i].name, victims[v]))
                    st_writer_data(w, st.tensors[i].data, st.tensors[i].bytes);
            if (st_writer_finish(w, &err)) fail_msg("%s", err.text);
            safetensors_close(&st);
            rename(aside, path);
            m.files[1].bytes = sum.bytes;
            m.files[1].checksum = checksum_end(&sum);
            put_marker(&m);
            int64_t got = typed_load(&f, 1, 0, false, &err);
            if (got != (kind ? E_FORMAT : 5) || (kind && !strstr(err.text, file))) fail_msg("%d: %s", kind, err.text);
        }
    write_whole(path, data, bytes);
    m.files[1].bytes = bytes;
    m.files[1].checksum = checksum;
    for (int i = 0; i < m.n_tensors; i++) {
        int64_t unit = m.tensors[i].split.unit;
        if (unit == 1) continue;
        m.tensors[i].split.unit = unit / 2;
        put_marker(&m);
        assert_int_equal(typed_load(&f, 1, 0, false, &err), E_FORMAT);
        if (!strstr(err.text, marker) || !strstr(err.text, m.tensors[i].name)) fail_msg("%s", err.text);
        m.tensors[i].split.unit = unit;
    }
    put_marker(&m);
    assert_int_equal(typed_load(&f, 1, 0, false, &err), 5);
    free(data);
    train_marker_free(&m);
}

// Without `latest` the newest complete checkpoint is taken; what cannot be read is not taken for what is not there.
static void no_latest(void **state) {
    (void)state;
    model(NULL, NULL);
    fresh();
    must_save(2, false, 9, 0);
    must_save(2, false, 10, 0);
    mkdir(in_out("step-11"), 0777);
    write_whole(in_out("step-12"), "x", 1);
    mkdir(in_out("step-13.tmp"), 0777);
    write_whole(in_out("step-13.tmp/checkpoint.json"), "x", 1);
    unlink(in_out("latest"));
    assert_int_equal(must_load(), 10);
    assert_int_equal(load_ranks(3, true, ""), 0);
    assert_int_equal(symlink("step-14", in_out("step-14")), 0);
    assert_int_equal(load_ranks(2, false, strerror(ELOOP)), E_FAIL);
    assert_int_equal(load_ranks(2, false, "/step-14/checkpoint.json"), E_FAIL);
    unlink(in_out("step-14"));
    assert_int_equal(symlink("latest", in_out("latest")), 0);
    assert_int_equal(load_ranks(2, false, strerror(ELOOP)), E_FAIL);
    assert_int_equal(load_ranks(2, false, "/latest"), E_FAIL);
    strcat(out, "/step-12");
    assert_int_equal(load_ranks(1, false, "/step-12"), E_FAIL);
}

static void refuse(const TrainProgress *p, const LlamaConfig *c, const QuantPlan *q, int n_arrays, const char *word) {
    Rank k;
    Err err = {0};
    TrainProgress now = *p;
    rank_open(&k, 1, 0, false);
    assert_int_equal(train_state_load(out, &now, c, q, &k.own, k.arrays, n_arrays, &err), E_USAGE);
    if (!strstr(err.text, word)) fail_msg("expected \"%s\" in: %s", word, err.text);
    assert_true(same_progress(now, *p));
    rank_close(&k);
}

static void other_runs(void **state) {
    (void)state;
    model(NULL, NULL);
    fresh();
    must_save(2, false, 5, 0);
    TrainProgress p = progress_of(0), q = p;
    LlamaConfig c = config;
    QuantPlan other;
    Err err = {0};
    c.rope_theta *= 2;
    refuse(&p, &c, &plan, 3, "model configuration");
    assert_int_equal(quant_plan_from_options(&other, NULL, "int8wo", NULL, NULL, NULL, NULL, NULL, 0, &err), 0);
    refuse(&p, &config, &other, 3, "quantization scheme");
    q = p; q.T++;
    refuse(&q, &config, &plan, 3, "--seq-len (64)");
    q = p; q.seed--;
    refuse(&q, &config, &plan, 3, "--seed");
    q = p; q.data_hash++;
    refuse(&q, &config, &plan, 3, "training data");
    refuse(&p, &config, &plan, 2, "--optimizer");
}

static void keep_newest(void **state) {
    (void)state;
    model(NULL, NULL);
    fresh();
    mkdir(in_out("elsewhere"), 0777);
    write_whole(in_out("elsewhere/checkpoint.json"), "x", 1);
    for (int64_t s = 2; s <= 4; s++) must_save(2, false, s, 2);
    assert_int_equal(entries("step-"), 2);
    assert_true(path_exists(in_out("step-3")) && path_exists(in_out("step-4")));
    assert_int_equal(symlink("elsewhere", in_out("step-1")), 0);
    mkdir(in_out("step-0"), 0777);                             // no checkpoint of ours
    write_whole(in_out("step-0/state"), "x", 1);
    write_whole(in_out("step-3/notes"), "x", 1);               // a checkpoint with something else in it
    must_save(1, false, 9, 2);
    must_save(1, false, 7, 2);                                 // from an earlier one: what came later is not counted
    must_save(1, false, 8, 2);
    static const char *const stay[] = {"step-0/state", "step-1/checkpoint.json", "step-3/notes",
                                       "step-3/checkpoint.json", "step-7", "step-8", "step-9"};
    for (size_t i = 0; i < sizeof stay / sizeof *stay; i++)
        if (!path_exists(in_out(stay[i]))) fail_msg("%s is gone", stay[i]);
    assert_false(path_exists(in_out("step-4")));
    assert_int_equal(entries("step-"), 6);
    assert_int_equal(must_load(), 8);
}

static void clean_start(void **state) {
    (void)state;
    model(NULL, NULL);
    fresh();
    must_save(2, false, 5, 0);
    static const char *const folders[] = {"step-6.tmp", "step-7.tmp", "step-06.tmp", "step-x.tmp", "step-6.tmp2",
                                          "elsewhere", "xstep-6.tmp"};
    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++) {
        char name[100];
        mkdir(in_out(folders[i]), 0777);
        snprintf(name, sizeof name, "%s/rank-00001-of-00002.done", folders[i]);
        write_whole(in_out(name), "17 0123456789abcdef\n", 20);
        snprintf(name, sizeof name, "%s/rank-00001-of-00002.safetensors.tmp-77", folders[i]);
        write_whole(in_out(name), "x", 1);
        snprintf(name, sizeof name, "%s/checkpoint.json", folders[i]);
        write_whole(in_out(name), "x", 1);
    }
    write_whole(in_out("step-7.tmp/notes"), "x", 1);
    assert_int_equal(symlink("elsewhere", in_out("step-8.tmp")), 0);
    assert_int_equal(symlink("../elsewhere", in_out("step-6.tmp/rank-00000-of-00002.done")), 0);
    static const char *const aside[] = {"latest.tmp-1", "model.bin.tmp-4194304", "latest.tmp-", "latest.tmp-7x",
                                        "latest.tmp", "model.bin.tmp-7.1", "model.bin", "xlatest.tmp-7",
                                        "other.tmp-7"};
    for (size_t i = 0; i < sizeof aside / sizeof *aside; i++) write_whole(in_out(aside[i]), "x", 1);
    // A stale word that a file is there would be believed; a start takes it away.
    train_state_clean(out);
    for (size_t i = 0; i < sizeof aside / sizeof *aside; i++)
        if (path_exists(in_out(aside[i])) != (i >= 2)) fail_msg("%s is %s", aside[i], i >= 2 ? "gone" : "there");
    assert_false(path_exists(in_out("step-6.tmp")));
    assert_true(path_exists(in_out("step-7.tmp/notes")));
    assert_false(path_exists(in_out("step-7.tmp/checkpoint.json")));
    for (size_t i = 2; i < sizeof folders / sizeof *folders; i++) {
        char name[100];
        snprintf(name, sizeof name, "%s/checkpoint.json", folders[i]);
        if (!path_exists(in_out(name))) fail_msg("%s is gone", name);
    }
    must_save(2, false, 6, 0);
    assert_int_equal(must_load(), 6);

    // Between the two renames where names cannot be exchanged, and after them.
    assert_int_equal(rename(in_out("step-6"), in_out("step-6.old")), 0);
    assert_int_equal(must_load(), 6);
    train_state_clean(out);
    assert_true(path_exists(in_out("step-6/checkpoint.json")) && !path_exists(in_out("step-6.old")));
    assert_int_equal(rename(in_out("step-5"), in_out("step-6.old")), 0);
    train_state_clean(out);
    assert_false(path_exists(in_out("step-6.old")));
    assert_int_equal(must_load(), 6);
    train_state_clean(in_out("nosuch"));
}

// In one process: a save goes on behind, the next waits for it, the same step is not saved again, errors are kept until
// finish has told them, and a save that waits for a rank that does not come can be given up.
static void one_process(void **state) {
    (void)state;
    model(NULL, NULL);
    fresh();
    Rank k, half, other;
    Err err = {0};
    rank_open(&k, 1, 0, false);
    for (int64_t s = 1; s <= 3; s++) {
        assert_int_equal(rank_save(&k, s, 0, &err), 0);
        rank_values(&k, 99, true);                             // the step goes on with the arrays
    }
    assert_int_equal(train_state_finish(&err), 0);
    assert_int_equal(train_state_finish(&err), 0);
    assert_int_equal(must_load(), 3);
    assert_int_equal(rename(in_out("step-3"), in_out("away")), 0);
    assert_int_equal(rank_save(&k, 3, 0, &err), 0);
    assert_int_equal(train_state_finish(&err), 0);
    assert_false(path_exists(in_out("step-3")));
    assert_int_equal(rename(in_out("away"), in_out("step-3")), 0);

    rank_open(&half, 2, 0, false);
    rank_open(&other, 2, 1, false);
    assert_int_equal(rank_save(&half, 4, 0, &err), 0);
    nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
    assert_int_equal(train_state_poll(&err), 0);
    assert_true(path_exists(in_out("step-4.tmp")));
    train_state_abandon();
    assert_false(path_exists(in_out("step-4.tmp")));
    assert_int_equal(train_state_poll(&err), E_FAIL);
    assert_int_equal(rank_save(&half, 5, 0, &err), E_FAIL);
    assert_int_equal(train_state_finish(&err), E_FAIL);
    assert_non_null(strstr(err.text, "step 4"));
    assert_non_null(strstr(err.text, "given up"));
    assert_int_equal(train_state_finish(&err), 0);
    train_state_abandon();
    assert_int_equal(train_state_poll(&err), 0);
    assert_int_equal(must_load(), 3);

    // Rank 1 does not wait for rank 0.
    pid_t pid = fork();
    if (pid == 0) _exit(rank_save(&other, 6, 0, &err) || train_state_finish(&err));
    int status;
    waitpid(pid, &status, 0);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    assert_int_equal(rank_save(&half, 6, 0, &err), 0);
    assert_int_equal(train_state_finish(&err), 0);
    assert_int_equal(must_load(), 6);

    // A file that is not as its rank said.
    static const char *const words[] = {"", "x", "-1 0123456789abcdef\n", "9 0123456789abcdef\n",
                                        "9 0123456789ABCDEF\n"};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        mkdir(in_out("step-7.tmp"), 0777);
        write_whole(in_out("step-7.tmp/rank-00001-of-00002.done"), words[i], strlen(words[i]));
        assert_int_equal(rank_save(&half, 7, 0, &err), 0);
        assert_true(train_state_finish(&err) < 0);
        assert_non_null(strstr(err.text, i == 3 ? "rank-00001-of-00002.safetensors" : "rank-00001-of-00002.done"));
        assert_false(path_exists(in_out("step-7.tmp")));
    }

    // No memory for the copy; no such folder; a file where the folder should be.
#ifndef __SANITIZE_ADDRESS__
    int64_t n = k.tensors[0][0].values;
    k.tensors[0][0].values = (int64_t)1 << 50;
    TrainProgress p = progress_of(8);
    assert_int_equal(train_state_save(out, &p, &config, &plan, &k.own, k.arrays, 3, 0, &err), E_NOMEM);
    k.tensors[0][0].values = n;
#endif
    write_whole(in_out("step-8.tmp"), "x", 1);
    assert_int_equal(rank_save(&k, 8, 0, &err), 0);
    assert_true(train_state_finish(&err) < 0);
    unlink(in_out("step-8.tmp"));
    write_whole(in_out("step-8"), "x", 1);
    assert_int_equal(rank_save(&k, 8, 0, &err), 0);
    assert_true(train_state_finish(&err) < 0);
    assert_non_null(strstr(err.text, "step-8"));
    assert_int_equal(must_load(), 6);
    unlink(in_out("step-8"));
    assert_int_equal(rank_save(&k, 8, 0, &err), 0);
    assert_int_equal(train_state_finish(&err), 0);
    assert_int_equal(must_load(), 8);
    rank_close(&k);
    rank_close(&half);
    rank_close(&other);
}

// Rank 0 says once, after a minute, whom it waits for; and reads again what could not be read.
static void slow_ranks(void **state) {
    (void)state;
    model(NULL, NULL);
    fresh();
    Rank k, other;
    Err err = {0};
    size_t size = 0;
    rank_open(&k, 40, 0, false);
    rank_open(&other, 40, 2, false);
    pid_t pid = fork();
    if (pid == 0) _exit(rank_save(&other, 6, 0, &err) || train_state_finish(&err));
    int status;
    waitpid(pid, &status, 0);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);

    int to = open(in_out("said"), O_RDWR | O_CREAT | O_TRUNC, 0666), before = dup(2);
    dup2(to, 2);
    char word[100];
    for (int r = 3; r < 40; r++) {                              // many that cannot be read at the same time
        snprintf(word, sizeof word, "step-6.tmp/rank-%05d-of-00040.done", r);
        mkdir(in_out(word), 0777);
    }
    int rc = rank_save(&k, 6, 0, &err);
    nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
    for (int r = 3; r < 40; r++) {
        snprintf(word, sizeof word, "step-6.tmp/rank-%05d-of-00040.done", r);
        rmdir(in_out(word));
    }
    for (int turn = 0, after = 0; turn < 1000 && after < 5; turn++) {
        nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
        seconds_ahead += 61;
        if (lseek(to, 0, SEEK_END) > 0) after++;
    }
    dup2(before, 2);
    close(before);
    close(to);
    train_state_abandon();
    assert_int_equal(rc, 0);
    assert_int_equal(train_state_finish(&err), E_FAIL);
    char *said = (char *)read_whole(in_out("said"), &size);
    if (!strstr(said, "ranks 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17 and 22 more")) fail_msg("%s", said);
    assert_non_null(strstr(said, "same file system"));
    assert_ptr_equal(strchr(said, '\n'), said + size - 1);     // once
    free(said);
    rank_close(&k);
    rank_close(&other);

    rank_open(&k, 2, 0, false);
    rank_open(&other, 2, 1, false);
    pid = fork();
    if (pid == 0) _exit(rank_save(&other, 7, 0, &err) || train_state_finish(&err));
    waitpid(pid, &status, 0);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    assert_int_equal(rename(in_out("step-7.tmp/rank-00001-of-00002.done"), in_out("word")), 0);
    mkdir(in_out("step-7.tmp/rank-00001-of-00002.done"), 0777);
    assert_int_equal(rank_save(&k, 7, 0, &err), 0);
    nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
    rmdir(in_out("step-7.tmp/rank-00001-of-00002.done"));
    assert_int_equal(rename(in_out("word"), in_out("step-7.tmp/rank-00001-of-00002.done")), 0);
    if (train_state_finish(&err)) fail_msg("%s", err.text);
    assert_int_equal(must_load(), 7);
    rank_close(&k);
    rank_close(&other);
}

// A marker that would be too long to be read is not written, and nothing takes its name.
static void marker_too_long(void **state) {
    (void)state;
    model(NULL, NULL);
    fresh();
    enum { N = 170000 };
    ParamTable many = table;
    many.n = N;
    many.n_params = many.n_elements = N;
    many.p = calloc(N, sizeof *many.p);
    OwnTable own = {.table = &many, .row0 = calloc(N, sizeof *own.row0), .split = calloc(N, sizeof *own.split), .R = 1};
    for (int i = 0; i < N; i++) {
        snprintf(many.p[i].name, sizeof many.p[i].name, "%090d", i);
        many.p[i].rows = many.p[i].cols = 1;
        many.p[i].offset = (size_t)i;
        own.split[i] = (RowSplit){.rows = 1, .unit = 1, .R = 1};
    }
    own.held = many;
    StateTensor *tensors = calloc(N, sizeof *tensors);
    float *data = calloc(N, sizeof *data);
    for (int i = 0; i < N; i++) tensors[i] = (StateTensor){DT_F32, 1, 1, data + i};
    StateArray array = {"master", tensors};
    Err err = {0};
    TrainProgress p = progress_of(3);
    assert_int_equal(train_state_save(out, &p, &config, &plan, &own, &array, 1, 0, &err), 0);
    assert_int_equal(train_state_finish(&err), E_USAGE);
    if (!strstr(err.text, "checkpoint.json")) fail_msg("%s", err.text);
    assert_int_equal(entries(""), 0);
    free(many.p);
    free(own.row0);
    free(own.split);
    free(data);
    free(tensors);
}

// ---------------------------------------------------------------------------------------------
// Faults

// What is synced before what is renamed.
static int note(const char *text) {
    for (int i = 0; i < faults->n_notes; i++)
        if (!strncmp(faults->notes[i], text, strlen(text))) return i;
    fail_msg("no call \"%s\"", text);
    return -1;
}

static void order_of_syncs(void **state) {
    (void)state;
    model(NULL, NULL);
    fresh();
    must_save(2, false, 1, 1);
    faults = shared(sizeof *faults);
    must_save(2, false, 2, 1);
    int data = note("fsync rank-00000-of-00002.safetensors.tmp-"),
        named = note("rename to rank-00000-of-00002.safetensors"),
        other = note("fsync rank-00001-of-00002.safetensors"), told = note("rename to rank-00001-of-00002.done"),
        marker = note("fsync checkpoint.json.tmp-"), marked = note("rename to checkpoint.json"),
        folder = note("rename to step-2"), latest = note("fsync latest.tmp-"), moved = note("rename to latest"),
        removed = note("rename to step-1.tmp"), seen = 0, aside = 0, above = 0;
    char out_sync[600];
    snprintf(out_sync, sizeof out_sync, "fsync %s", last_part(out));
    for (int i = 0; i < faults->n_notes; i++) {
        if (!strcmp(faults->notes[i], "unlink rank-00001-of-00002.done")) seen = i;
        if (!strcmp(faults->notes[i], "fsync step-2.tmp") && i < folder) aside = i;
        if (!strcmp(faults->notes[i], out_sync) && i < moved) above = i;
    }
    assert_true(data < named && named < marker && other < told && told < marker && marker < marked && marked < seen &&
                seen < aside && aside < folder && folder < above && above < latest && latest < moved &&
                moved < removed);
    munmap(faults, sizeof *faults);
    faults = NULL;
}

// The states that a save begins from, and what it does: to a new step, to one that is there and that `latest` names,
// the same where names cannot be exchanged, to a step that is there while latest names another, and the first of all.
enum { NEW_STEP, SAME_STEP, NO_EXCHANGE, OLD_STEP, FIRST_STEP, SITUATIONS };

static int64_t prepare(int situation, int64_t *target) {
    fresh();
    faults->at = 0;
    faults->no_exchange = false;
    if (situation != FIRST_STEP) {
        save_here(3, 0);
        save_here(4, 0);
    }
    *target = situation == NEW_STEP || situation == FIRST_STEP ? 5 : situation == OLD_STEP ? 3 : 4;
    if (situation == OLD_STEP) save_here(2, 0);      // the user went back
    faults->no_exchange = situation == NO_EXCHANGE;
    faults->calls = faults->writes = faults->n_notes = 0;
    return situation == FIRST_STEP ? 0 : situation == OLD_STEP ? 2 : 4;
}

// The call of the last note that is `text`, with none that begins with `end` before it; counted from 1.
static int last_call(const char *text, const char *end) {
    int call = 0;
    for (int i = 0; i < faults->n_notes && strncmp(faults->notes[i], end, strlen(end)); i++)
        if (!strcmp(faults->notes[i], text)) call = i + 1;
    if (!call) fail_msg("no call \"%s\"", text);
    return call;
}

static void failing_syncs(void **state) {
    (void)state;
    model(NULL, NULL);
    faults = shared(sizeof *faults);
    int64_t target;
    char out_sync[600];
    prepare(NEW_STEP, &target);
    assert_int_equal(save_ranks(1, false, target, 1), 0);
    snprintf(out_sync, sizeof out_sync, "fsync %s", last_part(out));
    // Before older ones are removed, the disk must have `latest`.
    int at = last_call(out_sync, "rename to step-4.tmp");
    prepare(NEW_STEP, &target);
    faults->at = at;
    faults->error = EIO;
    assert_int_equal(save_ranks(1, false, target, 1), E_FAIL);
    assert_non_null(strstr(reports[0].err.text, "cannot sync folder"));
    assert_int_equal(must_load(), target);
    assert_true(path_exists(in_out("step-3/checkpoint.json")) && path_exists(in_out("step-4/checkpoint.json")));

    // Before a rank says that its file is there, the disk must have the file's name.
    Rank other;
    Err err = {0};
    rank_open(&other, 2, 1, false);
    for (int fails = 0; fails < 2; fails++) {
        faults->calls = faults->n_notes = faults->writes = 0;
        faults->at = fails ? at : 0;
        assert_int_equal(rank_save(&other, 20 + fails, 0, &err), 0);
        assert_int_equal(train_state_finish(&err), fails ? E_FAIL : 0);
        at = last_call(fails ? "fsync step-21.tmp" : "fsync step-20.tmp", "fsync rank-00001-of-00002.done");
    }
    assert_non_null(strstr(err.text, "cannot sync folder"));
    assert_false(path_exists(in_out("step-21.tmp")));
    rank_close(&other);
    munmap(faults, sizeof *faults);
    faults = NULL;
}

// A process killed at any call of a save, one call after the other: `latest` names a complete checkpoint, the old one
// or the new; after a start's cleaning nothing is left over, and saving works.
static void killed_anywhere(void **state) {
    (void)state;
    model(NULL, NULL);
    faults = shared(sizeof *faults);
    int kills = 0;
    for (int situation = 0; situation < SITUATIONS; situation++)
        for (int at = 1;; at++) {
            int64_t target, before = prepare(situation, &target);
            faults->at = at;
            int rc = save_ranks(1, false, target, 2);
            bool done = faults->calls < at;
            assert_int_equal(rc, done ? 0 : -9);
            faults->at = 0;
            kills += !done;
            int64_t got = must_load();
            if (got != before && got != target) fail_msg("call %d: step %lld loads", at, (long long)got);
            if (done) assert_int_equal(got, target);
            if (situation == FIRST_STEP) assert_int_equal(got != 0, path_exists(in_out("step-5")));
            if (situation != NO_EXCHANGE && got) {
                char dir[64];
                snprintf(dir, sizeof dir, "step-%lld/checkpoint.json", (long long)got);
                assert_true(path_exists(in_out(dir)));         // by the very name that latest has
            }
            train_state_clean(out);
            assert_int_equal(must_load(), got);
            assert_int_equal(entries(".tmp"), 0);
            assert_int_equal(entries(".old"), 0);
            save_here(target, 2);
            assert_int_equal(must_load(), target);
            if (done) break;
        }
    print_message("%d kills at every call of a save\n", kills);
    assert_true(kills > 40);
    munmap(faults, sizeof *faults);
    faults = NULL;
}

// The same with calls that fail: a message, what was there before is intact, and nothing is left aside.
static void failing_calls(void **state) {
    (void)state;
    model(NULL, NULL);
    faults = shared(sizeof *faults);
    static const int errors[] = {ENOSPC, EIO};
    int failures = 0;
    for (int situation = 0; situation < SITUATIONS; situation++)
        for (int e = 0; e < 2; e++)
            for (int at = 1;; at++) {
                int64_t target, before = prepare(situation, &target);
                faults->error = errors[e];
                faults->at = at;
                int rc = save_ranks(1, false, target, 2);
                faults->at = faults->error = 0;
                bool done = faults->calls < at;
                int64_t got = must_load();
                if (rc == 0 && got != target) fail_msg("call %d failed unnoticed", at);
                if (rc) {
                    failures++;
                    assert_int_equal(rc, E_FAIL);
                    if (!strstr(reports[0].err.text, strerror(errors[e]))) fail_msg("%s", reports[0].err.text);
                    bool placed = false;                       // the folder bears its name, latest has not moved
                    for (int i = 0; i < faults->n_notes && i < at - 1; i++)
                        placed |= !strncmp(faults->notes[i], "rename to step-", 15) ||
                                  !strncmp(faults->notes[i], "exchange with", 13);
                    if (situation == NEW_STEP && !placed) assert_int_equal(got, before);
                    if (!placed) assert_int_equal(entries(".tmp"), 0);
                }
                save_here(target, 2);
                assert_int_equal(must_load(), target);
                if (done) break;
            }
    print_message("%d calls that failed\n", failures);
    assert_true(failures > 40);
    munmap(faults, sizeof *faults);
    faults = NULL;
}

// Two ranks that save step after step, killed at random moments: about when rank 0 has made so many calls.
static void killed_at_random(void **state) {
    (void)state;
    model("int5,block=2x16", NULL);
    fresh();
    faults = shared(sizeof *faults);
    uint32_t random = 12345;
    int64_t last = 0;
    for (int trial = 0; trial < 30; trial++) {
        pid_t pids[2];
        train_state_clean(out);
        faults->calls = faults->begun = 0;
        for (int r = 0; r < 2; r++) {
            pids[r] = fork();
            if (pids[r]) continue;
            Rank k;
            Err err = {0};
            rank_open(&k, 2, r, false);
            Faults *shared_faults = faults;
            if (r) faults = NULL;
            for (int64_t s = last ? last : 1;; s++) {          // the last step again: it is replaced
                if (r == 0) faults->begun = (int)s;
                while (shared_faults->begun < s) nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
                if (rank_save(&k, s, 3, &err)) _exit(1);
            }
        }
        random = random * 1664525 + 1013904223;
        for (int wait = 0; wait < 20000 && faults->calls < (int)(random >> 8) % 120; wait++)
            nanosleep(&(struct timespec){.tv_nsec = 50000 + (random >> 20)}, NULL);
        for (int r = 0; r < 2; r++) {
            int status;
            kill(pids[r], SIGKILL);
            waitpid(pids[r], &status, 0);
            assert_true(WIFSIGNALED(status));                  // none had ended with an error
        }
        int64_t step = must_load();
        assert_true(step >= last);
        last = step;
    }
    print_message("30 kills, step %lld reached\n", (long long)last);
    assert_true(last > 10);
    munmap(faults, sizeof *faults);
    faults = NULL;
}

// A full disk for real: a small tmpfs where one can be mounted, and files that may not grow.
static void full_disk(void **state) {
    (void)state;
    model(NULL, NULL);
    fresh();
    Report *r = shared(sizeof *r);
    pid_t pid = fork();
    if (pid == 0) {
        if (unshare(CLONE_NEWNS) || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
            mount("none", out, "tmpfs", 0, "size=144k"))
            _exit(77);
        Rank k;
        rank_open(&k, 1, 0, false);
        int fits = 0;
        for (int64_t s = 1; s < 9 && r->rc == 0; s++, fits++) {
            r->rc = rank_save(&k, s, 0, &r->err);
            if (r->rc == 0) r->rc = train_state_finish(&r->err);
        }
        Err err = {0};
        int64_t step = load_one(1, 0, false, &err);
        _exit(fits < 2 ? 1 : step != fits - 1 ? 2 : entries(".tmp") ? 3 : 0);
    }
    int status;
    waitpid(pid, &status, 0);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77) {
        print_message("no tmpfs can be mounted here: the full disk is a limit on files alone\n");
    } else {
        if (!WIFEXITED(status) || WEXITSTATUS(status)) fail_msg("status %#x: %s", status, r->err.text);
        assert_int_equal(r->rc, E_FAIL);
        if (!strstr(r->err.text, "No space left")) fail_msg("%s", r->err.text);
    }

    must_save(2, false, 1, 0);
    for (rlim_t limit = 0; limit < 30000; limit += 3000) {
        pid = fork();
        if (pid == 0) {
            signal(SIGXFSZ, SIG_IGN);
            setrlimit(RLIMIT_FSIZE, &(struct rlimit){limit, limit});
            Rank k;
            rank_open(&k, 1, 0, false);
            memset(r, 0, sizeof *r);
            r->rc = rank_save(&k, 2, 0, &r->err);
            if (r->rc == 0) r->rc = train_state_finish(&r->err);
            _exit(0);
        }
        waitpid(pid, &status, 0);
        assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
        assert_int_equal(r->rc, E_FAIL);
        if (!strstr(r->err.text, strerror(EFBIG))) fail_msg("%s", r->err.text);
        assert_int_equal(entries(".tmp"), 0);
        assert_int_equal(must_load(), 1);
    }
    munmap(r, sizeof *r);
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(checksums),
        cmocka_unit_test(every_rank_to_every_rank),
        cmocka_unit_test(folder_contents),
        cmocka_unit_test(flipped_bits),
        cmocka_unit_test(some_rank_finds_it),
        cmocka_unit_test(wrong_files),
        cmocka_unit_test(hostile_markers),
        cmocka_unit_test(no_latest),
        cmocka_unit_test(typed_arrays),
        cmocka_unit_test(other_formats),
        cmocka_unit_test(wrong_types),
        cmocka_unit_test(other_runs),
        cmocka_unit_test(keep_newest),
        cmocka_unit_test(clean_start),
        cmocka_unit_test(one_process),
        cmocka_unit_test(slow_ranks),
        cmocka_unit_test(marker_too_long),
        cmocka_unit_test(order_of_syncs),
        cmocka_unit_test(failing_syncs),
        cmocka_unit_test(killed_anywhere),
        cmocka_unit_test(failing_calls),
        cmocka_unit_test(killed_at_random),
        cmocka_unit_test(full_disk),
    };
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, NULL, NULL) != 0;
}
