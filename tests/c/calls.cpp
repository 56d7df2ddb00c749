// The tables of tests/calls through mor.hpp; tests/calls/README.md says what they are.
//
//     calls_cpp TABLE MODEL ROOT THREADS
#include <mor.hpp>

#include <cmath>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <map>
#include <sstream>

namespace {

using text = std::string;
using args = std::vector<text>;

const char *const statuses[] = {
    "OK", "INVALID_ARGUMENT", "OUT_OF_MEMORY", "IO", "FORMAT", "UNSUPPORTED", "TOKENIZER",
    "TEMPLATE", "CONTEXT_FULL", "KV_FULL", "NOT_FINITE", "THREAD", "CANCELLED", "BUSY",
    "BUFFER_TOO_SMALL", "STATE", "FILE_CHANGED", "LOCK", "NOT_READY", "INTERNAL", "DEVICE"};
const char *const finishes[] = {"end",      "stop",      "length",  "context_full",
                                "callback", "cancelled", "stopped", "failed"};

// --- What a table says. --------------------------------------------------------------------------

text unescape(const text &field) {
    if (field == "-") return "";
    text plain;
    for (std::size_t i = 0; i < field.size(); i++) {
        if (field[i] != '\\') {
            plain += field[i];
            continue;
        }
        char letter = field[++i];
        plain += letter == 'n'   ? '\n'
                 : letter == 't' ? '\t'
                 : letter == 'r' ? '\r'
                 : letter == 's' ? ' '
                                 : letter;
    }
    return plain;
}

/// A list of key=value.
class options {
public:
    explicit options(const text &field) {
        std::istringstream words(field);
        for (text word; words >> word;) {
            std::size_t at = word.find('=');
            values[word.substr(0, at)] = word.substr(at + 1);
        }
    }

    /// Sets what is given.
    template <class T>
    void set(const char *key, T &value) const {
        auto found = values.find(key);
        if (found == values.end()) return;
        double number = std::strtod(found->second.c_str(), nullptr);
        value = static_cast<T>(number);
    }

