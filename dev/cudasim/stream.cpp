// Streams, events, asynchronous copies and graphs: when what was asked for is done (cudasim.h says the rules).
#include "internal.h"
#include <algorithm>
#include <deque>
#include <functional>
#include <time.h>
#include <vector>

using namespace cudasim;

namespace {

// One cudaEventRecord. An event knows its latest; who waits keeps the one that was the latest then.
struct Record {
    bool done;
    double time;
    cudaStream_t stream;
    uint64_t capture;                  // which capture it was recorded in, 0: none
    std::vector<size_t> after;         // and the nodes it stands for there
};

struct Copy { char *dst; size_t dst_pitch; const char *src; size_t src_pitch, width, rows; cudaMemcpyKind kind; };

struct Work {
    enum { KERNEL, COPY, SET, RECORD, WAIT, GRAPH, HOST } what;
    Launch launch;
    Copy copy;                         // SET: dst and width
    int byte;
    std::shared_ptr<Record> record;    // RECORD, WAIT
    std::shared_ptr<std::vector<Work>> nodes;
    std::vector<size_t> after;         // in a graph: the nodes that come first
    std::function<void()> host;
    std::vector<Range> touches;        // HOST: device memory that it reads or writes
};

struct Capture {
    uint64_t id;
    cudaStream_t origin;
    cudaStreamCaptureMode mode;
    bool invalid;
    std::vector<Work> nodes;
};

}   // namespace

struct CudasimStream {
    bool blocking;
    std::deque<Work> queue;
    Capture *capture;
    std::vector<size_t> tails;         // while it captures: the nodes that its next one comes after
};
struct CudasimEvent { bool timing; std::shared_ptr<Record> latest; };   // NULL: never recorded
struct CudasimGraph { std::shared_ptr<std::vector<Work>> nodes; };
struct CudasimGraphExec { std::shared_ptr<std::vector<Work>> nodes; };

