package dev.mor.tests

import dev.mor.Batch
import dev.mor.BatchParams
import dev.mor.ChatMessage
import dev.mor.Device
import dev.mor.LoadParams
import dev.mor.LogLevel
import dev.mor.Model
import dev.mor.Mor
import dev.mor.MorException
import dev.mor.MorStatus
import dev.mor.Request
import dev.mor.SamplerParams
import dev.mor.Session
import dev.mor.SessionParams
import dev.mor.Tokenizer
import java.io.File
import java.lang.reflect.InvocationTargetException
import java.lang.reflect.Modifier
import java.nio.ByteBuffer
import kotlin.test.assertEquals
import kotlin.test.assertSame
import kotlin.test.assertTrue

fun failures() {
    test("each status has its exception and a sentence") {
        val classes = MorStatus.entries.map { status ->
            val failure = MorException.of(status.code, "why")
            assertEquals(status, failure.status)
            assertEquals("why", failure.message)
            assertTrue(status.sentence.length > 5 && status.sentence != "unknown status")
            failure.javaClass
        }
        assertEquals(MorStatus.entries.size, classes.toSet().size)
        assertEquals((1..MorStatus.entries.size).toList(), MorStatus.entries.map { it.code })
        assertEquals(MorStatus.INTERNAL, MorException.of(77, "why").status)
    }

    test("failures of the library come as their exceptions") {
        val root = System.getProperty("mor.root")
        val missing = fails<MorException.Io> { Model.load("models/nothing-here.gguf") }
        assertTrue("nothing-here.gguf" in missing.message.orEmpty())
        fails<MorException.Format> { Model.load("$root/Cargo.toml") }
        val far = LoadParams(device = Device.CUDA, deviceIndex = 256)
        fails<MorException.InvalidArgument> { Model.load(modelFile, far) }
        Model.load(modelFile).use { model ->
            fails<MorException.InvalidArgument> { Session(model, SessionParams(context = -1)) }
            fails<MorException.InvalidArgument> { Session(model, SessionParams(threads = 300)) }
            fails<MorException.InvalidArgument> { Session(model, SessionParams(threads = -1)) }
            fails<MorException.InvalidArgument> { model.plan(SessionParams(cpus = listOf(5000))) }
            fails<MorException.InvalidArgument> { model.planBatchIn(-1, 1.0) }
            fails<MorException.Template> {
                Tokenizer(model).use { it.formatChat(listOf(ChatMessage("user", "Hello"))) }
            }
            fails<MorException.InvalidArgument> {
                Tokenizer(model, maxPieceBytes = 4).use { it.encode("incomprehensibilities") }
            }
            fails<MorException.KvFull> { model.prompted(SessionParams(64, threads = 1, kvPages = 1)) }
            Session(model, small).use { session ->
                fails<MorException.NotReady> { session.sample() }
                fails<MorException.NotReady> { session.logits() }
                fails<MorException.NotReady> { session.generate { } }
                fails<MorException.InvalidArgument> { session.prefill(IntArray(0)) }
                fails<MorException.InvalidArgument> { session.prefill(intArrayOf(-1)) }
                fails<MorException.InvalidArgument> { session.prefill(intArrayOf(4096)) }
                fails<MorException.ContextFull> { session.prefill(IntArray(65)) }
                session.prefill(intArrayOf(300))
                fails<MorException.BufferTooSmall> { session.logits(FloatArray(10)) }
                fails<MorException.BufferTooSmall> { session.step(300, FloatArray(4095)) }
                fails<MorException.BufferTooSmall> { session.save(ByteBuffer.allocateDirect(10)) }
                fails<MorException.InvalidArgument> { session.save(ByteBuffer.allocate(100_000)) }
                fails<MorException.InvalidArgument> {
                    session.save(ByteBuffer.allocateDirect(100_000).asReadOnlyBuffer())
                }
                fails<MorException.State> { session.restore(ByteArray(100)) }
                fails<MorException.State> { session.restore(session.save().apply { this[100]++ }) }
                fails<MorException.InvalidArgument> { session.rewind(2) }
                fails<MorException.InvalidArgument> { session.rewind(-1) }
                fails<MorException.InvalidArgument> { session.tokens(0, 2) }
                fails<MorException.InvalidArgument> { session.tokens(Int.MAX_VALUE, Int.MAX_VALUE) }
                fails<MorException.InvalidArgument> { session.depths(-1, 1) }
                fails<MorException.InvalidArgument> { session.setCut(Float.NaN) }
                fails<MorException.InvalidArgument> { session.setDepthLimit(0) }
                fails<MorException.InvalidArgument> { session.setTimeBudget(-1) }
                fails<MorException.InvalidArgument> { session.setSampler(SamplerParams(topK = -1)) }
                fails<MorException.InvalidArgument> { session.generate(most(-1)) { } }
                assertEquals(1, session.length)
                session.generate(most(1))
            }
            val plan = model.plan(small)
            fails<MorException.BufferTooSmall> {
                Session(model, small, ByteBuffer.allocateDirect(plan.bytes.toInt() - 1))
            }
            fails<MorException.InvalidArgument> {
                Session(model, small, ByteBuffer.allocate(plan.bytes.toInt() + 64))
            }
            fails<MorException.InvalidArgument> {
                val room = ByteBuffer.allocateDirect((plan.bytes + plan.alignment).toInt())
                Session(model, small, room.asReadOnlyBuffer())
            }
            Batch(model, BatchParams(context = 64, threads = 1)).use { batch ->
                fails<MorException.InvalidArgument> { batch.tokens(77) }
                fails<MorException.InvalidArgument> { batch.add(Request()) }
                batch.add(Request(intArrayOf(300)))
                fails<MorException.NotReady> { batch.add(Request(intArrayOf(300))) }
            }
        }
    }

    test("a file that is shortened between two calls") {
        val file = File.createTempFile("mor", ".gguf")
        try {
            modelFile.copyTo(file, overwrite = true)
            Model.load(file).use { model ->
                Session(model, small).use { session ->
                    session.prefill(intArrayOf(300))
                    java.io.RandomAccessFile(file, "rw").use { it.setLength(1000) }
                    fails<MorException.FileChanged> { session.step(300) }
                }
            }
        } finally {
            file.delete()
        }
    }

    test("what was closed throws, and crashes nothing: every public method") {
        val live = Mor.liveObjects
        val model = Model.load(modelFile)
        val objects = listOf(Tokenizer(model), Session(model, small), Batch(model), model)
        for (closed in objects) {
            closed.close()
            closed.close()
        }
        assertEquals(live, Mor.liveObjects)
        var tried = 0
        for (closed in objects) {
            for (method in closed.javaClass.declaredMethods) {
                val harmless = setOf("close", "cancel", "resetCancel", "getModel", "getInfo", "stream")
                if (!Modifier.isPublic(method.modifiers) || Modifier.isStatic(method.modifiers)) continue
                if (method.name in harmless || '$' in method.name || method.isSynthetic) continue
                val arguments = method.parameterTypes.map(::something).toTypedArray()
                val failure = fails<InvocationTargetException> { method.invoke(closed, *arguments) }
                val said = "$method: ${failure.cause}"
                assertTrue(failure.cause is IllegalStateException, said)
                assertTrue("is closed" in failure.cause?.message.orEmpty(), said)
                tried++
            }
        }
        assertTrue(tried > 60, "only $tried methods")
        val session = objects[1] as Session
        session.cancel()
        session.resetCancel()
        fails<IllegalStateException> { session.stream().hasNext() }
        fails<IllegalStateException> { Session(model) }
        fails<IllegalStateException> { Tokenizer(model) }
        fails<IllegalStateException> { Batch(model) }
    }

    test("what a callback throws is what the caller gets, and the session goes on") {
        class Mine : Exception("mine")
        Model.load(modelFile).use { model ->
            model.prompted().use { session ->
                for (at in 1..3) {
                    val mine = Mine()
                    var calls = 0
                    val before = session.length
                    val thrown = fails<Mine> {
                        session.generate { if (++calls == at) throw mine }
                    }
                    assertSame(mine, thrown)
                    assertEquals(at, calls)
                    assertEquals(before + at, session.length)
                }
                fails<StackOverflowError> { session.generate { endless(0) } }
                fails<OutOfMemoryError> { session.generateWhile { throw OutOfMemoryError("not really") } }
                assertEquals(12, session.length)
                session.generate(most(3))
                assertEquals(15, session.length)
            }
        }
    }

    test("a log, and one that throws") {
        val lines = mutableListOf<Pair<LogLevel, String>>()
        val log = LoadParams(log = { level, text -> lines.add(level to text) })
        Model.load(modelFile, log).use { model ->
            Session(model, small).close()
            thread { Session(model, small).close() }.finished()
        }
        assertEquals(3, lines.size)
        assertTrue(lines.all { it.first == LogLevel.INFO && it.second.length > 20 })

        val live = Mor.liveObjects
        val open = File("/proc/self/fd").list()!!.size
        val mine = IllegalArgumentException("mine")
        var quiet = false
        val throwing = LoadParams(log = { _, _ -> if (!quiet) throw mine })
        repeat(50) { assertSame(mine, fails<IllegalArgumentException> { Model.load(modelFile, throwing) }) }
        quiet = true
        Model.load(modelFile, throwing).use { model ->
            quiet = false
            repeat(50) { assertSame(mine, fails<IllegalArgumentException> { Session(model, small) }) }
        }
        assertEquals(live, Mor.liveObjects)
        assertEquals(open, File("/proc/self/fd").list()!!.size)
    }
}

private fun endless(n: Int): Int = endless(n + 1) + 1

/** An argument of a type. */
private fun something(type: Class<*>): Any? = when (type) {
    Int::class.java -> 1
    Long::class.java -> 1L
    Float::class.java -> 0.5f
    Double::class.java -> 0.5
    Boolean::class.java -> true
    String::class.java -> "text"
    IntArray::class.java -> intArrayOf(1)
    ByteArray::class.java -> ByteArray(8)
    FloatArray::class.java -> FloatArray(8)
    ByteBuffer::class.java -> ByteBuffer.allocateDirect(8)
    List::class.java -> emptyList<Any>()
    dev.mor.Routing::class.java -> dev.mor.Routing.THRESHOLD
    dev.mor.TokenListener::class.java -> dev.mor.TokenListener { }
    dev.mor.TokenPredicate::class.java -> dev.mor.TokenPredicate { true }
    else -> type.getConstructor().newInstance()
}
