import CMor
import Foundation

/// One turn of a conversation.
public struct ChatMessage: Sendable, Equatable {
    /// Who speaks: usually "system", "user" or "assistant".
    public var role: String
    /// What is said.
    public var content: String

    /// A turn of anyone.
    public init(role: String, content: String) {
        self.role = role
        self.content = content
    }

    /// What the model is told about its part.
    public static func system(_ content: String) -> Self { Self(role: "system", content: content) }
    /// What a person says.
    public static func user(_ content: String) -> Self { Self(role: "user", content: content) }
    /// What the model said.
    public static func assistant(_ content: String) -> Self {
        Self(role: "assistant", content: content)
    }
}

/// A model's tokenizer with working memory of its own.
///
/// Any thread may use it; calls wait for each other. Threads that encode much make one each: they
/// share the vocabulary, which is the model's.
public final class Tokenizer: @unchecked Sendable {
    /// How to read a text.
    public struct EncodeOptions: OptionSet, Sendable {
        public let rawValue: UInt32
        public init(rawValue: UInt32) { self.rawValue = rawValue }

        /// Put the tokens that begin and end a text around it, if the file asks for them. Usual for a
        /// prompt, wrong for a rendered chat, which brings its own.
        public static let addSpecial = Self(rawValue: UInt32(MOR_ENCODE_ADD_SPECIAL))
        /// Read the names of control tokens, such as "<|im_end|>", as these tokens. Only for text
        /// that is trusted, such as a rendered chat.
        public static let parseSpecial = Self(rawValue: UInt32(MOR_ENCODE_PARSE_SPECIAL))
    }

    /// Tokens. The model may have more: its last rows are then no text.
    public let vocabSize: Int
    /// The token that begins a text.
    public let bos: Token?
    /// The token that ends a text.
    public let eos: Token?
    /// The token that ends a turn of a conversation.
    public let eot: Token?
    /// Whether the file asks for ``bos`` before each text.
    public let addsBos: Bool
    /// Whether the file asks for ``eos`` after each text.
    public let addsEos: Bool
    /// Bytes of the longest token.
    public let maxTokenBytes: Int

    // Safe to share: every use of the pointer is under the lock.
    private let pointer: OpaquePointer
    private let lock = NSLock()
    private let model: Model

    /// Makes a tokenizer. The longest piece of text without a break that ``encode(_:_:)`` can take has
    /// `maxPieceBytes`; nil stands for 16384. The working memory is about 29 times as large.
    public init(_ model: Model, maxPieceBytes: Int? = nil) throws {
        var params = defaults(mor_tokenizer_params(), mor_tokenizer_params_init)
        if let maxPieceBytes { params.max_piece_bytes = try size(maxPieceBytes, "maxPieceBytes") }
        let pointer = try created { mor_tokenizer_create(model.pointer, &params, $0, $1) }
        var info = mor_tokenizer_info()
        info.struct_size = MemoryLayout<mor_tokenizer_info>.stride
        do {
            try check(mor_tokenizer_describe(pointer, &info), mor_tokenizer_last_error(pointer))
        } catch {
            _ = mor_tokenizer_free(pointer)
            throw error
        }
        vocabSize = Int(info.vocab_size)
        bos = Token(exactly: info.bos)
        eos = Token(exactly: info.eos)
        eot = Token(exactly: info.eot)
        addsBos = info.add_bos != 0
        addsEos = info.add_eos != 0
        maxTokenBytes = info.max_token_bytes
        self.pointer = pointer
        self.model = model
    }

    deinit { _ = mor_tokenizer_free(pointer) }

    /// The tokens of a text, which is by default a prompt: what begins one comes in front of it.
    public func encode(_ text: String, _ options: EncodeOptions = .addSpecial) throws -> [Token] {
        var text = text
        return try lock.withLock {
            try text.withUTF8 { bytes in
                try bytes.withMemoryRebound(to: CChar.self) { try encode($0, options) }
            }
        }
    }

    private func encode(
        _ text: UnsafeBufferPointer<CChar>, _ options: EncodeOptions
    ) throws -> [Token] {
        // A text without bytes is still a text.
        let empty: [CChar] = [0]
        return try empty.withUnsafeBufferPointer { empty in
            let start = text.baseAddress ?? empty.baseAddress
            return try list { tokens, capacity, count in
                mor_tokenizer_encode(
                    pointer, start, text.count, options.rawValue, tokens, capacity, count)
            } reason: {
                mor_tokenizer_last_error(pointer)
            }
        }
    }

