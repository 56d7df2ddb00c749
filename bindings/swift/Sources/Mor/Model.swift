import CMor
import Foundation

/// A token of a model's vocabulary.
public typealias Token = UInt32

/// A model: the mapped file and what it says about itself.
///
/// It never changes, so that any number of threads, sessions, batches and tokenizers may use one at
/// the same time. The file is unmapped with the last of them.
public final class Model: Sendable {
    /// Where a model runs, and all sessions and batches made of it.
    public enum Device: Sendable, Equatable {
        /// The processor.
        case cpu
        /// The NVIDIA GPU of this number, from 0. Needs a library that was built with the feature
        /// `cuda`, otherwise loading fails with ``MorError/Status/unsupported``, and NVIDIA's
        /// driver, otherwise with ``MorError/Status/device``.
        case cuda(Int)
    }

    /// How a model is loaded.
    public struct Options: Sendable {
        /// Read the file into memory of this process instead of mapping it. A map costs no memory of
        /// its own, but a file that is truncated while it is in use ends the process.
        public var copy = false
        /// Touch every page while loading, so that no later call waits for the disk.
        public var prefault = false
        /// Keep every page in memory. When the system refuses, loading fails.
        public var lock = false
        /// Where the model runs.
        public var device = Device.cpu
        /// Takes what the library has to tell about this model and its sessions, on whatever thread
        /// creates something. It must not use the object in question.
        public var log: (@Sendable (LogLevel, String) -> Void)?

        /// Options with these values.
        public init(
            copy: Bool = false, prefault: Bool = false, lock: Bool = false,
            device: Device = .cpu, log: (@Sendable (LogLevel, String) -> Void)? = nil
        ) {
            self.copy = copy
            self.prefault = prefault
            self.lock = lock
            self.device = device
            self.log = log
        }
    }

    /// How much a line of log matters.
    public enum LogLevel: Sendable {
        /// What was loaded and created, and what it takes.
        case info
        /// Something that the host may want to know.
        case warning
    }

    /// What chooses a token's depth.
    public enum Kind: UInt32, Sendable {
        /// Every layer runs once: a plain Llama model.
        case vanilla
        /// Every token runs every recursion.
        case recursive
        /// Before each recursion a router decides which tokens go on.
        case expertChoice
        /// One router gives each token its depth before the first recursion.
        case tokenChoice
    }

    /// What a model says about itself.
    public struct Description: Sendable, Equatable {
        /// What chooses a token's depth.
        public let kind: Kind
        /// Tokens in the vocabulary: the length of a row of logits.
        public let vocabSize: Int
        /// Tokens that the model was trained to see at once.
        public let contextLength: Int
        /// Width of the residual stream.
        public let hiddenSize: Int
        /// Inner width of the feed-forward half.
        public let feedForwardSize: Int
        /// Query heads.
        public let heads: Int
        /// Key and value heads.
        public let kvHeads: Int
        /// Width of a head.
        public let headDim: Int
        /// Layers in the file.
        public let storedLayers: Int
        /// Layers that a token of full depth passes.
        public let logicalLayers: Int
        /// The most recursions that a token takes; 1 for a vanilla model.
        public let recursions: Int
        /// The cut that the routers were trained for.
        public let cut: Float
        /// Bytes of all tensors, each once: what a run reads of the map.
        public let weightBytes: UInt64
        /// Bytes that the weights would take if recursions shared nothing.
        public let unsharedWeightBytes: UInt64
        /// Weights in the file.
        public let parameters: UInt64
        /// Whether ``Tokenizer/init(_:maxPieceBytes:)`` will find a usable tokenizer.
        public let hasTokenizer: Bool
        /// Whether the file has a chat template.
        public let hasChatTemplate: Bool
    }

    /// What the model says about itself.
    public let description: Description

    // Safe to share: the object behind it never changes.
    nonisolated(unsafe) let pointer: OpaquePointer
    /// Called by the library as long as the model or anything made of it lives.
    private let log: Log?

    /// Loads the GGUF file at a path: maps it read-only and checks all that is needed to run it.
    public convenience init(path: String, _ options: Options = Options()) throws {
        try self.init(options) { params, out, error in
            try withCString(path, "the path") { mor_model_load($0, params, out, error) }
        }
    }

    /// Loads the GGUF file at a file URL.
    public convenience init(contentsOf url: URL, _ options: Options = Options()) throws {
        guard url.isFileURL else {
            throw MorError(.invalidArgument, "\(url) is no file")
        }
        try self.init(path: url.path, options)
    }

