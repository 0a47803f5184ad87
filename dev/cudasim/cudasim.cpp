// The simulator's run time: fibers, the scheduler of one block, and guarded device memory. See README.md.
#include "internal.h"
#include <link.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ASAN 1
#else
#define ASAN 0
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

static cudaError_t last_error = cudaSuccess;
cudaError_t cudasim::set_error(cudaError_t e) {
    if (e != cudaSuccess) last_error = e;
    return e;
}

namespace {
using cudasim::set_error;

const size_t PAGE = 4096;
const size_t STACK = ASAN ? 256 << 10 : 64 << 10;             // of a simulated thread
const int MAX_THREADS = 1024;                                 // in a block, as on every GPU
const size_t DEFAULT_SMEM = 48 << 10;                          // without cudaFuncSetAttribute
// Static shared memory counts too, and how much a kernel has is not known here: above this, dynamic is to be asked for.
const size_t DEFAULT_DYNAMIC = DEFAULT_SMEM - (16 << 10);
// CUDASIM_CAPABILITY=75 plays a device of compute capability 7.5.
int capability() {
    const char *s = getenv("CUDASIM_CAPABILITY");
    return s ? atoi(s) : 80;
}
// What a block may have with cudaFuncSetAttribute: "CUDA C++ Programming Guide", Compute Capabilities.
size_t max_smem() {
    int c = capability();
    size_t kib = c < 80 ? 64 : c == 80 || c == 87 ? 163 : c < 90 || c >= 120 ? 99 : 227;
    return kib << 10;
}

using cudasim::fail;

// ---------------------------------------------------------------------------------------------
// Fibers: a simulated thread is a stack and a place to go on. Switching is a handful of instructions and no system call
// on x86-64; elsewhere ucontext does it, correct and slower. The floating-point control words are not switched: kernels
// do not change them.

#if defined(__x86_64__) && !defined(CUDASIM_UCONTEXT)
typedef void *Context;
// Saves the callee-saved registers on the running stack, stores its pointer in *from and goes on with the stack `to`.
extern "C" void cudasim_swap(void **from, void *to);
__asm__(R"(
    .text
    .globl cudasim_swap
    .type cudasim_swap, @function
cudasim_swap:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size cudasim_swap, .-cudasim_swap
)");
void context_make(Context *c, char *stack, size_t size, void (*entry)()) {
    // Six registers, the address that `ret` takes, and a word so that the stack is aligned as after a call.
    uint64_t *sp = (uint64_t *)(stack + size) - 8;
    memset(sp, 0, 8 * sizeof *sp);
    sp[6] = (uint64_t)(uintptr_t)entry;
    *c = sp;
}
void context_swap(Context *from, Context *to) { cudasim_swap(from, *to); }
#else
typedef ucontext_t Context;
void context_make(Context *c, char *stack, size_t size, void (*entry)()) {
    getcontext(c);
    c->uc_stack.ss_sp = stack;
    c->uc_stack.ss_size = size;
    c->uc_link = nullptr;
    makecontext(c, entry, 0);
}
void context_swap(Context *from, Context *to) { swapcontext(from, to); }
#endif

// ---------------------------------------------------------------------------------------------
// State of the running launch.

enum Wait { READY, AT_BARRIER, IN_WARP, DONE };

struct Thread {
    Context context;
    void *fake_stack;                  // AddressSanitizer's
    char *stack;
    uint3 idx;
    Wait wait;
    const char *file; int line;        // where it waits
    cudasim::Collective kind;          // IN_WARP: what it waits for, and what it brings
    unsigned mask;
    uint64_t value; int src;
    uint64_t result;
    struct Copy { char *dst; const char *src; int bytes, group; } *copies;   // cp.async that nobody waited for yet
    int n_copies, max_copies, group;
};

Thread threads[MAX_THREADS];
Thread *current;                       // NULL: the host runs
int n_threads, n_alive, n_at_barrier, barrier_votes;
size_t n_launches;
unsigned ready[MAX_THREADS / 32];      // lanes of each warp that can run
unsigned ready_warps;                  // warps that have any
unsigned alive[MAX_THREADS / 32];      // lanes of each warp that have not ended
unsigned in_warp[MAX_THREADS / 32];    // and those that wait for others of it
const cudasim::Launch *launch;
void *smem;                            // dynamic shared memory of the launch
Context scheduler;
#if ASAN
void *scheduler_fake_stack;
const void *scheduler_stack; size_t scheduler_stack_size;
#endif

}   // namespace
unsigned cudasim::order;
namespace {
using cudasim::order;
uint64_t random_state;
unsigned random_below(unsigned n) {    // xorshift64; the small bias does not matter here
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (unsigned)((random_state >> 32) % n);
}
int poison_byte() { return order & 1 ? 0x7e : 0xff; }

void print_place(FILE *f) {
    if (!launch) return;
    fprintf(f, "  in %s launched at %s:%d, grid (%u,%u,%u), block (%u,%u,%u), order %u\n", launch->name, launch->file,
            launch->line, gridDim.x, gridDim.y, gridDim.z, blockDim.x, blockDim.y, blockDim.z, order);
    if (current) fprintf(f, "  block (%u,%u,%u), thread (%u,%u,%u)\n", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x,
                         threadIdx.y, threadIdx.z);
}

}   // namespace
// A mistake in a kernel ends the program, with the place: there is nothing sensible to go on with.
void cudasim::fail(const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    fprintf(stderr, "cudasim: ");
    vfprintf(stderr, fmt, ap);
    fprintf(stderr, "\n");
    va_end(ap);
    print_place(stderr);
    abort();
}
namespace {

// ---------------------------------------------------------------------------------------------
// Device memory. Each allocation ends (to 16 bytes) at a page that cannot be touched, and begins after another; the
// bytes left over on both sides hold a pattern that is checked after each launch. Freed memory stays mapped without
// access, so that its address is never used again. Under AddressSanitizer the left-over bytes are poisoned as well.
//
//   | no access | pattern ... | the allocation | pattern, 0..15 bytes | no access |
//               ^ base                         ^ p + bytes            ^ base + size

struct Allocation { char *base, *p; size_t size, bytes; bool freed; };
Allocation *allocations;
int n_allocations, max_allocations;
size_t bytes_allocated;
const unsigned char PATTERN = 0xa5;

size_t round_up(size_t n, size_t m) { return (n + m - 1) / m * m; }

Allocation *find(const void *p, size_t slack) {
    for (int i = n_allocations - 1; i >= 0; i--) {
        Allocation *a = &allocations[i];
        if ((const char *)p >= a->base - slack && (const char *)p < a->base + a->size + slack) return a;
    }
    return nullptr;
}

void access(const Allocation *a, bool on) {
    if (!a->freed) mprotect(a->base, a->size, on ? PROT_READ | PROT_WRITE : PROT_NONE);
}
void access_all(bool on) {
    for (int i = 0; i < n_allocations; i++) access(&allocations[i], on);
}

__attribute__((no_sanitize_address)) bool pattern_intact(const Allocation *a, const char **where) {
    for (const char *c = a->base; c < a->p; c++)
        if ((unsigned char)*c != PATTERN) { *where = c; return false; }
    for (const char *c = a->p + a->bytes; c < a->base + a->size; c++)
        if ((unsigned char)*c != PATTERN) { *where = c; return false; }
    return true;
}

void check_patterns() {
    const char *where;
    for (int i = 0; i < n_allocations; i++) {
        const Allocation *a = &allocations[i];
        if (a->freed || pattern_intact(a, &where)) continue;
        if (where < a->p) fail("a write %td bytes before a device allocation of %zu bytes", a->p - where, a->bytes);
        fail("a write %td bytes past the end of a device allocation of %zu bytes",
             where - a->p - (ptrdiff_t)a->bytes + 1, a->bytes);
    }
}

// Not memset, which AddressSanitizer watches: the bytes may be poisoned.
__attribute__((no_sanitize_address)) void fill(char *p, int byte, size_t n) {
    for (size_t i = 0; i < n; i++) ((volatile char *)p)[i] = (char)byte;
}

void on_fault(int, siginfo_t *info, void *) {
    const char *p = (const char *)info->si_addr;
    const Allocation *a = find(p, PAGE);
    const char *who = current ? "a kernel" : "host code";
    if (!a) {
        fprintf(stderr, "cudasim: %s touches address %p, which is no device memory\n", who, (const void *)p);
        for (int i = 0; i < n_threads; i++)
            if (threads[i].stack && p < threads[i].stack && p >= threads[i].stack - PAGE)
                fprintf(stderr, "cudasim: it is below the stack of a simulated thread (%zu bytes): too deep, or arrays "
                                "too large for registers\n", STACK);
    } else if (a->freed) {
        fprintf(stderr, "cudasim: %s touches freed device memory (an allocation of %zu bytes)\n", who, a->bytes);
    } else if (p < a->p) {
        fprintf(stderr, "cudasim: %s touches %td bytes before a device allocation of %zu bytes\n", who, a->p - p,
                a->bytes);
    } else if (p >= a->p + a->bytes) {
        fprintf(stderr, "cudasim: %s touches %td bytes past the end of a device allocation of %zu bytes\n", who,
                p - a->p - (ptrdiff_t)a->bytes + 1, a->bytes);
    } else {
        fprintf(stderr, "cudasim: %s touches device memory (byte %td of an allocation of %zu): copy it out first\n",
                who, p - a->p, a->bytes);
    }
    print_place(stderr);
    fflush(stderr);
    signal(SIGABRT, SIG_DFL);
    abort();
}

void init() {
    static bool done;
    if (done) return;
    done = true;
    const char *o = getenv("CUDASIM_ORDER");
    if (o) cudasim_set_order((unsigned)strtoul(o, nullptr, 10));
    if (ASAN) return;                  // its own report is better than ours
    static char alt[64 << 10];
    stack_t ss = {};
    ss.ss_sp = alt;
    ss.ss_size = sizeof alt;
    sigaltstack(&ss, nullptr);         // a fault may be a stack that is full
    struct sigaction sa = {};
    sa.sa_sigaction = on_fault;
    sa.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &sa, nullptr);
    sigaction(SIGBUS, &sa, nullptr);
}

