// Wikitext and HellaSwag: the worked examples of doc/numerics.md, Python's own answers on nasty texts (made by
// dev/ref/gen_metrics.py), and the totals of the published test file where it is at hand.
#include "test_common.h"
#include <math.h>
#include "json.h"
#include "metrics.h"

static void windows_of_the_worked_example(void **state) {
    (void)state;
    // Tokens 0..9 after prefix P, M = 4: [P,0,1,2]->0..3, [3,4,5,6]->4..7, [5,6,7,8]->8,9.
    const Window expected[3] = {{0, 4, 4}, {4, 4, 4}, {6, 4, 2}};
    assert_int_equal(rolling_window_count(10, 4), 3);
    for (size_t i = 0; i < 3; i++) {
        Window w = rolling_window(10, 4, i);
        assert_int_equal(w.begin, expected[i].begin);
        assert_int_equal(w.len, expected[i].len);
        assert_int_equal(w.scored, expected[i].scored);
    }
}

static void windows_predict_each_token_once(void **state) {
    (void)state;
    for (int M = 1; M <= 9; M++)
        for (size_t n = 0; n <= 40; n++) {
            size_t next = 0;                     // token that is to be predicted next
            for (size_t i = 0; i < rolling_window_count(n, M); i++) {
                Window w = rolling_window(n, M, i);
                assert_true(w.len >= 1 && w.len <= M && w.scored >= 1 && w.scored <= w.len);
                // Input k of the window is position begin + k of [prefix] + tokens, and predicts token begin + k.
                assert_int_equal(w.begin + (size_t)(w.len - w.scored), next);
                next += (size_t)w.scored;
                assert_true(i == 0 || w.len == M || n < (size_t)M);      // context fills a short last window
            }
            assert_int_equal(next, n);
        }
}

static void scores_of_the_worked_example(void **state) {
    (void)state;
    // (-120, 100 words, 500 bytes) and (-60, 40, 210): sums before division. Nine digits are given.
    TextScore s = {.loglik = -120.0 - 60.0, .words = 100 + 40, .bytes = 500 + 210, .tokens = 90};
    assert_true(fabs(word_perplexity(&s) - 3.61725079) < 5e-9);
    assert_true(fabs(byte_perplexity(&s) - 1.28855460) < 5e-9);
    assert_true(fabs(bits_per_byte(&s) - 0.365753672) < 5e-10);
    assert_true(fabs(token_perplexity(&s) - exp(2.0)) < 1e-14 * exp(2.0));
}

static void words_are_fields_between_spaces(void **state) {
    (void)state;
    static const char text[] = " = Title = \n \n Some words here . \n ";
    assert_int_equal(count_words(text, sizeof text - 1), 9);
    assert_int_equal(sizeof text - 1, 35);
    assert_int_equal(count_words("", 0), 1);
    assert_int_equal(count_words(" ", 1), 2);
    // U+2003 and U+3000 part words, U+200B does not; bytes that are no UTF-8 are letters.
    assert_int_equal(count_words("a\xe2\x80\x83" "b\xe3\x80\x80\x20" "c", 9), 3);
    assert_int_equal(count_words("a\xe2\x80\x8b" "b", 5), 1);
    assert_int_equal(count_words("\xe2\x80 \xc2 \xff\xa0", 7), 3);
    assert_int_equal(count_chars("\xc3\xa9\xf0\x9f\x98\x80\xff" "a", 8), 4);
    assert_int_equal(count_chars("\xe2\x80", 2), 2);             // cut off
    assert_int_equal(count_chars("\xed\xa0\x80\xc0\x80", 5), 5); // surrogate, overlong
}

