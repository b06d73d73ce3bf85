"""The rules notice what is broken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from shadow_scene import RWU, Scene

from tdxlab.bits import MASK64
from tdxlab.kvm.pae_rules import complaints, quadrants, roots_held
from tdxlab.kvm.role import Role
from tdxlab.kvm.shadow_params import AMD, REVIEWED, SPECIAL, ShadowRole
from tdxlab.kvm.shadow_roots import kvm_mmu_free_roots
from tdxlab.kvm.shadow_vm import Root, ShadowPage
from tdxlab.steps import run


def mapped(design: str) -> Scene:
    scene = Scene(2, design=design, vendor=AMD, c_bit=45)
    scene.put(0x1000, 0, 0x2000 | RWU)
    scene.put(0x2000, 0, 0x5000 | RWU)
    scene.turn_on()
    scene.access(0)
    assert complaints(scene.vm) == []
    return scene


def page(scene: Scene, level: int) -> ShadowPage:
    return next(sp for sp in scene.vm.sps.values() if sp.level == level)


def change(scene: Scene, level: int, **changes: object) -> None:
    scene.vm.update_sp(page(scene, level), **changes)


def roled(scene: Scene, level: int, **bits: int) -> None:
    change(scene, level, role=int(ShadowRole(page(scene, level).role).with_(**bits)))


def keep_special(scene: Scene) -> None:
    scene.vcpu.prev_roots = (Root(scene.vcpu.pae_root, 0), *scene.vcpu.prev_roots[1:])


def leave_a_slot(scene: Scene) -> None:
    run(kvm_mmu_free_roots(scene.vcpu))
    scene.vm.write(scene.vcpu.pae_root, 1)


def root_above_4g(scene: Scene) -> None:
    scene.vcpu.root = Root(0x1_4000_8000, 0)


def entry_512(scene: Scene) -> None:
    scene.vm.write(page(scene, 3).spt + 8 * 100, 0x801)


BREAKS: list[tuple[str, Callable[[Scene], object], str]] = [
    (SPECIAL, lambda s: change(s, 2, root_count=0), "root_count 0, held 1 times"),
    (SPECIAL, lambda s: change(s, 1, parents=()), "parents and the entries"),
    (SPECIAL, lambda s: s.vm.leaves.clear(), "leaves and rmap differ"),
    (SPECIAL, lambda s: s.vm.write(page(s, 1).spt + 80, 0), "links nothing and holds 0x0"),
    (SPECIAL, lambda s: s.vm.write(s.vcpu.pae_root, MASK64), "the CPU refuses slot 0"),
    (SPECIAL, leave_a_slot, "no root, and slots that are not empty"),
    (SPECIAL, keep_special, "keeps a root without a header"),
    (SPECIAL, root_above_4g, "the root lies above 4 GiB"),
    (SPECIAL, lambda s: s.vm.pages.alloc_page("x"), "pages that are out"),
    (SPECIAL, lambda s: s.vm.plain.put(0x1_4000_1000, True), "by mistake"),
    (SPECIAL, lambda s: roled(s, 1, direct=1), "direct, and entries of 4 bytes"),
    (REVIEWED, lambda s: roled(s, 1, quadrant=1, has_4_byte_gpte=0), "a quadrant, and no"),
    (REVIEWED, lambda s: roled(s, 2, pae_root=1), "called a PAE root, at level 2"),
    (REVIEWED, entry_512, "more than four entries"),
    (REVIEWED, lambda s: s.vm.write(page(s, 3).spt + 8, MASK64 - 0x801), "links nothing and holds"),
]


@pytest.mark.parametrize(("design", "damage", "says"), BREAKS, ids=[says for *_, says in BREAKS])
def test_complaints_names_what_is_broken(
    design: str, damage: Callable[[Scene], object], says: str
) -> None:
    scene = mapped(design)
    damage(scene)
    assert any(says in text for text in complaints(scene.vm)), complaints(scene.vm)


def test_roots_held_are_the_directories_of_a_special_root_and_the_root_itself_of_another() -> None:
    assert len(roots_held(mapped(SPECIAL).vcpu)) == 4
    scene = mapped(REVIEWED)
    assert roots_held(scene.vcpu) == [scene.vcpu.root.hpa]


def test_quadrants_lists_tables_of_small_entries_only() -> None:
    scene = mapped(REVIEWED)
    assert quadrants(scene.vm) == [(1, 2, 0), (2, 1, 0)]
    assert Role(page(scene, 3).role).quadrant == 0
