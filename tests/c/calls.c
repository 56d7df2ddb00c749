/*
 * The tables of tests/calls through the C interface; tests/calls/README.md says what they are.
 *
 *     calls TABLE MODEL ROOT THREADS
 */
#include <mor.h>

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_FIELDS 32
#define MOST 1024 /* tokens of a sequence, bytes of a name */
#define PLACES 8

static const char *file, *root;
static uint32_t all_threads;
static mor_model *model;
static mor_tokenizer *tokenizer;
static mor_session *session;
static mor_batch *batch;
static uint64_t sequences[PLACES];
static char *state;
static size_t state_bytes;
static mor_error why;

/* --- Results are written piece by piece. ------------------------------------------------------- */

static char result[1 << 16];
static char pieces[1 << 14], text[1 << 14];

static void put(const char *format, ...) {
    size_t used = strlen(result);
    va_list args;
    va_start(args, format);
    vsnprintf(result + used, sizeof result - used, format, args);
    va_end(args);
}

/* Before each item of a list. */
static void separate(void) {
    if (result[0]) put(" ");
}

static const char *const statuses[] = {
    "OK", "INVALID_ARGUMENT", "OUT_OF_MEMORY", "IO", "FORMAT", "UNSUPPORTED", "TOKENIZER",
    "TEMPLATE", "CONTEXT_FULL", "KV_FULL", "NOT_FINITE", "THREAD", "CANCELLED", "BUSY",
    "BUFFER_TOO_SMALL", "STATE", "FILE_CHANGED", "LOCK", "NOT_READY", "INTERNAL", "DEVICE"};
static const char *const finishes[] = {"end",      "stop",      "length",  "context_full",
                                       "callback", "cancelled", "stopped", "failed"};

/* --- What a table says. ------------------------------------------------------------------------- */

/* Undoes the escapes of a field, in place. */
static void unescape(char *field) {
    char *to = field;
    if (strcmp(field, "-") == 0) field[0] = '\0';
    for (; *field; field++) {
        if (*field == '\\') {
            field++;
            *to++ = *field == 'n'   ? '\n'
                    : *field == 't' ? '\t'
                    : *field == 'r' ? '\r'
                    : *field == 's' ? ' '
                                    : *field;
        } else {
            *to++ = *field;
        }
    }
    *to = '\0';
}

/* The value of key=value in a list of such, or NULL. */
static const char *given(const char *options, const char *key) {
    size_t length = strlen(key);
    while (*options) {
        if (strncmp(options, key, length) == 0 && options[length] == '=') return options + length + 1;
        options += strcspn(options, " ");
        options += strspn(options, " ");
    }
    return NULL;
}

static long long option(const char *options, const char *key, long long otherwise) {
    const char *value = given(options, key);
    return value ? atoll(value) : otherwise;
}

static float number(const char *options, const char *key, float otherwise) {
    const char *value = given(options, key);
    return value ? strtof(value, NULL) : otherwise;
}

static size_t numbers(const char *list, uint32_t *out) {
    size_t count = 0;
    char *end;
    while (*list && count < MOST) {
        out[count++] = (uint32_t)strtoul(list, &end, 10);
        list = end + strspn(end, " ");
    }
    return count;
}

static uint32_t kv_type(const char *options) {
    const char *name = given(options, "kv");
    if (!name || strncmp(name, "f16", 3) == 0) return MOR_KV_F16;
    return strncmp(name, "q8_0", 4) == 0 ? MOR_KV_Q8_0 : MOR_KV_F32;
}

static mor_session_params session_params(const char *options) {
    mor_session_params p;
    mor_session_params_init(&p, sizeof p);
    p.context = (size_t)option(options, "context", 0);
    p.batch = (size_t)option(options, "batch", (long long)p.batch);
    p.threads = (uint32_t)option(options, "threads", all_threads);
    p.kv_pages = (size_t)option(options, "pages", 0);
    p.kv_type = kv_type(options);
    return p;
}

