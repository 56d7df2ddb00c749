package dev.mor.tests

import dev.mor.Batch
import dev.mor.BatchEvent
import dev.mor.BatchParams
import dev.mor.Finish
import dev.mor.Model
import dev.mor.MorException
import dev.mor.Pressure
import dev.mor.Request
import dev.mor.SamplerParams
import dev.mor.SequenceStatus
import dev.mor.Session
import dev.mor.SessionParams
import kotlin.test.assertEquals
import kotlin.test.assertNull
import kotlin.test.assertTrue

private fun Batch.run(): List<BatchEvent> = buildList { while (!isIdle) addAll(tick()) }

fun batches() {
    test("sequences of a batch get what sessions get") {
        Model.load(modelFile).use { model ->
            val prompts = listOf(intArrayOf(1116, 365, 259, 1879), intArrayOf(300, 301), intArrayOf(417))
            val params = BatchParams(context = 64, sequences = 3, threads = 2)
            Batch(model, params).use { batch ->
                val numbers = prompts.mapIndexed { i, prompt ->
                    batch.add(Request(prompt, maxTokens = 10, sampler = SamplerParams(seed = i.toLong())))
                }
                assertEquals(3, numbers.toSet().size)
                assertEquals(SequenceStatus.WAITING, batch.status(numbers[0]))
                assertNull(batch.finish(numbers[0]))
                val events = batch.run()
                for ((i, number) in numbers.withIndex()) {
                    val (tokens, depths) = Session(model, SessionParams(64, threads = 1)).use {
                        it.setSampler(SamplerParams(seed = i.toLong()))
                        it.prefill(prompts[i])
                        it.generate(most(10))
                        it.tokens().toList() to it.depths().toList()
                    }
                    assertEquals(tokens, batch.tokens(number).toList())
                    // The last one was drawn and not run.
                    assertEquals(depths.dropLast(1), batch.depths(number).toList())
                    val drawn = events.filterIsInstance<BatchEvent.Token>().filter { it.sequence == number }
                    assertEquals(tokens.drop(prompts[i].size), drawn.map { it.id })
                    assertEquals(depths.drop(prompts[i].size - 1).dropLast(1), drawn.map { it.depth })
                    assertTrue(BatchEvent.Finished(number, Finish.LENGTH) in events)
                    assertEquals(SequenceStatus.FINISHED, batch.status(number))
                    assertEquals(Finish.LENGTH, batch.finish(number))
                    assertNull(batch.failure(number))
                }
                val counters = batch.counters()
                assertEquals(3, counters.rows.size)
                assertTrue(counters.ticks > 0 && counters.logits == 30L && counters.rows[0] > 0)
                assertTrue(batch.kvBytesUsed > 0)
            }
        }
    }

    test("forks, stops, removals") {
        Model.load(modelFile).use { model ->
            Batch(model, BatchParams(context = 64, sequences = 2, threads = 1)).use { batch ->
                batch.setInStep(true)
                batch.setInStep(false)
                val greedy = SamplerParams.greedy()
                val first = batch.add(Request(intArrayOf(1116, 365, 259, 1879), 6, greedy))
                batch.run()
                val fork = batch.fork(first, 4, Request(maxTokens = 6, sampler = greedy))
                batch.run()
                assertEquals(batch.tokens(first).toList(), batch.tokens(fork).toList())
                fails<MorException.NotReady> { batch.fork(first, 4) }
                batch.remove(fork)
                fails<MorException.InvalidArgument> { batch.status(fork) }
                val endless = batch.add(Request(intArrayOf(300), ignoreEnd = true))
                repeat(6) { batch.tick() }
                batch.stop(endless)
                assertEquals(Finish.STOPPED, batch.finish(endless))
                assertTrue(batch.isIdle)
                fails<MorException.InvalidArgument> { batch.fork(first, -1) }
            }
        }
    }

    test("a full pool: who gives way is as the pressure says") {
        Model.load(modelFile).use { model ->
            for (pressure in Pressure.entries) {
                val params = BatchParams(
                    context = 64, sequences = 2, threads = 1, kvPages = 44, pressure = pressure,
                )
                Batch(model, params).use { batch ->
                    val requests = List(2) {
                        Request(IntArray(20) { n -> 300 + n }, 40, cut = 0f, priority = it, ignoreEnd = true)
                    }
                    val numbers = requests.map { batch.add(it) }
                    val events = batch.run().toMutableList()
                    if (pressure == Pressure.REFUSE) {
                        // Both need a page in the same tick, and there is none left.
                        for (number in numbers) {
                            assertTrue(BatchEvent.Full(number) in events)
                            assertEquals(SequenceStatus.FULL, batch.status(number))
                        }
                        batch.remove(numbers[1])
                        batch.resume(numbers[0])
                        events += batch.run()
                    } else {
                        assertTrue(BatchEvent.Evicted(numbers[0]) in events)
                        assertTrue(BatchEvent.Resumed(numbers[0]) in events)
                        assertTrue(batch.counters().evictions > 0)
                    }
                    val done = if (pressure == Pressure.REFUSE) numbers.take(1) else numbers
                    for (number in done) {
                        val ended = BatchEvent.Finished(number, Finish.LENGTH)
                        assertTrue(ended in events, "$pressure: $ended in $events")
                    }
                }
            }
        }
    }
}
