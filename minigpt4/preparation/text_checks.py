"""What the answers of a data set are like: lengths, repetition, and which language they seem to be in.

Input: answers. Output: counts and short labels. The language is a guess from script and small words, good enough to
notice a few French captions among English ones, not to name a language for certain.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

SCRIPTS = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "CYRILLIC", "ARABIC", "DEVANAGARI", "GREEK", "HEBREW", "THAI")
SMALL_WORDS = {
    "English": "the a an of and is in with to on are it that this there at by for from two has its was white",
    "German": "der die das und ist ein eine einem einer mit auf von im den dem zu nicht sind neben",
    "French": "le la les des est une dans avec sur et du au un qui il deux pour pas sont",
    "Spanish": "el los las es una en con y del por que un se su sobre está hay para",
    "Italian": "il lo gli di che è una con sul nella e un per sono della del due",
    "Portuguese": "os as uma em com e do da no na um que é são sobre para",
    "Dutch": "de het een van en op met is zijn in niet dat aan twee",
}
_WORDS = {language: frozenset(words.split()) for language, words in SMALL_WORDS.items()}
_TOKEN = re.compile(r"[^\W\d_]+")
MIN_WORDS = 4
"""Words below which a text in Latin letters is too short for a guess."""
REPEATED = 3
"""Times that a sentence of an answer must occur to be called repetition."""
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


def language(text: str) -> str:
    """Return the likely language of a text, the script if it is not Latin, or `unknown`."""
    letters = [character for character in text[:1000] if character.isalpha()]
    if not letters:
        return "no letters"
    scripts: Counter[str] = Counter()
    for character in letters:
        if character.isascii():
            scripts["LATIN"] += 1
        else:
            name = unicodedata.name(character, "").split()
            scripts[name[0] if name and name[0] in SCRIPTS else "LATIN"] += 1
    script, count = scripts.most_common(1)[0]
    if script != "LATIN" and count * 2 > len(letters):
        return {"HIRAGANA": "Japanese", "KATAKANA": "Japanese", "CJK": "Chinese or Japanese"}.get(
            script, script.capitalize()
        )
    words = _TOKEN.findall(text[:1000].lower())
    if len(words) < MIN_WORDS:
        return "unknown"
    scores = {name: sum(word in small for word in words) for name, small in _WORDS.items()}
    best = max(scores, key=lambda name: scores[name])
    runner_up = max(score for name, score in scores.items() if name != best)
    return best if scores[best] > runner_up else "unknown"


def repeated_sentence(text: str) -> str:
    """Return a sentence that occurs at least `REPEATED` times in a text, or an empty text."""
    if len(text) < 20:
        return ""
    sentences = Counter(sentence.strip().lower() for sentence in _SENTENCE.split(text) if len(sentence) > 3)
    if not sentences:
        return ""
    sentence, count = sentences.most_common(1)[0]
    return sentence if count >= REPEATED else ""
