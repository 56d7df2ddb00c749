package dev.mor

/**
 * The native methods, one for each function of mor.h, as `src/jni/` of the library exports them.
 * Texts are UTF-8, structs are arrays in the order of their fields, handles are addresses:
 * everything is checked by the classes around it, and nothing else may call it.
 */
internal object Native {
    init {
        NativeLibrary.load()
    }

    // What the library calls.

    /** Throws the exception of a status. */
    @JvmStatic
    fun fail(status: Int, text: ByteArray) {
        throw MorException.of(status, text.decodeToString())
    }

    /** Passes a token on; whether the generation goes on. */
    @JvmStatic
    fun piece(receiver: Any, token: Int, depth: Int, text: ByteArray): Boolean =
        (receiver as TokenPredicate).onToken(GeneratedToken(text.decodeToString(), token, depth))

    /** Passes a line of log on. */
    @JvmStatic
    fun log(receiver: Any, level: Int, text: ByteArray): Boolean {
        (receiver as LogListener).onLine(LogLevel.entries.at(level), text.decodeToString())
        return true
    }

    // What the library is asked.

    /** Keeps an object from being collected, until [letGo] of what this answers. */
    @JvmStatic external fun hold(kept: Any): Long
    @JvmStatic external fun letGo(held: Long)

    @JvmStatic external fun version(): ByteArray
    @JvmStatic external fun statusText(status: Int): ByteArray

    @JvmStatic external fun modelDefaults(): Int
    @JvmStatic external fun tokenizerDefaults(): Long
    @JvmStatic external fun sessionDefaults(): LongArray
    @JvmStatic external fun batchDefaults(): LongArray
    @JvmStatic external fun samplerDefaults(): LongArray
    @JvmStatic external fun generateDefaults(): Long
    @JvmStatic external fun requestDefaults(): LongArray

    @JvmStatic external fun logCreate(receiver: Any): Long
    @JvmStatic external fun logFree(log: Long)
    @JvmStatic external fun modelLoad(path: ByteArray, flags: Int, log: Long): Long
    @JvmStatic external fun modelLoadDescriptor(
        descriptor: Int, offset: Long, bytes: Long, flags: Int, log: Long,
    ): Long
    @JvmStatic external fun modelLoadMemory(data: Any, flags: Int, log: Long): Long
    @JvmStatic external fun modelFree(model: Long)
    @JvmStatic external fun modelDescribe(model: Long): LongArray
    @JvmStatic external fun modelMetadata(model: Long, key: ByteArray): ByteArray

    @JvmStatic external fun tokenizerCreate(model: Long, maxPieceBytes: Long): Long
    @JvmStatic external fun tokenizerFree(tokenizer: Long)
    @JvmStatic external fun tokenizerDescribe(tokenizer: Long): LongArray
    @JvmStatic external fun encode(
        tokenizer: Long, text: ByteArray, special: Boolean, parse: Boolean,
    ): IntArray
    @JvmStatic external fun decode(tokenizer: Long, tokens: IntArray, special: Boolean): ByteArray
    @JvmStatic external fun decodeNext(
        tokenizer: Long, pending: ByteArray, token: Int, special: Boolean,
    ): ByteArray
    @JvmStatic external fun decodeEnd(tokenizer: Long, pending: ByteArray): ByteArray
    @JvmStatic external fun tokenBytes(tokenizer: Long, token: Int, special: Boolean): ByteArray
    @JvmStatic external fun isEnd(tokenizer: Long, token: Int): Boolean
    @JvmStatic external fun formatChat(
        tokenizer: Long, texts: Array<ByteArray>, addPrompt: Boolean,
    ): ByteArray

