import Foundation
import Mor

/// What a test finds where.
enum Place {
    static let root: String = {
        if let root = ProcessInfo.processInfo.environment["MOR_ROOT"] { return root }
        // bindings/swift/Tests/MorTests/Calls.swift
        var folder = URL(fileURLWithPath: #filePath)
        for _ in 0..<5 { folder.deleteLastPathComponent() }
        return folder.path
    }()
    static let model = root + "/models/austen-mor-5m-q8_0.gguf"
}

/// The objects that the calls of a table of tests/calls work on, and each call in Swift;
/// tests/calls/README.md says what they are.
final class Calls {
    struct Broken: Error, CustomStringConvertible {
        let description: String
    }

    /// A key that is missing is nil in Swift and a failure in the table.
    private struct NoSuchKey: Error {}

    private let file: String
    private let threads: Int
    private var loaded: (Model, Tokenizer)?
    private var session: Session?
    private var pieces: [Piece] = []
    private var state = Data()
    private var batch: Batch?
    private var sequences = [Batch.SequenceID?](repeating: nil, count: 8)

    init(file: String, threads: Int) {
        self.file = file
        self.threads = threads
    }

    /// The fields of a line, their escapes undone.
    static func fields(_ line: Substring) -> [String] {
        line.split(separator: "\t").map { field in
            guard field != "-" else { return "" }
            var text = ""
            var letters = field.makeIterator()
            while let letter = letters.next() {
                guard letter == "\\" else {
                    text.append(letter)
                    continue
                }
                switch letters.next() {
                case "n": text += "\n"
                case "t": text += "\t"
                case "r": text += "\r"
                case "s": text += " "
                default: text += "\\"
                }
            }
            return text
        }
    }

    /// Runs a table; answers how many calls there were and what was wrong.
    func run(_ table: String) async throws -> (calls: Int, wrong: [String]) {
        var calls = 0
        var wrong: [String] = []
        let lines = try String(contentsOfFile: table, encoding: .utf8)
        for (index, line) in lines.split(separator: "\n", omittingEmptySubsequences: false)
            .enumerated()
        {
            guard !line.isEmpty, !line.hasPrefix("#") else { continue }
            let fields = Self.fields(line)
            // A device that is none cannot be written in Swift.
            if fields[0] == "load_on" && Int(fields[2]) != nil { continue }
            let (status, result) = (fields[fields.count - 2], fields[fields.count - 1])
            let outcome: (String, String)
            do {
                outcome = ("OK", try await call(fields[0], Array(fields[1..<fields.count - 2])))
            } catch let error as MorError {
                outcome = (Self.name(error.status), error.message)
            } catch is NoSuchKey {
                outcome = ("INVALID_ARGUMENT", "")
            }
            calls += 1
            let fits =
                status == "OK"
                ? Array(outcome.1.utf8) == Array(result.utf8)
                : result.isEmpty || outcome.1.contains(result)
            if outcome.0 != status || !fits {
                wrong.append("\(table):\(index + 1): \(line)\n  came out: \(outcome)")
            }
        }
        return (calls, wrong)
    }

    private func call(_ verb: String, _ args: [String]) async throws -> String {
        switch verb {
        case "load", "load_bytes": return try load(args)
        case "load_on": return try loadOn(args)
        case "describe", "metadata", "plan", "batch_plan", "batch_plan_in", "batch_pages":
            return try askModel(verb, args)
        case "encode", "decode", "decode_each", "token_bytes", "is_end", "format_chat":
            return try tokenize(verb, args)
        case "generate", "generate_until", "generate_cancel": return try await generate(verb, args)
        case "pieces": return list(pieces.map { "\($0.token):\($0.depth)" })
        case "text": return pieces.map(\.text).joined()
        case "session":
            session = try Session(model(), sessionParameters(Options(args[0])))
            return ""
        case "batch":
            batch = try Batch(model(), batchParameters(Options(args[0])))
            sequences = Array(repeating: nil, count: 8)
            return ""
        case "add", "fork": return try await add(verb, args)
        case "tick", "run": return try await tick(verb)
        case "stop", "remove", "resume", "status", "failure", "batch_tokens", "batch_depths":
            return try await askSequence(verb, try place(args[0]))
        case "batch_idle", "batch_kv_bytes", "batch_counters", "in_step":
            return try await askBatch(verb, args)
        default: return try await askSession(verb, args)
        }
    }

