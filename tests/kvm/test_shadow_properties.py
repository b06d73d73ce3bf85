"""Random guest tables, random accesses, random zaps: the shadow tables give what the guest's own
tables give, or a fault, whatever the root is made of; links, references and pages add up.
"""

from __future__ import annotations

import random

import pytest
from shadow_scene import Scene, small_map

from tdxlab.kvm.pae_rules import complaints
from tdxlab.kvm.shadow import kvm_mmu_zap_all_fast, kvm_unmap_gfn, zap_page
from tdxlab.kvm.shadow_params import AMD, DESIGNS, NESTED, NPT, REVIEWED, RFC, SPECIAL
from tdxlab.kvm.shadow_run import (
    EMULATED,
    GUEST_FAULT,
    MMIO,
    NO_MEMORY,
    OK,
    Outcome,
    destroy_vcpu,
    set_cr3,
)
from tdxlab.steps import run

DIRECTORIES = range(0x1000, 0x4000, 0x1000)
TABLES = range(0x4000, 0x8000, 0x1000)
DATA = range(0x10000, 0x14000, 0x1000)
PDPTS = (0x9020, 0x9040, 0xA000)
STEPS = 120
#: (levels, parameters): every kind of guest, encryption, both widths' ends, every use.
KINDS = [
    (0, {}),
    (2, {}),
    (3, {}),
    (2, {"vendor": AMD, "c_bit": 45}),
    (3, {"vendor": AMD, "c_bit": 51, "maxphyaddr": 52}),
    (2, {"maxphyaddr": 36}),
]
OTHER_USES = [
    (SPECIAL, 0, {"vendor": AMD, "use": NPT}),
    (REVIEWED, 0, {"vendor": AMD, "use": NPT}),
    (SPECIAL, 2, {"vendor": AMD, "use": NESTED, "tdp_level": 4, "c_bit": 45}),
    (SPECIAL, 3, {"vendor": AMD, "use": NESTED, "tdp_level": 5}),
]
CASES = [(design, *kind) for design in DESIGNS for kind in KINDS] + OTHER_USES


