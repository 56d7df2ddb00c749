/*
 * Sessions that come and go:  cycles MODEL CYCLES
 *
 * Four threads create a session, run a prompt, generate, and free it, CYCLES times in all, while a fifth
 * cancels every other one, if it meets it. Whatever it meets, a call answers MOR_OK or MOR_ERROR_CANCELLED. What is left
 * behind is for a sanitizer or valgrind to see.
 */
#include <mor.h>

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define WORKERS 4

static mor_model *model;
static atomic_int left, finished, generated, cancelled;

/* A session is freed only when nobody cancels it any more. */
static struct {
    pthread_mutex_t mutex;
    mor_session *session;
} places[WORKERS];

static void expect(mor_status status, const char *what)
{
    if (status == MOR_OK)
        return;
    if (status == MOR_ERROR_CANCELLED) {
        cancelled++;
        return;
    }
    fprintf(stderr, "cycles: %s: %s\n", what, mor_status_text((int32_t)status));
    exit(1);
}

static bool count(void *user_data, const mor_piece *piece)
{
    (void)user_data;
    (void)piece;
    generated++;
    return true;
}

static void *work(void *argument)
{
    const size_t place = *(const size_t *)argument;
    static const uint32_t prompt[] = {1, 2};
    for (int cycle; (cycle = left--) > 0;) {
        mor_session_params params;
        mor_session_params_init(&params, sizeof params);
        params.context = 16;
        params.batch = 4;
        params.threads = 1 + (uint32_t)(place % 2);
        mor_session *session = NULL;
        if (mor_session_create(model, &params, &session, NULL) != MOR_OK) {
            fputs("cycles: no session\n", stderr);
            exit(1);
        }
        /* Every other one may be cancelled: under a sanitizer none would come to an end. */
        pthread_mutex_lock(&places[place].mutex);
        places[place].session = cycle % 2 ? session : NULL;
        pthread_mutex_unlock(&places[place].mutex);

        mor_status status = mor_session_prefill(session, prompt, 2);
        expect(status, "prefill");
        if (status == MOR_OK) {
            mor_generate_params generate;
            mor_generate_params_init(&generate, sizeof generate);
            generate.callback = count;
            generate.max_tokens = 2;
            mor_finish finish = MOR_FINISH_LENGTH;
            expect(mor_session_generate(session, &generate, &finish), "generate");
            if (finish == MOR_FINISH_CANCELLED)
                cancelled++;
        }

        pthread_mutex_lock(&places[place].mutex);
        places[place].session = NULL;
        pthread_mutex_unlock(&places[place].mutex);
        expect(mor_session_free(session), "free");
    }
    finished++;
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fputs("usage: cycles MODEL CYCLES\n", stderr);
        return 2;
    }
    const int cycles = atoi(argv[2]);
    left = cycles;
    if (mor_model_load(argv[1], NULL, &model, NULL) != MOR_OK)
        return 1;
    pthread_t threads[WORKERS];
    size_t numbers[WORKERS];
    for (size_t i = 0; i < WORKERS; i++) {
        pthread_mutex_init(&places[i].mutex, NULL);
        numbers[i] = i;
        pthread_create(&threads[i], NULL, work, &numbers[i]);
    }
    for (size_t next = 0; finished < WORKERS; next = (next + 1) % WORKERS) {
        const struct timespec pause = {0, 3000000};
        nanosleep(&pause, NULL);
        pthread_mutex_lock(&places[next].mutex);
        if (places[next].session != NULL)
            expect(mor_session_cancel(places[next].session), "cancel");
        pthread_mutex_unlock(&places[next].mutex);
    }
    for (size_t i = 0; i < WORKERS; i++) {
        pthread_join(threads[i], NULL);
        pthread_mutex_destroy(&places[i].mutex);
    }
    mor_model_free(model);
    printf("%d cycles, %d tokens, %d cancelled\n", cycles, (int)generated, (int)cancelled);
    return generated == 0 || cancelled == 0;
}
