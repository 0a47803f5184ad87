// The stand-in for NCCL: see nccl_sim.h.
#ifdef HAVE_MPI
#include "nccl_sim.h"
#include "internal.h"
#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <limits.h>
#include <mpi.h>
#include <stdarg.h>
#include <stdio.h>
#include <string>
#include <time.h>
#include <unistd.h>

using cudasim::Range;
using std::string;
using std::vector;

namespace {

const uint32_t LIVE = 0x0cc11fe0u, DEAD = 0xdeadc011u;

// One operation, and a call: one operation, or those of a group.
enum Kind : int32_t { ALL_GATHER, SEND, RECV, DESTROY };
struct Op {
    Kind kind;
    ncclDataType_t type;
    uint64_t count;
    int32_t peer;                      // SEND, RECV
    int32_t unused;
};
struct Buffers { const char *send; char *recv; };
struct Sent {                          // a message on its way, and until then
    vector<char> bytes;
    MPI_Request request;
};
struct Call {
    uint64_t number;
    vector<Op> ops;
    vector<Buffers> buffers;
    vector<vector<char>> snapshot;     // of what each operation sends
};

}   // namespace

struct NcclSimComm {
    uint32_t state;
    MPI_Comm mpi;
    int rank, R;
    uint64_t calls;                    // made so far
    int waiting;                       // in streams
    double failed_at;                  // when the network's failure was first asked for, 0: not yet
    vector<Sent *> sent;
    // The group that is open: what it holds, and where.
    vector<Op> ops;
    vector<Buffers> buffers;
    cudaStream_t stream;
};

