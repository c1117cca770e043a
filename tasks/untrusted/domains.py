"""Host names in one spelling, and registrable domains, from the copy of the Public Suffix List that ships with tldextract."""

import functools
import ipaddress
import re
import typing
import unicodedata

import idna

if typing.TYPE_CHECKING:  # slow to import, and runs without block lists do not need it
    import tldextract


def ascii_host(host: str) -> str:
    """Return a host as it is looked up: lower case, without a final dot, international names in IDNA 2008 with UTS #46.

    Raises:
        ValueError: not a host name.
    """
    if not host.isascii():
        host = idna.uts46_remap(host, std3_rules=False)  # other widths of letters, digits and dots
        labels = (label if label.isascii() else idna.alabel(label).decode("ascii") for label in host.split("."))
        host = ".".join(labels)
    host = host.lower().removesuffix(".")
    if ":" not in host and not (len(host) <= 253 and re.fullmatch(r"([^.]{1,63}\.)*[^.]{1,63}", host)):
        raise ValueError(f"got {host[:300]!r}, expected a host name")
    return host


CANONICAL_HOST = r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*"
"""RE2 pattern of hosts that `canonical_host` leaves as they are; it may miss some of them."""


@functools.lru_cache(maxsize=100_000)
def canonical_host(host: str) -> str:
    """Return the one spelling of a host by which hosts are compared: lower-case ASCII, without brackets and the final dot.

    Full-width letters and dots, and an international name and its punycode, become the same, by UTS 46 and IDNA 2008.
    A name that they do not allow keeps its letters.
    """
    name = host.strip().strip("[]")
    if ":" in name:
        try:
            return ipaddress.ip_address(name).compressed
        except ValueError:
            return name.lower()
    try:
        return ascii_host(name.rstrip("."))
    except ValueError:
        folded = unicodedata.normalize("NFKC", name).casefold()
        return ".".join(map(_ascii_label, re.split("[.\u3002]", folded))).strip(".")


def _ascii_label(label: str) -> str:
    if label.isascii():
        return label
    try:
        return idna.alabel(label).decode()
    except idna.IDNAError:
        return f"xn--{label.encode('punycode').decode()}"


def is_public_suffix(host: str) -> bool:
    """Return True if anyone may register names under the host."""
    found = suffixes()(host)
    return bool(found.suffix) and not found.domain


@functools.lru_cache(maxsize=100_000)
def registrable_domain(host: str) -> str:
    """Return the part of a host that belongs to one owner. A suffix that is not on the list counts as a single label."""
    found = suffixes().extract_str(host)
    if found.suffix or ":" in host or re.fullmatch(r"[0-9]+|0x[0-9a-f]*", host.rpartition(".")[2]):
        return found.top_domain_under_public_suffix or host
    return ".".join(host.split(".")[-2:])


@functools.cache
def suffixes() -> "tldextract.TLDExtract":
    """Return the list. Without URLs and a cache it neither uses the network nor writes a file."""
    import tldextract

    return tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)