// The program's thread-local variables: the __shared__ ones (cudasim.h), and perhaps some of the host code, which are
// kept safe while a kernel runs.
struct { char *p, *saved; size_t size; } tls;

int find_tls(struct dl_phdr_info *info, size_t, void *) {      // the first object is the program itself
    for (int i = 0; i < info->dlpi_phnum; i++)
        if (info->dlpi_phdr[i].p_type == PT_TLS) {
            tls.p = (char *)info->dlpi_tls_data;
            tls.size = info->dlpi_phdr[i].p_memsz;
        }
    return 1;
}

void shared_begin() {
    if (!tls.saved) {
        dl_iterate_phdr(find_tls, nullptr);
        tls.saved = (char *)malloc(tls.size + 1);
        if (!tls.saved) fail("no memory");
    }
    if (tls.size) memcpy(tls.saved, tls.p, tls.size);
}
void shared_end() {
    if (tls.size) memcpy(tls.p, tls.saved, tls.size);
}

// ---------------------------------------------------------------------------------------------
// The scheduler. A thread runs until it waits or ends; the scheduler then picks another. All waiting is on the block's
// barrier or on lanes of the own warp.

const unsigned FULL = 0xffffffffu;

int index_of(const Thread *t) { return (int)(t - threads); }
bool other_file(const Thread *a, const Thread *b) { return a->file != b->file && strcmp(a->file, b->file) != 0; }

