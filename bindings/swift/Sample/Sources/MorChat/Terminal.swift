#if !canImport(SwiftUI)
    import Foundation

    /// Where there is no SwiftUI: each line of standard input is said, answers come tinted by depth.
    @main @MainActor
    struct Terminal {
        static func main() async throws {
            guard let path = CommandLine.arguments.dropFirst().first else {
                print("usage: MorChat MODEL.gguf")
                return
            }
            let conversation = try Conversation(path: path)
            while let line = readLine() {
                conversation.send(line)
                await conversation.finished()
                if let failure = conversation.failure { print(failure) }
                guard let turn = conversation.turns.last else { continue }
                print(
                    turn.pieces.map { "\u{1B}[\(36 - $0.depth)m\($0.text)" }.joined() + "\u{1B}[0m")
            }
        }
    }
#endif
