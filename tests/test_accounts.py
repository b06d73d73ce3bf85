"""Occupancy of page tables while somebody is in the middle of a change."""

import tdxlab
from tdxlab.abi import leaves as abi
from tdxlab.abi.registers import Registers


def test_tables_do_not_count_an_entry_that_a_running_call_has_only_locked() -> None:
    machine = tdxlab.Machine(memory="1 GiB")
    td = machine.create_td(memory="4 MiB")
    td.touch(0x1000)
    assert td.tdr is not None
    free = machine.host.pages.alloc_page("test")
    before = machine.tables(td)["external"]
    call = machine.seamcall_steps(
        1, abi.TDH_MEM_PAGE_AUG, Registers(rcx=0x2000, rdx=td.tdr, r8=free)
    )
    next(call)
    assert machine.tables(td)["external"] == before
    for _ in call:
        pass
    after = machine.tables(td)["external"]
    assert after["4K"].entries == before["4K"].entries + 1
