import CMor
import Foundation

/// Memory for one session at a time: taken once, so that sessions may come and go without asking the
/// system for any.
///
/// Safe to send: one session at a time has it, which the lock sees to.
public final class SessionMemory: @unchecked Sendable {
    /// How many bytes there are.
    public let bytes: Int
    let pointer: UnsafeMutableRawPointer
    private let lock = NSLock()
    private var taken = false

    /// Takes as much as a session of this plan needs.
    public init(for plan: MemoryPlan) {
        bytes = plan.bytes
        pointer = .allocate(byteCount: plan.bytes, alignment: plan.alignment)
    }

    deinit { pointer.deallocate() }

    func claim() throws {
        try lock.withLock {
            guard !taken else { throw MorError(.busy, "another session is in this memory") }
            taken = true
        }
    }

    func release() {
        lock.withLock { taken = false }
    }
}

/// One sequence of tokens in the making, its memory, its helper threads and its sampler.
///
/// A session runs its calls one after the other, on a queue of its own. Only ``cancel()`` and
/// ``resetCancel()`` may come at any time. Cancelling the task that waits for ``prefill(_:)``,
/// ``step(_:)`` or a generation ends it within the time of one layer.
public actor Session {
    /// Who decides which tokens go on to the next recursion of an expert-choice model.
    public enum Routing: UInt32, Sendable {
        /// Each token's own score, against the cut: causal, for generating.
        case threshold
        /// The best of the whole text, as the paper trains and scores. The text must come as one
        /// ``Session/prefill(_:)`` into an empty session whose batch size holds it.
        case capacity
    }

    /// The model.
    public nonisolated let model: Model
    /// What it took when it was created.
    public nonisolated let plan: MemoryPlan
    /// Why the last generation ended; nil before the first, and when it failed.
    public internal(set) var lastFinish: Finish?

    nonisolated let handle: Handle
    private nonisolated let executor: QueueExecutor

    public nonisolated var unownedExecutor: UnownedSerialExecutor {
        executor.asUnownedSerialExecutor()
    }

    /// What a session will take, to the byte. Takes no memory.
    public static func plan(
        for model: Model, _ parameters: SessionParameters = SessionParameters()
    ) throws -> MemoryPlan {
        try MemoryPlan(model, parameters)
    }

    /// Creates a session in memory of its own, as much as ``plan(for:_:)`` says, and starts its
    /// helper threads.
    public init(_ model: Model, _ parameters: SessionParameters = SessionParameters()) throws {
        try self.init(model, parameters, nil) { params, out, error in
            mor_session_create(model.pointer, params, out, error)
        }
    }

    /// As above, in memory that was taken before, of at least the plan's bytes. The session keeps it
    /// until it is closed or its last reference gone.
    public init(
        _ model: Model, _ parameters: SessionParameters = SessionParameters(),
        in memory: SessionMemory
    ) throws {
        try memory.claim()
        do {
            try self.init(model, parameters, memory) { params, out, error in
                mor_session_create_in(
                    model.pointer, params, memory.pointer, memory.bytes, out, error)
            }
        } catch {
            memory.release()
            throw error
        }
    }

    private init(
        _ model: Model, _ parameters: SessionParameters, _ memory: SessionMemory?,
        _ create: (
            UnsafePointer<mor_session_params>, UnsafeMutablePointer<OpaquePointer?>,
            UnsafeMutablePointer<mor_error>
        ) -> mor_status
    ) throws {
        plan = try MemoryPlan(model, parameters)
        let pointer = try parameters.withC { params in
            try created { create(params, $0, $1) }
        }
        handle = Handle("session", pointer) {
            _ = mor_session_free($0)
            memory?.release()
        }
        executor = QueueExecutor("mor.session")
        self.model = model
    }

    /// Gives the session's memory back now and not with its last reference. Later calls fail.
    public func close() { handle.close() }

    // MARK: Cancelling

    /// Ends the session's call in progress within the time of one layer, or its next call at once.
    /// One cancel ends one call: ``prefill(_:)``, ``prefillWhole(_:)``, ``logProbabilities(_:)`` and ``step(_:)`` with
    /// ``MorError/Status/cancelled``, a generation with ``Finish/cancelled``. Never blocks.
    public nonisolated func cancel() {
        handle.ifLive { _ = mor_session_cancel($0) }
    }

    /// Takes back a cancel that no call has met yet.
    public nonisolated func resetCancel() {
        handle.ifLive { _ = mor_session_reset_cancel($0) }
    }

    // MARK: Running tokens

    /// Runs tokens after those so far. On a failure the session is as it was before.
    public func prefill(_ tokens: [Token]) async throws {
        try await cancellable {
            try handle.call { mor_session_prefill($0, tokens, tokens.count) }
        }
    }

    /// Makes the session hold this text and nothing else, as a chat does each turn: of the beginning that it holds already
    /// nothing is run again (but with capacity routing everything). Answers how many tokens stayed. After a failure while
    /// tokens ran, such as a cancel, the session holds the common beginning, as after a rewind.
    @discardableResult
    public func prefillWhole(_ tokens: [Token]) async throws -> Int {
        try await cancellable {
            var kept = 0
            try handle.call { mor_session_prefill_whole($0, tokens, tokens.count, &kept) }
            return kept
        }
    }

    /// Runs tokens after those so far, of which there must be some. Answers the natural logarithm of each one's probability
    /// (the softmax of the logits, whatever the sampler would do) after all before it; the sum says how likely the tokens are
    /// as a continuation. Not with capacity routing, which wants the whole text at once. On a failure the session is as it
    /// was before.
    public func logProbabilities(_ tokens: [Token]) async throws -> [Float] {
        try await cancellable {
            var numbers = [Float](repeating: 0, count: tokens.count)
            try handle.call { mor_session_log_probabilities($0, tokens, tokens.count, &numbers) }
            return numbers
        }
    }

    /// Runs one token; answers the logits of what follows it, one for each token of the vocabulary.
    @discardableResult
    public func step(_ token: Token) async throws -> [Float] {
        try await cancellable {
            var start: UnsafePointer<Float>?
            try handle.call { mor_session_step($0, token, &start) }
            return Array(UnsafeBufferPointer(start: start, count: model.description.vocabSize))
        }
    }

    /// The logits of what follows the last token.
    public func logits() throws -> [Float] {
        try withLogits { Array($0) }
    }

    /// As ``logits()``, without a copy. The numbers stand for the time of the call.
    public func withLogits<R: Sendable>(
        _ body: @Sendable (UnsafeBufferPointer<Float>) throws -> R
    ) throws -> R {
        var start: UnsafePointer<Float>?
        var count = 0
        try handle.call { mor_session_logits($0, &start, &count) }
        return try body(UnsafeBufferPointer(start: start, count: count))
    }

    /// Sets how ``sample()`` and generations draw tokens from now on; the random sequence begins at
    /// its seed. A new session draws with the defaults.
    public func setSampler(_ sampler: Sampler) throws {
        var params = try sampler.c()
        try handle.call { mor_session_set_sampler($0, &params) }
    }

    /// Draws a token from the logits after the last one. It is not run.
    public func sample() throws -> Token {
        try handle.value(0) { mor_session_sample($0, $1) }
    }

    // MARK: What there is

    /// How many tokens the sequence has so far.
    public var length: Int {
        get throws { try handle.value(0) { mor_session_length($0, $1) } }
    }

    /// The tokens so far.
    public var tokens: [Token] {
        get throws { try tokens(in: 0..<length) }
    }

    /// Those at some positions.
    public func tokens(in positions: Range<Int>) throws -> [Token] {
        try known(positions)
        return try handle.items(0, positions.count) {
            mor_session_tokens($0, positions.lowerBound, $1.count, $1.baseAddress)
        }
    }

    /// The recursions that each token so far ran; 0 where the router let one pass by.
    public var depths: [UInt8] {
        get throws { try depths(in: 0..<length) }
    }

    /// Those at some positions.
    public func depths(in positions: Range<Int>) throws -> [UInt8] {
        try known(positions)
        return try handle.items(0, positions.count) {
            mor_session_depths($0, positions.lowerBound, $1.count, $1.baseAddress)
        }
    }

    /// Refuses positions before they cost memory.
    private func known(_ positions: Range<Int>) throws {
        guard positions.lowerBound >= 0, try positions.upperBound <= length else {
            throw MorError(
                .invalidArgument,
                "positions \(positions) were asked for; there are \(try length) tokens")
        }
    }

    /// How many of the tokens so far ran each number of recursions, from 0 to the model's.
    public var depthHistogram: [UInt64] {
        get throws {
            try handle.items(0, model.description.recursions + 1) {
                mor_session_depth_histogram($0, $1.baseAddress, $1.count)
            }
        }
    }

    /// Bytes of KV pages in use.
    public var kvBytesUsed: Int {
        get throws { try handle.value(0) { mor_session_kv_bytes_used($0, $1) } }
    }

    // MARK: Settings

    /// Sets the routers' cut from the next token on, from 0 (every token runs all recursions) to 1
    /// (none runs any). Higher is faster and coarser.
    public func setCut(_ cut: Float) throws {
        try handle.call { mor_session_set_cut($0, cut) }
    }

    /// Limits the recursions of tokens from the next one on, from 1 to the model's.
    public func setDepthLimit(_ limit: Int) throws {
        let limit: UInt32 = try number(limit, "the depth limit")
        try handle.call { mor_session_set_depth_limit($0, limit) }
    }

    /// Sets the time that a token should take: an aim, not a bound. The deepest recursions are left
    /// out when they would not be done in time. nil sets none.
    public func setTimeBudget(_ budget: Duration?) throws {
        let (seconds, attoseconds) = (budget ?? .zero).components
        let (whole, overflow) = seconds.multipliedReportingOverflow(by: 1_000_000_000)
        let nanoseconds = UInt64(exactly: whole)?.addingReportingOverflow(
            UInt64(clamping: attoseconds / 1_000_000_000))
        guard !overflow, let nanoseconds, !nanoseconds.overflow, attoseconds >= 0 else {
            throw MorError(.invalidArgument, "the time budget is out of range")
        }
        try handle.call { mor_session_set_time_budget($0, nanoseconds.partialValue) }
    }

    /// Sets who decides which tokens go on, from the next call on.
    public func setRouting(_ routing: Routing) throws {
        try handle.call { mor_session_set_routing($0, routing.rawValue) }
    }

    // MARK: Going back

    /// Forgets all tokens from a position on. The logits are gone: run a token to get new ones.
    public func rewind(to length: Int) throws {
        let length = try size(length, "the length")
        try handle.call { mor_session_rewind($0, length) }
    }

    /// The sequence so far: tokens, depths, keys and values, and where the sampler's random sequence
    /// stands. Settings are not part of it.
    public func save() throws -> Data {
        let session = try handle.live()
        var count = try handle.value(0) { mor_session_save_size($0, $1) }
        var state = Data(count: count)
        let status = state.withUnsafeMutableBytes {
            mor_session_save(session, $0.baseAddress, $0.count, &count)
        }
        try check(status, mor_session_last_error(session))
        return state
    }

    /// Replaces the sequence so far by a saved one, of this or another session of the same model file
    /// and KV type. A state is not trusted: what is damaged is refused, and the session is as before.
    public func restore(_ state: Data) throws {
        try handle.call { session in
            state.withUnsafeBytes { bytes in
                withUnsafePointer(to: 0) { nothing in
                    mor_session_restore(
                        session, bytes.baseAddress ?? UnsafeRawPointer(nothing), bytes.count)
                }
            }
        }
    }

    // MARK: How calls are made

    /// A call that ends when the task does.
    private func cancellable<R: Sendable>(_ body: () throws -> R) async throws -> R {
        let cancellation = Cancellation(handle)
        return try await withTaskCancellationHandler {
            guard cancellation.begin() else { throw MorError(.cancelled) }
            defer { cancellation.end() }
            return try body()
        } onCancel: {
            cancellation.request()
        }
    }
}

/// Calls on a session. They are no part of the actor, for what they pass on is not shared with it.
extension Handle {
    func call(_ body: (OpaquePointer) throws -> mor_status) throws {
        let session = try live()
        try check(try body(session), mor_session_last_error(session))
    }

    func value<V>(
        _ empty: V, _ ask: (OpaquePointer, UnsafeMutablePointer<V>) -> mor_status
    ) throws -> V {
        var answer = empty
        try call { ask($0, &answer) }
        return answer
    }

    func items<T>(
        _ empty: T, _ count: Int,
        _ ask: (OpaquePointer, UnsafeMutableBufferPointer<T>) -> mor_status
    ) throws -> [T] {
        var items = [T](repeating: empty, count: count)
        try items.withUnsafeMutableBufferPointer { buffer in
            try call { ask($0, buffer) }
        }
        return items
    }
}
