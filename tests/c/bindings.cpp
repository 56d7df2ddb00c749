// mor.hpp, every member, in both of its modes:  bindings MODEL
#include <mor.hpp>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

void expect(bool truth, const char *what, int line) {
    if (truth) return;
    std::fprintf(stderr, "bindings.cpp:%d: %s\n", line, what);
    std::exit(1);
}
#define EXPECT(truth) expect((truth), #truth, __LINE__)

// The two modes, made alike for this test: the value of what succeeds, the status of what fails.
#if MOR_HPP_EXCEPTIONS
#define VALUE(call) (call)
#define DO(call) (call)
template <class F>
mor_status status_of(F &&f) {
    try {
        f();
        return MOR_OK;
    } catch (const mor::error &error) {
        EXPECT(*error.what() != '\0');
        return error.status();
    }
}
template <class F>
std::string text_of(F &&f) {
    try {
        f();
        return "";
    } catch (const mor::error &error) {
        return error.what();
    }
}
#else
template <class T>
T value_of(mor::result<T> result, int line) {
    if (!result.has_value()) expect(false, result.error().what(), line);
    return std::move(result).value();
}
#define VALUE(call) value_of((call), __LINE__)
#define DO(call) EXPECT(bool(call))
template <class F>
mor_status status_of(F &&f) {
    auto result = f();
    EXPECT(*result.error().what() != '\0');
    EXPECT(bool(result) == (result.error().status() == MOR_OK));
    return result.error().status();
}
template <class F>
std::string text_of(F &&f) {
    return f().error().what();
}
#endif
#define STATUS(call) status_of([&] { return call; })
#define TEXT(call) text_of([&] { return call; })

static_assert(!std::is_copy_constructible_v<mor::model>);
static_assert(!std::is_copy_assignable_v<mor::session>);
static_assert(std::is_nothrow_move_constructible_v<mor::session>);
static_assert(std::is_nothrow_move_assignable_v<mor::tokenizer>);
static_assert(std::is_nothrow_move_constructible_v<mor::batch>);

std::vector<std::byte> read(const char *path) {
    std::vector<std::byte> bytes;
    std::FILE *file = std::fopen(path, "rb");
    EXPECT(file != nullptr);
    std::fseek(file, 0, SEEK_END);
    bytes.resize(static_cast<std::size_t>(std::ftell(file)));
    std::rewind(file);
    EXPECT(std::fread(bytes.data(), 1, bytes.size(), file) == bytes.size());
    std::fclose(file);
    return bytes;
}

// What a request or parameters would only point to may not be gone at once.
static_assert(!std::is_constructible<mor::batch_request, std::vector<std::uint32_t>>::value, "");
static_assert(std::is_constructible<mor::batch_request, std::vector<std::uint32_t> &>::value, "");
// Nor the bytes that a model lies in.
template <class Bytes, class = void> struct loads : std::false_type {};
template <class Bytes>
struct loads<Bytes, std::void_t<decltype(mor::model::load_memory(std::declval<Bytes>()))>> : std::true_type {};
static_assert(!loads<std::vector<std::byte>>::value, "");
static_assert(loads<std::vector<std::byte> &>::value && loads<mor::span<const std::byte>>::value, "");
#if !MOR_HPP_EXCEPTIONS
// Whether there is an answer is not the answer.
static_assert(!std::is_constructible<bool, mor::result<bool>>::value, "");
static_assert(std::is_constructible<bool, mor::result<int>>::value, "");
#endif

