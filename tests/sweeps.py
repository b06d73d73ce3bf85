"""Systematic mutations: of one valid call every operand, lock, version and circumstance in turn.

What random mutations meet by luck, a sweep meets for sure; each call starts from the same state.
"""

from collections.abc import Iterator

from tdxlab.abi import leaves as abi
from tdxlab.abi.registers import MASK64, NULL_PA, Registers
from tdxlab.abi.structs import TD_PARAMS_SIZE
from tdxlab.arch import SIZE_1G, SIZE_2M
from tdxlab.seam.exits import EXIT_EPT_VIOLATION
from tdxlab.seam.fields_system import SYSTEM_FIELDS
from tdxlab.seam.fields_td import TD_FIELDS
from tdxlab.seam.fields_vcpu import VCPU_FIELDS
from tdxlab.seam.module import LEAVES
from tdxlab.seam.rules import PT_EPT, PT_NDA, PT_REG, PT_TDCX, PT_TDR, PT_TDVPR, SEPT_ACCEPTS
from tdxlab.seam.stepping import THRESHOLD
from tdxlab.seam.td import MAX_TDCX, MAX_TDVPS_PAGES
from tdxlab.steps import Schedule
from tests.fuzzer import WEATHERS, Fuzzer
from tests.ghost import locks_near
from tests.scene import BASE, BIG_POOL, PARAMS_KINDS, SCRATCH, SMALL_GPAS, SOURCE, TdView
from tests.walker import HostCall
from tests.walker_calls import CARELESS_MAKERS, MAKERS, draw, draw_carelessly

_ROWS = {
    abi.TDH_SYS_RD: SYSTEM_FIELDS,
    abi.TDH_MNG_RD: TD_FIELDS,
    abi.TDH_MNG_WR: TD_FIELDS,
    abi.TDH_VP_RD: VCPU_FIELDS,
    abi.TDH_VP_WR: VCPU_FIELDS,
}

_L2_PAGES = ("r9", "r10", "r11")

#: Bytes of TD_PARAMS whose bits are flipped one by one.
_PARAMS_BYTES = (*range(44), 60, *range(224, 234), *range(256, 280, 4), 448, TD_PARAMS_SIZE - 1)


