"""Words for people: those of strangers, such as ids, made harmless for terminals and spreadsheets, and amounts."""

import unicodedata

__all__ = ["SPELLING", "bytes_in_words", "counted", "csv_cell", "drawn", "printable"]

_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories that are no visible text: controls, direction marks, lone surrogates, line separators."""

SPELLING = "\n\u200c\u200d"
"""What a page keeps of these: lines, and the joiners within words of Persian and Hindi and the parts of an emoji."""


def printable(text: str, *, keep: str = "") -> str:
    r"""The text with everything that a terminal could take for a command written as an escape.

    Args:
        text: any string.
        keep: control characters that stay, such as ``"\n"``.

    Example:
        >>> print(printable("id\x1b[2J\u202e"))
        id\x1b[2J\u202e
    """
    if text.isprintable():  # nearly all are, and lists of a million examples need it soon
        return text
    return "".join(
        character
        if character in keep or unicodedata.category(character) not in _UNSAFE
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def csv_cell(value: object) -> object:
    """A cell that no spreadsheet takes for a formula: a text that begins like one gets an apostrophe before it.

    Example:
        >>> csv_cell("=HYPERLINK(1)"), csv_cell("-x"), csv_cell("a-b"), csv_cell(-1.5)
        ("'=HYPERLINK(1)", "'-x", 'a-b', -1.5)
    """
    if not isinstance(value, str):
        return value
    text = printable(value)
    # Full-width signs as well: some spreadsheets read them as the narrow ones.
    first = unicodedata.normalize("NFKC", text.lstrip()[:1])
    return f"'{text}" if first in ("=", "+", "-", "@", "\\", "|", "%") else text


def drawn(text: object) -> str:
    r"""A text as matplotlib draws it letter by letter, where two dollars would begin and end a formula.

    Example:
        >>> print(drawn("from $5 to $6_"))
        from \$5 to \$6_
    """
    return printable(str(text)).replace("$", r"\$")


def counted(count: int, noun: str) -> str:
    """A number of things in words, in the singular where it is one.

    Example:
        >>> counted(1, "checkpoint"), counted(0, "checkpoint")
        ('1 checkpoint', '0 checkpoints')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def bytes_in_words(count: int) -> str:
    """An amount of memory as people write it.

    Example:
        >>> bytes_in_words(307_200), bytes_in_words(12_000), bytes_in_words(2_500_000_000)
        ('0.3 MB', '12 kB', '2.50 GB')
    """
    if count >= 10**8:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 10**5 else f"{count / 1e3:.0f} kB"