class Story:
    """One random run. answers: what each access came to, for comparison of designs."""

    def __init__(self, design: str, levels: int, params: dict[str, object], seed: int) -> None:
        self.dice = random.Random(seed)
        cr3 = PDPTS[0] if levels == 3 else DIRECTORIES[0]
        memory_map = small_map(normal=400, guest=64)
        self.scene = Scene(levels, design=design, vcpus=2, cr3=cr3, memory_map=memory_map, **params)
        self.levels = levels
        self.answers: list[tuple[str, int | None]] = []
        choose = self.dice.choice
        self.vas = [
            choose(range(4)) << 30
            | choose((0, 1, 511)) << 21
            | choose((0, 511)) << 12
            | self.dice.randrange(4096)
            for _ in range(8)
        ]
        for pdpt in PDPTS if levels == 3 else ():
            for index in range(4):
                self.scene.put(pdpt, index, choose(DIRECTORIES) | choose((1, 1, 1, 0)))
        for table in (*DIRECTORIES, *TABLES) if levels else ():
            for va in self.vas:
                self.scene.put(table, self._index(table, va), self._entry(table))
        self.scene.turn_on()

    def _index(self, table: int, va: int) -> int:
        """Of the entry for `va`, if the table is used at the level that it is meant for."""
        bits = 10 if self.levels == 2 else 9
        shift = 12 + bits if table in DIRECTORIES else 12
        return va >> shift & (1 << bits) - 1

    def _entry(self, table: int) -> int:
        """Mostly tables below directories and data below tables, that are there and let through;
        sometimes anything.
        """
        choose = self.dice.choice
        flags = choose((7, 7, 0x67, 0x67, 0x67, 0x27, 0x65, 3, 0x87, 1, 0))
        frame = choose(TABLES) if table in DIRECTORIES else choose(DATA)
        if self.dice.random() < 0.15:
            frame = choose((*TABLES, *DIRECTORIES, 0x7F000))
        if flags & 0x80:
            frame = 0
        too_high = self.levels == 3 and self.dice.random() < 0.03
        return frame | flags | (1 << 62 if too_high else 0)

    def _changed(self, table: int, entry: int) -> int:
        """Another entry, or the same with a permission, its presence or its frame changed."""
        bit = self.dice.choice((1, 2, 2, 4, 4, 0x1000, 0x2000, 0))
        return entry ^ bit if bit else self._entry(table)

    def access(self) -> None:
        """An access by one of the vCPUs; what it comes to is what the guest's tables say."""
        dice, scene = self.dice, self.scene
        va, vcpu = dice.choice(self.vas), dice.choice(scene.vm.vcpus)
        how = {"write": dice.random() < 0.5, "user": dice.random() < 0.8}
        expected = scene.expected(va, **how)
        came: Outcome = scene.access(va, vcpu=vcpu, **how)
        if came.kind == OK:
            assert came.hpa == expected
        elif came.kind == EMULATED:
            assert expected is not None
            assert how["write"]
        else:
            assert came.kind in (GUEST_FAULT, MMIO)
            assert expected is None
        is_fine = expected is not None
        self.answers.append(("reached", expected) if is_fine else (came.kind, came.error_code))

    def change(self) -> None:
        """The guest writes an entry, and flushes by loading CR3, or goes to another process."""
        dice, scene = self.dice, self.scene
        if not self.levels:
            return
        table, va = dice.choice((*DIRECTORIES, *TABLES, *TABLES)), dice.choice(self.vas)
        index = self._index(table, va)
        old = scene.vm.read_guest(table + index * scene.size, scene.size) or 0
        scene.guest_put(table, index, self._changed(table, old))
        if dice.random() < 0.4:
            scene.cr3 = dice.choice(PDPTS if self.levels == 3 else DIRECTORIES)
        for vcpu in scene.vm.vcpus:
            assert run(set_cr3(vcpu, scene.cr3)) == "fine"

    def take(self) -> None:
        """The host takes something away. What it takes depends on the tables alone that every
        design has, so that stories stay the same."""
        choice, place, gfn = self.dice.random(), self.dice.random(), self.dice.randrange(16)
        vm = self.scene.vm
        if choice < 0.2:
            run(kvm_mmu_zap_all_fast(vm))
        elif choice < 0.6:
            pages = [sp.spt for sp in vm.sps.values() if not sp.is_invalid]
            if pages:
                run(zap_page(vm, pages[int(place * len(pages))]))
        else:
            run(kvm_unmap_gfn(vm, gfn))

    def play(self) -> None:
        """A random run, with the rules checked all along."""
        for step in range(STEPS):
            doing = self.dice.random()
            (self.access if doing < 0.6 else self.change if doing < 0.95 else self.take)()
            if step % 15 == 0:
                assert complaints(self.scene.vm) == []

    def end(self) -> None:
        """The vCPUs go, then everything: nothing is left."""
        vm = self.scene.vm
        for vcpu in vm.vcpus:
            run(destroy_vcpu(vcpu))
        run(kvm_mmu_zap_all_fast(vm))
        assert list(vm.pages.in_use) == [vm.address(vm.default_pdpte)] * bool(vm.default_pdpte)
        assert vm.counts["decrypted"] == vm.counts["encrypted"]
        assert not vm.plain
        assert not vm.leaves
        assert not vm.rmap


@pytest.mark.parametrize(
    ("design", "levels", "params"),
    CASES,
    ids=["-".join(map(str, (case[0], case[1], *case[2].values()))) for case in CASES],
)
def test_shadow_tables_give_what_the_guests_tables_give(
    design: str, levels: int, params: dict[str, object]
) -> None:
    for seed in range(2):
        story = Story(design, levels, params, seed)
        story.play()
        story.end()


@pytest.mark.parametrize("levels", [2, 3])
def test_designs_give_the_same_answers(levels: int) -> None:
    answers = []
    for design in DESIGNS:
        story = Story(design, levels, {}, 7)
        story.play()
        answers.append(story.answers)
    assert answers[0] == answers[1] == answers[2]
    kinds = [kind for kind, _ in answers[0]]
    assert min(kinds.count(kind) for kind in ("reached", GUEST_FAULT)) >= 5


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("normal", [3, 39, 43])
def test_memory_that_runs_out_loses_nothing(design: str, normal: int) -> None:
    scene = Scene(0, design=design, memory_map=small_map(low=3, normal=normal))
    scene.turn_on()
    kinds = {
        scene.access(gib << 30 | mib << 21 & 0x3FFF_FFFF).kind
        for gib in range(4)
        for mib in range(3)
    }
    assert complaints(scene.vm) == []
    # With 39 pages the RFC's default directory takes one, the cache for tables takes two low pages
    # with the rest, the root takes the last, and none is left to be kept ready.
    assert (NO_MEMORY in kinds) == (normal == 3 or (design == RFC and normal == 39))
    run(kvm_mmu_zap_all_fast(scene.vm))
    run(destroy_vcpu(scene.vcpu))
    assert scene.vm.pages.free == normal + 3 - (design == RFC)
