"""Labels of single tokens that need no model: pure functions of a text and its tokens' spans.

Used on text at its natural frequencies, where the concepts of `concepts` are absent or rare.
A token has a tag if any of its characters has it; pieces of one character (byte-level tokens)
all have that character's tags. A token without characters (BOS) has none.
"""

import re
import unicodedata

import numpy as np
from jaxtyping import Bool, Int

SCRIPTS = {  # tag: how the Unicode names of the script's characters begin
    "latin": ("LATIN", "FULLWIDTH LATIN"),
    "greek": ("GREEK",),
    "cyrillic": ("CYRILLIC",),
    "hebrew": ("HEBREW",),
    "arabic": ("ARABIC",),
    "devanagari": ("DEVANAGARI",),
    "han": ("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH"),
    "kana": ("HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA"),
    "hangul": ("HANGUL", "HALFWIDTH HANGUL"),
}
QUOTES = "\"'`\u2018\u2019\u201a\u201c\u201d\u201e\u00ab\u00bb\u2039\u203a\u300c\u300d"
BRACKETS = "()[]{}<>"
PATTERNS = {  # tag: what is searched in the text
    "url": r"(?:https?|ftp)://[^\s<>\"')\]}]+|\bwww\.[^\s<>\"')\]}]+",
    "email": r"\b[\w.+-]+@[\w-]+\.[\w.-]*\w",
    "year": r"(?<![\d.])(?:1[6-9]|20)\d\d(?![\d.]?\d)",
    "camel_case": r"\b[A-Z]?[a-z][a-z0-9]*(?:[A-Z]+[a-z0-9]*)+\b",
    "snake_case": r"\b[a-zA-Z0-9]*[a-zA-Z0-9]_+[a-zA-Z0-9]\w*\b",
    "all_caps": r"\b[A-Z]{2,}\b",
    "capitalised": r"\b[A-Z][a-z]+\b",
    "quoted": r"\"[^\"\n]{1,200}\"|\u201c[^\u201d\n]{1,200}\u201d",
    "newline": r"[\r\n]",
    "indent": r"(?m)^(?:\t| {2})[ \t]*",
}
CHARACTER_TAGS = ("digit", "punctuation", "quote", "bracket", "mathematical", "accented", *SCRIPTS)
TAGS = (*CHARACTER_TAGS, *PATTERNS)


def token_tags(text: str, offsets: Int[np.ndarray, "token 2"]) -> Bool[np.ndarray, "token tag"]:
    """Which of `TAGS` each token has; `offsets` are starts and ends in characters of `text`."""
    masks = np.concatenate([_character_masks(text), _pattern_masks(text)])
    counts = np.zeros((len(TAGS), len(text) + 1), dtype=np.int64)
    masks.cumsum(axis=1, out=counts[:, 1:])
    return (counts[:, offsets[:, 1]] > counts[:, offsets[:, 0]]).T


def _character_masks(text: str) -> Bool[np.ndarray, "tag character"]:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    unique, position = np.unique(codes, return_inverse=True)
    table = np.array([_tags_of_character(chr(code)) for code in unique], dtype=bool)
    return table.reshape(len(unique), len(CHARACTER_TAGS)).T[:, position]


def _tags_of_character(character: str) -> list[bool]:
    category = unicodedata.category(character)
    name = unicodedata.name(character, "")
    is_letter = category[0] == "L"
    return [
        category == "Nd",
        category[0] == "P" and character != "_",  # part of a name, see snake_case
        character in QUOTES,
        character in BRACKETS,
        category == "Sm",
        is_letter and name.startswith("LATIN") and not character.isascii(),
        *(is_letter and name.startswith(prefixes) for prefixes in SCRIPTS.values()),
    ]


def _pattern_masks(text: str) -> Bool[np.ndarray, "tag character"]:
    masks = np.zeros((len(PATTERNS), len(text)), dtype=bool)
    for mask, pattern in zip(masks, PATTERNS.values(), strict=True):
        for match in re.finditer(pattern, text):
            mask[match.start() : match.end()] = True
    return masks
