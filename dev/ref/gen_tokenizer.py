#!/usr/bin/env python3
"""Golden files of test_tokenizer: needs pip install tokenizers transformers sentencepiece gguf safetensors numpy.

    python dev/ref/gen_tokenizer.py [--llama2 tokenizer.json] [--llama3 tokenizer.json] [--gguf model.gguf]
    python dev/ref/gen_tokenizer.py --check libtok.so [--n 20000] [--llama2 ...] [--llama3 ...] [--gguf ...]

test/golden/tokens_*.json, *.gguf     tiny tokenizers, trained here on babble and on the corpus below
test/golden/tokens.safetensors        the corpus (text, offsets) and the ids that `tokenizers` gives for each of them
Ids of the large tokenizers (Llama-2, Llama-3, SmolLM2 as a GGUF file) are stored only where their files are named.

--check compares many random strings instead, through a shared library of ours:
    cc -O2 -fPIC -shared -std=c11 -D_GNU_SOURCE -I. -Illmc llmc/tokenizer*.c llmc/common.c llmc/json.c llmc/gguf.c \
       -lcjson -lpcre2-8 -lm -o libtok.so
"""
import argparse
import ctypes
import io
import json
import os
import random
import numpy as np
import gguf
import sentencepiece
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, trainers, pre_tokenizers, normalizers, Regex, AddedToken
from transformers.convert_slow_tokenizer import generate_merges

GOLDEN = os.path.join(os.path.dirname(__file__), "..", "..", "test", "golden")
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")

CORPUS = [
    "", "a", " ", "  ", "   ", " a", "a ", "Hello, world!", "Hello  world   again", "\n", "\n\n", "a\nb", "a\n\nb",
    "a\r\nb\r\n\r\nc", "a \n b", "\t\ttab\tx", "a\u00a0b\u00a0 c", "\u3000全角　スペース", "word\n", "word \n", "tail   ",
    "don't DON'T I'LL i'Ll we'Ve they'RE 'S 's ’s", "'\u017fx", "it's 'tis 'twas", "1234567890",
    "12 345 6789 3.14159e-10", "٠١٢٣٤٥ ①②③ ½ Ⅷ", "naïve café résumé", "e\u0301 n\u0303 o\u0308", "Ångström Å",
    "Привет, мир! Ёжик", "שלום עולם", "مرحبا بالعالم", "नमस्ते दुनिया", "你好，世界！", "こんにちは世界", "안녕하세요 세계",
    "👍👍🏽👨\u200d👩\u200d👧\u200d👦🏳️\u200d🌈", "🇩🇪🇫🇷 flags", "zero\u200bwidth\u200djoin\ufeffbom",
    "\x01\x02\x7f\x80\x85x", "nul\x00nul", "\u2028line\u2029para", "\u180emvs \u180e", "<s>", "</s>", "<unk>",
    "<s>a</s> b <unk>c", "<|begin_of_text|>hi<|end_of_text|>", "<|eot_id|> x <|eot_id|>",
    "<|im_start|>user\nhi<|im_end|>\n", "<|endoftext|><|endoftext|>", "<|begin_of_tex", "<0x0A><0xFF>", "▁▁a▁ b", "▁",
    "x  <strip>  y", "a<word>b <word> c", "<norm>  <norm>", "a" * 100, "ab" * 70, " " * 90, "\n" * 40,
    "x" + " " * 50 + "y", "!?" * 40, "=" * 77, " zxqj zxqjz ффф", "supercalifragilisticexpialidocious" * 3,
    "def f(x):\n    return x**2  # comment\n", "https://example.com/a?b=c&d=%20#e", "a_b-c.d,e;f:g",
    "$100,000.00 €5 £3 ¥", "∑∫√≠≤≥∞", "\U0001F600\U0001F601 x\U0010FFFF\U000E0001", "ﬁ ﬂ ﬆ ŉ ß ẞ İ ı",
    "\ud7ff\ue000\ufffd", "A\u0300\u0316\u0301\u0317" * 5, "Z̷̡̛a̴l̸g̵o̶", "\r", "\r\r\n", "\v\f\x1c\x1d\x1e\x1f",
    "  \n  \n\t\n x", "One. Two, three;Four  FiveSix.Seven",
    b"\xff", b"a\x80b", b"\xc3", b"\xe2\x82", b"\xf0\x9f\x92", b"\xed\xa0\x80\xed\xb0\x80", b"\xc0\xaf",
    b"\xf5\x80\x80\x80", b"\xe0\x80\x80", b"ok \xfe\xff end", b"\xf0\x9f\x92x\xe2\x82y", b"\xf4\x90\x80\x80",
    b"\xc3\xa9\xc3", b"\x80\x80\x80 \n\xff\n",
]


