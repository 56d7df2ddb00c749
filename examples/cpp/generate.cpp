// Continues a text:  generate MODEL PROMPT
//
// The same work twice: as it is written with exceptions, and as it is written without. mor.hpp takes
// the second form when it is compiled with -fno-exceptions or MOR_NO_EXCEPTIONS.
#include <mor.hpp>

#include <iostream>
#include <vector>

namespace {

// Gets the text as it comes; false ends the generation.
bool show(const mor::piece &piece) {
    std::cout << piece.text << std::flush;
    return std::cout.good();
}

void report(const mor_session_plan_info &plan, const std::vector<std::uint64_t> &depths) {
    std::cout << "\ntokens by depth:";
    for (std::size_t depth = 0; depth < depths.size(); depth++)
        std::cout << "  " << depth << ": " << depths[depth];
    std::cout << "\nplan: " << plan.bytes << " bytes for " << plan.context << " tokens\n";
}

// Parameters have the library's defaults.
mor::session_params session_params() {
    mor::session_params params;
    params.threads = 1;
    return params;
}

mor::generate_params generate_params() {
    static const char *const stop[] = {"\n\n"};
    mor::generate_params params;
    params.max_tokens = 48;
    params.set_stop(stop);
    return params;
}

#if MOR_HPP_EXCEPTIONS

void run(std::string_view path, std::string_view prompt) {
    auto model = mor::model::load(path);
    auto tokenizer = mor::tokenizer::create(model);
    auto plan = model.plan(session_params());
    auto session = mor::session::create(model, session_params());

    session.prefill(tokenizer.encode(prompt, MOR_ENCODE_ADD_SPECIAL));
    std::cout << prompt;
    session.generate(generate_params(), show);

    std::vector<std::uint64_t> depths(model.describe().recursions + 1);
    session.depth_histogram(depths);
    report(plan, depths);
}

int attempt(std::string_view path, std::string_view prompt) {
    try {
        run(path, prompt);
        return 0;
    } catch (const mor::error &error) { // error.status() tells what kind it is
        std::cerr << "generate: " << error.what() << "\n";
        return 1;
    }
}

#else

mor::result<void> run(std::string_view path, std::string_view prompt) {
    auto model = mor::model::load(path);
    if (!model) return model.error();
    auto tokenizer = mor::tokenizer::create(*model);
    if (!tokenizer) return tokenizer.error();
    auto plan = model->plan(session_params());
    if (!plan) return plan.error();
    auto session = mor::session::create(*model, session_params());
    if (!session) return session.error();

    auto tokens = tokenizer->encode(prompt, MOR_ENCODE_ADD_SPECIAL);
    if (!tokens) return tokens.error();
    if (auto done = session->prefill(*tokens); !done) return done;
    std::cout << prompt;
    if (auto finish = session->generate(generate_params(), show); !finish) return finish.error();

    auto info = model->describe();
    if (!info) return info.error();
    std::vector<std::uint64_t> depths(info->recursions + 1);
    if (auto done = session->depth_histogram(depths); !done) return done;
    report(*plan, depths);
    return {};
}

int attempt(std::string_view path, std::string_view prompt) {
    auto done = run(path, prompt);
    if (done) return 0;
    std::cerr << "generate: " << done.error().what() << "\n";
    return 1;
}

#endif

} // namespace

int main(int argc, char **argv) {
    if (argc != 3) {
        std::cerr << "usage: generate MODEL PROMPT\n";
        return 2;
    }
    return attempt(argv[1], argv[2]);
}
