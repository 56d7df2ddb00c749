package dev.mor.tests

import dev.mor.Finish
import dev.mor.Model
import dev.mor.Mor
import dev.mor.SessionParams
import dev.mor.Tokenizer
import java.io.File
import kotlin.test.assertEquals
import kotlin.test.assertTrue

private const val THREADS = 4
private const val CYCLES = 250

/** What a process holds, apart from its heap. */
private data class Held(val objects: Int, val threads: Long, val descriptors: Int, val maps: Int)

private fun held(): Held {
    val models = File("/proc/self/maps").readLines().count { ".gguf" in it }
    val descriptors = File("/proc/self/fd").list().orEmpty().size
    return Held(Mor.liveObjects, processStatus("Threads"), descriptors, models)
}

private fun resident(): Long {
    repeat(3) { System.gc() }
    Thread.sleep(200)
    return processStatus("VmRSS")
}

/** Creates, generates, cancels and closes. */
private fun cycle(model: Model, number: Int) {
    class Mine : Exception()
    val session = model.prompted(SessionParams(context = 64, threads = 1 + number % 2))
    var seen = 0
    when (number % 6) {
        0 -> session.generate(most(8)) { seen++ }
        1 -> assertEquals(Finish.CANCELLED, session.generate { if (++seen == 2) session.cancel() })
        2 -> fails<Mine> { session.generate { if (++seen == 2) throw Mine() } }
        3 -> session.stream().use { stream -> repeat(2) { seen += stream.next().text.length } }
        4 -> {
            val other = thread { session.cancel() }
            session.generate(most(8)) { seen++ }
            other.finished()
        }
        5 -> {
            val other = thread { session.close() }
            try {
                session.generate(most(8)) { seen++ }
            } catch (_: IllegalStateException) {
            }
            other.finished()
        }
    }
    session.close()
}

fun stress() {
    test("${THREADS * CYCLES} sessions created, run, cancelled and closed by $THREADS threads: no leak") {
        val model = Model.load(modelFile)
        fun round(cycles: Int) {
            val threads = List(THREADS) { thread { repeat(cycles) { cycle(model, it) } } }
            threads.forEach { it.finished() }
            // A model of its own as well, and a tokenizer.
            repeat(cycles / 5) { Model.load(modelFile).use { own -> Tokenizer(own).close() } }
        }
        round(CYCLES / 5)
        val before = held()
        // A session takes 0.6 MB: one in a hundred that is not freed would show, in every round. The JVM's own memory
        // grows for some time, longer on a busy machine.
        val resident = mutableListOf(resident())
        do {
            round(CYCLES)
            resident += resident()
            val grows = resident.last() >= resident[resident.size - 2] + 6 * 1024
        } while (grows && resident.size < 6)
        val after = held()
        println("        before $before; after $after; $resident kB")
        // The model; the tests before this one have closed what they made.
        assertEquals(listOf(1, 1), listOf(before.objects, after.objects))
        assertEquals(before.descriptors, after.descriptors)
        assertEquals(before.maps, after.maps)
        // The JVM has threads of its own that come and go.
        assertTrue(after.threads <= before.threads + 2, "${before.threads} threads, then ${after.threads}")
        assertTrue(resident.last() < resident[resident.size - 2] + 6 * 1024, "it grows in each round: $resident kB")
        model.close()
        assertEquals(0, Mor.liveObjects)
        assertEquals(before.maps - 1, held().maps)
    }
}
