/*
 * A model in a control loop:  embedded MODEL [PROMPT]
 *
 * All memory that grows with the model or the session is static and owned by this program: the model
 * file is read into an array and used there, the session is created in another array. This program
 * never calls malloc, and after the session is created the library does not either. One thread, a time
 * budget and a limit of recursions keep each step short; the slowest one is printed.
 */
#include <mor.h>

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#define CONTEXT 128                 /* tokens that the loop may come to */
#define STEPS 64                    /* ticks of the loop */
#define BUDGET_NS UINT64_C(4000000) /* what a tick may take: 4 ms */
#define DEPTH_LIMIT 2               /* recursions that a tick may take at most */

/* Sized by a plan made during development; checked against the plan at run time. */
#define MODEL_BYTES (6u << 20)
#define SESSION_BYTES (1280u << 10)

/* The file may lie at any address. */
static unsigned char model_file[MODEL_BYTES];

/* C99 cannot ask for an alignment, so the array has room to begin at the next multiple of the
 * alignment that a session needs. With C11: _Alignas(MOR_SESSION_ALIGNMENT). */
static unsigned char session_memory[SESSION_BYTES + MOR_SESSION_ALIGNMENT];

static char out_buffer[4096];

static int failed(mor_status status, const char *what, const char *reason)
{
    if (status == MOR_OK)
        return 0;
    if (reason == NULL || reason[0] == '\0')
        reason = mor_status_text((int32_t)status);
    fprintf(stderr, "embedded: %s: %s\n", what, reason);
    return 1;
}

/* Reads a whole file. On a device it may as well be linked into the program. 0: failed. */
static size_t read_file(const char *path, unsigned char *buffer, size_t capacity)
{
    int file = open(path, O_RDONLY);
    if (file < 0)
        return 0;
    size_t bytes = 0;
    ssize_t got;
    while ((got = read(file, buffer + bytes, capacity - bytes)) > 0)
        bytes += (size_t)got;
    close(file);
    return got == 0 && bytes < capacity ? bytes : 0;
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * UINT64_C(1000000000) + (uint64_t)now.tv_nsec;
}