    // MARK: The model and its tokenizer

    private func model() throws -> Model { try made(loaded).0 }

    private func load(_ args: [String]) throws -> String {
        let path = args[0] == "@" ? file : Place.root + "/" + args[0]
        let model: Model
        if args.count == 1 {
            model = try Model(path: path)
        } else {
            let bytes = try Data(contentsOf: URL(fileURLWithPath: path))
            model = try Model(data: bytes.prefix(number(args[1])))
        }
        loaded = (model, try Tokenizer(model))
        return ""
    }

    private func loadOn(_ args: [String]) throws -> String {
        let device = args[1] == "cuda" ? Model.Device.cuda(0) : .cpu
        let path = args[0] == "@" ? file : Place.root + "/" + args[0]
        let model = try Model(path: path, .init(device: device))
        loaded = (model, try Tokenizer(model))
        return ""
    }

    private func describe() throws -> String {
        let d = try model().description
        let kind: String
        switch d.kind {
        case .vanilla: kind = "vanilla"
        case .recursive: kind = "recursive"
        case .expertChoice: kind = "expert_choice"
        case .tokenChoice: kind = "token_choice"
        }
        return """
            \(kind) vocab \(d.vocabSize) context \(d.contextLength) hidden \(d.hiddenSize) \
            feed_forward \(d.feedForwardSize) heads \(d.heads) kv_heads \(d.kvHeads) \
            head_dim \(d.headDim) stored \(d.storedLayers) logical \(d.logicalLayers) \
            recursions \(d.recursions) weights \(d.weightBytes) unshared \(d.unsharedWeightBytes) \
            parameters \(d.parameters) tokenizer \(d.hasTokenizer ? 1 : 0) \
            template \(d.hasChatTemplate ? 1 : 0)
            """
    }

    private func askModel(_ verb: String, _ args: [String]) throws -> String {
        let model = try model()
        switch verb {
        case "describe": return try describe()
        case "metadata":
            guard let text = model.metadata(args[0]) else { throw NoSuchKey() }
            return text
        case "plan":
            return line(try Session.plan(for: model, sessionParameters(Options(args[0]))))
        case "batch_plan":
            return batchLine(try Batch.plan(for: model, batchParameters(Options(args[0]))))
        case "batch_plan_in":
            return batchLine(
                try Batch.plan(
                    for: model, batchParameters(Options(args[0])), meanDepth: number(args[1]),
                    bytes: number(args[2])))
        default:
            let parameters = try batchParameters(Options(args[0]))
            return String(try Batch.pages(for: model, parameters, meanDepth: number(args[1])))
        }
    }

    private func line(_ plan: MemoryPlan) -> String {
        let wrong = plan.bytes > plan.kvBytes && plan.threads == threads ? "" : " WRONG"
        return """
            context \(plan.context) batch \(plan.rows) pages \(plan.kvPages) \
            kv_bytes \(plan.kvBytes) per_token \(plan.kvBytesPerToken)\(wrong)
            """
    }

    private func batchLine(_ plan: MemoryPlan) -> String {
        "sequences \(plan.sequences) \(line(plan))"
    }

    private func tokenize(_ verb: String, _ args: [String]) throws -> String {
        let tokenizer = try made(loaded).1
        switch verb {
        case "encode":
            return list(try tokenizer.encode(args[1], .init(rawValue: number(args[0]))))
        case "decode": return try tokenizer.decode(numbers(args[1]), special: args[0] == "1")
        case "decode_each":
            var stream = DecodeStream()
            let pieces = try numbers(args[1]).map {
                try tokenizer.decodeNext($0, in: &stream, special: args[0] == "1") + "|"
            }
            return pieces.joined() + (try tokenizer.decodeEnd(&stream))
        case "token_bytes":
            let bytes = try tokenizer.bytes(of: number(args[1]), special: args[0] == "1")
            return bytes.map { String($0 >> 4, radix: 16) + String($0 & 15, radix: 16) }.joined()
        case "is_end": return String(try tokenizer.isEnd(number(args[0])))
        default:
            let messages = stride(from: 1, to: args.count, by: 2).map {
                ChatMessage(role: args[$0], content: args[$0 + 1])
            }
            return try tokenizer.formatChat(messages, addPrompt: args[0] == "1")
        }
    }

