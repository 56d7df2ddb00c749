import CMor
import Foundation

/// Why a call failed: a status to decide by, and a sentence for people.
public struct MorError: Error, Equatable, Sendable {
    /// What a failure came to; the statuses of `mor.h`, by their numbers.
    public enum Status: UInt32, Sendable, CaseIterable {
        /// A parameter, token, text or size that the call cannot take.
        case invalidArgument = 1
        /// The system gave no memory, or no room for one more thread.
        case outOfMemory
        /// The system refused to read or map a file.
        case io
        /// The model file is damaged, truncated or made to mislead.
        case format
        /// The file is of a kind that this library does not run, or the system cannot do it.
        case unsupported
        /// The file has no usable tokenizer, or the text cannot be expressed in it.
        case tokenizer
        /// The file has no chat template, or a broken one, or it refuses the conversation.
        case template
        /// The sequence does not fit into the context of the session or batch.
        case contextFull
        /// Every page of the KV cache is taken.
        case kvFull
        /// The model computed a value that is not finite: its weights are damaged. Or a key or a value that is too
        /// large for the type in which they are kept.
        case notFinite
        /// The system refused a thread, its affinity or niceness.
        case thread
        /// The call was cancelled; the session is as it was before it.
        case cancelled
        /// Another call on this object is in progress.
        case busy
        /// A buffer is too small.
        case bufferTooSmall
        /// A saved state is damaged, or of another model, version or kind of session.
        case state
        /// The model's file was shortened while it was mapped.
        case fileChanged
        /// The system refused to lock memory.
        case lock
        /// The call needs something that has not happened yet, such as a prompt.
        case notReady
        /// A bug in the library.
        case internalError
        /// There is no GPU that can be used, it has too little memory, or it failed. What was made
        /// on it accepts no more calls; the CPU still works.
        case device

        /// One sentence about the status.
        public var message: String {
            String(cString: mor_status_text(Int32(rawValue)))
        }
    }

    /// What kind of failure it was.
    public let status: Status
    /// What was wrong in this call and what to do about it, in one sentence.
    public let message: String

    init(_ status: Status, _ message: String? = nil) {
        self.status = status
        self.message = message ?? status.message
    }

    /// Of a status of C that is not `MOR_OK`. An empty sentence says no more than the status.
    init(_ status: mor_status, _ message: String = "") {
        // A status that a newer library added is told by its sentence.
        self.init(
            Status(rawValue: UInt32(status.rawValue)) ?? .internalError,
            message.isEmpty ? String(cString: mor_status_text(Int32(status.rawValue))) : message)
    }
}

extension MorError: LocalizedError, CustomStringConvertible {
    public var errorDescription: String? { message }
    public var description: String { message }
}

/// What the library is.
public enum MorLibrary {
    /// Its version, as "1.2.3".
    public static var version: String { String(cString: mor_version()) }
}

// MARK: - Calls

/// Throws what a call came to, with the sentence that `reason` points to.
func check(_ status: mor_status, _ reason: @autoclosure () -> UnsafePointer<CChar>?) throws {
    guard status != MOR_OK else { return }
    // While another call is in progress the sentence is that call's.
    let sentence = status == MOR_ERROR_BUSY ? nil : reason()
    throw MorError(status, sentence.map { String(cString: $0) } ?? "")
}

/// Throws what a call came to that tells the reason in a `mor_error`.
func checked(_ call: (UnsafeMutablePointer<mor_error>) throws -> mor_status) throws {
    var error = mor_error()
    let status = try call(&error)
    guard status != MOR_OK else { return }
    throw MorError(status, text(of: error))
}

/// The object that a call makes.
func created(
    _ call: (UnsafeMutablePointer<OpaquePointer?>, UnsafeMutablePointer<mor_error>) throws
        -> mor_status
) throws -> OpaquePointer {
    var made: OpaquePointer?
    try checked { try call(&made, $0) }
    guard let made else { throw MorError(.internalError) }
    return made
}

func text(of error: mor_error) -> String {
    withUnsafeBytes(of: error.text) { bytes in
        String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
    }
}

/// A struct of parameters with the library's defaults in it.
func defaults<T>(_ empty: T, _ initialise: (UnsafeMutablePointer<T>, Int) -> mor_status) -> T {
    var value = empty
    // It fails only for a size that no struct has.
    _ = initialise(&value, MemoryLayout<T>.stride)
    return value
}

// MARK: - Arguments

/// A size, which must not be negative.
func size(_ value: Int, _ name: String) throws -> Int {
    guard value >= 0 else {
        throw MorError(.invalidArgument, "\(name) is \(value); it must not be negative")
    }
    return value
}

/// A number that C takes in 32 bits.
func number<N: FixedWidthInteger>(_ value: Int, _ name: String) throws -> N {
    guard let number = N(exactly: value) else {
        throw MorError(.invalidArgument, "\(name) is \(value), which is out of range")
    }
    return number
}

/// Texts as C takes them. One with a zero byte inside would end there, so it is refused.
func withCStrings<R>(
    _ texts: [String], _ name: String, _ body: ([UnsafePointer<CChar>?]) throws -> R
) throws -> R {
    var bytes: [CChar] = []
    var starts: [Int] = []
    for text in texts {
        guard !text.utf8.contains(0) else {
            throw MorError(.invalidArgument, "\(name) has a zero byte in it")
        }
        starts.append(bytes.count)
        bytes.append(contentsOf: text.utf8CString)
    }
    return try bytes.withUnsafeBufferPointer { all in
        try body(starts.map { start in all.baseAddress.map { $0 + start } })
    }
}

/// As above, one text.
func withCString<R>(
    _ text: String, _ name: String, _ body: (UnsafePointer<CChar>?) throws -> R
) throws -> R {
    try withCStrings([text], name) { try body($0[0]) }
}

/// A text that C writes to a buffer: asked first for its size, without the zero byte behind it.
func text(
    _ write: (UnsafeMutablePointer<CChar>?, Int, UnsafeMutablePointer<Int>) throws -> mor_status,
    reason: @autoclosure () -> UnsafePointer<CChar>?
) throws -> String {
    var count = 0
    let asked = try write(nil, 0, &count)
    if asked != MOR_ERROR_BUFFER_TOO_SMALL {
        try check(asked, reason())
        return ""
    }
    var status = MOR_OK
    let text = try String(unsafeUninitializedCapacity: count + 1) { buffer in
        status = try buffer.withMemoryRebound(to: CChar.self) { chars in
            try write(chars.baseAddress, chars.count, &count)
        }
        return status == MOR_OK ? count : 0
    }
    try check(status, reason())
    return text
}
