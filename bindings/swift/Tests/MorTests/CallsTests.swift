import Foundation
import XCTest

/// The tables that all languages run.
final class CallsTests: XCTestCase {
    private func check(_ table: String, _ model: String) async throws {
        for threads in [1, 2] {
            let calls = Calls(file: model, threads: threads)
            let (count, wrong) = try await calls.run("\(Place.root)/tests/calls/\(table)")
            XCTAssertGreaterThan(count, 50)
            XCTAssertEqual(wrong, [], "with \(threads) threads")
            print("\(table): \(count) calls, \(threads) threads: \(wrong.count) wrong")
        }
    }

    func testDefaultModel() async throws {
        try await check("austen.tsv", Place.model)
    }

    func testSmolLM2() async throws {
        let named = ProcessInfo.processInfo.environment["MOR_TEST_SMOLLM2"]
        guard let model = named, !model.isEmpty else {
            throw XCTSkip("MOR_TEST_SMOLLM2 does not name SmolLM2-135M-Instruct.Q4_1.gguf")
        }
        try await check("smollm2.tsv", model)
    }
}
