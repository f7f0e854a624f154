"""One feed-forward block over a prompt's rows, by the share of rows that skip it, beside Inductor's dense block."""
def run(options, shape, rate):
    raise NotImplementedError
