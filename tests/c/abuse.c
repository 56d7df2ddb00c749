/*
 * Everything that a caller can do wrong and that can be told:  abuse MODEL
 *
 * Each call must answer with the status that the header says; the program must end by itself. What
 * cannot be told (memory that is not there, or less of it than was said) is not tried.
 */
#include <mor.h>

#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int checks, failures;

static void expect(mor_status got, mor_status wanted, const char *call, int line)
{
    checks++;
    if (got == wanted)
        return;
    failures++;
    printf("abuse.c:%d: %s: status %d, not %d\n", line, call, (int)got, (int)wanted);
}
static void check(bool truth, const char *what, int line)
{
    checks++;
    if (truth)
        return;
    failures++;
    printf("abuse.c:%d: %s\n", line, what);
}
#define STATUS(wanted, call) expect((call), (wanted), #call, __LINE__)
#define OK(call) STATUS(MOR_OK, call)
#define REFUSED(call) STATUS(MOR_ERROR_INVALID_ARGUMENT, call)
#define CHECK(truth) check((truth), #truth, __LINE__)
/* Any failure will do: the header does not say which. */
#define FAILS(call) check((call) != MOR_OK, #call " succeeded", __LINE__)

#define CONTEXT 96

static const char *path;
static unsigned char file_bytes[8u << 20];
static size_t file_size;

/* A struct that claims to be larger than it is needs the room that it claims. */
typedef union {
    size_t struct_size;
    unsigned char bytes[4096];
    uint64_t aligned;
} large;

static const size_t bad_sizes[] = {0, 1, 7, 4097, 65536, SIZE_MAX / 2, SIZE_MAX};
#define BAD_SIZES (sizeof bad_sizes / sizeof bad_sizes[0])

static void read_file(void)
{
    int file = open(path, O_RDONLY);
    ssize_t got;
    while (file >= 0 && (got = read(file, file_bytes + file_size, sizeof file_bytes - file_size)) > 0)
        file_size += (size_t)got;
    close(file);
}

static bool ignore(void *user_data, const mor_piece *piece)
{
    (void)user_data;
    (void)piece;
    return true;
}

/* --- Every call on a session that is none, or that is in use. ------------------------------------ */

static unsigned char state_bytes[4u << 20];

static void every_session_call(mor_session *s, mor_status wanted, bool only_in_use)
{
    uint32_t tokens[4] = {5, 6, 7, 8};
    uint8_t depths[4];
    uint64_t counts[256];
    float numbers[4];
    const float *logits = NULL;
    size_t size = 0;
    uint32_t token = 0;
    mor_finish finish;
    STATUS(wanted, mor_session_prefill(s, tokens, 4));
    STATUS(wanted, mor_session_prefill_whole(s, tokens, 4, NULL));
    STATUS(wanted, mor_session_log_probabilities(s, tokens, 4, numbers));
    STATUS(wanted, mor_session_step(s, 5, &logits));
    STATUS(wanted, mor_session_step(s, 5, NULL));
    STATUS(wanted, mor_session_logits(s, &logits, &size));
    STATUS(wanted, mor_session_set_sampler(s, NULL));
    STATUS(wanted, mor_session_sample(s, &token));
    STATUS(wanted, mor_session_generate(s, NULL, &finish));
    STATUS(wanted, mor_session_length(s, &size));
    STATUS(wanted, mor_session_tokens(s, 0, 1, tokens));
    STATUS(wanted, mor_session_depths(s, 0, 1, depths));
    STATUS(wanted, mor_session_depth_histogram(s, counts, 256));
    STATUS(wanted, mor_session_kv_bytes_used(s, &size));
    STATUS(wanted, mor_session_set_cut(s, 0.5f));
    STATUS(wanted, mor_session_set_depth_limit(s, 1));
    STATUS(wanted, mor_session_set_time_budget(s, 0));
    STATUS(wanted, mor_session_set_routing(s, MOR_ROUTING_THRESHOLD));
    STATUS(wanted, mor_session_rewind(s, 0));
    STATUS(wanted, mor_session_save_size(s, &size));
    STATUS(wanted, mor_session_save(s, state_bytes, sizeof state_bytes, &size));
    STATUS(wanted, mor_session_restore(s, state_bytes, 16));
    if (s != NULL) /* freeing NULL is allowed */
        STATUS(wanted, mor_session_free(s));
    if (!only_in_use) {
        STATUS(wanted, mor_session_cancel(s));
        STATUS(wanted, mor_session_reset_cancel(s));
    } else {
        OK(mor_session_cancel(s));
        OK(mor_session_reset_cancel(s));
    }
    CHECK(logits == NULL && token == 0 && size == 0); /* results are written on success only */
    CHECK(mor_session_last_error(s) != NULL);
}

/* Every call on a batch that is none, or on a sequence that it does not have. */

static void every_sequence_call(mor_batch *b, uint64_t sequence)
{
    mor_sequence_status where = MOR_SEQUENCE_RUNNING;
    mor_finish finish = MOR_FINISH_CALLBACK;
    uint32_t tokens[4];
    uint8_t depths[4];
    size_t count = 0;
    uint64_t made = 0;
    mor_error failure;
    failure.status = MOR_ERROR_INTERNAL;
    REFUSED(mor_batch_stop(b, sequence));
    REFUSED(mor_batch_remove(b, sequence));
    REFUSED(mor_batch_resume(b, sequence));
    REFUSED(mor_batch_sequence_status(b, sequence, &where, &finish));
    REFUSED(mor_batch_sequence_status(b, sequence, &where, NULL));
    REFUSED(mor_batch_tokens(b, sequence, tokens, 4, &count));
    REFUSED(mor_batch_tokens(b, sequence, NULL, 0, &count));
    REFUSED(mor_batch_depths(b, sequence, depths, 4, &count));
    REFUSED(mor_batch_failure(b, sequence, &failure));
    REFUSED(mor_batch_fork(b, sequence, 0, NULL, &made));
    REFUSED(mor_batch_fork(b, sequence, 1, NULL, &made));
    CHECK(mor_batch_last_error(b) != NULL && mor_batch_last_error(b)[0] != '\0');
    CHECK(where == MOR_SEQUENCE_RUNNING && finish == MOR_FINISH_CALLBACK && count == 0 && made == 0 &&
          failure.status == MOR_ERROR_INTERNAL);
}

static void every_batch_call(mor_batch *b)
{
    uint32_t token = 5;
    mor_batch_request request;
    OK(mor_batch_request_init(&request, sizeof request));
    request.prompt = &token;
    request.prompt_count = 1;
    const mor_batch_event *events = NULL;
    mor_batch_counters_info counters;
    counters.struct_size = sizeof counters;
    uint64_t made = 0;
    size_t count = 0;
    bool idle = false;
    every_sequence_call(b, 0);
    every_sequence_call(b, 1 << 20);
    REFUSED(mor_batch_add(b, &request, &made));
    REFUSED(mor_batch_tick(b, &events, &count));
    REFUSED(mor_batch_is_idle(b, &idle));
    REFUSED(mor_batch_kv_bytes_used(b, &count));
    REFUSED(mor_batch_counters(b, &counters));
    REFUSED(mor_batch_set_in_step(b, true));
    if (b != NULL)
        REFUSED(mor_batch_free(b));
    CHECK(made == 0 && events == NULL && count == 0 && !idle);
}

static void every_tokenizer_call(mor_tokenizer *t)
{
    mor_tokenizer_info info;
    info.struct_size = sizeof info;
    uint32_t tokens[16] = {5};
    char text[64];
    const char *bytes = NULL;
    size_t size = 0;
    bool end = false;
    mor_chat_message message = {"user", "Hello"};
    REFUSED(mor_tokenizer_describe(t, &info));
    REFUSED(mor_tokenizer_encode(t, "Hello", 5, 0, tokens, 16, &size));
    REFUSED(mor_tokenizer_decode(t, tokens, 1, 0, text, sizeof text, &size));
    mor_decode_stream stream = {{0}, 0};
    REFUSED(mor_tokenizer_decode_next(t, &stream, 5, 0, text, sizeof text, &size));
    REFUSED(mor_tokenizer_decode_end(t, &stream, text, sizeof text, &size));
    REFUSED(mor_tokenizer_token_bytes(t, 5, 0, &bytes, &size));
    REFUSED(mor_tokenizer_is_end(t, 5, &end));
    REFUSED(mor_tokenizer_format_chat(t, &message, 1, true, text, sizeof text, &size));
    if (t != NULL)
        REFUSED(mor_tokenizer_free(t));
    CHECK(size == 0 && bytes == NULL);
    CHECK(mor_tokenizer_last_error(t) != NULL && mor_tokenizer_last_error(t)[0] != '\0');
}

