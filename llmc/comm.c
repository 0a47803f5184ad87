// The interface: one rank, the start, which transport carries device memory, and what goes through host memory.
#include "comm.h"
#include "checksum.h"
#include "comm_impl.h"
#include "device.h"
#include <sched.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { END_SECONDS = 60 };              // for MPI_Finalize

// NCCL's wing is linked into a program or it is not: a weak symbol is NULL where it is missing.
extern const CommWing comm_wing_nccl __attribute__((weak));

static MpiWorld self = {.size = 1, .local_size = 1, .machines = 1};
static RankInfo *ranks;                 // (size), NULL for one rank
static bool mpi_runs;
static const CommWing *wing;            // NULL: MPI
static char description[256];
static CommTicket issued;               // collectives on device memory asked for
static double blocked_seconds;
static void *stage_in, *stage_out;      // host memory for a device whose memory MPI cannot read
static size_t stage_in_bytes, stage_out_bytes;

int comm_rank(void) { return self.rank; }
int comm_size(void) { return self.size; }
int comm_local_rank(void) { return self.local_rank; }
int comm_local_size(void) { return self.local_size; }
const char *comm_description(void) { return description; }

// ---------------------------------------------------------------------------------------------
// Start and end

static int environment_number(const char *name) {
    const char *text = getenv(name);
    char *end;
    long n = text ? strtol(text, &end, 10) : 0;
    return text && end != text && *end == 0 && n > 0 && n < 1 << 24 ? (int)n : 0;
}

// How many ranks a launcher has started, 1 if there is none; 0: there is one that does not tell.
static int launched(const char **by) {
    static const char *const sizes[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "MPI_LOCALNRANKS",
                                        "SLURM_STEP_NUM_TASKS"};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        int n = environment_number(sizes[i]);
        *by = sizes[i];
        // MPI_LOCALNRANKS counts those of this machine only.
        if (n > 1) return n;
        if (n == 1 && strcmp(sizes[i], "MPI_LOCALNRANKS")) return 1;
    }
    *by = "PMIX_RANK";
    return getenv(*by) ? 0 : 1;
}

static void know_each_other(RankInfo *own) {
    own->pid = (int32_t)getpid();
    own->machine = self.leader;
    if (gethostname(own->host, sizeof own->host - 1)) strcpy(own->host, "?");
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        for (int c = 0; c < CPU_SETSIZE && c < 1024; c++)
            if (CPU_ISSET(c, &set)) own->cores[c / 64] |= (uint64_t)1 << (c % 64);
}

// Cores that this rank may run on, and ranks of this machine that may run on some of them.
static void count_cores(int *cores, int *sharing) {
    const RankInfo *own = &ranks[self.rank];
    *cores = *sharing = 0;
    for (int w = 0; w < 16; w++) *cores += __builtin_popcountll(own->cores[w]);
    for (int r = 0; r < self.size; r++) {
        bool meets = false;
        for (int w = 0; w < 16; w++) meets = meets || (own->cores[w] & ranks[r].cores[w]);
        *sharing += ranks[r].machine == own->machine && meets;
    }
}

int comm_default_threads(void) {
    if (!ranks) return 0;
    int cores, sharing;
    count_cores(&cores, &sharing);
    if (sharing <= 1) return 0;         // bound to cores of its own
    return cores / sharing > 1 ? cores / sharing : 1;
}

static void describe(const char *transport) {
    description[0] = 0;
    if (self.size == 1 && !wing) return;
    int n = snprintf(description, sizeof description, "%d rank%s on %d machine%s, %s", self.size,
                     self.size == 1 ? "" : "s", self.machines, self.machines == 1 ? "" : "s", transport);
    if (!ranks || n >= (int)sizeof description) return;
    // Open MPI binds two ranks of a machine with many cores to one core each: a pity that should be seen.
    int cores, sharing, all = (int)sysconf(_SC_NPROCESSORS_ONLN);
    count_cores(&cores, &sharing);
    if (sharing == 1 && cores * self.local_size * 2 <= all)
        snprintf(description + n, sizeof description - (size_t)n,
                 "; bound to %d of %d cores each (mpirun --bind-to none: all)", cores, all);
}

