"""Makes the tokenizer tests' data: small vocabularies and what other tokenizers make of hard text.

    python tools/golden/tokenizer.py                       writes tests/data/tokenizer/
    python tools/golden/tokenizer.py --smollm2 FILE.gguf   also makes the ids of SmolLM2's vocabulary anew
    python tools/golden/tokenizer.py --fuzz N --out DIR    the same with N random texts, for
                                                           MOR_TEST_TOKENIZER_DIR=DIR cargo test --test tokenizer

Needs tokenizers, sentencepiece, gguf and numpy from PyPI. The ids of the byte-level vocabularies come
from HF's tokenizers, those of the SentencePiece vocabulary from sentencepiece itself.
"""

import argparse
import io
import json
import pathlib
import random
import unicodedata

import gguf
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = pathlib.Path(__file__).resolve().parents[2]

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# llama.cpp's list for files that name no pre-tokenizer.
DEFAULT = [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"]

CONTROL = ["<|begin|>", "<|im_end|>", "<|im_"]
USER = ["<tool>", "\n\n\n", "    "]

PROSE = """
The quick brown fox jumps over the lazy dog; it wasn't the first time, and it won't be the last.
They're here, we've seen them, I'm sure you'll agree that he'd go. THEY'RE LOUD, I'M NOT.
In 1984, 2001 and 2024 there were 123456789 reasons; 3.14159 is not 22/7, nor is 1,000,000 €.
def main(argv):\n    for i in range(10):\n        print(f"{i:>4} {argv[i]!r}")\n\treturn {'a': [1, 2, 3]}
fn add<T: Into<u64>>(a: T, b: T) -> u64 { a.into() + b.into() } // => x != y && z <= w
Grüße aus Köln, naïve café, façade, señor, Ærø, Łódź, İstanbul, Ελλάδα, Москва, Київ.
学而时习之，不亦说乎？ 日本語のテキストです。한국어 문장도 있습니다. ภาษาไทยไม่มีช่องว่าง
السلام عليكم ورحمة الله وبركاته. हिन्दी में लिखा हुआ पाठ। ১২৩ ٤٥٦ ⅷ ½ ²
the then they there these this that those than thank think thing through thought
"""

CASES = [
    "",
    " ",
    "  ",
    "     ",
    "a",
    " a",
    "a ",
    "Hello, world!",
    "Hello  world   and    more     spaces      here",
    "  leading and trailing  ",
    "\t",
    "\t\ttabs\tin\t text\t",
    "\n",
    "\n\n",
    "a\nb\n\nc\n\n\nd\n\n\n\ne\n\n\n\n\nf\n",
    "a \n b  \n  c\n \nd",
    "CRLF\r\nlines\r\n\r\n\r\nend\r",
    "\r\r\n\n \r \n",
    "0 1 12 123 1234 12345 123456 1234567 12345678",
    "in 2024 at 12:34:56, 3.14159 or 1,000,000.00 or 0xDEADBEEF or 1e-10",
    "a1b22c333d4444e",
    "I'm you're he's we've they'll I'd can't won't",
    "I'M YOU'RE HE'S WE'VE THEY'LL I'D CAN'T WON'T",
    "'s't're've'm'll'd 'S'T'RE'VE'M'LL'D 'r 'v 'l 'x ' ''",
    "'\u017f 'a\u017fb' x'\u017fy l'\u017f",
    "don\u2019t \u2018quoted\u2019 \u201cdouble\u201d \u2026 \u2013 \u2014",
    "caf\u00e9 na\u00efve \u00c5ngstr\u00f6m (precomposed)",
    "cafe\u0301 nai\u0308ve A\u030angstro\u0308m (combining)",
    "\u0301x \u0301 e\u0301\u0302\u0303\u0304 Z\u0351\u036b\u0343a\u0363\u0368l",
    "\u5b66\u800c\u65f6\u4e60\u4e4b\uff0c\u4e0d\u4ea6\u8bf4\u4e4e\uff1f\u3002\u300c\u5f15\u7528\u300d",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3067\u3059\u3002\uff11\uff12\uff13\uff34\uff25\uff38\uff34",
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5\ub3c4 \uc788\uc2b5\ub2c8\ub2e4. \u1112\u1161\u11ab",
    "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22\u0e44\u0e21\u0e48\u0e21\u0e35\u0e0a\u0e48\u0e2d\u0e07\u0e27\u0e48\u0e32\u0e07",
    "\u0627\u0644\u0633\u0644\u0627\u0645 \u0639\u0644\u064a\u0643\u0645\u060c \u0668\u0669 \u0640\u0640 \u0644\u0627\u0650",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902 \u0967\u0968\u0969 \u0996\u09cd\u09af",
    "\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd \u200f\u05e2\u05d5\u05dc\u05dd\u200e",
    "\U0001f600 \U0001f44b\U0001f3fd \U0001f469\U0001f3fd\u200d\U0001f680 \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1e9\U0001f1ea \u2764\ufe0f \u0031\ufe0f\u20e3",
    "x\U0001f600y\U0001f600\U0001f600 z",
    "def f(x):\n    if x > 0:\n        return x ** 2  # square\n\treturn -1\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * 2; } // ok\n",
    "SELECT * FROM t WHERE a='it''s' AND b<>\"q\";",
    "<div class=\"a b\">&nbsp;&amp;</div><!-- c -->",
    "{\"key\": [1, 2.5e3, null, true], \"s\": \"\\u00e9\\n\"}",
    "https://example.org/a/b?c=d&e=%20f#g user@example.org C:\\dir\\file.txt",
    "!@#$%^&*()_+-=[]{}|;':\",./<>?`~",
    "!!!??? ... --- === ### *** ___ $$$ ``` ~~~ ||| ^^^ <<< >>>",
    "a.b,c;d:e!f?g(h)i[j]k{l}m<n>o/p\\q|r~s^t`u+v=w$x",
    "\u00a0nbsp\u00a0\u00a0two \u00a0mixed\u00a0 ",
    "next\u0085line \u0085 \u0085\u0085x",
    "\u2000\u2001en em\u2002\u2003 thin\u2009hair\u200a fig\u2007 narrow\u202f ideo\u3000x",
    "line\u2028sep para\u2029sep\u2028\u2029",
    "zero\u200bwidth\u200cjoin\u200dbom\ufeff word\u2060joiner soft\u00adhyphen",
    "\u180emongolian\u180e \u1680ogham\u1680",
    "vt\x0bff\x0c us\x1f fs\x1c del\x7f esc\x1b bell\x07",
    "\u0660\u0661\u0662\u0663 \u0967\u0968\u0969\u096a \u09e7\u09e8\u09e9 \uff11\uff12\uff13\uff14 \U0001d7d8\U0001d7d9\U0001d7da",
    "\u2160\u2161\u2162 \u2460\u2461\u2462 \u00bd\u00be \u00b2\u00b3\u00b9 \u3007\u4e00\u4e8c \u0bf0\u0bf1",
    "\u0378 \u0379unassigned\u0378\u0378 \U000e0080 \U0003fffd \U0010fffd \ue000private\ue001",
    "\ufffe\uffff \ufffd replacement \ufffd\ufffd",
    "\u2581visible \u2581\u2581 space\u2581",
    "\u0120\u010a\u0100 byte-level letters \u0120the \u0143",
    "\u01c5 \u02b0 \u00aa \u00ba \u2c7c \u3005 titlecase, modifier and ordinal letters",
    "\u212a \u212b \u1e9e \u00df \ufb00 \ufb06 folds",
    "a" * 600,
    "ab" * 400 + " " + "\u00e9" * 200,
    " " * 300 + "x" + "\n" * 200 + "\t" * 50,
    "1" * 500,
    "the" * 300,
    "!" * 200 + "?" * 33,
    "Pneumonoultramicroscopicsilicovolcanoconiosis Donaudampfschifffahrtsgesellschaft",
    "MiXeD CaSe WORDS camelCase snake_case kebab-case SCREAMING_CASE x86_64",
    "<|begin|>user\nhi<|im_end|>\n<|im_start|> <tool> <tool>x</tool> <|end",
    "<|im_<|im_end|><|begin|><|begin|> <tool><tool>",
    "\n\n\n\n\n\n\n x     y         z",
]
# A whole page: everything above at once, but for what is only long.
CASES.append("\n".join(case for case in CASES if len(case) < 200))


def alphabet():
    """The characters of byte-level BPE, by byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(rest)) for byte in range(256)]


def split_by(patterns):
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def gpt2_like(digits):
    parts = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])


PRE = {
    "smollm": gpt2_like(True),
    "gpt-2": gpt2_like(False),
    "default": split_by(DEFAULT),
    "llama-bpe": split_by([LLAMA3]),
    "qwen2": split_by([QWEN2]),
}


def byte_level(name, vocab, merges, control, user):
    """HF's tokenizer for a vocabulary, with or without its control tokens."""
    model = models.BPE(vocab=vocab, merges=merges, ignore_merges=name == "llama-bpe")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = PRE[name]
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in user])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in control])
    return tokenizer


