// The GPU as device.h sees it: memory, copies, errors, and steps that are recorded.
#include "cuda_test.h"

extern "C" {
extern const DeviceWing device_wing_cuda;
}

static __global__ void add_kernel(float *y, const float *x, float *scratch, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    if (scratch) scratch[i] = x[i];
    y[i] += scratch ? scratch[i] : x[i];
}
// y += x by way of `work` bytes of working memory, and count how often the host came by.
struct Step { float *y, *x; size_t work; int calls; };
static void step(void *ctx) {
    Step *s = (Step *)ctx;
    s->calls++;
    LAUNCH(add_kernel, 1, 64, 0, cuda_stream)(s->y, s->x, (float *)cuda_workspace(s->work), 64);
    CUDA_CHECK(cudaGetLastError());
}

CUDA_TEST(device) {
    const DeviceWing *wing = &device_wing_cuda;
    char text[256];
    Err err = {};
    cudaStream_t before = cuda_stream;
    cuda_stream = 0;
    CHECK(wing->available(0, text, sizeof text), "%s", text);
    CHECK(wing->init(0, text, sizeof text, &err) == 0, "%s", err.text);
    CHECK(cuda_stream && strstr(text, ops_cuda.name) == text, "%s", text);
    double available = 0, total = 0;
    wing->memory(&available, &total);
    CHECK(available > 0 && available <= total, "%g of %g", available, total);

    float one[64], out[64];
    for (int i = 0; i < 64; i++) one[i] = (float)(i + 1), out[i] = -1.0f;
    Step s = {nullptr, nullptr, 1024, 0};
    CHECK(wing->alloc((void **)&s.y, sizeof one, "y", &err) == 0, "%s", err.text);
    CHECK(wing->alloc((void **)&s.x, sizeof one, "x", &err) == 0, "%s", err.text);
    wing->copy_out(out, s.y, sizeof out);
    for (int i = 0; i < 64; i++) CHECK(out[i] == 0.0f, "memory begins zeroed: %g", (double)out[i]);
    wing->copy_in(s.x, one, sizeof one);
    memset(one, 0, sizeof one);                     // the copy is the device's own by now

    CHECK(cuda_workspace(s.work) != nullptr, "working memory");
    // Eager, recorded, replayed: the host comes by twice. What the device then finds in x is what counts.
    for (int i = 0; i < 4; i++) wing->step(7, step, &s);
    CHECK(s.calls == 2, "%d calls for four steps", s.calls);
    wing->copy_out(out, s.y, sizeof out);
    for (int i = 0; i < 64; i++) CHECK(out[i] == 4.0f * (float)(i + 1), "%d: %g", i, (double)out[i]);
    wing->zero(s.x, sizeof one);
    wing->step(7, step, &s);
    CHECK(s.calls == 2, "%d calls", s.calls);
    // Another key is another step; and so is one whose working memory has moved since.
    for (int i = 0; i < 3; i++) wing->step(8, step, &s);
    CHECK(s.calls == 4, "%d calls", s.calls);
    CHECK(cuda_workspace((size_t)1 << 25) != nullptr, "working memory");
    for (int i = 0; i < 3; i++) wing->step(8, step, &s);
    CHECK(s.calls == 6, "%d calls", s.calls);
    setenv("QLLM_NO_GRAPH", "1", 1);
    for (int i = 0; i < 3; i++) wing->step(8, step, &s);
    unsetenv("QLLM_NO_GRAPH");
    CHECK(s.calls == 9, "%d calls", s.calls);
    wing->copy_out(out, s.y, sizeof out);
    for (int i = 0; i < 64; i++) CHECK(out[i] == 4.0f * (float)(i + 1), "%d: %g", i, (double)out[i]);

    // More than there is: the message names what for, how much and the way out.
    void *p = nullptr;
    CHECK(wing->alloc(&p, (size_t)1 << 50, "a whale", &err) == E_NOMEM, "%d", err.code);
    CHECK(strstr(err.text, "a whale") && strstr(err.text, "batch"), "%s", err.text);
    wing->free(s.x);
    wing->free(s.y);
    wing->wait();
    CHECK(device_sync(&err) == 0, "%s", err.text);

    // A failed call is kept with its file, line, text and the library's words.
    CUDA_CHECK(cudaMemcpy(out, (void *)(uintptr_t)16, sizeof out, cudaMemcpyDeviceToHost));
    CHECK(device_sync(&err) == E_FAIL, "%d", err.code);
    CHECK(strstr(err.text, "test_device.cpp:") && strstr(err.text, "cudaMemcpy(") && strstr(err.text, "invalid argument"),
          "%s", err.text);
    (void)cudaGetLastError();
    cuda_stream = before;
}

