"""Parallel layouts against one rank: the same request through one engine per layout, every tensor compared.

    plan (every value is checked before a rank is started) -> run (an engine per layout) -> compare -> report

What counts as the same is `torch.equal`; the other figures tell how far off a tensor is that is not.
"""
