"""tdxlab: how confidential VMs (Intel TDX, Linux KVM) manage memory, as a model to play with."""

__version__ = "0.1.0"
