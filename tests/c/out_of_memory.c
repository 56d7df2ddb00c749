/*
 * Refuses the n-th request for memory, or for a thread, for every n, in each call that makes an
 * object:  LD_PRELOAD=fail_nth.so out_of_memory MODEL
 *
 * Each attempt happens in a process of its own, so that an abort in one is told and the others go on.
 * It must answer MOR_ERROR_OUT_OF_MEMORY, leave no block behind, and then work.
 */
#include <mor.h>

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* Of fail_nth.c. */
void fail_nth_begin(long n);
bool fail_nth_end(void);
long fail_nth_held(void);

static const char *path;
static int file;
static unsigned char bytes[8u << 20];
static size_t byte_count;
static _Alignas(64) unsigned char memory[4u << 20];

static mor_model *model;
static mor_tokenizer *tokenizer;
static mor_session *session;
static mor_batch *batch;
static mor_error error;
static uint32_t threads;
static mor_model_params copied;

static mor_status load(void) { return mor_model_load(path, NULL, &model, &error); }
static mor_status load_copy(void) { return mor_model_load(path, &copied, &model, &error); }
static mor_status load_descriptor(void)
{
    return mor_model_load_descriptor(file, 0, 0, NULL, &model, &error);
}
static mor_status load_memory(void)
{
    return mor_model_load_memory(bytes, byte_count, NULL, &model, &error);
}
static mor_status create_tokenizer(void)
{
    return mor_tokenizer_create(model, NULL, &tokenizer, &error);
}
static mor_status create_session(void)
{
    mor_session_params params;
    mor_session_params_init(&params, sizeof params);
    params.threads = threads;
    return mor_session_create(model, &params, &session, &error);
}
static mor_status create_session_in(void)
{
    mor_session_params params;
    mor_session_params_init(&params, sizeof params);
    params.threads = threads;
    return mor_session_create_in(model, &params, memory, sizeof memory, &session, &error);
}
static mor_status create_batch(void)
{
    mor_batch_params params;
    mor_batch_params_init(&params, sizeof params);
    params.sequences = 4;
    params.threads = threads;
    return mor_batch_create(model, &params, &batch, &error);
}

static void free_all(void)
{
    mor_batch_free(batch);
    mor_session_free(session);
    mor_tokenizer_free(tokenizer);
    mor_model_free(model);
    batch = NULL;
    session = NULL;
    tokenizer = NULL;
    model = NULL;
}

/* What a child tells by its exit status. */
enum { WELL = 0, NOT_REACHED = 10, WRONG = 20, BROKEN = 30 };

static int wrong(const char *name, long n, const char *what)
{
    char line[700];
    int length = snprintf(line, sizeof line, "out_of_memory: %s, request %ld: %s\n", name, n, what);
    return write(STDERR_FILENO, line, (size_t)length) == length ? WRONG : WRONG + 1;
}

static int attempt(const char *name, mor_status (*call)(void), bool needs_model, long n, bool count)
{
    if (needs_model && load() != MOR_OK) {
        wrong(name, n, "loading before");
        return BROKEN;
    }
    mor_model *const model_before = model;
    const long held = fail_nth_held();

    fail_nth_begin(n);
    mor_status status = call();
    if (!fail_nth_end()) {
        free_all();
        if (status == MOR_OK)
            return NOT_REACHED;
        wrong(name, n, error.text);
        return BROKEN;
    }
    if (status != MOR_ERROR_OUT_OF_MEMORY) {
        char what[600];
        snprintf(what, sizeof what, "status %d, %s", (int)status,
                 status == MOR_OK ? "though something was refused" : error.text);
        return wrong(name, n, what);
    }
    if (error.status != status || error.text[0] == '\0')
        return wrong(name, n, "no sentence");
    if (model != model_before || tokenizer != NULL || session != NULL || batch != NULL)
        return wrong(name, n, "a result was written");
    if (count && fail_nth_held() != held) {
        char what[64];
        snprintf(what, sizeof what, "%ld blocks leaked", fail_nth_held() - held);
        return wrong(name, n, what);
    }

    /* And now it works: the object is made, and does something. */
    if (call() != MOR_OK)
        return wrong(name, n, error.text);
    uint32_t tokens[8];
    size_t token_count = 0;
    if (tokenizer == NULL && create_tokenizer() != MOR_OK)
        return wrong(name, n, error.text);
    if (mor_tokenizer_encode(tokenizer, "It is", 5, 0, tokens, 8, &token_count) != MOR_OK)
        return wrong(name, n, "tokenizing after");
    if (session == NULL && create_session() != MOR_OK)
        return wrong(name, n, error.text);
    if (mor_session_prefill(session, tokens, token_count) != MOR_OK)
        return wrong(name, n, "a prompt after");
    if (batch != NULL) {
        mor_batch_request request;
        mor_batch_request_init(&request, sizeof request);
        request.prompt = tokens;
        request.prompt_count = token_count;
        uint64_t sequence;
        const mor_batch_event *events;
        size_t count_of_events;
        if (mor_batch_add(batch, &request, &sequence) != MOR_OK ||
            mor_batch_tick(batch, &events, &count_of_events) != MOR_OK)
            return wrong(name, n, "a tick after");
    }
    free_all();
    return WELL;
}

