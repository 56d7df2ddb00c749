import Foundation
import Mor

#if canImport(SwiftUI)
    import Observation
#endif

/// A conversation with a model: what a view shows, and what its buttons do.
#if canImport(SwiftUI)
    @Observable
#endif
@MainActor
final class Conversation {
    /// One turn. What the model says comes in pieces, each with the recursions it took.
    struct Turn: Identifiable {
        let id: Int
        let role: String
        var pieces: [Piece]

        var text: String { pieces.map(\.text).joined() }
    }

    private(set) var turns: [Turn] = []
    /// What went wrong in the last answer.
    private(set) var failure: String?
    private(set) var isAnswering = false

    let model: Model
    private let tokenizer: Tokenizer
    private let session: Session
    private var answer: Task<Void, Never>?

    init(path: String) throws {
        model = try Model(path: path)
        tokenizer = try Tokenizer(model)
        session = try Session(model)
    }

    /// Says something and has the model answer.
    func send(_ text: String) {
        guard !isAnswering else { return }
        turns.append(Turn(id: turns.count, role: "user", pieces: [Piece(text: text)]))
        turns.append(Turn(id: turns.count, role: "assistant", pieces: []))
        isAnswering = true
        failure = nil
        answer = Task {
            do {
                try await generate()
            } catch {
                failure = error.localizedDescription
            }
            isAnswering = false
        }
    }

    /// Ends the answer where it is.
    func stop() { answer?.cancel() }

    /// Waits for the answer to end.
    func finished() async { await answer?.value }

    private func generate() async throws {
        try await session.prefillWhole(prompt())
        for try await piece in session.generate(GenerateOptions(maxTokens: 256)) {
            turns[turns.count - 1].pieces.append(piece)
        }
    }

    /// The turns as the model was trained on them; without a template, as one text to go on with.
    private func prompt() throws -> [Token] {
        let said = turns.dropLast()
        guard model.description.hasChatTemplate else {
            return try tokenizer.encode(said.map(\.text).joined(), .addSpecial)
        }
        let messages = said.map { ChatMessage(role: $0.role, content: $0.text) }
        return try tokenizer.encode(tokenizer.formatChat(messages), .parseSpecial)
    }
}
