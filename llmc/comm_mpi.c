// MPI: all calls after MPI_Init are made by one thread, the lane, so that bytes move while the program computes, and
// any MPI with MPI_THREAD_SERIALIZED will do. Transfers are nonblocking; between looks at them the lane sleeps, because
// the core it runs on is usually one that computes.
#include "comm_impl.h"
#include "profile.h"

size_t mpi_piece = (size_t)1 << 30;
int mpi_window = 8;

#ifdef HAVE_MPI
#include <errno.h>
#include <mpi.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <time.h>

const bool mpi_built = true;

enum { RING = 256, WINDOW = 8 };        // transfers that wait in a queue; the most that mpi_window may be

// A transfer goes in steps; the messages of a step are under way together.
typedef struct {
    Transfer t;
    size_t offset;                      // of the piece
    int round;                          // gather, all-to-all: first round of the step; s: rank + s, rank - s
    int n;                              // messages of the step
    bool active;
    double began;
    MPI_Request request[2 * WINDOW];
} Running;

static struct {
    Transfer ring[RING];
    uint64_t put, taken, done;          // transfers ever: asked for, begun, finished
    Running run;
    MPI_Comm comm;
    double busy;
    Err failed;                         // the first failure; what comes after it is not even tried
} queues[QUEUES];

static MpiWorld world;
static pthread_t lane;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t asked = PTHREAD_COND_INITIALIZER, finished = PTHREAD_COND_INITIALIZER;
static bool stopping, lane_runs;
static int waiting;                     // threads that are blocked until something is done

// ---------------------------------------------------------------------------------------------
// Transfers

static int check(int rc, Err *failed) {
    if (rc == MPI_SUCCESS) return 0;
    char text[MPI_MAX_ERROR_STRING] = "";
    int n = 0;
    MPI_Error_string(rc, text, &n);
    return err_set(failed, E_FAIL, "MPI: %s", text);
}

// Like check, for a call on n requests: where only their statuses tell, the first of them that has failed.
static int check_all(int rc, const MPI_Status *status, int n, Err *failed) {
    for (int i = 0; i < n && rc == MPI_ERR_IN_STATUS; i++)
        if (status[i].MPI_ERROR != MPI_SUCCESS && status[i].MPI_ERROR != MPI_ERR_PENDING) rc = status[i].MPI_ERROR;
    return check(rc, failed);
}

// Starts messages of the next step; n = 0 if there are none left.
static int next_step(Running *r, MPI_Comm comm, Err *failed) {
    const Transfer *t = &r->t;
    int rc = MPI_SUCCESS, R = world.size, me = world.rank;
    size_t left = t->bytes - r->offset, piece = left < mpi_piece ? left : mpi_piece;
    uint8_t *recv = t->recv;
    const uint8_t *send = t->send;
    r->n = 0;
    switch (t->kind) {
    case T_BARRIER:
        if (r->round++ == 0) rc = MPI_Ibarrier(comm, &r->request[r->n++]);
        break;
    case T_BROADCAST:
        if (piece) rc = MPI_Ibcast(recv + r->offset, (int)piece, MPI_BYTE, t->peer, comm, &r->request[r->n++]);
        r->offset += piece;
        break;
    case T_SEND:
        if (piece) rc = MPI_Isend(send + r->offset, (int)piece, MPI_BYTE, t->peer, 1, comm, &r->request[r->n++]);
        r->offset += piece;
        break;
    case T_RECV:
        if (piece) rc = MPI_Irecv(recv + r->offset, (int)piece, MPI_BYTE, t->peer, 1, comm, &r->request[r->n++]);
        r->offset += piece;
        break;
    case T_ALL_GATHER:
    case T_ALL_TO_ALL:
        if (!piece) break;
        int end = r->round + mpi_window < R ? r->round + mpi_window : R;
        for (int s = r->round; s < end && rc == MPI_SUCCESS; s++) {
            int from = (me + R - s) % R;
            if (s) rc = MPI_Irecv(recv + (size_t)from * t->bytes + r->offset, (int)piece, MPI_BYTE, from, 0, comm,
                                  &r->request[r->n++]);
        }
        for (int s = r->round; s < end && rc == MPI_SUCCESS; s++) {
            int to = (me + s) % R;
            const uint8_t *part = send + (t->kind == T_ALL_TO_ALL ? (size_t)to * t->bytes : 0) + r->offset;
            uint8_t *own = recv + (size_t)me * t->bytes + r->offset;
            if (s) rc = MPI_Isend(part, (int)piece, MPI_BYTE, to, 0, comm, &r->request[r->n++]);
            else if (own != part) memcpy(own, part, piece);
        }
        r->round = end;
        if (end == R) {
            r->round = 0;
            r->offset += piece;
        }
        break;
    }
    return check(rc, failed);
}

