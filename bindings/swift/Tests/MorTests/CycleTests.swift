import Foundation
import Mor
import XCTest

/// Sessions come and go, from several threads, in every way in which one may end.
final class CycleTests: XCTestCase {
    func testAThousandCyclesFromSeveralThreads() async throws {
        let model = try Model(path: Place.model)
        let before = memory()
        let (workers, cycles) = (4, 250)
        let finishes = try await withThrowingTaskGroup(of: [Finish: Int].self) { group in
            for worker in 0..<workers {
                group.addTask {
                    var finishes: [Finish: Int] = [:]
                    for cycle in 0..<cycles {
                        let finish = try await Self.cycle(model, worker * cycles + cycle)
                        finishes[finish, default: 0] += 1
                    }
                    return finishes
                }
            }
            return try await group.reduce(into: [:]) { all, some in
                all.merge(some, uniquingKeysWith: +)
            }
        }
        let grown = memory() - before
        print("\(workers * cycles) cycles: \(finishes), resident memory grew by \(grown) bytes")
        XCTAssertEqual(finishes.values.reduce(0, +), workers * cycles)
        // Each way of ending was met.
        XCTAssertGreaterThan(finishes[.length, default: 0], 100)
        XCTAssertGreaterThan(finishes[.cancelled, default: 0], 100)
        // A session takes more than a megabyte; a leak of each would show.
        XCTAssertLessThan(grown, 200 << 20)
    }

    private static func cycle(_ model: Model, _ number: Int) async throws -> Finish {
        let parameters = SessionParameters(context: 64, threads: 1 + number % 2)
        let session = try Session(model, parameters)
        try await session.prefill([1116, 365, Token(300 + number % 100)])
        let options = GenerateOptions(maxTokens: 6)
        var finish: Finish
        switch number % 5 {
        case 0:  // to its end
            for try await _ in session.generate(options) {}
            finish = try await ended(session)
        case 1:  // cancelled from its own callback
            finish = try await session.generate(options) { _ in
                session.cancel()
                return true
            }
        case 2:  // the task is cancelled, sooner or later
            let task = Task { try await session.generate(options) { _ in true } }
            if number % 2 == 0 { await Task.yield() }
            task.cancel()
            finish = try await task.value
        case 3:  // the reader leaves
            for try await _ in session.generate(options) { break }
            finish = try await ended(session)
        default:  // cancelled before it began, then closed
            session.cancel()
            finish = try await session.generate(options) { _ in true }
            await session.close()
        }
        if finish == .callback { finish = .cancelled }
        return finish
    }

    private static func ended(_ session: Session) async throws -> Finish {
        let finish = await session.lastFinish
        return try XCTUnwrap(finish)
    }

    /// Resident memory of this process; 0 where /proc is not.
    private func memory() -> Int {
        let text = try? String(contentsOfFile: "/proc/self/statm", encoding: .utf8)
        let pages = text?.split(separator: " ").dropFirst().first.flatMap { Int($0) } ?? 0
        return pages * 4096
    }
}