static mor_batch_params batch_params(const char *options) {
    mor_batch_params p;
    mor_batch_params_init(&p, sizeof p);
    p.context = (size_t)option(options, "context", 0);
    p.sequences = (size_t)option(options, "sequences", 1);
    p.rows = (size_t)option(options, "batch", (long long)p.rows);
    p.threads = (uint32_t)option(options, "threads", all_threads);
    p.kv_pages = (size_t)option(options, "pages", 0);
    p.kv_type = kv_type(options);
    p.pressure = given(options, "pressure") ? MOR_PRESSURE_REFUSE : MOR_PRESSURE_EVICT;
    return p;
}

static mor_sampler_params sampler(const char *options) {
    mor_sampler_params p;
    mor_sampler_params_init(&p, sizeof p);
    p.temperature = number(options, "temperature", p.temperature);
    p.top_p = number(options, "top_p", p.top_p);
    p.min_p = number(options, "min_p", p.min_p);
    p.repeat_penalty = number(options, "penalty", p.repeat_penalty);
    p.top_k = (uint32_t)option(options, "top_k", p.top_k);
    p.repeat_last_n = (uint32_t)option(options, "last_n", p.repeat_last_n);
    p.seed = (uint64_t)option(options, "seed", 0);
    return p;
}

/* --- The calls. A verb that is not one of a group's answers `unknown`. -------------------------- */

static const mor_status unknown = (mor_status)-1;

static int is(const char *verb, const char *name) { return strcmp(verb, name) == 0; }

/* A call on an object: what went wrong stands in it. */
static mor_status keep(mor_status status, const char *sentence) {
    why.status = status;
    snprintf(why.text, sizeof why.text, "%s", status == MOR_OK ? "" : sentence);
    return status;
}
static mor_status on_session(mor_status status) {
    return keep(status, mor_session_last_error(session));
}
static mor_status on_tokenizer(mor_status status) {
    return keep(status, mor_tokenizer_last_error(tokenizer));
}
static mor_status on_batch(mor_status status) { return keep(status, mor_batch_last_error(batch)); }

static mor_status load(const char *verb, const char *const *args) {
    char path[MOST];
    mor_model *loaded = NULL;
    mor_status status;
    snprintf(path, sizeof path, "%s/%s", root, args[0]);
    if (is(args[0], "@")) snprintf(path, sizeof path, "%s", file);
    if (is(verb, "load")) {
        status = mor_model_load(path, NULL, &loaded, &why);
    } else if (is(verb, "load_on")) {
        mor_model_params on;
        mor_model_params_init(&on, sizeof on);
        on.device = (uint8_t)(is(args[1], "cpu")    ? MOR_DEVICE_CPU
                              : is(args[1], "cuda") ? MOR_DEVICE_CUDA
                                                    : atoi(args[1]));
        status = mor_model_load(path, &on, &loaded, &why);
    } else {
        size_t bytes = (size_t)atoll(args[1]);
        char *data = malloc(bytes + 1);
        FILE *in = fopen(path, "rb");
        mor_model_params copy;
        mor_model_params_init(&copy, sizeof copy);
        copy.copy = 1;
        if (!data || !in || fread(data, 1, bytes, in) != bytes) exit(2);
        fclose(in);
        status = mor_model_load_memory(data, bytes, &copy, &loaded, &why);
        free(data);
    }
    if (status != MOR_OK) return status;
    mor_tokenizer_free(tokenizer);
    mor_model_free(model);
    model = loaded;
    return mor_tokenizer_create(model, NULL, &tokenizer, &why);
}

static mor_status describe(void) {
    static const char *const kinds[] = {"vanilla", "recursive", "expert_choice", "token_choice"};
    mor_model_info i;
    i.struct_size = sizeof i;
    mor_status status = mor_model_describe(model, &i);
    if (status != MOR_OK) return status;
    put("%s vocab %u context %u hidden %u feed_forward %u heads %u kv_heads %u head_dim %u "
        "stored %u logical %u recursions %u weights %llu unshared %llu parameters %llu "
        "tokenizer %u template %u",
        kinds[i.kind], i.vocab_size, i.context_length, i.hidden_size, i.feed_forward_size, i.heads,
        i.kv_heads, i.head_dim, i.stored_layers, i.logical_layers, i.recursions,
        (unsigned long long)i.weight_bytes, (unsigned long long)i.unshared_weight_bytes,
        (unsigned long long)i.parameters, i.has_tokenizer, i.has_chat_template);
    return status;
}

