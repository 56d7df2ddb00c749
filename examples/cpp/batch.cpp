// Continues several texts at once:  batch MODEL PROMPT...
//
// All of them share each pass over the weights, and a text is printed as soon as it is done, with the
// mean number of recursions of its tokens. Written with exceptions; generate.cpp shows both forms.
#include <mor.hpp>

#include <cstdio>
#include <iostream>
#include <numeric>
#include <vector>

namespace {

// The most texts that are worked on at a time; others wait until one is done.
constexpr std::size_t at_a_time = 8;

void print(const mor::batch &batch, const mor::tokenizer &tokenizer, std::uint64_t sequence) {
    auto depths = batch.depths(sequence);
    double sum = std::accumulate(depths.begin(), depths.end(), 0.0);
    char mean[32];
    std::snprintf(mean, sizeof mean, "%.2f", depths.empty() ? 0 : sum / static_cast<double>(depths.size()));
    std::cout << tokenizer.decode(batch.tokens(sequence)) << "\n[" << depths.size()
              << " tokens, mean depth " << mean << "]\n\n";
    if (mor_error failure = batch.failure(sequence); failure.status != MOR_OK)
        std::cout << "[" << failure.text << "]\n\n";
}

void run(std::string_view path, mor::span<char *const> prompts) {
    auto model = mor::model::load(path);
    auto tokenizer = mor::tokenizer::create(model);

    mor::batch_params params;
    params.context = 256;
    params.sequences = prompts.size() < at_a_time ? prompts.size() : at_a_time;
    params.threads = 1;
    auto plan = mor::batch::plan(model, params);
    std::cout << "plan: " << plan.bytes + plan.heap_bytes << " bytes for " << plan.sequences
              << " sequences of " << plan.context << " tokens\n\n";
    auto batch = mor::batch::create(model, params);

    std::size_t next = 0, working = 0;
    while (next < prompts.size() || working > 0) {
        for (; next < prompts.size() && working < plan.sequences; next++, working++) {
            auto tokens = tokenizer.encode(prompts[next], MOR_ENCODE_ADD_SPECIAL);
            mor::batch_request request(tokens);
            request.max_tokens = 32;
            batch.add(request);
        }
        // The events stand until the next call on the batch: what is done is remembered first.
        std::vector<std::uint64_t> done;
        for (const mor_batch_event &event : batch.tick())
            if (event.kind == MOR_EVENT_FINISHED) done.push_back(event.sequence);
        for (std::uint64_t sequence : done) {
            print(batch, tokenizer, sequence);
            batch.remove(sequence);
            working--;
        }
    }

    auto counters = batch.counters();
    auto rows = std::accumulate(std::begin(counters.rows), std::end(counters.rows), std::uint64_t{0});
    std::cout << counters.ticks << " passes over the weights for " << counters.finished
              << " tokens, which ran the block " << rows << " times\n";
}

} // namespace

int main(int argc, char **argv) {
    if (argc < 3) {
        std::cerr << "usage: batch MODEL PROMPT...\n";
        return 2;
    }
    try {
        run(argv[1], mor::span<char *const>(argv + 2, static_cast<std::size_t>(argc - 2)));
        return 0;
    } catch (const mor::error &error) {
        std::cerr << "batch: " << error.what() << "\n";
        return 1;
    }
}
