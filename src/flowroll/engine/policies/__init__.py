"""Named sets of weights beside those that the engine was last given: old policies and moving averages of policies."""
