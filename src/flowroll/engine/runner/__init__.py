"""Runs the model, on one rank or several.

model_runner.py   holds the samples of one rank and runs their steps; every rank has the same object
sample.py         the state of one sample, and its steps
recorder.py       keeps the tensors that a sample's rollout returns
streams.py        the streams of the device, and the order among them
pipeline.py       the text encoder and the VAE, which only rank 0 has
executor.py       rank 0's operations: each is sent to the other ranks, then run here
peers.py          the interface through which rank 0 reaches the other ranks
rank_group.py     that interface for several ranks: starts, watches and ends their processes
rank_watch.py     notices when another rank ends or falls silent
messages.py       the messages from rank 0 to the other ranks
worker.py         the process of a rank other than 0
"""