static mor_status ask_model(const char *verb, const char *const *args) {
    mor_status status = unknown;
    if (is(verb, "describe")) return describe();
    if (is(verb, "metadata")) {
        size_t bytes;
        why.text[0] = '\0';
        return mor_model_metadata(model, args[0], result, sizeof result, &bytes);
    }
    if (is(verb, "plan")) {
        mor_session_params params = session_params(args[0]);
        mor_session_plan_info plan;
        plan.struct_size = sizeof plan;
        status = mor_session_plan(model, &params, &plan, &why);
        if (status == MOR_OK) {
            put("context %zu batch %zu pages %zu kv_bytes %zu per_token %zu", plan.context,
                plan.batch, plan.kv_pages, plan.kv_bytes, plan.kv_bytes_per_token);
            if (plan.bytes <= plan.kv_bytes || plan.threads != params.threads) put(" WRONG");
        }
    } else if (is(verb, "batch_plan") || is(verb, "batch_plan_in")) {
        mor_batch_params params = batch_params(args[0]);
        mor_batch_plan_info plan;
        plan.struct_size = sizeof plan;
        status = is(verb, "batch_plan")
                     ? mor_batch_plan(model, &params, &plan, &why)
                     : mor_batch_plan_in(model, &params, atof(args[1]), (size_t)atoll(args[2]),
                                         &plan, &why);
        if (status == MOR_OK) {
            put("sequences %zu context %zu batch %zu pages %zu kv_bytes %zu per_token %zu",
                plan.sequences, plan.context, plan.rows, plan.kv_pages, plan.kv_bytes,
                plan.kv_bytes_per_token);
            if (plan.bytes <= plan.kv_bytes || plan.threads != params.threads) put(" WRONG");
        }
    } else if (is(verb, "batch_pages")) {
        mor_batch_params params = batch_params(args[0]);
        size_t pages;
        status = mor_batch_pages_for(model, &params, atof(args[1]), &pages, &why);
        if (status == MOR_OK) put("%zu", pages);
    }
    return status;
}

static mor_status tokenize(const char *verb, const char *const *args, int count) {
    uint32_t tokens[MOST], flags = (uint32_t)atoi(args[0]);
    size_t n = 0, bytes;
    mor_status status = unknown;
    if (is(verb, "encode")) {
        status = mor_tokenizer_encode(tokenizer, args[1], MOR_ZERO_TERMINATED, flags, tokens, MOST, &n);
        for (size_t i = 0; status == MOR_OK && i < n; i++) separate(), put("%u", tokens[i]);
    } else if (is(verb, "decode")) {
        n = numbers(args[1], tokens);
        status = mor_tokenizer_decode(tokenizer, tokens, n, flags, result, sizeof result, &bytes);
    } else if (is(verb, "decode_each")) {
        mor_decode_stream stream = {{0}, 0};
        char piece[256];
        n = numbers(args[1], tokens);
        status = MOR_OK;
        for (size_t i = 0; status == MOR_OK && i < n; i++) {
            status = mor_tokenizer_decode_next(tokenizer, &stream, tokens[i], flags, piece, sizeof piece, &bytes);
            if (status == MOR_OK) put("%s|", piece);
        }
        if (status == MOR_OK) {
            status = mor_tokenizer_decode_end(tokenizer, &stream, piece, sizeof piece, &bytes);
            if (status == MOR_OK) put("%s", piece);
        }
    } else if (is(verb, "token_bytes")) {
        const char *at;
        uint32_t token = (uint32_t)atoi(args[1]);
        status = mor_tokenizer_token_bytes(tokenizer, token, flags, &at, &n);
        for (size_t i = 0; status == MOR_OK && i < n; i++) put("%02x", (unsigned char)at[i]);
    } else if (is(verb, "is_end")) {
        bool end;
        status = mor_tokenizer_is_end(tokenizer, (uint32_t)atoi(args[0]), &end);
        if (status == MOR_OK) put(end ? "true" : "false");
    } else if (is(verb, "format_chat")) {
        mor_chat_message turns[MOST_FIELDS];
        for (n = 0; 2 + 2 * n < (size_t)count; n++) {
            turns[n].role = args[1 + 2 * n];
            turns[n].content = args[2 + 2 * n];
        }
        status = mor_tokenizer_format_chat(tokenizer, turns, n, flags == 1, result, sizeof result,
                                           &bytes);
    }
    return status == unknown ? unknown : on_tokenizer(status);
}