// Looks whether the step is done, and begins the next. 1: the transfer is done.
static int advance(Running *r, MPI_Comm comm, Err *failed) {
    int all = 1;
    if (r->n) {
        MPI_Status status[2 * WINDOW];
        int rc = check_all(MPI_Testall(r->n, r->request, &all, status), status, r->n, failed);
        if (rc < 0) return rc;
    }
    while (all) {
        bool more = r->t.kind == T_BARRIER ? r->round == 0 : r->offset < r->t.bytes;
        if (!more) return 1;
        int rc = next_step(r, comm, failed);
        if (rc < 0) return rc;
        if (r->n) return 0;
    }
    return 0;
}

// ---------------------------------------------------------------------------------------------
// The lane

static void sleep_seconds(double s) {       // less than one
    struct timespec t = {0, (long)(s * 1e9)};
    nanosleep(&t, NULL);
}
static double between(double least, double x, double most) { return x < least ? least : x > most ? most : x; }

static void *run_lane(void *unused) {
    (void)unused;
    prctl(PR_SET_TIMERSLACK, 1000UL, 0UL, 0UL, 0UL);      // sleeps of microseconds should be that
    double moved = 0;
    Err failed[QUEUES] = {{0}};           // the lane's own: others may read what queues[] has meanwhile
    pthread_mutex_lock(&lock);
    for (;;) {
        bool idle = true;
        for (int q = 0; q < QUEUES; q++) {
            Running *r = &queues[q].run;
            if (!r->active && queues[q].taken < queues[q].put) {
                *r = (Running){.t = queues[q].ring[queues[q].taken++ % RING], .active = true, .began = now_seconds()};
                moved = now_seconds();
            }
            idle = idle && !r->active;
        }
        if (idle && stopping) break;
        if (idle) {
            pthread_cond_wait(&asked, &lock);
            continue;
        }
        bool awaited = waiting > 0;
        pthread_mutex_unlock(&lock);
        bool over[QUEUES] = {false};
        double before = now_seconds();
        for (int q = 0; q < QUEUES; q++) {
            Running *r = &queues[q].run;
            if (r->active) over[q] = failed[q].code || advance(r, queues[q].comm, &failed[q]) != 0;
        }
        double now = now_seconds();
        bool ended = false;
        for (int q = 0; q < QUEUES; q++) ended = ended || over[q];
        if (over[Q_DEVICE]) {
            const Running *r = &queues[Q_DEVICE].run;
            profile_span(r->t.kind == T_ALL_GATHER ? "all_gather" : "all_to_all", PROFILE_COMMUNICATION, r->began, now);
        }
        // A look that took long has moved bytes. Else something must come from another process: it gets the core, and
        // the longer that takes the less exact the end of it need be known.
        if (ended || now - before > 20e-6) moved = now;
        if (now - moved < (awaited ? 200e-6 : 20e-6)) sched_yield();
        else if (awaited) sleep_seconds(between(20e-6, (now - moved) / 16, 250e-6));
        else sleep_seconds(between(50e-6, (now - moved) / 8, 1e-3));
        pthread_mutex_lock(&lock);
        for (int q = 0; q < QUEUES; q++) {
            if (!over[q]) continue;
            queues[q].run.active = false;
            queues[q].busy += now - queues[q].run.began;
            if (failed[q].code) queues[q].failed = failed[q];
            queues[q].done++;
        }
        if (ended) pthread_cond_broadcast(&finished);
    }
    pthread_mutex_unlock(&lock);
    return NULL;
}

uint64_t mpi_put(Queue q, const Transfer *t) {
    pthread_mutex_lock(&lock);
    waiting++;
    while (queues[q].put - queues[q].done >= RING) pthread_cond_wait(&finished, &lock);
    waiting--;
    queues[q].ring[queues[q].put++ % RING] = *t;
    uint64_t ticket = queues[q].put;
    pthread_cond_signal(&asked);
    pthread_mutex_unlock(&lock);
    return ticket;
}

int mpi_wait(Queue q, uint64_t ticket, Err *err) {
    pthread_mutex_lock(&lock);
    waiting++;
    while (queues[q].done < ticket) pthread_cond_wait(&finished, &lock);
    waiting--;
    Err failed = queues[q].failed;
    pthread_mutex_unlock(&lock);
    return failed.code ? err_set(err, failed.code, "%s", failed.text) : 0;
}

