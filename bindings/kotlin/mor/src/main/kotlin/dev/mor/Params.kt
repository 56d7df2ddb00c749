package dev.mor

/** How keys and values are stored. */
public enum class KvType {
    /** 2 bytes a number. */
    F16,

    /** 34 bytes for 32 numbers; the width of a head must be a multiple of 32. */
    Q8_0,

    /** 4 bytes a number: as computed, for exact comparisons. */
    F32,
}

/** Where a model runs, and all sessions and batches made of it. */
public enum class Device {
    /** The processor. */
    CPU,

    /**
     * An NVIDIA GPU. Needs a library that was built with the feature `cuda`, otherwise loading is
     * [MorException.Unsupported], and NVIDIA's driver, otherwise it is [MorException.Device].
     */
    CUDA,
}

/**
 * How a model is loaded.
 *
 * @property copy read the file into memory of this process instead of mapping it. A map costs no
 *   memory of its own, but whoever truncates the file during a call ends the process; a copy is
 *   safe from that
 * @property prefault touch every page while loading, so that no later call waits for the disk
 * @property lock keep every page in memory until the model is closed; [MorException.Lock] when the
 *   system refuses
 * @property log takes what the library has to tell about this model and its sessions
 * @property device where the model runs
 * @property deviceIndex the number of the GPU, from 0 to 255, when the device is one
 */
public data class LoadParams(
    var copy: Boolean = false,
    var prefault: Boolean = false,
    var lock: Boolean = false,
    var log: LogListener? = null,
    var device: Device = Device.CPU,
    var deviceIndex: Int = 0,
) {
    internal fun flags(): Int {
        if (deviceIndex !in 0..255) {
            throw MorException.InvalidArgument("deviceIndex is $deviceIndex, out of its range")
        }
        return (if (copy) 1 else 0) + (if (prefault) 2 else 0) + (if (lock) 4 else 0) +
            (device.ordinal shl 8) + (deviceIndex shl 16)
    }
}

/** How much a line of log matters. */
public enum class LogLevel {
    /** What was loaded and created, and what it takes. */
    INFO,

    /** Something that the host may want to know, such as a model without a usable tokenizer. */
    WARNING,
}

/** Takes a model's log, on whatever thread something is loaded or created. */
public fun interface LogListener {
    /**
     * Takes one line. What it throws ends the call that has something to tell, and goes on from
     * there.
     */
    public fun onLine(level: LogLevel, text: String)
}

/**
 * What a session is planned for.
 *
 * @property context most tokens of the sequence; 0: as many as the model was trained for
 * @property batch most tokens of one pass over the weights: prompts are taken in pieces of this
 *   size; 0: 64, on a GPU 512. Larger is faster and takes more memory; results do not depend on it
 * @property threads threads that share the work, the caller's included, at most 256; 0: one for
 *   each core that this process may use. Results do not depend on it
 * @property kvType how keys and values are stored
 * @property kvPages pages of the KV pool, of 16 entries each; 0: enough for every token to take
 *   every recursion. With fewer, calls may fail with [MorException.KvFull]
 * @property logitRows rows of logits that [Session.logProbabilities] computes together, each of which takes 4 bytes for
 *   every token of the vocabulary; 0: 1. 16 or more are faster where texts are scored
 * @property niceness of the helper threads, from -20 (first) to 19 (last); 0 leaves it as it is
 * @property prefault touch every page of the session's memory when it is created
 * @property lock keep the session's memory from being swapped out; [MorException.Lock] when the
 *   system refuses
 * @property cpus the CPUs that helper threads may run on, by the system's numbers; null: any
 */
public data class SessionParams(
    var context: Int = 0,
    var batch: Int = 0,
    var threads: Int = 0,
    var kvType: KvType = KvType.F16,
    var kvPages: Long = 0,
    var logitRows: Int = 0,
    var niceness: Int = 0,
    var prefault: Boolean = false,
    var lock: Boolean = false,
    var cpus: List<Int>? = null,
) {
    internal fun fields(): LongArray = longArrayOf(
        context.toLong(), batch.toLong(), threads.toLong(), kvType.ordinal.toLong(), kvPages,
        logitRows.toLong(), niceness.toLong(), prefault.toLong(), lock.toLong(),
    )
}

/**
 * How tokens are drawn. The filters work in this order: penalty, top-k, top-p, min-p, temperature.
 *
 * @property temperature logits are divided by this before the draw; 0 takes the likeliest token
 * @property topP only the likeliest tokens whose probabilities add up to this stay; 1 does nothing
 * @property minP only tokens at least this times as likely as the likeliest stay; 0 does nothing
 * @property repeatPenalty logits of recent tokens are divided by this where positive and multiplied
 *   where negative; 1 does nothing
 * @property topK only this many of the likeliest tokens stay; 0 does nothing
 * @property repeatLastN how many tokens back the penalty looks
 * @property seed start of the random sequence: the same seed draws the same tokens
 */
