"""Words of captions, in scripts with and without spaces between words."""

import pyarrow as pa
import pyarrow.compute as pc

# Scripts written without spaces: each character counts as a word.
_UNSPACED = (
    r"([\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Yi}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
    r"\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Tham}\p{Tai_Viet}\p{Javanese}\p{Balinese}])"
)


def split_words(captions: pa.ChunkedArray) -> pa.ListArray:
    """Lower-case words of each caption: runs of letters, marks and digits, or single characters of scripts without spaces."""
    text = pc.replace_substring_regex(pc.utf8_lower(captions), _UNSPACED, r" \1 ")
    text = pc.utf8_trim_whitespace(pc.replace_substring_regex(text, r"[^\pL\pM\pN]+", " "))
    words = pc.split_pattern(pc.if_else(pc.equal(text, ""), None, text), " ")
    return words.combine_chunks() if isinstance(words, pa.ChunkedArray) else words


def count_words(captions: pa.ChunkedArray) -> pa.ChunkedArray:
    """Number of words of each caption: those between spaces, or those of `split_words` where a script has no spaces."""
    counts = pc.count_substring_regex(captions, r"[^\s\pZ]+")
    is_unspaced = pc.fill_null(pc.match_substring_regex(captions, _UNSPACED), False)
    if not pc.any(is_unspaced).as_py():
        return counts
    words = pc.list_value_length(split_words(pc.if_else(is_unspaced, captions, None)))
    return pc.if_else(is_unspaced, pc.fill_null(words, 0), counts)
