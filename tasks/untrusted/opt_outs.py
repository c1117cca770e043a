"""Opt-outs from AI use that servers declare, in response headers, in lines of robots.txt and in a file of their own.

There are four: X-Robots-Tag, TDM-Reservation (W3C TDMRep), Content-Usage (IETF AI Preferences) and Content-Signal
(contentsignals.org). The last two may also appear in robots.txt, in a robot's group, optionally with a path. TDMRep has the file
`/.well-known/tdmrep.json`, with paths of the site. A value that cannot be parsed counts as a refusal, and one refusal outweighs
any permission.
"""

import json
import re
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

USAGES = ("train-ai", "train-genai", "ai", "bots", "all")
"""Categories of Content-Usage that include training a model."""
SIGNALS = ("ai-train",)
"""Signals of Content-Signal that include training a model."""

# Possessive quantifiers: a pattern that tries each start anew takes minutes for a header of 64 kB.
_PREVIEW = re.compile(r"(?<![\w-])max-[a-z-]++\s*+:\s*+[\w-]++")  # as in "max-image-preview: none"
_ROBOT = re.compile(r"\*|(?!unavailable_after$)[a-z][a-z0-9_.-]*(/[a-z0-9_.-]*)?")
_KEY = r"[a-z*][a-z0-9_.*-]*+"
# Types of RFC 9651: number, string, token, bytes, boolean, date, display string.
_BARE = r"""(?:-?[0-9]++(?:[.][0-9]++)?+|%?"(?:[^"\\]|\\.)*+"|[a-zA-Z*][!#$%&'*+.^_`|~:/\w-]*+|:[\w+/=]*+:|[?][01]|@-?[0-9]++)"""
_PARAMETERS = rf"(?:;[ ]*+{_KEY}(?:={_BARE})?+)*+"
_MEMBER = re.compile(rf"({_KEY})(?:=({_BARE}|[(][^()]*+[)]))?+{_PARAMETERS}[ \t]*+(?:,[ \t]*+(?=[^ \t])|$)", re.ASCII)
_SIGNAL = re.compile(r"\s*([A-Za-z][\w-]*)\s*=\s*([\w-]+)\s*", re.ASCII)

_LINE = re.compile(r"(content-usage|content-signal)(?![\w-])\s*:?\s*(/\S*)?\s*(.*)", re.IGNORECASE)


def opted_out(values: Iterable[str], agent: str, directives: Sequence[str]) -> bool:
    """Return True if X-Robots-Tag headers contain one of `directives` for all robots or for `agent`.

    A header lists directives, some with a value, that apply to the robot named before them. A directive that cannot be
    parsed counts as addressed to `agent` (its name in lower case, without its version).
    """
    if not directives:
        return False
    forbidden = re.compile(rf"\b(?:{'|'.join(map(re.escape, directives))})\b")
    for value in values:
        robot, in_date = "*", False
        for item in _PREVIEW.sub("", value.lower()).split(","):
            name, colon, rest = (part.strip() for part in item.partition(":"))
            if in_date and re.match(r"\d", name) and not forbidden.search(item):
                in_date = False  # "25 Jun 2010 15:00:00 PST", after "unavailable_after: Friday"
                continue
            if colon and _ROBOT.fullmatch(name) and not forbidden.search(name):
                robot = name.partition("/")[0]
                name, colon, rest = (part.strip() for part in rest.partition(":"))
            in_date = name == "unavailable_after"
            if colon and not in_date:
                robot = "*"
            if forbidden.search(f"{name} {rest}") and robot in ("*", agent):
                return True
    return False


def rights_reserved(values: Iterable[str]) -> bool:
    """Return True if TDM-Reservation headers reserve the rights to text and data mining; only "0" waives them."""
    return any(value.strip() != "0" for value in values)


def usage_refused(value: str) -> bool:
    """Return True if a Content-Usage refuses training: an RFC 9651 dictionary such as `train-ai=n, search=y`."""
    text = re.sub(r"\s+", " ", value).strip()
    position = 0
    while position < len(text):
        member = _MEMBER.match(text, position)
        if member is None or (member[1] in USAGES and member[2] != "y"):
            return True
        position = member.end()
    return False


def signal_refused(value: str) -> bool:
    """Return True if a Content-Signal refuses training: a list such as `search=yes, ai-train=no`."""
    for item in value.split(",") if value.strip() else ():
        signal = _SIGNAL.fullmatch(item)
        if signal is None or (signal[1].lower() in SIGNALS and signal[2].lower() != "yes"):
            return True
    return False


