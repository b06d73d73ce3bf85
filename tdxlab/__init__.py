"""tdxlab: how confidential VMs (Intel TDX, Linux KVM) manage memory, as a model to play with.

import tdxlab
machine = tdxlab.Machine(gpaw=48, memory="4 GiB")
td = machine.create_td(vcpus=2, memory="64 MiB")
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tdxlab.machine import Machine

__version__ = "0.1.0"
__all__ = ["Machine", "__version__"]


def __getattr__(name: str) -> object:
    """`Machine` comes with its first use: whoever needs less pays for less."""
    if name == "Machine":
        from tdxlab.machine import Machine

        return Machine
    raise AttributeError(f"module 'tdxlab' has no attribute {name!r}")
