package dev.mor.tests

import dev.mor.BatchParams
import dev.mor.Finish
import dev.mor.GenerateParams
import dev.mor.GeneratedToken
import dev.mor.LoadParams
import dev.mor.Model
import dev.mor.ModelKind
import dev.mor.Mor
import dev.mor.Native
import dev.mor.Request
import dev.mor.Routing
import dev.mor.SamplerParams
import dev.mor.Session
import dev.mor.SessionParams
import dev.mor.Tokenizer
import dev.mor.tokenLimit
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertFalse
import kotlin.test.assertNotEquals
import kotlin.test.assertNull
import kotlin.test.assertTrue

fun idioms() {
    test("the defaults in Kotlin are the library's") {
        assertContentEquals(Native.sessionDefaults(), SessionParams().fields())
        assertContentEquals(Native.batchDefaults(), BatchParams().fields())
        assertContentEquals(Native.samplerDefaults(), SamplerParams().fields())
        assertContentEquals(Native.requestDefaults(), Request().fields())
        assertEquals(Native.generateDefaults(), tokenLimit(GenerateParams().maxTokens))
        assertEquals(Native.tokenizerDefaults(), Tokenizer.DEFAULT_MAX_PIECE_BYTES.toLong())
        assertEquals(Native.modelDefaults(), LoadParams().flags())
    }

    test("the quick start of the README") {
        val shown = StringBuilder()
        Model.load(modelFile.path).use { model ->
            Tokenizer(model).use { tokenizer ->
                Session(model).use { session ->
                    session.prefill(tokenizer.encode("It is a truth"))
                    session.generate(GenerateParams(maxTokens = 20)) { shown.append(it.text) }
                }
            }
        }
        assertTrue(shown.length > 20, shown.toString())
    }

    test("a model and its tokenizer say what they are") {
        Model.load(modelFile).use { model ->
            val info = model.info
            assertEquals(ModelKind.EXPERT_CHOICE, info.kind)
            assertEquals(listOf(4096, 256, 3), listOf(info.vocabSize, info.contextLength, info.recursions))
            assertEquals("austen-mor-5m", model.metadata("general.name"))
            assertNull(model.metadata("no.such.key"))
            Tokenizer(model).use {
                assertEquals(4096, it.info.vocabSize)
                assertTrue(it.isEnd(it.info.eos))
                assertFalse(it.isEnd(300))
                assertContentEquals("om".encodeToByteArray(), it.tokenBytes(300))
                assertEquals("<|endoftext|>", it.decode(intArrayOf(0), special = true))
                assertEquals("", it.decode(intArrayOf(0)))
            }
        }
        assertTrue(Regex("[0-9]+\\.[0-9]+\\.[0-9]+").matches(Mor.version))
    }

    test("the tokens of a callback are those of the session, their texts are its text") {
        Model.load(modelFile).use { model ->
            model.prompted().use { session ->
                val tokens = mutableListOf<GeneratedToken>()
                assertEquals(Finish.LENGTH, session.generate(most(12)) { tokens.add(it) })
                assertEquals(session.length, 4 + tokens.size)
                assertEquals(session.tokens(4, 12).toList(), tokens.map { it.id })
                assertEquals(session.depths(4, 12).toList(), tokens.map { it.depth })
                assertTrue(tokens.map { it.depth }.toSet().size > 1, "all of one depth")
                val text = Tokenizer(model).use { it.decode(session.tokens(4, 12)) }
                assertEquals(text, tokens.joinToString("") { it.text })
                assertEquals(16, session.depthHistogram().sum())
                assertEquals(4, session.depthHistogram().size)
                assertTrue(session.kvBytesUsed > 0)
            }
        }
    }

    test("the ways of a generation to end") {
        Model.load(modelFile).use { model ->
            model.prompted().use { session ->
                var calls = 0
                assertEquals(Finish.CALLBACK, session.generateWhile { ++calls < 3 })
                assertEquals(3, calls)
                assertEquals(7, session.length)
                assertEquals(Finish.LENGTH, session.generate(most(0)))
                var shown = ""
                val stop = GenerateParams(stop = listOf("habit", "never comes"))
                assertEquals(Finish.STOP, session.generate(stop) { shown += it.text })
                assertFalse("habit" in shown)
                assertEquals(Finish.CONTEXT_FULL, session.generate())
                assertEquals(64, session.length)
            }
        }
    }

    test("logits, steps and draws") {
        Model.load(modelFile).use { model ->
            model.prompted().use { session ->
                val logits = session.logits()
                assertEquals(4096, logits.size)
                val best = logits.indices.maxBy { logits[it] }
                assertEquals(best, session.sample())
                val again = FloatArray(5000) { -1f }
                session.step(best, again)
                assertContentEquals(session.logits(), again.copyOf(4096))
                assertEquals(-1f, again[4096])
                session.step(300)
                assertEquals(6, session.length)
            }
        }
    }

    test("a seed repeats, another seed does not") {
        Model.load(modelFile).use { model ->
            fun drawn(seed: Long) = model.prompted().use { session ->
                session.setSampler(SamplerParams(temperature = 1.2f, seed = seed))
                session.generate(most(20))
                session.tokens().toList()
            }
            assertEquals(drawn(7), drawn(7))
            assertNotEquals(drawn(7), drawn(8))
            // All 64 bits count.
            assertNotEquals(drawn(-1), drawn(0xFFFF_FFFFL))
        }
    }

    test("save, restore, rewind") {
        Model.load(modelFile).use { model ->
            model.prompted().use { session ->
                val state = session.save()
                assertEquals(session.saveSize, state.size.toLong())
                val buffer = java.nio.ByteBuffer.allocateDirect(state.size + 7)
                buffer.position(7)
                session.save(buffer)
                assertEquals(buffer.limit(), buffer.position())
                buffer.position(7)
                session.generate(most(5))
                val tokens = session.tokens().toList()
                for (restore in listOf<Session.() -> Unit>({ restore(state) }, { restore(buffer) })) {
                    Session(model, small).use { other ->
                        other.setSampler(SamplerParams.greedy())
                        other.restore()
                        assertEquals(4, other.length)
                        other.generate(most(5))
                        assertEquals(tokens, other.tokens().toList())
                    }
                }
                session.rewind(4)
                assertEquals(4, session.length)
            }
        }
    }

    test("cut, depth limit, routing, time budget") {
        Model.load(modelFile).use { model ->
            model.prompted().use { session ->
                session.setCut(1f)
                session.generate(most(3))
                session.setCut(0f)
                session.generate(most(3))
                session.setDepthLimit(2)
                session.generate(most(3))
                val depths = session.depths().toList()
                assertEquals(List(3) { 0 } + List(3) { 3 } + List(3) { 2 }, depths.drop(4))
                session.setTimeBudget(1_000_000)
                session.generate(most(1))
                session.setTimeBudget(0)
            }
            Session(model, small).use { session ->
                session.setRouting(Routing.CAPACITY)
                session.prefill(IntArray(8) { 300 + it })
                assertEquals(8, session.length)
            }
        }
    }

    test("plans are kept to") {
        Model.load(modelFile).use { model ->
            val plan = model.plan(SessionParams(context = 64, threads = 2))
            assertEquals(listOf(64, 64, 2), listOf(plan.context, plan.batch, plan.threads))
            assertTrue(plan.bytes > plan.kvBytes && plan.kvBytes > 0 && plan.stackBytes > 0)
            val batch = model.planBatch(BatchParams(context = 64, sequences = 4, threads = 1))
            assertEquals(4, batch.sequences)
            assertEquals(listOf(0L, 0L), listOf(plan.deviceBytes, plan.pinnedBytes))
            assertEquals(listOf(0L, 0L), listOf(batch.deviceBytes, batch.pinnedBytes))
            assertEquals(1, batch.threads)
            val fits = model.planBatchIn(batch.bytes, 3.0, BatchParams(context = 64, threads = 1))
            assertEquals(4, fits.sequences)
            val pages = model.batchPagesFor(3.0, BatchParams(context = 64, sequences = 4))
            assertTrue(pages >= batch.kvPages)
            assertTrue(model.batchPagesFor(1.0, BatchParams(context = 64, sequences = 4)) < pages)
        }
    }

    test("a session in memory of the caller") {
        Model.load(modelFile).use { model ->
            val plan = model.plan(small)
            var memory: java.nio.ByteBuffer? =
                java.nio.ByteBuffer.allocateDirect((plan.bytes + plan.alignment).toInt())
            val collected = java.lang.ref.WeakReference(memory)
            val session = Session(model, small, memory)
            memory = null
            // It is only the session's now, and is not collected.
            repeat(3) { System.gc() }
            session.setSampler(SamplerParams.greedy())
            session.prefill(intArrayOf(1116, 365, 259, 1879))
            session.generate(most(12))
            val wanted = model.prompted().use { it.generate(most(12)); it.tokens().toList() }
            assertEquals(wanted, session.tokens().toList())
            session.close()
            // Nobody holds it any more.
            repeat(50) { if (collected.get() != null) { System.gc(); Thread.sleep(20) } }
            assertTrue(collected.get() == null)
        }
    }

    test("two threads compute the same") {
        Model.load(modelFile).use { model ->
            fun drawn(threads: Int) = model.prompted(SessionParams(context = 64, threads = threads)).use {
                it.generate(most(20))
                it.logits().toList() to it.tokens().toList()
            }
            assertEquals(drawn(1), drawn(2))
        }
    }

    test("a Java program") { JavaCaller.run(modelFile.path) }
}