_REFUSED = {"content-usage": usage_refused, "content-signal": signal_refused}


def headers_refuse(headers: Mapping[str, Sequence[str]]) -> bool:
    """Return True if any header refuses training. `headers` maps lower-case names to the values of all lines."""
    return any(refused(value) for name, refused in _REFUSED.items() for value in headers.get(name, ()))


class Preference(NamedTuple):
    """One usage line of a robots.txt."""

    name: str
    """content-usage or content-signal."""
    path: str
    """Pattern of the paths that the line covers; empty for all paths."""
    refused: bool


def preferences(text: str, agent: str) -> list[Preference]:
    """Return the usage lines of a robots.txt that apply to a robot.

    They come from the groups that name the robot, else from the groups of `*`. Lines before any group apply to all robots.

    Args:
        agent: the robot's name, without its version.
    """
    everyone: list[Preference] = []
    groups: dict[str, list[Preference]] = {}
    current, is_open = [everyone], False  # an open group accepts further robots
    for line in text.splitlines():
        line = line.partition("#")[0].strip()
        if usage := _LINE.fullmatch(line):
            found = Preference(usage[1].lower(), usage[2] or "", _REFUSED[usage[1].lower()](usage[3]))
            for lines in current:
                lines.append(found)
            is_open = False
        elif robot := re.fullmatch(r"user-agent\s*:\s*([^/]*).*", line, re.IGNORECASE):
            current = current if is_open else []
            current.append(groups.setdefault(robot[1].strip().lower(), []))
            is_open = True
        elif re.match(r"(dis)?allow|crawl-delay", line, re.IGNORECASE):
            is_open = False
    # Like protego, take the longest name that is part of ours.
    names = (robot for robot in groups if robot and robot in agent.lower())
    return everyone + groups.get(max(names, key=len, default="*"), [])


def training_refused(lines: Sequence[Preference], path: str) -> bool:
    """Return True if a robots.txt refuses training on the content at a path.

    For each kind of line, those with the longest matching pattern decide.

    Args:
        path: path of the URL, with its query.
    """
    for name in _REFUSED:
        matching = [line for line in lines if line.name == name and _matches(line.path, path)]
        longest = max((len(line.path) for line in matching), default=0)
        if any(line.refused for line in matching if len(line.path) == longest):
            return True
    return False


class Reservation(NamedTuple):
    """One rule of a tdmrep.json."""

    path: str
    """Pattern of the paths that the rule covers."""
    reserved: bool


EVERYTHING_RESERVED = [Reservation("/", True)]


def reservations(body: bytes) -> list[Reservation]:
    """Return the rules of a tdmrep.json; a page in its place has none, and a file that cannot be parsed reserves everything.

    Only a `tdm-reservation` of 0 waives the rights to text and data mining.
    """
    if body.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):  # many servers answer any path with a page
        return []
    try:
        rules = json.loads(body.decode("utf-8-sig"))
        found = [Reservation(rule["location"], rule["tdm-reservation"] not in (0, "0")) for rule in rules]
    except (ValueError, TypeError, LookupError, RecursionError):
        return EVERYTHING_RESERVED
    return found if all(isinstance(rule.path, str) for rule in found) else EVERYTHING_RESERVED


def path_reserved(rules: Sequence[Reservation], path: str) -> bool:
    """Return True if a tdmrep.json reserves the rights to a path; the rules with the longest matching pattern decide."""
    matching = [rule for rule in rules if _matches(rule.path, path)]
    longest = max((len(rule.path) for rule in matching), default=0)
    return any(rule.reserved for rule in matching if len(rule.path) == longest)


def _matches(pattern: str, path: str) -> bool:
    """Match a path against the start pattern: `*` matches any characters, a final `$` the end of the path."""
    pattern, path = urllib.parse.unquote(pattern), urllib.parse.unquote(path)
    anchored = pattern.endswith("$")
    first, *rest = pattern.removesuffix("$").split("*")
    if not path.startswith(first):
        return False
    position = len(first)
    for number, piece in enumerate(rest, 1):
        if anchored and number == len(rest):
            return path.endswith(piece) and len(path) - len(piece) >= position
        position = path.find(piece, position)
        if position < 0:
            return False
        position += len(piece)
    return not anchored or position == len(path)
