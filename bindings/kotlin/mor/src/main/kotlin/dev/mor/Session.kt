package dev.mor

import java.nio.ByteBuffer

/**
 * One sequence of tokens in the making, its memory, its helper threads and its sampler.
 *
 * One call at a time may use a session: a second one, from another thread or from a callback of the
 * first, gets [MorException.Busy] and does nothing. It may move between threads. Only [cancel],
 * [resetCancel] and [close] may come at any time. The model may be closed before it.
 *
 * Close it when it is no longer needed: what is not closed is never freed.
 *
 * @property model the model that it was made of
 * @param params for what
 * @param memory where the session is to be: a direct buffer of [MemoryPlan.bytes] and
 *   [MemoryPlan.alignment] more, since Java's buffers begin anywhere. It is the session's until it
 *   is closed. null: memory of its own
 */
public class Session @JvmOverloads constructor(
    public val model: Model,
    params: SessionParams = SessionParams(),
    memory: ByteBuffer? = null,
) : AutoCloseable {
    private val handle: Handle

    /** The stream that waits inside a generation. */
    @Volatile
    private var stream: TokenStream? = null

    init {
        val (fields, cpus) = params.fields() to params.cpus?.toIntArray()
        if (memory?.isReadOnly == true) throw MorException.InvalidArgument("the buffer is read-only")
        val kept = listOfNotNull(memory, model.data)
        handle = Handle.of("session", exclusive = true, kept, Native::sessionFree) {
            model.handle.call {
                when (memory) {
                    null -> Native.sessionCreate(it, fields, cpus)
                    else -> Native.sessionCreateIn(it, fields, cpus, memory.slice())
                }
            }
        }
    }

    /**
     * Runs tokens after those so far. On a failure the session is as it was before the call. May
     * take long; [cancel] ends it with [MorException.Cancelled].
     *
     * @param tokens token ids, each below the vocabulary's size; at least one
     */
    public fun prefill(tokens: IntArray): Unit = handle.call { Native.prefill(it, tokens) }

    /**
     * Makes the session hold this text and nothing else, as a chat does each turn: of the beginning that it holds already
     * nothing is run again (but with capacity routing everything), of the rest everything, and at least the last token,
     * unless its logits are there. After a failure while tokens ran, such as [cancel], the session holds the common
     * beginning, as after a rewind.
     *
     * @param tokens the whole text, at least one token
     * @return how many tokens stayed
     */
    public fun prefillWhole(tokens: IntArray): Int = handle.call { Native.prefillWhole(it, tokens) }

    /**
     * Runs tokens after those so far, of which there must be some, and tells how likely each of them was after all before
     * it. The sum says how likely they are as a continuation: to compare answers, for example. Not with capacity routing,
     * which wants the whole text at once. On a failure the session is as it was before.
     *
     * @param tokens at least one token
     * @return the natural logarithms of the probabilities (the softmax of the logits, whatever the sampler would do)
     * @throws MorException.NotReady for an empty session and after a rewind
     */
    public fun logProbabilities(tokens: IntArray): FloatArray {
        val numbers = FloatArray(tokens.size)
        handle.call { Native.logProbabilities(it, tokens, numbers) }
        return numbers
    }

    /**
     * Runs one token after those so far.
     *
     * @param into gets the logits of what follows it, one number for each token of the vocabulary;
     *   null when only the token is to be run
     */
    @JvmOverloads
    public fun step(token: Int, into: FloatArray? = null): Unit = handle.call {
        val needed = model.info.vocabSize
        // Before the token is run: a call that fails changes nothing.
        if (into != null && into.size < needed) {
            throw MorException.BufferTooSmall("the array holds ${into.size} logits of $needed")
        }
        Native.step(it, token, into)
    }

    /**
     * The logits of what follows the last token.
     *
     * @param into an array of the vocabulary's size to be used again
     * @throws MorException.NotReady before the first token and after a rewind
     */
    @JvmOverloads
    public fun logits(into: FloatArray = FloatArray(model.info.vocabSize)): FloatArray {
        handle.call { Native.logits(it, into) }
        return into
    }

    /**
     * Sets how [sample] and [generate] draw tokens from now on; the random sequence begins at its
     * seed. A new session draws with the defaults.
     */
    public fun setSampler(params: SamplerParams): Unit =
        handle.call { Native.setSampler(it, params.fields()) }

    /** Draws a token from the logits after the last one. It is not run: pass it to [step]. */
    public fun sample(): Int = handle.call { Native.sample(it) }

    /**
     * Continues the text so far, token by token: draws, runs, decodes and calls [listener], on this
     * thread. Needs a prompt ([prefill]) first. What the listener throws ends the generation after
     * the token that it was given, and goes on from here.
     *
     * [cancel] ends it with [Finish.CANCELLED]. The tokens before a failure stay.
     *
     * @return why it ended
     */
    @JvmOverloads
    public fun generate(params: GenerateParams = GenerateParams(), listener: TokenListener): Finish =
        run(params) { token ->
            listener.onToken(token)
            true
        }

    /** As [generate] with a listener; the tokens are found in the session afterwards. */
    @JvmOverloads
    public fun generate(params: GenerateParams = GenerateParams()): Finish = run(params, null)

    /** As [generate], as long as [predicate] answers true; then it ends with [Finish.CALLBACK]. */
    @JvmOverloads
    public fun generateWhile(
        params: GenerateParams = GenerateParams(),
        predicate: TokenPredicate,
    ): Finish = run(params, predicate)

    /**
     * As [generate], for a loop: each token is drawn when it is asked for. Close the stream when
     * the loop may end before it does. Until then the session is in use by it.
     */
    @JvmOverloads
    public fun stream(params: GenerateParams = GenerateParams()): TokenStream = TokenStream(this, params)

    private fun run(params: GenerateParams, receiver: TokenPredicate?): Finish {
        val stop = Array(params.stop.size) { params.stop[it].utf8() }
        return handle.call { generate(it, params, stop, receiver) }
    }

    private fun generate(
        session: Long,
        params: GenerateParams,
        stop: Array<ByteArray>,
        receiver: TokenPredicate?,
    ): Finish = Finish.entries.at(Native.generate(session, tokenLimit(params.maxTokens), stop, receiver))

    /** A generation for a stream, which [close] is to know. */
    internal fun run(stream: TokenStream, params: GenerateParams, receiver: TokenPredicate): Finish {
        val stop = Array(params.stop.size) { params.stop[it].utf8() }
        return handle.call {
            this.stream = stream
            try {
                generate(it, params, stop, receiver)
            } finally {
                this.stream = null
            }
        }
    }

    /** How many tokens the sequence has so far. */
    public val length: Int get() = handle.call { Native.length(it) }.toInt()

    /** The tokens so far. */
    public fun tokens(): IntArray = handle.call { Native.tokens(it, 0, Native.length(it).toInt()) }

    /** [count] of the tokens so far, from the position [first] on. */
    public fun tokens(first: Int, count: Int): IntArray = handle.call { Native.tokens(it, first, count) }

    /** The recursions that the tokens so far ran; 0 where the router let one pass by. */
    public fun depths(): IntArray =
        handle.call { Native.depths(it, 0, Native.length(it).toInt()) }.toInts()

    /** As [depths], of [count] tokens from the position [first] on. */
    public fun depths(first: Int, count: Int): IntArray =
        handle.call { Native.depths(it, first, count) }.toInts()

    /** How many of the tokens so far ran each number of recursions, from 0 to the model's. */
    public fun depthHistogram(): LongArray {
        val depths = model.info.recursions + 1
        return handle.call { Native.depthHistogram(it) }.copyOf(depths)
    }

    /** Bytes of KV pages in use: they follow the recursions that tokens ran, not the context. */
    public val kvBytesUsed: Long get() = handle.call { Native.kvBytesUsed(it) }

    /**
     * Sets the routers' cut from the next token on: a token goes on while the sigmoid of its score
     * is at least this. Higher is faster and coarser. Models without expert-choice routers take no
     * notice.
     *
     * @param cut from 0, which sends every token through all recursions, to 1, which sends none; a
     *   session begins with the cut that the model was trained for
     */
    public fun setCut(cut: Float): Unit = handle.call { Native.setCut(it, cut) }

    /**
     * Limits the recursions of tokens from the next one on.
     *
     * @param limit from 1 to the model's `recursions`, with which a session begins
     */
    public fun setDepthLimit(limit: Int): Unit = handle.call { Native.setDepthLimit(it, limit) }

    /**
     * Sets the time that a token should take: an aim, not a bound. The deepest recursions of a
     * token are left out when by the speed measured so far they would not be done in time. With a
     * budget, results depend on the clock.
     *
     * @param nanoseconds the budget; 0, with which a session begins, sets none
     */
    public fun setTimeBudget(nanoseconds: Long): Unit =
        handle.call { Native.setTimeBudget(it, nanoseconds) }

    /** Sets who decides, from the next call on; a session begins with [Routing.THRESHOLD]. */
    public fun setRouting(routing: Routing): Unit =
        handle.call { Native.setRouting(it, routing.ordinal) }

    /**
     * Forgets all tokens from a position on; their KV pages are free again. The logits are gone:
     * run a token to get new ones.
     *
     * @param length how many tokens stay, at most as many as there are
     */
    public fun rewind(length: Int): Unit = handle.call { Native.rewind(it, length) }

    /** Bytes that [save] writes now. */
    public val saveSize: Long get() = handle.call { Native.saveSize(it) }

    /**
     * The sequence so far: tokens, depths, keys and values, and where the sampler's random sequence
     * stands. Settings are not part of it.
     */
    public fun save(): ByteArray = handle.call { Native.save(it) }

    /**
     * As [save], to a direct buffer from its position on, which then stands behind the state.
     *
     * @throws MorException.BufferTooSmall and nothing is written, see [saveSize]
     */
    public fun save(buffer: ByteBuffer) {
        if (buffer.isReadOnly) throw MorException.InvalidArgument("the buffer is read-only")
        val bytes = handle.call { Native.saveTo(it, buffer.slice()) }
        buffer.position(buffer.position() + bytes.toInt())
    }

    /**
     * Replaces the sequence so far by a saved one, of this or another session of the same model
     * file and KV type. A state is not trusted: what is damaged or does not fit is refused, and the
     * session is as before.
     *
     * @throws MorException.State when it is damaged or of another model
     */
    public fun restore(state: ByteArray): Unit = handle.call { Native.restore(it, state) }

    /** As [restore] of an array, from a direct buffer, from its position to its limit. */
    public fun restore(state: ByteBuffer): Unit = handle.call { Native.restoreFrom(it, state.slice()) }

    /**
     * Ends the call in progress within the time of one layer, or the next call at once. Any thread,
     * any time, also from a callback; never blocks. One cancel ends one [prefill],
     * [prefillWhole], [logProbabilities] or [step], with [MorException.Cancelled], or one [generate], with [Finish.CANCELLED]. After [close] it does
     * nothing.
     */
    public fun cancel(): Unit = handle.beside { Native.cancel(it) }

    /**
     * Takes back a cancel that no call has met yet: call it before a new request, so that a cancel
     * that came too late for the last one does not end it.
     */
    public fun resetCancel(): Unit = handle.beside { Native.resetCancel(it) }

    /**
     * Frees the session. A call in progress on another thread is cancelled and waited for, and a
     * stream is ended; a callback that does not return is waited for as well. The second time it
     * does nothing.
     *
     * @throws MorException.Busy inside a callback of this session's
     */
    override fun close(): Unit = handle.close { session ->
        Native.cancel(session)
        stream?.end()
    }
}