static void agrees_with_python(void **state) {
    (void)state;
    char *text;
    size_t len, n_texts = 0, n_capitals = 0;
    Err err = {0};
    assert_int_equal(file_read(&text, &len, "test/golden/metrics.json", 1 << 20, &err), 0);
    cJSON *all = json_parse(text, len, "metrics.json", &err), *o;
    assert_non_null(all);
    cJSON_ArrayForEach(o, all) {
        const char *in = json_string(o, "in"), *second = json_string(o, "ctx_b");
        if (in) {
            size_t out_len;
            char *out = wikitext_detokenize(in, strlen(in), &out_len);
            assert_string_equal(out, json_string(o, "detok"));
            assert_int_equal(out_len, strlen(out));
            free(out);
            out = hellaswag_clean(in);
            assert_string_equal(out, json_string(o, "clean"));
            free(out);
            assert_int_equal(count_words(in, strlen(in)), cJSON_GetObjectItem(o, "words")->valueint);
            assert_int_equal(count_chars(in, strlen(in)), cJSON_GetObjectItem(o, "chars")->valueint);
            n_texts++;
        } else {
            // Through a whole task: "x: y " stands before ctx_b.
            cJSON *task = cJSON_CreateObject();
            cJSON_AddStringToObject(task, "activity_label", "x");
            cJSON_AddStringToObject(task, "ctx_a", "y");
            cJSON_AddStringToObject(task, "ctx_b", second);
            cJSON_AddNumberToObject(task, "label", 2);
            const char *endings[4] = {"a", "b ", "c [step]  d", "\xc3\xa9"};
            cJSON_AddItemToObject(task, "endings", cJSON_CreateStringArray(endings, 4));
            char *line = cJSON_PrintUnformatted(task), raw[256];
            snprintf(raw, sizeof raw, "x: y %s", json_string(o, "capital"));
            char *expected = hellaswag_clean(raw);
            Hellaswag h;
            assert_int_equal(hellaswag_parse(&h, line, strlen(line), "task", 0, &err), 0);
            assert_int_equal(h.n, 1);
            assert_false(h.prepared);
            assert_string_equal(h.item[0].context, expected);
            assert_string_equal(h.item[0].ending[1], "b");
            assert_string_equal(h.item[0].ending[2], "c  d");          // one pass over three spaces
            assert_int_equal(h.item[0].chars[2], 4);
            assert_int_equal(h.item[0].chars[3], 1);
            assert_int_equal(h.item[0].label, 2);
            hellaswag_free(&h);
            free(expected);
            cJSON_free(line);
            cJSON_Delete(task);
            n_capitals++;
        }
    }
    assert_true(n_texts > 200 && n_capitals >= 9);
    cJSON_Delete(all);
    free(text);
}

static void pages_begin_at_titles(void **state) {
    (void)state;
    static const char text[] = " \n = One = \n \n a b \n \n = = Part = = \n c \n = = = Sub = = = \n"
                               " = Two = \n d\n = Not\nx = ";
    TextSpan *pages;
    assert_int_equal(wikitext_pages(&pages, text, sizeof text - 1), 2);
    static const char one[] = " = One = \n \n a b \n \n = = Part = = \n c \n = = = Sub = = = ";
    assert_int_equal(pages[0].len, sizeof one - 1);
    assert_memory_equal(pages[0].s, one, sizeof one - 1);
    static const char two[] = " = Two = \n d\n = Not\nx = ";
    assert_int_equal(pages[1].len, sizeof two - 1);
    assert_memory_equal(pages[1].s, two, sizeof two - 1);
    free(pages);
    assert_int_equal(wikitext_pages(&pages, NULL, 0), 0);
    assert_null(pages);
    assert_int_equal(wikitext_pages(&pages, "\n \n\t", 4), 0);
    free(pages);
    assert_int_equal(wikitext_pages(&pages, "= A =\n= B =", 11), 2);
    assert_int_equal(pages[0].len, 5);
    free(pages);
}

