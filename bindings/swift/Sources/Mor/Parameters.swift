import CMor

/// How keys and values are stored.
public enum KVType: UInt32, Sendable {
    /// 2 bytes a number.
    case f16
    /// 34 bytes for 32 numbers; the width of a head must be a multiple of 32.
    case q8_0
    /// 4 bytes a number: as computed, for exact comparisons.
    case f32
}

/// What a ``Session`` is planned for.
public struct SessionParameters: Sendable {
    /// Most tokens of the sequence; nil: as many as the model was trained for.
    public var context: Int?
    /// Most tokens of one pass over the weights; nil: 64, on a GPU 512. Results do not depend on it.
    public var batchSize: Int?
    /// Threads that share the work, the caller's included; nil: one for each core. Results do not
    /// depend on it.
    public var threads: Int?
    /// How keys and values are stored.
    public var kvType = KVType.f16
    /// Pages of the KV pool, of 16 entries each; nil: enough for every token to take every recursion.
    public var kvPages: Int?
    /// The CPUs that helper threads may run on; empty: any. Linux and Android only.
    public var cpus: [UInt32] = []
    /// Niceness of the helper threads, from -20 to 19. Linux and Android only.
    public var niceness = 0
    /// Rows of logits that ``Session/logProbabilities(_:)`` computes together, each of which takes 4 bytes for every token of
    /// the vocabulary; nil: 1. 16 or more are faster where texts are scored.
    public var logitRows: Int?
    /// Touch every page of the session's memory when it is created.
    public var prefault = false
    /// Keep the session's memory from being swapped out.
    public var lock = false

    /// Parameters with these values; the rest are properties.
    public init(
        context: Int? = nil, batchSize: Int? = nil, threads: Int? = nil, kvType: KVType = .f16,
        kvPages: Int? = nil
    ) {
        self.context = context
        self.batchSize = batchSize
        self.threads = threads
        self.kvType = kvType
        self.kvPages = kvPages
    }

    /// As C takes it, for the time of a call.
    func withC<R>(_ body: (UnsafePointer<mor_session_params>) throws -> R) throws -> R {
        var c = defaults(mor_session_params(), mor_session_params_init)
        if let context { c.context = try size(context, "context") }
        if let batchSize { c.batch = try size(batchSize, "batchSize") }
        if let threads { c.threads = try number(threads, "threads") }
        if let kvPages { c.kv_pages = try size(kvPages, "kvPages") }
        if let logitRows { c.logit_rows = try size(logitRows, "logitRows") }
        c.kv_type = kvType.rawValue
        c.niceness = try number(niceness, "niceness")
        c.prefault = prefault ? 1 : 0
        c.lock = lock ? 1 : 0
        return try cpus.withUnsafeBufferPointer { cpus in
            c.cpus = cpus.isEmpty ? nil : cpus.baseAddress
            c.cpu_count = cpus.count
            return try body(&c)
        }
    }
}

/// What a ``Batch`` is planned for.
public struct BatchParameters: Sendable {
    /// Who has the pages of the KV pool when there are not enough.
    public enum Pressure: UInt32, Sendable {
        /// The sequence of lowest priority gives its pages back and is run anew when there is room
        /// again, to the same results.
        case evict
        /// The sequence of lowest priority of those that need a page stands still until
        /// ``Batch/resume(_:)``.
        case refuse
    }

    /// Most tokens of a sequence; nil: as many as the model was trained for.
    public var context: Int?
    /// Sequences at a time, those among them that are done and not yet removed.
    public var sequences = 1
    /// Most tokens of one tick's pass over the weights; nil: 64, on a GPU 512. Results do not depend on it.
    public var rows: Int?
    /// Rows of logits that are computed together; nil: one for each sequence, up to 32.
    public var logitRows: Int?
    /// Threads that share the work, the caller's included; nil: one for each core.
    public var threads: Int?
    /// How keys and values are stored.
    public var kvType = KVType.f16
    /// Pages of the KV pool that the sequences share; nil: enough for every token of every sequence
    /// to take every recursion. ``Batch/pages(for:_:meanDepth:)`` says how many do for less.
    public var kvPages: Int?
    /// What happens when the KV pool is full.
    public var pressure = Pressure.evict
    /// The CPUs that helper threads may run on; empty: any. Linux and Android only.
    public var cpus: [UInt32] = []
    /// Niceness of the helper threads, from -20 to 19. Linux and Android only.
    public var niceness = 0
    /// Touch every page of the batch's memory when it is created.
    public var prefault = false
    /// Keep the batch's memory from being swapped out.
    public var lock = false

    /// Parameters with these values; the rest are properties.
    public init(
        sequences: Int = 1, context: Int? = nil, rows: Int? = nil, threads: Int? = nil,
        kvType: KVType = .f16, kvPages: Int? = nil, pressure: Pressure = .evict
    ) {
        self.sequences = sequences
        self.context = context
        self.rows = rows
        self.threads = threads
        self.kvType = kvType
        self.kvPages = kvPages
        self.pressure = pressure
    }

    /// As C takes it, for the time of a call.
    func withC<R>(_ body: (UnsafePointer<mor_batch_params>) throws -> R) throws -> R {
        var c = defaults(mor_batch_params(), mor_batch_params_init)
        c.sequences = try size(sequences, "sequences")
        if let context { c.context = try size(context, "context") }
        if let rows { c.rows = try size(rows, "rows") }
        if let logitRows { c.logit_rows = try size(logitRows, "logitRows") }
        if let threads { c.threads = try number(threads, "threads") }
        if let kvPages { c.kv_pages = try size(kvPages, "kvPages") }
        c.kv_type = kvType.rawValue
        c.pressure = pressure.rawValue
        c.niceness = try number(niceness, "niceness")
        c.prefault = prefault ? 1 : 0
        c.lock = lock ? 1 : 0
        return try cpus.withUnsafeBufferPointer { cpus in
            c.cpus = cpus.isEmpty ? nil : cpus.baseAddress
            c.cpu_count = cpus.count
            return try body(&c)
        }
    }
}

