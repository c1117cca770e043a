"""What servers say about using their content for AI: headers of an answer, and lines of robots.txt about it.

Four ways to say no: X-Robots-Tag, TDM-Reservation (W3C TDMRep), Content-Usage (IETF AI Preferences) and Content-Signal
(contentsignals.org). The last two also stand in robots.txt, in the groups of a robot, perhaps with a path. What cannot be
parsed counts as a no, and one no counts more than any yes.
"""

import re
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

USAGES = ("train-ai", "train-genai", "ai", "bots", "all")
"""Categories of Content-Usage that training a model falls into."""
SIGNALS = ("ai-train",)
"""Of Content-Signal."""

_ROBOT = re.compile(r"\*|(?!unavailable_after$)[a-z][a-z0-9_.-]*(/[a-z0-9_.-]*)?")
_KEY = r"[a-z*][a-z0-9_.*-]*+"
# Of RFC 9651: number, string, token, bytes, boolean, date, display string.
_BARE = r"""(?:-?[0-9]++(?:[.][0-9]++)?+|%?"(?:[^"\\]|\\.)*+"|[a-zA-Z*][!#$%&'*+.^_`|~:/\w-]*+|:[\w+/=]*+:|[?][01]|@-?[0-9]++)"""
_PARAMETERS = rf"(?:;[ ]*+{_KEY}(?:={_BARE})?+)*+"
_MEMBER = re.compile(rf"({_KEY})(?:=({_BARE}|[(][^()]*+[)]))?+{_PARAMETERS}[ \t]*+(?:,[ \t]*+(?=[^ \t])|$)", re.ASCII)
_SIGNAL = re.compile(r"\s*([A-Za-z][\w-]*)\s*=\s*([\w-]+)\s*", re.ASCII)

_LINE = re.compile(r"(content-usage|content-signal)(?![\w-])\s*:?\s*(/\S*)?\s*(.*)", re.IGNORECASE)


def opted_out(values: Iterable[str], agent: str, directives: Sequence[str]) -> bool:
    """Whether X-Robots-Tag headers hold one of `directives` for everyone, or for `agent` (lower case, without its version).

    A value is a list of directives, each perhaps with a value of its own, which apply to the robot named before them. What
    cannot be parsed counts as said to us.
    """
    if not directives:
        return False
    forbidden = re.compile(rf"\b(?:{'|'.join(map(re.escape, directives))})\b")
    for value in values:
        robot, in_date = "*", False
        # "max-image-preview: none" is about previews.
        for item in re.sub(r"\bmax-[a-z-]+\s*:\s*[\w-]+", "", value.lower()).split(","):
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


def reserved(values: Iterable[str]) -> bool:
    """Whether TDM-Reservation headers keep the rights to text and data mining; "0" alone waives them."""
    return any(value.strip() != "0" for value in values)


def usage_refused(value: str) -> bool:
    """Whether a Content-Usage refuses training: a dictionary of RFC 9651 such as `train-ai=n, search=y`."""
    text = re.sub(r"\s+", " ", value).strip()
    position = 0
    while position < len(text):
        member = _MEMBER.match(text, position)
        if member is None or (member[1] in USAGES and member[2] != "y"):
            return True
        position = member.end()
    return False


def signal_refused(value: str) -> bool:
    """Whether a Content-Signal refuses training: a list such as `search=yes, ai-train=no`."""
    for item in value.split(",") if value.strip() else ():
        signal = _SIGNAL.fullmatch(item)
        if signal is None or (signal[1].lower() in SIGNALS and signal[2].lower() != "yes"):
            return True
    return False


_REFUSED = {"content-usage": usage_refused, "content-signal": signal_refused}


def headers_refuse(headers: Mapping[str, Sequence[str]]) -> bool:
    """Whether headers refuse training; by lower-case name the values of each of their lines."""
    return any(refused(value) for name, refused in _REFUSED.items() for value in headers.get(name, ()))


class Preference(NamedTuple):
    """A line of a robots.txt about usage."""

    name: str
    """content-usage or content-signal."""
    path: str
    """Pattern of the paths that it is about; empty for all."""
    refused: bool


def preferences(text: str, agent: str) -> list[Preference]:
    """The lines of a robots.txt about usage that are for a robot.

    They are taken from the groups that name the robot, or else from those of all robots; those before any group are for all.

    Args:
        agent: the robot's name, without its version.
    """
    everyone: list[Preference] = []
    groups: dict[str, list[Preference]] = {}
    current, is_open = [everyone], False  # an open group takes further robots
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
    # As protego does: the longest name that is part of ours.
    names = (robot for robot in groups if robot and robot in agent.lower())
    return everyone + groups.get(max(names, key=len, default="*"), [])


def training_refused(lines: Sequence[Preference], path: str) -> bool:
    """Whether a robots.txt refuses to have what is at a path used for training.

    Of both kinds of line those count whose own path is the longest that matches.

    Args:
        path: of the URL, with its query.
    """
    for name in _REFUSED:
        fitting = [line for line in lines if line.name == name and _matches(line.path, path)]
        longest = max((len(line.path) for line in fitting), default=0)
        if any(line.refused for line in fitting if len(line.path) == longest):
            return True
    return False


def _matches(pattern: str, path: str) -> bool:
    """Whether a path begins with a pattern, in which `*` stands for any characters and `$` at the end for the end."""
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