// Two windows, of three tokens and of two. Mean divergence (1 + 2 + 3 + 0 + 4) / 5 = 2; the windows' sums are off by
// 6 - 6 = 0 and 4 - 4 = 0. Agreement 3/5: sums 3 - 9/5 and 0 - 6/5, so sqrt(2 (36/25 + 36/25)) / 5 = 12 / 25.
static void distance_of_the_worked_example(void **state) {
    (void)state;
    float kl[5] = {1, 2, 3, 0, 4};
    const float same[5] = {1, 1, 1, 0, 0}, loss[5] = {2, 2, 2, 2, 2.5f}, ref[5] = {2, 2, 2, 2, 2};
    const size_t count[2] = {3, 2};
    Distance d;
    distance_measure(&d, kl, loss, ref, same, count, 2);
    assert_int_equal(d.n, 5);
    assert_true(d.kl_mean == 2.0 && d.kl_stderr == 0.0);
    assert_true(d.kl_median == 2.0 && d.kl_max == 4.0);
    assert_true(fabs(d.kl_p99 - 3.96) < 1e-12);               // 0.96 of the way from 3 to 4: q (n - 1) = 3.96
    assert_true(fabs(d.same - 0.6) < 1e-15 && fabs(d.same_stderr - 0.48) < 1e-15);
    // Losses are 0.5 / 5 apart: sums off by 0 - 0.3 and 0.5 - 0.2.
    assert_true(fabs(d.ratio - exp(0.1)) < 1e-15);
    assert_true(fabs(d.ratio_stderr - exp(0.1) * 0.6 / 5) < 1e-15);
}

static void distance_of_one_token_and_of_none_that_counts(void **state) {
    (void)state;
    float one[1] = {0.25f}, bad[3] = {1, NAN, 2};
    const float same[3] = {1, 1, 1}, loss[3] = {1, 1, 1};
    const size_t count[1] = {1}, three[1] = {3};
    Distance d;
    distance_measure(&d, one, loss, loss, same, count, 1);
    assert_true(d.kl_mean == 0.25 && d.kl_median == 0.25 && d.kl_p99 == 0.25 && d.kl_max == 0.25 && d.same == 1.0 &&
                d.ratio == 1.0);
    assert_true(isnan(d.kl_stderr) && isnan(d.same_stderr) && isnan(d.ratio_stderr));
    distance_measure(&d, bad, loss, loss, same, three, 1);
    assert_int_equal(d.n, 3);
    assert_true(isnan(d.kl_mean) && isnan(d.kl_median) && isnan(d.kl_p99) && isnan(d.kl_max) && isnan(d.same));
}

// The published file: totals that reproduce the words-to-bytes ratio of lm-eval's tables, and its first page.
static void totals_of_the_test_file(void **state) {
    (void)state;
    const char *path = test_data("wikitext-2/wiki.test.raw");
    if (!path) skip();
    FileMap map;
    Err err = {0};
    assert_int_equal(file_map(&map, path, &err), 0);
    TextSpan *pages;
    int n = wikitext_pages(&pages, (const char *)map.data, map.size);
    size_t words = 0, bytes = 0, scored = 0;
    for (int i = 0; i < n; i++) {
        size_t len;
        char *text = wikitext_detokenize(pages[i].s, pages[i].len, &len);
        words += count_words(pages[i].s, pages[i].len);
        bytes += pages[i].len;
        scored += len;
        if (i == 0) {
            static const char begin[] = " = Robert Boulter =\n\nRobert Boulter is an English film, television";
            assert_int_equal(count_words(pages[0].s, pages[0].len), 1093);
            assert_int_equal(pages[0].len, 5667);
            assert_int_equal(len, 5423);
            assert_memory_equal(text, begin, sizeof begin - 1);
        }
        free(text);
    }
    assert_int_equal(n, 62);
    assert_int_equal(words, 241335);
    assert_int_equal(bytes, 1290527);
    assert_int_equal(scored, 1240466);
    free(pages);
    file_unmap(&map);
}

static int parse(const char *text, int limit, Hellaswag *h, Err *err) {
    return hellaswag_parse(h, text, strlen(text), "tasks", limit, err);
}

static void six_line_form(void **state) {
    (void)state;
    static const char text[] = "Roof: A man is on it. he\n3\na\nb \nc\nd\n\nNext: x\r\n0\r\n\xc3\xa9t\r\nf\r\ng\r\nh";
    Hellaswag h;
    Err err = {0};
    assert_int_equal(parse(text, 0, &h, &err), 0);
    assert_int_equal(h.n, 2);
    assert_true(h.prepared);
    assert_string_equal(h.item[0].context, "Roof: A man is on it. he");
    assert_string_equal(h.item[0].ending[1], "b ");
    assert_int_equal(h.item[0].label, 3);
    assert_string_equal(h.item[1].context, "Next: x");
    assert_int_equal(h.item[1].chars[0], 2);
    hellaswag_free(&h);
    assert_int_equal(parse(text, 1, &h, &err), 0);
    assert_int_equal(h.n, 1);
    hellaswag_free(&h);
}

