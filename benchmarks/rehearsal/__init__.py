"""Runs the real code at real width on a CUDA device that is not there, and counts what a GPU would have to do.

`device` makes the device, `meter` watches and counts every operation, `models` has the architectures, `ranks` the other ranks,
`run` takes an engine through its life, `flops` says what a forward must cost, `tables` writes what came out.
"""
