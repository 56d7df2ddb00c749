/*
 * mor: runs Mixture-of-Recursions language models.
 *
 * This file is generated from src/ffi/ (cargo build --features header); do not edit it.
 *
 * In one minute, leaving out what to do about failures:
 *
 *     mor_model *model = NULL;
 *     mor_tokenizer *tokenizer = NULL;
 *     mor_session *session = NULL;
 *     mor_error error;
 *     uint32_t tokens[64];
 *     size_t count = 0;
 *     mor_generate_params params;
 *     mor_finish finish;
 *
 *     if (mor_model_load("model.gguf", NULL, &model, &error) != MOR_OK) puts(error.text);
 *     mor_tokenizer_create(model, NULL, &tokenizer, &error);
 *     mor_session_create(model, NULL, &session, &error);
 *     mor_tokenizer_encode(tokenizer, "Hello", MOR_ZERO_TERMINATED, MOR_ENCODE_ADD_SPECIAL,
 *                          tokens, 64, &count);
 *     mor_session_prefill(session, tokens, count);
 *     mor_generate_params_init(&params, sizeof params);
 *     params.callback = print_piece;
 *     mor_session_generate(session, &params, &finish);
 *     mor_session_free(session);
 *     mor_tokenizer_free(tokenizer);
 *     mor_model_free(model);
 *
 * Rules that hold for every function:
 *
 * - It returns a status; 0 (MOR_OK) is success. (Functions that return a text, and mor_model_free,
 *   cannot fail.) Results go where `out_` parameters point, on success only, but for a size, which is
 *   written also when the buffer was too small. No function aborts, throws or prints.
 *   A buffer for text or tokens means nothing after a failure.
 * - Sizes of texts never count the zero byte behind them, capacities of buffers do: a text that needs
 *   `out_bytes` needs a buffer of `out_bytes + 1`.
 * - A function that makes an object takes a `mor_error *`, or NULL, for the reason of a failure. Others
 *   leave the reason in the object: mor_session_last_error, mor_tokenizer_last_error,
 *   mor_batch_last_error.
 * - Parameter structs begin with their size. Set them up with their `_init` function, then set fields:
 *   fields that later versions add have defaults. NULL in their place means the defaults.
 * - A NULL, a wrong size, an object of another kind, an unknown flag: each is
 *   MOR_ERROR_INVALID_ARGUMENT, and so is a session in the caller's memory that was freed. A pointer to
 *   memory that is not there, which is what other freed objects are, cannot be checked.
 * - A model may be used by any number of threads at once; a session, tokenizer or batch by one at a
 *   time (MOR_ERROR_BUSY otherwise), but for mor_session_cancel. There is no global state.
 * - What a model on a GPU runs, or is made for it, may also fail with MOR_ERROR_DEVICE. A cancel, a time
 *   budget and the plan's numbers say where a GPU is different.
 * - Text is UTF-8. All numbers are in the machine's byte order.
 *
 * docs/c-api.md says what is promised, how it is checked, and what is not.
 */

#ifndef MOR_H
#define MOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/**
 * In place of a text's length: the text ends with a zero byte.
 */
#define MOR_ZERO_TERMINATED SIZE_MAX

/**
 * Bytes of an error's text, its final zero included.
 */
#define MOR_ERROR_TEXT_BYTES 512

/**
 * Flag of `mor_tokenizer_encode`: put the tokens that begin and end a text around it, if the file
 * asks for them. Usual for a prompt, wrong for a rendered chat, which brings its own.
 */
#define MOR_ENCODE_ADD_SPECIAL 1

/**
 * Flag of `mor_tokenizer_encode`: read the names of control tokens, such as "<|im_end|>", as these
 * tokens. Only for text that is trusted, such as a rendered chat.
 */
#define MOR_ENCODE_PARSE_SPECIAL 2

/**
 * Flag of `mor_tokenizer_decode` and `mor_tokenizer_token_bytes`: write control tokens by their
 * names. Without it they are no text.
 */
#define MOR_DECODE_SPECIAL 1

/**
 * What a session's memory must be aligned to, in bytes.
 */
#define MOR_SESSION_ALIGNMENT 64

/**
 * The most recursions of any model.
 */
#define MOR_MAX_RECURSIONS 64

/**
 * What a call came to. The numbers are fixed: new ones are added at the end, none is reused.
 */
typedef enum mor_status {
  /**
   * The call did what it says.
   */
  MOR_OK = 0,
  /**
   * A parameter, token, text, size or pointer that the call cannot take.
   */
  MOR_ERROR_INVALID_ARGUMENT = 1,
  /**
   * The system gave no memory, or no room for one more thread.
   */
  MOR_ERROR_OUT_OF_MEMORY = 2,
  /**
   * The system refused to read or map a file.
   */
  MOR_ERROR_IO = 3,
  /**
   * The model file is damaged, truncated or made to mislead.
   */
  MOR_ERROR_FORMAT = 4,
  /**
   * The file is sound but of a kind that this library does not run, or this system cannot do
   * what was asked for.
   */
  MOR_ERROR_UNSUPPORTED = 5,
  /**
   * The file has no tokenizer, or one that cannot be used, or the text cannot be expressed in it.
   */
  MOR_ERROR_TOKENIZER = 6,
  /**
   * The file has no chat template, or a broken one, or it refuses the conversation.
   */
  MOR_ERROR_TEMPLATE = 7,
  /**
   * The sequence does not fit into the context of the session or batch.
   */
  MOR_ERROR_CONTEXT_FULL = 8,
  /**
   * Every page of the KV cache is taken.
   */
  MOR_ERROR_KV_FULL = 9,
  /**
   * The model computed a value that is not finite: its weights are damaged. Or a key or a value that is too large for
   * the type in which they are kept.
   */
  MOR_ERROR_NOT_FINITE = 10,
  /**
   * The system refused a thread for another reason than a lack of memory or room, or its affinity
   * or niceness.
   */
  MOR_ERROR_THREAD = 11,
  /**
   * The call was cancelled; the session is as it was before the call (after `mor_session_prefill_whole`
   * it holds what the text has in common with what it held).
   */
  MOR_ERROR_CANCELLED = 12,
  /**
   * Another thread (or a callback of this one) is inside a call on this object.
   */
  MOR_ERROR_BUSY = 13,
  /**
   * A buffer is too small; the needed size was written where the call says.
   */
  MOR_ERROR_BUFFER_TOO_SMALL = 14,
  /**
   * A saved state is damaged, or of another model, version or kind of session.
   */
  MOR_ERROR_STATE = 15,
  /**
   * The model's file was shortened while it was mapped.
   */
  MOR_ERROR_FILE_CHANGED = 16,
  /**
   * The system refused to lock memory.
   */
  MOR_ERROR_LOCK = 17,
  /**
   * The call needs something that has not happened yet, such as logits before any token.
   */
  MOR_ERROR_NOT_READY = 18,
  /**
   * A bug in this library. The object of the call accepts nothing but being freed.
   */
  MOR_ERROR_INTERNAL = 19,
  /**
   * There is no GPU that can be used, it has too little memory, or it failed. What was made on it
   * accepts nothing but being freed; the CPU still works.
   */
  MOR_ERROR_DEVICE = 20,
} mor_status;

/**
 * How much a log line matters.
 */
typedef enum mor_log_level {
  /**
   * What was loaded and created, and what it takes.
   */
  MOR_LOG_INFO = 0,
  /**
   * Something that the host may want to know, such as a model without a usable tokenizer.
   */
  MOR_LOG_WARNING = 1,
} mor_log_level;

/**
 * Why a generation, or a sequence of a batch, ended.
 */
typedef enum mor_finish {
  /**
   * The model drew a token that ends a text; it is neither run nor shown.
   */
  MOR_FINISH_END = 0,
  /**
   * A stop string came up. Its tokens, which were not shown, were run and are in the session:
   * `mor_session_rewind` takes them out before the text goes on.
   */
  MOR_FINISH_STOP = 1,
  /**
   * `max_tokens` were written.
   */
  MOR_FINISH_LENGTH = 2,
  /**
   * The context is full.
   */
  MOR_FINISH_CONTEXT_FULL = 3,
  /**
   * The callback asked for it.
   */
  MOR_FINISH_CALLBACK = 4,
  /**
   * It was cancelled; the session stands after the last token that was shown.
   */
  MOR_FINISH_CANCELLED = 5,
  /**
   * Of a batch's sequence: `mor_batch_stop`.
   */
  MOR_FINISH_STOPPED = 6,
  /**
   * Of a batch's sequence: the model computed a value that is not finite, or too large for the type of keys and values.
   * `mor_batch_failure` says
   * which.
   */
  MOR_FINISH_FAILED = 7,
} mor_finish;

/**
 * What happened to a sequence in a tick.
 */
typedef enum mor_event_kind {
  /**
   * A token was drawn. It is run by a later tick.
   */
  MOR_EVENT_TOKEN = 0,
  /**
   * It gave its pages back and waits (`MOR_PRESSURE_EVICT`).
   */
  MOR_EVENT_EVICTED = 1,
  /**
   * It was evicted and runs again.
   */
  MOR_EVENT_RESUMED = 2,
  /**
   * The KV pool has no page for it; it stands still until `mor_batch_resume`.
   */
  MOR_EVENT_FULL = 3,
  /**
   * It ended. Its tokens can be read, and forks made of it, until it is removed.
   */
  MOR_EVENT_FINISHED = 4,
} mor_event_kind;

