package dev.mor

/**
 * A model's tokenizer with working memory of its own. One call at a time may use it: a second one,
 * from another thread, gets [MorException.Busy]. Threads make one each; they share the vocabulary,
 * which is the model's. The model may be closed before it.
 *
 * @property model the model that it was made of
 * @param maxPieceBytes the longest piece of text without a break that [encode] can take, in bytes:
 *   a word for byte-level vocabularies, whose texts may be of any length; the text between two
 *   special tokens for SentencePiece's. The working memory is about 29 times as large
 * @throws MorException.Tokenizer when the model has no tokenizer that can be used
 */
public class Tokenizer @JvmOverloads constructor(
    public val model: Model,
    maxPieceBytes: Int = DEFAULT_MAX_PIECE_BYTES,
) : AutoCloseable {
    private val handle =
        Handle.of("tokenizer", exclusive = true, listOfNotNull(model.data), Native::tokenizerFree) {
            model.handle.call { Native.tokenizerCreate(it, maxPieceBytes.toLong()) }
        }

    /** What the tokenizer says about itself. It stands after the tokenizer is closed. */
    public val info: TokenizerInfo = TokenizerInfo.of(handle.call { Native.tokenizerDescribe(it) })

    /**
     * The tokens of a text, which may hold any characters, also the zero one.
     *
     * @param addSpecial put the tokens that begin and end a text around it, if the file asks for
     *   them: usual for a prompt, wrong for a rendered chat, which brings its own
     * @param parseSpecial read the names of control tokens, such as "<|im_end|>", as these tokens:
     *   only for text that is trusted, such as a rendered chat
     */
    @JvmOverloads
    public fun encode(
        text: String,
        addSpecial: Boolean = true,
        parseSpecial: Boolean = false,
    ): IntArray {
        val bytes = text.utf8()
        return handle.call { Native.encode(it, bytes, addSpecial, parseSpecial) }
    }

    /**
     * The text of some tokens. What is no valid UTF-8 becomes U+FFFD: to show tokens one by one use
     * [Session.generate] or a [DecodeStream], which never cut a character.
     *
     * @param special write control tokens by their names; without it they are no text
     */
    @JvmOverloads
    public fun decode(tokens: IntArray, special: Boolean = false): String =
        handle.call { Native.decode(it, tokens, special) }.decodeToString()

    internal fun decodeNext(pending: ByteArray, token: Int, special: Boolean): ByteArray =
        handle.call { Native.decodeNext(it, pending, token, special) }

    internal fun decodeEnd(pending: ByteArray): String =
        handle.call { Native.decodeEnd(it, pending) }.decodeToString()

    /**
     * The bytes that one token adds to a text; they need not be whole characters.
     *
     * @param special as in [decode]
     */
    @JvmOverloads
    public fun tokenBytes(token: Int, special: Boolean = false): ByteArray =
        handle.call { Native.tokenBytes(it, token, special) }

    /** Whether nothing is to be generated after a token. */
    public fun isEnd(token: Int): Boolean = handle.call { Native.isEnd(it, token) }

    /**
     * A conversation as the text that the model was trained on, by the chat template in its file.
     * Encode it with `encode(text, addSpecial = false, parseSpecial = true)`. The texts cannot hold
     * the zero character. A template is a program from the file and is not trusted: its work is
     * bounded.
     *
     * @param addPrompt end where the assistant is to speak
     * @throws MorException.Template also when the file has no template
     */
    @JvmOverloads
    public fun formatChat(messages: List<ChatMessage>, addPrompt: Boolean = true): String {
        val texts = messages.flatMap { listOf(it.role.utf8(), it.content.utf8()) }.toTypedArray()
        return handle.call { Native.formatChat(it, texts, addPrompt) }.decodeToString()
    }

    /** Waits for a call in progress and frees the tokenizer. The second time it does nothing. */
    override fun close(): Unit = handle.close()

    /** What it is made with. */
    public companion object {
        /** The default of the longest piece, in bytes. */
        public const val DEFAULT_MAX_PIECE_BYTES: Int = 16384
    }
}

/**
 * A text whose tokens come one by one, as a batch gives them: whole characters only, and U+FFFD for what is no valid
 * UTF-8. One for each text, used by one thread at a time; it lives on the tokenizer and need not be closed.
 *
 * @param tokenizer what the tokens are of
 * @param special write control tokens by their names; without it they are no text
 */
public class DecodeStream @JvmOverloads constructor(
    private val tokenizer: Tokenizer,
    private val special: Boolean = false,
) {
    /** The beginning of a character whose end is missing. */
    private var pending = ByteArray(0)

    /** The characters that are complete with one more token. */
    public fun next(token: Int): String {
        // How many bytes are pending now, these, and the text.
        val result = tokenizer.decodeNext(pending, token, special)
        val text = 1 + result[0]
        pending = result.copyOfRange(1, text)
        return result.decodeToString(startIndex = text)
    }

    /** Ends the text: U+FFFD if a character was left incomplete, else nothing. Another text may follow. */
    public fun end(): String = tokenizer.decodeEnd(pending).also { pending = ByteArray(0) }

    /** One that goes on from the same place, for a fork. */
    public fun copy(): DecodeStream = DecodeStream(tokenizer, special).also { it.pending = pending }
}

/**
 * What a tokenizer says about itself. A special token that the file does not have is -1.
 *
 * @property vocabSize tokens; the model may have more, whose last rows are then no text
 * @property bos the token that begins a text
 * @property eos the token that ends a text
 * @property eot the token that ends a turn of a conversation
 * @property addBos whether the file asks for [bos] before each text
 * @property addEos whether the file asks for [eos] after each text
 * @property maxTokenBytes bytes of the longest token
 */
public data class TokenizerInfo(
    val vocabSize: Int,
    val bos: Int,
    val eos: Int,
    val eot: Int,
    val addBos: Boolean,
    val addEos: Boolean,
    val maxTokenBytes: Int,
) {
    internal companion object {
        fun of(f: LongArray) = TokenizerInfo(
            f[0].toInt(), f[1].toInt(), f[2].toInt(), f[3].toInt(), f[4] != 0L, f[5] != 0L, f[6].toInt(),
        )
    }
}

/**
 * One turn of a conversation.
 *
 * @property role who speaks: usually "system", "user" or "assistant"
 * @property content what is said
 */
public data class ChatMessage(val role: String, val content: String)
