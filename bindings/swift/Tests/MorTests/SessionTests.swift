import Foundation
import Mor
import XCTest

/// What Swift adds: streams, cancelled tasks, closing, values that C cannot be given.
final class SessionTests: XCTestCase {
    private func made(
        _ parameters: SessionParameters = SessionParameters(context: 128, threads: 1)
    ) throws -> (Model, Tokenizer, Session) {
        let model = try Model(path: Place.model)
        return (model, try Tokenizer(model), try Session(model, parameters))
    }

    private func assertFails<T>(
        _ status: MorError.Status, _ words: String, line: UInt = #line,
        _ body: () async throws -> T
    ) async {
        do {
            _ = try await body()
            XCTFail("it did not fail", line: line)
        } catch let error as MorError {
            XCTAssertEqual(error.status, status, line: line)
            XCTAssertTrue(error.message.contains(words), error.message, line: line)
            XCTAssertEqual(error.localizedDescription, error.message, line: line)
        } catch {
            XCTFail("\(error)", line: line)
        }
    }

    func testQuickStart() async throws {
        let (_, tokenizer, session) = try made()
        try await session.setSampler(.greedy)
        try await session.prefill(tokenizer.encode("It is a truth", .addSpecial))
        var text = ""
        var depths: [Int] = []
        var tokens: [Token] = []
        for try await piece in session.generate(GenerateOptions(maxTokens: 12)) {
            text += piece.text
            depths.append(piece.depth)
            tokens.append(piece.token)
        }
        let length = try await session.length
        let finish = await session.lastFinish
        XCTAssertEqual(finish, .length)
        XCTAssertEqual(tokens.count, 12)
        XCTAssertEqual(text, try tokenizer.decode(tokens))
        let run = try await session.tokens(in: length - 12..<length)
        let ran = try await session.depths(in: length - 12..<length)
        XCTAssertEqual(tokens, run)
        XCTAssertEqual(depths, ran.map(Int.init))
    }

    func testLoading() async throws {
        let file = try Data(contentsOf: URL(fileURLWithPath: Place.model))
        let handle = try FileHandle(forReadingFrom: URL(fileURLWithPath: Place.model))
        let log = Lines()
        let options = Model.Options(log: { _, line in log.add(line) })
        let models = [
            try Model(path: Place.model, options),
            try Model(contentsOf: URL(fileURLWithPath: Place.model)),
            try Model(data: file),
            try Model(descriptor: handle.fileDescriptor),
        ]
        try handle.close()
        XCTAssertTrue(log.all.contains { $0.contains("loaded a model") }, "\(log.all)")
        for model in models {
            XCTAssertEqual(model.description, models[0].description)
            XCTAssertEqual(model.metadata("general.name"), "austen-mor-5m")
            XCTAssertNil(model.metadata("no.such.key"))
            XCTAssertNil(model.metadata("zero\0byte"))
        }
        try file.withUnsafeBytes { bytes in
            let model = try Model(unsafeBytes: bytes)
            XCTAssertEqual(model.description, models[0].description)
        }
        await assertFails(.invalidArgument, "zero byte") { try Model(path: "a\0b") }
        await assertFails(.invalidArgument, "is no file") {
            try Model(contentsOf: XCTUnwrap(URL(string: "https://example.org/model.gguf")))
        }
        await assertFails(.io, "file descriptor") { try Model(descriptor: -1) }
        await assertFails(.format, "damaged") { try Model(data: Data()) }
    }

