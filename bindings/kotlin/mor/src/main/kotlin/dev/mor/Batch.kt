package dev.mor

/**
 * Many sequences at once, batched by depth: each [tick] runs the shared block once over all tokens
 * that need it, whatever their sequence and recursion. What a sequence gets does not depend on who
 * else is there: the same as in a session of its own.
 *
 * One call at a time may use a batch: a second one, from another thread, gets [MorException.Busy]
 * and does nothing. It may move between threads. The model may be closed before it.
 *
 * Sequences are known by numbers, which a batch gives out once.
 *
 * @property model the model that it was made of
 * @param params for what
 */
public class Batch @JvmOverloads constructor(
    public val model: Model,
    params: BatchParams = BatchParams(),
) : AutoCloseable {
    private val handle =
        Handle.of("batch", exclusive = true, listOfNotNull(model.data), Native::batchFree) {
            model.handle.call { Native.batchCreate(it, params.fields(), params.cpus?.toIntArray()) }
        }

    /**
     * Adds a sequence. Nothing is run yet: [tick] does that.
     *
     * @return its number
     * @throws MorException.NotReady when the batch has as many sequences as it was planned for
     */
    public fun add(request: Request): Long = handle.call {
        Native.batchAdd(it, request.fields(), request.prompt, request.sampler.fields())
    }

    /**
     * Adds a sequence that begins with the first tokens of another, whose keys and values it shares
     * as far as they are there: a common prompt is run and stored once. The parent may be in any
     * state, and may be removed before it.
     *
     * @param parent the other
     * @param length how many tokens they have in common, at most those that the parent has
     * @param request what comes after them
     * @return its number
     */
    @JvmOverloads
    public fun fork(parent: Long, length: Int, request: Request = Request()): Long = handle.call {
        Native.batchFork(
            it, parent, length, request.fields(), request.prompt, request.sampler.fields(),
        )
    }

    /** Ends a sequence, with [Finish.STOPPED] and no event; its tokens stay. */
    public fun stop(sequence: Long): Unit = handle.call { Native.batchStop(it, sequence) }

    /** Forgets a sequence, in whatever state: its place and its pages are free for others. */
    public fun remove(sequence: Long): Unit = handle.call { Native.batchRemove(it, sequence) }

    /** Lets a sequence that stands still because the KV pool was full try again. */
    public fun resume(sequence: Long): Unit = handle.call { Native.batchResume(it, sequence) }

    /**
     * One pass over the weights: new tokens enter, every token in the recursions runs its next one,
     * those that leave are finished, and what follows them is drawn. A failure that concerns one
     * sequence ends that sequence only, with [Finish.FAILED].
     *
     * @return what happened, in its order: often nothing, while tokens are in the recursions
     */
    public fun tick(): List<BatchEvent> {
        val numbers = handle.call { Native.batchTick(it) }
        return List(numbers.size / EVENT) { BatchEvent.of(numbers, it * EVENT) }
    }

    /** Where a sequence stands. */
    public fun status(sequence: Long): SequenceStatus {
        val both = handle.call { Native.batchSequenceStatus(it, sequence) }
        return SequenceStatus.entries.at(both % FINISH)
    }

    /** Why a sequence ended; null before. */
    public fun finish(sequence: Long): Finish? {
        val both = handle.call { Native.batchSequenceStatus(it, sequence) }
        val done = SequenceStatus.entries.at(both % FINISH) == SequenceStatus.FINISHED
        return if (done) Finish.entries.at(both / FINISH) else null
    }

    /** The tokens of a sequence so far, its prompt among them. */
    public fun tokens(sequence: Long): IntArray = handle.call { Native.batchTokens(it, sequence) }

    /**
     * The recursions that the tokens of a sequence ran; 0 where the router let one pass by. Tokens
     * that have not passed all layers yet, the last that was drawn among them, are left out.
     */
    public fun depths(sequence: Long): IntArray {
        val depths = handle.call { Native.batchDepths(it, sequence) }
        return IntArray(depths.size) { depths[it].toInt() and 0xFF }
    }

    /** Why a sequence ended with [Finish.FAILED]; null when nothing failed. */
    public fun failure(sequence: Long): MorException? {
        val told = handle.call { Native.batchFailure(it, sequence) } ?: return null
        return MorException.of(told[0].toInt(), told.decodeToString(startIndex = 1))
    }

    /**
     * Whether there is nothing to run: no sequence waits or runs. Those that stand still
     * ([SequenceStatus.FULL]) do neither.
     */
    public val isIdle: Boolean get() = handle.call { Native.batchIsIdle(it) }

    /** Bytes of KV pages in use. A page that several sequences share counts once. */
    public val kvBytesUsed: Long get() = handle.call { Native.batchKvBytesUsed(it) }

    /** What the batch ran so far. */
    public fun counters(): BatchCounters {
        val recursions = model.info.recursions
        return BatchCounters.of(handle.call { Native.batchCounters(it) }, recursions)
    }

    /**
     * Switches to ordinary batching, to compare with: new tokens enter only when all others have
     * left the recursions, so that everyone waits for the deepest. Results do not depend on it.
     */
    public fun setInStep(inStep: Boolean): Unit = handle.call { Native.batchSetInStep(it, inStep) }

    /** Waits for a call in progress, which is one pass, and frees the batch. */
    override fun close(): Unit = handle.close()

    private companion object {
        /** Numbers of an event. */
        const val EVENT = 5

        /** What the reason is multiplied with, beside the status. */
        const val FINISH = 256
    }
}