namespace {

int group_depth;
vector<ncclComm_t> in_group;           // communicators with operations in the open group

string text(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
string text(const char *fmt, ...) {
    char buf[512];
    va_list args;
    va_start(args, fmt);
    vsnprintf(buf, sizeof buf, fmt, args);
    va_end(args);
    return buf;
}

int world_rank() {
    int rank = 0;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    return rank;
}
[[noreturn]] void violation(const string &what) {
    fprintf(stderr, "ncclsim: rank %d: %s\n", world_rank(), what.c_str());
    fflush(stderr);
    MPI_Abort(MPI_COMM_WORLD, 3);
    abort();
}

size_t type_size(ncclDataType_t type) {
    switch (type) {
    case ncclInt8: case ncclUint8: return 1;
    case ncclFloat16: case ncclBfloat16: return 2;
    case ncclInt32: case ncclUint32: case ncclFloat32: return 4;
    case ncclInt64: case ncclUint64: case ncclFloat64: return 8;
    }
    return 0;
}
const char *type_name(ncclDataType_t type) {
    static const char *const names[] = {"int8", "uint8", "int32", "uint32", "int64", "uint64", "float16", "float32",
                                        "float64", "bfloat16"};
    return (unsigned)type < sizeof names / sizeof *names ? names[type] : "a type that there is not";
}
size_t bytes_of(const Op &op) { return (size_t)op.count * type_size(op.type); }

string describe(const Op &op) {
    unsigned long long count = op.count;
    switch (op.kind) {
    case ALL_GATHER: return text("ncclAllGather(%llu %s)", count, type_name(op.type));
    case SEND: return text("ncclSend(%llu %s to %d)", count, type_name(op.type), op.peer);
    case RECV: return text("ncclRecv(%llu %s from %d)", count, type_name(op.type), op.peer);
    case DESTROY: return "ncclCommDestroy";
    }
    return "nothing known";
}
string describe(const vector<Op> &ops) {
    string s = ops.size() == 1 ? "" : "a group of ";
    for (size_t i = 0; i < ops.size() && i < 8; i++) s += (i ? ", " : "") + describe(ops[i]);
    return ops.size() > 8 ? s + text(" and %zu more", ops.size() - 8) : ops.empty() ? "an empty group" : s;
}
// A call of this rank, for messages.
string describe(const NcclSimComm *c, const Call &call) {
    return text("call %llu: rank %d ", (unsigned long long)call.number, c->rank) + describe(call.ops);
}

// ---------------------------------------------------------------------------------------------
// Messages: number of the call, number of operations, the operations, and what they send to this rank.
struct Header { uint64_t number, n_ops; };

void send_to(NcclSimComm *c, int q, const Call &call) {
    auto *m = new Sent;
    Header h = {call.number, call.ops.size()};
    auto put = [&](const void *p, size_t n) { m->bytes.insert(m->bytes.end(), (const char *)p, (const char *)p + n); };
    put(&h, sizeof h);
    put(call.ops.data(), call.ops.size() * sizeof(Op));
    for (size_t i = 0; i < call.ops.size(); i++)
        if (call.ops[i].kind == ALL_GATHER || (call.ops[i].kind == SEND && call.ops[i].peer == q))
            put(call.snapshot[i].data(), call.snapshot[i].size());
    if (m->bytes.size() > INT_MAX) violation(text("a message of %zu bytes: the stand-in takes 2 GiB", m->bytes.size()));
    MPI_Isend(m->bytes.data(), (int)m->bytes.size(), MPI_BYTE, q, 0, c->mpi, &m->request);
    c->sent.push_back(m);
}
void forget_sent(NcclSimComm *c, bool wait) {
    size_t kept = 0;
    for (Sent *m : c->sent) {
        int done = 0;
        if (wait) MPI_Wait(&m->request, MPI_STATUS_IGNORE), done = 1;
        else MPI_Test(&m->request, &done, MPI_STATUS_IGNORE);
        if (done) delete m;
        else c->sent[kept++] = m;
    }
    c->sent.resize(kept);
}

double now() {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

struct Received { vector<Op> ops; vector<char> bytes; size_t at; };    // at: where its data begin

// What rank q has for this call, which must be one of the same number.
Received receive_from(NcclSimComm *c, int q, const Call &call) {
    const char *limit = getenv("NCCLSIM_TIMEOUT");
    double end = now() + (limit ? atof(limit) : 30.0);
    MPI_Message message;
    MPI_Status status;
    for (int there = 0, tries = 0; !there; tries++) {
        MPI_Improbe(q, 0, c->mpi, &there, &message, &status);
        if (there) break;
        if (now() > end) violation(describe(c, call) + text(" waits in vain for rank %d, which makes no such call", q));
        if (tries > 100) usleep(100);
    }
    int bytes = 0;
    MPI_Get_count(&status, MPI_BYTE, &bytes);
    Received r;
    r.bytes.resize((size_t)bytes);
    MPI_Mrecv(r.bytes.data(), bytes, MPI_BYTE, &message, MPI_STATUS_IGNORE);
    Header h;
    memcpy(&h, r.bytes.data(), sizeof h);
    r.ops.resize(h.n_ops);
    memcpy((void *)r.ops.data(), r.bytes.data() + sizeof h, h.n_ops * sizeof(Op));
    r.at = sizeof h + h.n_ops * sizeof(Op);
    if (h.number != call.number)
        violation(describe(c, call) + text(", rank %d is at call %llu, ", q, (unsigned long long)h.number) +
                  describe(r.ops));
    return r;
}

// The operations of one kind, or of one kind with one peer.
vector<Op> select(const vector<Op> &ops, Kind kind, int peer) {
    vector<Op> s;
    for (const Op &op : ops)
        if (op.kind == kind && (peer < 0 || op.peer == peer)) s.push_back(op);
    return s;
}
bool all_alike(const vector<Op> &a, const vector<Op> &b) {
    if (a.size() != b.size()) return false;
    for (size_t i = 0; i < a.size(); i++)
        if (a[i].type != b[i].type || a[i].count != b[i].count) return false;
    return true;
}
// Whether this rank's call and rank q's go together.
void compare(const NcclSimComm *c, const Call &call, int q, const Received &r) {
    const char *why = nullptr;
    bool own_p2p = !select(call.ops, SEND, -1).empty() || !select(call.ops, RECV, -1).empty();
    bool their_p2p = !select(r.ops, SEND, -1).empty() || !select(r.ops, RECV, -1).empty();
    if (!all_alike(select(call.ops, DESTROY, -1), select(r.ops, DESTROY, -1)))
        why = "one has come to its end and the other has not";
    else if (select(call.ops, ALL_GATHER, -1).size() != select(r.ops, ALL_GATHER, -1).size() || own_p2p != their_p2p)
        why = "these are different operations";
    else if (!all_alike(select(call.ops, ALL_GATHER, -1), select(r.ops, ALL_GATHER, -1)))
        why = "counts or types differ";
    else if (!all_alike(select(call.ops, SEND, q), select(r.ops, RECV, c->rank)))
        why = "what the first sends is not what the second receives";
    else if (!all_alike(select(call.ops, RECV, q), select(r.ops, SEND, c->rank)))
        why = "what the second sends is not what the first receives";
    if (why) violation(describe(c, call) + text(", rank %d ", q) + describe(r.ops) + ": " + why);
}

// ---------------------------------------------------------------------------------------------
// Doing it, in the stream's turn.
int poison_byte() { return cudasim::order & 1 ? 0x7e : 0xff; }

// Where an operation writes, as parts: an all-gather in place leaves out its own, which it sends.
struct Part { char *p; size_t bytes; };
vector<Part> written(const NcclSimComm *c, const Op &op, const Buffers &b) {
    size_t n = bytes_of(op);
    if (op.kind == RECV) return {{b.recv, n}};
    if (op.kind != ALL_GATHER) return {};
    vector<Part> parts;
    for (int q = 0; q < c->R; q++)
        if (q != c->rank || b.recv + (size_t)q * n != b.send) parts.push_back({b.recv + (size_t)q * n, n});
    return parts;
}
vector<Range> touched(const NcclSimComm *c, const Op &op, const Buffers &b) {
    vector<Range> ranges;
    size_t n = bytes_of(op);
    if (b.send && n) ranges.push_back({b.send, n});
    if (b.recv && n) ranges.push_back({b.recv, op.kind == ALL_GATHER ? (size_t)c->R * n : n});
    return ranges;
}

// NCCLSIM_ASYNC_ERROR: the number of calls that are made before the network fails.
bool broken(uint64_t calls) {
    const char *from = getenv("NCCLSIM_ASYNC_ERROR");
    return from && calls >= (uint64_t)atoll(from);
}

void arrive(NcclSimComm *c, const Call &call) {
    c->waiting--;
    while (c->state == LIVE && broken(call.number + 1)) usleep(1000);      // a kernel that waits for the other side
    if (c->state != LIVE) return;                      // aborted: whatever was under way is given up
    vector<Received> from((size_t)c->R);
    for (int q = 0; q < c->R; q++)
        if (q != c->rank) {
            from[(size_t)q] = receive_from(c, q, call);
            compare(c, call, q, from[(size_t)q]);
        }
    for (size_t i = 0; i < call.ops.size(); i++)
        for (const Range &r : touched(c, call.ops[i], call.buffers[i]))
            if (!cudasim::is_device(r.p, r.bytes))
                violation(describe(c, call) + ": memory was freed before the stream came to it");
    cudasim::open_memory(true);
    vector<size_t> own(call.ops.size());               // a send to itself: how many receives took theirs
    for (size_t i = 0; i < call.ops.size(); i++) {
        const Op &op = call.ops[i];
        const Buffers &b = call.buffers[i];
        const vector<char> &s = call.snapshot[i];
        if (b.send && s.size() && memcmp(b.send, s.data(), s.size()))
            violation(describe(c, call) + ": " + describe(op) + " sends memory that was changed meanwhile");
        for (const Part &part : written(c, op, b))
            for (size_t k = 0; k < part.bytes; k++)
                if ((unsigned char)part.p[k] != poison_byte())
                    violation(describe(c, call) + ": " + describe(op) +
                              text(" receives into memory that was written to meanwhile, byte %zu",
                                   (size_t)(part.p - b.recv) + k));
    }
    for (size_t i = 0; i < call.ops.size(); i++) {
        const Op &op = call.ops[i];
        size_t n = bytes_of(op);
        for (int q = 0; q < c->R; q++) {
            Received &r = from[(size_t)q];
            if (op.kind == ALL_GATHER || (op.kind == RECV && op.peer == q)) {
                char *to = op.kind == RECV ? call.buffers[i].recv : call.buffers[i].recv + (size_t)q * n;
                if (q != c->rank) {
                    // Both ranks' operations of a kind stand in the same order, but those of two kinds may not: the
                    // place of this one's data is behind those of the operations before it in the sender's order.
                    size_t before = 0, at = r.at, k = 0;
                    for (size_t j = 0; j < i; j++)
                        before += call.ops[j].kind == op.kind && (op.kind != RECV || call.ops[j].peer == q);
                    for (; k < r.ops.size(); k++) {
                        const Op &o = r.ops[k];
                        if (o.kind != ALL_GATHER && !(o.kind == SEND && o.peer == c->rank)) continue;
                        if (o.kind == (op.kind == RECV ? SEND : ALL_GATHER) && before-- == 0) break;
                        at += bytes_of(o);
                    }
                    if (n) memcpy(to, r.bytes.data() + at, n);
                } else if (op.kind == ALL_GATHER) {
                    if (n && to != call.buffers[i].send) memcpy(to, call.snapshot[i].data(), n);
                } else {
                    for (size_t j = 0; j < call.ops.size(); j++)
                        if (call.ops[j].kind == SEND && call.ops[j].peer == q && !own[j]++) {
                            if (n) memcpy(to, call.snapshot[j].data(), n);
                            break;
                        }
                }
            }
        }
    }
    cudasim::open_memory(false);
}

// Asking for it: what is sent leaves, and what is received is poison from now on.
void begin(NcclSimComm *c, vector<Op> ops, vector<Buffers> buffers, cudaStream_t stream) {
    Call call = {c->calls++, std::move(ops), std::move(buffers), {}};
    vector<Range> ranges;
    for (size_t i = 0; i < call.ops.size(); i++) {
        vector<Range> t = touched(c, call.ops[i], call.buffers[i]);
        ranges.insert(ranges.end(), t.begin(), t.end());
    }
    // What one operation writes no other one touches, nor does it send that itself.
    for (size_t i = 0; i < call.ops.size(); i++)
        for (const Part &w : written(c, call.ops[i], call.buffers[i]))
            for (size_t j = 0; j < call.ops.size(); j++) {
                vector<Range> others = touched(c, call.ops[j], call.buffers[j]);
                if (i == j) others = {{call.buffers[i].send, call.buffers[i].send ? bytes_of(call.ops[i]) : 0}};
                for (const Range &r : others)
                    if (w.p < r.p + r.bytes && r.p < w.p + w.bytes)
                        violation(describe(c, call) + ": memory of " + describe(call.ops[i]) + " and " +
                                  describe(call.ops[j]) + " overlaps");
            }
    // Receives and sends between this rank and itself.
    if (!all_alike(select(call.ops, SEND, c->rank), select(call.ops, RECV, c->rank)))
        violation(describe(c, call) + ": what it sends to itself is not what it receives from itself");
    cudasim::catch_up(stream, ranges);
    cudasim::open_memory(true);
    for (size_t i = 0; i < call.ops.size(); i++) {
        const char *p = call.buffers[i].send;
        call.snapshot.emplace_back(p, p ? p + bytes_of(call.ops[i]) : p);
    }
    for (size_t i = 0; i < call.ops.size(); i++)
        for (const Part &w : written(c, call.ops[i], call.buffers[i])) memset(w.p, poison_byte(), w.bytes);
    cudasim::open_memory(false);
    forget_sent(c, false);
    for (int q = 0; q < c->R; q++)
        if (q != c->rank) send_to(c, q, call);
    c->waiting++;
    cudasim::later(stream, ranges, [c, call] { arrive(c, call); });
}

// Communicators are never freed, so that a later use is seen.
vector<ncclComm_t> &communicators() { static auto *all = new vector<ncclComm_t>; return *all; }
NcclSimComm *live(ncclComm_t comm, const char *call) {
    for (ncclComm_t c : communicators())
        if (c == comm) {
            if (c->state != LIVE)
                violation(text("%s after %llu calls on a communicator that was destroyed or aborted", call,
                               (unsigned long long)c->calls));
            return c;
        }
    violation(text("%s on what is no communicator", call));
}

ncclResult_t add(const Op &op, const void *send, void *recv, ncclComm_t comm, cudaStream_t stream) {
    NcclSimComm *c = live(comm, describe(op).c_str());
    Call call = {c->calls, {op}, {}, {}};
    if (!type_size(op.type) || op.peer < 0 || op.peer >= c->R) return ncclInvalidArgument;
    size_t n = bytes_of(op), received = op.kind == ALL_GATHER ? (size_t)c->R * n : n;
    bool sends = op.kind != RECV, receives = op.kind != SEND;
    if (n && ((sends && !cudasim::is_device(send, n)) || (receives && !cudasim::is_device(recv, received))))
        violation(describe(c, call) + ": a buffer is not, or not as a whole, in device memory");
    if (cudasim::capturing(stream)) violation(describe(c, call) + ": the stream is being captured");
    if (!group_depth) {
        if (op.kind != ALL_GATHER) violation(describe(c, call) + " stands in no group");
        begin(c, {op}, {{(const char *)send, (char *)recv}}, stream);
        return ncclSuccess;
    }
    if (c->ops.empty()) in_group.push_back(c), c->stream = stream;
    if (c->stream != stream) violation(describe(c, call) + ": operations of one group are on two streams");
    c->ops.push_back(op);
    c->buffers.push_back({(const char *)send, (char *)recv});
    return ncclSuccess;
}

}   // namespace

// ---------------------------------------------------------------------------------------------

// The stand-in calls MPI on whichever thread waits for a stream, beside a program that has one of its own for that: it
// takes this door of MPI's, which is there for tools, to have threads allowed for.
extern "C" int MPI_Init_thread(int *argc, char ***argv, int required, int *provided) {
    (void)required;
    return PMPI_Init_thread(argc, argv, MPI_THREAD_MULTIPLE, provided);
}

ncclResult_t ncclGetVersion(int *version) {
    *version = 22800;
    return ncclSuccess;
}
const char *ncclGetErrorString(ncclResult_t result) {
    static const char *const texts[] = {"no error", "unhandled cuda error", "unhandled system error", "internal error",
                                        "invalid argument", "invalid usage", "remote process exited or there was a "
                                        "network error", "operation in progress"};
    return (unsigned)result < sizeof texts / sizeof *texts ? texts[result] : "unknown result code";
}
static string last_error;
const char *ncclGetLastError(ncclComm_t) { return last_error.c_str(); }

#define ID_MAGIC "ncclsim"
ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    static unsigned n;
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, ID_MAGIC " %ld %u %.9f", (long)getpid(), n++, now());
    return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t *comm, int R, ncclUniqueId id, int rank) {
    int there = 0, size = 0, device = 0, threads = 0;
    MPI_Initialized(&there);
    if (!there) cudasim::fail("ncclCommInitRank before MPI_Init");
    MPI_Query_thread(&threads);
    if (threads < MPI_THREAD_MULTIPLE) cudasim::fail("this MPI has no MPI_THREAD_MULTIPLE, which the stand-in needs");
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (memcmp(id.internal, ID_MAGIC, sizeof ID_MAGIC - 1)) return ncclInvalidArgument;
    if (R != size || rank != world_rank())
        violation(text("ncclCommInitRank as rank %d of %d, and MPI says %d of %d", rank, R, world_rank(), size));
    if (cudaGetDevice(&device) != cudaSuccess) return ncclUnhandledCudaError;
    auto *c = new NcclSimComm{LIVE, MPI_COMM_NULL, rank, R, 0, 0, 0.0, {}, {}, {}, nullptr};
    MPI_Comm_dup(MPI_COMM_WORLD, &c->mpi);
    // Everyone's id, host and device.
    cudaDeviceProp prop;
    if (cudaGetDeviceProperties(&prop, device) != cudaSuccess) return ncclUnhandledCudaError;
    struct Who { ncclUniqueId id; char host[64]; int device; cudaUUID_t uuid; } own = {id, {}, device, prop.uuid};
    gethostname(own.host, sizeof own.host - 1);
    vector<Who> all((size_t)R);
    MPI_Allgather(&own, sizeof own, MPI_BYTE, all.data(), sizeof own, MPI_BYTE, c->mpi);
    bool shared = false;
    for (int q = 0; q < R; q++) {
        if (memcmp(&all[(size_t)q].id, &id, sizeof id))
            violation(text("ncclCommInitRank with another id than rank %d's", q));
        for (int p = 0; p < q; p++)
            if (!memcmp(&all[(size_t)p].uuid, &all[(size_t)q].uuid, sizeof prop.uuid) &&
                !strcmp(all[(size_t)p].host, all[(size_t)q].host)) {
                last_error = text("Duplicate GPU detected : rank %d and rank %d both on CUDA device %d", q, p,
                                  all[(size_t)q].device);
                shared = true;
            }
    }
    if (shared) {
        MPI_Comm_free(&c->mpi);
        delete c;
        return ncclInvalidUsage;
    }
    communicators().push_back(c);
    *comm = c;
    return ncclSuccess;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    NcclSimComm *c = live(comm, "ncclCommDestroy");
    if (c->waiting)
        violation(text("ncclCommDestroy after %llu calls, %d of them still in a stream", (unsigned long long)c->calls,
                       c->waiting));
    if (group_depth) violation("ncclCommDestroy in a group");
    // That all ranks made as many calls.
    Call call = {c->calls++, {{DESTROY, ncclInt8, 0, 0, 0}}, {{nullptr, nullptr}}, {{}}};
    for (int q = 0; q < c->R; q++)
        if (q != c->rank) send_to(c, q, call);
    for (int q = 0; q < c->R; q++)
        if (q != c->rank) compare(c, call, q, receive_from(c, q, call));
    forget_sent(c, true);
    MPI_Comm_free(&c->mpi);
    c->state = DEAD;
    return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
    live(comm, "ncclCommAbort")->state = DEAD;
    return ncclSuccess;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *state) {
    const char *late = getenv("NCCLSIM_ASYNC_AFTER");
    NcclSimComm *c = live(comm, "ncclCommGetAsyncError");
    *state = ncclSuccess;
    if (broken(c->calls)) {
        if (c->failed_at <= 0) c->failed_at = now();
        if (now() - c->failed_at >= (late ? atof(late) : 0)) *state = ncclRemoteError;
    }
    if (*state != ncclSuccess) last_error = "NCCLSIM_ASYNC_ERROR asks for it";
    return ncclSuccess;
}

ncclResult_t ncclGroupStart(void) {
    group_depth++;
    return ncclSuccess;
}
ncclResult_t ncclGroupEnd(void) {
    if (!group_depth) {
        last_error = "ncclGroupEnd: not in a group call.";
        return ncclInvalidUsage;
    }
    if (--group_depth) return ncclSuccess;
    vector<ncclComm_t> communicating;
    communicating.swap(in_group);
    for (ncclComm_t c : communicating) {
        vector<Op> ops;
        vector<Buffers> buffers;
        ops.swap(c->ops);
        buffers.swap(c->buffers);
        begin(c, std::move(ops), std::move(buffers), c->stream);
    }
    return ncclSuccess;
}

ncclResult_t ncclAllGather(const void *send, void *recv, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
    return add({ALL_GATHER, type, count, 0, 0}, send, recv, comm, stream);
}
ncclResult_t ncclSend(const void *send, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
    return add({SEND, type, count, peer, 0}, send, nullptr, comm, stream);
}
ncclResult_t ncclRecv(void *recv, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
    return add({RECV, type, count, peer, 0}, nullptr, recv, comm, stream);
}
#endif
