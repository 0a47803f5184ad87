// The sampler: what it may pick, how often, and that a run repeats.
#include "test_common.h"
#include <math.h>
#include "rng.h"
#include "sampler.h"

static int draw(Sampler s, const float *logits, int V, uint64_t step) {
    float copy[512];
    assert_true(V <= 512);
    memcpy(copy, logits, (size_t)V * sizeof *copy);
    return sample_token(&s, copy, V, step);
}

static void greedy_takes_the_first_of_equals(void **state) {
    (void)state;
    const float logits[] = {1, 3, -2, 3, 0};
    assert_int_equal(draw((Sampler){0.0f, 0, 1.0f, 7}, logits, 5, 0), 1);
    assert_int_equal(argmax_token(logits, 5), 1);
    // Any temperature with one candidate is greedy too, ties included.
    for (uint64_t step = 0; step < 50; step++) assert_int_equal(draw((Sampler){2.0f, 1, 1.0f, 7}, logits, 5, step), 1);
}

static void nan_and_infinity_are_defined(void **state) {
    (void)state;
    const float some[] = {NAN, 1, NAN, 2}, none[] = {NAN, -INFINITY, NAN, -INFINITY};
    const float inf[] = {5, INFINITY, NAN, INFINITY};
    for (int t = 0; t < 2; t++) {
        Sampler s = {(float)t, 0, 1.0f, 3};
        for (uint64_t step = 0; step < 100; step++) {
            int got = draw(s, some, 4, step);
            assert_true(got == 3 || (t == 1 && got == 1));
            assert_int_equal(draw(s, none, 4, step), -1);
            assert_int_equal(draw(s, inf, 4, step), 1);
        }
    }
    const float one[] = {-3};
    assert_int_equal(draw((Sampler){1.0f, 5, 0.5f, 3}, one, 1, 0), 0);
    // Tiny temperatures and huge logits neither overflow nor divide by zero.
    const float far[] = {-3e38f, 3e38f, 2.9e38f};
    assert_int_equal(draw((Sampler){1e-30f, 0, 1.0f, 3}, far, 3, 0), 1);
}

// The allowed set by sorting, as the definition says; order: larger logit first, of equals the smaller index.
static void allowed_by_sorting(bool *allowed, const float *logits, int V, float temperature, int top_k, float top_p) {
    int order[512];
    for (int i = 0; i < V; i++) {
        int at = i;
        for (; at > 0 && logits[order[at - 1]] < logits[i]; at--) order[at] = order[at - 1];
        order[at] = i;
    }
    int k = top_k > 0 && top_k < V ? top_k : V;
    double total = 0, sum = 0;
    for (int i = 0; i < k; i++) total += (double)expf((logits[order[i]] - logits[order[0]]) / temperature);
    for (int i = 0; i < V; i++) allowed[i] = false;
    for (int i = 0; i < k && (i == 0 || sum < (double)top_p * total); i++) {
        allowed[order[i]] = true;
        sum += (double)expf((logits[order[i]] - logits[order[0]]) / temperature);
    }
}

static void cuts_agree_with_sorting(void **state) {
    (void)state;
    static const int ks[] = {0, 1, 2, 5, 40, 299, 300, 1000};
    static const float ps[] = {1.0f, 0.95f, 0.5f, 0.1f, 0.0f};
    enum { V = 300 };
    float logits[V];
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < V; i++) {
            float u = philox_uniform(philox(5, (uint64_t)round, (uint64_t)i).v[0]);
            logits[i] = round & 1 ? floorf(u * 8.0f) : u * 12.0f - 6.0f;     // odd rounds: many ties at every cut
        }
        for (size_t k = 0; k < sizeof ks / sizeof *ks; k++)
            for (size_t p = 0; p < sizeof ps / sizeof *ps; p++) {
                bool allowed[V], seen[V] = {false};
                Sampler s = {1.3f, ks[k], ps[p], 11};
                allowed_by_sorting(allowed, logits, V, s.temperature, s.top_k, s.top_p);
                int n_allowed = 0, n_seen = 0;
                for (uint64_t step = 0; step < 4000; step++) {
                    int got = draw(s, logits, V, step);
                    assert_true(allowed[got]);
                    n_seen += !seen[got];
                    seen[got] = true;
                }
                for (int i = 0; i < V; i++) n_allowed += allowed[i];
                // With up to 5 candidates, each at least exp(-1.5) as likely as another, 4000 draws miss none.
                if (n_allowed <= 5) assert_int_equal(n_seen, n_allowed);
            }
    }
}

static void frequencies_follow_the_softmax(void **state) {
    (void)state;
    enum { V = 5, N = 200000 };
    const float logits[V] = {0.0f, 1.0f, 2.0f, -1.0f, 0.5f};
    static const float temperature[] = {0.5f, 1.0f, 2.0f};
    for (int t = 0; t < 3; t++) {
        int count[V] = {0};
        double weight[V], total = 0;
        for (int i = 0; i < V; i++) total += weight[i] = exp((double)logits[i] / (double)temperature[t]);
        Sampler s = {temperature[t], 0, 1.0f, 42};
        for (uint64_t step = 0; step < N; step++) count[draw(s, logits, V, step)]++;
        // Five standard deviations of a binomial count: all 15 hold with probability above 0.9999; the seed is fixed.
        for (int i = 0; i < V; i++) {
            double p = weight[i] / total;
            assert_true(fabs(count[i] - N * p) < 5 * sqrt(N * p * (1 - p)));
        }
    }
}

static void draws_repeat_and_depend_on_seed_and_step(void **state) {
    (void)state;
    float logits[256] = {0};
    int same_seed = 0, same_step = 0;
    for (uint64_t step = 0; step < 1000; step++) {
        Sampler s = {1.0f, 0, 1.0f, 1}, other = {1.0f, 0, 1.0f, 2};
        int got = draw(s, logits, 256, step);
        assert_int_equal(got, draw(s, logits, 256, step));
        same_seed += got == draw(other, logits, 256, step);
        same_step += got == draw(s, logits, 256, step + 1);
    }
    // Independent draws agree once in 256: 4 expected in 1000, standard deviation 2.
    assert_true(same_seed < 15 && same_step < 15);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(greedy_takes_the_first_of_equals),
    cmocka_unit_test(nan_and_infinity_are_defined),
    cmocka_unit_test(cuts_agree_with_sorting),
    cmocka_unit_test(frequencies_follow_the_softmax),
    cmocka_unit_test(draws_repeat_and_depend_on_seed_and_step),
};
TEST_MAIN(tests)
