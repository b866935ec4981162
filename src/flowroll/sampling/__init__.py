"""Schedules, transitions and noise: torch only, pure functions, no state.

`schedule` makes the sigma grid, `dynamics` turns it into one `Transition` per step (by `flow_sde`, `cps` or the plain `ode`),
`transition` applies and scores a step, `noise` addresses every random number by (seed, step).
"""
