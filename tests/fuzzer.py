"""SEAMCALLs that should fail: valid ones with one mutation, and any 64-bit garbage.

A fuzzer notes every status that comes back. Nothing here knows which one is right; what is sure is
that there is a status, and that the machine stays sound.
"""

import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from tdxlab.abi import leaves as abi
from tdxlab.abi.registers import MASK64, NULL_PA, REGISTER_NAMES, Registers
from tdxlab.abi.structs import TD_PARAMS_SIZE
from tdxlab.arch import SIZE_1G
from tdxlab.cpu import PCONFIG_BUSY, PCONFIG_NO_ENTROPY, Conditions
from tdxlab.seam.fields_td import TD_FIELDS
from tdxlab.seam.fields_vcpu import VCPU_FIELDS
from tdxlab.seam.module import LEAVES
from tests.ghost import locks_near
from tests.scene import (
    ANSWER,
    BASE,
    BIG_POOL,
    PARAMS,
    PARAMS_KINDS,
    POOL,
    SCRATCH,
    SMALL_GPAS,
    SOURCE,
    Scene,
)
from tests.walker import HostCall, NothingToDo, Walker
from tests.walker_calls import MAKERS, draw
from tests.walker_guests import DEEDS, RARE_DEEDS

#: The leaves that touch private memory come more often than the rest: they can refuse most.
FUZZED_LEAVES = (
    *sorted(LEAVES),
    *(leaf for leaf in sorted(LEAVES) if abi.HOST_LEAVES[leaf].name.startswith("TDH.MEM")),
)
_OPERANDS = REGISTER_NAMES[:6]

#: What the hardware may have against a call.
WEATHERS = (
    Conditions(interrupt_pending=True),
    Conditions(entropy_fails=True),
    Conditions(pconfig_result=PCONFIG_BUSY),
    Conditions(pconfig_result=PCONFIG_NO_ENTROPY),
)


