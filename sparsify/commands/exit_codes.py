"""What the `sparsify` command returns to the shell."""

DONE = 0
DIFFERS = 1  # eager and compiled differ, the graph was left untouched after a failure, `doctor` found what fails, a variant of `bench` did
FAILED = 2  # wrong usage, configuration or model
INTERRUPTED = 130  # as shells count it: 128 and the signal's number