void make_ready(Thread *t) {
    int i = index_of(t);
    t->wait = READY;
    in_warp[i / 32] &= ~(1u << (i % 32));
    ready[i / 32] |= 1u << (i % 32);
    ready_warps |= 1u << (i / 32);
}

void switch_to_scheduler(bool ending) {
    (void)ending;
#if ASAN
    __sanitizer_start_switch_fiber(ending ? nullptr : &current->fake_stack, scheduler_stack, scheduler_stack_size);
#endif
    Thread *self = current;
    context_swap(&self->context, &scheduler);
#if ASAN
    __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
#endif
}

// If every running lane of t's mask has come to the same call, gives each its result and lets it run.
void try_warp_collective(Thread *t) {
    int w = index_of(t) / 32;
    Thread *warp = threads + w * 32;
    unsigned mask = t->mask, lanes = alive[w] & mask, ballot = 0;
    if (lanes & ~in_warp[w]) return;
    for (int l = 0; l < 32; l++) {
        if (!(lanes >> l & 1)) continue;
        const Thread *o = &warp[l];
        if (!(o->mask >> (index_of(t) % 32) & 1)) return;      // it waits for others first
        if (o->kind != t->kind || o->mask != mask || o->line != t->line || other_file(o, t))
            fail("lanes of one mask wait in different calls: lane %d at %s:%d (mask %08x), "
                 "lane %d at %s:%d (mask %08x)", index_of(t) % 32, t->file, t->line, mask, l, o->file, o->line,
                 o->mask);
        if (o->value) ballot |= 1u << l;
    }
    if (t->kind == cudasim::EXCHANGE) {
        if (lanes != FULL) fail("%08x are not all lanes of the warp at %s:%d", lanes, t->file, t->line);
        cudasim::Exchange *all[32];
        for (int l = 0; l < 32; l++) all[l] = (cudasim::Exchange *)(uintptr_t)warp[l].value;
        all[0]->finish(all);
    }
    for (int l = 0; l < 32; l++) {
        if (!(lanes >> l & 1)) continue;
        Thread *o = &warp[l];
        if (o->kind == cudasim::SHUFFLE && !(lanes >> o->src & 1))
            fail("lane %d reads lane %d at %s:%d, which is not in the mask %08x or has ended", l, o->src, o->file,
                 o->line, mask);
        o->result = o->kind == cudasim::SHUFFLE ? warp[o->src].value : ballot;
    }
    if (t->kind == cudasim::SYNCWARP) cudasim::race_syncwarp(w, lanes);
    for (int l = 0; l < 32; l++)
        if (lanes >> l & 1) make_ready(&warp[l]);
}

