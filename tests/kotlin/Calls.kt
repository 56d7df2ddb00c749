package dev.mor.tests

import dev.mor.Batch
import dev.mor.BatchEvent
import dev.mor.BatchParams
import dev.mor.BatchPlan
import dev.mor.ChatMessage
import dev.mor.DecodeStream
import dev.mor.Device
import dev.mor.Finish
import dev.mor.GenerateParams
import dev.mor.KvType
import dev.mor.LoadParams
import dev.mor.Model
import dev.mor.MorException
import dev.mor.Native
import dev.mor.Pressure
import dev.mor.Request
import dev.mor.Routing
import dev.mor.SamplerParams
import dev.mor.SequenceStatus
import dev.mor.Session
import dev.mor.SessionParams
import dev.mor.Tokenizer
import java.io.File
import java.nio.ByteBuffer
import kotlin.test.assertTrue

/** The tables of tests/calls, whose README says what they are. */
fun calls() {
    val smollm2 = System.getenv("MOR_TEST_SMOLLM2")
    val tables = mapOf("austen" to modelFile.path, "smollm2" to smollm2)
    for ((table, model) in tables) {
        if (model == null) {
            println("SKIPPED tests/calls/$table.tsv: MOR_TEST_SMOLLM2 names no model")
            continue
        }
        for (threads in 1..2) {
            test("tests/calls/$table.tsv, $threads threads") { run(table, model, threads) }
        }
    }
}

private fun run(table: String, model: String, threads: Int) {
    val root = File(System.getProperty("mor.root"))
    val wrong = mutableListOf<String>()
    var calls = 0
    Objects(model, root, threads).use { objects ->
        File(root, "tests/calls/$table.tsv").readLines().forEachIndexed { at, line ->
            if (line.isEmpty() || line.startsWith("#")) return@forEachIndexed
            val fields = line.split('\t').map(::unescape)
            val (wanted, said) = fields.takeLast(2)
            val (status, came) = try {
                "OK" to objects.call(fields.first(), fields.subList(1, fields.size - 2))
            } catch (failure: MorException) {
                failure.status.name to failure.message.orEmpty()
            }
            calls++
            val right = status == wanted && if (wanted == "OK") came == said else said in came
            if (!right) wrong.add("line ${at + 1}: $line\n    came: $status $came")
        }
    }
    assertTrue(wrong.isEmpty(), wrong.joinToString("\n"))
    assertTrue(calls > 50, "only $calls calls")
    println("        $calls calls")
}

private fun unescape(field: String): String = if (field == "-") "" else {
    Regex("""\\(.)""").replace(field) {
        when (val letter = it.groupValues[1]) {
            "n" -> "\n"
            "t" -> "\t"
            "r" -> "\r"
            "s" -> " "
            else -> letter
        }
    }
}

private fun words(field: String): List<String> = field.split(' ').filter { it.isNotEmpty() }

private fun numbers(field: String): IntArray = words(field).map { it.toInt() }.toIntArray()

private fun Iterable<*>.list(): String = joinToString(" ")

private fun name(word: Enum<*>): String = word.name.lowercase()

/** A list of `key=value`. */
private class Options(field: String) {
    private val values = words(field).associate { it.substringBefore('=') to it.substringAfter('=') }

    operator fun get(key: String): String? = values[key]
    fun int(key: String, otherwise: Int): Int = values[key]?.toInt() ?: otherwise
    fun float(key: String, otherwise: Float): Float = values[key]?.toFloat() ?: otherwise
    val kv: KvType get() = KvType.valueOf((values["kv"] ?: "f16").uppercase())

    fun sampler(): SamplerParams = SamplerParams().apply {
        temperature = float("temperature", temperature)
        topP = float("top_p", topP)
        minP = float("min_p", minP)
        repeatPenalty = float("penalty", repeatPenalty)
        topK = int("top_k", topK)
        repeatLastN = int("last_n", repeatLastN)
        seed = get("seed")?.toLong() ?: seed
    }
}

/** The objects that a table's calls work on. */
private class Objects(val file: String, val root: File, val threads: Int) : AutoCloseable {
    lateinit var model: Model
    lateinit var tokenizer: Tokenizer
    lateinit var session: Session
    lateinit var batch: Batch
    var pieces = mutableListOf<String>()
    var written = ""
    var state = ByteArray(0)
    val sequences = LongArray(8) { -1 }
    private val made = mutableListOf<AutoCloseable>()

    /** Kept until the end: the objects of a table are few. */
    private fun <T : AutoCloseable> keep(new: T): T = new.also { made.add(it) }

    override fun close() = made.asReversed().forEach { it.close() }