static void every_model_call(const mor_model *m)
{
    mor_model_info info;
    info.struct_size = sizeof info;
    mor_session_plan_info plan;
    plan.struct_size = sizeof plan;
    char text[16];
    size_t size = 0;
    mor_tokenizer *tokenizer = NULL;
    mor_session *session = NULL;
    mor_batch *batch = NULL;
    mor_batch_plan_info batch_plan;
    batch_plan.struct_size = sizeof batch_plan;
    mor_error error;
    REFUSED(mor_model_describe(m, &info));
    REFUSED(mor_model_metadata(m, "general.architecture", text, sizeof text, &size));
    REFUSED(mor_tokenizer_create(m, NULL, &tokenizer, &error));
    REFUSED(mor_session_plan(m, NULL, &plan, &error));
    REFUSED(mor_session_create(m, NULL, &session, &error));
    REFUSED(mor_session_create_in(m, NULL, state_bytes, sizeof state_bytes, &session, &error));
    REFUSED(mor_batch_plan(m, NULL, &batch_plan, &error));
    REFUSED(mor_batch_plan_in(m, NULL, 1, SIZE_MAX, &batch_plan, &error));
    REFUSED(mor_batch_pages_for(m, NULL, 1, &size, &error));
    REFUSED(mor_batch_create(m, NULL, &batch, &error));
    CHECK(tokenizer == NULL && session == NULL && batch == NULL && size == 0);
    CHECK(error.status == MOR_ERROR_INVALID_ARGUMENT && error.text[0] != '\0');
}

static void wrong_objects(mor_model *model, mor_tokenizer *tokenizer, mor_session *session,
                          mor_batch *batch)
{
    static uint64_t zeros[64];
    /* A pointer that is no handle: NULL, zeros, in the middle of one, of another kind. */
    void *none[] = {NULL, zeros, (char *)zeros + 1};
    for (size_t i = 0; i < 3; i++) {
        every_session_call(none[i], MOR_ERROR_INVALID_ARGUMENT, false);
        every_tokenizer_call(none[i]);
        every_batch_call(none[i]);
        every_model_call(none[i]);
        mor_model_free(none[i]);
    }
    OK(mor_session_free(NULL));
    OK(mor_tokenizer_free(NULL));
    OK(mor_batch_free(NULL));
    every_batch_call((mor_batch *)(void *)session);
    every_batch_call((mor_batch *)(void *)model);
    every_batch_call((mor_batch *)(void *)tokenizer);
    every_session_call((mor_session *)(void *)batch, MOR_ERROR_INVALID_ARGUMENT, false);
    every_tokenizer_call((mor_tokenizer *)(void *)batch);
    every_model_call((const mor_model *)(const void *)batch);
    every_session_call((mor_session *)(void *)tokenizer, MOR_ERROR_INVALID_ARGUMENT, false);
    every_session_call((mor_session *)(void *)model, MOR_ERROR_INVALID_ARGUMENT, false);
    every_tokenizer_call((mor_tokenizer *)(void *)session);
    every_tokenizer_call((mor_tokenizer *)(void *)model);
    every_model_call((const mor_model *)(const void *)session);
    every_model_call((const mor_model *)(const void *)tokenizer);
    mor_model_free((mor_model *)(void *)session);
    mor_model_free((mor_model *)(void *)tokenizer);
    /* None of that has harmed them. */
    size_t length;
    mor_model_info info;
    info.struct_size = sizeof info;
    bool idle = false;
    OK(mor_session_length(session, &length));
    OK(mor_model_describe(model, &info));
    OK(mor_batch_is_idle(batch, &idle));
    CHECK(idle);
}

/* --- Structs of the wrong size. ------------------------------------------------------------------ */