/**
 * Where a sequence of a batch stands.
 */
typedef enum mor_sequence_status {
  /**
   * It waits for pages of the KV pool, or for the first tick.
   */
  MOR_SEQUENCE_WAITING = 0,
  /**
   * Its tokens are being run.
   */
  MOR_SEQUENCE_RUNNING = 1,
  /**
   * The KV pool has no page for it, with `MOR_PRESSURE_EVICT` not even when it is alone.
   * `mor_batch_resume` lets it try again.
   */
  MOR_SEQUENCE_FULL = 2,
  /**
   * It is done.
   */
  MOR_SEQUENCE_FINISHED = 3,
} mor_sequence_status;

/**
 * Where a model runs.
 */
typedef enum mor_device {
  /**
   * The processor.
   */
  MOR_DEVICE_CPU = 0,
  /**
   * An NVIDIA GPU. Needs a library that was built with the feature `cuda`, and NVIDIA's driver.
   */
  MOR_DEVICE_CUDA = 1,
} mor_device;

/**
 * What chooses a token's depth.
 */
typedef enum mor_model_kind {
  /**
   * Every layer runs once: a plain Llama model.
   */
  MOR_MODEL_VANILLA = 0,
  /**
   * Every token runs every recursion.
   */
  MOR_MODEL_RECURSIVE = 1,
  /**
   * Before each recursion a router decides which tokens go on.
   */
  MOR_MODEL_EXPERT_CHOICE = 2,
  /**
   * One router gives each token its depth before the first recursion.
   */
  MOR_MODEL_TOKEN_CHOICE = 3,
} mor_model_kind;

/**
 * How keys and values are stored.
 */
typedef enum mor_kv_type {
  /**
   * 2 bytes a number.
   */
  MOR_KV_F16 = 0,
  /**
   * 34 bytes for 32 numbers; the width of a head must be a multiple of 32.
   */
  MOR_KV_Q8_0 = 1,
  /**
   * 4 bytes a number: as computed, for exact comparisons.
   */
  MOR_KV_F32 = 2,
} mor_kv_type;

/**
 * Who decides which tokens go on to the next recursion of an expert-choice model.
 */
typedef enum mor_routing {
  /**
   * Each token's own score, against the cut: causal, for generating.
   */
  MOR_ROUTING_THRESHOLD = 0,
  /**
   * The best of the whole text, as the paper trains and scores: for comparing with published
   * numbers. The text must come as one `mor_session_prefill` into an empty session whose `batch`
   * holds it.
   */
  MOR_ROUTING_CAPACITY = 1,
} mor_routing;

/**
 * Who has the pages of the KV pool when there are not enough.
 */
typedef enum mor_pressure {
  /**
   * The sequence of lowest priority gives its pages back and goes on when there is room again: it
   * is run anew from its tokens, to the same results.
   */
  MOR_PRESSURE_EVICT = 0,
  /**
   * The sequence of lowest priority of those that need a page stands still, with what it has,
   * until `mor_batch_resume`.
   */
  MOR_PRESSURE_REFUSE = 1,
} mor_pressure;

/**
 * Many sequences at once, batched by depth: each `mor_batch_tick` runs the shared block once over
 * all tokens that need it, whatever their sequence and recursion. What a sequence gets does not
 * depend on who else is there: the same bits as in a session of its own.
 *
 * One call at a time may use a batch; a second one gets `MOR_ERROR_BUSY` and does nothing. It may
 * move between threads. No call but those that create and free a batch allocates or frees memory, on
 * any thread.
 */
typedef struct mor_batch mor_batch;

/**
 * A model: the mapped file and what it says about itself. It never changes, so any number of
 * threads, sessions and tokenizers may use one at the same time.
 */
typedef struct mor_model mor_model;

/**
 * One sequence of tokens in the making, its memory, its helper threads and its sampler.
 *
 * One call at a time may use a session; a second one, from another thread or from a callback of the
 * first, gets `MOR_ERROR_BUSY` and does nothing. Only `mor_session_cancel` and
 * `mor_session_reset_cancel` may come at any time. No call but those that create and free a session
 * allocates or frees memory, on any thread.
 */
typedef struct mor_session mor_session;

/**
 * A model's tokenizer with working memory of its own. One call at a time may use it; a second one
 * gets `MOR_ERROR_BUSY`. Threads make one each; they share the vocabulary, which is the model's.
 * No call but those that create and free it, and `mor_tokenizer_format_chat`, allocates.
 */
typedef struct mor_tokenizer mor_tokenizer;

/**
 * Takes one line of log, a sentence of UTF-8 that ends with a zero byte and lives for the call.
 * It is called on the thread of the call that has something to tell, must not call this library on
 * the object in question, and must not unwind.
 */
typedef void (*mor_log_fn)(void *user_data, enum mor_log_level level, const char *text);

/**
 * How a model is loaded. Set it up with `mor_model_params_init`; NULL in its place means the
 * defaults. Numbers of type `uint8_t` are truths: 0 is no, anything else yes.
 */
typedef struct mor_model_params {
  /**
   * Size of this struct as the caller knows it; `mor_model_params_init` sets it.
   */
  size_t struct_size;
  /**
   * Read the file into memory of this process instead of mapping it. Default: no. A map costs no
   * memory of its own and is shared between processes. But if somebody truncates the file while
   * a call is reading it, the system ends the process with SIGBUS; between calls, truncation is
   * found and told as `MOR_ERROR_FILE_CHANGED`. A copy is safe from both. (Replacing a file by
   * renaming another one over it, or deleting it, harms neither.)
   */
  uint8_t copy;
  /**
   * Touch every page while loading, so that no later call waits for the disk. Default: no.
   */
  uint8_t prefault;
  /**
   * Keep every page in memory until the model is freed. Default: no. When the system refuses,
   * loading fails with `MOR_ERROR_LOCK`.
   */
  uint8_t lock;
  /**
   * Where the model runs, a `mor_device`. Default: `MOR_DEVICE_CPU`.
   */
  uint8_t device;
  /**
   * The number of the GPU, from 0, when the device is one.
   */
  uint8_t device_index;
  /**
   * Zero.
   */
  uint8_t reserved[3];
  /**
   * Takes what the library has to tell about this model and its sessions; NULL (the default):
   * nobody. The library itself writes nowhere.
   */
  mor_log_fn log;
  /**
   * Passed to `log`, on whatever thread it is called.
   */
  void *log_user_data;
} mor_model_params;

/**
 * Why a call that makes an object failed. The memory is the caller's. After a call that failed it
 * holds the status and a sentence; after one that succeeded, `MOR_OK` and an empty text.
 */
typedef struct mor_error {
  /**
   * What the call returned.
   */
  enum mor_status status;
  /**
   * What was wrong and what to do about it, one sentence of UTF-8 that ends with a zero byte.
   */
  char text[MOR_ERROR_TEXT_BYTES];
} mor_error;

/**
 * What a model says about itself. Set `struct_size` to `sizeof(mor_model_info)` before the call.
 */
typedef struct mor_model_info {
  /**
   * Size of this struct as the caller knows it.
   */
  size_t struct_size;
  /**
   * A `mor_model_kind`.
   */
  uint32_t kind;
  /**
   * Tokens in the vocabulary: the length of a row of logits.
   */
  uint32_t vocab_size;
  /**
   * Tokens that the model was trained to see at once.
   */
  uint32_t context_length;
  /**
   * Width of the residual stream.
   */
  uint32_t hidden_size;
  /**
   * Inner width of the feed-forward half.
   */
  uint32_t feed_forward_size;
  /**
   * Query heads.
   */
  uint32_t heads;
  /**
   * Key and value heads.
   */
  uint32_t kv_heads;
  /**
   * Width of a head.
   */
  uint32_t head_dim;
  /**
   * Layers in the file.
   */
  uint32_t stored_layers;
  /**
   * Layers that a token of full depth passes.
   */
  uint32_t logical_layers;
  /**
   * N_r: the most recursions that a token takes; 1 for a vanilla model.
   */
  uint32_t recursions;
  /**
   * The cut that the routers were trained for (`mor_session_set_cut`).
   */
  float cut;
  /**
   * Bytes of all tensors, each once: what a run reads of the map.
   */
  uint64_t weight_bytes;
  /**
   * Bytes that the weights would take if recursions shared nothing.
   */
  uint64_t unshared_weight_bytes;
  /**
   * Weights in the file.
   */
  uint64_t parameters;
  /**
   * 1 when `mor_tokenizer_create` will find a usable tokenizer, else 0.
   */
  uint32_t has_tokenizer;
  /**
   * 1 when the file has a chat template, else 0.
   */
  uint32_t has_chat_template;
} mor_model_info;

/**
 * What a tokenizer is made for. Set it up with `mor_tokenizer_params_init`; NULL in its place means
 * the defaults.
 */
typedef struct mor_tokenizer_params {
  /**
   * Size of this struct as the caller knows it; `mor_tokenizer_params_init` sets it.
   */
  size_t struct_size;
  /**
   * The longest piece of text without a break that `mor_tokenizer_encode` can take, in bytes: a
   * word for byte-level vocabularies, whose texts may be of any length; the text between two
   * special tokens for SentencePiece's. The working memory is about 29 times as large. Default:
   * 16384.
   */
  size_t max_piece_bytes;
} mor_tokenizer_params;

