"""Each SEAMCALL of a TD's life fails: what must come of it is written here by hand, from how Linux
6.16 answers each failure, and compared with every life of the campaign.
"""

import random

import pytest

from tdxlab import campaign
from tdxlab.abi.status import TDX_RND_NO_ENTROPY
from tdxlab.campaign import INTERRUPTED, WAYS, Campaign, play_all, table
from tdxlab.failures import ALLOC_PAGE, Failure
from tdxlab.kvm import tdx_hooks, tdx_teardown
from tdxlab.kvm.pages import HostPages
from tdxlab.lives import CRASHED, DEAD, GONE, LOOPS, UNFINALISED, USABLE, WHOLE_LIFE
from tdxlab.verdicts import (
    BUG,
    KVM_BUG_ON,
    NOTHING,
    TO_USER,
    WARN_ON,
    Row,
    Run,
    Verdict,
    as_ranges,
    rows,
)

ONCE, TWICE, FOR_EVER, FATAL = WAYS

# ---- what a whole life consists of ---------------------------------------------------------------

VCPUS, TDCX_EACH, TDCS = 2, 5, 6
#: Tables of the S-EPT below the root: one a level for GPA 0, one more at 2 MiB.
TABLES = {48: 4, 52: 5}
#: Private pages are removed one by one: by a conversion, a hole, a deleted slot (2), the end (4).
#: Number of the removal -> private pages that are mapped just before it.
MAPPED = {1: 5, 2: 5, 3: 5, 4: 4, 5: 4, 6: 3, 7: 2, 8: 1}
FIRST_AT_THE_END = 5
#: VP.FLUSH as vCPU 0 moves to another LP and back; then for each vCPU at the end.
FLUSHES_AT_THE_END = 3

Expected = tuple[str, str, dict[str, int], bool]


def everything(gpaw: int) -> dict[str, int]:
    """Pages of a TD that keeps its KeyID: no RECLAIM is even tried."""
    vcpu_pages = {"TDVPR": VCPUS, "TDCX": VCPUS * TDCX_EACH}
    return {"S-EPT page": TABLES[gpaw], "TDCS": TDCS, "TDR": 1, **vcpu_pages}


def in_order_of_reclaim(gpaw: int) -> list[str]:
    """What each RECLAIM of the end is about: vCPUs, tables, TDCS, and the TDR last of all."""
    vcpu = ["TDCX"] * TDCX_EACH + ["TDVPR"]
    return vcpu * VCPUS + ["S-EPT page"] * TABLES[gpaw] + ["TDCS"] * TDCS + ["TDR"]


def building(leaf: str, way: str) -> Expected:
    """Source: tdx.c, __tdx_td_init, tdx_td_vcpu_init, tdx_td_finalize: what is built is undone, or
    the VM is dead (KVM_BUG_ON); the unused pages are freed, the others reclaimed at the end.
    """
    if leaf in ("TDH.MNG.CREATE", "TDH.MNG.ADDCX", "TDH.MNG.INIT"):
        return GONE, WARN_ON, {}, False
    if leaf == "TDH.MNG.RD":  # a failed read yields 0, and nobody hears of it
        return USABLE, NOTHING, {}, False
    if leaf == "TDH.MEM.PAGE.ADD":  # the page stays premapped: KVM_TDX_FINALIZE_VM is refused
        return UNFINALISED, TO_USER, {}, False
    if leaf == "TDH.MR.EXTEND":  # -EIO to user space, which may finalize a TD that measures less
        return USABLE, TO_USER, {}, False
    if leaf == "TDH.MR.FINALIZE" and way in (ONCE, TWICE):  # -EBUSY: this VMM asks three times
        return USABLE, NOTHING, {}, False
    if leaf == "TDH.MR.FINALIZE" and way == FOR_EVER:
        return UNFINALISED, TO_USER, {}, False
    return DEAD, KVM_BUG_ON, {}, False


def faulting(leaf: str, way: str, n: int, gpaw: int) -> Expected:
    """Source: tdx.c, tdx_sept_link_private_spt, tdx_sept_set_private_spte: BUSY is -EBUSY, and the
    fault comes again; another status is KVM_BUG_ON, and the page is freed, for it was not given
    away. tdx_exit_handlers_fastpath: a BUSY entry is entered again; tdx_handle_exit: another status
    is an exit to user space.
    """
    if way in (ONCE, TWICE):
        return USABLE, NOTHING, {}, False
    if way == FOR_EVER:
        # Under KVM_TDX_INIT_MEM_REGION a signal is -EINTR; KVM_RUN just ends.
        is_image = leaf == "TDH.MEM.SEPT.ADD" and n <= TABLES[gpaw] - 1
        return LOOPS, TO_USER if is_image else NOTHING, {}, False
    if leaf == "TDH.VP.ENTER":
        return USABLE, TO_USER, {}, False
    return DEAD, KVM_BUG_ON, {}, False


