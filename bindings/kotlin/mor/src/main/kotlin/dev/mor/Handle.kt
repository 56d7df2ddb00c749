package dev.mor

import java.util.concurrent.atomic.AtomicInteger
import java.util.concurrent.locks.ReentrantLock
import kotlin.concurrent.withLock

/**
 * An object of the library's and who uses it. Calls are counted, so that it is freed when none is
 * in progress and used by none afterwards.
 *
 * @param name what it is, for sentences
 * @param address its handle
 * @param exclusive whether one call at a time may use it
 * @param free what frees it
 */
internal class Handle(
    private val name: String,
    private var address: Long,
    private val exclusive: Boolean,
    private val free: (Long) -> Unit,
) {
    private val lock = ReentrantLock()
    private val left = lock.newCondition()
    private val users = ArrayList<Thread>(1)
    private var closing = false

    init {
        live.incrementAndGet()
    }

    /** Makes a call. */
    inline fun <T> call(call: (Long) -> T): T {
        val handle = enter()
        try {
            return call(handle)
        } finally {
            leave()
        }
    }

    private fun enter(): Long = lock.withLock {
        check(!closing) { "the $name is closed" }
        if (exclusive && users.isNotEmpty()) {
            throw MorException.Busy("the $name is in use by another call; one at a time may use it")
        }
        users.add(Thread.currentThread())
        address
    }

    private fun leave(): Unit = lock.withLock {
        users.remove(Thread.currentThread())
        left.signalAll()
    }

    /** Makes a call that may come beside others and does not block; none when it is closed. */
    inline fun beside(call: (Long) -> Unit): Unit = lock.withLock {
        if (!closing) call(address)
    }

    /**
     * Frees it, when no call is in progress. Those that are get [interrupt], which must not block;
     * then they are waited for.
     */
    inline fun close(interrupt: (Long) -> Unit = {}) {
        lock.withLock {
            if (closing) return awaitFreed()
            if (Thread.currentThread() in users) {
                throw MorException.Busy("the $name cannot be closed from its own callback")
            }
            closing = true
            if (users.isNotEmpty()) interrupt(address)
        }
        freeWhenIdle()
    }

    private fun awaitFreed() {
        // A call of this thread's is what the other one that closes waits for.
        while (address != 0L && Thread.currentThread() !in users) left.awaitUninterruptibly()
    }

    private fun freeWhenIdle() {
        val handle = lock.withLock {
            while (users.isNotEmpty()) left.awaitUninterruptibly()
            address
        }
        // Without the lock, since it takes its time; nobody begins anything any more.
        try {
            free(handle)
        } finally {
            lock.withLock {
                address = 0
                live.decrementAndGet()
                left.signalAll()
            }
        }
    }

    companion object {
        /** How many there are that are not freed. */
        val live = AtomicInteger()

        /**
         * Makes an object by [make]. What it uses of Java's memory, [kept], is not collected before
         * it is freed; a field would not do, for nobody may read it.
         */
        inline fun of(
            name: String,
            exclusive: Boolean,
            kept: List<Any>,
            crossinline free: (Long) -> Unit,
            make: () -> Long,
        ): Handle {
            val held = if (kept.isEmpty()) 0 else Native.hold(kept)
            val address = try {
                make()
            } catch (failure: Throwable) {
                Native.letGo(held)
                throw failure
            }
            return Handle(name, address, exclusive) {
                free(it)
                Native.letGo(held)
            }
        }
    }
}