    text get(const char *key, const char *otherwise) const {
        auto found = values.find(key);
        return found == values.end() ? otherwise : found->second;
    }

private:
    std::map<text, text> values;
};

template <class T>
T number(const text &field) {
    return static_cast<T>(std::strtod(field.c_str(), nullptr));
}

std::vector<std::uint32_t> numbers(const text &field) {
    std::istringstream words(field);
    return {std::istream_iterator<std::uint32_t>(words), {}};
}

template <class C>
text list(const C &items) {
    std::ostringstream out;
    const char *before = "";
    for (const auto &item : items) {
        out << before << +item;
        before = " ";
    }
    return out.str();
}

template <>
text list(const args &items) {
    text out;
    for (const text &item : items) out += (out.empty() ? "" : " ") + item;
    return out;
}

template <class... T>
text join(const T &...parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

/// What sessions and batches have in common.
template <class P>
P params(const text &field, std::uint32_t threads, std::size_t P::*rows) {
    options given(field);
    P p;
    p.threads = threads;
    given.set("context", p.context);
    given.set("batch", p.*rows);
    given.set("threads", p.threads);
    given.set("pages", p.kv_pages);
    text kv = given.get("kv", "f16");
    p.kv_type = kv == "f16" ? MOR_KV_F16 : kv == "q8_0" ? MOR_KV_Q8_0 : MOR_KV_F32;
    return p;
}

mor::sampler_params sampler(const options &given) {
    mor::sampler_params p;
    given.set("temperature", p.temperature);
    given.set("top_p", p.top_p);
    given.set("min_p", p.min_p);
    given.set("penalty", p.repeat_penalty);
    given.set("top_k", p.top_k);
    given.set("last_n", p.repeat_last_n);
    given.set("seed", p.seed);
    return p;
}

// --- The objects that a table's calls work on. ---------------------------------------------------

struct objects {
    text file, root;
    std::uint32_t threads;
    std::optional<mor::model> model;
    std::optional<mor::tokenizer> tokenizer;
    std::optional<mor::session> session;
    std::optional<mor::batch> batch;
    args pieces;
    text written;
    std::vector<std::byte> state;
    std::vector<std::uint64_t> sequences = std::vector<std::uint64_t>(8, UINT64_MAX);

    text load(const args &a) {
        text path = a[0] == "@" ? file : root + "/" + a[0];
        if (a.size() == 1) {
            model = mor::model::load(path);
        } else {
            std::ifstream in(path, std::ios::binary);
            std::vector<char> data(number<std::size_t>(a[1]));
            in.read(data.data(), static_cast<std::streamsize>(data.size()));
            mor::model_params copy;
            copy.copy = 1;
            auto *bytes = reinterpret_cast<const std::byte *>(data.data());
            model = mor::model::load_memory(mor::span<const std::byte>(bytes, data.size()), copy);
        }
        tokenizer = mor::tokenizer::create(*model);
        return "";
    }

    text load_on(const args &a) {
        mor::model_params on;
        on.device = a[1] == "cpu"    ? std::uint8_t(MOR_DEVICE_CPU)
                    : a[1] == "cuda" ? std::uint8_t(MOR_DEVICE_CUDA)
                                     : static_cast<std::uint8_t>(number<std::uint32_t>(a[1]));
        model = mor::model::load(a[0] == "@" ? file : root + "/" + a[0], on);
        tokenizer = mor::tokenizer::create(*model);
        return "";
    }

    text describe() const {
        static const char *const kinds[] = {"vanilla", "recursive", "expert_choice", "token_choice"};
        auto i = model->describe();
        return join(kinds[i.kind], " vocab ", i.vocab_size, " context ", i.context_length, " hidden ",
                    i.hidden_size, " feed_forward ", i.feed_forward_size, " heads ", i.heads,
                    " kv_heads ", i.kv_heads, " head_dim ", i.head_dim, " stored ", i.stored_layers,
                    " logical ", i.logical_layers, " recursions ", i.recursions, " weights ",
                    i.weight_bytes, " unshared ", i.unshared_weight_bytes, " parameters ",
                    i.parameters, " tokenizer ", i.has_tokenizer, " template ",
                    i.has_chat_template);
    }

    mor::session_params session_params(const text &field) const {
        return params<mor::session_params>(field, threads, &mor::session_params::batch);
    }

    mor::batch_params batch_params(const text &field) const {
        auto p = params<mor::batch_params>(field, threads, &mor::batch_params::rows);
        options given(field);
        given.set("sequences", p.sequences);
        if (given.get("pressure", "evict") == "refuse") p.pressure = MOR_PRESSURE_REFUSE;
        return p;
    }

    template <class P>
    text plan(const P &p, std::size_t rows) const {
        const char *wrong = p.bytes > p.kv_bytes && p.threads == threads ? "" : " WRONG";
        return join("context ", p.context, " batch ", rows, " pages ", p.kv_pages, " kv_bytes ",
                    p.kv_bytes, " per_token ", p.kv_bytes_per_token, wrong);
    }

    text plan(const mor_batch_plan_info &p) const {
        return join("sequences ", p.sequences, " ", plan(p, p.rows));
    }

    text format_chat(const args &a) const {
        std::vector<mor::chat_message> turns;
        for (std::size_t i = 1; i + 1 < a.size(); i += 2) turns.push_back({a[i], a[i + 1]});
        return tokenizer->format_chat(turns, a[0] == "1");
    }

    text token_bytes(const args &a) const {
        static const char digits[] = "0123456789abcdef";
        text hex;
        auto bytes = tokenizer->token_bytes(number<std::uint32_t>(a[1]), number<std::uint32_t>(a[0]));
        for (unsigned char byte : bytes) hex += {digits[byte / 16], digits[byte % 16]};
        return hex;
    }

    text prompt(const args &a) {
        auto tokens = tokenizer->encode(a[1], number<std::uint32_t>(a[0]));
        session->prefill(tokens);
        return std::to_string(tokens.size());
    }

    /// The token of the largest number, the first of equals.
    static text likeliest(mor::span<const float> logits) {
        std::size_t best = 0;
        for (std::size_t i = 1; i < logits.size(); i++) {
            if (logits[i] > logits[best]) best = i;
        }
        return std::to_string(best);
    }

    text histogram() const {
        std::vector<std::uint64_t> counts(model->describe().recursions + 1);
        session->depth_histogram(counts);
        return list(counts);
    }

    template <class T>
    static text from(std::vector<T> items, const text &first) {
        items.erase(items.begin(), items.begin() + number<std::ptrdiff_t>(first));
        return list(items);
    }

    text generate(const text &verb, const args &a) {
        std::size_t first = verb == "generate" ? 1 : 2;
        std::size_t after = first == 1 ? 0 : number<std::size_t>(a[1]);
        std::vector<const char *> stops;
        for (std::size_t i = first; i < a.size(); i++) stops.push_back(a[i].c_str());
        mor::generate_params p;
        if (!a[0].empty()) p.max_tokens = number<std::size_t>(a[0]);
        p.set_stop(stops);
        pieces.clear();
        written.clear();
        return finishes[session->generate(p, [&](const mor::piece &piece) {
            pieces.push_back(join(piece.token, ":", piece.depth));
            written += piece.text;
            if (pieces.size() != after) return true;
            if (verb == "generate_until") return false;
            session->cancel();
            return true;
        })];
    }

    text restore(const args &a) {
        auto copy = state;
        if (!a.empty()) copy[number<std::size_t>(a[0])] ^= std::byte{1};
        session->restore(copy);
        return "";
    }

    text add(const text &verb, const args &a) {
        options given(a[a.size() - 2]);
        auto prompt = tokenizer->encode(a.back(), 0);
        auto how = sampler(given);
        mor::batch_request request{mor::span<const std::uint32_t>(prompt)};
        request.set_sampler(how);
        given.set("max", request.max_tokens);
        given.set("cut", request.cut);
        given.set("depth_limit", request.depth_limit);
        given.set("priority", request.priority);
        given.set("ignore_end", request.ignore_end);
        std::uint64_t sequence =
            verb == "add" ? batch->add(request)
                          : batch->fork(place(a[1]), number<std::size_t>(a[2]), request);
        sequences[number<std::size_t>(a[0])] = sequence;
        return "";
    }

    std::uint64_t place(const text &field) const { return sequences[number<std::size_t>(field)]; }

    text tick(const text &verb) {
        static const char *const kinds[] = {"token", "evicted", "resumed", "full", "finished"};
        args events;
        do {
            for (const mor_batch_event &e : batch->tick()) {
                std::size_t at = 0;
                while (at < 7 && sequences[at] != e.sequence) at++;
                text event = join(kinds[e.kind], ":", at);
                if (e.kind == MOR_EVENT_TOKEN) event += join(":", e.token, ":", e.depth);
                if (e.kind == MOR_EVENT_FINISHED) event += join(":", finishes[e.finish]);
                events.push_back(event);
            }
        } while (verb == "run" && !batch->is_idle());
        return list(events);
    }

    text status(const text &field) const {
        static const char *const names[] = {"waiting", "running", "full", "finished"};
        auto answer = batch->status(place(field));
        text finish = answer.status == MOR_SEQUENCE_FINISHED ? join(":", finishes[answer.finish]) : "";
        return names[answer.status] + finish;
    }

    text counters() const {
        auto c = batch->counters();
        std::uint64_t rows = 0;
        for (std::uint64_t n : c.rows) rows += n;
        return list(std::vector<std::uint64_t>{c.ticks, c.row_capacity, c.finished, c.logits, c.evictions, rows});
    }

    text call(const text &verb, const args &a) {
        using verb_fn = std::function<text()>;
        auto quiet = [](auto work) { return verb_fn([work] { return work(), text(); }); };
        const std::map<text, verb_fn> verbs = {
            {"load", [&] { return load(a); }},
            {"load_on", [&] { return load_on(a); }},
            {"load_bytes", [&] { return load(a); }},
            {"describe", [&] { return describe(); }},
            {"metadata", [&] { return model->metadata(a[0]); }},
            {"plan", [&] { auto p = model->plan(session_params(a[0])); return plan(p, p.batch); }},
            {"batch_plan", [&] { return plan(mor::batch::plan(*model, batch_params(a[0]))); }},
            {"batch_plan_in", [&] {
                 return plan(mor::batch::plan_in(*model, batch_params(a[0]), number<double>(a[1]),
                                                 number<std::size_t>(a[2])));
             }},
            {"batch_pages", [&] {
                 return std::to_string(
                     mor::batch::pages_for(*model, batch_params(a[0]), number<double>(a[1])));
             }},
            {"encode", [&] { return list(tokenizer->encode(a[1], number<std::uint32_t>(a[0]))); }},
            {"decode", [&] { return tokenizer->decode(numbers(a[1]), number<std::uint32_t>(a[0])); }},
            {"decode_each", [&] {
                 mor_decode_stream stream{};
                 std::string all;
                 for (std::uint32_t token : numbers(a[1]))
                     all += std::string(tokenizer->decode_next(stream, token, number<std::uint32_t>(a[0]))) + "|";
                 return text(all + std::string(tokenizer->decode_end(stream)));
             }},
            {"token_bytes", [&] { return token_bytes(a); }},
            {"is_end", [&] {
                 return text(tokenizer->is_end(number<std::uint32_t>(a[0])) ? "true" : "false");
             }},
            {"format_chat", [&] { return format_chat(a); }},
            {"session", quiet([&] { session = mor::session::create(*model, session_params(a[0])); })},
            {"prompt", [&] { return prompt(a); }},
            {"prefill", quiet([&] { session->prefill(numbers(a[0])); })},
            {"prefill_whole", [&] { return std::to_string(session->prefill_whole(numbers(a[0]))); }},
            {"step", [&] { return likeliest(session->step(number<std::uint32_t>(a[0]))); }},
            {"log_probabilities", [&] {
                std::vector<long> rounded;
                auto tokens = numbers(a[0]);
                for (float number : session->log_probabilities(tokens))
                    rounded.push_back(std::lround(100 * number));
                return list(rounded);
            }},
            {"logits", [&] { return likeliest(session->logits()); }},
            {"sampler", quiet([&] { session->set_sampler(sampler(options(a[0]))); })},
            {"sample", [&] { return std::to_string(session->sample()); }},
            {"generate", [&] { return generate(verb, a); }},
            {"generate_until", [&] { return generate(verb, a); }},
            {"generate_cancel", [&] { return generate(verb, a); }},
            {"pieces", [&] { return list(pieces); }},
            {"text", [&] { return written; }},
            {"length", [&] { return std::to_string(session->length()); }},
            {"tokens", [&] { return from(session->tokens(), a[0]); }},
            {"depths", [&] { return from(session->depths(), a[0]); }},
            {"histogram", [&] { return histogram(); }},
            {"kv_bytes", [&] { return std::to_string(session->kv_bytes_used()); }},
            {"cut", quiet([&] { session->set_cut(number<float>(a[0])); })},
            {"depth_limit", quiet([&] { session->set_depth_limit(number<std::uint32_t>(a[0])); })},
            {"routing", quiet([&] {
                 session->set_routing(a[0] == "capacity" ? MOR_ROUTING_CAPACITY
                                                         : MOR_ROUTING_THRESHOLD);
             })},
            {"rewind", quiet([&] { session->rewind(number<std::size_t>(a[0])); })},
            {"save", [&] { state = session->save(); return std::to_string(state.size()); }},
            {"restore", [&] { return restore(a); }},
            {"cancel", quiet([&] { session->cancel(); })},
            {"reset_cancel", quiet([&] { session->reset_cancel(); })},
            {"batch", quiet([&] { batch = mor::batch::create(*model, batch_params(a[0])); })},
            {"add", [&] { return add(verb, a); }},
            {"fork", [&] { return add(verb, a); }},
            {"tick", [&] { return tick(verb); }},
            {"run", [&] { return tick(verb); }},
            {"stop", quiet([&] { batch->stop(place(a[0])); })},
            {"remove", quiet([&] { batch->remove(place(a[0])); })},
            {"resume", quiet([&] { batch->resume(place(a[0])); })},
            {"status", [&] { return status(a[0]); }},
            {"failure", [&] { return text(statuses[batch->failure(place(a[0])).status]); }},
            {"batch_tokens", [&] { return list(batch->tokens(place(a[0]))); }},
            {"batch_depths", [&] { return list(batch->depths(place(a[0]))); }},
            {"batch_idle", [&] { return text(batch->is_idle() ? "true" : "false"); }},
            {"batch_kv_bytes", [&] { return std::to_string(batch->kv_bytes_used()); }},
            {"batch_counters", [&] { return counters(); }},
            {"in_step", quiet([&] { batch->set_in_step(a[0] == "1"); })},
        };
        auto found = verbs.find(verb);
        if (found == verbs.end()) throw std::runtime_error("no verb '" + verb + "'");
        return found->second();
    }
};

} // namespace

int main(int argc, char **argv) {
    if (argc != 5) return 2;
    std::ifstream table(argv[1]);
    objects all{};
    all.file = argv[2];
    all.root = argv[3];
    all.threads = number<std::uint32_t>(argv[4]);
    int at = 0, calls = 0, wrong = 0;
    for (text line; std::getline(table, line);) {
        at++;
        if (line.empty() || line[0] == '#') continue;
        args fields;
        std::istringstream parts(line);
        for (text field; std::getline(parts, field, '\t');) fields.push_back(unescape(field));
        const text wanted = fields[fields.size() - 2], said = fields.back();
        text status = "OK", came;
        try {
            came = all.call(fields[0], args(fields.begin() + 1, fields.end() - 2));
        } catch (const mor::error &error) {
            status = statuses[error.status()];
            came = error.what();
        }
        calls++;
        bool right = status == "OK" ? came == said : came.find(said) != text::npos;
        if (status == wanted && right) continue;
        wrong++;
        std::cerr << argv[1] << ':' << at << ": " << fields[0] << ": " << status << " '" << came
                  << "', not " << wanted << " '" << said << "'\n";
    }
    std::cout << calls << " calls, " << all.threads << " threads: " << wrong << " wrong\n";
    return calls == 0 || wrong > 0;
}