def removing(leaf: str, way: str, n: int) -> Expected:
    """Source: tdx.c, tdx_sept_zap_private_spte, tdx_track, tdx_sept_drop_private_spte: BUSY is
    called again once; then the page keeps its reference, and as a child of it keeps the TDR.
    (A TRACK that failed makes REMOVE fail.) A page that only the WBINVD failed is no child any
    more. The last WBINVD is the TDR's own.
    """
    outcome = DEAD if n < FIRST_AT_THE_END else GONE
    if leaf == "TDH.PHYMEM.PAGE.WBINVD":
        count = {ONCE: 1, FATAL: 1, TWICE: 2}.get(way, 1 << 16)
        pages = min(count, MAPPED.get(n, 0))
        leaks = {"private page": pages} if pages else {}
        if pages < count and n + pages >= FIRST_AT_THE_END:
            leaks["TDR"] = 1
        return outcome, KVM_BUG_ON, leaks, False
    if way == ONCE:
        return (USABLE if outcome == DEAD else GONE), NOTHING, {}, False
    pages = MAPPED[n] if way == FOR_EVER else 1
    return outcome, KVM_BUG_ON, {"private page": pages, "TDR": 1}, False


def ending(leaf: str, way: str, n: int, gpaw: int) -> Expected:
    """Source: tdx.c, tdx_mmu_release_hkid: the KeyID is lost, and every control page with it.
    tdx_reclaim_page: the page is lost, and the TDR that has a child.
    """
    if leaf != "TDH.PHYMEM.PAGE.RECLAIM":
        is_early = leaf == "TDH.VP.FLUSH" and n < FLUSHES_AT_THE_END
        return DEAD if is_early else GONE, KVM_BUG_ON, everything(gpaw), True
    count = {ONCE: 1, FATAL: 1, TWICE: 2}.get(way, 1 << 16)
    failed = in_order_of_reclaim(gpaw)[n - 1 :][:count]
    leaks = {role: failed.count(role) for role in failed}
    return GONE, WARN_ON, leaks | {"TDR": 1}, False


FAULTING = {"TDH.MEM.SEPT.ADD", "TDH.MEM.PAGE.AUG", "TDH.VP.ENTER"}
REMOVING = {"TDH.MEM.RANGE.BLOCK", "TDH.MEM.TRACK", "TDH.MEM.PAGE.REMOVE", "TDH.PHYMEM.PAGE.WBINVD"}
ENDING = {"TDH.VP.FLUSH", "TDH.MNG.VPFLUSHDONE", "TDH.PHYMEM.CACHE.WB", "TDH.MNG.KEY.FREEID"}
ENDING |= {"TDH.PHYMEM.PAGE.RECLAIM"}
BUILDING = {"TDH.MNG.CREATE", "TDH.MNG.KEY.CONFIG", "TDH.MNG.ADDCX", "TDH.MNG.INIT", "TDH.MNG.RD"}
BUILDING |= {"TDH.VP.CREATE", "TDH.VP.ADDCX", "TDH.VP.INIT", "TDH.VP.WR"}
BUILDING |= {"TDH.MEM.PAGE.ADD", "TDH.MR.EXTEND", "TDH.MR.FINALIZE"}


def expected(run: Run) -> Expected:
    """(outcome, what KVM says, leaks, KeyID lost) of a systematic run."""
    failure, way = run.failures[0], run.way
    leaf, n = failure.target, failure.n
    if leaf in BUILDING:
        return building(leaf, way)
    if leaf in FAULTING:
        return faulting(leaf, way, n, run.gpaw)
    if leaf in REMOVING:
        return removing(leaf, way, n)
    return ending(leaf, way, n, run.gpaw)


def expect(found: Verdict) -> None:
    """A life came to what it should, and the books balance."""
    assert not found.broken, found
    assert found.struck, found
    came = (found.outcome, found.said, dict(found.leaks), found.keyid_lost)
    assert came == expected(found.run), found


# ---- the systematic part -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def at_48() -> Campaign:
    return Campaign(48)


@pytest.fixture(scope="module")
def whole(at_48: Campaign) -> list[Verdict]:
    """Every call x every way to fail, at GPAW 48."""
    return [at_48.play(run) for run in at_48.systematic()]


def test_play_leaks_what_linux_leaks_for_each_call_that_fails(whole: list[Verdict]) -> None:
    for found in whole:
        expect(found)


