"""Schedules, transitions and noise, as pure functions without state that need torch only.

`schedule` makes the sigma grid, `dynamics` turns it into one `Transition` per step (by `flow_sde`, `cps` or the plain `ode`),
`transition` applies a step and computes its log-prob, `noise` determines every random number by (seed, step).
"""