double mpi_busy(Queue q) {
    pthread_mutex_lock(&lock);
    double busy = queues[q].busy + (queues[q].run.active ? now_seconds() - queues[q].run.began : 0);
    pthread_mutex_unlock(&lock);
    return busy;
}

// ---------------------------------------------------------------------------------------------
// Start and end

// "Open MPI v4.1.4, package: ..." and "MPICH Version:\t4.0.2\n..." to "Open MPI 4.1.4" and "MPICH 4.0.2".
static void library_name(char *out, size_t size) {
    char text[MPI_MAX_LIBRARY_VERSION_STRING] = "";
    int n = 0;
    MPI_Get_library_version(text, &n);
    text[strcspn(text, ",\n")] = 0;
    char *version = strstr(text, " Version:");
    if (version) {
        size_t skip = 9 + strspn(version + 9, " \t");
        *version = 0;
        snprintf(out, size, "%.40s %.20s", text, version + skip);
    } else if ((version = strstr(text, " v")) && version[2] >= '0' && version[2] <= '9') {
        *version = 0;
        snprintf(out, size, "%.40s %.20s", text, version + 2);
    } else {
        snprintf(out, size, "%.60s", text);
    }
}

enum { START_SECONDS = 60 };            // from MPI_Init, which waits for all, until comm_init knows all ranks
static const char no_start[] = "the ranks did not find each other within 60 s of MPI's start: one of them may have "
                               "died, or the network between the machines does not carry MPI; start again";

int mpi_start(int *argc, char ***argv, MpiWorld *out, Err *err) {
    int provided = MPI_THREAD_SINGLE, leader = 0, is_leader;
    if (MPI_Init_thread(argc, argv, MPI_THREAD_SERIALIZED, &provided) != MPI_SUCCESS)
        return err_set(err, E_FAIL, "MPI does not start");
    guard_deadline(START_SECONDS, no_start, 1);
    MPI_Comm_rank(MPI_COMM_WORLD, &world.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &world.size);
    library_name(world.library, sizeof world.library);
    *out = world;
    if (provided < MPI_THREAD_SERIALIZED)
        return err_set(err, E_FAIL, "%s was built without threads (MPI_THREAD_SERIALIZED); use one that has them",
                       world.library);
    MPI_Comm local;
    int rc = MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &local);
    if (rc == MPI_SUCCESS) {
        MPI_Comm_rank(local, &world.local_rank);
        MPI_Comm_size(local, &world.local_size);
        is_leader = world.local_rank == 0;
        leader = world.rank;
        MPI_Bcast(&leader, 1, MPI_INT, 0, local);
        MPI_Comm_free(&local);
        MPI_Allreduce(&is_leader, &world.machines, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
    }
    for (int q = 0; q < QUEUES && rc == MPI_SUCCESS; q++) {
        rc = MPI_Comm_dup(MPI_COMM_WORLD, &queues[q].comm);
        if (rc == MPI_SUCCESS) rc = MPI_Comm_set_errhandler(queues[q].comm, MPI_ERRORS_RETURN);
    }
    world.leader = leader;
    *out = world;
    if (rc != MPI_SUCCESS) return check(rc, err);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);            // signals are for the main thread
    int e = pthread_create(&lane, NULL, run_lane, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (e) return err_set(err, E_FAIL, "no thread for MPI: %s", strerror(e));
    lane_runs = true;
    return 0;
}

void mpi_stop(void) {
    if (lane_runs) {
        pthread_mutex_lock(&lock);
        stopping = true;
        pthread_cond_signal(&asked);
        pthread_mutex_unlock(&lock);
        pthread_join(lane, NULL);
        lane_runs = false;
        for (int q = 0; q < QUEUES; q++) MPI_Comm_free(&queues[q].comm);
    }
    MPI_Finalize();
}

void mpi_abort(int status) { MPI_Abort(MPI_COMM_WORLD, status); }

#else
const bool mpi_built = false;

int mpi_start(int *argc, char ***argv, MpiWorld *world, Err *err) {
    (void)argc, (void)argv, (void)world;
    return err_set(err, E_FAIL, "this build has no MPI");
}
void mpi_stop(void) {}
void mpi_abort(int status) { (void)status; }
uint64_t mpi_put(Queue q, const Transfer *t) {
    (void)q, (void)t;
    return 0;
}
int mpi_wait(Queue q, uint64_t ticket, Err *err) {
    (void)q, (void)ticket;
    return err_set(err, E_FAIL, "this build has no MPI");
}
double mpi_busy(Queue q) {
    (void)q;
    return 0;
}
#endif
