"""What the `sparsify` command returns to the shell."""

DONE = 0
DIFFERS = 1  # eager and compiled differ, the graph was left untouched after a failure, or `doctor` found what fails
FAILED = 2  # wrong usage, configuration or model