def as_bytes(s):
    return s if isinstance(s, bytes) else s.encode()


def babble():
    """Sentences of made-up words, and the corpus, to train tiny vocabularies on."""
    r = random.Random(5)
    syllable = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("", "n", "r", "s")]
    words = ["".join(r.choice(syllable) for _ in range(r.randrange(1, 4))) for _ in range(150)]
    words += ["the", "and", "of", "to", "Hello", "world", "don't", "it's", "12", "345", "über", "мир", "世界"]
    text = [" ".join(r.choice(words) for _ in range(12)) + r.choice([".", "!", ",\n", "\n\n"]) for _ in range(200)]
    return text + [s for s in CORPUS if isinstance(s, str) and len(s) < 60 and "\x00" not in s]


def train(pre, size, added=(), **model):
    tok = Tokenizer(models.BPE(**model))
    tok.pre_tokenizer = pre
    tok.train_from_iterator(babble(), trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    for a in added:
        (tok.add_special_tokens if a.special else tok.add_tokens)([a])
    return tok


def special(text, **kw):
    return AddedToken(text, special=True, normalized=False, **kw)


def level(**kw):
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, "use_regex": True, **kw})


def write_gguf(path, model, pre, tokens, types, scores=None, merges=None, ids=()):
    w = gguf.GGUFWriter(path, "llama")
    w.add_tokenizer_model(model)
    if pre:
        w.add_tokenizer_pre(pre)
    w.add_token_list(tokens)
    if scores is not None:
        w.add_token_scores(scores)
    w.add_token_types(types)
    if merges is not None:
        w.add_token_merges(merges)
    for key, value in ids:
        w.add_uint32(f"tokenizer.ggml.{key}_token_id", value)
    w.add_chat_template("{{ messages }} \"quoted\"\n")
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def sentencepiece_model():
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([s for s in babble() if s.strip()]), model_writer=out, model_type="bpe", vocab_size=700,
        byte_fallback=True, character_coverage=0.98, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, split_digits=True, minloglevel=2, num_threads=1, max_sentence_length=400)
    sp = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    tokens = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
    types = [2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1
             for i in range(len(tokens))]
    return tokens, types, [sp.get_score(i) for i in range(len(tokens))]


def spm_tokenizer(tokens, types, scores, **kw):
    vocab = {s: i for i, s in enumerate(tokens)}
    skip = {s for s, k in zip(tokens, types) if k != 1}
    score = dict(zip(tokens, scores))
    merges = generate_merges(vocab, score, skip)        # now in the order that Llama-2's tokenizer.json has
    merges.sort(key=lambda m: (-score[m[0] + m[1]], vocab[m[0] + m[1]], vocab[m[0]], vocab[m[1]]))
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", **{"byte_fallback": True,
                                                                              "fuse_unk": True, **kw}))
    tok.add_special_tokens([special(s) for s in ("<unk>", "<s>", "</s>")])
    return tok


