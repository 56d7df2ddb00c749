package dev.mor.tests

import dev.mor.LoadParams
import dev.mor.Model
import dev.mor.MorException
import dev.mor.SamplerParams
import dev.mor.Session
import java.io.File
import java.io.FileDescriptor
import java.io.FileInputStream
import java.nio.ByteBuffer
import kotlin.test.assertEquals
import kotlin.test.assertTrue

/**
 * The number of an open file, which the JVM keeps to itself; Android has
 * `ParcelFileDescriptor.getFd`.
 */
private val FileInputStream.number: Int
    get() = FileDescriptor::class.java.getDeclaredField("fd").apply { isAccessible = true }.getInt(fd)

/** Tokens and the bits of logits. */
private fun computed(model: Model): Pair<List<Int>, List<Int>> = Session(model, small).use { session ->
    session.setSampler(SamplerParams.greedy())
    session.prefill(intArrayOf(1116, 365, 259, 1879))
    session.generate(most(12))
    session.tokens().toList() to session.logits().map { it.toRawBits() }
}

private fun maps(): Int = File("/proc/self/maps").readLines().count { ".gguf" in it || "mor-asset" in it }

fun loading() {
    val wanted by lazy { Model.load(modelFile).use(::computed) }

    test("from a descriptor, at every alignment that an asset can have") {
        val before = maps()
        // Page, 4 bytes as zipalign does it, and worse.
        for (offset in listOf(0, 4096, 4, 4096 + 4, 12_344, 1, 3, 4097, 65_535)) {
            val file = File.createTempFile("mor-asset", ".apk")
            try {
                val bytes = modelFile.readBytes()
                file.outputStream().use {
                    it.write(ByteArray(offset) { 0x55 })
                    it.write(bytes)
                    it.write(ByteArray(1000) { 0x55 })
                }
                for (copy in listOf(false, true)) {
                    val model = FileInputStream(file).use {
                        Model.loadDescriptor(
                            it.number, offset.toLong(), bytes.size.toLong(), LoadParams(copy = copy),
                        )
                    }
                    // The descriptor is closed; a map needs none.
                    assertEquals(if (copy) before else before + 1, maps())
                    model.use { assertEquals(wanted, computed(it), "at $offset") }
                }
            } finally {
                file.delete()
            }
        }
        assertEquals(before, maps())
    }

    test("descriptors that are no model") {
        val bytes = modelFile.length()
        fails<MorException.Io> { Model.loadDescriptor(-1) }
        fails<MorException.Io> { Model.loadDescriptor(Int.MAX_VALUE) }
        FileInputStream(modelFile).use { file ->
            val number = file.number
            fails<MorException.InvalidArgument> { Model.loadDescriptor(number, -1) }
            fails<MorException.InvalidArgument> { Model.loadDescriptor(number, 0, -1) }
            fails<MorException.InvalidArgument> { Model.loadDescriptor(number, 0, bytes + 1) }
            fails<MorException.InvalidArgument> { Model.loadDescriptor(number, 1, bytes) }
            fails<MorException.InvalidArgument> { Model.loadDescriptor(number, Long.MAX_VALUE, 1) }
            fails<MorException.Format> { Model.loadDescriptor(number, bytes) }
            fails<MorException.Format> { Model.loadDescriptor(number, Long.MAX_VALUE) }
            fails<MorException.Format> { Model.loadDescriptor(number, 4, bytes - 4) }
            fails<MorException.Format> { Model.loadDescriptor(number, 0, 100) }
            // Length 0: up to the end.
            Model.loadDescriptor(number).close()
            file.close()
            fails<MorException.Io> { Model.loadDescriptor(number) }
        }
        val pipe = ProcessBuilder("sleep", "60").start()
        try {
            val number = FileDescriptor::class.java.getDeclaredField("fd").apply { isAccessible = true }
            val stream = pipe.inputStream
            val descriptor = generateSequence<Class<*>>(stream.javaClass) { it.superclass }
                .mapNotNull { runCatching { it.getDeclaredField("in") }.getOrNull() }.first()
                .apply { isAccessible = true }.get(stream) as FileInputStream
            fails<MorException.Unsupported> { Model.loadDescriptor(number.getInt(descriptor.fd)) }
        } finally {
            pipe.destroy()
        }
    }

    test("from a buffer, in place at any address, which is not collected before its sessions") {
        val bytes = modelFile.readBytes()
        for (offset in listOf(0, 1, 7)) {
            var buffer: ByteBuffer? = ByteBuffer.allocateDirect(bytes.size + 100)
            buffer!!.position(offset)
            buffer.put(bytes).flip().position(offset)
            val model = Model.load(buffer)
            buffer = null
            val session = model.prompted()
            model.close()
            repeat(3) { System.gc(); ByteBuffer.allocateDirect(bytes.size) }
            session.generate(most(12))
            assertEquals(wanted.first, session.tokens().toList())
            session.close()
        }
        val copied = ByteBuffer.allocateDirect(bytes.size).put(bytes).flip()
        Model.load(copied, LoadParams(copy = true)).use { model ->
            copied.put(0, ByteArray(bytes.size))
            assertEquals(wanted, computed(model))
        }
        fails<MorException.InvalidArgument> { Model.load(ByteBuffer.wrap(bytes)) }
        fails<MorException.Format> { Model.load(ByteBuffer.allocateDirect(0)) }
        fails<MorException.Format> { Model.load(ByteBuffer.allocateDirect(1000)) }
    }

    test("copied, prefaulted") {
        for (params in listOf(LoadParams(copy = true), LoadParams(prefault = true))) {
            Model.load(modelFile, params).use { assertEquals(wanted, computed(it)) }
        }
        assertTrue(wanted.first.size == 16)
    }
}
