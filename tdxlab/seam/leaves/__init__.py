"""The module's functions, one Python function each, grouped by what they work on.

Every leaf has the same shape: read the registers, check in the module's order, yield once with all
locks held, and then the line `# -- effects: nothing below may fail`. It sets `call.status` only
where success has a shade.
"""