def llama_normalizer():
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def gguf_reference(path):
    """A GGUF file's tokenizer as `tokenizers` would have it, built from its metadata alone."""
    fields = gguf.GGUFReader(path).fields
    get = lambda k: fields[f"tokenizer.ggml.{k}"].contents()
    tokens, types = get("tokens"), get("token_type")
    if get("model") == "llama":
        tok = spm_tokenizer(tokens, types, get("scores"))
        tok.normalizer = llama_normalizer()
        return tok
    merges = [tuple(m.split(" ")) for m in get("merges")]
    llama3 = get("pre") == "llama-bpe"
    tok = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(tokens)}, merges=merges, ignore_merges=llama3))
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), level(use_regex=False)] if llama3 else
        [pre_tokenizers.Digits(individual_digits=True), level()])
    tok.add_special_tokens([special(s) for s, k in zip(tokens, types) if k == 3])
    tok.add_tokens([AddedToken(s, normalized=False) for s, k in zip(tokens, types) if k == 4])
    return tok


def make_tiny():
    """name -> (file, reference)."""
    made = {}

    def put(name, tok):
        path = os.path.join(GOLDEN, f"tokens_{name}.json")
        tok.save(path)
        made[name] = (path, Tokenizer.from_file(path))

    tok = train(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), level(use_regex=False)]), 500)
    state = json.loads(tok.to_str())                # two words that no merge reaches: only ignore_merges finds them
    state["model"]["ignore_merges"] = True
    n = tok.get_vocab_size()
    state["model"]["vocab"].update({"Ġzxqj": n, "ĠÑĦÑĦÑĦ": n + 1})
    tok = Tokenizer.from_str(json.dumps(state))
    tok.add_special_tokens([special("<|begin_of_text|>"), special("<|end_of_text|>"), special("<|eot_id|>")])
    put("llama3", tok)
    put("smollm", train(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level()]), 450, [
        special("<|im_start|>"), special("<|im_end|>"), special("<|endoftext|>"),
        AddedToken("<strip>", lstrip=True, rstrip=True, normalized=False), AddedToken("<word>", single_word=True),
        AddedToken("<norm>", normalized=True), AddedToken("<norm>  <", normalized=False)]))
    split = pre_tokenizers.Split
    put("split", train(pre_tokenizers.Sequence([
        split(", ", "removed"), split(Regex("[A-Z]"), "merged_with_next"), split(Regex("[.;]"), "merged_with_previous"),
        split(Regex(" "), "contiguous"), split(Regex(r"[^\W\d_]+"), "isolated", invert=True),
        split(Regex("x*"), "isolated"), pre_tokenizers.Digits(individual_digits=False),
        level(add_prefix_space=True, use_regex=False)]), 400))

    tokens, types, scores = sentencepiece_model()
    tok = spm_tokenizer(tokens, types, scores)
    tok.normalizer = llama_normalizer()
    tok.add_tokens([AddedToken("<norm>", normalized=True)])
    put("llama2", tok)
    plain = [i for i, k in enumerate(types) if k != 6]          # no byte tokens: unknown characters become <unk>
    for name, scheme, fuse in (("metaspace", "first", True), ("metaspace_split", "always", False)):
        tok = spm_tokenizer([tokens[i] for i in plain], [types[i] for i in plain], [scores[i] for i in plain],
                            byte_fallback=False, fuse_unk=fuse)
        tok.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=name.endswith("split"))
        put(name, tok)

    path = os.path.join(GOLDEN, "tokens_spm.gguf")
    write_gguf(path, "llama", None, tokens, types, scores, None, [("bos", 1), ("eos", 2), ("unknown", 0)])
    made["spm_gguf"] = (path, gguf_reference(path))
    model = json.loads(made["smollm"][1].to_str())
    vocab = dict(model["model"]["vocab"])
    n = len(vocab)
    tokens = sorted(vocab, key=vocab.get) + ["<|im_start|>", "<|im_end|>", "<|user|>"]
    path = os.path.join(GOLDEN, "tokens_bpe.gguf")
    write_gguf(path, "gpt2", "smollm", tokens, [1] * n + [3, 3, 4], None,
               [" ".join(m) for m in model["model"]["merges"]], [("bos", n), ("eos", n + 1)])
    made["bpe_gguf"] = (path, gguf_reference(path))
    return made


