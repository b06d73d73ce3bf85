"""The command `tdxlab`: lab, demo, replay, explore, faults, attack, measure, bench, doctor.

Every command imports what it needs when it runs, so that `tdxlab --help` answers at once. A mistake
at the keyboard is one line on stderr and exit status 2, never a traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from string import hexdigits
from typing import NoReturn

from tdxlab import __version__
from tdxlab.arguments import one_line

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130
#: A guest of the demo may not be larger: it would run for hours.
DEMO_LIMIT = 1 << 36
#: Digits of an MRTD.
MRTD_DIGITS = 96


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints take one line."""

    def error(self, message: str) -> NoReturn:
        said = one_line(f"{self.prog}: {message} (see {self.prog} --help)")
        self.exit(EXIT_MISTAKE, f"{said}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command in `arguments` (default: the command line); returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader of our output left (`tdxlab demo | head`): there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except OSError as error:
        return _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))


def _complain(message: str) -> int:
    """One line on stderr; returns the exit status of a mistake."""
    print(one_line(f"tdxlab: {message}"), file=sys.stderr)
    return EXIT_MISTAKE


def _parser() -> argparse.ArgumentParser:
    """The parser with all its commands; each leaves the function that runs it in `run`."""
    parser = _Parser(prog="tdxlab", description="How confidential VMs manage memory, to play with.")
    parser.add_argument("--version", action="version", version=f"tdxlab {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_lab(commands)
    _add_demo(commands)
    _add_replay(commands)
    _add_explore(commands)
    _add_faults(commands)
    _add_attack(commands)
    _add_measure(commands)
    for name, run, text in (
        ("bench", _bench, "measure the model's speed, as ratios to a plain-Python baseline"),
        ("doctor", _doctor, "say what is installed, what is missing and what is not modelled"),
    ):
        commands.add_parser(name, help=text, description=text).set_defaults(run=run)
    return parser


def _add_lab(commands: argparse._SubParsersAction[_Parser]) -> None:
    from tdxlab.lab import DEFAULT_FOLDER, DEFAULT_PORT

    text = "copy the notebooks to a working folder and open them in JupyterLab"
    lab = commands.add_parser("lab", help=text, description=text)
    folder = os.environ.get("TDXLAB_NOTEBOOKS") or DEFAULT_FOLDER
    note = "working folder; your files in it are never overwritten (default: %(default)s)"
    lab.add_argument("--dir", type=Path, default=Path(folder), metavar="FOLDER", help=note)
    note = "first TCP port to try; the next free one is taken (default: %(default)s)"
    lab.add_argument("--port", type=_port, default=DEFAULT_PORT, metavar="PORT", help=note)
    lab.add_argument("--no-browser", action="store_true", help="print the URL, open no browser")
    note = "copy the solutions and the instructor notes (instructor/) too; students get neither"
    lab.add_argument("--instructor", action="store_true", help=note)
    lab.set_defaults(run=_lab)


def _add_demo(commands: argparse._SubParsersAction[_Parser]) -> None:
    text = "play a TD's whole life and print what each phase costs"
    demo = commands.add_parser("demo", help=text, description=text)
    _add_gpaw(demo)
    note = "memory of the guest, such as 64MiB (default: %(default)s)"
    demo.add_argument("--memory", type=_size, default="64MiB", metavar="SIZE", help=note)
    note = "vCPUs, at least 1 (default: %(default)s)"
    demo.add_argument("--vcpus", type=_vcpus, default=2, metavar="N", help=note)
    demo.add_argument("--json", action="store_true", help="print one JSON object, not a table")
    note = "draw the SEAMCALLs of each phase into this file too"
    demo.add_argument("--plot", type=Path, metavar="FILE.png", help=note)
    demo.set_defaults(run=_demo)


def _add_gpaw(parser: _Parser) -> None:
    note = "width of guest addresses: 48 (4 levels) or 52 (5 levels); default: %(default)s"
    parser.add_argument("--gpaw", type=int, choices=(48, 52), default=48, help=note)


def _add_replay(commands: argparse._SubParsersAction[_Parser]) -> None:
    text = "replay recorded traces of the real code, module and KVM, and compare every answer"
    replay = commands.add_parser("replay", help=text, description=text)
    note = "trace files (.json, .json.gz) or folders of them (default: the packaged traces)"
    replay.add_argument("paths", nargs="*", metavar="PATH", help=note)
    replay.add_argument("--json", action="store_true", help="print one JSON object, not a table")
    replay.set_defaults(run=_replay)


def _add_explore(commands: argparse._SubParsersAction[_Parser]) -> None:
    text = "let a few operations meet in every possible order, and say what goes wrong"
    explore = commands.add_parser("explore", help=text, description=text)
    note = "what meets, such as same-page; any other word prints them all"
    explore.add_argument("scenario", metavar="SCENARIO", help=note)
    note = "vCPUs, from 1 to what the scenario is made for (default: 2, or that)"
    explore.add_argument("--vcpus", type=_vcpus, metavar="N", help=note)
    note = "turn a rule of KVM off, such as no-freeze; any other word prints them all"
    explore.add_argument("--break", dest="rule", metavar="RULE", help=note)
    note = "let others move inside of a SEAMCALL too, where it holds all its locks"
    explore.add_argument("--inside-seamcalls", action="store_true", help=note)
    explore.add_argument("--json", action="store_true", help="print one JSON object, not a table")
    explore.set_defaults(run=_explore)


def _add_measure(commands: argparse._SubParsersAction[_Parser]) -> None:
    text = "build a TD with a firmware image and print the MRTD that the module computes"
    measure = commands.add_parser("measure", help=text, description=text)
    note = "TDVF firmware image, code and variables in one file, such as OVMF.fd"
    measure.add_argument("image", type=Path, metavar="IMAGE", help=note)
    note = "measure each page when it is added, or all of a section (default: %(default)s)"
    orders = ("per-page", "per-section")
    measure.add_argument("--order", choices=orders, default=orders[0], help=note)
    note = "print each call that is measured, and SHA-384 of its bytes"
    measure.add_argument("--log", action="store_true", help=note)
    note = "96 hex digits to compare with; exit status 1 if MRTD is different"
    measure.add_argument("--expect", type=_digest, metavar="HEX", help=note)
    measure.add_argument("--json", action="store_true", help="print one JSON object, not a table")
    measure.set_defaults(run=_measure)


def _add_attack(commands: argparse._SubParsersAction[_Parser]) -> None:
    text = "let a hostile host try something, and say what stops it, if anything does"
    attack = commands.add_parser("attack", help=text, description=text)
    note = "what is tried, such as read-private, or all (the default); other words print them"
    attack.add_argument("name", nargs="?", default="all", metavar="NAME", help=note)
    note = "width of guest addresses, 48 or 52; default: %(default)s"
    attack.add_argument("--gpaw", type=int, choices=(48, 52), default=48, help=note)
    note = "what the machine or the guest lacks, such as MACs; any other word prints them all"
    attack.add_argument("--without", default="nothing", metavar="WHAT", help=note)
    attack.add_argument("--json", action="store_true", help="print JSON, not text")
    attack.set_defaults(run=_attack)


def _add_faults(commands: argparse._SubParsersAction[_Parser]) -> None:
    text = "let every SEAMCALL of a TD's life fail in turn, and say what is lost"
    faults = commands.add_parser("faults", help=text, description=text)
    _add_gpaw(faults)
    note = "only this leaf, such as TDH.MEM.TRACK; can be given several times"
    faults.add_argument("--leaf", action="append", default=[], metavar="NAME", help=note)
    note = "where random lives and their random failures come from (default: %(default)s)"
    faults.add_argument("--seed", type=_count, default=0, metavar="N", help=note)
    note = "random lives besides (default: 100, with --leaf none)"
    faults.add_argument("--runs", type=_count, metavar="M", help=note)
    note = "only random life K of the seed: to see one again"
    faults.add_argument("--only", type=_count, metavar="K", help=note)
    faults.add_argument("--json", action="store_true", help="print one JSON object, not a table")
    faults.set_defaults(run=_faults)


def _port(text: str) -> int:
    """A TCP port as the command line names it, 1..65535."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no TCP port: give a number from 1 to 65535")
    return int(text)


def _size(text: str) -> int:
    """A size of guest memory as the command line names it."""
    from tdxlab.sizes import parse_size

    try:
        size = parse_size(text)
    except ValueError as mistake:
        raise argparse.ArgumentTypeError(str(mistake)) from None
    if size % 4096 or not 4096 <= size <= DEMO_LIMIT:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give a multiple of 4 KiB, at most {DEMO_LIMIT >> 30} GiB"
        )
    return size


def _vcpus(text: str) -> int:
    """A number of vCPUs as the command line names it, 1..256."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 256:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number of vCPUs from 1 to 256")
    return int(text)


