"""Registrable domains, by the copy of the Public Suffix List that comes with tldextract."""

import functools
import re
import typing

if typing.TYPE_CHECKING:  # its import takes longer than a run without block lists needs
    import tldextract


def is_public_suffix(host: str) -> bool:
    """Whether anybody may register names below."""
    found = suffixes()(host)
    return bool(found.suffix) and not found.domain


@functools.lru_cache(maxsize=100_000)
def registrable_domain(host: str) -> str:
    """The part of a host that belongs to one owner. A suffix that is not on the list counts as one of a single label."""
    found = suffixes().extract_str(host)
    if found.suffix or ":" in host or re.fullmatch(r"[0-9]+|0x[0-9a-f]*", host.rpartition(".")[2]):
        return found.top_domain_under_public_suffix or host
    return ".".join(host.split(".")[-2:])


@functools.cache
def suffixes() -> "tldextract.TLDExtract":
    """The list. Without addresses and cache it neither asks the network nor writes a file."""
    import tldextract

    return tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)
