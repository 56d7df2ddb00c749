package dev.mor

import java.io.File
import java.nio.ByteBuffer

/**
 * A model: the mapped file and what it says about itself. It never changes, so any number of
 * threads, sessions, tokenizers and batches may use one at the same time. Those made of it keep
 * what they need of it and stay usable after it is closed; the file is unmapped with the last of
 * them.
 *
 * Close it when it is no longer needed: what is not closed is never freed.
 */
public class Model private constructor(
    internal val handle: Handle,
    /** The memory that it is used in place from: not to be collected before all that use it. */
    internal val data: ByteBuffer?,
) : AutoCloseable {
    /** What the model says about itself. It stands after the model is closed. */
    public val info: ModelInfo = ModelInfo.of(handle.call { Native.modelDescribe(it) })

    /**
     * The value of a metadata key whose value is a string, such as "general.name"; null without
     * one.
     */
    public fun metadata(key: String): String? {
        val name = key.utf8()
        return try {
            handle.call { Native.modelMetadata(it, name) }.decodeToString()
        } catch (_: MorException.InvalidArgument) {
            null
        }
    }

    /** What a session will take, to the byte. No memory is taken for that. */
    @JvmOverloads
    public fun plan(params: SessionParams = SessionParams()): MemoryPlan = MemoryPlan.of(
        handle.call { Native.sessionPlan(it, params.fields(), params.cpus?.toIntArray()) },
    )

    /** What a batch will take, to the byte. No memory is taken for that. */
    @JvmOverloads
    public fun planBatch(params: BatchParams = BatchParams()): BatchPlan = BatchPlan.of(
        handle.call { Native.batchPlan(it, params.fields(), params.cpus?.toIntArray()) },
    )

    /**
     * Plans the batch with the most sequences whose block of memory, or on a GPU what it takes
     * there, has at most so many bytes. What was sought stands in the plan's `sequences` and
     * `kvPages`; in [params] these two do not matter.
     *
     * @param meanDepth recursions of a token on average: from 0 to the model's `recursions` where
     *   routers may drop a token at once, from 1 elsewhere
     * @param bytes for the block, on a GPU for `deviceBytes`; all else comes besides
     */
    @JvmOverloads
    public fun planBatchIn(
        bytes: Long,
        meanDepth: Double,
        params: BatchParams = BatchParams(),
    ): BatchPlan = BatchPlan.of(
        handle.call {
            Native.batchPlanIn(it, params.fields(), params.cpus?.toIntArray(), meanDepth, bytes)
        },
    )

    /**
     * Pages of the KV pool that the sequences of [params] take when their contexts are full: a
     * value for [BatchParams.kvPages], which does not matter here.
     *
     * @param meanDepth recursions of a token on average: from 0 to the model's `recursions` where
     *   routers may drop a token at once, from 1 elsewhere
     */
    @JvmOverloads
    public fun batchPagesFor(meanDepth: Double, params: BatchParams = BatchParams()): Long =
        handle.call {
            Native.batchPagesFor(it, params.fields(), params.cpus?.toIntArray(), meanDepth)
        }

    /**
     * Waits for calls on the model that are in progress and frees it. The second time it does
     * nothing.
     */
    override fun close(): Unit = handle.close()

    /** Loads models. */
    public companion object {
        /**
         * Loads the GGUF file at [path]: maps it read-only and checks all that is needed to run it.
         * The weights are used where they lie in the map. May block on the disk. Files are not
         * trusted: a damaged or hostile one gives an exception.
         */
        @JvmStatic
        @JvmOverloads
        public fun load(path: String, params: LoadParams = LoadParams()): Model {
            val name = path.utf8()
            return load(params, null) { flags, log -> Native.modelLoad(name, flags, log) }
        }

        /** As [load] of a path. */
        @JvmStatic
        @JvmOverloads
        public fun load(file: File, params: LoadParams = LoadParams()): Model = load(file.path, params)

        /**
         * As [load] of a path, from the descriptor of an open file: the [length] bytes from
         * [offset] on, any number, for example of an uncompressed asset inside an Android package,
         * which is mapped where it lies. The descriptor stays the caller's and may be closed after
         * the call.
         *
         * @param length in bytes; 0: up to the file's end
         */
        @JvmStatic
        @JvmOverloads
        public fun loadDescriptor(
            descriptor: Int,
            offset: Long = 0,
            length: Long = 0,
            params: LoadParams = LoadParams(),
        ): Model = load(params, null) { flags, log ->
            Native.modelLoadDescriptor(descriptor, offset, length, flags, log)
        }

        /**
         * As [load] of a path, from a direct buffer, from its position to its limit. It is used
         * where it is and must not change before the model and all that was made of it are closed;
         * with [LoadParams.copy] it is copied.
         */
        @JvmStatic
        @JvmOverloads
        public fun load(data: ByteBuffer, params: LoadParams = LoadParams()): Model {
            val part = data.slice()
            return load(params, part) { flags, log -> Native.modelLoadMemory(part, flags, log) }
        }

        private inline fun load(
            params: LoadParams,
            data: ByteBuffer?,
            make: (flags: Int, log: Long) -> Long,
        ): Model {
            val log = params.log?.let { Native.logCreate(it) } ?: 0
            val freeLog = { if (log != 0L) Native.logFree(log) }
            val free = { model: Long ->
                Native.modelFree(model)
                freeLog()
            }
            val kept = listOfNotNull(data)
            val handle = Handle.of("model", exclusive = false, kept, free) {
                try {
                    make(params.flags(), log)
                } catch (failure: Throwable) {
                    freeLog()
                    throw failure
                }
            }
            return Model(handle, data)
        }
    }
}