static int join(int *argc, char ***argv, Err *err) {
    const char *by;
    int n = launched(&by);
    if (n == 1) return 0;
    if (!mpi_built)
        return n == 0 ? 0 : err_set(err, E_FAIL, "started as one of %d ranks (%s), but this build has no MPI: each "
                                    "would train alone; install it (apt-get install libopenmpi-dev openmpi-bin), or "
                                    "set MPI_HOME, and make again", n, by);
    int rc = mpi_start(argc, argv, &self, err);
    mpi_runs = self.size > 0;
    if (rc < 0) return rc;
    if (self.size == 1) {
        if (n > 1)
            return err_set(err, E_FAIL, "started as one of %d ranks (%s), but %s, which this program was built with, "
                           "does not know that launcher: start with its own mpirun", n, by, self.library);
        return 0;
    }
    RankInfo own = {0};
    know_each_other(&own);
    ranks = xcalloc((size_t)self.size, sizeof *ranks);
    GuardPlace place = {0};
    const char *watch = getenv("QLLM_WATCH");
    bool off = watch && !strcmp(watch, "off");
    if ((rc = comm_host_all_gather(ranks, &own, sizeof own, err)) < 0) return rc;
    if (self.rank == 0 && !off) guard_listen(&place, self.machines == 1);
    if (off) place.port = -1;
    if ((rc = comm_host_broadcast(&place, sizeof place, 0, err)) < 0) return rc;
    guard_deadline(0, NULL, 0);         // the guard has its own
    if (place.port >= 0) {
        if ((rc = guard_connect(&place, self.rank, self.size, err)) < 0) return rc;
        if ((rc = guard_watch(ranks, self.local_rank, err)) < 0) return rc;
    }
    char transport[80];
    snprintf(transport, sizeof transport, "MPI (%s)", self.library);
    describe(transport);
    return 0;
}

int comm_init(int *argc, char ***argv, Err *err) {
    int rc = join(argc, argv, err);
    guard_deadline(0, NULL, 0);         // mpi_start has set it
    return rc;
}

void comm_end(void) {
    if (wing && wing->end) {
        wing->wait(issued);
        wing->end();
    }
    if (mpi_runs) {
        if (self.size > 1) {
            comm_wait(issued);
            comm_barrier(NULL);
            guard_goodbye();
        }
        // All work is done, and nothing watches any more: should a rank die in MPI_Finalize, the others end well.
        fflush(stdout);
        guard_deadline(END_SECONDS, NULL, 0);
        mpi_stop();
        guard_deadline(0, NULL, 0);
    }
    free(ranks);
    free(stage_in);
    free(stage_out);
    ranks = NULL;
    stage_in = stage_out = NULL;
    stage_in_bytes = stage_out_bytes = 0;
    wing = NULL;
    mpi_runs = false;
    self = (MpiWorld){.size = 1, .local_size = 1, .machines = 1};
    describe("");
}

void comm_die(const Err *err) {
    if (self.size == 1) die(err);
    if (guard_watching()) guard_die(err);
    // Without the watch: as quietly as can be, but certainly.
    fflush(stdout);
    if (self.rank > 0) nanosleep(&(struct timespec){0, 300000000}, NULL);
    fprintf(stderr, "%s[rank %d]: %s\n", program_name, self.rank, err->text);
    mpi_abort(err->code == E_USAGE ? 2 : 1);
    _exit(err->code == E_USAGE ? 2 : 1);
}

// ---------------------------------------------------------------------------------------------
// Device memory

// Which GPU a rank computes on, and whether NCCL can serve there.
typedef struct { int32_t device, able; uint64_t identity; char why[160]; } Ability;

// How many ranks compute on this rank's GPU.
static int count_sharers(Err *err) {
    uint64_t *all = xcalloc((size_t)self.size, sizeof *all), *own = &all[self.rank];
    *own = device_identity();
    int rc = comm_host_all_gather(all, own, sizeof *own, err), n = 0;
    for (int r = 0; r < self.size; r++) n += ranks[r].machine == ranks[self.rank].machine && all[r] == *own;
    if (rc == 0 && *own) device_shared_by(n);
    free(all);
    return rc;
}

static int meet_over_nccl(Err *err) {
    int rc = 0;
    uint8_t *id = xcalloc(1, wing->id_bytes ? wing->id_bytes : 1);
    Err own = {0};
    if (self.rank == 0) rc = wing->make_id(id, &own);
    // Should rank 0 have failed, the others must not wait for it.
    struct { int32_t rc; char text[256]; } made = {.rc = rc};
    snprintf(made.text, sizeof made.text, "%.255s", own.text);
    int sent = comm_host_broadcast(&made, sizeof made, 0, err);
    if (sent == 0 && made.rc < 0) sent = err_set(err, made.rc, "%s", made.text);
    if (sent == 0) sent = comm_host_broadcast(id, wing->id_bytes, 0, err);
    if (sent == 0) sent = wing->init(id, self.rank, self.size, err);
    free(id);
    return sent;
}

