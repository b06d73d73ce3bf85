"""The yardstick: the TDX module's memory leaves in the plainest Python that is still right.

A Secure EPT page is a list of 512 entries in a dict keyed by page frame; a PAMT entry is the list
[lock, page type, owner, BEPOCH], and each 1 GiB block has lists of them, the 4K ones made when
first needed; a status is an int. Each leaf makes the module's checks in the module's order and
takes the module's locks, which `seamcall` gives back at the end. A leaf is `tdh_*(regs)` with
regs = [rcx, rdx, r8, r9, r10, r11], changed in place, and returns RAX. There is no journal, no
step generator, and on the hot path no class but the two records Td and Vcpu.

Source: TDX module 1.5.01, src/vmm_dispatcher/api_calls/tdh_*.c and the helpers they call.
Differs: only the leaves that make a TD, map, zap and reclaim its pages, and only their version 0;
    no guest runs, no migration, no MRTD, page contents, encryption or lack of entropy; a refused
    leaf explains nothing in RCX and RDX; of TD_PARAMS only max_vcpus, eptp and config are read;
    every lock word counts its readers from bit 2; `boot` stands for the system leaves.
"""

from collections.abc import Callable, Iterator
from typing import Any

SUCCESS = 0
INTERRUPTED_RESUMABLE = 0x8000000300000000
OPERAND_INVALID = 0xC000010000000000
OPERAND_ADDR_RANGE_ERROR = 0xC000010100000000
OPERAND_BUSY = 0x8000020000000000
PREVIOUS_TLB_EPOCH_BUSY = 0x8000020100000000
PAGE_METADATA_INCORRECT = 0xC000030000000000
TD_ASSOCIATED_PAGES_EXIST = 0xC000040000000000
SYS_NOT_READY = 0xC000050500000000
TD_FATAL = 0xE000060400000000
TDCS_NOT_ALLOCATED = 0xC000060600000000
LIFECYCLE_STATE_INCORRECT = 0xC000060700000000
OP_STATE_INCORRECT = 0xC000060800000000
NO_VCPUS = 0xC000060900000000
TDCX_NUM_INCORRECT = 0xC000061000000000
VCPU_STATE_INCORRECT = 0xC000070000000000
VCPU_NOT_ASSOCIATED = 0x8000070200000000
MAX_VCPUS_EXCEEDED = 0xC000070500000000
TD_KEYS_NOT_CONFIGURED = 0x8000081000000000
KEY_CONFIGURED = 0x0000081500000000
WBCACHE_NOT_COMPLETE = 0x8000081700000000
HKID_NOT_FREE = 0xC000082000000000
NO_HKID_READY_TO_WBCACHE = 0x0000082100000000
WBCACHE_RESUME_ERROR = 0xC000082300000000
FLUSHVP_NOT_DONE = 0x8000082400000000
EPT_WALK_FAILED = 0xC0000B0000000000
GPA_RANGE_NOT_BLOCKED = 0xC0000B0600000000
GPA_RANGE_ALREADY_BLOCKED = 0x00000B0700000000
TLB_TRACKING_NOT_DONE = 0xC0000B0800000000
EPT_ENTRY_STATE_INCORRECT = 0xC0000B0D00000000

# Operand ids, added to a status.
RCX, RDX, R8, R9, CONFIG_FLAGS, EPTP_CONTROLS, MAX_VCPUS = 1, 2, 8, 9, 66, 67, 68
TDR, SEPT_TREE, TD_EPOCH, OP_STATE, KOT = 128, 146, 169, 172, 186

PT_NDA, PT_RSVD, PT_REG, PT_TDR, PT_TDCX, PT_TDVPR, PT_EPT = 0, 1, 3, 4, 5, 6, 8
TYPE, OWNER, BEPOCH = 1, 2, 3  # fields of a PAMT entry; field 0 is its lock

HKID_ASSIGNED, KEYS_CONFIGURED, BLOCKED_LIFE, TEARDOWN = 0, 1, 2, 3
UNINITIALIZED, INITIALIZED, RUNNABLE = 0, 1, 2
KEY_FREE, KEY_ASSIGNED, KEY_FLUSHED, KEY_RESERVED = 0, 1, 2, 3
VCPU_UNINITIALIZED, VCPU_READY = 0, 2
BUILDING, ALIVE = (INITIALIZED,), (INITIALIZED, RUNNABLE)