/** What chooses a token's depth. */
public enum class ModelKind {
    /** Every layer runs once: a plain Llama model. */
    VANILLA,

    /** Every token runs every recursion. */
    RECURSIVE,

    /** Before each recursion a router decides which tokens go on. */
    EXPERT_CHOICE,

    /** One router gives each token its depth before the first recursion. */
    TOKEN_CHOICE,
}

/**
 * What a model says about itself.
 *
 * @property kind what chooses a token's depth
 * @property vocabSize tokens in the vocabulary: the length of a row of logits
 * @property contextLength tokens that the model was trained to see at once
 * @property hiddenSize width of the residual stream
 * @property feedForwardSize inner width of the feed-forward half
 * @property heads query heads
 * @property kvHeads key and value heads
 * @property headDim width of a head
 * @property storedLayers layers in the file
 * @property logicalLayers layers that a token of full depth passes
 * @property recursions the most recursions that a token takes; 1 for a vanilla model
 * @property cut the cut that the routers were trained for, see [Session.setCut]
 * @property weightBytes bytes of all tensors, each once: what a run reads of the map
 * @property unsharedWeightBytes bytes that the weights would take if recursions shared nothing
 * @property parameters weights in the file
 * @property hasTokenizer whether a [Tokenizer] can be made of it
 * @property hasChatTemplate whether the file has a chat template
 */
public data class ModelInfo(
    val kind: ModelKind,
    val vocabSize: Int,
    val contextLength: Int,
    val hiddenSize: Int,
    val feedForwardSize: Int,
    val heads: Int,
    val kvHeads: Int,
    val headDim: Int,
    val storedLayers: Int,
    val logicalLayers: Int,
    val recursions: Int,
    val cut: Float,
    val weightBytes: Long,
    val unsharedWeightBytes: Long,
    val parameters: Long,
    val hasTokenizer: Boolean,
    val hasChatTemplate: Boolean,
) {
    internal companion object {
        fun of(f: LongArray) = ModelInfo(
            ModelKind.entries.at(f[0].toInt()), f[1].toInt(), f[2].toInt(), f[3].toInt(), f[4].toInt(),
            f[5].toInt(), f[6].toInt(), f[7].toInt(), f[8].toInt(), f[9].toInt(), f[10].toInt(),
            Float.fromBits(f[11].toInt()), f[12], f[13], f[14], f[15] != 0L, f[16] != 0L,
        )
    }
}

/**
 * What a session will take.
 *
 * @property bytes of the session's one block of memory: all that it takes, at once, when it is
 *   created, but for the stacks of its helper threads
 * @property alignment what the block is aligned to, in bytes
 * @property kvBytes the pages of the KV cache: of [bytes], or of [deviceBytes] when the model is on
 *   a GPU
 * @property kvBytesPerToken bytes of KV pages that a token of full depth takes
 * @property stackBytes bytes of address space of the helper threads' stacks, which the system gives
 *   page by page as they are used
 * @property context tokens of the sequence, with the default filled in
 * @property batch tokens of a pass
 * @property kvPages pages of the KV pool
 * @property threads threads, the caller's included
 * @property deviceBytes bytes of the GPU's memory, besides the weights; 0 on the CPU
 * @property pinnedBytes bytes of the host's memory that are pinned for copies to and from the GPU; 0
 *   on the CPU
 */
public data class MemoryPlan(
    val bytes: Long,
    val alignment: Int,
    val kvBytes: Long,
    val kvBytesPerToken: Long,
    val stackBytes: Long,
    val context: Int,
    val batch: Int,
    val kvPages: Long,
    val threads: Int,
    val deviceBytes: Long,
    val pinnedBytes: Long,
) {
    internal companion object {
        fun of(f: LongArray) = MemoryPlan(
            f[0], f[1].toInt(), f[2], f[3], f[4], f[5].toInt(), f[6].toInt(), f[7], f[8].toInt(), f[9],
            f[10],
        )
    }
}

/**
 * What a batch will take.
 *
 * @property bytes of the batch's one block of memory, which it takes when it is created
 * @property heapBytes bytes that it takes from the heap besides, for its list of sequences
 * @property kvBytes the pages of the KV pool: of [bytes], or of [deviceBytes] when the model is on a
 *   GPU
 * @property kvBytesPerToken bytes of KV pages that a token of full depth takes
 * @property stackBytes as in [MemoryPlan]
 * @property context tokens of a sequence, with the default filled in
 * @property sequences sequences at a time
 * @property rows tokens of a tick's pass
 * @property kvPages pages of the KV pool
 * @property threads threads, the caller's included
 * @property deviceBytes bytes of the GPU's memory, besides the weights; 0 on the CPU
 * @property pinnedBytes bytes of the host's memory that are pinned for copies to and from the GPU; 0
 *   on the CPU
 */
public data class BatchPlan(
    val bytes: Long,
    val heapBytes: Long,
    val kvBytes: Long,
    val kvBytesPerToken: Long,
    val stackBytes: Long,
    val context: Int,
    val sequences: Int,
    val rows: Int,
    val kvPages: Long,
    val threads: Int,
    val deviceBytes: Long,
    val pinnedBytes: Long,
) {
    internal companion object {
        fun of(f: LongArray) = BatchPlan(
            f[0], f[1], f[2], f[3], f[4], f[5].toInt(), f[6].toInt(), f[7].toInt(), f[8], f[9].toInt(),
            f[10], f[11],
        )
    }
}