namespace {

// Stream 0 is the first. Never freed: work may be asked for until the process ends.
std::vector<cudaStream_t> &streams() {
    static auto *all = new std::vector<cudaStream_t>{new CudasimStream{true, {}, nullptr, {}}};
    return *all;
}
cudaStream_t stream_zero() { return streams()[0]; }
cudaStream_t find_stream(cudaStream_t s) {             // NULL, and the error set, if there is none such
    if (!s) return stream_zero();
    for (cudaStream_t t : streams())
        if (t == s && t != stream_zero()) return s;
    set_error(cudaErrorInvalidResourceHandle);
    return nullptr;
}

struct Pinned { char *p; size_t bytes; };
std::vector<Pinned> &pinned() { static auto *all = new std::vector<Pinned>; return *all; }
bool is_pinned(const void *p) {
    for (const Pinned &a : pinned())
        if ((const char *)p >= a.p && (const char *)p < a.p + a.bytes) return true;
    return false;
}

double now() {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

unsigned random_below(unsigned n) {    // apart from the scheduler's, which starts anew at each launch
    static uint64_t state = 0x9e3779b97f4a7c15u;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (unsigned)((state >> 32) % n);
}

// ---------------------------------------------------------------------------------------------
// Doing it.

bool range_is_right(const void *p, size_t pitch, size_t width, size_t rows, bool device) {
    if (!width || !rows) return true;
    size_t span = (rows - 1) * pitch + width;
    return device ? is_device(p, span) : p && !touches_device(p);
}
bool copy_is_right(const Copy &c) {
    return (c.rows < 2 || (c.width <= c.dst_pitch && c.width <= c.src_pitch)) &&
           range_is_right(c.dst, c.dst_pitch, c.width, c.rows, c.kind & cudaMemcpyHostToDevice) &&
           range_is_right(c.src, c.src_pitch, c.width, c.rows, c.kind & cudaMemcpyDeviceToHost);
}

void do_copy(const Copy &c) {
    if (!copy_is_right(c)) fail("a copy whose memory was freed before its turn came");
    open_memory(true);
    for (size_t r = 0; r < c.rows; r++)
        memmove(c.dst + r * c.dst_pitch, c.src + r * c.src_pitch, c.width);
    open_memory(false);
}

void execute(const Work &w);
void step(cudaStream_t s) {
    Work w = std::move(s->queue.front());
    s->queue.pop_front();
    execute(w);
}
void finish(cudaStream_t s) {
    while (!s->queue.empty()) step(s);
}
void wait_for(const Record *r) {
    while (!r->done) step(r->stream);  // where it stands in the queue
}

// Any order that `after` allows: the first that can, the last, or any.
void run_graph(const std::vector<Work> &nodes) {
    std::vector<size_t> ready, waits(nodes.size());
    std::vector<std::vector<size_t>> next(nodes.size());
    for (size_t i = 0; i < nodes.size(); i++) {
        waits[i] = nodes[i].after.size();
        for (size_t before : nodes[i].after) next[before].push_back(i);
        if (!waits[i]) ready.push_back(i);
    }
    while (!ready.empty()) {
        size_t at = order == 0 ? 0 : order == 1 ? ready.size() - 1 : random_below((unsigned)ready.size());
        size_t i = ready[at];
        ready.erase(ready.begin() + (ptrdiff_t)at);
        execute(nodes[i]);
        for (size_t n : next[i])
            if (--waits[n] == 0) ready.push_back(n);
    }
}

void execute(const Work &w) {
    switch (w.what) {
    case Work::KERNEL:
        w.launch.check(w.launch);
        run(w.launch);
        break;
    case Work::COPY: do_copy(w.copy); break;
    case Work::SET:
        if (!is_device(w.copy.dst, w.copy.width)) fail("cudaMemsetAsync of memory that was freed before its turn came");
        open_memory(true);
        memset(w.copy.dst, w.byte, w.copy.width);
        open_memory(false);
        break;
    case Work::RECORD:
        w.record->done = true;
        w.record->time = now();
        break;
    case Work::WAIT: wait_for(w.record.get()); break;
    case Work::GRAPH: run_graph(*w.nodes); break;
    case Work::HOST: w.host(); break;
    }
}

// Whether work that touches `ranges` must come after w. Who waits for an event touches nothing; a kernel, who knows.
bool depends(const Work &w, const std::vector<Range> &ranges) {
    if (w.what == Work::WAIT || w.what == Work::RECORD) return false;
    if (w.what == Work::KERNEL || w.what == Work::GRAPH) return true;
    std::vector<Range> touches = w.touches;
    const Copy &c = w.copy;
    if (w.what == Work::SET) touches = {{c.dst, c.width}};
    if (w.what == Work::COPY)
        touches = {{c.dst, (c.rows - 1) * c.dst_pitch + c.width}, {c.src, (c.rows - 1) * c.src_pitch + c.width}};
    for (const Range &a : touches)
        for (const Range &b : ranges)
            if (a.p < b.p + b.bytes && b.p < a.p + a.bytes) return true;
    return false;
}

// What stream 0 waits for, and what waits for it.
void finish_blocking() {
    for (size_t i = 0; i < streams().size(); i++)
        if (streams()[i]->blocking) finish(streams()[i]);
}

// ---------------------------------------------------------------------------------------------
// Asking for it.

cudaError_t invalidate(Capture *c, cudaError_t e) {
    c->invalid = true;
    return set_error(e);
}

cudaError_t enqueue(cudaStream_t s, Work w) {
    if (Capture *c = s->capture) {
        if (c->invalid) return set_error(cudaErrorStreamCaptureInvalidated);
        w.after = s->tails;
        s->tails = {c->nodes.size()};
        c->nodes.push_back(std::move(w));
        return cudaSuccess;
    }
    if (s == stream_zero()) {
        for (cudaStream_t t : streams())
            if (t->capture && t->blocking) return invalidate(t->capture, cudaErrorStreamCaptureImplicit);
        finish_blocking();
    } else if (s->blocking) {
        finish(stream_zero());
    }
    s->queue.push_back(std::move(w));
    if (order == 0) finish(s);
    while (order > 1 && random_below(2)) {
        cudaStream_t any = streams()[random_below((unsigned)streams().size())];
        if (!any->queue.empty()) step(any);
    }
    return cudaSuccess;
}

cudaError_t enqueue_copy(Copy c, cudaStream_t s) {
    if (c.kind < cudaMemcpyHostToHost || c.kind > cudaMemcpyDeviceToDevice)
        return set_error(cudaErrorInvalidMemcpyDirection);
    if (!(s = find_stream(s))) return cudaErrorInvalidResourceHandle;
    if (!copy_is_right(c)) return set_error(cudaErrorInvalidValue);
    if (!c.width || !c.rows) return cudaSuccess;
    bool from_host = !(c.kind & cudaMemcpyDeviceToHost), to_host = !(c.kind & cudaMemcpyHostToDevice);
    bool from_pageable = from_host && !is_pinned(c.src), to_pageable = to_host && !is_pinned(c.dst);
    if (s->capture && (from_pageable || to_pageable)) return invalidate(s->capture, cudaErrorStreamCaptureUnsupported);
    Work w = {};
    w.what = Work::COPY;
    w.copy = c;
    cudaError_t e = enqueue(s, std::move(w));
    if (e == cudaSuccess && to_pageable) finish(s);    // there when the call returns
    return e;
}

Capture *find_capture(uint64_t id) {
    for (cudaStream_t s : streams())
        if (s->capture && s->capture->id == id) return s->capture;
    return nullptr;
}

// Whether every node leads to one of `tails`: nodes stand after those they come after, so one pass backwards is enough.
bool all_joined(const std::vector<Work> &nodes, const std::vector<size_t> &tails) {
    std::vector<bool> leads(nodes.size());
    for (size_t t : tails) leads[t] = true;
    for (size_t i = nodes.size(); i-- > 0;) {
        if (!leads[i]) return false;
        for (size_t before : nodes[i].after) leads[before] = true;
    }
    return true;
}

}   // namespace

namespace cudasim {

void finish_all() {
    for (size_t i = 0; i < streams().size(); i++) finish(streams()[i]);
}

cudaError_t refused_in_capture() {
    cudaError_t e = cudaSuccess;
    for (cudaStream_t s : streams())
        if (s->capture && s->capture->mode != cudaStreamCaptureModeRelaxed)
            e = invalidate(s->capture, cudaErrorStreamCaptureUnsupported);
    return e;
}

bool capturing(cudaStream_t s) { return s && s->capture; }

void catch_up(cudaStream_t s, const std::vector<Range> &ranges) {
    if (!(s = find_stream(s))) fail("a stream that was destroyed, or never was one");
    std::vector<std::shared_ptr<Record>> waits;
    for (const Work &w : s->queue) {
        if (depends(w, ranges)) {
            finish(s);
            return;
        }
        if (w.what == Work::WAIT) waits.push_back(w.record);
    }
    for (const auto &r : waits) wait_for(r.get());
}

void later(cudaStream_t s, const std::vector<Range> &ranges, std::function<void()> f) {
    Work w = {};
    w.what = Work::HOST;
    w.host = std::move(f);
    w.touches = ranges;
    enqueue(find_stream(s), std::move(w));
}

void submit(const Launch &l) {
    l.check(l);
    Work w = {};
    w.what = Work::KERNEL;
    w.launch = l;
    cudaStream_t s = find_stream(l.stream);
    if (s && launchable(l)) enqueue(s, std::move(w));
}

}   // namespace cudasim

// ---------------------------------------------------------------------------------------------
// The API.

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) {
    if (flags > cudaStreamNonBlocking) return set_error(cudaErrorInvalidValue);
    streams().push_back(*s = new CudasimStream{!flags, {}, nullptr, {}});
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int) {
    return cudaStreamCreateWithFlags(s, flags);
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = *greatest = 0;            // there are none
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *s) { return cudaStreamCreateWithFlags(s, cudaStreamDefault); }