def train_byte_level(name):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = PRE[name]
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet(), show_progress=False)
    tokenizer.train_from_iterator([*PROSE.splitlines(keepends=True)] * 2 + CASES, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    vocab = model["vocab"]
    for text in CONTROL + USER:
        vocab.setdefault(text, len(vocab))
    return vocab, merges


def write_gguf(path, fields):
    writer = gguf.GGUFWriter(None, "llama")
    for add in fields:
        add(writer)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.close()


def make_byte_level(name, path, cases):
    vocab, merges = train_byte_level(name)
    tokens = sorted(vocab, key=vocab.get)
    types = [3 if t in CONTROL else 4 if t in USER else 1 for t in tokens]
    write_gguf(path, [
        lambda w: w.add_tokenizer_model("gpt2"),
        lambda w: w.add_tokenizer_pre(name),
        lambda w: w.add_token_list(tokens),
        lambda w: w.add_token_types(types),
        lambda w: w.add_token_merges([" ".join(pair) for pair in merges]),
        lambda w: w.add_bos_token_id(vocab["<|begin|>"]),
        lambda w: w.add_eos_token_id(vocab["<|im_end|>"]),
    ])
    all_of_it = byte_level(name, vocab, merges, CONTROL, USER)
    plain = byte_level(name, vocab, merges, [], USER)
    return both_ways(all_of_it, plain, cases)


def ids_of(tokenizer, cases):
    return [tokenizer.encode(case, add_special_tokens=False).ids for case in cases]


def both_ways(all_of_it, plain, cases):
    """The ids with control tokens as text, and with them as tokens where that differs."""
    plain = ids_of(plain, cases)
    pairs = zip(plain, ids_of(all_of_it, cases))
    return {"plain": plain, "special": [None if a == b else b for a, b in pairs]}


def make_spm(path, cases, byte_fallback):
    model = io.BytesIO()
    # Without bytes, few characters are known: the rest must become the unknown token.
    text = [line for line in PROSE.splitlines() if line] * 4
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, model_type="bpe",
        vocab_size=600 if byte_fallback else 350, byte_fallback=byte_fallback,
        character_coverage=0.98, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, allow_whitespace_only_pieces=True, minloglevel=2, num_threads=1,
    )
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    count = range(sp.get_piece_size())
    kind = lambda i: 2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1
    write_gguf(path, [
        lambda w: w.add_tokenizer_model("llama"),
        lambda w: w.add_token_list([sp.id_to_piece(i) for i in count]),
        lambda w: w.add_token_scores([sp.get_score(i) for i in count]),
        lambda w: w.add_token_types([kind(i) for i in count]),
        lambda w: w.add_bos_token_id(sp.bos_id()),
        lambda w: w.add_eos_token_id(sp.eos_id()),
        lambda w: w.add_unk_token_id(sp.unk_id()),
    ])
    return {"plain": [sp.encode(case) for case in cases]}