int comm_choose(const char *transport, Err *err) {
    bool nccl = !strcmp(transport, "nccl"), automatic = !strcmp(transport, "auto");
    if (!nccl && !automatic && strcmp(transport, "mpi"))
        return err_set(err, E_USAGE, "comm %s: unknown; use auto, mpi or nccl", transport);
    int rc = self.size > 1 ? count_sharers(err) : 0;
    if (rc < 0 || (!nccl && (!automatic || self.size == 1))) return rc;
    Ability own = {.device = device_index(), .identity = device_identity()}, *all;
    all = xcalloc((size_t)self.size, sizeof *all);
    if (device_is_host()) snprintf(own.why, sizeof own.why, "it computes on the CPU");
    else if (!&comm_wing_nccl) snprintf(own.why, sizeof own.why, "this build has no NCCL wing; build where nvcc is");
    else own.able = comm_wing_nccl.available(own.why, sizeof own.why);
    int unable = -1;
    rc = comm_host_all_gather(all, &own, sizeof own, err);
    if (rc < 0) {
        free(all);
        return rc;
    }
    for (int r = self.size - 1; r >= 0; r--) {
        for (int q = 0; q < r && all[r].able; q++) {
            if (ranks[q].machine != ranks[r].machine || all[q].identity != all[r].identity) continue;
            all[r].able = 0;
            snprintf(all[r].why, sizeof all[r].why,
                     "it shares GPU %d of %s with rank %d, and NCCL wants one GPU a rank", all[r].device,
                     ranks[r].host, q);
        }
        if (!all[r].able) unable = r;
    }
    if (unable < 0) {
        wing = &comm_wing_nccl;
        rc = meet_over_nccl(err);
        if (rc == 0) describe(wing->description());
        else wing = NULL;
    } else if (nccl) {
        rc = err_set(err, E_FAIL, "comm nccl: rank %d: %.150s; use --comm mpi", unable, all[unable].why);
    }
    free(all);
    return rc;
}

static bool stage(void **p, size_t *have, size_t bytes) {
    if (bytes <= *have) return true;
    Err err;
    free(*p);
    *p = NULL;
    *have = 0;
    if (big_alloc(p, bytes, "the way of the device's bytes through host memory", &err) < 0) {
        ops_set_error(err.code, "%s", err.text);
        return false;
    }
    *have = bytes;
    return true;
}

static CommTicket collective(TransferKind kind, void *recv, const void *send, size_t bytes) {
    CommTicket ticket = ++issued;
    if (wing) {
        (kind == T_ALL_GATHER ? wing->all_gather : wing->all_to_all)(ticket, recv, send, bytes);
        return ticket;
    }
    size_t all = bytes * (size_t)self.size, sent = kind == T_ALL_GATHER ? bytes : all;
    if (device_is_host()) {
        if (self.size > 1) mpi_put(Q_DEVICE, &(Transfer){.kind = kind, .recv = recv, .send = send, .bytes = bytes});
        else if (bytes && recv != send) memcpy(recv, send, bytes);
        return ticket;
    }
    // Through host memory, and not on the way: for tests, and for GPUs that NCCL does not know.
    double begin = now_seconds();
    if (stage(&stage_out, &stage_out_bytes, sent) && stage(&stage_in, &stage_in_bytes, all)) {
        Err err;
        device_copy_out(stage_out, send, sent);
        if (self.size == 1) memcpy(stage_in, stage_out, bytes);
        else {
            Transfer t = {.kind = kind, .recv = stage_in, .send = stage_out, .bytes = bytes};
            if (mpi_wait(Q_DEVICE, mpi_put(Q_DEVICE, &t), &err) < 0) ops_set_error(err.code, "%s", err.text);
        }
        device_copy_in(recv, stage_in, all);
    }
    blocked_seconds += now_seconds() - begin;
    return ticket;
}

CommTicket comm_all_gather(void *recv, const void *send, size_t bytes) {
    return collective(T_ALL_GATHER, recv, send, bytes);
}
CommTicket comm_all_to_all(void *recv, const void *send, size_t bytes) {
    return collective(T_ALL_TO_ALL, recv, send, bytes);
}

void comm_wait(CommTicket ticket) {
    double begin = now_seconds();
    Err err;
    if (wing) wing->wait(ticket);
    else if (self.size > 1 && device_is_host() && mpi_wait(Q_DEVICE, ticket, &err) < 0)
        ops_set_error(err.code, "%s", err.text);
    blocked_seconds += now_seconds() - begin;
}

void comm_times(double *busy, double *blocked) {
    *busy = mpi_runs ? mpi_busy(Q_DEVICE) : 0;
    *blocked = blocked_seconds;
    if (wing) wing->times(busy, blocked);
}

// ---------------------------------------------------------------------------------------------
// Host memory

static int host_transfer(const Transfer *t, Err *err) { return mpi_wait(Q_HOST, mpi_put(Q_HOST, t), err); }