    @JvmStatic external fun sessionPlan(model: Long, params: LongArray, cpus: IntArray?): LongArray
    @JvmStatic external fun sessionCreate(model: Long, params: LongArray, cpus: IntArray?): Long
    @JvmStatic external fun sessionCreateIn(
        model: Long, params: LongArray, cpus: IntArray?, memory: Any,
    ): Long
    @JvmStatic external fun sessionFree(session: Long)
    @JvmStatic external fun cancel(session: Long)
    @JvmStatic external fun resetCancel(session: Long)
    @JvmStatic external fun prefill(session: Long, tokens: IntArray)
    @JvmStatic external fun prefillWhole(session: Long, tokens: IntArray): Int
    @JvmStatic external fun logProbabilities(session: Long, tokens: IntArray, into: FloatArray)
    @JvmStatic external fun step(session: Long, token: Int, into: FloatArray?)
    @JvmStatic external fun logits(session: Long, into: FloatArray)
    @JvmStatic external fun setSampler(session: Long, params: LongArray)
    @JvmStatic external fun sample(session: Long): Int
    @JvmStatic external fun generate(
        session: Long, maxTokens: Long, stop: Array<ByteArray>, receiver: Any?,
    ): Int
    @JvmStatic external fun length(session: Long): Long
    @JvmStatic external fun tokens(session: Long, first: Int, count: Int): IntArray
    @JvmStatic external fun depths(session: Long, first: Int, count: Int): ByteArray
    @JvmStatic external fun depthHistogram(session: Long): LongArray
    @JvmStatic external fun kvBytesUsed(session: Long): Long
    @JvmStatic external fun setCut(session: Long, cut: Float)
    @JvmStatic external fun setDepthLimit(session: Long, limit: Int)
    @JvmStatic external fun setTimeBudget(session: Long, nanoseconds: Long)
    @JvmStatic external fun setRouting(session: Long, routing: Int)
    @JvmStatic external fun rewind(session: Long, length: Int)
    @JvmStatic external fun saveSize(session: Long): Long
    @JvmStatic external fun save(session: Long): ByteArray
    @JvmStatic external fun saveTo(session: Long, buffer: Any): Long
    @JvmStatic external fun restore(session: Long, state: ByteArray)
    @JvmStatic external fun restoreFrom(session: Long, buffer: Any)

    @JvmStatic external fun batchPlan(model: Long, params: LongArray, cpus: IntArray?): LongArray
    @JvmStatic external fun batchPlanIn(
        model: Long, params: LongArray, cpus: IntArray?, meanDepth: Double, bytes: Long,
    ): LongArray
    @JvmStatic external fun batchPagesFor(
        model: Long, params: LongArray, cpus: IntArray?, meanDepth: Double,
    ): Long
    @JvmStatic external fun batchCreate(model: Long, params: LongArray, cpus: IntArray?): Long
    @JvmStatic external fun batchFree(batch: Long)
    @JvmStatic external fun batchAdd(
        batch: Long, request: LongArray, prompt: IntArray, sampler: LongArray?,
    ): Long
    @JvmStatic external fun batchFork(
        batch: Long, parent: Long, length: Int,
        request: LongArray, prompt: IntArray, sampler: LongArray?,
    ): Long
    @JvmStatic external fun batchStop(batch: Long, sequence: Long)
    @JvmStatic external fun batchRemove(batch: Long, sequence: Long)
    @JvmStatic external fun batchResume(batch: Long, sequence: Long)
    @JvmStatic external fun batchTick(batch: Long): LongArray
    @JvmStatic external fun batchSequenceStatus(batch: Long, sequence: Long): Int
    @JvmStatic external fun batchTokens(batch: Long, sequence: Long): IntArray
    @JvmStatic external fun batchDepths(batch: Long, sequence: Long): ByteArray
    @JvmStatic external fun batchFailure(batch: Long, sequence: Long): ByteArray?
    @JvmStatic external fun batchIsIdle(batch: Long): Boolean
    @JvmStatic external fun batchKvBytesUsed(batch: Long): Long
    @JvmStatic external fun batchCounters(batch: Long): LongArray
    @JvmStatic external fun batchSetInStep(batch: Long, inStep: Boolean)
}

/**
 * The text as the library takes it. Kotlin would write "?" for half of a surrogate pair, which is
 * no character; here it is an error.
 */
internal fun String.utf8(): ByteArray = try {
    encodeToByteArray(throwOnInvalidSequence = true)
} catch (_: CharacterCodingException) {
    throw MorException.InvalidArgument("a text has half of a surrogate pair, which is no character")
}

/** The value of an enum that the library means by a number. */
internal fun <E : Enum<E>> List<E>.at(number: Int): E =
    getOrNull(number)
        ?: throw MorException.Internal("the library answered $number, which is not known")