cudaError_t cudaStreamDestroy(cudaStream_t s) {
    if (!s || !find_stream(s)) return set_error(cudaErrorInvalidResourceHandle);
    if (s->capture) return invalidate(s->capture, cudaErrorStreamCaptureUnsupported);
    finish(s);                                         // the driver lets it finish later; nothing can tell
    for (size_t i = 0; i < streams().size(); i++)
        if (streams()[i] == s) streams().erase(streams().begin() + (ptrdiff_t)i);
    delete s;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    if (!(s = find_stream(s))) return cudaErrorInvalidResourceHandle;
    if (s->capture) return invalidate(s->capture, cudaErrorStreamCaptureUnsupported);
    if (cudaError_t e = refused_in_capture()) return e;
    if (s == stream_zero()) finish_blocking();
    finish(s);
    return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t s) {
    if (!(s = find_stream(s))) return cudaErrorInvalidResourceHandle;
    if (s->capture) return invalidate(s->capture, cudaErrorStreamCaptureUnsupported);
    if (cudaError_t e = refused_in_capture()) return e;
    if (!s->queue.empty()) step(s);                    // so that a loop of queries ends
    return s->queue.empty() ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaDeviceSynchronize(void) {
    for (cudaStream_t s : streams())
        if (s->capture) return invalidate(s->capture, cudaErrorStreamCaptureUnsupported);
    finish_all();
    return cudaPeekAtLastError();
}

cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, cudaMemcpyKind kind, cudaStream_t s) {
    return enqueue_copy({(char *)dst, bytes, (const char *)src, bytes, bytes, 1, kind}, s);
}
cudaError_t cudaMemcpy2DAsync(void *dst, size_t dst_pitch, const void *src, size_t src_pitch, size_t width, size_t rows,
                              cudaMemcpyKind kind, cudaStream_t s) {
    return enqueue_copy({(char *)dst, dst_pitch, (const char *)src, src_pitch, width, rows, kind}, s);
}
cudaError_t cudaMemcpy(void *dst, const void *src, size_t bytes, cudaMemcpyKind kind) {
    if (cudaError_t e = refused_in_capture()) return e;
    cudaError_t e = cudaMemcpyAsync(dst, src, bytes, kind, 0);
    if (e == cudaSuccess) finish(stream_zero());
    return e;
}