class Fuzzer:
    """Makes calls in a scene. seed: of all its choices. statuses: (leaf, status) -> how often."""

    def __init__(self, scene: Scene, seed: int) -> None:
        self.scene = scene
        self.machine = scene.machine
        self.random = random.Random(seed)
        self.walker = Walker(scene, self.random.choice)
        self.statuses: Counter[tuple[int, int]] = Counter()
        self.calls = 0
        self.garbage_calls = 0
        self.mutations: tuple[Callable[[HostCall], None], ...] = (
            self.flip_a_bit,
            self.exchange_an_operand,
            self.exchange_an_operand,
            self.change_the_version,
            self.use_another_lp,
            self.hold_a_lock,
            self.hold_a_lock,
            self.call_again,
            self.call_in_bad_weather,
            self.damage_the_parameters,
        )

    # -- steps that are not counted

    def live(self) -> None:
        """One thing that a host or a guest does in earnest."""
        guests = self.scene.guest_lps()
        if guests and self.random.random() < 0.3:
            deeds = RARE_DEEDS if self.random.random() < 0.03 else DEEDS
            with suppress(NothingToDo):
                self.random.choice(deeds)(self.walker, self.random.choice(guests))
        elif self.scene.host_lps():
            made = draw(self.walker, self.random.choice(sorted(MAKERS)))
            if made is not None:
                self.machine.seamcall(*made)

    # -- calls that are counted

    def call(self, made: HostCall) -> int:
        """Make a call and note its status."""
        status = self.machine.seamcall(*made)
        self.statuses[made.rax & 0xFFFF, status] += 1
        self.calls += 1
        return status

    def mutated(self) -> None:
        """One call that should have succeeded, or could have, with one mutation."""
        leaf = self.random.choice(FUZZED_LEAVES)
        made = draw(self.walker, leaf) if leaf in MAKERS else None
        if made is None:
            made = self.plausible(leaf)
        self.random.choice(self.mutations)(made)

    def garbage(self) -> None:
        """One call with random 64-bit values, in all registers or in some."""
        bits = self.random.getrandbits
        registers = Registers(**{name: bits(64) for name in REGISTER_NAMES})
        for name in REGISTER_NAMES:
            if self.random.random() < 0.2:
                setattr(registers, name, self.random.choice((0, 1, MASK64, bits(12), bits(52))))
        rax = bits(64) if self.random.random() < 0.2 else self.random.choice(FUZZED_LEAVES)
        if self.random.random() < 0.1:
            rax = bits(8)
        self.call(HostCall(self.host_lp(), rax, registers))
        self.garbage_calls += 1

    def guest_garbage(self) -> None:
        """A TDCALL or an exit of a guest with random values; not counted."""
        guests = self.scene.guest_lps()
        if not guests:
            return
        lp, bits = self.random.choice(guests), self.random.getrandbits
        registers = Registers(**{name: bits(64) for name in REGISTER_NAMES})
        registers.rcx = self.random.choice((registers.rcx, self.interesting(), 0))
        registers.rdx = self.random.choice((registers.rdx, self.interesting(), 0))
        if self.random.random() < 0.8:
            self.machine.tdcall(lp, self.random.choice((bits(5), bits(64))), registers)
            return
        reason, gpa = self.random.randrange(80), self.random.choice((bits(52), bits(64)))
        self.machine.vm_exit(lp, reason, registers, qualification=bits(10), gpa=gpa, rip=bits(2))

    def host_lp(self) -> int:
        """An LP that runs the host; if there is none, one guest is interrupted."""
        if not self.scene.host_lps():
            self.machine.interrupt(self.random.choice(self.scene.guest_lps()))
        return self.random.choice(self.scene.host_lps())

    def interesting(self) -> int:
        """A value that means something to some leaf."""
        choose = self.random.choice
        kind = self.random.randrange(9)
        if kind == 0:
            return choose(POOL)
        if kind == 1:
            return choose([td.tdr for td in self.scene.tds()] or [BASE])
        if kind == 2:
            return choose([vcpu.tdvpr for vcpu in self.scene.vcpus()] or [BASE])
        if kind in (3, 4):
            return choose(SMALL_GPAS) | choose(range(6))
        if kind == 5:
            return choose((*BIG_POOL, BASE + SIZE_1G, BASE + 2 * SIZE_1G))
        if kind == 6:
            return choose((SOURCE, ANSWER, PARAMS, self.machine.platform.seamrr.base))
        if kind == 7:
            return choose((*TD_FIELDS, *VCPU_FIELDS)).id
        return choose((0, 1, 2, 8, 56, NULL_PA, 1 << 51, 1 << 52, 1 << 53, 1 << 63, 3 << 46))

    def plausible(self, leaf: int) -> HostCall:
        """A call whose operands are taken from what exists, whether they fit or not."""
        tdrs = [td.tdr for td in self.scene.tds()] or [BASE]
        tdvprs = [vcpu.tdvpr for vcpu in self.scene.vcpus()] or tdrs
        name = abi.HOST_LEAVES[leaf].name
        registers = Registers(r8=self.random.choice(POOL), r9=SOURCE)
        if name.startswith(("TDH.MEM", "TDH.MR.EXTEND")) and leaf != abi.TDH_MEM_TRACK:
            registers.rcx = self.random.choice(SMALL_GPAS) | self.random.choice((0, 0, 1, 2, 3))
            registers.rdx = self.random.choice(tdrs)
        elif name.startswith("TDH.VP") and leaf != abi.TDH_VP_CREATE:
            registers.rcx = self.random.choice(tdvprs)
            registers.rdx = self.random.choice(tdvprs)
        else:
            registers.rcx = self.random.choice((*tdrs, *POOL[:8]))
            registers.rdx = self.random.choice((*tdrs, PARAMS, self.interesting()))
        return HostCall(self.host_lp(), leaf, registers)

    # -- mutations

    def flip_a_bit(self, made: HostCall) -> None:
        """One bit of one operand."""
        name = self.random.choice(_OPERANDS)
        value = getattr(made.registers, name) ^ 1 << self.random.randrange(64)
        setattr(made.registers, name, value)
        self.call(made)

    def exchange_an_operand(self, made: HostCall) -> None:
        """Something else that exists, in place of one operand."""
        setattr(made.registers, self.random.choice(_OPERANDS[:4]), self.interesting())
        self.call(made)

    def change_the_version(self, made: HostCall) -> None:
        """Another version, or reserved bits of RAX."""
        flips = (1 << 16, 2 << 16, 3 << 16, 1 << self.random.randrange(16, 64))
        self.call(made._replace(rax=made.rax ^ self.random.choice(flips)))

    def use_another_lp(self, made: HostCall) -> None:
        """The same call from elsewhere."""
        self.call(made._replace(lp=self.host_lp()))

    def hold_a_lock(self, made: HostCall) -> None:
        """Somebody holds a lock that the call may need, and lets go afterwards."""
        lock = self.random.choice(locks_near(self.scene, made))
        taken = lock.take(lock.words, lock.index)
        try:
            self.call(made)
        finally:
            if taken:
                lock.release(lock.words, lock.index)

    def call_again(self, made: HostCall) -> None:
        """Twice the same: the second one finds another state."""
        again = HostCall(made.lp, made.rax, made.registers.copy())
        self.call(made)
        if not self.machine.cpu.vcpu_inside(again.lp):
            self.call(again)

    def call_in_bad_weather(self, made: HostCall) -> None:
        """An interrupt waits, there is no entropy, or PCONFIG does not work."""
        self.call_in(self.random.choice(WEATHERS), made)

    def call_in(self, weather: Conditions, made: HostCall) -> None:
        """The call under other conditions of the hardware."""
        module = self.machine.module
        fair = replace(module.conditions)
        vars(module.conditions).update(vars(weather))
        try:
            self.call(made)
        finally:
            vars(module.conditions).update(vars(fair))

    def damage_the_parameters(self, made: HostCall) -> None:
        """TD_PARAMS with one bit flipped; other leaves get a bit flipped in an operand."""
        if made.rax != abi.TDH_MNG_INIT:
            self.flip_a_bit(made)
            return
        number = self.random.randrange(len(PARAMS_KINDS))
        params = bytearray(PARAMS_KINDS[number])
        offset = self.random.choice((self.random.randrange(TD_PARAMS_SIZE), *range(44)))
        params[offset] ^= 1 << self.random.randrange(8)
        self.machine.store(SCRATCH, bytes(params))
        made.registers.rdx = SCRATCH
        self.call(made)
