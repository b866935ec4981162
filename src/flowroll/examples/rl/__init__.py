"""What the training examples share: the loop over HTTP, what is written down of it, and ways to spoil it on purpose."""
