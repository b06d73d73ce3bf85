"""Figures reported beside the ratios: memory, the journal's cost, import time, redraws.

What draws is imported when it is measured: the ratios need neither matplotlib nor widgets.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tdxlab import steps
from tdxlab.abi import leaves as abi
from tdxlab.abi.registers import Registers
from tdxlab.arch import PAGE_SIZE, SIZE_1G, SIZE_2M
from tdxlab.bench.kvm_workloads import ModelKvm
from tdxlab.bench.workloads import GUEST_BASE, PAGES, ModelBench, aug, best_slice, measure
from tdxlab.tape import Tape

if TYPE_CHECKING:
    from tdxlab.study.panel_life import LifePanel

_DENSE_PAGES = 204_800
_SPREAD_PAGES = 256
_TAPE_EVENTS = 1000


def resident_bytes() -> int:
    """Resident memory of this process; from the kernel where it tells, else the highest so far."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def dense_memory() -> str:
    """Resident bytes for each 4 KiB page of a guest without holes: mirror, S-EPT and PAMT.

    Its pages are in their guest_memfd already: what KVM knows of those is not counted.
    """
    bench = ModelKvm(_DENSE_PAGES)
    slot = bench.td.vm.slots.find(0)
    assert slot is not None
    for gfn in range(_DENSE_PAGES):
        pfn = bench.td.guest_memory.get_pfn(slot.gmem, gfn)
        bench.td.guest_memory.get_page(pfn)
    before = resident_bytes()
    for gpa in range(0, _DENSE_PAGES * PAGE_SIZE, PAGE_SIZE):
        bench.fault(gpa)
    each = (resident_bytes() - before) / _DENSE_PAGES
    return f"memory per page, dense        {each:8.1f} bytes   (goal <= 40)"


def file_memory() -> str:
    """Resident bytes that KVM needs to know each page of a guest_memfd without holes: in the file,
    out of the host's free pages, and referenced.
    """
    bench = ModelKvm(_DENSE_PAGES)
    slot = bench.td.vm.slots.find(0)
    assert slot is not None
    before = resident_bytes()
    for gfn in range(_DENSE_PAGES):
        bench.td.guest_memory.get_page(bench.td.guest_memory.get_pfn(slot.gmem, gfn))
    each = (resident_bytes() - before) / _DENSE_PAGES
    return f"memory per page, guest_memfd  {each:8.1f} bytes"