/** What a tick brought for a sequence. */
public sealed interface BatchEvent {
    /** The sequence that it is about. */
    public val sequence: Long

    /**
     * A token was drawn. It is run by a later tick.
     *
     * @property id the token
     * @property depth recursions of the token before it, after which it was drawn
     */
    public data class Token(override val sequence: Long, val id: Int, val depth: Int) : BatchEvent

    /** It gave its pages back and waits ([Pressure.EVICT]). */
    public data class Evicted(override val sequence: Long) : BatchEvent

    /** It was evicted and runs again. */
    public data class Resumed(override val sequence: Long) : BatchEvent

    /** The KV pool has no page for it; it stands still until [Batch.resume]. */
    public data class Full(override val sequence: Long) : BatchEvent

    /**
     * It ended. Its tokens can be read, and forks made of it, until it is removed.
     *
     * @property finish why
     */
    public data class Finished(override val sequence: Long, val finish: Finish) : BatchEvent

    /** What the library tells. */
    public companion object {
        internal fun of(numbers: LongArray, at: Int): BatchEvent {
            val sequence = numbers[at]
            return when (val kind = numbers[at + 1].toInt()) {
                0 -> Token(sequence, numbers[at + 2].toInt(), numbers[at + 3].toInt())
                1 -> Evicted(sequence)
                2 -> Resumed(sequence)
                3 -> Full(sequence)
                4 -> Finished(sequence, Finish.entries.at(numbers[at + 4].toInt()))
                else -> throw MorException.Internal("an event of kind $kind, which is not known")
            }
        }
    }
}

/** Where a sequence of a batch stands. */
public enum class SequenceStatus {
    /** It waits for pages of the KV pool, or for the first tick. */
    WAITING,

    /** Its tokens are being run. */
    RUNNING,

    /**
     * The KV pool has no page for it, with [Pressure.EVICT] not even when it is alone.
     * [Batch.resume] lets it try again.
     */
    FULL,

    /** It is done. */
    FINISHED,
}

/**
 * What a batch ran since it was created.
 *
 * @property ticks ticks that ran anything
 * @property rowCapacity rows for which there was room in the passes of the recursions
 * @property finished rows that passed the last layers
 * @property logits rows of logits
 * @property evictions sequences that gave their pages back
 * @property rows rows of the passes of the recursions, by recursion from 0. Without routers a row
 *   runs all recursions in one pass and counts at 0
 */
public data class BatchCounters(
    val ticks: Long,
    val rowCapacity: Long,
    val finished: Long,
    val logits: Long,
    val evictions: Long,
    val rows: List<Long>,
) {
    internal companion object {
        fun of(f: LongArray, recursions: Int) = BatchCounters(
            f[0], f[1], f[2], f[3], f[4], List(recursions) { f[5 + it] },
        )
    }
}
