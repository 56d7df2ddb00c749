/*
 * Preloaded under a program that uses the shared library: counts what takes or gives back memory, on
 * any thread, from the return of the last mor_tokenizer_create or mor_session_create... to the entry
 * of mor_session_free. Prints the numbers; ends the program with 97 when there were any, or when it
 * never saw a session come and go, or nothing taken before it came (which would mean that it is blind).
 */
#include "interpose.h"

#include <mor.h>

#include <stdarg.h>

static bool watching;  /* between the two */
static long before;    /* taken until then, to show that this sees anything */
static long during[2]; /* taken, given back */
static long sessions;  /* freed while watching */
static long bad;

static bool is_watching(void) { return __atomic_load_n(&watching, __ATOMIC_SEQ_CST); }

static bool may_take(void) { return true; }

static void took(void)
{
    __atomic_fetch_add(is_watching() ? &during[0] : &before, 1, __ATOMIC_SEQ_CST);
}

static void gave(void)
{
    if (is_watching())
        __atomic_fetch_add(&during[1], 1, __ATOMIC_SEQ_CST);
}

static void watch(bool on) { __atomic_store_n(&watching, on, __ATOMIC_SEQ_CST); }

/* Begins to watch anew: what counts is the last of the calls that create. */
static mor_status created(mor_status status)
{
    during[0] = during[1] = 0;
    watch(status == MOR_OK);
    return status;
}

mor_status mor_tokenizer_create(const mor_model *model, const mor_tokenizer_params *params,
                                mor_tokenizer **out_tokenizer, mor_error *out_error)
{
    watch(false);
    NEXT(mor_tokenizer_create);
    return created(next(model, params, out_tokenizer, out_error));
}

mor_status mor_session_create(const mor_model *model, const mor_session_params *params,
                              mor_session **out_session, mor_error *out_error)
{
    watch(false);
    NEXT(mor_session_create);
    return created(next(model, params, out_session, out_error));
}

mor_status mor_session_create_in(const mor_model *model, const mor_session_params *params,
                                 void *memory, size_t bytes, mor_session **out_session,
                                 mor_error *out_error)
{
    watch(false);
    NEXT(mor_session_create_in);
    return created(next(model, params, memory, bytes, out_session, out_error));
}

mor_status mor_session_free(mor_session *session)
{
    NEXT(mor_session_free);
    if (is_watching() && session != NULL) {
        watch(false);
        sessions++;
        bad += during[0] + during[1];
        char line[128];
        int bytes = snprintf(line, sizeof line,
                             "malloc_counter: %ld taken before, %ld taken and %ld given back during\n",
                             before, during[0], during[1]);
        if (write(STDERR_FILENO, line, (size_t)bytes) != bytes)
            bad++;
    }
    return next(session);
}

__attribute__((destructor)) static void verdict(void)
{
    if (bad != 0 || sessions == 0 || before == 0)
        _exit(97);
}