/**
 * What a tokenizer says about itself. Set `struct_size` to `sizeof(mor_tokenizer_info)` before the
 * call. A special token that the file does not have is -1.
 */
typedef struct mor_tokenizer_info {
  /**
   * Size of this struct as the caller knows it.
   */
  size_t struct_size;
  /**
   * Tokens. The model may have more: its last rows are then no text.
   */
  uint32_t vocab_size;
  /**
   * The token that begins a text.
   */
  int32_t bos;
  /**
   * The token that ends a text.
   */
  int32_t eos;
  /**
   * The token that ends a turn of a conversation.
   */
  int32_t eot;
  /**
   * 1 when the file asks for `bos` before each text, else 0.
   */
  uint32_t add_bos;
  /**
   * 1 when the file asks for `eos` after each text, else 0.
   */
  uint32_t add_eos;
  /**
   * Bytes of the longest token.
   */
  size_t max_token_bytes;
} mor_tokenizer_info;

/**
 * A text that comes token by token, as a batch gives tokens: the beginning of a character whose end is still missing.
 * Set it to zero (`mor_decode_stream stream = {0};`) before the first token. It is plain memory of the caller, one for
 * each text; a copy goes on from the same place, as a fork does.
 */
typedef struct mor_decode_stream {
  /**
   * The bytes.
   */
  uint8_t pending[4];
  /**
   * How many they are, at most 3.
   */
  uint32_t pending_count;
} mor_decode_stream;

/**
 * One turn of a conversation. Both texts are UTF-8 and end with a zero byte.
 */
typedef struct mor_chat_message {
  /**
   * Who speaks: usually "system", "user" or "assistant".
   */
  const char *role;
  /**
   * What is said.
   */
  const char *content;
} mor_chat_message;

/**
 * What a session is planned for. Set it up with `mor_session_params_init`; NULL in its place means
 * the defaults. Numbers of type `uint8_t` are truths: 0 is no, anything else yes.
 */
typedef struct mor_session_params {
  /**
   * Size of this struct as the caller knows it; `mor_session_params_init` sets it.
   */
  size_t struct_size;
  /**
   * Most tokens of the sequence. 0 (the default): as many as the model was trained for
   * (`mor_model_info.context_length`). More are allowed, but models write worse there.
   */
  size_t context;
  /**
   * Most tokens of one pass over the weights: prompts are taken in pieces of this size. Larger
   * is faster and takes more memory. 0 (the default): 64, on a GPU 512. More than `context`
   * counts as `context`. Results do not depend on it.
   */
  size_t batch;
  /**
   * Threads that share the work, the caller's included: `threads - 1` are started when the
   * session is created. At most 256. Results do not depend on it. 0 (the default): one for each
   * core that this process may use. On a GPU always 1.
   */
  uint32_t threads;
  /**
   * A `mor_kv_type`. Default: `MOR_KV_F16`.
   */
  uint32_t kv_type;
  /**
   * Pages of the KV pool, of 16 entries each. 0 (the default): enough for every token to take
   * every recursion. A smaller pool takes less memory and bets on tokens that leave early; when
   * it is lost, calls fail with `MOR_ERROR_KV_FULL`. More than enough counts as enough; the
   * least that holds one token of full depth is one page for each layer that it passes
   * (`mor_model_info.logical_layers`), fewer where recursions share their keys and values.
   */
  size_t kv_pages;
  /**
   * Rows of logits that `mor_session_log_probabilities` computes together: the output matrix is read once for so many
   * of them, and each takes 4 bytes for every token of the vocabulary. 0 (the default): 1; 16 or more are faster
   * where texts are scored. Results do not depend on it.
   */
  size_t logit_rows;
  /**
   * The CPUs that helper threads may run on, by the system's numbers (below 1024), or NULL (the
   * default) for any. The caller's own thread is left alone. Linux and Android only. Read during
   * the call, not kept.
   */
  const uint32_t *cpus;
  /**
   * How many `cpus` there are.
   */
  size_t cpu_count;
  /**
   * Niceness of the helper threads, from -20 (first) to 19 (last). 0 (the default) leaves it as
   * it is inherited; below that needs a privilege. Linux and Android only.
   */
  int32_t niceness;
  /**
   * Touch every page of the session's memory when it is created, so that no later call waits
   * for the system to give one. Default: no.
   */
  uint8_t prefault;
  /**
   * Keep the session's memory from being swapped out. Default: no. When the system refuses,
   * creating fails with `MOR_ERROR_LOCK`.
   */
  uint8_t lock;
  /**
   * Zero.
   */
  uint8_t reserved[2];
} mor_session_params;

/**
 * What a session will take. Set `struct_size` to `sizeof(mor_session_plan_info)` before the call.
 */
typedef struct mor_session_plan_info {
  /**
   * Size of this struct as the caller knows it.
   */
  size_t struct_size;
  /**
   * Bytes of the session's one block of memory: all that it takes, at once, when it is created,
   * but for the stacks of its helper threads and what it takes on a GPU.
   */
  size_t bytes;
  /**
   * What the block must be aligned to, in bytes: `MOR_SESSION_ALIGNMENT`.
   */
  size_t alignment;
  /**
   * The pages of the KV cache: of `bytes`, or of `device_bytes` when the model is on a GPU.
   */
  size_t kv_bytes;
  /**
   * Bytes of KV pages that a token of full depth takes.
   */
  size_t kv_bytes_per_token;
  /**
   * Bytes of address space of the helper threads' stacks. The system gives them page by page as
   * they are used, some kilobytes each.
   */
  size_t stack_bytes;
  /**
   * Tokens of the sequence, with the default filled in.
   */
  size_t context;
  /**
   * Tokens of a pass.
   */
  size_t batch;
  /**
   * Pages of the KV pool.
   */
  size_t kv_pages;
  /**
   * Threads, the caller's included.
   */
  uint32_t threads;
  /**
   * Zero.
   */
  uint32_t reserved;
  /**
   * Bytes of the GPU's memory, besides the weights; 0 on the CPU.
   */
  size_t device_bytes;
  /**
   * Bytes of the host's memory that are pinned for copies to and from the GPU; 0 on the CPU.
   */
  size_t pinned_bytes;
} mor_session_plan_info;

/**
 * How tokens are drawn. Set it up with `mor_sampler_params_init`. The filters work in this order:
 * penalty, top-k, top-p, min-p, temperature.
 */
typedef struct mor_sampler_params {
  /**
   * Size of this struct as the caller knows it; `mor_sampler_params_init` sets it.
   */
  size_t struct_size;
  /**
   * Logits are divided by this before the draw; 0 takes the likeliest token. Default: 0.8.
   */
  float temperature;
  /**
   * Only the likeliest tokens whose probabilities add up to this stay; 1 does nothing. Default:
   * 0.95.
   */
  float top_p;
  /**
   * Only tokens at least this times as likely as the likeliest stay; 0 does nothing. Default:
   * 0.05.
   */
  float min_p;
  /**
   * Logits of recent tokens are divided by this where positive and multiplied where negative; 1
   * (the default) does nothing. From 0.001 to 1000.
   */
  float repeat_penalty;
  /**
   * Only this many of the likeliest tokens stay; 0 does nothing. Default: 40.
   */
  uint32_t top_k;
  /**
   * How many tokens back the penalty looks. Default: 64.
   */
  uint32_t repeat_last_n;
  /**
   * Start of the random sequence: the same seed draws the same tokens. Default: 0.
   */
  uint64_t seed;
} mor_sampler_params;

/**
 * One token of a generation, as it comes. All of it lives for the callback only.
 */
typedef struct mor_piece {
  /**
   * The token, which has been run and is part of the session.
   */
  uint32_t token;
  /**
   * Recursions that it ran.
   */
  uint32_t depth;
  /**
   * The text that is certain with this token: UTF-8, whole characters, nothing that may still
   * turn out to be a stop string, with a zero byte behind it. Often empty; the last call of a
   * generation may repeat the last token with the rest of the text (but not after the callback
   * itself has ended it: it is not called again, and what was held back is not shown).
   */
  const char *text;
  /**
   * Bytes of `text` without the zero byte.
   */
  size_t text_bytes;
} mor_piece;

/**
 * Takes the tokens of a generation; answers whether it is to go on. It may look at other objects
 * but gets `MOR_ERROR_BUSY` from this session, but for `mor_session_cancel`. It must not unwind
 * (no C++ exception, no longjmp).
 */
typedef bool (*mor_piece_fn)(void *user_data, const struct mor_piece *piece);

/**
 * What to generate. Set it up with `mor_generate_params_init`.
 */
typedef struct mor_generate_params {
  /**
   * Size of this struct as the caller knows it; `mor_generate_params_init` sets it.
   */
  size_t struct_size;
  /**
   * Most tokens to write. Default: as many as the context holds. With 0 nothing is run and the
   * generation ends with `MOR_FINISH_LENGTH`.
   */
  size_t max_tokens;
  /**
   * Texts that end the generation and are not part of it, each UTF-8 that ends with a zero byte;
   * or NULL (the default). One of more than 1024 bytes is refused, an empty one ends nothing.
   * Read during the call, not kept.
   */
  const char *const *stop;
  /**
   * How many there are.
   */
  size_t stop_count;
  /**
   * Takes the tokens; NULL (the default): nobody, and they are found in the session afterwards.
   */
  mor_piece_fn callback;
  /**
   * Passed to `callback`.
   */
  void *user_data;
} mor_generate_params;