cudaError_t cudaMemsetAsync(void *p, int byte, size_t bytes, cudaStream_t s) {
    if (!(s = find_stream(s))) return cudaErrorInvalidResourceHandle;
    if (!bytes) return cudaSuccess;
    if (!is_device(p, bytes)) return set_error(cudaErrorInvalidValue);
    Work w = {};
    w.what = Work::SET;
    w.copy.dst = (char *)p;
    w.copy.width = bytes;
    w.byte = byte;
    return enqueue(s, std::move(w));
}
cudaError_t cudaMemset(void *p, int byte, size_t bytes) {
    if (cudaError_t e = refused_in_capture()) return e;
    return cudaMemsetAsync(p, byte, bytes, 0);
}

cudaError_t cudaMallocHost(void **p, size_t bytes) {
    if (cudaError_t e = refused_in_capture()) return e;
    *p = nullptr;
    if (!bytes) return cudaSuccess;
    char *m = (char *)aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    if (!m) return set_error(cudaErrorMemoryAllocation);
    memset(m, order & 1 ? 0x7e : 0xff, bytes);
    pinned().push_back({m, bytes});
    *p = m;
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void *p) {
    if (cudaError_t e = refused_in_capture()) return e;
    finish_all();
    if (!p) return cudaSuccess;
    for (size_t i = 0; i < pinned().size(); i++)
        if (pinned()[i].p == p) {
            pinned().erase(pinned().begin() + (ptrdiff_t)i);
            free(p);
            return cudaSuccess;
        }
    return set_error(cudaErrorInvalidValue);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) {
    if (flags > (cudaEventBlockingSync | cudaEventDisableTiming)) return set_error(cudaErrorInvalidValue);
    *e = new CudasimEvent{!(flags & cudaEventDisableTiming), nullptr};
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, cudaEventDefault); }
cudaError_t cudaEventDestroy(cudaEvent_t e) {
    if (!e) return set_error(cudaErrorInvalidResourceHandle);
    delete e;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
    if (!e) return set_error(cudaErrorInvalidResourceHandle);
    if (!(s = find_stream(s))) return cudaErrorInvalidResourceHandle;
    auto record = std::make_shared<Record>(Record{false, 0.0, s, 0, {}});
    e->latest = record;
    if (s->capture) {
        record->capture = s->capture->id;
        record->after = s->tails;
        return set_error(s->capture->invalid ? cudaErrorStreamCaptureInvalidated : cudaSuccess);
    }
    Work w = {};
    w.what = Work::RECORD;
    w.record = record;
    return enqueue(s, std::move(w));
}

cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags) {
    if (!e) return set_error(cudaErrorInvalidResourceHandle);
    if (flags) return set_error(cudaErrorInvalidValue);
    if (!(s = find_stream(s))) return cudaErrorInvalidResourceHandle;
    if (!e->latest) return cudaSuccess;
    const Record *r = e->latest.get();
    if (r->capture) {
        Capture *c = find_capture(r->capture);
        if (!c) return set_error(cudaErrorCapturedEvent);
        if (s == stream_zero()) return invalidate(c, cudaErrorStreamCaptureImplicit);
        if (s->capture && s->capture != c) return invalidate(c, cudaErrorStreamCaptureIsolation);
        if (!s->capture) s->tails.clear();
        s->capture = c;
        for (size_t node : r->after)
            if (std::find(s->tails.begin(), s->tails.end(), node) == s->tails.end()) s->tails.push_back(node);
        return cudaSuccess;
    }
    if (s->capture) return invalidate(s->capture, cudaErrorStreamCaptureIsolation);
    Work w = {};
    w.what = Work::WAIT;
    w.record = e->latest;
    return enqueue(s, std::move(w));
}

cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    if (!e) return set_error(cudaErrorInvalidResourceHandle);
    if (cudaError_t refused = refused_in_capture()) return refused;
    if (!e->latest) return cudaSuccess;
    if (e->latest->capture) return set_error(cudaErrorCapturedEvent);
    wait_for(e->latest.get());
    return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t e) {
    if (!e) return set_error(cudaErrorInvalidResourceHandle);
    if (cudaError_t refused = refused_in_capture()) return refused;
    if (!e->latest) return cudaSuccess;
    if (e->latest->capture) return set_error(cudaErrorCapturedEvent);
    if (!e->latest->done) step(e->latest->stream);     // so that a loop of queries ends
    return e->latest->done ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t begin, cudaEvent_t end) {
    if (!begin || !end || !begin->timing || !end->timing || !begin->latest || !end->latest)
        return set_error(cudaErrorInvalidResourceHandle);
    if (begin->latest->capture || end->latest->capture) return set_error(cudaErrorCapturedEvent);
    if (!begin->latest->done || !end->latest->done) return cudaErrorNotReady;
    *ms = (float)((end->latest->time - begin->latest->time) * 1e3);
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------
// Graphs.

cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode mode) {
    static uint64_t captures;
    if (!(s = find_stream(s))) return cudaErrorInvalidResourceHandle;
    if (s == stream_zero()) return set_error(cudaErrorStreamCaptureUnsupported);
    if (s->capture) return set_error(cudaErrorIllegalState);
    s->capture = new Capture{++captures, s, mode, false, {}};
    s->tails.clear();
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph) {
    *graph = nullptr;
    if (!(s = find_stream(s))) return cudaErrorInvalidResourceHandle;
    Capture *c = s->capture;
    if (!c) return set_error(cudaErrorIllegalState);
    if (c->origin != s) return invalidate(c, cudaErrorStreamCaptureUnmatched);
    cudaError_t e = c->invalid ? cudaErrorStreamCaptureInvalidated
                    : all_joined(c->nodes, s->tails) ? cudaSuccess : cudaErrorStreamCaptureUnjoined;
    for (cudaStream_t t : streams())
        if (t->capture == c) t->capture = nullptr;
    if (e == cudaSuccess) *graph = new CudasimGraph{std::make_shared<std::vector<Work>>(std::move(c->nodes))};
    delete c;
    return set_error(e);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus *status) {
    if (!(s = find_stream(s))) return cudaErrorInvalidResourceHandle;
    *status = !s->capture ? cudaStreamCaptureStatusNone
              : s->capture->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags) {
    *exec = nullptr;
    if (!graph || flags) return set_error(cudaErrorInvalidValue);
    *exec = new CudasimGraphExec{graph->nodes};
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s) {
    if (!exec) return set_error(cudaErrorInvalidValue);
    if (!(s = find_stream(s))) return cudaErrorInvalidResourceHandle;
    Work w = {};
    w.what = Work::GRAPH;
    w.nodes = exec->nodes;
    return enqueue(s, std::move(w));
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    delete exec;
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}