struct drawing {
    const char *verb;
    long after;
    long seen;
};

static bool take(void *user_data, const mor_piece *piece) {
    struct drawing *d = user_data;
    size_t used = strlen(pieces);
    snprintf(pieces + used, sizeof pieces - used, "%s%u:%u", used ? " " : "", piece->token,
             piece->depth);
    used = strlen(text);
    snprintf(text + used, sizeof text - used, "%s", piece->text);
    if (++d->seen != d->after) return true;
    if (is(d->verb, "generate_until")) return false;
    mor_session_cancel(session);
    return true;
}

static mor_status generate(const char *verb, const char *const *args, int count) {
    struct drawing drawing = {verb, is(verb, "generate") ? -1 : atol(args[1]), 0};
    int first = is(verb, "generate") ? 1 : 2;
    mor_finish finish;
    mor_generate_params params;
    mor_generate_params_init(&params, sizeof params);
    if (args[0][0]) params.max_tokens = (size_t)atoll(args[0]);
    params.stop = args + first;
    params.stop_count = (size_t)(count - first);
    params.callback = take;
    params.user_data = &drawing;
    pieces[0] = text[0] = '\0';
    mor_status status = mor_session_generate(session, &params, &finish);
    if (status == MOR_OK) put("%s", finishes[finish]);
    return on_session(status);
}

/* The token of the largest number, the first of equals. */
static void put_likeliest(const float *logits) {
    size_t count, best = 0;
    if (mor_session_logits(session, &logits, &count) != MOR_OK) return;
    for (size_t i = 1; i < count; i++)
        if (logits[i] > logits[best]) best = i;
    put("%zu", best);
}

/* Tokens, depths or the histogram. */
static mor_status list_session(const char *verb, size_t first) {
    uint32_t tokens[MOST];
    uint8_t depths[MOST];
    uint64_t counts[MOR_MAX_RECURSIONS + 1];
    size_t length, i;
    mor_model_info info;
    info.struct_size = sizeof info;
    mor_status status = mor_session_length(session, &length);
    if (status != MOR_OK || mor_model_describe(model, &info) != MOR_OK) return status;
    if (is(verb, "histogram")) {
        status = mor_session_depth_histogram(session, counts, MOR_MAX_RECURSIONS + 1);
        for (i = 0; i <= info.recursions; i++) separate(), put("%llu", (unsigned long long)counts[i]);
    } else if (is(verb, "tokens")) {
        status = mor_session_tokens(session, first, length - first, tokens);
        for (i = 0; i < length - first; i++) separate(), put("%u", tokens[i]);
    } else {
        status = mor_session_depths(session, first, length - first, depths);
        for (i = 0; i < length - first; i++) separate(), put("%u", depths[i]);
    }
    return status;
}