/// What a session or batch will take, to the byte, before it exists.
public struct MemoryPlan: Sendable, Equatable {
    /// Bytes of its one block of memory, which it takes when it is created.
    public let bytes: Int
    /// Bytes that it takes from the heap besides: a batch's list of sequences; 0 for a session.
    public let heapBytes: Int
    /// The pages of the KV cache: of ``bytes``, or of ``deviceBytes`` when the model is on a GPU.
    public let kvBytes: Int
    /// Bytes of KV pages that a token of full depth takes.
    public let kvBytesPerToken: Int
    /// Bytes of address space of the helper threads' stacks.
    public let stackBytes: Int
    /// What the block must be aligned to, in bytes.
    public let alignment: Int
    /// Tokens of a sequence, with the default filled in.
    public let context: Int
    /// Sequences at a time; 1 for a session.
    public let sequences: Int
    /// Tokens of a pass over the weights.
    public let rows: Int
    /// Pages of the KV pool.
    public let kvPages: Int
    /// Threads, the caller's included.
    public let threads: Int
    /// Bytes of the GPU's memory, besides the weights; 0 on the CPU.
    public let deviceBytes: Int
    /// Bytes of the host's memory that are pinned for copies to and from the GPU; 0 on the CPU.
    public let pinnedBytes: Int

    init(_ model: Model, _ parameters: SessionParameters) throws {
        var c = mor_session_plan_info()
        c.struct_size = MemoryLayout<mor_session_plan_info>.stride
        try parameters.withC { params in
            try checked { mor_session_plan(model.pointer, params, &c, $0) }
        }
        bytes = c.bytes
        heapBytes = 0
        kvBytes = c.kv_bytes
        kvBytesPerToken = c.kv_bytes_per_token
        stackBytes = c.stack_bytes
        alignment = c.alignment
        context = c.context
        sequences = 1
        rows = c.batch
        kvPages = c.kv_pages
        threads = Int(c.threads)
        deviceBytes = c.device_bytes
        pinnedBytes = c.pinned_bytes
    }

    init(
        _ parameters: BatchParameters,
        _ plan: (
            UnsafePointer<mor_batch_params>, UnsafeMutablePointer<mor_batch_plan_info>,
            UnsafeMutablePointer<mor_error>
        ) -> mor_status
    ) throws {
        var c = mor_batch_plan_info()
        c.struct_size = MemoryLayout<mor_batch_plan_info>.stride
        try parameters.withC { params in
            try checked { plan(params, &c, $0) }
        }
        bytes = c.bytes
        heapBytes = c.heap_bytes
        kvBytes = c.kv_bytes
        kvBytesPerToken = c.kv_bytes_per_token
        stackBytes = c.stack_bytes
        alignment = Int(MOR_SESSION_ALIGNMENT)
        context = c.context
        sequences = c.sequences
        rows = c.rows
        kvPages = c.kv_pages
        threads = Int(c.threads)
        deviceBytes = c.device_bytes
        pinnedBytes = c.pinned_bytes
    }
}

/// How tokens are drawn. The filters work in this order: penalty, top-k, top-p, min-p, temperature.
public struct Sampler: Sendable, Equatable {
    /// Logits are divided by this before the draw; 0 takes the likeliest token. Default: 0.8.
    public var temperature: Float
    /// Only the likeliest tokens whose probabilities add up to this stay; 1 does nothing. Default:
    /// 0.95.
    public var topP: Float
    /// Only tokens at least this times as likely as the likeliest stay; 0 does nothing. Default: 0.05.
    public var minP: Float
    /// Logits of recent tokens are divided by this where positive and multiplied where negative; 1,
    /// the default, does nothing.
    public var repeatPenalty: Float
    /// Only this many of the likeliest tokens stay; 0 does nothing. Default: 40.
    public var topK: Int
    /// How many tokens back the penalty looks. Default: 64.
    public var repeatLastN: Int
    /// Start of the random sequence: the same seed draws the same tokens. Default: 0.
    public var seed: UInt64

    /// What is left out has the library's default.
    public init(
        temperature: Float? = nil, topP: Float? = nil, minP: Float? = nil,
        repeatPenalty: Float? = nil, topK: Int? = nil, repeatLastN: Int? = nil, seed: UInt64? = nil
    ) {
        let c = defaults(mor_sampler_params(), mor_sampler_params_init)
        self.temperature = temperature ?? c.temperature
        self.topP = topP ?? c.top_p
        self.minP = minP ?? c.min_p
        self.repeatPenalty = repeatPenalty ?? c.repeat_penalty
        self.topK = topK ?? Int(c.top_k)
        self.repeatLastN = repeatLastN ?? Int(c.repeat_last_n)
        self.seed = seed ?? c.seed
    }

    /// Always the likeliest token.
    public static let greedy = Sampler(temperature: 0)

    func c() throws -> mor_sampler_params {
        var c = defaults(mor_sampler_params(), mor_sampler_params_init)
        c.temperature = temperature
        c.top_p = topP
        c.min_p = minP
        c.repeat_penalty = repeatPenalty
        c.top_k = try number(topK, "topK")
        c.repeat_last_n = try number(repeatLastN, "repeatLastN")
        c.seed = seed
        return c
    }
}