// A batch: what a sequence gets is what a session of its own gets.
void run_batch(const mor::model &model, mor::session &session,
               const std::vector<std::uint32_t> &prompt) {
    mor::batch_params params;
    params.context = 64;
    params.threads = 2;
    params.sequences = 3;
    EXPECT(params.rows == 0);
    auto plan = VALUE(mor::batch::plan(model, params));
    EXPECT(plan.rows == 64 && plan.sequences == 3 && plan.kv_bytes > 0 && plan.heap_bytes > 0);
    EXPECT(plan.device_bytes == 0 && plan.pinned_bytes == 0);
    auto pages = VALUE(mor::batch::pages_for(model, params, 1.5));
    EXPECT(pages > 0 && pages < plan.kv_pages);
    EXPECT(VALUE(mor::batch::plan_in(model, params, 1.5, 4 * plan.bytes)).sequences > 3);
    EXPECT(STATUS(mor::batch::plan_in(model, params, 1.5, 1)) == MOR_ERROR_INVALID_ARGUMENT);
    EXPECT(STATUS(mor::batch::pages_for(model, params, -1)) == MOR_ERROR_INVALID_ARGUMENT);
    params.pressure = 7;
    EXPECT(STATUS(mor::batch::create(model, params)) == MOR_ERROR_INVALID_ARGUMENT);
    EXPECT(STATUS(mor::batch::plan(model, params)) == MOR_ERROR_INVALID_ARGUMENT);
    params.pressure = MOR_PRESSURE_REFUSE;
    auto batch = VALUE(mor::batch::create(model, params));
    DO(batch.set_in_step(false));

    mor::sampler_params greedy;
    greedy.temperature = 0;
    mor::batch_request request(prompt);
    request.max_tokens = 6;
    request.ignore_end = 1;
    request.set_sampler(greedy);
    EXPECT(STATUS(batch.add(mor::batch_request())) == MOR_ERROR_INVALID_ARGUMENT);
    auto first = VALUE(batch.add(request));
    auto stopped = VALUE(batch.add(request));
    DO(batch.stop(stopped));
    EXPECT(VALUE(batch.status(stopped)).finish == MOR_FINISH_STOPPED);
    DO(batch.remove(stopped));
    EXPECT(STATUS(batch.status(stopped)) == MOR_ERROR_INVALID_ARGUMENT);
    EXPECT(VALUE(batch.status(first)).status == MOR_SEQUENCE_WAITING);
    std::vector<std::uint32_t> drawn;
    while (!VALUE(batch.is_idle()))
        for (const mor_batch_event &event : VALUE(batch.tick()))
            if (event.kind == MOR_EVENT_TOKEN) drawn.push_back(event.token);
    EXPECT(VALUE(batch.status(first)).finish == MOR_FINISH_LENGTH);
    auto tokens = VALUE(batch.tokens(first));
    EXPECT(drawn.size() == 6 && tokens.size() == prompt.size() + 6);
    auto depths = VALUE(batch.depths(first));
    EXPECT(depths.size() + 1 == tokens.size());
    std::uint32_t some[64];
    EXPECT(VALUE(batch.tokens(first, some)).size() == tokens.size());
    std::uint8_t few[2];
    EXPECT(STATUS(batch.depths(first, few)) == MOR_ERROR_BUFFER_TOO_SMALL);

    DO(session.rewind(0));
    DO(session.set_sampler(greedy));
    DO(session.prefill(prompt));
    for (std::uint32_t token : drawn) {
        EXPECT(VALUE(session.sample()) == token);
        DO(session.step(token));
    }
    auto alone = VALUE(session.depths());
    alone.pop_back(); // of the last token, which the batch has not run
    EXPECT(alone == depths);

    auto fork = VALUE(batch.fork(first, 3, request));
    DO(batch.resume(fork));
    EXPECT(VALUE(batch.tokens(fork)).size() == 3 + prompt.size());
    EXPECT(VALUE(batch.depths(fork)).size() == 3);
    EXPECT(VALUE(batch.failure(fork)).status == MOR_OK);
    EXPECT(VALUE(batch.kv_bytes_used()) > 0);
    auto counters = VALUE(batch.counters());
    EXPECT(counters.ticks > 0 && counters.logits == 6 && counters.evictions == 0);
    mor::batch moved = std::move(batch);
    EXPECT(STATUS(batch.tick()) == MOR_ERROR_INVALID_ARGUMENT);
    DO(moved.remove(first));
    DO(moved.tick());
}

