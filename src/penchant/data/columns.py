"""Which column of a file is which: the mapping, and what to type when a column is missing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from penchant.data.findings import Problem
from penchant.schema import EVENT, ITEM, OPTIONAL, RATING, TIME, TITLE, USER

# Spellings seen in public sets. They are suggested, never guessed: a wrong column is worse than a question.
_KNOWN = {
    USER: ("user", "uid", "userid", "reviewerid", "customerid", "memberid", "visitorid", "account", "sessionid"),
    ITEM: ("item", "iid", "itemid", "movieid", "productid", "asin", "parentasin", "articleid", "courseid", "bookid"),
    TIME: ("time", "ts", "date", "datetime", "createdat", "unixreviewtime", "eventtime", "when", "time0"),
    TITLE: ("name", "itemname", "productname", "movietitle", "itemtitle", "label", "headline"),
    RATING: ("score", "stars", "overall", "ratings"),
    EVENT: ("event", "action", "behavior", "type"),
}
# One mapping serves both files, and these names mean something in the interactions alone.
INTERACTIONS_ONLY = (USER, TIME, *OPTIONAL)


def choose(
    found: Sequence[str], required: Sequence[str], optional: Sequence[str], mapping: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Canonical name -> the file's column for every name present, and the required names that aren't.

    A mapped column wins over one that has the canonical name already. Where the mapped one isn't in this
    file (one mapping serves both), the canonical name itself is looked for.
    """
    chosen: dict[str, str] = {}
    missing: list[str] = []
    for name in (*required, *optional):
        source = mapping.get(name, name)
        if source in found:
            chosen[name] = source
        elif name in found:
            chosen[name] = name
        elif name in required:
            missing.append(name)
    return chosen, missing


def missing_problem(
    missing: Sequence[str], found: Sequence[str], mapping: Mapping[str, str], where: str
) -> Problem | None:
    """The problem of missing columns: what was found, and the ``--map`` texts to type."""
    if not missing:
        return None
    names = " and ".join(
        f"{name!r} (mapped to {mapping[name]!r})" if mapping.get(name, name) != name else repr(name) for name in missing
    )
    what = f"no column {names}; columns found: {', '.join(found)}"
    inner = next((mark for mark in ";\t|," if len(found) == 1 and mark in found[0]), None)
    if inner is not None:
        return Problem(what, where, f"--sep {inner!r} (--items-sep for the items)")
    hints = []
    for name in missing:
        near = near_matches(name, found)
        hints.append(" or ".join(f"--map {name}={column}" for column in near) or f"--map {name}=<the file's column>")
    return Problem(what, where, " ".join(hints))


def near_matches(name: str, found: Sequence[str]) -> list[str]:
    """The columns that may be meant by a canonical ``name``, the likeliest first, at most three."""
    plain = {column: re.sub(r"[^a-z0-9]", "", column.lower()) for column in found}
    spellings = (name.replace("_", ""), *_KNOWN.get(name, ()))
    known = [column for spelling in spellings for column in found if plain[column] == spelling]
    if known:
        return list(dict.fromkeys(known))[:3]
    close = set(difflib.get_close_matches(spellings[0], plain.values(), n=3, cutoff=0.7))
    return [column for column in found if plain[column] in close]


def unused_mapping(
    mapping: Mapping[str, str], interactions: Sequence[str], items: Sequence[str], context: Sequence[str], where: str
) -> Problem | None:
    """The problem of a mapping whose column is in no file where its name means something."""
    for name, source in mapping.items():
        if name == ITEM:
            places = [*interactions, *items]
        else:
            places = [*interactions] if name in (*INTERACTIONS_ONLY, *context) else [*items]
        if source not in places:
            near = [*difflib.get_close_matches(source, places, n=1, cutoff=0.6), "<a column found>"][0]
            remedy = f"--map {name}={near}" if near != name else f"leave --map {name} out"
            if source in interactions:
                remedy = f"--context {name} to keep it"
            return Problem(
                f"the column {source!r} that {name!r} is mapped to isn't there; "
                f"columns found: {', '.join(dict.fromkeys(places))}",
                where,
                remedy,
            )
    return None
