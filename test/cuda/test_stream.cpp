// Streams, events, asynchronous copies and graphs. What holds on a GPU is tested on one too; the simulator alone also
// shows what a missing wait would leave to chance.
#include "cuda_test.h"

static __global__ void scale_kernel(float *y, const float *x, const float *factor, int n) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) y[i] = x[i] * *factor;
}
static __global__ void add_one_kernel(float *x) { *x += 1.0f; }

struct Stream {
    cudaStream_t s;
    Stream() { CUDA_CHECK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking)); }
    ~Stream() { CUDA_CHECK(cudaStreamDestroy(s)); }
};
struct Event {
    cudaEvent_t e;
    Event(unsigned flags = cudaEventDisableTiming) { CUDA_CHECK(cudaEventCreateWithFlags(&e, flags)); }
    ~Event() { CUDA_CHECK(cudaEventDestroy(e)); }
};
template <class T> struct Host {               // page-locked
    T *p;
    Host(size_t n) { CUDA_CHECK(cudaMallocHost((void **)&p, n * sizeof(T))); }
    ~Host() { CUDA_CHECK(cudaFreeHost(p)); }
};
#define IS(call, expected) \
    do { \
        cudaError_t e_ = (call), want_ = (expected); \
        CHECK(e_ == want_, "%s: %s, expected %s", #call, cudaGetErrorString(e_), cudaGetErrorString(want_)); \
        (void)cudaGetLastError(); \
    } while (0)

// Copies in, computes and copies out on three streams that only events hold together.
CUDA_TEST(streams_and_events) {
    for (int order = 0; order < 2 * ORDERS; order++) {
        set_order(order);
        const int n = 300;
        Stream in, work, out;
        Event arrived, computed, begin(cudaEventDefault), end(cudaEventDefault);
        Host<float> hx(n), hy(n), hf(1);
        Device<float> x(n), y(n), factor(1), rows(75);
        *hf.p = 3.0f;
        for (int i = 0; i < n; i++) hx.p[i] = (float)i;
        CUDA_CHECK(cudaDeviceSynchronize());                   // the arrays were filled on stream 0
        CUDA_CHECK(cudaEventRecord(begin.e, in.s));
        CUDA_CHECK(cudaMemcpyAsync(factor.p, hf.p, sizeof(float), cudaMemcpyHostToDevice, in.s));
        CUDA_CHECK(cudaMemcpyAsync(x.p, hx.p, n * sizeof(float), cudaMemcpyHostToDevice, in.s));
        CUDA_CHECK(cudaEventRecord(arrived.e, in.s));
        CUDA_CHECK(cudaStreamWaitEvent(work.s, arrived.e, 0));
        LAUNCH(scale_kernel, (n + 63) / 64, 64, 0, work.s)(y.p, x.p, factor.p, n);
        CUDA_CHECK(cudaMemsetAsync(x.p, 0, n * sizeof(float), work.s));
        CUDA_CHECK(cudaEventRecord(computed.e, work.s));
        CUDA_CHECK(cudaStreamWaitEvent(out.s, computed.e, 0));
        CUDA_CHECK(cudaEventRecord(computed.e, in.s));         // another record: `out` waits for the first all the same
        CUDA_CHECK(cudaMemcpyAsync(hy.p, y.p, n * sizeof(float), cudaMemcpyDeviceToHost, out.s));
        CUDA_CHECK(cudaEventRecord(end.e, out.s));
        IS(cudaEventSynchronize(end.e), cudaSuccess);
        for (int i = 0; i < n; i++) CHECK(hy.p[i] == 3.0f * (float)i, "order %d, value %d: %g", order, i, hy.p[i]);
        CHECK(x.host()[7] == 0.0f, "cudaMemsetAsync");
        float ms = -1.0f;
        IS(cudaEventElapsedTime(&ms, begin.e, end.e), cudaSuccess);
        CHECK(ms >= 0.0f && ms < 60000.0f, "%g ms", ms);
        IS(cudaEventElapsedTime(&ms, arrived.e, end.e), cudaErrorInvalidResourceHandle);   // no timing
        IS(cudaStreamSynchronize(out.s), cudaSuccess);
        IS(cudaStreamQuery(out.s), cudaSuccess);
        IS(cudaEventQuery(end.e), cudaSuccess);
        // Rows of 5 out of rows of 20.
        CUDA_CHECK(cudaMemcpy2DAsync(rows.p, 20, y.p, 80, 20, 15, cudaMemcpyDeviceToDevice, work.s));
        CUDA_CHECK(cudaStreamSynchronize(work.s));
        std::vector<float> r = rows.host();
        for (int i = 0; i < 75; i++) CHECK(r[i] == 3.0f * (float)(i / 5 * 20 + i % 5), "row copy, %d: %g", i, r[i]);
    }
}

// A step captured once gives the new result when the device's data have changed; a branch of it runs on a second stream.
CUDA_TEST(graph_replay) {
    for (int order = 0; order < 2 * ORDERS; order++) {
        set_order(order);
        const int n = 100;
        Stream main, side;
        Event fork, joined;
        Host<float> hx(n), hcount(1);
        Device<float> x(n), y(n), z(n), factor(1), count(1);
        CUDA_CHECK(cudaMemset(y.p, 0, n * sizeof(float)));
        CUDA_CHECK(cudaDeviceSynchronize());
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        cudaStreamCaptureStatus status;
        IS(cudaStreamBeginCapture(main.s, cudaStreamCaptureModeGlobal), cudaSuccess);
        CUDA_CHECK(cudaMemcpyAsync(x.p, hx.p, n * sizeof(float), cudaMemcpyHostToDevice, main.s));
        CUDA_CHECK(cudaEventRecord(fork.e, main.s));
        CUDA_CHECK(cudaStreamWaitEvent(side.s, fork.e, 0));
        IS(cudaStreamIsCapturing(side.s, &status), cudaSuccess);
        CHECK(status == cudaStreamCaptureStatusActive, "a stream that waits for a captured event is captured");
        CUDA_CHECK(cudaMemsetAsync(count.p, 0, sizeof(float), side.s));
        for (int i = 0; i < 5; i++) LAUNCH(add_one_kernel, 1, 1, 0, side.s)(count.p);
        LAUNCH(scale_kernel, 2, 64, 0, main.s)(y.p, x.p, factor.p, n);
        LAUNCH(scale_kernel, 2, 64, 0, main.s)(z.p, y.p, factor.p, n);
        CUDA_CHECK(cudaEventRecord(joined.e, side.s));
        CUDA_CHECK(cudaStreamWaitEvent(main.s, joined.e, 0));
        CUDA_CHECK(cudaMemcpyAsync(hcount.p, count.p, sizeof(float), cudaMemcpyDeviceToHost, main.s));
        IS(cudaStreamEndCapture(main.s, &graph), cudaSuccess);
        IS(cudaStreamIsCapturing(main.s, &status), cudaSuccess);
        CHECK(status == cudaStreamCaptureStatusNone, "the capture is over");
        IS(cudaGraphInstantiateWithFlags(&exec, graph, 0), cudaSuccess);
        IS(cudaGraphDestroy(graph), cudaSuccess);
        CHECK(y.host()[1] == 0.0f, "what is captured is not done");
        for (int step = 0; step < 3; step++) {
            float f = (float)(step + 2);
            CUDA_CHECK(cudaMemcpy(factor.p, &f, sizeof f, cudaMemcpyHostToDevice));
            for (int i = 0; i < n; i++) hx.p[i] = (float)(i + step);
            *hcount.p = 0.0f;
            IS(cudaGraphLaunch(exec, main.s), cudaSuccess);
            IS(cudaStreamSynchronize(main.s), cudaSuccess);
            std::vector<float> hz = z.host();
            for (int i = 0; i < n; i++)
                CHECK(hz[i] == (float)(i + step) * f * f, "order %d, step %d, value %d: %g", order, step, i, hz[i]);
            CHECK(*hcount.p == 5.0f, "order %d, step %d: count %g", order, step, *hcount.p);
        }
        IS(cudaGraphExecDestroy(exec), cudaSuccess);
    }
}

// What a capture forbids is refused, and the capture is then good for nothing.
CUDA_TEST(capture_refuses) {
    Stream stream, other;
    Event event;
    Device<float> x(4);
    Host<float> h(4);
    cudaGraph_t graph;
    for (int what = 0; what < 5; what++) {
        CUDA_CHECK(cudaDeviceSynchronize());
        IS(cudaStreamBeginCapture(stream.s, cudaStreamCaptureModeGlobal), cudaSuccess);
        LAUNCH(add_one_kernel, 1, 1, 0, stream.s)(x.p);
        void *p;
        if (what == 0) IS(cudaMalloc(&p, 64), cudaErrorStreamCaptureUnsupported);
        if (what == 1) IS(cudaStreamSynchronize(stream.s), cudaErrorStreamCaptureUnsupported);
        if (what == 2) IS(cudaMemcpy(h.p, x.p, 4, cudaMemcpyDeviceToHost), cudaErrorStreamCaptureUnsupported);
        if (what == 3) IS(cudaDeviceSynchronize(), cudaErrorStreamCaptureUnsupported);
        if (what == 4) {                                       // a branch that nobody waits for
            CUDA_CHECK(cudaEventRecord(event.e, stream.s));
            CUDA_CHECK(cudaStreamWaitEvent(other.s, event.e, 0));
            LAUNCH(add_one_kernel, 1, 1, 0, other.s)(x.p);
        }
        IS(cudaStreamEndCapture(stream.s, &graph),
           what == 4 ? cudaErrorStreamCaptureUnjoined : cudaErrorStreamCaptureInvalidated);
        CHECK(graph == nullptr, "no graph of an invalid capture");
    }
    IS(cudaStreamBeginCapture(0, cudaStreamCaptureModeGlobal), cudaErrorStreamCaptureUnsupported);
    IS(cudaStreamEndCapture(stream.s, &graph), cudaErrorIllegalState);
    IS(cudaGetLastError(), cudaSuccess);
}

CUDA_TEST(device_and_host_memory) {
    int count, value;
    size_t free_before, free_after, total;
    cudaDeviceProp prop;
    IS(cudaGetDeviceCount(&count), cudaSuccess);
    CHECK(count >= 1, "%d devices", count);
    IS(cudaSetDevice(0), cudaSuccess);
    IS(cudaSetDevice(count), cudaErrorInvalidDevice);
    IS(cudaGetDeviceProperties(&prop, 0), cudaSuccess);
    CHECK(prop.name[0] && prop.major >= 8 && prop.multiProcessorCount > 0, "%s %d", prop.name, prop.major);
    IS(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), cudaSuccess);
    CHECK((size_t)value == prop.sharedMemPerBlockOptin, "%d", value);
    IS(cudaMemGetInfo(&free_before, &total), cudaSuccess);
    CHECK(free_before <= total, "%zu of %zu", free_before, total);
    void *p;
    IS(cudaMalloc(&p, total + 1), cudaErrorMemoryAllocation);
    CHECK(p == nullptr || total == 0, "no memory, no pointer");
    {
        Device<char> block(64 << 20);
        IS(cudaMemGetInfo(&free_after, &total), cudaSuccess);
        CHECK(free_after <= free_before - (32 << 20), "%zu, before %zu", free_after, free_before);
    }
    float host[4] = {};
    Device<float> x(4);
    IS(cudaMemcpy(x.p + 2, host, 12, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    IS(cudaMemcpy(x.p, host, 16, (cudaMemcpyKind)9), cudaErrorInvalidMemcpyDirection);
}

#ifndef __CUDACC__
// ---------------------------------------------------------------------------------------------
// Planted mistakes.

// In how many orders the host, or a second stream, sees what the first has not done yet.
enum Missing { NOTHING, EVENT_WAIT, HOST_WAIT, LATE_STAGING };
static int wrong_orders(Missing missing) {
    int wrong = 0;
    for (int order = 0; order < 8; order++) {
        set_order(order);
        Stream first, second;
        Event done;
        Host<float> h(1);
        Device<float> x(1), y(1), two(std::vector<float>(1, 2.0f));
        CUDA_CHECK(cudaMemset(x.p, 0, 4));
        CUDA_CHECK(cudaDeviceSynchronize());
        *h.p = 5.0f;
        CUDA_CHECK(cudaMemcpyAsync(x.p, h.p, 4, cudaMemcpyHostToDevice, first.s));
        if (missing == LATE_STAGING) *h.p = 6.0f;              // before the copy was made
        CUDA_CHECK(cudaEventRecord(done.e, first.s));
        if (missing != EVENT_WAIT) CUDA_CHECK(cudaStreamWaitEvent(second.s, done.e, 0));
        LAUNCH(scale_kernel, 1, 1, 0, second.s)(y.p, x.p, two.p, 1);
        CUDA_CHECK(cudaMemcpyAsync(h.p, y.p, 4, cudaMemcpyDeviceToHost, second.s));
        if (missing != HOST_WAIT) CUDA_CHECK(cudaStreamSynchronize(second.s));
        wrong += *h.p != 10.0f;
    }
    return wrong;
}
CUDA_TEST(planted_missing_wait) {
    CHECK(wrong_orders(NOTHING) == 0, "the correct program");
    CHECK(wrong_orders(EVENT_WAIT) > 0, "a stream that does not wait for the other's event");
    CHECK(wrong_orders(HOST_WAIT) > 0, "a host that reads before the copy is made");
    CHECK(wrong_orders(LATE_STAGING) > 0, "a host that writes what has yet to be copied");
}
#endif
