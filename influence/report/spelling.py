"""Tokens as a reader sees them: pieces of one text, with nothing invisible or unsafe left in it.

Knows nothing of pages or scores. A piece is usually one token; where a tokenizer cut a character into several tokens (an emoji
in a byte-level vocabulary, decoded one at a time to U+FFFD), those tokens are one piece.
"""

import re
from collections.abc import Sequence

# Drawn as themselves these would vanish, end the line, or turn the rest of the page around (bidirectional overrides).
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

# How lengths of pieces are written (see `widths`): characters of one byte that neither JSON nor HTML has to escape.
_PAIR = 9
_PAIRS = "".join(chr(code) for code in range(33, 126) if chr(code) not in '"&<>\\')[: _PAIR * _PAIR]
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_WIDEST = len(_DIGITS) - 1


def shown(text: str) -> str:
    """The text with every control character replaced by a visible stand-in; newlines and tabs stay, `\\r\\n` is one newline.

    What an HTML parser returns for it, escaped, is the same string again.
    """
    return _INVISIBLE.sub(_stand_in, text.replace("\r\n", "\n"))


def _stand_in(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if 0xD800 <= code <= 0xDFFF:
        return "\ufffd"
    return f"[U+{code:04X}]"


def pieces(tokens: Sequence[str], text: str) -> list[tuple[str, int]]:
    """The tokens as `(piece, number of tokens)`: joined, the text those tokens spell.

    Runs of tokens that hold only parts of characters become the characters `text` has in their place. Where the tokens
    do not spell `text` (a special token, a truncation), the tokens are taken at their word.
    """
    apart = [(token, 1) for token in tokens]
    if "".join(tokens) == text:
        return apart
    result: list[tuple[str, int]] = []
    position = 0
    broken: list[str] = []
    for token in tokens:
        if "\ufffd" in token:
            broken.append(token)
            continue
        # A broken run is at least one character after whatever its first token says whole.
        earliest = position + len(broken[0].partition("\ufffd")[0]) + 1 if broken else position
        start = text.find(token, earliest) if broken else position
        if start < 0 or not text.startswith(token, start):
            return apart
        if broken:
            result.append((text[position:start], len(broken)))
            broken = []
        result.append((token, 1))
        position = start + len(token)
    if broken:
        result.append((text[position:], len(broken)))
    return result


def widths(shown_pieces: Sequence[str]) -> str:
    """The lengths of the pieces in UTF-16 code units, in little more than half a character each.

    Two lengths of 1 to 9 are one character; any other two are `~` and base-62 digits, where `Z` is 61 and more to come.
    An odd list ends with a length of nothing.
    """
    lengths = [len(piece.encode("utf-16-le")) // 2 for piece in shown_pieces]
    lengths += [0] * (len(lengths) % 2)
    return "".join(_pair(first, second) for first, second in zip(lengths[::2], lengths[1::2], strict=True))


def _pair(first: int, second: int) -> str:
    if 1 <= first <= _PAIR and 1 <= second <= _PAIR:
        return _PAIRS[_PAIR * (first - 1) + second - 1]
    return "~" + "".join(_DIGITS[_WIDEST] * (n // _WIDEST) + _DIGITS[n % _WIDEST] for n in (first, second))


def anchor(*parts: str) -> str:
    """A link target for these names that stays the same whatever else is on the page."""
    return "--".join(re.sub(r"[^A-Za-z0-9_.:-]+", "-", part).strip("-") or "unnamed" for part in parts)
