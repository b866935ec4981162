"""What runs the model, on one rank or several.

model_runner.py   the samples of one rank, and what is done to them: the same object on every rank
sample.py         the state of one sample, and its steps
recorder.py       what a sample keeps for its rollout
pipeline.py       the text encoder and the VAE, which rank 0 alone has
executor.py       rank 0's operations: told to the other ranks, then done here
peers.py          the other ranks, seen from rank 0
messages.py       what they are told
worker.py         the process of another rank
"""