int main(int argc, char **argv)
{
    if (argc < 2 || argc > 3) {
        fprintf(stderr, "usage: embedded MODEL [PROMPT]\n");
        return 2;
    }
    const char *prompt = argc > 2 ? argv[2] : "It is a truth";

    /* Otherwise stdio takes a buffer from the heap. */
    setvbuf(stdout, out_buffer, _IOFBF, sizeof out_buffer);

    int result = 1;
    mor_model *model = NULL;
    mor_tokenizer *tokenizer = NULL;
    mor_session *session = NULL;
    mor_error error;
    mor_status status;

    size_t file_bytes = read_file(argv[1], model_file, sizeof model_file);
    if (file_bytes == 0) {
        fprintf(stderr, "embedded: %s cannot be read, or is larger than %u bytes\n", argv[1],
                (unsigned)MODEL_BYTES);
        return 1;
    }
    status = mor_model_load_memory(model_file, file_bytes, NULL, &model, &error);
    if (failed(status, "loading", error.text))
        goto end;

    /* The prompt is short, and the tokenizer's working memory goes with the longest word. */
    mor_tokenizer_params tokenizer_params;
    status = mor_tokenizer_params_init(&tokenizer_params, sizeof tokenizer_params);
    if (failed(status, "tokenizer parameters", NULL))
        goto end;
    tokenizer_params.max_piece_bytes = 256;
    status = mor_tokenizer_create(model, &tokenizer_params, &tokenizer, &error);
    if (failed(status, "creating the tokenizer", error.text))
        goto end;

    mor_session_params params;
    status = mor_session_params_init(&params, sizeof params);
    if (failed(status, "session parameters", NULL))
        goto end;
    params.context = CONTEXT;
    params.batch = 16;
    params.threads = 1; /* the caller's own: no thread is started */
    params.prefault = 1; /* no page fault inside the loop */

    /* Does the static memory suffice? The plan says so to the byte, before anything is created. */
    mor_session_plan_info plan;
    plan.struct_size = sizeof plan;
    status = mor_session_plan(model, &params, &plan, &error);
    if (failed(status, "planning", error.text))
        goto end;
    printf("plan: %zu bytes aligned to %zu; static memory: %u bytes\n", plan.bytes, plan.alignment,
           (unsigned)SESSION_BYTES);
    if (plan.bytes > SESSION_BYTES) {
        fprintf(stderr, "embedded: the session needs %zu bytes: raise SESSION_BYTES\n", plan.bytes);
        goto end;
    }
    size_t past = (size_t)((uintptr_t)session_memory % plan.alignment);
    unsigned char *memory = session_memory + (past == 0 ? 0 : plan.alignment - past);
    status = mor_session_create_in(model, &params, memory, SESSION_BYTES, &session, &error);
    if (failed(status, "creating the session", error.text))
        goto end;

    static uint32_t tokens[CONTEXT];
    size_t count = 0;
    status = mor_tokenizer_encode(tokenizer, prompt, MOR_ZERO_TERMINATED, MOR_ENCODE_ADD_SPECIAL,
                                  tokens, CONTEXT, &count);
    if (failed(status, "tokenizing", mor_tokenizer_last_error(tokenizer)))
        goto end;
    status = mor_session_prefill(session, tokens, count);
    if (failed(status, "running the prompt", mor_session_last_error(session)))
        goto end;

    /* From here on, each tick answers on time. */
    mor_sampler_params sampler;
    status = mor_sampler_params_init(&sampler, sizeof sampler);
    if (failed(status, "sampler parameters", NULL))
        goto end;
    sampler.temperature = 0.0f; /* the likeliest token */
    sampler.repeat_penalty = 1.3f;
    status = mor_session_set_sampler(session, &sampler);
    if (failed(status, "setting the sampler", mor_session_last_error(session)))
        goto end;
    status = mor_session_set_depth_limit(session, DEPTH_LIMIT);
    if (failed(status, "limiting the depth", mor_session_last_error(session)))
        goto end;
    status = mor_session_set_time_budget(session, BUDGET_NS);
    if (failed(status, "setting the budget", mor_session_last_error(session)))
        goto end;

    fputs(prompt, stdout);
    uint64_t worst_ns = 0;
    unsigned late = 0, ticks = 0;
    for (; ticks < STEPS; ticks++) {
        uint32_t token;
        bool end;
        status = mor_session_sample(session, &token);
        if (failed(status, "sampling", mor_session_last_error(session)))
            goto end;
        status = mor_tokenizer_is_end(tokenizer, token, &end);
        if (failed(status, "looking at a token", mor_tokenizer_last_error(tokenizer)))
            goto end;
        if (end)
            break;

        uint64_t begin = now_ns();
        status = mor_session_step(session, token, NULL);
        uint64_t took = now_ns() - begin;
        if (status == MOR_ERROR_CONTEXT_FULL)
            break;
        if (failed(status, "a step", mor_session_last_error(session)))
            goto end;
        worst_ns = took > worst_ns ? took : worst_ns;
        late += took > BUDGET_NS;

        /* Bytes, not characters: a token may end within one. Good for a stream of bytes. */
        const char *text;
        size_t bytes;
        status = mor_tokenizer_token_bytes(tokenizer, token, 0, &text, &bytes);
        if (failed(status, "a token's text", mor_tokenizer_last_error(tokenizer)))
            goto end;
        fwrite(text, 1, bytes, stdout);
    }

    uint64_t depths[MOR_MAX_RECURSIONS + 1];
    status = mor_session_depth_histogram(session, depths, MOR_MAX_RECURSIONS + 1);
    if (failed(status, "the depths", mor_session_last_error(session)))
        goto end;
    printf("\ntokens by depth:  0: %" PRIu64 "  1: %" PRIu64 "  2: %" PRIu64 "  3: %" PRIu64 "\n",
           depths[0], depths[1], depths[2], depths[3]);
    printf("worst step of %u: %" PRIu64 " us; over the budget of %" PRIu64 " us: %u\n", ticks,
           worst_ns / 1000, BUDGET_NS / 1000, late);
    if (fflush(stdout) == 0)
        result = 0;

end:
    /* The session's memory is ours again after this. */
    mor_session_free(session);
    mor_tokenizer_free(tokenizer);
    mor_model_free(model);
    return result;
}