/**
 * What a batch is planned for. Set it up with `mor_batch_params_init`; NULL in its place means the
 * defaults. Numbers of type `uint8_t` are truths: 0 is no, anything else yes.
 */
typedef struct mor_batch_params {
  /**
   * Size of this struct as the caller knows it; `mor_batch_params_init` sets it.
   */
  size_t struct_size;
  /**
   * Most tokens of a sequence. 0 (the default): as many as the model was trained for.
   */
  size_t context;
  /**
   * Sequences at a time, those among them that are done and not yet removed. At least 1, which is
   * the default.
   */
  size_t sequences;
  /**
   * Most tokens of one tick's pass over the weights. Larger is faster when there are many
   * sequences or long prompts, and takes more memory. 0 (the default): 64, on a GPU 512. More than
   * all sequences can hold counts as that. Results do not depend on it.
   */
  size_t rows;
  /**
   * Rows of logits that are computed together when tokens are drawn for many sequences: the output
   * matrix is read once for so many of them, and each takes 4 bytes for every token of the
   * vocabulary. 0 (the default): one for each sequence, up to 32; on a GPU at least that
   * many. Results do not depend on it.
   */
  size_t logit_rows;
  /**
   * Pages of the KV pool that the sequences share, of 16 entries each. 0 (the default): enough for
   * every token of every sequence to take every recursion; `mor_batch_pages_for` says how many do
   * for less. More than enough counts as enough.
   */
  size_t kv_pages;
  /**
   * Threads that share the work, the caller's included: `threads - 1` are started when the batch
   * is created. At most 256. Results do not depend on it. 0 (the default): one for each core that
   * this process may use. On a GPU always 1.
   */
  uint32_t threads;
  /**
   * A `mor_kv_type`. Default: `MOR_KV_F16`.
   */
  uint32_t kv_type;
  /**
   * A `mor_pressure`: what happens when the KV pool is full. Default: `MOR_PRESSURE_EVICT`.
   */
  uint32_t pressure;
  /**
   * As in `mor_session_params`.
   */
  int32_t niceness;
  /**
   * As in `mor_session_params`. Read during the call, not kept.
   */
  const uint32_t *cpus;
  /**
   * How many `cpus` there are.
   */
  size_t cpu_count;
  /**
   * Touch every page of the batch's memory when it is created, so that no later call waits for
   * the system to give one. Default: no.
   */
  uint8_t prefault;
  /**
   * Keep the batch's memory from being swapped out, but for its `heap_bytes`. Default: no. When
   * the system refuses, creating fails with `MOR_ERROR_LOCK`.
   */
  uint8_t lock;
  /**
   * Zero.
   */
  uint8_t reserved[6];
} mor_batch_params;

/**
 * What a batch will take. Set `struct_size` to `sizeof(mor_batch_plan_info)` before the call.
 */
typedef struct mor_batch_plan_info {
  /**
   * Size of this struct as the caller knows it.
   */
  size_t struct_size;
  /**
   * Bytes of the batch's one block of memory, which it takes when it is created. Besides there are
   * `heap_bytes` and the stacks of its helper threads.
   */
  size_t bytes;
  /**
   * Bytes that it takes from the heap when it is created, for its list of sequences.
   */
  size_t heap_bytes;
  /**
   * The pages of the KV pool: of `bytes`, or of `device_bytes` when the model is on a GPU.
   */
  size_t kv_bytes;
  /**
   * Bytes of KV pages that a token of full depth takes.
   */
  size_t kv_bytes_per_token;
  /**
   * Bytes of address space of the helper threads' stacks. The system gives them page by page as
   * they are used, some kilobytes each.
   */
  size_t stack_bytes;
  /**
   * Tokens of a sequence, with the default filled in.
   */
  size_t context;
  /**
   * Sequences at a time.
   */
  size_t sequences;
  /**
   * Tokens of a tick's pass.
   */
  size_t rows;
  /**
   * Pages of the KV pool.
   */
  size_t kv_pages;
  /**
   * Threads, the caller's included.
   */
  uint32_t threads;
  /**
   * Zero.
   */
  uint32_t reserved;
  /**
   * Bytes of the GPU's memory, besides the weights; 0 on the CPU.
   */
  size_t device_bytes;
  /**
   * Bytes of the host's memory that are pinned for copies to and from the GPU; 0 on the CPU.
   */
  size_t pinned_bytes;
} mor_batch_plan_info;

/**
 * What a new sequence of a batch is to do. Set it up with `mor_batch_request_init`, then set at least
 * the prompt. All of it is read during the call, nothing kept.
 */
typedef struct mor_batch_request {
  /**
   * Size of this struct as the caller knows it; `mor_batch_request_init` sets it.
   */
  size_t struct_size;
  /**
   * Its tokens; for a fork, those after the common beginning. NULL (the default) for none.
   */
  const uint32_t *prompt;
  /**
   * How many tokens.
   */
  size_t prompt_count;
  /**
   * Most tokens to generate; 0 only runs the prompt. Default: as many as the context holds.
   */
  size_t max_tokens;
  /**
   * How tokens are drawn, or NULL (the default) for the defaults.
   */
  const struct mor_sampler_params *sampler;
  /**
   * The routers' cut, from 0 to 1: see `mor_session_set_cut`. Below 0 (the default, -1): as the
   * model was trained; for a fork, as its parent, which is all that a fork may have.
   */
  float cut;
  /**
   * The most recursions of a token, from 1. 0 (the default): all; for a fork, as its parent, which
   * is all that a fork may have. Others are refused for models without routers.
   */
  uint32_t depth_limit;
  /**
   * Under pressure sequences of lower priority give way; of equals the later. Default: 0.
   */
  int32_t priority;
  /**
   * Go on after tokens that end a text. Default: no. 0 is no, anything else yes.
   */
  uint8_t ignore_end;
  /**
   * Zero.
   */
  uint8_t reserved[3];
} mor_batch_request;

/**
 * What a tick brought for a sequence.
 */
typedef struct mor_batch_event {
  /**
   * The sequence that it is about.
   */
  uint64_t sequence;
  /**
   * What happened.
   */
  enum mor_event_kind kind;
  /**
   * Of `MOR_EVENT_TOKEN`: the token; else 0.
   */
  uint32_t token;
  /**
   * Of `MOR_EVENT_TOKEN`: recursions of the token before it, after which it was drawn; else 0.
   */
  uint32_t depth;
  /**
   * Of `MOR_EVENT_FINISHED`: why; else 0.
   */
  enum mor_finish finish;
} mor_batch_event;

/**
 * What a batch ran since it was created. Set `struct_size` to `sizeof(mor_batch_counters_info)`
 * before the call.
 */
typedef struct mor_batch_counters_info {
  /**
   * Size of this struct as the caller knows it.
   */
  size_t struct_size;
  /**
   * Ticks that ran anything.
   */
  uint64_t ticks;
  /**
   * Rows for which there was room in the passes of the recursions.
   */
  uint64_t row_capacity;
  /**
   * Rows that passed the last layers.
   */
  uint64_t finished;
  /**
   * Rows of logits.
   */
  uint64_t logits;
  /**
   * Sequences that gave their pages back.
   */
  uint64_t evictions;
  /**
   * Rows of the passes of the recursions, by recursion from 0: each ran the block once. Their sum
   * over `row_capacity` is the share of the room that was used. Without routers a row runs all
   * recursions in one pass and counts at 0.
   */
  uint64_t rows[MOR_MAX_RECURSIONS];
} mor_batch_counters_info;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The version of this library, as "1.2.3". The text lives as long as the program.
 */
const char *mor_version(void);

/**
 * One sentence about a status (a `mor_status`), for people. Never NULL; a number that is no status
 * gives a sentence too. The text lives as long as the program. What went wrong in a particular call is told better
 * by the `mor_error` that it took, or by the object's `..._last_error`.
 */
const char *mor_status_text(int32_t status);

/**
 * Sets every field of `params` to its default.
 *
 * @param params       the struct
 * @param struct_size  `sizeof(mor_model_params)`
 * @return `MOR_ERROR_INVALID_ARGUMENT` when `params` is NULL or the size impossible
 */
enum mor_status mor_model_params_init(struct mor_model_params *params, size_t struct_size);

/**
 * Loads the GGUF file at `path`: maps it read-only and checks all that is needed to run it. The
 * weights are used where they lie in the map; none is copied, unless `params->copy` asks for it.
 * May block on the disk. Files are not trusted: a damaged or hostile one gives an error.
 *
 * @param path       name of the file, UTF-8 (on Unix: any bytes), ending with a zero byte
 * @param params     how, or NULL
 * @param out_model  gets the model; free it with `mor_model_free`
 * @param out_error  gets the reason of a failure, or NULL
 * @return `MOR_ERROR_IO`, `MOR_ERROR_FORMAT`, `MOR_ERROR_UNSUPPORTED`, `MOR_ERROR_OUT_OF_MEMORY`,
 *         `MOR_ERROR_LOCK`, `MOR_ERROR_INVALID_ARGUMENT`; `*out_model` is then left as it was
 */
enum mor_status mor_model_load(const char *path,
                               const struct mor_model_params *params,
                               struct mor_model **out_model,
                               struct mor_error *out_error);

