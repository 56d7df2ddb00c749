package dev.mor.tests

/** All tests of the Kotlin binding: see run.sh. */
fun main() {
    idioms()
    texts()
    failures()
    guards()
    streams()
    loading()
    batches()
    flows()
    calls()
    stress()
    conclude()
}