RWX, PS, LOCKED, HOST_PRIORITY = 7, 1 << 7, 1 << 11, 1 << 52
HPA_MASK = 0x000FFFFFFFFFF000
STATE_MASK = 0x01E00000000002C0
FREE, TABLE, MAPPED, PENDING = (
    0x80E0000000000000,
    0x8000000000000007,
    0x80000000000000F7,
    0x81000000000000F0,
)
BLOCK_BIT = 1 << 55
IS_FREE, IS_TABLE, IS_MAPPED, IS_PENDING = (e & STATE_MASK for e in (FREE, TABLE, MAPPED, PENDING))
UNBLOCKED = (IS_TABLE, IS_MAPPED, IS_PENDING)
BLOCKED = tuple(state | BLOCK_BIT for state in UNBLOCKED)
LEAF_STATES = UNBLOCKED[1:] + BLOCKED[1:]


class Td:
    """What the TDR and the TDCS pages hold."""

    __slots__ = (
        *("tdr", "hkid", "fatal", "life", "packages", "tdcx", "children", "op_lock", "op_state"),
        *("tree_lock", "epoch_lock", "epoch", "inside", "max_vcpus", "vcpus", "associated"),
        *("top", "gpa_bits", "root"),
    )

    def __init__(self, tdr: int, hkid: int) -> None:
        self.tdr, self.hkid = tdr, hkid
        self.fatal = self.life = self.packages = self.tdcx = self.children = self.op_state = 0
        self.op_lock, self.tree_lock, self.epoch_lock, self.inside = [0], [0], [0], [0, 0]
        self.epoch = self.max_vcpus = self.vcpus = self.associated = 0
        self.top = self.gpa_bits = self.root = 0


class Vcpu:
    """What the TDVPR page holds."""

    __slots__ = ("lp", "pages", "state", "td")

    def __init__(self, td: Td) -> None:
        self.td, self.pages, self.state, self.lp = td, 1, VCPU_UNINITIALIZED, -1


def number(value: int | str) -> int:
    """An int, or the hexadecimal text that a recorded trace has for it."""
    return value if isinstance(value, int) else int(value, 0)