/**
 * As `mor_model_load`, from a descriptor of an open file: the `bytes` bytes from `offset` on, for
 * example of an asset inside an Android package. The descriptor stays the caller's and may be
 * closed after the call. Not on Windows.
 *
 * @param descriptor  a file that can be read and mapped
 * @param offset      where the model begins in it, any number
 * @param bytes       how long it is; 0: up to the file's end
 * @return as `mor_model_load`
 */
enum mor_status mor_model_load_descriptor(int32_t descriptor,
                                          uint64_t offset,
                                          uint64_t bytes,
                                          const struct mor_model_params *params,
                                          struct mor_model **out_model,
                                          struct mor_error *out_error);

/**
 * As `mor_model_load`, from memory of the caller, which is used where it is and must neither change
 * nor go before the model and every session and tokenizer made of it are freed. With
 * `params->copy` it is copied and may go at once. `params->prefault` and `params->lock` concern the
 * copy.
 *
 * @param data   the bytes of a GGUF file, at any address
 * @param bytes  how many they are
 * @return as `mor_model_load`
 */
enum mor_status mor_model_load_memory(const void *data,
                                      size_t bytes,
                                      const struct mor_model_params *params,
                                      struct mor_model **out_model,
                                      struct mor_error *out_error);

/**
 * Frees a model; NULL is allowed, and an object of another kind is left alone. Sessions and tokenizers made of it keep what they need of it and
 * stay usable; the file is unmapped with the last of them. Must not be called while another call on
 * this model is in progress.
 */
void mor_model_free(struct mor_model *model);

/**
 * Describes a model. Any thread, any time.
 *
 * @param model     the model
 * @param out_info  gets the description; its `struct_size` must be set
 */
enum mor_status mor_model_describe(const struct mor_model *model, struct mor_model_info *out_info);

/**
 * Copies the value of a metadata key whose value is a string, such as "general.name", and a zero
 * byte behind it. Any thread, any time.
 *
 * @param model      the model
 * @param key        the key, ending with a zero byte
 * @param buffer     gets the text; may be NULL when `capacity` is 0
 * @param capacity   bytes in `buffer`
 * @param out_bytes  gets the text's length without the zero byte, also when the buffer is too
 *                   small
 * @return `MOR_ERROR_BUFFER_TOO_SMALL`; `MOR_ERROR_INVALID_ARGUMENT`, also when the file has no
 *         such key or its value is no string
 */
enum mor_status mor_model_metadata(const struct mor_model *model,
                                   const char *key,
                                   char *buffer,
                                   size_t capacity,
                                   size_t *out_bytes);

/**
 * Sets every field of `params` to its default.
 *
 * @param params       the struct
 * @param struct_size  `sizeof(mor_tokenizer_params)`
 */
enum mor_status mor_tokenizer_params_init(struct mor_tokenizer_params *params, size_t struct_size);

/**
 * Creates a tokenizer of a model. The model may be freed before it.
 *
 * @param model          the model
 * @param params         for what, or NULL
 * @param out_tokenizer  gets the tokenizer; free it with `mor_tokenizer_free`
 * @param out_error      gets the reason of a failure, or NULL
 * @return `MOR_ERROR_TOKENIZER` when the file has none that can be used, `MOR_ERROR_OUT_OF_MEMORY`,
 *         `MOR_ERROR_INVALID_ARGUMENT`; `*out_tokenizer` is then left as it was
 */
enum mor_status mor_tokenizer_create(const struct mor_model *model,
                                     const struct mor_tokenizer_params *params,
                                     struct mor_tokenizer **out_tokenizer,
                                     struct mor_error *out_error);

/**
 * Frees a tokenizer; NULL is allowed.
 *
 * @return `MOR_ERROR_BUSY` when a call on it is in progress; it then stays valid
 */
enum mor_status mor_tokenizer_free(struct mor_tokenizer *tokenizer);

/**
 * As `mor_session_last_error`, of a tokenizer.
 */
const char *mor_tokenizer_last_error(const struct mor_tokenizer *tokenizer);

/**
 * Describes a tokenizer.
 *
 * @param tokenizer  the tokenizer
 * @param out_info   gets the description; its `struct_size` must be set
 */
enum mor_status mor_tokenizer_describe(struct mor_tokenizer *tokenizer,
                                       struct mor_tokenizer_info *out_info);

/**
 * Writes the tokens of a text.
 *
 * @param tokenizer   the tokenizer
 * @param text        UTF-8
 * @param text_bytes  its length, or `MOR_ZERO_TERMINATED`
 * @param flags       0 or a sum of `MOR_ENCODE_...`
 * @param out_tokens  gets the tokens; may be NULL when `capacity` is 0
 * @param capacity    how many it holds
 * @param out_count   gets how many tokens the text has, also when the buffer is too small
 * @return `MOR_ERROR_BUFFER_TOO_SMALL`, `MOR_ERROR_TOKENIZER`, `MOR_ERROR_INVALID_ARGUMENT`, also
 *         for text that is not UTF-8 and for a piece longer than `max_piece_bytes`
 */
enum mor_status mor_tokenizer_encode(struct mor_tokenizer *tokenizer,
                                     const char *text,
                                     size_t text_bytes,
                                     uint32_t flags,
                                     uint32_t *out_tokens,
                                     size_t capacity,
                                     size_t *out_count);

/**
 * Writes the text of some tokens and a zero byte behind it. What is no valid UTF-8 becomes U+FFFD.
 * To show tokens one by one use `mor_session_generate` or `mor_tokenizer_decode_next`, which never cut a character.
 *
 * @param tokenizer  the tokenizer
 * @param tokens     the tokens
 * @param count      how many
 * @param flags      0 or `MOR_DECODE_SPECIAL`
 * @param buffer     gets the text; may be NULL when `capacity` is 0
 * @param capacity   bytes in `buffer`
 * @param out_bytes  gets the text's length without the zero byte, also when the buffer is too small
 * @return `MOR_ERROR_BUFFER_TOO_SMALL`, `MOR_ERROR_INVALID_ARGUMENT`
 */
enum mor_status mor_tokenizer_decode(struct mor_tokenizer *tokenizer,
                                     const uint32_t *tokens,
                                     size_t count,
                                     uint32_t flags,
                                     char *buffer,
                                     size_t capacity,
                                     size_t *out_bytes);

/**
 * Writes the characters that are complete with one more token, and a zero byte behind them. What can be no UTF-8 becomes
 * U+FFFD. `3 * max_token_bytes + 10` bytes are always enough (`mor_tokenizer_info`).
 *
 * @param tokenizer  the tokenizer
 * @param stream     the text so far; it takes the token unless the call fails
 * @param token      the token; one beyond the vocabulary, which a model may draw, adds nothing
 * @param flags      0 or `MOR_DECODE_SPECIAL`
 * @param buffer     gets the text, which may be empty; may be NULL when `capacity` is 0
 * @param capacity   bytes in `buffer`
 * @param out_bytes  gets the text's length without the zero byte, also when the buffer is too small
 * @return `MOR_ERROR_BUFFER_TOO_SMALL`, `MOR_ERROR_INVALID_ARGUMENT`
 */
enum mor_status mor_tokenizer_decode_next(struct mor_tokenizer *tokenizer,
                                          struct mor_decode_stream *stream,
                                          uint32_t token,
                                          uint32_t flags,
                                          char *buffer,
                                          size_t capacity,
                                          size_t *out_bytes);

/**
 * Ends a text that came token by token: writes U+FFFD if a character was left incomplete, else nothing, and a zero
 * byte. The stream is then ready for another text.
 *
 * @param tokenizer  the tokenizer
 * @param stream     the text so far
 * @param buffer     gets the text, at most three bytes and the zero; may be NULL when `capacity` is 0
 * @param capacity   bytes in `buffer`
 * @param out_bytes  gets the text's length without the zero byte, also when the buffer is too small
 * @return as `mor_tokenizer_decode_next`
 */
enum mor_status mor_tokenizer_decode_end(struct mor_tokenizer *tokenizer,
                                         struct mor_decode_stream *stream,
                                         char *buffer,
                                         size_t capacity,
                                         size_t *out_bytes);

/**
 * The bytes that one token adds to a text; they need not be whole characters and are not followed
 * by a zero byte. They lie in the model and live as long as it.
 *
 * @param tokenizer  the tokenizer
 * @param token      the token
 * @param flags      0 or `MOR_DECODE_SPECIAL`
 * @param out_text   gets where they begin
 * @param out_bytes  gets how many they are
 */
enum mor_status mor_tokenizer_token_bytes(struct mor_tokenizer *tokenizer,
                                          uint32_t token,
                                          uint32_t flags,
                                          const char **out_text,
                                          size_t *out_bytes);

/**
 * Whether nothing is to be generated after a token.
 *
 * @param tokenizer  the tokenizer
 * @param token      the token; one outside the vocabulary ends nothing
 * @param out_end    gets the answer
 */
enum mor_status mor_tokenizer_is_end(struct mor_tokenizer *tokenizer,
                                     uint32_t token,
                                     bool *out_end);

/**
 * Writes a conversation as the text that the model was trained on, by the chat template in its
 * file, and a zero byte behind it. Encode it with `MOR_ENCODE_PARSE_SPECIAL`.
 *
 * A template is a program from the file and is not trusted: its work and its depth are bounded. This
 * is the one call besides creating and freeing that takes memory from the heap, and that starts a
 * thread, which ends with the call: templates run on a stack of their own, so that no template can
 * overflow the caller's.
 *
 * @param tokenizer   the tokenizer
 * @param messages    the turns, the first one first
 * @param count       how many
 * @param add_prompt  end where the assistant is to speak
 * @param buffer      gets the text; may be NULL when `capacity` is 0
 * @param capacity    bytes in `buffer`
 * @param out_bytes   gets the text's length without the zero byte, also when the buffer is too small
 * @return `MOR_ERROR_TEMPLATE`, also when the file has none; `MOR_ERROR_BUFFER_TOO_SMALL`;
 *         `MOR_ERROR_UNSUPPORTED` when the library was built without templates
 */