void try_barrier() {
    if (!n_alive || n_at_barrier < n_alive) return;
    const Thread *first = nullptr;
    for (int i = 0; i < n_threads; i++) {
        Thread *t = &threads[i];
        if (t->wait != AT_BARRIER) continue;
        if (!first) first = t;
        if (t->line != first->line || other_file(t, first))
            fail("threads of one block wait at different barriers: thread %d at %s:%d, thread %d at %s:%d",
                 index_of(first), first->file, first->line, i, t->file, t->line);
        t->result = (uint64_t)barrier_votes;
        make_ready(t);
    }
    n_at_barrier = 0;
    barrier_votes = 0;
    cudasim::race_barrier();
}

void fiber_main() __attribute__((no_sanitize_address));
void fiber_main() {
#if ASAN
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
    launch->body(launch->args.get());
    Thread *self = current;
    self->wait = DONE;
    n_alive--;
    alive[index_of(self) / 32] &= ~(1u << index_of(self) % 32);
    try_barrier();                     // the others may have waited for this one only
    Thread *warp = threads + index_of(self) / 32 * 32;
    for (int l = 0; l < 32 && &warp[l] < threads + n_threads; l++)
        if (warp[l].wait == IN_WARP && (warp[l].mask >> (index_of(self) % 32) & 1)) try_warp_collective(&warp[l]);
    switch_to_scheduler(true);
    __builtin_unreachable();
}

void resume(Thread *t) {
    current = t;
    threadIdx = t->idx;
#if ASAN
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, t->stack, STACK);
#endif
    context_swap(&scheduler, &t->context);
#if ASAN
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
    current = nullptr;
}

int pick_bit(unsigned bits) {
    if (order == 0) return __builtin_ctz(bits);
    if (order == 1) return 31 - __builtin_clz(bits);
    for (int skip = (int)random_below((unsigned)__builtin_popcount(bits)); skip > 0; skip--) bits &= bits - 1;
    return __builtin_ctz(bits);
}

void deadlock() {
    fprintf(stderr, "cudasim: no thread can go on\n");
    int shown = 0;
    for (int i = 0; i < n_threads && shown < 8; i++) {
        const Thread *t = &threads[i], *before = i ? &threads[i - 1] : nullptr;
        if (before && before->wait == t->wait && before->file == t->file && before->line == t->line) continue;
        shown++;
        fprintf(stderr, "  from thread %d on: ", i);
        if (t->wait == DONE) fprintf(stderr, "ended\n");
        else if (t->wait == AT_BARRIER) fprintf(stderr, "at the barrier %s:%d\n", t->file, t->line);
        else fprintf(stderr, "waits for lanes %08x at %s:%d\n", t->mask, t->file, t->line);
    }
    fail("deadlock");
}

void run_block() {
    if (!ASAN && tls.size) memset(tls.p, poison_byte(), tls.size);
    if (launch->smem) fill((char *)smem, poison_byte(), launch->smem);
    cudasim::race_block();
    n_alive = n_threads;
    n_at_barrier = barrier_votes = 0;
    for (int i = 0; i < n_threads; i++) {
        unsigned u = (unsigned)i;
        Thread *t = &threads[i];
        t->n_copies = t->group = 0;
        t->idx = {u % blockDim.x, u / blockDim.x % blockDim.y, u / blockDim.x / blockDim.y};
        context_make(&t->context, t->stack, STACK, fiber_main);
        alive[i / 32] |= 1u << (i % 32);
        make_ready(t);
    }
    while (n_alive) {
        if (!ready_warps) deadlock();
        int w = pick_bit(ready_warps);
        // Each lane that can run now runs once; those it sets free wait for the next turn.
        for (unsigned lanes = ready[w]; lanes;) {
            int l = pick_bit(lanes);
            lanes &= ~(1u << l);
            ready[w] &= ~(1u << l);
            if (!ready[w]) ready_warps &= ~(1u << w);
            resume(&threads[w * 32 + l]);
        }
    }
}

void make_stacks(int n) {
    for (int i = 0; i < n; i++) {
        if (threads[i].stack) continue;
        void *p = mmap(nullptr, STACK + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
                       0);
        if (p == MAP_FAILED) fail("no memory for the stack of thread %d", i);
        mprotect(p, PAGE, PROT_NONE);
        threads[i].stack = (char *)p + PAGE;
    }
}

