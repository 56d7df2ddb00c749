/*
 * mor.hpp: mor.h for C++17 and later, in one header.
 *
 *     auto model = mor::model::load("model.gguf");
 *     auto tokenizer = mor::tokenizer::create(model);
 *     auto session = mor::session::create(model);
 *     session.prefill(tokenizer.encode("It is a truth"));
 *     session.generate([](const mor::piece &piece) { std::cout << piece.text << std::flush; });
 *
 * Names and meanings are those of mor.h, which is the manual; here is what C++ adds:
 *
 * - Objects are freed by their destructors and can be moved, not copied. After a move the old one is
 *   empty, and calls on it fail with MOR_ERROR_INVALID_ARGUMENT. get() is the C handle.
 * - Failures are exceptions of type mor::error. With MOR_NO_EXCEPTIONS defined, or where the compiler
 *   has exceptions switched off, every function that can fail returns a mor::result<T> instead, which
 *   holds the value or the error; nothing else differs. (A condition does not take a result<bool>, for
 *   it would ask whether there is an answer: `*batch.is_idle()` is the answer.) In this file
 *   `outcome<T>` stands for what a function returns: T itself, or result<T>. MOR_HPP_EXCEPTIONS is 1 or
 *   0. The standard library ends a program without exceptions when there is no memory: the functions
 *   that allocate are then not for programs that must go on.
 * - Text comes as std::string_view; numbers come as mor::span, which is std::span where there is one.
 * - Parameter structs are those of C, with the library's defaults already in them.
 * - A callback may be anything that can be called, and may throw: the generation ends, and the
 *   exception goes on from mor::session::generate.
 *
 * Functions whose results have a length of their own (std::string, std::vector) take memory from the
 * heap; for each of them but format_chat there is one that writes to memory of the caller. All others allocate
 * nothing, but for load, which copies the name of its file.
 *
 * There is no range of pieces to loop over (for (auto piece : session.stream())): which bytes of a text
 * are certain, because no character is cut and no stop string can begin there, is known inside
 * mor_session_generate only, and it cannot be left in the middle. The callback is the way.
 */
#ifndef MOR_HPP
#define MOR_HPP

#include "mor.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__has_include)
#if __has_include(<version>)
#include <version>
#endif
#endif
#if defined(__cpp_lib_span)
#include <span>
#define MOR_STD_SPAN 1
#else
#define MOR_STD_SPAN 0
#endif

#if defined(MOR_NO_EXCEPTIONS)
#define MOR_HPP_EXCEPTIONS 0
#elif defined(__cpp_exceptions) || defined(_CPPUNWIND)
#define MOR_HPP_EXCEPTIONS 1
#else
#define MOR_HPP_EXCEPTIONS 0
#endif

// The modes differ in types, so that each has a namespace of its own, which is not written: files of
// one program may be compiled in different ones.
#if MOR_HPP_EXCEPTIONS && MOR_STD_SPAN
#define MOR_MODE throws_std_span
#elif MOR_HPP_EXCEPTIONS
#define MOR_MODE throws_own_span
#elif MOR_STD_SPAN
#define MOR_MODE results_std_span
#else
#define MOR_MODE results_own_span
#endif