    /// The text of some tokens; what is no valid UTF-8 becomes U+FFFD. With `special` control tokens
    /// are written by their names; without it they are no text.
    public func decode(_ tokens: [Token], special: Bool = false) throws -> String {
        try lock.withLock {
            try text(
                {
                    mor_tokenizer_decode(
                        pointer, tokens, tokens.count, Self.decodeFlags(special), $0, $1, $2)
                }, reason: mor_tokenizer_last_error(pointer))
        }
    }

    /// The characters that are complete with one more token of a text whose tokens come one by one, as a batch gives
    /// them. What is no valid UTF-8 becomes U+FFFD.
    public func decodeNext(
        _ token: Token, in stream: inout DecodeStream, special: Bool = false
    ) throws -> String {
        try lock.withLock {
            try text(
                {
                    mor_tokenizer_decode_next(
                        pointer, &stream.state, token, Self.decodeFlags(special), $0, $1, $2)
                }, reason: mor_tokenizer_last_error(pointer))
        }
    }

    /// Ends such a text: U+FFFD if a character was left incomplete, else nothing.
    public func decodeEnd(_ stream: inout DecodeStream) throws -> String {
        try lock.withLock {
            try text(
                { mor_tokenizer_decode_end(pointer, &stream.state, $0, $1, $2) },
                reason: mor_tokenizer_last_error(pointer))
        }
    }

    /// The bytes that one token adds to a text; they need not be whole characters.
    public func bytes(of token: Token, special: Bool = false) throws -> [UInt8] {
        try lock.withLock {
            var start: UnsafePointer<CChar>?
            var count = 0
            let flags = Self.decodeFlags(special)
            try check(
                mor_tokenizer_token_bytes(pointer, token, flags, &start, &count),
                mor_tokenizer_last_error(pointer))
            return UnsafeBufferPointer(start: start, count: count).map { UInt8(bitPattern: $0) }
        }
    }

    /// Whether nothing is to be generated after a token.
    public func isEnd(_ token: Token) throws -> Bool {
        try lock.withLock {
            var end = false
            try check(
                mor_tokenizer_is_end(pointer, token, &end), mor_tokenizer_last_error(pointer))
            return end
        }
    }

    /// A conversation as the text that the model was trained on, by the chat template in its file.
    /// Encode it with ``EncodeOptions/parseSpecial``. With `addPrompt` it ends where the assistant is
    /// to speak.
    public func formatChat(_ messages: [ChatMessage], addPrompt: Bool = true) throws -> String {
        let texts = messages.flatMap { [$0.role, $0.content] }
        return try withCStrings(texts, "a message") { texts in
            let turns = stride(from: 0, to: texts.count, by: 2).map {
                mor_chat_message(role: texts[$0], content: texts[$0 + 1])
            }
            return try lock.withLock {
                try text(
                    {
                        mor_tokenizer_format_chat(
                            pointer, turns, turns.count, addPrompt, $0, $1, $2)
                    }, reason: mor_tokenizer_last_error(pointer))
            }
        }
    }

    private static func decodeFlags(_ special: Bool) -> UInt32 {
        special ? UInt32(MOR_DECODE_SPECIAL) : 0
    }
}

/// A text whose tokens come one by one (``Tokenizer/decodeNext(_:in:special:)``): one for each text. A copy goes on from
/// the same place, as a fork of a sequence does.
public struct DecodeStream: Sendable {
    var state = mor_decode_stream()

    /// A text at its beginning.
    public init() {}
}

/// A list that C writes to a buffer: asked first for its length.
func list<T: ExpressibleByIntegerLiteral>(
    _ write: (UnsafeMutablePointer<T>?, Int, UnsafeMutablePointer<Int>) -> mor_status,
    reason: () -> UnsafePointer<CChar>?
) throws -> [T] {
    var count = 0
    let asked = write(nil, 0, &count)
    if asked != MOR_ERROR_BUFFER_TOO_SMALL {
        try check(asked, reason())
        return []
    }
    var items = [T](repeating: 0, count: count)
    try check(write(&items, items.count, &count), reason())
    return items
}
