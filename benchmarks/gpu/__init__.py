"""`make gpu`: every check that needs a GPU, and its report. `--device cpu` runs what a CPU can run of it."""
