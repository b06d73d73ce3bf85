"""CR3 switches, kept roots, control registers: what each design builds anew."""

from __future__ import annotations

import pytest
from shadow_scene import RWU, Scene, small_map

from tdxlab.hardware import Region
from tdxlab.kvm.pae_pdpte import X86_CR0_PG, X86_CR0_WP, X86_CR4_PAE, X86_CR4_PGE, X86_CR4_PSE
from tdxlab.kvm.pae_rules import complaints
from tdxlab.kvm.shadow import kvm_mmu_zap_all_fast
from tdxlab.kvm.shadow_params import DESIGNS, REVIEWED, RFC, SPECIAL, ShadowParams
from tdxlab.kvm.shadow_run import GUEST_FAULT, OK, set_cr0, set_cr3, set_cr4
from tdxlab.kvm.shadow_vm import MMU_SYNC, NO_ROOT, TLB_FLUSH
from tdxlab.steps import run

ALL = pytest.mark.parametrize("design", DESIGNS)


def processes(design: str, count: int, levels: int = 2, vcpus: int = 1) -> Scene:
    """A guest with so many processes; the first page of each is another one."""
    scene = Scene(levels, design=design, vcpus=vcpus, cr3=cr3_of(0))
    for number in range(count):
        top, directory, table = cr3_of(number), 0x20000 + 0x2000 * number, 0x21000 + 0x2000 * number
        if levels == 3:
            scene.put(top, 0, directory | 1)
            scene.put(directory, 0, table | RWU)
        else:
            scene.put(top, 0, table | RWU)
        scene.put(table, 0, 0x50000 + 0x1000 * number | RWU)
    scene.turn_on()
    return scene


def cr3_of(number: int) -> int:
    return 0x10000 + 0x1000 * number


def switch(scene: Scene, number: int) -> None:
    """Run a process: its own page is what its address 0 leads to."""
    assert run(set_cr3(scene.vcpu, cr3_of(number))) == "fine"
    assert scene.access(0).hpa == scene.vm.map.guest.base + 0x50000 + 0x1000 * number


def built_per_round(design: str, count: int, levels: int = 2) -> int:
    """Roots built in one round over all processes, after two rounds of warming up."""
    scene = processes(design, count, levels)
    for _ in range(2):
        for number in range(count):
            switch(scene, number)
    before = scene.vm.counts["roots_built"]
    for number in range(count):
        switch(scene, number)
    assert complaints(scene.vm) == []
    return scene.vm.counts["roots_built"] - before


@pytest.mark.parametrize(("count", "kept"), [(1, 0), (2, 0), (4, 0), (5, 5), (6, 6)])
def test_new_pgd_keeps_three_roots_with_headers_and_no_special_one(count: int, kept: int) -> None:
    assert built_per_round(SPECIAL, count) == (count if count > 1 else 0)
    assert built_per_round(RFC, count) == built_per_round(REVIEWED, count) == kept


def test_new_pgd_finds_no_kept_root_for_a_pae_guest() -> None:
    for design in DESIGNS:
        assert built_per_round(design, 3, levels=3) == 3


@ALL
def test_set_cr3_of_the_same_value_keeps_the_root(design: str) -> None:
    scene = processes(design, 1)
    switch(scene, 0)
    root = scene.vcpu.root
    switch(scene, 0)
    assert scene.vcpu.root == root
    assert scene.vm.counts["roots_built"] == 1


@ALL
def test_directories_of_a_special_root_are_found_again_and_not_built(design: str) -> None:
    scene = processes(design, 2)
    for number in (0, 1, 0, 1):
        switch(scene, number)
    created = scene.vm.counts["sp_created"]
    switch(scene, 0)
    assert scene.vm.counts["sp_created"] == created


@ALL
def test_a_pdpte_takes_effect_when_cr3_is_loaded_and_not_before(design: str) -> None:
    scene = processes(design, 2, levels=3)
    switch(scene, 0)
    scene.guest_put(cr3_of(0), 0, 0)
    assert scene.access(0).kind == OK
    assert run(set_cr3(scene.vcpu, cr3_of(0))) == "fine"
    assert scene.access(0).kind == GUEST_FAULT
    assert complaints(scene.vm) == []


@ALL
def test_is_root_usable_tells_a_kept_root_of_other_pdptes_apart(design: str) -> None:
    scene = processes(design, 1, levels=3)
    scene.put(cr3_of(1), 0, 0x20001)
    switch(scene, 0)
    assert run(set_cr3(scene.vcpu, cr3_of(1))) == "fine"
    assert scene.access(0).kind == OK
    scene.put(cr3_of(0), 0, 0)
    assert run(set_cr3(scene.vcpu, cr3_of(0))) == "fine"
    assert scene.access(0).kind == GUEST_FAULT


def test_set_cr3_refuses_more_than_32_bits() -> None:
    with pytest.raises(ValueError, match="more than 32 bits"):
        run(set_cr3(processes(RFC, 1).vcpu, 1 << 32))


def test_a_special_root_is_never_kept() -> None:
    scene = processes(SPECIAL, 3)
    for number in (0, 1, 2, 0):
        switch(scene, number)
        assert set(scene.vcpu.prev_roots) == {NO_ROOT}


@ALL
def test_set_cr0_and_cr4_change_the_paging_mode(design: str) -> None:
    scene = processes(design, 1)
    vcpu = scene.vcpu
    switch(scene, 0)
    assert run(set_cr0(vcpu, X86_CR0_WP)) == "fine"
    assert scene.access(0x7123).hpa == scene.vm.map.guest.base + 0x7123
    scene.put(cr3_of(0), 0, 0x20001)
    scene.vm.write_guest(cr3_of(0), 0x20001, 8)
    scene.vm.write_guest(0x20000, 0x21007, 8)
    scene.vm.write_guest(0x21000, 0x60007, 8)
    assert run(set_cr4(vcpu, X86_CR4_PAE)) == "fine"
    assert run(set_cr0(vcpu, X86_CR0_WP | X86_CR0_PG)) == "fine"
    assert vcpu.pdptrs == (0x20001, 0, 0, 0)
    assert scene.access(0).hpa == scene.vm.map.guest.base + 0x60000
    assert complaints(scene.vm) == []


