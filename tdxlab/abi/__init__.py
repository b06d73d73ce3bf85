"""What the host and the TDX module share: the language of SEAMCALL and TDCALL.

registers    the general registers that carry operands and results
leaves       the functions, by number and by name, with their operands
status       the completion status that comes back in RAX

Host code and module code both import this package and never each other; it knows neither of them.
Everything here is data or pure functions of a register value.
"""