    func testWhatCCannotBeGiven() async throws {
        let (model, tokenizer, session) = try made()
        await assertFails(.invalidArgument, "context is -1") {
            try Session(model, SessionParameters(context: -1))
        }
        await assertFails(.invalidArgument, "threads is -1") {
            try Session(model, SessionParameters(threads: -1))
        }
        await assertFails(.invalidArgument, "sequences is -1") {
            try Batch(model, BatchParameters(sequences: -1))
        }
        await assertFails(.invalidArgument, "zero byte") {
            try tokenizer.formatChat([.user("a\0b")])
        }
        await assertFails(.invalidArgument, "length is -1") { try await session.rewind(to: -1) }
        await assertFails(.invalidArgument, "positions") { try await session.tokens(in: -1..<0) }
        await assertFails(.invalidArgument, "positions") {
            try await session.depths(in: 0..<Int.max)
        }
        await assertFails(.invalidArgument, "out of range") {
            try await session.setDepthLimit(1 << 40)
        }
        await assertFails(.invalidArgument, "time budget") {
            try await session.setTimeBudget(.seconds(-1))
        }
        await assertFails(.invalidArgument, "time budget") {
            try await session.setTimeBudget(.seconds(Int64.max))
        }
        await assertFails(.invalidArgument, "topK") {
            try await session.setSampler(Sampler(topK: -1))
        }
        await assertFails(.invalidArgument, "the cut is -1") {
            try await Batch(model).add(Batch.Request(prompt: [300], cut: -1))
        }
        await assertFails(.state, "cannot be restored") { try await session.restore(Data()) }
        try await session.prefill([300])
        await assertFails(.invalidArgument, "1025 bytes") {
            for try await _ in session.generate(
                GenerateOptions(stop: [String(repeating: "x", count: 1025)]))
            {}
        }
        await assertFails(.invalidArgument, "zero byte") {
            try await session.generate(GenerateOptions(stop: ["a\0b"])) { _ in true }
        }
        await assertFails(.invalidArgument, "maxTokens") {
            try await session.generate(GenerateOptions(maxTokens: -1)) { _ in true }
        }
        // The session is none the worse for it.
        try await session.setTimeBudget(.milliseconds(500))
        try await session.setTimeBudget(nil)
        let finish = try await session.generate(GenerateOptions(maxTokens: 2)) { _ in true }
        XCTAssertEqual(finish, .length)
    }

    func testMemoryThatIsUsedAgain() async throws {
        let model = try Model(path: Place.model)
        let parameters = SessionParameters(context: 32, threads: 1)
        let plan = try Session.plan(for: model, parameters)
        let memory = SessionMemory(for: plan)
        for _ in 0..<3 {
            let session = try Session(model, parameters, in: memory)
            XCTAssertEqual(session.plan, plan)
            await assertFails(.busy, "another session") {
                try Session(model, parameters, in: memory)
            }
            try await session.prefill([300, 301])
            let logits = try await session.logits()
            let (count, first) = try await session.withLogits { ($0.count, $0[0]) }
            XCTAssertEqual(count, model.description.vocabSize)
            XCTAssertEqual(first, logits[0])
            await session.close()
        }
        await assertFails(.bufferTooSmall, "buffer") {
            try Session(model, SessionParameters(context: 64, threads: 1), in: memory)
        }
        _ = try Session(model, parameters, in: memory)
    }

    func testAClosedSession() async throws {
        let (_, _, session) = try made()
        await session.close()
        await session.close()
        session.cancel()
        session.resetCancel()
        await assertFails(.invalidArgument, "closed") { try await session.prefill([300]) }
        await assertFails(.invalidArgument, "closed") { try await session.length }
        await assertFails(.invalidArgument, "closed") { for try await _ in session.generate() {} }
    }

    /// The cancel of a task ends the call that it waits for, and nothing that comes later.
    func testCancelledTask() async throws {
        let (_, _, session) = try made(SessionParameters(context: 100_000, threads: 1))
        let prompt = (0..<50_000).map { Token($0 % 4000) }
        let task = Task { try await session.prefill(prompt) }
        try await Task.sleep(for: .milliseconds(50))
        task.cancel()
        let start = ContinuousClock.now
        await assertFails(.cancelled, "cancelled") { try await task.value }
        XCTAssertLessThan(ContinuousClock.now - start, .seconds(2))
        let length = try await session.length
        XCTAssertEqual(length, 0)
        try await session.prefill([300, 301])

        let before = Task {
            while !Task.isCancelled { await Task.yield() }
            try await session.prefill([302])
        }
        before.cancel()
        await assertFails(.cancelled, "cancelled") { try await before.value }
        try await session.prefill([303])
        let tokens = try await session.tokens
        XCTAssertEqual(tokens, [300, 301, 303])
    }