def smollm2_ids(path, cases):
    reader = gguf.GGUFReader(path)
    field = lambda key: reader.fields[f"tokenizer.ggml.{key}"].contents()
    tokens, types = field("tokens"), field("token_type")
    merges = [tuple(line.split(" ", 1)) for line in field("merges")]
    vocab = {token: index for index, token in enumerate(tokens)}
    control = [token for token, kind in zip(tokens, types) if kind == 3]
    all_of_it = byte_level("smollm", vocab, merges, control, [])
    return both_ways(all_of_it, byte_level("smollm", vocab, merges, [], []), cases)


def random_texts(count, seed=1):
    """Texts of pieces that are hard next to each other."""
    rng = random.Random(seed)
    pieces = [*" \n\r\t'!", "  ", "\r\n", "'s", "'LL", "'re", "12", "345", "the", " a", "\u00e9", "e\u0301"]
    pieces += sorted({c for case in CASES for c in case}) + CONTROL + USER

    def one():
        if rng.random() < 0.1:
            # What Unicode assigned last is a letter to one tokenizer and nothing to another.
            character = chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x3_0000)]))
            return character if unicodedata.category(character) != "Cn" else "\u0378"
        return rng.choice(pieces)

    return ["".join(one() for _ in range(rng.randrange(1, 40))) for _ in range(count)]


def write_json(path, value):
    """Writes a list, or lists by name, with an element a line."""
    lines = lambda items: "[\n" + ",\n".join(json.dumps(i, separators=(",", ":")) for i in items) + "\n]"
    if isinstance(value, dict):
        text = "{\n" + ",\n".join(f'"{key}": {lines(items)}' for key, items in value.items()) + "\n}"
    else:
        text = lines(value)
    path.write_text(text + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "tests/data/tokenizer")
    parser.add_argument("--smollm2", type=pathlib.Path)
    parser.add_argument("--fuzz", type=int)
    args = parser.parse_args()
    cases = random_texts(args.fuzz) if args.fuzz else CASES
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "cases.json", cases)
    for name in PRE:
        write_json(args.out / f"{name}.json", make_byte_level(name, args.out / f"{name}.gguf", cases))
    write_json(args.out / "spm.json", make_spm(args.out / "spm.gguf", cases, True))
    write_json(args.out / "spm-unknown.json", make_spm(args.out / "spm-unknown.gguf", cases, False))
    if args.smollm2:
        write_json(args.out / "smollm2.json", smollm2_ids(args.smollm2, cases))


main()
