// Talks with a model; each line of standard input is a message:  chat MODEL
//
// The same program in Rust is examples/chat.rs. Written with exceptions; generate.cpp shows both forms.
#include <mor.hpp>

#include <iostream>
#include <string>
#include <vector>

namespace {

struct turn {
    std::string role;
    std::string content;
};

// The conversation as the model was trained on it. One that was never taught to chat continues a text.
std::vector<std::uint32_t> prompt(const mor::tokenizer &tokenizer, bool has_template,
                                  const std::vector<turn> &turns) {
    if (!has_template) {
        std::string said;
        for (const turn &turn : turns) said += turn.content;
        return tokenizer.encode(said, MOR_ENCODE_ADD_SPECIAL);
    }
    std::vector<mor::chat_message> messages;
    for (const turn &turn : turns) messages.push_back({turn.role, turn.content});
    return tokenizer.encode(tokenizer.format_chat(messages), MOR_ENCODE_PARSE_SPECIAL);
}

void run(std::string_view path) {
    auto model = mor::model::load(path);
    auto tokenizer = mor::tokenizer::create(model);
    auto session = mor::session::create(model);
    bool has_template = model.describe().has_chat_template != 0;
    mor::generate_params params;
    params.max_tokens = 100;

    std::vector<turn> turns;
    for (std::string line; std::getline(std::cin, line);) {
        turns.push_back({"user", line});
        // The whole conversation is written and tokenized each time: only so does it stand as the model was trained on
        // it. What the session holds of it already is not run again.
        auto tokens = prompt(tokenizer, has_template, turns);
        std::size_t kept = session.prefill_whole(tokens);
        std::cerr << "[" << tokens.size() - kept << " of " << tokens.size() << " tokens run]\n";
        std::string answer;
        session.generate(params, [&](const mor::piece &piece) {
            answer += piece.text;
            std::cout << piece.text << std::flush;
            return std::cout.good();
        });
        std::cout << "\n";
        turns.push_back({"assistant", answer});
    }
}

} // namespace

int main(int argc, char **argv) {
    if (argc != 2) {
        std::cerr << "usage: chat MODEL\n";
        return 2;
    }
    try {
        run(argv[1]);
        return 0;
    } catch (const mor::error &error) {
        std::cerr << "chat: " << error.what() << "\n";
        return 1;
    }
}
