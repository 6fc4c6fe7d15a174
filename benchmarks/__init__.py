"""Timings of the ops and of whole training steps. Run them with `make bench`."""