def _digest(text: str) -> str:
    """An MRTD as the command line names it, in lower case."""
    if len(text) != MRTD_DIGITS or not set(text) <= set(hexdigits):
        raise argparse.ArgumentTypeError(f"{text!r}: give an MRTD, {MRTD_DIGITS} hex digits")
    return text.lower()


def _count(text: str) -> int:
    """A number from 0 on as the command line names it."""
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number from 0 to 999999999")
    return int(text)


def _lab(options: argparse.Namespace) -> int:
    from tdxlab import lab

    browser = not options.no_browser and lab.wants_browser(os.environ)
    try:
        return lab.run(options.dir, options.port, browser, sys.stdout, options.instructor)
    except lab.LabError as error:
        return _complain(str(error))


def _replay(options: argparse.Namespace) -> int:
    from tdxlab import replay, resources

    paths = options.paths or [str(resources.traces())]
    with _progress("traces") as progress:
        return replay.command(paths, options.json, sys.stdout, sys.stderr, progress)


def _explore(options: argparse.Namespace) -> int:
    from tdxlab import race_command

    try:
        with _progress("states") as show:
            return race_command.command(
                options.scenario,
                options.vcpus,
                options.rule,
                options.json,
                sys.stdout,
                lambda states, _moves: show(states, 0),
                inside_seamcalls=options.inside_seamcalls,
            )
    except ValueError as mistake:
        return _complain(str(mistake))


