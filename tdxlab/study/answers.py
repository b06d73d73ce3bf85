"""What comes back from a SEAMCALL, in words: the status decoded, registers, and what it changed."""

from __future__ import annotations

from dataclasses import dataclass

from tdxlab.abi.outcome import IN_GUEST
from tdxlab.abi.registers import REGISTER_NAMES
from tdxlab.abi.status import describe, is_error, operand_name, status_name
from tdxlab.study.books import Change
from tdxlab.tape import Action


class Answer:
    """What came back from one action, decoded.

    kind: "done", "warning" (RAX is not zero, bit 63 is not set), "refused", "in the guest" or
    "left" (an interrupt took the guest out). name: of the status. operand: that it blames, "" if
    none. text: status, operand and meaning in words.
    """

    def __init__(self, action: Action) -> None:
        status = action.status
        if action.kind != "SEAMCALL" or status is None:
            self.kind, self.name, self.operand = "left", "TD exit", ""
            self.text = "the guest leaves, TDH.VP.ENTER returns to the host"
        elif status == IN_GUEST:
            self.kind, self.name, self.operand = "in the guest", "running", ""
            self.text = f"no answer yet: the guest runs on LP {action.lp}"
        else:
            self.kind = "refused" if is_error(status) else "warning" if status else "done"
            self.name, self.operand = status_name(status), operand_name(status) or ""
            self.text = describe(status) if status else self.name


@dataclass(frozen=True, repr=False)
class Reply:
    """One action with its answer and what it changed; prints itself."""

    action: Action
    answer: Answer
    changes: list[Change]

    @property
    def status(self) -> str:
        """The name of the status."""
        return self.answer.name

    @property
    def registers(self) -> dict[str, int]:
        """Registers that the SEAMCALL left with another value than they went in with."""
        if self.action.kind != "SEAMCALL":
            return {}
        given = {name: self.action.inputs.get(name, 0) for name in REGISTER_NAMES}
        return {name: v for name, v in self.action.outputs.items() if v != given[name]}

    def __repr__(self) -> str:
        given = " ".join(f"{k.upper()}={v:#x}" for k, v in self.action.inputs.items() if k != "rax")
        lines = [f"{self.action.name} on LP {self.action.lp}  {given}".rstrip()]
        status = self.action.status
        raw = f" (RAX={status:#018x})" if self.answer.kind in ("refused", "warning") else ""
        lines.append(f"  {self.answer.kind}{raw}: {self.answer.text}")
        written = " ".join(f"{k.upper()}={v:#x}" for k, v in self.registers.items())
        if written:
            lines.append(f"  registers now: {written}")
        return "\n".join(lines + [f"  {change_text(change)}" for change in self.changes])


def change_text(change: Change) -> str:
    """A changed line as text: `PAMT 0x100000000: PT_NDA -> PT_TDR`."""
    line = change.line
    return f"{line.book} {line.what}: {change.before} -> {change.after}"