def golden(made):
    text = [as_bytes(s) for s in CORPUS]
    out = {"text": np.frombuffer(b"".join(text), np.uint8), 
           "offsets": np.cumsum([0] + [len(s) for s in text]).astype(np.int64)}
    for name, (_, ref) in made.items():
        for plain in (False, True):
            ref.encode_special_tokens = plain
            ids = [ref.encode(s.decode("utf-8", "replace"), add_special_tokens=False).ids for s in text]
            if plain:                                           # only what has specials in it can differ
                ids = [i if b"<" in s else [] for s, i in zip(text, ids)]
            suffix = ".plain" if plain else ""
            out[f"{name}{suffix}.ids"] = np.array(sum(ids, []), np.int32)
            out[f"{name}{suffix}.offsets"] = np.cumsum([0] + [len(i) for i in ids]).astype(np.int32)
    save_file(out, os.path.join(GOLDEN, "tokens.safetensors"))


# --check: our library through ctypes.

class Err(ctypes.Structure):
    _fields_ = [("code", ctypes.c_int), ("text", ctypes.c_char * 1024)]


class Ours:
    def __init__(self, lib, path):
        self.lib, self.p, err = lib, ctypes.c_void_p(), Err()
        if path == "bytes":
            lib.tokenizer_bytes.restype = ctypes.c_void_p
            self.p, rc = ctypes.c_void_p(lib.tokenizer_bytes()), 0
        elif path.endswith(".gguf"):
            g = ctypes.create_string_buffer(1 << 16)
            rc = lib.gguf_open(g, path.encode(), ctypes.byref(err))
            if rc == 0:
                rc = lib.tokenizer_from_gguf(ctypes.byref(self.p), g, ctypes.byref(err))
        else:
            text = open(path, "rb").read()
            rc = lib.tokenizer_from_json(ctypes.byref(self.p), text, ctypes.c_size_t(len(text)), ctypes.byref(err))
        if rc < 0:
            raise SystemExit(f"{path}: {err.text.decode()}")

    def export(self):
        text, n, err = ctypes.c_void_p(), ctypes.c_size_t(), Err()
        assert self.lib.tokenizer_to_json(self.p, ctypes.byref(text), ctypes.byref(n), ctypes.byref(err)) == 0
        return ctypes.string_at(text, n.value).decode()

    def blob(self):
        """The same tokenizer by way of its blob, which has lost the original JSON."""
        data, n, err, other = ctypes.c_void_p(), ctypes.c_size_t(), Err(), object.__new__(Ours)
        assert self.lib.tokenizer_to_blob(self.p, ctypes.byref(data), ctypes.byref(n), ctypes.byref(err)) == 0
        other.lib, other.p = self.lib, ctypes.c_void_p()
        rc = self.lib.tokenizer_from_blob(ctypes.byref(other.p), data, n, ctypes.byref(err))
        if rc < 0:
            raise SystemExit(err.text.decode())
        return other

    def encode(self, text, specials):
        ids, n, err = ctypes.POINTER(ctypes.c_int32)(), ctypes.c_size_t(), Err()
        rc = self.lib.tokenizer_encode(self.p, text, ctypes.c_size_t(len(text)), ctypes.c_bool(specials),
                                       ctypes.byref(ids), ctypes.byref(n), ctypes.byref(err))
        if rc < 0:
            raise SystemExit(err.text.decode())
        got = ids[:n.value]
        ctypes.CDLL(None).free(ids)
        return got

    def decode(self, ids):
        out, n = b"", ctypes.c_size_t()
        self.lib.tokenizer_piece.restype = ctypes.c_void_p
        for k, i in enumerate(ids):
            p = self.lib.tokenizer_piece(self.p, ctypes.c_int32(i), ctypes.c_bool(k == 0), ctypes.byref(n))
            out += ctypes.string_at(p, n.value)
        return out


