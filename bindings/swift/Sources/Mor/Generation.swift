import CMor
import Foundation

/// What to generate.
public struct GenerateOptions: Sendable {
    /// Most tokens to write; nil: as many as the context holds.
    public var maxTokens: Int?
    /// Texts that end the generation and are not part of it, of at most 1024 bytes each.
    public var stop: [String]

    /// Options with these values.
    public init(maxTokens: Int? = nil, stop: [String] = []) {
        self.maxTokens = maxTokens
        self.stop = stop
    }
}

/// One token of a generation, as it comes.
public struct Piece: Sendable, Equatable {
    /// The token, which has been run and is part of the session.
    public let token: Token
    /// Recursions that it ran.
    public let depth: Int
    /// The text that is certain with this token: whole characters, nothing that may still turn out
    /// to be a stop string. Often empty; the last piece of a generation may repeat the last token
    /// with the rest of the text.
    public let text: String

    /// A piece that did not come from a model: something to show beside those that did.
    public init(token: Token = 0, depth: Int = 0, text: String) {
        self.token = token
        self.depth = depth
        self.text = text
    }
}

/// Why a generation, or a sequence of a batch, ended.
public enum Finish: UInt32, Sendable {
    /// The model drew a token that ends a text; it is neither run nor shown.
    case end
    /// A stop string came up. Its tokens, which were not shown, were run and are in the session:
    /// ``Session/rewind(to:)`` takes them out before the text goes on.
    case stop
    /// As many tokens were written as were asked for.
    case length
    /// The context is full.
    case contextFull
    /// Whoever took the pieces asked for it.
    case callback
    /// It was cancelled; the session stands after the last token that was run.
    case cancelled
    /// Of a batch's sequence: ``Batch/stop(_:)``.
    case stopped
    /// Of a batch's sequence: the model computed a value that is not finite, or too large for the type
    /// of keys and values.
    case failed

    init(_ c: mor_finish) {
        self = Finish(rawValue: UInt32(c.rawValue)) ?? .failed
    }
}

extension Session {
    /// Continues the text so far, with the session's sampler. Needs a prompt first.
    ///
    /// The generation begins at once, when the calls before it are done, and does not wait for those
    /// who read the stream. It ends when the stream is cancelled: when the task that reads it is, or
    /// when nobody reads it any more. The session then stands after the last token that was run;
    /// calls that are made once its first piece came wait until the generation has ended.
    /// ``Session/lastFinish`` says why it did.
    public nonisolated func generate(
        _ options: GenerateOptions = GenerateOptions()
    ) -> AsyncThrowingStream<Piece, any Error> {
        let (stream, continuation) = AsyncThrowingStream<Piece, any Error>.makeStream()
        let cancellation = Cancellation(handle)
        continuation.onTermination = { _ in cancellation.request() }
        Task {
            do {
                _ = try await run(options, cancellation) { piece in
                    if case .terminated = continuation.yield(piece) { return false }
                    return true
                }
                continuation.finish()
            } catch {
                continuation.finish(throwing: error)
            }
        }
        return stream
    }

    /// As ``generate(_:)``, with a function that takes each piece before the next token is run, on
    /// the session's queue, and answers whether to go on. It may call ``Session/cancel()``.
    @discardableResult
    public func generate(
        _ options: GenerateOptions = GenerateOptions(),
        onPiece: @escaping @Sendable (Piece) -> Bool
    ) async throws -> Finish {
        let cancellation = Cancellation(handle)
        return try await withTaskCancellationHandler {
            try run(options, cancellation, onPiece)
        } onCancel: {
            cancellation.request()
        }
    }

    private func run(
        _ options: GenerateOptions, _ cancellation: Cancellation,
        _ onPiece: @escaping @Sendable (Piece) -> Bool
    ) throws -> Finish {
        lastFinish = nil
        guard cancellation.begin() else {
            lastFinish = .cancelled
            return .cancelled
        }
        defer { cancellation.end() }
        let finish = try handle.generate(options, Sink(onPiece))
        lastFinish = finish
        return finish
    }
}

extension Handle {
    fileprivate func generate(_ options: GenerateOptions, _ sink: Sink) throws -> Finish {
        var params = defaults(mor_generate_params(), mor_generate_params_init)
        if let maxTokens = options.maxTokens {
            params.max_tokens = try size(maxTokens, "maxTokens")
        }
        params.callback = takePiece
        params.user_data = Unmanaged.passUnretained(sink).toOpaque()
        var finish = MOR_FINISH_END
        try withExtendedLifetime(sink) {
            try withCStrings(options.stop, "a stop string") { stops in
                try stops.withUnsafeBufferPointer { stops in
                    params.stop = stops.baseAddress
                    params.stop_count = stops.count
                    try call { mor_session_generate($0, &params, &finish) }
                }
            }
        }
        return Finish(finish)
    }
}

/// Who takes the pieces, as C holds it.
private final class Sink: Sendable {
    let take: @Sendable (Piece) -> Bool

    init(_ take: @escaping @Sendable (Piece) -> Bool) { self.take = take }
}

private func takePiece(
    _ userData: UnsafeMutableRawPointer?, _ piece: UnsafePointer<mor_piece>?
) -> Bool {
    guard let userData, let piece = piece?.pointee else { return false }
    let text = UnsafeRawBufferPointer(start: piece.text, count: piece.text_bytes)
    return Unmanaged<Sink>.fromOpaque(userData).takeUnretainedValue().take(
        Piece(
            token: piece.token, depth: Int(piece.depth), text: String(decoding: text, as: UTF8.self)
        ))
}

/// Carries the cancel of a task to the call that the task waits for, and to no other: a session's
/// cancel ends whatever call is in progress, or the next.
///
/// Safe to send: all of it is under the lock.
final class Cancellation: @unchecked Sendable {
    private let lock = NSLock()
    private let session: Handle
    private var requested = false
    private var running = false

    init(_ session: Handle) { self.session = session }

    func request() {
        lock.withLock {
            requested = true
            if running { session.ifLive { _ = mor_session_cancel($0) } }
        }
    }

    /// Whether the call may begin.
    func begin() -> Bool {
        lock.withLock {
            running = !requested
            return running
        }
    }

    func end() {
        lock.withLock {
            running = false
            // What came too late for this call is not for the next.
            if requested { session.ifLive { _ = mor_session_reset_cancel($0) } }
        }
    }
}