static mor_status run_tokens(const char *verb, const char *const *args) {
    uint32_t tokens[MOST];
    const float *logits = NULL;
    size_t n;
    mor_status status = unknown;
    if (is(verb, "prompt")) {
        status = mor_tokenizer_encode(tokenizer, args[1], MOR_ZERO_TERMINATED,
                                      (uint32_t)atoi(args[0]), tokens, MOST, &n);
        if (status != MOR_OK) return on_tokenizer(status);
        status = mor_session_prefill(session, tokens, n);
        if (status == MOR_OK) put("%zu", n);
    } else if (is(verb, "prefill")) {
        n = numbers(args[0], tokens);
        status = mor_session_prefill(session, tokens, n);
    } else if (is(verb, "prefill_whole")) {
        size_t kept;
        n = numbers(args[0], tokens);
        status = mor_session_prefill_whole(session, tokens, n, &kept);
        if (status == MOR_OK) put("%zu", kept);
    } else if (is(verb, "log_probabilities")) {
        float numbers_of[MOST];
        n = numbers(args[0], tokens);
        status = mor_session_log_probabilities(session, tokens, n, numbers_of);
        for (size_t i = 0; status == MOR_OK && i < n; i++)
            put("%s%ld", i ? " " : "", (long)(100 * numbers_of[i] - 0.5f));
    } else if (is(verb, "step")) {
        status = mor_session_step(session, (uint32_t)atoi(args[0]), &logits);
    } else if (is(verb, "logits")) {
        status = mor_session_logits(session, &logits, &n);
    } else if (is(verb, "sample")) {
        status = mor_session_sample(session, tokens);
        if (status == MOR_OK) put("%u", tokens[0]);
    }
    if (status == MOR_OK && logits) put_likeliest(logits);
    return status;
}

static mor_status keep_state(const char *verb, const char *const *args, int count) {
    mor_status status;
    if (is(verb, "save")) {
        status = mor_session_save_size(session, &state_bytes);
        if (status != MOR_OK) return status;
        state = realloc(state, state_bytes);
        if (!state) exit(2);
        status = mor_session_save(session, state, state_bytes, &state_bytes);
        put("%zu", state_bytes);
        return status;
    }
    long damaged = count > 0 ? atol(args[0]) : -1;
    if (damaged >= 0) state[damaged] ^= 1;
    status = mor_session_restore(session, state, state_bytes);
    if (damaged >= 0) state[damaged] ^= 1;
    return status;
}

static mor_status ask_session(const char *verb, const char *const *args, int count) {
    size_t n;
    mor_status status = run_tokens(verb, args);
    if (status != unknown) return on_session(status);
    if (is(verb, "session")) {
        mor_session_params params = session_params(args[0]);
        mor_session *made = NULL;
        status = mor_session_create(model, &params, &made, &why);
        if (status != MOR_OK) return status;
        mor_session_free(session);
        session = made;
        return status;
    }
    if (is(verb, "sampler")) {
        mor_sampler_params params = sampler(args[0]);
        status = mor_session_set_sampler(session, &params);
    } else if (is(verb, "length")) {
        status = mor_session_length(session, &n);
        put("%zu", n);
    } else if (is(verb, "tokens") || is(verb, "depths")) {
        status = list_session(verb, (size_t)atoll(args[0]));
    } else if (is(verb, "histogram")) {
        status = list_session(verb, 0);
    } else if (is(verb, "kv_bytes")) {
        status = mor_session_kv_bytes_used(session, &n);
        put("%zu", n);
    } else if (is(verb, "cut")) {
        status = mor_session_set_cut(session, strtof(args[0], NULL));
    } else if (is(verb, "depth_limit")) {
        status = mor_session_set_depth_limit(session, (uint32_t)atoi(args[0]));
    } else if (is(verb, "routing")) {
        status = mor_session_set_routing(
            session, is(args[0], "capacity") ? MOR_ROUTING_CAPACITY : MOR_ROUTING_THRESHOLD);
    } else if (is(verb, "rewind")) {
        status = mor_session_rewind(session, (size_t)atoll(args[0]));
    } else if (is(verb, "cancel")) {
        return mor_session_cancel(session);
    } else if (is(verb, "reset_cancel")) {
        return mor_session_reset_cancel(session);
    } else if (is(verb, "save") || is(verb, "restore")) {
        status = keep_state(verb, args, count);
    }
    return status == unknown ? unknown : on_session(status);
}