def test_census_has_every_leaf_of_the_expectations(at_48: Campaign) -> None:
    assert set(at_48.census()) == BUILDING | FAULTING | REMOVING | ENDING
    calls = at_48.census()
    assert calls["TDH.MEM.RANGE.BLOCK"] == len(MAPPED)
    assert calls["TDH.PHYMEM.PAGE.RECLAIM"] == len(in_order_of_reclaim(48))


def test_systematic_has_each_call_in_each_way(at_48: Campaign, whole: list[Verdict]) -> None:
    made = {(f.run.failures[0].target, f.run.failures[0].n, f.run.way) for f in whole}
    calls = at_48.census()
    wanted = {(leaf, n, way) for leaf in calls for n in range(1, calls[leaf] + 1) for way in WAYS}
    wanted |= {("TDH.PHYMEM.CACHE.WB", n, INTERRUPTED) for n in (1, 2)}
    assert made == wanted


def test_play_ends_what_kvm_does_for_ever(whole: list[Verdict]) -> None:
    """... and says in which call it would go on."""
    endless = {found.run.failures[0].target for found in whole if found.looped}
    assert endless == FAULTING
    assert all((found.outcome == LOOPS) == bool(found.looped) for found in whole)


def test_play_leaks_the_same_at_gpaw_52() -> None:
    """A sample, with each leaf in it."""
    wide = Campaign(52)
    runs = list(wide.systematic())
    choose = random.Random(52)
    chosen = choose.sample(runs, 40)
    chosen += [next(r for r in runs if r.failures[0].target == leaf) for leaf in wide.census()]
    for run in chosen:
        expect(wide.play(run))


def test_play_leaves_the_machine_as_it_was(at_48: Campaign) -> None:
    before = at_48.machine.digest()
    found = at_48.play(Run(48, (Failure("TDH.MNG.KEY.FREEID", 1, campaign.FATAL),), FATAL))
    assert found.keyid_lost
    assert at_48.machine.digest() == before
    assert not at_48.machine.journal.recording


def test_systematic_refuses_a_leaf_that_is_not_called(at_48: Campaign) -> None:
    with pytest.raises(ValueError, match=r"TDH\.MEM\.RD.*TDH\.MNG\.CREATE"):
        list(at_48.systematic(["TDH.MEM.RD"]))


# ---- random lives --------------------------------------------------------------------------------


@pytest.mark.parametrize(("gpaw", "seed"), [(48, 1), (52, 2)])
def test_random_lives_balance(gpaw: int, seed: int) -> None:
    print(f"seed {seed}")
    found = play_all(gpaw, seed=seed, runs=60, leaves=["TDH.MNG.RD"])
    lives = [one for one in found if one.run.seed is not None]
    assert not [one for one in found if one.broken]
    assert len(lives) == 60
    assert {USABLE, DEAD, GONE} <= {one.outcome for one in lives if one.struck}


def test_random_life_is_the_same_again(at_48: Campaign) -> None:
    first, again = at_48.random_life(3, 14), at_48.random_life(3, 14)
    assert at_48.play(*first) == at_48.play(*again)
    assert at_48.random_life(3, 15)[0] != first[0]
    assert play_all(48, seed=3, only=14) == [at_48.play(*first)]


def test_play_all_refuses_a_number_below_0() -> None:
    with pytest.raises(ValueError, match="choose 0 or more"):
        play_all(48, runs=-1)


# ---- failures that are no SEAMCALL's status ------------------------------------------------------


def one(at_48: Campaign, *failures: Failure) -> Verdict:
    found = at_48.play(Run(48, failures))
    assert not found.broken, found
    return found


def test_play_crashes_the_host_without_memory_for_roots(at_48: Campaign) -> None:
    """Linux 6.16 ignores what kvm_mmu_reload returns before it adds the first page."""
    found = one(at_48, Failure(ALLOC_PAGE, n=40, times=2, step=60))
    assert (found.outcome, found.said, found.deed) == (CRASHED, BUG, "image")


def test_play_goes_without_a_td_where_no_page_can_be_had(at_48: Campaign) -> None:
    found = one(at_48, Failure(ALLOC_PAGE, times=None))
    assert (found.outcome, found.said, found.leaks) == (GONE, TO_USER, ())


def test_play_loses_a_page_that_a_hook_did_not_remove(at_48: Campaign) -> None:
    found = one(at_48, Failure("remove_external_spte", n=1, answer=-5))
    assert (found.outcome, found.said) == (DEAD, KVM_BUG_ON)
    assert found.leaks == (("TDR", 1), ("private page", 1))