def spread_memory() -> str:
    """Resident bytes for each page where guest memory holds one page in each GiB, KVM's included.

    Differs: host memory is dense; each GiB of it that is used costs the module the first page of
    that GiB's PAMT, as it does on a real host.
    """
    bench = ModelKvm(_SPREAD_PAGES * SIZE_1G // PAGE_SIZE)
    before = resident_bytes()
    for number in range(_SPREAD_PAGES):
        bench.fault(number * SIZE_1G)
    each = (resident_bytes() - before) / _SPREAD_PAGES / 1024
    return f"memory per page, one a GiB    {each:8.1f} KiB     (goal <= 48)"


def demo_time() -> str:
    """CPU time of `tdxlab demo` with a TD of 64 MiB, in a fresh interpreter."""
    command = [sys.executable, "-m", "tdxlab", "demo", "--memory", "64 MiB"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return f"tdxlab demo, 64 MiB           {seconds:8.2f} s       (aim 5)"


def campaign_time() -> str:
    """CPU time of the systematic part of `tdxlab faults` at GPAW 48."""
    from tdxlab.campaign import play_all

    start = time.process_time()
    lives = len(play_all(48, runs=0))
    seconds = time.process_time() - start
    return f"tdxlab faults, {lives} lives      {seconds:8.2f} s       (aim 120)"


def journal_cost() -> str:
    """How much slower a mapped page gets while somebody holds a mark."""
    plain = measure(ModelBench(), aug)
    bench = ModelBench()
    mark = bench.machine.mark()
    recorded = measure(bench, aug)
    bench.machine.journal.release(mark)
    each = recorded * 1e6
    return f"AUG with the journal on       {each:8.2f} us      ({recorded / plain:.2f} x without)"


def stepped_cost() -> str:
    """How much slower a fault gets if a schedule drives it from one step to the next."""
    bench, half = ModelKvm(), PAGES // 2
    for gpa in range(0, PAGES * PAGE_SIZE, SIZE_2M):
        bench.fault(gpa)

    def plain(page: int) -> None:
        steps.run(bench.faulting(page * PAGE_SIZE))

    def stepped(page: int) -> None:
        steps.round_robin([bench.faulting((half + page) * PAGE_SIZE)])

    at_once, by_steps = best_slice(plain, half) * 1e6, best_slice(stepped, half) * 1e6
    left = f"fault driven step by step     {by_steps:8.2f} us"
    return f"{left}      ({by_steps / at_once:.2f} x all at once, goal <= 2)"


def import_time() -> str:
    """CPU time of `import tdxlab` and its machine in a fresh interpreter, numpy not loaded."""
    code = (
        "import time, sys; start = time.process_time(); import tdxlab, tdxlab.bare; "
        "assert 'numpy' not in sys.modules; print(time.process_time() - start)"
    )
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(3)
    ]
    return f"import tdxlab                 {min(seconds):8.3f} s       (aim 0.2)"


def milliseconds(work: Callable[[], object], repeats: int = 20) -> float:
    """Best CPU time of one call of `work`."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best * 1e3


def svg_redraw() -> str:
    """One redraw of a map of 512 entries, all of them in use."""
    from tdxlab.study import palette, svg

    look = palette.SEPT_LOOKS["MAPPED"]
    cells = dict.fromkeys(range(512), look)
    each = milliseconds(lambda: svg.entry_map(cells, title="a table"))
    return f"SVG map of 512 entries        {each:8.2f} ms      (aim 5)"


def figure_redraw() -> str:
    """One redraw of the life-cycle panel's bars, PNG included."""
    panel = _panel_of_a_life()
    return f"figure of a panel             {milliseconds(panel.png):8.2f} ms      (aim 80)"


def panel_redraw() -> str:
    """One redraw of everything in the life-cycle panel: sentence, views, numbers, figure."""
    panel = _panel_of_a_life()
    return f"panel redrawn                 {milliseconds(panel.draw):8.2f} ms      (aim 100)"


def _panel_of_a_life() -> LifePanel:
    """A TD that is built and has used a page."""
    from tdxlab.study.panel_life import LifePanel

    panel = LifePanel()
    panel.build.click()
    panel.touch.click()
    return panel


def step_back() -> str:
    """Going back over a tape of 1000 events, from its end to its beginning."""
    bench = ModelBench()
    tape = Tape(bench.machine)
    for page in range(_TAPE_EVENTS):
        offset = page * PAGE_SIZE
        given = Registers(rcx=GUEST_BASE + offset, rdx=bench.tdr, r8=bench.pool + offset)
        tape.seamcall(0, abi.TDH_MEM_PAGE_AUG, given)
    start = time.process_time()
    tape.seek(0)
    each = (time.process_time() - start) * 1e3
    return f"back over 1000 events         {each:8.2f} ms      (aim 50)"


def protocol_speed() -> str:
    """Moves that the exploration of the small protocol makes, states and schedules counted; in the
    quickest of five.
    """
    from tdxlab.study.protocol import PROTOCOLS
    from tdxlab.study.protocol_search import explore

    def moves_a_second() -> float:
        start = time.process_time()
        return explore(PROTOCOLS["hook-failure"](3)).transitions / (time.process_time() - start)

    each = max(moves_a_second() for _ in range(5)) / 1e6
    return f"protocol explored             {each:8.2f} million transitions a second (goal >= 0.2)"


def explore_time(vcpus: int) -> str:
    """All schedules of same-page, explored completely."""
    from tdxlab.races import build

    race = build("same-page", vcpus)
    start = time.process_time()
    found = race.explore()
    seconds = time.process_time() - start
    what = f"{found.states:,} states, {found.transitions:,} transitions"
    return f"same-page, {vcpus} vCPUs, explored {seconds:7.2f} s       ({what})"


def two_vcpus_explored() -> str:
    """As `explore_time`, with two vCPUs."""
    return explore_time(2)


def three_vcpus_explored() -> str:
    """As `explore_time`, with three vCPUs."""
    return explore_time(3)


#: Every figure, in the order they are printed.
ALL: tuple[Callable[[], str], ...] = (
    dense_memory,
    file_memory,
    spread_memory,
    demo_time,
    campaign_time,
    journal_cost,
    stepped_cost,
    import_time,
    svg_redraw,
    figure_redraw,
    panel_redraw,
    step_back,
    protocol_speed,
    two_vcpus_explored,
    three_vcpus_explored,
)
