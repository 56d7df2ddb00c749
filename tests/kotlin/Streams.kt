package dev.mor.tests

import dev.mor.Finish
import dev.mor.GeneratedToken
import dev.mor.Model
import dev.mor.Mor
import dev.mor.MorException
import dev.mor.Session
import dev.mor.SessionParams
import java.util.concurrent.CountDownLatch
import kotlin.test.assertEquals
import kotlin.test.assertFalse
import kotlin.test.assertNull
import kotlin.test.assertTrue

private fun streamThreads() = Thread.getAllStackTraces().keys.count { it.name == "mor-stream" }

fun streams() {
    test("a loop over a stream gets what a callback gets") {
        Model.load(modelFile).use { model ->
            val wanted = mutableListOf<GeneratedToken>()
            model.prompted().use { it.generate(most(12)) { token -> wanted.add(token) } }
            model.prompted().use { session ->
                session.stream(most(12)).use { stream ->
                    val got = mutableListOf<GeneratedToken>()
                    for (token in stream) got.add(token)
                    assertEquals(wanted, got)
                    assertEquals(Finish.LENGTH, stream.finish)
                    fails<NoSuchElementException> { stream.next() }
                    assertFalse(stream.hasNext())
                }
                assertEquals(16, session.length)
            }
        }
    }

    test("a stream that is left early leaves the session after the last token that was taken") {
        Model.load(modelFile).use { model ->
            model.prompted().use { session ->
                for (most in 0..4) {
                    val before = session.length
                    val stream = session.stream()
                    val taken = List(most) { stream.next() }
                    if (most > 0) fails<MorException.Busy> { session.length }
                    stream.close()
                    stream.close()
                    assertEquals(before + most, session.length)
                    assertEquals(taken.map { it.id }, session.tokens(before, most).toList())
                    assertFalse(stream.hasNext())
                    assertNull(stream.finish)
                }
                assertEquals(3, session.stream().use { it.asSequence().take(3).count() })
                session.generate(most(1))
            }
        }
        assertEquals(0, streamThreads())
    }

    test("failures of a stream are thrown in the loop") {
        Model.load(modelFile).use { model ->
            Session(model, small).use { session ->
                val stream = session.stream()
                fails<MorException.NotReady> { stream.hasNext() }
                assertFalse(stream.hasNext())
            }
            model.prompted().use { session ->
                val first = session.stream()
                first.next()
                fails<MorException.Busy> { session.stream().next() }
                // The second one did not end the first.
                first.next()
                first.close()
                assertEquals(6, session.length)
            }
        }
    }

    test("an interrupt ends a stream, also while its token is computed") {
        Model.load(modelFile).use { model ->
            model.prompted(SessionParams(context = 256, threads = 1)).use { session ->
                val begun = CountDownLatch(1)
                val reads = thread {
                    fails<InterruptedException> {
                        // A stream may end before the interrupt comes.
                        while (true) {
                            for (token in session.stream()) {
                                begun.countDown()
                                check(token.id >= 0)
                            }
                            session.rewind(3)
                            session.step(300)
                            session.step(301)
                        }
                    }
                }
                begun.await()
                reads.thread.interrupt()
                reads.finished()
                assertTrue(session.length >= 5)
                session.rewind(3)
                session.step(300)
            }
        }
    }

    test("a session that is closed ends its stream, waiting or not") {
        val live = Mor.liveObjects
        Model.load(modelFile).use { model ->
            repeat(20) { round ->
                val session = model.prompted(SessionParams(context = 256, threads = 1))
                val stream = session.stream()
                stream.next()
                val reads = thread {
                    try {
                        while (round % 2 == 0 && stream.hasNext()) stream.next()
                    } catch (_: IllegalStateException) {
                    }
                }
                session.close()
                reads.finished()
                assertFalse(stream.hasNext())
                stream.close()
            }
        }
        assertEquals(live, Mor.liveObjects)
        assertEquals(0, streamThreads())
    }
}