// Copies from memory that changes and goes as soon as the call returns: more than are staged at a time, and large ones.
CUDA_TEST(device_copy_in) {
    const DeviceWing *wing = &device_wing_cuda;
    char text[256];
    Err err = {};
    cudaStream_t before = cuda_stream;
    cuda_stream = 0;
    CHECK(wing->init(0, text, sizeof text, &err) == 0, "%s", err.text);
    const size_t sizes[] = {1, 100000, 300000, 4, 250000, 70001, 1000000};
    const size_t total = 1 + 100000 + 300000 + 4 + 250000 + 70001 + 1000000;
    for (int order = 0; order < ORDERS; order++) {
        set_order(order);
        void *p = nullptr;
        CHECK(wing->alloc(&p, total, "p", &err) == 0, "%s", err.text);
        size_t at = 0;
        for (size_t n : sizes) {
            std::vector<uint8_t> host(n);
            for (size_t i = 0; i < n; i++) host[i] = (uint8_t)((at + i) % 251);
            wing->copy_in((char *)p + at, host.data(), n);
            memset(host.data(), 0xee, n);
            at += n;
        }
        std::vector<uint8_t> got(total);
        wing->copy_out(got.data(), p, total);
        size_t bad = 0;
        for (size_t i = 0; i < total; i++) bad += got[i] != (uint8_t)(i % 251);
        CHECK(bad == 0, "order %d: %zu of %zu bytes are not those of the time of the call", order, bad, total);
        wing->free(p);
    }
    CHECK(device_sync(&err) == 0, "%s", err.text);
    cuda_stream = before;
}

// Marks come in the order of the work between them, lie on the host's clock, and cost no wait.
CUDA_TEST(device_marks) {
    const DeviceWing *wing = &device_wing_cuda;
    char text[256];
    Err err = {};
    cudaStream_t before = cuda_stream;
    cuda_stream = 0;
    CHECK(wing->init(0, text, sizeof text, &err) == 0, "%s", err.text);
    static double t[DEVICE_MARKS];
    (void)wing->marks_read(t);
    void *p = nullptr;
    CHECK(wing->alloc(&p, 4096, "p", &err) == 0, "%s", err.text);
    for (int order = 0; order < ORDERS; order++) {
        set_order(order);
        double host = now_seconds();
        const int n = 100;
        for (int i = 0; i < n; i++) {
            CHECK(wing->mark() == i, "mark %d", i);
            wing->zero(p, 4096);
        }
        CHECK(wing->marks_read(t) == n, "order %d", order);
        double end = now_seconds();
        // The anchor's time is known to half of what the host waited for it: at most all of this test.
        double slack = 0.5 * (end - host) + 1e-5;
        CHECK(t[0] > host - slack && t[n - 1] < end + slack, "order %d: %.6f to %.6f outside %.6f to %.6f", order, t[0],
              t[n - 1], host, end);
        int backwards = 0;                      // an event's clock ticks every half a microsecond
        for (int i = 1; i < n; i++) backwards += t[i] < t[i - 1] - 1e-6;
        CHECK(backwards == 0, "order %d: %d marks before the one before", order, backwards);
        CHECK(wing->marks_read(t) == 0, "order %d: marks are read once", order);
    }
    for (int i = 0; i < DEVICE_MARKS; i++) (void)wing->mark();
    CHECK(wing->mark() == -1, "a mark more than there is room for");
    CHECK(wing->marks_read(t) == DEVICE_MARKS, "all of them");
    wing->free(p);
    CHECK(device_sync(&err) == 0, "%s", err.text);
    cuda_stream = before;
}