struct SmemLimit { const void *kernel; size_t bytes; } smem_limits[256];
int n_smem_limits;
size_t smem_limit(const void *kernel) {
    for (int i = 0; i < n_smem_limits; i++)
        if (smem_limits[i].kernel == kernel) return smem_limits[i].bytes;
    return DEFAULT_DYNAMIC;
}

// ---------------------------------------------------------------------------------------------
// Allocation.

size_t total_memory() {
    static size_t total;
    if (!total) {
        const char *text = getenv("CUDASIM_MEMORY");
        total = text ? strtoull(text, nullptr, 10) : (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
    }
    return total;
}

cudaError_t allocate(void **out, size_t bytes) {
    init();
    *out = nullptr;
    if (bytes == 0) return cudaSuccess;
    if (bytes > total_memory() - bytes_allocated) return set_error(cudaErrorMemoryAllocation);
    size_t size = round_up(bytes, PAGE);
    char *m = (char *)mmap(nullptr, size + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m == (char *)MAP_FAILED) return set_error(cudaErrorMemoryAllocation);
    if (n_allocations == max_allocations) {
        max_allocations = max_allocations ? 2 * max_allocations : 64;
        allocations = (Allocation *)realloc(allocations, (size_t)max_allocations * sizeof *allocations);
        if (!allocations) fail("no memory for the list of allocations");
    }
    Allocation a = {m + PAGE, m + PAGE + size - round_up(bytes, 16), size, bytes, false};
    allocations[n_allocations++] = a;
    bytes_allocated += bytes;
    access(&a, true);
    fill(a.base, PATTERN, a.size);
    fill(a.p, poison_byte(), bytes);
    ASAN_POISON_MEMORY_REGION(a.base, (size_t)(a.p - a.base));
    // AddressSanitizer's granule is 8 bytes: the part of one that a.bytes ends in is poisoned from its end on.
    ASAN_POISON_MEMORY_REGION(a.p + bytes, (size_t)(a.base + a.size - a.p) - bytes);
    if (!launch) access(&a, false);
    *out = a.p;
    return cudaSuccess;
}

void release(void *p) {
    Allocation *a = find(p, 0);
    if (!a || a->freed || a->p != p) fail("cudaFree(%p): not the start of a device allocation, or freed already", p);
    access(a, true);
    const char *where;
    if (!pattern_intact(a, &where)) fail("an allocation of %zu bytes was written outside its bounds", a->bytes);
    ASAN_UNPOISON_MEMORY_REGION(a->base, a->size);
    madvise(a->base, a->size, MADV_DONTNEED);
    access(a, false);
    a->freed = true;
    bytes_allocated -= a->bytes;
}

}   // namespace

// ---------------------------------------------------------------------------------------------
// What kernels call.