def random_text(r):
    ascii_char = lambda: chr(r.randrange(128))
    any_char = lambda: chr(r.choice([r.randrange(0x80, 0x800), r.randrange(0x800, 0xd800),
                                     r.randrange(0xe000, 0x110000), r.randrange(0x3000, 0x9fff),
                                     r.randrange(0x1f300, 0x1f900)]))
    words = "the of and to in is that it was for on as with they at be this have from or had by word but what".split()
    m, kind = r.randrange(1, 40), r.random()
    if kind < .25:
        s = "".join(ascii_char() for _ in range(m))
    elif kind < .5:
        s = "".join(any_char() if r.random() < .5 else ascii_char() for _ in range(m))
    elif kind < .75:
        between = [" ", " ", "  ", "\n", "\n\n", "", ". ", ", ", "\t", "'s "]
        s = "".join(r.choice(words) + r.choice(between) for _ in range(m))
    else:
        parts = [s for s in CORPUS if isinstance(s, str)]
        s = "".join(r.choice(parts) if r.random() < .6 else r.choice(words) for _ in range(r.randrange(1, 5)))
    b = bytearray(s.encode())
    if b and r.random() < .05:
        b[r.randrange(len(b))] = r.randrange(256)
    return bytes(b)


def every_character():
    every = [*range(0xd800), *range(0xe000, 0x110000)]
    for i in range(0, len(every), 16):
        yield "".join(f"a{c}b '{c} {c}1 {c}{c}\n" for c in map(chr, every[i:i + 16])).encode()


def check(made, so, n, characters):
    lib = ctypes.CDLL(so)
    for name, (path, ref) in made.items():
        ours = Ours(lib, path)
        again, exported = ours.blob(), None
        exported = Tokenizer.from_str(again.export())
        ref, r, bad = ref or exported, random.Random(1), 0
        texts = [as_bytes(s) for s in CORPUS] + [random_text(r) for _ in range(n)]
        if characters:
            texts += every_character()
        for specials in (True, False):
            ref.encode_special_tokens = exported.encode_special_tokens = not specials
            for k, b in enumerate(texts if specials else texts[:n]):
                s = b.decode("utf-8", "replace")
                want = ref.encode(s, add_special_tokens=False).ids
                got = ours.encode(b, specials)
                ok = got == want
                if k < n // 4:
                    ok = ok and again.encode(b, specials) == want
                    ok = ok and exported.encode(s, add_special_tokens=False).ids == want
                if not ok and (bad := bad + 1) < 4:
                    print(name, specials, b, want[:40], got[:40])
        wrong = 0
        for b in texts[:n]:
            i = ours.encode(b, False)
            got, want = ours.decode(i).decode("utf-8", "replace"), exported.decode(i, skip_special_tokens=False)
            if got != want and (wrong := wrong + 1) < 4:
                print(name, i[:40], repr(got[:80]), repr(want[:80]))
        print(f"{name}: {2 * len(texts)} strings, {bad} with other ids, {wrong} decoded otherwise", flush=True)


def main():
    ap = argparse.ArgumentParser()
    for a in ("--llama2", "--llama3", "--gguf", "--check"):
        ap.add_argument(a)
    ap.add_argument("--n", type=int, default=20000)
    ap.add_argument("--only", help="with --check: this tokenizer alone")
    ap.add_argument("--characters", action="store_true", help="with --check: every character of Unicode too")
    a = ap.parse_args()
    if a.check:
        open_any = lambda p: gguf_reference(p) if p.endswith("gguf") else Tokenizer.from_file(p)
        tiny = [f for f in sorted(os.listdir(GOLDEN)) if f.startswith("tokens_") and f.endswith((".json", ".gguf"))]
        made = {f[7:].rsplit(".", 1)[0]: (os.path.join(GOLDEN, f), open_any(os.path.join(GOLDEN, f))) for f in tiny}
    else:
        made = make_tiny()
    for name, path in (("Llama-2", a.llama2), ("Llama-3", a.llama3)):
        if path:
            made[name] = (path, Tokenizer.from_file(path))
    if a.gguf:
        made["SmolLM2"] = (a.gguf, gguf_reference(a.gguf))
    if a.check:
        made["bytes"] = ("bytes", None)
    made = {k: v for k, v in made.items() if a.only in (None, k)}
    check(made, os.path.abspath(a.check), a.n, a.characters) if a.check else golden(made)


if __name__ == "__main__":
    main()
