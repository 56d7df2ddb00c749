package dev.mor.tests

import dev.mor.Batch
import dev.mor.BatchParams
import dev.mor.Finish
import dev.mor.Model
import dev.mor.Mor
import dev.mor.MorException
import dev.mor.Request
import dev.mor.Session
import dev.mor.SessionParams
import dev.mor.Tokenizer
import java.util.concurrent.CountDownLatch
import java.util.concurrent.atomic.AtomicBoolean
import kotlin.test.assertEquals
import kotlin.test.assertFalse
import kotlin.test.assertTrue

/** Threads that meet, and objects that go while they are used. */
fun guards() {
    test("a second thread is refused, and so is a callback; the first goes on") {
        Model.load(modelFile).use { model ->
            model.prompted().use { session ->
                val inside = CountDownLatch(1)
                val leave = CountDownLatch(1)
                val first = thread {
                    session.generate(most(3)) {
                        fails<MorException.Busy> { session.length }
                        fails<MorException.Busy> { session.prefill(intArrayOf(1)) }
                        inside.countDown()
                        leave.await()
                    }
                }
                inside.await()
                for (call in listOf<() -> Unit>(
                    { session.prefill(intArrayOf(300)) },
                    { session.tokens() },
                    { session.generate { } },
                    { session.save() },
                    { session.stream().hasNext() },
                )) {
                    fails<MorException.Busy> { call() }
                }
                leave.countDown()
                first.finished()
                assertEquals(7, session.length)
            }
        }
    }

    test("a cancel from another thread ends a prompt and a generation, and loses nothing") {
        Model.load(modelFile).use { model ->
            val params = SessionParams(context = 256, batch = 256, threads = 1)
            Session(model, params).use { session ->
                val running = CountDownLatch(1)
                val other = thread {
                    running.await()
                    session.cancel()
                }
                running.countDown()
                // Met by this call or, where it came first, by the next one.
                var cancelled = 0
                while (cancelled == 0) {
                    try {
                        session.prefill(IntArray(255) { 300 + it })
                        session.rewind(0)
                    } catch (_: MorException.Cancelled) {
                        cancelled++
                    }
                }
                other.finished()
                assertEquals(0, session.length)
            }
            model.prompted(SessionParams(context = 256, threads = 1)).use { session ->
                val begun = CountDownLatch(3)
                val other = thread {
                    begun.await()
                    session.cancel()
                }
                val finish = session.generate {
                    begun.countDown()
                    if (begun.count == 0L) Thread.sleep(20)
                }
                assertEquals(Finish.CANCELLED, finish)
                other.finished()
                val length = session.length
                assertTrue(length in 7..255, "$length")

                var calls = 0
                assertEquals(Finish.CANCELLED, session.generate { calls++; session.cancel() })
                assertEquals(1, calls)
                session.cancel()
                fails<MorException.Cancelled> { session.step(300) }
                session.cancel()
                session.resetCancel()
                session.step(300)
                assertEquals(length + 2, session.length)
            }
        }
    }

    test("closed by another thread during a call: the call ends, the close waits for it") {
        repeat(20) { round ->
            val live = Mor.liveObjects
            val model = Model.load(modelFile)
            val session = model.prompted(SessionParams(context = 256, threads = 1 + round % 2))
            val begun = CountDownLatch(1)
            val inside = AtomicBoolean()
            val generates = thread {
                val finish = session.generate {
                    inside.set(true)
                    begun.countDown()
                    Thread.sleep(1)
                    inside.set(false)
                }
                assertEquals(Finish.CANCELLED, finish)
                fails<IllegalStateException> { session.length }
            }
            begun.await()
            model.close()
            val closes = List(2) { thread { session.close() } }
            session.close()
            assertFalse(inside.get())
            closes.forEach { it.finished() }
            generates.finished()
            assertEquals(live, Mor.liveObjects)
        }
    }

    test("closed by another thread during a long prompt") {
        Model.load(modelFile).use { model ->
            val session = Session(model, SessionParams(context = 256, threads = 1))
            val running = CountDownLatch(1)
            val prefills = thread {
                running.countDown()
                try {
                    while (true) {
                        session.prefill(IntArray(255) { 300 + it })
                        session.rewind(0)
                    }
                } catch (_: MorException.Cancelled) {
                } catch (_: IllegalStateException) {
                }
            }
            running.await()
            Thread.sleep(30)
            session.close()
            prefills.finished()
        }
    }

    test("a session cannot be closed from its own callback, and lives on") {
        Model.load(modelFile).use { model ->
            model.prompted().use { session ->
                session.generate(most(2)) { fails<MorException.Busy> { session.close() } }
                assertEquals(6, session.length)
                // Another one can, and the model too.
                val other = model.prompted()
                session.generate(most(1)) {
                    other.close()
                    model.close()
                }
                session.generate(most(1))
                assertEquals(8, session.length)
            }
        }
    }

    test("a model may be closed before what was made of it") {
        val model = Model.load(modelFile)
        val session = model.prompted()
        val tokenizer = Tokenizer(model)
        val batch = Batch(model, BatchParams(context = 64, threads = 1))
        model.close()
        session.generate(most(4))
        assertEquals(4096, session.logits().size)
        assertEquals(8, session.depthHistogram().sum())
        val number = batch.add(Request(tokenizer.encode("She was not"), maxTokens = 4))
        while (!batch.isIdle) batch.tick()
        assertEquals(4, batch.counters().logits)
        assertTrue(tokenizer.decode(batch.tokens(number)).startsWith("She was not"))
        listOf(session, tokenizer, batch).forEach { it.close() }
    }

    test("a model from many threads; tokenizers and batches closed while they are used") {
        val live = Mor.liveObjects
        val model = Model.load(modelFile)
        val tokenizer = Tokenizer(model)
        val batch = Batch(model, BatchParams(context = 64, sequences = 4, threads = 1))
        val threads = List(4) { number ->
            thread {
                try {
                    while (true) {
                        when (number) {
                            0 -> tokenizer.encode("It is a truth universally acknowledged")
                            1 -> batch.add(Request(intArrayOf(300), maxTokens = 3)).let {
                                while (!batch.isIdle) batch.tick()
                                batch.remove(it)
                            }
                            else -> {
                                model.plan(small)
                                Session(model, small).close()
                            }
                        }
                    }
                } catch (closed: IllegalStateException) {
                    assertTrue("is closed" in closed.message.orEmpty())
                }
            }
        }
        Thread.sleep(200)
        tokenizer.close()
        batch.close()
        model.close()
        threads.forEach { it.finished() }
        assertEquals(live, Mor.liveObjects)
    }
}
