package dev.mor.tests;

import dev.mor.*;
import java.util.List;

/** The binding as Java sees it: it compiles without Kotlin's words, and runs. */
public final class JavaCaller {
    public static void run(String path) throws Exception {
        StringBuilder text = new StringBuilder();
        SessionParams params = new SessionParams();
        params.setContext(64);
        SamplerParams sampler = SamplerParams.greedy();
        GenerateParams most = new GenerateParams();
        most.setMaxTokens(8);
        most.setStop(List.of("never comes"));
        try (Model model = Model.load(path);
                Tokenizer tokenizer = new Tokenizer(model);
                Session session = new Session(model, params)) {
            session.setSampler(sampler);
            session.prefill(tokenizer.encode("It is a truth"));
            Finish finish = session.generate(most, token -> text.append(token.getText()));
            if (finish != Finish.LENGTH || text.length() == 0) throw new AssertionError(finish);
            session.generate(token -> { throw new IllegalArgumentException("mine"); });
            throw new AssertionError("nothing thrown");
        } catch (IllegalArgumentException mine) {
            if (!"mine".equals(mine.getMessage())) throw mine;
        }
        try {
            Model.load("/nowhere");
            throw new AssertionError("nothing thrown");
        } catch (MorException.Io failure) {
            if (failure.getStatus() != MorStatus.IO) throw failure;
        }
        if (Mor.getVersion().isEmpty()) throw new AssertionError();
    }
}
