package dev.mor.tests

import dev.mor.GeneratedToken
import dev.mor.Model
import dev.mor.MorException
import dev.mor.Session
import dev.mor.SessionParams
import dev.mor.coroutines.tokenFlow
import kotlinx.coroutines.CompletableDeferred
import kotlinx.coroutines.cancelAndJoin
import kotlinx.coroutines.flow.first
import kotlinx.coroutines.flow.take
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.launch
import kotlinx.coroutines.runBlocking
import kotlin.test.assertEquals
import kotlin.test.assertTrue

fun flows() {
    test("a flow gets what a callback gets, and may be left early") {
        Model.load(modelFile).use { model ->
            val wanted = mutableListOf<GeneratedToken>()
            model.prompted().use { it.generate(most(12)) { token -> wanted.add(token) } }
            model.prompted().use { session ->
                runBlocking {
                    assertEquals(wanted.take(3), session.tokenFlow().take(3).toList())
                    assertEquals(7, session.length)
                    assertEquals(wanted[3], session.tokenFlow().first())
                    assertEquals(wanted.drop(4), session.tokenFlow(most(8)).toList())
                }
                assertEquals(16, session.length)
            }
            Session(model, small).use {
                runBlocking { fails<MorException.NotReady> { it.tokenFlow().first() } }
            }
        }
    }

    test("a cancelled collection frees the session") {
        Model.load(modelFile).use { model ->
            repeat(20) { round ->
                model.prompted(SessionParams(context = 256, threads = 1)).use { session ->
                    runBlocking {
                        val begun = CompletableDeferred<Unit>()
                        val job = launch { session.tokenFlow().collect { begun.complete(Unit) } }
                        begun.await()
                        if (round % 2 == 1) kotlinx.coroutines.delay(3)
                        job.cancelAndJoin()
                    }
                    val length = session.length
                    assertTrue(length in 5..256)
                    session.rewind(4)
                    session.step(300)
                }
            }
        }
    }
}