    private fun load(arguments: List<String>) {
        val path = if (arguments[0] == "@") File(file) else File(root, arguments[0])
        val loaded = if (arguments.size == 1) Model.load(path) else {
            val count = arguments[1].toInt()
            val bytes = path.inputStream().use { it.readNBytes(count) }
            check(bytes.size == count) { "$path has fewer than $count bytes" }
            val buffer = ByteBuffer.allocateDirect(count).put(bytes)
            Model.load(buffer.rewind(), LoadParams(copy = true))
        }
        model = keep(loaded)
        tokenizer = keep(Tokenizer(model))
    }

    private fun loadOn(arguments: List<String>) {
        val path = if (arguments[0] == "@") file else File(root, arguments[0]).path
        // A device that is none cannot be written in Kotlin, but passed to what is below it.
        arguments[1].toIntOrNull()?.let { Native.modelLoad(path.encodeToByteArray(), it shl 8, 0) }
        val device = Device.valueOf(arguments[1].uppercase())
        model = keep(Model.load(path, LoadParams(device = device)))
        tokenizer = keep(Tokenizer(model))
    }

    private fun describe(): String = with(model.info) {
        "${name(kind)} vocab $vocabSize context $contextLength hidden $hiddenSize " +
            "feed_forward $feedForwardSize heads $heads kv_heads $kvHeads head_dim $headDim " +
            "stored $storedLayers logical $logicalLayers recursions $recursions weights $weightBytes " +
            "unshared $unsharedWeightBytes parameters $parameters " +
            "tokenizer ${if (hasTokenizer) 1 else 0} template ${if (hasChatTemplate) 1 else 0}"
    }

    private fun sessionParams(field: String): SessionParams = with(Options(field)) {
        val p = SessionParams()
        SessionParams(
            int("context", 0), int("batch", p.batch), int("threads", threads), kv, int("pages", 0).toLong(),
        )
    }

    private fun batchParams(field: String): BatchParams = with(Options(field)) {
        val p = BatchParams()
        p.copy(
            context = int("context", 0),
            sequences = int("sequences", p.sequences),
            rows = int("batch", p.rows),
            kvPages = int("pages", 0).toLong(),
            threads = int("threads", threads),
            kvType = kv,
            pressure = Pressure.valueOf((get("pressure") ?: "evict").uppercase()),
        )
    }

    private fun plan(field: String): String = with(model.plan(sessionParams(field))) {
        planned(context, batch, kvPages, kvBytes, kvBytesPerToken, bytes > kvBytes, threads)
    }

    private fun plan(p: BatchPlan): String = "sequences ${p.sequences} " +
        planned(p.context, p.rows, p.kvPages, p.kvBytes, p.kvBytesPerToken, p.bytes > p.kvBytes, p.threads)

    private fun planned(
        context: Int, batch: Int, pages: Long, kv: Long, token: Long, more: Boolean, threads: Int,
    ): String {
        val right = if (more && threads == this.threads) "" else " WRONG"
        return "context $context batch $batch pages $pages kv_bytes $kv per_token $token$right"
    }

    private fun encode(flags: String, text: String): IntArray =
        tokenizer.encode(text, flags.toInt() and 1 != 0, flags.toInt() and 2 != 0)

    private fun likeliest(logits: FloatArray): String =
        logits.indices.maxByOrNull { logits[it] }.toString()

    private fun generate(verb: String, a: List<String>): String {
        val own = if (verb == "generate") 1 else 2
        val after = if (own == 2) a[1].toInt() else 0
        val most = if (a[0].isEmpty()) Int.MAX_VALUE else a[0].toInt()
        pieces = mutableListOf()
        written = ""
        return name(session.generateWhile(GenerateParams(most, a.drop(own))) {
            pieces.add("${it.id}:${it.depth}")
            written += it.text
            if (pieces.size == after && verb == "generate_cancel") session.cancel()
            pieces.size != after || verb == "generate_cancel"
        })
    }

    private fun restore(a: List<String>) {
        val copy = state.copyOf()
        if (a.isNotEmpty()) copy[a[0].toInt()] = (copy[a[0].toInt()].toInt() xor 1).toByte()
        session.restore(copy)
    }

    private fun add(verb: String, a: List<String>) {
        val given = Options(a[a.size - 2])
        val request = Request(tokenizer.encode(a.last(), addSpecial = false), sampler = given.sampler())
        request.maxTokens = given.int("max", request.maxTokens)
        request.cut = given.float("cut", request.cut)
        request.depthLimit = given.int("depth_limit", request.depthLimit)
        request.priority = given.int("priority", request.priority)
        request.ignoreEnd = given.int("ignore_end", 0) != 0
        sequences[a[0].toInt()] =
            if (verb == "add") batch.add(request) else batch.fork(place(a[1]), a[2].toInt(), request)
    }

    private fun place(field: String): Long = sequences[field.toInt()]

    private fun tick(): List<String> = batch.tick().map { event ->
        val at = sequences.indexOf(event.sequence)
        when (event) {
            is BatchEvent.Token -> "token:$at:${event.id}:${event.depth}"
            is BatchEvent.Evicted -> "evicted:$at"
            is BatchEvent.Resumed -> "resumed:$at"
            is BatchEvent.Full -> "full:$at"
            is BatchEvent.Finished -> "finished:$at:${name(event.finish)}"
        }
    }

