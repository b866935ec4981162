"""The parts of the soak test: what is asked, how clients behave, what is watched, what is promised, what is written down."""
