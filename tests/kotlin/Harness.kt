package dev.mor.tests

import dev.mor.GenerateParams
import dev.mor.Model
import dev.mor.SamplerParams
import dev.mor.Session
import dev.mor.SessionParams
import dev.mor.Tokenizer
import java.io.File

/** The model of the repository. */
val modelFile: File = File(System.getProperty("mor.root"), "models/austen-mor-5m-q8_0.gguf")

private var passed = 0
private var failed = 0

/** A test: runs it and says what came of it. */
fun test(name: String, body: () -> Unit) {
    val start = System.nanoTime()
    val failure = runCatching(body).exceptionOrNull()
    val took = (System.nanoTime() - start) / 1_000_000
    println("${if (failure == null) "ok     " else "FAILED "} $name ($took ms)")
    if (failure == null) passed++ else failed++
    failure?.printStackTrace(System.out)
}

/** The closing line; ends the program. */
fun conclude(): Nothing {
    println("$passed passed, $failed failed")
    // Threads that hang would keep it.
    Runtime.getRuntime().halt(if (failed == 0 && passed > 0) 0 else 1)
    throw AssertionError()
}

/** What [body] must throw. */
inline fun <reified E : Throwable> fails(body: () -> Unit): E {
    try {
        body()
    } catch (failure: Throwable) {
        if (failure is E) return failure
        throw AssertionError("expected ${E::class.java.name}, got $failure", failure)
    }
    throw AssertionError("expected ${E::class.java.name}, got nothing")
}

val small: SessionParams get() = SessionParams(context = 64, threads = 1)

/** A session that stands after a prompt and draws greedily. */
fun Model.prompted(params: SessionParams = small, prompt: String = "It is a truth"): Session {
    val session = Session(this, params)
    try {
        session.setSampler(SamplerParams.greedy())
        session.prefill(Tokenizer(this).use { it.encode(prompt, addSpecial = false) })
    } catch (failure: Throwable) {
        session.close()
        throw failure
    }
    return session
}

fun most(tokens: Int): GenerateParams = GenerateParams(maxTokens = tokens)

/** A thread that must end by itself; [Thread.join] it by [finished]. */
fun thread(body: () -> Unit): Started = Started(body)

class Started(body: () -> Unit) {
    private var failure: Throwable? = null
    val thread: Thread = Thread { failure = runCatching(body).exceptionOrNull() }.apply { start() }

    fun finished() {
        thread.join(60_000)
        check(!thread.isAlive) { "a thread hangs: ${thread.stackTrace.joinToString("\n")}" }
        failure?.let { throw AssertionError("in a thread", it) }
    }
}

/** The value of a line of /proc/self/status, such as "VmRSS". */
fun processStatus(name: String): Long = File("/proc/self/status").readLines()
    .first { it.startsWith("$name:") }.filter { it.isDigit() }.toLong()
