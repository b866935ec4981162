"""A small world to train on: one coloured shape at one place, its prompt, its picture, and a reward for a picture of it."""
