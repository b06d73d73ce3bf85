"""Mistakes at the places where PHYMEM calls are made, and who notices them, style by style.

    scene = PhymemScene()
    bugs = drawn_bugs(seed=0, count=10)
    Table(bug_rows(scene, bugs))

A bug is one change at one call site: an argument becomes another variable that the caller has, two
arguments change places, another leaf is called, an output is read from another place, an
interrupted write-back is not gone on with. The same teardown runs with and without it, in each
style. Whoever complains first has noticed it:

    impossible   the style has no place for this mistake: the argument, variable or output is hidden
    types        a type is wrong; a C compiler would say so
    status       the module answers with a status that the caller did not expect, to this call or a
                 later one
    nobody       every call succeeds, and something else was done, or said, than was meant
    harmless     nothing else was done or said
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tdxlab.abi import leaves as abi
from tdxlab.abi.status import TDX_INTERRUPTED_RESUMABLE
from tdxlab.host import SeamcallFailed
from tdxlab.study.phymem_scene import PhymemScene
from tdxlab.study.phymem_styles import LEAVES, RAW, STYLES, Answer, Style, seamcall

IMPOSSIBLE, TYPES, STATUS, NOBODY = "impossible", "types", "status", "nobody"
HARMLESS = "harmless"
OUTCOMES = (IMPOSSIBLE, TYPES, STATUS, NOBODY, HARMLESS)

#: How often the write-back is gone on with here. Differs: Linux tries 10000 times.
RETRIES = 10

#: What a caller has at hand, by name.
VARIABLES = (
    *("private", "pfn", "keyed", "tdr", "tdcs", "td_hkid", "global_hkid", "gpa"),
    *("start", "again"),
)
_OUTPUTS = ("type", "owner", "size", "R9")


class Bug(NamedTuple):
    """One mistake. site: of a style's sites. kind: "argument", "exchange", "leaf", "output" or
    "retry". place: what is wrong. other: what stands there instead.
    """

    site: str
    kind: str
    place: str
    other: str

    def __str__(self) -> str:
        forms = {
            "argument": "{site}: {other} given for {place}",
            "exchange": "{site}: {place} and {other} exchanged",
            "leaf": "{site}: {other} called instead of {place}",
            "output": "{site}: {place} taken from {other}",
            "retry": "{site}: {other}",
        }
        return forms[self.kind].format(**self._asdict())


#: (leaf, RCX) of the calls of a teardown, and the lines that it reported.
Done = tuple[list[tuple[int, int]], list[str]]


class Unexpected(Exception):
    """A call ended with a status that its caller did not expect."""


class Impossible(Exception):
    """The style cannot say this."""


# -- the teardown


class Teardown:
    """One teardown in one style, with a bug or without. said: what it reported."""

    def __init__(self, scene: PhymemScene, style: Style, bug: Bug | None = None) -> None:
        self.scene = scene
        self.style = style
        self.bug = bug
        self.said: list[str] = []
        self.variables = style.variables(scene)

    def run(self) -> None:
        """Everything from the last private page to the TDR. Raises Unexpected or SeamcallFailed
        where the module refuses, TypeError where a type is wrong, Impossible.
        """
        scene, must = self.scene, self.scene.host.must
        tdr = scene.values["tdr"]
        self._do("flush page")
        must(0, abi.TDH_VP_FLUSH, rcx=scene.td.vcpus[0])
        must(0, abi.TDH_MNG_VPFLUSHDONE, rcx=tdr)
        for package in scene.machine.cpu.packages:
            scene.lp = scene.host.lp_of(package)
            self._write_back()
        scene.lp = 0
        must(0, abi.TDH_MNG_KEY_FREEID, rcx=tdr)
        self._reclaim("reclaim page")
        for hpa in scene.pages():
            must(0, abi.TDH_PHYMEM_PAGE_RECLAIM, rcx=hpa)
        self._reclaim("reclaim TDR")
        self._do("flush TDR")

    def _do(self, site: str) -> Answer:
        """The call at `site`, which must succeed."""
        answer = self._call(site)
        if answer.status:
            raise Unexpected(site)
        return answer

    def _write_back(self) -> None:
        """Write back a package, and go on after each interrupt."""
        retry = self._other("go on with write-back", "retry")
        answer = self._call("start write-back")
        left = 0 if retry == "taken for done" else RETRIES
        while answer.status == TDX_INTERRUPTED_RESUMABLE and left:
            left -= 1
            site = "start write-back" if retry == "started again" else "go on with write-back"
            answer = self._call(site)
        if answer.status and not (retry and answer.status == TDX_INTERRUPTED_RESUMABLE):
            raise Unexpected("write-back")

    def _reclaim(self, site: str) -> None:
        outputs = self._do(site).outputs
        names = [self._other(site, "output", name) or name for name in ("type", "owner", "size")]
        if not set(names) <= set(outputs):
            raise Impossible
        self.said.append(self.style.report(*(outputs[name] for name in names)))

    def _call(self, site: str) -> Answer:
        """The call at a site as it is written, bug and all."""
        written = self.style.sites[site]
        if self._other(site, "exchange", "leaf"):
            return self._with_leaf_exchanged(written.call, *written.arguments.values())
        names = [
            self._other(site, "argument", place) or name
            for place, name in self._exchanged(site, dict(written.arguments)).items()
        ]
        call = self._other(site, "leaf", written.call.removesuffix("_tdr")) or written.call
        if not set(names) <= set(self.variables):
            raise Impossible
        return self.style.calls[call](self.scene, *(self.variables[name] for name in names))

    def _exchanged(self, site: str, arguments: dict[str, str]) -> dict[str, str]:
        """The arguments, two of them exchanged if that is the bug; and the bug has its place."""
        bug = self.bug
        if bug is None or bug.site != site or bug.kind not in ("argument", "exchange"):
            return arguments
        places = {bug.place, bug.other} if bug.kind == "exchange" else {bug.place}
        if not places <= set(arguments):
            raise Impossible
        if bug.kind == "exchange":
            first, second = arguments[bug.place], arguments[bug.other]
            arguments |= {bug.place: second, bug.other: first}
        return arguments

    def _with_leaf_exchanged(self, call: str, *names: str) -> Answer:
        """The leaf and the operand in each other's place."""
        if not self.style.has_leaf_argument:
            raise Impossible
        values = [self.variables[name] for name in names]
        operand = values[0] if len(values) == 1 else self.scene.keyed(*values)
        return seamcall(self.scene, operand, LEAVES[call])

    def _other(self, site: str, kind: str, place: str = "") -> str:
        """What stands at a place if the bug is there, else ""."""
        bug = self.bug
        is_here = bug is not None and (bug.site, bug.kind) == (site, kind)
        return bug.other if bug is not None and is_here and place in ("", bug.place) else ""