    // MARK: The session

    private func sessionParameters(_ options: Options) throws -> SessionParameters {
        SessionParameters(
            context: try options.get("context"), batchSize: try options.get("batch"),
            threads: try options.get("threads") ?? threads, kvType: options.kvType,
            kvPages: try options.get("pages"))
    }

    private func sampler(_ o: Options) throws -> Sampler {
        Sampler(
            temperature: try o.get("temperature"), topP: try o.get("top_p"),
            minP: try o.get("min_p"),
            repeatPenalty: try o.get("penalty"), topK: try o.get("top_k"),
            repeatLastN: try o.get("last_n"), seed: try o.get("seed"))
    }

    private func askSession(_ verb: String, _ args: [String]) async throws -> String {
        let session = try made(session)
        switch verb {
        case "prefill": try await session.prefill(numbers(args[0]))
        case "prefill_whole": return String(try await session.prefillWhole(numbers(args[0])))
        case "prompt":
            let tokens = try made(loaded).1.encode(args[1], .init(rawValue: number(args[0])))
            try await session.prefill(tokens)
            return String(tokens.count)
        case "step": return likeliest(try await session.step(number(args[0])))
        case "log_probabilities":
            let numbers = try await session.logProbabilities(numbers(args[0]))
            return list(numbers.map { Int((100 * $0).rounded()) })
        case "logits": return likeliest(try await session.logits())
        case "sampler": try await session.setSampler(sampler(Options(args[0])))
        case "sample": return String(try await session.sample())
        case "length": return String(try await session.length)
        case "tokens":
            return list(try await session.tokens(in: number(args[0])..<session.length))
        case "depths":
            return list(try await session.depths(in: number(args[0])..<session.length))
        case "histogram": return list(try await session.depthHistogram)
        case "kv_bytes": return String(try await session.kvBytesUsed)
        case "cut": try await session.setCut(number(args[0]))
        case "depth_limit": try await session.setDepthLimit(number(args[0]))
        case "routing":
            try await session.setRouting(args[0] == "capacity" ? .capacity : .threshold)
        case "rewind": try await session.rewind(to: number(args[0]))
        case "cancel": session.cancel()
        case "reset_cancel": session.resetCancel()
        case "save":
            state = try await session.save()
            return String(state.count)
        case "restore":
            var copy = state
            if let place = args.first { copy[try number(place)] ^= 1 }
            try await session.restore(copy)
        default: throw Broken(description: "no verb '\(verb)'")
        }
        return ""
    }

    private func generate(_ verb: String, _ args: [String]) async throws -> String {
        let session = try made(session)
        let after: Int = verb == "generate" ? .max : try number(args[1])
        let options = GenerateOptions(
            maxTokens: args[0].isEmpty ? nil : try number(args[0]),
            stop: Array(args[(verb == "generate" ? 1 : 2)...]))
        let taken = Taken()
        defer { pieces = taken.all }
        let finish = try await session.generate(options) { piece in
            guard taken.add(piece) == after else { return true }
            if verb == "generate_until" { return false }
            session.cancel()
            return true
        }
        return Self.name(finish)
    }

    // MARK: The batch

    private func batchParameters(_ options: Options) throws -> BatchParameters {
        BatchParameters(
            sequences: try options.get("sequences") ?? 1, context: try options.get("context"),
            rows: try options.get("batch"), threads: try options.get("threads") ?? threads,
            kvType: options.kvType, kvPages: try options.get("pages"),
            pressure: options["pressure"] == "refuse" ? .refuse : .evict)
    }

    private func place(_ field: String) throws -> Batch.SequenceID {
        try made(sequences[number(field)])
    }

    private func add(_ verb: String, _ args: [String]) async throws -> String {
        let batch = try made(batch)
        let options = Options(args[args.count - 2])
        let request = Batch.Request(
            prompt: try made(loaded).1.encode(args[args.count - 1], []),
            maxTokens: try options.get("max"), sampler: try sampler(options),
            cut: try options.get("cut"), depthLimit: try options.get("depth_limit"),
            priority: try options.get("priority") ?? 0, ignoresEnd: options["ignore_end"] == "1")
        let sequence =
            verb == "add"
            ? try await batch.add(request)
            : try await batch.fork(place(args[1]), length: number(args[2]), request)
        sequences[try number(args[0])] = sequence
        return ""
    }