#define WRONG_INIT(type)                                                                 \
    do {                                                                                 \
        large params;                                                                    \
        REFUSED(type##_init(NULL, sizeof(type)));                                        \
        for (size_t i = 0; i < BAD_SIZES; i++)                                           \
            REFUSED(type##_init((type *)(void *)&params, bad_sizes[i]));                 \
        OK(type##_init((type *)(void *)&params, sizeof params));                         \
        CHECK(params.struct_size == sizeof params);                                      \
        CHECK(params.bytes[sizeof params - 1] == 0);                                     \
        OK(type##_init((type *)(void *)&params, sizeof(type)));                          \
        CHECK(params.struct_size == sizeof(type));                                       \
    } while (0)

/* A call with a pointer `params` to a struct: of wrong sizes, with an unknown field, and as it is in a
 * later version that sets none. */
#define WRONG_PARAMS(type, call, undo)                                                   \
    do {                                                                                 \
        large storage;                                                                   \
        type *params = (type *)(void *)&storage;                                         \
        OK(type##_init(params, sizeof storage));                                         \
        OK(call);                                                                        \
        undo;                                                                            \
        storage.bytes[sizeof storage - 1] = 1;                                           \
        REFUSED(call);                                                                   \
        storage.bytes[sizeof storage - 1] = 0;                                           \
        for (size_t i = 0; i < BAD_SIZES; i++) {                                         \
            storage.struct_size = bad_sizes[i];                                          \
            REFUSED(call);                                                               \
        }                                                                                \
    } while (0)

/* The same of a struct that is written. */
#define WRONG_INFO(type, call)                                                           \
    do {                                                                                 \
        large storage;                                                                   \
        type *info = (type *)(void *)&storage;                                           \
        for (size_t i = 0; i < BAD_SIZES; i++) {                                         \
            storage.struct_size = bad_sizes[i];                                          \
            REFUSED(call);                                                               \
        }                                                                                \
        memset(&storage, 0xff, sizeof storage);                                          \
        storage.struct_size = sizeof storage;                                            \
        OK(call);                                                                        \
        CHECK(storage.struct_size == sizeof storage);                                    \
        CHECK(storage.bytes[sizeof storage - 1] == 0);                                   \
    } while (0)

static void wrong_sizes(mor_model *model, mor_tokenizer *tokenizer, mor_session *session,
                        mor_batch *batch)
{
    mor_model *m = NULL;
    mor_tokenizer *t = NULL;
    mor_session *s = NULL;
    mor_session_plan_info plan;
    plan.struct_size = sizeof plan;
    uint32_t token = 5;
    WRONG_INIT(mor_model_params);
    WRONG_INIT(mor_tokenizer_params);
    WRONG_INIT(mor_session_params);
    WRONG_INIT(mor_sampler_params);
    WRONG_INIT(mor_generate_params);
    WRONG_PARAMS(mor_model_params, mor_model_load(path, params, &m, NULL), mor_model_free(m));
    WRONG_PARAMS(mor_model_params, mor_model_load_memory(file_bytes, file_size, params, &m, NULL),
                 mor_model_free(m));
    int file = open(path, O_RDONLY);
    WRONG_PARAMS(mor_model_params, mor_model_load_descriptor(file, 0, 0, params, &m, NULL),
                 mor_model_free(m));
    close(file);
    WRONG_PARAMS(mor_tokenizer_params, mor_tokenizer_create(model, params, &t, NULL),
                 OK(mor_tokenizer_free(t)));
    WRONG_PARAMS(mor_session_params, mor_session_plan(model, params, &plan, NULL), (void)0);
    WRONG_PARAMS(mor_session_params, mor_session_create(model, params, &s, NULL),
                 OK(mor_session_free(s)));
    WRONG_PARAMS(mor_sampler_params, mor_session_set_sampler(session, params), (void)0);
    OK(mor_session_prefill(session, &token, 1));
    WRONG_PARAMS(mor_generate_params,
                 (params->max_tokens = 1, mor_session_generate(session, params, NULL)), (void)0);
    OK(mor_session_rewind(session, 0));
    WRONG_INIT(mor_batch_params);
    WRONG_INIT(mor_batch_request);
    mor_batch *b = NULL;
    mor_batch_plan_info batch_plan;
    batch_plan.struct_size = sizeof batch_plan;
    size_t pages = 0;
    uint64_t sequence = 0;
    WRONG_PARAMS(mor_batch_params, mor_batch_plan(model, params, &batch_plan, NULL), (void)0);
    WRONG_PARAMS(mor_batch_params,
                 mor_batch_plan_in(model, params, 1, SIZE_MAX / 4, &batch_plan, NULL), (void)0);
    WRONG_PARAMS(mor_batch_params, mor_batch_pages_for(model, params, 1, &pages, NULL), (void)0);
    WRONG_PARAMS(mor_batch_params, mor_batch_create(model, params, &b, NULL), OK(mor_batch_free(b)));
    WRONG_PARAMS(mor_batch_request,
                 (params->prompt = &token, params->prompt_count = 1,
                  mor_batch_add(batch, params, &sequence)),
                 OK(mor_batch_remove(batch, sequence)));
    mor_batch_request request;
    OK(mor_batch_request_init(&request, sizeof request));
    request.prompt = &token;
    request.prompt_count = 1;
    WRONG_PARAMS(mor_sampler_params,
                 (request.sampler = params, mor_batch_add(batch, &request, &sequence)),
                 OK(mor_batch_remove(batch, sequence)));
    /* Bytes that later versions may make fields of. */
    mor_model_params load;
    OK(mor_model_params_init(&load, sizeof load));
    load.reserved[2] = 1;
    REFUSED(mor_model_load(path, &load, &m, NULL));
    mor_session_params ask;
    OK(mor_session_params_init(&ask, sizeof ask));
    ask.reserved[1] = 1;
    REFUSED(mor_session_create(model, &ask, &s, NULL));
    mor_batch_params ask_batch;
    OK(mor_batch_params_init(&ask_batch, sizeof ask_batch));
    ask_batch.reserved[5] = 1;
    REFUSED(mor_batch_create(model, &ask_batch, &b, NULL));
    request.sampler = NULL;
    OK(mor_batch_add(batch, &request, &sequence));
    OK(mor_batch_remove(batch, sequence));
    request.reserved[2] = 1;
    REFUSED(mor_batch_add(batch, &request, &sequence));
    /* Sizes that nobody has. */
    OK(mor_batch_params_init(&ask_batch, sizeof ask_batch));
    ask_batch.sequences = 0;
    REFUSED(mor_batch_pages_for(model, &ask_batch, 1, &pages, NULL));
    ask_batch.sequences = 1;
    ask_batch.context = SIZE_MAX;
    REFUSED(mor_batch_pages_for(model, &ask_batch, 1, &pages, NULL));
    WRONG_INFO(mor_batch_plan_info, mor_batch_plan(model, NULL, info, NULL));
    WRONG_INFO(mor_batch_plan_info, mor_batch_plan_in(model, NULL, 1, SIZE_MAX / 4, info, NULL));
    WRONG_INFO(mor_batch_counters_info, mor_batch_counters(batch, info));
    REFUSED(mor_batch_plan(model, NULL, NULL, NULL));
    REFUSED(mor_batch_counters(batch, NULL));
    WRONG_INFO(mor_model_info, mor_model_describe(model, info));
    WRONG_INFO(mor_tokenizer_info, mor_tokenizer_describe(tokenizer, info));
    WRONG_INFO(mor_session_plan_info, mor_session_plan(model, NULL, info, NULL));
    REFUSED(mor_model_describe(model, NULL));
    REFUSED(mor_tokenizer_describe(tokenizer, NULL));
    REFUSED(mor_session_plan(model, NULL, NULL, NULL));
}

/* --- Loading. ------------------------------------------------------------------------------------ */

static void wrong_files(void)
{
    mor_model *m = NULL;
    mor_error error;
    REFUSED(mor_model_load(NULL, NULL, &m, &error));
    REFUSED(mor_model_load(path, NULL, NULL, &error));
    REFUSED(mor_model_load(NULL, NULL, NULL, NULL));
    REFUSED(mor_model_load_memory(NULL, 100, NULL, &m, &error));
    REFUSED(mor_model_load_memory(file_bytes, file_size, NULL, NULL, &error));
    REFUSED(mor_model_load_memory(file_bytes, SIZE_MAX, NULL, &m, &error));
    REFUSED(mor_model_load_memory(file_bytes, SIZE_MAX / 2 + 1, NULL, &m, &error));
    STATUS(MOR_ERROR_FORMAT, mor_model_load_memory(file_bytes, 0, NULL, &m, &error));
    STATUS(MOR_ERROR_FORMAT, mor_model_load_memory(NULL, 0, NULL, &m, &error));
    STATUS(MOR_ERROR_IO, mor_model_load("", NULL, &m, &error));
    STATUS(MOR_ERROR_IO, mor_model_load("/nowhere/at/all", NULL, &m, &error));
    STATUS(MOR_ERROR_IO, mor_model_load("\xff\xfe\x80", NULL, &m, &error));
    FAILS(mor_model_load("/", NULL, &m, &error));
    STATUS(MOR_ERROR_UNSUPPORTED, mor_model_load("/dev/null", NULL, &m, &error));
    CHECK(error.status != MOR_OK && error.text[0] != '\0');
    static char endless[100000];
    memset(endless, 'a', sizeof endless - 1);
    STATUS(MOR_ERROR_IO, mor_model_load(endless, NULL, &m, &error));
    CHECK(strlen(error.text) < sizeof error.text);

    STATUS(MOR_ERROR_IO, mor_model_load_descriptor(-1, 0, 0, NULL, &m, &error));
    STATUS(MOR_ERROR_IO, mor_model_load_descriptor(INT32_MAX, 0, 0, NULL, &m, &error));
    int ends[2];
    CHECK(pipe(ends) == 0);
    STATUS(MOR_ERROR_UNSUPPORTED, mor_model_load_descriptor(ends[0], 0, 0, NULL, &m, &error));
    STATUS(MOR_ERROR_UNSUPPORTED, mor_model_load_descriptor(ends[1], 0, 100, NULL, &m, &error));
    close(ends[0]);
    close(ends[1]);
    STATUS(MOR_ERROR_IO, mor_model_load_descriptor(ends[0], 0, 0, NULL, &m, &error));
    int file = open(path, O_RDONLY);
    REFUSED(mor_model_load_descriptor(file, 0, 0, NULL, NULL, &error));
    FAILS(mor_model_load_descriptor(file, file_size, 0, NULL, &m, &error));
    FAILS(mor_model_load_descriptor(file, file_size + 4096, 0, NULL, &m, &error));
    FAILS(mor_model_load_descriptor(file, UINT64_MAX, 0, NULL, &m, &error));
    FAILS(mor_model_load_descriptor(file, UINT64_MAX, 2, NULL, &m, &error));
    FAILS(mor_model_load_descriptor(file, 1, UINT64_MAX, NULL, &m, &error));
    FAILS(mor_model_load_descriptor(file, 0, file_size + 1, NULL, &m, &error));
    FAILS(mor_model_load_descriptor(file, 1, file_size - 1, NULL, &m, &error));
    FAILS(mor_model_load_descriptor(file, 0, 100, NULL, &m, &error));
    OK(mor_model_load_descriptor(file, 0, file_size, NULL, &m, &error));
    CHECK(error.status == MOR_OK && error.text[0] == '\0');
    close(file);
    mor_model_free(m);
    m = NULL;

    /* Cut short, at many places. */
    for (size_t bytes = 1; bytes < file_size; bytes += bytes < 1000 ? 13 : file_size / 64)
        FAILS(mor_model_load_memory(file_bytes, bytes, NULL, &m, NULL));
    CHECK(m == NULL);
    /* At an address that no number can stand at. */
    static unsigned char shifted[sizeof file_bytes + 1];
    memcpy(shifted + 1, file_bytes, file_size);
    OK(mor_model_load_memory(shifted + 1, file_size, NULL, &m, NULL));
    mor_model_free(m);

    CHECK(mor_version() != NULL && mor_version()[0] != '\0');
    for (int32_t status = -3; status < 30; status++)
        CHECK(mor_status_text(status) != NULL && mor_status_text(status)[0] != '\0');
    CHECK(mor_status_text(INT32_MIN) != NULL && mor_status_text(INT32_MAX) != NULL);
}

static void wrong_metadata(const mor_model *model)
{
    char text[64];
    size_t bytes = 0;
    REFUSED(mor_model_metadata(model, NULL, text, sizeof text, &bytes));
    REFUSED(mor_model_metadata(model, "general.architecture", text, sizeof text, NULL));
    REFUSED(mor_model_metadata(model, "general.architecture", NULL, 5, &bytes));
    REFUSED(mor_model_metadata(model, "general.architecture", text, SIZE_MAX, &bytes));
    REFUSED(mor_model_metadata(model, "no such key", text, sizeof text, &bytes));
    REFUSED(mor_model_metadata(model, "tokenizer.ggml.tokens", text, sizeof text, &bytes));
    REFUSED(mor_model_metadata(model, "\xff", text, sizeof text, &bytes));
    CHECK(bytes == 0);
    STATUS(MOR_ERROR_BUFFER_TOO_SMALL,
           mor_model_metadata(model, "general.architecture", NULL, 0, &bytes));
    CHECK(bytes == 3);
    STATUS(MOR_ERROR_BUFFER_TOO_SMALL,
           mor_model_metadata(model, "general.architecture", text, 3, &bytes));
    OK(mor_model_metadata(model, "general.architecture", text, 4, &bytes));
    CHECK(strcmp(text, "mor") == 0);
}

/* --- Tokenizing. --------------------------------------------------------------------------------- */

static void wrong_texts(mor_tokenizer *t, const mor_model *model)
{
    uint32_t tokens[64];
    char text[64];
    const char *bytes = NULL;
    size_t count = 0;
    bool end = false;
    mor_tokenizer *other = NULL;
    REFUSED(mor_tokenizer_create(model, NULL, NULL, NULL));
    mor_tokenizer_params params;
    OK(mor_tokenizer_params_init(&params, sizeof params));
    params.max_piece_bytes = SIZE_MAX;
    FAILS(mor_tokenizer_create(model, &params, &other, NULL));
    params.max_piece_bytes = SIZE_MAX / 29;
    FAILS(mor_tokenizer_create(model, &params, &other, NULL));
    params.max_piece_bytes = 0;
    if (mor_tokenizer_create(model, &params, &other, NULL) == MOR_OK) {
        (void)mor_tokenizer_encode(other, "Hello", 5, 0, tokens, 64, &count);
        OK(mor_tokenizer_free(other));
    }

    REFUSED(mor_tokenizer_encode(t, NULL, 5, 0, tokens, 64, &count));
    REFUSED(mor_tokenizer_encode(t, NULL, MOR_ZERO_TERMINATED, 0, tokens, 64, &count));
    REFUSED(mor_tokenizer_encode(t, "Hello", 5, 0, NULL, 64, &count));
    REFUSED(mor_tokenizer_encode(t, "Hello", 5, 0, tokens, 64, NULL));
    REFUSED(mor_tokenizer_encode(t, "Hello", 5, 0xfffffffc, tokens, 64, &count));
    REFUSED(mor_tokenizer_encode(t, "Hello", 5, 0, tokens, SIZE_MAX, &count));
    REFUSED(mor_tokenizer_encode(t, "Hello", 5, 0, (uint32_t *)(void *)(text + 1), 4, &count));
    REFUSED(mor_tokenizer_encode(t, "Hello", SIZE_MAX - 1, 0, tokens, 64, &count));
    REFUSED(mor_tokenizer_encode(t, "Hello", SIZE_MAX / 2 + 1, 0, tokens, 64, &count));
    REFUSED(mor_tokenizer_encode(t, "\xff", 1, 0, tokens, 64, &count));
    REFUSED(mor_tokenizer_encode(t, "ab\xc3", 3, 0, tokens, 64, &count));         /* cut short */
    REFUSED(mor_tokenizer_encode(t, "\xc0\xaf", 2, 0, tokens, 64, &count));       /* overlong */
    REFUSED(mor_tokenizer_encode(t, "\xed\xa0\x80", 3, 0, tokens, 64, &count));   /* surrogate */
    REFUSED(mor_tokenizer_encode(t, "\xf4\x90\x80\x80", 4, 0, tokens, 64, &count)); /* too high */
    CHECK(count == 0 && mor_tokenizer_last_error(t)[0] != '\0');
    OK(mor_tokenizer_encode(t, "", 0, 0, tokens, 64, &count));
    CHECK(count == 0 && mor_tokenizer_last_error(t)[0] == '\0');
    OK(mor_tokenizer_encode(t, NULL, 0, 0, NULL, 0, &count));
    OK(mor_tokenizer_encode(t, "a\0b", 3, 0, tokens, 64, &count)); /* a zero byte is text here */
    STATUS(MOR_ERROR_BUFFER_TOO_SMALL, mor_tokenizer_encode(t, "It is a truth", 13, 0, tokens, 1,
                                                            &count));
    CHECK(count > 1 && count < 64);
    static char word[1u << 20];
    memset(word, 'a', sizeof word - 1);
    REFUSED(mor_tokenizer_encode(t, word, MOR_ZERO_TERMINATED, 0, tokens, 64, &count));
    static char words[1u << 20];
    for (size_t i = 0; i < sizeof words - 1; i++)
        words[i] = i % 6 == 5 ? ' ' : 'b';
    STATUS(MOR_ERROR_BUFFER_TOO_SMALL,
           mor_tokenizer_encode(t, words, MOR_ZERO_TERMINATED, 0, NULL, 0, &count));

    tokens[0] = 5;
    tokens[1] = UINT32_MAX;
    REFUSED(mor_tokenizer_decode(t, NULL, 1, 0, text, sizeof text, &count));
    REFUSED(mor_tokenizer_decode(t, tokens, 1, 0, NULL, 5, &count));
    REFUSED(mor_tokenizer_decode(t, tokens, 1, 0, text, sizeof text, NULL));
    REFUSED(mor_tokenizer_decode(t, tokens, 1, 6, text, sizeof text, &count));
    REFUSED(mor_tokenizer_decode(t, tokens, SIZE_MAX, 0, text, sizeof text, &count));
    REFUSED(mor_tokenizer_decode(t, tokens, 1, 0, text, SIZE_MAX, &count));
    REFUSED(mor_tokenizer_decode(t, tokens, 2, 0, text, sizeof text, &count)); /* no such token */
    REFUSED(mor_tokenizer_decode(t, (uint32_t *)(void *)(text + 1), 1, 0, text, sizeof text, &count));
    OK(mor_tokenizer_decode(t, NULL, 0, 0, text, sizeof text, &count));
    CHECK(count == 0 && text[0] == '\0');
    STATUS(MOR_ERROR_BUFFER_TOO_SMALL, mor_tokenizer_decode(t, NULL, 0, 0, NULL, 0, &count));

    /* Of "é" as two tokens: half a character stays in the stream until the other half comes. */
    mor_decode_stream stream = {{0}, 0}, damaged = {{1, 2, 3, 4}, 4};
    size_t halves = 0;
    OK(mor_tokenizer_encode(t, "\xc3\xa9", 2, 0, tokens, 64, &halves));
    REFUSED(mor_tokenizer_decode_next(t, NULL, 5, 0, text, sizeof text, &count));
    REFUSED(mor_tokenizer_decode_next(t, &stream, 5, 0, NULL, 5, &count));
    REFUSED(mor_tokenizer_decode_next(t, &stream, 5, 0, text, SIZE_MAX, &count));
    REFUSED(mor_tokenizer_decode_next(t, &stream, 5, 0, text, sizeof text, NULL));
    REFUSED(mor_tokenizer_decode_next(t, &stream, 5, 2, text, sizeof text, &count));
    REFUSED(mor_tokenizer_decode_next(t, &damaged, 5, 0, text, sizeof text, &count));
    REFUSED(mor_tokenizer_decode_end(t, &damaged, text, sizeof text, &count));
    REFUSED(mor_tokenizer_decode_end(t, NULL, text, sizeof text, &count));
    REFUSED(mor_tokenizer_decode_end(t, &stream, text, sizeof text, NULL));
    OK(mor_tokenizer_decode_next(t, &stream, UINT32_MAX, 0, text, sizeof text, &count)); /* no text */
    CHECK(count == 0 && text[0] == '\0' && stream.pending_count == 0);
    for (size_t i = 0; i < halves; i++) {
        mor_decode_stream before = stream;
        STATUS(MOR_ERROR_BUFFER_TOO_SMALL, mor_tokenizer_decode_next(t, &stream, tokens[i], 0, NULL, 0, &count));
        CHECK(memcmp(&before, &stream, sizeof stream) == 0);
        OK(mor_tokenizer_decode_next(t, &stream, tokens[i], 0, text, sizeof text, &count));
    }
    CHECK(stream.pending_count == 0 && strcmp(text, "\xc3\xa9") == 0);
    OK(mor_tokenizer_decode_next(t, &stream, tokens[0], 0, text, sizeof text, &count));
    STATUS(MOR_ERROR_BUFFER_TOO_SMALL, mor_tokenizer_decode_end(t, &stream, text, 2, &count));
    OK(mor_tokenizer_decode_end(t, &stream, text, sizeof text, &count));
    CHECK(halves == 1 || (count == 3 && strcmp(text, "\xef\xbf\xbd") == 0));

    tokens[0] = 5;
    REFUSED(mor_tokenizer_token_bytes(t, UINT32_MAX, 0, &bytes, &count));
    REFUSED(mor_tokenizer_token_bytes(t, 5, 2, &bytes, &count));
    REFUSED(mor_tokenizer_token_bytes(t, 5, 0, NULL, &count));
    REFUSED(mor_tokenizer_token_bytes(t, 5, 0, &bytes, NULL));
    REFUSED(mor_tokenizer_is_end(t, 5, NULL));
    OK(mor_tokenizer_is_end(t, UINT32_MAX, &end));
    CHECK(!end);

    mor_chat_message turns[2] = {{"user", "Hello"}, {NULL, NULL}};
    mor_chat_message not_utf8 = {"user", "\xff"};
    REFUSED(mor_tokenizer_format_chat(t, NULL, 1, true, text, sizeof text, &count));
    REFUSED(mor_tokenizer_format_chat(t, turns, 1, true, text, sizeof text, NULL));
    REFUSED(mor_tokenizer_format_chat(t, turns, SIZE_MAX, true, text, sizeof text, &count));
    REFUSED(mor_tokenizer_format_chat(t, turns, 2, true, text, sizeof text, &count));
    REFUSED(mor_tokenizer_format_chat(t, &not_utf8, 1, true, text, sizeof text, &count));
    /* The default model has no template. */
    STATUS(MOR_ERROR_TEMPLATE, mor_tokenizer_format_chat(t, turns, 1, true, text, sizeof text, &count));
    FAILS(mor_tokenizer_format_chat(t, turns, 1, true, NULL, 5, &count));
    (void)mor_tokenizer_format_chat(t, turns, 0, true, text, sizeof text, &count);
    OK(mor_tokenizer_encode(t, "Hello", 5, 0, tokens, 64, &count));
}

/* --- Sessions. ----------------------------------------------------------------------------------- */

static void wrong_plans(const mor_model *model)
{
    mor_session_plan_info plan;
    plan.struct_size = sizeof plan;
    mor_session *s = NULL;
    mor_error error;
    mor_session_params params;
#define WITH(set)                                                                        \
    do {                                                                                 \
        OK(mor_session_params_init(&params, sizeof params));                             \
        params.set;                                                                      \
        FAILS(mor_session_create(model, &params, &s, &error));                           \
        CHECK(error.status != MOR_OK && error.text[0] != '\0' && s == NULL);             \
    } while (0)
    WITH(context = SIZE_MAX);
    WITH(context = SIZE_MAX / 2);
    WITH(context = (size_t)1 << 50);
    WITH(threads = UINT32_MAX);
    WITH(kv_type = 99);
    WITH(logit_rows = SIZE_MAX);
    WITH(niceness = 1000);
    WITH(niceness = INT32_MIN);
#undef WITH
    /* More than can be used is as much as can be used; or it is refused. */
#define WITH(set)                                                                        \
    do {                                                                                 \
        OK(mor_session_params_init(&params, sizeof params));                             \
        params.set;                                                                      \
        mor_status status = mor_session_create(model, &params, &s, &error);              \
        CHECK((status == MOR_OK) == (s != NULL) && error.status == status);              \
        OK(mor_session_free(s));                                                         \
        s = NULL;                                                                        \
    } while (0)
    WITH(batch = SIZE_MAX);
    WITH(batch = SIZE_MAX / 4096);
    WITH(kv_pages = SIZE_MAX);
    WITH(kv_pages = SIZE_MAX / 16);
    WITH(kv_pages = 1);
#undef WITH
    uint32_t cpus[1] = {5000};
    OK(mor_session_params_init(&params, sizeof params));
    params.cpus = cpus;
    params.cpu_count = 1;
    REFUSED(mor_session_create(model, &params, &s, &error));
    params.cpu_count = SIZE_MAX;
    REFUSED(mor_session_create(model, &params, &s, &error));
    params.cpu_count = SIZE_MAX / 4;
    REFUSED(mor_session_plan(model, &params, &plan, &error));

    OK(mor_session_params_init(&params, sizeof params));
    params.threads = 1;
    params.context = CONTEXT;
    OK(mor_session_plan(model, &params, &plan, &error));
    static _Alignas(64) unsigned char memory[4u << 20];
    CHECK(plan.bytes <= sizeof memory && plan.alignment <= 64);
    REFUSED(mor_session_create(model, &params, NULL, &error));
    REFUSED(mor_session_create_in(model, &params, NULL, sizeof memory, &s, &error));
    REFUSED(mor_session_create_in(model, &params, memory + 1, sizeof memory - 1, &s, &error));
    REFUSED(mor_session_create_in(model, &params, memory, sizeof memory, NULL, &error));
    REFUSED(mor_session_create_in(model, &params, memory, SIZE_MAX, &s, &error));
    REFUSED(mor_session_create_in(model, &params, memory, SIZE_MAX / 2 + 1, &s, &error));
    STATUS(MOR_ERROR_BUFFER_TOO_SMALL,
           mor_session_create_in(model, &params, memory, plan.bytes - 1, &s, &error));
    STATUS(MOR_ERROR_BUFFER_TOO_SMALL, mor_session_create_in(model, &params, memory, 0, &s, &error));
    CHECK(s == NULL);
    /* Exactly enough; what lies behind is not touched. */
    memset(memory, 0xa5, sizeof memory);
    OK(mor_session_create_in(model, &params, memory, plan.bytes, &s, &error));
    uint32_t tokens[CONTEXT];
    for (size_t i = 0; i < CONTEXT; i++)
        tokens[i] = (uint32_t)(5 + i);
    OK(mor_session_prefill(s, tokens, CONTEXT));
    OK(mor_session_free(s));
    for (size_t i = plan.bytes; i < sizeof memory; i++)
        if (memory[i] != 0xa5) {
            CHECK(!"the session wrote behind its memory");
            break;
        }
    /* Freed, and its memory still there: each call can tell. */
    every_session_call(s, MOR_ERROR_INVALID_ARGUMENT, false);
    /* The memory serves for the next one. */
    OK(mor_session_create_in(model, &params, memory, sizeof memory, &s, &error));
    OK(mor_session_free(s));
}

static void wrong_order_and_counts(mor_session *s)
{
    uint32_t tokens[CONTEXT + 1];
    for (size_t i = 0; i <= CONTEXT; i++)
        tokens[i] = (uint32_t)(5 + i);
    uint8_t depths[4];
    uint64_t counts[256];
    const float *logits = NULL;
    float numbers[4];
    size_t size = 0;
    uint32_t token = 0;
    char misplaced[64];

    /* Before any token. */
    STATUS(MOR_ERROR_NOT_READY, mor_session_logits(s, &logits, &size));
    STATUS(MOR_ERROR_NOT_READY, mor_session_sample(s, &token));
    STATUS(MOR_ERROR_NOT_READY, mor_session_generate(s, NULL, NULL));
    CHECK(mor_session_last_error(s)[0] != '\0');
    REFUSED(mor_session_tokens(s, 0, 1, tokens));
    REFUSED(mor_session_depths(s, 0, 1, depths));
    REFUSED(mor_session_rewind(s, 1));
    OK(mor_session_rewind(s, 0));
    CHECK(mor_session_last_error(s)[0] == '\0');

    REFUSED(mor_session_prefill(s, NULL, 4));
    REFUSED(mor_session_prefill(s, tokens, 0));
    REFUSED(mor_session_prefill(s, NULL, 0));
    /* More than any context: never read. */
    STATUS(MOR_ERROR_CONTEXT_FULL, mor_session_prefill(s, tokens, SIZE_MAX));
    STATUS(MOR_ERROR_CONTEXT_FULL, mor_session_prefill(s, tokens, SIZE_MAX / 4));
    STATUS(MOR_ERROR_CONTEXT_FULL, mor_session_prefill(s, tokens, SIZE_MAX / 16));
    REFUSED(mor_session_prefill(s, (uint32_t *)(void *)(misplaced + 1), 2));
    STATUS(MOR_ERROR_CONTEXT_FULL, mor_session_prefill(s, tokens, CONTEXT + 1));
    tokens[1] = UINT32_MAX;
    REFUSED(mor_session_prefill(s, tokens, 3));
    REFUSED(mor_session_step(s, UINT32_MAX, &logits));
    REFUSED(mor_session_step(s, UINT32_MAX, NULL));
    tokens[1] = 6;
    OK(mor_session_length(s, &size));
    CHECK(size == 0 && logits == NULL);

    REFUSED(mor_session_prefill_whole(s, NULL, 4, &size));
    REFUSED(mor_session_prefill_whole(s, tokens, 0, &size));
    STATUS(MOR_ERROR_CONTEXT_FULL, mor_session_prefill_whole(s, tokens, SIZE_MAX, &size));
    STATUS(MOR_ERROR_CONTEXT_FULL, mor_session_prefill_whole(s, tokens, CONTEXT + 1, NULL));
    OK(mor_session_prefill_whole(s, tokens, 3, NULL));
    OK(mor_session_prefill_whole(s, tokens, 4, &size));
    CHECK(size == 3);
    REFUSED(mor_session_log_probabilities(s, NULL, 4, numbers));
    REFUSED(mor_session_log_probabilities(s, tokens, 0, numbers));
    REFUSED(mor_session_log_probabilities(s, tokens, 4, NULL));
    REFUSED(mor_session_log_probabilities(s, tokens, 1, (float *)(void *)(misplaced + 1)));
    STATUS(MOR_ERROR_CONTEXT_FULL, mor_session_log_probabilities(s, tokens, SIZE_MAX, numbers));
    STATUS(MOR_ERROR_CONTEXT_FULL, mor_session_log_probabilities(s, tokens, CONTEXT, numbers));
    OK(mor_session_length(s, &size));
    CHECK(size == 4);
    numbers[1] = 1;
    OK(mor_session_log_probabilities(s, tokens, 1, numbers));
    CHECK(numbers[0] < 0 && numbers[1] > 0);
    OK(mor_session_rewind(s, 4));
    STATUS(MOR_ERROR_NOT_READY, mor_session_log_probabilities(s, tokens, 1, numbers));
    OK(mor_session_prefill_whole(s, tokens, 4, &size));
    REFUSED(mor_session_logits(s, NULL, &size));
    OK(mor_session_logits(s, &logits, NULL));
    REFUSED(mor_session_sample(s, NULL));
    REFUSED(mor_session_length(s, NULL));
    REFUSED(mor_session_kv_bytes_used(s, NULL));
    REFUSED(mor_session_tokens(s, 0, 1, NULL));
    REFUSED(mor_session_tokens(s, 4, 1, tokens));
    REFUSED(mor_session_tokens(s, SIZE_MAX, 1, tokens));
    REFUSED(mor_session_tokens(s, 1, SIZE_MAX, tokens));
    REFUSED(mor_session_tokens(s, SIZE_MAX, SIZE_MAX, tokens));
    OK(mor_session_tokens(s, 4, 0, NULL));
    REFUSED(mor_session_depths(s, 0, 1, NULL));
    REFUSED(mor_session_depths(s, 1, SIZE_MAX, depths));
    OK(mor_session_depths(s, 0, 4, depths));
    REFUSED(mor_session_depth_histogram(s, NULL, 256));
    STATUS(MOR_ERROR_BUFFER_TOO_SMALL, mor_session_depth_histogram(s, counts, 0));
    STATUS(MOR_ERROR_BUFFER_TOO_SMALL, mor_session_depth_histogram(s, NULL, 0));
    STATUS(MOR_ERROR_BUFFER_TOO_SMALL, mor_session_depth_histogram(s, counts, 1));
    REFUSED(mor_session_rewind(s, 5));
    REFUSED(mor_session_rewind(s, SIZE_MAX));

    REFUSED(mor_session_set_cut(s, NAN));
    REFUSED(mor_session_set_cut(s, -0.1f));
    REFUSED(mor_session_set_cut(s, 1.1f));
    REFUSED(mor_session_set_cut(s, INFINITY));
    REFUSED(mor_session_set_depth_limit(s, 0));
    REFUSED(mor_session_set_depth_limit(s, UINT32_MAX));
    REFUSED(mor_session_set_routing(s, 2));
    REFUSED(mor_session_set_routing(s, UINT32_MAX));
    OK(mor_session_set_time_budget(s, UINT64_MAX));
    OK(mor_session_set_time_budget(s, 0));

    mor_sampler_params sampler;
#define WITH(set)                                                \
    do {                                                         \
        OK(mor_sampler_params_init(&sampler, sizeof sampler));   \
        sampler.set;                                             \
        REFUSED(mor_session_set_sampler(s, &sampler));           \
    } while (0)
    WITH(temperature = NAN);
    WITH(temperature = -1);
    WITH(temperature = INFINITY);
    WITH(top_p = NAN);
    WITH(top_p = -1);
    WITH(top_p = 2);
    WITH(min_p = NAN);
    WITH(min_p = 2);
    WITH(repeat_penalty = NAN);
    WITH(repeat_penalty = 0);
    WITH(repeat_penalty = -1);
#undef WITH
    OK(mor_sampler_params_init(&sampler, sizeof sampler));
    sampler.top_k = UINT32_MAX;
    sampler.repeat_last_n = UINT32_MAX;
    sampler.repeat_penalty = 1.1f;
    OK(mor_session_set_sampler(s, &sampler));
    OK(mor_session_sample(s, &token));

    /* Stop strings. */
    mor_generate_params generate;
    static char endless[1100];
    memset(endless, 'x', 1025);
    const char *stops[2] = {endless, NULL};
    OK(mor_generate_params_init(&generate, sizeof generate));
    generate.max_tokens = 2;
    generate.callback = ignore;
    generate.stop = stops;
    generate.stop_count = 1;
    REFUSED(mor_session_generate(s, &generate, NULL));
    endless[1024] = '\0';
    OK(mor_session_generate(s, &generate, NULL));
    stops[0] = "\xff";
    REFUSED(mor_session_generate(s, &generate, NULL));
    generate.stop_count = 2;
    stops[0] = "fine";
    REFUSED(mor_session_generate(s, &generate, NULL));
    generate.stop_count = SIZE_MAX;
    REFUSED(mor_session_generate(s, &generate, NULL));
    generate.stop_count = 1;
    stops[0] = "";
    mor_status empty = mor_session_generate(s, &generate, NULL);
    CHECK(empty == MOR_OK || empty == MOR_ERROR_INVALID_ARGUMENT);
    generate.stop_count = 0;
    generate.max_tokens = 0;
    mor_finish finish = MOR_FINISH_END;
    OK(mor_session_generate(s, &generate, &finish));
    CHECK(finish == MOR_FINISH_LENGTH);

    /* Full. */
    OK(mor_session_rewind(s, 0));
    STATUS(MOR_ERROR_NOT_READY, mor_session_sample(s, &token));
    OK(mor_session_prefill(s, tokens, CONTEXT));
    STATUS(MOR_ERROR_CONTEXT_FULL, mor_session_step(s, 5, &logits));
    OK(mor_session_length(s, &size));
    CHECK(size == CONTEXT);
    OK(mor_session_generate(s, NULL, &finish));
    CHECK(finish == MOR_FINISH_CONTEXT_FULL);
    OK(mor_session_rewind(s, 8));
    OK(mor_session_step(s, 5, NULL));

    /* Cancelled before it begins. */
    OK(mor_session_cancel(s));
    STATUS(MOR_ERROR_CANCELLED, mor_session_step(s, 5, NULL));
    OK(mor_session_length(s, &size));
    CHECK(size == 9);
    OK(mor_session_step(s, 5, NULL));
    OK(mor_session_cancel(s));
    OK(mor_session_reset_cancel(s));
    OK(mor_session_step(s, 5, NULL));
    OK(mor_session_set_sampler(s, NULL));
    OK(mor_session_rewind(s, 0));
}

static void wrong_states(mor_session *s, mor_session *other_kind)
{
    uint32_t tokens[8] = {5, 6, 7, 8, 9, 10, 11, 12};
    size_t size = 0, written = 0;
    OK(mor_session_prefill(s, tokens, 8));
    REFUSED(mor_session_save_size(s, NULL));
    OK(mor_session_save_size(s, &size));
    CHECK(size <= sizeof state_bytes);
    REFUSED(mor_session_save(s, NULL, 100, &written));
    REFUSED(mor_session_save(s, state_bytes, SIZE_MAX, &written));
    STATUS(MOR_ERROR_BUFFER_TOO_SMALL, mor_session_save(s, NULL, 0, &written));
    CHECK(written == size);
    STATUS(MOR_ERROR_BUFFER_TOO_SMALL, mor_session_save(s, state_bytes, size - 1, NULL));
    OK(mor_session_save(s, state_bytes, size, NULL));
    REFUSED(mor_session_restore(s, NULL, 100));
    REFUSED(mor_session_restore(s, state_bytes, SIZE_MAX));
    STATUS(MOR_ERROR_STATE, mor_session_restore(s, NULL, 0));
    STATUS(MOR_ERROR_STATE, mor_session_restore(s, state_bytes, size + 1));
    STATUS(MOR_ERROR_STATE, mor_session_restore(other_kind, state_bytes, size));
    for (size_t bytes = 0; bytes < size; bytes += bytes < 300 ? 1 : 997)
        STATUS(MOR_ERROR_STATE, mor_session_restore(s, state_bytes, bytes));
    /* Every byte of the beginning, damaged in turn; a key or value cannot be told from another. */
    for (size_t i = 0; i < size; i += i < 300 ? 1 : 997) {
        state_bytes[i] ^= 0x81;
        mor_status status = mor_session_restore(s, state_bytes, size);
        CHECK(status == MOR_OK || status == MOR_ERROR_STATE || status == MOR_ERROR_CONTEXT_FULL ||
              status == MOR_ERROR_KV_FULL);
        state_bytes[i] ^= 0x81;
    }
    OK(mor_session_restore(s, state_bytes, size));
    OK(mor_session_step(s, 5, NULL));
    OK(mor_session_rewind(s, 0));
}

/* --- Batches. ------------------------------------------------------------------------------------ */

static void wrong_batch_plans(const mor_model *model)
{
    mor_batch *b = NULL;
    mor_error error;
    mor_batch_params params;
    mor_batch_plan_info plan;
    plan.struct_size = sizeof plan;
#define WITH(set)                                                                        \
    do {                                                                                 \
        OK(mor_batch_params_init(&params, sizeof params));                               \
        params.set;                                                                      \
        FAILS(mor_batch_create(model, &params, &b, &error));                             \
        CHECK(error.status != MOR_OK && error.text[0] != '\0' && b == NULL);             \
    } while (0)
    WITH(context = SIZE_MAX);
    WITH(context = (size_t)1 << 50);
    WITH(sequences = 0);
    WITH(sequences = SIZE_MAX);
    WITH(sequences = SIZE_MAX / 4096);
    WITH(sequences = (size_t)1 << 20);
    WITH(logit_rows = SIZE_MAX);
    WITH(threads = UINT32_MAX);
    WITH(kv_type = 99);
    WITH(pressure = 2);
    WITH(pressure = UINT32_MAX);
    WITH(niceness = 1000);
#undef WITH
    /* As much as can be used, or refused. */
#define WITH(set)                                                                        \
    do {                                                                                 \
        OK(mor_batch_params_init(&params, sizeof params));                               \
        params.set;                                                                      \
        mor_status status = mor_batch_create(model, &params, &b, &error);                \
        CHECK((status == MOR_OK) == (b != NULL) && error.status == status);              \
        OK(mor_batch_free(b));                                                           \
        b = NULL;                                                                        \
    } while (0)
    WITH(rows = SIZE_MAX);
    WITH(kv_pages = SIZE_MAX);
    WITH(kv_pages = 1);
#undef WITH
    uint32_t cpus[1] = {5000};
    OK(mor_batch_params_init(&params, sizeof params));
    params.cpus = cpus;
    params.cpu_count = 1;
    REFUSED(mor_batch_create(model, &params, &b, &error));
    params.cpu_count = SIZE_MAX;
    REFUSED(mor_batch_plan(model, &params, &plan, &error));
    REFUSED(mor_batch_create(model, NULL, NULL, &error));

    size_t pages = 0;
    const double no_depths[] = {NAN, INFINITY, -0.1, -INFINITY, 65, 1e300};
    for (size_t i = 0; i < sizeof no_depths / sizeof no_depths[0]; i++) {
        REFUSED(mor_batch_pages_for(model, NULL, no_depths[i], &pages, &error));
        REFUSED(mor_batch_plan_in(model, NULL, no_depths[i], SIZE_MAX / 4, &plan, &error));
    }
    REFUSED(mor_batch_pages_for(model, NULL, 1, NULL, &error));
    REFUSED(mor_batch_plan_in(model, NULL, 1, 0, &plan, &error));
    REFUSED(mor_batch_plan_in(model, NULL, 1, 1000, &plan, &error));
    CHECK(pages == 0);
    OK(mor_batch_plan_in(model, NULL, 1, SIZE_MAX, &plan, &error));
    OK(mor_batch_plan_in(model, NULL, 1, (size_t)64 << 20, &plan, &error));
    CHECK(plan.bytes <= (size_t)64 << 20 && plan.sequences >= 1);
}

/* Ticks until there is nothing to run. */
static void run(mor_batch *b)
{
    const mor_batch_event *events = NULL;
    size_t count = 0;
    bool idle = false;
    for (int i = 0; i < 10000 && !idle; i++) {
        OK(mor_batch_tick(b, &events, &count));
        for (size_t e = 0; e < count; e++)
            CHECK((unsigned)events[e].kind <= MOR_EVENT_FINISHED && events[e].sequence != 0);
        OK(mor_batch_is_idle(b, &idle));
    }
    CHECK(idle);
}

/* A batch for `CONTEXT` tokens and 3 sequences, with nothing in it; another with one. */
static void wrong_requests(mor_batch *b, const mor_model *model)
{
    uint32_t tokens[CONTEXT + 1];
    for (size_t i = 0; i <= CONTEXT; i++)
        tokens[i] = (uint32_t)(5 + i);
    char misplaced[64];
    uint8_t depths[CONTEXT];
    uint64_t made = 0;
    size_t count = 0, used = 0;
    mor_batch_request request;
#define WITH(wanted, set)                                                                \
    do {                                                                                 \
        OK(mor_batch_request_init(&request, sizeof request));                            \
        request.prompt = tokens;                                                         \
        request.prompt_count = 4;                                                        \
        request.max_tokens = 4;                                                          \
        request.set;                                                                     \
        STATUS(wanted, mor_batch_add(b, &request, &made));                               \
    } while (0)
    mor_sampler_params sampler;
    OK(mor_sampler_params_init(&sampler, sizeof sampler));
    sampler.temperature = NAN;
    WITH(MOR_ERROR_INVALID_ARGUMENT, sampler = &sampler);
    WITH(MOR_ERROR_INVALID_ARGUMENT, prompt = NULL);
    WITH(MOR_ERROR_INVALID_ARGUMENT, prompt_count = 0);
    WITH(MOR_ERROR_INVALID_ARGUMENT, prompt = (uint32_t *)(void *)(misplaced + 1));
    /* More than any context: never read. */
    WITH(MOR_ERROR_CONTEXT_FULL, prompt_count = SIZE_MAX);
    WITH(MOR_ERROR_CONTEXT_FULL, prompt_count = SIZE_MAX / 16);
    WITH(MOR_ERROR_CONTEXT_FULL, prompt_count = CONTEXT + 1);
    WITH(MOR_ERROR_INVALID_ARGUMENT, cut = NAN);
    WITH(MOR_ERROR_INVALID_ARGUMENT, cut = 1.1f);
    WITH(MOR_ERROR_INVALID_ARGUMENT, cut = INFINITY);
    WITH(MOR_ERROR_INVALID_ARGUMENT, depth_limit = 65);
    WITH(MOR_ERROR_INVALID_ARGUMENT, depth_limit = UINT32_MAX);
    tokens[2] = UINT32_MAX;
    WITH(MOR_ERROR_INVALID_ARGUMENT, priority = 0);
    tokens[2] = 7;
    REFUSED(mor_batch_add(b, NULL, &made));
    CHECK(made == 0 && mor_batch_last_error(b)[0] != '\0');
    bool idle = false;
    OK(mor_batch_is_idle(b, &idle));
    CHECK(idle);

    /* As many as there are places for. */
    uint64_t all[3];
    WITH(MOR_OK, cut = -INFINITY);
    all[0] = made;
    WITH(MOR_OK, max_tokens = 0);
    all[1] = made;
    WITH(MOR_OK, max_tokens = SIZE_MAX);
    all[2] = made;
    CHECK(mor_batch_last_error(b)[0] == '\0');
    made = 0;
    WITH(MOR_ERROR_NOT_READY, priority = INT32_MAX);
    STATUS(MOR_ERROR_NOT_READY, mor_batch_fork(b, all[0], 1, &request, &made));
    REFUSED(mor_batch_add(b, &request, NULL));
    CHECK(made == 0);
#undef WITH

    mor_sequence_status where = MOR_SEQUENCE_FINISHED;
    mor_finish finish = MOR_FINISH_CALLBACK;
    mor_error failure;
    const mor_batch_event *events = NULL;
    REFUSED(mor_batch_tick(b, NULL, &count));
    REFUSED(mor_batch_tick(b, &events, NULL));
    REFUSED(mor_batch_sequence_status(b, all[0], NULL, &finish));
    REFUSED(mor_batch_failure(b, all[0], NULL));
    REFUSED(mor_batch_is_idle(b, NULL));
    REFUSED(mor_batch_kv_bytes_used(b, NULL));
    OK(mor_batch_sequence_status(b, all[0], &where, &finish));
    CHECK(where == MOR_SEQUENCE_WAITING && finish == MOR_FINISH_CALLBACK); /* nothing was run */
    run(b);
    OK(mor_batch_sequence_status(b, all[1], &where, &finish));
    CHECK(where == MOR_SEQUENCE_FINISHED && finish == MOR_FINISH_LENGTH);
    OK(mor_batch_failure(b, all[1], &failure));
    CHECK(failure.status == MOR_OK && failure.text[0] == '\0');

    STATUS(MOR_ERROR_BUFFER_TOO_SMALL, mor_batch_tokens(b, all[1], NULL, 0, &count));
    CHECK(count == 4);
    STATUS(MOR_ERROR_BUFFER_TOO_SMALL, mor_batch_depths(b, all[1], depths, 3, &count));
    REFUSED(mor_batch_tokens(b, all[1], tokens, CONTEXT, NULL));
    REFUSED(mor_batch_tokens(b, all[1], NULL, 4, &count));
    REFUSED(mor_batch_tokens(b, all[1], tokens, SIZE_MAX, &count));
    REFUSED(mor_batch_tokens(b, all[1], (uint32_t *)(void *)(misplaced + 1), 4, &count));
    REFUSED(mor_batch_depths(b, all[1], depths, SIZE_MAX, &count));
    OK(mor_batch_tokens(b, all[1], tokens, 4, &count));
    OK(mor_batch_depths(b, all[1], depths, CONTEXT, &count));
    CHECK(count == 4 && tokens[3] == 8);

    /* Stopped when it is done; resumed when it does not stand still: nothing happens. */
    OK(mor_batch_stop(b, all[1]));
    OK(mor_batch_resume(b, all[1]));
    OK(mor_batch_sequence_status(b, all[1], &where, &finish));
    CHECK(where == MOR_SEQUENCE_FINISHED && finish == MOR_FINISH_LENGTH);
    OK(mor_batch_remove(b, all[0]));
    every_sequence_call(b, all[0]); /* removed */
    OK(mor_batch_request_init(&request, sizeof request));
    request.max_tokens = 1;
    REFUSED(mor_batch_fork(b, all[1], 5, &request, &made));
    REFUSED(mor_batch_fork(b, all[1], SIZE_MAX, &request, &made));
    REFUSED(mor_batch_fork(b, all[1], 0, &request, &made));
    request.cut = 0.25f;
    REFUSED(mor_batch_fork(b, all[1], 4, &request, &made));
    request.cut = -1;
    request.prompt = tokens;
    request.prompt_count = CONTEXT;
    STATUS(MOR_ERROR_CONTEXT_FULL, mor_batch_fork(b, all[1], 1, &request, &made));
    request.prompt_count = 0;
    OK(mor_batch_fork(b, all[1], 4, &request, &made));
    CHECK(made != all[0]); /* in the same place, by another number */
    every_sequence_call(b, all[0]);
    OK(mor_batch_stop(b, made));
    OK(mor_batch_sequence_status(b, made, &where, &finish));
    CHECK(where == MOR_SEQUENCE_FINISHED && finish == MOR_FINISH_STOPPED);

    /* Numbers that are none, and a number of another batch. */
    const uint64_t none[] = {0, 1, made + 1, made + (1 << 20), UINT64_MAX, UINT64_MAX >> 1};
    for (size_t i = 0; i < sizeof none / sizeof none[0]; i++)
        every_sequence_call(b, none[i]);
    mor_batch *other = NULL;
    OK(mor_batch_create(model, NULL, &other, NULL));
    every_sequence_call(other, made);
    OK(mor_batch_free(other));

    OK(mor_batch_remove(b, made));
    OK(mor_batch_remove(b, all[1]));
    OK(mor_batch_remove(b, all[2]));
    OK(mor_batch_kv_bytes_used(b, &used));
    CHECK(used == 0);
    OK(mor_batch_tick(b, &events, &count));
    CHECK(count == 0);
}

/* A pool with too few pages: somebody gives way, or stands still, and nobody is lost. */
static void too_few_pages(const mor_model *model)
{
    for (uint32_t pressure = MOR_PRESSURE_EVICT; pressure <= MOR_PRESSURE_REFUSE; pressure++) {
        mor_model_info info;
        info.struct_size = sizeof info;
        OK(mor_model_describe(model, &info));
        mor_batch_params params;
        OK(mor_batch_params_init(&params, sizeof params));
        params.context = CONTEXT;
        params.sequences = 3;
        params.threads = 2;
        params.pressure = pressure;
        params.kv_pages = (size_t)info.logical_layers * (CONTEXT / 16); /* for one of full depth */
        mor_batch *b = NULL;
        OK(mor_batch_create(model, &params, &b, NULL));
        const uint32_t tokens[4] = {5, 6, 7, 8};
        mor_batch_request request;
        OK(mor_batch_request_init(&request, sizeof request));
        request.prompt = tokens;
        request.prompt_count = 4;
        request.ignore_end = 1;
        request.cut = 0; /* as deep as can be */
        uint64_t all[3];
        for (size_t i = 0; i < 3; i++)
            OK(mor_batch_add(b, &request, &all[i]));
        run(b);
        mor_sequence_status where = MOR_SEQUENCE_WAITING;
        mor_finish finish = MOR_FINISH_END;
        for (size_t i = 3; i-- > 0;) {
            OK(mor_batch_sequence_status(b, all[i], &where, &finish));
            if (pressure == MOR_PRESSURE_EVICT) {
                CHECK(where == MOR_SEQUENCE_FINISHED && finish == MOR_FINISH_CONTEXT_FULL);
            } else if (i > 0) {
                /* What it has is free for those before it. */
                CHECK(where == MOR_SEQUENCE_FULL);
                OK(mor_batch_remove(b, all[i]));
            } else {
                OK(mor_batch_resume(b, all[i]));
                run(b);
                OK(mor_batch_sequence_status(b, all[i], &where, &finish));
                CHECK(where == MOR_SEQUENCE_FINISHED && finish == MOR_FINISH_CONTEXT_FULL);
            }
        }
        mor_batch_counters_info counters;
        counters.struct_size = sizeof counters;
        OK(mor_batch_counters(b, &counters));
        CHECK((counters.evictions > 0) == (pressure == MOR_PRESSURE_EVICT));
        OK(mor_batch_free(b));
    }
}

/* --- Two at once. -------------------------------------------------------------------------------- */

struct meeting {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    int stage; /* 0: not begun, 1: the session is in a callback, 2: the callback may return */
    mor_session *session;
    mor_tokenizer *tokenizer;
    mor_batch *batch;
};

static void go_to(struct meeting *m, int stage)
{
    pthread_mutex_lock(&m->mutex);
    m->stage = stage;
    pthread_cond_broadcast(&m->changed);
    pthread_mutex_unlock(&m->mutex);
}

static void wait_for(struct meeting *m, int stage)
{
    pthread_mutex_lock(&m->mutex);
    while (m->stage < stage)
        pthread_cond_wait(&m->changed, &m->mutex);
    pthread_mutex_unlock(&m->mutex);
}

/* Stops in the middle of a generation, until the other thread has tried everything. */
static bool meet(void *user_data, const mor_piece *piece)
{
    struct meeting *m = user_data;
    (void)piece;
    if (m->stage == 0) {
        go_to(m, 1);
        wait_for(m, 2);
    }
    return true;
}

static void *intrude(void *user_data)
{
    struct meeting *m = user_data;
    wait_for(m, 1);
    every_session_call(m->session, MOR_ERROR_BUSY, true);
    go_to(m, 2);
    return NULL;
}

/* From inside a callback: everything on its own session, which must go on, and another's use. */
static bool meddle(void *user_data, const mor_piece *piece)
{
    struct meeting *m = user_data;
    (void)piece;
    every_session_call(m->session, MOR_ERROR_BUSY, true);
    uint32_t tokens[8];
    size_t count;
    OK(mor_tokenizer_encode(m->tokenizer, "Hello", 5, 0, tokens, 8, &count));
    return true;
}

static bool cancel_inside(void *user_data, const mor_piece *piece)
{
    (void)piece;
    OK(mor_session_cancel(user_data));
    return true;
}

static int hammered, unexpected; /* calls that found the object free; calls that should not be */

static void *hammer(void *user_data)
{
    struct meeting *m = user_data;
    uint32_t tokens[64];
    size_t count;
    int done = 0, wrong = 0;
    for (int i = 0; i < 300; i++) {
        mor_status status = mor_tokenizer_encode(m->tokenizer, "It is a truth universally", 25, 0,
                                                 tokens, 64, &count);
        done += status == MOR_OK;
        wrong += status != MOR_OK && status != MOR_ERROR_BUSY;
        status = i % 8 == 0 ? mor_session_rewind(m->session, 0)
                            : mor_session_step(m->session, 5, NULL);
        done += status == MOR_OK;
        wrong += status != MOR_OK && status != MOR_ERROR_BUSY && status != MOR_ERROR_CANCELLED &&
                 status != MOR_ERROR_CONTEXT_FULL;
        status = i % 2 == 0 ? mor_session_cancel(m->session) : mor_session_reset_cancel(m->session);
        wrong += status != MOR_OK;
        mor_batch_request request;
        const mor_batch_event *events; /* perhaps of a call that is over: not looked at */
        uint64_t sequence;
        (void)mor_batch_request_init(&request, sizeof request);
        request.prompt = tokens;
        request.prompt_count = 1;
        tokens[0] = 5;
        status = mor_batch_add(m->batch, &request, &sequence);
        if (status == MOR_OK)
            do {
                status = mor_batch_remove(m->batch, sequence);
            } while (status == MOR_ERROR_BUSY);
        done += status == MOR_OK;
        wrong += status != MOR_OK && status != MOR_ERROR_BUSY;
        status = mor_batch_tick(m->batch, &events, &count);
        done += status == MOR_OK;
        wrong += status != MOR_OK && status != MOR_ERROR_BUSY;
    }
    pthread_mutex_lock(&m->mutex);
    hammered += done;
    unexpected += wrong;
    pthread_mutex_unlock(&m->mutex);
    return NULL;
}

static void two_at_once(mor_session *session, mor_tokenizer *tokenizer, mor_batch *batch)
{
    uint32_t token = 5;
    struct meeting m = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0, session, tokenizer,
                        batch};
    mor_generate_params params;
    mor_finish finish = MOR_FINISH_END;
    OK(mor_generate_params_init(&params, sizeof params));
    params.max_tokens = 3;
    params.user_data = &m;

    OK(mor_session_rewind(session, 0));
    OK(mor_session_prefill(session, &token, 1));
    pthread_t other;
    CHECK(pthread_create(&other, NULL, intrude, &m) == 0);
    params.callback = meet;
    OK(mor_session_generate(session, &params, &finish));
    pthread_join(other, NULL);

    params.callback = meddle;
    OK(mor_session_generate(session, &params, &finish));
    params.callback = cancel_inside;
    params.user_data = session;
    params.max_tokens = 10;
    OK(mor_session_generate(session, &params, &finish));
    CHECK(finish == MOR_FINISH_CANCELLED || finish == MOR_FINISH_END);
    OK(mor_session_reset_cancel(session));

    pthread_t two[2];
    bool started = pthread_create(&two[0], NULL, hammer, &m) == 0 &&
                   pthread_create(&two[1], NULL, hammer, &m) == 0;
    CHECK(started);
    for (int i = 0; i < 2 && started; i++)
        pthread_join(two[i], NULL);
    CHECK(hammered > 0 && unexpected == 0);
    OK(mor_session_reset_cancel(session));
    OK(mor_session_rewind(session, 0));
}

static void log_line(void *user_data, mor_log_level level, const char *text)
{
    ++*(int *)user_data;
    CHECK((level == MOR_LOG_INFO || level == MOR_LOG_WARNING) && text != NULL && text[0] != '\0');
}

int main(int argc, char **argv)
{
    if (argc != 2)
        return 2;
    path = argv[1];
    read_file();

    mor_model *model = NULL;
    mor_tokenizer *tokenizer = NULL;
    mor_session *session = NULL, *other_kind = NULL;
    mor_error error;
    int lines = 0;
    mor_model_params model_params;
    OK(mor_model_params_init(&model_params, sizeof model_params));
    model_params.log = log_line;
    model_params.log_user_data = &lines;
    OK(mor_model_load(path, &model_params, &model, &error));
    OK(mor_tokenizer_create(model, NULL, &tokenizer, &error));
    mor_session_params params;
    OK(mor_session_params_init(&params, sizeof params));
    params.context = CONTEXT;
    params.threads = 2;
    OK(mor_session_create(model, &params, &session, &error));
    params.kv_type = MOR_KV_Q8_0;
    params.threads = 1;
    OK(mor_session_create(model, &params, &other_kind, &error));
    mor_batch *batch = NULL;
    mor_batch_params batch_params;
    OK(mor_batch_params_init(&batch_params, sizeof batch_params));
    batch_params.context = CONTEXT;
    batch_params.sequences = 3;
    batch_params.threads = 2;
    OK(mor_batch_create(model, &batch_params, &batch, &error));
    if (failures > 0)
        return 1;
    CHECK(lines >= 3);

    wrong_objects(model, tokenizer, session, batch);
    wrong_sizes(model, tokenizer, session, batch);
    wrong_files();
    wrong_metadata(model);
    wrong_texts(tokenizer, model);
    wrong_plans(model);
    wrong_order_and_counts(session);
    wrong_states(session, other_kind);
    wrong_batch_plans(model);
    wrong_requests(batch, model);
    too_few_pages(model);
    two_at_once(session, tokenizer, batch);

    /* The model goes first; what was made of it works on. */
    mor_model_free(model);
    uint32_t tokens[16];
    size_t count = 0;
    mor_finish finish;
    OK(mor_tokenizer_encode(tokenizer, "It is", 5, 0, tokens, 16, &count));
    OK(mor_session_prefill(session, tokens, count));
    OK(mor_session_generate(session, NULL, &finish));
    OK(mor_tokenizer_free(tokenizer));
    OK(mor_session_rewind(session, 0));
    OK(mor_session_prefill(session, tokens, count));
    OK(mor_session_generate(session, NULL, &finish));
    OK(mor_session_free(session));
    OK(mor_session_free(other_kind));
    mor_batch_request request;
    uint64_t sequence;
    OK(mor_batch_request_init(&request, sizeof request));
    request.prompt = tokens;
    request.prompt_count = count;
    OK(mor_batch_add(batch, &request, &sequence));
    run(batch);
    OK(mor_batch_set_in_step(batch, true));
    OK(mor_batch_free(batch));

    printf("abuse: %d checks, %d failures\n", checks, failures);
    return failures == 0 ? 0 : 1;
}
