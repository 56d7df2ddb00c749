package dev.mor.coroutines

import dev.mor.GenerateParams
import dev.mor.GeneratedToken
import dev.mor.Session
import kotlinx.coroutines.CoroutineDispatcher
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.flow
import kotlinx.coroutines.runInterruptible

/**
 * A generation as a cold flow: each collection continues the session's text from where it stands,
 * and a token is drawn when the collector is ready for it. Cancelling the collection ends the
 * generation within the time of one layer; the session then stands after the last token that was
 * emitted, or one behind it where that was cancelled while it was handed over.
 *
 * The session is in use by the collection until that ends.
 *
 * @param dispatcher where it is waited for; a thread of it is taken while a token is computed
 */
public fun Session.tokenFlow(
    params: GenerateParams = GenerateParams(),
    dispatcher: CoroutineDispatcher = Dispatchers.IO,
): Flow<GeneratedToken> = flow {
    stream(params).use { stream ->
        while (runInterruptible(dispatcher) { stream.hasNext() }) emit(stream.next())
    }
}