namespace cudasim {

int lane() { return index_of(current) % 32; }
void *dyn_shared() { return smem; }

uint64_t warp_collective(Collective kind, unsigned mask, uint64_t value, int src, const char *file, int line) {
    Thread *t = current;
    if (!(mask >> lane() & 1)) fail("lane %d is not in its own mask %08x at %s:%d", lane(), mask, file, line);
    t->kind = kind; t->mask = mask; t->value = value; t->src = src; t->file = file; t->line = line;
    t->wait = IN_WARP;
    in_warp[index_of(t) / 32] |= 1u << lane();
    try_warp_collective(t);
    switch_to_scheduler(false);
    return t->result;
}

void maybe_switch() {
    if (order < 2 || random_below(2)) return;
    make_ready(current);
    switch_to_scheduler(false);
}

// Fragments as ptx.cuh draws them, gathered to whole matrices. Sums are f32, k ascending, each product and addition
// fused: hardware sums in an order and precision of its own, which tests have to allow for.
struct Mma : Exchange { void *d; const uint32_t *a, *b; };

static void finish_bf16(Exchange *const lanes[32]) {
    float A[16][16], B[16][8];
    for (int l = 0; l < 32; l++) {
        const Mma *m = (const Mma *)lanes[l];
        for (int i = 0, g = l / 4, t = l % 4; i < 2; i++)
            for (int r = 0; r < 4; r++) {
                A[g + r % 2 * 8][2 * t + r / 2 * 8 + i] = __uint_as_float(m->a[r] >> 16 * i << 16);
                if (r < 2) B[2 * t + r * 8 + i][g] = __uint_as_float(m->b[r] >> 16 * i << 16);
            }
    }
    for (int l = 0; l < 32; l++)
        for (int r = 0, g = l / 4, t = l % 4; r < 4; r++) {
            float *d = (float *)((const Mma *)lanes[l])->d + r;
            for (int k = 0; k < 16; k++) *d = fmaf(A[g + r / 2 * 8][k], B[k][2 * t + r % 2], *d);
        }
}
static void finish_s8(Exchange *const lanes[32]) {
    int A[16][32], B[32][8];
    for (int l = 0; l < 32; l++) {
        const Mma *m = (const Mma *)lanes[l];
        for (int i = 0, g = l / 4, t = l % 4; i < 4; i++)
            for (int r = 0; r < 4; r++) {
                A[g + r % 2 * 8][4 * t + r / 2 * 16 + i] = (int8_t)(m->a[r] >> 8 * i);
                if (r < 2) B[4 * t + r * 16 + i][g] = (int8_t)(m->b[r] >> 8 * i);
            }
    }
    for (int l = 0; l < 32; l++)
        for (int r = 0, g = l / 4, t = l % 4; r < 4; r++) {
            int *d = (int *)((const Mma *)lanes[l])->d + r;
            for (int k = 0; k < 32; k++) *d += A[g + r / 2 * 8][k] * B[k][2 * t + r % 2];
        }
}
static void exchange(Exchange *e, const char *file, int line) {
    warp_collective(EXCHANGE, FULL, (uint64_t)(uintptr_t)e, 0, file, line);
}
void mma_bf16(float *d, const uint32_t *a, const uint32_t *b, const char *file, int line) {
    Mma m;
    m.finish = finish_bf16; m.d = d; m.a = a; m.b = b;
    exchange(&m, file, line);
}
void mma_s8(int *d, const uint32_t *a, const uint32_t *b, const char *file, int line) {
    Mma m;
    m.finish = finish_s8; m.d = d; m.a = a; m.b = b;
    exchange(&m, file, line);
}

struct Ldmatrix : Exchange { uint32_t *r; const uint16_t *row; bool trans; };

static void finish_ldmatrix(Exchange *const lanes[32]) {
    for (int l = 0; l < 32; l++) {
        const Ldmatrix *m = (const Ldmatrix *)lanes[l];
        for (int i = 0; i < 4; i++) {
            uint32_t half[2];
            for (int z = 0; z < 2; z++) {
                int row = m->trans ? 2 * (l % 4) + z : l / 4, column = m->trans ? l / 4 : 2 * (l % 4) + z;
                half[z] = ((const Ldmatrix *)lanes[8 * i + row])->row[column];
            }
            m->r[i] = half[0] | half[1] << 16;
        }
    }
}
void ldmatrix_x4(uint32_t *r, const void *row, bool trans, const char *file, int line) {
    if ((uintptr_t)row % 16) fail("ldmatrix of a row at %p, which is not 16-byte aligned, at %s:%d", row, file, line);
    race_access(row, 16, false, __builtin_return_address(0));
    Ldmatrix m;
    m.finish = finish_ldmatrix; m.r = r; m.row = (const uint16_t *)row; m.trans = trans;
    exchange(&m, file, line);
}

void cp_async(void *smem_to, const void *gmem, int bytes, const char *file, int line) {
    if ((uintptr_t)smem_to % 16 || (uintptr_t)gmem % 16)
        fail("cp.async from %p to %p, which are not both 16-byte aligned, at %s:%d", gmem, smem_to, file, line);
    Thread *t = current;
    if (t->n_copies == t->max_copies) {
        t->max_copies = t->max_copies ? 2 * t->max_copies : 16;
        t->copies = (Thread::Copy *)realloc(t->copies, (size_t)t->max_copies * sizeof *t->copies);
        if (!t->copies) fail("no memory");
    }
    t->copies[t->n_copies++] = {(char *)smem_to, (const char *)gmem, bytes, t->group};
    race_access(gmem, (size_t)bytes, false, __builtin_return_address(0));
    race_access(smem_to, 16, true, __builtin_return_address(0));
    memset(smem_to, poison_byte(), 16);
}
void cp_async_commit() { current->group++; }
void cp_async_wait(int newest) {
    Thread *t = current;
    int kept = 0;
    for (int i = 0; i < t->n_copies; i++) {
        Thread::Copy c = t->copies[i];
        if (c.group >= t->group - newest) { t->copies[kept++] = c; continue; }
        race_access(c.dst, 16, true, __builtin_return_address(0));
        memcpy(c.dst, c.src, (size_t)c.bytes);
        memset(c.dst + c.bytes, 0, (size_t)(16 - c.bytes));
    }
    t->n_copies = kept;
}

size_t launches() { return n_launches; }
int thread_index() { return current ? index_of(current) : -1; }
bool own_stack(const void *p) { return (const char *)p >= current->stack && (const char *)p < current->stack + STACK; }

int barrier_vote(int predicate, const char *file, int line) {
    barrier_votes += predicate;
    __syncthreads(file, line);
    return (int)current->result;
}

void check_pointer(const Launch &l, int arg, const void *p) {
    const Allocation *a = p ? find(p, 0) : nullptr;
    if (!p || (a && !a->freed)) return;
    launch = nullptr;
    fail("argument %d of %s at %s:%d is not device memory: %p%s", arg, l.name, l.file, l.line, p, a ? " (freed)" : "");
}

cudaError_t set_max_dynamic_shared(const void *kernel, int bytes) {
    if (bytes < 0 || (size_t)bytes > max_smem()) return set_error(cudaErrorInvalidValue);
    for (int i = 0; i < n_smem_limits; i++)
        if (smem_limits[i].kernel == kernel) { smem_limits[i].bytes = (size_t)bytes; return cudaSuccess; }
    if (n_smem_limits == 256) fail("more than 256 kernels with an own limit of shared memory");
    smem_limits[n_smem_limits++] = {kernel, (size_t)bytes};
    return cudaSuccess;
}

int max_dynamic_shared(const void *kernel) { return (int)smem_limit(kernel); }

bool launchable(const Launch &l) {
    init();
    size_t per_block = (size_t)l.block.x * l.block.y * l.block.z;
    if (!per_block || per_block > MAX_THREADS || l.block.z > 64 || !l.grid.x || l.grid.x > 0x7fffffffu || !l.grid.y ||
        l.grid.y > 65535 || !l.grid.z || l.grid.z > 65535 || l.smem > smem_limit(l.kernel)) {
        set_error(cudaErrorInvalidConfiguration);
        return false;
    }
    n_launches++;
    return true;
}

void run(const Launch &l) {
    launch = &l;
    gridDim = l.grid;
    blockDim = l.block;
    n_threads = (int)(l.block.x * l.block.y * l.block.z);
    random_state = 0x9e3779b97f4a7c15u * (order + 1u);
    make_stacks(n_threads);
    if (l.smem && allocate(&smem, l.smem) != cudaSuccess) fail("no memory for %zu bytes of shared memory", l.smem);
    shared_begin();
    race_launch(smem, l.smem, tls.p, ASAN ? 0 : tls.size);
    access_all(true);
    // Blocks: ascending, descending, or i -> (i * odd + c) mod 2^k, which visits each once in a scattered order.
    size_t blocks = (size_t)l.grid.x * l.grid.y * l.grid.z, span = 1;
    while (span < blocks) span *= 2;
    size_t factor = random_below(1u << 30) | 1u, offset = random_below(1u << 30);
    for (size_t i = 0; i < span; i++) {
        size_t b = order == 0 ? i : order == 1 ? span - 1 - i : (i * factor + offset) & (span - 1);
        if (b >= blocks) continue;
        blockIdx = {(unsigned)(b % l.grid.x), (unsigned)(b / l.grid.x % l.grid.y), (unsigned)(b / l.grid.x / l.grid.y)};
        run_block();
    }
    check_patterns();
    access_all(false);
    shared_end();
    if (l.smem) {
        release(smem);
        const Allocation *a = &allocations[--n_allocations];   // the last: it may be forgotten, address and all
        munmap(a->base - PAGE, a->size + 2 * PAGE);
    }
    smem = nullptr;
    launch = nullptr;
}

}   // namespace cudasim