public data class SamplerParams(
    var temperature: Float = 0.8f,
    var topP: Float = 0.95f,
    var minP: Float = 0.05f,
    var repeatPenalty: Float = 1f,
    var topK: Int = 40,
    var repeatLastN: Int = 64,
    var seed: Long = 0,
) {
    internal fun fields(): LongArray = longArrayOf(
        temperature.bits(), topP.bits(), minP.bits(), repeatPenalty.bits(),
        topK.toLong(), repeatLastN.toLong(), seed,
    )

    /** Usual ones. */
    public companion object {
        /** Always the likeliest token. */
        @JvmStatic
        public fun greedy(): SamplerParams = SamplerParams(temperature = 0f)
    }
}

/**
 * What to generate.
 *
 * @property maxTokens most tokens to write; [Int.MAX_VALUE]: as many as the context holds
 * @property stop texts that end the generation and are not part of it, each of at most 1024 bytes
 *   of UTF-8 and without a zero character; an empty one ends nothing
 */
public data class GenerateParams(
    var maxTokens: Int = Int.MAX_VALUE,
    var stop: List<String> = emptyList(),
)

/** Who decides which tokens go on to the next recursion of an expert-choice model. */
public enum class Routing {
    /** Each token's own score, against the cut: causal, for generating. */
    THRESHOLD,

    /**
     * The best of the whole text, as the paper trains and scores: for comparing with published
     * numbers. The text must come as one [Session.prefill] into an empty session whose `batch`
     * holds it.
     */
    CAPACITY,
}

/** Who has the pages of the KV pool when there are not enough. */
public enum class Pressure {
    /**
     * The sequence of lowest priority gives its pages back and goes on when there is room again: it
     * is run anew from its tokens, to the same results.
     */
    EVICT,

    /**
     * The sequence of lowest priority of those that need a page stands still until [Batch.resume].
     */
    REFUSE,
}

/**
 * What a batch is planned for.
 *
 * @property context most tokens of a sequence; 0: as many as the model was trained for
 * @property sequences sequences at a time, those among them that are done and not yet removed; at
 *   least 1
 * @property rows most tokens of one tick's pass over the weights; 0: 64, on a GPU 512. Larger is
 *   faster when there are many sequences or long prompts, and takes more memory; results do not
 *   depend on it
 * @property logitRows rows of logits that are computed together, each of which takes 4 bytes for
 *   every token of the vocabulary; 0: one for each sequence, up to 32. Results do not depend on it
 * @property kvPages pages of the KV pool that the sequences share, of 16 entries each; 0: enough
 *   for every token to take every recursion. [Model.batchPagesFor] says how many do for less
 * @property threads as in [SessionParams]
 * @property kvType how keys and values are stored
 * @property pressure what happens when the KV pool is full
 * @property niceness as in [SessionParams]
 * @property prefault touch every page of the batch's memory when it is created
 * @property lock keep the batch's memory from being swapped out; [MorException.Lock] when the
 *   system refuses
 * @property cpus as in [SessionParams]
 */
public data class BatchParams(
    var context: Int = 0,
    var sequences: Int = 1,
    var rows: Int = 0,
    var logitRows: Int = 0,
    var kvPages: Long = 0,
    var threads: Int = 0,
    var kvType: KvType = KvType.F16,
    var pressure: Pressure = Pressure.EVICT,
    var niceness: Int = 0,
    var prefault: Boolean = false,
    var lock: Boolean = false,
    var cpus: List<Int>? = null,
) {
    internal fun fields(): LongArray = longArrayOf(
        context.toLong(), sequences.toLong(), rows.toLong(), logitRows.toLong(), kvPages,
        threads.toLong(), kvType.ordinal.toLong(), pressure.ordinal.toLong(), niceness.toLong(),
        prefault.toLong(), lock.toLong(),
    )
}

/**
 * What a new sequence of a batch is to do.
 *
 * @property prompt its tokens; for a fork, those after the common beginning
 * @property maxTokens most tokens to generate; 0 only runs the prompt; [Int.MAX_VALUE]: as many as
 *   the context holds
 * @property sampler how tokens are drawn
 * @property cut the routers' cut, from 0 to 1, see [Session.setCut]; below 0: as the model was
 *   trained; for a fork, as its parent, which is all that a fork may have
 * @property depthLimit the most recursions of a token, from 1; 0: all; for a fork, as its parent,
 *   which is all that a fork may have
 * @property priority under pressure sequences of lower priority give way; of equals the later
 * @property ignoreEnd go on after tokens that end a text
 */
public class Request(
    public var prompt: IntArray = IntArray(0),
    public var maxTokens: Int = Int.MAX_VALUE,
    public var sampler: SamplerParams = SamplerParams(),
    public var cut: Float = -1f,
    public var depthLimit: Int = 0,
    public var priority: Int = 0,
    public var ignoreEnd: Boolean = false,
) {
    internal fun fields(): LongArray = longArrayOf(
        tokenLimit(maxTokens), cut.bits(), depthLimit.toLong(), priority.toLong(), ignoreEnd.toLong(),
    )
}

internal fun Boolean.toLong(): Long = if (this) 1 else 0

internal fun Float.bits(): Long = toRawBits().toLong() and 0xFFFF_FFFFL

/** As the library counts: its largest number means no limit. */
internal fun tokenLimit(tokens: Int): Long =
    if (tokens == Int.MAX_VALUE) Long.MAX_VALUE else tokens.toLong()
