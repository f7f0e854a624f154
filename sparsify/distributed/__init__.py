"""Several processes that run one model: which part of it is this one's, and whether all of them do the same."""
