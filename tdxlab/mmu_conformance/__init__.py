"""Replay of recorded traces of the real KVM MMU code (a host kernel's half of a TD's memory).

Reading order: `decode` (what a trace says), `record` (what the model does, folded as a trace folds
it), `rig` (a VM in the surroundings that the recorder had), `ops*` (one function for each operation
of a trace), `dump` (the page tables as a trace shows them), `run` (one trace, step by step).
"""
