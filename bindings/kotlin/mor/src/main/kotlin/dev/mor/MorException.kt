package dev.mor

/**
 * What a call came to, by the numbers of the C header's `mor_status`.
 *
 * @property code the number
 */
public enum class MorStatus(public val code: Int) {
    /** A parameter, token, text or size that the call cannot take. */
    INVALID_ARGUMENT(1),

    /** The system gave no memory, or no room for one more thread. */
    OUT_OF_MEMORY(2),

    /** The system refused to read or map a file. */
    IO(3),

    /** The model file is damaged, truncated or made to mislead. */
    FORMAT(4),

    /**
     * The file is sound but not of a kind that is run, or this system cannot do what was asked for.
     */
    UNSUPPORTED(5),

    /**
     * The file has no tokenizer, or one that cannot be used, or the text cannot be expressed in it.
     */
    TOKENIZER(6),

    /** The file has no chat template, or a broken one, or it refuses the conversation. */
    TEMPLATE(7),

    /** The sequence does not fit into the context of the session or batch. */
    CONTEXT_FULL(8),

    /** Every page of the KV cache is taken. */
    KV_FULL(9),

    /**
     * The model computed a value that is not finite: its weights are damaged. Or a key or a value that
     * is too large for the type in which they are kept.
     */
    NOT_FINITE(10),

    /**
     * The system refused a thread for another reason than a lack of memory, its affinity or
     * niceness.
     */
    THREAD(11),

    /** The call was cancelled; the session is as it was before the call. */
    CANCELLED(12),

    /** Another thread, or a callback of this one, is inside a call on this object. */
    BUSY(13),

    /** A buffer is too small; the sentence says how much is needed. */
    BUFFER_TOO_SMALL(14),

    /** A saved state is damaged, or of another model, version or kind of session. */
    STATE(15),

    /** The model's file was shortened while it was mapped. */
    FILE_CHANGED(16),

    /** The system refused to lock memory. */
    LOCK(17),

    /** The call needs something that has not happened yet, such as logits before any token. */
    NOT_READY(18),

    /** A bug in the library. The object of the call accepts nothing but being closed. */
    INTERNAL(19),

    /**
     * There is no GPU that can be used, it has too little memory, or it failed. What was made on it
     * accepts nothing but being closed; the CPU still works.
     */
    DEVICE(20);

    /**
     * One sentence about it, for people. [MorException]'s message says more about a particular
     * call.
     */
    public val sentence: String get() = Native.statusText(code).decodeToString()
}

/**
 * Why a call failed. There is a class for each [MorStatus]. A call on an object that was closed is
 * none of these but an [IllegalStateException].
 *
 * @property status which kind of failure
 */
public sealed class MorException(
    public val status: MorStatus,
    message: String,
) : RuntimeException(message) {
    /** See [MorStatus.INVALID_ARGUMENT]. */
    public class InvalidArgument(message: String) : MorException(MorStatus.INVALID_ARGUMENT, message)

    /** See [MorStatus.OUT_OF_MEMORY]. */
    public class OutOfMemory(message: String) : MorException(MorStatus.OUT_OF_MEMORY, message)

    /** See [MorStatus.IO]. */
    public class Io(message: String) : MorException(MorStatus.IO, message)

    /** See [MorStatus.FORMAT]. */
    public class Format(message: String) : MorException(MorStatus.FORMAT, message)

    /** See [MorStatus.UNSUPPORTED]. */
    public class Unsupported(message: String) : MorException(MorStatus.UNSUPPORTED, message)

    /** See [MorStatus.TOKENIZER]. */
    public class Tokenizer(message: String) : MorException(MorStatus.TOKENIZER, message)

    /** See [MorStatus.TEMPLATE]. */
    public class Template(message: String) : MorException(MorStatus.TEMPLATE, message)

    /** See [MorStatus.CONTEXT_FULL]. */
    public class ContextFull(message: String) : MorException(MorStatus.CONTEXT_FULL, message)

    /** See [MorStatus.KV_FULL]. */
    public class KvFull(message: String) : MorException(MorStatus.KV_FULL, message)

    /** See [MorStatus.NOT_FINITE]. */
    public class NotFinite(message: String) : MorException(MorStatus.NOT_FINITE, message)

    /** See [MorStatus.THREAD]. */
    public class Thread(message: String) : MorException(MorStatus.THREAD, message)

    /** See [MorStatus.CANCELLED]. */
    public class Cancelled(message: String) : MorException(MorStatus.CANCELLED, message)

    /** See [MorStatus.BUSY]. */
    public class Busy(message: String) : MorException(MorStatus.BUSY, message)

    /** See [MorStatus.BUFFER_TOO_SMALL]. */
    public class BufferTooSmall(message: String) : MorException(MorStatus.BUFFER_TOO_SMALL, message)

    /** See [MorStatus.STATE]. */
    public class State(message: String) : MorException(MorStatus.STATE, message)

    /** See [MorStatus.FILE_CHANGED]. */
    public class FileChanged(message: String) : MorException(MorStatus.FILE_CHANGED, message)

    /** See [MorStatus.LOCK]. */
    public class Lock(message: String) : MorException(MorStatus.LOCK, message)

    /** See [MorStatus.NOT_READY]. */
    public class NotReady(message: String) : MorException(MorStatus.NOT_READY, message)

    /** See [MorStatus.INTERNAL]. */
    public class Internal(message: String) : MorException(MorStatus.INTERNAL, message)

    /** See [MorStatus.DEVICE]. */
    public class Device(message: String) : MorException(MorStatus.DEVICE, message)

    internal companion object {
        /** The exception of a status. */
        fun of(code: Int, text: String): MorException = when (MorStatus.entries.find { it.code == code }) {
            MorStatus.INVALID_ARGUMENT -> InvalidArgument(text)
            MorStatus.OUT_OF_MEMORY -> OutOfMemory(text)
            MorStatus.IO -> Io(text)
            MorStatus.FORMAT -> Format(text)
            MorStatus.UNSUPPORTED -> Unsupported(text)
            MorStatus.TOKENIZER -> Tokenizer(text)
            MorStatus.TEMPLATE -> Template(text)
            MorStatus.CONTEXT_FULL -> ContextFull(text)
            MorStatus.KV_FULL -> KvFull(text)
            MorStatus.NOT_FINITE -> NotFinite(text)
            MorStatus.THREAD -> Thread(text)
            MorStatus.CANCELLED -> Cancelled(text)
            MorStatus.BUSY -> Busy(text)
            MorStatus.BUFFER_TOO_SMALL -> BufferTooSmall(text)
            MorStatus.STATE -> State(text)
            MorStatus.FILE_CHANGED -> FileChanged(text)
            MorStatus.LOCK -> Lock(text)
            MorStatus.NOT_READY -> NotReady(text)
            MorStatus.INTERNAL -> Internal(text)
            MorStatus.DEVICE -> Device(text)
            null -> Internal("status $code, which this version does not know: $text")
        }
    }
}
