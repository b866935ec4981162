"""The parity harness: one prompt and its seeds through several layouts, each in processes of its own, against one rank.

    plan (what to run; every value is checked here) -> run (one child per layout) -> child (an Engine; rollouts to files)
    -> compare (two rollouts, tensor by tensor) -> results -> report (Markdown, JSON)

What counts as the same is `torch.equal`; the other figures tell how far off a tensor is that is not.
"""
