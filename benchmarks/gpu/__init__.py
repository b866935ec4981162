"""The first minutes on a GPU: what is certified there, what the promises are worth there, and how fast it is."""