def outcome(scene: PhymemScene, style: Style, bug: Bug) -> str:
    """Who notices the bug in this style: one of OUTCOMES. The scene is as before."""
    return judged(scene, style, bug, done(scene, style))


def judged(scene: PhymemScene, style: Style, bug: Bug, right: Done) -> str:
    """As `outcome`. right: what a teardown without the bug does."""
    try:
        wrong = done(scene, style, bug)
    except Impossible:
        return IMPOSSIBLE
    except TypeError:
        return TYPES
    except (Unexpected, SeamcallFailed):
        return STATUS
    return HARMLESS if wrong == right else NOBODY


def done(scene: PhymemScene, style: Style, bug: Bug | None = None) -> Done:
    """What a teardown called and said; nothing of it stays. Raises as `Teardown.run`."""
    teardown = Teardown(scene, style, bug)
    with scene.undone():
        teardown.run()
        return scene.calls, teardown.said


# -- the bugs


def all_bugs() -> list[Bug]:
    """Every bug that the raw style can have."""
    return [bug for site in RAW.sites for bug in _bugs_at(site)]


def _bugs_at(site: str) -> Iterator[Bug]:
    call, arguments = RAW.sites[site]
    for place, right in arguments.items():
        yield from (Bug(site, "argument", place, name) for name in VARIABLES if name != right)
    if len(arguments) == 2:
        yield Bug(site, "exchange", *arguments)
    yield Bug(site, "exchange", "leaf", "operand")
    yield from (Bug(site, "leaf", call, other) for other in LEAVES if other != call)
    if site == "reclaim page":
        for place in _OUTPUTS[:3]:
            yield from (Bug(site, "output", place, name) for name in _OUTPUTS if name != place)
    if site == "go on with write-back":
        yield from (Bug(site, "retry", "", how) for how in ("taken for done", "started again"))


def drawn_bugs(*, seed: int, count: int) -> list[Bug]:
    """`count` different bugs, drawn by `seed`. Refuses more than there are: ValueError."""
    bugs = all_bugs()
    if not 0 <= count <= len(bugs):
        raise ValueError(f"{count} bugs; there are 0 to {len(bugs)} different ones")
    return random.Random(seed).sample(bugs, count)


class CallRow(NamedTuple):
    """How each style writes the call at a site."""

    site: str
    raw: str
    named: str
    linux_6_16: str
    typed: str


def call_rows() -> list[CallRow]:
    """Every site as it is written."""
    return [CallRow(site, *(_written(style, site) for style in STYLES)) for site in RAW.sites]


def _written(style: Style, site: str) -> str:
    call, arguments = style.sites[site]
    names = list(arguments.values())
    if style.has_leaf_argument:
        return f"seamcall({LEAVES[call]}, {' | KeyID '.join(reversed(names))})"
    return f"{call}({', '.join(names)})"


class BugRow(NamedTuple):
    """A bug, and who notices it in each style."""

    bug: str
    raw: str
    named: str
    linux_6_16: str
    typed: str


def bug_rows(scene: PhymemScene, bugs: Iterable[Bug]) -> list[BugRow]:
    """Each bug in each style."""
    styles = [(style, done(scene, style)) for style in STYLES]
    return [
        BugRow._make([str(bug), *(judged(scene, style, bug, right) for style, right in styles)])
        for bug in bugs
    ]


class StyleRow(NamedTuple):
    """How many bugs of a kind a style has noticed, by whom."""

    kind: str
    style: str
    impossible: int
    types: int
    status: int
    nobody: int
    harmless: int


def style_rows(scene: PhymemScene, bugs: Iterable[Bug]) -> list[StyleRow]:
    """The bugs, counted by kind and style; "all" at the end."""
    bugs = list(bugs)
    found = {bug: row[1:] for bug, row in zip(bugs, bug_rows(scene, bugs), strict=True)}
    kinds = list(dict.fromkeys(bug.kind for bug in found))
    rows = []
    for kind in [*kinds, "all"]:
        for number, style in enumerate(STYLES):
            counts = Counter(
                outcomes[number] for bug, outcomes in found.items() if kind in (bug.kind, "all")
            )
            rows.append(StyleRow(kind, style.name, *(counts[name] for name in OUTCOMES)))
    return rows