int run(const char *path) {
    EXPECT(!mor::version().empty());
    EXPECT(STATUS(mor::model::load("/nowhere/model.gguf")) == MOR_ERROR_IO);
    // What a zero byte would cut is refused.
    EXPECT(STATUS(mor::model::load(std::string_view("a\0b", 3))) == MOR_ERROR_INVALID_ARGUMENT);
    std::vector<std::byte> bytes = read(path);
    EXPECT(STATUS(mor::model::load_memory(mor::span<const std::byte>(bytes.data(), 100))) ==
           MOR_ERROR_FORMAT);
    EXPECT(STATUS(mor::model::load_descriptor(-1)) == MOR_ERROR_IO);

    // A view that does not end with a zero byte.
    std::string longer = std::string(path) + "xyz";
    auto model = VALUE(mor::model::load(std::string_view(longer).substr(0, longer.size() - 3)));
    auto from_memory = VALUE(mor::model::load_memory(bytes));
    EXPECT(VALUE(from_memory.describe()).parameters == VALUE(model.describe()).parameters);
    auto architecture = VALUE(model.metadata("general.architecture"));
    EXPECT(architecture == "mor");
    char small[4];
    EXPECT(VALUE(model.metadata("general.architecture", mor::span<char>(small))) == "mor");
    EXPECT(STATUS(model.metadata("no.such.key")) == MOR_ERROR_INVALID_ARGUMENT);
    EXPECT(TEXT(model.metadata("no.such.key")) == "the file has no text of this key, or an argument is wrong");

    auto tokenizer = VALUE(mor::tokenizer::create(model));
    EXPECT(VALUE(tokenizer.describe()).vocab_size > 0);
    auto tokens = VALUE(tokenizer.encode("It is a truth", 0));
    EXPECT(VALUE(tokenizer.decode(tokens)) == "It is a truth");
    EXPECT(VALUE(tokenizer.encode("", 0)).empty());
    EXPECT(VALUE(tokenizer.encode("It is a truth")).size() >= tokens.size());
    std::uint32_t few[32];
    EXPECT(VALUE(tokenizer.encode("It is a truth", 0, few)).size() == tokens.size());
    char text[64];
    EXPECT(VALUE(tokenizer.decode(tokens, 0, text)) == "It is a truth");
    EXPECT(STATUS(tokenizer.decode(tokens, 0, small)) == MOR_ERROR_BUFFER_TOO_SMALL);
    mor_decode_stream stream{};
    std::string streamed;
    for (std::uint32_t token : tokens) streamed += VALUE(tokenizer.decode_next(stream, token));
    EXPECT(streamed == "It is a truth" && VALUE(tokenizer.decode_end(stream)).empty());
    EXPECT(VALUE(tokenizer.decode_next(stream, tokens[0], 0, text)) == VALUE(tokenizer.token_bytes(tokens[0])));
    EXPECT(STATUS(tokenizer.decode_next(stream, tokens[0], 0, mor::span<char>())) == MOR_ERROR_BUFFER_TOO_SMALL);
    EXPECT(VALUE(tokenizer.decode_end(stream, text)).empty());
    EXPECT(!VALUE(tokenizer.token_bytes(tokens[0])).empty());
    EXPECT(!VALUE(tokenizer.is_end(tokens[0])));
    EXPECT(STATUS(tokenizer.encode("\xff")) == MOR_ERROR_INVALID_ARGUMENT);
    const mor::chat_message turns[] = {{"user", "Hello"}};
    EXPECT(STATUS(model.metadata(std::string_view("general.name\0", 13))) == MOR_ERROR_INVALID_ARGUMENT);
    const mor::chat_message short_turns[] = {{"user", std::string_view("a\0b", 3)}};
    EXPECT(STATUS(tokenizer.format_chat(short_turns)) == MOR_ERROR_INVALID_ARGUMENT);
    // The default model has no template.
    EXPECT(STATUS(tokenizer.format_chat(turns)) == MOR_ERROR_TEMPLATE);

    mor::session_params params;
    params.threads = 2;
    params.context = 64;
    EXPECT(params.batch == 0);
    auto plan = VALUE(model.plan(params));
    EXPECT(plan.batch == 64);
    std::vector<std::byte> memory(plan.bytes + plan.alignment);
    auto past = reinterpret_cast<std::uintptr_t>(memory.data()) % plan.alignment;
    std::byte *start = memory.data() + (plan.alignment - past) % plan.alignment;
    EXPECT(STATUS(mor::session::create_in(model, params,
                                          mor::span<std::byte>(start, plan.bytes - 1))) ==
           MOR_ERROR_BUFFER_TOO_SMALL);
    auto inside = VALUE(
        mor::session::create_in(model, params, mor::span<std::byte>(start, plan.bytes)));
    auto session = VALUE(mor::session::create(model, params));

    EXPECT(STATUS(session.sample()) == MOR_ERROR_NOT_READY);
    EXPECT(STATUS(session.logits()) == MOR_ERROR_NOT_READY);
    DO(session.prefill(tokens));
    DO(inside.prefill(tokens));
    auto logits = VALUE(session.logits());
    EXPECT(logits.size() == VALUE(model.describe()).vocab_size);
    auto same = VALUE(inside.logits());
    for (std::size_t i = 0; i < logits.size(); i++) EXPECT(logits[i] == same[i]);
    mor::session_params for_scores = params;
    for_scores.logit_rows = 16;
    auto scored = VALUE(mor::session::create(model, for_scores));
    EXPECT(STATUS(scored.log_probabilities(tokens)) == MOR_ERROR_NOT_READY);
    DO(scored.prefill(tokens));
    auto likely = VALUE(scored.log_probabilities(tokens));
    EXPECT(likely.size() == tokens.size() && likely[0] < 0);
    std::vector<float> numbers(tokens.size() + 1, 1.0f);
    mor::span<float> short_of_one(numbers.data(), tokens.size() - 1);
    EXPECT(STATUS(inside.log_probabilities(tokens, short_of_one)) == MOR_ERROR_BUFFER_TOO_SMALL);
    auto filled = VALUE(inside.log_probabilities(tokens, numbers));
    EXPECT(filled.size() == tokens.size() && numbers.back() == 1.0f);
    for (std::size_t i = 0; i < likely.size(); i++) EXPECT(filled[i] == likely[i]);
    mor::sampler_params greedy;
    greedy.temperature = 0;
    DO(session.set_sampler(greedy));
    auto token = VALUE(session.sample());
    EXPECT(VALUE(session.step(token)).size() == logits.size());
    EXPECT(VALUE(session.length()) == tokens.size() + 1);
    EXPECT(VALUE(session.tokens()).back() == token);
    EXPECT(VALUE(session.depths()).size() == tokens.size() + 1);
    std::uint8_t depth[1];
    DO(session.depths(tokens.size(), depth));
    EXPECT(VALUE(session.depths()).back() == depth[0]);
    DO(session.tokens(0, mor::span<std::uint32_t>(few, tokens.size())));
    EXPECT(few[0] == tokens[0]);
    std::uint64_t histogram[256] = {};
    DO(session.depth_histogram(histogram));
    EXPECT(VALUE(session.kv_bytes_used()) > 0);
    auto state = VALUE(session.save());
    EXPECT(state.size() == VALUE(session.save_size()));
    DO(inside.restore(state));
    EXPECT(VALUE(inside.length()) == tokens.size() + 1);
    std::vector<std::byte> copy(state.size());
    EXPECT(VALUE(inside.save(copy)).size() == state.size());
    DO(session.rewind(tokens.size()));
    DO(session.set_cut(0.5f));
    DO(session.set_depth_limit(1));
    DO(session.set_time_budget(1000000));
    DO(session.set_routing(MOR_ROUTING_THRESHOLD));
    EXPECT(STATUS(session.set_cut(2.0f)) == MOR_ERROR_INVALID_ARGUMENT);

    session.cancel();
    EXPECT(STATUS(session.step(token)) == MOR_ERROR_CANCELLED);
    session.cancel();
    session.reset_cancel();
    DO(session.step(token));

    // Callbacks: one that answers, one that does not, one that uses its own session, none.
    mor::generate_params generate;
    generate.max_tokens = 5;
    int calls = 0;
    EXPECT(VALUE(session.generate(generate, [&](const mor::piece &) { return ++calls < 2; })) ==
           MOR_FINISH_CALLBACK);
    EXPECT(calls == 2);
    auto counter = [&](const mor::piece &piece) { calls += piece.text.size() < 1000; };
    EXPECT(VALUE(session.generate(generate, counter)) == MOR_FINISH_LENGTH);
    EXPECT(calls >= 7);
    mor_status inner = MOR_OK;
    DO(session.generate(generate, [&](const mor::piece &) { inner = STATUS(session.sample()); }));
    EXPECT(inner == MOR_ERROR_BUSY);
    EXPECT(VALUE(session.generate(generate)) == MOR_FINISH_LENGTH);
    EXPECT(VALUE(session.generate([&](const mor::piece &) { return false; })) ==
           MOR_FINISH_CALLBACK);

#if MOR_HPP_EXCEPTIONS
    // A callback's exception arrives as it was, and the session goes on.
    bool caught = false;
    try {
        session.generate(generate, [](const mor::piece &) { throw std::out_of_range("mine"); });
    } catch (const std::out_of_range &mine) {
        caught = std::string_view(mine.what()) == "mine";
    }
    EXPECT(caught);
    EXPECT(session.generate(generate) == MOR_FINISH_LENGTH);
#endif

    // Moved: the old one is empty, and says so; the model may go first.
    mor::session moved = std::move(session);
    EXPECT(moved && !session);
    EXPECT(STATUS(session.length()) == MOR_ERROR_INVALID_ARGUMENT);
    EXPECT(VALUE(moved.length()) > 0);
    moved = std::move(inside);
    { mor::model gone = std::move(model); }
    DO(moved.step(token));
    EXPECT(VALUE(tokenizer.decode(tokens)) == "It is a truth");
    run_batch(from_memory, moved, tokens);

    std::printf("bindings: ok (%s, %s)\n", MOR_HPP_EXCEPTIONS ? "exceptions" : "results",
                __cplusplus >= 202002L ? "C++20" : "C++17");
    return 0;
}

} // namespace

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    return run(argv[1]);
}