private fun ByteArray.toInts(): IntArray = IntArray(size) { this[it].toInt() and 0xFF }

/**
 * One token of a generation, as it comes. It has been run and is part of the session.
 *
 * @property text the text that is certain with this token: whole characters, nothing that may still
 *   turn out to be a stop string. Often empty; the last call of a generation may repeat the last
 *   token with the rest of the text
 * @property id the token
 * @property depth recursions that it ran
 */
public data class GeneratedToken(val text: String, val id: Int, val depth: Int)

/** Takes the tokens of a generation, on the thread that generates. */
public fun interface TokenListener {
    /** Takes one token. What it throws ends the generation and goes on from there. */
    public fun onToken(token: GeneratedToken)
}

/** Takes the tokens of a generation and says whether it is to go on. */
public fun interface TokenPredicate {
    /**
     * Takes one token; false ends the generation. What it throws does as well, and goes on from
     * there.
     */
    public fun onToken(token: GeneratedToken): Boolean
}

/** Why a generation, or a sequence of a batch, ended. */
public enum class Finish {
    /** The model drew a token that ends a text; it is neither run nor shown. */
    END,

    /**
     * A stop string came up. Its tokens, which were not shown, were run and are in the session:
     * [Session.rewind] takes them out before the text goes on.
     */
    STOP,

    /** The most tokens were written. */
    LENGTH,

    /** The context is full. */
    CONTEXT_FULL,

    /** The callback asked for it. */
    CALLBACK,

    /** It was cancelled; the session stands after the last token that was shown. */
    CANCELLED,

    /** Of a batch's sequence: [Batch.stop]. */
    STOPPED,

    /**
     * Of a batch's sequence: the model computed a value that is not finite, or too large for the
     * type of keys and values, see [Batch.failure].
     */
    FAILED,
}
