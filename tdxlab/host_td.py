"""One TD as its host sees it: built, run and torn down with plain SEAMCALLs.

    host = Host(BareMachine()); host.boot()
    td = HostTd(host, gpaw=48)
    td.add_vcpu(lp=0)
    td.add_page(0x4000_0000, b"code"); td.measure(0x4000_0000); td.finalize()
    td.enter(0, lp=0); ...
    td.tear_down()

Mistakes of the caller (an address that is not aligned or not the guest's, an LP that is taken) are
ValueErrors and change nothing; what the module refuses is a SeamcallFailed.
"""

from __future__ import annotations

from tdxlab.abi import leaves as abi
from tdxlab.abi.outcome import GuestOutcome
from tdxlab.abi.registers import Registers
from tdxlab.abi.structs import CONFIG_FLAGS_GPAW_52, EPTP_4_LEVELS, EPTP_5_LEVELS, make_td_params
from tdxlab.arch import PAGE_SIZE, level_size, sept_levels, shared_bit
from tdxlab.host import SOURCE_PAGE_BUFFER, TD_PARAMS_BUFFER, Host

TDCS_PAGES = 6
VCPU_PAGES = 5
MEASURED_CHUNK = 256


class HostTd:
    """A TD that exists from construction on: created, keyed, given its pages, initialised.

    gpaw: 48 or 52. max_vcpus: 1..65535. attributes: TD attributes.
    tdr, keyid: its identity. vcpus: HPA of each vCPU's TDVPR. tables: (gpa, sept_level) -> HPA of
    the S-EPT page under that entry.
    pages: gpa -> (HPA, sept_level) of each mapped page.
    """

    def __init__(
        self, host: Host, *, gpaw: int = 48, max_vcpus: int = 4, attributes: int = 0
    ) -> None:
        self.limit = 1 << shared_bit(gpaw)
        self.top_level = sept_levels(gpaw) - 1
        self.host = host
        self.gpaw = gpaw
        self.vcpus: list[int] = []
        self.tables: dict[tuple[int, int], int] = {}
        self.pages: dict[int, tuple[int, int]] = {}
        self._lp_of_vcpu: dict[int, int] = {}
        self._control_pages: list[int] = []
        self.keyid = host.take_keyid()
        self.tdr = host.take_page()
        self._create(max_vcpus, attributes)

    def _create(self, max_vcpus: int, attributes: int) -> None:
        host, cpu = self.host, self.host.machine.cpu
        host.phase("create")
        host.must(0, abi.TDH_MNG_CREATE, rcx=self.tdr, rdx=self.keyid)
        for package in cpu.packages:
            host.must(host.lp_of(package), abi.TDH_MNG_KEY_CONFIG, rcx=self.tdr)
        for _ in range(TDCS_PAGES):
            host.must(0, abi.TDH_MNG_ADDCX, rcx=self._take_control_page(), rdx=self.tdr)
        params = make_td_params(
            max_vcpus=max_vcpus,
            eptp_controls=EPTP_4_LEVELS if self.top_level == 3 else EPTP_5_LEVELS,
            attributes=attributes,
            config_flags=0 if self.gpaw == 48 else CONFIG_FLAGS_GPAW_52,
        )
        host.door.store(TD_PARAMS_BUFFER, params)
        host.must(0, abi.TDH_MNG_INIT, rcx=self.tdr, rdx=TD_PARAMS_BUFFER)

    def _take_control_page(self) -> int:
        hpa = self.host.take_page()
        self._control_pages.append(hpa)
        return hpa

    # -- building

    def add_vcpu(self, *, lp: int = 0) -> int:
        """Create a vCPU and make it ready on `lp`; returns its number."""
        host = self.host
        host.machine.cpu.require_lp(lp)
        host.phase("add a vCPU")
        tdvpr = self._take_control_page()
        host.must(lp, abi.TDH_VP_CREATE, rcx=tdvpr, rdx=self.tdr)
        for _ in range(VCPU_PAGES):
            host.must(lp, abi.TDH_VP_ADDCX, rcx=self._take_control_page(), rdx=tdvpr)
        host.must(lp, abi.TDH_VP_INIT, rcx=tdvpr)
        self.vcpus.append(tdvpr)
        self._lp_of_vcpu[len(self.vcpus) - 1] = lp
        return len(self.vcpus) - 1

    def require_private(self, gpa: int, sept_level: int = 0) -> None:
        """Refuse, with a ValueError, what is not the address of a private page of this guest."""
        size = level_size(sept_level)
        if gpa % size or not 0 <= gpa <= self.limit - size:
            raise ValueError(
                f"GPA {gpa:#x} is not a private page of this guest: it must be a multiple of "
                f"{size:#x} in 0..{self.limit - size:#x} (GPAW {self.gpaw})"
            )

    def map_tables(self, gpa: int, sept_level: int = 0) -> None:
        """Add the S-EPT pages that are missing above the entry for `gpa` at `sept_level`."""
        self.require_private(gpa, sept_level)
        for level in range(self.top_level, sept_level, -1):
            base = gpa & -level_size(level)
            if (base, level) not in self.tables:
                hpa = self.host.take_page()
                self.host.must(0, abi.TDH_MEM_SEPT_ADD, rcx=base | level, rdx=self.tdr, r8=hpa)
                self.tables[base, level] = hpa

    def add_page(self, gpa: int, content: bytes = b"") -> int:
        """Add an initial page with `content` (at most 4096 bytes, zeros behind); returns its
        HPA.
        """
        if len(content) > PAGE_SIZE:
            raise ValueError(f"{len(content)} bytes do not fit a page; give at most {PAGE_SIZE}")
        self.require_private(gpa)
        self.host.phase("add a page")
        self.map_tables(gpa)
        self.host.door.store(SOURCE_PAGE_BUFFER, content.ljust(PAGE_SIZE, b"\0"))
        hpa = self.host.take_page()
        self.host.must(
            0, abi.TDH_MEM_PAGE_ADD, rcx=gpa, rdx=self.tdr, r8=hpa, r9=SOURCE_PAGE_BUFFER
        )
        self.pages[gpa] = (hpa, 0)
        return hpa

    def measure(self, gpa: int) -> None:
        """Measure the content of an initial page: 16 chunks of 256 bytes."""
        self.require_private(gpa)
        self.host.phase("measure a page")
        for chunk in range(gpa, gpa + PAGE_SIZE, MEASURED_CHUNK):
            self.host.must(0, abi.TDH_MR_EXTEND, rcx=chunk, rdx=self.tdr)

    def finalize(self) -> None:
        """Close the measurement; the TD can run."""
        self.host.phase("finalize")
        self.host.must(0, abi.TDH_MR_FINALIZE, rcx=self.tdr)

    # -- running

    def enter(self, vcpu: int, *, lp: int) -> int:
        """Run a vCPU on `lp`; returns IN_GUEST, or the status of a refusal.

        Refuses a vCPU or an LP that does not exist, an LP that runs a guest, a vCPU that runs
        elsewhere: ValueError.
        """
        tdvpr = self._tdvpr(vcpu)
        cpu = self.host.machine.cpu
        self.host.machine.module.require_host(lp)
        for other in cpu.lps:
            if cpu.vcpu_inside(other) == tdvpr:
                raise ValueError(
                    f"vCPU {vcpu} runs on LP {other}, so it cannot be entered on LP {lp}; "
                    f"kick it out of LP {other} first"
                )
        self._move(vcpu, lp)
        self.host.phase("run")
        status, _ = self.host.call(lp, abi.TDH_VP_ENTER, rcx=tdvpr)
        return status

    def _tdvpr(self, vcpu: int) -> int:
        if not 0 <= vcpu < len(self.vcpus):
            raise ValueError(f"vCPU {vcpu} does not exist; this TD has {len(self.vcpus)} of them")
        return self.vcpus[vcpu]

    def _move(self, vcpu: int, lp: int) -> None:
        """Flush the vCPU from the LP it was on, if that is another one."""
        old = self._lp_of_vcpu.get(vcpu)
        if old is not None and old != lp:
            self.host.must(old, abi.TDH_VP_FLUSH, rcx=self.vcpus[vcpu])
        self._lp_of_vcpu[vcpu] = lp

    def kick(self, lp: int) -> GuestOutcome:
        """Take the guest out of `lp` with an IPI."""
        return self.host.door.kick(lp)

    def accept(self, lp: int, gpa: int, sept_level: int = 0) -> GuestOutcome:
        """The guest inside `lp` accepts a page."""
        self.require_private(gpa, sept_level)
        self.host.phase("accept a page")
        return self.host.door.tdcall(lp, abi.TDG_MEM_PAGE_ACCEPT, Registers(rcx=gpa | sept_level))

    # -- memory while it runs

    def aug(self, gpa: int, sept_level: int = 0, *, lp: int = 0) -> int:
        """Map a free page at `gpa`, for the guest to accept; returns its HPA."""
        self.require_private(gpa, sept_level)
        self.host.phase("map a page")
        self.map_tables(gpa, sept_level)
        hpa = self.host.take_page(level_size(sept_level))
        self.host.must(lp, abi.TDH_MEM_PAGE_AUG, rcx=gpa | sept_level, rdx=self.tdr, r8=hpa)
        self.pages[gpa] = (hpa, sept_level)
        return hpa

    def zap(self, gpa: int, *, lp: int = 0) -> int:
        """Take a 4 KiB page away: block, track, remove, write back, clear; returns its HPA.

        The host must have kicked the vCPUs that were inside: the module refuses to remove before.
        Refuses a GPA without a page: ValueError.
        """
        if gpa not in self.pages:
            known = ", ".join(f"{page:#x}" for page in sorted(self.pages)[:4]) or "none"
            raise ValueError(f"no page is mapped at GPA {gpa:#x}; the first ones mapped: {known}")
        hpa, sept_level = self.pages[gpa]
        host, operand = self.host, gpa | sept_level
        host.phase("remove a page")
        host.must(lp, abi.TDH_MEM_RANGE_BLOCK, rcx=operand, rdx=self.tdr)
        host.must(lp, abi.TDH_MEM_TRACK, rcx=self.tdr)
        for inside in host.machine.cpu.lps:
            if host.machine.cpu.tdr_inside(inside) == self.tdr:
                self.kick(inside)
        host.must(lp, abi.TDH_MEM_PAGE_REMOVE, rcx=operand, rdx=self.tdr)
        del self.pages[gpa]
        self._take_back(hpa, sept_level, lp=lp, keyid=self.keyid)
        return hpa

    def _take_back(self, hpa: int, sept_level: int, *, lp: int, keyid: int | None) -> None:
        """Write back (under `keyid`, None if that was done for all) and clear every 4 KiB of a
        page; it is free again.
        """
        host = self.host
        for page in range(hpa, hpa + level_size(sept_level), PAGE_SIZE):
            if keyid is not None:
                pa = host.machine.memory.join(page, keyid)
                host.must(lp, abi.TDH_PHYMEM_PAGE_WBINVD, rcx=pa)
            host.door.clear(page)
            host.give_back(page)

    # -- the end

    def tear_down(self) -> None:
        """Flush the vCPUs, write the caches back, free the KeyID, reclaim every page."""
        host, cpu = self.host, self.host.machine.cpu
        host.phase("tear down")
        for lp in cpu.lps:
            if cpu.tdr_inside(lp) == self.tdr:
                self.kick(lp)
        for vcpu, lp in self._lp_of_vcpu.items():
            host.must(lp, abi.TDH_VP_FLUSH, rcx=self.vcpus[vcpu])
        host.must(0, abi.TDH_MNG_VPFLUSHDONE, rcx=self.tdr)
        for package in cpu.packages:
            host.must(host.lp_of(package), abi.TDH_PHYMEM_CACHE_WB)
        host.must(0, abi.TDH_MNG_KEY_FREEID, rcx=self.tdr)
        host.phase("reclaim")
        mapped = list(self.pages.values())
        for hpa, sept_level in mapped:
            self._reclaim(hpa, sept_level)
        for hpa in [*self.tables.values(), *self._control_pages]:
            self._reclaim(hpa)
        self._reclaim_tdr()
        host.give_keyid_back(self.keyid)

    def _reclaim(self, hpa: int, sept_level: int = 0) -> None:
        self.host.must(0, abi.TDH_PHYMEM_PAGE_RECLAIM, rcx=hpa)
        self._take_back(hpa, sept_level, lp=0, keyid=None)

    def _reclaim_tdr(self) -> None:
        """The TDR comes last and was written under the module's own KeyID, which no teardown
        flushed.
        """
        self.host.must(0, abi.TDH_PHYMEM_PAGE_RECLAIM, rcx=self.tdr)
        self._take_back(self.tdr, 0, lp=0, keyid=self.host.machine.platform.global_keyid)