static mor_status add(const char *verb, const char *const *args, int count) {
    uint32_t prompt[MOST];
    uint64_t sequence;
    const char *options = args[count - 2];
    mor_sampler_params how = sampler(options);
    mor_batch_request request;
    mor_batch_request_init(&request, sizeof request);
    mor_status status = mor_tokenizer_encode(tokenizer, args[count - 1], MOR_ZERO_TERMINATED, 0,
                                             prompt, MOST, &request.prompt_count);
    if (status != MOR_OK) return on_tokenizer(status);
    request.prompt = prompt;
    request.sampler = &how;
    if (given(options, "max")) request.max_tokens = (size_t)option(options, "max", 0);
    request.cut = number(options, "cut", request.cut);
    request.depth_limit = (uint32_t)option(options, "depth_limit", 0);
    request.priority = (int32_t)option(options, "priority", 0);
    request.ignore_end = (uint8_t)option(options, "ignore_end", 0);
    if (is(verb, "add")) {
        status = mor_batch_add(batch, &request, &sequence);
    } else {
        uint64_t parent = sequences[atoi(args[1])];
        status = mor_batch_fork(batch, parent, (size_t)atoll(args[2]), &request, &sequence);
    }
    if (status == MOR_OK) sequences[atoi(args[0])] = sequence;
    return on_batch(status);
}

static mor_status tick(const char *verb) {
    static const char *const kinds[] = {"token", "evicted", "resumed", "full", "finished"};
    const mor_batch_event *events;
    size_t count;
    mor_status status;
    bool idle = is(verb, "tick");
    do {
        status = mor_batch_tick(batch, &events, &count);
        for (size_t i = 0; status == MOR_OK && i < count; i++) {
            const mor_batch_event *e = &events[i];
            int place = 0;
            while (place < PLACES - 1 && sequences[place] != e->sequence) place++;
            separate();
            put("%s:%d", kinds[e->kind], place);
            if (e->kind == MOR_EVENT_TOKEN) put(":%u:%u", e->token, e->depth);
            if (e->kind == MOR_EVENT_FINISHED) put(":%s", finishes[e->finish]);
        }
        if (status == MOR_OK && !idle) status = mor_batch_is_idle(batch, &idle);
    } while (status == MOR_OK && !idle);
    return on_batch(status);
}

static mor_status ask_sequence(const char *verb, uint64_t sequence) {
    uint32_t tokens[MOST];
    uint8_t depths[MOST];
    size_t n, i;
    mor_status status = unknown;
    if (is(verb, "stop")) status = mor_batch_stop(batch, sequence);
    if (is(verb, "remove")) status = mor_batch_remove(batch, sequence);
    if (is(verb, "resume")) status = mor_batch_resume(batch, sequence);
    if (is(verb, "batch_tokens")) {
        status = mor_batch_tokens(batch, sequence, tokens, MOST, &n);
        for (i = 0; status == MOR_OK && i < n; i++) separate(), put("%u", tokens[i]);
    }
    if (is(verb, "batch_depths")) {
        status = mor_batch_depths(batch, sequence, depths, MOST, &n);
        for (i = 0; status == MOR_OK && i < n; i++) separate(), put("%u", depths[i]);
    }
    if (is(verb, "failure")) {
        mor_error failure;
        status = mor_batch_failure(batch, sequence, &failure);
        if (status == MOR_OK) put("%s", statuses[failure.status]);
    }
    if (is(verb, "status")) {
        static const char *const names[] = {"waiting", "running", "full", "finished"};
        mor_sequence_status stands;
        mor_finish finish;
        status = mor_batch_sequence_status(batch, sequence, &stands, &finish);
        if (status == MOR_OK) put("%s", names[stands]);
        if (status == MOR_OK && stands == MOR_SEQUENCE_FINISHED) put(":%s", finishes[finish]);
    }
    return status == unknown ? unknown : on_batch(status);
}

