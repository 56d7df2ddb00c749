#if canImport(SwiftUI)
    import Mor
    import SwiftUI

    /// A chat whose answers are tinted by depth: the more recursions a token took, the warmer.
    @main
    struct ChatApp: App {
        @State private var conversation = Result { try Conversation(path: Self.path) }

        /// The first argument, or model.gguf among the app's resources.
        private static var path: String {
            CommandLine.arguments.dropFirst().first { !$0.hasPrefix("-") }
                ?? Bundle.main.path(forResource: "model", ofType: "gguf") ?? "model.gguf"
        }

        var body: some Scene {
            WindowGroup {
                switch conversation {
                case .success(let conversation): ChatView(conversation: conversation)
                case .failure(let error): Text(error.localizedDescription).padding()
                }
            }
        }
    }

    struct ChatView: View {
        let conversation: Conversation
        @State private var text = ""

        var body: some View {
            VStack(spacing: 0) {
                ScrollView {
                    LazyVStack(alignment: .leading, spacing: 12) {
                        ForEach(conversation.turns) { turn in
                            VStack(alignment: .leading, spacing: 2) {
                                Text(turn.role).font(.caption).foregroundStyle(.secondary)
                                Text(tinted(turn)).textSelection(.enabled)
                            }
                        }
                        if let failure = conversation.failure {
                            Text(failure).foregroundStyle(.red)
                        }
                    }
                    .padding()
                    .frame(maxWidth: .infinity, alignment: .leading)
                }
                .defaultScrollAnchor(.bottom)
                Divider()
                HStack {
                    TextField("Say something", text: $text).onSubmit(send)
                    if conversation.isAnswering {
                        Button("Stop", action: conversation.stop)
                    } else {
                        Button("Send", action: send).disabled(text.isEmpty)
                    }
                }
                .padding()
            }
        }

        private func send() {
            guard !text.isEmpty, !conversation.isAnswering else { return }
            conversation.send(text)
            text = ""
        }

        private func tinted(_ turn: Conversation.Turn) -> AttributedString {
            turn.pieces.reduce(into: AttributedString()) { all, piece in
                var part = AttributedString(piece.text)
                if turn.role == "assistant" { part.foregroundColor = tint(piece.depth) }
                all += part
            }
        }

        /// From blue for no recursion to red for the most.
        private func tint(_ depth: Int) -> Color {
            let most = Double(conversation.model.description.recursions)
            return Color(hue: 0.6 * (1 - Double(depth) / most), saturation: 0.7, brightness: 0.8)
        }
    }
#endif