def test_play_asks_ten_times_for_entropy(at_48: Campaign) -> None:
    nine = Failure("TDH.MNG.CREATE", answer=TDX_RND_NO_ENTROPY, times=9)
    assert one(at_48, nine).outcome == USABLE
    assert one(at_48, nine._replace(times=10)).outcome == GONE


def test_play_reclaims_at_the_end_what_a_failed_creation_left(at_48: Campaign) -> None:
    """The TDR of a TD that could not be built stays with the VM, which tries again."""
    reclaim = Failure("TDH.PHYMEM.PAGE.RECLAIM", n=1, answer=campaign.BUSY)
    no_init = Failure("TDH.MNG.ADDCX", n=1, answer=campaign.FATAL)
    found = one(at_48, no_init, reclaim)
    assert (found.struck, found.outcome, found.leaks) == (2, GONE, ())
    flush = Failure("TDH.PHYMEM.PAGE.WBINVD", n=1, answer=campaign.FATAL)
    assert one(at_48, no_init, flush).leaks == (("TDR", 1),)


def test_play_loses_the_tdr_that_a_second_creation_overwrites(at_48: Campaign) -> None:
    no_init = Failure("TDH.MNG.ADDCX", n=1, answer=campaign.FATAL)
    reclaim = Failure("TDH.PHYMEM.PAGE.RECLAIM", n=1, answer=campaign.BUSY)
    found = at_48.play(Run(48, (no_init, reclaim)), (WHOLE_LIFE[0], *WHOLE_LIFE))
    assert not found.broken
    assert (found.struck, found.outcome, found.leaks) == (2, USABLE, (("TDR", 1),))


# ---- the books notice ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leaf", "owner", "name", "says"),
    [
        ("TDH.PHYMEM.PAGE.RECLAIM", HostPages, "leak", "nobody has it"),
        ("TDH.MEM.RANGE.BLOCK", tdx_hooks, "leak_page", "nobody has it"),
        ("TDH.MNG.KEY.FREEID", tdx_teardown, "leak_control_pages", "nobody has it"),
    ],
)
def test_play_says_that_a_page_is_lost_without_a_word(
    at_48: Campaign,
    monkeypatch: pytest.MonkeyPatch,
    leaf: str,
    owner: object,
    name: str,
    says: str,
) -> None:
    monkeypatch.setattr(owner, name, lambda *_: None)
    found = at_48.play(Run(48, (Failure(leaf, 1, campaign.FATAL),), FATAL))
    assert says in found.broken


def test_play_says_that_a_page_of_the_module_is_free(
    at_48: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostPages, "leak", lambda pages, hpa, why: pages.free_page(hpa))
    found = at_48.play(Run(48, (Failure("TDH.PHYMEM.PAGE.RECLAIM", 1, campaign.FATAL),), FATAL))
    assert "free for the host" in found.broken


# ---- tables --------------------------------------------------------------------------------------


def test_rows_put_ways_and_calls_together(whole: list[Verdict]) -> None:
    found = rows(whole)
    assert sum(row.runs for row in found) == len(whole)
    assert [row for row in found if row.leaf == "TDH.MEM.PAGE.ADD"] == [
        Row("TDH.MEM.PAGE.ADD", tuple(WAYS), "1", 4, UNFINALISED, TO_USER, (), False)
    ]
    removed = [row for row in found if row.leaf == "TDH.MEM.PAGE.REMOVE"]
    assert [(row.ways, row.calls, row.leaked) for row in removed] == [
        ((ONCE,), "1-4", "none"),
        ((ONCE,), "5-8", "none"),
        ((TWICE, FATAL), "1-4", "TDR x 1, private page x 1"),
        ((TWICE, FATAL), "5-8", "TDR x 1, private page x 1"),
        ((FOR_EVER,), "1-4", "TDR x 1, private page x 4-5"),
        ((FOR_EVER,), "5-8", "TDR x 1, private page x 1-4"),
    ]


def test_table_is_of_the_leaves_that_are_asked_for() -> None:
    assert [row.leaf for row in table(48, ["TDH.MNG.INIT"])] == ["TDH.MNG.INIT"]


@pytest.mark.parametrize(
    ("numbers", "text"), [([1], "1"), ([1, 2, 3, 7], "1-3, 7"), ([2, 4, 5], "2, 4-5"), ([], "")]
)
def test_as_ranges_joins_neighbours(numbers: list[int], text: str) -> None:
    assert as_ranges(numbers) == text


def test_whole_life_without_a_failure_is_usable_and_leaks_nothing(at_48: Campaign) -> None:
    found = one(at_48)
    assert (found.outcome, found.said, found.leaks) == (USABLE, NOTHING, ())
    assert found.deeds == tuple(deed.name for deed in WHOLE_LIFE)