int comm_barrier(Err *err) { return self.size == 1 ? 0 : host_transfer(&(Transfer){.kind = T_BARRIER}, err); }

int comm_host_broadcast(void *data, size_t bytes, int root, Err *err) {
    if (self.size == 1) return 0;
    return host_transfer(&(Transfer){.kind = T_BROADCAST, .recv = data, .bytes = bytes, .peer = root}, err);
}

int comm_host_all_gather(void *recv, const void *send, size_t bytes, Err *err) {
    if (self.size > 1)
        return host_transfer(&(Transfer){.kind = T_ALL_GATHER, .recv = recv, .send = send, .bytes = bytes}, err);
    if (bytes && recv != send) memcpy(recv, send, bytes);
    return 0;
}

static int check_peer(int peer, Err *err) {
    if (peer >= 0 && peer < self.size && peer != self.rank) return 0;
    return err_set(err, E_FAIL, "rank %d of %d cannot exchange bytes with rank %d", self.rank, self.size, peer);
}
int comm_host_send(const void *data, size_t bytes, int to, Err *err) {
    int rc = check_peer(to, err);
    return rc < 0 ? rc : host_transfer(&(Transfer){.kind = T_SEND, .send = data, .bytes = bytes, .peer = to}, err);
}
int comm_host_recv(void *data, size_t bytes, int from, Err *err) {
    int rc = check_peer(from, err);
    return rc < 0 ? rc : host_transfer(&(Transfer){.kind = T_RECV, .recv = data, .bytes = bytes, .peer = from}, err);
}

// The item of text round position i: between lines, commas with a space, or options that begin with --.
static void item_at(const char *text, size_t n, size_t i, char *out, size_t size) {
    size_t begin = i, end = i;
    if (i > n) {
        snprintf(out, size, "nothing there");
        return;
    }
    for (; begin > 0; begin--) {
        const char *p = text + begin;
        if (p[-1] == '\n' || p[-1] == '{' || (begin > 1 && p[-2] == ',' && p[-1] == ' ')) break;
        if (n - begin >= 2 && p[-1] == ' ' && p[0] == '-' && p[1] == '-') break;
    }
    for (; end < n; end++) {
        const char *p = text + end;
        if (*p == '\n' || *p == '}' || (n - end > 1 && p[0] == ',' && p[1] == ' ')) break;
        if (n - end > 2 && p[0] == ' ' && p[1] == '-' && p[2] == '-') break;
    }
    if (i > begin + 120) begin = i - 40;               // a long item: what is round the place
    bool cut = end - begin > 160;
    snprintf(out, size, "%.*s%s", (int)(cut ? 160 : end - begin), text + begin, cut ? "..." : "");
    if (!out[0]) snprintf(out, size, "nothing there");
}

int comm_check_same(const char *what, const char *text, Err *err) {
    if (self.size == 1) return 0;
    typedef struct { uint64_t hash, bytes; } Print;
    Print own = {checksum_of(text, strlen(text)), strlen(text)};
    Print *all = xcalloc((size_t)self.size, sizeof *all);
    int rc = comm_host_all_gather(all, &own, sizeof own, err), other = 0;
    for (int r = self.size - 1; r > 0; r--)
        if (all[r].hash != all[0].hash || all[r].bytes != all[0].bytes) other = r;
    uint64_t bytes = all[0].bytes;
    free(all);
    if (rc < 0 || !other) return rc;
    // That rank gets the text of rank 0, finds the place and words the message for all.
    Err told = {.code = E_USAGE};
    if (self.rank == 0) rc = comm_host_send(text, bytes, other, err);
    if (self.rank == other) {
        char *first = xmalloc(bytes + 1), there[256], here[256];
        rc = comm_host_recv(first, bytes, 0, err);
        first[bytes] = 0;
        size_t i = 0;
        while (rc == 0 && i < bytes && i < own.bytes && first[i] == text[i]) i++;
        // Where one text ends between items, the next one is what the other has not.
        const char *longer = bytes > own.bytes ? first : text;
        if (i == (bytes < own.bytes ? bytes : own.bytes) && strchr(", \n", longer[i])) i += strspn(longer + i, ", \n");
        item_at(first, bytes, i, there, sizeof there);
        item_at(text, own.bytes, i, here, sizeof here);
        snprintf(told.text, sizeof told.text, "rank %d was started with other %s: rank 0 has %s, rank %d %s", other,
                 what, there, other, here);
        free(first);
    }
    if (rc == 0) rc = comm_host_broadcast(&told, sizeof told, other, err);
    return rc < 0 ? rc : err_set(err, E_USAGE, "%s", told.text);
}
