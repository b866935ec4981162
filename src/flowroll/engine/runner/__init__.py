"""Runs the model, on one rank or several.

model_runner.py   holds the samples of one rank and runs their steps; every rank has the same object
sample.py         the state of one sample, and its steps
recorder.py       keeps the tensors that a sample's rollout returns
streams.py        the streams of the device, and the order among them
pipeline.py       the text encoder and the VAE, which only rank 0 has
executor.py       rank 0's operations: each is sent to the other ranks, then run here
peers.py          how rank 0 reaches the other ranks: if there are none, by doing nothing
rank_group.py     the same for several ranks: starts, watches and ends their processes
messages.py       the messages from rank 0 to the other ranks
changes.py        those that change the weights: what every rank prepares, then puts into effect
shapes.py         the tensors of a message without their data
worker.py         the process of a rank other than 0
"""