enum mor_status mor_tokenizer_format_chat(struct mor_tokenizer *tokenizer,
                                          const struct mor_chat_message *messages,
                                          size_t count,
                                          bool add_prompt,
                                          char *buffer,
                                          size_t capacity,
                                          size_t *out_bytes);

/**
 * Sets every field of `params` to its default.
 *
 * @param params       the struct
 * @param struct_size  `sizeof(mor_session_params)`
 */
enum mor_status mor_session_params_init(struct mor_session_params *params, size_t struct_size);

/**
 * Plans a session without taking any memory: what it will take, to the byte.
 *
 * @param model      the model
 * @param params     for what, or NULL
 * @param out_plan   gets the plan; its `struct_size` must be set
 * @param out_error  gets the reason of a failure, or NULL
 * @return `MOR_ERROR_INVALID_ARGUMENT` for sizes that nobody can have, `MOR_ERROR_UNSUPPORTED` for
 *         what this system cannot do
 */
enum mor_status mor_session_plan(const struct mor_model *model,
                                 const struct mor_session_params *params,
                                 struct mor_session_plan_info *out_plan,
                                 struct mor_error *out_error);

/**
 * Creates a session in memory of its own, as much as `mor_session_plan` says, and starts its helper
 * threads. The model may be freed before the session.
 *
 * @param model        the model
 * @param params       for what, or NULL
 * @param out_session  gets the session; end it with `mor_session_free`
 * @param out_error    gets the reason of a failure, or NULL
 * @return `MOR_ERROR_OUT_OF_MEMORY`, `MOR_ERROR_INVALID_ARGUMENT`, `MOR_ERROR_THREAD`,
 *         `MOR_ERROR_LOCK`, `MOR_ERROR_FILE_CHANGED`, `MOR_ERROR_UNSUPPORTED`; `*out_session` is then
 *         left as it was
 */
enum mor_status mor_session_create(const struct mor_model *model,
                                   const struct mor_session_params *params,
                                   struct mor_session **out_session,
                                   struct mor_error *out_error);

/**
 * As `mor_session_create`, in memory of the caller. The memory must not be used for anything else
 * until `mor_session_free`, which gives it back without freeing it; what it holds before does not
 * matter. With `params->threads` 1, on the CPU, nothing else is taken from anywhere, so such a session
 * may also simply be forgotten together with its memory when the program ends. (On a GPU
 * `device_bytes`, `pinned_bytes` and some of the heap come besides, until it is freed.)
 *
 * @param memory  aligned to the plan's `alignment`
 * @param bytes   how many bytes it has, at least the plan's `bytes`
 * @return besides those of `mor_session_create`: `MOR_ERROR_BUFFER_TOO_SMALL`
 */
enum mor_status mor_session_create_in(const struct mor_model *model,
                                      const struct mor_session_params *params,
                                      void *memory,
                                      size_t bytes,
                                      struct mor_session **out_session,
                                      struct mor_error *out_error);

/**
 * Ends a session: stops its threads and gives its memory back. NULL is allowed.
 *
 * @return `MOR_ERROR_BUSY` when a call on the session is in progress; it then stays valid. Must
 *         not be called at the same time as `mor_session_cancel`
 */
enum mor_status mor_session_free(struct mor_session *session);

/**
 * One sentence about the last call on this session that failed, or an empty text when the last call
 * succeeded. It lives in the session and stands until the next call on it, so only the thread whose
 * turn it is may ask for it. (A call that was refused with `MOR_ERROR_BUSY`, or that got no live
 * session, leaves no text.) Never NULL.
 */
const char *mor_session_last_error(const struct mor_session *session);

/**
 * Ends the session's call that runs tokens within the time of one layer (on a GPU of one pass); where
 * none is in progress, the next one at once. Any thread, any time, also from a signal handler or a
 * callback; never blocks. One cancel ends one `mor_session_prefill`, `mor_session_prefill_whole`,
 * `mor_session_log_probabilities` or `mor_session_step`, with `MOR_ERROR_CANCELLED`, or one `mor_session_generate`, with
 * `MOR_OK` and `MOR_FINISH_CANCELLED` (with no call of its callback, where the cancel came before the first token).
 * Other calls, and those that have nothing to run, leave it pending. Only a NULL or freed session is a
 * failure.
 */
enum mor_status mor_session_cancel(struct mor_session *session);

/**
 * Takes back a cancel that no call has met yet: call it before a new request, so that a cancel that
 * came too late for the last one does not end it.
 */
enum mor_status mor_session_reset_cancel(struct mor_session *session);

/**
 * Runs tokens after those so far. On a failure the session is as it was before the call, its logits
 * too. May take long; `mor_session_cancel` ends it.
 *
 * @param session  the session
 * @param tokens   token ids, each below the vocabulary's size
 * @param count    how many, at least 1
 * @return `MOR_ERROR_CONTEXT_FULL`, `MOR_ERROR_KV_FULL`, `MOR_ERROR_CANCELLED`,
 *         `MOR_ERROR_NOT_FINITE`, `MOR_ERROR_FILE_CHANGED`, `MOR_ERROR_INVALID_ARGUMENT`,
 *         `MOR_ERROR_BUSY`
 */
enum mor_status mor_session_prefill(struct mor_session *session,
                                    const uint32_t *tokens,
                                    size_t count);

/**
 * Makes a session hold this text and nothing else, as a chat does each turn: of the beginning that it holds already
 * nothing is run again, of the rest everything, and at least the last token, unless its logits are there. (With capacity
 * routing, which looks at a text as a whole, all is run again.)
 *
 * @param session   the session
 * @param tokens    the whole text, at least one token
 * @param count     how many
 * @param out_kept  gets how many of the session's tokens stayed, or NULL
 * @return as `mor_session_prefill`. After `MOR_ERROR_INVALID_ARGUMENT` and `MOR_ERROR_CONTEXT_FULL` the session is as it
 *         was; after a failure that came when tokens ran it holds the common beginning, as after a rewind
 */
enum mor_status mor_session_prefill_whole(struct mor_session *session,
                                          const uint32_t *tokens,
                                          size_t count,
                                          size_t *out_kept);

/**
 * Runs tokens after those so far, and tells how likely each of them was after all before it. The sum says how likely they
 * are as a continuation of the text so far, of which there must be some: to compare answers, or to measure a model. (Not
 * with capacity routing, which wants the whole text at once.) On a failure the session is as it was before the call. May
 * take long; `mor_session_cancel` ends it. Faster with more `mor_session_params.logit_rows` than one.
 *
 * @param session                the session
 * @param tokens                 token ids, each below the vocabulary's size
 * @param count                  how many, at least 1
 * @param out_log_probabilities  gets `count` numbers: natural logarithms of probabilities (the softmax of the logits,
 *                               whatever the sampler would do). Must not overlap `tokens`. After a failure they mean
 *                               nothing
 * @return `MOR_ERROR_NOT_READY` for an empty session and after a rewind; else as `mor_session_prefill`
 */
enum mor_status mor_session_log_probabilities(struct mor_session *session,
                                              const uint32_t *tokens,
                                              size_t count,
                                              float *out_log_probabilities);

/**
 * Runs one token after those so far and computes the logits of what follows it.
 *
 * @param session     the session
 * @param token       the token
 * @param out_logits  gets a pointer to one number for each token of the vocabulary, or NULL when
 *                    only the token is to be run. The numbers lie in the session and stand until
 *                    the next call on it
 * @return as `mor_session_prefill`
 */
enum mor_status mor_session_step(struct mor_session *session,
                                 uint32_t token,
                                 const float **out_logits);

/**
 * The logits of what follows the last token.
 *
 * @param session     the session
 * @param out_logits  gets a pointer to the numbers, which lie in the session and stand until the
 *                    next call on it
 * @param out_count   gets how many there are, the vocabulary's size; may be NULL
 * @return `MOR_ERROR_NOT_READY` before the first token and after a rewind
 */
enum mor_status mor_session_logits(struct mor_session *session,
                                   const float **out_logits,
                                   size_t *out_count);

/**
 * Sets every field of `params` to its default.
 *
 * @param params       the struct
 * @param struct_size  `sizeof(mor_sampler_params)`
 */
enum mor_status mor_sampler_params_init(struct mor_sampler_params *params, size_t struct_size);

/**
 * Sets how `mor_session_sample` and `mor_session_generate` draw tokens from now on; the random
 * sequence begins at its seed. A new session draws with the defaults.
 *
 * @param session  the session
 * @param params   how, or NULL for the defaults
 */
enum mor_status mor_session_set_sampler(struct mor_session *session,
                                        const struct mor_sampler_params *params);

/**
 * Draws a token from the logits after the last one. It is not run: pass it to `mor_session_step` or
 * `mor_session_prefill`.
 *
 * @param session    the session
 * @param out_token  gets the token
 * @return `MOR_ERROR_NOT_READY` before the first token and after a rewind
 */
enum mor_status mor_session_sample(struct mor_session *session, uint32_t *out_token);

