"""The TDX module: registers in, registers out, and a life of its own in between.

Reading order: `rules` (which leaf is legal in which state, data only), `pamt` and `sept` (who owns
a page, where a guest address leads), `keys`, `epochs` and `td` (KeyIDs, TLB tracking, one TD),
`measure` (MRTD, RTMRs), `checks` (one refusal each), `leaves/` (one function per leaf), `module`
(the dispatcher).

The host never imports this package: it reaches the module through SEAMCALL alone.
"""