class Sweeper(Fuzzer):
    """A fuzzer that also goes through mutations in order."""

    def sweep(self) -> None:
        """All mutations of one or two calls of each leaf, in the present state."""
        for leaf in sorted(LEAVES):
            for made in self.samples(leaf):
                self.sweep_operands(made)
                self.sweep_circumstances(made)
        self.sweep_addresses()
        self.sweep_fields()
        self.sweep_parameters()

    def samples(self, leaf: int) -> list[HostCall]:
        """A call that should succeed, or a plausible one; and one that forgets TLB tracking."""
        made = draw(self.walker, leaf) if leaf in MAKERS else None
        return [made or self.plausible(leaf), *filter(None, [draw_carelessly(self.walker, leaf)])]

    def once(self, made: HostCall, **operands: int) -> None:
        """Make the call with some operands exchanged, then go back."""
        registers = made.registers.copy()
        for name, value in operands.items():
            setattr(registers, name, value)
        mark = self.machine.mark()
        self.call(made._replace(registers=registers))
        self.machine.rewind(mark)
        self.machine.journal.release(mark)

    def sweep_operands(self, made: HostCall) -> None:
        """Every operand becomes everything else."""
        self.once(made)
        for name in ("rcx", "rdx", "r8", "r9"):
            for value in self.values(getattr(made.registers, name)):
                self.once(made, **{name: value})
        newer = made._replace(rax=made.rax & 0xFFFF | 1 << 16)
        for name in _L2_PAGES:
            self.once(newer, **(dict.fromkeys(_L2_PAGES, NULL_PA) | {name: SOURCE}))

    def values(self, given: int) -> Iterator[int]:
        """Things that exist and do not fit, and damaged forms of what was given."""
        yield from (given ^ 1, given ^ 1 << 11, given ^ 1 << 51, given ^ 1 << 53, given ^ 1 << 62)
        yield from (given | 8, given | 3 << 46, NULL_PA, BASE + 2 * SIZE_1G, BIG_POOL[0])
        for page_type in (PT_NDA, PT_REG, PT_TDCX, PT_TDVPR, PT_EPT):
            yield from self.scene.pages(page_type)[:1]
        yield from self.scene.pages(PT_TDR)
        yield from self.scene.pages(PT_TDVPR)
        for gpa in SMALL_GPAS:
            yield from (gpa | level for level in range(3))
        yield from (3, 4, 5, 33, 256, SOURCE + 8, SIZE_2M // 2)
        yield self.machine.platform.seamrr.base

    def sweep_circumstances(self, made: HostCall) -> None:
        """Every lock, version, LP; bad weather; the same call again."""
        for lock in locks_near(self.scene, made):
            if lock.take(lock.words, lock.index):
                self.once(made)
                lock.release(lock.words, lock.index)
        for version in range(4):
            self.once(made._replace(rax=made.rax & 0xFFFF | version << 16))
        for lp in self.scene.host_lps():
            self.once(made._replace(lp=lp))
        mark = self.machine.mark()
        for weather in WEATHERS:
            self.call_in(weather, HostCall(made.lp, made.rax, made.registers.copy()))
            self.machine.rewind(mark)
        self.call_again(HostCall(made.lp, made.rax, made.registers.copy()))
        self.machine.rewind(mark)
        self.machine.journal.release(mark)

    def sweep_addresses(self) -> None:
        """Every guest address of every TD, at every level."""
        page = self.scene.free_pages()[0]
        for leaf in sorted(SEPT_ACCEPTS.keys() & LEAVES.keys()):
            for tdr in self.scene.pages(PT_TDR):
                for gpa in SMALL_GPAS:
                    for level in range(4):
                        operands = Registers(gpa | level, tdr, page, SOURCE)
                        self.once(HostCall(self.host_lp(), leaf, operands))

    def sweep_fields(self) -> None:
        """Every metadata field, read and written, version 0 and 1."""
        for leaf, rows in _ROWS.items():
            made = draw(self.walker, leaf)
            if made is None:
                continue
            for row in rows:
                for value, mask in ((0, row.write[0]), (MASK64, row.write[0]), (1, 1)):
                    self.once(made, rdx=row.id, r8=value, r9=mask)
            self.once(made._replace(rax=leaf | 1 << 16), rdx=NULL_PA)

    def sweep_parameters(self) -> None:
        """TD_PARAMS with each bit flipped that means something."""
        made = draw(self.walker, abi.TDH_MNG_INIT)
        if made is None:
            return
        for offset in _PARAMS_BYTES:
            for bit in range(8):
                params = bytearray(PARAMS_KINDS[0])
                params[offset] ^= 1 << bit
                self.machine.store(SCRATCH, bytes(params))
                self.once(made, rdx=SCRATCH)
        self.machine.store(SCRATCH, bytes(PARAMS_KINDS[0][:16]) + bytes(TD_PARAMS_SIZE - 16))
        self.once(made, rdx=SCRATCH)

    # -- what neither luck nor a sweep finds

    def corner_cases(self) -> None:
        """States that take many steps to reach, each from the present one."""
        for case in (
            self.fill_the_tdcs,
            self.fill_a_vcpu,
            self.stay_at_one_instruction,
            self.use_every_vcpu,
            self.track_twice,
            self.block_before_all_else,
            self.end_a_td,
            self.write_a_field_twice_at_once,
            self.shut_down,
        ):
            mark = self.machine.mark()
            case()
            self.machine.rewind(mark)
            self.machine.journal.release(mark)

    def fill_the_tdcs(self) -> None:
        """One page more than a TD may have, and one after its parameters are set."""
        for td in self.scene.tds():
            for _ in range(MAX_TDCX + 1 - td.tdcx):
                registers = Registers(rcx=self.scene.free_pages()[0], rdx=td.tdr)
                self.call(HostCall(self.host_lp(), abi.TDH_MNG_ADDCX, registers))

    def fill_a_vcpu(self) -> None:
        """One page more than a vCPU may have."""
        for vcpu in self.scene.vcpus():
            for _ in range(MAX_TDVPS_PAGES + 1 - vcpu.pages):
                registers = Registers(rcx=self.scene.free_pages()[0], rdx=vcpu.tdvpr)
                self.call(HostCall(self.host_lp(), abi.TDH_VP_ADDCX, registers))

    def stay_at_one_instruction(self) -> None:
        """A guest that faults again and again arms the zero-step filter; then entry needs the S-EPT
        tree.
        """
        made = draw(self.walker, abi.TDH_VP_ENTER)
        assert made is not None
        for _ in range(THRESHOLD + 2):
            self.call(HostCall(made.lp, made.rax, made.registers.copy()))
            if not self.machine.cpu.vcpu_inside(made.lp):
                break
            gpa = self.scene.guest_td(made.lp).limit - 0x1000
            self.machine.vm_exit(
                made.lp, EXIT_EPT_VIOLATION, Registers(), qualification=2, gpa=gpa, rip=0
            )
        self.sweep_circumstances(made)

    def use_every_vcpu(self) -> None:
        """All vCPUs, the incomplete ones too, are initialised, given more pages, and entered."""
        vcpus, spare = self.scene.vcpus(), self.scene.free_pages()[0]
        for leaf in (abi.TDH_VP_INIT, abi.TDH_VP_INIT, abi.TDH_VP_ADDCX):
            for vcpu in vcpus:
                operands = (spare, vcpu.tdvpr) if leaf == abi.TDH_VP_ADDCX else (vcpu.tdvpr, 0)
                self.call(HostCall(self.host_lp(), leaf, Registers(*operands)))
        for leaf in (abi.TDH_MR_FINALIZE, abi.TDH_MEM_TRACK):
            for td in self.scene.tds():
                self.call(HostCall(self.host_lp(), leaf, Registers(td.tdr)))
        for leaf in (abi.TDH_VP_ENTER, abi.TDH_VP_RD, abi.TDH_VP_WR):
            for vcpu in vcpus:
                self.once(HostCall(self.host_lp(), leaf, Registers(vcpu.tdvpr)))

    def track_twice(self) -> None:
        """A vCPU stays inside for two epochs."""
        made = draw(self.walker, abi.TDH_VP_ENTER)
        assert made is not None
        self.call(made)
        tdr = self.machine.cpu.tdr_inside(made.lp)
        for _ in range(2):
            self.call(HostCall(self.host_lp(), abi.TDH_MEM_TRACK, Registers(tdr)))

    def block_before_all_else(self) -> None:
        """The entries of level 0 are blocked, then those of level 1; what takes a page away is
        tried on all entries, before and after TRACK.
        """
        tds = [td for td in self.scene.tds() if td.accepts(abi.TDH_MEM_TRACK)]
        for level in (0, 1):
            for td in tds:
                for entry in td.entries(level, level, SEPT_ACCEPTS[abi.TDH_MEM_RANGE_BLOCK]):
                    operands = Registers(entry.operand, td.tdr)
                    self.call(HostCall(self.host_lp(), abi.TDH_MEM_RANGE_BLOCK, operands))
            for td in tds:
                self.take_everything_away(td)
                self.call(HostCall(self.host_lp(), abi.TDH_MEM_TRACK, Registers(td.tdr)))
                self.take_everything_away(td)

    def take_everything_away(self, td: TdView) -> None:
        """Each leaf that needs TLB tracking, on each entry that is in a state for it."""
        page, used = self.scene.free_pages()[0], self.scene.pages(PT_TDCX)[0]
        for leaf in sorted(CARELESS_MAKERS):
            for entry in td.entries(0, 2, SEPT_ACCEPTS[leaf]):
                made = HostCall(0, leaf, Registers(entry.operand, td.tdr, page))
                self.once(made)
                self.sweep_circumstances(made)
                for value in (0, BASE + 2 * SIZE_1G, used, NULL_PA):
                    self.once(made, r8=value)

    def end_a_td(self) -> None:
        """A TD is flushed, its KeyID written back and freed; each step is swept first."""
        for leaf in (
            *(abi.TDH_MNG_VPFLUSHDONE, abi.TDH_MNG_KEY_FREEID),
            *(abi.TDH_PHYMEM_CACHE_WB,) * 8,
            *(abi.TDH_MNG_KEY_FREEID, abi.TDH_PHYMEM_PAGE_RECLAIM),
        ):
            made = draw(self.walker, leaf)
            for td in self.scene.tds() if made is None else ():
                self.sweep_circumstances(HostCall(self.host_lp(), leaf, Registers(td.tdr)))
            if made is not None:
                self.sweep_circumstances(made)
                self.call(made)

    def write_a_field_twice_at_once(self) -> None:
        """Two hosts write one field: the slower one is refused."""
        tds = [td for td in self.scene.tds() if td.accepts(abi.TDH_MNG_WR)]
        field = next(row for row in TD_FIELDS if row.name == "VM_CTLS")
        first, second = (Registers(rcx=tds[0].tdr, rdx=field.id, r8=1, r9=1) for _ in range(2))
        slow = Schedule([self.machine.seamcall_steps(0, abi.TDH_MNG_WR, first)])
        slow.advance(0)
        self.call(HostCall(1, abi.TDH_MNG_WR, second))
        while slow.advance(0):
            pass
        self.statuses[abi.TDH_MNG_WR, slow.results[0]] += 1
        self.calls += 1

    def shut_down(self) -> None:
        """Another LP is inside the module; then nobody is, and nothing works any more."""
        shutdown = HostCall(0, abi.TDH_SYS_SHUTDOWN, Registers())
        other = self.machine.seamcall_steps(1, abi.TDH_PHYMEM_PAGE_RDMD, Registers(rcx=BASE))
        waiting = Schedule([other])
        waiting.advance(0)
        self.call(shutdown)
        waiting.advance(0)
        self.call(shutdown)
        for leaf in sorted(LEAVES):
            self.call(HostCall(0, leaf, Registers()))