namespace mor {
inline namespace MOR_MODE {

#if MOR_STD_SPAN
template <class T>
using span = std::span<T>;
#else
/// A pointer and a count, in place of std::span.
template <class T>
class span {
public:
    constexpr span() noexcept = default;
    constexpr span(T *data, std::size_t size) noexcept : data_(data), size_(size) {}

    template <std::size_t N>
    constexpr span(T (&array)[N]) noexcept : span(array, N) {}

    /// From a vector, an array, a string, another span: whatever has data() and size().
    template <class C, class P = decltype(std::declval<C &>().data()),
              class = decltype(std::declval<C &>().size()),
              class = std::enable_if_t<std::is_convertible_v<std::remove_pointer_t<P> (*)[], T (*)[]>>>
    constexpr span(C &&from) noexcept : span(from.data(), from.size()) {}

    constexpr T *data() const noexcept { return data_; }
    constexpr std::size_t size() const noexcept { return size_; }
    constexpr bool empty() const noexcept { return size_ == 0; }
    constexpr T &operator[](std::size_t i) const noexcept { return data_[i]; }
    constexpr T *begin() const noexcept { return data_; }
    constexpr T *end() const noexcept { return data_ + size_; }

    /// The `count` items from the beginning.
    constexpr span first(std::size_t count) const noexcept { return span(data_, count); }

private:
    T *data_ = nullptr;
    std::size_t size_ = 0;
};
#endif

/// Why a call failed: a status and a sentence. It allocates nothing.
class error : public std::exception {
public:
    error(mor_status status, const char *text) noexcept : status_(status) {
        // Fall back to the status's own sentence where the call left none.
        if (text == nullptr || *text == '\0') text = mor_status_text(static_cast<std::int32_t>(status));
        std::size_t bytes = std::strlen(text);
        if (bytes >= sizeof text_) bytes = sizeof text_ - 1;
        std::memcpy(text_, text, bytes);
        text_[bytes] = '\0';
    }

    mor_status status() const noexcept { return status_; }
    const char *what() const noexcept override { return text_; }

private:
    mor_status status_;
    char text_[MOR_ERROR_TEXT_BYTES];
};

/// A value, or the error in its place. Ask `if (result)` before taking the value: taking one that is
/// not there ends the program.
template <class T>
class [[nodiscard]] result {
public:
    result(T value) : value_(std::move(value)) {}
    result(mor::error error) noexcept : error_(std::move(error)) {}

    bool has_value() const noexcept { return value_.has_value(); }
    /// Not of a result<bool>, for which it would not be the answer.
    template <class U = T, std::enable_if_t<!std::is_same<U, bool>::value, int> = 0>
    explicit operator bool() const noexcept {
        return has_value();
    }
    T &value() & noexcept { return *checked(); }
    const T &value() const & noexcept { return *checked(); }
    T &&value() && noexcept { return std::move(*checked()); }
    T &operator*() & noexcept { return *checked(); }
    T *operator->() noexcept { return checked(); }

    /// Why there is no value; MOR_OK when there is one.
    const mor::error &error() const noexcept { return error_; }

private:
    const T *checked() const noexcept {
        if (!value_) std::terminate();
        return &*value_;
    }
    T *checked() noexcept {
        if (!value_) std::terminate();
        return &*value_;
    }

    std::optional<T> value_;
    mor::error error_{MOR_OK, nullptr};
};

template <>
class [[nodiscard]] result<void> {
public:
    result() noexcept = default;
    result(mor::error error) noexcept : error_(std::move(error)) {}

    bool has_value() const noexcept { return error_.status() == MOR_OK; }
    explicit operator bool() const noexcept { return has_value(); }
    const mor::error &error() const noexcept { return error_; }

private:
    mor::error error_{MOR_OK, nullptr};
};

#if MOR_HPP_EXCEPTIONS
template <class T>
using outcome = T;
#else
template <class T>
using outcome = result<T>;
#endif

namespace detail {

#if MOR_HPP_EXCEPTIONS
template <class T>
[[noreturn]] inline T fail(mor_status status, const char *text) {
    throw error(status, text);
}
inline void succeed() noexcept {}
#else
template <class T>
inline result<T> fail(mor_status status, const char *text) noexcept {
    return error(status, text);
}
inline result<void> succeed() noexcept { return {}; }
#endif

/// C takes texts that end with zero bytes: one that has another inside would be cut.
inline bool is_cut(std::string_view text) noexcept { return text.find('\0') != text.npos; }
inline constexpr const char *cut = "a text has a zero byte inside";

/// A text of a function that says how long it is when its buffer is too small.
template <class Write>
mor_status two_calls(std::string &text, Write &&write) {
    std::size_t bytes = 0;
    mor_status status = write(nullptr, 0, &bytes);
    if (status == MOR_ERROR_BUFFER_TOO_SMALL) {
        // The library's zero byte takes the place of the string's own.
        text.resize(bytes);
        status = write(text.data(), bytes + 1, &bytes);
    }
    return status;
}

/// A struct that says its own size, to be filled in by the library.
template <class T>
T sized() noexcept {
    T value{};
    value.struct_size = sizeof value;
    return value;
}

/// What stands behind a C handle, freed with it.
template <class T, class Free>
class handle {
public:
    T *get() const noexcept { return pointer_.get(); }
    explicit operator bool() const noexcept { return pointer_ != nullptr; }

protected:
    explicit handle(T *pointer) noexcept : pointer_(pointer) {}

private:
    std::unique_ptr<T, Free> pointer_;
};

/// An object that one call at a time may use, and that keeps the reason of its last failure.
template <class T, class Free, const char *(*LastError)(const T *)>
class exclusive : public handle<T, Free> {
protected:
    using handle<T, Free>::handle;

    template <class R>
    outcome<R> fail(mor_status status) const {
        // While another call is in progress, the last error is that call's.
        const char *text = status == MOR_ERROR_BUSY ? nullptr : LastError(this->get());
        return detail::fail<R>(status, text);
    }

    outcome<void> done(mor_status status) const {
        if (status != MOR_OK) return fail<void>(status);
        return detail::succeed();
    }

    /// The value that a function of C writes.
    template <class V>
    outcome<V> value(mor_status (*ask)(T *, V *)) const {
        V answer{};
        mor_status status = ask(this->get(), &answer);
        if (status != MOR_OK) return fail<V>(status);
        return answer;
    }
};

struct free_model {
    void operator()(mor_model *model) const noexcept { mor_model_free(model); }
};
struct free_tokenizer {
    void operator()(mor_tokenizer *tokenizer) const noexcept { mor_tokenizer_free(tokenizer); }
};
struct free_session {
    void operator()(mor_session *session) const noexcept { mor_session_free(session); }
};
struct free_batch {
    void operator()(mor_batch *batch) const noexcept { mor_batch_free(batch); }
};

} // namespace detail

/// mor_model_params with the defaults set. `device` takes a mor_device, `device_index` a GPU's number;
/// what a session or batch takes of a GPU is in their plans.
struct model_params : mor_model_params {
    model_params() noexcept : mor_model_params() {
        mor_model_params_init(this, sizeof(mor_model_params));
    }
};

/// mor_tokenizer_params with the defaults set.
struct tokenizer_params : mor_tokenizer_params {
    tokenizer_params() noexcept : mor_tokenizer_params() {
        mor_tokenizer_params_init(this, sizeof(mor_tokenizer_params));
    }
};

/// mor_session_params with the defaults set.
struct session_params : mor_session_params {
    session_params() noexcept : mor_session_params() {
        mor_session_params_init(this, sizeof(mor_session_params));
    }

    /// The CPUs that helper threads may run on; the numbers must live as long as the parameters.
    void set_cpus(span<const std::uint32_t> numbers) noexcept {
        cpus = numbers.data();
        cpu_count = numbers.size();
    }
    void set_cpus(std::vector<std::uint32_t> &&numbers) = delete;
};

/// mor_sampler_params with the defaults set.
struct sampler_params : mor_sampler_params {
    sampler_params() noexcept : mor_sampler_params() {
        mor_sampler_params_init(this, sizeof(mor_sampler_params));
    }
};

/// mor_generate_params with the defaults set. The callback is set by session::generate.
struct generate_params : mor_generate_params {
    generate_params() noexcept : mor_generate_params() {
        mor_generate_params_init(this, sizeof(mor_generate_params));
    }

    /// Texts that end the generation; they must live as long as the parameters.
    void set_stop(span<const char *const> texts) noexcept {
        stop = texts.data();
        stop_count = texts.size();
    }
    void set_stop(std::vector<const char *> &&texts) = delete;
};

/// mor_batch_params with the defaults set.
struct batch_params : mor_batch_params {
    batch_params() noexcept : mor_batch_params() {
        mor_batch_params_init(this, sizeof(mor_batch_params));
    }

    /// The CPUs that helper threads may run on; the numbers must live as long as the parameters.
    void set_cpus(span<const std::uint32_t> numbers) noexcept {
        cpus = numbers.data();
        cpu_count = numbers.size();
    }
    void set_cpus(std::vector<std::uint32_t> &&numbers) = delete;
};

/// mor_batch_request with the defaults set.
struct batch_request : mor_batch_request {
    batch_request() noexcept : mor_batch_request() {
        mor_batch_request_init(this, sizeof(mor_batch_request));
    }

    /// The tokens, which must live as long as the request.
    explicit batch_request(span<const std::uint32_t> tokens) noexcept : batch_request() {
        prompt = tokens.data();
        prompt_count = tokens.size();
    }
    explicit batch_request(std::vector<std::uint32_t> &&tokens) = delete;

    /// How tokens are drawn; the parameters must live as long as the request.
    void set_sampler(const sampler_params &params) noexcept { sampler = &params; }
    void set_sampler(sampler_params &&) = delete;
};

/// The library's version, as "1.2.3".
inline std::string_view version() noexcept { return mor_version(); }

/// A model: see mor_model. Any number of threads, tokenizers, sessions and batches may use one at once,
/// and it may go before them.
class model : public detail::handle<mor_model, detail::free_model> {
public:
    static outcome<model> load(std::string_view path, const model_params &params = {}) {
        if (detail::is_cut(path)) return detail::fail<model>(MOR_ERROR_INVALID_ARGUMENT, detail::cut);
        // A view need not end with a zero byte.
        std::string name(path);
        return make([&](mor_model **out, mor_error *error) {
            return mor_model_load(name.c_str(), &params, out, error);
        });
    }

    static outcome<model> load_descriptor(int descriptor, std::uint64_t offset = 0,
                                          std::uint64_t bytes = 0, const model_params &params = {}) {
        return make([&](mor_model **out, mor_error *error) {
            return mor_model_load_descriptor(descriptor, offset, bytes, &params, out, error);
        });
    }

    /// The bytes are used where they are, unless the parameters ask for a copy.
    static outcome<model> load_memory(span<const std::byte> file, const model_params &params = {}) {
        return make([&](mor_model **out, mor_error *error) {
            return mor_model_load_memory(file.data(), file.size(), &params, out, error);
        });
    }

    /// A temporary's bytes would be gone before the model is used.
    static outcome<model> load_memory(std::vector<std::byte> &&) = delete;

    outcome<mor_model_info> describe() const {
        auto info = detail::sized<mor_model_info>();
        mor_status status = mor_model_describe(get(), &info);
        if (status != MOR_OK) return detail::fail<mor_model_info>(status, nullptr);
        return info;
    }

    /// The value of a metadata key whose value is a string.
    outcome<std::string> metadata(std::string_view key) const {
        if (detail::is_cut(key)) return detail::fail<std::string>(MOR_ERROR_INVALID_ARGUMENT, detail::cut);
        std::string name(key), value;
        mor_status status = detail::two_calls(value, [&](char *buffer, std::size_t capacity, std::size_t *bytes) {
            return mor_model_metadata(get(), name.c_str(), buffer, capacity, bytes);
        });
        if (status != MOR_OK) return detail::fail<std::string>(status, no_text(status));
        return value;
    }

    /// As above, without allocating: to a buffer with room for a zero byte, for a key that ends with
    /// one.
    outcome<std::string_view> metadata(const char *key, span<char> buffer) const {
        std::size_t bytes = 0;
        mor_status status = mor_model_metadata(get(), key, buffer.data(), buffer.size(), &bytes);
        if (status != MOR_OK) return detail::fail<std::string_view>(status, no_text(status));
        return std::string_view(buffer.data(), bytes);
    }

    /// What a session will take, to the byte.
    outcome<mor_session_plan_info> plan(const session_params &params = {}) const {
        auto plan = detail::sized<mor_session_plan_info>();
        mor_error error{};
        mor_status status = mor_session_plan(get(), &params, &plan, &error);
        if (status != MOR_OK) return detail::fail<mor_session_plan_info>(status, error.text);
        return plan;
    }

private:
    /// A model keeps no sentence.
    static const char *no_text(mor_status status) noexcept {
        return status == MOR_ERROR_INVALID_ARGUMENT ? "the file has no text of this key, or an argument is wrong"
                                                    : nullptr;
    }

    using handle::handle;

    template <class Load>
    static outcome<model> make(Load &&load) {
        mor_model *out = nullptr;
        mor_error error{};
        mor_status status = load(&out, &error);
        if (status != MOR_OK) return detail::fail<model>(status, error.text);
        return model(out);
    }
};

/// One turn of a conversation.
struct chat_message {
    std::string_view role;
    std::string_view content;
};

/// A model's tokenizer with working memory of its own: see mor_tokenizer. One call at a time.
class tokenizer
    : public detail::exclusive<mor_tokenizer, detail::free_tokenizer, mor_tokenizer_last_error> {
public:
    static outcome<tokenizer> create(const model &model, const tokenizer_params &params = {}) {
        mor_tokenizer *out = nullptr;
        mor_error error{};
        mor_status status = mor_tokenizer_create(model.get(), &params, &out, &error);
        if (status != MOR_OK) return detail::fail<tokenizer>(status, error.text);
        return tokenizer(out);
    }

    outcome<mor_tokenizer_info> describe() const {
        auto info = detail::sized<mor_tokenizer_info>();
        mor_status status = mor_tokenizer_describe(get(), &info);
        if (status != MOR_OK) return fail<mor_tokenizer_info>(status);
        return info;
    }

    /// The tokens of a text. `flags` is 0 or a sum of MOR_ENCODE_...; by default the text is a prompt, and gets what
    /// begins one in front of it.
    outcome<std::vector<std::uint32_t>> encode(std::string_view text,
                                               std::uint32_t flags = MOR_ENCODE_ADD_SPECIAL) const {
        std::vector<std::uint32_t> tokens;
        std::size_t count = 0;
        mor_status status = mor_tokenizer_encode(get(), text.data(), text.size(), flags, nullptr, 0, &count);
        if (status == MOR_ERROR_BUFFER_TOO_SMALL) {
            tokens.resize(count);
            status = mor_tokenizer_encode(get(), text.data(), text.size(), flags, tokens.data(), count,
                                          &count);
        }
        if (status != MOR_OK) return fail<std::vector<std::uint32_t>>(status);
        return tokens;
    }

    /// As above, without allocating. Answers the part of the buffer that was written.
    outcome<span<std::uint32_t>> encode(std::string_view text, std::uint32_t flags,
                                        span<std::uint32_t> buffer) const {
        std::size_t count = 0;
        mor_status status = mor_tokenizer_encode(get(), text.data(), text.size(), flags, buffer.data(),
                                                 buffer.size(), &count);
        if (status != MOR_OK) return fail<span<std::uint32_t>>(status);
        return buffer.first(count);
    }

    /// The text of some tokens. `flags` is 0 or MOR_DECODE_SPECIAL.
    outcome<std::string> decode(span<const std::uint32_t> tokens, std::uint32_t flags = 0) const {
        return two_calls([&](char *buffer, std::size_t capacity, std::size_t *bytes) {
            return mor_tokenizer_decode(get(), tokens.data(), tokens.size(), flags, buffer, capacity, bytes);
        });
    }

    /// As above, without allocating: to a buffer with room for a zero byte.
    outcome<std::string_view> decode(span<const std::uint32_t> tokens, std::uint32_t flags,
                                     span<char> buffer) const {
        std::size_t bytes = 0;
        mor_status status = mor_tokenizer_decode(get(), tokens.data(), tokens.size(), flags,
                                                 buffer.data(), buffer.size(), &bytes);
        if (status != MOR_OK) return fail<std::string_view>(status);
        return std::string_view(buffer.data(), bytes);
    }

    /// Text from tokens as they come, as a batch gives them: the characters that are complete with one more. Each text
    /// has a stream of its own, `mor_decode_stream stream{}`, of which a copy goes on from the same place.
    outcome<std::string> decode_next(mor_decode_stream &stream, std::uint32_t token,
                                     std::uint32_t flags = 0) const {
        return two_calls([&](char *buffer, std::size_t capacity, std::size_t *bytes) {
            return mor_tokenizer_decode_next(get(), &stream, token, flags, buffer, capacity, bytes);
        });
    }

    /// As above, without allocating: to a buffer with room for a zero byte.
    outcome<std::string_view> decode_next(mor_decode_stream &stream, std::uint32_t token, std::uint32_t flags,
                                          span<char> buffer) const {
        std::size_t bytes = 0;
        mor_status status = mor_tokenizer_decode_next(get(), &stream, token, flags, buffer.data(),
                                                      buffer.size(), &bytes);
        if (status != MOR_OK) return fail<std::string_view>(status);
        return std::string_view(buffer.data(), bytes);
    }

    /// Ends such a text: U+FFFD if a character was left incomplete, else nothing.
    outcome<std::string> decode_end(mor_decode_stream &stream) const {
        return two_calls([&](char *buffer, std::size_t capacity, std::size_t *bytes) {
            return mor_tokenizer_decode_end(get(), &stream, buffer, capacity, bytes);
        });
    }

    /// As above, without allocating.
    outcome<std::string_view> decode_end(mor_decode_stream &stream, span<char> buffer) const {
        std::size_t bytes = 0;
        mor_status status = mor_tokenizer_decode_end(get(), &stream, buffer.data(), buffer.size(), &bytes);
        if (status != MOR_OK) return fail<std::string_view>(status);
        return std::string_view(buffer.data(), bytes);
    }

    /// The bytes that one token adds to a text; they live as long as the model.
    outcome<std::string_view> token_bytes(std::uint32_t token, std::uint32_t flags = 0) const {
        const char *text = nullptr;
        std::size_t bytes = 0;
        mor_status status = mor_tokenizer_token_bytes(get(), token, flags, &text, &bytes);
        if (status != MOR_OK) return fail<std::string_view>(status);
        return std::string_view(text, bytes);
    }

    /// Whether nothing is to be generated after a token.
    outcome<bool> is_end(std::uint32_t token) const {
        bool end = false;
        mor_status status = mor_tokenizer_is_end(get(), token, &end);
        if (status != MOR_OK) return fail<bool>(status);
        return end;
    }

    /// A conversation as the model was trained on it. Encode it with MOR_ENCODE_PARSE_SPECIAL.
    outcome<std::string> format_chat(span<const chat_message> messages, bool add_prompt = true) const {
        // C takes texts that end with zero bytes.
        std::vector<std::string> texts;
        texts.reserve(2 * messages.size());
        std::vector<mor_chat_message> turns;
        turns.reserve(messages.size());
        for (const chat_message &message : messages) {
            if (detail::is_cut(message.role) || detail::is_cut(message.content))
                return detail::fail<std::string>(MOR_ERROR_INVALID_ARGUMENT, detail::cut);
            const std::string &role = texts.emplace_back(message.role);
            const std::string &content = texts.emplace_back(message.content);
            turns.push_back({role.c_str(), content.c_str()});
        }
        return two_calls([&](char *buffer, std::size_t capacity, std::size_t *bytes) {
            return mor_tokenizer_format_chat(get(), turns.data(), turns.size(), add_prompt, buffer, capacity,
                                             bytes);
        });
    }

private:
    template <class Write>
    outcome<std::string> two_calls(Write &&write) const {
        std::string text;
        mor_status status = detail::two_calls(text, write);
        if (status != MOR_OK) return fail<std::string>(status);
        return text;
    }

    using exclusive::exclusive;

};

/// One token of a generation, as it comes: see mor_piece. The text lives for the callback only.
struct piece {
    std::uint32_t token;
    std::uint32_t depth;
    std::string_view text;
};

/// One sequence of tokens in the making: see mor_session. One call at a time, but for cancel and
/// reset_cancel. It must not be destroyed from its own callback: it would then live for ever.
class session : public detail::exclusive<mor_session, detail::free_session, mor_session_last_error> {
public:
    /// In memory of its own.
    static outcome<session> create(const model &model, const session_params &params = {}) {
        mor_session *out = nullptr;
        mor_error error{};
        mor_status status = mor_session_create(model.get(), &params, &out, &error);
        if (status != MOR_OK) return detail::fail<session>(status, error.text);
        return session(out);
    }

    /// In memory of the caller, which must outlive it: see model::plan.
    static outcome<session> create_in(const model &model, const session_params &params,
                                      span<std::byte> memory) {
        mor_session *out = nullptr;
        mor_error error{};
        mor_status status =
            mor_session_create_in(model.get(), &params, memory.data(), memory.size(), &out, &error);
        if (status != MOR_OK) return detail::fail<session>(status, error.text);
        return session(out);
    }

    /// Runs tokens after those so far.
    outcome<void> prefill(span<const std::uint32_t> tokens) {
        return done(mor_session_prefill(get(), tokens.data(), tokens.size()));
    }

    /// Makes the session hold this text and nothing else, without running again what it holds of its beginning. Answers
    /// how many tokens stayed.
    outcome<std::size_t> prefill_whole(span<const std::uint32_t> tokens) {
        std::size_t kept = 0;
        mor_status status = mor_session_prefill_whole(get(), tokens.data(), tokens.size(), &kept);
        if (status != MOR_OK) return fail<std::size_t>(status);
        return kept;
    }

    /// Runs tokens after those so far, of which there must be some. Answers the natural logarithm of each one's
    /// probability after all before it; their sum says how likely they are as a continuation. On a failure the session is as
    /// it was before.
    outcome<std::vector<float>> log_probabilities(span<const std::uint32_t> tokens) {
        std::vector<float> values(tokens.size());
        mor_status status = mor_session_log_probabilities(get(), tokens.data(), tokens.size(), values.data());
        if (status != MOR_OK) return fail<std::vector<float>>(status);
        return values;
    }

    /// As above, into memory of the caller: a number for each token.
    outcome<span<float>> log_probabilities(span<const std::uint32_t> tokens, span<float> buffer) {
        if (buffer.size() < tokens.size())
            return detail::fail<span<float>>(MOR_ERROR_BUFFER_TOO_SMALL, "there is a number for each token");
        mor_status status = mor_session_log_probabilities(get(), tokens.data(), tokens.size(), buffer.data());
        if (status != MOR_OK) return fail<span<float>>(status);
        return span<float>(buffer.data(), tokens.size());
    }

    /// Runs one token. The logits stand until the next call on the session.
    outcome<span<const float>> step(std::uint32_t token) {
        const float *logits = nullptr;
        mor_status status = mor_session_step(get(), token, &logits);
        if (status != MOR_OK) return fail<span<const float>>(status);
        return this->logits();
    }

    /// The logits after the last token; they stand until the next call on the session.
    outcome<span<const float>> logits() {
        const float *logits = nullptr;
        std::size_t count = 0;
        mor_status status = mor_session_logits(get(), &logits, &count);
        if (status != MOR_OK) return fail<span<const float>>(status);
        return span<const float>(logits, count);
    }

    outcome<void> set_sampler(const sampler_params &params) {
        return done(mor_session_set_sampler(get(), &params));
    }

    /// Draws a token, which is not run.
    outcome<std::uint32_t> sample() {
        std::uint32_t token = 0;
        mor_status status = mor_session_sample(get(), &token);
        if (status != MOR_OK) return fail<std::uint32_t>(status);
        return token;
    }

    /// Continues the text so far. `callback` is called with each `const mor::piece &`; when it returns
    /// something, false ends the generation.
    template <class F, class = std::enable_if_t<std::is_invocable_v<F &, const piece &>>>
    outcome<mor_finish> generate(const generate_params &params, F &&callback) {
        using called = std::remove_reference_t<F>;
        struct state {
            called *callback;
#if MOR_HPP_EXCEPTIONS
            std::exception_ptr thrown;
#endif
            // Strictly, C's function pointers are of another linkage; every compiler takes these.
            static bool call(void *user_data, const mor_piece *from) noexcept {
                auto *self = static_cast<state *>(user_data);
                const piece to{from->token, from->depth, std::string_view(from->text, from->text_bytes)};
#if MOR_HPP_EXCEPTIONS
                // No exception may pass through C.
                try {
                    return self->invoke(to);
                } catch (...) {
                    self->thrown = std::current_exception();
                    return false;
                }
#else
                return self->invoke(to);
#endif
            }

            bool invoke(const piece &to) {
                if constexpr (std::is_void_v<std::invoke_result_t<F &, const piece &>>) {
                    std::invoke(*callback, to);
                    return true;
                } else {
                    return static_cast<bool>(std::invoke(*callback, to));
                }
            }
        };
        state state{};
        state.callback = std::addressof(callback);
        mor_generate_params with_callback = params;
        with_callback.callback = &state::call;
        with_callback.user_data = &state;
        mor_finish finish = MOR_FINISH_END;
        mor_status status = mor_session_generate(get(), &with_callback, &finish);
#if MOR_HPP_EXCEPTIONS
        if (state.thrown) std::rethrow_exception(std::move(state.thrown));
#endif
        if (status != MOR_OK) return fail<mor_finish>(status);
        return finish;
    }

    template <class F, class = std::enable_if_t<std::is_invocable_v<F &, const piece &>>>
    outcome<mor_finish> generate(F &&callback) {
        return generate(generate_params(), std::forward<F>(callback));
    }

    /// Without a callback: the tokens are found in the session afterwards.
    outcome<mor_finish> generate(const generate_params &params = {}) {
        return generate(params, [](const piece &) {});
    }

    outcome<std::size_t> length() const { return value<std::size_t>(mor_session_length); }

    /// The tokens so far.
    outcome<std::vector<std::uint32_t>> tokens() const {
        return copy<std::uint32_t>(mor_session_tokens);
    }

    /// As above, without allocating: as many from `first` on as the buffer holds.
    outcome<void> tokens(std::size_t first, span<std::uint32_t> buffer) const {
        return done(mor_session_tokens(get(), first, buffer.size(), buffer.data()));
    }

    /// The recursions that each token so far ran.
    outcome<std::vector<std::uint8_t>> depths() const {
        return copy<std::uint8_t>(mor_session_depths);
    }

    /// As above, without allocating: as many from `first` on as the buffer holds.
    outcome<void> depths(std::size_t first, span<std::uint8_t> buffer) const {
        return done(mor_session_depths(get(), first, buffer.size(), buffer.data()));
    }

    /// How many tokens ran each number of recursions, from 0 to the model's.
    outcome<void> depth_histogram(span<std::uint64_t> counts) const {
        return done(mor_session_depth_histogram(get(), counts.data(), counts.size()));
    }

    outcome<std::size_t> kv_bytes_used() const {
        return value<std::size_t>(mor_session_kv_bytes_used);
    }

    outcome<void> set_cut(float cut) { return done(mor_session_set_cut(get(), cut)); }

    outcome<void> set_depth_limit(std::uint32_t limit) {
        return done(mor_session_set_depth_limit(get(), limit));
    }

    /// 0 nanoseconds: none. (std::chrono::nanoseconds(...).count() is such a number.)
    outcome<void> set_time_budget(std::uint64_t nanoseconds) {
        return done(mor_session_set_time_budget(get(), nanoseconds));
    }

    outcome<void> set_routing(mor_routing routing) {
        return done(mor_session_set_routing(get(), static_cast<std::uint32_t>(routing)));
    }

    /// Forgets all tokens from a position on.
    outcome<void> rewind(std::size_t length) { return done(mor_session_rewind(get(), length)); }

    /// The state of the sequence, for restore.
    outcome<std::vector<std::byte>> save() const {
        std::vector<std::byte> state;
        std::size_t bytes = 0;
        mor_status status = mor_session_save_size(get(), &bytes);
        if (status == MOR_OK) {
            state.resize(bytes);
            status = mor_session_save(get(), state.data(), bytes, &bytes);
        }
        if (status != MOR_OK) return fail<std::vector<std::byte>>(status);
        return state;
    }

    outcome<std::size_t> save_size() const { return value<std::size_t>(mor_session_save_size); }

    /// As above, without allocating. Answers the part of the buffer that was written.
    outcome<span<std::byte>> save(span<std::byte> buffer) const {
        std::size_t bytes = 0;
        mor_status status = mor_session_save(get(), buffer.data(), buffer.size(), &bytes);
        if (status != MOR_OK) return fail<span<std::byte>>(status);
        return buffer.first(bytes);
    }

    outcome<void> restore(span<const std::byte> state) {
        return done(mor_session_restore(get(), state.data(), state.size()));
    }

    /// Ends the call in progress, or the next one. Any thread, any time while the session lives.
    void cancel() noexcept { mor_session_cancel(get()); }

    /// Takes back a cancel that no call has met yet.
    void reset_cancel() noexcept { mor_session_reset_cancel(get()); }

private:
    using exclusive::exclusive;

    template <class T>
    outcome<std::vector<T>> copy(mor_status (*ask)(mor_session *, std::size_t, std::size_t, T *)) const {
        std::vector<T> values;
        std::size_t count = 0;
        mor_status status = mor_session_length(get(), &count);
        if (status == MOR_OK) {
            values.resize(count);
            status = ask(get(), 0, count, values.data());
        }
        if (status != MOR_OK) return fail<std::vector<T>>(status);
        return values;
    }
};

/// Where a sequence of a batch stands and, when it is done, why it ended.
struct sequence_status {
    mor_sequence_status status;
    mor_finish finish;
};

/// Many sequences at once, batched by depth: see mor_batch. One call at a time.
class batch : public detail::exclusive<mor_batch, detail::free_batch, mor_batch_last_error> {
public:
    static outcome<batch> create(const model &model, const batch_params &params = {}) {
        mor_batch *out = nullptr;
        mor_error error{};
        mor_status status = mor_batch_create(model.get(), &params, &out, &error);
        if (status != MOR_OK) return detail::fail<batch>(status, error.text);
        return batch(out);
    }

    /// What a batch will take, to the byte.
    static outcome<mor_batch_plan_info> plan(const model &model, const batch_params &params = {}) {
        auto plan = detail::sized<mor_batch_plan_info>();
        mor_error error{};
        mor_status status = mor_batch_plan(model.get(), &params, &plan, &error);
        if (status != MOR_OK) return detail::fail<mor_batch_plan_info>(status, error.text);
        return plan;
    }

    /// The plan with the most sequences for so many bytes, on a GPU of its memory, at a mean depth.
    static outcome<mor_batch_plan_info> plan_in(const model &model, const batch_params &params,
                                                double mean_depth, std::size_t bytes) {
        auto plan = detail::sized<mor_batch_plan_info>();
        mor_error error{};
        mor_status status =
            mor_batch_plan_in(model.get(), &params, mean_depth, bytes, &plan, &error);
        if (status != MOR_OK) return detail::fail<mor_batch_plan_info>(status, error.text);
        return plan;
    }

    /// Pages that the sequences of `params` take at a mean depth.
    static outcome<std::size_t> pages_for(const model &model, const batch_params &params,
                                          double mean_depth) {
        std::size_t pages = 0;
        mor_error error{};
        mor_status status = mor_batch_pages_for(model.get(), &params, mean_depth, &pages, &error);
        if (status != MOR_OK) return detail::fail<std::size_t>(status, error.text);
        return pages;
    }

    /// Adds a sequence; answers its number.
    outcome<std::uint64_t> add(const batch_request &request) {
        std::uint64_t sequence = 0;
        mor_status status = mor_batch_add(get(), &request, &sequence);
        if (status != MOR_OK) return fail<std::uint64_t>(status);
        return sequence;
    }

    /// Adds a sequence that begins with the first `length` tokens of another.
    outcome<std::uint64_t> fork(std::uint64_t parent, std::size_t length,
                                const batch_request &request = {}) {
        std::uint64_t sequence = 0;
        mor_status status = mor_batch_fork(get(), parent, length, &request, &sequence);
        if (status != MOR_OK) return fail<std::uint64_t>(status);
        return sequence;
    }

    /// Ends a sequence; its tokens stay.
    outcome<void> stop(std::uint64_t sequence) { return done(mor_batch_stop(get(), sequence)); }

    /// Forgets a sequence.
    outcome<void> remove(std::uint64_t sequence) { return done(mor_batch_remove(get(), sequence)); }

    /// Lets a sequence that stands still try again.
    outcome<void> resume(std::uint64_t sequence) { return done(mor_batch_resume(get(), sequence)); }

    /// One pass over the weights. The events stand until the next call on the batch.
    outcome<span<const mor_batch_event>> tick() {
        const mor_batch_event *events = nullptr;
        std::size_t count = 0;
        mor_status status = mor_batch_tick(get(), &events, &count);
        if (status != MOR_OK) return fail<span<const mor_batch_event>>(status);
        return span<const mor_batch_event>(events, count);
    }

    outcome<sequence_status> status(std::uint64_t sequence) const {
        sequence_status answer{MOR_SEQUENCE_WAITING, MOR_FINISH_END};
        mor_status status =
            mor_batch_sequence_status(get(), sequence, &answer.status, &answer.finish);
        if (status != MOR_OK) return fail<sequence_status>(status);
        return answer;
    }

    /// The tokens of a sequence so far, its prompt among them.
    outcome<std::vector<std::uint32_t>> tokens(std::uint64_t sequence) const {
        return copy<std::uint32_t>(mor_batch_tokens, sequence);
    }

    /// As above, without allocating. Answers the part of the buffer that was written.
    outcome<span<std::uint32_t>> tokens(std::uint64_t sequence, span<std::uint32_t> buffer) const {
        return copy_to(mor_batch_tokens, sequence, buffer);
    }

    /// The recursions that each token of a sequence ran.
    outcome<std::vector<std::uint8_t>> depths(std::uint64_t sequence) const {
        return copy<std::uint8_t>(mor_batch_depths, sequence);
    }

    /// As above, without allocating. Answers the part of the buffer that was written.
    outcome<span<std::uint8_t>> depths(std::uint64_t sequence, span<std::uint8_t> buffer) const {
        return copy_to(mor_batch_depths, sequence, buffer);
    }

    /// Why a sequence failed; MOR_OK when it did not.
    outcome<mor_error> failure(std::uint64_t sequence) const {
        mor_error failure;
        mor_status status = mor_batch_failure(get(), sequence, &failure);
        if (status != MOR_OK) return fail<mor_error>(status);
        return failure;
    }

    /// Whether there is nothing to run.
    outcome<bool> is_idle() const { return value<bool>(mor_batch_is_idle); }

    outcome<std::size_t> kv_bytes_used() const { return value<std::size_t>(mor_batch_kv_bytes_used); }

    /// What ran so far.
    outcome<mor_batch_counters_info> counters() const {
        auto counters = detail::sized<mor_batch_counters_info>();
        mor_status status = mor_batch_counters(get(), &counters);
        if (status != MOR_OK) return fail<mor_batch_counters_info>(status);
        return counters;
    }

    /// Ordinary batching, to compare with.
    outcome<void> set_in_step(bool in_step) { return done(mor_batch_set_in_step(get(), in_step)); }

private:
    using exclusive::exclusive;

    template <class T>
    using list = mor_status(mor_batch *, std::uint64_t, T *, std::size_t, std::size_t *);

    template <class T>
    outcome<std::vector<T>> copy(list<T> *ask, std::uint64_t sequence) const {
        std::vector<T> values;
        std::size_t count = 0;
        mor_status status = ask(get(), sequence, nullptr, 0, &count);
        if (status == MOR_ERROR_BUFFER_TOO_SMALL) {
            values.resize(count);
            status = ask(get(), sequence, values.data(), count, &count);
        }
        if (status != MOR_OK) return fail<std::vector<T>>(status);
        return values;
    }

    template <class T>
    outcome<span<T>> copy_to(list<T> *ask, std::uint64_t sequence, span<T> buffer) const {
        std::size_t count = 0;
        mor_status status = ask(get(), sequence, buffer.data(), buffer.size(), &count);
        if (status != MOR_OK) return fail<span<T>>(status);
        return buffer.first(count);
    }
};

} // namespace MOR_MODE
} // namespace mor

#undef MOR_MODE
#undef MOR_STD_SPAN

#endif // MOR_HPP