void __syncthreads(const char *file, int line) {
    current->file = file; current->line = line;
    current->wait = AT_BARRIER;
    n_at_barrier++;
    try_barrier();
    switch_to_scheduler(false);
}

void cudasim_set_order(unsigned o) {
    cudasim::finish_all();
    order = o;
}

// ---------------------------------------------------------------------------------------------
// The part of the runtime API that a .cu file needs.

cudaError_t cudaMalloc(void **out, size_t bytes) {
    if (cudaError_t e = cudasim::refused_in_capture()) return e;
    return allocate(out, bytes);
}

cudaError_t cudaFree(void *p) {
    if (cudaError_t e = cudasim::refused_in_capture()) return e;
    cudasim::finish_all();
    if (p) release(p);
    return cudaSuccess;
}

// A copy must lie inside one allocation, as the driver demands for most such mistakes.
bool cudasim::is_device(const void *p, size_t bytes) {
    const Allocation *a = find(p, 0);
    return a && !a->freed && (const char *)p >= a->p && bytes <= a->bytes - (size_t)((const char *)p - a->p);
}
bool cudasim::touches_device(const void *p) {
    const Allocation *a = find(p, 0);
    return a && !a->freed;
}
void cudasim::open_memory(bool on) { access_all(on); }

cudaError_t cudaGetLastError(void) {
    cudaError_t e = last_error;
    last_error = cudaSuccess;
    return e;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }
#define ERRORS(X) \
    X(cudaSuccess, "no error") \
    X(cudaErrorInvalidValue, "invalid argument") \
    X(cudaErrorMemoryAllocation, "out of memory") \
    X(cudaErrorInvalidConfiguration, "invalid configuration argument") \
    X(cudaErrorInvalidMemcpyDirection, "invalid copy direction for memcpy") \
    X(cudaErrorNoDevice, "no CUDA-capable device is detected") \
    X(cudaErrorInvalidDevice, "invalid device ordinal") \
    X(cudaErrorInvalidResourceHandle, "invalid resource handle") \
    X(cudaErrorIllegalState, "the operation cannot be performed in the present state") \
    X(cudaErrorNotReady, "device not ready") \
    X(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing") \
    X(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture") \
    X(cudaErrorStreamCaptureUnmatched, "the capture was not begun on this stream") \
    X(cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work") \
    X(cudaErrorStreamCaptureIsolation, "dependency created on uncaptured work in another stream") \
    X(cudaErrorStreamCaptureImplicit, "operation would make the legacy stream depend on a capturing blocking stream") \
    X(cudaErrorCapturedEvent, "operation not permitted on an event last recorded in a capturing stream")

const char *cudaGetErrorString(cudaError_t e) {
    switch (e) {
#define ERROR_TEXT(name, text) case name: return text;
    ERRORS(ERROR_TEXT)
    }
    return "unknown error";
}
const char *cudaGetErrorName(cudaError_t e) {
    switch (e) {
#define ERROR_NAME(name, text) case name: return #name;
    ERRORS(ERROR_NAME)
    }
    return "cudaErrorUnknown";
}

// ---------------------------------------------------------------------------------------------
// The device.

static int n_devices() {
    const char *n = getenv("CUDASIM_DEVICES");
    return n ? atoi(n) : 1;
}
static int current_device;
static cudaError_t check_device(int device) {
    int n = n_devices();
    return set_error(n <= 0 ? cudaErrorNoDevice : device < 0 || device >= n ? cudaErrorInvalidDevice : cudaSuccess);
}
cudaError_t cudaGetDeviceCount(int *n) {
    *n = n_devices();
    return check_device(0);
}
cudaError_t cudaGetDevice(int *device) {
    *device = current_device;
    return check_device(0);
}
// A process stays on the device it began with: streams and memory know of no other.
cudaError_t cudaSetDevice(int device) {
    if (cudaError_t e = check_device(device)) return e;
    if (device != current_device && n_allocations)
        cudasim::fail("cudaSetDevice(%d) after memory was taken on device %d", device, current_device);
    current_device = device;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device) {
    *p = {};
    snprintf(p->name, sizeof p->name, n_devices() > 1 ? "cudasim %d" : "cudasim", device);
    const char *first = getenv("CUDASIM_FIRST");
    int64_t number = (first ? atoi(first) : 0) + device + 1;
    memcpy(p->uuid.bytes, &number, sizeof number);
    p->major = capability() / 10;
    p->minor = capability() % 10;
    p->multiProcessorCount = 4;
    p->l2CacheSize = 1 << 20;
    p->warpSize = 32;
    p->maxThreadsPerBlock = MAX_THREADS;
    p->maxThreadsPerMultiProcessor = 2048;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->memoryBusWidth = 64;
    p->totalGlobalMem = total_memory();
    p->sharedMemPerBlock = DEFAULT_SMEM;
    p->sharedMemPerBlockOptin = max_smem();
    p->sharedMemPerMultiprocessor = max_smem() + 1024;
    return check_device(device);
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp p;
    cudaError_t e = cudaGetDeviceProperties(&p, device);
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; return e;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)p.sharedMemPerBlock; return e;
    case cudaDevAttrWarpSize: *value = p.warpSize; return e;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; return e;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; return e;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; return e;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; return e;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; return e;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = (int)p.sharedMemPerMultiprocessor; return e;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)p.sharedMemPerBlockOptin; return e;
    }
    return set_error(cudaErrorInvalidValue);
}
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
    *total_bytes = total_memory();
    *free_bytes = *total_bytes - bytes_allocated;
    return check_device(0);
}
cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = 12000;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) {
    *version = n_devices() > 0 ? 12000 : 0;
    return cudaSuccess;
}
