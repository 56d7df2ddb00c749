import CMor
import Foundation

/// An object of the library that one call at a time may use. It is freed with the last reference.
///
/// Safe to send: whoever owns it makes its calls one after the other; what may come at any time goes
/// through ``ifLive(_:)``, which the lock keeps apart from ``close()``.
final class Handle: @unchecked Sendable {
    private let lock = NSLock()
    private var pointer: OpaquePointer?
    private let name: String
    private let free: @Sendable (OpaquePointer) -> Void

    init(
        _ name: String, _ pointer: OpaquePointer, free: @escaping @Sendable (OpaquePointer) -> Void
    ) {
        self.name = name
        self.pointer = pointer
        self.free = free
    }

    /// For a call of the owner's.
    func live() throws -> OpaquePointer {
        guard let pointer = lock.withLock({ pointer }) else {
            throw MorError(.invalidArgument, "the \(name) was closed")
        }
        return pointer
    }

    /// For a call that may come at any time and does not take long.
    func ifLive(_ body: (OpaquePointer) -> Void) {
        lock.withLock {
            if let pointer { body(pointer) }
        }
    }

    /// Frees the object, with no call of the owner's in progress.
    func close() {
        lock.withLock {
            if let pointer { free(pointer) }
            pointer = nil
        }
    }

    deinit { close() }
}

/// Runs an actor on a queue of its own. Calls of the library take long, and the threads that Swift's
/// tasks share are few.
final class QueueExecutor: SerialExecutor {
    private let queue: DispatchQueue

    init(_ label: String) {
        queue = DispatchQueue(label: label, qos: .userInitiated)
    }

    func enqueue(_ job: consuming ExecutorJob) {
        let job = UnownedJob(job)
        let executor = asUnownedSerialExecutor()
        // The executor stays until its jobs have run.
        queue.async { [self] in
            withExtendedLifetime(self) { job.runSynchronously(on: executor) }
        }
    }

    func asUnownedSerialExecutor() -> UnownedSerialExecutor {
        UnownedSerialExecutor(ordinary: self)
    }
}
