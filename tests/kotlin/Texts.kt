package dev.mor.tests

import dev.mor.ChatMessage
import dev.mor.Finish
import dev.mor.GenerateParams
import dev.mor.Model
import dev.mor.MorException
import dev.mor.SamplerParams
import dev.mor.Session
import dev.mor.SessionParams
import dev.mor.Tokenizer
import java.io.File
import kotlin.test.assertEquals
import kotlin.test.assertTrue

/** Texts that JNI's own strings would change. */
private val hard = listOf(
    "🙂", "a🙂b👩‍👩‍👧‍👦c", "\u0000", "zero \u0000 inside", "\u0000\u0000", "é", "e\u0301", "你好，世界",
    "\uFFFD", "\uFEFFmark", "𝄞𝄞", "\n\t\r", "", "\uD7FF\uE000", "\uDBFF\uDFFF",
)

fun texts() {
    test("emoji, zeros and all other characters survive the tokenizer") {
        Model.load(modelFile).use { model ->
            Tokenizer(model).use { tokenizer ->
                for (text in hard) {
                    val tokens = tokenizer.encode(text, addSpecial = false)
                    assertEquals(text, tokenizer.decode(tokens))
                    val bytes = tokens.map { tokenizer.tokenBytes(it).toList() }.flatten()
                    assertEquals(text.encodeToByteArray().toList(), bytes)
                }
            }
        }
    }

    test("half of a surrogate pair is an error, and so is a zero where C ends a text") {
        Model.load(modelFile).use { model ->
            Tokenizer(model).use { tokenizer ->
                for (half in listOf("\uD83D", "\uDE42", "a\uD83Db", "\uDE42\uD83D")) {
                    fails<MorException.InvalidArgument> { tokenizer.encode(half) }
                    fails<MorException.InvalidArgument> { Model.load(half) }
                }
                val zero = listOf(ChatMessage("user", "zero \u0000 inside"))
                val said = fails<MorException.InvalidArgument> { tokenizer.formatChat(zero) }
                assertTrue("zero" in said.message.orEmpty())
            }
            model.prompted().use {
                val zero = GenerateParams(stop = listOf("a\u0000b"))
                fails<MorException.InvalidArgument> { it.generate(zero) }
                fails<MorException.InvalidArgument> { Model.load("a\u0000b") }
            }
        }
    }

    test("a file whose name is emoji, and a sentence that names it") {
        val folder = kotlin.io.path.createTempDirectory("mor").toFile()
        val file = File(folder, "🙂 é.gguf")
        try {
            modelFile.copyTo(file)
            Model.load(file).close()
            file.delete()
            val failure = fails<MorException.Io> { Model.load(file) }
            assertTrue("🙂 é.gguf" in failure.message.orEmpty(), failure.message)
        } finally {
            folder.deleteRecursively()
        }
    }

    test("random tokens: pieces of characters come as whole ones, joined they are the text") {
        Model.load(modelFile).use { model ->
            Session(model, SessionParams(threads = 1)).use { session ->
                Tokenizer(model).use { tokenizer ->
                    var beyond = 0
                    for (seed in 0L until 8) {
                        session.rewind(0)
                        session.setSampler(SamplerParams(1000f, 1f, 0f, 1f, 0, 64, seed))
                        // Begun inside an emoji, so that its rest may come or not.
                        val emoji = tokenizer.encode("x🙂", addSpecial = false)
                        session.prefill(emoji.copyOf(emoji.size - 1))
                        val start = session.length
                        val text = StringBuilder()
                        session.generate { text.append(it.text) }
                        val tokens = session.tokens(start, session.length - start)
                        assertEquals(tokenizer.decode(tokens), text.toString())
                        beyond += text.count { it.code > 127 }
                    }
                    assertTrue(beyond > 50, "only $beyond characters beyond ASCII")
                }
            }
        }
    }

    val smollm2 = System.getenv("MOR_TEST_SMOLLM2")
    if (smollm2 == null) {
        println("SKIPPED generated emoji and a chat: MOR_TEST_SMOLLM2 names no model")
        return
    }
    test("SmolLM2: generated emoji, and a chat") {
        Model.load(smollm2).use { model ->
            val params = SessionParams(context = 256)
            model.prompted(params, "🙂 🙂 🙂 🙂 🙂 🙂 🙂 🙂 🙂 🙂").use { session ->
                var shown = ""
                session.generate(most(24)) { shown += it.text }
                assertTrue("🙂 🙂" in shown, shown)
            }
            val prompt = Tokenizer(model).use { tokenizer ->
                val emoji = tokenizer.formatChat(listOf(ChatMessage("user", "What does 🙂 mean?")))
                assertTrue("What does 🙂 mean?<|im_end|>" in emoji, emoji)
                val system = ChatMessage("system", "Answer in one sentence.")
                val user = ChatMessage("user", "What is the capital of France?")
                tokenizer.formatChat(listOf(system, user))
            }
            Session(model, params).use { session ->
                session.setSampler(SamplerParams.greedy())
                session.prefill(
                    Tokenizer(model).use { it.encode(prompt, addSpecial = false, parseSpecial = true) },
                )
                var shown = ""
                assertEquals(Finish.END, session.generate { shown += it.text })
                assertTrue("Paris" in shown, shown)
            }
        }
    }
}