def _attack(options: argparse.Namespace) -> int:
    from tdxlab.attacks import command
    from tdxlab.study.aes_xts import AesXts

    try:
        with _progress("attacks") as progress:
            return command.command(
                options.name,
                options.gpaw,
                options.json,
                sys.stdout,
                lacks=options.without,
                cipher=AesXts(),
                progress=progress,
            )
    except ValueError as mistake:
        return _complain(str(mistake))


def _faults(options: argparse.Namespace) -> int:
    from tdxlab import faults_command

    try:
        with _progress("lives") as show:
            return faults_command.command(
                options.gpaw,
                options.seed,
                options.runs,
                options.leaf,
                options.only,
                options.json,
                sys.stdout,
                show,
            )
    except ValueError as mistake:
        return _complain(str(mistake))


@contextmanager
def _progress(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr if that is a terminal; yields a function of (done, in all)."""
    from tqdm import tqdm

    with tqdm(unit=unit, leave=False, disable=not sys.stderr.isatty()) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def _demo(options: argparse.Namespace) -> int:
    from tdxlab import demo

    with _progress("pages") as show:
        life = demo.live(
            gpaw=options.gpaw,
            memory=options.memory,
            vcpus=options.vcpus,
            progress=lambda _phase, done, total: show(done, total),
        )
    if options.plot is not None:
        from tdxlab.study import demo_plot

        demo_plot.save(life, options.plot)
    return demo.command(life, options.json, sys.stdout)


def _measure(options: argparse.Namespace) -> int:
    from tdxlab import measure

    try:
        with _progress("calls") as show:
            return measure.command(
                options.image,
                options.order,
                options.expect,
                options.log,
                options.json,
                sys.stdout,
                show,
            )
    except ValueError as mistake:
        return _complain(str(mistake))


def _bench(_options: argparse.Namespace) -> int:
    from tdxlab import bench

    return bench.main(sys.stdout, sys.stderr)


def _doctor(_options: argparse.Namespace) -> int:
    from tdxlab import doctor

    return doctor.run(sys.stdout)
