package dev.mor.sample

import android.app.Activity
import android.graphics.Color
import android.os.Bundle
import android.text.SpannableString
import android.text.Spanned
import android.text.style.BackgroundColorSpan
import android.view.View
import android.view.ViewGroup
import android.widget.Button
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.ScrollView
import android.widget.TextView
import dev.mor.ChatMessage
import dev.mor.GenerateParams
import dev.mor.GeneratedToken
import dev.mor.Model
import dev.mor.MorException
import dev.mor.Session
import dev.mor.SessionParams
import dev.mor.Tokenizer
import dev.mor.android.loadAsset
import java.util.concurrent.Executors

/**
 * Talks to a model; each token is tinted by the recursions that it took, the darker the more. A
 * model without a chat template, as the repository's is, continues what is written.
 */
class ChatActivity : Activity() {
    /** Everything that loads and computes runs here, one thing at a time. */
    private val worker = Executors.newSingleThreadExecutor()
    private lateinit var shown: TextView
    private lateinit var scroll: ScrollView

    // Set by the worker; the session is also cancelled from the main thread.
    private var model: Model? = null
    private var tokenizer: Tokenizer? = null

    @Volatile
    private var session: Session? = null

    /** Who said what so far, of which the last answer may be a part. */
    private var turns = listOf<ChatMessage>()

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        shown = TextView(this).apply { textSize = 18f }
        scroll = ScrollView(this).apply { addView(shown) }
        val said = EditText(this).apply { hint = "It is a truth" }
        val send = button("Send") {
            val text = said.text.toString().ifEmpty { said.hint.toString() }
            said.text.clear()
            work { answer(text) }
        }
        val stop = button("Stop") { session?.cancel() }
        val row = LinearLayout(this).apply {
            addView(said, LinearLayout.LayoutParams(0, WRAP, 1f))
            addView(send)
            addView(stop)
        }
        setContentView(
            LinearLayout(this).apply {
                orientation = LinearLayout.VERTICAL
                addView(scroll, LinearLayout.LayoutParams(MATCH, 0, 1f))
                addView(row, LinearLayout.LayoutParams(MATCH, WRAP))
            },
        )
        work { open() }
    }

    override fun onDestroy() {
        super.onDestroy()
        session?.cancel()
        worker.execute {
            session?.close()
            tokenizer?.close()
            model?.close()
        }
        worker.shutdown()
    }

    private fun open() {
        val loaded = Model.loadAsset(assets, "austen-mor-5m-q8_0.gguf")
        model = loaded
        tokenizer = Tokenizer(loaded)
        session = Session(loaded, SessionParams(context = context(loaded)))
    }

    private fun answer(text: String) {
        val (model, tokenizer, session) = Triple(model ?: return, tokenizer ?: return, session ?: return)
        show(if (model.info.hasChatTemplate) "\n\n> $text\n" else "\n\n$text")
        var asked = turns + ChatMessage("user", text)
        var tokens = prompt(model, tokenizer, asked)
        // A conversation that leaves no room for an answer begins anew.
        if (tokens.size > context(model) / 2) {
            asked = asked.takeLast(1)
            tokens = prompt(model, tokenizer, asked)
        }
        session.resetCancel()
        // What the session has of it already is not run again.
        session.prefillWhole(tokens)
        val answer = StringBuilder()
        try {
            session.generate(GenerateParams(maxTokens = 100)) {
                answer.append(it.text)
                show(it, model.info.recursions)
            }
        } finally {
            turns = asked + ChatMessage("assistant", answer.toString())
        }
    }

    /** What was said, as the model was trained on it; without a template, as one text to go on with. */
    private fun prompt(model: Model, tokenizer: Tokenizer, said: List<ChatMessage>): IntArray {
        if (!model.info.hasChatTemplate) return tokenizer.encode(said.joinToString("") { it.content })
        return tokenizer.encode(tokenizer.formatChat(said), addSpecial = false, parseSpecial = true)
    }

    private fun context(model: Model) = minOf(model.info.contextLength, 2048)

    /** Runs something and shows what goes wrong in it. */
    private fun work(what: () -> Unit) = worker.execute {
        try {
            what()
        } catch (failure: MorException) {
            show("\n[${failure.message}]\n")
        }
    }

    private fun show(text: CharSequence) = runOnUiThread {
        shown.append(text)
        scroll.fullScroll(View.FOCUS_DOWN)
    }

    private fun show(token: GeneratedToken, recursions: Int) {
        val strength = 160 * token.depth / recursions
        val tinted = SpannableString(token.text)
        val tint = BackgroundColorSpan(Color.argb(strength, 255, 140, 0))
        tinted.setSpan(tint, 0, tinted.length, Spanned.SPAN_EXCLUSIVE_EXCLUSIVE)
        show(tinted)
    }

    private fun button(name: String, pressed: () -> Unit) = Button(this).apply {
        text = name
        setOnClickListener { pressed() }
    }

    private companion object {
        const val MATCH = ViewGroup.LayoutParams.MATCH_PARENT
        const val WRAP = ViewGroup.LayoutParams.WRAP_CONTENT
    }
}