@ALL
def test_set_cr4_gives_the_root_up_when_pae_is_turned_off(design: str) -> None:
    scene = processes(design, 1, levels=3)
    switch(scene, 0)
    assert run(set_cr4(scene.vcpu, X86_CR4_PSE)) == "fine"
    assert scene.vcpu.root == NO_ROOT
    scene.vm.write_guest(cr3_of(0), 0x21000 | RWU, 4)
    scene.vm.write_guest(0x21000, 0x61000 | RWU, 4)
    assert scene.access(0).hpa == scene.vm.map.guest.base + 0x61000


@pytest.mark.parametrize("write", [set_cr0, set_cr4])
def test_turning_pae_paging_on_with_a_bad_table_is_gp(write: object) -> None:
    scene = Scene(3, cr3=0x9020)
    scene.put(0x9020, 1, 0x2003)
    vcpu = scene.vcpu
    assert run(set_cr3(vcpu, 0x9020)) == "fine"
    if write is set_cr0:
        run(set_cr4(vcpu, X86_CR4_PAE))
        assert run(set_cr0(vcpu, X86_CR0_WP | X86_CR0_PG)) == "#GP"
    else:
        run(set_cr0(vcpu, X86_CR0_WP | X86_CR0_PG))
        assert run(set_cr4(vcpu, X86_CR4_PAE)) == "#GP"
    assert vcpu.guest_level != 3


@pytest.mark.parametrize(("bit", "reads"), [(X86_CR4_PGE, True), (1 << 9, False)])
def test_set_cr4_reads_the_pdptes_anew_for_some_bits_only(bit: int, reads: bool) -> None:
    scene = processes(SPECIAL, 1, levels=3)
    scene.put(cr3_of(0), 3, 0x22001)
    assert run(set_cr4(scene.vcpu, scene.vcpu.cr4 | bit)) == "fine"
    assert (scene.vcpu.pdptrs[3] == 0x22001) == reads


@ALL
def test_set_cr4_keeps_the_roots_and_syncs_when_pge_changes(design: str) -> None:
    scene = processes(design, 2)
    for number in (0, 1, 0):
        switch(scene, number)
    roots = (scene.vcpu.root, scene.vcpu.prev_roots)
    assert scene.guest_put(0x21000, 0, 0x61000 | RWU) == "direct"
    assert scene.access(0).hpa == scene.vm.map.guest.base + 0x50000
    assert run(set_cr4(scene.vcpu, scene.vcpu.cr4 | X86_CR4_PGE)) == "fine"
    assert scene.vcpu.requests == {MMU_SYNC, TLB_FLUSH}
    assert scene.access(0).hpa == scene.vm.map.guest.base + 0x61000
    assert (scene.vcpu.root, scene.vcpu.prev_roots) == roots


@pytest.mark.parametrize("bit", [4, 12, 20, 21, 22])
def test_set_cr4_gives_all_roots_up_for_a_bit_of_the_mmus_role(bit: int) -> None:
    scene = processes(RFC, 2)
    for number in (0, 1, 0):
        switch(scene, number)
    assert run(set_cr4(scene.vcpu, scene.vcpu.cr4 ^ 1 << bit)) == "fine"
    assert {scene.vcpu.root, *scene.vcpu.prev_roots} == {NO_ROOT}


@ALL
def test_kept_roots_go_when_everything_is_zapped(design: str) -> None:
    scene = processes(design, 3)
    for number in range(3):
        switch(scene, number)
    run(kvm_mmu_zap_all_fast(scene.vm))
    for number in range(3):
        switch(scene, number)
    assert complaints(scene.vm) == []
    assert not any(sp.is_invalid for sp in scene.vm.sps.values())


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"maxphyaddr": 53}, "choose 36 to 52"),
        ({"design": "best"}, "choose from special root"),
        ({"c_bit": 46, "vendor": "AMD"}, "choose 34 to 45"),
        ({"c_bit": 45}, "AMD's"),
        ({"use": "nested NPT"}, "AMD's"),
        ({"use": "nested NPT", "vendor": "AMD", "design": "RFC"}, "no PAE root to NPT"),
        ({"use": "NPT of a 32-bit host", "vendor": "AMD", "c_bit": 45}, "no SME"),
        ({"forget": frozenset({"lunch"})}, "no step 'lunch'"),
        ({"tdp_level": 3, "use": "nested NPT", "vendor": "AMD"}, "choose from 4, 5"),
    ],
)
def test_shadow_params_refuse_what_does_not_exist(params: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ShadowParams(**params)  # type: ignore[arg-type]


def test_shadow_vm_refuses_memory_that_the_cpu_cannot_address() -> None:
    assert Scene(2, vendor="AMD", maxphyaddr=36, c_bit=34).vm.params.me_value == 1 << 34
    far = small_map()._replace(normal=(Region(1 << 34, 0x1000),))
    with pytest.raises(ValueError, match="beyond 34 address bits"):
        Scene(2, vendor="AMD", maxphyaddr=36, c_bit=34, memory_map=far)


def test_pse_is_part_of_every_mode_but_pae() -> None:
    scene = processes(SPECIAL, 1)
    assert scene.vcpu.cr4 == X86_CR4_PSE
    assert scene.vcpu.has_pse