    /// A reader that leaves ends the generation, and the next call finds the session in order.
    func testAReaderWhoLeaves() async throws {
        let (_, _, session) = try made(SessionParameters(context: 100_000, threads: 1))
        try await session.prefill([1116, 365])
        var seen: [Token] = []
        for try await piece in session.generate() {
            seen.append(piece.token)
            if seen.count == 5 { break }
        }
        let tokens = try await session.tokens
        let finish = await session.lastFinish
        XCTAssertEqual(Array(tokens[2..<7]), seen)
        XCTAssertLessThan(tokens.count, 10_000)
        XCTAssertTrue(finish == .cancelled || finish == .callback, "\(String(describing: finish))")

        let reader = Task {
            var count = 0
            for try await _ in session.generate() { count += 1 }
            return count
        }
        try await Task.sleep(for: .milliseconds(30))
        reader.cancel()
        _ = try await reader.value
        try await session.rewind(to: 2)
        try await session.prefill([300])
        let after = try await session.generate(GenerateOptions(maxTokens: 3)) { _ in true }
        XCTAssertEqual(after, .length)
        let length = try await session.length
        XCTAssertEqual(length, 6)
    }

    /// Generations on one session wait for each other.
    func testTwoStreamsOfOneSession() async throws {
        let (_, _, session) = try made()
        try await session.prefill([1116, 365])
        let options = GenerateOptions(maxTokens: 20)
        async let first = session.generate(options).reduce(into: 0) { count, _ in count += 1 }
        async let second = session.generate(options).reduce(into: 0) { count, _ in count += 1 }
        let counts = try await (first, second)
        XCTAssertGreaterThanOrEqual(counts.0, 20)
        XCTAssertGreaterThanOrEqual(counts.1, 20)
        let length = try await session.length
        XCTAssertEqual(length, 42)
    }

    func testBatchStream() async throws {
        let model = try Model(path: Place.model)
        let batch = try Batch(model, BatchParameters(sequences: 4, context: 64, threads: 2))
        var alone: [Batch.SequenceID: [Token]] = [:]
        for first in [300, 301, 302, 303] as [Token] {
            let session = try Session(model, SessionParameters(context: 64, threads: 1))
            try await session.setSampler(Sampler(seed: 7))
            try await session.prefill([first, 365])
            try await session.generate(GenerateOptions(maxTokens: 8)) { _ in true }
            let request = Batch.Request(
                prompt: [first, 365], maxTokens: 8, sampler: Sampler(seed: 7))
            alone[try await batch.add(request)] = try await session.tokens
        }
        for try await event in batch.run() {
            guard case .finished(let sequence, _) = event else { continue }
            let tokens = try await batch.tokens(of: sequence)
            XCTAssertEqual(tokens, alone[sequence])
        }
        let idle = try await batch.isIdle
        XCTAssertTrue(idle)
        // A reader who leaves ends the ticking.
        for sequence in alone.keys { try await batch.remove(sequence) }
        let endless = try await batch.add(Batch.Request(prompt: [300], ignoresEnd: true))
        for try await _ in batch.run() { break }
        try await Task.sleep(for: .milliseconds(50))
        let ticks = try await batch.counters.ticks
        try await Task.sleep(for: .milliseconds(50))
        let later = try await batch.counters.ticks
        XCTAssertEqual(ticks, later)
        let status = try await batch.status(of: endless)
        XCTAssertNotEqual(status, .waiting)
        await batch.close()
        await assertFails(.invalidArgument, "closed") { try await batch.tick() }
    }
}

/// What a log took.
private final class Lines: @unchecked Sendable {
    private let lock = NSLock()
    private var lines: [String] = []

    var all: [String] { lock.withLock { lines } }
    func add(_ line: String) { lock.withLock { lines.append(line) } }
}
