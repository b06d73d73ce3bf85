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

from tdxlab.abi import leaves as abi
from tdxlab.abi.registers import Registers
from tdxlab.arch import PAGE_SIZE, SIZE_1G, SIZE_2M
from tdxlab.bare import BareMachine
from tdxlab.bench.workloads import GUEST_BASE, ModelBench, aug, measure
from tdxlab.hardware import default_platform
from tdxlab.host import Host
from tdxlab.host_td import HostTd
from tdxlab.tape import Tape

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
    """Resident bytes for each 4 KiB page of a guest without holes: S-EPT and PAMT."""
    bench = ModelBench(pages=0)
    before = resident_bytes()
    for gpa in range(GUEST_BASE, GUEST_BASE + _DENSE_PAGES * PAGE_SIZE, SIZE_2M):
        bench.td.map_tables(gpa)
    measure(bench, aug, _DENSE_PAGES)
    each = (resident_bytes() - before) / _DENSE_PAGES
    return f"memory per page, dense        {each:8.1f} bytes   (goal <= 40)"


def spread_memory() -> str:
    """Resident bytes for each page where guest and host memory hold one page in each GiB."""
    machine = BareMachine(default_platform(tdmr_gib=_SPREAD_PAGES + 2))
    host = Host(machine)
    host.boot()
    td = HostTd(host)
    td.add_vcpu()
    td.finalize()
    base = machine.platform.tdmrs[0].base + SIZE_1G
    before = resident_bytes()
    for number in range(_SPREAD_PAGES):
        gpa, hpa = GUEST_BASE + number * SIZE_1G, base + number * SIZE_1G
        td.map_tables(gpa)
        host.must(0, abi.TDH_MEM_PAGE_AUG, rcx=gpa, rdx=td.tdr, r8=hpa)
    each = (resident_bytes() - before) / _SPREAD_PAGES / 1024
    return f"memory per page, one a GiB    {each:8.1f} KiB     (goal <= 24)"


def journal_cost() -> str:
    """How much slower a mapped page gets while somebody holds a mark."""
    plain = measure(ModelBench(), aug)
    bench = ModelBench()
    mark = bench.machine.mark()
    recorded = measure(bench, aug)
    bench.machine.journal.release(mark)
    each = recorded * 1e6
    return f"AUG with the journal on       {each:8.2f} us      ({recorded / plain:.2f} x without)"


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
    from tdxlab.study.panel_life import LifePanel

    panel = LifePanel()
    panel.build.click()
    return f"figure of a panel             {milliseconds(panel.png):8.2f} ms      (aim 80)"


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


#: Every figure, in the order they are printed.
ALL: tuple[Callable[[], str], ...] = (
    dense_memory,
    spread_memory,
    journal_cost,
    import_time,
    svg_redraw,
    figure_redraw,
    step_back,
)