    private func tick(_ verb: String) async throws -> String {
        let batch = try made(batch)
        var events: [Batch.Event] = []
        if verb == "tick" {
            events = try await batch.tick()
        } else {
            for try await event in batch.run() { events.append(event) }
        }
        let place = { [sequences] id in sequences.firstIndex(of: id) ?? -1 }
        return list(
            events.map { event in
                switch event {
                case .token(let id, let token, let depth): "token:\(place(id)):\(token):\(depth)"
                case .evicted(let id): "evicted:\(place(id))"
                case .resumed(let id): "resumed:\(place(id))"
                case .full(let id): "full:\(place(id))"
                case .finished(let id, let why): "finished:\(place(id)):\(Self.name(why))"
                }
            })
    }

    private func askSequence(_ verb: String, _ id: Batch.SequenceID) async throws -> String {
        let batch = try made(batch)
        switch verb {
        case "stop": try await batch.stop(id)
        case "remove": try await batch.remove(id)
        case "resume": try await batch.resume(id)
        case "batch_tokens": return list(try await batch.tokens(of: id))
        case "batch_depths": return list(try await batch.depths(of: id))
        case "failure": return try await batch.failure(of: id).map { Self.name($0.status) } ?? "OK"
        default:
            switch try await batch.status(of: id) {
            case .waiting: return "waiting"
            case .running: return "running"
            case .full: return "full"
            case .finished(let why): return "finished:\(Self.name(why))"
            }
        }
        return ""
    }

    private func askBatch(_ verb: String, _ args: [String]) async throws -> String {
        let batch = try made(batch)
        switch verb {
        case "batch_idle": return String(try await batch.isIdle)
        case "batch_kv_bytes": return String(try await batch.kvBytesUsed)
        case "in_step": try await batch.setInStep(args[0] == "1")
        default:
            let c = try await batch.counters
            return list([
                c.ticks, c.rowCapacity, c.finished, c.logits, c.evictions, c.rows.reduce(0, +),
            ])
        }
        return ""
    }

    // MARK: How a table writes things

    private static func name(_ status: MorError.Status) -> String {
        status == .internalError ? "INTERNAL" : snake("\(status)").uppercased()
    }

    private static func name(_ finish: Finish) -> String { snake("\(finish)") }

    /// contextFull -> context_full
    private static func snake(_ name: some StringProtocol) -> String {
        name.reduce(into: "") { text, letter in
            text += letter.isUppercase ? "_" + letter.lowercased() : String(letter)
        }
    }

    /// The token of the largest number, the first of equals.
    private func likeliest(_ logits: [Float]) -> String {
        var best = 0
        for (token, logit) in logits.enumerated() where logit > logits[best] { best = token }
        return String(best)
    }
}

/// A list of key=value.
private struct Options {
    private var values: [Substring: Substring] = [:]

    init(_ field: String) {
        for word in field.split(separator: " ") {
            let parts = word.split(separator: "=")
            values[parts[0]] = parts[1]
        }
    }

    subscript(key: Substring) -> Substring? { values[key] }

    func get<N: LosslessStringConvertible>(_ key: Substring) throws -> N? {
        try values[key].map { try number(String($0)) }
    }

    var kvType: KVType {
        switch values["kv"] {
        case "q8_0": .q8_0
        case "f32": .f32
        default: .f16
        }
    }
}

/// Pieces that a callback took.
final class Taken: @unchecked Sendable {
    private let lock = NSLock()
    private var pieces: [Piece] = []

    var all: [Piece] { lock.withLock { pieces } }

    /// Answers how many there are then.
    func add(_ piece: Piece) -> Int {
        lock.withLock {
            pieces.append(piece)
            return pieces.count
        }
    }
}

private func made<T>(_ object: T?) throws -> T {
    guard let object else { throw Calls.Broken(description: "the table makes it first") }
    return object
}

private func list<T>(_ items: [T]) -> String {
    items.map { "\($0)" }.joined(separator: " ")
}

private func number<N: LosslessStringConvertible>(_ text: String) throws -> N {
    guard let number = N(text) else { throw Calls.Broken(description: "'\(text)' is no number") }
    return number
}

private func numbers(_ text: String) throws -> [Token] {
    try text.split(separator: " ").map { try number(String($0)) }
}