    /// Loads a model from the bytes of a GGUF file, which are copied.
    public convenience init(data: Data, _ options: Options = Options()) throws {
        var options = options
        options.copy = true
        try self.init(options) { params, out, error in
            data.withUnsafeBytes {
                mor_model_load_memory($0.baseAddress ?? empty, $0.count, params, out, error)
            }
        }
    }

    /// Loads a model from bytes that are used where they are. They must neither change nor go before
    /// the model and every session, batch and tokenizer made of it: nothing checks that.
    public convenience init(
        unsafeBytes bytes: UnsafeRawBufferPointer, _ options: Options = Options()
    ) throws {
        try self.init(options) { params, out, error in
            mor_model_load_memory(bytes.baseAddress ?? empty, bytes.count, params, out, error)
        }
    }

    /// Loads a model that is a part of an open file, which stays the caller's and may be closed
    /// afterwards. A count of 0 means up to the file's end.
    public convenience init(
        descriptor: Int32, offset: UInt64 = 0, count: UInt64 = 0, _ options: Options = Options()
    ) throws {
        try self.init(options) { params, out, error in
            mor_model_load_descriptor(descriptor, offset, count, params, out, error)
        }
    }

    private init(
        _ options: Options,
        _ load: (
            UnsafePointer<mor_model_params>, UnsafeMutablePointer<OpaquePointer?>,
            UnsafeMutablePointer<mor_error>
        ) throws -> mor_status
    ) throws {
        var params = defaults(mor_model_params(), mor_model_params_init)
        params.copy = options.copy ? 1 : 0
        params.prefault = options.prefault ? 1 : 0
        params.lock = options.lock ? 1 : 0
        if case .cuda(let index) = options.device {
            params.device = UInt8(MOR_DEVICE_CUDA.rawValue)
            params.device_index = try number(index, "the device")
        }
        let log = options.log.map(Log.init)
        if let log {
            params.log = writeLog
            params.log_user_data = Unmanaged.passUnretained(log).toOpaque()
        }
        let pointer = try created { try load(&params, $0, $1) }
        do {
            description = try Self.describe(pointer)
        } catch {
            mor_model_free(pointer)
            throw error
        }
        self.pointer = pointer
        self.log = log
    }

    deinit { mor_model_free(pointer) }

    private static func describe(_ model: OpaquePointer) throws -> Description {
        var info = mor_model_info()
        info.struct_size = MemoryLayout<mor_model_info>.stride
        try check(mor_model_describe(model, &info), nil)
        return Description(
            kind: Kind(rawValue: info.kind) ?? .recursive,
            vocabSize: Int(info.vocab_size),
            contextLength: Int(info.context_length),
            hiddenSize: Int(info.hidden_size),
            feedForwardSize: Int(info.feed_forward_size),
            heads: Int(info.heads),
            kvHeads: Int(info.kv_heads),
            headDim: Int(info.head_dim),
            storedLayers: Int(info.stored_layers),
            logicalLayers: Int(info.logical_layers),
            recursions: Int(info.recursions),
            cut: info.cut,
            weightBytes: info.weight_bytes,
            unsharedWeightBytes: info.unshared_weight_bytes,
            parameters: info.parameters,
            hasTokenizer: info.has_tokenizer != 0,
            hasChatTemplate: info.has_chat_template != 0)
    }

    /// The value of a metadata key whose value is a string, such as "general.name"; nil when the file
    /// has none.
    public func metadata(_ key: String) -> String? {
        try? withCString(key, "the key") { key in
            try text({ mor_model_metadata(pointer, key, $0, $1, $2) }, reason: nil)
        }
    }
}

// Where no bytes are: NULL would be another mistake than an empty file.
private nonisolated(unsafe) let empty = UnsafeRawPointer(
    UnsafeMutableRawPointer.allocate(byteCount: 1, alignment: 1))

/// A host's log, as C holds it.
private final class Log: Sendable {
    let write: @Sendable (Model.LogLevel, String) -> Void

    init(_ write: @escaping @Sendable (Model.LogLevel, String) -> Void) { self.write = write }
}

private func writeLog(
    _ userData: UnsafeMutableRawPointer?, _ level: mor_log_level, _ text: UnsafePointer<CChar>?
) {
    guard let userData, let text else { return }
    let log = Unmanaged<Log>.fromOpaque(userData).takeUnretainedValue()
    log.write(level == MOR_LOG_WARNING ? .warning : .info, String(cString: text))
}
