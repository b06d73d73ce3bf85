"""The host's memory management, which knows the module's interface and nothing behind it.

`external.py` settles how an MMU that keeps a mirror of a page table it may not write pushes its
changes to whoever may.
"""