static void published_six_line_file(void **state) {
    (void)state;
    const char *path = test_data("hellaswag/hellaswag_val_full.txt");
    if (!path) skip();
    Hellaswag h;
    Err err = {0};
    assert_int_equal(hellaswag_load(&h, path, 0, &err), 0);
    assert_int_equal(h.n, 10042);
    hellaswag_free(&h);
}

#define TASK "{\"ctx_a\":\"a\",\"ctx_b\":\"b\",\"activity_label\":\"c\","

static void malformed_tasks_are_named(void **state) {
    (void)state;
    static const struct { const char *text, *says; } bad[] = {
        {"", "no HellaSwag tasks"},
        {" \n\n", "no HellaSwag tasks"},
        {"ctx\n3\na\nb\nc", "middle of a task (5 of 6 lines)"},
        {"ctx\n4\na\nb\nc\nd", "index of the right ending"},
        {"ctx\n33\na\nb\nc\nd", "index of the right ending"},
        {"{\"ctx_a\": \"a\"", "line 1"},
        {"{\"ctx_a\": \"a\", \"ctx_b\": 3}", "expected strings"},
        {TASK "\"endings\":[\"1\",\"2\",\"3\"],\"label\":0}", "array of 4"},
        {TASK "\"endings\":[\"1\",\"2\",\"3\",4],\"label\":0}", "ending 3"},
        {TASK "\"endings\":[\"1\",\"2\",\"3\",\"4\"],\"label\":\"\"}", "label"},
        {TASK "\"endings\":[\"1\",\"2\",\"3\",\"4\"],\"label\":1.5}", "label"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        Hellaswag h;
        Err err = {0};
        assert_true(parse(bad[i].text, 0, &h, &err) < 0);
        assert_non_null(strstr(err.text, bad[i].says));
        assert_null(h.item);
    }
    Hellaswag h;
    Err err = {0};
    assert_true(hellaswag_parse(&h, "a\0b\n1\n2\n3\n4\n5", 13, "tasks", 0, &err) < 0);
    assert_non_null(strstr(err.text, "NUL"));
}

static void accuracy_and_its_error(void **state) {
    (void)state;
    ChoiceScore c = {0};
    const int chars[4] = {10, 20, 5, 10};
    choice_add(&c, (double[4]){-3, -4, -2, -3}, chars, 4, 2);     // by score 2, by score a character 1 (-0.2)
    choice_add(&c, (double[4]){-3, -4, -2, -3}, chars, 4, 1);
    choice_add(&c, (double[4]){-2, -4, -2, -2}, (int[4]){10, 20, 10, 10}, 4, 0);    // ties: the first
    choice_add(&c, (double[4]){-9, -9, -9, -1}, chars, 4, 0);
    assert_int_equal(c.n, 4);
    assert_int_equal(c.right, 2);
    assert_int_equal(c.right_norm, 2);
    // Sample standard deviation of 1,1,0,0 over sqrt(4): sqrt(4 * 0.25 / 3) / 2.
    assert_true(fabs(choice_stderr(4, 2) - sqrt(1.0 / 3.0) / 2.0) < 1e-15);
    assert_true(isnan(choice_stderr(1, 1)));
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(windows_of_the_worked_example),
    cmocka_unit_test(windows_predict_each_token_once),
    cmocka_unit_test(scores_of_the_worked_example),
    cmocka_unit_test(distance_of_the_worked_example),
    cmocka_unit_test(distance_of_one_token_and_of_none_that_counts),
    cmocka_unit_test(words_are_fields_between_spaces),
    cmocka_unit_test(agrees_with_python),
    cmocka_unit_test(pages_begin_at_titles),
    cmocka_unit_test(totals_of_the_test_file),
    cmocka_unit_test(six_line_form),
    cmocka_unit_test(published_six_line_file),
    cmocka_unit_test(malformed_tasks_are_named),
    cmocka_unit_test(accuracy_and_its_error),
};
TEST_MAIN(tests)
