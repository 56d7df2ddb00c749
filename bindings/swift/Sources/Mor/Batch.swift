import CMor
import Foundation

/// Many sequences at once, batched by depth: each ``tick()`` runs the shared block once over all
/// tokens that need it, whatever their sequence and recursion. What a sequence gets does not depend
/// on who else is there: the same bits as in a ``Session`` of its own.
///
/// A batch runs its calls one after the other, on a queue of its own.
public actor Batch {
    /// Names a sequence of a batch; no number is used twice.
    public struct SequenceID: Hashable, Sendable {
        /// The number that the library gave.
        public let rawValue: UInt64
    }

    /// What a new sequence is to do.
    public struct Request: Sendable {
        /// Its tokens; for a fork, those after the common beginning.
        public var prompt: [Token]
        /// Most tokens to generate; 0 only runs the prompt; nil: as many as the context holds.
        public var maxTokens: Int?
        /// How tokens are drawn.
        public var sampler: Sampler
        /// The routers' cut; nil: as the model was trained and, for a fork, as its parent.
        public var cut: Float?
        /// The most recursions of a token; nil: all and, for a fork, as its parent.
        public var depthLimit: Int?
        /// Under pressure sequences of lower priority give way; of equals the later.
        public var priority: Int
        /// Go on after tokens that end a text.
        public var ignoresEnd: Bool

        /// A request with these values.
        public init(
            prompt: [Token] = [], maxTokens: Int? = nil, sampler: Sampler = Sampler(),
            cut: Float? = nil, depthLimit: Int? = nil, priority: Int = 0, ignoresEnd: Bool = false
        ) {
            self.prompt = prompt
            self.maxTokens = maxTokens
            self.sampler = sampler
            self.cut = cut
            self.depthLimit = depthLimit
            self.priority = priority
            self.ignoresEnd = ignoresEnd
        }

        /// As C takes it, for the time of a call.
        func withC(_ body: (UnsafePointer<mor_batch_request>) throws -> Void) throws {
            var c = defaults(mor_batch_request(), mor_batch_request_init)
            var drawing = try sampler.c()
            if let maxTokens { c.max_tokens = try size(maxTokens, "maxTokens") }
            if let cut {
                // Below 0 would mean that none is given.
                guard cut >= 0 else {
                    throw MorError(
                        .invalidArgument, "the cut is \(cut); it must be between 0 and 1")
                }
                c.cut = cut
            }
            if let depthLimit {
                guard depthLimit > 0 else {
                    throw MorError(
                        .invalidArgument, "the depth limit is \(depthLimit); it must be positive")
                }
                c.depth_limit = try number(depthLimit, "the depth limit")
            }
            c.priority = try number(priority, "priority")
            c.ignore_end = ignoresEnd ? 1 : 0
            try prompt.withUnsafeBufferPointer { prompt in
                try withUnsafePointer(to: &drawing) { drawing in
                    c.prompt = prompt.baseAddress
                    c.prompt_count = prompt.count
                    c.sampler = drawing
                    try body(&c)
                }
            }
        }
    }

    /// What a tick brought for a sequence.
    public enum Event: Sendable, Equatable {
        /// A token was drawn, after one that ran so many recursions. It is run by a later tick.
        case token(SequenceID, Token, depth: Int)
        /// It gave its pages back and waits.
        case evicted(SequenceID)
        /// It was evicted and runs again.
        case resumed(SequenceID)
        /// The KV pool has no page for it; it stands still until ``Batch/resume(_:)``.
        case full(SequenceID)
        /// It ended. Its tokens can be read, and forks made of it, until it is removed.
        case finished(SequenceID, Finish)

        init?(_ c: mor_batch_event) {
            let sequence = SequenceID(rawValue: c.sequence)
            switch c.kind {
            case MOR_EVENT_TOKEN: self = .token(sequence, c.token, depth: Int(c.depth))
            case MOR_EVENT_EVICTED: self = .evicted(sequence)
            case MOR_EVENT_RESUMED: self = .resumed(sequence)
            case MOR_EVENT_FULL: self = .full(sequence)
            case MOR_EVENT_FINISHED: self = .finished(sequence, Finish(c.finish))
            // A kind that a newer library added.
            default: return nil
            }
        }
    }

    /// Where a sequence stands.
    public enum Status: Sendable, Equatable {
        /// It waits for pages of the KV pool, or for the first tick.
        case waiting
        /// Its tokens are being run.
        case running
        /// The KV pool has no page for it.
        case full
        /// It is done.
        case finished(Finish)
    }

    /// What a batch ran since it was created.
    public struct Counters: Sendable, Equatable {
        /// Ticks that ran anything.
        public let ticks: UInt64
        /// Rows for which there was room in the passes of the recursions.
        public let rowCapacity: UInt64
        /// Rows that passed the last layers.
        public let finished: UInt64
        /// Rows of logits.
        public let logits: UInt64
        /// Sequences that gave their pages back.
        public let evictions: UInt64
        /// Rows of the passes of the recursions, by recursion from 0.
        public let rows: [UInt64]
    }

    /// The model.
    public nonisolated let model: Model
    private nonisolated let handle: Handle
    private nonisolated let executor: QueueExecutor

    public nonisolated var unownedExecutor: UnownedSerialExecutor {
        executor.asUnownedSerialExecutor()
    }

    // MARK: Plans

    /// What a batch will take, to the byte. Takes no memory.
    public static func plan(for model: Model, _ parameters: BatchParameters) throws -> MemoryPlan {
        try MemoryPlan(parameters) { mor_batch_plan(model.pointer, $0, $1, $2) }
    }

    /// The plan with the most sequences whose block of memory, or on a GPU what it takes there, has at
    /// most so many bytes, when a token runs `meanDepth` recursions on average. The parameters' `sequences` and `kvPages` do not matter.
    public static func plan(
        for model: Model, _ parameters: BatchParameters, meanDepth: Double, bytes: Int
    ) throws -> MemoryPlan {
        let bytes = try size(bytes, "bytes")
        return try MemoryPlan(parameters) {
            mor_batch_plan_in(model.pointer, $0, meanDepth, bytes, $1, $2)
        }
    }

    /// Pages of the KV pool that the sequences take when their contexts are full and a token runs
    /// `meanDepth` recursions on average: a value for ``BatchParameters/kvPages``.
    public static func pages(
        for model: Model, _ parameters: BatchParameters, meanDepth: Double
    ) throws -> Int {
        var pages = 0
        try parameters.withC { params in
            try checked { mor_batch_pages_for(model.pointer, params, meanDepth, &pages, $0) }
        }
        return pages
    }

    /// Creates a batch in memory of its own and starts its helper threads.
    public init(_ model: Model, _ parameters: BatchParameters = BatchParameters()) throws {
        let pointer = try parameters.withC { params in
            try created { mor_batch_create(model.pointer, params, $0, $1) }
        }
        handle = Handle("batch", pointer) { _ = mor_batch_free($0) }
        executor = QueueExecutor("mor.batch")
        self.model = model
    }

    /// Gives the batch's memory back now and not with its last reference. Later calls fail.
    public func close() { handle.close() }

    // MARK: Sequences

    /// Adds a sequence. Nothing is run yet: ``tick()`` does that.
    public func add(_ request: Request) throws -> SequenceID {
        try make(request) { mor_batch_add($0, $1, $2) }
    }

    /// Adds a sequence that begins with the first tokens of another, whose keys and values it shares
    /// as far as they are there. It has its parent's cut and depth limit.
    public func fork(
        _ parent: SequenceID, length: Int, _ request: Request = Request()
    ) throws -> SequenceID {
        let length = try size(length, "the length")
        return try make(request) { mor_batch_fork($0, parent.rawValue, length, $1, $2) }
    }

    private func make(
        _ request: Request,
        _ add: (OpaquePointer, UnsafePointer<mor_batch_request>, UnsafeMutablePointer<UInt64>)
            -> mor_status
    ) throws -> SequenceID {
        var sequence: UInt64 = 0
        try request.withC { request in
            try call { add($0, request, &sequence) }
        }
        return SequenceID(rawValue: sequence)
    }

    /// Ends a sequence, with ``Finish/stopped`` and no event; its tokens stay.
    public func stop(_ sequence: SequenceID) throws {
        try call { mor_batch_stop($0, sequence.rawValue) }
    }

    /// Forgets a sequence, in whatever state: its place and its pages are free for others.
    public func remove(_ sequence: SequenceID) throws {
        try call { mor_batch_remove($0, sequence.rawValue) }
    }

    /// Lets a sequence that stands still because the KV pool was full try again.
    public func resume(_ sequence: SequenceID) throws {
        try call { mor_batch_resume($0, sequence.rawValue) }
    }

    /// Where a sequence stands.
    public func status(of sequence: SequenceID) throws -> Status {
        var status = MOR_SEQUENCE_WAITING
        var finish = MOR_FINISH_END
        try call { mor_batch_sequence_status($0, sequence.rawValue, &status, &finish) }
        switch status {
        case MOR_SEQUENCE_RUNNING: return .running
        case MOR_SEQUENCE_FULL: return .full
        case MOR_SEQUENCE_FINISHED: return .finished(Finish(finish))
        default: return .waiting
        }
    }

    /// The tokens of a sequence so far, its prompt among them.
    public func tokens(of sequence: SequenceID) throws -> [Token] {
        let batch = try handle.live()
        return try list {
            mor_batch_tokens(batch, sequence.rawValue, $0, $1, $2)
        } reason: {
            mor_batch_last_error(batch)
        }
    }

    /// The recursions that the tokens of a sequence ran; those that have not passed all layers yet,
    /// the last that was drawn among them, are left out.
    public func depths(of sequence: SequenceID) throws -> [UInt8] {
        let batch = try handle.live()
        return try list {
            mor_batch_depths(batch, sequence.rawValue, $0, $1, $2)
        } reason: {
            mor_batch_last_error(batch)
        }
    }

    /// Why a sequence ended with ``Finish/failed``; nil when it did not.
    public func failure(of sequence: SequenceID) throws -> MorError? {
        var failure = mor_error()
        try call { mor_batch_failure($0, sequence.rawValue, &failure) }
        return failure.status == MOR_OK ? nil : MorError(failure.status, text(of: failure))
    }

    // MARK: Running

    /// One pass over the weights: new tokens enter, every token in the recursions runs its next one,
    /// those that leave are finished, and what follows them is drawn. Answers what happened: often
    /// nothing, while tokens are in the recursions.
    public func tick() throws -> [Event] {
        var start: UnsafePointer<mor_batch_event>?
        var count = 0
        try call { mor_batch_tick($0, &start, &count) }
        return UnsafeBufferPointer(start: start, count: count).compactMap(Event.init)
    }

    /// Ticks until there is nothing left to run or the stream is cancelled: when the task that reads
    /// it is, or when nobody reads it any more. Other calls may come between two ticks.
    public nonisolated func run() -> AsyncThrowingStream<Event, any Error> {
        AsyncThrowingStream { continuation in
            let task = Task {
                do {
                    while try await !isIdle, !Task.isCancelled {
                        for event in try await tick() { continuation.yield(event) }
                    }
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
            continuation.onTermination = { _ in task.cancel() }
        }
    }

    /// Whether no sequence waits or runs.
    public var isIdle: Bool {
        get throws {
            var idle = false
            try call { mor_batch_is_idle($0, &idle) }
            return idle
        }
    }

    /// Bytes of KV pages in use. A page that several sequences share counts once.
    public var kvBytesUsed: Int {
        get throws {
            var bytes = 0
            try call { mor_batch_kv_bytes_used($0, &bytes) }
            return bytes
        }
    }

    /// What the batch ran so far.
    public var counters: Counters {
        get throws {
            var c = mor_batch_counters_info()
            c.struct_size = MemoryLayout<mor_batch_counters_info>.stride
            try call { mor_batch_counters($0, &c) }
            let rows = withUnsafeBytes(of: c.rows) { Array($0.bindMemory(to: UInt64.self)) }
            return Counters(
                ticks: c.ticks, rowCapacity: c.row_capacity, finished: c.finished, logits: c.logits,
                evictions: c.evictions, rows: Array(rows.prefix(model.description.recursions)))
        }
    }

    /// Switches to ordinary batching, to compare with: everyone waits for the deepest. Results do not
    /// depend on it.
    public func setInStep(_ inStep: Bool) throws {
        try call { mor_batch_set_in_step($0, inStep) }
    }

    private func call(_ body: (OpaquePointer) -> mor_status) throws {
        let batch = try handle.live()
        try check(body(batch), mor_batch_last_error(batch))
    }
}