static mor_status ask_batch(const char *verb, const char *const *args) {
    mor_status status = unknown;
    if (is(verb, "batch")) {
        mor_batch_params params = batch_params(args[0]);
        mor_batch *made = NULL;
        status = mor_batch_create(model, &params, &made, &why);
        if (status != MOR_OK) return status;
        mor_batch_free(batch);
        batch = made;
        memset(sequences, 0xff, sizeof sequences);
        return status;
    }
    if (is(verb, "batch_idle")) {
        bool idle;
        status = mor_batch_is_idle(batch, &idle);
        put(idle ? "true" : "false");
    } else if (is(verb, "batch_kv_bytes")) {
        size_t bytes;
        status = mor_batch_kv_bytes_used(batch, &bytes);
        put("%zu", bytes);
    } else if (is(verb, "in_step")) {
        status = mor_batch_set_in_step(batch, is(args[0], "1"));
    } else if (is(verb, "batch_counters")) {
        mor_batch_counters_info c;
        unsigned long long rows = 0;
        c.struct_size = sizeof c;
        status = mor_batch_counters(batch, &c);
        for (int i = 0; i < MOR_MAX_RECURSIONS; i++) rows += c.rows[i];
        put("%llu %llu %llu %llu %llu %llu", (unsigned long long)c.ticks,
            (unsigned long long)c.row_capacity, (unsigned long long)c.finished,
            (unsigned long long)c.logits, (unsigned long long)c.evictions, rows);
    }
    return status == unknown ? unknown : on_batch(status);
}

static mor_status call(const char *verb, const char *const *args, int count) {
    mor_status status;
    if (strncmp(verb, "load", 4) == 0) return load(verb, args);
    if (strncmp(verb, "generate", 8) == 0) return generate(verb, args, count);
    if (is(verb, "add") || is(verb, "fork")) return add(verb, args, count);
    if (is(verb, "tick") || is(verb, "run")) return tick(verb);
    if (is(verb, "pieces") || is(verb, "text")) {
        put("%s", is(verb, "text") ? text : pieces);
        return MOR_OK;
    }
    if ((status = ask_model(verb, args)) != unknown) return status;
    if ((status = ask_batch(verb, args)) != unknown) return status;
    if ((status = ask_session(verb, args, count)) != unknown) return status;
    if (count > 0 && (status = tokenize(verb, args, count)) != unknown) return status;
    if (count > 0 && (status = ask_sequence(verb, sequences[atoi(args[0]) % PLACES])) != unknown)
        return status;
    fprintf(stderr, "no verb '%s'\n", verb);
    exit(2);
}

int main(int argc, char **argv) {
    static char line[1 << 16];
    int number = 0, calls = 0, wrong = 0;
    FILE *table = argc == 5 ? fopen(argv[1], "r") : NULL;
    if (!table) return fprintf(stderr, "usage: calls TABLE MODEL ROOT THREADS\n"), 2;
    file = argv[2];
    root = argv[3];
    all_threads = (uint32_t)atoi(argv[4]);
    while (fgets(line, sizeof line, table)) {
        char *fields[MOST_FIELDS] = {0}, *field;
        int count = 0;
        number++;
        line[strcspn(line, "\n")] = '\0';
        if (line[0] == '#' || line[0] == '\0') continue;
        for (field = strtok(line, "\t"); field && count < MOST_FIELDS; field = strtok(NULL, "\t")) {
            unescape(field);
            fields[count++] = field;
        }
        const char *wanted = fields[count - 2], *said = fields[count - 1];
        result[0] = why.text[0] = '\0';
        mor_status status = call(fields[0], (const char *const *)fields + 1, count - 3);
        int right = strcmp(wanted, statuses[status]) == 0 &&
                    (status == MOR_OK ? strcmp(result, said) == 0 : strstr(why.text, said) != NULL);
        calls++;
        if (right) continue;
        wrong++;
        fprintf(stderr, "%s:%d: %s: %s '%s', not %s '%s'\n", argv[1], number, fields[0],
                statuses[status], status == MOR_OK ? result : why.text, wanted, said);
    }
    fclose(table);
    mor_batch_free(batch);
    mor_session_free(session);
    mor_tokenizer_free(tokenizer);
    mor_model_free(model);
    free(state);
    printf("%d calls, %d threads: %d wrong\n", calls, (int)all_threads, wrong);
    return calls == 0 || wrong > 0;
}