class Baseline:
    """One TDX module on one platform. `boot` it, then call `seamcall`."""

    def __init__(self) -> None:
        self.ready = False
        self.lp = 0
        self.blocks: dict[int, tuple[list[int], list[list[int]], list[Any]]] = {}
        self.sept: dict[int, list[int]] = {}
        self.tds: dict[int, Td] = {}
        self.vcpus: dict[int, Vcpu] = {}
        self.td_params: dict[int, dict[str, int]] = {}
        self.interrupt_pending = False
        self.held: list[tuple[list[int], int]] = []
        self.held_sept: tuple[list[int], int] | None = None
        self.leaves: dict[int, Callable[[list[int]], int]] = {
            1: self.tdh_mng_addcx,
            2: self.tdh_mem_page_add,
            3: self.tdh_mem_sept_add,
            4: self.tdh_vp_addcx,
            6: self.tdh_mem_page_aug,
            7: self.tdh_mem_range_block,
            8: self.tdh_mng_key_config,
            9: self.tdh_mng_create,
            10: self.tdh_vp_create,
            17: self.tdh_mr_finalize,
            18: self.tdh_vp_flush,
            19: self.tdh_mng_vpflushdone,
            20: self.tdh_mng_key_freeid,
            21: self.tdh_mng_init,
            22: self.tdh_vp_init,
            24: self.tdh_phymem_page_rdmd,
            28: self.tdh_phymem_page_reclaim,
            29: self.tdh_mem_page_remove,
            38: self.tdh_mem_track,
            40: self.tdh_phymem_cache_wb,
            41: self.tdh_phymem_page_wbinvd,
        }

    def boot(self, platform: dict[str, Any]) -> None:
        """Bring the module to where SYS.INIT .. TDMR.INIT leave it. `platform`: as in a trace."""
        self.hkid_shift = platform["hkid_start_bit"]
        self.hkids = range(platform["private_hkid_min"], platform["private_hkid_max"] + 1)
        self.kot = {hkid: [KEY_FREE, 0] for hkid in self.hkids}
        self.kot[platform["tdx_global_hkid"]][0] = KEY_RESERVED
        self.kot_lock = [0]
        self.package_of = platform["lp_to_package"]
        self.all_packages = (1 << platform["packages"]) - 1
        self.sub_blocks = platform["wbinvd_sub_blocks"]
        self.written_back = [0] * platform["packages"]
        self.writing_back: list[list[list[int]]] = [[] for _ in range(platform["packages"])]
        base, size = (number(platform["seamrr"][key]) for key in ("base", "size"))
        self.seamrr = range(base, base + size)
        for tdmr in platform["tdmrs"]:
            base, size = number(tdmr["base"]), number(tdmr["size"])
            for block in range(base >> 30, (base + size) >> 30):
                large = [[0, PT_NDA, 0, 0] for _ in range(512)]
                self.blocks[block] = ([0, PT_NDA, 0, 0], large, [None] * (512 * 512))
            for area in tdmr["reserved"]:
                first = (base + number(area["offset"])) >> 12
                for frame in range(first, first + (number(area["size"]) >> 12)):
                    self.pamt(frame << 12, 0)[TYPE] = PT_RSVD
        self.ready = True

    def seamcall(self, lp: int, rax: int, regs: list[int]) -> int:
        """Run one host leaf. regs: [rcx, rdx, r8, r9, r10, r11], changed in place."""
        if rax >> 16:
            return OPERAND_INVALID
        if not self.ready:
            return SYS_NOT_READY
        leaf = self.leaves.get(rax)
        if leaf is None:
            return OPERAND_INVALID
        self.lp = lp
        status = leaf(regs)
        for lock, amount in self.held:
            lock[0] -= amount
        self.held.clear()
        if self.held_sept is not None:
            table, index = self.held_sept
            table[index] &= ~LOCKED
            self.held_sept = None
        return status

    # -- locks: bit 0 exclusive, bit 1 host priority, readers from bit 2

    def share(self, lock: list[int]) -> bool:
        if lock[0] & 1:
            lock[0] |= 2
            return False
        lock[0] = (lock[0] & ~2) + 4
        self.held.append((lock, 4))
        return True

    def own(self, lock: list[int]) -> bool:
        if lock[0] & ~2:
            lock[0] |= 2
            return False
        lock[0] = 1
        self.held.append((lock, 1))
        return True

    def upgrade(self) -> bool:
        """Turn the share taken last into an exclusive hold."""
        lock = self.held[-1][0]
        if lock[0] & ~2 != 4:
            lock[0] |= 2
            return False
        lock[0] = 1
        self.held[-1] = (lock, 1)
        return True

    # -- checks that several leaves make

    def pamt(self, hpa: int, size: int) -> list[int]:
        """The PAMT entry of a page (size 0 4K, 1 2M, 2 1G), without a lock."""
        giant, large, small = self.blocks[hpa >> 30]
        if size:
            return giant if size == 2 else large[hpa >> 21 & 511]
        entry: list[int] | None = small[hpa >> 12 & 0x3FFFF]
        if entry is None:
            entry = small[hpa >> 12 & 0x3FFFF] = [0, PT_NDA, 0, 0]
        return entry

    def walk_pamt(
        self, hpa: int, operand: int, exclusive: bool, target: int = 0
    ) -> tuple[int, Any, int]:
        """Lock the entry that describes a page, and its parents: status, entry, size found."""
        if hpa & 0xFFF or hpa >> self.hkid_shift:
            return OPERAND_INVALID + operand, None, 0
        block = self.blocks.get(hpa >> 30)
        if block is None:
            return OPERAND_ADDR_RANGE_ERROR + operand, None, 0
        giant, large, _ = block
        if not self.share(giant):
            return OPERAND_BUSY + operand, None, 0
        entry, size = giant, 2
        if giant[TYPE] != PT_REG:
            entry, size = large[hpa >> 21 & 511], 1
            if not self.share(entry):
                return OPERAND_BUSY + operand, None, 0
            if entry[TYPE] != PT_REG and target == 0:
                entry = self.pamt(hpa, 0)
                if not (self.own(entry) if exclusive else self.share(entry)):
                    return OPERAND_BUSY + operand, None, 0
                return SUCCESS, entry, 0
        if exclusive and not self.upgrade():
            return OPERAND_BUSY + operand, None, 0
        return SUCCESS, entry, size

    def take_page(
        self, hpa: int, operand: int, kind: int, exclusive: bool, target: int = 0
    ) -> tuple[int, Any]:
        """An explicit page operand of an expected type: status and its locked PAMT entry."""
        if hpa & ((0x1000 << 9 * target) - 1):
            return OPERAND_INVALID + operand, None
        status, entry, size = self.walk_pamt(hpa, operand, exclusive, target)
        if status:
            return status, None
        if size != target or entry[TYPE] != kind:
            return PAGE_METADATA_INCORRECT + operand, None
        if target == 1:
            first = hpa >> 12 & 0x3FFFF
            for child in self.blocks[hpa >> 30][2][first : first + 512]:
                if child is not None and child[TYPE] != PT_NDA:
                    return PAGE_METADATA_INCORRECT + operand, None
        return SUCCESS, entry

    def check_state(self, td: Td, states: tuple[int, ...], lock: bool) -> int:
        """The TD is alive, has its keys and its TDCS, and is in one of these op-states."""
        if td.fatal:
            return TD_FATAL
        if td.life != KEYS_CONFIGURED:
            return TD_KEYS_NOT_CONFIGURED
        if td.tdcx < 6:
            return TDCS_NOT_ALLOCATED
        if lock and not self.share(td.op_lock):
            return OPERAND_BUSY + OP_STATE
        if td.op_state not in states:
            return OP_STATE_INCORRECT
        return SUCCESS

    def take_td(
        self, tdr: int, operand: int, states: tuple[int, ...], exclusive: bool = False
    ) -> tuple[int, Any]:
        """An explicit TDR in one of these op-states: status and the TD."""
        status, _ = self.take_page(tdr, operand, PT_TDR, exclusive)
        if status:
            return status, None
        td = self.tds[tdr]
        return self.check_state(td, states, not exclusive), td

    def take_vcpu(
        self, tdvpr: int, operand: int, states: tuple[int, ...], exclusive: bool = True
    ) -> tuple[int, Any]:
        """An explicit TDVPR whose TD is in one of these op-states: status and the vCPU."""
        status, entry = self.take_page(tdvpr, operand, PT_TDVPR, exclusive)
        if status:
            return status, None
        if not self.share(self.pamt(entry[OWNER], 0)):
            return OPERAND_BUSY + TDR, None
        vcpu = self.vcpus[tdvpr]
        return self.check_state(vcpu.td, states, True), vcpu

    def walk(self, td: Td, gpa: int, level: int) -> tuple[list[int], int, int]:
        """Follow the S-EPT down to a level: the table, the index in it, the level reached."""
        reached = td.top
        table = self.sept[td.root]
        while True:
            index = gpa >> (12 + 9 * reached) & 511
            sept_entry = table[index]
            if reached == level or not sept_entry & RWX or sept_entry & PS:
                return table, index, reached
            table = self.sept[(sept_entry & HPA_MASK) >> 12]
            reached -= 1

    def take_entry(
        self, regs: list[int], levels: tuple[int, int], exclusive: bool = False
    ) -> tuple[int, Any, Any, int, int]:
        """The common start of the S-EPT leaves: TD, GPA and level, tree lock, walk, entry lock.

        levels: lowest and highest entry level; a highest of 5 means whatever the TD has.
        Returns status, TD, table, index and the entry's value; RCX and RDX are cleared first.
        """
        rcx, tdr = regs[0], regs[1]
        regs[0] = regs[1] = 0
        status, td = self.take_td(tdr, RDX, ALIVE)
        if status:
            return status, None, None, 0, 0
        level = rcx & 7
        gpa = rcx & HPA_MASK
        if (
            rcx & ~(HPA_MASK | 7)
            or not levels[0] <= level <= min(levels[1], td.top)
            or gpa & ((0x1000 << 9 * level) - 1)
            or gpa >> td.gpa_bits
        ):
            return OPERAND_INVALID + RCX, None, None, 0, 0
        if not (self.own(td.tree_lock) if exclusive else self.share(td.tree_lock)):
            return OPERAND_BUSY + SEPT_TREE, None, None, 0, 0
        table, index, reached = self.walk(td, gpa, level)
        sept_entry = table[index]
        if reached != level:
            return EPT_WALK_FAILED + RCX, None, None, 0, 0
        if sept_entry & LOCKED:
            table[index] |= HOST_PRIORITY
            return OPERAND_BUSY + RCX, None, None, 0, 0
        sept_entry &= ~HOST_PRIORITY
        table[index] = sept_entry | LOCKED
        self.held_sept = (table, index)
        return SUCCESS, td, table, index, sept_entry

    @staticmethod
    def check_tracked(td: Td, page: list[int], sept_entry: int) -> int:
        """Before a page may leave a running TD: blocked, and no TLB can still hold it."""
        if td.op_state != RUNNABLE:
            return SUCCESS
        if sept_entry & STATE_MASK not in BLOCKED:
            return GPA_RANGE_NOT_BLOCKED + RCX
        age = td.epoch - page[BEPOCH]
        if age > 1 or (age == 1 and td.inside[page[BEPOCH] & 1] == 0):
            return SUCCESS
        return TLB_TRACKING_NOT_DONE + RCX

    # -- making a TD

    def tdh_mng_create(self, regs: list[int]) -> int:
        if regs[1] not in self.hkids:
            return OPERAND_INVALID + RDX
        status, entry = self.take_page(regs[0], RCX, PT_NDA, True)
        if status:
            return status
        if not self.own(self.kot_lock):
            return OPERAND_BUSY + KOT
        key = self.kot[regs[1]]
        if key[0] != KEY_FREE:
            return HKID_NOT_FREE
        key[0] = KEY_ASSIGNED
        self.tds[regs[0]] = Td(regs[0], regs[1])
        entry[TYPE], entry[OWNER] = PT_TDR, 0
        return SUCCESS

    def tdh_mng_key_config(self, regs: list[int]) -> int:
        status, _ = self.take_page(regs[0], RCX, PT_TDR, True)
        if status:
            return status
        td = self.tds[regs[0]]
        if td.fatal:
            return TD_FATAL
        if td.life != HKID_ASSIGNED:
            return LIFECYCLE_STATE_INCORRECT
        package = 1 << self.package_of[self.lp]
        if td.packages & package:
            return KEY_CONFIGURED
        td.packages |= package
        if td.packages == self.all_packages:
            td.life = KEYS_CONFIGURED
        return SUCCESS

    def tdh_mng_addcx(self, regs: list[int]) -> int:
        status, _ = self.take_page(regs[1], RDX, PT_TDR, True)
        if status:
            return status
        td = self.tds[regs[1]]
        if td.fatal:
            return TD_FATAL
        if td.life != KEYS_CONFIGURED:
            return TD_KEYS_NOT_CONFIGURED
        if td.tdcx == 9:
            return TDCX_NUM_INCORRECT
        status, entry = self.take_page(regs[0], RCX, PT_NDA, True)
        if status:
            return status
        if td.tdcx >= 6 and td.op_state != UNINITIALIZED:
            return OP_STATE_INCORRECT
        if td.tdcx == 3:
            td.root = regs[0] >> 12
            self.sept[td.root] = [FREE] * 512
        td.tdcx += 1
        td.children += 1
        entry[1:] = [PT_TDCX, td.tdr, 0]
        return SUCCESS

    def tdh_mng_init(self, regs: list[int]) -> int:
        tdr, pa = regs[0], regs[1]
        regs[0] = 0
        status, td = self.take_td(tdr, RCX, (UNINITIALIZED,), True)
        if status:
            return status
        if pa & 1023 or pa >> self.hkid_shift >= self.hkids[0] or pa in self.seamrr:
            return OPERAND_INVALID + RDX
        params = self.td_params.get(pa, {})
        max_vcpus, eptp, config = (params.get(key, 0) for key in ("max_vcpus", "eptp", "config"))
        if max_vcpus == 0:
            return OPERAND_INVALID + MAX_VCPUS
        if config & ~7:
            return OPERAND_INVALID + CONFIG_FLAGS
        if eptp not in ((0x26,) if config & 1 else (0x1E, 0x26)):
            return OPERAND_INVALID + EPTP_CONTROLS
        td.max_vcpus, td.top, td.gpa_bits = max_vcpus, eptp >> 3, 51 if config & 1 else 47
        td.epoch, td.inside, td.op_state = 1, [0, 0], INITIALIZED
        return SUCCESS

    def tdh_mr_finalize(self, regs: list[int]) -> int:
        status, td = self.take_td(regs[0], RCX, BUILDING, True)
        if status:
            return status
        if td.vcpus == 0:
            return NO_VCPUS
        td.op_state = RUNNABLE
        return SUCCESS

    # -- vCPUs

    def tdh_vp_create(self, regs: list[int]) -> int:
        status, td = self.take_td(regs[1], RDX, BUILDING)
        if status:
            return status
        status, entry = self.take_page(regs[0], RCX, PT_NDA, True)
        if status:
            return status
        self.vcpus[regs[0]] = Vcpu(td)
        td.children += 1
        entry[1:] = [PT_TDVPR, td.tdr, 0]
        return SUCCESS

    def tdh_vp_addcx(self, regs: list[int]) -> int:
        status, vcpu = self.take_vcpu(regs[1], RDX, BUILDING)
        if status:
            return status
        if vcpu.state != VCPU_UNINITIALIZED:
            return VCPU_STATE_INCORRECT
        if vcpu.pages >= 15:
            return TDCX_NUM_INCORRECT
        status, entry = self.take_page(regs[0], RCX, PT_NDA, True)
        if status:
            return status
        vcpu.pages += 1
        vcpu.td.children += 1
        entry[1:] = [PT_TDCX, vcpu.td.tdr, 0]
        return SUCCESS

    def tdh_vp_init(self, regs: list[int]) -> int:
        status, vcpu = self.take_vcpu(regs[0], RCX, BUILDING)
        if status:
            return status
        if vcpu.pages < 6:
            return TDCX_NUM_INCORRECT
        if vcpu.state != VCPU_UNINITIALIZED:
            return VCPU_STATE_INCORRECT
        if vcpu.td.vcpus == vcpu.td.max_vcpus:
            return MAX_VCPUS_EXCEEDED
        vcpu.td.vcpus += 1
        vcpu.td.associated += 1
        vcpu.state, vcpu.lp = VCPU_READY, self.lp
        return SUCCESS

    def tdh_vp_flush(self, regs: list[int]) -> int:
        status, entry = self.take_page(regs[0], RCX, PT_TDVPR, True)
        if status:
            return status
        if not self.share(self.pamt(entry[OWNER], 0)):
            return OPERAND_BUSY + TDR
        vcpu = self.vcpus[regs[0]]
        if vcpu.td.life != KEYS_CONFIGURED:
            return TD_KEYS_NOT_CONFIGURED
        if vcpu.pages < 6:
            return TDCX_NUM_INCORRECT
        if vcpu.lp != self.lp:
            return VCPU_NOT_ASSOCIATED
        vcpu.lp = -1
        vcpu.td.associated -= 1
        return SUCCESS

    # -- private memory

    def tdh_mem_sept_add(self, regs: list[int]) -> int:
        flags, new = regs[1] & ~HPA_MASK, regs[2]
        if flags & ~1:
            regs[0] = regs[1] = 0
            return OPERAND_INVALID + RDX
        regs[1] &= HPA_MASK
        status, td, table, index, sept_entry = self.take_entry(regs, (1, 5))
        if status:
            return status
        state = sept_entry & STATE_MASK
        if state not in (IS_FREE, IS_TABLE):
            return EPT_ENTRY_STATE_INCORRECT + RCX
        if new == 0xFFFFFFFFFFFFFFFF:
            return OPERAND_INVALID + R8
        if state == IS_TABLE:
            if flags:
                return SUCCESS
            return EPT_ENTRY_STATE_INCORRECT + RCX
        new &= ~(1 << 63)
        status, page = self.take_page(new, R8, PT_NDA, True)
        if status:
            return status
        self.sept[new >> 12] = [FREE] * 512
        page[1:] = [PT_EPT, td.tdr, 0]
        td.children += 1
        table[index] = TABLE | new
        return SUCCESS

    def tdh_mem_page_add(self, regs: list[int]) -> int:
        rcx, tdr, new, source = regs[:4]
        regs[0] = regs[1] = 0
        status, td = self.take_td(tdr, RDX, BUILDING, True)
        if status:
            return status
        if rcx & 0xFFF or rcx >> td.gpa_bits:
            return OPERAND_INVALID + RCX
        table, index, reached = self.walk(td, rcx, 0)
        if reached:
            return EPT_WALK_FAILED + RCX
        if table[index] & STATE_MASK != IS_FREE:
            return EPT_ENTRY_STATE_INCORRECT + RCX
        if source & 0xFFF or source >> self.hkid_shift >= self.hkids[0] or source in self.seamrr:
            return OPERAND_INVALID + R9
        status, page = self.take_page(new, R8, PT_NDA, True)
        if status:
            return status
        page[1:] = [PT_REG, td.tdr, 0]
        td.children += 1
        table[index] = MAPPED | new
        return SUCCESS

    def tdh_mem_page_aug(self, regs: list[int]) -> int:
        level, new = regs[0] & 7, regs[2]
        status, td, table, index, sept_entry = self.take_entry(regs, (0, 1))
        if status:
            return status
        if sept_entry & STATE_MASK != IS_FREE:
            return EPT_ENTRY_STATE_INCORRECT + RCX
        status, page = self.take_page(new, R8, PT_NDA, True, level)
        if status:
            return status
        page[1:] = [PT_REG, td.tdr, 0]
        td.children += 1 << 9 * level
        table[index] = PENDING | new
        return SUCCESS

    def tdh_mem_range_block(self, regs: list[int]) -> int:
        level = regs[0] & 7
        status, td, table, index, sept_entry = self.take_entry(regs, (0, 5), exclusive=True)
        if status:
            return status
        state = sept_entry & STATE_MASK
        if state in BLOCKED:
            return GPA_RANGE_ALREADY_BLOCKED + RCX
        if state not in UNBLOCKED:
            return EPT_ENTRY_STATE_INCORRECT + RCX
        table[index] = sept_entry & ~RWX | BLOCK_BIT
        page = self.pamt(sept_entry & HPA_MASK, level if sept_entry & PS else 0)
        page[BEPOCH] = td.epoch
        return SUCCESS

    def tdh_mem_track(self, regs: list[int]) -> int:
        tdr = regs[0]
        regs[0] = regs[1] = 0
        status, td = self.take_td(tdr, RCX, ALIVE)
        if status:
            return status
        if not self.own(td.epoch_lock):
            return OPERAND_BUSY + TD_EPOCH
        if td.inside[1 - (td.epoch & 1)]:
            return PREVIOUS_TLB_EPOCH_BUSY
        td.epoch += 1
        return SUCCESS

    def tdh_mem_page_remove(self, regs: list[int]) -> int:
        level = regs[0] & 7
        status, td, table, index, sept_entry = self.take_entry(regs, (0, 2))
        if status:
            return status
        if sept_entry & STATE_MASK not in LEAF_STATES:
            return EPT_ENTRY_STATE_INCORRECT + RCX
        page = self.pamt(sept_entry & HPA_MASK, level)
        if not self.own(page):
            return OPERAND_BUSY + RCX
        status = self.check_tracked(td, page, sept_entry)
        if status:
            return status
        table[index] = FREE
        td.children -= 1 << 9 * level
        page[TYPE] = PT_NDA
        regs[0] = sept_entry & HPA_MASK
        return SUCCESS

    # -- taking a TD down

    def tdh_mng_vpflushdone(self, regs: list[int]) -> int:
        status, _ = self.take_page(regs[0], RCX, PT_TDR, True)
        if status:
            return status
        if not self.own(self.kot_lock):
            return OPERAND_BUSY + KOT
        td = self.tds[regs[0]]
        if td.life not in (HKID_ASSIGNED, KEYS_CONFIGURED):
            return LIFECYCLE_STATE_INCORRECT
        if td.tdcx >= 6 and td.op_state != UNINITIALIZED and td.associated:
            return FLUSHVP_NOT_DONE
        self.kot[td.hkid][:] = KEY_FLUSHED, self.all_packages
        td.life = BLOCKED_LIFE
        return SUCCESS

    def tdh_phymem_cache_wb(self, regs: list[int]) -> int:
        if regs[0] > 1:
            return OPERAND_INVALID + RCX
        if not self.share(self.kot_lock):
            return OPERAND_BUSY + KOT
        package = self.package_of[self.lp]
        if regs[0] == 0:
            self.written_back[package] = 0
            flushed = [key for key in self.kot.values() if key[0] == KEY_FLUSHED]
            if not flushed:
                return NO_HKID_READY_TO_WBCACHE
            self.writing_back[package] = flushed
        elif self.written_back[package] == 0:
            return WBCACHE_RESUME_ERROR
        self.written_back[package] += 1
        if self.interrupt_pending and self.written_back[package] < self.sub_blocks:
            return INTERRUPTED_RESUMABLE
        self.written_back[package] = 0
        for key in self.writing_back[package]:
            key[1] &= ~(1 << package)
        return SUCCESS

    def tdh_mng_key_freeid(self, regs: list[int]) -> int:
        status, _ = self.take_page(regs[0], RCX, PT_TDR, True)
        if status:
            return status
        td = self.tds[regs[0]]
        if td.life != BLOCKED_LIFE:
            return LIFECYCLE_STATE_INCORRECT
        if not self.own(self.kot_lock):
            return OPERAND_BUSY + KOT
        if self.kot[td.hkid][1]:
            return WBCACHE_NOT_COMPLETE
        self.kot[td.hkid][0] = KEY_FREE
        td.life = TEARDOWN
        return SUCCESS

    def tdh_phymem_page_reclaim(self, regs: list[int]) -> int:
        hpa = regs[0]
        regs[:] = [0] * 6
        status, page, size = self.walk_pamt(hpa, RCX, True)
        if status:
            return status
        kind = page[TYPE]
        if kind in (PT_NDA, PT_RSVD):
            return PAGE_METADATA_INCORRECT + RCX
        regs[:3] = kind, page[OWNER], size
        if hpa & ((0x1000 << 9 * size) - 1):
            return OPERAND_INVALID + RCX
        if kind == PT_TDR:
            td = self.tds[hpa]
            if td.life != TEARDOWN:
                return LIFECYCLE_STATE_INCORRECT
            if td.children:
                return TD_ASSOCIATED_PAGES_EXIST
            del self.tds[hpa]
        else:
            td = self.tds[page[OWNER]]
            if not self.share(self.pamt(td.tdr, 0)):
                return OPERAND_BUSY + TDR
            if td.life != TEARDOWN:
                return LIFECYCLE_STATE_INCORRECT
            td.children -= 1 << 9 * size
            if kind != PT_REG:
                self.sept.pop(hpa >> 12, None)
                self.vcpus.pop(hpa, None)
        page[TYPE] = PT_NDA
        return SUCCESS

    def tdh_phymem_page_rdmd(self, regs: list[int]) -> int:
        hpa = regs[0]
        regs[:] = [0] * 6
        status, page, size = self.walk_pamt(hpa, RCX, False)
        if status:
            return status
        regs[:3] = page[TYPE], page[OWNER], size
        if page[TYPE] in (PT_REG, PT_EPT):
            regs[3] = page[BEPOCH]
        return SUCCESS

    def tdh_phymem_page_wbinvd(self, regs: list[int]) -> int:
        hkid_mask = (1 << 52) - (1 << self.hkid_shift)
        return self.take_page(regs[0] & ~hkid_mask, RCX, PT_NDA, False)[0]

    # -- building a TD for a measurement

    def call(self, leaf: int, rcx: int, rdx: int = 0, r8: int = 0, lp: int = 0) -> None:
        """One SEAMCALL that must succeed."""
        status = self.seamcall(lp, leaf, [rcx, rdx, r8, 0, 0, 0])
        if status:
            raise ValueError(f"leaf {leaf} rcx={rcx:#x} rdx={rdx:#x} r8={r8:#x}: {status:#018x}")

    def build_td(
        self,
        pages: Iterator[int],
        hkid: int,
        td_params: int,
        memory: range,
        vcpus: int = 1,
        eptp: int = 0x1E,
        config: int = 0,
    ) -> int:
        """Make a TD that may run, with S-EPT tables but no pages under `memory`. Returns its TDR.

        pages: byte addresses of free pages. td_params: byte address in shared memory.
        memory: GPAs as range(start, stop), both 2M aligned. vcpus: each associated with LP 0.
        """
        tdr = next(pages)
        self.call(9, tdr, hkid)
        for package in range(self.all_packages.bit_length()):
            self.call(8, tdr, lp=self.package_of.index(package))
        for _ in range(6):
            self.call(1, next(pages), tdr)
        self.td_params[td_params] = {"max_vcpus": vcpus, "eptp": eptp, "config": config}
        self.call(21, tdr, td_params)
        for _ in range(vcpus):
            tdvpr = next(pages)
            self.call(10, tdvpr, tdr)
            for _ in range(5):
                self.call(4, next(pages), tdvpr)
            self.call(22, tdvpr)
        for level in range(eptp >> 3, 0, -1):
            span = 0x1000 << 9 * level
            for gpa in range(memory.start // span * span, memory.stop, span):
                self.call(3, gpa | level, tdr, next(pages))
        self.call(17, tdr)
        return tdr