/**
 * Sets every field of `params` to its default.
 *
 * @param params       the struct
 * @param struct_size  `sizeof(mor_generate_params)`
 */
enum mor_status mor_generate_params_init(struct mor_generate_params *params, size_t struct_size);

/**
 * Continues the text so far, token by token: draws with the session's sampler, runs, decodes with
 * the model's tokenizer and calls back. Needs a prompt (`mor_session_prefill`) first.
 *
 * The text of each call is one of its own: where calls follow one another, a character whose tokens they
 * share is not put together, and a stop string that begins in one and ends in the next is not found. Text that
 * goes on from call to call is made of the tokens by `mor_tokenizer_decode_next`.
 *
 * @param session     the session
 * @param params      what, or NULL
 * @param out_finish  gets why it ended; may be NULL
 * @return `MOR_ERROR_NOT_READY` without a prompt and after a rewind, `MOR_ERROR_TOKENIZER` when the model has none,
 *         `MOR_ERROR_KV_FULL`, `MOR_ERROR_NOT_FINITE`, `MOR_ERROR_FILE_CHANGED`,
 *         `MOR_ERROR_INVALID_ARGUMENT`, `MOR_ERROR_BUSY`. The tokens before a failure stay
 */
enum mor_status mor_session_generate(struct mor_session *session,
                                     const struct mor_generate_params *params,
                                     enum mor_finish *out_finish);

/**
 * How many tokens the sequence has so far.
 *
 * @param session     the session
 * @param out_length  gets the number
 */
enum mor_status mor_session_length(struct mor_session *session, size_t *out_length);

/**
 * Copies tokens of the sequence so far.
 *
 * @param session     the session
 * @param first       position of the first one wanted
 * @param count       how many; `first + count` is at most the length
 * @param out_tokens  gets `count` tokens
 */
enum mor_status mor_session_tokens(struct mor_session *session,
                                   size_t first,
                                   size_t count,
                                   uint32_t *out_tokens);

/**
 * Copies the recursions that tokens of the sequence so far ran; 0 where the router let one pass by.
 *
 * @param session     the session
 * @param first       position of the first one wanted
 * @param count       how many; `first + count` is at most the length
 * @param out_depths  gets `count` numbers
 */
enum mor_status mor_session_depths(struct mor_session *session,
                                   size_t first,
                                   size_t count,
                                   uint8_t *out_depths);

/**
 * How many of the tokens so far ran each number of recursions.
 *
 * @param session     the session
 * @param out_counts  gets a count for each depth from 0 to the model's `recursions`
 * @param capacity    how many counts it holds: at least `recursions + 1`, for which
 *                    `MOR_MAX_RECURSIONS + 1` is always enough
 * @return `MOR_ERROR_BUFFER_TOO_SMALL`
 */
enum mor_status mor_session_depth_histogram(struct mor_session *session,
                                            uint64_t *out_counts,
                                            size_t capacity);

/**
 * Bytes of KV pages in use: they follow the recursions that tokens ran, not the context.
 *
 * @param session    the session
 * @param out_bytes  gets the number
 */
enum mor_status mor_session_kv_bytes_used(struct mor_session *session, size_t *out_bytes);

/**
 * Sets the routers' cut from the next token on: a token goes on while the sigmoid of its score (the
 * score itself, where the router has neither a function nor an auxiliary router) is at least this. Higher is faster and coarser; 0
 * sends every token through all recursions, 1 none. Models without expert-choice routers take no notice.
 *
 * @param session  the session
 * @param cut      from 0 to 1; a session begins with the cut that the model was trained for
 * @return `MOR_ERROR_INVALID_ARGUMENT` for another number, `MOR_ERROR_BUSY`
 */
enum mor_status mor_session_set_cut(struct mor_session *session,
                                    float cut);

/**
 * Limits the recursions of tokens from the next one on.
 *
 * @param session  the session
 * @param limit    from 1 to the model's `recursions`, with which a session begins
 * @return `MOR_ERROR_INVALID_ARGUMENT` for another limit, `MOR_ERROR_BUSY`
 */
enum mor_status mor_session_set_depth_limit(struct mor_session *session, uint32_t limit);

/**
 * Sets the time that a token should take, from the call of `mor_session_step` to its logits: an aim,
 * not a bound, for no library can keep the system from giving the core to somebody else. The deepest
 * recursions of a token are left out when by the speed measured so far they would not be done in
 * time. The first recursion is never left out, so a budget below what it takes is missed;
 * and the first tokens of a session, before its speed is known, may go less deep than they could.
 * Prompts of more than one token are not limited. With a budget, results depend on the clock.
 *
 * @param session      the session
 * @param nanoseconds  the budget; 0, with which a session begins, sets none
 */
enum mor_status mor_session_set_time_budget(struct mor_session *session,
                                            uint64_t nanoseconds);

/**
 * Sets who decides, from the next call on.
 *
 * @param session  the session
 * @param routing  a `mor_routing`; a session begins with `MOR_ROUTING_THRESHOLD`
 */
enum mor_status mor_session_set_routing(struct mor_session *session, uint32_t routing);

/**
 * Forgets all tokens from a position on; their KV pages are free again. The logits are gone: run a
 * token to get new ones.
 *
 * @param session  the session
 * @param length   how many tokens stay, at most as many as there are
 * @return `MOR_ERROR_INVALID_ARGUMENT` when there are fewer, `MOR_ERROR_BUSY`
 */
enum mor_status mor_session_rewind(struct mor_session *session, size_t length);

/**
 * Bytes that `mor_session_save` writes now: never more than the plan's `kv_bytes`, 5 for each token of
 * the context, 4 for each element of the model's hidden size and 128.
 *
 * @param session    the session
 * @param out_bytes  gets the number
 */
enum mor_status mor_session_save_size(struct mor_session *session,
                                      size_t *out_bytes);

/**
 * Writes the sequence so far to memory of the caller: tokens, depths, keys and values, and where
 * the sampler's random sequence stands. Settings are not part of it.
 *
 * @param session    the session
 * @param buffer     gets the state
 * @param capacity   bytes in `buffer`
 * @param out_bytes  gets the state's size, also when the buffer is too small; may be NULL
 * @return `MOR_ERROR_BUFFER_TOO_SMALL`
 */
enum mor_status mor_session_save(struct mor_session *session,
                                 void *buffer,
                                 size_t capacity,
                                 size_t *out_bytes);

/**
 * Replaces the sequence so far by a saved one, of this or another session of the same model file
 * and KV type, on this or another machine. The next logits are the same bits that the saved session
 * would have computed here; where it had none, because it was rewound, `MOR_ERROR_NOT_READY` comes here
 * too. So does the next random number, if the sampler is set before: `mor_session_set_sampler` begins the
 * random sequence again. A state is not trusted: what is damaged or does not fit is refused, and the
 * session is as before.
 *
 * @param session  the session
 * @param state    the state
 * @param bytes    its size
 * @return `MOR_ERROR_STATE`, `MOR_ERROR_CONTEXT_FULL`, `MOR_ERROR_KV_FULL`, `MOR_ERROR_FILE_CHANGED`
 */
enum mor_status mor_session_restore(struct mor_session *session,
                                    const void *state,
                                    size_t bytes);

/**
 * Sets every field of `params` to its default.
 *
 * @param params       the struct
 * @param struct_size  `sizeof(mor_batch_params)`
 */
enum mor_status mor_batch_params_init(struct mor_batch_params *params, size_t struct_size);

/**
 * Plans a batch without taking any memory: what it will take, to the byte.
 *
 * @param model      the model
 * @param params     for what, or NULL
 * @param out_plan   gets the plan; its `struct_size` must be set
 * @param out_error  gets the reason of a failure, or NULL
 * @return `MOR_ERROR_INVALID_ARGUMENT` for sizes that nobody can have, `MOR_ERROR_UNSUPPORTED` for
 *         what this system cannot do
 */
enum mor_status mor_batch_plan(const struct mor_model *model,
                               const struct mor_batch_params *params,
                               struct mor_batch_plan_info *out_plan,
                               struct mor_error *out_error);

/**
 * Plans the batch with the most sequences whose block of memory, or on a GPU what it takes there, has
 * at most so many bytes, with pages for the whole context of each when a token runs `mean_depth`
 * recursions on average. What was sought stands in the plan's `sequences` and `kv_pages`; in `params`
 * these two do not matter.
 *
 * @param model       the model
 * @param params      for what else, or NULL
 * @param mean_depth  to the model's `recursions`, from 0 where routers may drop a token at once, from 1 elsewhere
 * @param bytes       for the block, the plan's `bytes`; `heap_bytes` and stacks come besides. On a GPU for
 *                    its `device_bytes`; all that is on the host comes besides
 * @param out_plan    gets the plan; its `struct_size` must be set
 * @param out_error   gets the reason of a failure, or NULL
 * @return `MOR_ERROR_INVALID_ARGUMENT` also when not even one sequence fits; otherwise as
 *         `mor_batch_plan`
 */
enum mor_status mor_batch_plan_in(const struct mor_model *model,
                                  const struct mor_batch_params *params,
                                  double mean_depth,
                                  size_t bytes,
                                  struct mor_batch_plan_info *out_plan,
                                  struct mor_error *out_error);

