/*
 * Ends calls from another thread:  cancel MODEL [THREADS]
 *
 * A user closes a window, a robot is told to stop: the thread that learns of it calls
 * mor_session_cancel, and the thread inside mor_session_prefill or mor_session_generate comes back.
 * This program does so in the middle of both and prints how long it took.
 */
#include <mor.h>

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define TOKENS 8192 /* a prompt that takes long */

static char out_buffer[4096];
static uint32_t tokens[TOKENS];

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * UINT64_C(1000000000) + (uint64_t)now.tv_nsec;
}

static int failed(mor_status status, const char *what, const char *reason)
{
    if (status == MOR_OK)
        return 0;
    if (reason == NULL || reason[0] == '\0')
        reason = mor_status_text((int32_t)status);
    fprintf(stderr, "cancel: %s: %s\n", what, reason);
    return 1;
}

/* What the two threads tell each other, under its mutex. */
struct canceller {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    mor_session *session; /* to be cancelled; NULL: nothing to do */
    uint64_t after_ns;    /* how long to wait before */
    uint64_t at_ns;       /* when it was cancelled; 0: not yet */
    mor_status status;    /* what mor_session_cancel said */
    bool quit;
};

/* The other thread: waits for a session to cancel. A session must not be freed while
 * mor_session_cancel runs, so it is done under the mutex, and main waits for the answer. */
static void *run_canceller(void *argument)
{
    struct canceller *c = argument;
    pthread_mutex_lock(&c->mutex);
    for (;;) {
        while (c->session == NULL && !c->quit)
            pthread_cond_wait(&c->changed, &c->mutex);
        if (c->quit)
            break;
        struct timespec wait;
        wait.tv_sec = (time_t)(c->after_ns / UINT64_C(1000000000));
        wait.tv_nsec = (long)(c->after_ns % UINT64_C(1000000000));
        pthread_mutex_unlock(&c->mutex);
        nanosleep(&wait, NULL);
        pthread_mutex_lock(&c->mutex);
        c->at_ns = now_ns();
        c->status = mor_session_cancel(c->session);
        c->session = NULL;
        pthread_cond_broadcast(&c->changed);
    }
    pthread_mutex_unlock(&c->mutex);
    return NULL;
}

static void cancel_after(struct canceller *c, mor_session *session, uint64_t nanoseconds)
{
    pthread_mutex_lock(&c->mutex);
    c->session = session;
    c->after_ns = nanoseconds;
    c->at_ns = 0;
    pthread_cond_broadcast(&c->changed);
    pthread_mutex_unlock(&c->mutex);
}

/* Waits until it was done; the nanoseconds from then to `end_ns`. */
static uint64_t delay_until(struct canceller *c, uint64_t end_ns)
{
    pthread_mutex_lock(&c->mutex);
    while (c->at_ns == 0)
        pthread_cond_wait(&c->changed, &c->mutex);
    uint64_t at = c->at_ns;
    pthread_mutex_unlock(&c->mutex);
    return end_ns > at ? end_ns - at : 0;
}

static bool count_pieces(void *user_data, const mor_piece *piece)
{
    (void)piece;
    ++*(unsigned *)user_data;
    return true;
}

/* Runs the three cases; 0: all went as it should. */
static int demonstrate(struct canceller *c, mor_session *session)
{
    size_t length = 0;

    /* 1. A long prompt. The session is then as if the call had not been made. */
    cancel_after(c, session, UINT64_C(30000000));
    uint64_t begin = now_ns();
    mor_status status = mor_session_prefill(session, tokens, TOKENS);
    uint64_t end = now_ns();
    uint64_t delay = delay_until(c, end);
    if (status != MOR_ERROR_CANCELLED) {
        fprintf(stderr, "cancel: the prompt was not cancelled: %s\n",
                mor_status_text((int32_t)status));
        return 1;
    }
    if (failed(mor_session_length(session, &length), "the length", mor_session_last_error(session)))
        return 1;
    printf("prefill: cancelled after %" PRIu64 " ms, back %" PRIu64 " us later, %zu tokens kept\n",
           (end - begin) / 1000000, delay / 1000, length);

    /* 2. A generation. It counts as a success, and keeps the tokens that were shown. */
    if (failed(mor_session_prefill(session, tokens, 16), "a prompt", mor_session_last_error(session)))
        return 1;
    unsigned pieces = 0;
    mor_finish finish = MOR_FINISH_LENGTH;
    mor_generate_params params;
    if (failed(mor_generate_params_init(&params, sizeof params), "parameters", NULL))
        return 1;
    params.callback = count_pieces;
    params.user_data = &pieces;
    cancel_after(c, session, UINT64_C(30000000));
    status = mor_session_generate(session, &params, &finish);
    end = now_ns();
    delay = delay_until(c, end);
    if (failed(status, "generating", mor_session_last_error(session)))
        return 1;
    if (finish == MOR_FINISH_END) {
        /* The model had no more to say before the cancel, which is then still to be met. */
        printf("generate: ended by itself after %u tokens\n", pieces);
    } else if (finish == MOR_FINISH_CANCELLED) {
        printf("generate: cancelled after %u tokens, back %" PRIu64 " us later\n", pieces,
               delay / 1000);
    } else {
        fprintf(stderr, "cancel: the generation was not cancelled\n");
        return 1;
    }

    /* 3. A cancel that comes too late would end the next request. Take it back before one. */
    if (failed(mor_session_cancel(session), "cancelling", NULL) ||
        failed(mor_session_reset_cancel(session), "taking it back", NULL) ||
        failed(mor_session_prefill(session, tokens, 16), "after taking back a cancel",
               mor_session_last_error(session)))
        return 1;
    printf("reset: a cancel was taken back, and the next call ran\n");
    return 0;
}

int main(int argc, char **argv)
{
    if (argc < 2 || argc > 3) {
        fprintf(stderr, "usage: cancel MODEL [THREADS]\n");
        return 2;
    }
    setvbuf(stdout, out_buffer, _IOFBF, sizeof out_buffer);

    int result = 1;
    mor_model *model = NULL;
    mor_session *session = NULL;
    mor_error error;
    struct canceller canceller = {
        PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, NULL, 0, 0, MOR_OK, false,
    };
    /* Starting a thread takes memory: do it before the session, and nothing is taken after. */
    pthread_t thread;
    if (pthread_create(&thread, NULL, run_canceller, &canceller) != 0) {
        fprintf(stderr, "cancel: no thread could be started\n");
        return 1;
    }

    mor_status status = mor_model_load(argv[1], NULL, &model, &error);
    if (failed(status, argv[1], error.text))
        goto end;
    mor_session_params params;
    status = mor_session_params_init(&params, sizeof params);
    if (failed(status, "session parameters", NULL))
        goto end;
    params.context = 2 * TOKENS; /* longer than the model was trained for, but it is not about text */
    if (argc > 2)
        params.threads = (uint32_t)strtoul(argv[2], NULL, 10);
    status = mor_session_create(model, &params, &session, &error);
    if (failed(status, "creating the session", error.text))
        goto end;

    for (size_t i = 0; i < TOKENS; i++)
        tokens[i] = (uint32_t)(100 + i % 1000);
    result = demonstrate(&canceller, session);
    if (fflush(stdout) != 0)
        result = 1;

end:
    pthread_mutex_lock(&canceller.mutex);
    canceller.quit = true;
    pthread_cond_broadcast(&canceller.changed);
    pthread_mutex_unlock(&canceller.mutex);
    mor_session_free(session);
    mor_model_free(model);
    pthread_join(thread, NULL);
    return result;
}
