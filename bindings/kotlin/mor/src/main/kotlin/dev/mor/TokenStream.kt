package dev.mor

import java.util.concurrent.locks.ReentrantLock
import kotlin.concurrent.withLock

/**
 * A generation to loop over: `session.stream().use { for (token in it) print(token.text) }`.
 *
 * A token is drawn when it is asked for, so the session stands after the last one that was taken.
 * The generation runs on a thread of its own, which waits between two tokens and ends with the
 * stream: one that is neither read to its end nor closed keeps its thread and its session until the
 * session is closed. One thread at a time may read it; any may close it.
 */
public class TokenStream internal constructor(
    private val session: Session,
    private val params: GenerateParams,
) : Iterator<GeneratedToken>, AutoCloseable {
    private val lock = ReentrantLock()
    private val changed = lock.newCondition()
    private var worker: Thread? = null

    /** Whether a token is wanted: the worker runs, and does not wait. */
    private var wanted = false
    private var token: GeneratedToken? = null
    private var ended = false
    private var failure: Throwable? = null
    private var closed = false

    /** Why the generation ended; null before, and when it was closed before its end or failed. */
    public var finish: Finish? = null
        get() = lock.withLock { field }
        private set

    /**
     * Whether there is another token, for which it waits. What ends the generation in a failure is
     * thrown here, once. An interrupt ends the stream.
     */
    override fun hasNext(): Boolean {
        try {
            return lock.withLock { await() }
        } catch (interrupt: InterruptedException) {
            close()
            throw interrupt
        }
    }

    private fun await(): Boolean {
        if (!ended && !closed && token == null) {
            wanted = true
            changed.signalAll()
            if (worker == null) worker = thread()
            while (token == null && !ended && !closed) changed.await()
        }
        failure?.let {
            failure = null
            throw it
        }
        return token != null && !closed
    }

    /** The next token, as [hasNext]; [NoSuchElementException] when there is none. */
    override fun next(): GeneratedToken {
        if (!hasNext()) throw NoSuchElementException("the generation has ended")
        return lock.withLock {
            val next = token ?: throw NoSuchElementException("the stream was closed")
            token = null
            next
        }
    }

    /**
     * Ends the generation and waits until the session is free again. The second time it does
     * nothing.
     */
    override fun close() {
        val (worker, running) = lock.withLock {
            closed = true
            changed.signalAll()
            worker to (wanted && !ended)
        }
        if (worker == null) return
        // The worker is computing a token that nobody takes.
        if (running) session.cancel()
        joinUninterruptibly(worker)
        // It may have been done just before.
        if (running) session.resetCancel()
    }

    /** Lets the worker end without waiting for it: the session is being closed. */
    internal fun end(): Unit = lock.withLock {
        closed = true
        changed.signalAll()
    }

    private fun thread() = Thread(::work, "mor-stream").apply {
        isDaemon = true
        start()
    }

    private fun work() {
        val outcome = runCatching { session.run(this, params, ::give) }
        lock.withLock {
            ended = true
            finish = outcome.getOrNull().takeUnless { closed }
            failure = outcome.exceptionOrNull().takeUnless { closed }
            changed.signalAll()
        }
    }

    /** Hands a token over and waits until the next one is wanted. */
    private fun give(next: GeneratedToken): Boolean = lock.withLock {
        token = next
        wanted = false
        changed.signalAll()
        while (!wanted && !closed) changed.awaitUninterruptibly()
        !closed
    }
}

private fun joinUninterruptibly(thread: Thread) {
    var interrupted = false
    while (true) {
        try {
            thread.join()
            break
        } catch (_: InterruptedException) {
            interrupted = true
        }
    }
    if (interrupted) Thread.currentThread().interrupt()
}