    private fun run(): List<String> = buildList {
        do addAll(tick()) while (!batch.isIdle)
    }

    private fun status(sequence: Long): String {
        val status = batch.status(sequence)
        val why = batch.finish(sequence)
        check((status == SequenceStatus.FINISHED) == (why != null))
        return name(status) + if (why == null) "" else ":${name(why)}"
    }

    private fun counters(): String = with(batch.counters()) {
        listOf(ticks, rowCapacity, finished, logits, evictions, rows.sum()).list()
    }

    fun call(verb: String, a: List<String>): String = when (verb) {
        "load", "load_bytes" -> quiet { load(a) }
        "load_on" -> quiet { loadOn(a) }
        "describe" -> describe()
        "metadata" -> model.metadata(a[0]) ?: throw MorException.InvalidArgument("none")
        "encode" -> encode(a[0], a[1]).toList().list()
        "decode" -> tokenizer.decode(numbers(a[1]), special = a[0] == "1")
        "decode_each" -> DecodeStream(tokenizer, special = a[0] == "1").let { stream ->
            numbers(a[1]).joinToString("") { stream.next(it) + "|" } + stream.end()
        }
        "token_bytes" -> tokenizer.tokenBytes(a[1].toInt(), special = a[0] == "1")
            .joinToString("") { "%02x".format(it) }
        "is_end" -> tokenizer.isEnd(a[0].toInt()).toString()
        "format_chat" -> tokenizer.formatChat(
            a.drop(1).chunked(2).map { ChatMessage(it[0], it[1]) }, addPrompt = a[0] == "1",
        )
        "plan" -> plan(a[0])
        "session" -> quiet { session = keep(Session(model, sessionParams(a[0]))) }
        "prefill" -> quiet { session.prefill(numbers(a[0])) }
        "prefill_whole" -> session.prefillWhole(numbers(a[0])).toString()
        "prompt" -> encode(a[0], a[1]).let { session.prefill(it); it.size.toString() }
        "step" -> FloatArray(model.info.vocabSize).let { session.step(a[0].toInt(), it); likeliest(it) }
        "log_probabilities" ->
            session.logProbabilities(numbers(a[0])).map { Math.round(100 * it) }.list()
        "logits" -> likeliest(session.logits())
        "sampler" -> quiet { session.setSampler(Options(a[0]).sampler()) }
        "sample" -> session.sample().toString()
        "generate", "generate_until", "generate_cancel" -> generate(verb, a)
        "pieces" -> pieces.list()
        "text" -> written
        "length" -> session.length.toString()
        "tokens" -> session.tokens().drop(a[0].toInt()).list()
        "depths" -> session.depths().drop(a[0].toInt()).list()
        "histogram" -> session.depthHistogram().toList().list()
        "kv_bytes" -> session.kvBytesUsed.toString()
        "cut" -> quiet { session.setCut(a[0].toFloat()) }
        "depth_limit" -> quiet { session.setDepthLimit(a[0].toInt()) }
        "routing" -> quiet { session.setRouting(Routing.valueOf(a[0].uppercase())) }
        "rewind" -> quiet { session.rewind(a[0].toInt()) }
        "save" -> { state = session.save(); state.size.toString() }
        "restore" -> quiet { restore(a) }
        "cancel" -> quiet { session.cancel() }
        "reset_cancel" -> quiet { session.resetCancel() }
        "batch_plan" -> plan(model.planBatch(batchParams(a[0])))
        "batch_plan_in" -> plan(model.planBatchIn(a[2].toLong(), a[1].toDouble(), batchParams(a[0])))
        "batch_pages" -> model.batchPagesFor(a[1].toDouble(), batchParams(a[0])).toString()
        "batch" -> quiet { batch = keep(Batch(model, batchParams(a[0]))) }
        "add", "fork" -> quiet { add(verb, a) }
        "tick" -> tick().list()
        "run" -> run().list()
        "stop" -> quiet { batch.stop(place(a[0])) }
        "remove" -> quiet { batch.remove(place(a[0])) }
        "resume" -> quiet { batch.resume(place(a[0])) }
        "status" -> status(place(a[0]))
        "failure" -> batch.failure(place(a[0]))?.status?.name ?: "OK"
        "batch_tokens" -> batch.tokens(place(a[0])).toList().list()
        "batch_depths" -> batch.depths(place(a[0])).toList().list()
        "batch_idle" -> batch.isIdle.toString()
        "batch_kv_bytes" -> batch.kvBytesUsed.toString()
        "batch_counters" -> counters()
        "in_step" -> quiet { batch.setInStep(a[0] == "1") }
        else -> error("no verb '$verb'")
    }

    private inline fun quiet(work: () -> Unit): String {
        work()
        return ""
    }
}