/**
 * Pages of the KV pool that the sequences of `params` take when their contexts are full and a token
 * runs `mean_depth` recursions on average: a value for `kv_pages`.
 *
 * @param model       the model
 * @param params      for what, or NULL; its `kv_pages` does not matter
 * @param mean_depth  to the model's `recursions`, from 0 where routers may drop a token at once, from 1 elsewhere
 * @param out_pages   gets the number
 * @param out_error   gets the reason of a failure, or NULL
 * @return `MOR_ERROR_INVALID_ARGUMENT`
 */
enum mor_status mor_batch_pages_for(const struct mor_model *model,
                                    const struct mor_batch_params *params,
                                    double mean_depth,
                                    size_t *out_pages,
                                    struct mor_error *out_error);

/**
 * Creates a batch in memory of its own, as much as `mor_batch_plan` says, and starts its helper
 * threads. The model may be freed before the batch.
 *
 * @param model      the model
 * @param params     for what, or NULL
 * @param out_batch  gets the batch; end it with `mor_batch_free`
 * @param out_error  gets the reason of a failure, or NULL
 * @return `MOR_ERROR_OUT_OF_MEMORY`, `MOR_ERROR_INVALID_ARGUMENT`, `MOR_ERROR_THREAD`,
 *         `MOR_ERROR_LOCK`, `MOR_ERROR_FILE_CHANGED`, `MOR_ERROR_UNSUPPORTED`; `*out_batch` is then
 *         left as it was
 */
enum mor_status mor_batch_create(const struct mor_model *model,
                                 const struct mor_batch_params *params,
                                 struct mor_batch **out_batch,
                                 struct mor_error *out_error);

/**
 * Ends a batch: stops its threads and gives its memory back. NULL is allowed.
 *
 * @return `MOR_ERROR_BUSY` when a call on the batch is in progress; it then stays valid
 */
enum mor_status mor_batch_free(struct mor_batch *batch);

/**
 * As `mor_session_last_error`, of a batch.
 */
const char *mor_batch_last_error(const struct mor_batch *batch);

/**
 * Sets every field of `request` to its default.
 *
 * @param request      the struct
 * @param struct_size  `sizeof(mor_batch_request)`
 */
enum mor_status mor_batch_request_init(struct mor_batch_request *request, size_t struct_size);

/**
 * Adds a sequence. Nothing is run yet: `mor_batch_tick` does that.
 *
 * @param batch         the batch
 * @param request       what it is to do
 * @param out_sequence  gets its number, which this batch uses for no other
 * @return `MOR_ERROR_NOT_READY` when the batch has as many sequences as it was planned for,
 *         `MOR_ERROR_CONTEXT_FULL` and `MOR_ERROR_INVALID_ARGUMENT` for what can never run,
 *         `MOR_ERROR_BUSY`. The batch is then as before
 */
enum mor_status mor_batch_add(struct mor_batch *batch,
                              const struct mor_batch_request *request,
                              uint64_t *out_sequence);

/**
 * Adds a sequence that begins with the first tokens of another, whose keys and values it shares as
 * far as they are there: a common prompt is run and stored once. It has its parent's cut and depth
 * limit. The parent may be in any state, and may be removed before it.
 *
 * @param batch         the batch
 * @param parent        the other
 * @param length        how many tokens they have in common, at most those that the parent has
 * @param request       what comes after them; NULL for nothing else than the defaults
 * @param out_sequence  gets the new sequence's number
 * @return as `mor_batch_add`
 */
enum mor_status mor_batch_fork(struct mor_batch *batch,
                               uint64_t parent,
                               size_t length,
                               const struct mor_batch_request *request,
                               uint64_t *out_sequence);

/**
 * Ends a sequence, with `MOR_FINISH_STOPPED` and no event; its tokens stay. One that is done already
 * stays as it is.
 *
 * @param batch     the batch
 * @param sequence  the sequence
 * @return `MOR_ERROR_INVALID_ARGUMENT` when there is no such sequence, `MOR_ERROR_BUSY`
 */
enum mor_status mor_batch_stop(struct mor_batch *batch,
                               uint64_t sequence);

/**
 * Forgets a sequence, in whatever state: its place and its pages are free for others.
 *
 * @param batch     the batch
 * @param sequence  the sequence
 * @return `MOR_ERROR_INVALID_ARGUMENT` when there is no such sequence, `MOR_ERROR_BUSY`
 */
enum mor_status mor_batch_remove(struct mor_batch *batch, uint64_t sequence);

/**
 * Lets a sequence that stands still because the KV pool was full (`MOR_SEQUENCE_FULL`) try again.
 * Nothing happens to others.
 *
 * @param batch     the batch
 * @param sequence  the sequence
 * @return `MOR_ERROR_INVALID_ARGUMENT` when there is no such sequence, `MOR_ERROR_BUSY`
 */
enum mor_status mor_batch_resume(struct mor_batch *batch, uint64_t sequence);

/**
 * One pass over the weights: new tokens enter, every token in the recursions runs its next one, those
 * that leave are finished, and what follows them is drawn. A failure that concerns one sequence ends
 * that sequence only, with `MOR_FINISH_FAILED`.
 *
 * @param batch       the batch
 * @param out_events  gets a pointer to what happened, in the order in which it did. The events lie in
 *                    the batch and stand until the next call on it
 * @param out_count   gets how many there are: often none, while tokens are in the recursions
 *                    (`mor_batch_is_idle` says whether there is anything left to run)
 * @return `MOR_ERROR_FILE_CHANGED`, `MOR_ERROR_INVALID_ARGUMENT`, `MOR_ERROR_BUSY`. Nothing is lost
 *         then: the next tick tries again, and brings first what this one would have brought. (When
 *         many fail in a row, the last events are kept.)
 */
enum mor_status mor_batch_tick(struct mor_batch *batch,
                               const struct mor_batch_event **out_events,
                               size_t *out_count);

/**
 * Where a sequence stands.
 *
 * @param batch       the batch
 * @param sequence    the sequence
 * @param out_status  gets where
 * @param out_finish  gets why it ended, when it did; may be NULL
 * @return `MOR_ERROR_INVALID_ARGUMENT` when there is no such sequence, `MOR_ERROR_BUSY`
 */
enum mor_status mor_batch_sequence_status(struct mor_batch *batch,
                                          uint64_t sequence,
                                          enum mor_sequence_status *out_status,
                                          enum mor_finish *out_finish);

/**
 * Copies the tokens of a sequence so far, its prompt among them.
 *
 * @param batch       the batch
 * @param sequence    the sequence
 * @param out_tokens  gets the tokens
 * @param capacity    how many it holds; the batch's `context` is always enough
 * @param out_count   gets how many there are, also when the buffer is too small
 * @return `MOR_ERROR_BUFFER_TOO_SMALL`, `MOR_ERROR_INVALID_ARGUMENT` when there is no such sequence,
 *         `MOR_ERROR_BUSY`
 */
enum mor_status mor_batch_tokens(struct mor_batch *batch,
                                 uint64_t sequence,
                                 uint32_t *out_tokens,
                                 size_t capacity,
                                 size_t *out_count);

/**
 * Copies the recursions that the tokens of a sequence ran; 0 where the router let one pass by. Tokens
 * that have not passed all layers yet, the last that was drawn among them, are left out: there may be
 * fewer numbers than tokens.
 *
 * @param batch       the batch
 * @param sequence    the sequence
 * @param out_depths  gets the numbers
 * @param capacity    how many it holds; the batch's `context` is always enough
 * @param out_count   gets how many there are, also when the buffer is too small
 * @return as `mor_batch_tokens`
 */
enum mor_status mor_batch_depths(struct mor_batch *batch,
                                 uint64_t sequence,
                                 uint8_t *out_depths,
                                 size_t capacity,
                                 size_t *out_count);

/**
 * Why a sequence ended with `MOR_FINISH_FAILED`.
 *
 * @param batch        the batch
 * @param sequence     the sequence
 * @param out_failure  gets the status and the sentence of what went wrong; `MOR_OK` and an empty text
 *                     when nothing did
 * @return `MOR_ERROR_INVALID_ARGUMENT` when there is no such sequence, `MOR_ERROR_BUSY`
 */
enum mor_status mor_batch_failure(struct mor_batch *batch,
                                  uint64_t sequence,
                                  struct mor_error *out_failure);

/**
 * Whether there is nothing to run: no sequence waits or runs. Those that stand still
 * (`MOR_SEQUENCE_FULL`) do neither.
 *
 * @param batch     the batch
 * @param out_idle  gets the answer
 */
enum mor_status mor_batch_is_idle(struct mor_batch *batch, bool *out_idle);

/**
 * Bytes of KV pages in use, those of sequences that are done among them. A page that several
 * sequences share counts once.
 *
 * @param batch      the batch
 * @param out_bytes  gets the number
 */
enum mor_status mor_batch_kv_bytes_used(struct mor_batch *batch, size_t *out_bytes);

/**
 * What the batch ran so far.
 *
 * @param batch         the batch
 * @param out_counters  gets the numbers; its `struct_size` must be set
 */
enum mor_status mor_batch_counters(struct mor_batch *batch,
                                   struct mor_batch_counters_info *out_counters);

/**
 * Switches to ordinary batching, to compare with: new tokens enter only when all others have left
 * the recursions, so that everyone waits for the deepest. Results do not depend on it.
 *
 * @param batch    the batch
 * @param in_step  whether to do so from now on; a batch begins without
 */
enum mor_status mor_batch_set_in_step(struct mor_batch *batch, bool in_step);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* MOR_H */
