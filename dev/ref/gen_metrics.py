#!/usr/bin/env python3
"""Golden values for test_metrics: texts through Python's own re, str.strip, str.split and str.capitalize.

Plain Python, nothing to install. Writes test/golden/metrics.json, a list of objects:
  in, detok, words, chars, clean      wikitext's detokenizer, the word count, HellaSwag's cleaning
  ctx_b, capital                      what str.capitalize makes of it
The rules are those of lm-evaluation-harness 0.4.5 as doc/numerics.md states them, written down again here.
"""
import json
import random
import re

BEFORE = [("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")] + [(f" {c} ", f"{c} ") for c in ":;.!?,"]
AFTER = [("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \u00b0 ", "\u00b0"), (" \n", "\n"), ("\n ", "\n"),
         (" N ", " 1 "), (" 's", "'s")]


def detokenize(text):
    for old, new in BEFORE:
        text = text.replace(old, new)
    # The original also has a rule for "/' 7/" with its slashes: no text of the data set matches it.
    for a, b in ("()", "[]", "{}", '""', "''"):
        body = f"[^{re.escape(b)}]*?"
        text = re.sub(re.escape(a) + r"\s*(" + body + r")\s*" + re.escape(b), lambda m: a + m.group(1) + b, text)
    for old, new in AFTER:
        text = text.replace(old, new)
    return text


def clean(text):
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


PIECES = [
    "(", ")", "[", "]", "{", "}", '"', "'", "' ", " '", "''", " ", "  ", "\n", " \n ", "\t", "\u00a0", "\u2003",
    "\u3000", "\x1c", "\x85", "\u200b", "s", "s '", "S '", "Boulter", " @-@ ", " @,@ ", " @.@ ", "@", " : ",
    " ; ", " . ", " ! ", " ? ", " , ", ".", ",", "= ", "= = ", "= = = =", " = ", "\u00b0", " \u00b0 ", " N ",
    "N", " 's", "'s", "1", " 1", "[title]", " [title]", "[step]", "\u00e9", "\u4e2d\u6587", "\U0001f600", "A",
    "b c", "\u0130", "\u00c9", "\u03a3", "\u042f", "\r\n",
]


def main():
    rng = random.Random(20240607)
    cases = [" = Title = \n \n Some words here . \n ", "", " ", "\n", "x", "( ( a ) )", "\" a \" b \" c \"", "' a 's ' b '", "(\n)", "( a",
             "[a\nb] [c] [d", " [title] [title] x", "((((", "a  b   c    d", "rock 'n ' roll", "\u2003x\u2003"]
    for _ in range(220):
        cases.append("".join(rng.choice(PIECES) for _ in range(rng.randint(1, 30))))
    out = []
    for text in cases:
        out.append({"in": text, "detok": detokenize(text), "words": len(re.split(r"\s+", text)), "chars": len(text),
                    "clean": clean(text)})
    for word in ["the lady", "THE END", "", "1st Place", "\u00e9COLE", "\u042f \u042f", "\u00dcBER \u00c4", " A", "mcDonald's"]:
        out.append({"ctx_b": word, "capital": word.capitalize()})
    with open("test/golden/metrics.json", "w", encoding="utf-8") as f:
        json.dump(out, f, ensure_ascii=True, indent=0)


main()