/* A plan is made without any request. */
static int plans_without_memory(void)
{
    mor_session_plan_info plan;
    plan.struct_size = sizeof plan;
    mor_batch_plan_info batch_plan;
    batch_plan.struct_size = sizeof batch_plan;
    size_t pages;
    pid_t child = fork();
    if (child == 0) {
        if (load() != MOR_OK)
            _exit(WRONG);
        fail_nth_begin(1);
        bool planned = mor_session_plan(model, NULL, &plan, &error) == MOR_OK &&
                       mor_batch_plan(model, NULL, &batch_plan, &error) == MOR_OK &&
                       mor_batch_plan_in(model, NULL, 1, 64u << 20, &batch_plan, &error) == MOR_OK &&
                       mor_batch_pages_for(model, NULL, 1, &pages, &error) == MOR_OK;
        _exit(fail_nth_end() || !planned ? WRONG : WELL);
    }
    int how;
    bool well = child > 0 && waitpid(child, &how, 0) == child && WIFEXITED(how) &&
                WEXITSTATUS(how) == WELL;
    printf("out_of_memory: mor_session_plan, mor_batch_plan...: %s\n", well ? "takes none" : "takes memory");
    return !well;
}

/* Every n until one is not reached, or the call fails by itself. The number of failures. */
static int sweep(const char *name, mor_status (*call)(void), bool needs_model, bool count)
{
    /* One that fails again and again is told often enough. */
    enum { PATIENCE = 20 };
    int failures = 0;
    bool reached = true;
    long n = 1;
    for (; failures < PATIENCE; n++) {
        pid_t child = fork();
        if (child < 0) {
            perror("out_of_memory: fork");
            return 1;
        }
        if (child == 0)
            _exit(attempt(name, call, needs_model, n, count));
        int how;
        if (waitpid(child, &how, 0) != child)
            return 1;
        if (WIFEXITED(how) && WEXITSTATUS(how) == NOT_REACHED) {
            reached = false;
            break;
        }
        if (WIFSIGNALED(how)) {
            wrong(name, n, strsignal(WTERMSIG(how)));
            failures++;
        } else if (WEXITSTATUS(how) != WELL) {
            failures++;
            if (WEXITSTATUS(how) == BROKEN)
                break;
        }
    }
    /* In memory of the caller's, and without threads, nothing is asked for. */
    if (!reached && n == 1 && !(call == create_session_in && threads == 1)) {
        wrong(name, n, "nothing was refused");
        failures++;
    }
    printf("out_of_memory: %s: %ld requests refused one by one, %d not survived well\n", name, n - 1,
           failures);
    return failures;
}

int main(int argc, char **argv)
{
    if (argc != 2)
        return 2;
    static char buffer[4096];
    setvbuf(stdout, buffer, _IOLBF, sizeof buffer);
    path = argv[1];
    file = open(path, O_RDONLY);
    ssize_t got;
    while ((got = read(file, bytes + byte_count, sizeof bytes - byte_count)) > 0)
        byte_count += (size_t)got;
    mor_model_params_init(&copied, sizeof copied);
    copied.copy = 1;

    int failures = 0;
    threads = 1;
    failures += sweep("mor_model_load", load, false, true);
    failures += sweep("mor_model_load with a copy", load_copy, false, true);
    failures += sweep("mor_model_load_descriptor", load_descriptor, false, true);
    failures += sweep("mor_model_load_memory", load_memory, false, true);
    failures += sweep("mor_tokenizer_create", create_tokenizer, true, true);
    failures += plans_without_memory();
    failures += sweep("mor_session_create, 1 thread", create_session, true, true);
    failures += sweep("mor_session_create_in, 1 thread", create_session_in, true, true);
    failures += sweep("mor_batch_create, 1 thread", create_batch, true, true);

    /* The C library keeps a thread's stack and tables for the next one. So blocks are counted only
     * where threads have come and gone before, and their requests refused only where none have. */
    for (int warm = 0; warm < 2; warm++) {
        threads = 3;
        failures += sweep(warm ? "mor_session_create, 3 threads, warm" : "mor_session_create, 3 threads",
                          create_session, true, warm);
        failures += sweep(warm ? "mor_session_create_in, 3 threads, warm"
                               : "mor_session_create_in, 3 threads", create_session_in, true, warm);
        failures += sweep(warm ? "mor_batch_create, 3 threads, warm" : "mor_batch_create, 3 threads",
                          create_batch, true, warm);
        threads = 0;
        failures += sweep(warm ? "mor_session_create, a thread a core, warm"
                               : "mor_session_create, a thread a core", create_session, true, warm);
        if (warm == 0) {
            threads = 3;
            if (load() != MOR_OK || create_session() != MOR_OK)
                return 1;
            free_all();
        }
    }
    return failures == 0 ? 0 : 1;
}
