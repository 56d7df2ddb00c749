/*
 * Continues a text:  generate MODEL PROMPT [THREADS [MAX_TOKENS]]
 *
 * All that a program needs: load, tokenize, plan, create, prefill, generate with a callback, look at
 * depths and memory, free. Every status is checked.
 */
#include <mor.h>

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

/* Depths are 0 to MOR_MAX_RECURSIONS. */
#define MAX_DEPTHS (MOR_MAX_RECURSIONS + 1)

/* Tells what failed. The reason stands in the mor_error of a call that makes an object, and in the
 * object's last error after any other call; without one, the status has a sentence of its own. */
static int failed(mor_status status, const char *what, const char *reason)
{
    if (status == MOR_OK)
        return 0;
    if (reason == NULL || reason[0] == '\0')
        reason = mor_status_text((int32_t)status);
    fprintf(stderr, "generate: %s: %s\n", what, reason);
    return 1;
}

/* Gets the text as it comes: whole characters, often nothing. Answering false ends the generation,
 * for which a closed output is a good reason. */
static bool show(void *user_data, const mor_piece *piece)
{
    FILE *out = user_data;
    fwrite(piece->text, 1, piece->text_bytes, out);
    return fflush(out) == 0;
}

static const char *finish_name(mor_finish finish)
{
    switch (finish) {
    case MOR_FINISH_END: return "end of text";
    case MOR_FINISH_STOP: return "stop string";
    case MOR_FINISH_LENGTH: return "length";
    case MOR_FINISH_CONTEXT_FULL: return "context full";
    case MOR_FINISH_CALLBACK: return "callback";
    case MOR_FINISH_CANCELLED: return "cancelled";
    case MOR_FINISH_STOPPED:
    case MOR_FINISH_FAILED: break; /* of batches */
    }
    return "unknown"; /* a later library may have more */
}

int main(int argc, char **argv)
{
    if (argc < 3 || argc > 5) {
        fprintf(stderr, "usage: generate MODEL PROMPT [THREADS [MAX_TOKENS]]\n");
        return 2;
    }
    const char *prompt = argv[2];

    /* stdio would take its buffer from the heap at the first output, while the session lives. With
     * this one, no allocation happens between creating and freeing the session, in this program as
     * little as in the library. */
    static char out_buffer[BUFSIZ];
    setvbuf(stdout, out_buffer, _IOFBF, sizeof out_buffer);

    int result = 1;
    mor_model *model = NULL;
    mor_tokenizer *tokenizer = NULL;
    mor_session *session = NULL;
    uint32_t *tokens = NULL;
    size_t count = 0;
    mor_error error;
    mor_status status;

    /* The model: mapped, checked, never changed. NULL parameters are the defaults. */
    status = mor_model_load(argv[1], NULL, &model, &error);
    if (failed(status, argv[1], error.text))
        goto end;
    mor_model_info info;
    info.struct_size = sizeof info;
    status = mor_model_describe(model, &info);
    if (failed(status, "describing the model", NULL))
        goto end;

    /* The prompt. With no room at all, encoding tells how many tokens the text has. */
    status = mor_tokenizer_create(model, NULL, &tokenizer, &error);
    if (failed(status, "creating the tokenizer", error.text))
        goto end;
    status = mor_tokenizer_encode(tokenizer, prompt, MOR_ZERO_TERMINATED, MOR_ENCODE_ADD_SPECIAL,
                                  NULL, 0, &count);
    if (status != MOR_ERROR_BUFFER_TOO_SMALL &&
        failed(status, "tokenizing", mor_tokenizer_last_error(tokenizer)))
        goto end;
    if (count == 0) {
        fprintf(stderr, "generate: the prompt is empty, so there is nothing to continue\n");
        goto end;
    }
    tokens = malloc(count * sizeof *tokens);
    if (failed(tokens == NULL ? MOR_ERROR_OUT_OF_MEMORY : MOR_OK, "the prompt", NULL))
        goto end;
    status = mor_tokenizer_encode(tokenizer, prompt, MOR_ZERO_TERMINATED, MOR_ENCODE_ADD_SPECIAL,
                                  tokens, count, &count);
    if (failed(status, "tokenizing", mor_tokenizer_last_error(tokenizer)))
        goto end;

    /* The plan says what the session will take before it takes it. */
    mor_session_params params;
    status = mor_session_params_init(&params, sizeof params);
    if (failed(status, "session parameters", NULL))
        goto end;
    if (argc > 3)
        params.threads = (uint32_t)strtoul(argv[3], NULL, 10);
    mor_session_plan_info plan;
    plan.struct_size = sizeof plan;
    status = mor_session_plan(model, &params, &plan, &error);
    if (failed(status, "planning the session", error.text))
        goto end;
    status = mor_session_create(model, &params, &session, &error);
    if (failed(status, "creating the session", error.text))
        goto end;

    /* Run the prompt, then continue it. */
    status = mor_session_prefill(session, tokens, count);
    if (failed(status, "running the prompt", mor_session_last_error(session)))
        goto end;
    mor_generate_params generate;
    status = mor_generate_params_init(&generate, sizeof generate);
    if (failed(status, "generation parameters", NULL))
        goto end;
    generate.max_tokens = 48;
    if (argc > 4)
        generate.max_tokens = (size_t)strtoul(argv[4], NULL, 10);
    generate.callback = show;
    generate.user_data = stdout;
    mor_finish finish;
    fputs(prompt, stdout);
    status = mor_session_generate(session, &generate, &finish);
    fputs("\n", stdout);
    if (failed(status, "generating", mor_session_last_error(session)))
        goto end;

    /* What it took: in recursions and in memory. */
    uint64_t depths[MAX_DEPTHS];
    size_t length = 0, kv_bytes = 0;
    status = mor_session_length(session, &length);
    if (failed(status, "the length", mor_session_last_error(session)))
        goto end;
    status = mor_session_depth_histogram(session, depths, MAX_DEPTHS);
    if (failed(status, "the depths", mor_session_last_error(session)))
        goto end;
    status = mor_session_kv_bytes_used(session, &kv_bytes);
    if (failed(status, "the KV cache", mor_session_last_error(session)))
        goto end;
    printf("finish: %s, after %zu tokens of which %zu are the prompt\n", finish_name(finish), length,
           count);
    printf("tokens by depth:");
    for (uint32_t depth = 0; depth <= info.recursions; depth++)
        printf("  %" PRIu32 ": %" PRIu64, depth, depths[depth]);
    printf("\nplan: %zu bytes for %zu tokens and %" PRIu32 " threads, of which KV cache %zu\n",
           plan.bytes, plan.context, plan.threads, plan.kv_bytes);
    printf("in use: KV cache %zu bytes; weights %" PRIu64 " bytes, in the mapped file\n", kv_bytes,
           info.weight_bytes);
    if (fflush(stdout) == 0)
        result = 0;

end:
    /* Each of these takes NULL. The order does not matter: what a session needs of the model lives
     * until the session is freed. */
    mor_session_free(session);
    mor_tokenizer_free(tokenizer);
    mor_model_free(model);
    free(tokens);
    return result;
}
